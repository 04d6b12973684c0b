//! What the kernel tells about a process: processor time, memory, descriptors.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Processor time of a process so far, user and system together.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Fields after the command in brackets: state is field 3, utime 14, stime 15.
    let (_, after) = stat
        .rsplit_once(')')
        .context("/proc/PID/stat has a command")?;
    let ticks: u64 = after
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().unwrap_or(0))
        .sum();
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

/// Measures how much of a core a process uses between two moments.
pub struct CpuMeter {
    pid: u32,
    started: Instant,
    before: Duration,
}

impl CpuMeter {
    /// Starts to measure.
    pub fn start(pid: u32) -> Result<CpuMeter> {
        Ok(CpuMeter {
            pid,
            started: Instant::now(),
            before: cpu_time(pid)?,
        })
    }

    /// Processor time used since the start.
    pub fn used(&self) -> Result<Duration> {
        Ok(cpu_time(self.pid)?.saturating_sub(self.before))
    }

    /// Percent of one core since the start.
    pub fn percent(&self) -> Result<f64> {
        Ok(self.used()?.as_secs_f64() / self.started.elapsed().as_secs_f64().max(1e-9) * 100.0)
    }
}

/// Resident memory that belongs to the process alone (anonymous), in bytes.
pub fn anonymous_bytes(pid: u32) -> Result<u64> {
    status_kib(pid, "RssAnon:").map(|kib| kib * 1024)
}

/// Resident memory, shared and file mappings included, in bytes.
pub fn resident_bytes(pid: u32) -> Result<u64> {
    status_kib(pid, "VmRSS:").map(|kib| kib * 1024)
}

fn status_kib(pid: u32, key: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find(|line| line.starts_with(key))
        .with_context(|| format!("no {key} in status"))?;
    let number = line.split_whitespace().nth(1).context("a number")?;
    Ok(number.parse()?)
}

/// Number of open descriptors.
pub fn descriptors(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// Number of threads.
pub fn threads(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/task"))?.count())
}
