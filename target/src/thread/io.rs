//! I/O commands: from the checked request through data transfer and device to the response.
//!
//! | command | data in the device's memory | otherwise |
//! |---|---|---|
//! | read | response straight out of it | buffers, device, response |
//! | write in the capsule | copied from the packet, response | buffers, device, response |
//! | larger write | fetched straight into it, response | buffers, fetch, device, response |

use arrayvec::ArrayVec;
use flexblk_blockdev::{Io as DeviceIo, IoBuffers, IoError, IoOp, Submitted};
use flexblk_nvme::command::Sqe;
use flexblk_nvme::command::nvm::DsmRange;
use flexblk_nvme::flexins::Immediate;
use flexblk_nvme::{Cid, Cqe, Lba, Nsid, Qid, Status, StatusCode};
use flexblk_reactor::Reactor;
use flexins::engine::Engine;
use flexins::verbs::{PostError, Rkey, SendFlags, SendOp, SendWr, Sge, WcStatus, WorkCompletion};

use super::buffers::MAX_PIECES;
use super::parts::Parts;
use super::queue::{Place, Queue, Role, Slot, Spill, Stage, What};
use crate::association::ErrorEntry;
use crate::queue::request::{self, Range, Remote, Request, Source};

/// Id of send requests whose completion nobody waits for.
const UNTRACKED: u64 = u64::MAX;

/// Command Retry Delay of a command that found no memory: the first time in Identify, 100 ms.
const RETRY_SOON: u8 = 1;

impl Parts {
    /// A command capsule of an I/O queue.
    pub(crate) fn io_command(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        sqe: &Sqe,
        data: &[u8],
    ) {
        let Role::Io(io) = &queue.role else { return };
        io.shared.count();
        let views = self.subsystems.get(io.subsystem).and_then(Option::as_ref);
        let write_through = io.association.write_through();
        let request = Request::parse(sqe, data.len(), |nsid| views?.view(nsid));
        let mut slot = Slot::new(What::Respond, sqe.opcode, sqe.cid());
        slot.nsid = sqe.nsid();
        match request {
            Ok(Request::Read { range, to }) => {
                slot.what = What::Read;
                slot.remote = to;
                self.read(engine, queue, slot, range);
            }
            Ok(Request::Write { range, from, fua }) => {
                slot.what = What::Write {
                    fua: fua || write_through,
                };
                self.write(engine, queue, slot, range, from, data);
            }
            Ok(Request::Compare { range, from }) => {
                slot.what = What::Compare;
                slot.range = range;
                slot.length = range.len_bytes() as u32;
                self.take_data(engine, queue, slot, from, data);
            }
            Ok(Request::Flush { device }) => {
                slot.range.device = device;
                if self
                    .devices
                    .get_mut(device)
                    .is_some_and(|device| !device.flushes)
                {
                    self.finish_new(engine, queue, slot, Status::SUCCESS);
                } else {
                    slot.what = What::Flush;
                    self.submit_later(engine, queue, slot);
                }
            }
            Ok(Request::WriteZeroes { range, unmap, fua }) => {
                slot.what = What::WriteZeroes {
                    unmap,
                    fua: fua || write_through,
                };
                slot.range = range;
                self.submit_later(engine, queue, slot);
            }
            Ok(Request::Verify { range }) => {
                slot.what = What::Verify;
                slot.range = range;
                self.submit_later(engine, queue, slot);
            }
            Ok(Request::Deallocate { from, ranges, view }) => {
                slot.what = What::Deallocate { ranges, next: 0 };
                slot.range.device = view.device;
                slot.length = u32::from(ranges) * request::DSM_RANGE_BYTES;
                self.take_data(engine, queue, slot, from, data);
            }
            Ok(Request::Nothing) => self.finish_new(engine, queue, slot, Status::SUCCESS),
            Err(status) => self.finish_new(engine, queue, slot, status),
        }
    }

    fn read(&mut self, engine: &mut Engine, queue: &mut Queue, mut slot: Slot, range: Range) {
        slot.range = range;
        slot.length = range.len_bytes() as u32;
        if self.devices.direct(&range).is_some() {
            slot.place = Place::Device;
            slot.stage = Stage::Response;
            if let Some(index) = self.admit(engine, queue, slot) {
                self.respond(engine, queue, index);
            }
        } else if let Some(index) = self.admit(engine, queue, slot) {
            self.want_buffers(engine, queue, index, None);
        }
    }

