# A target that goes away and comes back, and one that does not. Namespace 2 keeps its content.

connect_patient() {
    connect 1 --keep-alive-tmo=2 --reconnect-delay=1 --ctrl-loss-tmo=120
    eventually 30 has_disk 2
}

write_marks() {
    verify marks "$(disk 2)" --rw=write --bs=64k --iodepth=4 --size=4M
}

read_marks() {
    fio --name=marks --filename="$(disk 2)" --ioengine=libaio --direct=1 --rw=read --bs=64k --iodepth=4 --size=4M \
        --verify=crc32c --verify_only --verify_fatal=1 >/tmp/marks 2>&1 || { cat /tmp/marks; return 1; }
}

outage() {
    local name
    name=$(controller)
    # Its own part of the disk: the marks stay.
    start_load "$(disk 2)" 14 --offset=16M
    target_stop
    eventually 20 state_is "$name" connecting
    load_runs
    sleep 3
    target_again
    eventually 40 state_is "$name" live
    end_load
}

loss() {
    local name
    connect 1 --keep-alive-tmo=2 --reconnect-delay=1 --ctrl-loss-tmo=3
    eventually 30 has_disk 2
    name=$(controller)
    target_stop
    eventually 40 no_controllers
    if has_disk 2; then
        echo 'the disk outlived its last controller'
        return 1
    fi
    target_again
    eventually 20 connect_patient
    read_marks
}

disconnect_while_down() {
    target_stop
    eventually 20 state_is "$(controller)" connecting
    disconnect
    target_again
}

need 'a target is there' target_start
need 'connect' connect_patient
step 'write' write_marks
step 'the target restarts under I/O' outage
step 'what was written is there' read_marks
step 'disconnect' disconnect
step 'a target that stays away: the controller is given up' loss
step 'disconnect while the target is away' disconnect_while_down
