# Two paths to one namespace: both are used, and a lost path costs no I/O.

connect_both() {
    connect 1 --keep-alive-tmo=2 --reconnect-delay=1 --ctrl-loss-tmo=120
    connect 2 --keep-alive-tmo=2 --reconnect-delay=1 --ctrl-loss-tmo=120
    eventually 30 has_disk 1
    same 'controllers' 2 "$(controllers | wc -l)"
    same 'disks of namespace 1' 1 "$(ls -d /sys/block/nvme*n* | grep -v 'c[0-9]*n' | while read -r path; do cat "$path/nsid"; done | grep -c '^1$')"
}

# io_policy NAME: how the host chooses among optimized paths.
io_policy() {
    # The only subsystem.
    for subsystem in /sys/class/nvme-subsystem/*; do
        echo "$1" >"$subsystem/iopolicy"
    done
}

round_robin() {
    local first second before_first before_second
    first=$(on_path "$ADDRESS_1")
    second=$(on_path "$ADDRESS_2")
    io_policy round-robin
    before_first=$(path_sectors "$first" 1)
    before_second=$(path_sectors "$second" 1)
    verify both "$(disk 1)" --rw=randwrite --bs=4k --iodepth=8 --size=4M
    [ "$(path_sectors "$first" 1)" -gt "$before_first" ]
    [ "$(path_sectors "$second" 1)" -gt "$before_second" ]
    io_policy numa
}

lost_path() {
    local first
    eval "first=\$(on_path \"\$ADDRESS_$1\")"
    start_load "$(disk 1)" 15
    target_path_down "$1"
    eventually 20 state_is "$first" connecting
    load_runs
    sleep 2
    target_path_up "$1"
    eventually 30 state_is "$first" live
    end_load
}

need 'a target is there' target_start everywhere
need 'connect over both paths' connect_both
step 'both paths in turn' round_robin
step 'a path is lost and comes back under I/O' lost_path 1
step 'the other one, too' lost_path 2
step 'disconnect' disconnect