    fn write(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        mut slot: Slot,
        range: Range,
        from: Source,
        data: &[u8],
    ) {
        slot.range = range;
        slot.length = range.len_bytes() as u32;
        match from {
            Source::InCapsule(offset) => {
                let data = in_capsule(data, offset, slot.length);
                if self.devices.write_direct(&range, data) {
                    self.finish_new(engine, queue, slot, Status::SUCCESS);
                    return;
                }
            }
            Source::Remote(remote) if self.devices.direct(&range).is_some() => {
                slot.place = Place::Device;
                slot.remote = remote;
                if let Some(index) = self.admit(engine, queue, slot) {
                    self.fetch(engine, queue, index);
                }
                return;
            }
            Source::Remote(_) => {}
        }
        self.take_data(engine, queue, slot, from, data);
    }

    /// Data from the host into buffers.
    pub(crate) fn take_data(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        mut slot: Slot,
        from: Source,
        data: &[u8],
    ) {
        let (remote, data) = match from {
            Source::InCapsule(offset) => (None, Some(in_capsule(data, offset, slot.length))),
            Source::Remote(remote) => (Some(remote), None),
        };
        slot.data_moved = data.is_some();
        if let Some(remote) = remote {
            slot.remote = remote;
        }
        if let Some(index) = self.admit(engine, queue, slot) {
            self.want_buffers(engine, queue, index, data);
        }
    }

    /// A command without data goes to its device.
    fn submit_later(&mut self, engine: &mut Engine, queue: &mut Queue, mut slot: Slot) {
        slot.stage = Stage::Device;
        if let Some(index) = self.admit(engine, queue, slot) {
            self.device_work.push_back((queue.key, index));
        }
    }

    /// Gives a command a slot. `None` cannot be while credits are counted right, and then the queue
    /// is closed rather than a command forgotten.
    pub(crate) fn admit(
        &mut self,
        _engine: &mut Engine,
        queue: &mut Queue,
        mut slot: Slot,
    ) -> Option<u16> {
        slot.counted = slot.range.device != u32::MAX;
        let device = slot.range.device;
        let Some(index) = queue.alloc(slot) else {
            self.to_close.push_back(queue.key);
            tracing::error!(peer = %queue.peer, "a host has sent more commands than it had credits for");
            return None;
        };
        if slot.counted {
            self.devices.begin(device);
        }
        if let Role::Io(io) = &queue.role
            && let Some(Some(subsystem)) = self.subsystems.get_mut(io.subsystem)
        {
            subsystem.begin(self.now);
        }
        Some(index)
    }

    /// Buffers for a command, or a place in the line for them. `data` came with the capsule.
    pub(crate) fn want_buffers(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        index: u16,
        data: Option<&[u8]>,
    ) {
        let Some(slot) = queue.slot(index) else {
            return;
        };
        let length = slot.length;
        // Nobody overtakes those who wait.
        let held = if self.waiters.is_empty() {
            self.buffers.take(length)
        } else {
            None
        };
        if let Some(held) = held {
            slot.place = Place::Held(held);
            if let Some(data) = data {
                self.buffers.copy_in(held, data);
            }
            self.buffers_ready(engine, queue, index);
            return;
        }
        self.buffers.waits += 1;
        if let Some(data) = data {
            // The packet goes; its data has to be kept, within the memory budget.
            let Some(memory) = self.shared.directory.budget().reserve(data.len() as u64) else {
                let status = Status::from(StatusCode::CommandInterrupted).with_crd(RETRY_SOON);
                self.finish(engine, queue, index, status);
                return;
            };
            queue.spills.push((
                index,
                Spill {
                    bytes: data.to_vec(),
                    _memory: memory,
                },
            ));
        }
        if let Some(slot) = queue.slot(index) {
            slot.stage = Stage::Buffers;
        }
        self.waiters.push_back((queue.key, index));
    }

    /// Gives a command that waits buffers; false when there are still none.
    pub(crate) fn buffers_for_waiter(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        index: u16,
    ) -> bool {
        if queue.closing {
            self.end(engine, queue, index);
            return true;
        }
        let Some(slot) = queue
            .slot(index)
            .filter(|slot| slot.stage == Stage::Buffers)
        else {
            return true;
        };
        let Some(held) = self.buffers.take(slot.length) else {
            return false;
        };
        slot.place = Place::Held(held);
        if let Some(spill) = queue.take_spill(index) {
            self.buffers.copy_in(held, &spill.bytes);
        }
        self.buffers_ready(engine, queue, index);
        true
    }

