//! What the links of one thread share: a reactor, with FlexiNS endpoints and NVMe/TCP connections on it.
//!
//! A ring, a socket with its receive buffers and a set of trains cost some hundred KiB; a queue pair by itself a
//! tenth of that. So a thread has them once. Whichever link turns, turns for all: what arrives for another waits
//! in its completion queue, acknowledged.

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use flexblk_reactor::{Completion, Config, Polled, Reactor, Wait};
use flexins::endpoint::Endpoint;
use flexins::engine::{ConnEvent, Engine};
use flexins::middleware::FaultConfig;
use flexins::verbs::{Digest, WcStatus};

use super::guest::{Guests, SharedGuest};
use super::open::{OpenArgs, Outcome};
use super::tcp::connection::{self, Connection};
use crate::options::{RxMode, TxMode};
use crate::{ConnectOptions, Error, LostReason, TransportCounters};

/// Endpoints of one reactor at most: their owner numbers on it are `0..MAX_ENDPOINTS`.
const MAX_ENDPOINTS: usize = 64;
/// How long an endpoint without queue pairs stays at least: longer than the pauses between attempts to reconnect.
const KEPT: Duration = Duration::from_secs(60);
/// Sockets (endpoints, and NVMe/TCP connections with something outstanding) up to which each is asked by a system call
/// of its own.
const FEW_SOCKETS: usize = 2;
/// Submission queue entries. What is in flight at once is trains (32 of an endpoint) and receives; a full queue
/// only means one more system call. Each entry costs 136 bytes with its share of the completion queue.
const RING_ENTRIES: u32 = 256;

/// A thread's reactor with everything on it; its links hold it.
pub(crate) type SharedHome = Rc<RefCell<Home>>;

pub(crate) struct Home {
    // The reactor goes first: its drop waits for operations that use the endpoints' buffers and callers' memory.
    reactor: Reactor,
    /// Endpoints by their owner numbers.
    endpoints: Vec<Option<Slot>>,
    /// NVMe/TCP connections by their numbers.
    connections: Vec<Option<Box<Connection>>>,
    guests: Guests,
    /// For received bytes that came to the wrong place.
    scratch: Vec<u8>,
    completions: Vec<Completion>,
    poll_budget: Duration,
    /// How often it was turned.
    turns: u64,
}

/// One endpoint and the queue pairs on it.
struct Slot {
    key: Key,
    endpoint: Endpoint,
    /// By the queue pairs' `user` words.
    queues: Vec<Option<QueueState>>,
    /// Of them, those that are there.
    queue_pairs: usize,
    /// When it came, or the last queue pair left.
    used: Instant,
    /// Waits for the kernel to let go of it.
    closed: bool,
}

/// Queue pairs whose options agree in this share an endpoint.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Key {
    peer: SocketAddr,
    from: Option<IpAddr>,
    tx: TxMode,
    rx: RxMode,
    digest: Digest,
    mtu: Option<u32>,
    ack_timeout: Option<Duration>,
    fault: Option<FaultConfig>,
}

/// What happened to a queue pair, possibly while another's link turned.
#[derive(Default)]
pub(crate) struct QueueState {
    /// How its connection attempt ended.
    pub(crate) outcome: Option<Outcome>,
    pub(crate) lost: Option<LostReason>,
    pub(crate) disconnected: bool,
}

thread_local! {
    /// The reactors that links of this thread keep alive: one, unless their polling budgets differ.
    static HOMES: RefCell<Vec<Weak<RefCell<Home>>>> = const { RefCell::new(Vec::new()) };
}

/// The calling thread's reactor with that polling budget; a new one when there is none. A queue pair that is
/// captured has one for itself, because the capture is a file of its own.
pub(crate) fn of_this_thread(options: &ConnectOptions) -> Result<SharedHome, Error> {
    if options.capture.is_some() {
        return Ok(Rc::new(RefCell::new(Home::new(options.poll_budget)?)));
    }
    with_poll_budget(options.poll_budget)
}

