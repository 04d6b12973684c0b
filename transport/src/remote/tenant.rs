//! A client as its engine thread sees it: two pipes and what it owns in the engine.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use flexblk_reactor::{SharedMemory, Span};

use super::RemoteError;
use super::client::Connected;
use super::codec::{Request, decode_request, encode_completion};
use super::control::{ClientEvent, NewTenant, QueuePairConfig, Reply, TenantId};
use crate::cm::{ConnId, PrivateData, ServiceId};
use crate::engine::Engine;
use crate::pipe::{Consumer, Doorbell, EventFd, PipeError, Producer};
use crate::verbs::{
    Access, Cq, INLINE_RECV_MAX_BYTES, Lkey, Mr, Pd, PostError, QpInit, QpState, Qpn, RecvWr,
    SendOp, SendWr, Sge, VerbsError, WcOpcode, WcStatus, WorkCompletion,
};

/// Work requests taken from one client before the next gets its turn.
const REQUESTS_PER_TURN: usize = 64;

/// The client's end of a pipe is closed or broken: it gets nothing more.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone;

/// A client.
pub(super) struct Tenant {
    id: TenantId,
    requests: Consumer,
    completions: Producer,
    bell: EventFd,
    events: SyncSender<ClientEvent>,
    capacity: u32,
    pd: Pd,
    cq: Cq,
    qps: BTreeMap<u32, TenantQp>,
    regions: BTreeMap<u32, Region>,
    /// Completions on their way into the pipe.
    ready: VecDeque<WorkCompletion>,
    /// Completions of requests that the engine did not take; they come after those of the engine.
    refused: VecDeque<WorkCompletion>,
    scratch: Vec<WorkCompletion>,
}

struct TenantQp {
    /// First buffer of each posted receive request, for inlining short messages.
    recvs: VecDeque<Option<Sge>>,
    /// Caller of `connect`.
    connecting: Option<Reply<Connected>>,
}

struct Region {
    /// Where short messages can be copied out of; `None`: memory of the client that is not shared.
    shared: Option<(Arc<SharedMemory>, u64)>,
    mr: Mr,
}

impl fmt::Debug for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tenant")
            .field("id", &self.id)
            .field("queue_pairs", &self.qps.len())
            .field("regions", &self.regions.len())
            .finish_non_exhaustive()
    }
}

impl Tenant {
    pub(super) fn attach(
        engine: &mut Engine,
        id: TenantId,
        new: NewTenant,
    ) -> Result<Self, RemoteError> {
        let pd = engine.alloc_pd();
        let cq = engine.create_cq(new.capacity)?;
        Ok(Self {
            id,
            requests: Consumer::attach(new.requests),
            completions: Producer::attach(new.completions, Box::new(new.bell.clone())),
            bell: new.bell,
            events: new.events,
            capacity: new.capacity,
            pd,
            cq,
            qps: BTreeMap::new(),
            regions: BTreeMap::new(),
            ready: VecDeque::with_capacity(new.capacity as usize),
            refused: VecDeque::new(),
            scratch: Vec::with_capacity(new.capacity as usize),
        })
    }

    pub(super) const fn id(&self) -> TenantId {
        self.id
    }

    /// Gives the engine what the client has posted. Returns how much, at most a turn's worth.
    pub(super) fn take_requests(&mut self, engine: &mut Engine) -> Result<usize, Gone> {
        let mut taken = 0;
        while taken < REQUESTS_PER_TURN && self.refused.len() < self.capacity as usize {
            let request = match self.requests.pop() {
                Ok(Some(message)) => decode_request(message).ok_or(Gone)?,
                Ok(None) => break,
                // Client and engine are attached once each, so a restart is as bad as the rest.
                Err(_) => return Err(Gone),
            };
            taken += 1;
            self.post(engine, &request);
        }
        Ok(taken)
    }

    /// Gives the engine everything that the client had posted before a control call.
    pub(super) fn take_all_requests(&mut self, engine: &mut Engine) -> Result<(), Gone> {
        while self.take_requests(engine)? > 0 {}
        Ok(())
    }

    /// Moves completions into the pipe as far as the client has room. Returns how many.
    pub(super) fn push_completions(&mut self, engine: &mut Engine) -> Result<usize, Gone> {
        if self.ready.is_empty() {
            engine.poll_cq(self.cq, &mut self.scratch);
            for index in 0..self.scratch.len() {
                if let Some(mut completion) = self.scratch.get(index).copied() {
                    self.inline_short_message(&mut completion);
                    self.ready.push_back(completion);
                }
            }
            self.scratch.clear();
            self.ready.append(&mut self.refused);
        }
        let mut pushed = 0;
        while let Some(completion) = self.ready.front() {
            match self.completions.push(&encode_completion(completion)) {
                Ok(()) => pushed += 1,
                Err(PipeError::Full) => break,
                Err(_) => return Err(Gone),
            }
            self.ready.pop_front();
        }
        if pushed > 0 {
            self.completions.flush().map_err(|_| Gone)?;
        }
        Ok(pushed)
    }

