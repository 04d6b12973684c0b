//! When a lost path is tried again. Sans-IO.

use std::time::{Duration, Instant};

/// The pause before the first attempt: a target that was restarted is back soon.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// The attempts of one path to come back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    /// The longest pause.
    longest: Duration,
    /// How long it is tried; `None`: for ever.
    limit: Option<Duration>,
    pause: Duration,
    /// Since when it is lost.
    since: Option<Instant>,
}

impl Backoff {
    pub(crate) fn new(longest: Duration, limit: Option<Duration>) -> Backoff {
        Backoff {
            longest,
            limit,
            pause: FIRST_PAUSE,
            since: None,
        }
    }

    /// It is there.
    pub(crate) fn connected(&mut self) {
        self.since = None;
        self.pause = FIRST_PAUSE;
    }

    /// It was lost, or an attempt failed: when to try next; `None`: never. Pauses double up to the longest; `random`
    /// shortens them by up to half, so that a thousand hosts do not come back at the same moment.
    pub(crate) fn next(&mut self, now: Instant, random: u64) -> Option<Instant> {
        let since = *self.since.get_or_insert(now);
        if self.limit.is_some_and(|limit| now >= since + limit) {
            return None;
        }
        let pause = self.pause.min(self.longest);
        self.pause = (self.pause * 2).min(self.longest);
        let shorter = pause / 2 * (random % 1024) as u32 / 1024;
        let at = now + (pause - shorter);
        // The last attempt is made when the limit is there, not a pause later.
        Some(self.limit.map_or(at, |limit| at.min(since + limit)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_end_with_the_limit() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut backoff = Backoff::new(second, Some(10 * second));
        let (mut now, mut pauses) = (start, Vec::new());
        while let Some(next) = backoff.next(now, 0) {
            pauses.push(next - now);
            now = next;
        }
        assert_eq!(now, start + 10 * second, "the last attempt is at the limit");
        assert_eq!(
            pauses[..6],
            [50, 100, 200, 400, 800, 1000].map(Duration::from_millis)
        );
        backoff.connected();
        assert_eq!(backoff.next(now, 0), Some(now + FIRST_PAUSE));
    }

    #[test]
    fn jitter_takes_up_to_half() {
        let now = Instant::now();
        for random in [0, 1, 511, 1023, u64::MAX] {
            let mut backoff = Backoff::new(Duration::from_secs(1), None);
            let pause = backoff.next(now, random).unwrap() - now;
            assert!(pause <= FIRST_PAUSE && pause > FIRST_PAUSE / 2, "{pause:?}");
        }
    }
}