/// The same, for whoever has no connection yet.
pub(crate) fn with_poll_budget(poll_budget: Duration) -> Result<SharedHome, Error> {
    HOMES.with_borrow_mut(|homes| {
        homes.retain(|home| home.strong_count() > 0);
        let fits = |home: &SharedHome| {
            let mut home = home.borrow_mut();
            home.close_unused();
            home.poll_budget == poll_budget && home.endpoint_count() < MAX_ENDPOINTS
        };
        if let Some(home) = homes.iter().filter_map(Weak::upgrade).find(fits) {
            return Ok(home);
        }
        let home = Rc::new(RefCell::new(Home::new(poll_budget)?));
        homes.push(Rc::downgrade(&home));
        Ok(home)
    })
}

impl Home {
    fn new(poll_budget: Duration) -> Result<Home, Error> {
        let config = Config {
            entries: RING_ENTRIES,
            poll_budget,
            name: "flexblk queues",
        };
        Ok(Home {
            reactor: Reactor::new(&config).map_err(|e| Error::Transport(e.to_string()))?,
            endpoints: Vec::new(),
            connections: Vec::new(),
            guests: Guests::default(),
            scratch: Vec::new(),
            completions: Vec::with_capacity(256),
            poll_budget,
            turns: 0,
        })
    }

    pub(crate) fn reactor(&mut self) -> &mut Reactor {
        &mut self.reactor
    }

    pub(crate) fn now(&self) -> Instant {
        self.reactor.now()
    }

    /// Changes with every turn: whoever finds it changed was not the only one to turn.
    pub(crate) fn turns(&self) -> u64 {
        self.turns
    }

    /// A place for one more queue pair on an endpoint that suits it. An endpoint without queue pairs stays for a while:
    /// the next connection to the same target finds it again.
    pub(crate) fn join(&mut self, args: &OpenArgs<'_>) -> Result<Place, Error> {
        let key = Key::of(args);
        let fits = |slot: &Option<Slot>| {
            slot.as_ref()
                .is_some_and(|slot| slot.key == key && !slot.closed)
        };
        let endpoint = match self.endpoints.iter().position(fits) {
            Some(endpoint) => endpoint,
            None => self.bind(key, args)?,
        };
        let slot = self
            .slot(endpoint)
            .ok_or(Error::Protocol("no such endpoint"))?;
        let queue = match slot.queues.iter().position(Option::is_none) {
            Some(free) => free,
            None => {
                slot.queues.push(None);
                slot.queues.len() - 1
            }
        };
        if let Some(place) = slot.queues.get_mut(queue) {
            *place = Some(QueueState::default());
            slot.queue_pairs += 1;
        }
        Ok(Place { endpoint, queue })
    }

    /// A new endpoint; its owner number.
    fn bind(&mut self, key: Key, args: &OpenArgs<'_>) -> Result<usize, Error> {
        self.close_unused();
        let owner = match self.endpoints.iter().position(Option::is_none) {
            Some(free) => free,
            None if self.endpoints.len() < MAX_ENDPOINTS => {
                self.endpoints.push(None);
                self.endpoints.len() - 1
            }
            None => {
                return Err(Error::Transport(format!(
                    "this thread has connections to {MAX_ENDPOINTS} addresses already, the most there may be"
                )));
            }
        };
        let config = args.endpoint(owner as u16);
        let endpoint = Endpoint::bind(&mut self.reactor, owner as u8, config)
            .map_err(|e| Error::Transport(e.to_string()))?;
        if let Some(place) = self.endpoints.get_mut(owner) {
            *place = Some(Slot {
                key,
                endpoint,
                queues: Vec::new(),
                queue_pairs: 0,
                used: self.reactor.now(),
                closed: false,
            });
        }
        Ok(owner)
    }

    /// Targets come and go, and their addresses with them.
    fn close_unused(&mut self) {
        let now = self.reactor.now();
        for place in &mut self.endpoints {
            if let Some(slot) = place {
                slot.closed |= slot.queue_pairs == 0 && now >= slot.used + KEPT;
                if slot.closed {
                    // Once more, if the kernel did not take all of it.
                    slot.endpoint.close(&mut self.reactor);
                }
                if slot.endpoint.has_ended() {
                    *place = None;
                }
            }
        }
    }

    /// Those that something may come to.
    fn endpoint_count(&self) -> usize {
        let slots = self.endpoints.iter().flatten();
        slots.filter(|slot| !slot.closed).count()
    }

