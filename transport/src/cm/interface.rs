//! What callers of the manager see: limits, arguments, events, errors, counters.

use std::net::SocketAddr;
use std::time::Duration;

use super::mad::{PrivateData, RejectReason, ServiceId};
use super::params::Params;

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

/// What [`CmManager::connect`](super::CmManager::connect) needs.
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

/// What [`CmManager::accept`](super::CmManager::accept) needs.
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
