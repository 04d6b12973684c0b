//! A small server: one thread that only moves bytes, and two that do what is asked, so that a
//! slow client delays nobody else, and a slow change no question.
//!
//! A client has one request under way at a time; the next is read when it has been answered. What a
//! client may keep of us is bounded in bytes and time, and when all places are taken the one that
//! has been idle for longest goes.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::net::{RecvFlags, SendFlags, SocketFlags};

use super::place;
use crate::association::lock;

/// What a server understands and does. Everything but [`Protocol::run`] must return at once.
pub(crate) trait Protocol: Send + Sync + 'static {
    /// Where the next request ends; one for each client.
    type Framing: Default + Send;
    /// A request.
    type Request: Send + 'static;

    /// Takes the first whole request out of what a client has sent.
    fn next(&self, framing: &mut Self::Framing, input: &mut Vec<u8>) -> Next<Self::Request>;

    /// Does it.
    fn run(&self, request: Self::Request) -> Reply;
}

/// What a client's bytes hold.
pub(crate) enum Next<R> {
    /// Nothing whole yet.
    More,
    /// A request.
    Request(Ready<R>),
    /// Nothing that could become one: answer this and close.
    Refuse(Vec<u8>),
}

/// A request that can be run.
pub(crate) struct Ready<R> {
    pub(crate) request: R,
    pub(crate) lane: Lane,
    /// The answer if it takes too long.
    pub(crate) late: Vec<u8>,
}

/// Which thread does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Only looks.
    Query,
    /// Changes something; one after the other.
    Change,
}

/// An answer.
pub(crate) struct Reply {
    pub(crate) bytes: Vec<u8>,
    /// Close after it.
    pub(crate) close: bool,
}

/// What clients may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Clients at a time.
    pub(crate) clients: usize,
    /// Bytes of a request, not less than one read.
    pub(crate) request_bytes: usize,
    /// Bytes of all requests that are not whole yet.
    pub(crate) pending_bytes: usize,
    /// How long a request may take until its client is told that it takes longer.
    pub(crate) run_time: Duration,
    /// How long the rest of a request, or reading of an answer, may take.
    pub(crate) transfer_time: Duration,
    /// How long a client may be idle; `None` for ever.
    pub(crate) idle_time: Option<Duration>,
}

/// A running server. Dropping it stops it.
pub(crate) struct Server {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    stop: AtomicBool,
    /// Wakes the thread that moves bytes.
    wake: OwnedFd,
    done: Mutex<Vec<(u64, Reply)>>,
}

