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

use super::mad::{
    About, IP_HEADER_LEN_BYTES, IpHeader, MAD_LEN_BYTES, Mad, Message, PrivateData,
    REJ_PRIVATE_LEN_BYTES, REP_PRIVATE_LEN_BYTES, REQ_PRIVATE_LEN_BYTES, REQ_USER_LEN_BYTES, Rej,
    RejectReason, Rep, Req, ServiceId, gid_of, path_mtu_bytes, path_mtu_code,
};
use super::params::{PARAMS_OFFSET, Params};
use crate::middleware::random::SplitMix64;

/// UDP port of RoCEv2 (IBA annex A17), where standard peers are answered.
const ROCE_PORT: u16 = 4791;
/// Datagrams that may wait for [`CmManager::poll_transmit`]; beyond it they count as lost.
const TRANSMIT_QUEUE: usize = 512;
/// Undelivered events beyond which new requests are refused.
const EVENT_QUEUE: usize = 4096;
/// Finished connections remembered for late datagrams; beyond it the oldest is forgotten.
const TIME_WAIT_MAX: usize = 1024;
/// Full membership in the default partition.
const DEFAULT_PKEY: u16 = 0xFFFF;
const U24_MAX: u32 = 0x00FF_FFFF;

/// Limits and times of a manager.
#[derive(Clone, Debug)]
pub struct CmConfig {
    /// Time until the first retransmission; doubles with each.
    pub response_timeout: Duration,
    /// Longest time between retransmissions.
    pub response_timeout_max: Duration,
    /// Retransmissions of a ConnectRequest or ConnectReply.
    pub connect_retries: u8,
    /// Retransmissions of a DisconnectRequest.
    pub disconnect_retries: u8,
    /// Time that the application has to accept or reject.
    pub accept_timeout: Duration,
    /// Time that a finished connection is remembered for late datagrams.
    pub time_wait: Duration,
    /// Incoming connections that may be undecided or unconfirmed; more are refused.
    pub max_half_open: usize,
    /// Connections in any state but TimeWait.
    pub max_connections: usize,
}

impl Default for CmConfig {
    fn default() -> Self {
        Self {
            response_timeout: Duration::from_millis(50),
            response_timeout_max: Duration::from_secs(2),
            connect_retries: 7,
            disconnect_retries: 3,
            accept_timeout: Duration::from_secs(5),
            time_wait: Duration::from_secs(2),
            max_half_open: 256,
            max_connections: 65_536,
        }
    }
}

/// A connection of this manager: its local communication id, random and never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId(pub u32);

/// What [`CmManager::connect`] needs.
#[derive(Clone, Copy, Debug)]
pub struct ConnectArgs<'a> {
    /// Our queue pair (24 bit).
    pub qpn: u32,
    /// First PSN that we send (24 bit).
    pub starting_psn: u32,
    /// Our address, for the addressing header of RDMA-CM.
    pub local: SocketAddr,
    /// Peer's address and UDP port.
    pub to: SocketAddr,
    /// Service wanted.
    pub service: ServiceId,
    /// Application's private data: at most 40 bytes with `params`, 56 without.
    pub private: &'a [u8],
    /// FlexiNS parameters offered; `None` speaks standard RoCEv2 only.
    pub params: Option<Params>,
    /// Largest standard MTU to propose, used when the peer does not know FlexiNS.
    pub path_mtu_bytes: u32,
    /// RDMA READs outstanding in each direction.
    pub read_depth: u8,
    /// Transport retries (0-7).
    pub retry_count: u8,
    /// Receiver-not-ready retries (0-7, 7 = for ever).
    pub rnr_retry_count: u8,
}

/// What [`CmManager::accept`] needs.
#[derive(Clone, Copy, Debug)]
pub struct AcceptArgs<'a> {
    /// Our queue pair (24 bit).
    pub qpn: u32,
    /// First PSN that we send (24 bit).
    pub starting_psn: u32,
    /// Application's private data: at most 40 bytes when FlexiNS is negotiated, 196 otherwise.
    pub private: &'a [u8],
    /// FlexiNS parameters offered; used when the peer offered them too.
    pub params: Option<Params>,
    /// RDMA READs outstanding in each direction.
    pub read_depth: u8,
}

