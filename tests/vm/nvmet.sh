# The kernel's own target in the guest, with the operations that scenarios want of a target.
# Namespace 1 is a RAM disk, further ones are files on tmpfs.

NVMET=/sys/kernel/config/nvmet
ADDRESS_1=${ADDRESS_1:-10.77.0.2}
ADDRESS_2=${ADDRESS_2:-10.77.1.2}
PORT_1=4420
PORT_2=4420

# listen ID ADDRESS
nvmet_listen() {
    local port=$NVMET/ports/$1
    mkdir -p "$port"
    echo ipv4 >"$port/addr_adrfam"
    echo tcp >"$port/addr_trtype"
    echo "$2" >"$port/addr_traddr"
    echo "$3" >"$port/addr_trsvcid"
    mkdir -p "$port/ana_groups/2"
    echo optimized >"$port/ana_groups/2/ana_state"
    ln -s "$NVMET/subsystems/$SUBNQN" "$port/subsystems/$SUBNQN"
}

nvmet_namespace() {
    local namespace=$NVMET/subsystems/$SUBNQN/namespaces/$1
    mkdir "$namespace"
    echo "$2" >"$namespace/device_path"
    echo "5c1c5e6e-26f1-4c0a-9d44-0f3ad17b3d0$1" >"$namespace/device_uuid"
    echo 1 >"$namespace/enable"
}

target_start() {
    modprobe nvmet-tcp
    modprobe brd rd_nr=1 rd_size=$((64 * 1024))
    mkdir "$NVMET/subsystems/$SUBNQN"
    echo 1 >"$NVMET/subsystems/$SUBNQN/attr_allow_any_host"
    truncate -s 32M /tmp/namespace-2
    nvmet_namespace 1 /dev/ram0
    nvmet_namespace 2 /tmp/namespace-2
    nvmet_listen 1 "$ADDRESS_1" $PORT_1
    nvmet_listen 2 "$ADDRESS_2" $PORT_2
}

# target_stop, target_again: as if its process ended and came back.
target_stop() {
    rm "$NVMET/ports/1/subsystems/$SUBNQN" "$NVMET/ports/2/subsystems/$SUBNQN"
}

target_again() {
    ln -s "$NVMET/subsystems/$SUBNQN" "$NVMET/ports/1/subsystems/$SUBNQN"
    ln -s "$NVMET/subsystems/$SUBNQN" "$NVMET/ports/2/subsystems/$SUBNQN"
}

# target_add NSID MIB
target_add() {
    truncate -s "$2M" "/tmp/namespace-$1"
    nvmet_namespace "$1" "/tmp/namespace-$1"
}

target_remove() {
    echo 0 >"$NVMET/subsystems/$SUBNQN/namespaces/$1/enable"
    rmdir "$NVMET/subsystems/$SUBNQN/namespaces/$1"
}

# target_resize NSID MIB
target_resize() {
    truncate -s "$2M" "/tmp/namespace-$1"
    echo 1 >"$NVMET/subsystems/$SUBNQN/namespaces/$1/revalidate_size"
}

# target_ana PATH STATE
target_ana() {
    echo "$2" >"$NVMET/ports/$1/ana_groups/1/ana_state"
}

# The kernel's target is told apart where a step is about numbers that it does not count.
target_is_kernel() {
    true
}

# target_path_down PATH, target_path_up PATH: a path whose connections end and are refused.
target_path_down() {
    rm "$NVMET/ports/$1/subsystems/$SUBNQN"
}

target_path_up() {
    ln -s "$NVMET/subsystems/$SUBNQN" "$NVMET/ports/$1/subsystems/$SUBNQN"
}
