//! vhost-user-blk: a volume as a disk of virtual machines on this host (QEMU: docs/interop/vhost-user.rst).
//!
//! The guest's memory is mapped here and registered with the channel, so that what a request asks for moves between it and
//! the network without a copy of ours, if its memory lies in one piece.

mod block;
mod cells;
mod events;
mod inflight;
mod memory;
mod message;
mod server;
mod session;
mod socket;
mod turns;
mod virtqueue;
mod worker;

pub use server::{Options, ServeError, serve};

/// Foreign bytes, for fuzzing.
#[doc(hidden)]
pub mod fuzz {
    /// As a message of a front-end.
    pub fn message(bytes: &[u8], fds: usize) -> bool {
        super::message::check(bytes, fds)
    }

    /// As the memory of a guest with one ring in it.
    pub fn ring(bytes: &[u8]) {
        super::virtqueue::check(bytes);
    }
}
