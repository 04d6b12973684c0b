# The ways to connect that change what travels: digests, number and size of queues, kinds of queues.

# connected OPTION...: connects with these, checks data, disconnects.
connected() {
    connect 1 "$@"
    eventually 30 has_disk 1
    mkdir -p /tmp/out
    verify small "$(disk 1)" --rw=randwrite --bs=4k --iodepth=16 --size=4M
    verify large "$(disk 1)" --rw=write --bs=256k --iodepth=4 --size=8M
    disconnect
}

# queues NUMBER: that many I/O queues were made.
queues() {
    same 'number of I/O queues' "$1" "$(cat "/sys/class/nvme/$(controller)/queue_count" | awk '{ print $1 - 1 }')"
}

one_small_queue() {
    connect 1 --nr-io-queues=1 --queue-size=16
    eventually 30 has_disk 1
    queues 1
    same 'queue size' 16 "$(( $(cat "/sys/class/nvme/$(controller)/sqsize") + 1 ))"
    # More than the queue holds.
    verify deep "$(disk 1)" --rw=randwrite --bs=4k --iodepth=64 --size=4M
    disconnect
}

write_and_poll_queues() {
    connect 1 --nr-io-queues=1 --nr-write-queues=1 --nr-poll-queues=1
    eventually 30 has_disk 1
    queues 3
    verify queues "$(disk 1)" --rw=randrw --bs=4k --iodepth=8 --size=4M
    fio --name=polled --filename="$(disk 1)" --ioengine=pvsync2 --hipri --direct=1 --rw=randread --bs=4k --size=4M \
        --number_ios=200 >/tmp/polled 2>&1 || { cat /tmp/polled; return 1; }
    disconnect
}

# The same host a second time: another controller of the subsystem.
twice() {
    connect 1
    connect 1 --duplicate-connect
    eventually 30 has_disk 1
    same 'controllers' 2 "$(controllers | wc -l)"
    same 'different ids' 2 "$(for name in $(controllers); do cat "/sys/class/nvme/$name/cntlid"; done | sort -u | wc -l)"
    disconnect
}

unknown_subsystem() {
    if nvme connect -t tcp -a "$ADDRESS_1" -s "$PORT_1" -n "$SUBNQN-unknown"; then
        echo 'connected to a subsystem that does not exist'
        return 1
    fi
    # Connect Invalid Parameters, by the kernel's words.
    dmesg | grep -i 'connect' | tail -n 3
}

cycles() {
    for cycle in $(seq 10); do
        connect 1
        disconnect
    done
}

need 'a target is there' target_start
step 'header and data digests' connected --hdr-digest --data-digest
step 'header digest' connected --hdr-digest
step 'data digest' connected --data-digest
step 'without SQ flow control' connected --disable-sqflow
step 'one queue of 16' one_small_queue
step 'queues for writes and for polling' write_and_poll_queues
step 'two controllers of one host' twice
step 'a subsystem that does not exist' unknown_subsystem
step 'ten times connect and disconnect' cycles
