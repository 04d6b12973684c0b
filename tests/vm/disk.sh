# What is done to any block device of ours, $DISK. Scripts about one begin with this.

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
    # Longer than any one command.
    dd if=/tmp/fill of=$DISK bs=256k count=1 seek=120 oflag=direct
    blkdiscard -z $DISK
    reads_as_zero 0 16
    reads_as_zero 7680 64
    blkdiscard $DISK
}

fio_verify() {
    verify small $DISK --rw=randwrite --bs=4k --iodepth=32 --size=8M
    verify mixed $DISK --rw=randwrite --bsrange=4k-128k --iodepth=16 --size=16M
    verify large $DISK --rw=write --bs=2M --iodepth=4 --size=32M
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

# start_load: fio on the mounted file system for 15 seconds, or LOAD_SECONDS; see load_runs and end_load.
start_load() {
    mount -t ext4 $DISK /mnt
    fio --name=load --directory=/mnt --ioengine=libaio --direct=1 --rw=randrw --bs=4k --iodepth=16 --numjobs=2 --size=4M \
        --verify=crc32c --verify_backlog=64 --verify_fatal=1 --time_based --runtime="${LOAD_SECONDS:-15}" >/tmp/load 2>&1 &
    LOAD=$!
    sleep 2
}

# end_load_unharmed: the load has not noticed what was done meanwhile, and what file_system has left is there.
end_load_unharmed() {
    end_load
    grep -q 'err= 0' /tmp/load
    sync
    same 'sum of the file' "$(cat /mnt/sum)" "$(sha256sum /mnt/a | cut -d' ' -f1)"
    umount /mnt
    e2fsck -fn $DISK
    dmesg | grep -i 'i/o error' && return 1
    return 0
}

# What file_system has left is there.
file_is_the_same() {
    mount -t ext4 $DISK /mnt
    same 'sum of the file' "$(cat /mnt/sum)" "$(sha256sum /mnt/a | cut -d' ' -f1)"
    umount /mnt
}

