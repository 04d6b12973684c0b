//! Verbs of the engine: domains, memory, completion queues, queue pairs, work requests.

use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use flexblk_reactor::{SharedMemory, Span};

use super::Engine;
use crate::qp::Qp;
use crate::verbs::{
    Access, Cq, Lkey, MAX_SGE, Modify, Mr, NotifyOn, Pd, PostError, QpAttributes, QpInit, QpState,
    Qpn, RecvWr, Rkey, SendWr, VerbsError, WcOpcode, WcStatus, WorkCompletion,
};
use crate::wire::Psn;

/// Work requests of a queue at most.
const MAX_WR: u32 = 1 << 16;
/// Inline bytes of a request at most.
const MAX_INLINE_BYTES: u32 = 1024;

impl Engine {
    /// A new protection domain.
    pub fn alloc_pd(&mut self) -> Pd {
        self.next_pd += 1;
        let pd = Pd(self.next_pd);
        self.pds.push(pd);
        pd
    }

    /// Gives a domain up; it must have no memory regions and queue pairs.
    pub fn dealloc_pd(&mut self, pd: Pd) -> Result<(), VerbsError> {
        if self.env.mrs.uses(pd) || self.qps.iter().flatten().any(|qp| qp.init.pd == pd) {
            return Err(VerbsError::InUse("protection domain"));
        }
        let at = self.pds.iter().position(|known| *known == pd);
        self.pds
            .swap_remove(at.ok_or(VerbsError::Unknown("protection domain"))?);
        Ok(())
    }

    /// Registers a span. It stays mapped until [`Engine::deregister`] has returned and the trains
    /// built before have left.
    pub fn register(&mut self, pd: Pd, span: Span, access: Access) -> Result<Mr, VerbsError> {
        self.known_pd(pd)?;
        let ptr = NonNull::new(span.as_ptr()).ok_or(VerbsError::Parameter("address"))?;
        self.env.mrs.register(
            pd,
            ptr,
            u64::from(span.len()),
            access,
            None,
            &mut self.random,
        )
    }

    /// Registers a part of shared memory, which stays mapped as long as it is registered.
    pub fn register_memory(
        &mut self,
        pd: Pd,
        memory: &Arc<SharedMemory>,
        offset: u64,
        len: u64,
        access: Access,
    ) -> Result<Mr, VerbsError> {
        self.known_pd(pd)?;
        if offset > memory.len() || len > memory.len() - offset {
            return Err(VerbsError::Parameter("range of shared memory"));
        }
        let ptr = NonNull::new(memory.as_ptr().wrapping_add(offset as usize))
            .ok_or(VerbsError::Parameter("address"))?;
        let keep = Some(Arc::clone(memory));
        self.env
            .mrs
            .register(pd, ptr, len, access, keep, &mut self.random)
    }

    /// Gives a region a new remote key, after the peer has invalidated the old one.
    pub fn rekey(&mut self, lkey: Lkey) -> Result<Rkey, VerbsError> {
        self.env.mrs.rekey(lkey, &mut self.random)
    }

    /// Ends a registration. Requests that still use it fail with `LOC_PROT_ERR`.
    pub fn deregister(&mut self, lkey: Lkey) -> Result<(), VerbsError> {
        self.env.mrs.deregister(lkey)
    }

    /// Registered regions.
    #[must_use]
    pub fn memory_regions(&self) -> usize {
        self.env.mrs.len()
    }

    /// A completion queue for so many completions.
    pub fn create_cq(&mut self, capacity: u32) -> Result<Cq, VerbsError> {
        self.env.cqs.create(capacity)
    }

    /// Removes a completion queue that no queue pair uses.
    pub fn destroy_cq(&mut self, cq: Cq) -> Result<(), VerbsError> {
        self.env.cqs.destroy(cq)
    }

    /// Appends every completion of a queue to `out`; how many there were.
    pub fn poll_cq(&mut self, cq: Cq, out: &mut Vec<WorkCompletion>) -> usize {
        let Some(queue) = self.env.cqs.get_mut(cq) else {
            return 0;
        };
        let before = out.len();
        while let Some(completion) = queue.pop() {
            out.push(completion);
        }
        out.len() - before
    }

    /// Takes one completion.
    pub fn poll_one(&mut self, cq: Cq) -> Option<WorkCompletion> {
        self.env.cqs.get_mut(cq)?.pop()
    }

    /// Arms a completion queue: the next completion of this kind raises one event. As with every verbs
    /// library, completions that were there before raise none: poll once more after arming.
    pub fn req_notify_cq(&mut self, cq: Cq, on: NotifyOn) -> Result<(), VerbsError> {
        self.env.cqs.arm(cq, on)
    }

