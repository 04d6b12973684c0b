//! A block device's latencies as a histogram, in the layout of SPDK's `bdev_get_histogram`: ranges of
//! powers of two, each cut into 2^granularity buckets; times shorter and longer than the ranges are in
//! the first and the last bucket. A tick is a microsecond.
//!
//! Each data thread has buckets of its own, made with the histogram, and adds to them with a plain
//! load and store.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::counters::add;
use crate::iostat::IoType;

/// Ticks of a second.
pub const TICK_RATE: u64 = 1_000_000;
/// Nanoseconds of a tick.
const TICK_NS: u64 = 1000;
/// SPDK's granularity unless another is asked for: 128 buckets a range.
pub const DEFAULT_GRANULARITY: u8 = 7;
/// Finer ones would take 450 KiB a thread and device and more, and show no more: below 1 ms
/// every tick has a bucket already.
pub const MAX_GRANULARITY: u8 = 10;
/// SPDK's shortest time unless another is asked for.
pub const DEFAULT_MIN_NS: u64 = 1000;
/// SPDK's longest time unless another is asked for.
pub const DEFAULT_MAX_NS: u64 = 120_000_000_000;

/// What a histogram counts, and how closely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistogramConfig {
    /// I/Os of this type; `None` is all of them.
    pub io_type: Option<IoType>,
    /// Binary logarithm of the buckets of a range, at most [`MAX_GRANULARITY`].
    pub granularity: u8,
    /// Shortest time that is told apart, in nanoseconds.
    pub min_ns: u64,
    /// Where the times that are told apart end, in nanoseconds; [`u64::MAX`] is nowhere.
    pub max_ns: u64,
}

impl Default for HistogramConfig {
    fn default() -> Self {
        Self {
            io_type: None,
            granularity: DEFAULT_GRANULARITY,
            min_ns: DEFAULT_MIN_NS,
            max_ns: DEFAULT_MAX_NS,
        }
    }
}

/// Why there is no such histogram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HistogramError {
    /// [`HistogramConfig::granularity`].
    #[error("granularity is at most {MAX_GRANULARITY}, not {0}")]
    Granularity(u8),
    /// The shortest time is not below the end.
    #[error("min_nsec must be below max_nsec, by a microsecond at least")]
    Empty,
}

/// Which bucket a time is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Binary logarithm of the buckets of a range.
    pub granularity: u8,
    /// The first range that there are buckets for.
    pub min_range: u8,
    /// The last one.
    pub max_range: u8,
}

impl Layout {
    /// The range of a time: 0 is that of the times below 2^granularity, one tick a bucket; range r
    /// ends at 2^(granularity + r).
    fn range(granularity: u8, ticks: u64) -> u8 {
        let bits = (u64::BITS - ticks.leading_zeros()) as u8;
        bits.saturating_sub(granularity)
    }

    fn new(config: &HistogramConfig) -> Result<Self, HistogramError> {
        let granularity = config.granularity;
        if granularity > MAX_GRANULARITY {
            return Err(HistogramError::Granularity(granularity));
        }
        let min = config.min_ns / TICK_NS;
        let max = match config.max_ns {
            u64::MAX => u64::MAX,
            ns => ns / TICK_NS,
        };
        if min >= max {
            return Err(HistogramError::Empty);
        }
        Ok(Self {
            granularity,
            min_range: Self::range(granularity, min),
            max_range: Self::range(granularity, max - 1),
        })
    }

    /// Number of buckets.
    fn len(self) -> usize {
        usize::from(self.max_range - self.min_range + 1) << self.granularity
    }

    /// Number of a time's bucket.
    #[inline]
    fn bucket(self, ticks: u64) -> usize {
        let range = Self::range(self.granularity, ticks);
        if range < self.min_range {
            return 0;
        }
        if range > self.max_range {
            return self.len() - 1;
        }
        let within = (ticks >> range.saturating_sub(1)) as usize & ((1 << self.granularity) - 1);
        (usize::from(range - self.min_range) << self.granularity) + within
    }

    /// Where a bucket ends: the first time that is in the next one.
    fn end(self, bucket: usize) -> u64 {
        let range = (bucket >> self.granularity) as u32 + u32::from(self.min_range);
        let within = (bucket as u64 & ((1 << self.granularity) - 1)) + 1;
        match range.checked_sub(1) {
            None => within,
            // The last one of all ends where the numbers do.
            Some(shift) => ((1 << self.granularity) + within).saturating_mul(1 << shift),
        }
    }
}

/// A histogram that is counted.
#[derive(Debug)]
pub struct LatencyHistogram {
    config: HistogramConfig,
    layout: Layout,
    threads: Box<[Box<[AtomicU64]>]>,
}

impl LatencyHistogram {
    /// An empty one, with buckets for so many threads.
    ///
    /// # Errors
    /// [`HistogramError`]: there is no such histogram.
    pub fn new(config: HistogramConfig, threads: usize) -> Result<Self, HistogramError> {
        let layout = Layout::new(&config)?;
        let buckets = |_| (0..layout.len()).map(|_| AtomicU64::new(0)).collect();
        Ok(Self {
            config,
            layout,
            threads: (0..threads).map(buckets).collect(),
        })
    }

