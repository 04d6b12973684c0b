# What scenarios share. A scenario calls `step NAME FUNCTION [ARGUMENT...]` for everything it shows.

TAB=$(printf '\t')
FAILURES=0

# report WORD...: one line to the outside.
report() {
    local line=$1
    shift
    for word; do line="$line$TAB$word"; done
    printf '%s\n' "$line" >&8
}

# ask WORD...: has something done outside; prints the answer.
ask() {
    report ask "$@"
    local answer
    read -r answer <&8
    case $answer in
    ok*) printf '%s\n' "${answer#ok$TAB}" ;;
    *) echo "asked $*: $answer"; return 1 ;;
    esac
}

centiseconds() {
    local up
    read -r up _ </proc/uptime
    echo "${up%.*}${up#*.}"
}

# skip REASON: ends a step that does not apply to this peer.
skip() {
    echo "$*" >/tmp/skipped
    exit 77
}

# step NAME FUNCTION [ARGUMENT...]: runs a function that shows something; it fails with the first command that fails.
# Limit in seconds: STEP_LIMIT.
step() {
    local name=$1 started pid watchdog status took
    shift
    report step "$name"
    started=$(centiseconds)
    dmesg -c >/dev/null
    # Not inside a condition: there `set -e` would have no effect.
    ( set -eux; "$@" ) >/tmp/step 2>&1 &
    pid=$!
    ( sleep "${STEP_LIMIT:-90}"; kill -9 $pid ) 2>/dev/null &
    watchdog=$!
    wait $pid
    status=$?
    kill $watchdog 2>/dev/null
    wait $watchdog 2>/dev/null
    took=$(( $(centiseconds) - started ))
    case $status in
    0)
        report pass "$name" $took
        return 0
        ;;
    77)
        report skip "$name" $took "$(cat /tmp/skipped)"
        return 0
        ;;
    esac
    tail -n 40 /tmp/step | while IFS= read -r line; do report log "$line"; done
    dmesg | tail -n 15 | while IFS= read -r line; do report log "$line"; done
    if [ $status = 137 ]; then
        report fail "$name" $took "not within ${STEP_LIMIT:-90} s"
    else
        report fail "$name" $took "exit status $status"
    fi
    FAILURES=$((FAILURES + 1))
    return 1
}

# need NAME FUNCTION...: a step without which the others make no sense.
need() {
    step "$@" || finish
}

finish() {
    [ $FAILURES = 0 ]
    exit $?
}

# note TEXT: a line for whoever reads the log.
note() {
    report log "$*"
}

# eventually SECONDS COMMAND...: waits until a command succeeds.
eventually() {
    local deadline=$(( $(centiseconds) + $1 * 100 ))
    shift
    until "$@" >/tmp/eventually 2>&1; do
        if [ "$(centiseconds)" -gt $deadline ]; then
            echo "not in time: $*"
            cat /tmp/eventually
            return 1
        fi
        sleep 0.1
    done
}

# same WHAT EXPECTED FOUND
same() {
    [ "$2" = "$3" ] || { echo "$1: expected '$2', found '$3'"; return 1; }
}

# holds JSON-FILE EXPRESSION: an expression of jq that must be true.
holds() {
    jq -e "$2" "$1" >/dev/null || { echo "does not hold: $2"; cat "$1"; return 1; }
}

# fails STATUS COMMAND...: a command that must fail, with this NVMe status (hexadecimal, as nvme-cli prints it) in what it prints.
fails() {
    local wanted=$1
    shift
    if "$@" >/tmp/fails 2>&1; then
        echo "should have failed: $*"
        cat /tmp/fails
        return 1
    fi
    cat /tmp/fails
    grep -Eqi "\\(($wanted)\\)" /tmp/fails || { echo "status $wanted was expected"; return 1; }
}

# --- the host

# controllers: names of the connected controllers of our subsystem, oldest first.
controllers() {
    local path
    for path in /sys/class/nvme/nvme*; do
        [ -e "$path/subsysnqn" ] || continue
        [ "$(cat "$path/subsysnqn")" = "$SUBNQN" ] && basename "$path"
    done
    return 0
}

controller() {
    controllers | head -n 1
}

