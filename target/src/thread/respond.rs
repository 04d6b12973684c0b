//! Completions: data to the host, response capsules, what is freed when they have been acknowledged.

use arrayvec::ArrayVec;
use flexblk_nvme::command::nvm::opcode;
use flexblk_nvme::flexins::Immediate;
use flexblk_nvme::{Cid, Cqe, Nsid, Qid, Status, StatusCode};
use flexins::engine::Engine;
use flexins::verbs::{
    PostError, Rkey, Segments, SendFlags, SendOp, SendWr, Sge, WcStatus, WorkCompletion,
};

use super::buffers::MAX_PIECES;
use super::liveness::PROBE;
use super::parts::Parts;
use super::queue::{Fabric, Place, Queue, Role, Slot, Stage, What};
use super::transfer::{Kind, Last, Transfer, UNTRACKED};
use crate::metrics::Operation;
use crate::queue::request::Range;

/// Command Retry Delay of a command that found no memory: the first time in Identify, 100 ms.
pub(super) const RETRY_SOON: u8 = 1;

impl Parts {
    /// Completes a command that has no slot yet, mostly without giving it one.
    pub(crate) fn finish_new(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        mut slot: Slot,
        status: Status,
    ) {
        // It ends in the turn in which it came.
        slot.status = self.judge(queue, &slot, status, [0; 4]);
        let cqe = Cqe::new(slot.cid, slot.status)
            .with_result(slot.result)
            .with_sqhd(queue.head());
        match self.post_cqe(engine, queue, cqe) {
            Ok(()) => self.credit(engine, queue),
            Err(PostError::QueueFull | PostError::CompletionQueueFull) => {
                slot.what = What::Respond;
                slot.range.device = u32::MAX;
                slot.stage = Stage::Post;
                if let Some(index) = self.admit(engine, queue, slot) {
                    self.blocked.push_back((queue.key, index));
                }
            }
            // The queue pair is in the error state: it is being closed.
            Err(_) => {}
        }
    }

    /// Sends a completion that belongs to no slot and gives no credit; false when the send queue is
    /// full.
    pub(crate) fn send_late(&mut self, engine: &mut Engine, queue: &Queue, cqe: Cqe) -> bool {
        let full = Err(PostError::QueueFull);
        let result = self.post_cqe(engine, queue, cqe);
        result != full && result != Err(PostError::CompletionQueueFull)
    }

    /// Sends a completion that nobody waits for.
    #[inline]
    fn post_cqe(&mut self, engine: &mut Engine, queue: &Queue, cqe: Cqe) -> Result<(), PostError> {
        let qpn = match queue.fabric {
            Fabric::Flexins { qpn, .. } => qpn,
            Fabric::Tcp(conn) => {
                self.tcp.respond(conn, &cqe);
                return Ok(());
            }
        };
        let wr = SendWr {
            wr_id: UNTRACKED,
            op: SendOp::Send,
            inline: &cqe.to_bytes(),
            sges: &[],
            flags: SendFlags::empty(),
        };
        engine.post_send(qpn, &wr)
    }

    /// Completes a command without data for the host.
    pub(crate) fn finish(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        index: u16,
        status: Status,
    ) {
        let Some(slot) = queue.slot(index).copied() else {
            return;
        };
        let spent_us = queue.spent_us(index, self.now_us);
        let status = self.judge(queue, &slot, status, spent_us);
        if let Some(slot) = queue.slot(index) {
            slot.what = What::Respond;
            slot.status = status;
        }
        self.respond(engine, queue, index);
    }

    /// Counts a command by how it ended; a failed one goes to the error log, and its status says so.
    pub(super) fn judge(
        &self,
        queue: &Queue,
        slot: &Slot,
        status: Status,
        spent_us: [u32; 4],
    ) -> Status {
        match &queue.role {
            Role::Io(io) => {
                if let Some(counters) = self.counters(io.subsystem) {
                    match slot.what {
                        _ if !status.is_success() => {
                            counters.failed(operation(slot.opcode), is_media(status));
                        }
                        What::Write { .. } => counters.written(slot.length.into()),
                        What::Read | What::Compare => counters.read(slot.length.into()),
                        _ => counters.other(),
                    }
                }
                self.measure(io, slot, status, &spent_us, queue.peer);
                self.note_error((&io.association, io.qid), slot, status, queue.peer)
            }
            Role::Admin(admin) => {
                let association = admin.controller.association();
                self.note_error((association, Qid::ADMIN), slot, status, queue.peer)
            }
            Role::Unconnected(_) => status,
        }
    }

