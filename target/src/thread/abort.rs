//! Aborting a command (Base 5.1.1): what can still be taken back, and how without harm.
//!
//! | the command | what happens |
//! |---|---|
//! | waits for buffers, for room, for its fused mate, or for the device | it ends at once |
//! | its data is being fetched into a buffer | it ends when that is over; nothing is written |
//! | its data is being fetched into the device's own memory | not aborted |
//! | the device reads, compares or verifies for it | the host has its answer at once; slot and buffers stay until the device is done with them |
//! | the device writes for it | not aborted |
//!
//! A write that a device has is never answered early: the host would take the blocks for free, and
//! what it writes next could be overtaken by the old data.

use flexblk_nvme::{Cqe, Status};
use flexins::engine::Engine;

use super::parts::Parts;
use super::queue::{Place, Queue, Stage, What};

impl Parts {
    /// Ends a command with `status`, if it can be; false when it goes on and ends by itself.
    pub(crate) fn abort_command(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        index: u16,
        status: Status,
    ) -> bool {
        let Some(slot) = queue.slot(index) else {
            return false;
        };
        match slot.stage {
            Stage::Fetch if slot.place != Place::Device => slot.doomed = status,
            Stage::Device if slot.with_device => match slot.what {
                What::Read | What::Compare | What::Verify => {
                    self.abandon(queue, index, status);
                }
                _ => return false,
            },
            Stage::Post if !slot.fetches => return false,
            Stage::Buffers | Stage::Fused | Stage::Device | Stage::Post => {
                drop(queue.take_spill(index));
                self.finish(engine, queue, index, status);
            }
            Stage::Free | Stage::Fetch | Stage::Control | Stage::Response | Stage::Abandoned => {
                return false;
            }
        }
        true
    }

    /// Answers a command that the device still has. The host gets its credit back only when the
    /// device is done, so that slots never run out.
    fn abandon(&mut self, queue: &mut Queue, index: u16, status: Status) {
        let Some(slot) = queue.slot(index).copied() else {
            return;
        };
        let spent_us = queue.spent_us(index, self.now_us);
        let status = self.judge(queue, &slot, status, spent_us);
        if let Some(slot) = queue.slot(index) {
            slot.stage = Stage::Abandoned;
        }
        let cqe = Cqe::new(slot.cid, status).with_sqhd(queue.head());
        self.late.push_back((queue.key, cqe));
    }
}
