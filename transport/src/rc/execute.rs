//! Requests of the peer carried out: WRITEs placed, messages delivered, READs queued.

use super::Env;
use super::psn_bits::WINDOW_BITS;
use super::request::{Request, packets_of, segment_of};
use super::responder::{Assembly, ReadJob, Verdict};
use crate::engine::{Delivery, DeliveryKind, HeldBuffer, Payload};
use crate::memory::MemoryFault;
use crate::qp::{Qp, Receive};
use crate::verbs::{
    Access, INLINE_RECV_MAX_BYTES, Rkey, WcOpcode, WcStatus, WcWord, WorkCompletion,
};
use crate::wire::{NakCode, Opcode, Reth};

impl Qp {
    /// Carries out a request that is in order.
    #[inline]
    pub(super) fn execute(&mut self, env: &mut Env, request: &Request<'_>) -> Verdict {
        if request.payload.len() > self.path.mtu as usize {
            return Verdict::Refuse(NakCode::InvalidRequest);
        }
        match request.opcode {
            Opcode::WriteOnly | Opcode::WriteOnlyImm => self.execute_write_only(env, request),
            Opcode::SendOnly | Opcode::SendOnlyImm | Opcode::SendOnlyInv => {
                if self.resp.assembly != Assembly::None {
                    return Verdict::Refuse(NakCode::InvalidRequest);
                }
                self.execute_send(env, request)
            }
            Opcode::ReadRequest => self.execute_read(env, request),
            Opcode::WriteFirst | Opcode::WriteMiddle | Opcode::WriteLast | Opcode::WriteLastImm => {
                self.execute_write_part(env, request)
            }
            Opcode::SendFirst
            | Opcode::SendMiddle
            | Opcode::SendLast
            | Opcode::SendLastImm
            | Opcode::SendLastInv => self.execute_send(env, request),
            _ => Verdict::Refuse(NakCode::InvalidRequest),
        }
    }

    fn execute_read(&mut self, env: &mut Env, request: &Request<'_>) -> Verdict {
        if self.resp.assembly != Assembly::None {
            return Verdict::Refuse(NakCode::InvalidRequest);
        }
        let Reth { addr, rkey, len } = request.reth;
        if len > 1 << 31 {
            return Verdict::Refuse(NakCode::InvalidRequest);
        }
        if !self.access.contains(Access::REMOTE_READ) {
            return Verdict::Refuse(NakCode::RemoteAccess);
        }
        if len > 0
            && let Err(fault) = env
                .mrs
                .remote(self.init.pd, rkey, addr, len, Access::REMOTE_READ)
        {
            return fault.into();
        }
        let packets = packets_of(len, self.path.mtu);
        if self.path.is_flexins() && packets > WINDOW_BITS {
            // The requester asks for as much as fits its window.
            return Verdict::Refuse(NakCode::InvalidRequest);
        }
        if !self.resp.queue_read(ReadJob {
            psn: request.psn,
            addr,
            rkey,
            left: len,
            segment: segment_of(len, self.path.mtu, self.path.framing) as u16,
            fresh: true,
        }) {
            env.counters.read_overflows += 1;
            return Verdict::Drop;
        }
        self.bump_msn();
        Verdict::Done(packets)
    }

    /// Puts the payload of a self-contained WRITE in its place.
    #[inline]
    pub(super) fn place(
        &mut self,
        env: &mut Env,
        request: &Request<'_>,
    ) -> Result<(), MemoryFault> {
        let payload = request.payload;
        if payload.is_empty() {
            return Ok(());
        }
        if !self.access.contains(Access::REMOTE_WRITE) {
            return Err(MemoryFault::Access);
        }
        let Reth { addr, rkey, .. } = request.reth;
        let span = env.mrs.remote(
            self.init.pd,
            rkey,
            addr,
            payload.len() as u32,
            Access::REMOTE_WRITE | Access::LOCAL_WRITE,
        )?;
        span.copy_from_slice(payload);
        env.counters.rx_payload_bytes_placed += payload.len() as u64;
        Ok(())
    }

