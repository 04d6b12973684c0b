//! Keep Alive (Base 3.9), traffic based: any command within the interval keeps a host alive.

use std::time::{Duration, Instant};

use super::{IDLE, Kind, Reason};

/// Granularity of the timeout: Identify's KAS, units of 100 ms.
pub(super) const GRANULARITY_100MS: u16 = 1;

/// Is the Keep Alive Timer active? It is while CC.EN and CSTS.RDY are 1, CC.SHN and CSTS.SHST 0 (Base
/// 3.9.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Active,
    /// The controller is not enabled, or was shut down.
    Suspended,
}

/// The timer of one controller.
#[derive(Clone, Debug)]
pub(super) struct KeepAlive {
    kind: Kind,
    phase: Phase,
    timeout_ms: u32,
    deadline: Option<Instant>,
    /// An Admin command came within the interval.
    admin_traffic: bool,
    /// What [`crate::association::Association::traffic`] said when the interval began.
    io_traffic: u64,
}

impl KeepAlive {
    /// Of a controller that is not enabled yet.
    pub(super) fn new(kind: Kind, timeout_ms: u32, now: Instant) -> Self {
        let mut timer = Self {
            kind,
            phase: Phase::Suspended,
            timeout_ms: 0,
            deadline: None,
            admin_traffic: false,
            io_traffic: 0,
        };
        timer.set(timeout_ms, now);
        timer
    }

    /// The Keep Alive Timeout in force, in milliseconds; 0 is off.
    pub(super) fn timeout_ms(&self) -> u32 {
        self.timeout_ms
    }

    /// Sets the timeout, rounded up to the granularity (Base 5.1.25.1.8), and starts an interval.
    pub(super) fn set(&mut self, timeout_ms: u32, now: Instant) {
        let granularity = u32::from(GRANULARITY_100MS) * 100;
        self.timeout_ms = timeout_ms.div_ceil(granularity).saturating_mul(granularity);
        self.restart(now);
    }

    /// The controller is ready.
    pub(super) fn activate(&mut self, now: Instant) {
        self.phase = Phase::Active;
        self.restart(now);
    }

    /// The controller is being disabled or shut down.
    pub(super) fn suspend(&mut self, now: Instant) {
        self.phase = Phase::Suspended;
        self.restart(now);
    }

    /// An Admin or Fabrics command arrived.
    pub(super) fn command(&mut self) {
        self.admin_traffic = true;
    }

    /// When the interval ends.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The interval may be over: was there no command in it? If there was, the next one begins. So a
    /// dead host is noticed after one to two timeouts (Base 3.9.3.2).
    pub(super) fn expired(&mut self, now: Instant, io_traffic: u64) -> Option<Reason> {
        self.deadline.filter(|deadline| *deadline <= now)?;
        if self.admin_traffic || self.io_traffic != io_traffic {
            self.io_traffic = io_traffic;
            self.restart(now);
            return None;
        }
        self.deadline = None;
        Some(match (self.phase, self.timeout_ms) {
            (Phase::Active, 1..) => Reason::KeepAlive,
            _ => Reason::Idle,
        })
    }

    fn restart(&mut self, now: Instant) {
        self.admin_traffic = false;
        let interval = match (self.phase, self.timeout_ms, self.kind) {
            (Phase::Active, 0, Kind::Io) => None,
            (Phase::Suspended, ..) | (_, 0, _) => Some(IDLE),
            (_, ms, _) => Some(Duration::from_millis(ms.into())),
        };
        self.deadline = interval.and_then(|interval| now.checked_add(interval));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn commands_of_any_queue_keep_the_host_alive() {
        let start = Instant::now();
        let mut timer = KeepAlive::new(Kind::Io, 950, start);
        timer.activate(start);
        assert_eq!(timer.timeout_ms(), 1000, "rounded up to 100 ms");
        assert_eq!(timer.expired(at(start, 999), 0), None);
        timer.command();
        assert_eq!(timer.expired(at(start, 1000), 0), None);
        let io = timer.expired(at(start, 2000), 7);
        assert_eq!(io, None, "an I/O queue received something");
        assert_eq!(timer.expired(at(start, 3000), 7), Some(Reason::KeepAlive));
        assert_eq!(timer.deadline(), None);
    }

    #[test]
    fn zero_turns_it_off_except_for_idle_discovery() {
        let start = Instant::now();
        let mut io = KeepAlive::new(Kind::Io, 0, start);
        io.activate(start);
        assert_eq!(io.deadline(), None);
        let mut discovery = KeepAlive::new(Kind::Discovery, 0, start);
        discovery.activate(start);
        assert_eq!(discovery.expired(start + IDLE, 0), Some(Reason::Idle));
    }

    #[test]
    fn it_is_not_active_before_ready_and_after_a_shutdown() {
        let start = Instant::now();
        let mut timer = KeepAlive::new(Kind::Io, 1000, start);
        assert_eq!(timer.deadline(), Some(start + IDLE));
        timer.activate(start);
        assert_eq!(timer.deadline(), Some(at(start, 1000)));
        timer.suspend(at(start, 500));
        assert_eq!(timer.deadline(), Some(at(start, 500) + IDLE));
        let end = timer.expired(at(start, 500) + IDLE, 0);
        assert_eq!(end, Some(Reason::Idle));
    }
}