    /// Sends a command's data, if it has some for the host, and its completion.
    pub(crate) fn respond(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
        let (qpn, immediate, segments) = match queue.fabric {
            Fabric::Flexins {
                qpn,
                immediate,
                segments,
                ..
            } => (qpn, immediate && !queue.flow_control, segments),
            Fabric::Tcp(conn) => return self.respond_tcp(engine, queue, conn, index),
        };
        let head = queue.head();
        let Some(slot) = queue.slot(index) else {
            return;
        };
        slot.stage = Stage::Response;
        let with_data = matches!(slot.what, What::Read | What::AdminOut) && !slot.data_moved;
        let (cid, status, result, remote) = (slot.cid, slot.status, slot.result, slot.remote);
        if with_data {
            let short = immediate && result == 0 && !remote.invalidate;
            let last = if short {
                let imm = Immediate { cid, status }.to_bits();
                Last::Completes(index, imm)
            } else {
                Last::Untracked
            };
            let transfer = Transfer {
                remote,
                last,
                kind: Kind::ToHost,
            };
            let sges = self.sges(slot, segments);
            let result = transfer.post(engine, qpn, &sges, &mut slot.posted);
            if short || result.is_err() {
                if result.is_ok() {
                    self.count_read(queue, index);
                }
                self.posted(result, engine, queue, index);
                return;
            }
            slot.data_moved = true;
            self.count_read(queue, index);
        }
        let cqe = Cqe::new(cid, status)
            .with_result(result)
            .with_sqhd(head)
            .to_bytes();
        let op = if remote.invalidate {
            SendOp::SendInv(Rkey(remote.key))
        } else {
            SendOp::Send
        };
        let wr = SendWr {
            wr_id: index.into(),
            op,
            inline: &cqe,
            sges: &[],
            flags: SendFlags::SIGNALED,
        };
        self.posted(engine.post_send(qpn, &wr), engine, queue, index);
    }

    /// A read has been answered with success.
    pub(super) fn count_read(&self, queue: &mut Queue, index: u16) {
        let slot = match queue.slot(index) {
            Some(slot) if slot.what == What::Read => *slot,
            _ => return,
        };
        if let Role::Io(io) = &queue.role {
            if let Some(counters) = self.counters(io.subsystem) {
                counters.read(slot.length.into());
            }
            let spent_us = queue.spent_us(index, self.now_us);
            self.measure(io, &slot, Status::SUCCESS, &spent_us, queue.peer);
        }
    }

    /// What posting a command's request has led to.
    pub(super) fn posted(
        &mut self,
        result: Result<(), PostError>,
        engine: &mut Engine,
        queue: &mut Queue,
        index: u16,
    ) {
        match result {
            Ok(()) => {}
            Err(PostError::QueueFull | PostError::CompletionQueueFull) => {
                if let Some(slot) = queue.slot(index) {
                    slot.fetches = slot.stage == Stage::Fetch;
                    slot.stage = Stage::Post;
                }
                self.blocked.push_back((queue.key, index));
            }
            Err(error) => {
                if !matches!(error, PostError::State(_) | PostError::UnknownQp) {
                    tracing::error!(%error, peer = %queue.peer, "a request could not be posted");
                    self.to_close.push_back(queue.key);
                }
                self.end(engine, queue, index);
            }
        }
    }

    /// Tries again what found the send queue full.
    pub(crate) fn repost(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
        match queue.slot(index).map(|slot| (slot.stage, slot.fetches)) {
            Some((Stage::Post, true)) => self.fetch(engine, queue, index),
            Some((Stage::Post, false)) => self.respond(engine, queue, index),
            _ => {}
        }
    }

