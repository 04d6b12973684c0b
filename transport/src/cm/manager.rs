//! State machine of the connection manager.
//!
//! Calling order: [`CmManager::handle_mad`] for each datagram, [`CmManager::handle_timeout`] when
//! [`CmManager::next_timeout`] has come, then [`CmManager::poll_event`] until `None`, then
//! [`CmManager::poll_transmit`] until `None`. Events come before datagrams: a queue pair must be
//! ready to receive before the message that tells the peer so leaves.
//!
//! | state       | ends with                                                                   |
//! |-------------|-----------------------------------------------------------------------------|
//! | ReqSent     | REP: Established; REJ: gone; retries used up: gone (Unreachable)             |
//! | ReqReceived | accept: RepSent; reject or nobody decides in time: TimeWait                  |
//! | RepSent     | RTU or data: Established; DREQ, REJ or retries used up: gone (Disconnected)  |
//! | Established | DREQ: TimeWait; disconnect: DreqSent; same queue pair again: gone (stale)    |
//! | DreqSent    | DREP, DREQ, retries used up: TimeWait                                        |
//! | TimeWait    | time                                                                         |

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::connection::{Conn, State, check_u24, fill_private, timeout_code};
use super::interface::{
    AcceptArgs, CmConfig, CmCounters, CmError, CmEvent, ConnId, ConnectArgs, DisconnectReason,
    Negotiated, Peer,
};
use super::mad::{
    About, IP_HEADER_LEN_BYTES, IpHeader, MAD_LEN_BYTES, Mad, Message, PrivateData,
    REJ_PRIVATE_LEN_BYTES, REP_PRIVATE_LEN_BYTES, REQ_PRIVATE_LEN_BYTES, Rej, RejectReason, Rep,
    Req, ServiceId, gid_of, path_mtu_bytes, path_mtu_code,
};
use super::params::Params;
use crate::middleware::random::SplitMix64;

/// Datagrams that may wait for [`CmManager::poll_transmit`]; beyond it they count as lost.
const TRANSMIT_QUEUE: usize = 512;
/// Undelivered events beyond which new requests are refused.
pub(super) const EVENT_QUEUE: usize = 4096;
/// Finished connections remembered for late datagrams; beyond it the oldest is forgotten.
const TIME_WAIT_MAX: usize = 1024;
/// Full membership in the default partition.
const DEFAULT_PKEY: u16 = 0xFFFF;

/// Owner of all connections of an engine.
#[derive(Debug)]
pub struct CmManager {
    pub(super) config: CmConfig,
    pub(super) random: SplitMix64,
    pub(super) ca_guid: u64,
    pub(super) listeners: BTreeSet<ServiceId>,
    pub(super) conns: BTreeMap<ConnId, Conn>,
    /// By peer address and peer's communication id: recognises duplicates of a ConnectRequest.
    pub(super) by_peer: BTreeMap<(SocketAddr, u32), ConnId>,
    /// By peer address and peer's queue pair: recognises stale connections.
    pub(super) by_qpn: BTreeMap<(SocketAddr, u32), ConnId>,
    pub(super) timers: BTreeSet<(Instant, ConnId)>,
    /// Connections in TimeWait, oldest first.
    pub(super) time_wait: VecDeque<ConnId>,
    pub(super) half_open: usize,
    pub(super) transmit: VecDeque<(SocketAddr, [u8; MAD_LEN_BYTES])>,
    pub(super) events: VecDeque<CmEvent>,
    pub(super) counters: CmCounters,
}
impl CmManager {
    /// A manager. The seed decides communication ids, transaction ids and jitter.
    #[must_use]
    pub fn new(config: CmConfig, seed: u64) -> Self {
        let mut random = SplitMix64::new(seed);
        let ca_guid = random.next_u64();
        Self {
            config,
            random,
            ca_guid,
            listeners: BTreeSet::new(),
            conns: BTreeMap::new(),
            by_peer: BTreeMap::new(),
            by_qpn: BTreeMap::new(),
            timers: BTreeSet::new(),
            time_wait: VecDeque::new(),
            half_open: 0,
            transmit: VecDeque::new(),
            events: VecDeque::new(),
            counters: CmCounters::default(),
        }
    }

    /// Takes connect requests for `service`.
    pub fn listen(&mut self, service: ServiceId) -> Result<(), CmError> {
        if self.listeners.insert(service) {
            Ok(())
        } else {
            Err(CmError::ServiceInUse)
        }
    }

