//! NVMe/TCP: our client and SPDK's, each with our target and SPDK's, in turns; beside a raw TCP stream.
//!
//! Our client is `flexblk bench`, the like of `spdk_nvme_perf`; fio would add its own cost to one side only.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use flexblk_tests::binaries::Binaries;
use flexblk_tests::ports::free_tcp_port;
use flexblk_tests::process::{Process, find_program, run as run_program};
use flexblk_tests::spdk::{DIRECTORY_VARIABLE, Disk, Spdk};
use flexblk_tests::target::{SUBNQN, Target, TargetOptions};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::idle::{self, Idle};
use super::{Arguments, DEPTHS, Goal, LIMIT, median, number, perf};
use crate::table::{Table, count, micros};

const HOSTNQN: &str = "nqn.2026-11.dev.flexblk:spdk";
const RW: [&str; 2] = ["randread", "randwrite"];

/// Whose program it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Ours,
    Spdk,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Side::Ours => "flexblk",
            Side::Spdk => "SPDK",
        })
    }
}

/// What is compared: the same work by four pairs of programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cell {
    rw: &'static str,
    depth: u32,
}

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at depth {}", self.rw, self.depth)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Measured {
    iops: f64,
    p50_us: f64,
    p99_us: f64,
}

struct Row {
    cell: Cell,
    client: Side,
    target: Side,
    measured: Measured,
}

pub(super) struct Report {
    rows: Vec<Row>,
    /// Blocks per second through a plain socket: the median of all rounds.
    stream: f64,
    /// Whether SPDK was there.
    beside_spdk: bool,
    idle: Idle,
}

pub(super) fn measure(
    arguments: &Arguments,
    binaries: &Binaries,
    directory: &Path,
) -> Result<Report> {
    let spdk = Spdk::find()?;
    if spdk.is_none() {
        arguments.say(&format!(
            "SKIPPED beside SPDK: {DIRECTORY_VARIABLE} names no build of it"
        ));
    }
    let mut targets = Targets::start(arguments, binaries, directory, spdk.as_ref())?;
    let sides = match &spdk {
        Some(_) => &[Side::Ours, Side::Spdk][..],
        None => &[Side::Ours],
    };
    let mut runs: Vec<(Cell, Side, Side, Measured)> = Vec::new();
    let mut streams = Vec::new();
    for round in 1..=arguments.rounds {
        arguments.say(&format!(
            "NVMe/TCP, target on core {}, client on core {}, round {round} of {}",
            arguments.cores.0, arguments.cores.1, arguments.rounds
        ));
        let stream = perf(arguments, binaries, &["tcp-stream", "--size", "4096"])?;
        streams.push(number(&stream, "blocks_per_second")?);
        for cell in cells() {
            for &client in sides {
                for &target in sides {
                    targets.wake(target)?;
                    let port = targets.port(target);
                    let measured = match (client, &spdk) {
                        (Side::Spdk, Some(spdk)) => theirs(spdk, arguments, directory, port, cell),
                        _ => ours(binaries, arguments, port, cell),
                    };
                    let measured = measured
                        .with_context(|| format!("{client}'s client, {target}'s target, {cell}"))?;
                    runs.push((cell, client, target, measured));
                }
            }
        }
    }
    let mut rows: Vec<Row> = Vec::new();
    for &(cell, client, target, _) in &runs {
        if find(&rows, cell, client, target).is_some() {
            continue;
        }
        let same = || {
            runs.iter()
                .filter(move |run| (run.0, run.1, run.2) == (cell, client, target))
                .map(|run| run.3)
        };
        let middle = |of: fn(&Measured) -> f64| median(same().map(|run| of(&run)), |value| *value);
        rows.push(Row {
            cell,
            client,
            target,
            measured: Measured {
                iops: middle(|run| run.iops).context("at least one round")?,
                p50_us: middle(|run| run.p50_us).unwrap_or_default(),
                p99_us: middle(|run| run.p99_us).unwrap_or_default(),
            },
        });
    }
    arguments.say("memory of idle queue pairs");
    Ok(Report {
        rows,
        idle: idle::measure(binaries, directory, "tcp")?,
        stream: median(streams.into_iter(), |value| *value).unwrap_or_default(),
        beside_spdk: spdk.is_some(),
    })
}

/// Both targets on one core. SPDK's polls for ever, so whichever is not measured is stopped.
struct Targets {
    ours: Target,
    ours_port: u16,
    spdk: Option<(Process, u16)>,
}

