//! An application thread's end of an engine thread.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use flexblk_reactor::{HugePages, SharedMemory, Span, mailbox};

use super::RemoteError;
use super::codec::{decode_completion, encode_recv, encode_send};
use super::control::{
    Call, ClientEvent, Control, EngineCounters, Incoming, NewTenant, QueuePairConfig, Reply,
    TenantId,
};
use crate::cm::{Params, PrivateData, RejectReason, ServiceId};
use crate::pipe::{Consumer, EventFd, PipeError, Producer, Ring};
use crate::verbs::{
    Access, Lkey, Mr, PostError, Qpn, RecvWr, SendFlags, SendOp, SendWr, WcOpcode, WcStatus,
    WorkCompletion,
};

/// Completions taken by one [`Client::poll_cq`] at most.
const POLL_MAX: usize = 256;
/// Undelivered [`ClientEvent`]s.
const EVENTS: usize = 1024;
/// Undecided connect requests of a listener.
const INCOMING: usize = 64;

/// A connection that was made.
#[derive(Clone, Debug)]
pub struct Connected {
    /// Private data of the peer's acceptance.
    pub private: PrivateData,
    /// FlexiNS parameters agreed; `None` is standard RoCEv2.
    pub params: Option<Params>,
    /// Payload bytes of a packet.
    pub mtu_bytes: u32,
}

/// Why a work request was not taken. Nothing of it was kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PostFailure {
    /// As with an engine in the same thread. `CompletionQueueFull` is the pipe's: poll first.
    #[error(transparent)]
    Verbs(#[from] PostError),
    /// The engine thread has not taken earlier requests yet: try again.
    #[error("the pipe to the engine thread is full")]
    PipeFull,
    /// The engine thread has ended.
    #[error("the engine thread is gone")]
    EngineGone,
}

/// Connect requests for a service.
#[derive(Debug)]
pub struct Listener {
    incoming: mpsc::Receiver<Incoming>,
}

impl Listener {
    /// Waits for a peer; `None` when none came in time.
    pub fn incoming(&self, timeout: Duration) -> Result<Option<Incoming>, RemoteError> {
        match self.incoming.recv_timeout(timeout) {
            Ok(incoming) => Ok(Some(incoming)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(RemoteError::EngineGone),
        }
    }
}

/// One application thread's queue pairs, memory and completions on an engine thread.
///
/// Requests are staged: [`Client::poll_cq`], [`Client::wait`] and [`Client::flush`] make them
/// visible to the engine. Dropping the client destroys everything that it has made.
pub struct Client {
    control: mailbox::Sender<Control>,
    control_timeout: Duration,
    id: TenantId,
    requests: Producer,
    completions: Consumer,
    bell: EventFd,
    events: mpsc::Receiver<ClientEvent>,
    qps: BTreeMap<u32, ClientQp>,
    /// Requests that may still complete; each has a place in the completion pipe.
    outstanding: u32,
    capacity: u32,
    gone: bool,
    /// Error completions made here, after the engine thread has ended.
    orphans: VecDeque<WorkCompletion>,
}

/// What must complete yet on a queue pair, in order.
struct ClientQp {
    config: QueuePairConfig,
    sends: VecDeque<PostedSend>,
    recvs: VecDeque<u64>,
}

struct PostedSend {
    wr_id: u64,
    opcode: WcOpcode,
    flags: SendFlags,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("id", &self.id)
            .field("queue_pairs", &self.qps.len())
            .field("outstanding", &self.outstanding)
            .field("gone", &self.gone)
            .finish_non_exhaustive()
    }
}

