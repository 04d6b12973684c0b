# A disk whose back-end is ours: everything that a guest does to a disk, and what happens to the back-end meanwhile.

DISK=/dev/vda
SYS=/sys/block/vda

disk_is_there() {
    modprobe virtio_blk
    eventually 30 test -b $DISK
    modprobe ext4
    mkdir -p /mnt
    # fio's shared memory.
    mkdir -p /dev/shm
}

properties() {
    same 'sectors' $((64 * 2048)) "$(cat $SYS/size)"
    # As many as processors, of the four that there are.
    same 'queues' "$(nproc)" "$(ls $SYS/mq | wc -l)"
    same 'block size' 512 "$(cat $SYS/queue/logical_block_size)"
    [ "$(cat $SYS/queue/discard_max_bytes)" -gt 0 ]
    [ "$(cat $SYS/queue/write_zeroes_max_bytes)" -gt 0 ]
    [ -n "$(cat $SYS/serial)" ]
    # Virtio 1, indirect descriptors, event indices, flush, queues, discard, write zeroes.
    local bit
    for bit in 9 12 13 14 28 29 32; do
        same "feature $bit" 1 "$(cut -c$((bit + 1)) "$(dirname "$(readlink -f $SYS)")/../features")"
    done
}

every_queue() {
    local cpu
    for cpu in $(seq 0 $(($(nproc) - 1))); do
        verify cpu$cpu $DISK --rw=randwrite --bs=4k --iodepth=8 --size=4M --offset=$((cpu * 8))M --cpus_allowed=$cpu
    done
    # Each processor has a queue of its own, and each queue an interrupt that has come.
    same 'interrupts of queues' "$(nproc)" \
        "$(awk '/virtio.-req\./ { for (i = 2; i < 4; i++) if ($i > 0) { n++; break } } END { print n + 0 }' /proc/interrupts)"
}

# The driver lets go of the device and takes it again: rings stop and start.
driver_again() {
    rmmod virtio_blk
    modprobe virtio_blk
    eventually 30 test -b $DISK
    file_is_the_same
}

# restarts HOW: the back-end ends under load and comes back, three times.
restarts() {
    local i
    start_load
    for i in 1 2 3; do
        load_runs
        ask "$1"
        sleep 1
    done
    end_load
    cat /tmp/load | grep -q 'err= 0'
    sync
    umount /mnt
    e2fsck -fn $DISK
}

# A target dies under load and comes back, then the other one: the disk is slow for a moment.
paths() {
    local path
    start_load
    for path in 1 2; do
        load_runs
        ask path-down $path
        sleep 2
        ask path-up $path
        sleep 2
    done
    end_load
    grep -q 'err= 0' /tmp/load
    umount /mnt
    e2fsck -fn $DISK
    dmesg | grep -i 'i/o error' && return 1
    return 0
}

resize() {
    ask resize 96
    eventually 20 has_sectors $((96 * 2048))
    verify grown $DISK --rw=write --bs=64k --iodepth=4 --offset=70M --size=16M
    file_is_the_same
}

has_sectors() {
    same sectors "$1" "$(cat $SYS/size)"
}

need 'the disk is there' disk_is_there
step 'size, queues, block size, features' properties
step 'discard and write zeroes' ranges
step 'fio verify' fio_verify
step 'every queue' every_queue
step 'mkfs.ext4, mount, files, trim, fsck' file_system
step 'the driver goes and comes' driver_again
step 'kill -9 of the back-end under load, three times' restarts crash
step 'end and restart of the back-end under load, three times' restarts terminate
step 'paths go and come back under load' paths
step 'resize' resize
