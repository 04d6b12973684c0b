//! Block devices as one thread has them open: a channel each, and for RAM the registered memory.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_blockdev::{BlockDevice, Caps, Channel, Tokens};
use flexblk_nvme::{Status, StatusCode};
use flexblk_reactor::{Reactor, SharedMemory, Span};
use flexins::engine::Engine;
use flexins::verbs::{Access, Mr, Pd, Sge};

use super::queue::QueueKey;
use crate::control::{Mark, Why};
use crate::histogram::LatencyHistogram;
use crate::iostat::{Failure, IoStats, IoType};
use crate::media::{Full, Media};
use crate::queue::request::Range;
use crate::snapshot::Namespace;

/// How long the memory of a device outlives it. A packet that was built before the registration
/// ended may still be on its way to the kernel; it leaves within a turn of the reactor.
const GRACE: Duration = Duration::from_secs(1);

/// A device that this thread has open.
pub(crate) struct Device {
    /// Tells devices apart over threads.
    pub(crate) id: u64,
    pub(crate) channel: Box<dyn Channel>,
    memory: Option<(Arc<SharedMemory>, Mr)>,
    /// Blocks that must not be read.
    pub(crate) media: Arc<Media>,
    /// What is done with it.
    stats: Arc<IoStats>,
    /// Its latencies, when they are counted.
    histogram: Option<Arc<LatencyHistogram>>,
    /// A flush does something.
    pub(crate) flushes: bool,
    /// It can be written.
    writable: bool,
    /// Namespaces that use it.
    users: u32,
    /// Commands that use it or its memory.
    in_flight: u32,
    /// I/Os that found the channel full.
    pub(crate) backlog: VecDeque<(QueueKey, u16)>,
}

/// Blocks of a device that a fused operation has to itself: no I/O to them begins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fence {
    /// The fused operation.
    pub(crate) id: u64,
    pub(crate) device_id: u64,
    pub(crate) lba: u64,
    pub(crate) end: u64,
    /// Its thread, and whether it knows that the device has left the blocks.
    pub(crate) from: usize,
    pub(crate) drained: bool,
}

impl Device {
    /// Counts an I/O of this thread that has succeeded.
    #[inline]
    pub(super) fn count(&self, thread: usize, io_type: IoType, bytes: u64, took_us: u32) {
        if let Some(class) = io_type.class()
            && let Some(shard) = self.stats.shard(thread)
        {
            shard.count(class, bytes, took_us);
        }
        if let Some(histogram) = &self.histogram {
            histogram.count(thread, io_type, took_us);
        }
    }

    /// Counts an I/O of this thread that has failed.
    pub(super) fn count_failure(&self, thread: usize, failure: Failure) {
        if let Some(shard) = self.stats.shard(thread) {
            shard.fail(failure);
        }
    }
}

/// How a change of marks went.
#[derive(Debug)]
pub(crate) enum Marking {
    /// It is done, or cannot be.
    Done(Status),
    /// It is the control thread's to do.
    ToKeep(Mark),
}

impl Marking {
    fn of(media: &Arc<Media>, range: &Range, why: Why) -> Self {
        Self::ToKeep(Mark {
            media: Arc::clone(media),
            lba: range.lba,
            blocks: range.blocks,
            why,
        })
    }

    fn done(result: Result<(), Full>) -> Self {
        Self::Done(match result {
            Ok(()) => Status::SUCCESS,
            // A host that marks every second block: there is a limit, and it may try again.
            Err(Full) => StatusCode::WriteFault.into(),
        })
    }
}

/// The devices of a thread.
#[derive(Default)]
pub(crate) struct Devices {
    /// Fences of all threads' fused operations.
    pub(crate) fences: Vec<Fence>,
    slots: Vec<Option<Device>>,
    graveyard: VecDeque<(Instant, Arc<SharedMemory>)>,
}

