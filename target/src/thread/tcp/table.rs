//! The connections of a thread: accepted, found, closed, freed.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_nvme::Cqe;
use flexblk_nvme::command::Sqe;
use flexblk_nvme::tcp::{Digests, End, Error, Stream, TERM_MAX};
use flexblk_reactor::{Completion, Keeper, Reactor, Token};
use rustix::net::{Shutdown, sockopt};

use super::asked::Asked;
use super::send::Sender;
use super::socket::{self, ReceiveBuffers, Vector};
use super::{ACCEPT_PAUSE, LINGER, MAX_STRANGERS, TCP_OWNER};
use crate::config::{Config, TcpDigest};
use crate::error::StartError;
use crate::port::Port;
use crate::thread::CONNECT_TIMEOUT;
use crate::thread::queue::QueueKey;

/// Names a connection; a later one in the same place has another generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ConnKey {
    pub(super) index: u32,
    generation: u32,
}

/// What a completion is of; in bits 55:48 of its token, the number of a zero-copy send in 47:32, the
/// connection's index in 31:0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Accept = 0,
    Receive = 1,
    Send = 2,
}

impl Operation {
    pub(super) fn token(self, index: u32) -> Token {
        Token::new(TCP_OWNER, (self as u64) << 48 | u64::from(index))
    }

    /// The token of a zero-copy send.
    pub(super) fn numbered(self, index: u32, number: u16) -> Token {
        let slot = (self as u64) << 48 | u64::from(number) << 32 | u64::from(index);
        Token::new(TCP_OWNER, slot)
    }

    /// The number in such a token.
    pub(super) fn number(token: Token) -> u16 {
        (token.slot() >> 32) as u16
    }

    pub(super) fn of(token: Token) -> Option<(Self, u32)> {
        let operation = match token.slot() >> 48 {
            0 => Self::Accept,
            1 => Self::Receive,
            2 => Self::Send,
            _ => return None,
        };
        Some((operation, token.slot() as u32))
    }
}

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// PDUs are understood.
    Open,
    /// A last PDU is on its way; what comes in is thrown away, so that the host can read it before
    /// the connection is reset.
    Lingering,
    /// Shut down; waits for its operations and its queue.
    Closing,
}

/// What the data of the current PDU belongs to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Expect {
    Nothing,
    /// A command whose in-capsule data is coming.
    Capsule(Sqe),
    /// A command whose data was asked for: its slot, and where the next bytes go.
    Data {
        slot: u16,
        at: u32,
    },
}

/// The receiving half.
pub(super) struct Receiver {
    pub(super) stream: Stream,
    pub(super) expect: Expect,
    /// In-capsule data that came in pieces.
    pub(super) carry: Vec<u8>,
    /// What was received while the queue had no room.
    pub(super) stash: Vec<u8>,
    /// A receive straight to where it belongs is with the kernel: how many bytes at most.
    pub(super) direct: Option<Box<Vector>>,
    pub(super) is_direct: bool,
}

/// A connection.
pub(super) struct Connection {
    generation: u32,
    pub(super) fd: OwnedFd,
    /// Port by which it came.
    pub(super) port: u16,
    pub(super) peer: SocketAddr,
    pub(super) state: State,
    pub(super) queue: Option<QueueKey>,
    /// Taken out while its events are being handled.
    pub(super) receiver: Option<Box<Receiver>>,
    pub(super) sender: Sender,
    /// A receive is with the kernel.
    pub(super) receiving: bool,
    /// Its queue has no room, or the rest of what was received waits: not to be read.
    pub(super) paused: bool,
    /// It is in the list of those to be flushed.
    dirty: bool,
    /// When it was accepted.
    pub(super) since: Instant,
}

impl Connection {
    pub(super) fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Is it the one that the key names?
    pub(super) fn is(&self, key: ConnKey) -> bool {
        self.generation == key.generation
    }
}

/// A socket that is listened on.
struct Listener {
    port: u16,
    socket: OwnedFd,
    /// Accepting is with the kernel.
    accepting: bool,
    /// Its port is gone: it goes when accepting has ended.
    closing: bool,
}