impl Shared {
    fn wake(&self) {
        // Fails only when the counter is at its end, and then it is awake.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

/// How long stopping waits for a request under way.
const STOP_TIME: Duration = Duration::from_secs(2);
/// How often deadlines are looked at while there are any.
const TICK: Duration = Duration::from_millis(100);
/// Bytes of one read.
const READ_BYTES: usize = 64 << 10;
/// The listening socket and the wake-up in epoll's data; clients have larger numbers.
const LISTENER: u64 = 0;
const WAKE: u64 = 1;

impl Server {
    /// Serves a listening socket that does not block. `name` is that of its threads; they keep off
    /// `busy_cores` if they can.
    pub(crate) fn start<P: Protocol>(
        name: &str,
        listener: OwnedFd,
        protocol: Arc<P>,
        limits: Limits,
        busy_cores: &[usize],
    ) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            wake,
            done: Mutex::default(),
        });
        let mut server = Self {
            shared: Arc::clone(&shared),
            threads: Vec::new(),
        };
        let cores: Arc<[usize]> = busy_cores.into();
        let mut lanes = Vec::new();
        for lane in ["query", "change"] {
            let (sender, jobs) = mpsc::channel();
            let (protocol, shared) = (Arc::clone(&protocol), Arc::clone(&shared));
            server.spawn(&format!("{name}-{lane}"), &cores, move || {
                work(&*protocol, &shared, &jobs);
            })?;
            lanes.push(sender);
        }
        let (Some(change), Some(query)) = (lanes.pop(), lanes.pop()) else {
            return Err(io::ErrorKind::Other.into());
        };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let watch = |fd: BorrowedFd<'_>, data| {
            let data = epoll::EventData::new_u64(data);
            epoll::add(&epoll, fd, data, epoll::EventFlags::IN)
        };
        watch(listener.as_fd(), LISTENER)?;
        watch(shared.wake.as_fd(), WAKE)?;
        let mut mover = Mover {
            epoll,
            listener,
            shared,
            protocol,
            limits,
            query,
            change,
            clients: HashMap::new(),
            next_key: WAKE + 1,
            buffer: vec![0; READ_BYTES.min(limits.request_bytes)],
            accepting: true,
        };
        server.spawn(name, &cores, move || {
            if let Err(error) = mover.run() {
                tracing::error!(%error, "the management server ends");
            }
        })?;
        Ok(server)
    }

    fn spawn(
        &mut self,
        name: &str,
        busy_cores: &Arc<[usize]>,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let cores = Arc::clone(busy_cores);
        let thread = std::thread::Builder::new().name(name.to_owned());
        self.threads.push(thread.spawn(move || {
            place::control_thread(&cores);
            body();
        })?);
        Ok(())
    }

    /// Stops serving. A request under way gets a moment to end.
    pub(crate) fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
        let deadline = Instant::now() + STOP_TIME;
        // The mover is last, and with it go the channels that the others wait on.
        for thread in self.threads.drain(..).rev() {
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            if !thread.is_finished() || thread.join().is_err() {
                tracing::warn!("a management request does not end; it is left behind");
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Job<R> {
    client: u64,
    request: R,
    deadline: Instant,
}

/// A thread that does what is asked.
fn work<P: Protocol>(protocol: &P, shared: &Shared, jobs: &mpsc::Receiver<Job<P::Request>>) {
    while let Ok(job) = jobs.recv() {
        // Its client has been told that it was not done.
        if Instant::now() >= job.deadline {
            continue;
        }
        let reply = protocol.run(job.request);
        lock(&shared.done).push((job.client, reply));
        shared.wake();
    }
}

enum State {
    /// Reads.
    Reading,
    /// Its request is with a worker.
    Running { deadline: Instant, late: Vec<u8> },
    /// Gets an answer.
    Writing { bytes: Vec<u8>, written: usize },
}

struct Client<F> {
    socket: OwnedFd,
    framing: F,
    input: Vec<u8>,
    state: State,
    /// Close after the answer.
    close: bool,
    /// It has nothing more to say.
    at_end: bool,
    /// Last progress.
    since: Instant,
    /// What epoll waits for.
    interest: epoll::EventFlags,
}

/// The thread that moves bytes.
struct Mover<P: Protocol> {
    epoll: OwnedFd,
    listener: OwnedFd,
    shared: Arc<Shared>,
    protocol: Arc<P>,
    limits: Limits,
    query: mpsc::Sender<Job<P::Request>>,
    change: mpsc::Sender<Job<P::Request>>,
    clients: HashMap<u64, Client<P::Framing>>,
    next_key: u64,
    buffer: Vec<u8>,
    accepting: bool,
}

impl<P: Protocol> Mover<P> {
    fn run(&mut self) -> io::Result<()> {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
        let mut looked = Instant::now();
        loop {
            let tick = self.has_deadlines().then(|| Timespec {
                tv_sec: 0,
                tv_nsec: TICK.subsec_nanos().into(),
            });
            events.clear();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                tick.as_ref(),
            ) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            if self.shared.stop.load(Ordering::Acquire) {
                self.flush_answers();
                return Ok(());
            }
            for event in &events {
                let flags = event.flags;
                match event.data.u64() {
                    LISTENER => self.accept(),
                    WAKE => self.answers(),
                    key => self.ready(key, flags),
                }
            }
            if looked.elapsed() >= TICK {
                looked = Instant::now();
                self.expire(looked);
            }
        }
    }

    fn has_deadlines(&self) -> bool {
        !self.accepting
            || self.limits.idle_time.is_some() && !self.clients.is_empty()
            || self
                .clients
                .values()
                .any(|client| !matches!(client.state, State::Reading) || !client.input.is_empty())
    }

    fn accept(&mut self) {
        loop {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            match rustix::net::accept_with(&self.listener, flags) {
                Ok(socket) => self.admit(socket),
                Err(rustix::io::Errno::AGAIN) => return,
                Err(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE) => {
                    // The connection stays in the line; look again when something has closed.
                    if !self.evict() {
                        self.accept_later();
                        return;
                    }
                }
                // The client has gone already, or a network error of its own.
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(error) => {
                    tracing::warn!(%error, "a management client could not be accepted");
                    self.accept_later();
                    return;
                }
            }
        }
    }

    /// Without descriptors the listening socket stays ready for reading: look away for a tick.
    fn accept_later(&mut self) {
        let data = epoll::EventData::new_u64(LISTENER);
        let none = epoll::EventFlags::empty();
        self.accepting = epoll::modify(&self.epoll, &self.listener, data, none).is_err();
    }

    fn admit(&mut self, socket: OwnedFd) {
        // When all are busy the new one has to go.
        if self.clients.len() >= self.limits.clients && !self.evict() {
            return;
        }
        let key = self.next_key;
        let data = epoll::EventData::new_u64(key);
        let interest = epoll::EventFlags::IN;
        if epoll::add(&self.epoll, &socket, data, interest).is_err() {
            return;
        }
        self.next_key += 1;
        let client = Client {
            socket,
            framing: P::Framing::default(),
            input: Vec::new(),
            state: State::Reading,
            close: false,
            at_end: false,
            since: Instant::now(),
            interest,
        };
        self.clients.insert(key, client);
    }

    /// Closes the client that has been idle for longest.
    fn evict(&mut self) -> bool {
        let idle = self
            .clients
            .iter()
            .filter(|(_, client)| matches!(client.state, State::Reading))
            .min_by_key(|(_, client)| client.since);
        let Some(key) = idle.map(|(key, _)| *key) else {
            return false;
        };
        self.clients.remove(&key);
        true
    }

    fn ready(&mut self, key: u64, flags: epoll::EventFlags) {
        let Some(client) = self.clients.get_mut(&key) else {
            return;
        };
        if flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            self.clients.remove(&key);
            return;
        }
        if flags.contains(epoll::EventFlags::IN) {
            match rustix::net::recv(&client.socket, &mut self.buffer[..], RecvFlags::empty()) {
                Ok((0, _)) => client.at_end = true,
                Ok((len, _)) => {
                    client.since = Instant::now();
                    client
                        .input
                        .extend_from_slice(self.buffer.get(..len).unwrap_or_default());
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(_) => {
                    self.clients.remove(&key);
                    return;
                }
            }
            let pending: usize = self.clients.values().map(|client| client.input.len()).sum();
            if pending > self.limits.pending_bytes {
                tracing::warn!("management clients send too much at a time: one is closed");
                self.clients.remove(&key);
                return;
            }
        }
        self.advance(key);
    }

    /// Takes a client as far as it goes without waiting.
    fn advance(&mut self, key: u64) {
        loop {
            let Some(client) = self.clients.get_mut(&key) else {
                return;
            };
            match &mut client.state {
                State::Running { .. } => break,
                State::Writing { bytes, written } => {
                    let rest = bytes.get(*written..).unwrap_or_default();
                    if rest.is_empty() {
                        if client.close {
                            self.clients.remove(&key);
                            return;
                        }
                        client.state = State::Reading;
                        continue;
                    }
                    match rustix::net::send(&client.socket, rest, SendFlags::NOSIGNAL) {
                        Ok(len) => {
                            *written += len;
                            client.since = Instant::now();
                        }
                        Err(rustix::io::Errno::AGAIN) => break,
                        Err(rustix::io::Errno::INTR) => {}
                        Err(_) => {
                            self.clients.remove(&key);
                            return;
                        }
                    }
                }
                State::Reading => {
                    match self.protocol.next(&mut client.framing, &mut client.input) {
                        Next::More if client.at_end => {
                            self.clients.remove(&key);
                            return;
                        }
                        Next::More => {
                            if client.input.is_empty() {
                                // A long request leaves no memory behind.
                                client.input = Vec::new();
                            }
                            break;
                        }
                        Next::Refuse(bytes) => {
                            client.close = true;
                            client.state = State::Writing { bytes, written: 0 };
                        }
                        Next::Request(ready) => {
                            let deadline = Instant::now() + self.limits.run_time;
                            client.since = Instant::now();
                            client.state = State::Running {
                                deadline,
                                late: ready.late,
                            };
                            let lane = match ready.lane {
                                Lane::Query => &self.query,
                                Lane::Change => &self.change,
                            };
                            // The workers live as long as this thread.
                            let _ = lane.send(Job {
                                client: key,
                                request: ready.request,
                                deadline,
                            });
                            break;
                        }
                    }
                }
            }
        }
        self.watch(key);
    }

    /// Tells epoll what a client waits for now.
    fn watch(&mut self, key: u64) {
        let Some(client) = self.clients.get_mut(&key) else {
            return;
        };
        let wanted = match client.state {
            State::Reading => epoll::EventFlags::IN,
            State::Writing { .. } => epoll::EventFlags::OUT,
            State::Running { .. } => epoll::EventFlags::empty(),
        };
        if client.interest != wanted {
            client.interest = wanted;
            let data = epoll::EventData::new_u64(key);
            if epoll::modify(&self.epoll, &client.socket, data, wanted).is_err() {
                self.clients.remove(&key);
            }
        }
    }

    /// Answers that workers have left.
    fn answers(&mut self) {
        let mut counter = [0; 8];
        let _ = rustix::io::read(&self.shared.wake, &mut counter);
        let done = core::mem::take(&mut *lock(&self.shared.done));
        for (key, reply) in done {
            let Some(client) = self.clients.get_mut(&key) else {
                continue;
            };
            // A late one has had its answer.
            if matches!(client.state, State::Running { .. }) {
                client.close |= reply.close;
                client.since = Instant::now();
                client.state = State::Writing {
                    bytes: reply.bytes,
                    written: 0,
                };
                self.advance(key);
            }
        }
    }

    /// At the end: what is ready goes out as far as it goes.
    fn flush_answers(&mut self) {
        let deadline = Instant::now() + TICK;
        loop {
            self.answers();
            let running =
                |client: &Client<P::Framing>| matches!(client.state, State::Running { .. });
            if !self.clients.values().any(running) || Instant::now() >= deadline {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Clients whose time is over.
    fn expire(&mut self, now: Instant) {
        if !self.accepting {
            let data = epoll::EventData::new_u64(LISTENER);
            let read = epoll::EventFlags::IN;
            self.accepting = epoll::modify(&self.epoll, &self.listener, data, read).is_ok();
        }
        let mut late_ones = Vec::new();
        let limits = self.limits;
        self.clients.retain(|key, client| {
            let still = now.saturating_duration_since(client.since);
            match &mut client.state {
                State::Running { deadline, late } if *deadline <= now => {
                    late_ones.push((*key, core::mem::take(late)));
                    true
                }
                State::Running { .. } => true,
                State::Writing { .. } => still < limits.transfer_time,
                State::Reading if !client.input.is_empty() => still < limits.transfer_time,
                State::Reading => limits.idle_time.is_none_or(|limit| still < limit),
            }
        });
        for (key, bytes) in late_ones {
            if let Some(client) = self.clients.get_mut(&key) {
                // What becomes of the request must not be mixed up with the next one's answer.
                client.close = true;
                client.since = now;
                client.state = State::Writing { bytes, written: 0 };
                self.advance(key);
            }
        }
    }
}
