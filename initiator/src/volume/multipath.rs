//! Which path a request takes, and what becomes of it when the path fails. Sans-IO.
//!
//! One [`Multipath`] is the state of one channel. [`admit`](Multipath::admit) takes a request and says where to send it;
//! [`completed`](Multipath::completed) says whether its caller gets the answer or it is held to be issued again;
//! [`release`](Multipath::release) says for each held request what becomes of it now. [`tick`](Multipath::tick), now and then,
//! finds paths that are silent or slow. Nothing here allocates after [`new`](Multipath::new).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_nvme::{Status, StatusCode};

use super::fence::{Fence, Owner};
use super::{IoPolicy, Request};
use crate::{Busy, InvalidCommand, IoCompletion, IoError, Op};

/// A path with something outstanding that is silent so long is probed.
pub(crate) const SILENCE: Duration = Duration::from_millis(250);
/// How often a path that is avoided is asked whether it got better.
const REVIEW: Duration = Duration::from_millis(250);
/// A path is slow when its latency is so many times that of another, ...
const SLOW_FACTOR: u32 = 4;
/// ... and at least so long: below, nobody would notice.
const SLOW_FLOOR: Duration = Duration::from_millis(10);
/// Attempts of a request that paths fail although they work (as Linux's `nvme_core.max_retries`), or that runs into its
/// time-out again and again.
const MAX_ATTEMPTS: u8 = 5;
/// How long a request that the only path failed waits before it is tried there again.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// How good the access to the namespace is by a path (ANA, Base 8.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Access {
    None,
    NonOptimized,
    Optimized,
}

/// What is known of a request's old copy when its connection is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lost {
    /// The target may still carry out what it got by then.
    pub(crate) dead_at: Instant,
}

/// Where a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// To this path, under this number.
    Send { path: usize, index: u16 },
    /// Nowhere yet.
    Held,
}

/// What becomes of a held request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Released {
    Send { path: usize, index: u16 },
    Failed(IoCompletion),
    Held,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Free,
    Sent,
    Held,
}

#[derive(Clone, Copy)]
struct Slot {
    phase: Phase,
    path: u8,
    attempts: u8,
    /// Paths that failed it although they work.
    failed_by: u16,
    owner: Owner,
    tag: u64,
    sent: Instant,
    /// Held until then for a reason of its own.
    not_before: Option<Instant>,
    request: Request,
}

/// One path as its channel sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PathView {
    /// The channel has a queue pair there.
    connected: bool,
    access: Access,
    /// Slow: used only when there is no other.
    avoided: bool,
    outstanding: u32,
    answered: Instant,
    probed: Instant,
    /// Exponentially weighted moving average; zero: unknown.
    latency: Duration,
    /// Requests that it completed.
    pub(crate) ios: u64,
}

impl PathView {
    /// Average latency; zero: unknown.
    pub(crate) fn latency(&self) -> Duration {
        self.latency
    }

    fn is_usable(&self) -> bool {
        self.connected && self.access != Access::None
    }

    fn rank(&self) -> (bool, Access) {
        (!self.avoided, self.access)
    }
}

/// Of one channel: its requests, and the paths that they can take.
pub(crate) struct Multipath {
    policy: IoPolicy,
    /// How long requests wait for a path.
    patience: Option<Duration>,
    fence: Option<Arc<Fence>>,
    slots: Box<[Slot]>,
    free: Vec<u16>,
    held: VecDeque<u16>,
    paths: Box<[PathView]>,
    /// Paths that requests go to, all equally good.
    candidates: Vec<u8>,
    /// The candidate of the last request.
    last: usize,
    no_path_since: Option<Instant>,
    /// There is no path, and there will be none.
    gone: bool,
    /// Paths that denied access, by bits: what ANA says is to be read.
    doubts: u16,
}