    /// The next completion queue whose event was raised; each arming raises one at most.
    pub fn poll_cq_event(&mut self) -> Option<Cq> {
        self.env.cqs.event()
    }

    /// Completions that wait in a queue.
    #[must_use]
    pub fn cq_len(&self, cq: Cq) -> u32 {
        self.env
            .cqs
            .get(cq)
            .map_or(0, crate::cq::CompletionQueue::len)
    }

    /// A queue pair, in RESET. All of its memory is allocated here.
    pub fn create_qp(&mut self, init: &QpInit) -> Result<Qpn, VerbsError> {
        self.known_pd(init.pd)?;
        let in_range = |value: u32, max: u32, what| {
            if value <= max {
                Ok(())
            } else {
                Err(VerbsError::Parameter(what))
            }
        };
        in_range(init.max_send_wr, MAX_WR, "max_send_wr")?;
        in_range(init.max_recv_wr, MAX_WR, "max_recv_wr")?;
        in_range(init.max_sge, MAX_SGE as u32, "max_sge")?;
        in_range(init.max_inline, MAX_INLINE_BYTES, "max_inline")?;
        for cq in [init.send_cq, init.recv_cq] {
            if self.env.cqs.get(cq).is_none() {
                return Err(VerbsError::Unknown("completion queue"));
            }
        }
        let slot = match self.free_slots.pop_front() {
            Some(slot) => slot,
            None if self.qps.len() < self.config.max_qps.min(self.slot_mask as usize + 1) => {
                self.qps.push(None);
                (self.qps.len() - 1) as u32
            }
            None => return Err(VerbsError::TableFull("queue pair")),
        };
        let qpn = self.fresh_qpn(slot);
        let first_psn = Psn::new(self.random.next_u32());
        let window = self.config.window;
        let qp = Qp::new(qpn, *init, first_psn, window, self.config.max_reads);
        self.timers.add_slot(slot);
        if let Some(place) = self.qps.get_mut(slot as usize) {
            *place = Some(Box::new(qp));
        }
        for cq in [init.send_cq, init.recv_cq] {
            if let Some(queue) = self.env.cqs.get_mut(cq) {
                queue.users += 1;
            }
        }
        Ok(qpn)
    }

    /// The low bits are the slot, the others random, so that a packet for an earlier owner of the
    /// slot is not taken for the present one's. 0 and 1 are reserved (IBA 3.5.10).
    fn fresh_qpn(&mut self, slot: u32) -> Qpn {
        loop {
            let qpn = Qpn::new(self.random.next_u32() & !self.slot_mask | slot);
            if qpn.get() > 1 && qpn.get() != Qpn::MAX {
                return qpn;
            }
        }
    }

    /// Moves a queue pair to another state.
    pub fn modify_qp(
        &mut self,
        qpn: Qpn,
        to: Modify,
        _now: Instant,
    ) -> Result<QpState, VerbsError> {
        let env = &mut self.env;
        let qp = super::find(&mut self.qps, self.slot_mask, qpn)
            .ok_or(VerbsError::Unknown("queue pair"))?;
        match to {
            Modify::ToReset => {
                qp.reset(env);
                // Packets of the connection before shall not fit the next one.
                qp.req.reset(Psn::new(self.random.next_u32()));
            }
            Modify::ToInit(access) => {
                qp.state = qp.state.to(QpState::Init)?;
                qp.access = access;
            }
            Modify::ToReadyToReceive(args) => {
                let state = qp.state.to(QpState::ReadyToReceive)?;
                qp.ready_to_receive(&args)?;
                qp.state = state;
            }
            Modify::ToReadyToSend(args) => {
                if qp.state != QpState::ReadyToReceive {
                    // From SQD it is `Resume`, from RTS it would renumber what is outstanding.
                    let to = QpState::ReadyToSend;
                    return Err(VerbsError::IllegalTransition { from: qp.state, to });
                }
                qp.state = qp.state.to(QpState::ReadyToSend)?;
                qp.ready_to_send(&args);
            }
            Modify::ToSendQueueDrain => qp.state = qp.state.to(QpState::SendQueueDrain)?,
            Modify::Resume => {
                let from = qp.state;
                if from != QpState::SendQueueDrain {
                    let to = QpState::ReadyToSend;
                    return Err(VerbsError::IllegalTransition { from, to });
                }
                qp.state = from.to(QpState::ReadyToSend)?;
            }
            Modify::ToError => {
                qp.state = qp.state.to(QpState::Error)?;
                qp.flush(env);
            }
        }
        let state = qp.state;
        self.settle(qpn);
        Ok(state)
    }

    /// Attributes of a queue pair.
    pub fn query_qp(&self, qpn: Qpn) -> Result<QpAttributes, VerbsError> {
        self.qp(qpn)
            .map(Qp::attributes)
            .ok_or(VerbsError::Unknown("queue pair"))
    }

