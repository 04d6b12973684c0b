//! I/O commands: from the checked request through data transfer and device to the response.
//!
//! | command | data in the device's memory | otherwise |
//! |---|---|---|
//! | read | response straight out of it | buffers, device, response |
//! | write in the capsule | copied from the packet, response | buffers, device, response |
//! | larger write | fetched straight into it, response | buffers, fetch, device, response |

use flexblk_nvme::command::nvm::opcode;
use flexblk_nvme::command::{Fuse, Sqe};
use flexblk_nvme::{Status, StatusCode};
use flexins::engine::Engine;

use super::devices::Marking;
use super::parts::Parts;
use super::queue::{Fabric, Place, Queue, Role, Slot, Spill, Stage, What};
use super::respond::RETRY_SOON;
use super::transfer::{Kind, Last, Transfer};
use crate::control;
use crate::metrics::Stage as TimeOf;
use crate::queue::data::Source;
use crate::queue::request::{self, Range, Request};

/// Bytes of a read or write that are loaded ahead: the hardware sees by itself where a longer one goes, and a
/// train of 4 KiB blocks stays in half of a second-level cache.
const PREFETCH_MAX_BYTES: u32 = 8 << 10;

/// The block number in dwords 10 and 11 (SLBA, SDLBA), or 0 for a command that has none there.
fn first_block(sqe: &Sqe) -> u64 {
    let named = matches!(
        sqe.opcode,
        opcode::READ
            | opcode::WRITE
            | opcode::COMPARE
            | opcode::WRITE_ZEROES
            | opcode::WRITE_UNCORRECTABLE
            | opcode::VERIFY
            | opcode::COPY
    );
    match named {
        true => u64::from(sqe.cdw11.get()) << 32 | u64::from(sqe.cdw10.get()),
        false => 0,
    }
}

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
        self.open_series(queue, sqe.nsid());
        if (sqe.fuse() != Fuse::Normal || queue.fused.is_some())
            && self.fused_command(engine, queue, sqe, data)
        {
            return;
        }
        let Role::Io(io) = &queue.role else { return };
        let views = self.subsystems.get(io.subsystem).and_then(Option::as_ref);
        let write_through = io.association.write_through();
        let view = views.and_then(|views| views.view(sqe.nsid()));
        let request = match view {
            Some(view) if view.gated => {
                self.gate(io, queue.port, sqe.nsid(), sqe.opcode)
                    .and_then(|()| {
                        Request::parse(sqe, data.len(), queue.fabric.addressing(), |_| Some(view))
                    })
            }
            _ => Request::parse(sqe, data.len(), queue.fabric.addressing(), |_| view),
        };
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
            Ok(Request::Copy {
                from,
                destination,
                ranges,
                format,
                fua,
            }) if format == 0 || io.association.copies_between_namespaces() => {
                slot.what = What::Copy {
                    ranges,
                    format,
                    fua: fua || write_through,
                };
                slot.range = destination;
                slot.length = u32::from(ranges) * request::COPY_RANGE_BYTES;
                self.take_data(engine, queue, slot, from, data);
            }
            // The host has not enabled the format (Base 5.1.25.1.14, CDFE).
            Ok(Request::Copy { .. }) => {
                self.finish_new(engine, queue, slot, StatusCode::InvalidField.dnr());
            }
            Ok(Request::WriteUncorrectable { range }) => {
                slot.range = range;
                match self.devices.mark_uncorrectable(&range) {
                    Marking::Done(status) => self.finish_new(engine, queue, slot, status),
                    Marking::ToKeep(mark) => {
                        if let Some(index) = self.admit(engine, queue, slot) {
                            self.order_for(engine, queue, index, control::What::Mark(mark));
                        }
                    }
                }
            }
            Ok(Request::Reserve { command, from }) => {
                slot.what = What::Reserve(command);
                slot.length = command.data_bytes();
                self.take_data(engine, queue, slot, from, data);
            }
            Ok(Request::Report { bytes }) => {
                let page = views.and_then(|views| views.current().namespace(sqe.nsid()));
                let page = page.map(|namespace| namespace.reservations.report());
                let mut page = page.unwrap_or_default();
                page.resize(bytes as usize, 0);
                self.send_data(engine, queue, sqe, None, &page);
            }
            Ok(Request::Nothing) => self.finish_new(engine, queue, slot, Status::SUCCESS),
            Err(status) => {
                // For the error log, whose entry has the first block (Base 5.1.12.1.2).
                slot.range.lba = first_block(sqe);
                self.finish_new(engine, queue, slot, status);
            }
        }
    }

    /// Loads the memory that a write is going to be copied to, for a command that may turn out to be
    /// none: one write's time is enough for memory that no cache holds, and copying to such memory
    /// took a quarter of the target's time.
    #[inline]
    pub(crate) fn load_ahead(&self, queue: &Queue, sqe: &Sqe, data_len: usize) {
        let Role::Io(io) = &queue.role else { return };
        if sqe.opcode != opcode::WRITE || data_len == 0 {
            return;
        }
        let views = self.subsystems.get(io.subsystem).and_then(Option::as_ref);
        let view = |nsid| views.and_then(|views| views.view(nsid));
        let request = Request::parse(sqe, data_len, queue.fabric.addressing(), view);
        if let Ok(Request::Write { range, .. }) = request
            && let Some(memory) = self.devices.direct(&range)
        {
            memory.prefetch_for_write(PREFETCH_MAX_BYTES);
        }
    }

    fn read(&mut self, engine: &mut Engine, queue: &mut Queue, mut slot: Slot, range: Range) {
        slot.range = range;
        slot.length = range.len_bytes() as u32;
        if self.may_send_in_place(queue, &range)
            && let Some(memory) = self.devices.direct(&range)
        {
            // The packet is built when all commands of the train have been taken: time enough for
            // memory that no cache holds.
            memory.prefetch(PREFETCH_MAX_BYTES);
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
            Source::Remote(remote)
                if self.may_fetch_in_place(queue, &range)
                    && self.devices.direct(&range).is_some() =>
            {
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
    ) -> Option<u16> {
        let (remote, data) = match from {
            Source::InCapsule(offset) => (None, Some(in_capsule(data, offset, slot.length))),
            Source::Remote(remote) => (Some(remote), None),
        };
        slot.data_moved = data.is_some();
        if let Some(remote) = remote {
            slot.remote = remote;
        }
        let index = self.admit(engine, queue, slot)?;
        self.want_buffers(engine, queue, index, data);
        Some(index)
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
        if matches!(queue.role, Role::Io(_)) {
            queue.begin(index, self.now_us);
        }
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
            self.buffers.take(length, &mut queue.share)
        } else {
            None
        };
        if let Some(held) = held {
            if let Some(slot) = queue.slot(index) {
                slot.place = Place::Held(held);
            }
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
        // Those in front may only wait for their own queue's buffers.
        self.buffers.returned = true;
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
        let length = slot.length;
        let Some(held) = self.buffers.take(length, &mut queue.share) else {
            return false;
        };
        if let Some(slot) = queue.slot(index) {
            slot.place = Place::Held(held);
        }
        queue.spend(index, TimeOf::Wait, self.now_us);
        if let Some(spill) = queue.take_spill(index) {
            self.buffers.copy_in(held, &spill.bytes);
        }
        self.buffers_ready(engine, queue, index);
        true
    }

    fn buffers_ready(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
        let planned = !queue.copies.is_empty() && queue.copy(index).is_some();
        let Some(slot) = queue.slot(index) else {
            return;
        };
        match slot.what {
            What::Read => {
                slot.stage = Stage::Device;
                self.device_work.push_back((queue.key, index));
            }
            // The second time: for what the source ranges name.
            What::Copy { .. } if planned => {
                self.copy_step(engine, queue, index);
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
    pub(super) fn fetch(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
        let (qpn, segments) = match queue.fabric {
            Fabric::Flexins { qpn, segments, .. } => (qpn, segments),
            Fabric::Tcp(conn) => return self.fetch_tcp(engine, queue, conn, index),
        };
        let Some(slot) = queue.slot(index) else {
            return;
        };
        slot.stage = Stage::Fetch;
        let transfer = Transfer {
            remote: slot.remote,
            // Requests complete in order: the last one speaks for all.
            last: Last::Tracked(index),
            kind: Kind::FromHost,
        };
        let sges = self.sges(slot, segments);
        let result = transfer.post(engine, qpn, &sges, &mut slot.posted);
        self.posted(result, engine, queue, index);
    }

    /// A command's data is where it belongs: it ends, once blocks of it that were marked by Write
    /// Uncorrectable are so no more.
    pub(super) fn written(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        index: u16,
        range: &Range,
    ) {
        let forced = queue.slot(index).is_some_and(|slot| slot.what.is_forced());
        match self.devices.rewritten(range) {
            Marking::Done(status) => self.finish(engine, queue, index, status),
            Marking::ToKeep(mark) if forced => {
                self.order_for(engine, queue, index, control::What::Mark(mark));
            }
            // They were marked when it was with its device already: it was before that.
            Marking::ToKeep(_) => self.finish(engine, queue, index, Status::SUCCESS),
        }
    }

    /// A command's data from the host is in its place.
    pub(super) fn data_ready(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
        queue.spend(index, TimeOf::Network, self.now_us);
        let Some(slot) = queue.slot(index) else {
            return;
        };
        slot.posted = 0;
        if !slot.doomed.is_success() {
            let status = slot.doomed;
            return self.finish(engine, queue, index, status);
        }
        match (slot.what, slot.place) {
            (What::AdminIn, Place::Held(held)) => {
                let mut bytes = vec![0; slot.length as usize];
                self.buffers.copy_out(held, 0, &mut bytes);
                self.admin_data(engine, queue, index, &bytes);
            }
            (What::Write { .. }, Place::Device) => {
                let range = slot.range;
                self.written(engine, queue, index, &range);
            }
            (What::Deallocate { ranges, .. }, Place::Held(_)) => {
                match self.check_ranges(queue, index, ranges) {
                    Ok(()) => self.next_range(engine, queue, index),
                    Err(status) => self.finish(engine, queue, index, status),
                }
            }
            (What::Copy { .. }, _) => self.copy_ranges(engine, queue, index),
            (What::Reserve(_), _) => self.reserve(engine, queue, index),
            // Pairs are taken on by `Core::run_fused`.
            _ if slot.fuse != Fuse::Normal => slot.stage = Stage::Fused,
            _ => {
                slot.stage = Stage::Device;
                self.device_work.push_back((queue.key, index));
            }
        }
    }
}

/// Data that came with the capsule; its bounds were checked with the request.
fn in_capsule(data: &[u8], offset: u32, length: u32) -> &[u8] {
    let start = offset as usize;
    data.get(start..start + length as usize).unwrap_or_default()
}
