# The kernel's target for an initiator outside, which does its steps and answers when it is through.

outside() {
    ask "$1"
}

# The target goes away and comes back while the initiator is connected.
outage() {
    ask outage-start
    target_stop
    sleep 3
    target_again
    ask outage-end
}

need 'a target is there' target_start
step 'discover' outside discover
step 'info, id-ctrl, id-ns, smart-log, error-log, show-regs' outside identify
step 'ana-log' outside ana-log
step 'write and read back' outside copy
step 'write and read back with digests' outside copy-digests
step 'fio verify' outside fio
step 'fio verify with digests' outside fio-digests
step 'compare: this kernel has none, and says so' outside compare-refused
step 'flush' outside flush
step 'write-zeroes' outside write-zeroes
step 'dsm' outside dsm
step 'flush and discard under fio' outside discard
step 'connection loss: a clear error, then it works again' outage