    fn execute_write_only(&mut self, env: &mut Env, request: &Request<'_>) -> Verdict {
        if self.resp.assembly != Assembly::None
            || (!self.path.is_flexins() && request.reth.len as usize != request.payload.len())
        {
            return Verdict::Refuse(NakCode::InvalidRequest);
        }
        let has_imm = request.opcode == Opcode::WriteOnlyImm;
        if has_imm && self.rq.ready() == Receive::NotReady {
            return Verdict::NotReady;
        }
        // A held WRITE_WITH_IMM has no payload any more: it was placed when it came.
        if let Err(fault) = self.place(env, request) {
            return fault.into();
        }
        if has_imm {
            self.deliver_imm(env, request.word, request.reth.len, request.solicited);
        }
        self.bump_msn();
        Verdict::Done(1)
    }

    /// A packet of a WRITE in standard framing.
    fn execute_write_part(&mut self, env: &mut Env, request: &Request<'_>) -> Verdict {
        const INVALID: Verdict = Verdict::Refuse(NakCode::InvalidRequest);
        let len = request.payload.len() as u32;
        let (addr, rkey, left, total) = match (request.opcode, self.resp.assembly) {
            (Opcode::WriteFirst, Assembly::None) => {
                let Reth { addr, rkey, len } = request.reth;
                (addr, rkey, len, len)
            }
            (
                Opcode::WriteMiddle | Opcode::WriteLast | Opcode::WriteLastImm,
                Assembly::Write {
                    addr,
                    rkey,
                    left,
                    total,
                },
            ) => (addr, rkey, left, total),
            _ => return INVALID,
        };
        let ends = request.opcode.is_end();
        if (ends && len != left) || (!ends && (len != self.path.mtu || len >= left)) {
            return INVALID;
        }
        let has_imm = request.opcode == Opcode::WriteLastImm;
        if has_imm && self.rq.ready() == Receive::NotReady {
            return Verdict::NotReady;
        }
        if !self.access.contains(Access::REMOTE_WRITE) {
            return Verdict::Refuse(NakCode::RemoteAccess);
        }
        // The whole rest is checked with each packet: the key may be gone meanwhile.
        let need = Access::REMOTE_WRITE | Access::LOCAL_WRITE;
        match env.mrs.remote(self.init.pd, rkey, addr, left, need) {
            Ok(span) => {
                span.copy_from_slice(request.payload);
                env.counters.rx_payload_bytes_placed += u64::from(len);
            }
            Err(fault) => return fault.into(),
        }
        self.resp.assembly = if ends {
            Assembly::None
        } else {
            Assembly::Write {
                addr: addr.wrapping_add(u64::from(len)),
                rkey,
                left: left - len,
                total,
            }
        };
        if ends {
            if has_imm {
                self.deliver_imm(env, request.word, total, request.solicited);
            }
            self.bump_msn();
        }
        Verdict::Done(1)
    }

    /// A SEND, whole or in part.
    fn execute_send(&mut self, env: &mut Env, request: &Request<'_>) -> Verdict {
        const INVALID: Verdict = Verdict::Refuse(NakCode::InvalidRequest);
        let starts = request.opcode.is_send_start();
        let ends = request.opcode.is_end();
        let offset = match self.resp.assembly {
            Assembly::None if starts => 0,
            Assembly::Send { offset } if !starts => offset,
            _ => return INVALID,
        };
        let len = request.payload.len();
        let whole = if self.path.is_flexins() {
            len > 0
        } else {
            len == self.path.mtu as usize
        };
        if !ends && !whole {
            return INVALID;
        }
        let ready = self.rq.ready();
        match ready {
            Receive::NotReady if !starts => return INVALID,
            Receive::NotReady => return Verdict::NotReady,
            // Messages of several packets have no one place to be handed out from.
            Receive::InPlace if !(starts && ends) => return INVALID,
            Receive::InPlace | Receive::Posted => {}
        }
        if request.opcode.has_ieth()
            && let Err(fault) = env.mrs.invalidate(self.init.pd, request.word)
        {
            return fault.into();
        }
        if ready == Receive::InPlace {
            self.deliver_in_place(env, request);
        } else if let Err(refusal) = self.deliver_posted(env, request, offset, ends) {
            return refusal;
        }
        self.resp.assembly = if ends {
            Assembly::None
        } else {
            Assembly::Send {
                offset: offset.saturating_add(request.payload.len() as u32),
            }
        };
        if ends {
            self.bump_msn();
        }
        Verdict::Done(1)
    }

    #[inline]
    const fn bump_msn(&mut self) {
        self.resp.msn = self.resp.msn.wrapping_add(1) & 0x00FF_FFFF;
    }