impl Devices {
    /// The device of a namespace, opened if it is not yet. An error when it cannot be opened here.
    pub(crate) fn open(
        &mut self,
        namespace: &Namespace,
        owner: u8,
        engine: &mut Engine,
        pd: Pd,
        reactor: &mut Reactor,
    ) -> Result<u32, OpenError> {
        let known = |slot: &Option<Device>| {
            slot.as_ref()
                .is_some_and(|device| device.id == namespace.device_id)
        };
        if let Some(index) = self.slots.iter().position(known) {
            if let Some(device) = self.slots.get_mut(index).and_then(Option::as_mut) {
                device.users += 1;
            }
            return Ok(index as u32);
        }
        let index = match self.slots.iter().position(Option::is_none) {
            Some(index) => index,
            None => {
                self.slots.push(None);
                self.slots.len() - 1
            }
        };
        let bdev: &dyn BlockDevice = &*namespace.device;
        let channel = bdev.open(reactor, Tokens::new(owner, index as u32))?;
        let memory = match bdev.memory() {
            Some(memory) => {
                let access = Access::LOCAL_WRITE;
                let mr = engine.register_memory(pd, memory, 0, memory.len(), access)?;
                Some((Arc::clone(memory), mr))
            }
            None => None,
        };
        let device = Device {
            id: namespace.device_id,
            channel,
            memory,
            media: Arc::clone(&namespace.media),
            stats: Arc::clone(&namespace.stats),
            histogram: namespace.histogram.clone(),
            flushes: namespace.info.caps.contains(Caps::FLUSH),
            writable: !namespace.info.caps.contains(Caps::READ_ONLY),
            users: 1,
            in_flight: 0,
            backlog: VecDeque::new(),
        };
        if let Some(slot) = self.slots.get_mut(index) {
            *slot = Some(device);
        }
        Ok(index as u32)
    }

    /// A namespace no longer uses the device.
    pub(crate) fn close(&mut self, index: u32, engine: &mut Engine, now: Instant) {
        if let Some(device) = self.get_mut(index) {
            device.users = device.users.saturating_sub(1);
            self.reap(index, engine, now);
        }
    }

    #[inline]
    pub(crate) fn get(&self, index: u32) -> Option<&Device> {
        self.slots.get(index as usize)?.as_ref()
    }

    /// Counts a device's latencies as the namespace says.
    pub(crate) fn set_histogram(&mut self, index: u32, namespace: &Namespace) {
        if let Some(device) = self.get_mut(index) {
            device.histogram.clone_from(&namespace.histogram);
        }
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, index: u32) -> Option<&mut Device> {
        self.slots.get_mut(index as usize)?.as_mut()
    }

    /// A command begins to use the device.
    #[inline]
    pub(crate) fn begin(&mut self, index: u32) {
        if let Some(device) = self.get_mut(index) {
            device.in_flight += 1;
        }
    }

    /// A command no longer uses the device.
    #[inline]
    pub(crate) fn end(&mut self, index: u32, engine: &mut Engine, now: Instant) {
        let Some(device) = self.get_mut(index) else {
            return;
        };
        device.in_flight = device.in_flight.saturating_sub(1);
        if device.users == 0 {
            self.reap(index, engine, now);
        }
    }

    /// Frees a device that nobody uses any more.
    fn reap(&mut self, index: u32, engine: &mut Engine, now: Instant) {
        let unused = |device: &Device| device.users == 0 && device.in_flight == 0;
        let Some(slot) = self.slots.get_mut(index as usize) else {
            return;
        };
        let Some(device) = slot.take_if(|device| unused(device)) else {
            return;
        };
        if let Some((memory, mr)) = device.memory {
            if let Err(error) = engine.deregister(mr.lkey) {
                tracing::warn!(%error, "deregistering the memory of a removed namespace");
            }
            if let Some(end) = now.checked_add(GRACE) {
                self.graveyard.push_back((end, memory));
            }
        }
        // The channel goes with the device: nothing is in flight on it.
    }

