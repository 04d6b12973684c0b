# The kernel's NBD client with `flexblk export nbd`: what docs/mount.md says, over both kinds of socket.

DISK=/dev/nbd0
SYS=/sys/block/nbd0

# serve OPTION...: the exporter, in the background.
serve() {
    flexblk export nbd -t tcp -a "$ADDRESS_1" -n "$SUBNQN" -N 1 "$@" >/tmp/server.out 2>/tmp/server.err </dev/null &
    echo $! >/tmp/server.pid
    eventually 20 grep -q '^ready: ' /tmp/server.out || { cat /tmp/server.err; return 1; }
}

end_server() {
    kill -TERM "$(cat /tmp/server.pid)"
    eventually 5 server_is_gone || { cat /tmp/server.err; return 1; }
}

server_is_gone() {
    ! test -d /proc/"$(cat /tmp/server.pid)" || grep -q '^State:.Z' /proc/"$(cat /tmp/server.pid)"/status
}

load_modules() {
    modprobe nbd
    modprobe ext4
    mkdir -p /mnt /dev/shm
}

over_unix() {
    serve --socket /run/disk1.sock
    nbd-client -unix /run/disk1.sock $DISK -b 512 -C 2
    eventually 10 has_sectors $((64 * 2048))
}

over_tcp() {
    serve --listen 127.0.0.1:10809 --name disk1
    nbd-client 127.0.0.1 10809 $DISK -b 512 -N disk1
    eventually 10 has_sectors $((64 * 2048))
}

has_sectors() {
    same 'sectors' "$1" "$(cat $SYS/size)"
}

properties() {
    same 'connections' 2 "$(ls $SYS/mq | wc -l)"
    same 'block size' 512 "$(cat $SYS/queue/logical_block_size)"
    same 'cache' 'write back' "$(cat $SYS/queue/write_cache)"
    [ "$(cat $SYS/queue/discard_max_bytes)" -gt 0 ]
    nbd-client -c $DISK
}

verify_over_tcp() {
    file_is_the_same
    verify tcp $DISK --rw=randwrite --bsrange=4k-64k --iodepth=16 --size=8M
}

disconnect() {
    nbd-client -d $DISK
    eventually 10 has_sectors 0
    ! nbd-client -c $DISK
    end_server
}

need 'a target is there' target_start
need 'modules' load_modules
need 'nbd-client on a Unix socket' over_unix
step 'size, connections, block size, cache' properties
step 'discard and write zeroes' ranges
step 'fio verify' fio_verify
step 'mkfs.ext4, mount, files, trim, fsck' file_system
step 'disconnect' disconnect
need 'nbd-client over TCP' over_tcp
step 'fio verify and the same files over TCP' verify_over_tcp
step 'disconnect' disconnect
