# fio on block devices of a guest: ours by ublk, ours and those of peers by the kernel's NBD client, and the kernel's own
# NVMe/TCP host. Servers are outside.

load_modules() {
    modprobe ublk_drv
    modprobe nbd
    target_start
}

# measure WAY SERVER DISK: every cell.
measure() {
    local rw bs depth
    fio_run $3 --rw=write --bs=128k --iodepth=16
    for rw in randread randwrite; do
        for bs in 4k 128k; do
            for depth in 1 32; do
                fio_run $3 --rw=$rw --bs=$bs --iodepth=$depth --time_based --ramp_time=1 --runtime=$RUNTIME
                ask measured "$1" "$2" $rw $bs $depth "$(jq -c "{ jobs: [.jobs[] | { error, ${rw#rand}: (.${rw#rand} | { iops, lat_ns: { percentile: .lat_ns.percentile } }) }] }" /tmp/fio.json)"
            done
        done
    done
}

fio_run() {
    local disk=$1
    shift
    fio --name=guest --filename=$disk --size=64M --ioengine=io_uring --direct=1 --norandommap $FIO_OPTIONS --output=/tmp/fio.json "$@"
}

# flexblk_export WORD...: an exporter of ours, until end_export.
flexblk_export() {
    flexblk export "$@" -t tcp -a "$ADDRESS_1" -n "$SUBNQN" -N 1 >/tmp/export.out 2>/tmp/export.err </dev/null &
    EXPORT=$!
}

end_export() {
    kill -TERM $EXPORT
    wait $EXPORT || true
}

ublk() {
    flexblk_export ublk --dev-id 0
    eventually 20 test -b /dev/ublkb0
    measure ublk flexblk /dev/ublkb0
    end_export
}

nbd() {
    flexblk_export nbd --socket /run/disk.sock
    eventually 20 test -S /run/disk.sock
    nbd-client -unix /run/disk.sock /dev/nbd0 -b 4096
    measure nbd flexblk /dev/nbd0
    nbd-client -d /dev/nbd0
    end_export
}

# nbd_of SERVER: a peer's.
nbd_of() {
    nbd-client "$ADDRESS_1" "$(ask serve "$1")" /dev/nbd1 -b 4096
    measure nbd "$1" /dev/nbd1
    nbd-client -d /dev/nbd1
}

nvme_tcp() {
    connect 1
    eventually 20 has_disk 1
    measure nvme-tcp linux "$(disk 1)"
    disconnect
}

STEP_LIMIT=300
need 'a target, and modules' load_modules
step 'ublk' ublk
step 'NBD of ours' nbd
step 'NBD of nbdkit' nbd_of nbdkit
step 'NBD of QEMU' nbd_of qemu-nbd
step 'the kernel by NVMe/TCP' nvme_tcp