/// What both ends agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// FlexiNS parameters; `None` is standard RoCEv2.
    pub params: Option<Params>,
    /// Path MTU of standard RoCEv2 (payload bytes).
    pub path_mtu_bytes: u32,
    /// RDMA READs that we may have outstanding.
    pub initiator_depth: u8,
    /// RDMA READs that the peer may have outstanding.
    pub responder_resources: u8,
    /// Transport retries wanted by the connecting end.
    pub retry_count: u8,
    /// Receiver-not-ready retries that our sends shall make (as the peer asked).
    pub rnr_retry_count: u8,
}

/// The other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Where its packets go to (and, in FlexiNS mode, come from).
    pub address: SocketAddr,
    /// Its queue pair (24 bit).
    pub qpn: u32,
    /// First PSN that it sends (24 bit).
    pub starting_psn: u32,
    /// What was agreed.
    pub negotiated: Negotiated,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DisconnectReason {
    /// We asked for it, and the peer confirmed or did not answer.
    Local,
    /// The peer asked for it.
    Peer,
    /// The peer never confirmed, or the application never decided on the request.
    Timeout,
    /// The peer uses the same queue pair for a new connection: it has restarted.
    Stale,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum CmEvent {
    /// A peer wants to connect; answer with accept or reject.
    ConnectRequest {
        /// Connection.
        conn: ConnId,
        /// Peer.
        from: SocketAddr,
        /// Service that it wants.
        service: ServiceId,
        /// Its application's private data.
        private: PrivateData,
        /// FlexiNS parameters that it offers.
        params: Option<Params>,
    },
    /// Both ends are ready. The connecting end gets it with the ConnectReply, the accepting end
    /// with ReadyToUse.
    Established {
        /// Connection.
        conn: ConnId,
        /// Other end.
        peer: Peer,
        /// Private data of the ConnectReply; empty at the accepting end.
        private: PrivateData,
    },
    /// The peer refused. The connection is gone.
    Rejected {
        /// Connection.
        conn: ConnId,
        /// Why.
        reason: RejectReason,
        /// Private data of the refusal.
        private: PrivateData,
    },
    /// The connection is over.
    Disconnected {
        /// Connection.
        conn: ConnId,
        /// Why.
        reason: DisconnectReason,
    },
    /// No answer to the ConnectRequest. The connection is gone.
    Unreachable {
        /// Connection.
        conn: ConnId,
    },
}

/// Why a call was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CmError {
    /// No such connection (any more).
    #[error("no such connection")]
    UnknownConnection,
    /// The connection is in a state in which that is not possible.
    #[error("the connection is not in a state for that")]
    State,
    /// Private data longer than fits.
    #[error("private data longer than {max_bytes} bytes")]
    PrivateTooLong {
        /// What fits.
        max_bytes: usize,
    },
    /// A queue pair number or PSN above 24 bits.
    #[error("queue pair number or PSN above 24 bits")]
    Range,
    /// The service is listened to already.
    #[error("the service is already listened to")]
    ServiceInUse,
    /// [`CmConfig::max_connections`] are open.
    #[error("too many connections")]
    TooManyConnections,
}

/// Events of a manager.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CmCounters {
    /// Datagrams received.
    pub received: u64,
    /// Datagrams handed out for transmission.
    pub sent: u64,
    /// Retransmissions by timer.
    pub retransmissions: u64,
    /// Received datagrams that did not parse.
    pub malformed: u64,
    /// Duplicates received.
    pub duplicates: u64,
    /// Datagrams that fit no connection or not its state, MRA included.
    pub ignored: u64,
    /// ConnectRequests refused for want of room.
    pub refused_half_open: u64,
    /// ConnectRequests for a service that nobody listens to.
    pub refused_service: u64,
    /// Connections ended because the peer has restarted.
    pub stale: u64,
    /// Exchanges given up after all retries.
    pub timeouts: u64,
    /// Datagrams dropped because the transmit queue was full.
    pub transmit_dropped: u64,
}

