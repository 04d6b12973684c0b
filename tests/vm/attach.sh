# `flexblk attach` where the kernel has ublk: how it chooses, and what becomes of the device, its paths and its server.

NAME=data
LINK=/dev/flexblk/$NAME
DISK=/dev/ublkb0
SYS=/sys/block/ublkb0

# here NSID OPTION...: attaches, with a path on each network.
here() {
    under $NAME "$@"
}

# under NAME NSID OPTION...
under() {
    local name=$1 nsid=$2
    shift 2
    flexblk -v attach -t tcp -a "$ADDRESS_1" -n "$SUBNQN" -N "$nsid" --path "nvme+tcp://$ADDRESS_2:$PORT_2/$SUBNQN?nsid=$nsid" \
        --as "$name" "$@" >/tmp/device 2>/tmp/how </dev/null || { cat /tmp/how; return 1; }
    cat /tmp/how
}

# refused MESSAGE COMMAND...: fails, and says that.
refused() {
    local message=$1
    shift
    if "$@" >/tmp/refused 2>&1; then
        return 1
    fi
    grep -q "$message" /tmp/refused || { cat /tmp/refused; return 1; }
}

# listed EXPRESSION: what jq makes of our entry in the list.
listed() {
    flexblk list -o json | jq -r ".Attachments[] | select(.Name == \"$NAME\") | $1"
}

is_listed() {
    same "$1" "$2" "$(listed "$1")"
}

detached() {
    flexblk detach "$@" $NAME
    nothing_is_left
}

nothing_is_left() {
    eventually 5 nothing_is_there
}

nothing_is_there() {
    ! ls -A /dev | grep -E 'ublk[bc]' && ! test -e $SYS && ! test -e /run/flexblk/$NAME && ! test -L $LINK &&
        ! ls -A /run/flexblk | grep ublkb
}

# Its module is not loaded.
without_ublk() {
    modprobe fuse
    modprobe loop
    modprobe ext4
    mkdir -p /mnt /dev/shm /run/flexblk
    refused 'modprobe ublk_drv' here 1 --via ublk
    here 1
    grep -q 'loop device over FUSE, because .*modprobe ublk_drv' /tmp/how
    grep -q '^/dev/loop' /tmp/device
    is_listed .Backend fuse+loop
    detached
}

attach() {
    modprobe ublk_drv
    here 1 -i 2
    grep -q ', ublk, ' /tmp/how
    same 'device' $DISK "$(cat /tmp/device)"
    same 'link' $DISK "$(readlink -f $LINK)"
    is_listed .Backend ublk
    is_listed .State live
    is_listed .DevicePath $DISK
    is_listed '.Paths | length' 2
    same 'queues' 2 "$(ls $SYS/mq | wc -l)"
    grep -q "^FLEXBLK_NAME=$NAME$" /run/flexblk/.ublkb0.udev
    grep -q '^FLEXBLK_WWID=uuid\.' /run/flexblk/.ublkb0.udev
    refused 'attached already' under other 1
}

other_way() {
    flexblk detach $NAME
    here 1 --via fuse
    grep -q 'because --via says so' /tmp/how
    is_listed .Backend fuse+loop
    flexblk detach $NAME
    here 1 --no-partitions
    grep -q 'because --no-partitions is given' /tmp/how
    is_listed .Backend fuse+loop
    flexblk detach $NAME
    refused 'always looks for them' here 1 --no-partitions --via ublk
    here 1 -i 2
}

# One path goes and comes back under load, then the other.
paths() {
    local path LOAD_SECONDS=10
    start_load
    for path in 1 2; do
        load_runs
        target_path_down $path
        eventually 10 is_listed '[.Paths[] | select(.State != "live")] | length' 1
        target_path_up $path
        eventually 30 is_listed '[.Paths[] | select(.State == "live")] | length' 2
    done
    end_load
    grep -q 'err= 0' /tmp/load
    is_listed .Errors 0
    umount /mnt
}

crash() {
    kill -9 "$(listed .Process)"
    eventually 5 is_listed .State killed
    test -b $DISK
}