impl Client {
    pub(super) fn new(
        control: mailbox::Sender<Control>,
        control_timeout: Duration,
        entries: u32,
    ) -> Result<Self, RemoteError> {
        let capacity = entries.clamp(8, 1 << 16).next_power_of_two();
        let ring_len = Ring::len_bytes(capacity);
        let memory = SharedMemory::create("flexins-pipe", 2 * ring_len, HugePages::No)
            .map_err(|error| RemoteError::Pipe(Box::new(error)))?;
        let ring = |offset| {
            Ring::create(&memory, offset, capacity).map_err(|e| RemoteError::Pipe(Box::new(e)))
        };
        let (request_ring, completion_ring) = (ring(0)?, ring(ring_len)?);
        let bell = EventFd::new().map_err(|error| RemoteError::Pipe(Box::new(error)))?;
        let (events_tx, events) = mpsc::sync_channel(EVENTS);
        let doorbell = Box::new(control.waker().clone());
        let requests = Producer::attach(request_ring.clone(), doorbell);
        let completions = Consumer::attach(completion_ring.clone());
        let tenant = NewTenant {
            requests: request_ring,
            completions: completion_ring,
            bell: bell.clone(),
            events: events_tx,
            capacity,
        };
        let id = exchange(&control, control_timeout, |reply| Control::Attach {
            tenant,
            reply,
        })?;
        Ok(Self {
            control,
            control_timeout,
            id,
            requests,
            completions,
            bell,
            events,
            qps: BTreeMap::new(),
            outstanding: 0,
            capacity,
            gone: false,
            orphans: VecDeque::new(),
        })
    }

    /// Registers part of a shared memory. It stays mapped until it is deregistered or the client is
    /// gone.
    pub fn register(
        &mut self,
        memory: &Arc<SharedMemory>,
        offset_bytes: u64,
        len_bytes: u64,
        access: Access,
    ) -> Result<Mr, RemoteError> {
        let memory = Arc::clone(memory);
        self.call(|reply| Call::Register {
            memory,
            offset_bytes,
            len_bytes,
            access,
            reply,
        })
    }

    /// Registers memory of this process that is not shared memory. It stays mapped until
    /// [`Client::deregister`] has returned, also when the client is dropped before: then the engine
    /// thread has to have ended.
    pub fn register_span(&mut self, memory: Span, access: Access) -> Result<Mr, RemoteError> {
        self.call(|reply| Call::RegisterSpan {
            memory,
            access,
            reply,
        })
    }

    /// What the engine thread has counted.
    pub fn counters(&self) -> Result<EngineCounters, RemoteError> {
        if self.gone {
            return Err(RemoteError::EngineGone);
        }
        let id = self.id;
        exchange(&self.control, self.control_timeout, |reply| Control::Of {
            id,
            call: Call::Counters { reply },
        })
    }

    /// Takes a region away: its keys are invalid from now on. When it returns, neither engine nor
    /// kernel uses the memory.
    pub fn deregister(&mut self, lkey: Lkey) -> Result<(), RemoteError> {
        self.call(|reply| Call::Deregister { lkey, reply })
    }

    /// Makes a queue pair. Post receive requests before connecting it.
    pub fn create_qp(&mut self, config: &QueuePairConfig) -> Result<Qpn, RemoteError> {
        let config = config.clamped();
        let qpn: Qpn = self.call(|reply| Call::CreateQp { config, reply })?;
        let qp = ClientQp {
            config,
            sends: VecDeque::with_capacity(config.max_send_wr as usize),
            recvs: VecDeque::with_capacity(config.max_recv_wr as usize),
        };
        self.qps.insert(qpn.get(), qp);
        Ok(qpn)
    }

    /// Destroys a queue pair. What it has outstanding does not complete any more.
    pub fn destroy_qp(&mut self, qpn: Qpn) -> Result<(), RemoteError> {
        self.call(|reply| Call::DestroyQp { qpn, reply })?;
        if let Some(qp) = self.qps.remove(&qpn.get()) {
            self.outstanding -= (qp.sends.len() + qp.recvs.len()) as u32;
        }
        Ok(())
    }

    /// Connects a queue pair to a service of a peer and waits until it is ready to send.
    pub fn connect(
        &mut self,
        qpn: Qpn,
        to: SocketAddr,
        service: ServiceId,
        private: &[u8],
        timeout: Duration,
    ) -> Result<Connected, RemoteError> {
        let private = PrivateData::from_prefix(private);
        self.call_within(timeout, |reply| Call::Connect {
            qpn,
            to,
            service,
            private,
            reply,
        })
    }

    /// Takes connect requests for a service.
    pub fn listen(&mut self, service: ServiceId) -> Result<Listener, RemoteError> {
        let (incoming_tx, incoming) = mpsc::sync_channel(INCOMING);
        self.call(|reply| Call::Listen {
            service,
            incoming: incoming_tx,
            reply,
        })?;
        Ok(Listener { incoming })
    }