    /// No longer takes connect requests for `service`. False when nobody listened. Connections
    /// stay.
    pub fn unlisten(&mut self, service: ServiceId) -> bool {
        self.listeners.remove(&service)
    }

    /// Starts to connect. Ends with [`CmEvent::Established`], [`CmEvent::Rejected`] or
    /// [`CmEvent::Unreachable`].
    pub fn connect(&mut self, now: Instant, args: &ConnectArgs<'_>) -> Result<ConnId, CmError> {
        check_u24(args.qpn)?;
        check_u24(args.starting_psn)?;
        let mut private = [0; REQ_PRIVATE_LEN_BYTES];
        let header = IpHeader {
            source_port: args.local.port(),
            source: args.local.ip(),
            destination: args.to.ip(),
        };
        let (head, user) = private.split_at_mut(IP_HEADER_LEN_BYTES);
        head.copy_from_slice(&header.emit());
        fill_private(user, args.private, args.params)?;
        if self.active() >= self.config.max_connections {
            return Err(CmError::TooManyConnections);
        }
        let conn_id = self.new_id();
        let timeout_code = timeout_code(self.config.response_timeout_max);
        let request = Req {
            local_id: conn_id.0,
            service: args.service,
            ca_guid: self.ca_guid,
            qpn: args.qpn,
            responder_resources: args.read_depth,
            initiator_depth: args.read_depth,
            remote_response_timeout: timeout_code,
            starting_psn: args.starting_psn,
            local_response_timeout: timeout_code,
            retry_count: args.retry_count.min(7),
            pkey: DEFAULT_PKEY,
            path_mtu: path_mtu_code(args.path_mtu_bytes),
            rnr_retry_count: args.rnr_retry_count.min(7),
            max_cm_retries: self.config.connect_retries.min(15),
            local_gid: gid_of(args.local.ip()),
            remote_gid: gid_of(args.to.ip()),
            hop_limit: 64,
            ack_timeout: timeout_code.min(31),
            private,
        };
        let transaction = self.random.next_u64();
        let mad = Mad {
            transaction,
            message: Message::Req(request),
        }
        .emit();
        let negotiated = Negotiated {
            params: None,
            path_mtu_bytes: path_mtu_bytes(path_mtu_code(args.path_mtu_bytes)),
            initiator_depth: args.read_depth,
            responder_resources: args.read_depth,
            retry_count: args.retry_count.min(7),
            rnr_retry_count: args.rnr_retry_count.min(7),
        };
        let conn = Conn {
            state: State::ReqSent,
            transaction,
            peer_id: None,
            offer: args.params.map(Params::clamped),
            local_qpn: args.qpn,
            peer: Peer {
                address: args.to,
                qpn: 0,
                starting_psn: 0,
                negotiated,
            },
            repeat: Some(Box::new(mad)),
            deadline: None,
            attempts: 0,
        };
        self.conns.insert(conn_id, conn);
        self.send(args.to, mad);
        self.arm_retry(now, conn_id);
        Ok(conn_id)
    }

    /// Accepts a request. The queue pair must be ready to receive from the returned peer now;
    /// [`CmEvent::Established`] follows when the peer has confirmed, [`CmEvent::Disconnected`] or
    /// [`CmEvent::Rejected`] when it does not.
    pub fn accept(
        &mut self,
        now: Instant,
        conn_id: ConnId,
        args: &AcceptArgs<'_>,
    ) -> Result<Peer, CmError> {
        check_u24(args.qpn)?;
        check_u24(args.starting_psn)?;
        let ca_guid = self.ca_guid;
        let conn = self
            .conns
            .get_mut(&conn_id)
            .ok_or(CmError::UnknownConnection)?;
        if conn.state != State::ReqReceived {
            return Err(CmError::State);
        }
        let params = match (args.params, conn.offer) {
            (Some(ours), Some(theirs)) => Some(ours.negotiate(theirs)),
            _ => None,
        };
        let mut private = [0; REP_PRIVATE_LEN_BYTES];
        fill_private(&mut private, args.private, params)?;
        let negotiated = &mut conn.peer.negotiated;
        negotiated.params = params;
        negotiated.initiator_depth = negotiated.initiator_depth.min(args.read_depth);
        negotiated.responder_resources = negotiated.responder_resources.min(args.read_depth);
        let reply = Rep {
            local_id: conn_id.0,
            remote_id: conn.peer_id.unwrap_or_default(),
            qpn: args.qpn,
            starting_psn: args.starting_psn,
            responder_resources: negotiated.responder_resources,
            initiator_depth: negotiated.initiator_depth,
            ack_delay: 15,
            rnr_retry_count: negotiated.rnr_retry_count,
            ca_guid,
            private,
        };
        let peer = conn.peer;
        let mad = Mad {
            transaction: conn.transaction,
            message: Message::Rep(reply),
        }
        .emit();
        conn.local_qpn = args.qpn;
        conn.state = State::RepSent;
        conn.repeat = Some(Box::new(mad));
        conn.attempts = 0;
        self.send(peer.address, mad);
        self.arm_retry(now, conn_id);
        Ok(peer)
    }