    /// Uses up a credit for a message in one packet.
    #[inline]
    fn deliver_in_place(&mut self, env: &mut Env, request: &Request<'_>) {
        self.rq.take_credit();
        let payload = request.payload;
        let len = payload.len();
        if self.init.inline_recv && len <= INLINE_RECV_MAX_BYTES {
            let mut completion = self.completion(0, WcOpcode::Recv, WcStatus::Success);
            fill_word(&mut completion, request);
            completion.byte_len = len as u32;
            completion.inline_len = len as u8;
            if let Some(place) = completion.inline.get_mut(..len) {
                place.copy_from_slice(payload);
            }
            env.cqs
                .push_received(self.init.recv_cq, completion, request.solicited);
            return;
        }
        if self.init.inline_recv {
            env.cqs.release(self.init.recv_cq, 1);
        }
        let kind = match request.opcode {
            Opcode::SendOnlyImm => DeliveryKind::SendImm(request.word),
            Opcode::SendOnlyInv => DeliveryKind::SendInv(Rkey(request.word)),
            _ => DeliveryKind::Send,
        };
        let place = match request.payload_at {
            Some(at) => Payload::InPacket(at..at + len as u32),
            None => Payload::Held(HeldBuffer(payload.into())),
        };
        self.deliver(env, kind, place, len as u32);
    }

    fn deliver(&self, env: &mut Env, kind: DeliveryKind, payload: Payload, len: u32) {
        env.counters.deliveries += 1;
        env.deliveries.push_back(Delivery {
            qpn: self.qpn,
            user: self.init.user,
            kind,
            payload,
            len,
        });
    }

    /// Copies (a part of) a message into the posted buffer at the head.
    fn deliver_posted(
        &mut self,
        env: &mut Env,
        request: &Request<'_>,
        offset: u32,
        ends: bool,
    ) -> Result<(), Verdict> {
        let Some((wr_id, sges)) = self.rq.front() else {
            return Err(Verdict::NotReady);
        };
        let room: u64 = sges.iter().map(|sge| u64::from(sge.len)).sum();
        let end = u64::from(offset) + request.payload.len() as u64;
        let failure = if end > room {
            Some((WcStatus::LocLenErr, NakCode::InvalidRequest))
        } else if env
            .scatter(self.init.pd, sges, offset, request.payload)
            .is_err()
        {
            Some((WcStatus::LocProtErr, NakCode::RemoteOperational))
        } else {
            None
        };
        if let Some((status, code)) = failure {
            let completion = self.completion(wr_id, WcOpcode::Recv, status);
            self.rq.pop();
            env.cqs.push(self.init.recv_cq, completion);
            return Err(Verdict::Refuse(code));
        }
        if ends {
            let mut completion = self.completion(wr_id, WcOpcode::Recv, WcStatus::Success);
            fill_word(&mut completion, request);
            completion.byte_len = end as u32;
            self.rq.pop();
            env.cqs
                .push_received(self.init.recv_cq, completion, request.solicited);
        }
        Ok(())
    }

    /// Reports a WRITE_WITH_IMM of `len` bytes; a receive request or credit is there.
    fn deliver_imm(&mut self, env: &mut Env, imm: u32, len: u32, solicited: bool) {
        let wr_id = match self.rq.front() {
            Some((wr_id, _)) => {
                self.rq.pop();
                wr_id
            }
            None => {
                self.rq.take_credit();
                if !self.init.inline_recv {
                    let nothing = Payload::InPacket(0..0);
                    return self.deliver(env, DeliveryKind::WriteImm(imm), nothing, len);
                }
                0
            }
        };
        let mut completion = self.completion(wr_id, WcOpcode::RecvRdmaWithImm, WcStatus::Success);
        completion.word = imm;
        completion.word_kind = WcWord::Imm;
        completion.byte_len = len;
        env.cqs
            .push_received(self.init.recv_cq, completion, solicited);
    }
}

/// Immediate value or invalidated key of a SEND.
fn fill_word(completion: &mut WorkCompletion, request: &Request<'_>) {
    completion.word = request.word;
    completion.word_kind = if request.opcode.has_imm() {
        WcWord::Imm
    } else if request.opcode.has_ieth() {
        WcWord::Invalidated
    } else {
        WcWord::None
    };
}
