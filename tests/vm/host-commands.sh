# The kernel's host and nvme-cli with one controller: every command that an administrator types.

discover() {
    nvme discover -t tcp -a "$ADDRESS_1" -s "$PORT_1" -o json >/tmp/discover
    holds /tmp/discover "any(.records[]; .subnqn == \"$SUBNQN\" and .trtype == \"tcp\" and .traddr == \"$ADDRESS_1\" and (.trsvcid | tostring) == \"$PORT_1\")"
    # Without a subsystem's name `connect` would be lost: the text form must name it as well.
    nvme discover -t tcp -a "$ADDRESS_1" -s "$PORT_1" | grep -q "subnqn: *$SUBNQN"
}

connect_once() {
    connect 1
    eventually 30 has_disk 1
    eventually 30 has_disk 2
    state_is "$(controller)" live
}

list_subsys() {
    nvme list-subsys -o json >/tmp/list-subsys
    holds /tmp/list-subsys "any(.[].Subsystems[]; .NQN == \"$SUBNQN\" and any(.Paths[]; .State == \"live\" and .Transport == \"tcp\"))"
    nvme list -o json >/tmp/list
    holds /tmp/list '[.Devices[].NameSpace] | sort == [1, 2]'
}

id_ctrl() {
    nvme id-ctrl "/dev/$(controller)" -o json >/tmp/id-ctrl
    holds /tmp/id-ctrl ".subnqn == \"$SUBNQN\""
    holds /tmp/id-ctrl '.cntlid >= 1 and .cntlid <= 65519'
    # Queue entries of 64 and 16 bytes.
    holds /tmp/id-ctrl '.sqes == 102 and .cqes == 68'
    holds /tmp/id-ctrl '.ioccsz >= 4 and .iorcsz == 1 and .ofcs >= 0'
    # Base specification: an I/O controller (1), 2.x or 1.3 and up, SGLs supported.
    holds /tmp/id-ctrl '.cntrltype == 1 and .ver >= 66304 and (.sgls % 4) >= 1'
    holds /tmp/id-ctrl '.nn >= 2 and .maxcmd >= 16 and .kas > 0'
    # Several controllers.
    holds /tmp/id-ctrl '(.cmic / 2 | floor) % 2 == 1'
    nvme id-ctrl "/dev/$(controller)" -H >/dev/null
}

id_ns() {
    local device
    for nsid in 1 2; do
        device=$(disk $nsid)
        nvme id-ns "$device" -o json >/tmp/id-ns
        holds /tmp/id-ns '.nsze > 0 and .ncap <= .nsze and .nuse <= .ncap'
        holds /tmp/id-ns '.nmic % 2 == 1'
        ! reports_ana || holds /tmp/id-ns '.anagrpid >= 1'
        # What the kernel made of it: size and block size.
        same "size of namespace $nsid" "$(sectors "$device")" \
            "$(jq '.nsze * pow(2; .lbafs[.flbas % 16].ds) / 512 | floor' /tmp/id-ns)"
        nvme ns-descs "$device" -o json >/tmp/ns-descs
        same "uuid of namespace $nsid" "$(cat "/sys/block/$(basename "$device")/uuid")" \
            "$(jq -r '[.. | .uuid? | strings] | first' /tmp/ns-descs)"
    done
    nvme list-ns "/dev/$(controller)" -o json >/tmp/list-ns
    holds /tmp/list-ns '[.nsid_list[].nsid] == [1, 2]'
    nvme list-ctrl "/dev/$(controller)" >/tmp/list-ctrl 2>&1 || cat /tmp/list-ctrl
}

smart_log() {
    local device
    device=$(disk 1)
    nvme smart-log "/dev/$(controller)" -o json >/tmp/smart-1
    # 1,000 blocks of 512 bytes make one data unit.
    dd if=/dev/zero of="$device" bs=1M count=4 oflag=direct
    dd if="$device" of=/dev/null bs=1M count=4 iflag=direct
    nvme smart-log "/dev/$(controller)" -o json >/tmp/smart-2
    jq -s -e '(.[1].host_write_commands - .[0].host_write_commands) as $w
        | (.[1].host_read_commands - .[0].host_read_commands) as $r
        | $w >= 1 and $r >= 1 and .[1].data_units_written >= .[0].data_units_written + 8
        and .[1].data_units_read >= .[0].data_units_read + 8' /tmp/smart-1 /tmp/smart-2 >/dev/null || {
        target_is_kernel && skip "nvmet counts only what a real disk counts"
        cat /tmp/smart-1 /tmp/smart-2
        return 1
    }
    holds /tmp/smart-2 '.critical_warning == 0'
}

