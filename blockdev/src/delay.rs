//! A wrapper that makes I/Os slower: an average, and a spike for one in a hundred.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use flexblk_reactor::{Completion, Reactor};
use uuid::Uuid;

use crate::{
    BdevConfig, BlockDevice, Channel, DelayConfig, Error, Info, Io, IoDone, IoError, IoOp,
    Submitted, Tokens, config, identity, random::Random,
};

/// See [`crate::BdevConfig::Delay`].
pub struct DelayDevice {
    name: Arc<str>,
    base: Arc<dyn BlockDevice>,
    uuid: Option<Uuid>,
    seed: u64,
    depth: u32,
    opened: AtomicU64,
    latencies: Arc<Latencies>,
}

/// What channels add; changed while they run.
#[derive(Default)]
struct Latencies {
    read: Latency,
    write: Latency,
    flush: Latency,
}

/// In microseconds.
#[derive(Default)]
struct Latency {
    average_us: AtomicU64,
    p99_us: AtomicU64,
}

/// One in a hundred, as in SPDK's delay device.
const SPIKE_MILLIONTHS: u32 = 10_000;
/// An hour: no arithmetic on time overflows.
const LIMIT_US: u64 = 3_600_000_000;

impl Latency {
    fn set(&self, average_us: u64, p99_us: Option<u64>) {
        self.average_us.store(average_us, Ordering::Relaxed);
        self.p99_us
            .store(p99_us.unwrap_or(average_us), Ordering::Relaxed);
    }
}

impl Latencies {
    fn set(&self, config: &DelayConfig) -> Result<(), Error> {
        let longest = [
            Some(config.avg_read_latency),
            config.p99_read_latency,
            Some(config.avg_write_latency),
            config.p99_write_latency,
            Some(config.flush_latency),
        ];
        if longest.into_iter().flatten().any(|us| us > LIMIT_US) {
            return Err(Error::Config {
                what: config.name.clone(),
                reason: format!("latencies are at most {LIMIT_US} us"),
            });
        }
        self.read
            .set(config.avg_read_latency, config.p99_read_latency);
        self.write
            .set(config.avg_write_latency, config.p99_write_latency);
        self.flush.set(config.flush_latency, None);
        Ok(())
    }
}

impl DelayDevice {
    /// Wraps `base`.
    pub fn new(config: &DelayConfig, base: Arc<dyn BlockDevice>) -> Result<Self, Error> {
        config::check_depth(&config.name, config.depth)?;
        let latencies = Latencies::default();
        latencies.set(config)?;
        Ok(Self {
            name: config.name.as_str().into(),
            base,
            uuid: config.uuid,
            seed: config.seed,
            depth: config.depth,
            opened: AtomicU64::new(0),
            latencies: latencies.into(),
        })
    }

    fn named(&self, info: Info) -> Info {
        Info {
            name: Arc::clone(&self.name),
            kind: format!("delay over {}", info.kind).into(),
            uuid: self.uuid.unwrap_or_else(|| {
                identity::derived(&[info.uuid.as_bytes(), self.name.as_bytes()])
            }),
            ..info
        }
    }
}

impl BlockDevice for DelayDevice {
    fn info(&self) -> Info {
        self.named(self.base.info())
    }

    fn open(&self, reactor: &mut Reactor, tokens: Tokens) -> Result<Box<dyn Channel>, Error> {
        let below = tokens.below().ok_or_else(|| Error::TooDeep {
            what: self.name.to_string(),
        })?;
        let inner = self.base.open(reactor, below)?;
        let nth = self.opened.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(DelayChannel {
            inner,
            tokens,
            latencies: Arc::clone(&self.latencies),
            random: Random::new(
                self.seed
                    .wrapping_add(nth.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            ),
            slots: vec![Slot::default(); self.depth as usize].into(),
            free: (0..self.depth).rev().collect(),
            ended: Vec::with_capacity(self.depth as usize),
        }))
    }

