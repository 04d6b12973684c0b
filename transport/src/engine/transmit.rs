//! Packets out: queue pairs with something to send take turns.

use std::collections::VecDeque;
use std::time::Instant;

use super::sink::{PacketShape, TrainSink};
use super::timers::Timers;
use super::{Engine, find};
use crate::cm::{GSI_QKEY, GSI_QPN, MAD_LEN_BYTES};
use crate::qp::{NEVER, Qp};
use crate::rc::{CRC_LEN_BYTES, Progress};
use crate::verbs::Qpn;
use crate::wire::{BTH_LEN_BYTES, Bth, DETH_LEN_BYTES, Deth, Opcode, Psn};

/// Packets of a queue pair before the next one has its turn: about one train.
const TURN_PACKETS: u32 = 64;

impl Engine {
    /// Writes packets into `sink` until nothing is left to send or the sink has no room. True when
    /// something is left: call again when the sink has room.
    pub fn poll_transmit<S: TrainSink>(&mut self, now: Instant, sink: &mut S) -> bool {
        if !self.transmit_mads(sink) {
            return true;
        }
        if self.active.is_empty() {
            return false;
        }
        let now = self.clock.ns(now);
        while let Some(slot) = self.active.pop_front() {
            let Some(qp) = self.qps.get_mut(slot as usize).and_then(Option::as_mut) else {
                continue;
            };
            let progress = crate::rc::transmit(qp, &mut self.env, now, sink, TURN_PACKETS);
            match progress {
                Progress::Idle => qp.active = false,
                Progress::More => self.active.push_back(slot),
                Progress::Full => self.active.push_front(slot),
            }
            let deadline = qp.req.deadline();
            if deadline != NEVER {
                self.timers.ensure(slot, deadline);
            }
            if progress == Progress::Full {
                return true;
            }
        }
        false
    }

    /// Datagrams of the connection manager; false when the sink is full.
    fn transmit_mads<S: TrainSink>(&mut self, sink: &mut S) -> bool {
        const HEAD: usize = BTH_LEN_BYTES + DETH_LEN_BYTES + MAD_LEN_BYTES;
        loop {
            let Some((to, mad)) = self.waiting_mad.take().or_else(|| self.cm.poll_transmit())
            else {
                return true;
            };
            let shape = PacketShape {
                to,
                head: HEAD as u16,
                payload: 0,
                trailer: CRC_LEN_BYTES as u8,
            };
            let Some(slot) = sink.open(&shape) else {
                self.waiting_mad = Some((to, mad));
                return false;
            };
            let bth = Bth {
                opcode: Opcode::UdSendOnly,
                solicited: false,
                pad: 0,
                dest_qpn: Qpn::new(GSI_QPN),
                ack_req: false,
                psn: Psn::new(self.mad_psn),
            };
            self.mad_psn = self.mad_psn.wrapping_add(1);
            let deth = Deth {
                qkey: GSI_QKEY,
                source_qpn: GSI_QPN,
            };
            let (bth_slot, rest) = slot.split_at_mut(BTH_LEN_BYTES);
            let (deth_slot, mad_slot) = rest.split_at_mut(DETH_LEN_BYTES);
            bth_slot.copy_from_slice(&bth.emit());
            deth_slot.copy_from_slice(&deth.emit());
            mad_slot.copy_from_slice(&mad);
            let crc = crate::digest::crc32c(slot);
            sink.close(&crc.to_le_bytes());
            self.env.counters.mads_tx += 1;
            self.env.counters.packets_tx += 1;
        }
    }

    /// When [`Engine::handle_timeout`] wants to be called; may be early, never late.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Instant> {
        let acks = self.ack_list.front().map(|&(at, _)| at);
        let own = self.timers.peek().into_iter().chain(acks).min();
        let own = own.and_then(|ns| self.clock.instant(ns));
        own.into_iter().chain(self.cm.next_timeout()).min()
    }

    /// Acts on deadlines that have come.
    pub fn handle_timeout(&mut self, now: Instant) {
        let now_ns = self.clock.ns(now);
        while let Some((_, slot)) = self.ack_list.pop_front_if(|(at, _)| *at <= now_ns) {
            let Some(qp) = self.qps.get_mut(slot as usize).and_then(Option::as_mut) else {
                continue;
            };
            let due = qp.resp.ack_at;
            if due == NEVER {
                qp.in_ack_list = false;
            } else if due > now_ns {
                self.ack_list.push_back((due, slot));
            } else {
                qp.in_ack_list = false;
                qp.resp.acknowledge_now();
                let qpn = qp.qpn;
                self.settle(qpn);
            }
        }
        while let Some(slot) = self.timers.pop_due(now_ns) {
            let Some(qp) = self.qps.get_mut(slot as usize).and_then(Option::as_mut) else {
                continue;
            };
            qp.on_timer(&mut self.env, now_ns);
            let qpn = qp.qpn;
            self.settle(qpn);
        }
        self.cm.handle_timeout(now);
        self.pump_cm();
    }

    /// Makes every delayed acknowledgement due now: before the thread goes to sleep.
    pub fn flush_acks(&mut self) {
        while let Some((_, slot)) = self.ack_list.pop_front() {
            let Some(qp) = self.qps.get_mut(slot as usize).and_then(Option::as_mut) else {
                continue;
            };
            qp.in_ack_list = false;
            if qp.resp.unacked > 0 {
                qp.resp.acknowledge_now();
                let qpn = qp.qpn;
                self.settle(qpn);
            }
        }
    }

    /// After an event at a queue pair: its turn to send, its timers, its acknowledgement.
    pub(super) fn settle(&mut self, qpn: Qpn) {
        if let Some(qp) = find(&mut self.qps, self.slot_mask, qpn) {
            let slot = qpn.get() & self.slot_mask;
            settle(
                qp,
                slot,
                &mut self.active,
                &mut self.ack_list,
                &mut self.timers,
            );
        }
    }
}

/// The same with the queue pair at hand.
#[inline]
pub(super) fn settle(
    qp: &mut Qp,
    slot: u32,
    active: &mut VecDeque<u32>,
    ack_list: &mut VecDeque<(u64, u32)>,
    timers: &mut Timers,
) {
    if !qp.active && (qp.resp.has_responses() || qp.has_requests()) && qp.may_transmit() {
        qp.active = true;
        active.push_back(slot);
    }
    if !qp.in_ack_list && qp.resp.ack_at != NEVER {
        qp.in_ack_list = true;
        ack_list.push_back((qp.resp.ack_at, slot));
    }
    let deadline = qp.req.deadline();
    if deadline != NEVER {
        timers.ensure(slot, deadline);
    }
}