error_log() {
    local device
    device=$(disk 1)
    nvme error-log "/dev/$(controller)" -e 4 -o json >/tmp/error-1
    # LBA Out of Range; nvmet on a block device leaves the check to the device and says Internal Error.
    local status='0x80|0x2080|0x4080|0x6080'
    target_is_kernel && status="$status|0x6006"
    fails "$status" nvme io-passthru "$device" --opcode=2 --namespace-id=1 --cdw10=0xfffffff0 \
        --data-len="$(cat "/sys/block/$(basename "$device")/queue/logical_block_size")" --read
    nvme error-log "/dev/$(controller)" -e 4 -o json >/tmp/error-2
    jq -s -e '(.[1].errors[0].error_count > .[0].errors[0].error_count)' /tmp/error-1 /tmp/error-2 >/dev/null || {
        cat /tmp/error-1 /tmp/error-2
        return 1
    }
}

# reports_ana: whether the controller does.
reports_ana() {
    nvme id-ctrl "/dev/$(controller)" -o json | jq -e '(.cmic / 8 | floor) % 2 == 1' >/dev/null
}

ana_log() {
    reports_ana || skip 'the target does not report ANA'
    nvme ana-log "/dev/$(controller)" -o json >/tmp/ana
    holds /tmp/ana '[.["ANA DESC LIST "]? // .ana_desc_list? // . | .. | objects | select(has("state"))] | length >= 1'
    holds /tmp/ana '[.. | objects | select(has("state")) | .state] | any(. == "optimized")'
}

other_logs() {
    nvme fw-log "/dev/$(controller)" -o json >/tmp/fw
    nvme effects-log "/dev/$(controller)" -o json >/tmp/effects || { cat /tmp/effects; return 1; }
    nvme changed-ns-list-log "/dev/$(controller)" -o json >/tmp/changed
    # Read (2) and write (1) are supported, by the command effects log.
    nvme effects-log "/dev/$(controller)" >/tmp/effects.text
    grep -qi 'read' /tmp/effects.text
}

supported_log_pages() {
    nvme supported-log-pages "/dev/$(controller)" >/tmp/pages 2>&1 || {
        cat /tmp/pages
        target_is_kernel && skip "nvmet 6.12 does not list its log pages"
        return 1
    }
    grep -qi 'smart' /tmp/pages
}

show_regs() {
    nvme show-regs "/dev/$(controller)" -o json >/tmp/regs
    holds /tmp/regs '(.csts % 2) == 1 and (.cc % 2) == 1 and .vs >= 66304'
    nvme show-regs "/dev/$(controller)" -H >/dev/null
}

features() {
    # Number of Queues, zero-based: at least the two each way that two processors got.
    nvme get-feature "/dev/$(controller)" -f 7 >/tmp/feature
    cat /tmp/feature
    grep -Eqi 'current value:0x[0-9a-f]{3}[1-9a-f][0-9a-f]{3}[1-9a-f]$' /tmp/feature
    nvme get-feature "/dev/$(controller)" -f 0xb
    nvme get-feature "/dev/$(controller)" -f 0xf
    # Arbitration is mandatory by the base specification, but not in nvmet.
    nvme get-feature "/dev/$(controller)" -f 1 || target_is_kernel
}

file_system() {
    local device
    device=$(disk 1)
    mkfs.ext4 -q -F "$device"
    mount -t ext4 "$device" /mnt
    dd if=/dev/urandom of=/mnt/a bs=64k count=100
    cp /mnt/a /mnt/b
    mkdir /mnt/folder
    for file in $(seq 50); do echo "$file" >/mnt/folder/$file; done
    sha256sum /mnt/a | cut -d' ' -f1 >/tmp/sum
    umount /mnt
    # Nothing of it is in the page cache of this mount.
    echo 3 >/proc/sys/vm/drop_caches
    mount -t ext4 "$device" /mnt
    same 'sum of the file' "$(cat /tmp/sum)" "$(sha256sum /mnt/b | cut -d' ' -f1)"
    same 'files' 50 "$(ls /mnt/folder | wc -l)"
    rm -r /mnt/folder
    fstrim /mnt || true
    umount /mnt
    e2fsck -fn "$device"
}

