//! What can go wrong in the reactor itself; results of operations travel in completions.

use std::io;

/// A failure of the reactor, as opposed to the failure of one operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel gave us no io_uring.
    #[error(
        "io_uring is not available ({0}); it needs Linux 5.11 or newer, \
         /proc/sys/kernel/io_uring_disabled = 0 and a sandbox that permits it"
    )]
    Setup(#[source] io::Error),
    /// `io_uring_enter` failed for a reason that no retry mends.
    #[error("io_uring_enter failed: {0}")]
    Enter(#[source] io::Error),
    /// Registering something with the ring failed.
    #[error("registering {what} with io_uring failed: {source}")]
    Register {
        /// What was to be registered.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The running kernel lacks a feature that has no substitute here.
    #[error("this kernel's io_uring has no {0}")]
    Unsupported(&'static str),
    /// Memory could not be created or mapped.
    #[error("{what} of {len_bytes} bytes failed: {source}")]
    Memory {
        /// The step that failed.
        what: &'static str,
        /// How much was asked for.
        len_bytes: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// An argument was out of range.
    #[error("{0}")]
    Argument(&'static str),
    /// An eventfd could not be created.
    #[error("creating an eventfd failed: {0}")]
    EventFd(#[source] io::Error),
    /// The thread could not be pinned.
    #[error("pinning the thread to core {core} failed: {source}")]
    Pin {
        /// The core asked for.
        core: usize,
        /// The kernel's answer.
        source: io::Error,
    },
}
