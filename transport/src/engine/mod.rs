//! The engine: owns queue pairs, memory, completions and connections; sans-IO.
//!
//! Calling order: [`Engine::handle_packet`] for each received packet, and after each
//! [`Engine::poll_delivery`] until `None`; [`Engine::handle_timeout`] when [`Engine::next_timeout`]
//! has come; [`Engine::poll_cm`] and [`Engine::poll_cq`] for what happened; then
//! [`Engine::poll_transmit`] until it answers false. Verbs can be called at any time in between.
//! `now` is always an argument; there is no clock, socket or thread inside.

mod config;
mod connect;
mod delivery;
pub(crate) mod random;
mod receive;
mod sink;
mod timers;
mod transmit;
mod verbs;

pub use config::{EngineConfig, TxMode};
pub use delivery::{Delivery, DeliveryKind, HeldBuffer, Payload};
pub use sink::{PacketShape, TrainSink};

use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use crate::cm::{
    CmError, CmManager, ConnId, MAD_LEN_BYTES, Params, PrivateData, RejectReason, ServiceId,
};
use crate::counters::Counters;
use crate::cq::CqTable;
use crate::memory::MemoryTable;
use crate::qp::Qp;
use crate::rc::{Env, Limits};
use crate::verbs::{Pd, Qpn, VerbsError, WcStatus};
use random::Random;
use timers::Timers;

/// Owner of everything that a thread's transport consists of, its port aside.
pub struct Engine {
    config: EngineConfig,
    env: Env,
    /// By the low bits of the queue pair number.
    qps: Vec<Option<Box<Qp>>>,
    slot_mask: u32,
    /// Queue pairs with something to send, by slot.
    active: VecDeque<u32>,
    /// Delayed acknowledgements: (not due before, slot). All wait equally long.
    ack_list: VecDeque<(u64, u32)>,
    timers: Timers,
    clock: Clock,
    free_slots: VecDeque<u32>,
    pds: Vec<Pd>,
    next_pd: u32,
    random: Random,
    cm: CmManager,
    conns: BTreeMap<ConnId, Qpn>,
    conn_events: VecDeque<ConnEvent>,
    waiting_mad: Option<(SocketAddr, [u8; MAD_LEN_BYTES])>,
    mad_psn: u32,
    local: SocketAddr,
}

/// Times as nanoseconds since the first one seen.
#[derive(Clone, Copy, Debug, Default)]
struct Clock {
    start: Option<Instant>,
    /// The last time converted: packets of a batch come with the same one.
    last: Option<(Instant, u64)>,
}

impl Clock {
    #[inline]
    fn ns(&mut self, now: Instant) -> u64 {
        match self.last {
            Some((last, ns)) if last == now => ns,
            _ => self.convert(now),
        }
    }

    fn convert(&mut self, now: Instant) -> u64 {
        let start = *self.start.get_or_insert(now);
        let ns = now.saturating_duration_since(start).as_nanos() as u64;
        self.last = Some((now, ns));
        ns
    }

    fn instant(&self, ns: u64) -> Option<Instant> {
        self.start?.checked_add(Duration::from_nanos(ns))
    }
}

#[inline]
fn find(qps: &mut [Option<Box<Qp>>], slot_mask: u32, qpn: Qpn) -> Option<&mut Qp> {
    let qp = qps
        .get_mut((qpn.get() & slot_mask) as usize)?
        .as_deref_mut()?;
    (qp.qpn == qpn).then_some(qp)
}

impl Engine {
    /// An engine. The seed decides sequence numbers, queue pair numbers and keys: it must be
    /// secret (from the operating system) wherever peers are not trusted.
    #[must_use]
    pub fn new(config: EngineConfig, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let cm_seed = u64::from(random.next_u32()) << 32 | u64::from(random.next_u32());
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 4);
        let limits = Limits {
            ack_delay_ns: ns(config.ack_delay),
            ack_coalesce: config.ack_coalesce.clamp(1, (config.window / 4).max(1)),
            min_rto_ns: ns(config.min_rto).max(1),
            max_rto_ns: ns(config.max_rto),
            retry_time_ns: ns(config.retry_time),
            rnr_code: crate::rc::rnr_code_for(ns(config.rnr_delay)),
            hold_budget_bytes: config.hold_budget_bytes,
            tx: config.tx,
        };
        // A slot is at most 16 bits of the number, so that at least eight are random.
        let slots = config.max_qps.clamp(1, 1 << 16).next_power_of_two() as u32;
        let env = Env {
            limits,
            mrs: MemoryTable::new(config.max_mrs),
            cqs: CqTable::new(config.max_cqs),
            counters: Counters::default(),
            deliveries: VecDeque::new(),
            held_bytes: 0,
            broken: VecDeque::new(),
        };
        Self {
            cm: CmManager::new(config.cm.clone(), cm_seed),
            config,
            env,
            qps: Vec::new(),
            slot_mask: slots - 1,
            active: VecDeque::new(),
            ack_list: VecDeque::new(),
            timers: Timers::new(),
            clock: Clock::default(),
            free_slots: VecDeque::new(),
            pds: Vec::new(),
            next_pd: 0,
            random,
            conns: BTreeMap::new(),
            conn_events: VecDeque::new(),
            waiting_mad: None,
            mad_psn: 0,
            local: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        }
    }

    /// Configuration.
    #[must_use]
    pub const fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Event counters.
    #[must_use]
    pub const fn counters(&self) -> &Counters {
        &self.env.counters
    }

    /// Bytes of messages that wait because they arrived ahead of a gap.
    #[must_use]
    pub const fn held_bytes(&self) -> usize {
        self.env.held_bytes
    }

    fn qp(&self, qpn: Qpn) -> Option<&Qp> {
        let qp = self
            .qps
            .get((qpn.get() & self.slot_mask) as usize)?
            .as_deref()?;
        (qp.qpn == qpn).then_some(qp)
    }
}

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