# on_path ADDRESS: the controller that is connected to it.
on_path() {
    local name
    for name in $(controllers); do
        grep -q "traddr=$1," "/sys/class/nvme/$name/address" && echo "$name"
    done
    return 0
}

# disk NSID: the block device of a namespace of our subsystem.
disk() {
    local path
    for path in /sys/block/nvme*n*; do
        [ -e "$path/nsid" ] || continue
        case $path in *c[0-9]*n*) continue ;; esac
        if [ "$(cat "$path/nsid")" = "$1" ]; then
            echo "/dev/$(basename "$path")"
            return 0
        fi
    done
    return 1
}

state_is() {
    [ "$(cat "/sys/class/nvme/$1/state" 2>/dev/null)" = "$2" ]
}

# connect PORT-NUMBER [OPTION...]: to path 1 or 2.
connect() {
    local path=$1 address port
    shift
    eval "address=\$ADDRESS_$path port=\$PORT_$path"
    nvme connect -t tcp -a "$address" -s "$port" -n "$SUBNQN" "$@"
}

disconnect() {
    nvme disconnect -n "$SUBNQN"
    eventually 20 no_controllers
}

no_controllers() {
    [ -z "$(controllers)" ]
}

# sectors DISK: its size in units of 512 bytes.
sectors() {
    cat "/sys/block/$(basename "$1")/size"
}

size_is() {
    [ "$(sectors "$1")" = "$2" ]
}

# has_disk NSID
has_disk() {
    local found
    found=$(disk "$1") && [ -b "$found" ]
}

# path_state CONTROLLER NSID: the ANA state of a namespace on one path.
path_state() {
    local path
    for path in /sys/class/nvme/"$1"/nvme*c*n*; do
        [ "$(cat "$path/nsid" 2>/dev/null)" = "$2" ] && cat "$path/ana_state"
    done
    return 0
}

path_state_is() {
    [ "$(path_state "$1" "$2")" = "$3" ]
}

# path_sectors CONTROLLER NSID: sectors read and written over one path so far.
path_sectors() {
    local path
    for path in /sys/class/nvme/"$1"/nvme*c*n*; do
        [ "$(cat "$path/nsid" 2>/dev/null)" = "$2" ] && awk '{ print $3 + $7 }' "$path/stat"
    done
    return 0
}

# start_load DISK SECONDS OPTION...: random reads and verified writes in the background; end_load waits for their good end.
start_load() {
    local device=$1 seconds=$2
    shift 2
    fio --name=load --filename="$device" --ioengine=libaio --direct=1 --rw=randrw --bs=4k --iodepth=8 --size=8M \
        --verify=crc32c --verify_backlog=64 --verify_fatal=1 --time_based --runtime="$seconds" "$@" >/tmp/load 2>&1 &
    LOAD=$!
    sleep 1
}

# Nothing has gone wrong so far; on a slow machine the load's time may be over.
load_runs() {
    kill -0 "$LOAD" 2>/dev/null || grep -q 'err= 0' /tmp/load || { cat /tmp/load; return 1; }
}

end_load() {
    wait "$LOAD" || { cat /tmp/load; return 1; }
}

# verify NAME DISK OPTION...: fio writes and reads back.
verify() {
    local name=$1 device=$2
    shift 2
    fio --name="$name" --filename="$device" --ioengine=libaio --direct=1 --verify=crc32c \
        --do_verify=1 --verify_fatal=1 --verify_backlog=512 --output-format=terse --terse-version=3 "$@" >/tmp/fio.$name 2>&1 || {
        cat /tmp/fio.$name
        return 1
    }
}

# Options of the kernel's module, such as multipath=N.
modprobe nvme-core ${NVME_CORE:-}
modprobe nvme-tcp
echo nqn.2014-08.org.nvmexpress:uuid:5c1c5e6e-26f1-4c0a-9d44-0f3ad17b3c01 >/etc/nvme/hostnqn
echo 5c1c5e6e-26f1-4c0a-9d44-0f3ad17b3c01 >/etc/nvme/hostid
# No peer: a disk is all there is.
[ -z "${PEER:-}" ] || . "/vm/$PEER.sh"
