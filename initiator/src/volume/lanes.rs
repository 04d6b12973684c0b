//! The queue pairs of one channel: one on each path that is up, opened and given up without waiting.
//!
//! Whoever turns the thread's reactor calls [`before_turn`](Lanes::before_turn), turns, and calls
//! [`after_turn`](Lanes::after_turn). The choice of paths and what happens to requests is [`Multipath`]'s.

use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_reactor::{HugePages, SharedMemory, Span, Wait};

use super::MultipathOptions;
use super::Request;
use super::fence::Fence;
use super::multipath::{Access, Lost, Multipath, Next, Released};
use crate::queue_pair::opening::QueuePairOpening;
use crate::{Busy, Command, Error, IoCompletion, LostReason, Nsid, QueuePair};

/// How long a turn sleeps at most before it looks whether a controller is lost.
const LONGEST_SLEEP: Duration = Duration::from_millis(100);
/// How long the controller of a silent path has to answer.
pub(crate) const ANSWER_WITHIN: Duration = Duration::from_millis(400);
/// How often silent and slow paths are looked for.
const TICK: Duration = Duration::from_millis(50);
/// Pause after a queue pair could not be connected although its controller is there; doubles up to `LONGEST_PAUSE`.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Tags of probes: beyond those of requests.
const PROBE: u64 = 1 << 32;

/// Where the controllers of the paths are.
pub(crate) trait Source {
    /// Changes with what [`current`](Self::current) says.
    fn epoch(&self) -> u64;
    /// The path's controller, while it has one.
    fn current(&self, path: usize) -> Option<Current>;
    /// Starts to connect a queue pair with that controller.
    fn begin(&self, path: usize, depth: u16) -> Result<QueuePairOpening, Error>;
    /// A queue pair of it is lost, and so is the controller.
    fn failed(&self, path: usize, number: u64, reason: LostReason);
    /// A queue pair could not be connected.
    fn trouble(&self, path: usize, error: &Error);
    /// The path is silent: its controller is asked for a sign of life, and lost without one.
    fn probe(&self, path: usize);
    /// A command was told that there is no access by this path.
    fn read_ana(&self, path: usize);
    /// No path will ever come back.
    fn is_gone(&self) -> bool;
}

/// A path's controller, as far as lanes know it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Current {
    /// Each connection has another, from 1 on.
    pub(crate) number: u64,
    pub(crate) nsid: Nsid,
    pub(crate) access: Access,
    /// How long it goes on after we fell silent.
    pub(crate) silent: Duration,
    /// How long a command may take after the controller has ended.
    pub(crate) quiesce: Duration,
}

impl Current {
    /// From when on nothing that it got until `now` is carried out any more; `told`: it ended the connection.
    fn dead_at(&self, told: bool, now: Instant) -> Instant {
        let silent = if told { Duration::ZERO } else { self.silent };
        now + silent + self.quiesce
    }
}

/// A channel without its reactor.
pub(crate) struct Lanes {
    lanes: Vec<Lane>,
    multipath: Multipath,
    source: Box<dyn Source>,
    epoch: u64,
    /// Something is to be seen to before the next turn.
    unsettled: bool,
    /// Lanes that are being opened.
    opening: usize,
    depth: u16,
    memory: Vec<Arc<SharedMemory>>,
    /// Where probes read to, a block for each path.
    probe_block: Option<Span>,
    clock: Option<Instant>,
    next_tick: Instant,
    completions: Vec<IoCompletion>,
    silent: Vec<usize>,
    /// Why the last queue pair could not be connected.
    trouble: Option<Error>,
}

struct Lane {
    current: Option<Current>,
    state: State,
    probed: Option<Instant>,
    pause: Duration,
}

enum State {
    /// `Some`: when it is tried again with the same controller.
    Down(Option<Instant>),
    Opening(Box<QueuePairOpening>),
    Up(Box<QueuePair>),
}

