//! Is a host that turned Keep Alive off still there?
//!
//! With Keep Alive on, a silent host's controller ends (Base 3.9). With it off nothing in NVMe notices
//! that a host has died: the target sends only when it is asked. So the target asks the host's transport:
//! an RDMA WRITE of no bytes on the Admin queue touches no memory, needs no key (IBA 9.7.4.1.5) and is
//! acknowledged by every RC peer without its application. An I/O queue is not asked: with the engine in
//! the application's own thread it answers when the application comes back to it, which may be minutes.
//! It ends with its controller.

use std::time::{Duration, Instant};

use flexins::engine::Engine;
use flexins::verbs::{PostError, Qpn, Rkey, SendFlags, SendOp, SendWr};

/// Id of the request that asks.
pub(super) const PROBE: u64 = u64::MAX - 1;
/// Questions that fit into the longest silence: one may have to be repeated by the transport.
const QUESTIONS: u32 = 5;

/// What has become due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    Nothing,
    /// Ask the host's transport.
    Ask,
    /// It has been silent for too long.
    Dead,
}

/// The silence of one host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Liveness {
    longest_silence: Duration,
    heard: Instant,
    look_at: Instant,
}

impl Liveness {
    pub(super) fn new(longest_silence: Duration, now: Instant) -> Self {
        Self {
            longest_silence,
            heard: now,
            look_at: now + longest_silence / QUESTIONS,
        }
    }

    /// When [`Liveness::due`] wants to be called.
    pub(super) const fn deadline(&self) -> Instant {
        self.look_at
    }

    /// The host has sent or acknowledged something.
    pub(super) const fn heard(&mut self, now: Instant) {
        self.heard = now;
    }

    /// What is to be done now.
    pub(super) fn due(&mut self, now: Instant) -> Due {
        if now < self.look_at {
            return Due::Nothing;
        }
        let interval = self.longest_silence / QUESTIONS;
        let silence = now.saturating_duration_since(self.heard);
        if silence >= self.longest_silence {
            return Due::Dead;
        }
        self.look_at = now + interval;
        if silence >= interval {
            Due::Ask
        } else {
            Due::Nothing
        }
    }
}

/// Asks. What cannot be posted need not be: requests before it are not acknowledged yet, and the
/// silence goes on.
pub(super) fn ask(engine: &mut Engine, qpn: Qpn) -> Result<(), PostError> {
    engine.post_send(
        qpn,
        &SendWr {
            wr_id: PROBE,
            op: SendOp::Write {
                remote: 0,
                rkey: Rkey(0),
            },
            inline: &[],
            sges: &[],
            flags: SendFlags::SIGNALED,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_asked_about_and_ends() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut host = Liveness::new(Duration::from_secs(50), start);
        assert_eq!(host.deadline(), at(10));
        assert_eq!(host.due(at(9)), Due::Nothing);
        assert_eq!(host.due(at(10)), Due::Ask);
        host.heard(at(11));
        assert_eq!(host.due(at(20)), Due::Nothing, "heard nine seconds ago");
        for second in [30, 40, 50, 60] {
            assert_eq!(host.deadline(), at(second));
            assert_eq!(host.due(at(second)), Due::Ask);
        }
        assert_eq!(host.due(at(70)), Due::Dead);
    }
}
