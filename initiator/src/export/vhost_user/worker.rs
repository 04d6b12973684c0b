//! A thread with a channel and some of the rings: takes requests off the rings, gives them back when they are done.
//!
//! While there is something to do it looks at the rings by itself; when nothing has happened for the polling budget it
//! asks to be notified, looks once more, and sleeps.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use flexblk_reactor::{Span, Waker};

use super::block::{Device, Status, Work, feature};
use super::events::Events;
use super::inflight::InflightQueue;
use super::memory::GuestMemory;
use super::message::RingAddress;
use super::turns::{TURN, Turns};
use super::virtqueue::{Chain, RingError, Virtqueue};
use crate::export::jobs::{Done, Jobs, Wanted};
use crate::link::home::{self, SharedHome};
use crate::volume::{Channel, Volume};
use crate::{Error, IoCompletion, Op};

/// Requests under way in one thread.
const DEPTH: u16 = 128;
/// For requests whose memory is in pieces.
const BOUNCE_BYTES: u64 = 16 << 20;
/// How long requests under way may take when their ring has to stop; then the connection goes instead, and nobody
/// touches the guest's memory any more.
pub(crate) const DRAIN: Duration = Duration::from_secs(5);
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// A ring that is to be served.
#[derive(Debug)]
pub(crate) struct RingSetup {
    pub(crate) size: u16,
    pub(crate) address: RingAddress,
    pub(crate) next_available: u16,
    /// Of virtio, as negotiated.
    pub(crate) features: u64,
    pub(crate) kick: Option<OwnedFd>,
    pub(crate) call: Option<OwnedFd>,
    pub(crate) error: Option<OwnedFd>,
    pub(crate) inflight: Option<InflightQueue>,
}

/// What a worker is told. The answer comes through the sender.
#[derive(Debug)]
pub(crate) enum Order {
    /// The guest's memory; with `true`, more of it than before, and all that there was. No ring runs otherwise.
    Memory(Arc<GuestMemory>, bool, Sender<Result<(), String>>),
    /// The device as it is now.
    Device(Box<Device>),
    /// Serve a ring; false: it is not where it should be.
    Start(usize, Box<RingSetup>, Sender<bool>),
    /// Serve it no more. The answer is the next available index; it comes when no request of the ring is under way, which
    /// they are given until then for.
    Stop(usize, Instant, Sender<u16>),
    /// Its other descriptor for calls.
    Call(usize, Option<OwnedFd>),
}

/// The state of a thread.
pub(crate) struct Worker {
    volume: Volume,
    /// `None` only while it is replaced, or could not be.
    channel: Option<Channel>,
    /// The thread's reactor: stays when the channel is replaced.
    home: SharedHome,
    jobs: Jobs,
    events: Rc<RefCell<Events>>,
    owner: u8,
    rings: Vec<Option<Ring>>,
    turns: Turns,
    memory: Arc<GuestMemory>,
    device: Device,
    orders: Receiver<Order>,
    poll_budget: Duration,
    chain: Chain,
}

#[derive(Debug)]
struct Ring {
    queue: Virtqueue,
    inflight: Option<InflightQueue>,
    error: Option<OwnedFd>,
    /// Requests that somebody before us had taken.
    again: VecDeque<u16>,
    /// By their heads.
    requests: Vec<Option<Pending>>,
    outstanding: u16,
    /// Nothing is taken any more: the driver broke the rules.
    broken: bool,
    stopping: Option<(Sender<u16>, Instant)>,
    /// Something was given back in this round.
    returned: bool,
}

/// A request under way.
#[derive(Clone, Copy, Debug)]
struct Pending {
    status: Span,
    written: u32,
}