impl Targets {
    fn start(
        arguments: &Arguments,
        binaries: &Binaries,
        directory: &Path,
        spdk: Option<&Spdk>,
    ) -> Result<Targets> {
        let (core, _) = arguments.cores;
        let mib = arguments.ram.first().copied().unwrap_or(64);
        let port = free_tcp_port()?;
        let options = TargetOptions {
            core: Some(core),
            tcp_port: Some(port),
            ..TargetOptions::with_devices(&[&format!("ram:{mib}M,block_size=4096")])
        };
        let ours = Target::start(binaries, directory, options)?;
        // Every page of the namespace exists before anything is measured, as it does in SPDK's.
        let zeroes = directory.join("zeroes");
        File::create(&zeroes)?.set_len(u64::from(mib) << 20)?;
        let mut fill = Command::new(&binaries.flexblk);
        fill.arg("write").arg("--input").arg(&zeroes);
        run_program(fill.arg(uri(port)), LIMIT)?
            .success()
            .context("filling the namespace")?;
        let spdk = match spdk {
            Some(spdk) => {
                let port = free_tcp_port()?;
                let disk = Disk {
                    mib,
                    block_size: 4096,
                };
                let process = spdk.target_with(disk, core, SUBNQN, port, directory)?;
                Some((process, port))
            }
            None => None,
        };
        Ok(Targets {
            ours,
            ours_port: port,
            spdk,
        })
    }

    fn port(&self, side: Side) -> u16 {
        match (side, &self.spdk) {
            (Side::Spdk, Some((_, port))) => *port,
            _ => self.ours_port,
        }
    }

    fn wake(&mut self, side: Side) -> Result<()> {
        let Some((spdk, _)) = &mut self.spdk else {
            return Ok(());
        };
        let (ours, theirs) = match side {
            Side::Ours => (Signal::CONT, Signal::STOP),
            Side::Spdk => (Signal::STOP, Signal::CONT),
        };
        self.ours.signal(ours)?;
        spdk.signal(theirs)
    }
}

fn uri(port: u16) -> String {
    format!("nvme+tcp://127.0.0.1:{port}/{SUBNQN}?nsid=1")
}

/// `flexblk bench`, all of its threads on the client's core.
fn ours(binaries: &Binaries, arguments: &Arguments, port: u16, cell: Cell) -> Result<Measured> {
    let (_, core) = arguments.cores;
    let mut command = Command::new(find_program("taskset")?);
    command
        .args(["-c", &core.to_string()])
        .arg(&binaries.flexblk)
        .args(["bench", "--bs", "4k", "--overwrite", "--json"])
        .args(["--rw", cell.rw, "--iodepth", &cell.depth.to_string()])
        // SPDK's client never sleeps. SPDK's target answers in bursts, further apart than the default budget at depth 128.
        .args(["--poll-budget-us", "1000000"])
        .args(["--time", &format!("{}s", arguments.seconds)])
        .arg(uri(port));
    let done = run_program(&mut command, LIMIT)?.success()?;
    let json: Value = serde_json::from_str(&done.stdout).context("flexblk bench prints JSON")?;
    let run = json.pointer("/runs/0").context("one run")?;
    let latency = run.get("latency_us").context("latencies")?;
    Ok(Measured {
        iops: number(run, "iops")?,
        p50_us: number(latency, "p50")?,
        p99_us: number(latency, "p99")?,
    })
}

/// `spdk_nvme_perf` on the client's core.
fn theirs(
    spdk: &Spdk,
    arguments: &Arguments,
    directory: &Path,
    port: u16,
    cell: Cell,
) -> Result<Measured> {
    let (_, core) = arguments.cores;
    let address = format!(
        "trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:{port} subnqn:{SUBNQN} hostnqn:{HOSTNQN}"
    );
    let arguments = [
        "-r",
        &address,
        "-o",
        "4096",
        "-w",
        cell.rw,
        "-q",
        &cell.depth.to_string(),
        "-t",
        &arguments.seconds.to_string(),
        "-c",
        &format!("{:#x}", 1u64 << core),
        // Prints percentiles.
        "-L",
    ];
    let text = spdk.run("spdk_nvme_perf", &arguments, directory, LIMIT)?;
    in_output_of_spdk(&text).with_context(|| format!("spdk_nvme_perf said:\n{text}"))
}

