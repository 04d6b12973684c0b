//! FlexiNS, through fio, beside what raw UDP sockets reach in the same run.

use std::path::Path;

use anyhow::{Context, Result};
use flexblk_tests::binaries::Binaries;
use serde_json::{Value, json};

use super::idle::{self, Idle};
use super::{Arguments, DEPTHS, Goal, LIMIT, median, number, perf};
use crate::load::{Counters, Load, MODES, Mode, Run, cells, value};
use crate::table::{Table, count, micros};

/// At this depth throughput counts.
const DEEP: u32 = 128;
/// There: at least this part of what raw UDP trains reach, whether they send the same 64 KiB over
/// and over (which never leaves the first-level cache) or blocks from as much memory as the namespace has.
const GOAL_OF_STREAM: f64 = 0.5;
/// At depth 1: at most this many raw round trips.
const GOAL_OF_ROUND_TRIP: f64 = 2.5;

/// One measurement of raw sockets.
struct Ceiling {
    /// Payload from the same 64 KiB again and again.
    blocks_per_second: f64,
    /// Payload from as much memory as each namespace has.
    from_memory: Vec<f64>,
    round_trip_p50_us: f64,
    round_trip_p99_us: f64,
}

struct Row {
    mode: Mode,
    direction: &'static str,
    depth: u32,
    ram_mib: u32,
    run: Run,
    /// Raw UDP trains before, between and after, in blocks per second.
    stream: f64,
    /// The same with payload from as much memory as the namespace has.
    stream_from_memory: f64,
}

/// Everything that was measured.
pub(super) struct Report {
    rows: Vec<Row>,
    ceilings: Vec<Ceiling>,
    counted: Vec<(Mode, Counters, Counters)>,
    idle: Idle,
}

pub(super) fn measure(
    arguments: &Arguments,
    binaries: &Binaries,
    directory: &Path,
) -> Result<Report> {
    let say = |text: &str| arguments.say(text);
    let mut rows = Vec::new();
    let mut ceilings = Vec::new();
    let mut counted = Vec::new();
    say("raw UDP sockets");
    ceilings.push(ceiling(arguments, binaries)?);
    for mode in MODES {
        let devices: Vec<String> = arguments
            .ram
            .iter()
            .map(|mib| format!("ram:{mib}M,block_size=4096,hugepages=transparent"))
            .collect();
        let devices: Vec<&str> = devices.iter().map(String::as_str).collect();
        let load = Load::start(binaries, directory, mode, &devices, Some(arguments.cores))?;
        for nsid in 1..=devices.len() as u32 {
            // Every page of the namespace exists before anything is measured.
            let fill = load
                .job("fill", nsid)
                .option("rw", "write")
                .option("bs", "128k");
            fill.option("iodepth", 16).success(LIMIT)?;
        }
        for direction in ["read", "write"] {
            say(&format!(
                "{mode}: rand{direction}, target on core {}, fio on core {}",
                arguments.cores.0, arguments.cores.1
            ));
            // A machine is not always as fast: what is compared is measured in turns.
            let first = ceilings.len() - 1;
            let mut rounds: Vec<Vec<Run>> = Vec::new();
            for round in 1..=arguments.rounds {
                let mut runs = Vec::new();
                for namespace in 0..devices.len() {
                    for depth in DEPTHS {
                        let nsid = namespace as u32 + 1;
                        runs.push(one(&load, arguments, direction, nsid, depth)?);
                    }
                }
                rounds.push(runs);
                say(&format!(
                    "raw UDP sockets, round {round} of {}",
                    arguments.rounds
                ));
                ceilings.push(ceiling(arguments, binaries)?);
            }
            let around = ceilings.get(first..).unwrap_or_default();
            let cells =
                (0..devices.len()).flat_map(|namespace| DEPTHS.map(|depth| (namespace, depth)));
            for (cell, (namespace, depth)) in cells.enumerate() {
                let iops = |run: &Run| run.result.measured(direction).iops;
                let runs = rounds.iter().filter_map(|runs| runs.get(cell).cloned());
                let memory = |ceiling: &Ceiling| ceiling.from_memory.get(namespace).copied();
                rows.push(Row {
                    mode,
                    direction,
                    depth,
                    ram_mib: arguments.ram.get(namespace).copied().unwrap_or(0),
                    run: median(runs, iops).context("at least one round")?,
                    stream: median(around.iter().map(|at| at.blocks_per_second), |at| *at)
                        .unwrap_or(0.0),
                    stream_from_memory: median(around.iter().filter_map(memory), |at| *at)
                        .unwrap_or(0.0),
                });
            }
        }
        let initiator = load.initiator_counters()?;
        counted.push((mode, initiator, load.finish()?));
    }
    say("memory of idle queue pairs");
    let idle = idle::measure(binaries, directory, "flexins")?;
    Ok(Report {
        rows,
        ceilings,
        counted,
        idle,
    })
}

