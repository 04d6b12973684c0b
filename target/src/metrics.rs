//! What each host does on each namespace: counts, bytes, and how long it took and where.
//!
//! A data thread writes to shards of its own with plain loads and stores; readers sum them. An I/O
//! that begins and ends within one turn of the thread's loop took no time by the thread's clock,
//! which is read once in a turn: it costs two additions.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use flexblk_nvme::{Nqn, Nsid};

use crate::association::lock;
use crate::counters::add;

/// Upper bounds of the histograms' buckets in microseconds; one more bucket takes the rest.
pub const BOUNDS_US: [u32; BOUNDS] = {
    let mut bounds = [0; BOUNDS];
    let mut at = 0;
    while at < BOUNDS {
        bounds[at] = FIRST_US << at;
        at += 1;
    }
    bounds
};
const BOUNDS: usize = 19;
const FIRST_US: u32 = 16;
/// Most pairs of host and namespace that are told apart; later hosts are counted as one.
const MAX_SERIES: usize = 4096;
/// What the host is called under which they are counted.
pub const OTHER_HOSTS: &str = "other";
/// Slow commands that are logged in a second.
const SLOW_PER_SECOND: u32 = 10;

/// What a command does, as far as it is told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read, Compare, Verify.
    Read = 0,
    /// Write, Write Zeroes, Copy.
    Write = 1,
    /// The others.
    Other = 2,
}

impl Operation {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Other];

    /// Its label.
    #[must_use]
    pub fn name(self) -> &'static str {
        ["read", "write", "other"][self as usize]
    }
}

/// Where a command's time went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// All of it, from the capsule to the response.
    Total = 0,
    /// Waiting for buffers.
    Wait = 1,
    /// Fetching its data from the host.
    Network = 2,
    /// With the block device.
    Backend = 3,
}

impl Stage {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 4] = [Self::Total, Self::Wait, Self::Network, Self::Backend];

    /// Its label.
    #[must_use]
    pub fn name(self) -> &'static str {
        ["total", "wait", "network", "backend"][self as usize]
    }
}

/// Microseconds of a command, by [`Stage`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    began_us: u32,
    mark_us: u32,
    stages_us: [u32; 4],
}

impl Spent {
    /// Nothing.
    pub const ZERO: Self = Self {
        began_us: 0,
        mark_us: 0,
        stages_us: [0; 4],
    };

    /// A command that begins. Times are the thread's, and wrap around after 71 minutes.
    #[inline]
    #[must_use]
    pub fn begin(now_us: u32) -> Self {
        Self {
            began_us: now_us,
            mark_us: now_us,
            stages_us: [0; 4],
        }
    }

    /// The time since the last call, which is returned, was spent there.
    #[inline]
    pub fn spend(&mut self, stage: Stage, now_us: u32) -> u32 {
        let passed_us = now_us.wrapping_sub(self.mark_us);
        if let Some(spent) = self.stages_us.get_mut(stage as usize) {
            *spent = spent.wrapping_add(passed_us);
        }
        self.mark_us = now_us;
        passed_us
    }

    /// The whole time, and that of each stage.
    #[inline]
    #[must_use]
    pub fn end(mut self, now_us: u32) -> [u32; 4] {
        self.stages_us[0] = now_us.wrapping_sub(self.began_us);
        self.stages_us
    }
}

#[derive(Debug, Default)]
struct Histogram {
    sum_us: AtomicU64,
    /// Commands that took any time at all, by bucket.
    buckets: [AtomicU64; BOUNDS + 1],
}

impl Histogram {
    fn add(&self, us: u32) {
        add(&self.sum_us, us.into());
        let bucket = BOUNDS_US.partition_point(|bound| *bound < us);
        if let Some(bucket) = self.buckets.get(bucket) {
            add(bucket, 1);
        }
    }
}

#[derive(Debug, Default)]
struct OperationShard {
    commands: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    stages: [Histogram; 4],
}

/// One thread's numbers of a host on a namespace.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Shard {
    operations: [OperationShard; 3],
}

