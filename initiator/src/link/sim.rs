//! A queue pair on an engine of a simulated network, in virtual time.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_reactor::{SharedMemory, Span, Wait, Waker};
use flexins::engine::{ConnEvent, Engine};
use flexins::port::sim::NodeId;
use flexins::verbs::{
    Access, AckRequest, Cq, Lkey, Mr, Pd, PostError, QpInit, Qpn, SendWr, VerbsError, WcStatus,
    WorkCompletion,
};

use super::open::{OpenArgs, Outcome};
use super::rdma::{MAX_INLINE_BYTES, queue_sizes};
use super::verbs::Verbs;
use crate::sim::World;
use crate::{Error, LostReason, TransportCounters};

/// What a controller may do with memory whose key it was given.
const ACCESS: Access = Access::LOCAL_WRITE
    .union(Access::REMOTE_WRITE)
    .union(Access::REMOTE_READ);
/// How long a wait without a limit lasts.
const LONG: Duration = Duration::from_millis(100);

/// A queue pair with a node of its own.
pub(crate) struct SimVerbs {
    world: Rc<RefCell<dyn World>>,
    node: NodeId,
    pd: Pd,
    cq: Cq,
    qpn: Qpn,
    lost: Option<LostReason>,
    disconnected: bool,
    closed: bool,
}

impl SimVerbs {
    pub(crate) fn connect(
        world: &Rc<RefCell<dyn World>>,
        args: &OpenArgs<'_>,
    ) -> Result<(Self, Outcome), Error> {
        let mut connecting = Self::begin(world, args)?;
        let deadline = connecting.clock() + args.options.connect_timeout;
        loop {
            let stepped = world.borrow_mut().step(deadline);
            if let Some(outcome) = connecting.outcome() {
                return Ok((connecting, outcome));
            }
            if !stepped {
                return Ok((connecting, Outcome::Unreachable));
            }
        }
    }

    /// Starts to connect.
    pub(crate) fn begin(
        world: &Rc<RefCell<dyn World>>,
        args: &OpenArgs<'_>,
    ) -> Result<Self, Error> {
        let sizes = queue_sizes(args.depth);
        let verbs = |error: VerbsError| Error::Transport(error.to_string());
        let node = world.borrow_mut().add_node(args.endpoint(0).engine);
        let mut world_now = world.borrow_mut();
        let net = world_now.net();
        let now = net.now();
        let engine = net.engine(node);
        let pd = engine.alloc_pd();
        let cq = engine.create_cq(sizes.completions).map_err(verbs)?;
        let init = QpInit {
            pd,
            send_cq: cq,
            recv_cq: cq,
            max_send_wr: sizes.sends,
            max_recv_wr: sizes.receives,
            max_sge: 1,
            max_inline: MAX_INLINE_BYTES as u32,
            inline_recv: true,
            ack_request: AckRequest::Never,
            user: 0,
        };
        let qpn = engine.create_qp(&init).map_err(verbs)?;
        engine
            .post_recv_in_place(qpn, sizes.receives)
            .map_err(|error| Error::Transport(error.to_string()))?;
        engine
            .connect(qpn, args.address, args.service(), &args.request(), now)
            .map_err(|error| Error::Transport(error.to_string()))?;
        Ok(Self {
            world: Rc::clone(world),
            node,
            pd,
            cq,
            qpn,
            lost: None,
            disconnected: false,
            closed: false,
        })
    }

    /// How the attempt to connect ended, once it has.
    pub(crate) fn outcome(&mut self) -> Option<Outcome> {
        while let Some(event) = self.with_engine(Engine::poll_cm) {
            match event {
                ConnEvent::Established {
                    private,
                    params,
                    mtu_bytes,
                    ..
                } => {
                    return Some(Outcome::Established {
                        private: private.as_slice().to_vec(),
                        flexins: params.is_some(),
                        mtu_bytes,
                    });
                }
                ConnEvent::Rejected {
                    reason, private, ..
                } => {
                    return Some(Outcome::Rejected {
                        reason,
                        private: private.as_slice().to_vec(),
                    });
                }
                ConnEvent::ConnectRequest { .. } => {}
                _ => return Some(Outcome::Unreachable),
            }
        }
        None
    }