/// What holds for every listener of a thread.
#[derive(Default)]
pub(crate) struct TcpConfig {
    pub(crate) header_digest: TcpDigest,
    pub(crate) data_digest: TcpDigest,
    pub(crate) longest_silence: Duration,
    pub(crate) zerocopy_threshold: Option<u32>,
}

impl TcpConfig {
    pub(crate) fn new(config: &Config) -> Self {
        let tcp = config.tcp.unwrap_or_default();
        Self {
            header_digest: tcp.header_digest,
            data_digest: tcp.data_digest,
            longest_silence: config.limits.longest_silence,
            zerocopy_threshold: tcp.zerocopy_threshold,
        }
    }
}

/// Counters, by name in [`Tcp::counters`].
#[derive(Default)]
pub(super) struct Counters {
    pub(super) accepted: u64,
    pub(super) evicted: u64,
    pub(super) timed_out: u64,
    pub(super) protocol_errors: u64,
    pub(super) data_digest_errors: u64,
    pub(super) bytes_rx: u64,
    pub(super) bytes_direct_rx: u64,
    pub(super) receives: u64,
    pub(super) looks_found: u64,
    pub(super) bytes_tx: u64,
    pub(super) sends: u64,
    pub(super) zerocopy_sends: u64,
    pub(super) zerocopy_copied: u64,
    pub(super) paused: u64,
    pub(super) no_buffer: u64,
}

/// The connections of a thread.
pub(crate) struct Tcp {
    /// By the index that is in the token of their accept; a place is used again.
    listeners: Vec<Option<Listener>>,
    /// Accepting goes on then.
    accept_at: Option<Instant>,
    /// Accepting goes on now.
    pub(super) accept_due: bool,
    /// How long a host may be silent before the kernel asks whether it is there, five times.
    longest_silence: Duration,
    /// Of one `sendmsg`; `None`: never, or the kernel cannot.
    zerocopy_threshold: Option<u32>,
    pub(super) allowed: Digests,
    pub(super) required: Digests,
    pub(super) connections: Vec<(u32, Option<Box<Connection>>)>,
    free: Vec<u32>,
    len: usize,
    pub(super) buffers: Option<ReceiveBuffers>,
    /// Connections without a queue, the oldest first; those that have got one are passed over.
    strangers: VecDeque<(Instant, ConnKey)>,
    stranger_count: usize,
    lingering: VecDeque<(Instant, ConnKey)>,
    /// Connections to be given to the kernel: something to send, or to be received.
    pub(super) dirty: Vec<u32>,
    pub(super) asked: Asked,
    /// Paused connections whose queue may have room now.
    pub(super) resumable: Vec<u32>,
    /// Queues whose connection has changed in a way that closing them has to look at.
    pub(super) touched: Vec<QueueKey>,
    /// Empty buffers of receivers.
    pub(super) spare: Vec<Vec<u8>>,
    /// Commands that a send has ended; empty between completions.
    pub(super) ended: Vec<u16>,
    pub(super) counters: Counters,
    keeper: Option<Keeper>,
}

impl Tcp {
    /// Listens nowhere yet: no socket, no memory.
    pub(crate) fn new(config: TcpConfig) -> Self {
        let (mut allowed, mut required) = (Digests::empty(), Digests::empty());
        for (digest, policy) in [
            (Digests::HEADER, config.header_digest),
            (Digests::DATA, config.data_digest),
        ] {
            allowed.set(digest, policy != TcpDigest::Off);
            required.set(digest, policy == TcpDigest::Require);
        }
        Self {
            listeners: Vec::new(),
            accept_at: None,
            accept_due: false,
            longest_silence: config.longest_silence,
            zerocopy_threshold: config.zerocopy_threshold,
            allowed,
            required,
            connections: Vec::new(),
            free: Vec::new(),
            len: 0,
            buffers: None,
            strangers: VecDeque::new(),
            stranger_count: 0,
            lingering: VecDeque::new(),
            dirty: Vec::new(),
            asked: Asked::default(),
            resumable: Vec::new(),
            touched: Vec::new(),
            spare: Vec::new(),
            ended: Vec::new(),
            counters: Counters::default(),
            keeper: None,
        }
    }