fn one(
    load: &Load<'_>,
    arguments: &Arguments,
    direction: &str,
    nsid: u32,
    depth: u32,
) -> Result<Run> {
    let mut fio = load
        .job(&format!("rand{direction}-{nsid}-{depth}"), nsid)
        .option("rw", format!("rand{direction}"))
        .option("bs", "4k")
        .option("iodepth", depth)
        .option("norandommap", 1)
        .option("randrepeat", 0)
        // The raw stream sends the same bytes again and again, too.
        .option("scramble_buffers", 0)
        .option("time_based", 1)
        .option("runtime", arguments.seconds);
    if depth == 1 {
        fio = fio.flag("hipri");
    }
    if depth == DEEP {
        // While one half is under way, fio makes the other.
        fio = fio
            .option("iodepth_batch_submit", depth / 2)
            .option("iodepth_batch_complete_min", depth / 2);
    }
    load.run(&fio, LIMIT)
}

/// What plain sockets reach now: trains one way, and round trips of a request and a block.
fn ceiling(arguments: &Arguments, binaries: &Binaries) -> Result<Ceiling> {
    let measure = |test: &[&str]| perf(arguments, binaries, test);
    let stream = measure(&["udp-stream", "--size", "4096"])?;
    let mut from_memory = Vec::new();
    for mib in &arguments.ram {
        let kib = (u64::from(*mib) << 10).to_string();
        let stream = measure(&["udp-stream", "--size", "4096", "--working-set-kib", &kib])?;
        from_memory.push(number(&stream, "blocks_per_second")?);
    }
    // A read: a small request, a block with its headers back.
    let round_trip = measure(&["udp-rtt", "--size", "128", "--reply-size", "4160"])?;
    Ok(Ceiling {
        blocks_per_second: number(&stream, "blocks_per_second")?,
        from_memory,
        round_trip_p50_us: number(&round_trip, "p50_us")?,
        round_trip_p99_us: number(&round_trip, "p99_us")?,
    })
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    if count == 0.0 { 0.0 } else { sum / count }
}

/// Payload bytes that the transport copied per byte that it sent.
fn copies_per_byte(counters: &Counters) -> f64 {
    let copied = value(counters, "payload_bytes_copied") as f64;
    let sent = copied + value(counters, "payload_bytes_gathered") as f64;
    if sent == 0.0 { 0.0 } else { copied / sent }
}

impl Report {
    pub(super) fn goals(&self) -> Vec<Goal> {
        goals(&self.rows, &self.ceilings, &self.counted, self.idle)
    }

    pub(super) fn print(&self) {
        print(&self.rows, &self.ceilings, &self.counted);
    }

    pub(super) fn as_json(&self) -> Value {
        as_json(&self.rows, &self.ceilings, &self.counted, self.idle)
    }
}

fn goals(
    rows: &[Row],
    ceilings: &[Ceiling],
    counted: &[(Mode, Counters, Counters)],
    idle: Idle,
) -> Vec<Goal> {
    let mut goals = Vec::new();
    let (p50, p99) = (
        mean(ceilings.iter().map(|ceiling| ceiling.round_trip_p50_us)),
        mean(ceilings.iter().map(|ceiling| ceiling.round_trip_p99_us)),
    );
    let first = MODES.first().copied();
    for row in rows.iter().filter(|row| Some(row.mode) == first) {
        let measured = row.run.result.measured(row.direction);
        if row.depth == DEEP {
            let streams = [
                ("raw UDP trains", row.stream),
                (
                    "raw UDP trains from the same memory",
                    row.stream_from_memory,
                ),
            ];
            for (name, stream) in streams {
                let fraction = measured.iops / stream;
                goals.push(Goal {
                    what: format!(
                        "rand{} 4k at depth {DEEP} on {} MiB, of {name} ({} of {} blocks/s)",
                        row.direction,
                        row.ram_mib,
                        count(measured.iops),
                        count(stream)
                    ),
                    measured: format!("{fraction:.2}"),
                    goal: format!(">= {GOAL_OF_STREAM}"),
                    met: fraction >= GOAL_OF_STREAM,
                });
            }
        }
        if row.depth == 1 && row.direction == "read" {
            let ratio = measured.p50_us / p50;
            goals.push(Goal {
                what: format!(
                    "randread 4k at depth 1 on {} MiB, p50 {} us (p99 {}), to a raw UDP round trip, p50 {} us (p99 {})",
                    row.ram_mib,
                    micros(measured.p50_us), micros(measured.p99_us), micros(p50), micros(p99)
                ),
                measured: format!("{ratio:.2}"),
                goal: format!("<= {GOAL_OF_ROUND_TRIP}"),
                met: ratio <= GOAL_OF_ROUND_TRIP,
            });
        }
    }
    for (mode, initiator, target) in counted.iter().filter(|(mode, ..)| mode.tx == "header-only") {
        for (side, counters) in [("initiator", initiator), ("target", target)] {
            let copies = copies_per_byte(counters);
            goals.push(Goal {
                what: format!("payload copies per byte sent by the {side}, {mode}"),
                measured: format!("{copies:.3}"),
                goal: "0".to_owned(),
                met: copies == 0.0,
            });
        }
    }
    goals.extend(idle.goals());
    goals
}

