//! Whether other threads want the core that we spin on.
//!
//! To the scheduler a thread that spins is a thread with work, and it keeps those that have some from running: the very
//! program whose I/O it serves, when both share a core. So a spinning thread offers its core now and then
//! (`sched_yield`). When somebody takes it twice in a row (once may be the kernel, for a moment), spinning does harm: the
//! thread sleeps for some time wherever it would have spun, and then tries again.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

/// Between two offers, and before the first. An offer that nobody takes costs some 0.3 us.
const OFFER_EVERY: Duration = Duration::from_micros(20);
/// So many offers in a row are taken before we believe it.
const TAKEN_OFFERS: u32 = 2;
/// How long nothing is offered then; doubled each time that it turns out to be so again.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(320);

/// What one thread knows about the others on its core.
#[derive(Debug)]
pub(crate) struct Rivals {
    last_offer: Instant,
    /// Offers in a row that were taken.
    taken: u32,
    here_until: Instant,
    pause: Duration,
}

impl Rivals {
    pub(crate) fn new(now: Instant) -> Rivals {
        Rivals {
            last_offer: now,
            taken: 0,
            here_until: now,
            pause: SHORTEST_PAUSE,
        }
    }

    /// Others wanted the core a short time ago: do not spin.
    #[inline]
    pub(crate) fn are_here(&self, now: Instant) -> bool {
        now < self.here_until
    }

    /// Whether it is time for an offer, by a thread that spins since `since`.
    #[inline]
    pub(crate) fn offer_is_due(&self, since: Instant, now: Instant) -> bool {
        now >= since.max(self.last_offer) + OFFER_EVERY
    }

    /// Offers the core; true when others are there who want it.
    pub(crate) fn offer(&mut self) -> bool {
        let before = switches();
        std::thread::yield_now();
        let taken = switches() != before;
        self.note(taken, Instant::now())
    }

    /// An offer is over at `now`.
    fn note(&mut self, taken: bool, now: Instant) -> bool {
        self.last_offer = now;
        if !taken {
            self.taken = 0;
            self.pause = SHORTEST_PAUSE;
            return false;
        }
        self.taken += 1;
        if self.taken < TAKEN_OFFERS {
            return false;
        }
        self.taken = 0;
        self.here_until = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        true
    }
}

/// How often another thread has got the core from this one, which did not sleep (getrusage(2), `ru_nivcsw`).
fn switches() -> i64 {
    // SAFETY: all zeroes is valid for this C structure, which the kernel fills.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the structure lives across the call. It fails for no valid arguments.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    usage.ru_nivcsw
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offers_that_are_taken_stop_spinning_for_longer_each_time() {
        let mut now = Instant::now();
        let mut rivals = Rivals::new(now);
        assert!(!rivals.are_here(now));
        let mut pauses = Vec::new();
        for _ in 0..8 {
            assert!(!rivals.note(true, now), "once is nothing");
            assert!(!rivals.are_here(now));
            assert!(rivals.note(true, now));
            assert!(rivals.are_here(now));
            pauses.push(rivals.here_until - now);
            now = rivals.here_until;
            assert!(!rivals.are_here(now), "it tries again");
        }
        assert_eq!(pauses.first(), Some(&SHORTEST_PAUSE));
        assert_eq!(pauses.last(), Some(&LONGEST_PAUSE));
        assert!(pauses.is_sorted());
    }

    #[test]
    fn offers_that_nobody_takes_change_nothing() {
        let now = Instant::now();
        let mut rivals = Rivals::new(now);
        assert!(!rivals.note(false, now));
        assert!(!rivals.are_here(now));
        assert!(!rivals.offer_is_due(now, now + OFFER_EVERY / 2));
        assert!(rivals.offer_is_due(now, now + OFFER_EVERY));
        for _ in 0..10 {
            assert!(!rivals.note(true, now), "not in a row");
            assert!(!rivals.note(false, now));
        }
        assert!(!rivals.are_here(now));
    }
}
