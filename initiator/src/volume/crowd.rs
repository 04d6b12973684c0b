//! Whether others want the thread's core.
//!
//! A thread that spins keeps the core from whoever waits for it. Mostly the kernel lets a woken thread in at once, but
//! not always: then a program that shares the core with our exporter got its answer when the exporter had spun out its
//! budget. The kernel counts how often it has taken the core from a thread that wanted to go on; where that happens all
//! the time, the thread spins for answers that are on their way only, not for new work.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use libc::c_long;

/// How often the kernel is asked.
const SAMPLE: Duration = Duration::from_millis(10);
/// Switches within that time which say that the core is shared.
const MANY: c_long = 10;
/// How long that is believed.
const BELIEVED: Duration = Duration::from_secs(1);

/// What is known of the calling thread's core.
pub(super) struct Crowd {
    switches: c_long,
    sampled: Instant,
    shared_until: Instant,
}

impl Crowd {
    pub(super) fn new(now: Instant) -> Crowd {
        Crowd {
            switches: involuntary_switches(),
            sampled: now,
            shared_until: now,
        }
    }

    /// How long to spin of `budget`; `waits`: for an answer that is on its way, not for new work.
    #[inline]
    pub(super) fn budget(&mut self, now: Instant, budget: Duration, waits: bool) -> Duration {
        if now.saturating_duration_since(self.sampled) >= SAMPLE {
            self.sample(now, involuntary_switches());
        }
        if waits || now >= self.shared_until {
            budget
        } else {
            Duration::ZERO
        }
    }

    #[cold]
    fn sample(&mut self, now: Instant, switches: c_long) {
        let elapsed = now.saturating_duration_since(self.sampled);
        let new = switches - self.switches;
        (self.sampled, self.switches) = (now, switches);
        // A thread that slept long was not in the way of anybody.
        if new >= MANY && elapsed < 2 * SAMPLE {
            self.shared_until = now + BELIEVED;
        }
    }
}

/// How often the kernel has taken the core from the calling thread.
fn involuntary_switches() -> c_long {
    // SAFETY: all zeroes is valid, and the kernel fills what it knows.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` lives across the call. It cannot fail; if it did, nothing would have been counted.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    usage.ru_nivcsw
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_core_is_noticed_and_believed_for_a_while() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let budget = Duration::from_micros(100);
        let mut crowd = Crowd::new(start);
        let base = crowd.switches;
        assert_eq!(crowd.budget(at(1), budget, false), budget);
        crowd.sample(at(11), base + MANY - 1);
        assert_eq!(crowd.budget(at(12), budget, false), budget);
        crowd.sample(at(22), base + 2 * MANY);
        assert_eq!(crowd.budget(at(23), budget, false), Duration::ZERO);
        assert_eq!(crowd.budget(at(23), budget, true), budget);
        // Not noticed again, it is forgotten.
        crowd.sample(at(33), base + 2 * MANY);
        crowd.sampled = at(1030);
        assert_eq!(crowd.budget(at(1031), budget, false), budget);
        // Many over a long time are few.
        crowd.sample(at(9000), base + 9 * MANY);
        crowd.sampled = at(9001);
        assert_eq!(crowd.budget(at(9001), budget, false), budget);
    }
}