    /// The queue pair is destroyed.
    pub(crate) fn leave(&mut self, place: Place) {
        let now = self.reactor.now();
        if let Some(slot) = self.slot(place.endpoint)
            && let Some(state) = slot.queues.get_mut(place.queue)
            && state.take().is_some()
        {
            slot.queue_pairs -= 1;
            slot.used = now;
        }
    }

    #[inline]
    pub(crate) fn engine(&mut self, place: Place) -> Option<&mut Engine> {
        Some(self.slot(place.endpoint)?.endpoint.engine())
    }

    pub(crate) fn state(&mut self, place: Place) -> Option<&mut QueueState> {
        let slot = self.slot(place.endpoint)?;
        slot.queues.get_mut(place.queue)?.as_mut()
    }

    pub(crate) fn counters(&self, place: Place) -> TransportCounters {
        match self.endpoints.get(place.endpoint) {
            Some(Some(slot)) => TransportCounters {
                engine: *slot.endpoint.counters(),
                port: slot.endpoint.port_counters(),
                ..TransportCounters::default()
            },
            _ => TransportCounters::default(),
        }
    }

    /// Whether the kernel still reads what the endpoint sent, whichever queue pair it was of.
    pub(crate) fn is_sending(&self, place: Place) -> bool {
        matches!(self.endpoints.get(place.endpoint), Some(Some(slot)) if slot.endpoint.trains_in_flight() > 0)
    }

    /// Gives up on what the kernel could not send until now.
    pub(crate) fn cancel_sends(&mut self, place: Place) {
        if let Some(Some(slot)) = self.endpoints.get_mut(place.endpoint) {
            slot.endpoint.cancel_trains(&mut self.reactor);
        }
    }

    /// A number for one more TCP connection.
    pub(crate) fn free_connection(&mut self) -> usize {
        match self.connections.iter().position(Option::is_none) {
            Some(free) => free,
            None => {
                self.connections.push(None);
                self.connections.len() - 1
            }
        }
    }

    pub(crate) fn add_connection(&mut self, index: usize, connection: Box<Connection>) {
        if let Some(place) = self.connections.get_mut(index) {
            *place = Some(connection);
        }
    }

    #[inline]
    pub(crate) fn connection(&mut self, index: usize) -> Option<&mut Connection> {
        self.connections.get_mut(index)?.as_deref_mut()
    }

    pub(crate) fn cancel_connection(&mut self, index: usize) {
        if let Some(Some(connection)) = self.connections.get_mut(index) {
            connection.cancel(&mut self.reactor);
        }
    }

    /// The connection is over. What the kernel still uses of it stays, and so does its number.
    pub(crate) fn remove_connection(&mut self, index: usize) {
        if let Some(place) = self.connections.get_mut(index) {
            match place {
                Some(connection) if connection.is_busy() => connection.remove(),
                _ => *place = None,
            }
        }
    }

    /// One more on this reactor; the owner number for its tokens.
    pub(crate) fn add_guest(&mut self, guest: SharedGuest) -> Result<u8, Error> {
        self.guests
            .add(guest)
            .ok_or_else(|| Error::Transport("too many exports on one thread".into()))
    }

    /// It leaves.
    pub(crate) fn remove_guest(&mut self, owner: u8) {
        self.guests.remove(owner);
    }

    /// Acknowledges what was received, with the next turn.
    pub(crate) fn prepare_sleep(&mut self) {
        self.close_unused();
        let now = self.reactor.now();
        for slot in self.endpoints.iter_mut().flatten() {
            slot.endpoint.prepare_sleep(now);
        }
    }

