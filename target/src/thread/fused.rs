//! Compare and Write, fused (Base 3.4.2, NVM 3.2.1.1): both halves or none, and nobody in between.
//!
//! When both halves have their data, the pair claims its blocks among all pairs of the target, puts
//! up a fence on every thread, and waits until what the threads' devices had of these blocks is
//! done; then it compares and writes. A fence holds I/O to its blocks back, and nothing else. Single
//! blocks that are on their way to a host straight out of a device's memory are not waited for: they
//! are read whole, before or after (over NVMe/TCP unless the socket is full in the middle of one, see
//! `atomic_blocks` of RAM devices). Nor are writes whose data is still on its way: nothing orders them.

use flexblk_blockdev::IoError;
use flexblk_nvme::command::{Fuse, Sqe};
use flexblk_nvme::{Cid, Status, StatusCode};
use flexins::engine::Engine;

use super::Core;
use super::backend::status_of;
use super::devices::Fence;
use super::mail::Mail;
use super::parts::Parts;
use super::queue::{Place, Queue, QueueKey, QueueTable, Role, Slot, Stage, What};
use crate::queue::request::{Range, Request};

/// The first half of a pair whose second has not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum First {
    /// Its command.
    Slot(u16, Cid),
    /// It was refused: the second must not be done either.
    Refused,
}

/// A pair.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pair {
    /// Names it among all threads.
    id: u64,
    key: QueueKey,
    compare: (u16, Cid),
    write: (u16, Cid),
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Halves may still wait for their data, or another pair has the blocks.
    Gather,
    /// Threads whose devices are still busy with the blocks.
    Drain { threads: usize },
    /// Comparing or writing.
    Run,
}

/// Blocks that a pair has to itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    id: u64,
    device_id: u64,
    lba: u64,
    end: u64,
}

impl Claim {
    fn overlaps(&self, other: &Self) -> bool {
        self.device_id == other.device_id && self.lba < other.end && other.lba < self.end
    }
}

impl Parts {
    /// A command that is half of a fused operation, or one that comes instead of a second half.
    /// True when there is nothing left to do for it.
    #[cold]
    pub(super) fn fused_command(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        sqe: &Sqe,
        data: &[u8],
    ) -> bool {
        let first = queue.fused.take();
        let missing = StatusCode::AbortedMissingFused.dnr();
        match sqe.fuse() {
            Fuse::Second => {
                let Some(first) = first else {
                    self.refuse_half(engine, queue, sqe, missing);
                    return true;
                };
                self.second_half(engine, queue, sqe, data, first);
                true
            }
            fuse => {
                // "the second command ... shall be adjacent": this one is not it.
                if let Some(First::Slot(index, cid)) = first
                    && is_half(queue, index, cid, Fuse::First)
                {
                    self.abort_command(engine, queue, index, missing);
                }
                if fuse == Fuse::First {
                    queue.fused = Some(self.first_half(engine, queue, sqe, data));
                }
                // Reserved is the parser's to refuse.
                fuse == Fuse::First
            }
        }
    }

    fn first_half(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        sqe: &Sqe,
        data: &[u8],
    ) -> First {
        match self.half(queue, sqe, data.len()) {
            Ok(Request::Compare { range, from }) => {
                let mut slot = half_slot(What::Compare, sqe, Fuse::First, range);
                slot.nsid = sqe.nsid();
                match self.take_data(engine, queue, slot, from, data) {
                    Some(index) => First::Slot(index, sqe.cid()),
                    None => First::Refused,
                }
            }
            // NVM 3.2.1.1: Compare and Write is the only fused operation.
            Ok(_) => {
                self.refuse_half(engine, queue, sqe, StatusCode::InvalidField.dnr());
                First::Refused
            }
            Err(status) => {
                self.refuse_half(engine, queue, sqe, status);
                First::Refused
            }
        }
    }

    fn second_half(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        sqe: &Sqe,
        data: &[u8],
        first: First,
    ) {
        let failed = StatusCode::AbortedFailedFused.dnr();
        let compare = match first {
            First::Slot(index, cid) if is_half(queue, index, cid, Fuse::First) => (index, cid),
            _ => return self.refuse_half(engine, queue, sqe, failed),
        };
        let range = queue.slot(compare.0).map(|slot| slot.range);
        let request = match self.half(queue, sqe, data.len()) {
            // "the LBA ranges ... shall be the same": else Invalid Field in Command.
            Ok(Request::Write {
                range: own,
                from,
                fua,
            }) if Some(own) == range => Ok((own, from, fua)),
            Ok(_) => Err(StatusCode::InvalidField.dnr()),
            Err(status) => Err(status),
        };
        let (range, from, fua) = match request {
            Ok(request) => request,
            Err(status) => {
                self.abort_command(engine, queue, compare.0, failed);
                return self.refuse_half(engine, queue, sqe, status);
            }
        };
        let slot = half_slot(What::Write { fua }, sqe, Fuse::Second, range);
        let Some(index) = self.take_data(engine, queue, slot, from, data) else {
            return;
        };
        self.next_pair += 1;
        self.pairs.push(Pair {
            id: (self.id as u64) << 48 | self.next_pair,
            key: queue.key,
            compare,
            write: (index, sqe.cid()),
            phase: Phase::Gather,
        });
    }

