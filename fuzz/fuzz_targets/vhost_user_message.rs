//! Messages of a vhost-user front-end: understood or refused, whatever they say.

#![no_main]

use flexblk_initiator::export::vhost_user::fuzz;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (usize, &[u8])| {
    let (fds, bytes) = input;
    fuzz::message(bytes, fds % 10);
});
