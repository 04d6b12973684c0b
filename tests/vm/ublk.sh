# A block device of ours by the kernel's ublk driver: everything that a host does to it, and what happens to its server.

DISK=/dev/ublkb0
SYS=/sys/block/ublkb0

# serve NSID OPTION...: the server of device 0, in the background.
serve() {
    local nsid=$1
    shift
    flexblk -v export ublk -t tcp -a "$ADDRESS_1" -n "$SUBNQN" -N "$nsid" --dev-id 0 "$@" >/tmp/server.out 2>/tmp/server.err </dev/null &
    echo $! >/tmp/server.pid
    eventually 20 serves || { cat /tmp/server.out /tmp/server.err; return 1; }
}

serves() {
    grep -q $DISK /tmp/server.out && test -b $DISK
}

server() {
    cat /tmp/server.pid
}

server_is_gone() {
    ! test -d /proc/"$(server)" || grep -q '^State:.Z' /proc/"$(server)"/status
}

# crash: as kill -9 does it; the device stays.
crash() {
    kill -9 "$(server)"
    eventually 5 server_is_gone
    test -b $DISK
}

end_server() {
    kill -TERM "$(server)"
    eventually 5 server_is_gone || { cat /tmp/server.err; return 1; }
    eventually 5 no_device
}

no_device() {
    ! test -e $DISK && ! test -e /dev/ublkc0 && ! test -e $SYS
}

attach() {
    modprobe ublk_drv
    modprobe ext4
    mkdir -p /mnt /dev/shm
    serve 1 --queues 2
}

properties() {
    same 'sectors' $((64 * 2048)) "$(cat $SYS/size)"
    same 'queues' 2 "$(ls $SYS/mq | wc -l)"
    same 'block size' 512 "$(cat $SYS/queue/logical_block_size)"
    [ "$(cat $SYS/queue/discard_max_bytes)" -gt 0 ]
    [ "$(cat $SYS/queue/write_zeroes_max_bytes)" -gt 0 ]
    same 'writable' 0 "$(cat $SYS/ro)"
    # Both follow from the namespace's volatile write cache.
    local cache=0
    flexblk id-ctrl -t tcp -a "$ADDRESS_1" -n "$SUBNQN" -o json >/tmp/id-ctrl
    if jq -e '.vwc % 2 == 1' /tmp/id-ctrl >/dev/null; then cache=1; fi
    same 'FUA' $cache "$(cat $SYS/queue/fua)"
    case $cache in
    0) same 'cache' 'write through' "$(cat $SYS/queue/write_cache)" ;;
    1) same 'cache' 'write back' "$(cat $SYS/queue/write_cache)" ;;
    esac
}

fio_verify_durable() {
    verify durable $DISK --rw=randwrite --bs=4k --iodepth=4 --size=1M --sync=1
}

# The server dies three times under load; what it had not answered is done by the next one.
recoveries() {
    local i
    start_load
    for i in 1 2 3; do
        load_runs
        crash
        sleep 0.5
        serve 1 --recover
        sleep 1
    done
    end_load_unharmed
}

# What is no device of that namespace, or served, is not taken over.
refusals() {
    serve_fails 'is served by process' 1 --recover
    serve_fails 'adding a ublk device' 1
    crash
    serve_fails 'not of this namespace' 2 --recover
    serve 1 --recover
    file_is_the_same
}

# serve_fails MESSAGE NSID OPTION...
serve_fails() {
    local message=$1 nsid=$2
    shift 2
    if timeout 20 flexblk export ublk -t tcp -a "$ADDRESS_1" -n "$SUBNQN" -N "$nsid" --dev-id 0 "$@" >/tmp/refused 2>&1; then
        return 1
    fi
    grep -q "$message" /tmp/refused || { cat /tmp/refused; return 1; }
}

cycles() {
    local i
    for i in $(seq 20); do
        serve 2 --queues 2
        echo "cycle $i" | dd of=$DISK bs=4k count=1 conv=sync oflag=direct
        dd if=$DISK bs=4k count=1 iflag=direct | grep -q "cycle $i"
        end_server
    done
    ! ls /dev | grep ublk[bc]
}

resize() {
    serve 2
    same 'sectors' $((32 * 2048)) "$(cat $SYS/size)"
    target_resize 2 48
    eventually 10 followed
    local said=$(cat /tmp/server.err)
    end_server
    case $said in *'does not change the size'*) skip 'this kernel does not change the size of ublk devices' ;; esac
}

followed() {
    grep -q 'does not change the size' /tmp/server.err || same 'sectors' $((48 * 2048)) "$(cat $SYS/size)"
}

# The target is gone, and a read hangs: the server ends all the same, and the read with it.
dead_target() {
    serve 1
    target_stop
    dd if=$DISK of=/dev/null bs=4k count=1 iflag=direct 2>/tmp/dd &
    local reader=$!
    sleep 1
    end_server
    ! wait $reader
    target_again
}

need 'a target is there' target_start
need 'attach' attach
step 'size, queues, block size, cache' properties
step 'discard and write zeroes' ranges
step 'fio verify' fio_verify
step 'fio verify with FUA' fio_verify_durable
step 'mkfs.ext4, mount, files, trim, fsck' file_system
step 'kill -9 of the server under load and recovery, three times' recoveries
step 'what is not taken over' refusals
step 'detach' end_server
step 'twenty cycles' cycles
step 'resize' resize
step 'detach with a dead target and a read that hangs' dead_target
