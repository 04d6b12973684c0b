# Namespaces that come, grow and go while the host is connected: it learns of each by an asynchronous event.

connect_once() {
    connect 1
    eventually 30 has_disk 1
    eventually 30 has_disk 2
    # No event may be needed to see what is there already; 3 is not.
    ! has_disk 3
}

add() {
    target_add 3 16
    eventually 20 has_disk 3
    same 'sectors' 32768 "$(sectors "$(disk 3)")"
    verify new "$(disk 3)" --rw=randwrite --bs=4k --iodepth=8 --size=2M
}

resize() {
    target_resize 3 32
    eventually 20 size_is "$(disk 3)" 65536
    verify grown "$(disk 3)" --rw=randwrite --bs=4k --iodepth=8 --offset=20M --size=2M
}

no_disk_3() {
    ! has_disk 3
}

remove() {
    target_remove 3
    eventually 20 no_disk_3
}

# The other namespaces' I/O is not disturbed by any of it.
under_load() {
    start_load "$(disk 1)" 12
    for round in 1 2 3; do
        add
        resize
        remove
        load_runs
    done
    end_load
}

need 'a target is there' target_start
need 'connect' connect_once
step 'a namespace is added' add
step 'it grows' resize
step 'it is removed' remove
step 'the same under I/O on another namespace' under_load
step 'disconnect' disconnect