fio_verify() {
    local device
    device=$(disk 1)
    verify small "$device" --rw=randwrite --bs=4k --iodepth=32 --size=8M
    verify mixed "$device" --rw=randwrite --bsrange=4k-128k --iodepth=16 --size=16M
    verify large "$device" --rw=write --bs=1M --iodepth=4 --size=32M
    verify second "$(disk 2)" --rw=randwrite --bs=16k --iodepth=16 --size=8M
}

flush() {
    nvme flush "$(disk 1)" -n 1
}

# reads_as_zero DISK FIRST COUNT, in blocks of 4 KiB
reads_as_zero() {
    dd if="$1" bs=4k skip="$2" count="$3" iflag=direct 2>/dev/null >/tmp/block
    head -c $(($3 * 4096)) /dev/zero | cmp - /tmp/block
}

# fill DISK FIRST COUNT, in blocks of 4 KiB: with bytes that are not zero.
fill() {
    head -c $(($3 * 4096)) /dev/zero | tr '\0' 'x' >/tmp/fill
    dd if=/tmp/fill of="$1" bs=4k seek="$2" count="$3" oflag=direct 2>/dev/null
}

# lbas DISK FOUR-KIB-BLOCKS: as many of the disk's blocks.
lbas() {
    echo $(($2 * 4096 / $(cat "/sys/block/$(basename "$1")/queue/logical_block_size")))
}

write_zeroes() {
    local device
    device=$(disk 1)
    fill "$device" 0 16
    nvme write-zeroes "$device" -s "$(lbas "$device" 4)" -c $(($(lbas "$device" 4) - 1))
    reads_as_zero "$device" 4 4
    dd if="$device" bs=4k skip=3 count=1 iflag=direct 2>/dev/null | cmp -n 4096 - /tmp/fill
    dd if="$device" bs=4k skip=8 count=1 iflag=direct 2>/dev/null | cmp -n 4096 - /tmp/fill
    # By the kernel's own hand.
    blkdiscard -z -o 32768 -l 16384 "$device"
    reads_as_zero "$device" 8 4
}

dsm() {
    local device
    device=$(disk 1)
    fill "$device" 64 32
    nvme dsm "$device" -n 1 --ad --slbs="$(lbas "$device" 64),$(lbas "$device" 80)" --blocks="$(lbas "$device" 4),$(lbas "$device" 4)"
    # Blocks around the ranges keep their content.
    dd if="$device" bs=4k skip=68 count=12 iflag=direct 2>/dev/null | cmp -n $((12 * 4096)) - /tmp/fill
    dd if="$device" bs=4k skip=84 count=12 iflag=direct 2>/dev/null | cmp -n $((12 * 4096)) - /tmp/fill
    blkdiscard "$(disk 2)"
}

# oncs BIT: whether an optional command is supported.
oncs() {
    nvme id-ctrl "/dev/$(controller)" -o json | jq -e "(.oncs / pow(2; $1) | floor) % 2 == 1" >/dev/null
}

compare() {
    local device blocks
    oncs 0 || skip 'the target does not support Compare'
    device=$(disk 1)
    fill "$device" 0 2
    blocks=$(lbas "$device" 2)
    nvme compare "$device" -s 0 -c $((blocks - 1)) -z 8192 -d /tmp/fill
    printf 'y' | dd of=/tmp/fill bs=1 seek=5000 conv=notrunc 2>/dev/null
    # Compare Failure.
    fails '0x285|0x2285|0x4285|0x6285|0x2085' nvme compare "$device" -s 0 -c $((blocks - 1)) -z 8192 -d /tmp/fill
}

# Write Uncorrectable marks blocks that a read must not return.
write_uncorrectable() {
    local device blocks
    oncs 1 || skip 'the target does not support Write Uncorrectable'
    device=$(disk 1)
    fill "$device" 100 3
    blocks=$(lbas "$device" 1)
    nvme write-uncor "$device" -s "$(lbas "$device" 101)" -c $((blocks - 1))
    # Unrecovered Read Error.
    fails '0x281|0x2281|0x4281|0x6281' nvme read "$device" -s "$(lbas "$device" 101)" -c $((blocks - 1)) -z 4096 -d /tmp/read
    dd if="$device" bs=4k skip=100 count=1 iflag=direct 2>/dev/null | cmp -n 4096 - /tmp/fill
    # A write makes it readable again.
    fill "$device" 101 1
    dd if="$device" bs=4k skip=101 count=1 iflag=direct 2>/dev/null | cmp -n 4096 - /tmp/fill
}

