//! Counters of I/O: one set per thread and subsystem, written by its thread only, summed when read.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::metrics::Operation;

/// What one thread did for one subsystem.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct IoCounters {
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    reads: AtomicU64,
    writes: AtomicU64,
    other: AtomicU64,
    failed: [AtomicU64; 3],
    media_errors: AtomicU64,
    busy_us: AtomicU64,
}

/// Sums of [`IoCounters`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct IoTotals {
    /// Bytes that hosts read.
    pub read_bytes: u64,
    /// Bytes that hosts wrote.
    pub written_bytes: u64,
    /// Completed reads and compares.
    pub reads: u64,
    /// Completed writes.
    pub writes: u64,
    /// Other completed I/O commands.
    pub other: u64,
    /// Reads and compares completed with an error.
    pub failed_reads: u64,
    /// Writes completed with an error.
    pub failed_writes: u64,
    /// Commands completed with an error, of any kind.
    pub failed: u64,
    /// Those of them that the device is to blame for.
    pub media_errors: u64,
    /// Microseconds with a command outstanding, of the busiest thread.
    pub busy_us: u64,
}

/// There is one writer: a plain load and store, no locked instruction.
#[inline]
pub(crate) fn add(counter: &AtomicU64, value: u64) {
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(value),
        Ordering::Relaxed,
    );
}

impl IoCounters {
    /// A read or compare succeeded.
    #[inline]
    pub fn read(&self, bytes: u64) {
        add(&self.reads, 1);
        add(&self.read_bytes, bytes);
    }

    /// A write succeeded.
    #[inline]
    pub fn written(&self, bytes: u64) {
        add(&self.writes, 1);
        add(&self.written_bytes, bytes);
    }

    /// Another command succeeded.
    #[inline]
    pub fn other(&self) {
        add(&self.other, 1);
    }

    /// A command failed: a read or compare, a write, or another one; `media` when the device is to
    /// blame.
    pub fn failed(&self, operation: Operation, media: bool) {
        let [reads, writes, other] = &self.failed;
        add(
            match operation {
                Operation::Read => reads,
                Operation::Write => writes,
                Operation::Other => other,
            },
            1,
        );
        add(&self.media_errors, u64::from(media));
    }

    /// Commands were outstanding for that long.
    #[inline]
    pub fn busy(&self, time: Duration) {
        add(
            &self.busy_us,
            u64::try_from(time.as_micros()).unwrap_or(u64::MAX),
        );
    }
}

/// The sums over threads.
#[must_use]
pub fn total(threads: &[IoCounters]) -> IoTotals {
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    threads
        .iter()
        .fold(IoTotals::default(), |sum, thread| IoTotals {
            read_bytes: sum.read_bytes.wrapping_add(get(&thread.read_bytes)),
            written_bytes: sum.written_bytes.wrapping_add(get(&thread.written_bytes)),
            reads: sum.reads.wrapping_add(get(&thread.reads)),
            writes: sum.writes.wrapping_add(get(&thread.writes)),
            other: sum.other.wrapping_add(get(&thread.other)),
            failed_reads: sum.failed_reads.wrapping_add(get(&thread.failed[0])),
            failed_writes: sum.failed_writes.wrapping_add(get(&thread.failed[1])),
            failed: thread
                .failed
                .iter()
                .fold(sum.failed, |sum, count| sum.wrapping_add(get(count))),
            media_errors: sum.media_errors.wrapping_add(get(&thread.media_errors)),
            busy_us: sum.busy_us.max(get(&thread.busy_us)),
        })
}
