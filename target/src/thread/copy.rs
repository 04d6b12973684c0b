//! Copy (NVM 3.3.2): the source ranges are read into buffers one after the other, then written at
//! once, so that source and destination may overlap. What a command may copy (MSSRL, MCL) is what
//! fits into the buffers of the longest transfer.

use flexblk_nvme::command::nvm::CopyRange;
use flexblk_nvme::{Status, StatusCode};
use flexins::engine::Engine;

use super::parts::Parts;
use super::queue::{Place, Queue, Role, Stage, What};
use crate::queue::request::{self, Range, View};

/// A Copy whose source ranges are known.
#[derive(Debug)]
pub(crate) struct Copy {
    sources: Vec<Placed>,
    destination: Placed,
    /// The source to be read next; after the last the destination is written.
    next: usize,
}

/// A range, and the number of its device: while another device has its turn, it may be closed and its
/// place be taken.
#[derive(Clone, Copy, Debug)]
struct Placed {
    range: Range,
    device_id: Option<u64>,
}

/// What a Copy does next.
pub(super) struct Step {
    pub(super) range: Range,
    device_id: Option<u64>,
    /// Where its data lies in the buffers.
    pub(super) offset: u32,
    pub(super) writes: bool,
}

impl Copy {
    /// What is to be done now.
    pub(super) fn step(&self) -> Step {
        let before = self.sources.iter().take(self.next);
        let offset: u64 = before.map(|source| source.range.len_bytes()).sum();
        let (placed, offset, writes) = match self.sources.get(self.next) {
            Some(source) => (source, offset as u32, false),
            None => (&self.destination, 0, true),
        };
        Step {
            range: placed.range,
            device_id: placed.device_id,
            offset,
            writes,
        }
    }
}

impl Parts {
    /// The descriptors have come: checks all of them, then asks for buffers for the data.
    pub(super) fn copy_ranges(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
        match self.plan(queue, index) {
            Ok(copy) => {
                let length = copy.destination.range.len_bytes() as u32;
                let Some(slot) = queue.slot(index) else {
                    return;
                };
                slot.length = length;
                slot.data_moved = true;
                let place = core::mem::replace(&mut slot.place, Place::None);
                if let Place::Held(held) = place {
                    self.buffers.put(held, &mut queue.share);
                }
                queue.copies.push((index, copy));
                self.want_buffers(engine, queue, index, None);
            }
            Err(status) => self.finish(engine, queue, index, status),
        }
    }

    fn plan(&self, queue: &mut Queue, index: u16) -> Result<Copy, Status> {
        let gone = || StatusCode::InvalidNamespaceOrFormat.dnr();
        let slot = *queue.slot(index).ok_or_else(gone)?;
        let What::Copy { ranges, format, .. } = slot.what else {
            return Err(StatusCode::InternalError.into());
        };
        let Role::Io(io) = &queue.role else {
            return Err(gone());
        };
        let Place::Held(held) = slot.place else {
            return Err(StatusCode::InternalError.into());
        };
        let views = self.subsystems.get(io.subsystem).and_then(Option::as_ref);
        let views = views.ok_or_else(gone)?;
        let view: &View = views.view(slot.nsid).ok_or_else(gone)?;
        let mut sources = Vec::with_capacity(ranges.into());
        let mut blocks: u32 = 0;
        for number in 0..u32::from(ranges) {
            let mut bytes = [0; CopyRange::SIZE];
            self.buffers
                .copy_out(held, number * request::COPY_RANGE_BYTES, &mut bytes);
            let range = CopyRange::view(&bytes).ok_or_else(gone)?;
            let snsid = match format {
                0 => slot.nsid,
                _ => flexblk_nvme::Nsid::new(range.snsid.get()),
            };
            let from = views.view(snsid).ok_or_else(gone)?;
            if from.gated {
                self.gate(
                    io,
                    queue.port,
                    snsid,
                    flexblk_nvme::command::nvm::opcode::READ,
                )?;
            }
            let source = request::copy_source(range, from, view)?;
            blocks = blocks.saturating_add(source.blocks);
            sources.push(self.placed(source));
        }
        let destination = request::copy_destination(slot.range.lba, blocks, view)?;
        Ok(Copy {
            sources,
            destination: self.placed(destination),
            next: 0,
        })
    }

    fn placed(&self, range: Range) -> Placed {
        let device_id = self.devices.id_of(range.device);
        Placed { range, device_id }
    }

    /// The next step of a Copy goes to its device.
    pub(super) fn copy_step(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
        let step = queue.copy(index).map(|copy| copy.step());
        let Some(step) = step else {
            return self.finish(engine, queue, index, StatusCode::InternalError.into());
        };
        if step.device_id.is_none() {
            // It could not be opened by this thread.
            return self.finish(engine, queue, index, StatusCode::NamespaceNotReady.into());
        }
        if self.devices.id_of(step.range.device) != step.device_id {
            let gone = StatusCode::InvalidNamespaceOrFormat.dnr();
            return self.finish(engine, queue, index, gone);
        }
        let Some(slot) = queue.slot(index) else {
            return;
        };
        let before = slot.range.device;
        slot.range = step.range;
        slot.stage = Stage::Device;
        if before != step.range.device {
            // A command counts as I/O of the device that it uses now.
            self.devices.begin(step.range.device);
            self.devices.end(before, engine, self.now);
        }
        self.device_work.push_back((queue.key, index));
    }

    /// A step is done.
    pub(super) fn copied(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
        let Some(copy) = queue.copy(index) else {
            return self.finish(engine, queue, index, StatusCode::InternalError.into());
        };
        if copy.step().writes {
            let range = copy.destination.range;
            return self.written(engine, queue, index, &range);
        }
        copy.next += 1;
        self.copy_step(engine, queue, index);
    }
}
