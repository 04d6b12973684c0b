//! Exports: a volume as a block device of this host, or of whoever connects.
//!
//! Every export is the same loop with another protocol at its front. A worker (`worker.rs`) is a thread with one
//! [`Channel`](crate::volume::Channel) and one server on it; what the host says and what the target answers arrive on
//! the same reactor, so one system call moves both sides.
//!
//! ```text
//! turn the channel ->  host's operations ended: Guest::on_completion   (parse, take a buffer, note a request)
//!                      requests ended:          Server::on_io          (note a reply)
//! Server::submit   ->  noted requests go to the channel
//! Guest::flush     ->  replies and receives go to the kernel; all of it leaves with the next turn
//! ```
//!
//! Data lies in registered memory of fixed size, of NBD in buffers out of a pool (`buffers.rs`), where the target's data is placed
//! and where the host's is received; when it is used up, the host waits. Byte ranges become logical blocks and requests
//! of a size that the target takes (`requests.rs`).
//!
//! Virtual machines (`vhost_user/`) are served in another way: their rings are memory that a thread looks at by itself, and
//! their requests lie in memory of their own, in pieces (`jobs.rs`).

mod buffers;
mod counters;
pub mod daemon;
pub mod fuse;
mod jobs;
pub mod loop_device;
pub mod nbd;
mod requests;
pub mod ublk;
pub mod vhost_user;
mod worker;

pub use counters::ExportCounters;

// What the servers use.
pub(crate) use buffers::{Buffer, Buffers};
pub(crate) use counters::{Counters, Kind};
pub(crate) use requests::{Ended, Extent, Geometry, Refusal, Requests, Wanted};
pub(crate) use worker::{Server, Worker, WorkerConfig};
