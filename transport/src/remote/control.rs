//! What goes through an engine thread's mailbox, and what comes back.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use flexblk_reactor::{SharedMemory, Span};

use super::RemoteError;
use super::client::Connected;
use crate::cm::{ConnId, DisconnectReason, Params, PrivateData, RejectReason, ServiceId};
use crate::counters::Counters;
use crate::pipe::{EventFd, Ring};
use crate::port::PortCounters;
use crate::verbs::{Access, AckRequest, Lkey, MAX_SGE, Mr, Qpn, WcStatus};

/// Size of a queue pair of a client.
#[derive(Clone, Copy, Debug)]
pub struct QueuePairConfig {
    /// Send requests outstanding at most.
    pub max_send_wr: u32,
    /// Receive requests posted at most.
    pub max_recv_wr: u32,
    /// Entries of a request's list at most.
    pub max_sge: u32,
    /// Inline bytes of a send request at most (up to [`super::INLINE_MAX_BYTES`]).
    pub max_inline: u32,
    /// When requests ask for their acknowledgement.
    pub ack_request: AckRequest,
}

impl Default for QueuePairConfig {
    fn default() -> Self {
        Self {
            max_send_wr: 128,
            max_recv_wr: 128,
            max_sge: 4,
            max_inline: 64,
            ack_request: AckRequest::default(),
        }
    }
}

impl QueuePairConfig {
    pub(super) fn clamped(self) -> Self {
        Self {
            max_sge: self.max_sge.min(MAX_SGE as u32),
            max_inline: self.max_inline.min(super::INLINE_MAX_BYTES as u32),
            ..self
        }
    }
}

/// A peer that wants to connect.
#[derive(Clone, Debug)]
pub struct Incoming {
    /// Connection, for accept or reject.
    pub conn: ConnId,
    /// Peer.
    pub from: SocketAddr,
    /// Service that it wants.
    pub service: ServiceId,
    /// Its private data.
    pub private: PrivateData,
    /// What an accept will agree on; `None` is standard RoCEv2.
    pub params: Option<Params>,
}

/// What happened to a client's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientEvent {
    /// An accepted connection is ready.
    Established {
        /// Queue pair.
        qpn: Qpn,
    },
    /// The peer of an accepted connection did not come: refused or silent.
    Failed {
        /// Queue pair.
        qpn: Qpn,
    },
    /// The connection is over and the queue pair flushed.
    Disconnected {
        /// Queue pair.
        qpn: Qpn,
        /// Whose doing.
        reason: DisconnectReason,
    },
    /// The queue pair went to the error state and is flushed.
    Broken {
        /// Queue pair.
        qpn: Qpn,
        /// The error.
        status: WcStatus,
    },
}

/// What an engine thread has counted, for all of its clients together.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineCounters {
    /// Events of the engine.
    pub engine: Counters,
    /// Events of its port.
    pub port: PortCounters,
    /// System calls of its reactor.
    pub enters: u64,
}

/// A client in its engine thread's table: slot and generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TenantId {
    pub(super) slot: u32,
    pub(super) generation: u32,
}

impl TenantId {
    /// As the `user` word of its queue pairs.
    pub(super) const fn to_user(self) -> u64 {
        (self.generation as u64) << 32 | self.slot as u64
    }

    pub(super) const fn from_user(user: u64) -> Self {
        Self {
            slot: user as u32,
            generation: (user >> 32) as u32,
        }
    }
}

/// Where an answer goes. When it is dropped the caller learns that the engine thread is gone.
pub(super) type Reply<T> = SyncSender<Result<T, RemoteError>>;

/// What a new client brings.
#[derive(Debug)]
pub(super) struct NewTenant {
    pub(super) requests: Ring,
    pub(super) completions: Ring,
    pub(super) bell: EventFd,
    pub(super) events: SyncSender<ClientEvent>,
    /// Completions that the client has room for.
    pub(super) capacity: u32,
}

/// A control call.
#[derive(Debug)]
pub(super) enum Control {
    Attach {
        tenant: NewTenant,
        reply: Reply<TenantId>,
    },
    Of {
        id: TenantId,
        call: Call,
    },
    Stop,
    #[cfg(test)]
    Crash,
}

/// A control call of a client.
#[derive(Debug)]
pub(super) enum Call {
    Register {
        memory: Arc<SharedMemory>,
        offset_bytes: u64,
        len_bytes: u64,
        access: Access,
        reply: Reply<Mr>,
    },
    RegisterSpan {
        memory: Span,
        access: Access,
        reply: Reply<Mr>,
    },
    Deregister {
        lkey: Lkey,
        reply: Reply<()>,
    },
    Counters {
        reply: Reply<EngineCounters>,
    },
    CreateQp {
        config: QueuePairConfig,
        reply: Reply<Qpn>,
    },
    DestroyQp {
        qpn: Qpn,
        reply: Reply<()>,
    },
    Listen {
        service: ServiceId,
        incoming: SyncSender<Incoming>,
        reply: Reply<()>,
    },
    Connect {
        qpn: Qpn,
        to: SocketAddr,
        service: ServiceId,
        private: PrivateData,
        reply: Reply<Connected>,
    },
    Accept {
        conn: ConnId,
        qpn: Qpn,
        private: PrivateData,
        reply: Reply<()>,
    },
    Reject {
        conn: ConnId,
        reason: RejectReason,
        private: PrivateData,
        reply: Reply<()>,
    },
    Disconnect {
        qpn: Qpn,
        reply: Reply<()>,
    },
}
