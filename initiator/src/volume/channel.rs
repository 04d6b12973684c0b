//! One thread's way to do I/O on a volume.

use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_reactor::{SharedMemory, Waker};

use super::crowd::Crowd;
use super::lanes::{ANSWER_WITHIN, Current, Lanes, Source};
use super::shared::{ChannelCounters, Shared};
use super::{Request, Volume};
use crate::link::guest::SharedGuest;
use crate::link::home::{self, SharedHome};
use crate::queue_pair::opening::QueuePairOpening;
use crate::{Busy, Error, IoCompletion, LostReason, QueuePairOptions};

/// How often what was counted is made known.
const PUBLISH: Duration = Duration::from_millis(50);
/// How long opening a channel lets go by before it looks again.
const STEP: Duration = Duration::from_millis(10);

/// One thread's way to do I/O on a [`Volume`]: `submit` as often as wanted, then [`turn`](Self::turn), again and again.
/// Each request taken completes exactly once.
///
/// A request that a path fails is issued again on another; when there is none it waits, or fails, as
/// [`MultipathOptions`](super::MultipathOptions) say. `turn` returns in time all the same.
pub struct Channel {
    lanes: Lanes,
    home: SharedHome,
    /// Turns of the reactor as of our last one.
    turns: u64,
    waker: u64,
    counters: Arc<ChannelCounters>,
    next_publish: Instant,
    poll_budget: Duration,
    crowd: Crowd,
    volume: Volume,
}

impl Channel {
    pub(super) fn open(volume: &Volume, depth: u16) -> Result<Channel, Error> {
        let shared = volume.shared();
        let home = home::with_poll_budget(shared.poll_budget)?;
        let deepest = (0..shared.paths.len())
            .filter_map(|path| Some(shared.up(path)?.controller.max_queue_depth()))
            .max();
        let depth = depth.clamp(1, deepest.unwrap_or(u16::MAX - 1));
        let block_size = shared
            .namespace()
            .map_or(4096, |namespace| namespace.block_size);
        let lanes = Lanes::new(
            Box::new(Paths(Arc::clone(shared))),
            shared.paths.len(),
            depth,
            block_size,
            &shared.multipath,
            shared.fence.clone(),
            Instant::now(),
        )?;
        let waker = shared.add_waker(home.borrow_mut().reactor().waker());
        let mut channel = Channel {
            lanes,
            home,
            turns: 0,
            waker,
            counters: shared.add_counters(),
            next_publish: Instant::now(),
            poll_budget: shared.poll_budget,
            crowd: Crowd::new(Instant::now()),
            volume: volume.clone(),
        };
        channel.wait_settled()?;
        Ok(channel)
    }

    /// Until a queue pair is there. Without any controller there is nothing to wait for: requests do.
    fn wait_settled(&mut self) -> Result<(), Error> {
        let mut out = Vec::new();
        loop {
            self.turn(Some(Instant::now() + STEP), &mut out);
            match self.lanes.settled() {
                None => {}
                Some(None) => return Ok(()),
                Some(Some(error)) => return Err(error),
            }
        }
    }

    /// Requests that fit at once.
    pub fn depth(&self) -> u16 {
        self.lanes.multipath().depth() as u16
    }

    /// Requests taken and not yet handed out as completed.
    pub fn outstanding(&self) -> usize {
        self.lanes.multipath().outstanding()
    }

    /// Requests among these that wait for a usable path, or for an older write of a lost one to be out of the world.
    pub fn held(&self) -> usize {
        self.lanes.multipath().held()
    }

    /// Registers shared memory and keeps it mapped as long as the channel lives: requests on any part of it need no copy.
    /// Never on the I/O path.
    pub fn register_memory(&mut self, memory: &Arc<SharedMemory>) -> Result<(), Error> {
        self.lanes.register_memory(memory)
    }

    /// Takes one request; `tag` comes back in its completion. It leaves with the next turn. A request that can
    /// never work is taken, too, and completes with its error.
    #[inline]
    pub fn submit(&mut self, request: &Request, tag: u64) -> Result<(), Busy> {
        self.lanes.submit(request, tag, Instant::now)
    }