impl Multipath {
    /// Room for `depth` requests on `paths` paths, none of which is there yet.
    pub(crate) fn new(
        depth: u16,
        paths: usize,
        policy: IoPolicy,
        patience: Option<Duration>,
        fence: Option<Arc<Fence>>,
        now: Instant,
    ) -> Multipath {
        let slot = Slot {
            phase: Phase::Free,
            path: 0,
            attempts: 0,
            failed_by: 0,
            owner: Owner::NONE,
            tag: 0,
            sent: now,
            not_before: None,
            request: Request {
                op: Op::Flush,
                lba: 0,
                blocks: 0,
                buffer: None,
            },
        };
        let path = PathView {
            connected: false,
            access: Access::None,
            avoided: false,
            outstanding: 0,
            answered: now,
            probed: now,
            latency: Duration::ZERO,
            ios: 0,
        };
        Multipath {
            policy,
            patience,
            fence,
            slots: vec![slot; depth.into()].into(),
            free: (0..depth).rev().collect(),
            held: VecDeque::with_capacity(depth.into()),
            paths: vec![path; paths].into(),
            candidates: Vec::with_capacity(paths),
            last: 0,
            no_path_since: Some(now),
            gone: false,
            doubts: 0,
        }
    }

    /// Paths, by bits, that have denied access since it was asked last.
    #[inline]
    pub(crate) fn take_doubts(&mut self) -> u16 {
        std::mem::take(&mut self.doubts)
    }

    /// Requests that fit.
    pub(crate) fn depth(&self) -> usize {
        self.slots.len()
    }

    /// Requests admitted and not over.
    pub(crate) fn outstanding(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Requests that wait.
    pub(crate) fn held(&self) -> usize {
        self.held.len()
    }

    /// The paths.
    pub(crate) fn paths(&self) -> &[PathView] {
        &self.paths
    }

    // ---- requests ------------------------------------------------------------------------------

    /// Takes a request.
    #[inline]
    pub(crate) fn admit(
        &mut self,
        request: &Request,
        tag: u64,
        now: Instant,
    ) -> Result<Next, Busy> {
        let index = self.free.pop().ok_or(Busy)?;
        let slot = self.slots.get_mut(usize::from(index)).ok_or(Busy)?;
        *slot = Slot {
            phase: Phase::Held,
            path: 0,
            attempts: 0,
            failed_by: 0,
            owner: Owner::NONE,
            tag,
            sent: now,
            not_before: None,
            request: *request,
        };
        let next = self.place(index, now);
        if next == Next::Held {
            self.held.push_back(index);
        }
        Ok(next)
    }

    /// The request, for the queue pair.
    #[inline]
    pub(crate) fn request(&self, index: u16) -> Option<&Request> {
        self.slots.get(usize::from(index)).map(|slot| &slot.request)
    }

    /// The queue pair had no room for it.
    pub(crate) fn bounced(&mut self, index: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return;
        };
        if slot.phase != Phase::Sent {
            return;
        }
        slot.phase = Phase::Held;
        if let Some(path) = self.paths.get_mut(usize::from(slot.path)) {
            path.outstanding = path.outstanding.saturating_sub(1);
        }
        self.held.push_back(index);
    }

    /// A path completed a request: `Some` is for its caller, else it is held. `lost` is for results that say that the
    /// connection is lost.
    #[inline]
    pub(crate) fn completed(
        &mut self,
        index: u16,
        result: Result<(), IoError>,
        lost: Lost,
        now: Instant,
    ) -> Option<IoCompletion> {
        let slot = self.slots.get_mut(usize::from(index))?;
        if slot.phase != Phase::Sent {
            return None;
        }
        let path = self.paths.get_mut(usize::from(slot.path))?;
        path.outstanding = path.outstanding.saturating_sub(1);
        path.ios += 1;
        path.answered = now;
        if result.is_ok() {
            let took = now.saturating_duration_since(slot.sent);
            path.latency = average(path.latency, took);
        } else if self.failed(index, result, lost, now) {
            self.held.push_back(index);
            return None;
        }
        self.over(index, result)
    }

