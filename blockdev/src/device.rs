//! The two traits: a device that all threads share, and a thread's channel to it.

use std::sync::Arc;

use flexblk_reactor::{Completion, Reactor, SharedMemory, Span};
use uuid::Uuid;

use crate::{BdevConfig, Error, Injector, Io, IoDone, Submitted, Tokens};

bitflags::bitflags! {
    /// What a device can do beyond read, write, flush, compare and verify.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Caps: u32 {
        /// Write zeroes. Every device that can be written has it; some have to write real zeroes.
        const WRITE_ZEROES = 1 << 0;
        /// Discard gives space back. Without it a discard is [`crate::IoError::Unsupported`].
        const DISCARD = 1 << 1;
        /// Discarded blocks read as zeroes.
        const DISCARD_ZEROES = 1 << 2;
        /// A flush does something.
        const FLUSH = 1 << 3;
        /// Force unit access without a flush of everything.
        const FUA = 1 << 4;
        /// Nothing can be changed.
        const READ_ONLY = 1 << 5;
        /// [`BlockDevice::resize`] can work.
        const RESIZE = 1 << 6;
    }
}

/// What a device is like at the moment; only `block_count` ever changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// The name from the configuration.
    pub name: Arc<str>,
    /// Which kind, for people: `ram`, `file (direct)`, `delay over ram` ...
    pub kind: Arc<str>,
    /// Bytes of a logical block: 512 or 4096.
    pub block_size: u32,
    /// Number of logical blocks.
    pub block_count: u64,
    /// What it can do.
    pub caps: Caps,
    /// I/Os of a multiple of this, so aligned, are best.
    pub optimal_io_bytes: u32,
    /// The longest read, write or compare. Other operations have no such limit.
    pub max_io_bytes: u32,
    /// A completed write may be lost in a power failure unless it was forced or flushed.
    pub volatile_write_cache: bool,
    /// Identity. Configured, or new for each RAM device, or derived from machine and path.
    pub uuid: Uuid,
    /// Memory aligned to this is used in place; other memory costs a copy.
    pub memory_alignment: u32,
}

impl Info {
    /// Size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.block_count.saturating_mul(u64::from(self.block_size))
    }
}

/// A block device, shared by all threads.
pub trait BlockDevice: Send + Sync {
    /// What the device is like now. Makes no system call, but is not meant for each I/O: channels
    /// check ranges themselves.
    fn info(&self) -> Info;

    /// A channel for the thread of `reactor`, to be used only with that reactor. The caller routes
    /// completions whose token carries the owner and channel number of `tokens` to it.
    fn open(&self, reactor: &mut Reactor, tokens: Tokens) -> Result<Box<dyn Channel>, Error>;

    /// The memory behind a RAM device: block n lies at n x block size. It may be longer than the
    /// device (room to grow). Use [`Channel::direct_read`] to find out when to read it in place.
    fn memory(&self) -> Option<&Arc<SharedMemory>> {
        None
    }

    /// Makes the device `new_bytes` long; what is new reads as zeroes. I/O goes on meanwhile; I/O
    /// beyond a new, smaller end fails.
    fn resize(&self, new_bytes: u64) -> Result<Info, Error>;

    /// Looks again at how long the file or device below is, for one that was resized from outside.
    fn rescan(&self) -> Result<Info, Error> {
        Ok(self.info())
    }

    /// Takes over those values of its configuration that can change under running I/O (the latencies
    /// of a delay device); the others stay as they are.
    ///
    /// # Errors
    /// [`Error::Config`]: a value is impossible, or the device has none that can change.
    fn reconfigure(&self, config: &BdevConfig) -> Result<(), Error> {
        Err(Error::fixed(config.name()))
    }

    /// What errors are put into an error device with while it runs; `None` for every other.
    fn injector(&self) -> Option<&Injector> {
        None
    }

    /// Events worth a metric, summed over all channels; names are stable.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// A thread's way to a device.
///
/// Every accepted I/O ends exactly once: in [`Submitted::Done`] or as an [`IoDone`], in any order.
/// Nothing is allocated per I/O (`out` grows as the caller lets it). At most [`Channel::depth`] I/Os
/// are in flight; one more is refused with [`crate::IoError::Busy`] and nothing is queued beyond that, so
/// that the caller, who knows the queues, decides who waits.
///
/// Drop a channel when nothing is [in flight](Channel::in_flight). One that is dropped earlier leaves
/// what the kernel may still touch to the reactor (and says so in the log), the open file included;
/// its I/Os then never end for the caller, whose lent memory must stay where it is until the reactor
/// is gone.
pub trait Channel {
    /// Starts an I/O.
    fn submit(&mut self, reactor: &mut Reactor, io: Io) -> Submitted;

    /// Takes a completion with this channel's tokens; appends the I/Os that ended by it.
    fn complete(&mut self, reactor: &mut Reactor, completion: &Completion, out: &mut Vec<IoDone>);

    /// I/Os that were accepted and have not ended.
    fn in_flight(&self) -> usize;

    /// The most I/Os in flight.
    fn depth(&self) -> usize;

    /// Whether somebody who writes into the device's memory ([`Channel::direct_read`]) may leave a block half-written
    /// for a while: the device was told that its blocks need not be atomic (NVM Command Set, AWUN).
    fn may_tear_blocks(&self) -> bool {
        false
    }

    /// The device's own memory for a range, to be sent from in place instead of a read, or `None`:
    /// read it into a buffer. `None` also when another thread may be writing just now, since a block
    /// must be seen as it was before a write or after it, never half. What the span shows is what
    /// the blocks hold at the time of looking.
    fn direct_read(&self, lba: u64, blocks: u32) -> Option<Span> {
        let _ = (lba, blocks);
        None
    }
}
