//! `flexblk bench`: one thread and queue pair each, closed loop, latency histograms.

use std::sync::Arc;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use flexblk_initiator::{
    Command, Controller, IoCompletion, Namespace, QueueCounters, QueuePair, QueuePairOptions,
    SharedMemory, Span,
};
use hdrhistogram::Histogram;
use serde_json::json;

use crate::args::{self, Rw};
use crate::connect;
use crate::exit::Usage;
use crate::size::human;

/// `flexblk bench`.
pub(crate) fn bench(args: &args::Bench) -> Result<()> {
    if args.rw.writes(args.rwmixread) && !args.overwrite {
        return Err(Usage(
            "this run overwrites the namespace with random data: add --overwrite if that is meant"
                .into(),
        )
        .into());
    }
    let cores: Vec<usize> = match &args.cores {
        Some(list) => list
            .parse::<flexblk_reactor::affinity::CoreList>()
            .map_err(|e| Usage(format!("--cores: {e}")))?
            .cores()
            .to_vec(),
        None => Vec::new(),
    };
    let (controller, namespace) = connect::open(&args.address, &args.connection)?;
    let plan = Plan::new(args, &namespace)?;
    let mut rows = Vec::with_capacity(args.iodepth.len());
    for &depth in &args.iodepth {
        rows.push(run(&controller, &plan, depth, &cores)?);
    }
    if args.json {
        println!("{:#}", json_of(args, &namespace, &rows));
    } else {
        println!("{}", table_of(&rows));
        for row in &rows {
            println!("depth {}: {}", row.depth, counters_of(row));
        }
    }
    Ok(())
}

impl Rw {
    fn writes(self, read_percent: u8) -> bool {
        match self {
            Rw::Read | Rw::Randread => false,
            Rw::Write | Rw::Randwrite => true,
            Rw::Randrw => read_percent < 100,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Rw::Read => "read",
            Rw::Write => "write",
            Rw::Randread => "randread",
            Rw::Randwrite => "randwrite",
            Rw::Randrw => "randrw",
        }
    }
}

/// What every thread does.
#[derive(Clone)]
struct Plan {
    namespace: Namespace,
    rw: Rw,
    read_percent: u64,
    blocks_per_io: u32,
    /// Number of places for one I/O.
    places: u64,
    time: Duration,
    qpairs: u16,
}

impl Plan {
    fn new(args: &args::Bench, namespace: &Namespace) -> Result<Plan> {
        let block = namespace.block_size;
        if !args.bs.is_multiple_of(block) {
            return Err(Usage(format!(
                "--bs {} is not a multiple of the namespace's {block}-byte blocks",
                args.bs
            ))
            .into());
        }
        if args.bs > namespace.max_transfer_bytes {
            return Err(Usage(format!(
                "--bs {} is more than one command may carry ({} bytes)",
                args.bs, namespace.max_transfer_bytes
            ))
            .into());
        }
        if args.rw.writes(args.rwmixread) && namespace.read_only {
            return Err(Usage(format!("namespace {} is write-protected", namespace.nsid)).into());
        }
        let places = args.range.unwrap_or(u64::MAX).min(namespace.len_bytes()) / u64::from(args.bs);
        if places == 0 {
            return Err(Usage(format!(
                "--bs {} is larger than the namespace or --range",
                args.bs
            ))
            .into());
        }
        Ok(Plan {
            namespace: namespace.clone(),
            rw: args.rw,
            read_percent: u64::from(args.rwmixread),
            blocks_per_io: args.bs / block,
            places,
            time: args.time,
            qpairs: args.qpairs,
        })
    }

    fn io_bytes(&self) -> u32 {
        self.blocks_per_io * self.namespace.block_size
    }
}

