//! Engine mode `inline`: reactor and endpoint of our own, in the caller's thread.

use std::sync::Arc;
use std::time::Instant;

use flexblk_reactor::{Completion, Config, Reactor, SharedMemory, Span, Wait, Waker};
use flexins::endpoint::Endpoint;
use flexins::engine::ConnEvent;
use flexins::verbs::{
    Access, Cq, Lkey, Pd, PostError, QpInit, Qpn, SendWr, VerbsError, WcStatus, WorkCompletion,
};

use super::open::{OpenArgs, Outcome};
use super::rdma::{MAX_INLINE_BYTES, queue_sizes};
use super::verbs::{Registered, Verbs};
use crate::{Error, LostReason, TransportCounters};

/// Owner of the endpoint's operations on our reactor.
const PORT: u8 = 1;
/// What a controller may do with memory whose key it was given.
const ACCESS: Access = Access::LOCAL_WRITE
    .union(Access::REMOTE_WRITE)
    .union(Access::REMOTE_READ);

/// A queue pair of an engine in this thread.
pub(crate) struct InlineVerbs {
    /// `None` once closed.
    inner: Option<Inner>,
    /// As they were when it was closed.
    counters: TransportCounters,
}

struct Inner {
    // The reactor goes first: its drop waits for operations that use the endpoint's buffers and the caller's memory.
    reactor: Reactor,
    endpoint: Endpoint,
    pd: Pd,
    cq: Cq,
    qpn: Qpn,
    completions: Vec<Completion>,
    /// A message that is no response came.
    stray_message: bool,
    lost: Option<LostReason>,
    disconnected: bool,
}

impl InlineVerbs {
    /// Makes an endpoint and connects a queue pair; the private data of the answer is in the outcome.
    pub(crate) fn connect(args: &OpenArgs<'_>) -> Result<(InlineVerbs, Outcome), Error> {
        let deadline = Instant::now() + args.options.connect_timeout;
        let config = Config {
            poll_budget: args.options.poll_budget,
            name: "flexblk queue",
            ..Config::default()
        };
        let mut reactor = Reactor::new(&config).map_err(|e| Error::Transport(e.to_string()))?;
        let mut endpoint = Endpoint::bind(&mut reactor, PORT, args.endpoint())
            .map_err(|e| Error::Transport(e.to_string()))?;
        let sizes = queue_sizes(args.depth);
        let verbs = |e: VerbsError| Error::Transport(e.to_string());
        let engine = endpoint.engine();
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
            user: 0,
        };
        let qpn = engine.create_qp(&init).map_err(verbs)?;
        engine
            .post_recv_in_place(qpn, sizes.receives)
            .map_err(|e| Error::Transport(e.to_string()))?;
        let mut inner = Inner {
            reactor,
            endpoint,
            pd,
            cq,
            qpn,
            completions: Vec::with_capacity(256),
            stray_message: false,
            lost: None,
            disconnected: false,
        };
        let now = Instant::now();
        inner
            .endpoint
            .engine()
            .connect(qpn, args.address, args.service(), &args.request(), now)
            .map_err(|e| Error::Transport(e.to_string()))?;
        let outcome = inner.wait_connected(deadline)?;
        Ok((
            InlineVerbs {
                inner: Some(inner),
                counters: TransportCounters::default(),
            },
            outcome,
        ))
    }
}

impl Inner {
    fn wait_connected(&mut self, deadline: Instant) -> Result<Outcome, Error> {
        loop {
            self.turn(Wait::Until(deadline)).map_err(Error::Lost)?;
            while let Some(event) = self.endpoint.engine().poll_cm() {
                match event {
                    ConnEvent::Established {
                        private,
                        params,
                        mtu_bytes,
                        ..
                    } => {
                        let private = private.as_slice().to_vec();
                        return Ok(Outcome::Established {
                            private,
                            flexins: params.is_some(),
                            mtu_bytes,
                        });
                    }
                    ConnEvent::Rejected {
                        reason, private, ..
                    } => {
                        return Ok(Outcome::Rejected {
                            reason,
                            private: private.as_slice().to_vec(),
                        });
                    }
                    ConnEvent::Unreachable { .. }
                    | ConnEvent::Disconnected { .. }
                    | ConnEvent::Broken { .. } => {
                        return Ok(Outcome::Unreachable);
                    }
                    ConnEvent::ConnectRequest { .. } => {}
                }
            }
            if Instant::now() >= deadline {
                return Ok(Outcome::Unreachable);
            }
        }
    }