impl Shard {
    /// Counts a command that has ended; `bytes` is 0 unless it succeeded.
    #[inline]
    pub fn count(&self, operation: Operation, bytes: u32, success: bool, spent_us: &[u32; 4]) {
        let Some(shard) = self.operations.get(operation as usize) else {
            return;
        };
        add(&shard.commands, 1);
        add(&shard.bytes, bytes.into());
        if !success {
            add(&shard.failed, 1);
        }
        if spent_us[0] != 0 {
            Self::count_time(shard, spent_us);
        }
    }

    fn count_time(shard: &OperationShard, spent_us: &[u32; 4]) {
        for (histogram, us) in shard.stages.iter().zip(spent_us) {
            if *us != 0 {
                histogram.add(*us);
            }
        }
    }
}

/// A histogram, summed. Its count is that of the commands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Microseconds of all.
    pub sum_us: u64,
    /// Commands by bucket: up to each of [`BOUNDS_US`], and longer.
    pub buckets: [u64; BOUNDS + 1],
}

/// An operation, summed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// Completed commands.
    pub commands: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Those that failed.
    pub failed: u64,
    /// By [`Stage`].
    pub stages: [Times; 4],
}

/// Whose numbers they are.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Series {
    /// Name of the host.
    pub host: String,
    /// Name of the subsystem.
    pub subsystem: String,
    /// The namespace.
    pub nsid: u32,
    /// Its block device, by [`crate::bdevs::Bdev::id`].
    pub device_id: u64,
}

/// All of them, and how slow a command must be to be logged.
#[derive(Debug)]
pub struct Metrics {
    shards: Mutex<BTreeMap<Series, BTreeMap<usize, Arc<Shard>>>>,
    slow_us: AtomicU32,
    /// The second in which slow commands were logged last, and how many.
    slow_logged: AtomicU64,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            shards: Mutex::default(),
            slow_us: AtomicU32::new(u32::MAX),
            slow_logged: AtomicU64::new(0),
        }
    }
}

impl Metrics {
    /// A thread's shard. Taken once for each queue and namespace.
    #[must_use]
    pub fn shard(&self, thread: usize, host: &Nqn, at: (&Nqn, Nsid, u64)) -> Arc<Shard> {
        let (subsystem, nsid, device_id) = at;
        let mut shards = lock(&self.shards);
        let mut series = Series {
            host: host.as_str().to_owned(),
            subsystem: subsystem.as_str().to_owned(),
            nsid: nsid.get(),
            device_id,
        };
        if shards.len() >= MAX_SERIES && !shards.contains_key(&series) {
            OTHER_HOSTS.clone_into(&mut series.host);
        }
        let threads = shards.entry(series).or_default();
        Arc::clone(threads.entry(thread).or_default())
    }

    /// Forgets namespaces that are gone.
    pub(crate) fn retain(&self, keep: impl Fn(&Series) -> bool) {
        lock(&self.shards).retain(|series, _| keep(series));
    }

    /// Everything, summed over threads.
    #[must_use]
    pub fn sum(&self) -> Vec<(Series, [Numbers; 3])> {
        let shards = lock(&self.shards);
        let sums = shards.iter().map(|(series, threads)| {
            let mut sum: [Numbers; 3] = Default::default();
            for shard in threads.values() {
                for (sum, shard) in sum.iter_mut().zip(&shard.operations) {
                    sum.add(shard);
                }
            }
            (series.clone(), sum)
        });
        sums.collect()
    }

    /// How many microseconds a command must take to be logged; `None` when none are.
    #[must_use]
    pub fn slow_us(&self) -> Option<u32> {
        let us = self.slow_us.load(Ordering::Relaxed);
        (us != u32::MAX).then_some(us)
    }

