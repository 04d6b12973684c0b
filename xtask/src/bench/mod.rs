//! `cargo xtask bench`: how fast and how big, beside what raw sockets and SPDK reach in the same run.

mod exports;
mod flexins;
mod idle;
mod tcp;

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use flexblk_tests::binaries::{self, Binaries};
use flexblk_tests::process::run as run_program;
use serde_json::{Value, json};

use crate::apt;
use crate::table::Table;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Install what is missing without asking.
    #[arg(long)]
    yes: bool,
    /// What to measure; SPDK is measured beside NVMe/TCP when SPDK_DIR names a build of it.
    #[arg(long, value_enum, default_values_t = [Transport::Flexins, Transport::Tcp], value_delimiter = ',')]
    transport: Vec<Transport>,
    /// Measure the exports instead of the transports: NBD, FUSE with a loop device, and fio's engine for scale, beside
    /// QEMU and nbdkit.
    #[arg(long, conflicts_with = "transport")]
    exports: bool,
    /// Measure block devices of a Linux 6.12 guest, too: by ublk and by the kernel's NBD client. It is emulated, so that
    /// they compare with one another only.
    #[arg(long, requires = "exports")]
    vm: bool,
    /// Seconds for each run.
    #[arg(long, default_value_t = 1)]
    seconds: u32,
    /// Rounds of all runs, raw sockets between them; the median of each counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    /// Cores of target and client.
    #[arg(long, default_value = "0,1", value_parser = two_cores)]
    cores: (usize, usize),
    /// Sizes of the RAM namespaces in MiB: one that fits into the processor's cache, one that does not. NVMe/TCP is
    /// measured with the first.
    #[arg(long, default_value = "64,1024", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(16..=65536))]
    ram: Vec<u32>,
    /// Print one JSON object instead of tables.
    #[arg(long)]
    json: bool,
    /// End with an error when a goal is missed.
    #[arg(long)]
    check: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Transport {
    Flexins,
    Tcp,
}

/// Queue depths of the runs.
const DEPTHS: [u32; 3] = [1, 32, 128];
/// For any one program.
const LIMIT: Duration = Duration::from_secs(600);

fn two_cores(text: &str) -> Result<(usize, usize), String> {
    let wrong = || format!("'{text}' is not two cores such as 0,1");
    let (a, b) = text.split_once(',').ok_or_else(wrong)?;
    Ok((
        a.trim().parse().map_err(|_| wrong())?,
        b.trim().parse().map_err(|_| wrong())?,
    ))
}

impl Arguments {
    fn say(&self, text: &str) {
        if !self.json {
            println!("== {text}");
        }
    }
}

struct Goal {
    what: String,
    measured: String,
    goal: String,
    met: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<bool> {
    apt::ensure(&[apt::FIO, apt::TASKSET], arguments.yes)?;
    arguments.say("building in release mode");
    let binaries = binaries::build(true)?;
    let directory = binaries::target_directory()?.join("bench");
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    fs::create_dir_all(&directory)?;
    let wanted = |transport| !arguments.exports && arguments.transport.contains(&transport);
    let flexins = wanted(Transport::Flexins)
        .then(|| flexins::measure(arguments, &binaries, &directory))
        .transpose()?;
    let tcp = wanted(Transport::Tcp)
        .then(|| tcp::measure(arguments, &binaries, &directory))
        .transpose()?;
    let exports = arguments
        .exports
        .then(|| exports::measure(arguments, &binaries, &directory))
        .transpose()?;
    fs::remove_dir_all(&directory)?;
    let mut goals = Vec::new();
    goals.extend(flexins.iter().flat_map(flexins::Report::goals));
    goals.extend(tcp.iter().flat_map(tcp::Report::goals));
    goals.extend(exports.iter().flat_map(exports::Report::goals));
    if arguments.json {
        let mut json = flexins.map_or_else(|| json!({}), |report| report.as_json());
        if let Some(report) = tcp {
            json["tcp"] = report.as_json();
        }
        if let Some(report) = exports {
            json["exports"] = report.as_json();
        }
        json["goals"] = goals
            .iter()
            .map(|goal| json!({ "what": goal.what, "measured": goal.measured, "goal": goal.goal, "met": goal.met }))
            .collect();
        println!("{json:#}");
    } else {
        if let Some(report) = flexins {
            report.print();
        }
        if let Some(report) = tcp {
            report.print();
        }
        if let Some(report) = exports {
            report.print();
        }
        print(&goals);
    }
    Ok(!arguments.check || goals.iter().all(|goal| goal.met))
}

fn print(goals: &[Goal]) {
    println!();
    let mut table = Table::new(&["goal", "measured", "wanted", ""]);
    for goal in goals {
        table.row(&[
            goal.what.as_str(),
            &goal.measured,
            &goal.goal,
            if goal.met { "met" } else { "MISSED" },
        ]);
    }
    table.print();
}

/// One test of `flexins-perf` on the cores of this run.
fn perf(arguments: &Arguments, binaries: &Binaries, test: &[&str]) -> Result<Value> {
    let (a, b) = arguments.cores;
    let mut command = Command::new(&binaries.flexins_perf);
    command.args(test).args([
        "--json",
        "--cores",
        &format!("{a},{b}"),
        "--seconds",
        &arguments.seconds.to_string(),
    ]);
    let done = run_program(&mut command, LIMIT)?
        .success()
        .with_context(|| format!("flexins-perf {}", test.join(" ")))?;
    serde_json::from_str(done.stdout.trim()).context("flexins-perf prints JSON")
}

fn number(json: &Value, name: &str) -> Result<f64> {
    json.get(name)
        .and_then(Value::as_f64)
        .with_context(|| format!("no number {name} in {json}"))
}

/// The value in the middle, by `key`.
fn median<T>(values: impl Iterator<Item = T>, key: impl Fn(&T) -> f64) -> Option<T> {
    let mut values: Vec<T> = values.collect();
    values.sort_by(|a, b| key(a).total_cmp(&key(b)));
    let middle = values.len() / 2;
    (middle < values.len()).then(|| values.swap_remove(middle))
}