    /// Once around, for every link of the thread: send, receive, timers.
    #[inline]
    pub(crate) fn turn(&mut self, wait: Wait) -> Result<(), LostReason> {
        let mut wait = wait;
        self.turns += 1;
        let now = self.reactor.now();
        if wait != Wait::Poll {
            if self.reactor.will_sleep() {
                // Last chance to acknowledge what was received before nobody is awake to do it.
                self.prepare_sleep();
            }
            for slot in self.endpoints.iter().flatten() {
                if let Some(timer) = slot.endpoint.next_timeout() {
                    wait = match wait {
                        Wait::Until(until) => Wait::Until(until.min(timer)),
                        _ => Wait::Until(timer),
                    };
                }
            }
        }
        let spins = self.asks_sockets();
        for slot in self.endpoints.iter_mut().flatten() {
            slot.endpoint.flush(&mut self.reactor, now);
            slot.endpoint.prepare_turn(&mut self.reactor, spins);
        }
        for connection in self.connections.iter_mut().flatten() {
            connection.flush(&mut self.reactor, spins);
        }
        self.guests.flush(&mut self.reactor);
        let (connections, scratch) = (&mut self.connections, &mut self.scratch);
        let endpoints = &mut self.endpoints;
        self.reactor
            .turn_polling(wait, &mut self.completions, &mut || {
                let mut found = Polled::Nothing;
                for slot in endpoints.iter_mut().flatten() {
                    found = found.max(slot.endpoint.look());
                }
                for connection in connections.iter_mut().flatten() {
                    found = found.max(connection.look(scratch));
                }
                found
            })
            .map_err(|error| {
                tracing::error!(%error, "reactor");
                LostReason::Protocol
            })?;
        for completion in self.completions.drain(..) {
            let owner = usize::from(completion.token.owner());
            if completion.token.owner() == connection::OWNER {
                let index = connection::index_of(completion.token);
                if let Some(place) = self.connections.get_mut(index)
                    && let Some(connection) = place
                {
                    connection.on_completion(&completion, &mut self.scratch);
                    if connection.is_over() {
                        *place = None;
                    }
                }
            } else if let Some(Some(slot)) = self.endpoints.get_mut(owner) {
                slot.on_completion(&mut self.reactor, &completion);
            } else {
                self.guests.on_completion(&mut self.reactor, &completion);
            }
        }
        let now = self.reactor.now();
        for slot in self.endpoints.iter_mut().flatten() {
            slot.after_turn(now);
        }
        Ok(())
    }

    /// Whether sockets may be asked instead of the ring: it is quicker for one or two, as long as the thread does not
    /// sleep.
    fn asks_sockets(&self) -> bool {
        let waiting = self.connections.iter().flatten();
        let used = self.endpoints.iter().flatten();
        self.poll_budget > Duration::ZERO
            && !self.reactor.will_sleep()
            && waiting.filter(|c| c.is_waiting()).count()
                + used.filter(|slot| slot.queue_pairs > 0).count()
                <= FEW_SOCKETS
    }

    #[inline]
    fn slot(&mut self, endpoint: usize) -> Option<&mut Slot> {
        self.endpoints.get_mut(endpoint)?.as_mut()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let keeper = self.reactor.keeper();
        for connection in self.connections.drain(..).flatten() {
            if connection.is_busy() {
                keeper.keep(connection);
            }
        }
    }
}

/// A queue pair's place in its thread's [`Home`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    endpoint: usize,
    queue: usize,
}

impl Place {
    /// The `user` word that brings events of the queue pair here.
    pub(crate) fn user(self) -> u64 {
        self.queue as u64
    }
}

impl Key {
    fn of(args: &OpenArgs<'_>) -> Key {
        let options = args.options;
        Key {
            peer: args.address,
            from: options.host_traddr,
            tx: options.tx,
            rx: options.rx,
            digest: options.digest,
            mtu: options.mtu,
            ack_timeout: options.ack_timeout,
            fault: options.fault,
        }
    }
}

impl Slot {
    fn on_completion(&mut self, reactor: &mut Reactor, completion: &Completion) {
        let Self {
            endpoint, queues, ..
        } = self;
        endpoint.on_completion(reactor, completion, &mut |_, delivery, _| {
            stray(queues, delivery.user);
        });
    }

    fn after_turn(&mut self, now: Instant) {
        let Self {
            endpoint, queues, ..
        } = self;
        endpoint.take_looked(now, &mut |_, delivery, _| stray(queues, delivery.user));
        if endpoint.next_timeout().is_some_and(|at| at <= now) {
            endpoint.handle_timeout(now, &mut |_, delivery, _| stray(queues, delivery.user));
        }
        while let Some(event) = endpoint.engine().poll_cm() {
            on_event(queues, event);
        }
    }
}

fn state(queues: &mut [Option<QueueState>], user: u64) -> Option<&mut QueueState> {
    queues
        .get_mut(usize::try_from(user).unwrap_or(usize::MAX))?
        .as_mut()
}