    /// Refuses a request.
    pub fn reject(
        &mut self,
        now: Instant,
        conn_id: ConnId,
        reason: RejectReason,
        private: &[u8],
    ) -> Result<(), CmError> {
        let mut area = [0; REJ_PRIVATE_LEN_BYTES];
        fill_private(&mut area, private, None)?;
        let conn = self
            .conns
            .get_mut(&conn_id)
            .ok_or(CmError::UnknownConnection)?;
        if conn.state != State::ReqReceived {
            return Err(CmError::State);
        }
        let mad = conn.reject_mad(conn_id, About::Req, reason, area);
        conn.repeat = Some(Box::new(mad));
        let to = conn.peer.address;
        self.send(to, mad);
        self.enter_time_wait(now, conn_id);
        Ok(())
    }

    /// Ends a connection, in whatever state it is. [`CmEvent::Disconnected`] follows when there
    /// was one to end; an outgoing request that is withdrawn gives no event.
    pub fn disconnect(&mut self, now: Instant, conn_id: ConnId) -> Result<(), CmError> {
        let conn = self
            .conns
            .get_mut(&conn_id)
            .ok_or(CmError::UnknownConnection)?;
        match conn.state {
            State::ReqSent => {
                // A reply that still comes is answered with "invalid communication id".
                self.remove(conn_id);
            }
            State::ReqReceived => {
                return self.reject(now, conn_id, RejectReason::Consumer, &[]);
            }
            State::RepSent | State::Established => {
                let message = Message::Dreq {
                    local_id: conn_id.0,
                    remote_id: conn.peer_id.unwrap_or_default(),
                    remote_qpn: conn.peer.qpn,
                };
                let mad = Mad {
                    transaction: conn.transaction,
                    message,
                }
                .emit();
                conn.repeat = Some(Box::new(mad));
                conn.attempts = 0;
                let to = conn.peer.address;
                self.set_state(conn_id, State::DreqSent);
                self.send(to, mad);
                self.arm_retry(now, conn_id);
            }
            State::DreqSent | State::TimeWait => {}
        }
        Ok(())
    }

    /// Tells that data came from the peer of `conn`: as good as its ReadyToUse, which may be lost.
    pub fn communication_established(&mut self, conn_id: ConnId) {
        if self
            .conns
            .get(&conn_id)
            .is_some_and(|conn| conn.state == State::RepSent)
        {
            self.establish_passive(conn_id);
        }
    }

    /// The other end of a connection that has one.
    #[must_use]
    pub fn peer(&self, conn_id: ConnId) -> Option<&Peer> {
        self.conns
            .get(&conn_id)
            .filter(|conn| conn.peer_id.is_some() && conn.state != State::TimeWait)
            .map(|conn| &conn.peer)
    }

    /// Takes the payload of a packet that came to queue pair 1.
    pub fn handle_mad(&mut self, now: Instant, from: SocketAddr, bytes: &[u8]) {
        self.counters.received += 1;
        let Ok(Mad {
            transaction,
            message,
        }) = Mad::parse(bytes)
        else {
            self.counters.malformed += 1;
            return;
        };
        match message {
            Message::Req(req) => self.on_req(now, from, transaction, &req),
            Message::Rep(rep) => self.on_rep(from, transaction, &rep),
            Message::Rej(rej) => self.on_rej(from, &rej),
            Message::Mra { .. } => self.counters.ignored += 1,
            Message::Rtu {
                local_id,
                remote_id,
            } => self.on_rtu(from, local_id, remote_id),
            Message::Dreq {
                local_id,
                remote_id,
                remote_qpn,
            } => {
                self.on_dreq(now, from, transaction, local_id, remote_id, remote_qpn);
            }
            Message::Drep {
                local_id,
                remote_id,
            } => self.on_drep(now, from, local_id, remote_id),
        }
    }

