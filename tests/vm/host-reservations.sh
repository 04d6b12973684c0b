# Reservations between two hosts. The module runs without multipath, so that each host has a disk of its own.

HOST_A=nqn.2014-08.org.nvmexpress:uuid:5c1c5e6e-26f1-4c0a-9d44-0f3ad17b3c0a
HOST_B=nqn.2014-08.org.nvmexpress:uuid:5c1c5e6e-26f1-4c0a-9d44-0f3ad17b3c0b

# disk_of HOST NSID
disk_of() {
    local path
    for path in /sys/class/nvme/nvme*; do
        [ "$(cat "$path/hostnqn" 2>/dev/null)" = "$1" ] || continue
        for disk in "$path"/nvme*n*; do
            [ "$(cat "$disk/nsid" 2>/dev/null)" = "$2" ] && echo "/dev/$(basename "$disk")"
        done
    done
    return 0
}

both_have_disks() {
    [ -b "$(disk_of $HOST_A 1)" ] && [ -b "$(disk_of $HOST_B 1)" ]
}

connect_both() {
    connect 1 --hostnqn=$HOST_A --hostid=${HOST_A##*uuid:}
    connect 1 --hostnqn=$HOST_B --hostid=${HOST_B##*uuid:}
    eventually 30 both_have_disks
}

oncs_has_reservations() {
    nvme id-ctrl "/dev/$(controller)" -o json | jq -e '(.oncs / 32 | floor) % 2 == 1' >/dev/null
}

supported() {
    if ! oncs_has_reservations; then
        target_is_kernel && skip 'nvmet 6.12 has no reservations'
        return 1
    fi
    disks
    # All six types.
    nvme id-ns "$A" -o json >/tmp/id-ns
    holds /tmp/id-ns '(.rescap % 128 / 2 | floor) == 63'
}

write_works() {
    dd if=/dev/zero of="$1" bs=4k count=1 oflag=direct 2>/tmp/dd || { cat /tmp/dd; return 1; }
}

read_works() {
    dd if="$1" of=/dev/null bs=4k count=1 iflag=direct 2>/tmp/dd || { cat /tmp/dd; return 1; }
}

# Reservation Conflict, with or without the bits for "more" and "do not retry".
conflict() {
    fails '0x2083|0x83|0x4083|0x6083' "$@"
}

conflict_on_write() {
    head -c 4096 /dev/zero >/tmp/zero
    conflict nvme write "$1" -s 0 -c "$(( 4096 / $(cat "/sys/block/$(basename "$1")/queue/logical_block_size") - 1 ))" -z 4096 -d /tmp/zero
}

conflict_on_read() {
    conflict nvme read "$1" -s 0 -c "$(( 4096 / $(cat "/sys/block/$(basename "$1")/queue/logical_block_size") - 1 ))" -z 4096 -d /tmp/zero
}

disks() {
    A=$(disk_of $HOST_A 1)
    B=$(disk_of $HOST_B 1)
}

register() {
    disks
    nvme resv-register "$A" -n 1 --nrkey=0xa --rrega=0
    nvme resv-register "$B" -n 1 --nrkey=0xb --rrega=0
    nvme resv-report "$A" -n 1 -e -o json >/tmp/report
    cat /tmp/report
    holds /tmp/report '.regctl == 2 and .rtype == 0'
    # A second registration with another key is a conflict.
    conflict nvme resv-register "$A" -n 1 --nrkey=0xc --rrega=0
}

# exclusive TYPE: held by A.
acquire() {
    nvme resv-acquire "$A" -n 1 --crkey=0xa --rtype="$1" --racqa=0
}

release() {
    nvme resv-release "$A" -n 1 --crkey=0xa --rtype="$1" --rrela=0
}

write_exclusive() {
    disks
    acquire 1
    write_works "$A"
    read_works "$B"
    conflict_on_write "$B"
    conflict nvme resv-acquire "$B" -n 1 --crkey=0xb --rtype=1 --racqa=0
    release 1
    write_works "$B"
}

exclusive_access() {
    disks
    acquire 2
    write_works "$A"
    conflict_on_read "$B"
    conflict_on_write "$B"
    release 2
    read_works "$B"
}

# Registrants only (3, 4) and all registrants (5, 6): B is registered, so it may.
registrants() {
    disks
    for type in 3 4 5 6; do
        acquire $type
        nvme resv-report "$B" -n 1 -e -o json >/tmp/report
        holds /tmp/report ".rtype == $type"
        write_works "$B"
        read_works "$B"
        release $type
    done
}

preempt() {
    disks
    acquire 1
    # B takes over and A's registration is gone.
    nvme resv-acquire "$B" -n 1 --crkey=0xb --prkey=0xa --rtype=1 --racqa=1
    nvme resv-report "$B" -n 1 -e -o json >/tmp/report
    cat /tmp/report
    holds /tmp/report '.regctl == 1 and .rtype == 1'
    write_works "$B"
    conflict_on_write "$A"
    # Clear removes reservation and registrations.
    nvme resv-release "$B" -n 1 --crkey=0xb --rtype=1 --rrela=1
    nvme resv-report "$B" -n 1 -e -o json >/tmp/report
    holds /tmp/report '.regctl == 0 and .rtype == 0'
    write_works "$A"
}

preempt_and_abort() {
    disks
    nvme resv-register "$A" -n 1 --nrkey=0xa --rrega=0
    nvme resv-register "$B" -n 1 --nrkey=0xb --rrega=0
    acquire 2
    nvme resv-acquire "$B" -n 1 --crkey=0xb --prkey=0xa --rtype=2 --racqa=2
    conflict_on_read "$A"
    read_works "$B"
    nvme resv-release "$B" -n 1 --crkey=0xb --rtype=2 --rrela=1
}

# The kernel's own interface to them, which file systems of clusters use.
unregister() {
    disks
    nvme resv-register "$A" -n 1 --nrkey=0xa --rrega=0
    nvme resv-register "$A" -n 1 --crkey=0xa --nrkey=0xaa --rrega=2
    nvme resv-report "$A" -n 1 -e -o json >/tmp/report
    cat /tmp/report
    holds /tmp/report '[.. | objects | select(has("rkey")) | .rkey] == [170]'
    nvme resv-register "$A" -n 1 --crkey=0xaa --rrega=1
    nvme resv-report "$A" -n 1 -e -o json >/tmp/report
    holds /tmp/report '.regctl == 0'
}

need 'a target is there' target_start
need 'two hosts connect' connect_both
step 'reservations are supported' supported
if oncs_has_reservations; then
    step 'register and report' register
    step 'write exclusive' write_exclusive
    step 'exclusive access' exclusive_access
    step 'registrants only, all registrants' registrants
    step 'preempt, clear' preempt
    step 'preempt and abort' preempt_and_abort
    step 'replace a key, unregister' unregister
fi
step 'disconnect' disconnect