    /// What a half asks for, were it a command of its own.
    fn half(&self, queue: &Queue, sqe: &Sqe, data_len: usize) -> Result<Request, Status> {
        let Role::Io(io) = &queue.role else {
            return Err(StatusCode::InvalidField.dnr());
        };
        let views = self.subsystems.get(io.subsystem).and_then(Option::as_ref);
        let view = views.and_then(|views| views.view(sqe.nsid()));
        if view.is_some_and(|view| view.gated) {
            self.gate(io, queue.port, sqe.nsid(), sqe.opcode)?;
        }
        let mut single = *sqe;
        single.set_fuse(Fuse::Normal);
        let addressing = queue.fabric.addressing();
        let mut request = Request::parse(&single, data_len, addressing, |_| view)?;
        if let Request::Write { fua, .. } = &mut request {
            *fua |= io.association.write_through();
        }
        Ok(request)
    }

    fn refuse_half(&mut self, engine: &mut Engine, queue: &mut Queue, sqe: &Sqe, status: Status) {
        let mut slot = Slot::new(What::Respond, sqe.opcode, sqe.cid());
        slot.nsid = sqe.nsid();
        self.finish_new(engine, queue, slot, status);
    }

    /// The device has done one half.
    pub(super) fn half_done(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        index: u16,
        result: Result<(), IoError>,
    ) {
        let pair = self.pairs.iter().copied();
        let pair = pair.filter(|pair| pair.key == queue.key).find(|pair| {
            pair.phase == Phase::Run && (pair.compare.0 == index || pair.write.0 == index)
        });
        let Some(pair) = pair else {
            return self.finish(engine, queue, index, StatusCode::InternalError.into());
        };
        let status = result.map_or_else(status_of, |()| Status::SUCCESS);
        if index == pair.compare.0 && status.is_success() {
            if let Some(slot) = queue.slot(index) {
                slot.stage = Stage::Fused;
            }
            if let Some(slot) = queue.slot(pair.write.0) {
                slot.stage = Stage::Device;
                self.device_work.push_back((queue.key, pair.write.0));
            }
            return;
        }
        let (compare, write) = match index == pair.compare.0 {
            // "If there is an error in the first command, then the second command shall be aborted
            // with a status code of Command Aborted due to Failed Fused Command."
            true => (status, StatusCode::AbortedFailedFused.dnr()),
            false => (Status::SUCCESS, status),
        };
        self.finish(engine, queue, pair.compare.0, compare);
        self.finish(engine, queue, pair.write.0, write);
    }
}

fn half_slot(what: What, sqe: &Sqe, fuse: Fuse, range: Range) -> Slot {
    let mut slot = Slot::new(what, sqe.opcode, sqe.cid());
    slot.nsid = sqe.nsid();
    slot.range = range;
    slot.length = range.len_bytes() as u32;
    slot.fuse = fuse;
    slot
}

/// Is that command still a half that has not been answered?
fn is_half(queue: &mut Queue, index: u16, cid: Cid, fuse: Fuse) -> bool {
    queue.slot(index).is_some_and(|slot| {
        slot.fuse == fuse && slot.cid == cid && !matches!(slot.stage, Stage::Response)
    })
}

impl Core {
    /// Takes every pair as far as it gets, and tells when this thread's devices have left a fence.
    pub(super) fn run_fused(&mut self, engine: &mut Engine) {
        if self.parts.pairs.is_empty() && self.parts.devices.fences.is_empty() {
            return;
        }
        for at in (0..self.parts.pairs.len()).rev() {
            if let Some(pair) = self.parts.pairs.get(at).copied() {
                self.advance_pair(engine, at, pair);
            }
        }
        self.check_fences();
        for at in (0..self.parts.pairs.len()).rev() {
            let Some(pair) = self.parts.pairs.get_mut(at) else {
                continue;
            };
            if pair.phase == (Phase::Drain { threads: 0 }) {
                pair.phase = Phase::Run;
                let (key, index) = (pair.key, pair.compare.0);
                if let Some(slot) = self.queues.get_mut(key).and_then(|queue| queue.slot(index)) {
                    slot.stage = Stage::Device;
                    self.parts.device_work.push_back((key, index));
                }
            }
        }
    }