    /// Next datagram to send to queue pair 1 of an address.
    pub fn poll_transmit(&mut self) -> Option<(SocketAddr, [u8; MAD_LEN_BYTES])> {
        let next = self.transmit.pop_front();
        self.counters.sent += u64::from(next.is_some());
        next
    }

    /// Next event.
    pub fn poll_event(&mut self) -> Option<CmEvent> {
        self.events.pop_front()
    }

    /// When [`Self::handle_timeout`] wants to be called.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Instant> {
        self.timers.first().map(|&(at, _)| at)
    }

    /// Retransmits, gives up and forgets what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some(&(at, conn_id)) = self.timers.first() {
            if at > now {
                break;
            }
            self.on_timer(now, conn_id);
        }
    }

    /// Event counts.
    #[must_use]
    pub fn counters(&self) -> &CmCounters {
        &self.counters
    }

    /// Connections in any state but TimeWait.
    #[must_use]
    pub fn active(&self) -> usize {
        self.conns.len().saturating_sub(self.time_wait.len())
    }

    /// Incoming connections that are undecided or unconfirmed.
    #[must_use]
    pub fn half_open(&self) -> usize {
        self.half_open
    }
}

/// Timers and book-keeping.
impl CmManager {
    fn on_timer(&mut self, now: Instant, conn_id: ConnId) {
        self.disarm(conn_id);
        let Some(conn) = self.conns.get_mut(&conn_id) else {
            return;
        };
        let retries = match conn.state {
            State::ReqSent | State::RepSent => self.config.connect_retries,
            State::DreqSent => self.config.disconnect_retries,
            State::ReqReceived | State::Established | State::TimeWait => 0,
        };
        if conn.attempts < retries {
            conn.attempts += 1;
            let to = conn.peer.address;
            if let Some(mad) = conn.repeat.as_deref().copied() {
                self.counters.retransmissions += 1;
                self.send(to, mad);
            }
            return self.arm_retry(now, conn_id);
        }
        let state = conn.state;
        let to = conn.peer.address;
        let area = [0; REJ_PRIVATE_LEN_BYTES];
        match state {
            State::ReqSent => {
                let mad = conn.reject_mad(conn_id, About::Nothing, RejectReason::Timeout, area);
                self.counters.timeouts += 1;
                self.send(to, mad);
                self.remove(conn_id);
                self.events
                    .push_back(CmEvent::Unreachable { conn: conn_id });
            }
            State::ReqReceived | State::RepSent => {
                let about = if state == State::RepSent {
                    About::Nothing
                } else {
                    About::Req
                };
                let mad = conn.reject_mad(conn_id, about, RejectReason::Timeout, area);
                conn.repeat = Some(Box::new(mad));
                self.counters.timeouts += 1;
                self.send(to, mad);
                self.end(now, conn_id, DisconnectReason::Timeout);
            }
            State::DreqSent => {
                self.counters.timeouts += 1;
                self.end(now, conn_id, DisconnectReason::Local);
            }
            State::Established => {}
            State::TimeWait => self.remove(conn_id),
        }
    }

    /// The connection is over for the application; what is left answers late datagrams.
    pub(super) fn end(&mut self, now: Instant, conn_id: ConnId, reason: DisconnectReason) {
        self.events.push_back(CmEvent::Disconnected {
            conn: conn_id,
            reason,
        });
        self.enter_time_wait(now, conn_id);
    }

    pub(super) fn enter_time_wait(&mut self, now: Instant, conn_id: ConnId) {
        self.set_state(conn_id, State::TimeWait);
        if let Some(conn) = self.conns.get_mut(&conn_id) {
            let key = (conn.peer.address, conn.peer.qpn);
            // Only a ConnectReject is worth repeating now.
            let is_reject = conn.repeat.as_deref().is_some_and(|mad| {
                Mad::parse(mad).is_ok_and(|mad| matches!(mad.message, Message::Rej(_)))
            });
            if !is_reject {
                conn.repeat = None;
            }
            if self.by_qpn.get(&key) == Some(&conn_id) {
                self.by_qpn.remove(&key);
            }
        }
        self.arm(conn_id, now + self.config.time_wait);
        self.time_wait.push_back(conn_id);
        if self.time_wait.len() > TIME_WAIT_MAX
            && let Some(&oldest) = self.time_wait.front()
        {
            self.remove(oldest);
        }
    }

