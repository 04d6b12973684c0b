//! What commands took: into the host's numbers, into the log when one is slow or its host is traced.

use std::net::SocketAddr;
use std::sync::Arc;

use flexblk_nvme::{Nsid, Status};

use super::parts::Parts;
use super::queue::{Io, Queue, Role, Slot, What};
use super::record::event_of;
use crate::metrics::{Operation, Stage};
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
            What::Write { .. } | What::WriteZeroes { .. } => Operation::Write,
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
        let is_slow = self.shared.metrics.is_slow(spent_us[0]);
        if is_slow {
            let event = event_of(Kind::SlowIo, &io.association, io.qid, peer);
            self.record_command(event, slot, status, spent_us[0].into());
        }
        if is_slow || io.association.is_traced() {
            self.log(io, slot, status, spent_us);
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

impl Io {
    /// The numbers of a namespace.
    #[inline]
    pub(super) fn series(&self, nsid: Nsid) -> Option<&Arc<crate::metrics::Shard>> {
        let index = nsid.get().wrapping_sub(1);
        self.series.get(index as usize)?.as_ref()
    }
}