impl Lanes {
    /// No path is connected yet.
    pub(crate) fn new(
        source: Box<dyn Source>,
        paths: usize,
        depth: u16,
        block_size: u32,
        options: &MultipathOptions,
        fence: Option<Arc<Fence>>,
        now: Instant,
    ) -> Result<Lanes, Error> {
        let multipath = Multipath::new(
            depth,
            paths,
            options.iopolicy,
            options.patience(),
            fence,
            now,
        );
        let mut memory = Vec::new();
        let mut probe_block = None;
        if paths > 1 {
            let block = SharedMemory::create("flexblk probe", block_size.into(), HugePages::No)
                .map_err(|e| Error::Transport(format!("allocating a buffer: {e}")))?;
            probe_block = block.span(0, block_size);
            memory.push(block);
        }
        let lane = |_| Lane {
            current: None,
            state: State::Down(None),
            probed: None,
            pause: PAUSE,
        };
        Ok(Lanes {
            lanes: (0..paths).map(lane).collect(),
            multipath,
            epoch: source.epoch().wrapping_sub(1),
            source,
            unsettled: true,
            opening: 0,
            depth,
            memory,
            probe_block,
            clock: None,
            next_tick: now + TICK,
            completions: Vec::with_capacity(usize::from(depth) + paths),
            silent: Vec::with_capacity(paths),
            trouble: None,
        })
    }

    pub(crate) fn multipath(&self) -> &Multipath {
        &self.multipath
    }

    /// Whether a queue pair is there, or none is on its way; and why the last attempt failed.
    pub(crate) fn settled(&mut self) -> Option<Option<Error>> {
        if self
            .lanes
            .iter()
            .any(|lane| matches!(lane.state, State::Up(_)))
        {
            return Some(None);
        }
        (self.opening == 0).then(|| self.trouble.take())
    }

    /// Registers memory, with queue pairs to come, too.
    pub(crate) fn register_memory(&mut self, memory: &Arc<SharedMemory>) -> Result<(), Error> {
        for lane in &mut self.lanes {
            if let State::Up(queue) = &mut lane.state
                && queue.lost().is_none()
            {
                queue.register_memory(memory)?;
            }
        }
        self.memory.push(Arc::clone(memory));
        Ok(())
    }

    /// Takes one request. `clock` is read once between two turns at most.
    #[inline]
    pub(crate) fn submit(
        &mut self,
        request: &Request,
        tag: u64,
        clock: impl FnOnce() -> Instant,
    ) -> Result<(), Busy> {
        let now = *self.clock.get_or_insert_with(clock);
        if let Next::Send { path, index } = self.multipath.admit(request, tag, now)? {
            self.send(path, index);
        }
        Ok(())
    }

    #[inline]
    fn send(&mut self, path: usize, index: u16) {
        let sent = match (self.lanes.get_mut(path), self.multipath.request(index)) {
            (
                Some(Lane {
                    state: State::Up(queue),
                    current: Some(current),
                    ..
                }),
                Some(request),
            ) => queue.submit(&request.on(current.nsid), index.into()),
            _ => Err(Busy),
        };
        if sent.is_err() {
            self.multipath.bounced(index);
        }
    }

    /// What the thread's reactor is to do: `until` is how long the caller wants to wait. Completions that are here
    /// already, because another user of the reactor turned it, go to `out`.
    #[inline]
    pub(crate) fn before_turn(
        &mut self,
        until: Option<Instant>,
        others_turned: bool,
        now: Instant,
        out: &mut Vec<IoCompletion>,
    ) -> Wait {
        if self.unsettled || self.source.epoch() != self.epoch {
            self.attend(now);
        }
        let Some(until) = until else {
            return Wait::Poll;
        };
        let before = out.len();
        if others_turned {
            self.collect(now, out);
        }
        let ready = out.len() > before
            || self.unsettled
            || self
                .lanes
                .iter()
                .any(|lane| matches!(&lane.state, State::Up(queue) if queue.has_rejected()));
        if ready {
            return Wait::Poll;
        }
        Wait::Until(self.deadline(until, now))
    }

