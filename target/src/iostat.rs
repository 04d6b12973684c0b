//! What is done with each block device: operations, bytes, and how long the device took, as SPDK's
//! `bdev_get_iostat` has them.
//!
//! A data thread writes to a shard of its own with plain loads and stores; readers sum them. An I/O
//! that ends in the turn of the thread's loop in which it began took no time by the thread's clock: it
//! costs two additions.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::association::lock;
use crate::counters::add;

/// What an I/O does with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoType {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Deallocate: one I/O for each range of Dataset Management.
    Unmap,
    /// Copy.
    Copy,
    /// Compare.
    Compare,
    /// Verify, which SPDK does not have.
    Verify,
    /// Flush.
    Flush,
    /// Write Zeroes.
    WriteZeroes,
}

impl IoType {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Read,
        Self::Write,
        Self::Unmap,
        Self::Copy,
        Self::Compare,
        Self::Verify,
        Self::Flush,
        Self::WriteZeroes,
    ];

    /// SPDK's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Unmap => "unmap",
            Self::Copy => "copy",
            Self::Compare => "compare",
            Self::Verify => "verify",
            Self::Flush => "flush",
            Self::WriteZeroes => "write_zeroes",
        }
    }

    /// The class that it is counted in; flushes and write zeroes are in none, as in SPDK.
    #[must_use]
    pub fn class(self) -> Option<Class> {
        match self {
            Self::Read | Self::Compare | Self::Verify => Some(Class::Read),
            Self::Write => Some(Class::Write),
            Self::Unmap => Some(Class::Unmap),
            Self::Copy => Some(Class::Copy),
            Self::Flush | Self::WriteZeroes => None,
        }
    }
}

/// I/Os that are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Those that read: a device compares and verifies by reading.
    Read = 0,
    /// Writes.
    Write = 1,
    /// Deallocations.
    Unmap = 2,
    /// Copies.
    Copy = 3,
}

/// Why an I/O failed, as far as it is told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Any other reason.
    Failed = 0,
    /// A Compare found other data.
    Miscompare = 1,
    /// The host or another one aborted it, or it went with its queue or the other half of a fused
    /// operation.
    Aborted = 2,
}

#[derive(Debug)]
struct ClassShard {
    operations: AtomicU64,
    bytes: AtomicU64,
    /// Operations that took any time at all, and all of it.
    timed: AtomicU64,
    time_us: AtomicU64,
    /// Of those; [`u32::MAX`] and 0 while there were none.
    min_us: AtomicU32,
    max_us: AtomicU32,
}

impl Default for ClassShard {
    fn default() -> Self {
        Self {
            operations: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            timed: AtomicU64::new(0),
            time_us: AtomicU64::new(0),
            min_us: AtomicU32::new(u32::MAX),
            max_us: AtomicU32::new(0),
        }
    }
}

/// What one thread does with a device.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct IoShard {
    classes: [ClassShard; 4],
    failures: [AtomicU64; 3],
}

impl IoShard {
    /// Counts an I/O that has succeeded.
    #[inline]
    pub fn count(&self, class: Class, bytes: u64, took_us: u32) {
        let Some(shard) = self.classes.get(class as usize) else {
            return;
        };
        add(&shard.operations, 1);
        add(&shard.bytes, bytes);
        if took_us != 0 {
            shard.count_time(took_us);
        }
    }

    /// Counts an I/O that has failed.
    pub fn fail(&self, failure: Failure) {
        if let Some(count) = self.failures.get(failure as usize) {
            add(count, 1);
        }
    }
}

impl ClassShard {
    fn count_time(&self, us: u32) {
        add(&self.timed, 1);
        add(&self.time_us, us.into());
        // Whoever resets them may do so between load and store: then this I/O is the first after it.
        if us < self.min_us.load(Ordering::Relaxed) {
            self.min_us.store(us, Ordering::Relaxed);
        }
        if us > self.max_us.load(Ordering::Relaxed) {
            self.max_us.store(us, Ordering::Relaxed);
        }
    }
}

/// What numbers begin anew with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reset {
    /// Nothing.
    #[default]
    None,
    /// Everything.
    All,
    /// Shortest and longest times.
    MaxMin,
    /// Failures.
    Error,
}

/// Numbers of a class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassNumbers {
    /// I/Os that have succeeded.
    pub operations: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Microseconds of all of them together.
    pub time_us: u64,
    /// Of the shortest and the longest; `None` when there were none.
    pub range_us: Option<(u32, u32)>,
}

/// Numbers of a device, or of one thread's part in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoNumbers {
    /// By [`Class`].
    pub classes: [ClassNumbers; 4],
    /// By [`Failure`].
    pub failures: [u64; 3],
}

impl IoNumbers {
    /// These and those of another thread.
    #[must_use]
    pub fn plus(mut self, other: &Self) -> Self {
        for (sum, other) in self.classes.iter_mut().zip(&other.classes) {
            sum.operations += other.operations;
            sum.bytes += other.bytes;
            sum.time_us += other.time_us;
            sum.range_us = match (sum.range_us, other.range_us) {
                (Some(one), Some(two)) => Some((one.0.min(two.0), one.1.max(two.1))),
                (one, two) => one.or(two),
            };
        }
        for (sum, other) in self.failures.iter_mut().zip(&other.failures) {
            *sum += other;
        }
        self
    }
}

