//! A guest's memory, taken for a virtqueue with block requests: nothing outside of it is named, every chain ends.

#![no_main]

use flexblk_initiator::export::vhost_user::fuzz;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fuzz::ring(bytes));