    fn buffers_ready(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
        let Some(slot) = queue.slot(index) else {
            return;
        };
        match slot.what {
            What::Read => {
                slot.stage = Stage::Device;
                self.device_work.push_back((queue.key, index));
            }
            What::AdminOut => {
                slot.stage = Stage::Response;
                self.respond(engine, queue, index);
            }
            // In the capsule, and copied by now.
            _ if slot.data_moved => self.data_ready(engine, queue, index),
            _ => self.fetch(engine, queue, index),
        }
    }

    /// Reads a command's data from the host.
    fn fetch(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
        let Some(slot) = queue.slot(index) else {
            return;
        };
        slot.stage = Stage::Fetch;
        let remote = slot.remote;
        let sges = self.sges(slot);
        let wr = SendWr {
            wr_id: index.into(),
            op: SendOp::Read {
                remote: remote.address,
                rkey: Rkey(remote.key),
            },
            inline: &[],
            sges: &sges,
            flags: SendFlags::SIGNALED,
        };
        self.posted(engine.post_send(queue.qpn, &wr), engine, queue, index);
    }

    /// A command's data from the host is in its place.
    fn data_ready(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
        let Some(slot) = queue.slot(index) else {
            return;
        };
        match (slot.what, slot.place) {
            (What::AdminIn, Place::Held(held)) => {
                let mut bytes = vec![0; slot.length as usize];
                self.buffers.copy_out(held, 0, &mut bytes);
                self.admin_data(engine, queue, index, &bytes);
            }
            (What::Write { .. }, Place::Device) => {
                self.finish(engine, queue, index, Status::SUCCESS)
            }
            (What::Deallocate { ranges, .. }, Place::Held(_)) => {
                match self.check_ranges(queue, index, ranges) {
                    Ok(()) => self.next_range(engine, queue, index),
                    Err(status) => self.finish(engine, queue, index, status),
                }
            }
            _ => {
                slot.stage = Stage::Device;
                self.device_work.push_back((queue.key, index));
            }
        }
    }

    /// A range of Dataset Management out of a command's buffers, as checked against the namespace
    /// as it is now; `None` when the namespace is gone.
    fn dsm_range(
        &self,
        queue: &Queue,
        slot: &Slot,
        number: u16,
    ) -> Option<Result<Option<Range>, Status>> {
        let Role::Io(io) = &queue.role else {
            return None;
        };
        let view = self
            .subsystems
            .get(io.subsystem)?
            .as_ref()?
            .view(slot.nsid)?;
        let Place::Held(held) = slot.place else {
            return None;
        };
        let mut bytes = [0; DsmRange::SIZE];
        self.buffers.copy_out(
            held,
            u32::from(number) * request::DSM_RANGE_BYTES,
            &mut bytes,
        );
        let range = DsmRange::view(&bytes)?;
        Some(request::dsm_range(range, view))
    }

    /// Every range is checked before the first is deallocated (NVM 3.3.3).
    fn check_ranges(&self, queue: &mut Queue, index: u16, ranges: u16) -> Result<(), Status> {
        let gone = || StatusCode::InvalidNamespaceOrFormat.dnr();
        let slot = *queue.slot(index).ok_or_else(gone)?;
        for number in 0..ranges {
            self.dsm_range(queue, &slot, number).ok_or_else(gone)??;
        }
        Ok(())
    }

    /// Deallocates the next range, or completes the command after the last.
    fn next_range(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
        loop {
            let Some(slot) = queue.slot(index).copied() else {
                return;
            };
            let What::Deallocate { ranges, next } = slot.what else {
                return;
            };
            if next >= ranges {
                self.finish(engine, queue, index, Status::SUCCESS);
                return;
            }
            let range = self.dsm_range(queue, &slot, next);
            let Some(slot) = queue.slot(index) else {
                return;
            };
            slot.what = What::Deallocate {
                ranges,
                next: next + 1,
            };
            match range {
                Some(Ok(Some(range))) if range.device == slot.range.device => {
                    slot.range = range;
                    slot.stage = Stage::Device;
                    self.device_work.push_back((queue.key, index));
                    return;
                }
                Some(Ok(None)) => {}
                Some(Err(status)) => return self.finish(engine, queue, index, status),
                _ => {
                    let gone = StatusCode::InvalidNamespaceOrFormat.dnr();
                    return self.finish(engine, queue, index, gone);
                }
            }
        }
    }