    /// Listens on the thread's sockets of these ports, and no others. Connections without a queue go
    /// with their port; queues go with their controllers.
    pub(crate) fn listen(
        &mut self,
        ports: &[Arc<Port>],
        thread: usize,
        reactor: &mut Reactor,
    ) -> Result<(), StartError> {
        let is_there = |id: u16| ports.iter().any(|port| port.id == id);
        let mut gone = Vec::new();
        for place in &mut self.listeners {
            if let Some(listener) = place
                && !listener.closing
                && !is_there(listener.port)
            {
                gone.push(listener.port);
                listener.closing = true;
                // Ends the accept; fails on no socket that listens.
                let _ = rustix::net::shutdown(&listener.socket, Shutdown::Both);
                if !listener.accepting {
                    *place = None;
                }
            }
        }
        self.close_strangers(|connection| gone.contains(&connection.port));
        for port in ports {
            let Some(socket) = port.take_socket(thread) else {
                continue;
            };
            if self.keeper.is_none() {
                self.buffers = Some(ReceiveBuffers::new(reactor)?);
                self.keeper = Some(reactor.keeper());
                if !reactor.features().send_zc && self.zerocopy_threshold.take().is_some() {
                    tracing::warn!("zerocopy_threshold is not used: the kernel has no SENDMSG_ZC");
                }
            }
            let listener = Listener {
                port: port.id,
                socket,
                accepting: false,
                closing: false,
            };
            match self.listeners.iter_mut().find(|place| place.is_none()) {
                Some(place) => *place = Some(listener),
                None => self.listeners.push(Some(listener)),
            }
        }
        self.accept_all(reactor);
        Ok(())
    }

    /// Accepts at every listener.
    pub(super) fn accept_all(&mut self, reactor: &mut Reactor) {
        self.accept_at = None;
        self.accept_due = false;
        for (index, place) in self.listeners.iter_mut().enumerate() {
            if let Some(listener) = place
                && !listener.accepting
                && !listener.closing
            {
                listener.accepting = true;
                let token = Operation::Accept.token(index as u32);
                socket::accept(reactor, &listener.socket, token);
            }
        }
    }

    /// A connection was accepted, or accepting has ended.
    pub(super) fn accepted(
        &mut self,
        reactor: &mut Reactor,
        index: u32,
        completion: &Completion,
        now: Instant,
    ) {
        let Some(place) = self.listeners.get_mut(index as usize) else {
            return;
        };
        let Some(listener) = place else {
            return;
        };
        let port = listener.port;
        listener.accepting &= completion.flags.more();
        let closing = listener.closing;
        if closing && !listener.accepting {
            *place = None;
        }
        match completion.bytes() {
            Ok(fd) => self.add(fd as RawFd, port, closing, now),
            Err(libc::ECANCELED | libc::EINVAL) if closing => return,
            Err(libc::ECONNABORTED) => {}
            Err(errno) => {
                tracing::warn!(errno, "a connection could not be accepted");
                // No descriptors: those who have not said who they are have to go first.
                self.evict();
                self.accept_at = now.checked_add(ACCEPT_PAUSE);
            }
        }
        if self.accept_at.is_none() {
            self.accept_all(reactor);
        }
    }

