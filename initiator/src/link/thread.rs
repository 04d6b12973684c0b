//! Engine mode `thread`: the engine has a thread of its own, we meet it in shared-memory rings.

use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_reactor::{HugePages, SharedMemory, Span, Wait, Waker};
use flexins::remote::{
    Client, ClientEvent, EngineThread, PostFailure, QueuePairConfig, RemoteError, ThreadConfig,
    spawn,
};
use flexins::verbs::{
    Access, AckRequest, Lkey, Mr, PostError, Qpn, RecvWr, SendFlags, SendWr, VerbsError, WcStatus,
    WorkCompletion,
};

use super::open::{OpenArgs, Outcome};
use super::rdma::{MAX_INLINE_BYTES, queue_sizes};
use super::verbs::Verbs;
use crate::{Error, LostReason, TransportCounters};

/// What a controller may do with memory whose key it was given.
const ACCESS: Access = Access::LOCAL_WRITE
    .union(Access::REMOTE_WRITE)
    .union(Access::REMOTE_READ);
/// Room for a response capsule: 16 bytes, on a line of its own half.
const RESPONSE_BYTES: u32 = 32;

/// A queue pair on an engine thread.
pub(crate) struct ThreadVerbs {
    /// Goes before the thread and the memory.
    client: Option<Client>,
    qpn: Qpn,
    _engine: Arc<EngineThread>,
    /// Where responses land: as many places as receive requests, used in turn.
    _responses: Arc<SharedMemory>,
    response_region: Mr,
    receives: u32,
    next_receive: u32,
    /// Receive requests that found the pipe full.
    missing_receives: u32,
    poll_budget: Duration,
    /// Unsignalled sends since the last signalled one.
    unsignalled: u32,
    /// After so many a send is signalled for our own books.
    signal_every: u32,
    now: Instant,
    lost: Option<LostReason>,
    /// Registrations of memory that is the caller's.
    spans: Vec<Lkey>,
    /// As they were when it was closed.
    counters: TransportCounters,
}

/// In a request's id: signalled only so that the send queue gives places back. As with hardware
/// verbs, the client learns that unsignalled requests are done from a later signalled one.
const FOR_THE_BOOKS: u64 = 1 << 63;

/// Starts an engine thread for the queues of one controller.
pub(crate) fn start_engine(
    args: &OpenArgs<'_>,
    core: Option<usize>,
) -> Result<Arc<EngineThread>, Error> {
    let config = ThreadConfig {
        name: "flexblk-engine",
        core,
        poll_budget: args.options.poll_budget,
        ..ThreadConfig::default()
    };
    Ok(Arc::new(
        spawn(args.endpoint(0), config).map_err(transport)?,
    ))
}

impl ThreadVerbs {
    /// Connects a queue pair of the engine thread.
    pub(crate) fn connect(
        args: &OpenArgs<'_>,
        engine: Arc<EngineThread>,
    ) -> Result<(ThreadVerbs, Outcome), Error> {
        let sizes = queue_sizes(args.depth);
        let mut client = engine
            .client(sizes.sends + sizes.receives)
            .map_err(transport)?;
        let qpn = client
            .create_qp(&QueuePairConfig {
                max_send_wr: sizes.sends,
                max_recv_wr: sizes.receives,
                max_sge: 1,
                max_inline: MAX_INLINE_BYTES as u32,
                ack_request: AckRequest::Never,
            })
            .map_err(transport)?;
        let len = u64::from(sizes.receives) * u64::from(RESPONSE_BYTES);
        let responses = SharedMemory::create("flexblk responses", len, HugePages::No)
            .map_err(|e| Error::Transport(format!("allocating response buffers: {e}")))?;
        let response_region = client
            .register(&responses, 0, len, Access::LOCAL_WRITE)
            .map_err(transport)?;
        let mut verbs = ThreadVerbs {
            client: Some(client),
            qpn,
            _engine: engine,
            _responses: responses,
            response_region,
            receives: sizes.receives,
            next_receive: 0,
            missing_receives: 0,
            poll_budget: args.options.poll_budget,
            unsignalled: 0,
            signal_every: (sizes.sends / 4).max(1),
            now: Instant::now(),
            lost: None,
            spans: Vec::new(),
            counters: TransportCounters::default(),
        };
        verbs
            .post_receives(sizes.receives)
            .map_err(|e| Error::Transport(e.to_string()))?;
        let limit = args.options.connect_timeout;
        let client = verbs
            .client
            .as_mut()
            .ok_or(Error::Lost(LostReason::Closed))?;
        let connected = client.connect(qpn, args.address, args.service(), &args.request(), limit);
        let outcome = match connected {
            Ok(connected) => Outcome::Established {
                private: connected.private.as_slice().to_vec(),
                flexins: connected.params.is_some(),
                mtu_bytes: connected.mtu_bytes,
            },
            Err(RemoteError::Rejected { reason, private }) => Outcome::Rejected {
                reason,
                private: private.as_slice().to_vec(),
            },
            Err(RemoteError::Unreachable | RemoteError::Timeout(_)) => Outcome::Unreachable,
            Err(other) => return Err(transport(other)),
        };
        Ok((verbs, outcome))
    }