    /// What it counts.
    #[must_use]
    pub fn config(&self) -> &HistogramConfig {
        &self.config
    }

    /// Which bucket a time is in.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Counts an I/O of that thread.
    #[inline]
    pub fn count(&self, thread: usize, io_type: IoType, took_us: u32) {
        if self.config.io_type.is_some_and(|only| only != io_type) {
            return;
        }
        let buckets = self.threads.get(thread);
        if let Some(count) =
            buckets.and_then(|buckets| buckets.get(self.layout.bucket(took_us.into())))
        {
            add(count, 1);
        }
    }

    /// I/Os by bucket.
    #[must_use]
    pub fn sum(&self) -> Vec<u64> {
        let mut sums = vec![0; self.layout.len()];
        for buckets in &self.threads {
            for (sum, count) in sums.iter_mut().zip(buckets) {
                *sum += count.load(Ordering::Relaxed);
            }
        }
        sums
    }

    /// For each border, in ascending order, the I/Os that took as many ticks or less, as closely as
    /// the buckets tell: one counts whole when it begins at the border or before. At the end, all I/Os.
    #[must_use]
    pub fn up_to(&self, borders: &[u64]) -> Vec<u64> {
        let sums = self.sum();
        let within = |border: &u64| {
            let mut begins = 0;
            let buckets = sums.iter().enumerate().take_while(|(bucket, _)| {
                let begun = begins <= *border;
                begins = self.layout.end(*bucket);
                begun
            });
            buckets.map(|(_, count)| count).sum()
        };
        let all = sums.iter().sum();
        borders.iter().map(within).chain([all]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn histogram(granularity: u8, min_ns: u64, max_ns: u64) -> LatencyHistogram {
        let config = HistogramConfig {
            granularity,
            min_ns,
            max_ns,
            ..HistogramConfig::default()
        };
        LatencyHistogram::new(config, 2).unwrap()
    }

    /// Figures of SPDK's layout: 128 buckets of one tick, 128 of one, 128 of two, 128 of four ...
    #[test]
    fn buckets_are_spdks() {
        let layout = histogram(7, 0, u64::MAX).layout();
        assert_eq!((layout.min_range, layout.max_range), (0, 57));
        assert_eq!(layout.len(), 58 * 128);
        for (ticks, bucket, end) in [
            (0, 0, 1),
            (127, 127, 128),
            (128, 128, 129),
            (255, 255, 256),
            (256, 256, 258),
            (511, 383, 512),
            (512, 384, 516),
            (u64::MAX, 58 * 128 - 1, u64::MAX),
        ] {
            assert_eq!(layout.bucket(ticks), bucket, "{ticks}");
            assert_eq!(layout.end(bucket), end, "{ticks}");
        }
        let usual = histogram(7, DEFAULT_MIN_NS, DEFAULT_MAX_NS).layout();
        assert_eq!((usual.min_range, usual.max_range), (0, 20));
        let some = histogram(3, 1_000_000, 1_000_000_000).layout();
        // 1000 has 10 bits, 999999 has 20.
        assert_eq!((some.min_range, some.max_range), (7, 17));
        assert_eq!(some.bucket(0), 0);
        assert_eq!(some.bucket(u64::MAX), some.len() - 1);
    }

    #[test]
    fn impossible_ones_are_refused() {
        let new = |granularity, min_ns, max_ns| {
            let config = HistogramConfig {
                granularity,
                min_ns,
                max_ns,
                ..HistogramConfig::default()
            };
            LatencyHistogram::new(config, 1).map(|_| ()).unwrap_err()
        };
        assert_eq!(new(11, 0, 1 << 40), HistogramError::Granularity(11));
        assert_eq!(new(7, 5000, 5999), HistogramError::Empty);
        assert_eq!(new(7, 0, 0), HistogramError::Empty);
    }

    #[test]
    fn threads_add_up_and_types_are_told_apart() {
        let config = HistogramConfig {
            io_type: Some(IoType::Write),
            ..HistogramConfig::default()
        };
        let histogram = LatencyHistogram::new(config, 2).unwrap();
        for (thread, io_type, us) in [
            (0, IoType::Write, 5),
            (1, IoType::Write, 5),
            (1, IoType::Write, 900),
            (0, IoType::Read, 5),
            (2, IoType::Write, 5),
        ] {
            histogram.count(thread, io_type, us);
        }
        let sums = histogram.sum();
        assert_eq!((sums[5], sums.iter().sum::<u64>()), (2, 3));
        assert_eq!(histogram.up_to(&[4, 5, 1000]), [0, 2, 3, 3]);
    }

    proptest! {
        /// Every time is in the bucket that begins where the one before ends.
        #[test]
        fn a_time_lies_in_its_bucket(
            granularity in 0..=MAX_GRANULARITY,
            ticks in prop_oneof![any::<u64>(), 0..10_000_u64, any::<u32>().prop_map(u64::from)],
        ) {
            let layout = histogram(granularity, 0, u64::MAX).layout();
            let bucket = layout.bucket(ticks);
            prop_assert!(bucket < layout.len());
            let begin = bucket.checked_sub(1).map_or(0, |before| layout.end(before));
            prop_assert!(begin <= ticks && (ticks < layout.end(bucket) || ticks == u64::MAX));
        }
    }
}