    /// Bytes of memory that a queue pair takes, its completion queues aside.
    #[must_use]
    pub fn qp_memory_bytes(&self, qpn: Qpn) -> Option<usize> {
        self.qp(qpn).map(Qp::memory_bytes)
    }

    /// Removes a queue pair. Completions of it that were not polled are forgotten; its connection,
    /// if there still is one, is ended.
    pub fn destroy_qp(&mut self, qpn: Qpn, now: Instant) -> Result<(), VerbsError> {
        let qp = super::find(&mut self.qps, self.slot_mask, qpn)
            .ok_or(VerbsError::Unknown("queue pair"))?;
        qp.reset(&mut self.env);
        let (init, conn) = (qp.init, qp.conn.take());
        let slot = qpn.get() & self.slot_mask;
        if let Some(place) = self.qps.get_mut(slot as usize) {
            *place = None;
        }
        self.timers.remove(slot);
        // Packets of a slot's next owner differ in the random part of the number; the longest
        // unused slot is taken first all the same.
        self.free_slots.push_back(slot);
        for cq in [init.send_cq, init.recv_cq] {
            if let Some(queue) = self.env.cqs.get_mut(cq) {
                queue.users = queue.users.saturating_sub(1);
            }
        }
        self.env.broken.retain(|(broken, _, _)| *broken != qpn);
        if let Some(conn) = conn {
            self.conns.remove(&conn);
            // An unknown connection has ended by itself.
            let _ = self.cm.disconnect(now, conn);
        }
        Ok(())
    }

    /// Posts a send request. In the error state it completes at once with `WR_FLUSH_ERR`.
    #[inline]
    pub fn post_send(&mut self, qpn: Qpn, wr: &SendWr<'_>) -> Result<(), PostError> {
        let qp = super::find(&mut self.qps, self.slot_mask, qpn).ok_or(PostError::UnknownQp)?;
        if !qp.state.can_post_send() {
            return Err(PostError::State(qp.state));
        }
        let len = qp.sq.check(wr)?;
        let cq = self
            .env
            .cqs
            .get_mut(qp.init.send_cq)
            .ok_or(PostError::UnknownQp)?;
        if !cq.reserve(1) {
            return Err(PostError::CompletionQueueFull);
        }
        qp.sq.push(wr, len);
        if qp.state == QpState::Error {
            qp.complete_head(&mut self.env, WcStatus::WrFlushErr);
        } else if !qp.active {
            qp.active = true;
            self.active.push_back(qpn.get() & self.slot_mask);
        }
        Ok(())
    }

    /// Posts a receive buffer. In the error state it completes at once with `WR_FLUSH_ERR`.
    pub fn post_recv(&mut self, qpn: Qpn, wr: &RecvWr<'_>) -> Result<(), PostError> {
        let qp = super::find(&mut self.qps, self.slot_mask, qpn).ok_or(PostError::UnknownQp)?;
        qp.rq.check_post(wr)?;
        let cq = self
            .env
            .cqs
            .get_mut(qp.init.recv_cq)
            .ok_or(PostError::UnknownQp)?;
        if !cq.reserve(1) {
            return Err(PostError::CompletionQueueFull);
        }
        if qp.state == QpState::Error {
            let flushed = qp.completion(wr.wr_id, WcOpcode::Recv, WcStatus::WrFlushErr);
            self.env.cqs.push(qp.init.recv_cq, flushed);
        } else {
            qp.rq.post(wr);
        }
        Ok(())
    }

    /// Posts credits for messages that are handed out where they lie ([`Engine::poll_delivery`]) or,
    /// with `inline_recv` and when they are short, inside the completion. Messages longer than a
    /// packet are refused. Credits of a queue pair in the error state vanish: they carry no ids.
    #[inline]
    pub fn post_recv_in_place(&mut self, qpn: Qpn, count: u32) -> Result<(), PostError> {
        let qp = super::find(&mut self.qps, self.slot_mask, qpn).ok_or(PostError::UnknownQp)?;
        qp.rq.check_credits(count)?;
        if qp.state == QpState::Error {
            return Ok(());
        }
        if qp.init.inline_recv {
            let cq = self
                .env
                .cqs
                .get_mut(qp.init.recv_cq)
                .ok_or(PostError::UnknownQp)?;
            if !cq.reserve(count) {
                return Err(PostError::CompletionQueueFull);
            }
        }
        qp.rq.add_credits(count);
        Ok(())
    }

    fn known_pd(&self, pd: Pd) -> Result<(), VerbsError> {
        if self.pds.contains(&pd) {
            Ok(())
        } else {
            Err(VerbsError::Unknown("protection domain"))
        }
    }
}
