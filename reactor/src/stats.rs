//! Counters of one reactor.

use std::time::Duration;

/// What a reactor has done since it was made. Plain numbers, written by its thread only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Calls of `turn`.
    pub turns: u64,
    /// `io_uring_enter` system calls.
    pub enters: u64,
    /// How many of them slept.
    pub sleeps: u64,
    /// Wake-ups by a `Waker` that were noticed.
    pub wakes: u64,
    /// How many of them had to write the eventfd because we slept.
    pub eventfd_wakes: u64,
    /// Entries submitted.
    pub sqes: u64,
    /// Completions reaped.
    pub cqes: u64,
    /// Timers fired.
    pub timers: u64,
    /// Entries that waited outside the full submission queue for the next turn.
    pub deferred: u64,
    /// Times the kernel asked us to reap first (completion queue overflow).
    pub overflows: u64,
    /// Time between the end of one turn and the first empty look in the next: work.
    pub busy: Duration,
    /// Time spent spinning without work.
    pub spun: Duration,
    /// Time spent asleep in the kernel.
    pub slept: Duration,
}
