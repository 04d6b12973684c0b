# A target outside of the guest; whoever runs the guest does these operations.

ADDRESS_1=10.77.0.1
ADDRESS_2=10.77.1.1
PORT_1=4420
PORT_2=4420

# target_start [everywhere|listeners]: on path 1, on every address, or with a listener for each path.
target_start() {
    ask start "$@"
}

target_stop() {
    ask stop
}

target_again() {
    ask again
}

target_add() {
    ask add "$1" "$2"
}

target_remove() {
    ask remove "$1"
}

target_resize() {
    ask resize "$1" "$2"
}

# target_ana PATH STATE
target_ana() {
    ask ana "$1" "$2"
}

target_is_kernel() {
    false
}

# A path that is silent: packets go nowhere, as when a cable is pulled.
target_path_down() {
    ask path-down "$1"
}

target_path_up() {
    ask path-up "$1"
}