/// Owner of all connections of an engine.
#[derive(Debug)]
pub struct CmManager {
    config: CmConfig,
    random: SplitMix64,
    ca_guid: u64,
    listeners: BTreeSet<ServiceId>,
    conns: BTreeMap<ConnId, Conn>,
    /// By peer address and peer's communication id: recognises duplicates of a ConnectRequest.
    by_peer: BTreeMap<(SocketAddr, u32), ConnId>,
    /// By peer address and peer's queue pair: recognises stale connections.
    by_qpn: BTreeMap<(SocketAddr, u32), ConnId>,
    timers: BTreeSet<(Instant, ConnId)>,
    /// Connections in TimeWait, oldest first.
    time_wait: VecDeque<ConnId>,
    half_open: usize,
    transmit: VecDeque<(SocketAddr, [u8; MAD_LEN_BYTES])>,
    events: VecDeque<CmEvent>,
    counters: CmCounters,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    ReqSent,
    ReqReceived,
    RepSent,
    Established,
    DreqSent,
    TimeWait,
}

#[derive(Debug)]
struct Conn {
    state: State,
    transaction: u64,
    /// Peer's communication id, once known.
    peer_id: Option<u32>,
    /// Parameters that we offered, until they are negotiated.
    offer: Option<Params>,
    local_qpn: u32,
    peer: Peer,
    /// Datagram to repeat by timer, or in answer to a duplicate.
    repeat: Option<Box<[u8; MAD_LEN_BYTES]>>,
    deadline: Option<Instant>,
    attempts: u8,
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

/// Received messages.
impl CmManager {
    fn on_req(&mut self, now: Instant, from: SocketAddr, transaction: u64, req: &Req) {
        let offer = Params::parse(req.user_private());
        let reply_to = reply_address(from, offer);
        let peer_key = (reply_to, req.local_id);
        if let Some(&old_id) = self.by_peer.get(&peer_key)
            && let Some(old) = self.conns.get(&old_id)
        {
            if old.transaction == transaction
                && old.peer.qpn == req.qpn
                && old.peer.starting_psn == req.starting_psn
            {
                self.counters.duplicates += 1;
                let repeat = match old.state {
                    State::RepSent | State::TimeWait => old.repeat.as_deref().copied(),
                    _ => None,
                };
                if let Some(mad) = repeat {
                    self.send(reply_to, mad);
                }
                return;
            }
            if self.end_stale(old_id) {
                return self.refuse(reply_to, transaction, req, RejectReason::StaleConnection);
            }
        }
        if let Some(&old_id) = self.by_qpn.get(&(reply_to, req.qpn))
            && self.end_stale(old_id)
        {
            return self.refuse(reply_to, transaction, req, RejectReason::StaleConnection);
        }
        if !self.listeners.contains(&req.service) {
            self.counters.refused_service += 1;
            return self.refuse(reply_to, transaction, req, RejectReason::InvalidServiceId);
        }
        if self.half_open >= self.config.max_half_open
            || self.active() >= self.config.max_connections
            || self.events.len() >= EVENT_QUEUE
        {
            self.counters.refused_half_open += 1;
            return self.refuse(reply_to, transaction, req, RejectReason::NoResources);
        }
        let negotiated = Negotiated {
            params: None,
            path_mtu_bytes: path_mtu_bytes(req.path_mtu),
            // What the peer answers limits what we ask, and the other way round.
            initiator_depth: req.responder_resources,
            responder_resources: req.initiator_depth,
            retry_count: req.retry_count,
            rnr_retry_count: req.rnr_retry_count,
        };
        let peer = Peer {
            address: reply_to,
            qpn: req.qpn,
            starting_psn: req.starting_psn,
            negotiated,
        };
        let conn_id = self.new_id();
        let conn = Conn {
            state: State::ReqReceived,
            transaction,
            peer_id: Some(req.local_id),
            offer,
            local_qpn: 0,
            peer,
            repeat: None,
            deadline: None,
            attempts: 0,
        };
        self.conns.insert(conn_id, conn);
        self.half_open += 1;
        self.by_peer.insert(peer_key, conn_id);
        self.by_qpn.insert((reply_to, req.qpn), conn_id);
        self.arm(conn_id, now + self.config.accept_timeout);
        self.events.push_back(CmEvent::ConnectRequest {
            conn: conn_id,
            from: reply_to,
            service: req.service,
            private: application_private(req.user_private(), offer.is_some()),
            params: offer,
        });
    }

