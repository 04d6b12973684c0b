//! What commands took: into the host's numbers, into the log when one is slow or its host is traced.

use std::net::SocketAddr;
use std::sync::Arc;

use flexblk_nvme::{Nsid, Status, StatusCode};

use super::parts::Parts;
use super::queue::{Io, Queue, Role, Slot, What};
use super::record::event_of;
use crate::iostat::{Failure, IoType};
use crate::metrics::{Operation, Stage};
use crate::queue::request::Range;
use crate::recorder::Kind;

impl Parts {
    /// Makes sure that there are numbers for a namespace; called once for each command, and does
    /// nothing but look for all but the first.
    #[inline]
    pub(super) fn open_series(&self, queue: &mut Queue, nsid: Nsid) {
        let Role::Io(io) = &mut queue.role else {
            return;
        };
        if io.series(nsid).is_none() {
            self.new_series(io, nsid);
        }
    }

    #[cold]
    fn new_series(&self, io: &mut Io, nsid: Nsid) {
        let subsystem = self.snapshot.subsystem(io.subsystem);
        // A namespace that is not there has no numbers.
        let Some(namespace) = subsystem.and_then(|subsystem| subsystem.namespace(nsid)) else {
            return;
        };
        let association = &io.association;
        let at = (&association.subnqn, nsid, namespace.device_id);
        let shard = self.shared.metrics.shard(self.id, &association.hostnqn, at);
        let index = nsid.get().saturating_sub(1) as usize;
        if io.series.len() <= index {
            io.series.resize(index + 1, None);
        }
        if let Some(place) = io.series.get_mut(index) {
            *place = Some(shard);
        }
    }

    /// A command has been answered.
    #[inline]
    pub(super) fn measure(
        &self,
        io: &Io,
        slot: &Slot,
        status: Status,
        spent_us: &[u32; 4],
        peer: SocketAddr,
    ) {
        let operation = match slot.what {
            What::Read | What::Compare | What::Verify => Operation::Read,
            What::Write { .. } | What::WriteZeroes { .. } | What::Copy { .. } => Operation::Write,
            _ => Operation::Other,
        };
        let success = status.is_success();
        if let Some(shard) = io.series(slot.nsid) {
            let bytes = match slot.what {
                What::Read | What::Compare | What::Write { .. } if success => slot.length,
                _ => 0,
            };
            shard.count(operation, bytes, success, spent_us);
        }
        self.count_io(slot, status, spent_us);
        let is_slow = self.shared.metrics.is_slow(spent_us[0]);
        if is_slow {
            let event = event_of(Kind::SlowIo, &io.association, io.qid, peer);
            self.record_command(event, slot, status, spent_us[0].into());
        }
        if is_slow || io.association.is_traced() {
            self.log(io, slot, status, spent_us);
        }
    }

    /// A command counts as an I/O of its device, too, with the time that the device took.
    #[inline]
    fn count_io(&self, slot: &Slot, status: Status, spent_us: &[u32; 4]) {
        let Some(io_type) = io_type(slot.what) else {
            return;
        };
        let Some(device) = self.devices.get(slot.range.device) else {
            return;
        };
        if !status.is_success() {
            device.count_failure(self.id, failure(status));
        } else if io_type != IoType::Unmap {
            let took_us = spent_us.get(Stage::Backend as usize).copied().unwrap_or(0);
            device.count(self.id, io_type, slot.range.len_bytes(), took_us);
        }
    }

    /// Each range of Dataset Management is an I/O of its own.
    pub(super) fn count_range(&self, range: &Range, took_us: u32) {
        if let Some(device) = self.devices.get(range.device) {
            device.count(self.id, IoType::Unmap, range.len_bytes(), took_us);
        }
    }

    #[cold]
    fn log(&self, io: &Io, slot: &Slot, status: Status, spent_us: &[u32; 4]) {
        let traced = io.association.is_traced();
        if !traced && !self.shared.metrics.may_log_slow(self.now_us) {
            return;
        }
        let us = |stage: Stage| spent_us.get(stage as usize).copied().unwrap_or(0);
        tracing::info!(
            target: "flexblk_target::command",
            what = if traced { "traced" } else { "slow" },
            host = io.association.hostnqn.as_str(),
            subsystem = io.association.subnqn.as_str(),
            cntlid = %io.association.cntlid,
            qid = %io.qid,
            cid = %slot.cid,
            nsid = %slot.nsid,
            opcode = format_args!("{:#04x}", slot.opcode),
            lba = slot.range.lba,
            bytes = slot.length,
            %status,
            total_us = us(Stage::Total),
            wait_us = us(Stage::Wait),
            network_us = us(Stage::Network),
            backend_us = us(Stage::Backend),
            "command"
        );
    }
}

/// What a command does with its device; `None` when it has none.
#[inline]
fn io_type(what: What) -> Option<IoType> {
    Some(match what {
        What::Read => IoType::Read,
        What::Write { .. } => IoType::Write,
        What::Compare => IoType::Compare,
        What::Flush => IoType::Flush,
        What::WriteZeroes { .. } => IoType::WriteZeroes,
        What::Verify => IoType::Verify,
        What::Deallocate { .. } => IoType::Unmap,
        What::Copy { .. } => IoType::Copy,
        What::Reserve(_) | What::AdminOut | What::AdminIn | What::Shutdown | What::Respond => {
            return None;
        }
    })
}

fn failure(status: Status) -> Failure {
    if status.is(StatusCode::CompareFailure) {
        return Failure::Miscompare;
    }
    let aborted = [
        StatusCode::AbortRequested,
        StatusCode::AbortedSqDeletion,
        StatusCode::AbortedPreemptAndAbort,
        StatusCode::AbortedFailedFused,
    ];
    match aborted.into_iter().any(|code| status.is(code)) {
        true => Failure::Aborted,
        false => Failure::Failed,
    }
}

impl Io {
    /// The numbers of a namespace.
    #[inline]
    pub(super) fn series(&self, nsid: Nsid) -> Option<&Arc<crate::metrics::Shard>> {
        let index = nsid.get().wrapping_sub(1);
        self.series.get(index as usize)?.as_ref()
    }
}
