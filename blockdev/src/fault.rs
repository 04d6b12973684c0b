//! A wrapper that fails I/Os: at a rate, at bad places, or as it is told while it runs. Same seed, same
//! faults.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use flexblk_reactor::{Completion, Reactor, Span};
use uuid::Uuid;

use crate::{
    BlockDevice, Channel, Error, FaultConfig, FaultOn, Info, Io, IoBuffers, IoDone, IoError, IoOp,
    MediaError, Submitted, Tokens, identity,
    inject::{InjectedError, Injector},
    random::Random,
};

/// See [`crate::BdevConfig::Fault`].
///
/// An I/O that fails at a rate or at a bad place does not reach the base. Reads, compares and verifies
/// fail with [`IoError::MediaRead`], everything else with [`IoError::MediaWrite`]. Other errors are
/// [injected](BlockDevice::injector) while the device runs, and end with it.
pub struct FaultDevice {
    name: Arc<str>,
    base: Arc<dyn BlockDevice>,
    uuid: Option<Uuid>,
    seed: u64,
    opened: AtomicU64,
    plan: Arc<Plan>,
}

struct Plan {
    /// Millionths, by class.
    rates: [AtomicU32; 3],
    media_errors: Box<[MediaError]>,
    injector: Injector,
    injected: AtomicU64,
}

