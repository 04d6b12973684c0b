//! Commands with their device: submit, complete, range by range for Dataset Management.

use flexblk_blockdev::{Io as DeviceIo, IoBuffers, IoError, IoOp, Submitted};
use flexblk_nvme::command::Fuse;
use flexblk_nvme::command::nvm::DsmRange;
use flexblk_nvme::{Status, StatusCode};
use flexblk_reactor::Reactor;
use flexins::engine::Engine;

use super::parts::Parts;
use super::queue::{Place, Queue, Role, Slot, Stage, What};
use super::respond::RETRY_SOON;
use crate::metrics::Stage as TimeOf;
use crate::queue::request::{self, Range};

impl Parts {
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
    pub(super) fn check_ranges(
        &self,
        queue: &mut Queue,
        index: u16,
        ranges: u16,
    ) -> Result<(), Status> {
        let gone = || StatusCode::InvalidNamespaceOrFormat.dnr();
        let slot = *queue.slot(index).ok_or_else(gone)?;
        for number in 0..ranges {
            self.dsm_range(queue, &slot, number).ok_or_else(gone)??;
        }
        Ok(())
    }

    /// Deallocates the next range, or completes the command after the last.
    pub(super) fn next_range(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
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
        // An aborted command leaves its place in the line; whoever has its slot now has one too.
        let Some(slot) = queue
            .slot(index)
            .filter(|slot| slot.stage == Stage::Device && !slot.with_device)
        else {
            return true;
        };
        let mut part = None;
        let op = match slot.what {
            What::Read => IoOp::Read,
            What::Write { fua } => IoOp::Write { fua },
            What::Compare => IoOp::Compare,
            What::Flush | What::Shutdown => IoOp::Flush,
            What::WriteZeroes { unmap, fua } => IoOp::WriteZeroes { unmap, fua },
            What::Verify => IoOp::Verify,
            What::Deallocate { .. } => IoOp::Discard,
            What::Copy { fua, .. } => match queue.copy(index).map(|copy| copy.step()) {
                Some(step) if step.writes => IoOp::Write { fua },
                Some(step) => {
                    part = Some((step.offset, step.range.len_bytes() as u32));
                    IoOp::Read
                }
                None => return true,
            },
            What::Reserve(_) | What::AdminOut | What::AdminIn | What::Respond => return true,
        };
        let Some(slot) = queue.slot(index) else {
            return true;
        };
        let (range, length, place, fuse) = (slot.range, slot.length, slot.place, slot.fuse);
        if closing {
            self.end(engine, queue, index);
            return true;
        }
        let data = match place {
            Place::Held(held) if op.has_data() => {
                let (offset, length) = part.unwrap_or((0, length));
                self.buffers.io(held, offset, length)
            }
            _ => IoBuffers::none(),
        };
        let mut io = DeviceIo {
            tag: key.tag(index),
            op,
            lba: range.lba,
            blocks: range.blocks,
            data,
        };
        if fuse == Fuse::Normal && self.devices.is_fenced(&range) {
            self.fenced.push_back((key, index));
            return true;
        }
        let Some(device) = self.devices.get_mut(range.device) else {
            self.finish(engine, queue, index, StatusCode::NamespaceNotReady.into());
            return true;
        };
        if device.media.any() && device.media.is_marked(range.lba, range.blocks) {
            match &mut io.op {
                IoOp::Read | IoOp::Compare | IoOp::Verify => {
                    self.device_done(engine, queue, index, Err(IoError::MediaRead));
                    return true;
                }
                // The mark goes when the new data is safe.
                IoOp::Write { fua } | IoOp::WriteZeroes { fua, .. }
                    if device.media.keeper().is_some() =>
                {
                    *fua = true;
                    if let Some(slot) = queue.slot(index) {
                        slot.what.force();
                    }
                }
                _ => {}
            }
        }
        match device.channel.submit(reactor, io) {
            Submitted::Pending => {
                if let Some(slot) = queue.slot(index) {
                    slot.with_device = true;
                }
                true
            }
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
        let took_us = queue.spend(index, TimeOf::Backend, self.now_us);
        let Some(slot) = queue.slot(index) else {
            return;
        };
        slot.with_device = false;
        if slot.stage == Stage::Abandoned {
            return self.end(engine, queue, index);
        }
        if slot.fuse != Fuse::Normal {
            // The Compare before it has read the blocks: whoever has marked them since comes after it.
            return self.half_done(engine, queue, index, result);
        }
        match (slot.what, result) {
            (What::Read, Ok(())) => {
                slot.stage = Stage::Response;
                self.respond(engine, queue, index);
            }
            // Also when it failed: the host is going, and the device has logged it.
            (What::Shutdown, _) => self.shutdown_flush(engine, queue, index),
            (What::Copy { .. }, Ok(())) => self.copied(engine, queue, index),
            // Giving space back is advice: what the device cannot do is done.
            (What::Deallocate { .. }, Ok(()) | Err(IoError::Unsupported)) => {
                if result.is_ok() {
                    let range = slot.range;
                    self.count_range(&range, took_us);
                }
                self.next_range(engine, queue, index);
            }
            (What::Write { .. } | What::WriteZeroes { .. }, Ok(())) => {
                let range = slot.range;
                self.written(engine, queue, index, &range);
            }
            (_, Ok(())) => self.finish(engine, queue, index, Status::SUCCESS),
            (_, Err(error)) => self.finish(engine, queue, index, status_of(error)),
        }
    }
}

/// The status of a device's error.
pub(super) fn status_of(error: IoError) -> Status {
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
        IoError::Nvme { sct, sc } => Status::from_bits(u16::from(sct & 0x7) << 8 | u16::from(sc)),
        IoError::Invalid | IoError::Io(_) => StatusCode::InternalError.into(),
    }
}
