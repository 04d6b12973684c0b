//! One thread, one io_uring: completions, timers, mailboxes, registered memory.