    fn on_rep(&mut self, from: SocketAddr, transaction: u64, rep: &Rep) {
        let conn_id = ConnId(rep.remote_id);
        let answer = Params::parse(&rep.private);
        let Some(conn) = self.conns.get_mut(&conn_id) else {
            let reply_to = reply_address(from, answer);
            let message = Message::Rej(Rej {
                local_id: rep.remote_id,
                remote_id: rep.local_id,
                about: About::Rep,
                reason: RejectReason::InvalidCommId,
                private: [0; REJ_PRIVATE_LEN_BYTES],
            });
            self.counters.ignored += 1;
            return self.send(
                reply_to,
                Mad {
                    transaction,
                    message,
                }
                .emit(),
            );
        };
        if !conn.comes_from(from, answer.is_some()) {
            self.counters.ignored += 1;
            return;
        }
        match conn.state {
            State::ReqSent => {}
            State::Established if conn.peer_id == Some(rep.local_id) => {
                // Our ReadyToUse was lost.
                let rtu = conn.rtu_mad(conn_id);
                let to = conn.peer.address;
                self.counters.duplicates += 1;
                return self.send(to, rtu);
            }
            _ => {
                self.counters.ignored += 1;
                return;
            }
        }
        let params = match (conn.offer, answer) {
            (Some(ours), Some(theirs)) if ours.negotiate(theirs) == theirs => Ok(Some(theirs)),
            (Some(_), Some(_)) => Err(RejectReason::Unsupported),
            _ => Ok(None),
        };
        let address = conn.peer.address;
        let stale = self.by_qpn.get(&(address, rep.qpn)).copied();
        let stale = stale.filter(|&old_id| old_id != conn_id);
        let verdict = match stale {
            Some(old_id) if self.end_stale(old_id) => Err(RejectReason::StaleConnection),
            _ => params,
        };
        let Some(conn) = self.conns.get_mut(&conn_id) else {
            return;
        };
        conn.peer_id = Some(rep.local_id);
        match verdict {
            Ok(params) => {
                conn.peer.qpn = rep.qpn;
                conn.peer.starting_psn = rep.starting_psn;
                let negotiated = &mut conn.peer.negotiated;
                negotiated.params = params;
                negotiated.initiator_depth =
                    negotiated.initiator_depth.min(rep.responder_resources);
                negotiated.responder_resources =
                    negotiated.responder_resources.min(rep.initiator_depth);
                negotiated.rnr_retry_count = rep.rnr_retry_count;
                conn.repeat = None;
                let peer = conn.peer;
                let rtu = conn.rtu_mad(conn_id);
                self.set_state(conn_id, State::Established);
                self.disarm(conn_id);
                self.by_peer.insert((address, rep.local_id), conn_id);
                self.by_qpn.insert((address, rep.qpn), conn_id);
                let private = application_private(&rep.private, params.is_some());
                self.events.push_back(CmEvent::Established {
                    conn: conn_id,
                    peer,
                    private,
                });
                self.send(address, rtu);
            }
            Err(reason) => {
                let area = [0; REJ_PRIVATE_LEN_BYTES];
                let mad = conn.reject_mad(conn_id, About::Rep, reason, area);
                self.send(address, mad);
                self.remove(conn_id);
                let private = PrivateData::default();
                self.events.push_back(CmEvent::Rejected {
                    conn: conn_id,
                    reason,
                    private,
                });
            }
        }
    }

