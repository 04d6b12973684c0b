//! Whether other threads want the core that we spin on.
//!
//! To the scheduler a thread that spins is a thread with work, and it keeps those that have some from running: the very
//! program whose I/O it serves, when both share a core. So a spinning thread offers its core now and then
//! (`sched_yield`). When somebody took it, spinning does harm: the thread sleeps for some time wherever it would have
//! spun, and then tries again.

use std::time::{Duration, Instant};

/// Between two offers, and before the first. An offer that nobody takes costs some 0.2 us.
const OFFER_EVERY: Duration = Duration::from_micros(20);
/// An offer that takes longer was taken: two switches of context do, a system call does not.
const TAKEN_FROM: Duration = Duration::from_micros(2);
/// How long nothing is offered after one that was taken; doubled each time that the next is taken, too.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(320);

/// What one thread knows about the others on its core.
#[derive(Debug)]
pub(crate) struct Rivals {
    last_offer: Instant,
    here_until: Instant,
    pause: Duration,
}

impl Rivals {
    pub(crate) fn new(now: Instant) -> Rivals {
        Rivals {
            last_offer: now,
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

    /// Offers the core; true when somebody took it.
    pub(crate) fn offer(&mut self) -> bool {
        let before = Instant::now();
        std::thread::yield_now();
        let now = Instant::now();
        self.note(before, now)
    }

    /// An offer was made at `before` and is over at `now`.
    fn note(&mut self, before: Instant, now: Instant) -> bool {
        self.last_offer = now;
        let taken = now.saturating_duration_since(before) >= TAKEN_FROM;
        if taken {
            self.here_until = now + self.pause;
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        } else {
            self.pause = SHORTEST_PAUSE;
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_micros(100);
    const SHORT: Duration = Duration::from_nanos(300);

    #[test]
    fn an_offer_that_is_taken_stops_spinning_for_longer_each_time() {
        let mut now = Instant::now();
        let mut rivals = Rivals::new(now);
        assert!(!rivals.are_here(now));
        let mut pauses = Vec::new();
        for _ in 0..8 {
            assert!(rivals.note(now, now + LONG));
            now += LONG;
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
    fn an_offer_that_nobody_takes_changes_nothing() {
        let now = Instant::now();
        let mut rivals = Rivals::new(now);
        assert!(!rivals.note(now, now + SHORT));
        assert!(!rivals.are_here(now + SHORT));
        assert!(!rivals.offer_is_due(now, now + SHORT + OFFER_EVERY / 2));
        assert!(rivals.offer_is_due(now, now + SHORT + OFFER_EVERY));
    }
}