    fn with_engine<R>(&self, act: impl FnOnce(&mut Engine) -> R) -> R {
        let mut world = self.world.borrow_mut();
        act(world.net().engine(self.node))
    }

    fn take_events(&mut self) {
        while let Some(event) = self.with_engine(Engine::poll_cm) {
            let reason = match event {
                ConnEvent::Disconnected { .. } => {
                    self.disconnected = true;
                    LostReason::PeerClosed
                }
                ConnEvent::Broken {
                    status: WcStatus::RetryExcErr | WcStatus::RnrRetryExcErr,
                    ..
                } => LostReason::Retries,
                ConnEvent::Broken { .. } => LostReason::Protocol,
                _ => continue,
            };
            self.lost.get_or_insert(reason);
        }
    }
}

impl Verbs for SimVerbs {
    fn now(&self) -> Instant {
        self.clock()
    }

    fn clock(&self) -> Instant {
        self.world.borrow_mut().net().now()
    }

    fn waker(&self) -> Option<Waker> {
        None
    }

    fn register(&mut self, memory: Span) -> Result<Mr, VerbsError> {
        let pd = self.pd;
        self.with_engine(|engine| engine.register(pd, memory, ACCESS))
    }

    fn register_memory(&mut self, memory: &Arc<SharedMemory>) -> Result<Mr, VerbsError> {
        let pd = self.pd;
        self.with_engine(|engine| engine.register_memory(pd, memory, 0, memory.len(), ACCESS))
    }

    fn deregister(&mut self, lkey: u32) -> Result<(), VerbsError> {
        self.with_engine(|engine| engine.deregister(Lkey::from_bits(lkey)))
    }

    fn post_send(&mut self, wr: &SendWr<'_>) -> Result<(), PostError> {
        self.with_engine(|engine| engine.post_send(self.qpn, wr))
    }

    fn post_receives(&mut self, count: u32) -> Result<(), PostError> {
        self.with_engine(|engine| engine.post_recv_in_place(self.qpn, count))
    }

    fn turn(&mut self, wait: Wait, out: &mut Vec<WorkCompletion>) -> Result<(), LostReason> {
        if self.closed {
            return Err(LostReason::Closed);
        }
        let cq = self.cq;
        if self.with_engine(|engine| engine.poll_cq(cq, out)) == 0 {
            let now = self.clock();
            let limit = match wait {
                Wait::Poll => now,
                Wait::Until(until) => until.max(now),
                _ => now + LONG,
            };
            self.world.borrow_mut().step(limit);
            self.with_engine(|engine| engine.poll_cq(cq, out));
        }
        self.take_events();
        self.lost.map_or(Ok(()), Err)
    }

    fn collect(&mut self, out: &mut Vec<WorkCompletion>) -> Result<(), LostReason> {
        if self.closed {
            return Err(LostReason::Closed);
        }
        let cq = self.cq;
        self.with_engine(|engine| engine.poll_cq(cq, out));
        self.take_events();
        self.lost.map_or(Ok(()), Err)
    }

    fn pause(&mut self) {
        self.with_engine(Engine::flush_acks);
    }

    fn close(&mut self, until: Instant) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        let now = self.clock();
        // Fails when the connection is gone already.
        let _ = self.with_engine(|engine| engine.disconnect(self.qpn, now));
        while !self.disconnected && self.clock() < until {
            if !self.world.borrow_mut().step(until) {
                break;
            }
            self.take_events();
        }
        let now = self.clock();
        let _ = self.with_engine(|engine| engine.destroy_qp(self.qpn, now));
    }

    fn counters(&self) -> TransportCounters {
        TransportCounters {
            engine: self.with_engine(|engine| *engine.counters()),
            ..TransportCounters::default()
        }
    }
}