    /// Ends what is left of a connection whose peer has restarted. True when it was established,
    /// so that the peer's new request must be refused (IBA 12.9.8.3).
    pub(super) fn end_stale(&mut self, conn_id: ConnId) -> bool {
        let Some(state) = self.conns.get(&conn_id).map(|conn| conn.state) else {
            return false;
        };
        self.remove(conn_id);
        if state == State::TimeWait {
            return false;
        }
        self.counters.stale += 1;
        let reason = DisconnectReason::Stale;
        self.events.push_back(CmEvent::Disconnected {
            conn: conn_id,
            reason,
        });
        matches!(state, State::Established | State::DreqSent)
    }

    pub(super) fn refuse(
        &mut self,
        to: SocketAddr,
        transaction: u64,
        req: &Req,
        reason: RejectReason,
    ) {
        let message = Message::Rej(Rej {
            local_id: 0,
            remote_id: req.local_id,
            about: About::Req,
            reason,
            private: [0; REJ_PRIVATE_LEN_BYTES],
        });
        self.send(
            to,
            Mad {
                transaction,
                message,
            }
            .emit(),
        );
    }

    pub(super) fn establish_passive(&mut self, conn_id: ConnId) {
        self.disarm(conn_id);
        self.set_state(conn_id, State::Established);
        if let Some(conn) = self.conns.get_mut(&conn_id) {
            conn.repeat = None;
            let peer = conn.peer;
            let private = PrivateData::default();
            self.events.push_back(CmEvent::Established {
                conn: conn_id,
                peer,
                private,
            });
        }
    }

    pub(super) fn set_state(&mut self, conn_id: ConnId, state: State) {
        if let Some(conn) = self.conns.get_mut(&conn_id) {
            self.half_open -= usize::from(conn.state.is_half_open());
            conn.state = state;
            self.half_open += usize::from(state.is_half_open());
        }
    }

    pub(super) fn remove(&mut self, conn_id: ConnId) {
        self.disarm(conn_id);
        let Some(conn) = self.conns.remove(&conn_id) else {
            return;
        };
        self.half_open -= usize::from(conn.state.is_half_open());
        if conn.state == State::TimeWait {
            // All wait equally long, so the first to go is the first in the queue.
            self.time_wait.retain(|&id| id != conn_id);
        }
        let qpn_key = (conn.peer.address, conn.peer.qpn);
        if self.by_qpn.get(&qpn_key) == Some(&conn_id) {
            self.by_qpn.remove(&qpn_key);
        }
        if let Some(peer_id) = conn.peer_id {
            let peer_key = (conn.peer.address, peer_id);
            if self.by_peer.get(&peer_key) == Some(&conn_id) {
                self.by_peer.remove(&peer_key);
            }
        }
    }

    pub(super) fn new_id(&mut self) -> ConnId {
        loop {
            let conn_id = ConnId(self.random.next_u32());
            if conn_id.0 != 0 && !self.conns.contains_key(&conn_id) {
                return conn_id;
            }
        }
    }

    pub(super) fn send(&mut self, to: SocketAddr, mad: [u8; MAD_LEN_BYTES]) {
        if self.transmit.len() < TRANSMIT_QUEUE {
            self.transmit.push_back((to, mad));
        } else {
            self.counters.transmit_dropped += 1;
        }
    }

    /// Arms the retransmission timer: doubled by attempt, up to an eighth of jitter on top.
    fn arm_retry(&mut self, now: Instant, conn_id: ConnId) {
        let Some(conn) = self.conns.get(&conn_id) else {
            return;
        };
        let factor = 1_u32 << conn.attempts.min(16);
        let base = self.config.response_timeout.saturating_mul(factor);
        let base = base.min(self.config.response_timeout_max);
        let jitter_ns = u64::try_from(base.as_nanos() / 8).unwrap_or(u64::MAX);
        let jitter = Duration::from_nanos(self.random.below(jitter_ns));
        self.arm(conn_id, now + base + jitter);
    }

    pub(super) fn arm(&mut self, conn_id: ConnId, at: Instant) {
        self.disarm(conn_id);
        if let Some(conn) = self.conns.get_mut(&conn_id) {
            conn.deadline = Some(at);
            self.timers.insert((at, conn_id));
        }
    }

    pub(super) fn disarm(&mut self, conn_id: ConnId) {
        if let Some(at) = self
            .conns
            .get_mut(&conn_id)
            .and_then(|conn| conn.deadline.take())
        {
            self.timers.remove(&(at, conn_id));
        }
    }
}