    /// A send request of the queue has completed.
    #[inline]
    pub(crate) fn sent(&mut self, engine: &mut Engine, queue: &mut Queue, wc: &WorkCompletion) {
        if wc.wr_id == UNTRACKED {
            return;
        }
        if wc.wr_id == PROBE {
            if let Role::Admin(admin) = &mut queue.role
                && wc.status == WcStatus::Success
            {
                admin.liveness.heard(self.now);
            }
            return;
        }
        let index = wc.wr_id as u16;
        let fetched = queue
            .slot(index)
            .is_some_and(|slot| slot.stage == Stage::Fetch);
        if fetched && wc.status == WcStatus::Success {
            self.data_ready(engine, queue, index);
        } else {
            self.end(engine, queue, index);
        }
    }

    /// A command is over: everything it held goes back.
    pub(crate) fn end(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
        let Some(slot) = queue.release(index) else {
            return;
        };
        if let Place::Held(held) = slot.place {
            self.buffers.put(held, &mut queue.share);
        }
        if slot.counted {
            self.devices.end(slot.range.device, engine, self.now);
        }
        drop(queue.take_spill(index));
        if !queue.copies.is_empty() {
            queue.copies.retain(|(owner, _)| *owner != index);
        }
        match &queue.role {
            Role::Io(io) => {
                if let Some(Some(subsystem)) = self.subsystems.get_mut(io.subsystem) {
                    subsystem.end(self.now, self.id);
                }
            }
            Role::Admin(_) | Role::Unconnected(_) => {}
        }
        if queue.closing {
            self.to_close.push_back(queue.key);
        } else if slot.what != What::Shutdown {
            self.credit(engine, queue);
        }
    }

    /// The host may send another command.
    #[inline]
    pub(crate) fn credit(&mut self, engine: &mut Engine, queue: &Queue) {
        match queue.fabric {
            // Fails only when the queue pair is gone or going.
            Fabric::Flexins { qpn, .. } => {
                let _ = engine.post_recv_in_place(qpn, 1);
            }
            Fabric::Tcp(conn) => self.tcp.note_room(conn),
        }
    }

    /// A command's data as a gather list, one request for each entry.
    pub(super) fn sges(&self, slot: &Slot, segments: Segments) -> ArrayVec<Sge, MAX_PIECES> {
        match slot.place {
            Place::Held(held) => self.buffers.sges(held, slot.length),
            Place::Device => match self.devices.memory(&slot.range) {
                Some(all) => cut(all, whole_parts(segments, &slot.range)),
                None => ArrayVec::new(),
            },
            Place::None => ArrayVec::new(),
        }
    }
}

/// Lengths of messages for a range's data, none of whose packets ends inside of a block; `None`: they would be too many,
/// or packets are smaller than blocks.
#[inline]
pub(super) fn whole_parts(segments: Segments, range: &Range) -> Option<ArrayVec<u32, MAX_PIECES>> {
    let mut left = u32::try_from(range.len_bytes()).ok()?;
    let mut parts = ArrayVec::new();
    while left > 0 {
        let part = segments.whole_part(1 << range.block_shift, left)?;
        parts.try_push(part).ok()?;
        left -= part;
    }
    Some(parts)
}

/// Memory in parts; whole without any.
fn cut(all: Sge, parts: Option<ArrayVec<u32, MAX_PIECES>>) -> ArrayVec<Sge, MAX_PIECES> {
    let mut addr = all.addr;
    let part_at = |len: u32| {
        let part = Sge { addr, len, ..all };
        addr += u64::from(len);
        part
    };
    match parts {
        Some(parts) => parts.into_iter().map(part_at).collect(),
        None => core::iter::once(all).collect(),
    }
}

/// What a command counts as in the SMART log, in which Verify, Write Zeroes and Copy are neither.
const fn operation(opcode: u8) -> Operation {
    match opcode {
        opcode::READ | opcode::COMPARE => Operation::Read,
        opcode::WRITE => Operation::Write,
        _ => Operation::Other,
    }
}

fn is_media(status: Status) -> bool {
    status.is(StatusCode::UnrecoveredReadError) || status.is(StatusCode::WriteFault)
}

/// A command that is refused or answered before it means anything.
pub(crate) fn refusal(cid: Cid, opcode: u8, nsid: Nsid) -> Slot {
    let mut slot = Slot::new(What::Respond, opcode, cid);
    slot.nsid = nsid;
    slot
}