/// Reads `Total : IOPS MiB/s average min max` and lines such as ` 99.00000% :    19.123us`.
fn in_output_of_spdk(text: &str) -> Result<Measured> {
    let after = |name: &str| {
        text.lines()
            .find_map(|line| line.trim().strip_prefix(name)?.split_once(':'))
            .and_then(|(_, rest)| rest.split_whitespace().next())
            .with_context(|| format!("no line {name}"))
    };
    let percentile = |name: &str| -> Result<f64> {
        let value = after(name)?;
        value
            .trim_end_matches("us")
            .parse()
            .with_context(|| format!("{name}: {value}"))
    };
    Ok(Measured {
        iops: after("Total")?.parse().context("IOPS")?,
        p50_us: percentile("50.00000%")?,
        p99_us: percentile("99.00000%")?,
    })
}

fn find(rows: &[Row], cell: Cell, client: Side, target: Side) -> Option<Measured> {
    rows.iter()
        .find(|row| (row.cell, row.client, row.target) == (cell, client, target))
        .map(|row| row.measured)
}

/// One of our programs in the place of SPDK's, with the same other side.
#[derive(Clone, Copy)]
struct Comparison {
    what: &'static str,
    ours: (Side, Side),
    theirs: (Side, Side),
}

const COMPARISONS: [Comparison; 4] = [
    Comparison {
        what: "our target to SPDK's, SPDK's client",
        ours: (Side::Spdk, Side::Ours),
        theirs: (Side::Spdk, Side::Spdk),
    },
    Comparison {
        what: "our target to SPDK's, our client",
        ours: (Side::Ours, Side::Ours),
        theirs: (Side::Ours, Side::Spdk),
    },
    Comparison {
        what: "our client to SPDK's, SPDK's target",
        ours: (Side::Ours, Side::Spdk),
        theirs: (Side::Spdk, Side::Spdk),
    },
    Comparison {
        what: "our client to SPDK's, our target",
        ours: (Side::Ours, Side::Ours),
        theirs: (Side::Spdk, Side::Ours),
    },
];

/// How one of our programs does beside SPDK's in one cell.
#[derive(Clone, Copy, Debug)]
struct Ratio {
    cell: Cell,
    /// More is better.
    iops: f64,
    /// Less is better.
    p99: f64,
}

impl Comparison {
    fn ratios(&self, rows: &[Row]) -> Vec<Ratio> {
        cells()
            .filter_map(|cell| {
                let ours = find(rows, cell, self.ours.0, self.ours.1)?;
                let theirs = find(rows, cell, self.theirs.0, self.theirs.1)?;
                Some(Ratio {
                    cell,
                    iops: ours.iops / theirs.iops,
                    p99: ours.p99_us / theirs.p99_us,
                })
            })
            .collect()
    }
}

fn cells() -> impl Iterator<Item = Cell> {
    RW.iter()
        .flat_map(|rw| DEPTHS.map(|depth| Cell { rw, depth }))
}

/// At least as fast in every cell, and as good a 99th percentile: the worst cell counts.
fn goals(rows: &[Row]) -> Vec<Goal> {
    let mut goals = Vec::new();
    for comparison in COMPARISONS {
        let ratios = comparison.ratios(rows);
        let met = |good: fn(&Ratio) -> bool| {
            format!(
                "{} of {} cells",
                ratios.iter().filter(|ratio| good(ratio)).count(),
                ratios.len()
            )
        };
        let slowest = ratios.iter().min_by(|a, b| a.iops.total_cmp(&b.iops));
        if let Some(worst) = slowest {
            goals.push(Goal {
                what: format!(
                    "{}: IOPS, {}, least {}",
                    comparison.what,
                    met(|ratio| ratio.iops >= 1.0),
                    worst.cell
                ),
                measured: format!("{:.2}", worst.iops),
                goal: ">= 1".to_owned(),
                met: worst.iops >= 1.0,
            });
        }
        let latest = ratios.iter().max_by(|a, b| a.p99.total_cmp(&b.p99));
        if let Some(worst) = latest {
            goals.push(Goal {
                what: format!(
                    "{}: p99, {}, most {}",
                    comparison.what,
                    met(|ratio| ratio.p99 <= 1.0),
                    worst.cell
                ),
                measured: format!("{:.2}", worst.p99),
                goal: "<= 1".to_owned(),
                met: worst.p99 <= 1.0,
            });
        }
    }
    goals
}

impl Report {
    pub(super) fn goals(&self) -> Vec<Goal> {
        let mut goals = goals(&self.rows);
        goals.extend(self.idle.goals());
        goals
    }