    #[inline]
    fn deadline(&mut self, until: Instant, now: Instant) -> Instant {
        let mut until = until.min(now + LONGEST_SLEEP);
        if self.multipath.outstanding() > 0 {
            if self.lanes.len() > 1 {
                until = until.min(self.next_tick);
            }
            if let Some(deadline) = self.multipath.next_deadline() {
                until = until.min(deadline);
            }
            for lane in &mut self.lanes {
                if let State::Up(queue) = &mut lane.state
                    && let Some(deadline) = queue.next_deadline()
                {
                    until = until.min(deadline);
                }
            }
        }
        until
    }

    /// The reactor was turned.
    #[inline]
    pub(crate) fn after_turn(&mut self, now: Instant, out: &mut Vec<IoCompletion>) {
        self.clock = None;
        if self.opening > 0 {
            self.open(now);
        }
        self.collect(now, out);
        if now >= self.next_tick {
            self.tick(now);
        }
        if self.multipath.may_release(now) {
            self.release(now, out);
        }
    }

    /// The reactor has failed.
    #[cold]
    pub(crate) fn end_all(&mut self, reason: LostReason) {
        for lane in &mut self.lanes {
            if let State::Up(queue) = &mut lane.state {
                queue.end(reason);
            }
        }
    }

    /// Completions of all queue pairs.
    #[inline]
    fn collect(&mut self, now: Instant, out: &mut Vec<IoCompletion>) {
        let mut completions = std::mem::take(&mut self.completions);
        for path in 0..self.lanes.len() {
            let Some(lane) = self.lanes.get_mut(path) else {
                break;
            };
            let State::Up(queue) = &mut lane.state else {
                continue;
            };
            queue.collect(&mut completions);
            let lost = queue.lost();
            // Until the kernel had let go of all memory it could still send: that may have taken seconds.
            let now = lost.map_or(now, |_| queue.clock());
            let dead_at = match (lost, &lane.current) {
                (Some(reason), Some(current)) => {
                    current.dead_at(reason == LostReason::PeerClosed, now)
                }
                _ => now,
            };
            for completion in completions.drain(..) {
                if completion.tag >= PROBE {
                    if let Some(sent) = lane.probed.take()
                        && completion.result.is_ok()
                    {
                        self.multipath.probe_answered(path, sent, now);
                    }
                    continue;
                }
                let index = completion.tag as u16;
                let lost = Lost { dead_at };
                out.extend(
                    self.multipath
                        .completed(index, completion.result, lost, now),
                );
            }
            if let Some(reason) = lost {
                self.lost(path, reason, now);
            }
        }
        self.completions = completions;
        let doubts = self.multipath.take_doubts();
        if doubts != 0 {
            for path in (0..self.lanes.len()).filter(|path| doubts & 1 << path != 0) {
                self.source.read_ana(path);
            }
        }
    }

    #[cold]
    fn lost(&mut self, path: usize, reason: LostReason, now: Instant) {
        let Some(lane) = self.lanes.get_mut(path) else {
            return;
        };
        // Everything outstanding has completed; the transport has let go of all memory.
        lane.state = State::Down(None);
        lane.probed = None;
        self.multipath.path_down(path, now);
        if let Some(current) = lane.current {
            self.source.failed(path, current.number, reason);
        }
        self.unsettled = true;
    }

    /// Requests that are held: to a path, or back to their caller.
    #[cold]
    fn release(&mut self, now: Instant, out: &mut Vec<IoCompletion>) {
        for _ in 0..self.multipath.held() {
            match self.multipath.release(now) {
                Released::Send { path, index } => self.send(path, index),
                Released::Failed(completion) => out.push(completion),
                Released::Held => {}
            }
        }
    }