    fn on_rej(&mut self, from: SocketAddr, rej: &Rej) {
        let conn_id = ConnId(rej.remote_id);
        let Some(conn) = self
            .conns
            .get(&conn_id)
            .filter(|conn| conn.comes_from(from, false))
        else {
            self.counters.ignored += 1;
            return;
        };
        let from_peer = conn.peer_id == Some(rej.local_id);
        match conn.state {
            State::ReqSent => {
                self.remove(conn_id);
                self.events.push_back(CmEvent::Rejected {
                    conn: conn_id,
                    reason: rej.reason,
                    private: PrivateData::from_prefix(&rej.private),
                });
            }
            // "Invalid communication id" comes from a peer that has forgotten us: it names our id
            // only, or both.
            State::RepSent if from_peer || rej.about == About::Rep => {
                self.remove(conn_id);
                self.events.push_back(CmEvent::Rejected {
                    conn: conn_id,
                    reason: rej.reason,
                    private: PrivateData::from_prefix(&rej.private),
                });
            }
            // The accepting end has given up waiting for our ReadyToUse.
            State::Established if from_peer && rej.reason == RejectReason::Timeout => {
                self.remove(conn_id);
                let reason = DisconnectReason::Peer;
                self.events.push_back(CmEvent::Disconnected {
                    conn: conn_id,
                    reason,
                });
            }
            _ => self.counters.ignored += 1,
        }
    }

    fn on_rtu(&mut self, from: SocketAddr, local_id: u32, remote_id: u32) {
        let conn_id = ConnId(remote_id);
        match self.conns.get(&conn_id) {
            Some(conn) if conn.is_peer(from, local_id) => match conn.state {
                State::RepSent => self.establish_passive(conn_id),
                State::Established => self.counters.duplicates += 1,
                _ => self.counters.ignored += 1,
            },
            _ => self.counters.ignored += 1,
        }
    }

    fn on_dreq(
        &mut self,
        now: Instant,
        from: SocketAddr,
        transaction: u64,
        local_id: u32,
        remote_id: u32,
        remote_qpn: u32,
    ) {
        let conn_id = ConnId(remote_id);
        let Some(conn) = self.conns.get(&conn_id) else {
            // A connection that we have forgotten: confirm, so that the peer forgets it too.
            self.counters.ignored += 1;
            let message = Message::Drep {
                local_id: remote_id,
                remote_id: local_id,
            };
            return self.send(
                from,
                Mad {
                    transaction,
                    message,
                }
                .emit(),
            );
        };
        if !conn.is_peer(from, local_id) || conn.local_qpn != remote_qpn {
            self.counters.ignored += 1;
            return;
        }
        let reason = match conn.state {
            State::RepSent | State::Established => Some(DisconnectReason::Peer),
            State::DreqSent => Some(DisconnectReason::Local),
            State::TimeWait => None,
            State::ReqSent | State::ReqReceived => {
                self.counters.ignored += 1;
                return;
            }
        };
        let message = Message::Drep {
            local_id: conn_id.0,
            remote_id: local_id,
        };
        let to = conn.peer.address;
        self.send(
            to,
            Mad {
                transaction,
                message,
            }
            .emit(),
        );
        match reason {
            Some(reason) => self.end(now, conn_id, reason),
            None => self.counters.duplicates += 1,
        }
    }

