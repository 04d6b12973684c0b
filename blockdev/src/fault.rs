//! A wrapper that fails I/Os: at a rate, or at bad places. Same seed, same faults.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use flexblk_reactor::{Completion, Reactor};

use crate::{
    BlockDevice, Channel, Error, FaultConfig, FaultOn, Info, Io, IoDone, IoError, IoOp, MediaError,
    Submitted, Tokens, identity, random::Random,
};

/// See [`crate::BdevConfig::Fault`].
///
/// A failed I/O does not reach the base. Reads, compares and verifies fail with
/// [`IoError::MediaRead`], everything else with [`IoError::MediaWrite`].
pub struct FaultDevice {
    name: Arc<str>,
    base: Arc<dyn BlockDevice>,
    seed: u64,
    opened: AtomicU64,
    plan: Arc<Plan>,
}

struct Plan {
    /// Millionths, by class.
    rates: [AtomicU32; 3],
    media_errors: Box<[MediaError]>,
    injected: AtomicU64,
}

#[derive(Clone, Copy)]
enum Class {
    Read = 0,
    Write = 1,
    Flush = 2,
}

impl FaultDevice {
    /// Wraps `base`.
    pub fn new(config: &FaultConfig, base: Arc<dyn BlockDevice>) -> Result<Self, Error> {
        let device = Self {
            name: config.name.as_str().into(),
            base,
            seed: config.seed,
            opened: AtomicU64::new(0),
            plan: Arc::new(Plan {
                rates: Default::default(),
                media_errors: config.media_errors.clone().into(),
                injected: AtomicU64::new(0),
            }),
        };
        device.set_error_rates(
            config.read_error_rate,
            config.write_error_rate,
            config.flush_error_rate,
        )?;
        Ok(device)
    }

    /// Changes the rates (0.0 to 1.0) while I/O goes on.
    pub fn set_error_rates(&self, read: f64, write: f64, flush: f64) -> Result<(), Error> {
        let rates = [read, write, flush];
        if let Some(rate) = rates.iter().find(|rate| !(0.0..=1.0).contains(*rate)) {
            let reason = format!("error rate {rate} is not within 0.0 to 1.0");
            return Err(Error::Config {
                what: self.name.to_string(),
                reason,
            });
        }
        for (stored, rate) in self.plan.rates.iter().zip(rates) {
            stored.store((rate * 1e6).round() as u32, Ordering::Relaxed);
        }
        Ok(())
    }

    /// I/Os failed so far.
    #[must_use]
    pub fn injected(&self) -> u64 {
        self.plan.injected.load(Ordering::Relaxed)
    }

    fn named(&self, info: Info) -> Info {
        Info {
            name: Arc::clone(&self.name),
            kind: format!("fault over {}", info.kind).into(),
            uuid: identity::derived(&[info.uuid.as_bytes(), self.name.as_bytes()]),
            ..info
        }
    }
}

impl BlockDevice for FaultDevice {
    fn info(&self) -> Info {
        self.named(self.base.info())
    }

    fn open(&self, reactor: &mut Reactor, tokens: Tokens) -> Result<Box<dyn Channel>, Error> {
        let nth = self.opened.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(FaultChannel {
            inner: self.base.open(reactor, tokens)?,
            random: Random::new(
                self.seed
                    .wrapping_add(nth.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            ),
            plan: Arc::clone(&self.plan),
        }))
    }

    fn resize(&self, new_bytes: u64) -> Result<Info, Error> {
        self.base.resize(new_bytes).map(|info| self.named(info))
    }

    fn rescan(&self) -> Result<Info, Error> {
        self.base.rescan().map(|info| self.named(info))
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.base.counters();
        counters.push(("injected_errors", self.injected()));
        counters
    }
}

struct FaultChannel {
    inner: Box<dyn Channel>,
    random: Random,
    plan: Arc<Plan>,
}

impl FaultChannel {
    fn fault(&mut self, io: &Io) -> Option<IoError> {
        let class = match io.op {
            IoOp::Read | IoOp::Compare | IoOp::Verify => Class::Read,
            IoOp::Write { .. } | IoOp::WriteZeroes { .. } | IoOp::Discard => Class::Write,
            IoOp::Flush => Class::Flush,
        };
        let rate = self
            .plan
            .rates
            .get(class as usize)
            .map_or(0, |rate| rate.load(Ordering::Relaxed));
        let hit = self.random.chance(rate)
            || self.plan.media_errors.iter().any(|bad| bad.hits(class, io));
        hit.then(|| {
            self.plan.injected.fetch_add(1, Ordering::Relaxed);
            match class {
                Class::Read => IoError::MediaRead,
                Class::Write | Class::Flush => IoError::MediaWrite,
            }
        })
    }
}

impl MediaError {
    fn hits(&self, class: Class, io: &Io) -> bool {
        let concerned = match class {
            Class::Read => self.on != FaultOn::Write,
            Class::Write => self.on != FaultOn::Read,
            Class::Flush => false,
        };
        let io_end = io.lba.saturating_add(u64::from(io.blocks));
        concerned && io.lba < self.lba.saturating_add(self.blocks) && self.lba < io_end
    }
}

impl Channel for FaultChannel {
    fn submit(&mut self, reactor: &mut Reactor, io: Io) -> Submitted {
        match self.fault(&io) {
            Some(error) => Submitted::Done(Err(error)),
            None => self.inner.submit(reactor, io),
        }
    }

    fn complete(&mut self, reactor: &mut Reactor, completion: &Completion, out: &mut Vec<IoDone>) {
        self.inner.complete(reactor, completion, out);
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }

    fn depth(&self) -> usize {
        self.inner.depth()
    }
}
