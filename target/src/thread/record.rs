//! What goes into the flight recorder.

use std::net::SocketAddr;

use flexblk_nvme::{Qid, Status};

use super::parts::Parts;
use super::queue::Slot;
use crate::association::{Association, ErrorEntry};
use crate::controller::Reason;
use crate::recorder::{Event, Kind};

impl Parts {
    /// Notes an event.
    #[cold]
    pub(super) fn record(&self, mut event: Event) {
        let started = self.shared.started;
        event.at_us = self.now.saturating_duration_since(started).as_micros() as u64;
        if let Some(recorder) = self.shared.recorders.get(self.id) {
            recorder.record(event);
        }
    }

    /// Notes something about a command.
    #[cold]
    pub(super) fn record_command(&self, event: Event, slot: &Slot, status: Status, value: u64) {
        self.record(Event {
            cid: slot.cid.get(),
            opcode: slot.opcode,
            nsid: slot.nsid.get(),
            status: status.bits(),
            value,
            ..event
        });
    }

    /// Notes a failed command in its controller's log and sets More, which says so (Base 4.2.3).
    #[inline]
    pub(super) fn note_error(
        &self,
        (of, qid): (&Association, Qid),
        slot: &Slot,
        status: Status,
        peer: SocketAddr,
    ) -> Status {
        if status.is_success() {
            return status;
        }
        let event = event_of(Kind::Error, of, qid, peer);
        self.record_command(event, slot, status, slot.range.lba);
        of.log_error(ErrorEntry {
            sqid: qid,
            cid: slot.cid,
            opcode: slot.opcode,
            status: status.with_more(),
            lba: slot.lba(),
            nsid: slot.nsid,
        });
        status.with_more()
    }

    /// Notes what happened to a controller.
    #[cold]
    pub(super) fn record_controller(&self, kind: Kind, of: &Association, peer: SocketAddr) {
        self.record(event_of(kind, of, Qid::ADMIN, peer));
    }
}

/// An event of a queue of a controller.
pub(super) fn event_of(kind: Kind, of: &Association, qid: Qid, peer: SocketAddr) -> Event {
    Event {
        cntlid: of.cntlid.get(),
        host: of.host_tag,
        qid: qid.get(),
        ..Event::new(kind, peer)
    }
}

/// Why a controller ends by itself.
pub(super) fn kind_of(reason: Reason) -> Kind {
    match reason {
        Reason::KeepAlive => Kind::KeepAliveExpired,
        Reason::Idle => Kind::Idle,
        Reason::Silence => Kind::Silence,
        Reason::NotAllowed => Kind::NotAllowed,
    }
}