    /// Posts what is missing; stops quietly where the pipe is full.
    fn refill(&mut self) -> Result<(), PostError> {
        let Some(client) = &mut self.client else {
            return Err(PostError::UnknownQp);
        };
        while self.missing_receives > 0 {
            let offset = u64::from(self.next_receive) * u64::from(RESPONSE_BYTES);
            let wr = RecvWr {
                wr_id: u64::from(self.next_receive),
                sges: &[self.response_region.sge(offset, RESPONSE_BYTES)],
            };
            match client.post_recv(self.qpn, &wr) {
                Ok(()) => {
                    self.missing_receives -= 1;
                    self.next_receive = (self.next_receive + 1) % self.receives.max(1);
                }
                Err(PostFailure::PipeFull) => return Ok(()),
                Err(failure) => return Err(post_error(failure)),
            }
        }
        Ok(())
    }

    fn take_events(&mut self) {
        let Some(client) = &mut self.client else {
            return;
        };
        while let Some(event) = client.poll_event() {
            let reason = match event {
                ClientEvent::Disconnected { .. } | ClientEvent::Failed { .. } => {
                    LostReason::PeerClosed
                }
                ClientEvent::Broken {
                    status: WcStatus::RetryExcErr | WcStatus::RnrRetryExcErr,
                    ..
                } => LostReason::Retries,
                ClientEvent::Broken { .. } => LostReason::Protocol,
                ClientEvent::Established { .. } => continue,
            };
            self.lost.get_or_insert(reason);
        }
        if client.is_gone() {
            self.lost.get_or_insert(LostReason::EngineGone);
        }
    }
}

impl Verbs for ThreadVerbs {
    fn now(&self) -> Instant {
        self.now
    }

    fn waker(&self) -> Option<Waker> {
        None
    }

    fn register(&mut self, memory: Span) -> Result<Mr, VerbsError> {
        let gone = VerbsError::Unknown("queue pair");
        let client = self.client.as_mut().ok_or(gone)?;
        match client.register_span(memory, ACCESS) {
            Ok(region) => {
                self.spans.push(region.lkey);
                Ok(region)
            }
            Err(RemoteError::Verbs(error)) => Err(error),
            Err(_) => Err(VerbsError::Unknown("engine thread")),
        }
    }

    fn register_memory(&mut self, memory: &Arc<SharedMemory>) -> Result<Mr, VerbsError> {
        let client = self
            .client
            .as_mut()
            .ok_or(VerbsError::Unknown("queue pair"))?;
        match client.register(memory, 0, memory.len(), ACCESS) {
            Ok(region) => Ok(region),
            Err(RemoteError::Verbs(error)) => Err(error),
            Err(_) => Err(VerbsError::Unknown("engine thread")),
        }
    }

    fn deregister(&mut self, lkey: u32) -> Result<(), VerbsError> {
        let client = self
            .client
            .as_mut()
            .ok_or(VerbsError::Unknown("queue pair"))?;
        let lkey = Lkey::from_bits(lkey);
        self.spans.retain(|span| *span != lkey);
        client.deregister(lkey).map_err(|error| match error {
            RemoteError::Verbs(error) => error,
            _ => VerbsError::Unknown("engine thread"),
        })
    }

