//! What an export has done, counted by the threads that serve it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::Op;

/// Kinds of requests that are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Other,
}

impl Kind {
    pub(crate) fn of(op: Op) -> Kind {
        match op {
            Op::Read => Kind::Read,
            Op::Write { .. } => Kind::Write,
            _ => Kind::Other,
        }
    }
}

/// What one thread did; written by it alone, with plain stores, and summed by whoever wants to know.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    begun: AtomicU64,
    reads: AtomicU64,
    writes: AtomicU64,
    others: AtomicU64,
    errors: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    nanoseconds: AtomicU64,
}

fn add(counter: &AtomicU64, value: u64) {
    let sum = counter.load(Ordering::Relaxed).wrapping_add(value);
    counter.store(sum, Ordering::Relaxed);
}

impl Counters {
    /// A request has begun; [`count`](Self::count) ends it.
    pub(crate) fn begin(&self) {
        add(&self.begun, 1);
    }

    pub(crate) fn count(&self, kind: Kind, bytes: u32, failed: bool, took: Duration) {
        match kind {
            Kind::Read => {
                add(&self.reads, 1);
                add(&self.bytes_read, u64::from(bytes));
            }
            Kind::Write => {
                add(&self.writes, 1);
                add(&self.bytes_written, u64::from(bytes));
            }
            Kind::Other => add(&self.others, 1),
        }
        add(&self.errors, u64::from(failed));
        add(
            &self.nanoseconds,
            u64::try_from(took.as_nanos()).unwrap_or(u64::MAX),
        );
    }
}

/// What an export did since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExportCounters {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Flushes, discards and the like.
    pub others: u64,
    /// Of all of them, those that failed.
    pub errors: u64,
    /// Requests that have begun and not ended.
    pub under_way: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Time from the arrival of each request to its answer, summed.
    pub latency: Duration,
}

impl ExportCounters {
    /// Requests that have ended.
    #[must_use]
    pub fn ended(&self) -> u64 {
        self.reads + self.writes + self.others
    }

    /// Of all threads together.
    pub(crate) fn sum(threads: &[Arc<Counters>]) -> ExportCounters {
        let mut sum = ExportCounters::default();
        let mut begun = 0;
        for counters in threads {
            let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            sum.reads += read(&counters.reads);
            sum.writes += read(&counters.writes);
            sum.others += read(&counters.others);
            sum.errors += read(&counters.errors);
            sum.bytes_read += read(&counters.bytes_read);
            sum.bytes_written += read(&counters.bytes_written);
            sum.latency += Duration::from_nanos(read(&counters.nanoseconds));
            begun += read(&counters.begun);
        }
        // The threads go on meanwhile.
        sum.under_way = begun.saturating_sub(sum.ended());
        sum
    }
}
