//! The reliable connection: requester, responder, loss recovery. Sans-IO; times in nanoseconds.

mod execute;
mod packet;
mod psn_bits;
pub(crate) mod request;
mod requester;
mod responder;
mod rnr;
mod rtt;
mod scoreboard;
mod transmit;

pub(crate) use packet::{CRC_LEN_BYTES, checksum_ok};
pub(crate) use request::Request;
pub(crate) use requester::Requester;
pub(crate) use responder::Responder;
pub(crate) use rnr::code_for as rnr_code_for;
pub(crate) use transmit::{Progress, transmit};

use std::collections::VecDeque;

use crate::counters::Counters;
use crate::cq::CqTable;
use crate::engine::{Delivery, TxMode};
use crate::memory::MemoryTable;
use crate::verbs::{Qpn, WcStatus};

/// Times and limits that connections need, in the engine's units.
pub(crate) struct Limits {
    pub(crate) ack_delay_ns: u64,
    pub(crate) ack_coalesce: u32,
    pub(crate) min_rto_ns: u64,
    pub(crate) max_rto_ns: u64,
    pub(crate) retry_time_ns: u64,
    pub(crate) rnr_code: u8,
    pub(crate) hold_budget_bytes: usize,
    pub(crate) tx: TxMode,
}

/// What all queue pairs of an engine share.
pub(crate) struct Env {
    pub(crate) limits: Limits,
    pub(crate) mrs: MemoryTable,
    pub(crate) cqs: CqTable,
    pub(crate) counters: Counters,
    pub(crate) deliveries: VecDeque<Delivery>,
    /// Bytes in hold stores of all queue pairs.
    pub(crate) held_bytes: usize,
    /// Queue pairs that failed and whose owner has not been told: each at most once.
    pub(crate) broken: VecDeque<(Qpn, u64, WcStatus)>,
}
