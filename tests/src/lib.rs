//! What end-to-end tests, `cargo xtask demo` and `cargo xtask bench` share: real processes, real sockets, real fio.
//!
//! Every process started here is tracked and killed by its id, on drop or by [`process::kill_all`].

pub mod attachment;
pub mod binaries;
pub mod cable;
pub mod fio;
pub mod host;
pub mod nbd;
pub mod ports;
pub mod proc;
pub mod process;
pub mod setup;
pub mod skip;
pub mod spdk;
pub mod spdk_rpc;
pub mod target;
pub mod vm;