    /// Whether nothing is left to do until the client rings. It rings from now on.
    pub(super) fn prepare_sleep(&mut self) -> bool {
        self.ready.is_empty() && self.refused.is_empty() && self.requests.prepare_sleep()
    }

    pub(super) fn awake(&mut self) {
        self.requests.awake();
    }

    pub(super) fn register(
        &mut self,
        engine: &mut Engine,
        memory: Arc<SharedMemory>,
        offset_bytes: u64,
        len_bytes: u64,
        access: Access,
    ) -> Result<Mr, RemoteError> {
        let mr = engine.register_memory(self.pd, &memory, offset_bytes, len_bytes, access)?;
        let shared = Some((memory, offset_bytes));
        self.regions
            .insert(mr.lkey.to_bits(), Region { shared, mr });
        Ok(mr)
    }

    pub(super) fn register_span(
        &mut self,
        engine: &mut Engine,
        memory: Span,
        access: Access,
    ) -> Result<Mr, RemoteError> {
        let mr = engine.register(self.pd, memory, access)?;
        self.regions
            .insert(mr.lkey.to_bits(), Region { shared: None, mr });
        Ok(mr)
    }

    pub(super) fn deregister(
        &mut self,
        engine: &mut Engine,
        lkey: Lkey,
    ) -> Result<(), RemoteError> {
        if self.regions.remove(&lkey.to_bits()).is_none() {
            return Err(VerbsError::Unknown("memory region").into());
        }
        Ok(engine.deregister(lkey)?)
    }

    pub(super) fn create_qp(
        &mut self,
        engine: &mut Engine,
        config: &QueuePairConfig,
    ) -> Result<Qpn, RemoteError> {
        let qpn = engine.create_qp(&QpInit {
            pd: self.pd,
            send_cq: self.cq,
            recv_cq: self.cq,
            max_send_wr: config.max_send_wr,
            max_recv_wr: config.max_recv_wr,
            max_sge: config.max_sge,
            max_inline: config.max_inline,
            inline_recv: false,
            ack_request: config.ack_request,
            user: self.id.to_user(),
        })?;
        let recvs = VecDeque::with_capacity(config.max_recv_wr as usize);
        self.qps.insert(
            qpn.get(),
            TenantQp {
                recvs,
                connecting: None,
            },
        );
        Ok(qpn)
    }

    pub(super) fn destroy_qp(
        &mut self,
        engine: &mut Engine,
        now: Instant,
        qpn: Qpn,
    ) -> Result<(), RemoteError> {
        self.own(qpn)?;
        // A queue pair without a connection has nothing to end.
        let _ = engine.disconnect(qpn, now);
        engine.destroy_qp(qpn, now)?;
        self.qps.remove(&qpn.get());
        Ok(())
    }

    pub(super) fn connect(
        &mut self,
        engine: &mut Engine,
        now: Instant,
        (qpn, to, service): (Qpn, SocketAddr, ServiceId),
        private: &PrivateData,
        reply: Reply<Connected>,
    ) {
        let started = self
            .own(qpn)
            .and_then(|_| Ok(engine.connect(qpn, to, service, private, now)?));
        match (started, self.qps.get_mut(&qpn.get())) {
            (Ok(_), Some(qp)) => qp.connecting = Some(reply),
            (Err(error), _) => answer(&reply, Err(error)),
            (Ok(_), None) => {}
        }
    }

    pub(super) fn accept(
        &mut self,
        engine: &mut Engine,
        now: Instant,
        conn: ConnId,
        qpn: Qpn,
        private: &PrivateData,
    ) -> Result<(), RemoteError> {
        self.own(qpn)?;
        Ok(engine.accept(conn, qpn, private, now)?)
    }

    pub(super) fn disconnect(
        &mut self,
        engine: &mut Engine,
        now: Instant,
        qpn: Qpn,
    ) -> Result<(), RemoteError> {
        self.own(qpn)?;
        Ok(engine.disconnect(qpn, now)?)
    }

    /// A connection that this client has asked for is ready, or not. Gives the result back when
    /// nobody has asked: then it is an accepted one.
    pub(super) fn connected(
        &mut self,
        qpn: Qpn,
        result: Result<Connected, RemoteError>,
    ) -> Option<Result<Connected, RemoteError>> {
        match self
            .qps
            .get_mut(&qpn.get())
            .and_then(|qp| qp.connecting.take())
        {
            Some(reply) => {
                answer(&reply, result);
                None
            }
            None => Some(result),
        }
    }

    /// Tells the client and wakes it.
    pub(super) fn event(&self, event: ClientEvent) {
        if self.events.try_send(event).is_err() {
            tracing::warn!(?event, "a client does not take its events: dropped");
        }
        self.bell.ring();
    }