/// A message that is no response: responses are short enough to come inside completions.
fn stray(queues: &mut [Option<QueueState>], user: u64) {
    if let Some(state) = state(queues, user) {
        state.lost.get_or_insert(LostReason::Protocol);
    }
}

fn on_event(queues: &mut [Option<QueueState>], event: ConnEvent) {
    let (user, outcome, lost) = match event {
        ConnEvent::Established {
            user,
            private,
            params,
            mtu_bytes,
            ..
        } => {
            let outcome = Outcome::Established {
                private: private.as_slice().to_vec(),
                flexins: params.is_some(),
                mtu_bytes,
            };
            (user, Some(outcome), None)
        }
        ConnEvent::Rejected {
            user,
            reason,
            private,
            ..
        } => {
            let private = private.as_slice().to_vec();
            (user, Some(Outcome::Rejected { reason, private }), None)
        }
        ConnEvent::Unreachable { user, .. } => (user, Some(Outcome::Unreachable), None),
        ConnEvent::Disconnected { user, .. } => (user, None, Some(LostReason::PeerClosed)),
        ConnEvent::Broken {
            user,
            status: WcStatus::RetryExcErr | WcStatus::RnrRetryExcErr,
            ..
        } => (user, None, Some(LostReason::Retries)),
        ConnEvent::Broken { user, .. } => (user, None, Some(LostReason::Protocol)),
        // Nobody listens here.
        ConnEvent::ConnectRequest { .. } => return,
    };
    let Some(state) = state(queues, user) else {
        return;
    };
    if outcome.is_some() {
        state.outcome = outcome;
    }
    if let Some(reason) = lost {
        state.disconnected |= reason == LostReason::PeerClosed;
        // Before it was established: nobody is there who would take it.
        state.outcome.get_or_insert(Outcome::Unreachable);
        state.lost.get_or_insert(reason);
    }
}

#[cfg(test)]
mod tests {
    use flexblk_nvme::{Cntlid, Qid};

    use super::*;
    use crate::link::open::SharedEngine;
    use crate::{EngineMode, Host};

    fn options() -> ConnectOptions {
        let target = "nvme+flexins://127.0.0.1".parse().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let machine = folder.path().join("machine-id");
        std::fs::write(&machine, "0123456789abcdef0123456789abcdef").unwrap();
        let host = Host::load_from(folder.path(), &[&machine]).unwrap();
        ConnectOptions::new(target, host)
    }

    /// A queue pair to 127.0.1.`n`.
    fn join(home: &mut Home, options: &ConnectOptions, n: usize) -> Result<Place, Error> {
        home.join(&OpenArgs {
            options,
            address: SocketAddr::from(([127, 0, 1, n as u8], 4420)),
            qid: Qid::ADMIN,
            depth: 1,
            cntlid: Cntlid::DYNAMIC,
            engine: EngineMode::Inline,
            shared_engine: &SharedEngine::default(),
        })
    }

    #[test]
    fn targets_that_have_gone_leave_nothing() {
        let mut home = Home::new(Duration::ZERO).unwrap();
        let options = options();
        let stays = join(&mut home, &options, 0).unwrap();
        for n in 1..=200 {
            let place = join(&mut home, &options, n).unwrap();
            assert!(home.engine(place).is_some());
            home.leave(place);
            assert_eq!(
                join(&mut home, &options, n).unwrap(),
                place,
                "within a while"
            );
            home.leave(place);
            let now = home.reactor.now();
            home.slot(place.endpoint).unwrap().used = now.checked_sub(KEPT).unwrap();
            home.turn(Wait::Poll).unwrap();
        }
        assert!(home.endpoints.len() < 8, "{}", home.endpoints.len());
        assert!(home.endpoint_count() <= 2);
        assert!(home.engine(stays).is_some(), "it has a queue pair");
    }

    #[test]
    fn there_is_a_most_of_targets_at_once() {
        let mut home = Home::new(Duration::ZERO).unwrap();
        let options = options();
        for n in 0..=MAX_ENDPOINTS {
            let joined = join(&mut home, &options, n);
            assert_eq!(joined.is_ok(), n < MAX_ENDPOINTS, "{n}");
        }
    }
}