impl Worker {
    /// In the thread that will [`run`](Self::run) it.
    pub(crate) fn new(
        volume: &Volume,
        device: Device,
        queues: usize,
        orders: Receiver<Order>,
    ) -> Result<Worker, Error> {
        // It looks at its rings for as long as a channel spins.
        let poll_budget = volume.poll_budget();
        let home = home::with_poll_budget(poll_budget)?;
        let mut channel = volume.channel(DEPTH)?;
        let depth = channel.depth();
        let namespace = volume.namespace()?;
        let jobs = Jobs::new(&namespace, usize::from(depth), depth, BOUNCE_BYTES)?;
        channel.register_memory(jobs.memory())?;
        let events = Events::new(queues);
        let owner = home.borrow_mut().add_guest(events.clone())?;
        events.borrow_mut().set_owner(owner);
        Ok(Worker {
            volume: volume.clone(),
            channel: Some(channel),
            home,
            jobs,
            events,
            owner,
            rings: (0..queues).map(|_| None).collect(),
            turns: Turns::new(queues),
            memory: Arc::default(),
            device,
            orders,
            poll_budget,
            chain: Chain::default(),
        })
    }

    /// Ends a sleeping turn after an order was sent.
    pub(crate) fn waker(&self) -> Waker {
        self.home.borrow_mut().reactor().waker()
    }

    /// Works until there is nobody who could give orders.
    pub(crate) fn run(&mut self) -> Result<(), Error> {
        let mut completions: Vec<IoCompletion> = Vec::with_capacity(usize::from(DEPTH));
        let mut last_activity = Instant::now();
        loop {
            if !self.take_orders()? {
                return Ok(());
            }
            let active = self.serve();
            self.signal();
            let now = self.home.borrow().now();
            if active {
                last_activity = now;
            }
            let idle = now.saturating_duration_since(last_activity) >= self.poll_budget;
            let until = (idle && !self.enable_notifications())
                .then(|| self.drain_deadline().unwrap_or(now + LONGEST_SLEEP));
            let Some(channel) = &mut self.channel else {
                return Ok(());
            };
            channel.turn(until, &mut completions);
            if !completions.is_empty() {
                last_activity = channel.now();
            }
            for completion in completions.drain(..) {
                if let Some(done) = self.jobs.completed(&completion) {
                    self.finish(done);
                }
            }
            if let Some(channel) = &mut self.channel {
                self.jobs.submit_waiting(channel);
            }
            self.signal();
            self.stop_drained()?;
        }
    }

    /// False: there will be no more.
    fn take_orders(&mut self) -> Result<bool, Error> {
        loop {
            match self.orders.try_recv() {
                Ok(Order::Memory(memory, more, reply)) => {
                    self.memory = memory;
                    let result = if more {
                        self.register()
                    } else {
                        self.replace_channel()
                    };
                    let said = match &result {
                        Ok(()) => Ok(()),
                        Err(error) => Err(error.to_string()),
                    };
                    let _ = reply.send(said);
                    if !more {
                        result?;
                    }
                }
                Ok(Order::Device(device)) => self.device = *device,
                Ok(Order::Start(index, setup, reply)) => {
                    let _ = reply.send(self.start(index, *setup));
                }
                Ok(Order::Stop(index, until, reply)) => match self.rings.get_mut(index) {
                    Some(Some(ring)) => ring.stopping = Some((reply, until)),
                    _ => drop(reply.send(0)),
                },
                Ok(Order::Call(index, fd)) => self.events.borrow_mut().set_call(index, fd),
                Err(TryRecvError::Empty) => return Ok(true),
                Err(TryRecvError::Disconnected) => return Ok(false),
            }
        }
    }

    /// Opens the guest's newest memory to the channel.
    fn register(&mut self) -> Result<(), Error> {
        match (self.memory.mappings().last(), &mut self.channel) {
            (Some(memory), Some(channel)) => channel.register_memory(memory),
            _ => Ok(()),
        }
    }

    /// A new channel that knows the memory as it is now. The old one's end is the end of every use of memory.
    fn replace_channel(&mut self) -> Result<(), Error> {
        // The old one first: a controller may have no queue to spare.
        self.channel = None;
        let mut channel = self.volume.channel(DEPTH)?;
        channel.register_memory(self.jobs.memory())?;
        for memory in self.memory.mappings() {
            channel.register_memory(memory)?;
        }
        self.channel = Some(channel);
        for tag in self.jobs.abandon() {
            let (index, head) = split(tag);
            if let Some(Some(ring)) = self.rings.get_mut(index)
                && let Some(pending) = ring.requests.get_mut(usize::from(head))
                && pending.take().is_some()
            {
                ring.outstanding -= 1;
                ring.again.push_back(head);
            }
        }
        Ok(())
    }