    /// Gives everything of this client back to the engine.
    pub(super) fn destroy(self, engine: &mut Engine, now: Instant) {
        for &qpn in self.qps.keys() {
            let qpn = Qpn::new(qpn);
            let _ = engine.disconnect(qpn, now);
            if let Err(error) = engine.destroy_qp(qpn, now) {
                tracing::error!(%qpn, %error, "queue pair of a client left behind");
            }
        }
        for region in self.regions.values() {
            if let Err(error) = engine.deregister(region.mr.lkey) {
                tracing::error!(%error, "memory region of a client left behind");
            }
        }
        if let Err(error) = engine.destroy_cq(self.cq) {
            tracing::error!(%error, "completion queue of a client left behind");
        }
        if let Err(error) = engine.dealloc_pd(self.pd) {
            tracing::error!(%error, "protection domain of a client left behind");
        }
    }

    fn own(&mut self, qpn: Qpn) -> Result<&mut TenantQp, RemoteError> {
        let unknown = VerbsError::Unknown("queue pair");
        self.qps
            .get_mut(&qpn.get())
            .ok_or(RemoteError::Verbs(unknown))
    }

    fn post(&mut self, engine: &mut Engine, request: &Request) {
        let (qpn, wr_id, opcode, posted) = match request {
            Request::Send {
                qpn,
                wr_id,
                op,
                flags,
                inline,
                sges,
            } => {
                let wr = SendWr {
                    wr_id: *wr_id,
                    op: *op,
                    inline,
                    sges,
                    flags: *flags,
                };
                let posted = match self.qps.contains_key(&qpn.get()) {
                    true => engine.post_send(*qpn, &wr),
                    false => Err(PostError::UnknownQp),
                };
                let opcode = match op {
                    SendOp::Send | SendOp::SendImm(_) | SendOp::SendInv(_) => WcOpcode::Send,
                    SendOp::Write { .. } | SendOp::WriteImm { .. } => WcOpcode::RdmaWrite,
                    SendOp::Read { .. } => WcOpcode::RdmaRead,
                };
                (*qpn, *wr_id, opcode, posted)
            }
            Request::Recv { qpn, wr_id, sges } => {
                let wr = RecvWr {
                    wr_id: *wr_id,
                    sges,
                };
                let posted = match self.qps.get_mut(&qpn.get()) {
                    Some(qp) => {
                        let posted = engine.post_recv(*qpn, &wr);
                        if posted.is_ok() {
                            qp.recvs.push_back(sges.first().copied());
                        }
                        posted
                    }
                    None => Err(PostError::UnknownQp),
                };
                (*qpn, *wr_id, WcOpcode::Recv, posted)
            }
        };
        let status = match posted {
            Ok(()) => return,
            Err(PostError::State(QpState::Error)) => WcStatus::WrFlushErr,
            Err(PostError::TooLong | PostError::InlineTooLong) => WcStatus::LocLenErr,
            Err(_) => WcStatus::LocQpOpErr,
        };
        self.refused.push_back(WorkCompletion {
            wr_id,
            user: self.id.to_user(),
            qpn: qpn.get(),
            opcode,
            status,
            ..WorkCompletion::default()
        });
    }

    /// Puts a short received message into the completion as well, so that the client need not
    /// touch the buffer, which is in this core's cache.
    fn inline_short_message(&mut self, completion: &mut WorkCompletion) {
        if !completion.is_recv() {
            return;
        }
        let Some(qp) = self.qps.get_mut(&completion.qpn) else {
            return;
        };
        let Some(sge) = qp.recvs.pop_front().flatten() else {
            return;
        };
        let len = completion.byte_len as usize;
        if completion.status != WcStatus::Success
            || completion.opcode != WcOpcode::Recv
            || completion.inline_len != 0
            || len == 0
            || len > INLINE_RECV_MAX_BYTES
            || completion.byte_len > sge.len
        {
            return;
        }
        let Some(region) = self.regions.get(&sge.lkey.to_bits()) else {
            return;
        };
        let Some((memory, offset_bytes)) = &region.shared else {
            return;
        };
        let offset = sge.addr.wrapping_sub(region.mr.addr);
        let in_region = offset
            .checked_add(len as u64)
            .is_some_and(|end| end <= region.mr.len);
        let Some(span) = offset_bytes
            .checked_add(offset)
            .filter(|_| in_region)
            .and_then(|at| memory.span(at, completion.byte_len))
        else {
            return;
        };
        if let Some(inline) = completion.inline.get_mut(..len) {
            span.copy_to_slice(inline);
            completion.inline_len = len as u8;
        }
    }
}

/// Answers a control call. The caller may have given up waiting.
pub(super) fn answer<T>(reply: &Reply<T>, result: Result<T, RemoteError>) {
    let _ = reply.try_send(result);
}
