//! Waking a reactor from another thread: one atomic exchange while it is awake, one eventfd write
//! when it has declared itself asleep.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::{EventfdFlags, eventfd};

use crate::Error;

/// Wakes the reactor it came from. Cheap to clone; usable from any thread.
///
/// Publish first (push the message, store the flag), then [`Waker::wake`]. The turn that sees the
/// wake-up ends after the publication, so what was published is visible to the owner's next look.
#[derive(Clone, Debug)]
pub struct Waker(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: SleepState,
    eventfd: OwnedFd,
}

impl Waker {
    pub(crate) fn new() -> Result<Self, Error> {
        // Not NONBLOCK: io_uring would then answer EAGAIN to the read instead of waiting. A write
        // would block at 2^64 - 2 unread wake-ups, and there is at most one for each sleep.
        let eventfd =
            eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| Error::EventFd(error.into()))?;
        Ok(Self(Arc::new(Shared {
            state: SleepState::new(),
            eventfd,
        })))
    }

    /// Makes the reactor's current or next turn end early. Writes the eventfd only if it sleeps.
    pub fn wake(&self) {
        if self.0.state.notify() {
            // It cannot fail: the descriptor is ours and the value is small.
            let _ = rustix::io::write(self.0.eventfd.as_fd(), &1_u64.to_ne_bytes());
        }
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        self.0.eventfd.as_raw_fd()
    }

    pub(crate) fn state(&self) -> &SleepState {
        &self.0.state
    }
}

/// Who must do what about a sleeping reactor. Every step is one sequentially consistent
/// read-modify-write of one word, so the steps of all threads have one order:
///
/// | in state | `notify` | `try_sleep` | `wake_up` / `take` |
/// |---|---|---|---|
/// | AWAKE | -> NOTIFIED | -> ASLEEP, may sleep | -> AWAKE, nothing |
/// | NOTIFIED | stays | -> AWAKE, must not sleep | -> AWAKE, was notified |
/// | ASLEEP | -> NOTIFIED, must write the eventfd | not called | -> AWAKE, nothing |
///
/// A notification either precedes `try_sleep`, which then refuses, or follows it, and then writes
/// the eventfd that the sleeper reads: none is lost.
#[derive(Debug)]
pub(crate) struct SleepState(AtomicU32);

const AWAKE: u32 = 0;
const NOTIFIED: u32 = 1;
const ASLEEP: u32 = 2;

impl SleepState {
    const fn new() -> Self {
        Self(AtomicU32::new(AWAKE))
    }

    /// From any thread; true when the eventfd must be written.
    fn notify(&self) -> bool {
        self.0.swap(NOTIFIED, Ordering::SeqCst) == ASLEEP
    }

    /// A look without a write, for the spinning owner.
    pub(crate) fn is_notified(&self) -> bool {
        self.0.load(Ordering::Relaxed) == NOTIFIED
    }

    /// By the owner; false when it was notified (which is hereby taken) and must not sleep.
    pub(crate) fn try_sleep(&self) -> bool {
        let declared = self
            .0
            .compare_exchange(AWAKE, ASLEEP, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok();
        if !declared {
            // Further notifications since the failed exchange are taken along: the turn ends now,
            // after all their publications, since each exchange acquires the one before it.
            self.take();
        }
        declared
    }

    /// By the owner, after sleeping or while spinning; true when it was notified.
    pub(crate) fn take(&self) -> bool {
        self.0.swap(AWAKE, Ordering::SeqCst) == NOTIFIED
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Explores every interleaving of two senders (two messages each) and the owner. Each step below
    /// touches shared state once, by the very operations of [`SleepState`], which are sequentially
    /// consistent: so the interleavings are all there is.
    #[test]
    fn no_interleaving_loses_a_wake_up() {
        let mut seen = HashSet::new();
        let mut sleeps = 0;
        explore(&World::default(), &mut seen, &mut sleeps);
        assert!(seen.len() > 500, "explored only {}", seen.len());
        assert!(sleeps > 0, "no schedule slept");
    }

    /// The same exploration finds the fault when the notification skips the exchange, so it is able
    /// to find one.
    #[test]
    fn the_exploration_notices_a_lost_wake_up() {
        let world = World {
            faulty: true,
            ..World::default()
        };
        let lost = std::panic::catch_unwind(|| explore(&world, &mut HashSet::new(), &mut 0));
        assert!(lost.is_err());
    }

    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    enum Sender {
        #[default]
        Push,
        Notify,
        WriteEventfd,
    }

    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    enum Owner {
        #[default]
        Drain,
        TrySleep,
        /// In the kernel until the eventfd has a count.
        Asleep,
        Take,
    }

    #[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
    struct World {
        faulty: bool,
        state: u32,
        eventfd: u32,
        mailbox: u32,
        drained: u32,
        senders: [(Sender, u32); 2],
        owner: Owner,
    }

    const MESSAGES_EACH: u32 = 2;

    fn explore(world: &World, seen: &mut HashSet<World>, sleeps: &mut u32) {
        if !seen.insert(world.clone()) {
            return;
        }
        let mut moves = 0;
        for which in 0..world.senders.len() {
            if let Some(next) = step_sender(world, which) {
                moves += 1;
                explore(&next, seen, sleeps);
            }
        }
        if let Some(next) = step_owner(world, sleeps) {
            moves += 1;
            explore(&next, seen, sleeps);
        }
        if moves == 0 {
            // Everybody has stopped: the owner sleeps for good, so it must have seen everything.
            assert_eq!(
                (world.owner, world.mailbox),
                (Owner::Asleep, 0),
                "lost: {world:?}"
            );
            assert_eq!(world.drained, 2 * MESSAGES_EACH);
        }
    }

    fn step_sender(world: &World, which: usize) -> Option<World> {
        let mut next = world.clone();
        let (at, sent) = world.senders[which];
        let after = match at {
            Sender::Push if sent == MESSAGES_EACH => return None,
            Sender::Push => {
                next.mailbox += 1;
                Sender::Notify
            }
            Sender::Notify => {
                let state = SleepState(AtomicU32::new(world.state));
                // The fault to be found: taking a stale look for the exchange.
                let write = if world.faulty {
                    state.is_notified()
                } else {
                    state.notify()
                };
                next.state = state.0.into_inner();
                if write {
                    Sender::WriteEventfd
                } else {
                    Sender::Push
                }
            }
            Sender::WriteEventfd => {
                next.eventfd += 1;
                Sender::Push
            }
        };
        next.senders[which] = (after, sent + u32::from(after == Sender::Push));
        Some(next)
    }

    fn step_owner(world: &World, sleeps: &mut u32) -> Option<World> {
        let mut next = world.clone();
        let state = SleepState(AtomicU32::new(world.state));
        next.owner = match world.owner {
            Owner::Drain => {
                next.drained += std::mem::take(&mut next.mailbox);
                Owner::TrySleep
            }
            Owner::TrySleep if state.try_sleep() => {
                *sleeps += 1;
                Owner::Asleep
            }
            Owner::TrySleep => Owner::Drain,
            Owner::Asleep if world.eventfd == 0 => return None,
            Owner::Asleep => {
                next.eventfd = 0;
                Owner::Take
            }
            Owner::Take => {
                // Notified or a late eventfd write: either way the turn ends and the owner looks.
                state.take();
                Owner::Drain
            }
        };
        next.state = state.0.into_inner();
        Some(next)
    }
}
