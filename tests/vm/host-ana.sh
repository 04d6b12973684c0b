# Two paths to one namespace: ANA states decide which one is used.

connect_both() {
    connect 1 --keep-alive-tmo=2 --reconnect-delay=1 --ctrl-loss-tmo=120
    connect 2 --keep-alive-tmo=2 --reconnect-delay=1 --ctrl-loss-tmo=120
    eventually 30 has_disk 1
    eventually 10 path_state_is "$(on_path "$ADDRESS_1")" 1 optimized
    eventually 10 path_state_is "$(on_path "$ADDRESS_2")" 1 optimized
    same 'disks of namespace 1' 1 "$(ls -d /sys/block/nvme*n* | grep -v 'c[0-9]*n' | while read -r path; do cat "$path/nsid"; done | grep -c '^1$')"
}

# used_only OTHER ONE: for two seconds no I/O goes over OTHER, some over ONE.
used_only() {
    local other=$1 one=$2 before_other before_one
    before_other=$(path_sectors "$other" 1)
    before_one=$(path_sectors "$one" 1)
    sleep 2
    [ "$(path_sectors "$one" 1)" -gt "$before_one" ] || { echo "$one is not used"; return 1; }
    same "sectors over $other meanwhile" "$before_other" "$(path_sectors "$other" 1)"
}

fail_over() {
    local first second
    first=$(on_path "$ADDRESS_1")
    second=$(on_path "$ADDRESS_2")
    start_load "$(disk 1)" 25
    for state in inaccessible non-optimized; do
        target_ana 1 $state
        eventually 10 path_state_is "$first" 1 $state
        sleep 1
        used_only "$first" "$second"
        load_runs
        target_ana 1 optimized
        eventually 10 path_state_is "$first" 1 optimized
        target_ana 2 $state
        eventually 10 path_state_is "$second" 1 $state
        sleep 1
        used_only "$second" "$first"
        load_runs
        target_ana 2 optimized
        eventually 10 path_state_is "$second" 1 optimized
    done
    end_load
}

# Persistent Loss looks like Inaccessible to I/O and does not come back by itself.
persistent_loss() {
    local first
    first=$(on_path "$ADDRESS_1")
    start_load "$(disk 1)" 8
    target_ana 1 persistent-loss
    eventually 10 path_state_is "$first" 1 persistent-loss
    load_runs
    target_ana 1 optimized
    eventually 10 path_state_is "$first" 1 optimized
    end_load
}

# I/O waits while no path is usable, for as long as a group is in the state Change.
change() {
    local first second
    first=$(on_path "$ADDRESS_1")
    second=$(on_path "$ADDRESS_2")
    start_load "$(disk 1)" 8
    target_ana 2 inaccessible
    eventually 10 path_state_is "$second" 1 inaccessible
    target_ana 1 change
    eventually 10 path_state_is "$first" 1 change
    sleep 1
    load_runs
    target_ana 1 optimized
    eventually 10 path_state_is "$first" 1 optimized
    target_ana 2 optimized
    eventually 10 path_state_is "$second" 1 optimized
    end_load
}

need 'a target is there' target_start listeners
need 'connect over both paths' connect_both
STEP_LIMIT=120
step 'ANA fail-over under I/O' fail_over
step 'ANA persistent loss' persistent_loss
step 'ANA change' change
step 'disconnect' disconnect