    fn post_send(&mut self, wr: &SendWr<'_>) -> Result<(), PostError> {
        let client = self.client.as_mut().ok_or(PostError::UnknownQp)?;
        let signalled = wr.flags.contains(SendFlags::SIGNALED);
        let for_the_books = !signalled && self.unsignalled + 1 >= self.signal_every;
        let posted = if for_the_books {
            client.post_send(
                self.qpn,
                &SendWr {
                    wr_id: wr.wr_id | FOR_THE_BOOKS,
                    flags: wr.flags | SendFlags::SIGNALED,
                    ..*wr
                },
            )
        } else {
            client.post_send(self.qpn, wr)
        };
        posted.map_err(post_error)?;
        self.unsignalled = if signalled || for_the_books {
            0
        } else {
            self.unsignalled + 1
        };
        Ok(())
    }

    fn post_receives(&mut self, count: u32) -> Result<(), PostError> {
        self.missing_receives += count;
        self.refill()
    }

    fn turn(&mut self, wait: Wait, out: &mut Vec<WorkCompletion>) -> Result<(), LostReason> {
        if self.missing_receives > 0 {
            self.refill().map_err(|_| LostReason::PeerClosed)?;
        }
        let client = self.client.as_mut().ok_or(LostReason::Closed)?;
        let before = out.len();
        let mut found = client.poll_cq(out);
        self.now = Instant::now();
        if let Wait::Until(until) = wait
            && found == 0
        {
            let spin_until = until.min(self.now + self.poll_budget);
            while found == 0 && self.now < spin_until {
                std::hint::spin_loop();
                found = client.poll_cq(out);
                self.now = Instant::now();
            }
            if found == 0 && self.now < until {
                client.wait(until.saturating_duration_since(self.now));
                client.poll_cq(out);
                self.now = Instant::now();
            }
        }
        let mut place = 0;
        out.retain_mut(|wc| {
            place += 1;
            if place <= before || wc.is_recv() || wc.wr_id & FOR_THE_BOOKS == 0 {
                return true;
            }
            wc.wr_id &= !FOR_THE_BOOKS;
            wc.status != WcStatus::Success
        });
        self.take_events();
        self.lost.map_or(Ok(()), Err)
    }

    fn pause(&mut self) {
        // The engine thread acknowledges by itself.
        if let Some(client) = &mut self.client {
            client.flush();
        }
    }

    fn close(&mut self, _until: Instant) {
        let Some(mut client) = self.client.take() else {
            return;
        };
        self.counters = counters_of(&client);
        // The engine thread tells the peer and goes on without us; destroying the queue pair there ends all
        // use of our memory by the engine, and taking the registrations away that by the kernel.
        let _ = client.disconnect(self.qpn);
        insist(|| client.destroy_qp(self.qpn));
        for lkey in self.spans.drain(..) {
            insist(|| client.deregister(lkey));
        }
    }

    fn counters(&self) -> TransportCounters {
        self.client.as_ref().map_or(self.counters, counters_of)
    }
}

/// What the engine thread of a client has counted: for all of its queue pairs together.
fn counters_of(client: &Client) -> TransportCounters {
    let counted = client.counters().unwrap_or_default();
    TransportCounters {
        engine: counted.engine,
        port: counted.port,
        ..TransportCounters::default()
    }
}

/// Repeats a call whose end the caller's memory depends on, until the engine thread has answered or ended.
fn insist(mut call: impl FnMut() -> Result<(), RemoteError>) {
    while let Err(error @ (RemoteError::Timeout(_) | RemoteError::Busy)) = call() {
        tracing::warn!(%error, "an engine thread does not give memory back yet");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn transport(error: RemoteError) -> Error {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    Error::Transport(text)
}

fn post_error(failure: PostFailure) -> PostError {
    match failure {
        PostFailure::Verbs(error) => error,
        PostFailure::PipeFull => PostError::QueueFull,
        PostFailure::EngineGone => PostError::UnknownQp,
    }
}