    /// Accepts a peer on a fresh queue pair. [`ClientEvent::Established`] follows.
    pub fn accept(
        &mut self,
        incoming: &Incoming,
        qpn: Qpn,
        private: &[u8],
    ) -> Result<(), RemoteError> {
        let (conn, private) = (incoming.conn, PrivateData::from_prefix(private));
        self.call(|reply| Call::Accept {
            conn,
            qpn,
            private,
            reply,
        })
    }

    /// Refuses a peer.
    pub fn reject(
        &mut self,
        incoming: &Incoming,
        reason: RejectReason,
        private: &[u8],
    ) -> Result<(), RemoteError> {
        let (conn, private) = (incoming.conn, PrivateData::from_prefix(private));
        self.call(|reply| Call::Reject {
            conn,
            reason,
            private,
            reply,
        })
    }

    /// Ends a connection. Everything outstanding on it completes, in the end with an error.
    pub fn disconnect(&mut self, qpn: Qpn) -> Result<(), RemoteError> {
        self.call(|reply| Call::Disconnect { qpn, reply })
    }

    /// Posts a send request.
    pub fn post_send(&mut self, qpn: Qpn, wr: &SendWr<'_>) -> Result<(), PostFailure> {
        let qp = Self::room(
            &mut self.qps,
            qpn,
            self.gone,
            self.outstanding,
            self.capacity,
        )?;
        if qp.sends.len() >= qp.config.max_send_wr as usize {
            return Err(PostError::QueueFull.into());
        }
        if wr.sges.len() > qp.config.max_sge as usize {
            return Err(PostError::TooManySges.into());
        }
        if wr.inline.len() > qp.config.max_inline as usize {
            return Err(PostError::InlineTooLong.into());
        }
        let message = encode_send(qpn, wr).ok_or(PostError::TooManySges)?;
        let opcode = match wr.op {
            SendOp::Send | SendOp::SendImm(_) | SendOp::SendInv(_) => WcOpcode::Send,
            SendOp::Write { .. } | SendOp::WriteImm { .. } => WcOpcode::RdmaWrite,
            SendOp::Read { .. } => WcOpcode::RdmaRead,
        };
        match self.requests.push(&message) {
            Ok(()) => {
                qp.sends.push_back(PostedSend {
                    wr_id: wr.wr_id,
                    opcode,
                    flags: wr.flags,
                });
                self.outstanding += 1;
                Ok(())
            }
            Err(error) => Err(self.push_failed(error)),
        }
    }

    /// Posts a receive request.
    pub fn post_recv(&mut self, qpn: Qpn, wr: &RecvWr<'_>) -> Result<(), PostFailure> {
        let qp = Self::room(
            &mut self.qps,
            qpn,
            self.gone,
            self.outstanding,
            self.capacity,
        )?;
        if qp.recvs.len() >= qp.config.max_recv_wr as usize {
            return Err(PostError::QueueFull.into());
        }
        if wr.sges.len() > qp.config.max_sge as usize {
            return Err(PostError::TooManySges.into());
        }
        let message = encode_recv(qpn, wr).ok_or(PostError::TooManySges)?;
        match self.requests.push(&message) {
            Ok(()) => {
                qp.recvs.push_back(wr.wr_id);
                self.outstanding += 1;
                Ok(())
            }
            Err(error) => Err(self.push_failed(error)),
        }
    }

    /// Makes the requests posted so far visible to the engine.
    pub fn flush(&mut self) {
        if !self.gone && self.requests.flush().is_err() {
            self.engine_gone();
        }
    }

    /// Appends completions to `out`; returns how many. Never blocks.
    pub fn poll_cq(&mut self, out: &mut Vec<WorkCompletion>) -> usize {
        self.flush();
        let before = out.len();
        while out.len() - before < POLL_MAX && !self.gone {
            match self.completions.pop() {
                Ok(Some(entry)) => match decode_completion(entry) {
                    Some(completion) => {
                        if self.retire(&completion) {
                            out.push(completion);
                        }
                    }
                    None => self.engine_gone(),
                },
                Ok(None) => break,
                Err(_) => self.engine_gone(),
            }
        }
        while out.len() - before < POLL_MAX
            && let Some(completion) = self.orphans.pop_front()
        {
            out.push(completion);
        }
        out.len() - before
    }

    /// Next event of a connection.
    pub fn poll_event(&mut self) -> Option<ClientEvent> {
        self.events.try_recv().ok()
    }