    fn over(&mut self, index: u16, result: Result<(), IoError>) -> Option<IoCompletion> {
        let slot = self.slots.get_mut(usize::from(index))?;
        slot.phase = Phase::Free;
        let tag = slot.tag;
        self.free.push(index);
        Some(IoCompletion { tag, result })
    }

    /// Whether the failed request is to be tried again.
    #[cold]
    fn failed(
        &mut self,
        index: u16,
        result: Result<(), IoError>,
        lost: Lost,
        now: Instant,
    ) -> bool {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return false;
        };
        let path = usize::from(slot.path);
        let again = match result {
            Ok(()) => false,
            Err(IoError::ConnectionLost | IoError::TimedOut | IoError::Closed) => {
                if let Some(fence) = &self.fence
                    && slot.request.changes_blocks()
                {
                    if slot.owner == Owner::NONE {
                        slot.owner = fence.owner();
                    }
                    let request = &slot.request;
                    fence.add(request.lba, request.blocks, slot.owner, lost.dead_at);
                }
                // A connection says nothing about the request; a request that times out again and again does.
                slot.attempts += u8::from(result == Err(IoError::TimedOut));
                slot.attempts < MAX_ATTEMPTS
            }
            Err(IoError::Nvme(status)) => match path_error(status) {
                None => false,
                Some(PathError::Access) => {
                    self.doubts |= 1 << path;
                    self.set_access(path, Access::None, now);
                    true
                }
                Some(PathError::Once) => {
                    slot.attempts += 1;
                    slot.failed_by |= 1 << path;
                    slot.not_before = Some(now + RETRY_DELAY);
                    slot.attempts < MAX_ATTEMPTS
                }
            },
            Err(IoError::Invalid(InvalidCommand::Namespace)) => {
                // It may be back by now.
                self.doubts |= 1 << path;
                self.set_access(path, Access::None, now);
                true
            }
            Err(IoError::Invalid(_)) => false,
        };
        if again && let Some(slot) = self.slots.get_mut(usize::from(index)) {
            slot.phase = Phase::Held;
        }
        again
    }

    /// What becomes of the request that is held longest. Asked once for each of [`held`](Self::held).
    pub(crate) fn release(&mut self, now: Instant) -> Released {
        let Some(index) = self.held.pop_front() else {
            return Released::Held;
        };
        if self.gives_up(now) {
            let failed = self.over(index, Err(IoError::ConnectionLost));
            return failed.map_or(Released::Held, Released::Failed);
        }
        match self.place(index, now) {
            Next::Send { path, index } => Released::Send { path, index },
            Next::Held => {
                self.held.push_back(index);
                Released::Held
            }
        }
    }

    /// Whether asking [`release`](Self::release) can be of any use.
    pub(crate) fn may_release(&self, now: Instant) -> bool {
        !self.held.is_empty() && (!self.candidates.is_empty() || self.gives_up(now))
    }

    /// Whether there is no path any more for longer than requests wait for one.
    fn gives_up(&self, now: Instant) -> bool {
        match (self.no_path_since, self.patience) {
            (None, _) => false,
            (Some(_), _) if self.gone => true,
            (Some(since), Some(patience)) => now >= since + patience,
            (Some(_), None) => false,
        }
    }

    /// Finds a path for a request that is in nobody's hands.
    #[inline]
    fn place(&mut self, index: u16, now: Instant) -> Next {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return Next::Held;
        };
        if let Some(fence) = &self.fence
            && fence.is_active()
            && slot.request.changes_blocks()
        {
            let request = &slot.request;
            let held = fence.holds(request.lba, request.blocks, slot.owner, now);
            if held.is_some() {
                slot.not_before = held;
                return Next::Held;
            }
        }
        let several = self.candidates.len() > 1;
        let chosen = match slot.failed_by {
            // The usual case.
            0 => self.choose(),
            failed_by => {
                let other = self
                    .candidates
                    .iter()
                    .find(|path| failed_by & 1 << **path == 0);
                match (other, slot.not_before) {
                    (Some(other), _) => Some(usize::from(*other)),
                    (None, Some(at)) if at > now => None,
                    (None, _) => self.choose(),
                }
            }
        };
        let (Some(path), Some(slot)) = (chosen, self.slots.get_mut(usize::from(index))) else {
            return Next::Held;
        };
        let Some(view) = self.paths.get_mut(path) else {
            return Next::Held;
        };
        if several {
            self.last = path;
        }
        view.outstanding += 1;
        slot.phase = Phase::Sent;
        slot.path = path as u8;
        slot.sent = now;
        slot.not_before = None;
        Next::Send { path, index }
    }

    #[inline]
    fn choose(&self) -> Option<usize> {
        match self.candidates.as_slice() {
            [] => None,
            [only] => Some(usize::from(*only)),
            several => self.choose_of(several),
        }
    }

    fn choose_of(&self, several: &[u8]) -> Option<usize> {
        // Starting behind the last one makes equals take turns.
        let start = several
            .iter()
            .position(|path| usize::from(*path) > self.last)
            .unwrap_or(0);
        let (behind, front) = several.split_at_checked(start)?;
        let mut in_turn = front.iter().chain(behind).map(|path| usize::from(*path));
        let view = |path: &usize| self.paths.get(*path);
        match self.policy {
            IoPolicy::RoundRobin => in_turn.next(),
            IoPolicy::QueueDepth => {
                in_turn.min_by_key(|path| view(path).map_or(u32::MAX, |path| path.outstanding))
            }
            // How long it would take to get through what is there already.
            IoPolicy::Latency => in_turn.min_by_key(|path| {
                view(path).map_or(Duration::MAX, |path| {
                    path.latency.saturating_mul(path.outstanding + 1)
                })
            }),
        }
    }

    /// Everything that is outstanding on paths and could change blocks may still be carried out until then: the
    /// channel goes.
    pub(crate) fn abandon(&mut self, dead_at: Instant) {
        let Some(fence) = &self.fence else { return };
        for slot in &self.slots {
            if slot.phase == Phase::Sent && slot.request.changes_blocks() {
                fence.add(slot.request.lba, slot.request.blocks, slot.owner, dead_at);
            }
        }
    }

    // ---- paths ---------------------------------------------------------------------------------

    /// The channel has a queue pair on it.
    pub(crate) fn path_up(&mut self, path: usize, access: Access, now: Instant) {
        if let Some(view) = self.paths.get_mut(path) {
            view.connected = true;
            view.access = access;
            view.avoided = false;
            view.latency = Duration::ZERO;
            view.answered = now;
        }
        self.rank(now);
    }

    /// It has none any more.
    pub(crate) fn path_down(&mut self, path: usize, now: Instant) {
        if let Some(view) = self.paths.get_mut(path) {
            view.connected = false;
        }
        self.rank(now);
    }

    /// What ANA says.
    pub(crate) fn set_access(&mut self, path: usize, access: Access, now: Instant) {
        if let Some(view) = self.paths.get_mut(path) {
            view.access = access;
        }
        self.rank(now);
    }

    /// Whether no path will ever come back.
    pub(crate) fn set_gone(&mut self, gone: bool) {
        self.gone = gone;
    }

    fn rank(&mut self, now: Instant) {
        let best = self
            .paths
            .iter()
            .filter(|path| path.is_usable())
            .map(PathView::rank)
            .max();
        self.candidates.clear();
        for (number, path) in self.paths.iter().enumerate() {
            if path.is_usable() && Some(path.rank()) == best {
                self.candidates.push(number as u8);
            }
        }
        if best.is_some() {
            self.no_path_since = None;
        } else {
            self.no_path_since.get_or_insert(now);
        }
    }

    /// A probe was answered; `sent` is when it was sent.
    pub(crate) fn probe_answered(&mut self, path: usize, sent: Instant, now: Instant) {
        if let Some(view) = self.paths.get_mut(path) {
            view.answered = now;
            let took = now.saturating_duration_since(sent);
            // It decides on its own whether a path that carries nothing else is better.
            view.latency = (view.latency + took) / 2;
        }
    }

    /// Looks for silent and for slow paths; appends those to be probed. To be called every few tens of milliseconds.
    pub(crate) fn tick(&mut self, now: Instant, probe: &mut Vec<usize>) {
        let usable = self.paths.iter().filter(|path| path.is_usable()).count();
        if usable < 2 {
            // Whatever is wrong with it, there is no better one.
            if self.paths.iter().any(|path| path.avoided) {
                for path in &mut self.paths {
                    path.avoided = false;
                }
                self.rank(now);
            }
            return;
        }
        let mut changed = false;
        for number in 0..self.paths.len() {
            let oldest = self
                .slots
                .iter()
                .filter(|slot| slot.phase == Phase::Sent && usize::from(slot.path) == number)
                .map(|slot| slot.sent)
                .min();
            let others = self.paths.iter().enumerate().filter(|(other, path)| {
                *other != number
                    && path.is_usable()
                    && !path.avoided
                    && path.latency > Duration::ZERO
            });
            let best_other = others.map(|(_, path)| path.latency).min();
            let Some(path) = self.paths.get_mut(number) else {
                continue;
            };
            if !path.is_usable() {
                continue;
            }
            let waited = oldest.map_or(Duration::ZERO, |sent| now.saturating_duration_since(sent));
            let latency = path.latency.max(waited);
            let was = path.avoided;
            if let Some(other) = best_other {
                if !was && latency >= SLOW_FLOOR && latency > other * SLOW_FACTOR {
                    path.avoided = true;
                } else if was && (latency < SLOW_FLOOR / 2 || latency < other * 2) {
                    path.avoided = false;
                }
            }
            changed |= was != path.avoided;
            let silent = oldest.is_some_and(|sent| {
                now.saturating_duration_since(path.answered.max(sent)) >= SILENCE
            });
            let due = if silent { SILENCE } else { REVIEW };
            if (silent || path.avoided) && now.saturating_duration_since(path.probed) >= due {
                path.probed = now;
                probe.push(number);
            }
        }
        if changed {
            self.rank(now);
        }
    }

    /// When something of the held requests is due.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        if self.held.is_empty() {
            return None;
        }
        if let Some(since) = self.no_path_since {
            return if self.gone {
                Some(since)
            } else {
                self.patience.map(|patience| since + patience)
            };
        }
        self.held
            .iter()
            .filter_map(|index| self.slots.get(usize::from(*index))?.not_before)
            .min()
    }
}

/// Each sample counts for an eighth, as TCP's round-trip time does.
#[inline]
fn average(old: Duration, sample: Duration) -> Duration {
    // Nanoseconds in 64 bits: a `Duration`'s own arithmetic costs more than the rest of a completion.
    let (old, sample) = (old.as_nanos() as u64, sample.as_nanos() as u64);
    let new = if old == 0 {
        sample.max(1)
    } else {
        old - old / 8 + sample / 8
    };
    Duration::from_nanos(new)
}

/// A failure that says something about the path, not about the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PathError {
    /// No access this way, until ANA says otherwise.
    Access,
    /// This time it did not work.
    Once,
}

/// Base 2.1, figure 103 "Path Related Status"; aborted by the deletion of its queue.
fn path_error(status: Status) -> Option<PathError> {
    match status.code() {
        StatusCode::AnaInaccessible | StatusCode::AnaTransition | StatusCode::AnaPersistentLoss => {
            Some(PathError::Access)
        }
        StatusCode::InternalPathError
        | StatusCode::ControllerPathingError
        | StatusCode::HostPathingError
        | StatusCode::AbortedByHost
        | StatusCode::AbortedSqDeletion => Some(PathError::Once),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