    /// Changes that.
    pub fn set_slow_us(&self, us: Option<u32>) {
        self.slow_us
            .store(us.unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    /// Is a command of that length to be logged?
    #[inline]
    #[must_use]
    pub fn is_slow(&self, total_us: u32) -> bool {
        total_us >= self.slow_us.load(Ordering::Relaxed)
    }

    /// May a slow command be logged now? At most ten in a second are.
    #[must_use]
    pub fn may_log_slow(&self, now_us: u32) -> bool {
        let second = u64::from(now_us / 1_000_000);
        let mut logged = self.slow_logged.load(Ordering::Relaxed);
        if logged >> 32 != second {
            logged = second << 32;
        }
        // Two threads at the same moment may log one more than that.
        self.slow_logged.store(logged + 1, Ordering::Relaxed);
        (logged as u32) < SLOW_PER_SECOND
    }
}

impl Numbers {
    fn add(&mut self, shard: &OperationShard) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        self.commands += get(&shard.commands);
        self.bytes += get(&shard.bytes);
        self.failed += get(&shard.failed);
        for (times, histogram) in self.stages.iter_mut().zip(&shard.stages) {
            times.sum_us += get(&histogram.sum_us);
            for (sum, bucket) in times.buckets.iter_mut().zip(&histogram.buckets) {
                *sum += get(bucket);
            }
        }
        // Those that took no time were not counted one by one.
        for times in &mut self.stages {
            let rest = &times.buckets[1..];
            times.buckets[0] =
                times.buckets[0].max(self.commands - rest.iter().sum::<u64>().min(self.commands));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_add_up() {
        let metrics = Metrics::default();
        let host = Nqn::opaque("host").unwrap();
        let subsystem = Nqn::opaque("sub").unwrap();
        let at = (&subsystem, Nsid::new(3), 7);
        let first = metrics.shard(0, &host, at);
        let second = metrics.shard(1, &host, at);
        assert!(Arc::ptr_eq(&first, &metrics.shard(0, &host, at)));
        first.count(Operation::Read, 4096, true, &[0; 4]);
        first.count(Operation::Read, 4096, true, &[100, 0, 0, 90]);
        second.count(Operation::Read, 0, false, &[5_000_000, 1000, 0, 0]);
        second.count(Operation::Write, 512, true, &[16, 0, 16, 0]);
        let all = metrics.sum();
        assert_eq!(all.len(), 1);
        let (series, [read, write, other]) = &all[0];
        assert_eq!((series.nsid, series.device_id), (3, 7));
        assert_eq!((read.commands, read.bytes, read.failed), (3, 8192, 1));
        let total = &read.stages[Stage::Total as usize];
        assert_eq!(total.sum_us, 5_000_100);
        // 16, 32, 64, 128: the fourth bucket.
        assert_eq!((total.buckets[0], total.buckets[3]), (1, 1));
        assert_eq!(total.buckets[BOUNDS], 1, "longer than any bound");
        let backend = &read.stages[Stage::Backend as usize];
        assert_eq!((backend.buckets[0], backend.buckets[3]), (2, 1));
        assert_eq!(
            write.stages[0].buckets[0], 1,
            "a bound is part of its bucket"
        );
        assert_eq!(other, &Numbers::default());
        metrics.retain(|series| series.nsid != 3);
        assert!(metrics.sum().is_empty());
    }

    #[test]
    fn hosts_beyond_the_limit_are_one() {
        let metrics = Metrics::default();
        let subsystem = Nqn::opaque("sub").unwrap();
        for number in 0..MAX_SERIES + 100 {
            let host = Nqn::opaque(&format!("host{number}")).unwrap();
            let shard = metrics.shard(0, &host, (&subsystem, Nsid::new(1), 0));
            shard.count(Operation::Read, 1, true, &[0; 4]);
        }
        let all = metrics.sum();
        assert_eq!(all.len(), MAX_SERIES + 1);
        let other = all.iter().find(|(series, _)| series.host == OTHER_HOSTS);
        assert_eq!(other.unwrap().1[0].commands, 100);
    }

    #[test]
    fn slow_commands_are_logged_now_and_then() {
        let metrics = Metrics::default();
        assert!(!metrics.is_slow(u32::MAX - 1));
        metrics.set_slow_us(Some(1000));
        assert!(metrics.is_slow(1000) && !metrics.is_slow(999));
        let in_a_second = (0..100).filter(|_| metrics.may_log_slow(5_500_000)).count();
        assert_eq!(in_a_second, 10);
        assert!(metrics.may_log_slow(6_000_000));
    }

    #[test]
    fn time_is_spent_where_it_was() {
        let mut spent = Spent::begin(u32::MAX - 4);
        spent.spend(Stage::Wait, 5);
        spent.spend(Stage::Backend, 25);
        assert_eq!(spent.spend(Stage::Backend, 30), 5);
        assert_eq!(spent.end(40), [45, 10, 0, 25]);
    }
}
