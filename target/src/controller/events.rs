//! Asynchronous events (Base 5.1.2): at most four requests wait, an event that was reported is
//! masked until the host has read its log page.

use arrayvec::ArrayVec;
use flexblk_nvme::{Cid, Status, StatusCode};

/// Requests that may be outstanding: Identify's AERL + 1 (Base 5.1.13.2.1).
pub const MAX_REQUESTS: usize = 4;

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Notice 00h: the namespace list or a namespace's attributes changed; log page 04h.
    NamespaceChanged,
    /// Notice 02h: there is something of the controller's own accord to tell; log page 08h.
    TelemetryChanged,
    /// Notice 03h: the ANA log page changed; log page 0Ch.
    AnaChanged,
    /// I/O command specific 00h: the Reservation Notification log page has an entry; log page 80h.
    ReservationLog,
    /// Notice F0h: the discovery log changed; log page 70h.
    DiscoveryChanged,
}

impl Event {
    const ALL: [Self; 5] = [
        Self::NamespaceChanged,
        Self::TelemetryChanged,
        Self::AnaChanged,
        Self::ReservationLog,
        Self::DiscoveryChanged,
    ];

    /// Its bit in the Asynchronous Event Configuration feature (Base 5.1.25.1.5); 0 for an event
    /// that is turned off elsewhere (Reservation Notification Mask).
    const fn enable_bit(self) -> u32 {
        match self {
            Self::NamespaceChanged => 1 << 8,
            Self::TelemetryChanged => 1 << 10,
            Self::AnaChanged => 1 << 11,
            Self::ReservationLog => 0,
            Self::DiscoveryChanged => 1 << 31,
        }
    }

    const fn is_enabled(self, config: u32) -> bool {
        let bit = self.enable_bit();
        bit == 0 || config & bit != 0
    }

    const fn bit(self) -> u8 {
        match self {
            Self::NamespaceChanged => 1,
            Self::DiscoveryChanged => 2,
            Self::AnaChanged => 4,
            Self::ReservationLog => 8,
            Self::TelemetryChanged => 16,
        }
    }
}

/// Requests and events of one controller.
#[derive(Clone, Debug, Default)]
pub(super) struct AsyncEvents {
    requests: ArrayVec<Cid, MAX_REQUESTS>,
    pending: u8,
    masked: u8,
    config: u32,
}

impl AsyncEvents {
    /// An Asynchronous Event Request arrived. A fifth is *Asynchronous Event Request Limit Exceeded*
    /// (Base 5.1.2).
    pub(super) fn request(&mut self, cid: Cid) -> Result<(), Status> {
        self.requests
            .try_push(cid)
            .map_err(|_| StatusCode::AsyncEventLimitExceeded.dnr())
    }

    /// The Asynchronous Event Configuration feature.
    #[must_use]
    pub(super) fn config(&self) -> u32 {
        self.config
    }

    /// Sets it; events that it turns off and that wait are forgotten.
    pub(super) fn set_config(&mut self, config: u32) {
        self.config = config;
        for event in Event::ALL {
            if !event.is_enabled(config) {
                self.pending &= !event.bit();
            }
        }
    }

    /// Something happened.
    pub(super) fn raise(&mut self, event: Event) {
        if event.is_enabled(self.config) {
            self.pending |= event.bit();
        }
    }

    /// The host has read the event's log page without Retain Asynchronous Event: the next one of
    /// this kind is reported again.
    pub(super) fn clear(&mut self, event: Event) {
        self.masked &= !event.bit();
        self.pending &= !event.bit();
    }

    /// A request to be completed now, and with what.
    pub(super) fn poll(&mut self) -> Option<(Cid, Event)> {
        let ready = self.pending & !self.masked;
        let event = Event::ALL
            .into_iter()
            .find(|event| ready & event.bit() != 0)?;
        let cid = self.requests.pop_at(0)?;
        self.pending &= !event.bit();
        self.masked |= event.bit();
        Some((cid, event))
    }

    /// Takes a waiting request back for an Abort; false when it does not wait.
    pub(super) fn abort(&mut self, cid: Cid) -> bool {
        let before = self.requests.len();
        self.requests.retain(|waiting| *waiting != cid);
        self.requests.len() != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enabled() -> AsyncEvents {
        let mut events = AsyncEvents::default();
        events.set_config(1 << 8 | 1 << 31);
        events
    }

    /// "the command is aborted with Asynchronous Event Request Limit Exceeded" beyond AERL.
    #[test]
    fn a_fifth_request_is_refused() {
        let mut events = enabled();
        for cid in 0..4 {
            assert_eq!(events.request(Cid::new(cid)), Ok(()));
        }
        assert_eq!(
            events.request(Cid::new(4)),
            Err(StatusCode::AsyncEventLimitExceeded.dnr())
        );
    }

    /// "subsequent events of that type are automatically masked by the controller until the host
    /// clears that event" by reading the log page.
    #[test]
    fn a_reported_event_is_masked_until_its_log_is_read() {
        let mut events = enabled();
        events.request(Cid::new(1)).unwrap();
        events.request(Cid::new(2)).unwrap();
        events.raise(Event::NamespaceChanged);
        assert_eq!(events.poll(), Some((Cid::new(1), Event::NamespaceChanged)));
        events.raise(Event::NamespaceChanged);
        assert_eq!(events.poll(), None);
        // Another kind is not masked by it.
        events.raise(Event::DiscoveryChanged);
        assert_eq!(events.poll(), Some((Cid::new(2), Event::DiscoveryChanged)));
        events.request(Cid::new(3)).unwrap();
        events.clear(Event::NamespaceChanged);
        assert_eq!(
            events.poll(),
            None,
            "what the log showed is not reported again"
        );
        events.raise(Event::NamespaceChanged);
        assert_eq!(events.poll(), Some((Cid::new(3), Event::NamespaceChanged)));
    }

    #[test]
    fn events_wait_for_a_request_and_are_not_raised_when_turned_off() {
        let mut events = AsyncEvents::default();
        events.raise(Event::NamespaceChanged);
        events.request(Cid::new(1)).unwrap();
        assert_eq!(
            events.poll(),
            None,
            "notices are off until the host asks for them"
        );
        events.set_config(1 << 8);
        assert!(events.abort(Cid::new(1)));
        assert!(!events.abort(Cid::new(1)));
        events.raise(Event::NamespaceChanged);
        assert_eq!(events.poll(), None, "no request waits");
        events.request(Cid::new(2)).unwrap();
        assert_eq!(events.poll(), Some((Cid::new(2), Event::NamespaceChanged)));
    }
}