    /// Sleeps until there may be a completion or an event (true) or the time is over (false).
    pub fn wait(&mut self, timeout: Duration) -> bool {
        self.flush();
        if self.gone || !self.completions.prepare_sleep() {
            return true;
        }
        let woken = self.bell.wait(Some(timeout)).unwrap_or(true);
        self.completions.awake();
        woken || self.completions.has_something()
    }

    /// Whether the engine thread has ended.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    fn room(
        qps: &mut BTreeMap<u32, ClientQp>,
        qpn: Qpn,
        gone: bool,
        outstanding: u32,
        capacity: u32,
    ) -> Result<&mut ClientQp, PostFailure> {
        if gone {
            return Err(PostFailure::EngineGone);
        }
        if outstanding >= capacity {
            return Err(PostError::CompletionQueueFull.into());
        }
        qps.get_mut(&qpn.get()).ok_or(PostError::UnknownQp.into())
    }

    fn push_failed(&mut self, error: PipeError) -> PostFailure {
        match error {
            PipeError::Full => PostFailure::PipeFull,
            PipeError::TooLong(_) => PostError::TooManySges.into(),
            PipeError::Restarted
            | PipeError::Closed
            | PipeError::Corrupt(_)
            | PipeError::Layout { .. } => {
                self.engine_gone();
                PostFailure::EngineGone
            }
        }
    }

    /// Takes what a completion ends off the books. False: it is of a destroyed queue pair.
    fn retire(&mut self, completion: &WorkCompletion) -> bool {
        let Some(qp) = self.qps.get_mut(&completion.qpn) else {
            return false;
        };
        if completion.is_recv() {
            if qp.recvs.pop_front().is_some() {
                self.outstanding -= 1;
            }
            return true;
        }
        // Completions come in order. A successful one is that of the oldest signalled request, a
        // failed one that of the oldest request with its id; unsignalled ones before it are done.
        while let Some(posted) = qp.sends.pop_front() {
            self.outstanding -= 1;
            let is_it = match completion.status {
                WcStatus::Success => posted.flags.contains(SendFlags::SIGNALED),
                _ => posted.wr_id == completion.wr_id,
            };
            if is_it {
                break;
            }
        }
        true
    }

    /// The engine thread has ended: everything outstanding completes here.
    fn engine_gone(&mut self) {
        if std::mem::replace(&mut self.gone, true) {
            return;
        }
        let id = self.id;
        for (&qpn, qp) in &mut self.qps {
            let flushed = |wr_id, opcode| WorkCompletion {
                wr_id,
                user: id.to_user(),
                qpn,
                opcode,
                status: WcStatus::WrFlushErr,
                ..WorkCompletion::default()
            };
            let sends = qp.sends.drain(..);
            self.orphans
                .extend(sends.map(|posted| flushed(posted.wr_id, posted.opcode)));
            let recvs = qp.recvs.drain(..);
            self.orphans
                .extend(recvs.map(|wr_id| flushed(wr_id, WcOpcode::Recv)));
        }
        self.outstanding = 0;
    }

    fn call<T>(&mut self, call: impl FnOnce(Reply<T>) -> Call) -> Result<T, RemoteError> {
        self.call_within(self.control_timeout, call)
    }

    fn call_within<T>(
        &mut self,
        timeout: Duration,
        call: impl FnOnce(Reply<T>) -> Call,
    ) -> Result<T, RemoteError> {
        // The engine takes requests posted before a control call before it.
        self.flush();
        if self.gone {
            return Err(RemoteError::EngineGone);
        }
        let id = self.id;
        exchange(&self.control, timeout, |reply| Control::Of {
            id,
            call: call(reply),
        })
    }
}

/// Sends a control message and waits for its answer.
fn exchange<T>(
    control: &mailbox::Sender<Control>,
    timeout: Duration,
    message: impl FnOnce(Reply<T>) -> Control,
) -> Result<T, RemoteError> {
    let (reply, answer) = mpsc::sync_channel(1);
    control
        .try_send(message(reply))
        .map_err(|error| match error {
            mailbox::TrySendError::Full(_) => RemoteError::Busy,
            mailbox::TrySendError::Closed(_) => RemoteError::EngineGone,
        })?;
    match answer.recv_timeout(timeout) {
        Ok(answer) => answer,
        Err(RecvTimeoutError::Timeout) => Err(RemoteError::Timeout(timeout)),
        Err(RecvTimeoutError::Disconnected) => Err(RemoteError::EngineGone),
    }
}