    /// Once around: send, receive, timers.
    #[inline]
    fn turn(&mut self, wait: Wait) -> Result<(), LostReason> {
        let mut wait = wait;
        let now = self.reactor.now();
        if wait != Wait::Poll {
            if self.reactor.will_sleep() {
                // Last chance to acknowledge what was received before nobody is awake to do it.
                self.endpoint.prepare_sleep(now);
            }
            if let Some(timer) = self.endpoint.next_timeout() {
                wait = match wait {
                    Wait::Until(until) => Wait::Until(until.min(timer)),
                    _ => Wait::Until(timer),
                };
            }
        }
        self.endpoint.flush(&mut self.reactor, now);
        self.reactor
            .turn(wait, &mut self.completions)
            .map_err(|error| {
                tracing::error!(%error, "reactor");
                LostReason::Protocol
            })?;
        let stray = &mut self.stray_message;
        for completion in self.completions.drain(..) {
            if completion.token.owner() == PORT {
                self.endpoint
                    .on_completion(&mut self.reactor, &completion, &mut |_, _, _| *stray = true);
            }
        }
        let now = self.reactor.now();
        if self.endpoint.next_timeout().is_some_and(|at| at <= now) {
            self.endpoint
                .handle_timeout(now, &mut |_, _, _| *stray = true);
        }
        Ok(())
    }

    fn take_events(&mut self) {
        while let Some(event) = self.endpoint.engine().poll_cm() {
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
        if self.stray_message {
            self.lost.get_or_insert(LostReason::Protocol);
        }
    }
}

impl Verbs for InlineVerbs {
    fn now(&self) -> Instant {
        self.inner
            .as_ref()
            .map_or_else(Instant::now, |inner| inner.reactor.now())
    }

    fn waker(&self) -> Option<Waker> {
        self.inner.as_ref().map(|inner| inner.reactor.waker())
    }

    fn register(&mut self, memory: Span) -> Result<Registered, VerbsError> {
        let inner = self
            .inner
            .as_mut()
            .ok_or(VerbsError::Unknown("queue pair"))?;
        inner
            .endpoint
            .engine()
            .register(inner.pd, memory, ACCESS)
            .map(Registered::Region)
    }

    fn register_memory(&mut self, memory: &Arc<SharedMemory>) -> Result<Registered, VerbsError> {
        let inner = self
            .inner
            .as_mut()
            .ok_or(VerbsError::Unknown("queue pair"))?;
        let engine = inner.endpoint.engine();
        engine
            .register_memory(inner.pd, memory, 0, memory.len(), ACCESS)
            .map(Registered::Region)
    }

    fn deregister(&mut self, lkey: u32) -> Result<(), VerbsError> {
        let inner = self
            .inner
            .as_mut()
            .ok_or(VerbsError::Unknown("queue pair"))?;
        inner.endpoint.engine().deregister(Lkey::from_bits(lkey))
    }

    #[inline]
    fn post_send(&mut self, wr: &SendWr<'_>) -> Result<(), PostError> {
        let inner = self.inner.as_mut().ok_or(PostError::UnknownQp)?;
        inner.endpoint.engine().post_send(inner.qpn, wr)
    }

    fn post_receives(&mut self, count: u32) -> Result<(), PostError> {
        let inner = self.inner.as_mut().ok_or(PostError::UnknownQp)?;
        inner.endpoint.engine().post_recv_in_place(inner.qpn, count)
    }

    #[inline]
    fn turn(&mut self, wait: Wait, out: &mut Vec<WorkCompletion>) -> Result<(), LostReason> {
        let inner = self.inner.as_mut().ok_or(LostReason::Closed)?;
        // What is there already is not to be slept on.
        let wait = if inner.endpoint.engine().poll_cq(inner.cq, out) > 0 {
            Wait::Poll
        } else {
            wait
        };
        inner.turn(wait)?;
        inner.endpoint.engine().poll_cq(inner.cq, out);
        inner.take_events();
        inner.lost.map_or(Ok(()), Err)
    }

    fn pause(&mut self) {
        if let Some(inner) = &mut self.inner {
            let now = inner.reactor.now();
            inner.endpoint.prepare_sleep(now);
            // A failing reactor shows at the next turn.
            let _ = inner.turn(Wait::Poll);
        }
    }

    fn close(&mut self, until: Instant) {
        let Some(mut inner) = self.inner.take() else {
            return;
        };
        // The request to disconnect leaves in any case; its confirmation is waited for until `until`.
        let _ = inner
            .endpoint
            .engine()
            .disconnect(inner.qpn, Instant::now());
        loop {
            if inner
                .turn(Wait::Until(until.max(inner.reactor.now())))
                .is_err()
            {
                break;
            }
            inner.take_events();
            if inner.disconnected || Instant::now() >= until {
                break;
            }
        }
        let _ = inner
            .endpoint
            .engine()
            .destroy_qp(inner.qpn, Instant::now());
        self.counters = inner.counters();
        // Dropping the reactor waits for the kernel; after that nobody touches the caller's memory.
    }

    fn counters(&self) -> TransportCounters {
        self.inner.as_ref().map_or(self.counters, Inner::counters)
    }
}

impl Inner {
    fn counters(&self) -> TransportCounters {
        TransportCounters {
            engine: *self.endpoint.counters(),
            port: self.endpoint.port_counters(),
        }
    }
}
