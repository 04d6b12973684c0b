//! Target and fio with one choice of transmit and receive mode, measured: what `demo` and `bench` share.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use flexblk_tests::binaries::Binaries;
use flexblk_tests::fio::{Fio, FioResult, Measured};
use flexblk_tests::proc::CpuMeter;
use flexblk_tests::target::{Target, TargetOptions};
use serde_json::Value;

/// How packets are built and received, on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mode {
    pub(crate) tx: &'static str,
    pub(crate) rx: &'static str,
}

/// The mode this project is about, and the classic one beside it.
pub(crate) const MODES: [Mode; 2] = [
    Mode {
        tx: "header-only",
        rx: "in-cache",
    },
    Mode {
        tx: "copy",
        rx: "ring",
    },
];

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tx={} rx={}", self.tx, self.rx)
    }
}

/// A target in a mode, and how to run fio against it.
pub(crate) struct Load<'a> {
    pub(crate) binaries: &'a Binaries,
    pub(crate) directory: &'a Path,
    pub(crate) mode: Mode,
    pub(crate) target: Target,
    pub(crate) fio_core: Option<usize>,
}

/// One run of fio.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) result: FioResult,
    pub(crate) fio_cpu: f64,
    pub(crate) target_cpu: f64,
}

/// Counters by name.
pub(crate) type Counters = BTreeMap<String, u64>;

impl<'a> Load<'a> {
    pub(crate) fn start(
        binaries: &'a Binaries,
        directory: &'a Path,
        mode: Mode,
        devices: &[&str],
        cores: Option<(usize, usize)>,
    ) -> Result<Load<'a>> {
        let options = TargetOptions {
            tx: Some(mode.tx),
            rx: Some(mode.rx),
            core: cores.map(|(target, _)| target),
            ..TargetOptions::with_devices(devices)
        };
        let target = Target::start(binaries, directory, options)?;
        Ok(Load {
            binaries,
            directory,
            mode,
            target,
            fio_core: cores.map(|(_, fio)| fio),
        })
    }

    /// A job on namespace `nsid` in this mode.
    pub(crate) fn job(&self, name: &str, nsid: u32) -> Fio {
        Fio::new(self.binaries, &self.target, nsid, name, self.directory)
            .option("tx", self.mode.tx)
            .option("rx", self.mode.rx)
            .option("counters_file", self.counters_file().display())
            .on_core(self.fio_core)
    }

    fn counters_file(&self) -> std::path::PathBuf {
        self.directory.join(format!(
            "initiator-{}-{}.counters",
            self.mode.tx, self.mode.rx
        ))
    }

    /// Runs a job and measures both sides' processor time.
    pub(crate) fn run(&self, fio: &Fio, limit: Duration) -> Result<Run> {
        let meter = CpuMeter::start(self.target.id())?;
        let result = fio.success(limit)?;
        // The meter also saw fio start and end, with an idle target: the jobs' own run time is what counts.
        let runtime = result.runtime().as_secs_f64().max(0.001);
        Ok(Run {
            fio_cpu: result.cpu_percent(),
            target_cpu: meter.used()?.as_secs_f64() / runtime * 100.0,
            result,
        })
    }

    /// What the initiators of this mode counted, all jobs together.
    pub(crate) fn initiator_counters(&self) -> Result<Counters> {
        let mut sum = Counters::new();
        let text = fs::read_to_string(self.counters_file())
            .context("the counters that the fio engine writes")?;
        for line in text.lines() {
            add(
                &mut sum,
                &serde_json::from_str(line).context("a line of counters")?,
            );
        }
        Ok(sum)
    }

    /// Ends the target and reads what it counted.
    pub(crate) fn finish(mut self) -> Result<Counters> {
        let status = self.target.terminate()?;
        let output = self.target.output();
        if !status.success() {
            anyhow::bail!("flexblk-target ended with {status}:\n{output}");
        }
        let mut counters = Counters::new();
        for line in output.lines() {
            if let Ok(json) = serde_json::from_str::<Value>(line)
                && let Some(found) = json.get("counters")
            {
                counters.clear();
                add(&mut counters, found);
            }
        }
        if counters.is_empty() {
            anyhow::bail!("flexblk-target printed no counters at its end:\n{output}");
        }
        Ok(counters)
    }
}

fn add(sum: &mut Counters, json: &Value) {
    if let Some(object) = json.as_object() {
        for (name, value) in object {
            if let Some(value) = value.as_u64() {
                *sum.entry(name.clone()).or_default() += value;
            }
        }
    }
}

/// Cells that every table of runs has: IOPS, GB/s and percentiles.
pub(crate) fn cells(measured: &Measured) -> [String; 5] {
    use crate::table::{count, micros};
    [
        count(measured.iops),
        format!("{:.2}", measured.bytes_per_second / 1e9),
        micros(measured.p50_us),
        micros(measured.p99_us),
        micros(measured.p999_us),
    ]
}

/// A counter, 0 when it is not there.
pub(crate) fn value(counters: &Counters, name: &str) -> u64 {
    counters.get(name).copied().unwrap_or(0)
}
