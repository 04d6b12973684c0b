//! Engine mode `inline`: the engine of our thread, driven by its links' turns.

use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_reactor::{SharedMemory, Span, Wait, Waker};
use flexins::engine::Engine;
use flexins::verbs::{
    Access, AckRequest, Cq, Lkey, Mr, Pd, PostError, QpInit, Qpn, SendWr, VerbsError,
    WorkCompletion,
};

use super::home::{self, Place, SharedHome};
use super::open::{OpenArgs, Outcome};
use super::rdma::{MAX_INLINE_BYTES, queue_sizes};
use super::verbs::Verbs;
use crate::{Error, LostReason, TransportCounters};

/// What a controller may do with memory whose key it was given.
const ACCESS: Access = Access::LOCAL_WRITE
    .union(Access::REMOTE_WRITE)
    .union(Access::REMOTE_READ);
/// How long the end of a queue pair waits for the kernel to have sent what it was given; and once more after that
/// was cancelled.
const SENT_WITHIN: Duration = Duration::from_secs(1);

/// A queue pair of an engine in this thread.
pub(crate) struct InlineVerbs {
    home: SharedHome,
    place: Place,
    /// `None` once closed.
    queue: Option<Queue>,
    /// As they were when it was closed.
    counters: TransportCounters,
}

/// What this queue pair has on the shared engine.
struct Queue {
    pd: Pd,
    cq: Cq,
    qpn: Qpn,
    /// Registered by us, to be closed with us.
    regions: Vec<Lkey>,
}

impl InlineVerbs {
    /// Connects a queue pair on the thread's endpoint; the private data of the answer is in the outcome.
    pub(crate) fn connect(args: &OpenArgs<'_>) -> Result<(InlineVerbs, Outcome), Error> {
        let deadline = Instant::now() + args.options.connect_timeout;
        let mut verbs = Self::begin(args)?;
        loop {
            let turned = verbs.home.borrow_mut().turn(Wait::Until(deadline));
            turned.map_err(Error::Lost)?;
            if let Some(outcome) = verbs.outcome() {
                return Ok((verbs, outcome));
            }
            if Instant::now() >= deadline {
                return Ok((verbs, Outcome::Unreachable));
            }
        }
    }

    /// Starts to connect a queue pair on the thread's endpoint.
    pub(crate) fn begin(args: &OpenArgs<'_>) -> Result<InlineVerbs, Error> {
        let shared = home::of_this_thread(args.options)?;
        let mut home = shared.borrow_mut();
        let place = home.join(args)?;
        let made = home
            .engine(place)
            .ok_or(Error::Lost(LostReason::Closed))
            .and_then(|engine| Queue::connect(engine, args, place));
        let queue = match made {
            Ok(queue) => queue,
            Err(error) => {
                home.leave(place);
                return Err(error);
            }
        };
        drop(home);
        Ok(InlineVerbs {
            home: shared,
            place,
            queue: Some(queue),
            counters: TransportCounters::default(),
        })
    }

    /// How the attempt to connect ended, once it has.
    pub(crate) fn outcome(&mut self) -> Option<Outcome> {
        self.home.borrow_mut().state(self.place)?.outcome.take()
    }

    /// Registers memory, and notes that it is ours to close.
    fn register_with(
        &mut self,
        register: impl FnOnce(&mut Engine, Pd) -> Result<Mr, VerbsError>,
    ) -> Result<Mr, VerbsError> {
        let gone = VerbsError::Unknown("queue pair");
        let queue = self.queue.as_mut().ok_or(gone)?;
        let mut home = self.home.borrow_mut();
        let region = register(home.engine(self.place).ok_or(gone)?, queue.pd)?;
        queue.regions.push(region.lkey);
        Ok(region)
    }
}

impl Queue {
    fn connect(engine: &mut Engine, args: &OpenArgs<'_>, place: Place) -> Result<Queue, Error> {
        let (address, service) = (args.address, args.service());
        let queue = Queue::create(engine, args.depth, place)
            .map_err(|e| Error::Transport(e.to_string()))?;
        match engine.connect(queue.qpn, address, service, &args.request(), Instant::now()) {
            Ok(_) => Ok(queue),
            Err(error) => {
                queue.destroy(engine);
                Err(Error::Transport(error.to_string()))
            }
        }
    }

    fn create(engine: &mut Engine, depth: u16, place: Place) -> Result<Queue, VerbsError> {
        let sizes = queue_sizes(depth);
        let pd = engine.alloc_pd();
        let made = engine.create_cq(sizes.completions).and_then(|cq| {
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
                user: place.user(),
            };
            let qpn = engine.create_qp(&init).inspect_err(|_| {
                let _ = engine.destroy_cq(cq);
            })?;
            Ok((cq, qpn))
        });
        let (cq, qpn) = made.inspect_err(|_| {
            let _ = engine.dealloc_pd(pd);
        })?;
        let queue = Queue {
            pd,
            cq,
            qpn,
            regions: Vec::new(),
        };
        match engine.post_recv_in_place(qpn, sizes.receives) {
            Ok(()) => Ok(queue),
            Err(_) => {
                queue.destroy(engine);
                Err(VerbsError::Parameter("receive credits"))
            }
        }
    }

    /// Takes everything off the engine. The connection ends, if it has not yet.
    fn destroy(self, engine: &mut Engine) {
        let result = engine
            .destroy_qp(self.qpn, Instant::now())
            .and_then(|()| engine.destroy_cq(self.cq));
        debug_assert_eq!(result, Ok(()));
        for lkey in self.regions {
            let result = engine.deregister(lkey);
            debug_assert_eq!(result, Ok(()));
        }
        let result = engine.dealloc_pd(self.pd);
        debug_assert_eq!(result, Ok(()));
    }
}