    /// Once around: sends what was submitted, receives, appends completions to `out`. When there is nothing to do it
    /// spins for the polling budget (less on a core that others want, too), then sleeps until something happens, `until` at
    /// the latest; `None` never sleeps.
    #[inline]
    pub fn turn(&mut self, until: Option<Instant>, out: &mut Vec<IoCompletion>) {
        let (now, turns) = {
            let home = self.home.borrow();
            (home.now(), home.turns())
        };
        let waits = self.outstanding() > 0;
        let budget = self.crowd.budget(now, self.poll_budget, waits);
        let wait = self.lanes.before_turn(until, turns != self.turns, now, out);
        let now = {
            let mut home = self.home.borrow_mut();
            home.reactor().set_poll_budget(budget);
            if let Err(reason) = home.turn(wait) {
                self.lanes.end_all(reason);
                // The ring is unusable. Whoever calls in a loop shall not burn a core.
                std::thread::sleep(STEP);
            }
            // Others of the thread may turn the same reactor.
            home.reactor().set_poll_budget(self.poll_budget);
            self.turns = home.turns();
            home.now()
        };
        self.lanes.after_turn(now, out);
        if now >= self.next_publish {
            self.publish(now);
        }
    }

    #[cold]
    fn publish(&mut self, now: Instant) {
        self.next_publish = now + PUBLISH;
        for (number, path) in self.lanes.multipath().paths().iter().enumerate() {
            if let Some(counters) = self.counters.path(number) {
                counters.set(path.ios, path.latency());
            }
        }
    }

    /// The clock as of the last turn.
    pub fn now(&self) -> Instant {
        self.home.borrow().now()
    }

    /// Ends a sleeping turn from another thread.
    pub fn waker(&self) -> Waker {
        self.home.borrow_mut().reactor().waker()
    }

    /// Brings another user of the thread's reactor, whose completions end a turn, too; returns the owner number for its
    /// tokens.
    pub(crate) fn add_guest(&mut self, guest: SharedGuest) -> Result<u8, Error> {
        self.home.borrow_mut().add_guest(guest)
    }

    /// It leaves.
    pub(crate) fn remove_guest(&mut self, owner: u8) {
        self.home.borrow_mut().remove_guest(owner);
    }

    /// The thread's reactor, for a guest's first operations. Not to be borrowed across a turn.
    pub(crate) fn with_reactor<T>(
        &mut self,
        work: impl FnOnce(&mut flexblk_reactor::Reactor) -> T,
    ) -> T {
        work(self.home.borrow_mut().reactor())
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.publish(self.next_publish);
        let shared = self.volume.shared();
        shared.remove_waker(self.waker);
        shared.remove_counters(&self.counters);
    }
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel")
            .field("depth", &self.depth())
            .field("outstanding", &self.outstanding())
            .finish_non_exhaustive()
    }
}

/// The controllers that the volume's keeper keeps.
struct Paths(Arc<Shared>);

impl Source for Paths {
    fn epoch(&self) -> u64 {
        self.0.epoch()
    }

    fn current(&self, path: usize) -> Option<Current> {
        let up = self.0.up(path)?;
        Some(Current {
            number: up.number,
            nsid: up.nsid,
            access: up.access(),
            silent: 2 * up.controller.longest_kato(),
            quiesce: self.0.multipath.cqt.max(up.controller.quiesce_time()),
        })
    }

    fn begin(&self, path: usize, depth: u16) -> Result<QueuePairOpening, Error> {
        let up = self.0.up(path).ok_or(Error::Lost(LostReason::PeerClosed))?;
        up.controller.begin_queue_pair(&QueuePairOptions {
            depth: Some(depth),
            ..QueuePairOptions::default()
        })
    }

    fn failed(&self, path: usize, number: u64, reason: LostReason) {
        if let Some(up) = self.0.up(path).filter(|up| up.number == number) {
            self.0.note_error(path, &Error::Lost(reason).to_string());
            up.controller.fail(LostReason::IoQueue);
        }
    }

    fn trouble(&self, path: usize, error: &Error) {
        self.0.note_error(path, &error.to_string());
    }

    fn probe(&self, path: usize) {
        if let Some(up) = self.0.up(path) {
            up.controller.probe(ANSWER_WITHIN);
        }
    }

    fn read_ana(&self, path: usize) {
        if let Some(up) = self.0.up(path) {
            up.controller.read_ana();
        }
    }

    fn is_gone(&self) -> bool {
        self.0.is_gone()
    }
}
