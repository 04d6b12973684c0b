//! From a datagram to the queue pair that it is for. Nothing here trusts a byte.

use std::net::SocketAddr;
use std::time::Instant;

use super::transmit::settle;
use super::{Delivery, Engine};
use crate::cm::{GSI_QKEY, GSI_QPN};
use crate::qp::Qp;
use crate::rc::{CRC_LEN_BYTES, Env, Request, checksum_ok};
use crate::verbs::{Digest, QpState};
use crate::wire::sack::Sack;
use crate::wire::trailer::{FACK_LEN_BYTES, FLEXINS_LEN_BYTES, Fack};
use crate::wire::{Aeth, BTH_LEN_BYTES, Bth, DETH_LEN_BYTES, Deth, Opcode, Probe, Syndrome};

impl Engine {
    /// Takes a received packet. Afterwards [`Engine::poll_delivery`] has to be called until `None`,
    /// while `packet` is still there.
    pub fn handle_packet(&mut self, now: Instant, from: SocketAddr, packet: &[u8]) {
        self.env.counters.packets_rx += 1;
        if !self.env.deliveries.is_empty() {
            // They may point into a packet that is gone; this one will be repeated.
            self.env.counters.undrained += 1;
            return;
        }
        let Some(bth) = Bth::parse(packet) else {
            self.env.counters.malformed += 1;
            return;
        };
        if bth.dest_qpn.get() == GSI_QPN {
            return self.handle_mad(now, from, &bth, packet);
        }
        let now_ns = self.clock.ns(now);
        let qpn = bth.dest_qpn;
        let env = &mut self.env;
        let Some(qp) = super::find(&mut self.qps, self.slot_mask, qpn) else {
            env.counters.unknown_qpn += 1;
            return;
        };
        if !qp.path.is_peer(from) {
            env.counters.wrong_peer += 1;
            return;
        }
        if !qp.state.can_receive() && qp.state != QpState::Error {
            env.counters.wrong_state += 1;
            return;
        }
        let Some(end) = packet.len().checked_sub(usize::from(qp.path.trailer_len)) else {
            env.counters.malformed += 1;
            return;
        };
        if qp.path.digest == Digest::Crc32c && !checksum_ok(packet) {
            env.counters.crc_failures += 1;
            return;
        }
        let Some(request) = Request::parse(&bth, packet, end) else {
            env.counters.malformed += 1;
            return;
        };
        if qp.state == QpState::Error {
            env.counters.wrong_state += 1;
            if bth.opcode.is_request() || bth.opcode == Opcode::Probe {
                qp.on_request_after_failure();
            }
            return self.settle(qpn);
        }
        if !qp.resp.heard {
            qp.resp.heard = true;
            if let Some(conn) = qp.conn {
                // As good as the peer's ReadyToUse, which may be lost or late.
                self.cm.communication_established(conn);
                self.pump_cm();
            }
            return self.dispatch(now_ns, &bth, packet);
        }
        dispatch(qp, &mut self.env, now_ns, &bth, packet, &request);
        let slot = qpn.get() & self.slot_mask;
        settle(
            qp,
            slot,
            &mut self.active,
            &mut self.ack_list,
            &mut self.timers,
        );
    }

    /// Looks up the queue pair again and goes on: for the first packet of a connection.
    #[cold]
    fn dispatch(&mut self, now: u64, bth: &Bth, packet: &[u8]) {
        let qpn = bth.dest_qpn;
        if let Some(qp) = super::find(&mut self.qps, self.slot_mask, qpn)
            && let Some(end) = packet.len().checked_sub(usize::from(qp.path.trailer_len))
            && let Some(request) = Request::parse(bth, packet, end)
            && qp.state.can_receive()
        {
            dispatch(qp, &mut self.env, now, bth, packet, &request);
        }
        self.settle(qpn);
    }

    /// Next message that the packet has brought; until `None` after each packet.
    #[inline]
    pub fn poll_delivery(&mut self) -> Option<Delivery> {
        self.env.deliveries.pop_front()
    }

    /// What a packet that has not been handled yet seems to bring: the `user` word of a queue pair, and
    /// the message, if it is a SEND of one packet. Neither digest nor order nor length are checked, so
    /// it may only decide what memory is loaded into the cache ahead, never what is done.
    #[inline]
    #[must_use]
    pub fn foresee<'a>(&self, packet: &'a [u8]) -> Option<(u64, &'a [u8])> {
        let bth = Bth::parse(packet).filter(|bth| bth.opcode == Opcode::SendOnly)?;
        let slot = (bth.dest_qpn.get() & self.slot_mask) as usize;
        let qp = self.qps.get(slot)?.as_deref()?;
        if qp.qpn != bth.dest_qpn {
            return None;
        }
        let end = packet.len().checked_sub(qp.path.trailer_len.into())?;
        let message = packet.get(bth.opcode.header_len()..end)?;
        Some((qp.init.user, message))
    }

    /// A datagram to queue pair 1.
    fn handle_mad(&mut self, now: Instant, from: SocketAddr, bth: &Bth, packet: &[u8]) {
        let counters = &mut self.env.counters;
        if bth.opcode != Opcode::UdSendOnly {
            counters.malformed += 1;
            return;
        }
        if !checksum_ok(packet) {
            counters.crc_failures += 1;
            return;
        }
        let start = BTH_LEN_BYTES + DETH_LEN_BYTES;
        let deth = Deth::parse(packet, BTH_LEN_BYTES).filter(|deth| deth.qkey == GSI_QKEY);
        let mad = packet.get(start..packet.len() - CRC_LEN_BYTES);
        let (Some(_), Some(mad)) = (deth, mad) else {
            counters.malformed += 1;
            return;
        };
        counters.mads_rx += 1;
        self.cm.handle_mad(now, from, mad);
        self.pump_cm();
    }
}

/// Gives a packet that has passed every check to the half of the queue pair that it is for.
#[inline]
fn dispatch(qp: &mut Qp, env: &mut Env, now: u64, bth: &Bth, packet: &[u8], request: &Request<'_>) {
    if qp.path.is_flexins()
        && let Some((_, trailer)) = packet.split_last_chunk::<FLEXINS_LEN_BYTES>()
        && let Some(fack) = trailer.first_chunk::<FACK_LEN_BYTES>()
        && let Some(psn) = Fack::parse(*fack).cumulative
    {
        qp.on_cumulative(env, now, psn);
    }
    match bth.opcode {
        opcode if opcode.is_request() => qp.on_request(env, now, request),
        opcode if opcode.is_read_response() => qp.on_read_response(env, now, request),
        Opcode::Acknowledge => match Syndrome::from_u8((request.word >> 24) as u8) {
            Some(syndrome) => {
                let aeth = Aeth {
                    syndrome,
                    msn: request.word & 0x00FF_FFFF,
                };
                qp.on_aeth(env, now, bth.psn, aeth);
            }
            None => env.counters.malformed += 1,
        },
        Opcode::Sack if qp.path.is_flexins() => match Sack::parse(bth, request.payload) {
            Some(sack) => qp.on_sack(env, now, &sack),
            None => env.counters.malformed += 1,
        },
        Opcode::Probe if qp.path.is_flexins() => match Probe::parse(request.payload, 0) {
            Some(probe) => qp.on_probe(env, bth.psn, probe.token),
            None => env.counters.malformed += 1,
        },
        _ => env.counters.malformed += 1,
    }
}