fn print(rows: &[Row], ceilings: &[Ceiling], counted: &[(Mode, Counters, Counters)]) {
    println!();
    let mut table = Table::new(&[
        "4 KiB at random over FlexiNS",
        "",
        "MiB",
        "qd",
        "IOPS",
        "GB/s",
        "p50 us",
        "p99 us",
        "p99.9 us",
        "fio CPU %",
        "target CPU %",
        "of raw UDP, same memory",
        "same 64 KiB",
    ]);
    for row in rows {
        let measured = row.run.result.measured(row.direction);
        let [iops, rate, p50, p99, p999] = cells(&measured);
        table.row(&[
            row.mode.to_string(),
            format!("rand{}", row.direction),
            row.ram_mib.to_string(),
            row.depth.to_string(),
            iops,
            rate,
            p50,
            p99,
            p999,
            format!("{:.0}", row.run.fio_cpu),
            format!("{:.0}", row.run.target_cpu),
            format!("{:.2}", measured.iops / row.stream_from_memory),
            format!("{:.2}", measured.iops / row.stream),
        ]);
    }
    table.print();
    println!();
    let mut table = Table::new(&[
        "raw UDP in the same run",
        "blocks/s, same 64 KiB",
        "GB/s",
        "from memory of each size",
        "round trip p50 us",
        "p99 us",
    ]);
    for (number, ceiling) in ceilings.iter().enumerate() {
        table.row(&[
            format!("measurement {}", number + 1),
            count(ceiling.blocks_per_second),
            format!("{:.2}", ceiling.blocks_per_second * 4096.0 / 1e9),
            ceiling
                .from_memory
                .iter()
                .map(|stream| count(*stream))
                .collect::<Vec<_>>()
                .join(" / "),
            micros(ceiling.round_trip_p50_us),
            micros(ceiling.round_trip_p99_us),
        ]);
    }
    table.print();
    println!();
    let mut table = Table::new(&[
        "transport, per side",
        "copies/byte",
        "header bytes/packet",
        "packets/train",
        "retransmissions",
    ]);
    for (mode, initiator, target) in counted {
        for (side, counters) in [("initiator", initiator), ("target", target)] {
            let per = |a: &str, b: &str| {
                let below = value(counters, b);
                if below == 0 {
                    "-".to_owned()
                } else {
                    format!("{:.1}", value(counters, a) as f64 / below as f64)
                }
            };
            table.row(&[
                format!("{side} {mode}"),
                format!("{:.3}", copies_per_byte(counters)),
                per("header_bytes_written", "packets_tx"),
                per("segments_tx", "trains_tx"),
                value(counters, "retransmissions").to_string(),
            ]);
        }
    }
    table.print();
}

fn as_json(
    rows: &[Row],
    ceilings: &[Ceiling],
    counted: &[(Mode, Counters, Counters)],
    idle: Idle,
) -> Value {
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| {
            let measured = row.run.result.measured(row.direction);
            json!({
                "tx": row.mode.tx, "rx": row.mode.rx, "ram_mib": row.ram_mib, "of_raw_udp": measured.iops / row.stream,
                "of_raw_udp_same_memory": measured.iops / row.stream_from_memory, "rw": format!("rand{}", row.direction), "depth": row.depth,
                "iops": measured.iops, "bytes_per_second": measured.bytes_per_second, "p50_us": measured.p50_us,
                "p99_us": measured.p99_us, "p999_us": measured.p999_us, "fio_cpu_percent": row.run.fio_cpu,
                "target_cpu_percent": row.run.target_cpu,
            })
        })
        .collect();
    let ceilings: Vec<Value> = ceilings
        .iter()
        .map(|ceiling| {
            json!({
                "udp_stream_blocks_per_second": ceiling.blocks_per_second,
                "udp_stream_from_memory_blocks_per_second": ceiling.from_memory,
                "udp_round_trip_p50_us": ceiling.round_trip_p50_us,
                "udp_round_trip_p99_us": ceiling.round_trip_p99_us,
            })
        })
        .collect();
    let counters: Vec<Value> = counted
        .iter()
        .map(|(mode, initiator, target)| json!({ "tx": mode.tx, "rx": mode.rx, "initiator": initiator, "target": target }))
        .collect();
    json!({
        "runs": rows, "raw_udp": ceilings, "counters": counters,
        "idle_queue_pair_bytes": idle.as_json(),
    })
}
