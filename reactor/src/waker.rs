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
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::EventFd(error.into()))?;
        Ok(Self(Arc::new(Shared {
            state: SleepState::new(),
            eventfd,
        })))
    }

    /// Makes the reactor's current or next turn end early. Writes the eventfd only if it sleeps.
    pub fn wake(&self) {
        if self.0.state.notify() {
            // The only failure is EAGAIN at 2^64 - 2 unread wake-ups: then it is awake anyway.
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
