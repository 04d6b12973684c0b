//! Running fio with our engine, and reading what it measured.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::binaries::Binaries;
use crate::process::{Finished, Process, find_program};
use crate::target::{SUBNQN, Target};

/// Options that make fio print what a [`FioResult`] is made of.
pub const RESULT_OPTIONS: [&str; 6] = [
    "--output-format=json",
    "--lat_percentiles=1",
    "--clat_percentiles=0",
    // Total latencies only: fewer looks at the clock and counts (fio's manual, `disable_clat`).
    "--disable_clat=1",
    "--disable_slat=1",
    "--percentile_list=50:99:99.9",
];

/// One call of fio with one job.
#[derive(Clone, Debug)]
pub struct Fio {
    arguments: Vec<String>,
    core: Option<usize>,
    directory: PathBuf,
    name: String,
}

impl Fio {
    /// A job called `name` on namespace `nsid` of a target; output files go to `directory`.
    pub fn new(
        binaries: &Binaries,
        target: &Target,
        nsid: u32,
        name: &str,
        directory: &Path,
    ) -> Fio {
        Fio::at_port(binaries, target.udp_port(), nsid, name, directory)
    }

    /// As [`new`](Self::new), for a target that may not be there.
    pub fn at_port(
        binaries: &Binaries,
        udp_port: u16,
        nsid: u32,
        name: &str,
        directory: &Path,
    ) -> Fio {
        let engine = format!("external:{}", binaries.fio_engine.display());
        Fio::with_engine(&engine, name, directory)
            .option("traddr", "127.0.0.1")
            .option("subnqn", SUBNQN)
            .option("udp_port", udp_port)
            .option("nsid", nsid)
    }

    /// A job called `name` of any engine.
    pub fn with_engine(engine: &str, name: &str, directory: &Path) -> Fio {
        let fio = Fio {
            arguments: Vec::new(),
            core: None,
            directory: directory.to_owned(),
            name: name.to_owned(),
        };
        fio.option("name", name).option("ioengine", engine)
    }

    /// Adds `--name=value`.
    #[must_use]
    pub fn option(mut self, name: &str, value: impl std::fmt::Display) -> Fio {
        self.arguments.push(format!("--{name}={value}"));
        self
    }

    /// Adds `--name`.
    #[must_use]
    pub fn flag(mut self, name: &str) -> Fio {
        self.arguments.push(format!("--{name}"));
        self
    }

    /// Runs on one core only.
    #[must_use]
    pub fn on_core(mut self, core: Option<usize>) -> Fio {
        self.core = core;
        self
    }

    fn result_file(&self) -> PathBuf {
        self.directory.join(format!("{}.json", self.name))
    }

    fn command(&self) -> Result<Command> {
        let fio = find_program("fio")?;
        let mut command = match self.core {
            Some(core) => {
                let mut taskset = Command::new(find_program("taskset")?);
                taskset.args(["-c", &core.to_string()]).arg(fio);
                taskset
            }
            None => Command::new(fio),
        };
        command
            .current_dir(&self.directory)
            .args(&self.arguments)
            .args(RESULT_OPTIONS);
        // Not standard output: fio prints errors there, before the JSON.
        command.arg(format!("--output={}", self.result_file().display()));
        Ok(command)
    }

    /// Starts it.
    pub fn spawn(&self) -> Result<Process> {
        Process::spawn(&mut self.command()?, &self.name, &self.directory)
    }

    /// Runs it to its end, however that is.
    pub fn run(&self, limit: Duration) -> Result<(Finished, Option<FioResult>)> {
        let started = std::time::Instant::now();
        let mut process = self.spawn()?;
        let status = process.wait(limit)?;
        let finished = Finished {
            code: status.code(),
            stdout: process.stdout(),
            stderr: process.stderr(),
            took: started.elapsed(),
        };
        Ok((finished, FioResult::read(&self.result_file()).ok()))
    }

    /// Runs it to its end, which has to be a good one.
    pub fn success(&self, limit: Duration) -> Result<FioResult> {
        let (finished, result) = self.run(limit)?;
        finished
            .success()
            .with_context(|| format!("fio job {}", self.name))?;
        let result = result.context("fio wrote no result")?;
        match result.error() {
            0 => Ok(result),
            error => bail!("fio job {}: error {error}", self.name),
        }
    }
}

/// What fio measured in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measured {
    /// I/Os that were made.
    pub ios: u64,
    /// Bytes that were moved.
    pub bytes: u64,
    /// I/Os per second.
    pub iops: f64,
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// Median of the total latency (from making the I/O to its end) in microseconds.
    pub p50_us: f64,
    /// 99th percentile of it.
    pub p99_us: f64,
    /// 99.9th percentile of it.
    pub p999_us: f64,
}

/// fio's JSON.
#[derive(Clone, Debug)]
pub struct FioResult {
    json: Value,
}

impl FioResult {
    /// Reads an output file.
    pub fn read(path: &Path) -> Result<FioResult> {
        let text = fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
        FioResult::parse(&text)
    }

    /// What a run with [`RESULT_OPTIONS`] has printed.
    pub fn parse(text: &str) -> Result<FioResult> {
        // fio may put a line of its own before the JSON ("fio: terminating on signal").
        let start = text.find('{').context("no JSON")?;
        let json =
            serde_json::from_str(text.get(start..).unwrap_or_default()).context("fio's JSON")?;
        Ok(FioResult { json })
    }

    /// All jobs.
    pub fn jobs(&self) -> &[Value] {
        self.json
            .get("jobs")
            .and_then(Value::as_array)
            .map(Vec::as_slice)
            .unwrap_or_default()
    }

    /// The first error of any job, 0 when there was none.
    pub fn error(&self) -> i64 {
        self.jobs()
            .iter()
            .filter_map(|job| job.get("error")?.as_i64())
            .find(|error| *error != 0)
            .unwrap_or(0)
    }

    /// What all jobs did in one direction (`read`, `write`, `trim`); percentiles are those of the worst job.
    pub fn measured(&self, direction: &str) -> Measured {
        let mut sum = Measured::default();
        for job in self.jobs() {
            let Some(side) = job.get(direction) else {
                continue;
            };
            let number = |name: &str| side.get(name).and_then(Value::as_f64).unwrap_or(0.0);
            let percentile = |name: &str| {
                let nanoseconds = side
                    .pointer("/lat_ns/percentile")
                    .and_then(|all| all.get(name)?.as_f64());
                nanoseconds.unwrap_or(0.0) / 1000.0
            };
            sum.ios += number("total_ios") as u64;
            sum.bytes += number("io_bytes") as u64;
            sum.iops += number("iops");
            sum.bytes_per_second += number("bw_bytes");
            sum.p50_us = sum.p50_us.max(percentile("50.000000"));
            sum.p99_us = sum.p99_us.max(percentile("99.000000"));
            sum.p999_us = sum.p999_us.max(percentile("99.900000"));
        }
        sum
    }

    /// How long the longest job ran.
    pub fn runtime(&self) -> Duration {
        let longest = self
            .jobs()
            .iter()
            .filter_map(|job| job.get("job_runtime")?.as_u64())
            .max();
        Duration::from_millis(longest.unwrap_or(0))
    }

    /// Processor time of fio's jobs in percent of one core.
    pub fn cpu_percent(&self) -> f64 {
        let of = |job: &Value, name: &str| job.get(name).and_then(Value::as_f64).unwrap_or(0.0);
        self.jobs()
            .iter()
            .map(|job| of(job, "usr_cpu") + of(job, "sys_cpu"))
            .sum()
    }
}