# The server dies twice under load; what it had not answered is done by the next one.
recoveries() {
    local i LOAD_SECONDS=10
    start_load
    for i in 1 2; do
        load_runs
        crash
        here 1
        grep -q 'taken over' /tmp/how
        same 'device' $DISK "$(cat /tmp/device)"
        sleep 1
    done
    end_load_unharmed
}

# Nobody loses the device of a killed process by accident.
waiting() {
    mount -t ext4 $DISK /mnt
    crash
    refused 'wait since its process was killed' under other 1
    refused 'mounted on /mnt' flexblk detach $NAME
    refused 'waits since the serving process was killed' flexblk detach --lazy $NAME
    refused 'is in use' here 1 --via fuse
    # systemd starts it again.
    SERVICE_RESULT=signal flexblk detach --force --stop-post $NAME
    here 1
    same 'sum of the file' "$(cat /mnt/sum)" "$(sha256sum /mnt/a | cut -d' ' -f1)"
    umount /mnt
}

lazily() {
    mount -t ext4 $DISK /mnt
    flexblk detach --lazy $NAME
    is_listed .State detaching
    ! test -L $LINK
    sleep 1
    same 'sum of the file' "$(cat /mnt/sum)" "$(sha256sum /mnt/a | cut -d' ' -f1)"
    umount /mnt
    nothing_is_left
    here 1
}

# Who has it open gets errors, with a server that lives and with one that was killed.
force() {
    local how
    for how in lives killed; do
        mount -t ext4 $DISK /mnt
        [ $how = lives ] || crash
        refused 'mounted on /mnt' flexblk detach $NAME
        flexblk detach --force $NAME 2>/tmp/forced
        grep -q 'mounted on /mnt: the device has gone' /tmp/forced
        nothing_is_left
        ! dd if=/mnt/a of=/dev/null bs=4k count=1 iflag=direct
        umount /mnt
        here 1
    done
}

# The target is gone, and a read hangs.
dead_target() {
    local started reader
    target_stop
    dd if=$DISK of=/dev/null bs=4k count=1 iflag=direct 2>/tmp/dd &
    reader=$!
    sleep 1
    is_listed .State 'no path'
    refused 'open in dd' flexblk detach $NAME
    started=$(centiseconds)
    detached --force
    [ $(($(centiseconds) - started)) -le 600 ]
    ! wait $reader
    target_again
}

resize() {
    here 2
    same 'sectors' $((32 * 2048)) "$(cat $SYS/size)"
    target_resize 2 48
    eventually 10 followed
    local note=$(listed .Note)
    flexblk list | grep -q "^$NAME: the namespace has 48.00 MiB now, and the device still 32.00 MiB" || [ "$note" = null ]
    detached
    here 2
    same 'sectors' $((48 * 2048)) "$(cat $SYS/size)"
    detached
    case $note in *'does not change the size'*) skip 'this kernel does not change the size of ublk devices' ;; esac
}

followed() {
    [ "$(listed .Note)" != null ] || same 'sectors' $((48 * 2048)) "$(cat $SYS/size)"
}

boot() {
    here 1 --via ublk --persist --config /tmp/attach.toml
    grep -q '^via = "ublk"$' /tmp/attach.toml
    flexblk detach $NAME
    flexblk attach --all --config /tmp/attach.toml
    is_listed .Backend ublk
    detached --persist --config /tmp/attach.toml
    ! grep -q $NAME /tmp/attach.toml
}

offered() {
    flexblk connect-all -t tcp -a "$ADDRESS_1" -s "$PORT_1" >/tmp/devices
    same 'devices' '/dev/ublkb0 /dev/ublkb1' "$(sort /tmp/devices | tr '\n' ' ' | sed 's/ $//')"
    flexblk detach /dev/ublkb0
    flexblk detach /dev/ublkb1
    nothing_is_left
}

need 'a target is there' target_start everywhere
step 'without ublk: FUSE and a loop device' without_ublk
need 'attach' attach
step 'the other way' other_way
step 'mkfs.ext4, mount, files, trim, fsck' file_system
step 'paths go and come back under load' paths
step 'kill -9 of the server under load and attach again, twice' recoveries
step 'the device of a killed server waits' waiting
step 'detach --lazy' lazily
step 'detach --force' force
step 'detach with a dead target and a read that hangs' dead_target
step 'resize' resize
step 'boot' boot
step 'connect-all' offered