impl Verbs for InlineVerbs {
    fn now(&self) -> Instant {
        self.home.borrow().now()
    }

    fn waker(&self) -> Option<Waker> {
        Some(self.home.borrow_mut().reactor().waker())
    }

    fn register(&mut self, memory: Span) -> Result<Mr, VerbsError> {
        self.register_with(|engine, pd| engine.register(pd, memory, ACCESS))
    }

    fn register_memory(&mut self, memory: &Arc<SharedMemory>) -> Result<Mr, VerbsError> {
        self.register_with(|engine, pd| engine.register_memory(pd, memory, 0, memory.len(), ACCESS))
    }

    fn deregister(&mut self, lkey: u32) -> Result<(), VerbsError> {
        let gone = VerbsError::Unknown("queue pair");
        let queue = self.queue.as_mut().ok_or(gone)?;
        let lkey = Lkey::from_bits(lkey);
        let mut home = self.home.borrow_mut();
        home.engine(self.place).ok_or(gone)?.deregister(lkey)?;
        queue.regions.retain(|region| *region != lkey);
        Ok(())
    }

    #[inline]
    fn post_send(&mut self, wr: &SendWr<'_>) -> Result<(), PostError> {
        let queue = self.queue.as_ref().ok_or(PostError::UnknownQp)?;
        let mut home = self.home.borrow_mut();
        let engine = home.engine(self.place).ok_or(PostError::UnknownQp)?;
        engine.post_send(queue.qpn, wr)
    }

    fn post_receives(&mut self, count: u32) -> Result<(), PostError> {
        let queue = self.queue.as_ref().ok_or(PostError::UnknownQp)?;
        let mut home = self.home.borrow_mut();
        let engine = home.engine(self.place).ok_or(PostError::UnknownQp)?;
        engine.post_recv_in_place(queue.qpn, count)
    }

    #[inline]
    fn turn(&mut self, wait: Wait, out: &mut Vec<WorkCompletion>) -> Result<(), LostReason> {
        let before = out.len();
        // What is there already, because another link turned, is not to be slept on.
        let over = self.collect(out).is_err();
        let ready = over || out.len() > before;
        let wait = if ready { Wait::Poll } else { wait };
        self.home.borrow_mut().turn(wait)?;
        self.collect(out)
    }

    #[inline]
    fn collect(&mut self, out: &mut Vec<WorkCompletion>) -> Result<(), LostReason> {
        let queue = self.queue.as_ref().ok_or(LostReason::Closed)?;
        let mut home = self.home.borrow_mut();
        if let Some(engine) = home.engine(self.place) {
            engine.poll_cq(queue.cq, out);
        }
        match home.state(self.place) {
            Some(state) => state.lost.map_or(Ok(()), Err),
            None => Err(LostReason::Closed),
        }
    }

    fn pause(&mut self) {
        if self.queue.is_some() {
            let mut home = self.home.borrow_mut();
            home.prepare_sleep();
            // A failing reactor shows at the next turn.
            let _ = home.turn(Wait::Poll);
        }
    }

    fn close(&mut self, until: Instant) {
        let Some(queue) = self.queue.take() else {
            return;
        };
        let mut home = self.home.borrow_mut();
        let place = self.place;
        // The request to disconnect leaves in any case; its confirmation is waited for until `until`.
        if let Some(engine) = home.engine(place) {
            let _ = engine.disconnect(queue.qpn, Instant::now());
        }
        loop {
            let wait = Wait::Until(until.max(home.now()));
            if home.turn(wait).is_err() {
                break;
            }
            let over = home.state(place).is_none_or(|state| state.disconnected);
            if over || Instant::now() >= until {
                break;
            }
        }
        if let Some(engine) = home.engine(place) {
            queue.destroy(engine);
        }
        // Nobody but the kernel can touch the caller's memory now: wait until it has sent what names it.
        let mut give_up = Instant::now() + SENT_WITHIN;
        let mut cancelled = false;
        while home.turn(Wait::Poll).is_ok() && home.is_sending(place) {
            if Instant::now() < give_up {
                let _ = home.turn(Wait::Until(give_up));
            } else if cancelled {
                tracing::warn!("the kernel does not let go of what it was to send");
                break;
            } else {
                cancelled = true;
                home.cancel_sends(place);
                give_up = Instant::now() + SENT_WITHIN;
            }
        }
        self.counters = home.counters(place);
        home.leave(place);
    }

    fn counters(&self) -> TransportCounters {
        match self.queue {
            Some(_) => self.home.borrow().counters(self.place),
            None => self.counters,
        }
    }
}

impl Drop for InlineVerbs {
    fn drop(&mut self) {
        let now = self.now();
        self.close(now);
    }
}