    /// When [`Devices::bury`] has something to do.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        self.graveyard.front().map(|(end, _)| *end)
    }

    /// Unmaps memory whose time of grace is over.
    pub(crate) fn bury(&mut self, now: Instant) {
        while self.graveyard.front().is_some_and(|(end, _)| *end <= now) {
            self.graveyard.pop_front();
        }
    }

    /// The range in the device's own memory, when that is known to the transport and may be read
    /// (and, by the same reasoning, written) in place: no other thread has the device open.
    #[inline]
    pub(crate) fn direct(&self, range: &Range) -> Option<Span> {
        let device = self.slots.get(range.device as usize)?.as_ref()?;
        device.memory.as_ref()?;
        if !self.fences.is_empty() || device.media.any() {
            return None;
        }
        device.channel.direct_read(range.lba, range.blocks)
    }

    /// The range in the device's own memory as a gather list of the transport, for a command that was
    /// found to use it in place.
    #[inline]
    pub(crate) fn memory(&self, range: &Range) -> Option<Sge> {
        let device = self.slots.get(range.device as usize)?.as_ref()?;
        let (_, mr) = device.memory.as_ref()?;
        Some(mr.sge(range.offset_bytes(), u32::try_from(range.len_bytes()).ok()?))
    }

    /// The range in the device's own memory, for a transport that takes memory as it is.
    #[inline]
    pub(crate) fn span(&self, range: &Range) -> Option<Span> {
        let device = self.slots.get(range.device as usize)?.as_ref()?;
        let (memory, _) = device.memory.as_ref()?;
        memory.span(range.offset_bytes(), u32::try_from(range.len_bytes()).ok()?)
    }

    /// Copies data that came with a command straight into the device's memory; false when that must
    /// not be done (see [`Devices::direct`]).
    #[inline]
    pub(crate) fn write_direct(&self, range: &Range, data: &[u8]) -> bool {
        match self.direct(range) {
            Some(span) if span.len() as usize == data.len() => {
                span.copy_from_slice(data);
                true
            }
            _ => false,
        }
    }

    /// The number that tells the device apart over threads.
    pub(crate) fn id_of(&self, index: u32) -> Option<u64> {
        let device = self.slots.get(index as usize)?.as_ref()?;
        Some(device.id)
    }

    /// Does the range have blocks of the fence?
    pub(crate) fn meets(&self, range: &Range, fence: &Fence) -> bool {
        range.lba < fence.end
            && fence.lba < range.lba.saturating_add(range.blocks.into())
            && self.id_of(range.device) == Some(fence.device_id)
    }

    /// Has a fused operation any of the blocks?
    #[inline]
    pub(crate) fn is_fenced(&self, range: &Range) -> bool {
        !self.fences.is_empty() && self.fences.iter().any(|fence| self.meets(range, fence))
    }

    /// Write Uncorrectable: the blocks cannot be read until they are written.
    pub(crate) fn mark_uncorrectable(&self, range: &Range) -> Marking {
        let device = self.slots.get(range.device as usize);
        match device.and_then(Option::as_ref) {
            Some(device) if device.media.keeper().is_some() => {
                Marking::of(&device.media, range, Why::Uncorrectable)
            }
            Some(device) => Marking::done(device.media.mark(range.lba, range.blocks)),
            None => Marking::Done(StatusCode::NamespaceNotReady.into()),
        }
    }

    /// Blocks were written: they can be read again, should they have been marked.
    #[inline]
    pub(crate) fn rewritten(&self, range: &Range) -> Marking {
        let device = self.slots.get(range.device as usize);
        match device.and_then(Option::as_ref) {
            Some(device) if device.media.any() => {
                let (lba, blocks) = (range.lba, range.blocks);
                if device.media.keeper().is_none() {
                    Marking::done(device.media.rewritten(lba, blocks))
                } else if device.media.is_marked(lba, blocks) {
                    Marking::of(&device.media, range, Why::Rewritten)
                } else {
                    Marking::Done(Status::SUCCESS)
                }
            }
            _ => Marking::Done(Status::SUCCESS),
        }
    }

    /// Does a flush of the device make anything safe?
    pub(crate) fn is_flushable(&self, index: u32) -> bool {
        let device = self.slots.get(index as usize).and_then(Option::as_ref);
        device.is_some_and(|device| device.flushes && device.writable)
    }

    /// Open devices.
    pub(crate) fn len(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// I/Os that are with devices' channels.
    pub(crate) fn in_flight(&self) -> usize {
        let devices = self.slots.iter().flatten();
        devices.map(|device| device.channel.in_flight()).sum()
    }

    /// Is anything with a device's channel?
    pub(crate) fn is_busy(&self) -> bool {
        self.slots
            .iter()
            .flatten()
            .any(|device| device.channel.in_flight() > 0)
    }
}

/// Why a device cannot be used on a thread.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error(transparent)]
    Device(#[from] flexblk_blockdev::Error),
    #[error("registering its memory: {0}")]
    Verbs(#[from] flexins::verbs::VerbsError),
}
