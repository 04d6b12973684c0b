//! What threads report: counters of transport and I/O, CPU time, what is open.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use flexblk_nvme::log::discovery::TransportType;
use flexblk_nvme::{Cntlid, Nqn, Qid};
use serde::Serialize;

use crate::counters::IoTotals;

/// One data thread.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ThreadStats {
    /// Its number.
    pub thread: usize,
    /// CPU time of the thread, user and system, in microseconds.
    pub cpu_us: u64,
    /// The core it ran on when it answered.
    pub core: usize,
    /// Its number in the system.
    pub tid: i32,
    /// Queue pairs.
    pub queues: usize,
    /// Those of them that have not sent Connect.
    pub unconnected_queues: usize,
    /// Admin queues and I/O queues that were ever connected.
    pub connects: (u64, u64),
    /// I/Os with block devices.
    pub pending_bdev_io: usize,
    /// Controllers whose Admin queue is here.
    pub controllers: usize,
    /// Block devices open.
    pub devices: usize,
    /// Memory regions registered with the transport.
    pub memory_regions: usize,
    /// Free I/O buffers: small, large.
    pub free_buffers: (u32, u32),
    /// Times that a command waited for buffers.
    pub buffer_waits: u64,
    /// Counters of the transport's engine, by name.
    pub engine: BTreeMap<&'static str, u64>,
    /// Counters of the transport's port, by name.
    pub port: BTreeMap<&'static str, u64>,
    /// Counters of NVMe/TCP, by name; empty when it is not listened on.
    pub tcp: BTreeMap<&'static str, u64>,
    /// Turns of the thread's loop in which each thing that it looks after had something to do, by name.
    pub busy_turns: BTreeMap<&'static str, u64>,
    /// Counters of the reactor, by name.
    pub reactor: BTreeMap<&'static str, u64>,
}

/// A queue pair.
#[derive(Clone, Debug)]
pub struct QueueReport {
    /// Thread it lives on.
    pub thread: usize,
    /// Its controller.
    pub cntlid: Cntlid,
    /// Its identifier.
    pub qid: Qid,
    /// Name of its subsystem.
    pub subnqn: Nqn,
    /// Name of its host.
    pub hostnqn: Nqn,
    /// What carries it.
    pub transport: TransportType,
    /// Port by which it came.
    pub port: u16,
    /// Where its host sends from.
    pub peer: SocketAddr,
    /// Commands under way end, then it is gone.
    pub closing: bool,
}

/// The whole target.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TargetStats {
    /// Seconds since the start.
    pub uptime_s: f64,
    /// CPU time of the process, user and system, in microseconds.
    pub cpu_us: u64,
    /// Controllers.
    pub controllers: usize,
    /// Bytes of the memory budget that are free.
    pub budget_free_bytes: u64,
    /// I/O by subsystem name.
    pub subsystems: BTreeMap<String, IoTotals>,
    /// Sums over the threads of the transports' counters (engine, port, NVMe/TCP), by name.
    pub counters: BTreeMap<&'static str, u64>,
    /// Each thread.
    pub threads: Vec<ThreadStats>,
}

impl TargetStats {
    /// Sums the threads' transport counters.
    pub(crate) fn sum_transport(&mut self) {
        for thread in &self.threads {
            for (name, value) in thread.engine.iter().chain(&thread.port).chain(&thread.tcp) {
                *self.counters.entry(name).or_default() += value;
            }
        }
    }
}

/// CPU time of the calling thread, or of the process.
pub(crate) fn cpu_time(whole_process: bool) -> Duration {
    let clock = match whole_process {
        true => rustix::time::ClockId::ProcessCPUTime,
        false => rustix::time::ClockId::ThreadCPUTime,
    };
    let time = rustix::time::clock_gettime(clock);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// As a counter.
pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