    fn on_drep(&mut self, now: Instant, from: SocketAddr, local_id: u32, remote_id: u32) {
        let conn_id = ConnId(remote_id);
        match self.conns.get(&conn_id) {
            Some(conn) if conn.is_peer(from, local_id) && conn.state == State::DreqSent => {
                self.end(now, conn_id, DisconnectReason::Local);
            }
            _ => self.counters.ignored += 1,
        }
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
    fn end(&mut self, now: Instant, conn_id: ConnId, reason: DisconnectReason) {
        self.events.push_back(CmEvent::Disconnected {
            conn: conn_id,
            reason,
        });
        self.enter_time_wait(now, conn_id);
    }

    fn enter_time_wait(&mut self, now: Instant, conn_id: ConnId) {
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
    fn end_stale(&mut self, conn_id: ConnId) -> bool {
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

    fn refuse(&mut self, to: SocketAddr, transaction: u64, req: &Req, reason: RejectReason) {
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

    fn establish_passive(&mut self, conn_id: ConnId) {
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

    fn set_state(&mut self, conn_id: ConnId, state: State) {
        if let Some(conn) = self.conns.get_mut(&conn_id) {
            self.half_open -= usize::from(conn.state.is_half_open());
            conn.state = state;
            self.half_open += usize::from(state.is_half_open());
        }
    }

    fn remove(&mut self, conn_id: ConnId) {
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

    fn new_id(&mut self) -> ConnId {
        loop {
            let conn_id = ConnId(self.random.next_u32());
            if conn_id.0 != 0 && !self.conns.contains_key(&conn_id) {
                return conn_id;
            }
        }
    }

    fn send(&mut self, to: SocketAddr, mad: [u8; MAD_LEN_BYTES]) {
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

    fn arm(&mut self, conn_id: ConnId, at: Instant) {
        self.disarm(conn_id);
        if let Some(conn) = self.conns.get_mut(&conn_id) {
            conn.deadline = Some(at);
            self.timers.insert((at, conn_id));
        }
    }

    fn disarm(&mut self, conn_id: ConnId) {
        if let Some(at) = self
            .conns
            .get_mut(&conn_id)
            .and_then(|conn| conn.deadline.take())
        {
            self.timers.remove(&(at, conn_id));
        }
    }
}

impl State {
    const fn is_half_open(self) -> bool {
        matches!(self, Self::ReqReceived | Self::RepSent)
    }
}

impl Conn {
    /// Whether a datagram from that address can be the peer's. A standard RoCE peer chooses its
    /// source port freely (flow label), a FlexiNS peer has one.
    fn comes_from(&self, from: SocketAddr, exact: bool) -> bool {
        let exact = exact || self.peer.negotiated.params.is_some();
        if exact {
            self.peer.address == from
        } else {
            self.peer.address.ip() == from.ip()
        }
    }

    fn is_peer(&self, from: SocketAddr, peer_id: u32) -> bool {
        self.peer_id == Some(peer_id) && self.comes_from(from, false)
    }

    fn reject_mad(
        &self,
        conn_id: ConnId,
        about: About,
        reason: RejectReason,
        private: [u8; REJ_PRIVATE_LEN_BYTES],
    ) -> [u8; MAD_LEN_BYTES] {
        let remote_id = self.peer_id.unwrap_or_default();
        let message = Message::Rej(Rej {
            local_id: conn_id.0,
            remote_id,
            about,
            reason,
            private,
        });
        Mad {
            transaction: self.transaction,
            message,
        }
        .emit()
    }

    fn rtu_mad(&self, conn_id: ConnId) -> [u8; MAD_LEN_BYTES] {
        let remote_id = self.peer_id.unwrap_or_default();
        let message = Message::Rtu {
            local_id: conn_id.0,
            remote_id,
        };
        Mad {
            transaction: self.transaction,
            message,
        }
        .emit()
    }
}

/// FlexiNS peers are answered where they send from, standard ones at the port of RoCEv2.
fn reply_address(from: SocketAddr, params: Option<Params>) -> SocketAddr {
    if params.is_some() {
        from
    } else {
        SocketAddr::new(from.ip(), ROCE_PORT)
    }
}

/// Puts the application's bytes and, behind them, the parameters into a private-data area.
fn fill_private(area: &mut [u8], user: &[u8], params: Option<Params>) -> Result<(), CmError> {
    let max_bytes = if params.is_some() {
        PARAMS_OFFSET
    } else {
        area.len()
    };
    let Some(target) = area
        .get_mut(..user.len())
        .filter(|_| user.len() <= max_bytes)
    else {
        return Err(CmError::PrivateTooLong { max_bytes });
    };
    target.copy_from_slice(user);
    if let Some(params) = params {
        let _fits = params.clamped().emit(area);
        debug_assert!(_fits, "every area with parameters has 56 bytes");
    }
    Ok(())
}

/// The application's part of a received private-data area.
fn application_private(area: &[u8], with_params: bool) -> PrivateData {
    let len_bytes = if with_params {
        PARAMS_OFFSET
    } else {
        area.len()
    };
    PrivateData::from_prefix(area.get(..len_bytes).unwrap_or(area))
}

/// Exponent of a time in units of 4.096 us (IBA 12.6.5), rounded up, 5 bit.
fn timeout_code(time: Duration) -> u8 {
    let units = (time.as_nanos() / 4096).max(1);
    (128 - (units - 1).leading_zeros()).min(31) as u8
}

const fn check_u24(value: u32) -> Result<(), CmError> {
    if value <= U24_MAX {
        Ok(())
    } else {
        Err(CmError::Range)
    }
}

const _: () = assert!(REQ_USER_LEN_BYTES >= PARAMS_OFFSET + super::params::PARAMS_LEN_BYTES);
