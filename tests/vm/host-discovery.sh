# Discovery that connects by itself, and a discovery controller that stays.

DISCOVERY=nqn.2014-08.org.nvmexpress.discovery

connect_all() {
    nvme connect-all -t tcp -a "$ADDRESS_1" -s "$PORT_1"
    eventually 30 has_disk 1
    [ -n "$(on_path "$ADDRESS_1")" ]
    nvme disconnect-all
    eventually 20 no_controllers
}

discovery_controllers() {
    grep -l "^$DISCOVERY$" /sys/class/nvme/nvme*/subsysnqn 2>/dev/null | cut -d/ -f5
}

persistent() {
    local name
    nvme connect-all -t tcp -a "$ADDRESS_1" -s "$PORT_1" --persistent --keep-alive-tmo=5
    eventually 30 has_disk 1
    name=$(discovery_controllers)
    [ -n "$name" ]
    same 'kind of the controller' discovery "$(cat "/sys/class/nvme/$name/cntrltype")"
    # Longer than its keep-alive time-out.
    sleep 8
    state_is "$name" live
    # It is asked again without a new connection.
    nvme discover -d "$name" -o json >/tmp/again
    holds /tmp/again "any(.records[]; .subnqn == \"$SUBNQN\")"
}

nothing() {
    [ -z "$(ls /sys/class/nvme 2>/dev/null)" ]
}

disconnect_all() {
    nvme disconnect-all
    eventually 20 no_controllers
    # nvme-cli keeps persistent discovery controllers unless it is told their name.
    nvme disconnect -n "$DISCOVERY" || true
    eventually 20 nothing
}

again_and_again() {
    for round in $(seq 10); do
        nvme discover -t tcp -a "$ADDRESS_1" -s "$PORT_1" >/tmp/round
        grep -q "$SUBNQN" /tmp/round
    done
}

need 'a target is there' target_start
step 'connect-all' connect_all
step 'a persistent discovery controller' persistent
step 'disconnect-all' disconnect_all
step 'ten discoveries' again_and_again