    fn advance_pair(&mut self, engine: &mut Engine, at: usize, pair: Pair) {
        let stage = |queue: &mut Queue, (index, cid): (u16, Cid), fuse| {
            is_half(queue, index, cid, fuse)
                .then(|| queue.slot(index).map(|slot| slot.stage))
                .flatten()
        };
        let halves = self.queues.get_mut(pair.key).map(|queue| {
            (
                stage(queue, pair.compare, Fuse::First),
                stage(queue, pair.write, Fuse::Second),
            )
        });
        let failed = StatusCode::AbortedFailedFused.dnr();
        match (halves.unwrap_or((None, None)), pair.phase) {
            ((Some(Stage::Fused), Some(Stage::Fused)), Phase::Gather) => self.claim(at, pair),
            ((Some(_), Some(_)), Phase::Gather | Phase::Drain { .. }) => {}
            ((Some(Stage::Device), Some(_)) | (Some(_), Some(Stage::Device)), Phase::Run) => {}
            // One is over without the other, or both are.
            ((compare, write), _) => {
                if let Some(queue) = self.queues.get_mut(pair.key) {
                    if compare.is_some() {
                        self.parts
                            .abort_command(engine, queue, pair.compare.0, failed);
                    }
                    if write.is_some() {
                        self.parts
                            .abort_command(engine, queue, pair.write.0, failed);
                    }
                }
                self.release(at, pair);
            }
        }
    }

    /// Takes the pair's blocks if no other pair has them.
    fn claim(&mut self, at: usize, pair: Pair) {
        let slot = self
            .queues
            .get_mut(pair.key)
            .and_then(|queue| queue.slot(pair.compare.0));
        let Some(range) = slot.map(|slot| slot.range) else {
            return;
        };
        let Some(device_id) = self.parts.devices.id_of(range.device) else {
            // The namespace cannot be used on this thread: its device says so.
            if let Some(pair) = self.parts.pairs.get_mut(at) {
                pair.phase = Phase::Drain { threads: 0 };
            }
            return;
        };
        let claim = Claim {
            id: pair.id,
            device_id,
            lba: range.lba,
            end: range.lba + u64::from(range.blocks),
        };
        {
            let mut claims = crate::association::lock(&self.parts.shared.claims);
            if claims.iter().any(|other| other.overlaps(&claim)) {
                return;
            }
            claims.push(claim);
        }
        let threads = self.parts.shared.threads;
        if let Some(pair) = self.parts.pairs.get_mut(at) {
            pair.phase = Phase::Drain { threads };
        }
        for thread in 0..threads {
            if thread != self.parts.id {
                let from = self.parts.id;
                self.outbox.push(thread, Mail::Fence { claim, from });
            }
        }
        self.put_fence(claim, self.parts.id);
    }

    /// I/O of this thread to those blocks waits from now on.
    pub(super) fn put_fence(&mut self, claim: Claim, from: usize) {
        self.parts.devices.fences.push(Fence {
            id: claim.id,
            device_id: claim.device_id,
            lba: claim.lba,
            end: claim.end,
            from,
            drained: false,
        });
    }

    /// Tells the owners of fences whose blocks no device of this thread is busy with any more.
    fn check_fences(&mut self) {
        for at in 0..self.parts.devices.fences.len() {
            let Some(fence) = self.parts.devices.fences.get(at).copied() else {
                return;
            };
            if fence.drained || is_busy(&mut self.queues, &self.parts, &fence) {
                continue;
            }
            if let Some(fence) = self.parts.devices.fences.get_mut(at) {
                fence.drained = true;
            }
            if fence.from == self.parts.id {
                self.fence_drained(fence.id);
            } else {
                self.outbox.push(fence.from, Mail::Fenced(fence.id));
            }
        }
    }

    /// A thread's devices have left the blocks of a pair of ours.
    pub(super) fn fence_drained(&mut self, id: u64) {
        let pair = self.parts.pairs.iter_mut().find(|pair| pair.id == id);
        if let Some(Phase::Drain { threads }) = pair.map(|pair| &mut pair.phase) {
            *threads = threads.saturating_sub(1);
        }
    }

    /// The pair is over: its blocks are everybody's again.
    fn release(&mut self, at: usize, pair: Pair) {
        self.parts.pairs.swap_remove(at);
        let held = {
            let mut claims = crate::association::lock(&self.parts.shared.claims);
            let before = claims.len();
            claims.retain(|claim| claim.id != pair.id);
            claims.len() != before
        };
        if held {
            for thread in 0..self.parts.shared.threads {
                if thread != self.parts.id {
                    self.outbox.push(thread, Mail::Unfence(pair.id));
                }
            }
            self.remove_fence(pair.id);
        }
    }

    /// I/O that waited for a fence goes on.
    pub(super) fn remove_fence(&mut self, id: u64) {
        self.parts.devices.fences.retain(|fence| fence.id != id);
        let fenced = self.parts.fenced.drain(..);
        self.parts.device_work.extend(fenced);
    }
}

/// Is a device of this thread, or a transfer into its memory, at work on the fence's blocks?
fn is_busy(queues: &mut QueueTable, parts: &Parts, fence: &Fence) -> bool {
    queues.iter_mut().any(|queue| {
        let at_work = |slot: &Slot| {
            let working = match slot.stage {
                Stage::Device => slot.with_device,
                Stage::Fetch | Stage::Post => slot.place == Place::Device,
                _ => false,
            };
            working && slot.fuse == Fuse::Normal && parts.devices.meets(&slot.range, fence)
        };
        !queue.matching(at_work).is_empty()
    })
}