/// One line of the table.
struct Row {
    depth: u16,
    elapsed: Duration,
    ios: u64,
    latency_ns: Histogram<u64>,
    cpu: Duration,
    bytes: u64,
    queue: QueueCounters,
    transport: Vec<(&'static str, u64)>,
}

/// What one thread brings home.
struct Share {
    ios: u64,
    elapsed: Duration,
    latency_ns: Histogram<u64>,
    queue: QueueCounters,
    transport: Vec<(&'static str, u64)>,
}

fn run(controller: &Controller, plan: &Plan, depth: u16, cores: &[usize]) -> Result<Row> {
    let barrier = Arc::new(Barrier::new(usize::from(plan.qpairs) + 1));
    let threads: Vec<_> = (0..plan.qpairs)
        .map(|index| {
            let (controller, plan, barrier) = (controller.clone(), plan.clone(), barrier.clone());
            let core = (!cores.is_empty())
                .then(|| cores.get(usize::from(index) % cores.len()).copied())
                .flatten();
            std::thread::Builder::new()
                .name(format!("bench{index}"))
                .spawn(move || worker(&controller, &plan, depth, index, core, &barrier))
                .context("starting a thread")
        })
        .collect::<Result<_>>()?;
    barrier.wait();
    let (cpu_before, started) = (cpu_time(), Instant::now());
    let shares: Vec<Share> = threads
        .into_iter()
        .map(|thread| {
            thread
                .join()
                .map_err(|_| anyhow!("a bench thread panicked"))?
        })
        .collect::<Result<_>>()?;
    let cpu = cpu_time().saturating_sub(cpu_before);
    let mut row = Row {
        depth,
        elapsed: started.elapsed(),
        ios: 0,
        latency_ns: new_histogram()?,
        cpu,
        bytes: 0,
        queue: QueueCounters::default(),
        transport: Vec::new(),
    };
    let mut longest = Duration::ZERO;
    for share in &shares {
        row.ios += share.ios;
        longest = longest.max(share.elapsed);
        row.latency_ns
            .add(&share.latency_ns)
            .context("adding histograms")?;
        row.queue += share.queue;
        for &(name, value) in &share.transport {
            match row.transport.iter_mut().find(|(n, _)| *n == name) {
                Some((_, sum)) => *sum += value,
                None => row.transport.push((name, value)),
            }
        }
    }
    row.elapsed = longest;
    row.bytes = row.ios * u64::from(plan.io_bytes());
    Ok(row)
}

/// 1 us to 10 minutes at three digits.
fn new_histogram() -> Result<Histogram<u64>> {
    let mut histogram = Histogram::new_with_bounds(100, 600_000_000_000, 3).context("histogram")?;
    histogram.auto(true);
    Ok(histogram)
}

fn worker(
    controller: &Controller,
    plan: &Plan,
    depth: u16,
    index: u16,
    core: Option<usize>,
    barrier: &Barrier,
) -> Result<Share> {
    let prepared = prepare(controller, plan, depth, core);
    // Everybody passes the barrier, also who failed: nobody waits for ever.
    barrier.wait();
    let (mut queue, memory) = prepared?;
    measure(&mut queue, plan, depth, index, &memory)
}

fn prepare(
    controller: &Controller,
    plan: &Plan,
    depth: u16,
    core: Option<usize>,
) -> Result<(QueuePair, Arc<SharedMemory>)> {
    if let Some(core) = core {
        flexblk_reactor::affinity::pin_current_thread(core)
            .with_context(|| format!("pinning to core {core}"))?;
    }
    let len = u64::from(depth) * u64::from(plan.io_bytes());
    let memory = SharedMemory::create("flexblk bench", len, flexblk_reactor::HugePages::Try)
        .context("allocating buffers")?;
    let whole = span_of(&memory)?;
    let mut random = Random::new(0x5eed);
    for at in (0..whole.len()).step_by(8) {
        if let Some(word) = whole.sub(at, 8.min(whole.len() - at)) {
            word.copy_from_slice(&random.next().to_le_bytes());
        }
    }
    let options = QueuePairOptions {
        depth: Some(depth),
        memory: Vec::new(),
        bounce_bytes: Some(0),
    };
    let mut queue = controller.queue_pair(&options)?;
    queue.register_memory(&memory)?;
    if queue.depth() < depth {
        return Err(Usage(format!(
            "the controller allows a queue depth of {} at most",
            queue.depth()
        ))
        .into());
    }
    Ok((queue, memory))
}

fn span_of(memory: &SharedMemory) -> Result<Span> {
    let len = u32::try_from(memory.len())
        .map_err(|_| Usage("--bs times --iodepth must stay below 4 GiB".into()))?;
    memory.span(0, len).ok_or_else(|| anyhow!("no memory"))
}

fn measure(
    queue: &mut QueuePair,
    plan: &Plan,
    depth: u16,
    index: u16,
    memory: &SharedMemory,
) -> Result<Share> {
    let whole = span_of(memory)?;
    let mut source = Source::new(plan, index);
    let mut latency_ns = new_histogram()?;
    let mut submitted_at = vec![Instant::now(); usize::from(depth)];
    let mut free: Vec<u16> = (0..depth).collect();
    let mut completions: Vec<IoCompletion> = Vec::with_capacity(usize::from(depth));
    let before = queue.transport_counters();
    let started = Instant::now();
    let end = started + plan.time;
    let (mut now, mut ios) = (started, 0u64);
    loop {
        if now < end {
            while let Some(slot) = free.pop() {
                let span = whole
                    .sub(u32::from(slot) * plan.io_bytes(), plan.io_bytes())
                    .ok_or_else(|| anyhow!("buffer outside of its memory"))?;
                if queue.submit(&source.next(span), u64::from(slot)).is_err() {
                    free.push(slot);
                    break;
                }
                if let Some(at) = submitted_at.get_mut(usize::from(slot)) {
                    *at = now;
                }
            }
        } else if queue.outstanding() == 0 {
            break;
        }
        completions.clear();
        queue.wait(Duration::from_millis(100), 1, &mut completions);
        now = Instant::now();
        for completion in &completions {
            completion
                .result
                .map_err(|error| crate::exit::explain(error, queue.lost()))?;
            let slot = completion.tag as u16;
            if let Some(at) = submitted_at.get(usize::from(slot)) {
                latency_ns.saturating_record(now.duration_since(*at).as_nanos() as u64);
            }
            free.push(slot);
        }
        ios += completions.len() as u64;
    }
    let elapsed = started.elapsed();
    let transport = crate::counters::difference(&before, &queue.transport_counters());
    Ok(Share {
        ios,
        elapsed,
        latency_ns,
        queue: queue.counters(),
        transport,
    })
}

/// Where the next command goes.
struct Source<'a> {
    plan: &'a Plan,
    random: Random,
    next_place: u64,
}

impl<'a> Source<'a> {
    fn new(plan: &'a Plan, index: u16) -> Source<'a> {
        // Sequential threads start in different parts.
        let next_place = plan.places / u64::from(plan.qpairs.max(1)) * u64::from(index);
        Source {
            plan,
            random: Random::new(0x9e37_79b9 ^ u64::from(index) << 32),
            next_place,
        }
    }

    fn next(&mut self, span: Span) -> Command {
        let plan = self.plan;
        let place = match plan.rw {
            Rw::Read | Rw::Write => {
                let place = self.next_place;
                self.next_place = if place + 1 >= plan.places {
                    0
                } else {
                    place + 1
                };
                place
            }
            Rw::Randread | Rw::Randwrite | Rw::Randrw => self.random.below(plan.places),
        };
        let read = match plan.rw {
            Rw::Read | Rw::Randread => true,
            Rw::Write | Rw::Randwrite => false,
            Rw::Randrw => self.random.below(100) < plan.read_percent,
        };
        let lba = place * u64::from(plan.blocks_per_io);
        if read {
            Command::read(plan.namespace.nsid, lba, plan.blocks_per_io, span)
        } else {
            Command::write(plan.namespace.nsid, lba, plan.blocks_per_io, span)
        }
    }
}

/// xorshift64*: fast and good enough to pick blocks.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        Random(seed | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }
}

/// User and system time of this process, all threads.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

impl Row {
    fn iops(&self) -> f64 {
        self.ios as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    fn gigabytes_per_second(&self) -> f64 {
        self.bytes as f64 / 1e9 / self.elapsed.as_secs_f64().max(1e-9)
    }

    fn cpu_percent(&self) -> f64 {
        100.0 * self.cpu.as_secs_f64() / self.elapsed.as_secs_f64().max(1e-9)
    }

    fn us(&self, quantile: f64) -> f64 {
        self.latency_ns.value_at_quantile(quantile) as f64 / 1e3
    }
}

fn table_of(rows: &[Row]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::UTF8_HORIZONTAL_ONLY);
    table.set_header([
        "depth", "IOPS", "GB/s", "p50 us", "p99 us", "p99.9 us", "max us", "CPU %",
    ]);
    for row in rows {
        table.add_row([
            row.depth.to_string(),
            format!("{:.0}", row.iops()),
            format!("{:.3}", row.gigabytes_per_second()),
            format!("{:.1}", row.us(0.5)),
            format!("{:.1}", row.us(0.99)),
            format!("{:.1}", row.us(0.999)),
            format!("{:.1}", row.latency_ns.max() as f64 / 1e3),
            format!("{:.0}", row.cpu_percent()),
        ]);
    }
    for column in table.column_iter_mut() {
        column.set_cell_alignment(comfy_table::CellAlignment::Right);
    }
    table
}

fn counters_of(row: &Row) -> String {
    let mut words: Vec<String> = row
        .transport
        .iter()
        .filter(|(_, value)| *value > 0)
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    words.push(format!(
        "immediate_completions {}",
        row.queue.immediate_completions
    ));
    if row.queue.bounced > 0 {
        words.push(format!(
            "bounced {} ({})",
            row.queue.bounced,
            human(row.queue.bounced_bytes)
        ));
    }
    words.join(", ")
}

fn json_of(args: &args::Bench, namespace: &Namespace, rows: &[Row]) -> serde_json::Value {
    let runs: Vec<_> = rows
        .iter()
        .map(|row| {
            let transport: serde_json::Map<String, serde_json::Value> = row
                .transport
                .iter()
                .map(|(name, value)| ((*name).to_owned(), json!(value)))
                .collect();
            json!({
                "iodepth": row.depth,
                "seconds": row.elapsed.as_secs_f64(),
                "ios": row.ios,
                "iops": row.iops(),
                "gigabytes_per_second": row.gigabytes_per_second(),
                "latency_us": {
                    "min": row.latency_ns.min() as f64 / 1e3,
                    "mean": row.latency_ns.mean() / 1e3,
                    "p50": row.us(0.5),
                    "p99": row.us(0.99),
                    "p99.9": row.us(0.999),
                    "max": row.latency_ns.max() as f64 / 1e3,
                },
                "cpu_percent": row.cpu_percent(),
                "queue": {
                    "submitted": row.queue.submitted,
                    "bounced": row.queue.bounced,
                    "bounced_bytes": row.queue.bounced_bytes,
                    "immediate_completions": row.queue.immediate_completions,
                },
                "transport": transport,
            })
        })
        .collect();
    json!({
        "rw": args.rw.name(),
        "bs": args.bs,
        "qpairs": args.qpairs,
        "nsid": namespace.nsid.get(),
        "runs": runs,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_places_are_inside_and_spread() {
        let mut random = Random::new(7);
        let mut seen = [0u32; 10];
        for _ in 0..10_000 {
            seen[random.below(10) as usize] += 1;
        }
        assert!(seen.iter().all(|n| (800..1200).contains(n)), "{seen:?}");
        assert_eq!(random.below(1), 0);
    }
}