    #[allow(unsafe_code)]
    fn add(&mut self, fd: RawFd, port: u16, closing: bool, now: Instant) {
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        if closing {
            return;
        }
        // Gone already: nothing to talk to.
        let Some(peer) = rustix::net::getpeername(&fd)
            .ok()
            .flatten()
            .and_then(|address| SocketAddr::try_from(address).ok())
        else {
            return;
        };
        // A response must not wait for the acknowledgement of the one before. Fails only on sockets
        // that are gone.
        let _ = sockopt::set_tcp_nodelay(&fd, true);
        let _ = watch(&fd, self.longest_silence);
        self.counters.accepted += 1;
        if self.stranger_count >= MAX_STRANGERS {
            self.evict();
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.connections.push((0, None));
            self.connections.len() as u32 - 1
        });
        let Some((generation, place)) = self.connections.get_mut(index as usize) else {
            return;
        };
        let key = ConnKey {
            index,
            generation: *generation,
        };
        *place = Some(Box::new(Connection {
            generation: *generation,
            fd,
            port,
            peer,
            state: State::Open,
            queue: None,
            receiver: Some(Box::new(Receiver {
                stream: Stream::new(End::Controller),
                expect: Expect::Nothing,
                carry: Vec::new(),
                stash: Vec::new(),
                direct: None,
                is_direct: false,
            })),
            sender: Sender::new(self.zerocopy_threshold),
            receiving: false,
            paused: false,
            dirty: false,
            since: now,
        }));
        self.len += 1;
        self.stranger_count += 1;
        if self.strangers.len() > 4 * MAX_STRANGERS {
            self.forget_the_known();
        }
        self.strangers.push_back((now + CONNECT_TIMEOUT, key));
        self.mark(index);
    }

    /// Takes those out of the lists that have got a queue or are gone: however fast connections come
    /// and go, the lists stay short.
    fn forget_the_known(&mut self) {
        let mut strangers = core::mem::take(&mut self.strangers);
        strangers.retain(|(_, key)| {
            self.get(*key)
                .is_some_and(|connection| connection.queue.is_none())
        });
        self.strangers = strangers;
        let mut lingering = core::mem::take(&mut self.lingering);
        lingering.retain(|(_, key)| self.get(*key).is_some());
        self.lingering = lingering;
    }

    /// Closes the oldest connection without a queue.
    fn evict(&mut self) {
        while let Some((_, key)) = self.strangers.pop_front() {
            let stranger = |connection: &&mut Connection| {
                connection.queue.is_none() && connection.state != State::Closing
            };
            if self.get(key).filter(stranger).is_some() {
                self.counters.evicted += 1;
                self.shut_down(key.index);
                return;
            }
        }
    }

    pub(super) fn at(&mut self, index: u32) -> Option<&mut Connection> {
        self.connections.get_mut(index as usize)?.1.as_deref_mut()
    }

    pub(super) fn get(&mut self, key: ConnKey) -> Option<&mut Connection> {
        self.at(key.index)
            .filter(|connection| connection.generation == key.generation)
    }

    pub(super) fn key(&self, index: u32) -> ConnKey {
        let generation = self
            .connections
            .get(index as usize)
            .map_or(0, |(generation, _)| *generation);
        ConnKey { index, generation }
    }

    /// Where to put PDUs; `None` when the connection is closing.
    #[inline]
    pub(super) fn sender(&mut self, key: ConnKey) -> Option<&mut Sender> {
        let (_, connection) = self.connections.get_mut(key.index as usize)?;
        let connection = connection.as_deref_mut()?;
        if connection.generation != key.generation || connection.state != State::Open {
            return None;
        }
        if !connection.dirty {
            connection.dirty = true;
            self.dirty.push(key.index);
        }
        Some(&mut connection.sender)
    }

    /// The connection is to be given to the kernel.
    pub(super) fn mark(&mut self, index: u32) {
        if let Some(connection) = self.at(index)
            && !connection.dirty
        {
            connection.dirty = true;
            self.dirty.push(index);
        }
    }

    pub(super) fn unmark(&mut self, index: u32) {
        if let Some(connection) = self.at(index) {
            connection.dirty = false;
        }
    }

    /// Sends a completion that belongs to no slot.
    #[inline]
    pub(crate) fn respond(&mut self, key: ConnKey, cqe: &Cqe) {
        if let Some(sender) = self.sender(key) {
            sender.response(cqe);
        }
    }

    /// A command of the queue has ended.
    #[inline]
    pub(crate) fn note_room(&mut self, key: ConnKey) {
        if let Some(connection) = self.get(key)
            && connection.paused
        {
            self.resumable.push(key.index);
        }
    }

    /// Does the connection have data digests?
    #[inline]
    pub(crate) fn has_data_digest(&mut self, key: ConnKey) -> bool {
        self.get(key)
            .is_some_and(|connection| connection.sender.framing.has_data_digest())
    }

    /// A queue was made for the connection.
    pub(super) fn queue_made(&mut self, index: u32, queue: QueueKey) {
        if let Some(connection) = self.at(index) {
            connection.queue = Some(queue);
            self.stranger_count = self.stranger_count.saturating_sub(1);
        }
    }

    /// The queue of a connection is no more.
    pub(crate) fn queue_freed(&mut self, key: ConnKey) {
        if let Some(connection) = self.get(key) {
            connection.queue = None;
            // `settle` takes it out of the count again.
            self.stranger_count += 1;
            self.settle(key.index);
        }
    }

    /// The queue of a connection is being closed.
    pub(crate) fn close(&mut self, key: ConnKey) {
        if self
            .get(key)
            .is_some_and(|connection| connection.state == State::Open)
        {
            self.shut_down(key.index);
        }
    }

    /// Ends a connection after a last PDU: a C2HTermReq, or a response that says why not.
    pub(super) fn end_after(&mut self, index: u32, last: &[u8], now: Instant) {
        let key = self.key(index);
        let Some(connection) = self.at(index) else {
            return;
        };
        if connection.state != State::Open {
            return;
        }
        connection.state = State::Lingering;
        connection.sender.bytes(last);
        connection.paused = false;
        if let Some(queue) = connection.queue {
            self.touched.push(queue);
        }
        self.mark(index);
        if let Some(end) = now.checked_add(LINGER) {
            self.lingering.push_back((end, key));
        }
    }

    /// The host has broken the protocol: it is told, and the connection ends.
    pub(super) fn protocol_error(
        &mut self,
        index: u32,
        stream: &Stream,
        error: Error,
        now: Instant,
    ) {
        self.counters.protocol_errors += 1;
        if let Some(connection) = self.at(index) {
            tracing::warn!(peer = %connection.peer, %error, "the connection is closed");
        }
        let mut out = [0; TERM_MAX];
        let len = stream.term_req(error, &mut out);
        match out.get(..len) {
            Some(term) if len > 0 => self.end_after(index, term, now),
            _ => self.shut_down(index),
        }
    }

    /// Ends a connection now; operations under way fail.
    pub(super) fn shut_down(&mut self, index: u32) {
        let Some(connection) = self.at(index) else {
            return;
        };
        if connection.state != State::Closing {
            connection.state = State::Closing;
            connection.paused = false;
            // ENOTCONN: the host was faster.
            let _ = rustix::net::shutdown(&connection.fd, Shutdown::Both);
            if connection.sender.is_lent() {
                // What the host has not acknowledged is dropped, or a dead host would keep our memory.
                let _ = rustix::net::connect_unspec(&connection.fd);
            }
            if let Some(queue) = connection.queue {
                self.touched.push(queue);
            }
        }
        self.settle(index);
    }

    /// Frees a connection that is over; call it after anything that may have been the last.
    pub(super) fn settle(&mut self, index: u32) {
        let Some(connection) = self.at(index) else {
            return;
        };
        let queue = connection.queue;
        if connection.state == State::Lingering
            && connection.sender.is_empty()
            && rustix::net::shutdown(&connection.fd, Shutdown::Write).is_err()
        {
            return self.shut_down(index);
        }
        if connection.state != State::Closing {
            return;
        }
        if !connection.sender.is_with_kernel() {
            connection.sender.clear();
        }
        if connection.receiving || connection.sender.is_with_kernel() {
            return;
        }
        match queue {
            Some(queue) => self.touched.push(queue),
            None => {
                let Some((generation, place)) = self.connections.get_mut(index as usize) else {
                    return;
                };
                // A receiver that is out is put back nowhere.
                *place = None;
                *generation = generation.wrapping_add(1);
                self.free.push(index);
                self.len -= 1;
                self.stranger_count = self.stranger_count.saturating_sub(1);
            }
        }
    }

    /// Is the connection's memory of that direction free of the kernel? (receives, sends)
    pub(crate) fn is_quiet(&mut self, key: ConnKey) -> (bool, bool) {
        match self.get(key) {
            None => (true, true),
            Some(connection) => {
                let direct = connection
                    .receiver
                    .as_ref()
                    .is_some_and(|receiver| receiver.is_direct);
                (
                    !(connection.receiving && direct),
                    connection.sender.is_empty(),
                )
            }
        }
    }

    /// When [`Tcp::handle_timeout`] has something to do.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        let first = |queue: &VecDeque<(Instant, ConnKey)>| queue.front().map(|(at, _)| *at);
        [
            first(&self.strangers),
            first(&self.lingering),
            self.accept_at,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Connections that never got a queue, or whose host does not read its C2HTermReq.
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        while let Some((_, key)) = self.strangers.pop_front_if(|(at, _)| *at <= now) {
            if let Some(connection) = self.get(key)
                && connection.queue.is_none()
                && connection.state == State::Open
            {
                tracing::info!(peer = %connection.peer, "a connection without Connect is closed");
                self.counters.timed_out += 1;
                self.shut_down(key.index);
            }
        }
        while let Some((_, key)) = self.lingering.pop_front_if(|(at, _)| *at <= now) {
            if self.get(key).is_some() {
                self.shut_down(key.index);
            }
        }
        if self.accept_at.is_some_and(|at| at <= now) {
            self.accept_at = None;
            self.accept_due = true;
        }
    }

    /// Takes no more connections, and closes those without a queue.
    pub(crate) fn drain(&mut self) {
        for place in &mut self.listeners {
            if let Some(listener) = place {
                listener.closing = true;
                // Ends the accept; fails on no socket that listens.
                let _ = rustix::net::shutdown(&listener.socket, Shutdown::Both);
                if !listener.accepting {
                    *place = None;
                }
            }
        }
        self.close_strangers(|_| true);
    }

    /// Closes connections without a queue.
    fn close_strangers(&mut self, which: impl Fn(&Connection) -> bool) {
        for index in 0..self.connections.len() as u32 {
            if self
                .at(index)
                .is_some_and(|connection| connection.queue.is_none() && which(connection))
            {
                self.shut_down(index);
            }
        }
    }

    /// Are there no connections?
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Counters by name, for statistics.
    pub(crate) fn counters(&self) -> BTreeMap<&'static str, u64> {
        let counters = &self.counters;
        if self.keeper.is_none() {
            return BTreeMap::new();
        }
        BTreeMap::from([
            ("tcp_connections", self.len as u64),
            ("tcp_accepted", counters.accepted),
            ("tcp_evicted", counters.evicted),
            ("tcp_timed_out", counters.timed_out),
            ("tcp_protocol_errors", counters.protocol_errors),
            ("tcp_data_digest_errors", counters.data_digest_errors),
            ("tcp_bytes_rx", counters.bytes_rx),
            ("tcp_bytes_direct_rx", counters.bytes_direct_rx),
            ("tcp_receives", counters.receives),
            ("tcp_looks_found", counters.looks_found),
            ("tcp_bytes_tx", counters.bytes_tx),
            ("tcp_sends", counters.sends),
            ("tcp_zerocopy_sends", counters.zerocopy_sends),
            ("tcp_zerocopy_copied", counters.zerocopy_copied),
            ("tcp_paused", counters.paused),
            ("tcp_no_buffer", counters.no_buffer),
        ])
    }
}

/// Lets the kernel end the connection of a host that is dead: Keep Alive may be off, and an I/O queue
/// has none. As long as what it was sent is not acknowledged, as long as it does not answer.
fn watch(fd: &OwnedFd, silence: Duration) -> rustix::io::Result<()> {
    let step = (silence / 5).max(Duration::from_secs(1));
    let millis = u32::try_from(silence.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(fd, millis)?;
    sockopt::set_tcp_keepidle(fd, step)?;
    sockopt::set_tcp_keepintvl(fd, step)?;
    sockopt::set_tcp_keepcnt(fd, 4)?;
    sockopt::set_socket_keepalive(fd, true)
}

impl Drop for Tcp {
    /// What the kernel may still use outlives the reactor.
    fn drop(&mut self) {
        if let Some(keeper) = self.keeper.take() {
            let connections = core::mem::take(&mut self.connections);
            let listeners = core::mem::take(&mut self.listeners);
            keeper.keep(Box::new((connections, self.buffers.take(), listeners)));
        }
    }
}