    pub(super) fn print(&self) {
        println!();
        let mut table = Table::new(&[
            "4 KiB at random over NVMe/TCP",
            "qd",
            "client",
            "target",
            "IOPS",
            "p50 us",
            "p99 us",
            "of raw TCP",
        ]);
        for row in &self.rows {
            table.row(&[
                row.cell.rw.to_owned(),
                row.cell.depth.to_string(),
                row.client.to_string(),
                row.target.to_string(),
                count(row.measured.iops),
                micros(row.measured.p50_us),
                micros(row.measured.p99_us),
                format!("{:.2}", row.measured.iops / self.stream),
            ]);
        }
        table.print();
        println!(
            "raw TCP stream in the same run: {} blocks/s of 4 KiB",
            count(self.stream)
        );
        println!();
        if !self.beside_spdk {
            println!("SKIPPED beside SPDK: {DIRECTORY_VARIABLE} names no build of it");
            return;
        }
        let names = COMPARISONS.map(|comparison| comparison.what);
        let mut table = Table::new(&[&["IOPS (p99)"][..], &names].concat());
        for cell in cells() {
            let ratios = COMPARISONS.iter().map(|comparison| {
                let ratios = comparison.ratios(&self.rows);
                match ratios.iter().find(|ratio| ratio.cell == cell) {
                    Some(ratio) => format!("{:.2} ({:.2})", ratio.iops, ratio.p99),
                    None => "-".to_owned(),
                }
            });
            let row: Vec<String> = std::iter::once(cell.to_string()).chain(ratios).collect();
            table.row(&row);
        }
        table.print();
    }

    pub(super) fn as_json(&self) -> Value {
        let runs: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                json!({
                    "rw": row.cell.rw, "depth": row.cell.depth, "client": row.client.to_string(),
                    "target": row.target.to_string(), "iops": row.measured.iops, "p50_us": row.measured.p50_us,
                    "p99_us": row.measured.p99_us, "of_raw_tcp": row.measured.iops / self.stream,
                })
            })
            .collect();
        let ratios: Vec<Value> = COMPARISONS
            .iter()
            .flat_map(|comparison| {
                comparison.ratios(&self.rows).into_iter().map(|ratio| {
                    json!({
                        "what": comparison.what, "rw": ratio.cell.rw, "depth": ratio.cell.depth,
                        "iops": ratio.iops, "p99": ratio.p99,
                    })
                })
            })
            .collect();
        json!({
            "runs": runs, "ratios": ratios, "tcp_stream_blocks_per_second": self.stream,
            "skipped_beside_spdk": !self.beside_spdk, "idle_queue_pair_bytes": self.idle.as_json(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_spdk_prints_is_read() {
        let text = "\
TCP (addr:127.0.0.1 subnqn:nqn) NSID 1 from core  1:   72033.00     281.38      13.88      12.50    3001.75
========================================================
Total                                                 :   69121.50     270.00      14.46      12.50    3001.75

Summary latency data for TCP (addr:127.0.0.1) NSID 1 from core 1:
=================================================================================
  1.00000% :    13.003us
 50.00000% :    13.760us
 99.00000% :    19.200us
 99.99999% :  3001.000us
";
        let wanted = Measured {
            iops: 69121.5,
            p50_us: 13.76,
            p99_us: 19.2,
        };
        assert_eq!(in_output_of_spdk(text).unwrap(), wanted);
        assert!(in_output_of_spdk("ERROR: no controller").is_err());
    }

    #[test]
    fn the_worst_cell_decides_a_goal() {
        let mut rows = Vec::new();
        for cell in cells() {
            for client in [Side::Ours, Side::Spdk] {
                for target in [Side::Ours, Side::Spdk] {
                    let slow = cell.depth == 32 && (client, target) == (Side::Spdk, Side::Ours);
                    let measured = Measured {
                        iops: if slow { 90.0 } else { 100.0 },
                        p50_us: 1.0,
                        p99_us: 1.0,
                    };
                    rows.push(Row {
                        cell,
                        client,
                        target,
                        measured,
                    });
                }
            }
        }
        let goals = goals(&rows);
        let [iops, p99, ..] = &goals[..] else {
            panic!("two goals for each comparison");
        };
        assert_eq!(
            iops.what,
            "our target to SPDK's, SPDK's client: IOPS, 4 of 6 cells, least randread at depth 32"
        );
        assert!(!iops.met && iops.measured == "0.90");
        assert!(p99.met && p99.measured == "1.00");
        assert_eq!(goals.iter().filter(|goal| !goal.met).count(), 1);
    }

    #[test]
    fn without_spdk_there_is_nothing_to_compare() {
        let rows = cells().map(|cell| Row {
            cell,
            client: Side::Ours,
            target: Side::Ours,
            measured: Measured {
                iops: 1.0,
                p50_us: 1.0,
                p99_us: 1.0,
            },
        });
        assert!(goals(&rows.collect::<Vec<_>>()).is_empty());
    }
}