    /// Gives a command to its device. False when the device's channel is full: not now.
    pub(crate) fn submit(
        &mut self,
        engine: &mut Engine,
        reactor: &mut Reactor,
        queue: &mut Queue,
        index: u16,
    ) -> bool {
        let (key, closing) = (queue.key, queue.closing);
        let Some(slot) = queue.slot(index).filter(|slot| slot.stage == Stage::Device) else {
            return true;
        };
        let op = match slot.what {
            What::Read => IoOp::Read,
            What::Write { fua } => IoOp::Write { fua },
            What::Compare => IoOp::Compare,
            What::Flush | What::Shutdown => IoOp::Flush,
            What::WriteZeroes { unmap, fua } => IoOp::WriteZeroes { unmap, fua },
            What::Verify => IoOp::Verify,
            What::Deallocate { .. } => IoOp::Discard,
            What::AdminOut | What::AdminIn | What::Respond => return true,
        };
        let (range, length, place) = (slot.range, slot.length, slot.place);
        if closing {
            self.end(engine, queue, index);
            return true;
        }
        let data = match place {
            Place::Held(held) if op.has_data() => self.buffers.io(held, length),
            _ => IoBuffers::none(),
        };
        let io = DeviceIo {
            tag: key.tag(index),
            op,
            lba: range.lba,
            blocks: range.blocks,
            data,
        };
        let Some(device) = self.devices.get_mut(range.device) else {
            self.finish(engine, queue, index, StatusCode::NamespaceNotReady.into());
            return true;
        };
        match device.channel.submit(reactor, io) {
            Submitted::Pending => true,
            Submitted::Done(Err(IoError::Busy)) => {
                device.backlog.push_back((key, index));
                false
            }
            Submitted::Done(result) => {
                self.device_done(engine, queue, index, result);
                true
            }
        }
    }

    /// The device has finished a command's I/O.
    pub(crate) fn device_done(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        index: u16,
        result: Result<(), IoError>,
    ) {
        let Some(slot) = queue.slot(index) else {
            return;
        };
        match (slot.what, result) {
            (What::Read, Ok(())) => {
                slot.stage = Stage::Response;
                self.respond(engine, queue, index);
            }
            // Also when it failed: the host is going, and the device has logged it.
            (What::Shutdown, _) => self.shutdown_flush(engine, queue, index),
            // Giving space back is advice: what the device cannot do is done.
            (What::Deallocate { .. }, Ok(()) | Err(IoError::Unsupported)) => {
                self.next_range(engine, queue, index);
            }
            (_, Ok(())) => self.finish(engine, queue, index, Status::SUCCESS),
            (_, Err(error)) => self.finish(engine, queue, index, status_of(error)),
        }
    }

