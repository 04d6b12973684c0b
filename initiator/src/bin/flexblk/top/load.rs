//! What a target did between two looks at its counters.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Sort;

/// Counters since the target's start: `flexblk_get_io` and `flexblk_get_stats`.
#[derive(Clone, Debug, Default)]
pub(super) struct Sample {
    io: Io,
    stats: Stats,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Io {
    /// Microseconds since the target's start.
    ticks: u64,
    /// Upper bounds of the histograms' buckets; one more bucket takes the rest.
    bounds_us: Vec<u64>,
    series: Vec<Series>,
}

/// A host on a namespace.
#[derive(Clone, Debug, Deserialize)]
struct Series {
    host: String,
    subsystem: String,
    nsid: u32,
    bdev_name: Option<String>,
    read: Counts,
    write: Counts,
    other: Counts,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Counts {
    commands: u64,
    bytes: u64,
    failed: u64,
    total: Times,
    wait: Times,
    network: Times,
    backend: Times,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Times {
    sum_us: u64,
    buckets: Vec<u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Stats {
    uptime_s: f64,
    controllers: usize,
    threads: Vec<ThreadStats>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct ThreadStats {
    thread: usize,
    core: usize,
    cpu_us: u64,
    queues: usize,
    controllers: usize,
    pending_bdev_io: usize,
    buffer_waits: u64,
    reactor: BTreeMap<String, u64>,
}

impl Sample {
    pub(super) fn parse(io: Value, stats: Value) -> serde_json::Result<Self> {
        Ok(Self {
            io: serde_json::from_value(io)?,
            stats: serde_json::from_value(stats)?,
        })
    }
}

/// What happened between two samples.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Load {
    /// Time between them.
    pub(super) seconds: f64,
    /// Since the target's start.
    pub(super) uptime_s: f64,
    /// Controllers now.
    pub(super) controllers: usize,
    /// Queue pairs and NVMe/TCP connections now.
    pub(super) queues: usize,
    pub(super) threads: Vec<ThreadLoad>,
    /// Who has done something.
    pub(super) io: Vec<IoLoad>,
}

/// A data thread.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ThreadLoad {
    pub(super) thread: String,
    pub(super) core: usize,
    /// Of its time, the part in which it had something to do.
    pub(super) busy_percent: f64,
    /// CPU time, polling included.
    pub(super) cpu_percent: f64,
    pub(super) queues: usize,
    pub(super) controllers: usize,
    pub(super) pending_bdev_io: usize,
    /// Commands that had to wait for buffers, in a second.
    pub(super) buffer_waits: f64,
}

/// A host with one operation on one namespace.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct IoLoad {
    pub(super) host: String,
    pub(super) subsystem: String,
    pub(super) nsid: u32,
    pub(super) bdev_name: Option<String>,
    pub(super) operation: &'static str,
    pub(super) iops: f64,
    pub(super) bytes_per_s: f64,
    pub(super) failed_per_s: f64,
    /// Microseconds of a command in the mean; the stages are parts of it.
    pub(super) mean_us: f64,
    pub(super) wait_us: f64,
    pub(super) network_us: f64,
    pub(super) backend_us: f64,
    /// 99 of 100 commands took at most so long, by the bounds of the target's histogram; none when
    /// that is more than the last of them.
    pub(super) p99_us: Option<u64>,
}

impl Load {
    /// A target that was started in between begins at 0.
    pub(super) fn between(before: &Sample, after: &Sample) -> Self {
        let nothing = Sample::default();
        let before = match after.io.ticks < before.io.ticks {
            true => &nothing,
            false => before,
        };
        let seconds = (after.io.ticks - before.io.ticks) as f64 / 1e6;
        let known: BTreeMap<_, _> = before.io.series.iter().map(|of| (of.key(), of)).collect();
        let mut io = Vec::new();
        for series in &after.io.series {
            let was = known.get(&series.key());
            for (number, (operation, now)) in series.operations().into_iter().enumerate() {
                let none = Counts::default();
                let was = was
                    .and_then(|was| was.operations().into_iter().nth(number))
                    .map_or(&none, |(_, counts)| counts);
                // A namespace that was removed and added again begins at 0.
                let was = match was.commands <= now.commands {
                    true => was,
                    false => &none,
                };
                if was.commands != now.commands {
                    let change = (was, now);
                    io.push(IoLoad::of(
                        series,
                        operation,
                        change,
                        &after.io.bounds_us,
                        seconds,
                    ));
                }
            }
        }
        let elapsed = after.stats.uptime_s - before.stats.uptime_s;
        let threads: Vec<ThreadLoad> = after
            .stats
            .threads
            .iter()
            .map(|now| {
                let mut was = before.stats.threads.iter();
                let was = was.find(|was| was.thread == now.thread);
                ThreadLoad::between(was.unwrap_or(&ThreadStats::default()), now, elapsed)
            })
            .collect();
        Self {
            seconds,
            uptime_s: after.stats.uptime_s,
            controllers: after.stats.controllers,
            queues: threads.iter().map(|thread| thread.queues).sum(),
            threads,
            io,
        }
    }

