//! The engine: owns queue pairs, memory, completions and connections; sans-IO.
//!
//! Calling order: [`Engine::handle_packet`] for each received packet, and after each
//! [`Engine::poll_delivery`] until `None`; [`Engine::handle_timeout`] when [`Engine::next_timeout`]
//! has come; [`Engine::poll_cm`] and [`Engine::poll_cq`] for what happened; then
//! [`Engine::poll_transmit`] until it answers false. Verbs can be called at any time in between.
//! `now` is always an argument; there is no clock, socket or thread inside.

mod config;
mod delivery;
pub(crate) mod random;
mod sink;

pub use config::{EngineConfig, TxMode};
pub use delivery::{Delivery, DeliveryKind, HeldBuffer, Payload};
pub use sink::{PacketShape, TrainSink};

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use flexblk_reactor::{SharedMemory, Span};

use crate::cm::{CmError, ConnId, Params, PrivateData, RejectReason, ServiceId};
use crate::counters::Counters;
use crate::verbs::{
    Access, Cq, Lkey, Modify, Mr, Pd, PostError, QpAttributes, QpInit, Qpn, RecvWr, Rkey, SendWr,
    VerbsError, WcStatus, WorkCompletion,
};

/// What happened to a connection.
#[derive(Clone, Debug)]
pub enum ConnEvent {
    /// A peer wants to connect: answer with [`Engine::accept`] or [`Engine::reject`].
    ConnectRequest {
        /// Connection.
        conn: ConnId,
        /// Peer.
        from: SocketAddr,
        /// Service that it wants.
        service: ServiceId,
        /// Its application's private data.
        private: PrivateData,
        /// What an accept will agree on; `None` is standard RoCEv2.
        params: Option<Params>,
    },
    /// Both ends are ready; the queue pair is ready to send.
    Established {
        /// Connection.
        conn: ConnId,
        /// Our queue pair.
        qpn: Qpn,
        /// Its `user` word.
        user: u64,
        /// Private data of the acceptance; empty at the accepting end.
        private: PrivateData,
        /// What was agreed; `None` is standard RoCEv2.
        params: Option<Params>,
        /// Payload bytes of a packet.
        mtu_bytes: u32,
    },
    /// The peer refused.
    Rejected {
        /// Connection, gone now.
        conn: ConnId,
        /// Our queue pair; it can connect again.
        qpn: Qpn,
        /// Its `user` word.
        user: u64,
        /// Why.
        reason: RejectReason,
        /// Private data of the refusal.
        private: PrivateData,
    },
    /// Nobody answered.
    Unreachable {
        /// Connection, gone now.
        conn: ConnId,
        /// Our queue pair; it can connect again.
        qpn: Qpn,
        /// Its `user` word.
        user: u64,
    },
    /// The connection is over; the queue pair is in the error state and flushed.
    Disconnected {
        /// Our queue pair.
        qpn: Qpn,
        /// Its `user` word.
        user: u64,
        /// Whose doing.
        reason: crate::cm::DisconnectReason,
    },
    /// The queue pair went to the error state by itself and is flushed; disconnect and destroy it.
    Broken {
        /// Our queue pair.
        qpn: Qpn,
        /// Its `user` word.
        user: u64,
        /// The error that was reported, or is reported by the peer.
        status: WcStatus,
    },
}

/// Why a connection call was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The queue pair is unknown or in the wrong state.
    #[error(transparent)]
    Verbs(#[from] VerbsError),
    /// The connection manager refused.
    #[error(transparent)]
    Cm(#[from] CmError),
    /// The queue pair has a connection already.
    #[error("the queue pair has a connection already")]
    Busy,
}
