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

reads_as_zero() {
    dd if=$DISK bs=4k skip="$1" count="$2" iflag=direct 2>/dev/null >/tmp/block
    head -c $(($2 * 4096)) /dev/zero | cmp - /tmp/block
}

ranges() {
    head -c 262144 /dev/zero | tr '\0' 'x' >/tmp/fill
    dd if=/tmp/fill of=$DISK bs=256k count=1 oflag=direct
    blkdiscard -z -o 16384 -l 16384 $DISK
    reads_as_zero 4 4
    blkdiscard -o 65536 -l 65536 $DISK
    dd if=$DISK bs=4k skip=3 count=1 iflag=direct 2>/dev/null | cmp -n 4096 - /tmp/fill
    dd if=$DISK bs=4k skip=8 count=8 iflag=direct 2>/dev/null | cmp -n 32768 - /tmp/fill
    dd if=$DISK bs=4k skip=32 count=1 iflag=direct 2>/dev/null | cmp -n 4096 - /tmp/fill
    blkdiscard $DISK
}

fio_verify() {
    verify small $DISK --rw=randwrite --bs=4k --iodepth=32 --size=8M
    verify mixed $DISK --rw=randwrite --bsrange=4k-128k --iodepth=16 --size=16M
    verify large $DISK --rw=write --bs=2M --iodepth=4 --size=32M
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

file_system() {
    mkfs.ext4 -q -F $DISK
    mount -t ext4 -o discard $DISK /mnt
    dd if=/dev/urandom of=/mnt/a bs=64k count=200
    cp /mnt/a /mnt/b
    sha256sum /mnt/a | cut -d' ' -f1 >/mnt/sum
    umount /mnt
    echo 3 >/proc/sys/vm/drop_caches
    e2fsck -fn $DISK
    mount -t ext4 $DISK /mnt
    same 'sum of the file' "$(cat /mnt/sum)" "$(sha256sum /mnt/b | cut -d' ' -f1)"
    rm /mnt/b
    fstrim /mnt
    umount /mnt
    e2fsck -fn $DISK
}

# The driver lets go of the device and takes it again: rings stop and start.
driver_again() {
    rmmod virtio_blk
    modprobe virtio_blk
    eventually 30 test -b $DISK
    mount -t ext4 $DISK /mnt
    same 'sum of the file' "$(cat /mnt/sum)" "$(sha256sum /mnt/a | cut -d' ' -f1)"
    umount /mnt
}

# restarts HOW: the back-end ends under load and comes back, three times.
restarts() {
    local i
    mount -t ext4 $DISK /mnt
    fio --name=load --directory=/mnt --ioengine=libaio --direct=1 --rw=randrw --bs=4k --iodepth=16 --numjobs=2 --size=4M \
        --verify=crc32c --verify_backlog=64 --verify_fatal=1 --time_based --runtime=15 >/tmp/load 2>&1 &
    LOAD=$!
    sleep 2
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

resize() {
    ask resize 96
    eventually 20 has_sectors $((96 * 2048))
    verify grown $DISK --rw=write --bs=64k --iodepth=4 --offset=70M --size=16M
    mount -t ext4 $DISK /mnt
    same 'sum of the file' "$(cat /mnt/sum)" "$(sha256sum /mnt/a | cut -d' ' -f1)"
    umount /mnt
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
step 'resize' resize