/// How often I/Os that are held back are looked at, as SPDK's block device layer does for I/Os without
/// memory.
const LOOK_EVERY: Duration = Duration::from_millis(10);

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
            uuid: config.uuid,
            seed: config.seed,
            opened: AtomicU64::new(0),
            plan: Arc::new(Plan {
                rates: Default::default(),
                media_errors: config.media_errors.clone().into(),
                injector: Injector::default(),
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

    /// I/Os to which something was done so far.
    #[must_use]
    pub fn injected(&self) -> u64 {
        self.plan.injected.load(Ordering::Relaxed)
    }

    fn named(&self, info: Info) -> Info {
        Info {
            name: Arc::clone(&self.name),
            kind: format!("fault over {}", info.kind).into(),
            uuid: self.uuid.unwrap_or_else(|| {
                identity::derived(&[info.uuid.as_bytes(), self.name.as_bytes()])
            }),
            ..info
        }
    }
}

/// Channels end what they hold back.
impl Drop for FaultDevice {
    fn drop(&mut self) {
        self.plan.injector.clear();
        self.plan.injector.resume();
    }
}

impl BlockDevice for FaultDevice {
    fn info(&self) -> Info {
        self.named(self.base.info())
    }

    fn open(&self, reactor: &mut Reactor, tokens: Tokens) -> Result<Box<dyn Channel>, Error> {
        let below = tokens.below().ok_or_else(|| Error::TooDeep {
            what: self.name.to_string(),
        })?;
        let nth = self.opened.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(FaultChannel {
            inner: self.base.open(reactor, below)?,
            tokens,
            random: Random::new(
                self.seed
                    .wrapping_add(nth.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            ),
            plan: Arc::clone(&self.plan),
            held: VecDeque::new(),
            looking: false,
            corrupted: Vec::new(),
            ended: Vec::new(),
        }))
    }

    fn resize(&self, new_bytes: u64) -> Result<Info, Error> {
        self.base.resize(new_bytes).map(|info| self.named(info))
    }

    fn rescan(&self) -> Result<Info, Error> {
        self.base.rescan().map(|info| self.named(info))
    }

    fn injector(&self) -> Option<&Injector> {
        Some(&self.plan.injector)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.base.counters();
        counters.push(("injected_errors", self.injected()));
        counters
    }
}

struct FaultChannel {
    inner: Box<dyn Channel>,
    tokens: Tokens,
    random: Random,
    plan: Arc<Plan>,
    /// What the base has not seen yet.
    held: VecDeque<Held>,
    /// A timer runs, to look at them.
    looking: bool,
    /// What the base has and whose data is made another.
    corrupted: Vec<Corrupted>,
    /// What the inner channel finished in one call.
    ended: Vec<IoDone>,
}

struct Held {
    io: Io,
    until: Until,
}

enum Until {
    /// More [resumes](Injector::resumes) than these.
    Resumed(u64),
    /// The next look.
    Later,
}

/// The byte of an I/O that is made another.
struct Corrupted {
    tag: u64,
    byte: Span,
    value: u8,
    /// The caller's memory has what is wrong already, and gets back what was right.
    writes: bool,
}

impl Corrupted {
    fn new(io: &Io, offset: u64, value: u8) -> Option<Self> {
        Some(Self {
            tag: io.tag,
            byte: byte_at(&io.data, offset)?,
            value,
            writes: matches!(io.op, IoOp::Write { .. }),
        })
    }

    fn flip(&self) {
        let mut byte = [0];
        self.byte.copy_to_slice(&mut byte);
        self.byte
            .copy_from_slice(&byte.map(|byte| byte ^ self.value));
    }

    fn end(&self, result: Result<(), IoError>) {
        if self.writes || result.is_ok() {
            self.flip();
        }
    }
}

fn byte_at(data: &IoBuffers, mut offset: u64) -> Option<Span> {
    for span in &data.spans {
        match u32::try_from(offset) {
            Ok(within) if within < span.len() => return span.sub(within, 1),
            _ => offset -= u64::from(span.len()),
        }
    }
    None
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

impl FaultChannel {
    /// Gives an I/O to the base, or does to it what is injected.
    fn start(&mut self, reactor: &mut Reactor, io: Io) -> Submitted {
        let plan = Arc::clone(&self.plan);
        let resumes = plan.injector.resumes();
        let Some(error) = plan.injector.draw(io.op, self.inner.in_flight()) else {
            return self.inner.submit(reactor, io);
        };
        plan.injected.fetch_add(1, Ordering::Relaxed);
        match error {
            InjectedError::Failure => Submitted::Done(Err(IoError::Io(libc::EIO))),
            InjectedError::Nvme { sct, sc } => Submitted::Done(Err(IoError::Nvme { sct, sc })),
            InjectedError::Pending => self.hold(reactor, io, Until::Resumed(resumes)),
            InjectedError::NoMemory => self.hold(reactor, io, Until::Later),
            InjectedError::CorruptData { offset, value } => {
                match Corrupted::new(&io, offset, value.get()) {
                    Some(corrupted) => self.corrupt(reactor, io, corrupted),
                    None => self.inner.submit(reactor, io),
                }
            }
        }
    }

    fn corrupt(&mut self, reactor: &mut Reactor, io: Io, corrupted: Corrupted) -> Submitted {
        if corrupted.writes {
            corrupted.flip();
        }
        let submitted = self.inner.submit(reactor, io);
        match submitted {
            Submitted::Done(result) => corrupted.end(result),
            Submitted::Pending => self.corrupted.push(corrupted),
        }
        submitted
    }

    fn hold(&mut self, reactor: &mut Reactor, io: Io, until: Until) -> Submitted {
        self.held.push_back(Held { io, until });
        if !self.looking {
            self.look_later(reactor);
        }
        Submitted::Pending
    }

    fn look_later(&mut self, reactor: &mut Reactor) {
        self.looking = true;
        reactor.arm(Instant::now() + LOOK_EVERY, self.tokens.slot(0));
    }

    /// Lets go on what need not be held back any longer.
    fn look(&mut self, reactor: &mut Reactor, out: &mut Vec<IoDone>) {
        let resumes = self.plan.injector.resumes();
        for _ in 0..self.held.len() {
            let Some(held) = self.held.pop_front() else {
                break;
            };
            match held.until {
                Until::Resumed(before) if before == resumes => self.held.push_back(held),
                _ => {
                    let tag = held.io.tag;
                    match self.start(reactor, held.io.clone()) {
                        Submitted::Pending => {}
                        Submitted::Done(Err(IoError::Busy)) => self.held.push_back(Held {
                            until: Until::Later,
                            ..held
                        }),
                        Submitted::Done(result) => out.push(IoDone { tag, result }),
                    }
                }
            }
        }
        match self.held.is_empty() {
            true => self.looking = false,
            false => self.look_later(reactor),
        }
    }
}

impl Channel for FaultChannel {
    fn submit(&mut self, reactor: &mut Reactor, io: Io) -> Submitted {
        // What is held back will want a place with the base, and nothing is drawn for one that has none.
        if self.in_flight() >= self.depth() {
            return Submitted::Done(Err(IoError::Busy));
        }
        match self.fault(&io) {
            Some(error) => Submitted::Done(Err(error)),
            None => self.start(reactor, io),
        }
    }

    fn complete(&mut self, reactor: &mut Reactor, completion: &Completion, out: &mut Vec<IoDone>) {
        if self.tokens.own(completion.token).is_some() {
            return self.look(reactor, out);
        }
        if self.corrupted.is_empty() {
            return self.inner.complete(reactor, completion, out);
        }
        let mut ended = std::mem::take(&mut self.ended);
        self.inner.complete(reactor, completion, &mut ended);
        for done in ended.drain(..) {
            let at = self.corrupted.iter().position(|io| io.tag == done.tag);
            if let Some(at) = at {
                self.corrupted.swap_remove(at).end(done.result);
            }
            out.push(done);
        }
        self.ended = ended;
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.held.len()
    }

    fn depth(&self) -> usize {
        self.inner.depth()
    }
}