    /// Completes a command that has no slot yet, mostly without giving it one.
    pub(crate) fn finish_new(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        mut slot: Slot,
        status: Status,
    ) {
        slot.status = self.judge(queue, &slot, status);
        let cqe = Cqe::new(slot.cid, slot.status)
            .with_result(slot.result)
            .with_sqhd(queue.head());
        let bytes = cqe.to_bytes();
        let wr = SendWr {
            wr_id: UNTRACKED,
            op: SendOp::Send,
            inline: &bytes,
            sges: &[],
            flags: SendFlags::empty(),
        };
        match engine.post_send(queue.qpn, &wr) {
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
        let bytes = cqe.to_bytes();
        let wr = SendWr {
            wr_id: UNTRACKED,
            op: SendOp::Send,
            inline: &bytes,
            sges: &[],
            flags: SendFlags::empty(),
        };
        let full = Err(PostError::QueueFull);
        let result = engine.post_send(queue.qpn, &wr);
        result != full && result != Err(PostError::CompletionQueueFull)
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
        let status = self.judge(queue, &slot, status);
        if let Some(slot) = queue.slot(index) {
            slot.what = What::Respond;
            slot.status = status;
        }
        self.respond(engine, queue, index);
    }

    /// Counts a command by how it ended; a failed one goes to the error log, and its status says so.
    fn judge(&self, queue: &Queue, slot: &Slot, status: Status) -> Status {
        match &queue.role {
            Role::Io(io) => {
                if let Some(counters) = self.counters(io.subsystem) {
                    match slot.what {
                        _ if !status.is_success() => counters.failed(is_media(status)),
                        What::Write { .. } => counters.written(slot.length.into()),
                        What::Read | What::Compare => counters.read(slot.length.into()),
                        _ => counters.other(),
                    }
                }
                note_error(&io.association, io.qid, slot, status)
            }
            Role::Admin(admin) => {
                note_error(admin.controller.association(), Qid::ADMIN, slot, status)
            }
            Role::Unconnected(_) => status,
        }
    }

    /// Sends a command's data, if it has some for the host, and its completion.
    pub(crate) fn respond(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
        let (qpn, head, flow_control) = (queue.qpn, queue.head(), queue.flow_control);
        let immediate = queue.immediate && !flow_control;
        let Some(slot) = queue.slot(index) else {
            return;
        };
        slot.stage = Stage::Response;
        let with_data = matches!(slot.what, What::Read | What::AdminOut) && !slot.data_moved;
        let (cid, status, result, remote) = (slot.cid, slot.status, slot.result, slot.remote);
        if with_data {
            let sges = self.sges(slot);
            let (address, rkey) = (remote.address, Rkey(remote.key));
            let short = immediate && result == 0 && !remote.invalidate;
            let wr = if short {
                let imm = Immediate { cid, status }.to_bits();
                SendWr {
                    wr_id: index.into(),
                    op: SendOp::WriteImm {
                        remote: address,
                        rkey,
                        imm,
                    },
                    inline: &[],
                    sges: &sges,
                    flags: SendFlags::SIGNALED,
                }
            } else {
                SendWr {
                    wr_id: UNTRACKED,
                    op: SendOp::Write {
                        remote: address,
                        rkey,
                    },
                    inline: &[],
                    sges: &sges,
                    flags: SendFlags::empty(),
                }
            };
            let result = engine.post_send(qpn, &wr);
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
    fn count_read(&self, queue: &mut Queue, index: u16) {
        let length = match queue.slot(index) {
            Some(slot) if slot.what == What::Read => slot.length,
            _ => return,
        };
        if let Role::Io(io) = &queue.role
            && let Some(counters) = self.counters(io.subsystem)
        {
            counters.read(length.into());
        }
    }

    /// What posting a command's request has led to.
    fn posted(
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
            self.buffers.put(held);
        }
        if slot.counted {
            self.devices.end(slot.range.device, engine, self.now);
        }
        drop(queue.take_spill(index));
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
        // Fails only when the queue pair is gone or going.
        let _ = engine.post_recv_in_place(queue.qpn, 1);
    }

    fn sges(&self, slot: &Slot) -> ArrayVec<Sge, MAX_PIECES> {
        match slot.place {
            Place::Held(held) => self.buffers.sges(held, slot.length),
            Place::Device => self.devices.memory(&slot.range).into_iter().collect(),
            Place::None => ArrayVec::new(),
        }
    }
}

/// Data that came with the capsule; its bounds were checked with the request.
fn in_capsule(data: &[u8], offset: u32, length: u32) -> &[u8] {
    let start = offset as usize;
    data.get(start..start + length as usize).unwrap_or_default()
}

fn is_media(status: Status) -> bool {
    status.is(StatusCode::UnrecoveredReadError) || status.is(StatusCode::WriteFault)
}

/// The status of a device's error.
fn status_of(error: IoError) -> Status {
    match error {
        // The namespace was resized after the command had been checked.
        IoError::OutOfRange => StatusCode::LbaOutOfRange.dnr(),
        IoError::MediaRead => StatusCode::UnrecoveredReadError.into(),
        IoError::MediaWrite => StatusCode::WriteFault.into(),
        IoError::CompareMismatch => StatusCode::CompareFailure.dnr(),
        IoError::NoSpace => StatusCode::CapacityExceeded.dnr(),
        IoError::ReadOnly => StatusCode::NamespaceWriteProtected.dnr(),
        IoError::Unsupported => StatusCode::InvalidOpcode.dnr(),
        IoError::Busy => Status::from(StatusCode::CommandInterrupted).with_crd(RETRY_SOON),
        IoError::Invalid | IoError::Io(_) => StatusCode::InternalError.into(),
    }
}

/// Notes a failed command in its controller's log and sets More, which says so (Base 4.2.3).
fn note_error(
    association: &crate::association::Association,
    sqid: Qid,
    slot: &Slot,
    status: Status,
) -> Status {
    if status.is_success() {
        return status;
    }
    association.log_error(ErrorEntry {
        sqid,
        cid: slot.cid,
        opcode: slot.opcode,
        status: status.with_more(),
        lba: slot.lba(),
        nsid: slot.nsid,
    });
    status.with_more()
}

/// A completion for a command that is refused before it means anything.
pub(crate) fn refusal(cid: Cid, opcode: u8, nsid: Nsid) -> Slot {
    let mut slot = Slot::new(What::Respond, opcode, cid);
    slot.nsid = nsid;
    slot.range.lba = Lba::new(0).get();
    slot.remote = Remote {
        address: 0,
        key: 0,
        invalidate: false,
    };
    slot
}
