//! fio external ioengine on the initiator library: `ioengine=external:/path/to/libflexblk_fio.so`.
//!
//! One library serves every fio from 3.28 to 3.42 without fio's headers: `layout` knows where each release keeps what
//! an engine needs and proves it at run time, `abi` holds everything that is `unsafe`, `options` is what a job file
//! may say, `address` makes a connection's address of it, and `engine` does the I/O in safe code.

mod abi;
mod address;
mod engine;
mod layout;
mod options;
