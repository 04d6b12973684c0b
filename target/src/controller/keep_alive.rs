//! Keep Alive (Base 3.9), traffic based: any command within the interval keeps a host alive.

use std::time::{Duration, Instant};

use super::{DISCOVERY_IDLE, Kind};

/// Granularity of the timeout: Identify's KAS, units of 100 ms.
pub(super) const GRANULARITY_100MS: u16 = 1;

/// The timer of one controller.
#[derive(Clone, Debug)]
pub(super) struct KeepAlive {
    kind: Kind,
    timeout_ms: u32,
    deadline: Option<Instant>,
    /// An Admin command came within the interval.
    admin_traffic: bool,
    /// What [`crate::association::Association::traffic`] said when the interval began.
    io_traffic: u64,
}

impl KeepAlive {
    pub(super) fn new(kind: Kind, timeout_ms: u32, now: Instant) -> Self {
        let mut timer = Self {
            kind,
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

    /// An Admin or Fabrics command arrived.
    pub(super) fn command(&mut self, _now: Instant) {
        self.admin_traffic = true;
    }

    /// When the interval ends.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The interval may be over: was there no command in it? If there was, the next one begins. So a
    /// dead host is noticed after one to two timeouts (Base 3.9.3.2).
    pub(super) fn expired(&mut self, now: Instant, io_traffic: u64) -> bool {
        match self.deadline {
            Some(deadline) if deadline <= now => {}
            _ => return false,
        }
        if self.admin_traffic || self.io_traffic != io_traffic {
            self.io_traffic = io_traffic;
            self.restart(now);
            return false;
        }
        self.deadline = None;
        true
    }

    fn restart(&mut self, now: Instant) {
        self.admin_traffic = false;
        self.deadline = match (self.timeout_ms, self.kind) {
            (0, Kind::Io) => None,
            (0, Kind::Discovery) => now.checked_add(DISCOVERY_IDLE),
            (ms, _) => now.checked_add(Duration::from_millis(ms.into())),
        };
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
        assert_eq!(timer.timeout_ms(), 1000, "rounded up to 100 ms");
        assert!(!timer.expired(at(start, 999), 0));
        timer.command(at(start, 500));
        assert!(!timer.expired(at(start, 1000), 0));
        assert!(
            !timer.expired(at(start, 2000), 7),
            "an I/O queue received something"
        );
        assert!(timer.expired(at(start, 3000), 7));
        assert_eq!(timer.deadline(), None);
    }

    #[test]
    fn zero_turns_it_off_except_for_idle_discovery() {
        let start = Instant::now();
        assert_eq!(KeepAlive::new(Kind::Io, 0, start).deadline(), None);
        let mut discovery = KeepAlive::new(Kind::Discovery, 0, start);
        assert!(discovery.expired(start + DISCOVERY_IDLE, 0));
    }
}