    fn start(&mut self, index: usize, setup: RingSetup) -> bool {
        let event_index = setup.features & feature::EVENT_IDX != 0;
        let queue = Virtqueue::new(
            &self.memory,
            setup.size,
            &setup.address,
            event_index,
            setup.next_available,
        );
        let (Some(mut queue), Some(place)) = (queue, self.rings.get_mut(index)) else {
            return false;
        };
        let mut inflight = setup.inflight;
        let again: VecDeque<u16> = match &mut inflight {
            None => VecDeque::new(),
            Some(inflight) => {
                let heads = inflight.recover(queue.next_used());
                // What was taken and not given back is ours again; what follows was never taken.
                let taken = heads.len() as u16;
                queue.set_next_available(queue.next_used().wrapping_add(taken));
                heads.into()
            }
        };
        if !again.is_empty() {
            tracing::info!(queue = index, requests = again.len(), "carried out again");
        }
        *place = Some(Ring {
            queue,
            inflight,
            error: setup.error,
            again,
            requests: vec![None; usize::from(setup.size)],
            outstanding: 0,
            broken: false,
            stopping: None,
            returned: false,
        });
        self.events
            .borrow_mut()
            .start(index, setup.kick, setup.call);
        true
    }

    /// Takes what is available on the rings, as far as there is room; whether there was something.
    fn serve(&mut self) -> bool {
        let mut active = false;
        for index in 0..self.rings.len() {
            active |= self.events.borrow_mut().take_kick(index);
        }
        let mut turns = self.turns;
        active |= turns.round(|index| self.serve_ring(index));
        self.turns = turns;
        active
    }

    /// A turn of one ring: how many requests were taken from it; `None` when there is no room for any.
    fn serve_ring(&mut self, index: usize) -> Option<u16> {
        if !self.jobs.has_room() {
            return None;
        }
        let mut taken = 0;
        while taken < TURN && self.jobs.has_room() {
            let Some(Some(ring)) = self.rings.get_mut(index) else {
                break;
            };
            if ring.broken || ring.stopping.is_some() {
                break;
            }
            let head = match ring.again.pop_front() {
                Some(head) => head,
                None => match ring.queue.pop() {
                    Ok(Some(head)) => {
                        if let Some(inflight) = &mut ring.inflight {
                            inflight.taken(head);
                        }
                        head
                    }
                    Ok(None) => break,
                    Err(error) => {
                        ring.fail(index, error);
                        break;
                    }
                },
            };
            if taken == 0
                && let Some(Some(ring)) = self.rings.get(index)
            {
                ring.queue.suppress();
            }
            taken += 1;
            if let Err(error) = self.begin(index, head)
                && let Some(Some(ring)) = self.rings.get_mut(index)
            {
                ring.fail(index, error);
            }
        }
        Some(taken)
    }

    /// Begins the request at `head`.
    fn begin(&mut self, index: usize, head: u16) -> Result<(), RingError> {
        let Some(Some(ring)) = self.rings.get_mut(index) else {
            return Ok(());
        };
        ring.queue.chain(&self.memory, head, &mut self.chain)?;
        let (work, status) = self
            .device
            .parse(&mut self.chain)
            .ok_or(RingError::NoStatus)?;
        let bytes = |spans: &[Span]| spans.iter().map(Span::len).sum::<u32>();
        let place = ring
            .requests
            .get_mut(usize::from(head))
            .ok_or(RingError::Descriptor(head))?;
        if place.is_some() {
            return Err(RingError::Twice(head));
        }
        let written = 1 + bytes(&self.chain.writable);
        *place = Some(Pending { status, written });
        ring.outstanding += 1;
        let answer = match work {
            Work::Answer(status) => status,
            Work::GetId => {
                let id = self.device.id();
                let mut rest = id.as_slice();
                for span in &self.chain.writable {
                    let copied = span.copy_from_slice(rest);
                    rest = rest.get(copied..).unwrap_or_default();
                }
                Status::Ok
            }
            Work::Volume(op, lba, blocks) => {
                let spans = match op {
                    Op::Read => self.chain.writable.as_slice(),
                    Op::Write { .. } => self.chain.readable.as_slice(),
                    _ => &[],
                };
                let tag = (index as u64) << 16 | u64::from(head);
                let started = self.channel.as_mut().map(|channel| {
                    let wanted = Wanted {
                        op,
                        lba,
                        blocks,
                        then_flush: self.device.then_flush(op),
                    };
                    self.jobs.start(channel, &wanted, spans, tag)
                });
                match started {
                    Some(Ok(())) => return Ok(()),
                    // There was room, or we would not be here.
                    _ => Status::IoError,
                }
            }
        };
        ring.give_back(head, answer);
        Ok(())
    }

