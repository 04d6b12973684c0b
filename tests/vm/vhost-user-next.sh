# The next guest with the disk of the one before: all is there, and the back-end is as good as new.

DISK=/dev/vda

as_before() {
    modprobe virtio_blk
    eventually 30 test -b $DISK
    modprobe ext4
    mkdir -p /mnt
    mount -t ext4 $DISK /mnt
    same 'sum of the file' "$(cat /mnt/sum)" "$(sha256sum /mnt/a | cut -d' ' -f1)"
    umount /mnt
    e2fsck -fn $DISK
    same 'sectors' $((96 * 2048)) "$(cat /sys/block/vda/size)"
}

step 'the file is the same' as_before