    fn resize(&self, new_bytes: u64) -> Result<Info, Error> {
        self.base.resize(new_bytes).map(|info| self.named(info))
    }

    fn rescan(&self) -> Result<Info, Error> {
        self.base.rescan().map(|info| self.named(info))
    }

    /// Latencies change for I/Os that begin from now on.
    fn reconfigure(&self, config: &BdevConfig) -> Result<(), Error> {
        match config {
            BdevConfig::Delay(delay) => self.latencies.set(delay),
            _ => Err(Error::fixed(&self.name)),
        }
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.base.counters()
    }
}

struct DelayChannel {
    inner: Box<dyn Channel>,
    tokens: Tokens,
    latencies: Arc<Latencies>,
    random: Random,
    slots: Box<[Slot]>,
    free: Vec<u32>,
    /// What the inner channel finished in one call.
    ended: Vec<IoDone>,
}

#[derive(Clone, Copy)]
struct Slot {
    tag: u64,
    delay: Duration,
    result: Result<(), IoError>,
}

impl Default for Slot {
    fn default() -> Self {
        Self {
            tag: 0,
            delay: Duration::ZERO,
            result: Ok(()),
        }
    }
}

impl DelayChannel {
    fn set(&mut self, index: u32, slot: Slot) {
        if let Some(stored) = self.slots.get_mut(index as usize) {
            *stored = slot;
        }
    }

    fn delay(&mut self, op: IoOp) -> Duration {
        let latency = match op {
            IoOp::Read | IoOp::Compare | IoOp::Verify => &self.latencies.read,
            IoOp::Write { .. } | IoOp::WriteZeroes { .. } | IoOp::Discard => &self.latencies.write,
            IoOp::Flush => &self.latencies.flush,
        };
        let us = match self.random.chance(SPIKE_MILLIONTHS) {
            true => &latency.p99_us,
            false => &latency.average_us,
        };
        Duration::from_micros(us.load(Ordering::Relaxed))
    }
}

impl Channel for DelayChannel {
    fn submit(&mut self, reactor: &mut Reactor, mut io: Io) -> Submitted {
        let Some(index) = self.free.pop() else {
            return Submitted::Done(Err(IoError::Busy));
        };
        let delay = self.delay(io.op);
        let tag = std::mem::replace(&mut io.tag, u64::from(index));
        let submitted = self.inner.submit(reactor, io);
        match submitted {
            // refused rather than done, or nothing to wait for
            Submitted::Done(result) if delay.is_zero() || result == Err(IoError::Busy) => {
                self.free.push(index);
                return submitted;
            }
            Submitted::Done(result) => {
                self.set(index, Slot { tag, delay, result });
                reactor.arm(Instant::now() + delay, self.tokens.slot(index));
            }
            Submitted::Pending => self.set(
                index,
                Slot {
                    tag,
                    delay,
                    result: Ok(()),
                },
            ),
        }
        Submitted::Pending
    }

    fn complete(&mut self, reactor: &mut Reactor, completion: &Completion, out: &mut Vec<IoDone>) {
        if let Some(index) = self.tokens.own(completion.token) {
            // the timer of an I/O that the inner device has done
            let Some(slot) = self.slots.get(index as usize) else {
                return;
            };
            out.push(IoDone {
                tag: slot.tag,
                result: slot.result,
            });
            self.free.push(index);
            return;
        }
        let mut ended = std::mem::take(&mut self.ended);
        self.inner.complete(reactor, completion, &mut ended);
        for done in ended.drain(..) {
            let index = done.tag as u32; // we gave it
            let Some(slot) = self.slots.get_mut(index as usize) else {
                continue;
            };
            slot.result = done.result;
            if slot.delay.is_zero() {
                out.push(IoDone {
                    tag: slot.tag,
                    result: done.result,
                });
                self.free.push(index);
            } else {
                reactor.arm(Instant::now() + slot.delay, self.tokens.slot(index));
            }
        }
        self.ended = ended;
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn depth(&self) -> usize {
        self.slots.len()
    }
}