    /// What the source says about the paths.
    #[cold]
    fn attend(&mut self, now: Instant) {
        self.unsettled = false;
        self.epoch = self.source.epoch();
        self.multipath.set_gone(self.source.is_gone());
        for path in 0..self.lanes.len() {
            let current = self.source.current(path);
            let Some(lane) = self.lanes.get_mut(path) else {
                break;
            };
            let same = match (&lane.current, &current) {
                (Some(ours), Some(theirs)) => ours.number == theirs.number,
                (None, None) => true,
                _ => false,
            };
            match (&lane.state, current) {
                // When its controller is lost, so is the queue pair, which ends with its completions.
                (State::Up(_), _) if !same => {}
                (_, None) => {
                    if matches!(lane.state, State::Opening(_)) {
                        self.opening -= 1;
                    }
                    lane.state = State::Down(None);
                    lane.current = None;
                }
                (State::Up(_), Some(current)) => {
                    lane.current = Some(current);
                    self.multipath.set_access(path, current.access, now);
                }
                (_, Some(current)) if !same => {
                    if matches!(lane.state, State::Opening(_)) {
                        self.opening -= 1;
                    }
                    lane.current = Some(current);
                    lane.pause = PAUSE;
                    self.begin(path, now);
                }
                (State::Down(_) | State::Opening(_), Some(current)) => {
                    lane.current = Some(current);
                }
            }
        }
    }

    fn begin(&mut self, path: usize, now: Instant) {
        let begun = self.source.begin(path, self.depth);
        let Some(lane) = self.lanes.get_mut(path) else {
            return;
        };
        match begun {
            Ok(opening) => {
                lane.state = State::Opening(Box::new(opening));
                self.opening += 1;
            }
            Err(error) => self.not_opened(path, error, now),
        }
    }

    fn not_opened(&mut self, path: usize, error: Error, now: Instant) {
        if let Some(lane) = self.lanes.get_mut(path) {
            lane.state = State::Down(Some(now + lane.pause));
            lane.pause = (lane.pause * 2).min(LONGEST_PAUSE);
        }
        tracing::warn!(path, %error, "no queue pair");
        self.source.trouble(path, &error);
        self.trouble = Some(error);
    }

    /// Goes on with what is being opened.
    #[cold]
    fn open(&mut self, now: Instant) {
        for path in 0..self.lanes.len() {
            let Some(lane) = self.lanes.get_mut(path) else {
                break;
            };
            let State::Opening(opening) = &mut lane.state else {
                continue;
            };
            let Some(opened) = opening.poll(now) else {
                continue;
            };
            self.opening -= 1;
            let memory = &self.memory;
            let ready = opened.and_then(|mut queue| {
                for memory in memory {
                    queue.register_memory(memory)?;
                }
                Ok(queue)
            });
            match (ready, lane.current) {
                (Ok(queue), Some(current)) => {
                    lane.state = State::Up(Box::new(queue));
                    lane.pause = PAUSE;
                    lane.probed = None;
                    self.multipath.path_up(path, current.access, now);
                }
                (Ok(_), None) => lane.state = State::Down(None),
                (Err(error), _) => self.not_opened(path, error, now),
            }
        }
    }

    #[cold]
    fn tick(&mut self, now: Instant) {
        self.next_tick = now + TICK;
        let mut silent = std::mem::take(&mut self.silent);
        self.multipath.tick(now, &mut silent);
        for path in silent.drain(..) {
            self.probe(path, now);
        }
        self.silent = silent;
        for path in 0..self.lanes.len() {
            if let Some(Lane {
                state: State::Down(Some(at)),
                ..
            }) = self.lanes.get(path)
                && *at <= now
            {
                self.begin(path, now);
            }
        }
    }

    /// A read of one block gives the transport something to have acknowledged, and tells how slow the path is; the
    /// controller is asked on its Admin queue, too, since the device may be what is slow.
    fn probe(&mut self, path: usize, now: Instant) {
        self.source.probe(path);
        if let (
            Some(Lane {
                state: State::Up(queue),
                current: Some(current),
                probed: probed @ None,
                ..
            }),
            Some(block),
        ) = (self.lanes.get_mut(path), self.probe_block)
        {
            let read = Command::read(current.nsid, 0, 1, block);
            // A queue that is full has enough under way.
            if queue.submit(&read, PROBE).is_ok() {
                *probed = Some(now);
            }
        }
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        // Nobody waits for what is outstanding, but its writes may still be carried out.
        let now = Instant::now().max(self.next_tick);
        let currents = self.lanes.iter().filter_map(|lane| lane.current);
        if let Some(dead_at) = currents.map(|current| current.dead_at(false, now)).max() {
            self.multipath.abandon(dead_at);
        }
    }
}