    fn finish(&mut self, done: Done) {
        let (index, head) = split(done.tag);
        let Some(Some(ring)) = self.rings.get_mut(index) else {
            return;
        };
        let status = match done.result {
            Ok(()) => Status::Ok,
            Err(error) => {
                tracing::warn!(queue = index, %error, "request failed");
                Status::IoError
            }
        };
        ring.give_back(head, status);
    }

    /// Tells drivers of what was given back, if they want to know.
    fn signal(&mut self) {
        for (index, ring) in self.rings.iter_mut().enumerate() {
            if let Some(ring) = ring
                && std::mem::take(&mut ring.returned)
                && ring.queue.must_signal()
            {
                self.events.borrow_mut().call(index);
            }
        }
    }

    /// Before sleep. True: something is there already.
    fn enable_notifications(&mut self) -> bool {
        let has_room = self.jobs.has_room();
        let mut more = false;
        for ring in self.rings.iter().flatten() {
            if !ring.broken && ring.stopping.is_none() {
                // Without room only a completion changes something, and that ends the sleep.
                more |= ring.queue.enable() && has_room;
            }
        }
        more
    }

    fn drain_deadline(&self) -> Option<Instant> {
        let stopping = |ring: &Ring| ring.stopping.as_ref().map(|(_, until)| *until);
        self.rings.iter().flatten().filter_map(stopping).min()
    }

    /// Answers orders to stop where nothing is under way any more, or the time is over.
    fn stop_drained(&mut self) -> Result<(), Error> {
        if self.drain_deadline().is_some_and(|at| at <= Instant::now()) {
            tracing::warn!("requests of a ring that stops do not end: connecting anew");
            self.replace_channel()?;
        }
        for index in 0..self.rings.len() {
            let Some(place) = self.rings.get_mut(index) else {
                continue;
            };
            let drained = |ring: &Ring| ring.stopping.is_some() && ring.outstanding == 0;
            if !place.as_ref().is_some_and(drained) {
                continue;
            }
            let Some(ring) = place.take() else {
                continue;
            };
            let mut home = self.home.borrow_mut();
            self.events.borrow_mut().stop(home.reactor(), index);
            if let Some((reply, _)) = ring.stopping {
                let untouched = ring.again.len() as u16;
                let _ = reply.send(ring.queue.next_available().wrapping_sub(untouched));
            }
        }
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let mut home = self.home.borrow_mut();
        home.remove_guest(self.owner);
        // The kernel may still use descriptors.
        let keeper = home.reactor().keeper();
        keeper.keep(Box::new(self.events.clone()));
    }
}

impl Ring {
    fn give_back(&mut self, head: u16, status: Status) {
        let pending = self.requests.get_mut(usize::from(head));
        let Some(pending) = pending.and_then(Option::take) else {
            return;
        };
        pending.status.copy_from_slice(&[status as u8]);
        if let Some(inflight) = &self.inflight {
            inflight.before_used(head);
        }
        self.queue.push_used(head, pending.written);
        if let Some(inflight) = &self.inflight {
            inflight.after_used(head, self.queue.next_used());
        }
        self.outstanding -= 1;
        self.returned = true;
    }

    /// The driver broke the rules: nothing can be said in the ring any more.
    fn fail(&mut self, index: usize, error: RingError) {
        tracing::error!(queue = index, %error, "the guest's driver broke the ring");
        self.broken = true;
        if let Some(fd) = &self.error {
            let _ = rustix::io::write(fd, &1_u64.to_ne_bytes());
        }
    }
}

/// Ring and head of a tag.
fn split(tag: u64) -> (usize, u16) {
    ((tag >> 16) as usize, tag as u16)
}
