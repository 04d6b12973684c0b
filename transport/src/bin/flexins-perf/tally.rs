//! What a client counts while it measures, wherever its engine runs: slots of requests, completions,
//! latencies.

use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use flexins::verbs::{Qpn, WcStatus, WorkCompletion};
use hdrhistogram::Histogram;

use crate::args::{Args, VerbsArgs};
use crate::cpu::Meter;
use crate::verbs::{Measured, Side};

/// Time before measuring, as a share of the whole.
const WARM_UP: f64 = 0.1;

/// A connection of the client.
pub(crate) struct Connection {
    pub(crate) qpn: Qpn,
    /// Slots of requests that can be posted.
    pub(crate) free: Vec<u32>,
    /// When the request in each slot was posted.
    posted: Vec<Instant>,
}

impl Connection {
    pub(crate) fn new(qpn: Qpn, options: &VerbsArgs) -> Self {
        Self {
            qpn,
            free: (0..options.depth).rev().collect(),
            posted: vec![Instant::now(); options.depth as usize],
        }
    }

    /// The request in a slot was posted.
    pub(crate) fn note_posted(&mut self, slot: u32, now: Instant) {
        if let Some(posted) = self.posted.get_mut(slot as usize) {
            *posted = now;
        }
    }
}

/// Id of the request in a slot of a connection.
pub(crate) const fn wr_id(connection: usize, slot: u32) -> u64 {
    (connection as u64) << 32 | slot as u64
}

/// Completions since the start, and since the warm-up.
pub(crate) struct Tally {
    warm_until: Instant,
    until: Instant,
    meter: Option<Meter>,
    operations: u64,
    in_all: u64,
    latency: Histogram<u64>,
}

impl Tally {
    pub(crate) fn start(args: &Args) -> anyhow::Result<Self> {
        let warm_until = Instant::now() + args.duration().mul_f64(WARM_UP);
        Ok(Self {
            warm_until,
            until: warm_until + args.duration(),
            meter: None,
            operations: 0,
            in_all: 0,
            latency: Histogram::new_with_max(60_000_000_000, 3)?,
        })
    }

    /// The time is up?
    pub(crate) fn is_over(&mut self, now: Instant) -> bool {
        if self.meter.is_none() && now >= self.warm_until {
            self.meter = Some(Meter::start());
        }
        now >= self.until
    }

    /// Takes completions; each gives its slot back.
    pub(crate) fn take(
        &mut self,
        done: &mut Vec<WorkCompletion>,
        connections: &mut [Connection],
    ) -> anyhow::Result<()> {
        let now = Instant::now();
        for completion in done.drain(..) {
            if completion.status != WcStatus::Success {
                bail!("operation failed: {}", completion.status);
            }
            self.in_all += 1;
            let slot = completion.wr_id as u32;
            let Some(connection) = connections.get_mut((completion.wr_id >> 32) as usize) else {
                continue;
            };
            let posted = connection.posted.get(slot as usize).copied().unwrap_or(now);
            connection.free.push(slot);
            if self.meter.is_some() {
                self.operations += 1;
                let took = now.saturating_duration_since(posted);
                self.latency.saturating_record(took.as_nanos() as u64);
            }
        }
        Ok(())
    }

    /// The result; `side` makes the thread's part of it from its share of a core.
    pub(crate) fn finish(
        self,
        side: impl FnOnce(f64) -> anyhow::Result<Side>,
    ) -> anyhow::Result<Measured> {
        let meter = self.meter.ok_or_else(|| anyhow!("no time to measure"))?;
        let (wall, cpu): (Duration, f64) = meter.stop();
        Ok(Measured {
            side: side(cpu)?,
            operations: self.operations,
            operations_in_all: self.in_all,
            seconds: wall.as_secs_f64(),
            latency: self.latency,
        })
    }
}