    /// The busiest first.
    pub(super) fn sort(&mut self, by: Sort) {
        let key = |load: &IoLoad| match by {
            Sort::Iops => load.iops,
            Sort::Bandwidth => load.bytes_per_s,
            Sort::Latency => load.mean_us,
        };
        self.io.sort_by(|a, b| key(b).total_cmp(&key(a)));
    }
}

impl Series {
    fn key(&self) -> (&str, &str, u32) {
        (&self.host, &self.subsystem, self.nsid)
    }

    fn operations(&self) -> [(&'static str, &Counts); 3] {
        [
            ("read", &self.read),
            ("write", &self.write),
            ("other", &self.other),
        ]
    }
}

/// Of a whole, or of none.
fn per(amount: f64, whole: f64) -> f64 {
    match whole > 0.0 {
        true => amount / whole,
        false => 0.0,
    }
}

impl IoLoad {
    fn of(
        series: &Series,
        operation: &'static str,
        (was, now): (&Counts, &Counts),
        bounds_us: &[u64],
        seconds: f64,
    ) -> Self {
        let change = |now: u64, was: u64| now.saturating_sub(was) as f64;
        let commands = change(now.commands, was.commands);
        let mean = |now: &Times, was: &Times| per(change(now.sum_us, was.sum_us), commands);
        Self {
            host: series.host.clone(),
            subsystem: series.subsystem.clone(),
            nsid: series.nsid,
            bdev_name: series.bdev_name.clone(),
            operation,
            iops: per(commands, seconds),
            bytes_per_s: per(change(now.bytes, was.bytes), seconds),
            failed_per_s: per(change(now.failed, was.failed), seconds),
            mean_us: mean(&now.total, &was.total),
            wait_us: mean(&now.wait, &was.wait),
            network_us: mean(&now.network, &was.network),
            backend_us: mean(&now.backend, &was.backend),
            p99_us: quantile(0.99, &now.total.buckets, &was.total.buckets, bounds_us),
        }
    }
}

/// The bound that so many of the commands did not exceed.
fn quantile(of: f64, now: &[u64], was: &[u64], bounds_us: &[u64]) -> Option<u64> {
    let was = was.iter().chain(std::iter::repeat(&0));
    let changes: Vec<u64> = now
        .iter()
        .zip(was)
        .map(|(now, was)| now.saturating_sub(*was))
        .collect();
    let wanted = changes.iter().sum::<u64>() as f64 * of;
    let mut seen = 0;
    let reached = changes.iter().position(|count| {
        seen += count;
        seen as f64 >= wanted
    })?;
    bounds_us.get(reached).copied()
}

impl ThreadLoad {
    fn between(was: &ThreadStats, now: &ThreadStats, seconds: f64) -> Self {
        let spent = |name: &str| {
            let of = |stats: &ThreadStats| stats.reactor.get(name).copied().unwrap_or(0);
            of(now).saturating_sub(of(was)) as f64
        };
        let busy = spent("busy_us");
        let all = busy + spent("spun_us") + spent("slept_us");
        let cpu_s = now.cpu_us.saturating_sub(was.cpu_us) as f64 / 1e6;
        let waits = now.buffer_waits.saturating_sub(was.buffer_waits) as f64;
        Self {
            thread: format!("data-{}", now.thread),
            core: now.core,
            busy_percent: per(busy, all) * 100.0,
            cpu_percent: per(cpu_s, seconds) * 100.0,
            queues: now.queues,
            controllers: now.controllers,
            pending_bdev_io: now.pending_bdev_io,
            buffer_waits: per(waits, seconds),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;

    fn counts(commands: u64, bytes: u64, sum_us: u64, buckets: [u64; 3]) -> Value {
        let none = json!({ "sum_us": 0, "buckets": [commands, 0, 0] });
        json!({
            "commands": commands, "bytes": bytes, "failed": 0, "wait": none, "network": none,
            "total": { "sum_us": sum_us, "buckets": buckets },
            "backend": { "sum_us": sum_us / 2, "buckets": buckets },
        })
    }

    fn sample(ticks: u64, reads: Value, writes: Value) -> Sample {
        let other = counts(0, 0, 0, [0; 3]);
        Sample::parse(
            json!({
                "ticks": ticks, "bounds_us": [16, 32],
                "series": [{
                    "host": "nqn.2026-11.test:host", "subsystem": "nqn.2026-11.test:sub", "nsid": 1,
                    "bdev_name": "disk", "read": reads, "write": writes, "other": other,
                }],
            }),
            json!({
                "uptime_s": ticks as f64 / 1e6, "controllers": 1,
                "threads": [{
                    "thread": 0, "core": 3, "cpu_us": ticks / 2, "queues": 2, "controllers": 1,
                    "pending_bdev_io": 0, "buffer_waits": 0,
                    "reactor": { "busy_us": ticks / 4, "spun_us": ticks / 4, "slept_us": ticks / 2 },
                }],
            }),
        )
        .unwrap()
    }

    /// A second with reads and writes.
    pub(in super::super) fn load() -> Load {
        let none = || counts(0, 0, 0, [0; 3]);
        let before = sample(1_000_000, counts(10, 40960, 1000, [0, 0, 10]), none());
        let reads = counts(110, 450_560, 4000, [98, 2, 10]);
        let after = sample(2_000_000, reads, counts(1, 512, 40, [0, 0, 1]));
        Load::between(&before, &after)
    }

    #[test]
    fn rates_are_of_the_time_between() {
        let mut load = load();
        load.sort(Sort::Iops);
        let [reads, writes] = &load.io[..] else {
            panic!("{load:?}");
        };
        assert_eq!((reads.operation, reads.iops), ("read", 100.0));
        assert_eq!((reads.bytes_per_s, reads.mean_us), (409_600.0, 30.0));
        assert_eq!((reads.backend_us, reads.wait_us), (15.0, 0.0));
        assert_eq!(reads.p99_us, Some(32), "98 of 100 in the first bucket");
        assert_eq!((writes.iops, writes.p99_us), (1.0, None));
        assert_eq!(load.threads[0].busy_percent, 25.0);
        assert_eq!(load.threads[0].cpu_percent, 50.0);
        load.sort(Sort::Latency);
        assert_eq!(load.io[0].operation, "write");
    }

    #[test]
    fn a_target_that_is_started_again_begins_at_nothing() {
        let none = || counts(0, 0, 0, [0; 3]);
        let before = sample(9_000_000, counts(100, 0, 0, [100, 0, 0]), none());
        let after = sample(500_000, counts(5, 0, 0, [5, 0, 0]), none());
        assert_eq!(Load::between(&before, &after).io[0].iops, 10.0);
        // A namespace that was removed and added again.
        let later = sample(10_000_000, counts(7, 0, 0, [7, 0, 0]), none());
        assert_eq!(Load::between(&before, &later).io[0].iops, 7.0);
        assert!(Load::between(&later, &later).io.is_empty());
    }
}
