//! One thread's way to do I/O on a volume.

use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_nvme::Nsid;
use flexblk_reactor::{SharedMemory, Wait, Waker};

use super::{Request, Volume};
use crate::link::guest::SharedGuest;
use crate::link::home::{self, SharedHome};
use crate::{Busy, Error, IoCompletion, QueuePair, QueuePairOptions};

/// How long a turn sleeps at most before it looks whether a controller is lost.
const LONGEST_SLEEP: Duration = Duration::from_millis(100);

/// One thread's way to do I/O on a [`Volume`]: `submit` as often as wanted, then [`turn`](Self::turn), again and again.
/// Each request taken completes exactly once.
#[derive(Debug)]
pub struct Channel {
    queue: QueuePair,
    nsid: Nsid,
    home: Home,
    _volume: Volume,
}

/// The thread's reactor.
struct Home(SharedHome);

impl Channel {
    pub(super) fn open(volume: &Volume, depth: u16) -> Result<Channel, Error> {
        let shared = &volume.shared;
        let home = home::with_poll_budget(shared.poll_budget)?;
        let queue = shared.controller.queue_pair(&QueuePairOptions {
            depth: Some(depth),
            ..QueuePairOptions::default()
        })?;
        Ok(Channel {
            queue,
            nsid: shared.nsid,
            home: Home(home),
            _volume: volume.clone(),
        })
    }

    /// Requests that fit at once.
    pub fn depth(&self) -> u16 {
        self.queue.depth()
    }

    /// Requests taken and not yet handed out as completed.
    pub fn outstanding(&self) -> usize {
        self.queue.outstanding()
    }

    /// Registers shared memory and keeps it mapped as long as the channel lives: requests on any part of it need no copy.
    /// Never on the I/O path.
    pub fn register_memory(&mut self, memory: &Arc<SharedMemory>) -> Result<(), Error> {
        self.queue.register_memory(memory).map(drop)
    }

    /// Takes one request; `tag` comes back in its completion. It leaves with the next turn. A request that can
    /// never work is taken, too, and completes with its error.
    #[inline]
    pub fn submit(&mut self, request: &Request, tag: u64) -> Result<(), Busy> {
        self.queue.submit(&request.on(self.nsid), tag)
    }

    /// Once around: sends what was submitted, receives, appends completions to `out`. When there is nothing to do it
    /// spins for the polling budget, then sleeps until something happens, `until` at the latest; `None` never sleeps.
    #[inline]
    pub fn turn(&mut self, until: Option<Instant>, out: &mut Vec<IoCompletion>) {
        let wait = match until {
            None => Wait::Poll,
            Some(until) => {
                let mut until = until.min(self.now() + LONGEST_SLEEP);
                if let Some(deadline) = self.queue.next_deadline() {
                    until = until.min(deadline);
                }
                Wait::Until(until)
            }
        };
        if self.queue.lost().is_some() && self.queue.outstanding() == 0 {
            // The queue pair does not turn any more; what else is on the reactor goes on.
            if self.home.0.borrow_mut().turn(wait).is_err() {
                // The ring is unusable. Whoever calls in a loop shall not burn a core.
                std::thread::sleep(LONGEST_SLEEP);
            }
            return;
        }
        self.queue.turn(wait, out);
    }

    /// The clock as of the last turn.
    pub fn now(&self) -> Instant {
        self.home.0.borrow().now()
    }

    /// Ends a sleeping turn from another thread.
    pub fn waker(&self) -> Waker {
        self.home.0.borrow_mut().reactor().waker()
    }

    /// Brings another user of the thread's reactor, whose completions end a turn, too; returns the owner number for its
    /// tokens.
    pub(crate) fn add_guest(&mut self, guest: SharedGuest) -> Result<u8, Error> {
        self.home.0.borrow_mut().add_guest(guest)
    }

    /// It leaves.
    pub(crate) fn remove_guest(&mut self, owner: u8) {
        self.home.0.borrow_mut().remove_guest(owner);
    }

    /// The thread's reactor, for a guest's first operations. Not to be borrowed across a turn.
    pub(crate) fn with_reactor<T>(
        &mut self,
        work: impl FnOnce(&mut flexblk_reactor::Reactor) -> T,
    ) -> T {
        work(self.home.0.borrow_mut().reactor())
    }
}

impl std::fmt::Debug for Home {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Home")
    }
}
