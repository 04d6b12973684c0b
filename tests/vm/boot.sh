# A host that attaches and mounts at boot, by our packages and systemd: what each start of it shows, and how it ends.

NAME=data
UNIT=flexblk@$NAME.service
DISK=/dev/ublkb0

# Nobody is there to be asked.
systemctl() {
    command systemctl --no-ask-password "$@"
}

mounted() {
    grep -q "^$DISK /mnt ext4 " /proc/mounts
}

active() {
    systemctl is-active "$@"
}

# inactive UNIT: not failed either.
inactive() {
    same "$1" inactive "$(systemctl is-active "$1")"
}

# listed EXPRESSION: what jq makes of our entry in the list.
listed() {
    flexblk list -o json | jq -r ".Attachments[] | select(.Name == \"$NAME\") | $1"
}

nothing_is_there() {
    ! test -e $DISK && ! test -e /run/flexblk && ! test -L "$BY_ID" && ! test -L /dev/flexblk/$NAME
}

# within SECONDS COMMAND...: its time is noted, too.
within() {
    local limit=$1 started took
    shift
    started=$(centiseconds)
    "$@"
    took=$(( $(centiseconds) - started ))
    note "$*: $((took / 100)).$(printf '%02d' $((took % 100))) s"
    [ $took -le $((limit * 100)) ]
}

at_boot() {
    eventually 60 mounted
    active $UNIT mnt.mount remote-fs.target
    # udev's names: systemd knows them by its events.
    active dev-flexblk-$NAME.device
    same "$BY_ID" $DISK "$(readlink -f "$BY_ID")"
    same /dev/flexblk/$NAME $DISK "$(readlink -f /dev/flexblk/$NAME)"
    same 'way' ublk "$(listed .Backend)"
    systemctl --no-legend --plain list-units --failed >/tmp/failed
    same 'failed units' '' "$(cat /tmp/failed)"
}

# It was killed before the last shutdown.
late() {
    eventually 60 tried_again
    target_again
}

tried_again() {
    test "$(systemctl show -P NRestarts $UNIT)" -ge 1
}

# written NAME: it may be in memory only.
written() {
    dd if=/dev/urandom of="/mnt/$1" bs=1M count=4
    sha256sum "/mnt/$1" >"/mnt/$1.sum"
}

there() {
    sha256sum -c "/mnt/$1.sum"
}

target_unit() {
    systemctl start flexblk-target.service
    active flexblk-target.service
    flexblk discover -a 127.0.0.1 | grep nqn.2026-11.dev.flexblk:guest
    # What is to be kept goes where the unit may write.
    flexblk resv-register -a 127.0.0.1 -n nqn.2026-11.dev.flexblk:guest --nrkey 1 --cptpl 3
    grep nqn.2026-11.dev.flexblk:guest /var/lib/flexblk/target.ptpl.json
    within 10 systemctl stop flexblk-target.service
    inactive flexblk-target.service
}

# The process is killed: systemd starts it again, and it takes the device over.
crash() {
    local before=$(systemctl show -P MainPID $UNIT)
    there first
    kill -9 "$before"
    eventually 20 restarted "$before"
    written second
    within 10 sync
    mounted
    there second
}

restarted() {
    active $UNIT
    test "$(systemctl show -P MainPID $UNIT)" != "$1"
    test "$(systemctl show -P NRestarts $UNIT)" = 1
}

# systemd's end of the attachment when a file system is mounted: errors after TimeoutStopSec, and the mount goes, too.
stop_mounted() {
    there second
    ! flexblk detach $NAME
    within 30 systemctl stop $UNIT
    eventually 10 nothing_is_there
    eventually 10 inactive mnt.mount
    ! mounted
}

# The user's: unmount, and detach.
detach() {
    within 20 systemctl start $UNIT
    within 20 systemctl start mnt.mount
    mounted
    there second
    within 10 umount /mnt
    within 5 flexblk detach $NAME
    nothing_is_there
    eventually 5 inactive $UNIT
    systemctl start $UNIT mnt.mount
    within 10 systemctl stop mnt.mount
    within 10 systemctl stop $UNIT
    inactive $UNIT
    nothing_is_there
    systemctl start $UNIT mnt.mount
    mounted
}

# Who unmounts waits for data that is not written.
target_is_dead() {
    target_stop
    eventually 10 no_path
    written third
}

# Somebody waits for that and keeps the file system busy.
target_is_silent() {
    target_path_down 1
    target_path_down 2
    eventually 20 no_path
    dd if=/dev/zero of=/mnt/fourth bs=64k count=4 conv=fsync &
    sleep 1
}

no_path() {
    same 'state' 'no path' "$(listed .State)"
}

[ "$START" != target-silent ] || need 'the target comes late' late
need 'attached and mounted at boot' at_boot
case $START in
first)
    step 'flexblk-target.service' target_unit
    need 'a file' written first
    end='reboot'
    ;;
target-dies)
    step 'kill -9 of the server: the unit takes the device over' crash
    step 'the target is dead' target_is_dead
    end='poweroff'
    ;;
target-silent)
    step 'systemctl stop with a mounted file system' stop_mounted
    step 'umount, detach and stop' detach
    step 'the target is silent' target_is_silent
    end='poweroff'
    ;;
esac
ask shutdown
systemctl $end
