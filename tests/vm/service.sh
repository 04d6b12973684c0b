# A service of a guest with systemd, which runs the scenario.
/usr/bin/busybox --install -s /bin
export PATH=/usr/sbin:/usr/bin:/bin HOME=/tmp
. /vm/run.sh
# It shuts the machine down itself, unless it has ended early.
[ $? = 0 ] || systemctl --no-ask-password poweroff