/// What a shard had counted when its numbers were last reset.
#[derive(Clone, Copy, Debug, Default)]
struct Baseline {
    classes: [ClassBaseline; 4],
    failures: [u64; 3],
}

#[derive(Clone, Copy, Debug, Default)]
struct ClassBaseline {
    operations: u64,
    bytes: u64,
    time_us: u64,
    /// I/Os that had taken no time when the shortest and longest were reset, and those that had.
    untimed: u64,
    timed: u64,
}

impl IoShard {
    /// Its numbers since `baseline`, which is then moved on as `reset` says.
    fn read(&self, baseline: &mut Baseline, reset: Reset) -> IoNumbers {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut numbers = IoNumbers::default();
        let classes = self.classes.iter().zip(&mut baseline.classes);
        for (read, (shard, base)) in numbers.classes.iter_mut().zip(classes) {
            let (operations, timed) = (get(&shard.operations), get(&shard.timed));
            let untimed = operations.saturating_sub(timed);
            let (bytes, time_us) = (get(&shard.bytes), get(&shard.time_us));
            let longest = shard.max_us.load(Ordering::Relaxed);
            let shortest = match untimed > base.untimed {
                true => 0,
                false => shard.min_us.load(Ordering::Relaxed).min(longest),
            };
            let any = untimed > base.untimed || timed > base.timed;
            *read = ClassNumbers {
                operations: operations.saturating_sub(base.operations),
                bytes: bytes.saturating_sub(base.bytes),
                time_us: time_us.saturating_sub(base.time_us),
                range_us: any.then_some((shortest, longest)),
            };
            if matches!(reset, Reset::All | Reset::MaxMin) {
                (base.untimed, base.timed) = (untimed, timed);
                shard.min_us.store(u32::MAX, Ordering::Relaxed);
                shard.max_us.store(0, Ordering::Relaxed);
            }
            if reset == Reset::All {
                (base.operations, base.bytes, base.time_us) = (operations, bytes, time_us);
            }
        }
        let failures = self.failures.iter().zip(&mut baseline.failures);
        for (read, (count, base)) in numbers.failures.iter_mut().zip(failures) {
            let count = get(count);
            *read = count.saturating_sub(*base);
            if matches!(reset, Reset::All | Reset::Error) {
                *base = count;
            }
        }
        numbers
    }
}

/// What all threads do with a device.
#[derive(Debug)]
pub struct IoStats {
    shards: Box<[IoShard]>,
    baselines: Mutex<Box<[Baseline]>>,
}

impl IoStats {
    /// Of so many threads.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self {
            shards: (0..threads).map(|_| IoShard::default()).collect(),
            baselines: Mutex::new(vec![Baseline::default(); threads].into()),
        }
    }

    /// A thread's.
    #[inline]
    #[must_use]
    pub fn shard(&self, thread: usize) -> Option<&IoShard> {
        self.shards.get(thread)
    }

    /// Each thread's numbers since they were last reset; they are reset now as `reset` says. An I/O of
    /// this very moment may be counted before or after it.
    pub fn read(&self, reset: Reset) -> Vec<IoNumbers> {
        let mut baselines = lock(&self.baselines);
        let shards = self.shards.iter().zip(baselines.iter_mut());
        shards
            .map(|(shard, baseline)| shard.read(baseline, reset))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(stats: &IoStats, reset: Reset) -> IoNumbers {
        let all = stats.read(reset);
        all.iter()
            .fold(IoNumbers::default(), |sum, one| sum.plus(one))
    }

    #[test]
    fn threads_add_up_and_each_mode_resets_its_part() {
        let stats = IoStats::new(2);
        assert_eq!(sum(&stats, Reset::All), IoNumbers::default());
        let [first, second] = [0, 1].map(|thread| stats.shard(thread).unwrap());
        first.count(Class::Read, 4096, 30);
        first.count(Class::Read, 4096, 10);
        second.count(Class::Read, 512, 700);
        second.count(Class::Unmap, 1 << 20, 0);
        second.fail(Failure::Miscompare);
        let [read, write, unmap, copy] = sum(&stats, Reset::None).classes;
        assert_eq!((read.operations, read.bytes, read.time_us), (3, 8704, 740));
        assert_eq!(read.range_us, Some((10, 700)));
        assert_eq!((write, copy), Default::default());
        assert_eq!((unmap.bytes, unmap.range_us), (1 << 20, Some((0, 0))));
        let each = stats.read(Reset::None);
        assert_eq!(each[0].classes[0].range_us, Some((10, 30)));
        // An I/O that took no time is the shortest.
        first.count(Class::Read, 0, 0);
        assert_eq!(
            sum(&stats, Reset::MaxMin).classes[0].range_us,
            Some((0, 700))
        );
        assert_eq!(sum(&stats, Reset::None).classes[0].range_us, None);
        first.count(Class::Read, 0, 20);
        let now = sum(&stats, Reset::Error);
        assert_eq!(now.classes[0].range_us, Some((20, 20)));
        assert_eq!((now.classes[0].operations, now.failures), (5, [0, 1, 0]));
        let now = sum(&stats, Reset::All);
        assert_eq!((now.classes[0].operations, now.failures), (5, [0; 3]));
        assert_eq!(sum(&stats, Reset::None), IoNumbers::default());
        assert!(stats.shard(2).is_none());
    }
}