copy() {
    local device
    oncs 8 || skip 'the target does not support Copy'
    device=$(disk 1)
    blkdiscard -z -o 0 -l 1048576 "$device"
    fill "$device" 10 4
    dd if=/dev/urandom of=/tmp/random bs=4k count=2 2>/dev/null
    dd if=/tmp/random of="$device" bs=4k seek=20 oflag=direct 2>/dev/null
    nvme copy "$device" --sdlba="$(lbas "$device" 40)" --slbs="$(lbas "$device" 10),$(lbas "$device" 20)" \
        --blocks="$(($(lbas "$device" 4) - 1)),$(($(lbas "$device" 2) - 1))"
    dd if="$device" bs=4k skip=40 count=4 iflag=direct 2>/dev/null | cmp -n 16384 - /tmp/fill
    dd if="$device" bs=4k skip=44 count=2 iflag=direct 2>/dev/null | cmp - /tmp/random
}

verify_command() {
    local device
    oncs 7 || skip 'the target does not support Verify'
    device=$(disk 1)
    nvme verify "$device" -s 0 -c 7
}

reset() {
    local device name
    device=$(disk 1)
    name=$(controller)
    fill "$device" 0 4
    nvme reset "/dev/$name"
    eventually 30 state_is "$name" live
    dd if="$device" bs=4k count=4 iflag=direct 2>/dev/null | cmp - /tmp/fill
    # Under load: I/O waits for the new connection and goes on.
    fio --name=load --filename="$device" --ioengine=libaio --direct=1 --rw=randread --bs=4k --iodepth=16 \
        --time_based --runtime=4 >/tmp/load 2>&1 &
    sleep 1
    nvme reset "/dev/$name"
    wait $! || { cat /tmp/load; return 1; }
    eventually 30 state_is "$name" live
}

rescan() {
    nvme ns-rescan "/dev/$(controller)"
    has_disk 1
    has_disk 2
}

reservations() {
    local device
    oncs 5 || skip 'the target does not support reservations'
    device=$(disk 1)
    nvme resv-register "$device" -n 1 --nrkey=0x1234 --rrega=0 --cptpl=0
    nvme resv-report "$device" -n 1 -e -o json >/tmp/report
    cat /tmp/report
    holds /tmp/report '.regctl == 1 and .rtype == 0'
    nvme resv-acquire "$device" -n 1 --crkey=0x1234 --rtype=1 --racqa=0
    nvme resv-report "$device" -n 1 -e -o json >/tmp/report
    cat /tmp/report
    holds /tmp/report '.rtype == 1'
    holds /tmp/report '[.. | objects | select(has("rkey")) | .rkey] == [4660]'
    # The holder still writes.
    fill "$device" 0 1
    # A wrong key is a Reservation Conflict.
    fails '0x83|0x2083|0x4083|0x6083' nvme resv-release "$device" -n 1 --crkey=0x9999 --rtype=1 --rrela=0
    nvme resv-release "$device" -n 1 --crkey=0x1234 --rtype=1 --rrela=0
    nvme resv-report "$device" -n 1 -e -o json >/tmp/report
    holds /tmp/report '.rtype == 0 and .regctl == 1'
    nvme resv-register "$device" -n 1 --crkey=0x1234 --rrega=1
    nvme resv-report "$device" -n 1 -e -o json >/tmp/report
    holds /tmp/report '.regctl == 0'
}

need 'a target is there' target_start
step 'discover' discover
need 'connect' connect_once
step 'list and list-subsys' list_subsys
step 'id-ctrl' id_ctrl
step 'id-ns, ns-descs, list-ns' id_ns
step 'smart-log' smart_log
step 'error-log' error_log
step 'ana-log' ana_log
step 'fw-log, effects-log, changed-ns-list-log' other_logs
step 'supported-log-pages' supported_log_pages
step 'show-regs' show_regs
step 'get-feature' features
step 'mkfs.ext4, mount, files, fsck' file_system
step 'fio verify' fio_verify
step 'flush' flush
step 'write-zeroes' write_zeroes
step 'dsm' dsm
step 'compare' compare
step 'write-uncor' write_uncorrectable
step 'copy' copy
step 'verify' verify_command
step 'resv-register, -acquire, -report, -release' reservations
step 'reset' reset
step 'ns-rescan' rescan
step 'disconnect' disconnect
