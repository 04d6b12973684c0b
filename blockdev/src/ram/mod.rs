//! Memory as a block device, shared by all threads, resizable within its mapping: one memfd, sparse, or with huge pages
//! private memory that is taken at once.

mod channel;
mod locks;

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use flexblk_reactor::{HugePages, Reactor, SharedMemory};
use uuid::Uuid;

use crate::{
    BlockDevice, ByteSize, Caps, Channel, Error, HugePagesMode, Info, RamConfig, Tokens,
    check::{Extent, Limits},
    config,
};

/// See [`crate::BdevConfig::Ram`].
///
/// Reads, writes and compares end at once; only zeroing or discarding many megabytes takes several
/// turns of the reactor. Data lives as long as the device: a flush has nothing to do.
#[derive(Debug)]
pub struct RamDevice {
    name: Arc<str>,
    kind: Arc<str>,
    uuid: Uuid,
    depth: u32,
    shared: Arc<Shared>,
    /// One resize at a time.
    resizing: Mutex<()>,
}

#[derive(Debug)]
struct Shared {
    memory: Arc<SharedMemory>,
    block_count: AtomicU64,
    limits: Limits,
    atomic_blocks: bool,
    channels: AtomicU32,
    locks: locks::Locks,
}

const PAGE_BYTES: u64 = 4096;
const MAX_IO_BYTES: u32 = 1 << 30;

impl RamDevice {
    /// Makes the device; its memory is taken as blocks are written, or at once with huge pages.
    pub fn new(config: &RamConfig) -> Result<Self, Error> {
        let what = || config.name.clone();
        let count = config::block_count(
            &config.name,
            config.block_size,
            config.size,
            config.num_blocks,
        )?;
        config::check_depth(&config.name, config.depth)?;
        let size_bytes = count * u64::from(config.block_size);
        let max_bytes = match (config.max_size, config.hugepages) {
            (Some(max), _) if max.bytes() < size_bytes => {
                let reason = format!("max_size {max} is smaller than the size {size_bytes}");
                return Err(Error::Config {
                    what: what(),
                    reason,
                });
            }
            (Some(max), _) => max.bytes(),
            (None, HugePagesMode::No) => size_bytes.saturating_mul(4),
            (None, HugePagesMode::Transparent | HugePagesMode::Try) => size_bytes,
        };
        let max_bytes = max_bytes
            .min(i64::MAX as u64 - PAGE_BYTES)
            .next_multiple_of(PAGE_BYTES);
        let failed = |source| Error::Reactor {
            what: what(),
            source,
        };
        let huge = |hugepages| {
            // Taken now, and not when a host first writes somewhere: making room for a huge page can take seconds.
            let memory =
                SharedMemory::private(&config.name, max_bytes, hugepages).map_err(failed)?;
            if !memory.is_huge() {
                check_available(&config.name, max_bytes)?;
            }
            memory.populate().map_err(failed)?;
            Ok(memory)
        };
        let memory = match config.hugepages {
            HugePagesMode::No => {
                SharedMemory::create(&config.name, max_bytes, HugePages::No).map_err(failed)?
            }
            HugePagesMode::Transparent => huge(HugePages::Transparent)?,
            HugePagesMode::Try => huge(HugePages::Try)?,
        };
        let kind = if memory.is_huge() {
            "ram (hugepages)"
        } else {
            "ram"
        };
        Ok(Self {
            name: config.name.as_str().into(),
            kind: kind.into(),
            uuid: config.uuid.unwrap_or_else(Uuid::new_v4),
            depth: config.depth,
            shared: Arc::new(Shared {
                memory,
                block_count: AtomicU64::new(count),
                limits: Limits {
                    block_size: config.block_size,
                    max_io_bytes: MAX_IO_BYTES,
                    caps: Caps::WRITE_ZEROES
                        | Caps::DISCARD
                        | Caps::DISCARD_ZEROES
                        | Caps::FLUSH
                        | Caps::FUA
                        | Caps::RESIZE,
                },
                atomic_blocks: config.atomic_blocks,
                channels: AtomicU32::new(0),
                locks: locks::Locks::new(),
            }),
            resizing: Mutex::new(()),
        })
    }
}

/// Taking more memory than there is would not fail, but have the kernel kill somebody.
fn check_available(name: &str, wanted_bytes: u64) -> Result<(), Error> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = meminfo.lines().find_map(|line| {
        let kib = line
            .strip_prefix("MemAvailable:")?
            .trim()
            .strip_suffix(" kB")?;
        Some(ByteSize(kib.parse::<u64>().ok()? << 10))
    });
    match available {
        Some(available) if available.bytes() < wanted_bytes => Err(Error::Config {
            what: name.to_owned(),
            reason: format!(
                "hugepages are taken at once, and {} is more than the {available} of memory available: make it smaller, or leave hugepages out",
                ByteSize(wanted_bytes)
            ),
        }),
        _ => Ok(()),
    }
}

impl BlockDevice for RamDevice {
    fn info(&self) -> Info {
        Info {
            name: Arc::clone(&self.name),
            kind: Arc::clone(&self.kind),
            block_size: self.shared.limits.block_size,
            block_count: self.shared.block_count(),
            caps: self.shared.limits.caps,
            optimal_io_bytes: PAGE_BYTES as u32,
            max_io_bytes: MAX_IO_BYTES,
            volatile_write_cache: false,
            uuid: self.uuid,
            memory_alignment: 1,
        }
    }

    fn open(&self, _reactor: &mut Reactor, tokens: Tokens) -> Result<Box<dyn Channel>, Error> {
        Ok(Box::new(channel::RamChannel::new(
            Arc::clone(&self.shared),
            tokens,
            self.depth,
        )))
    }

    fn memory(&self) -> Option<&Arc<SharedMemory>> {
        Some(&self.shared.memory)
    }

    fn resize(&self, new_bytes: u64) -> Result<Info, Error> {
        let _one = self.resizing.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &self.shared;
        let count = config::whole_blocks(&self.name, new_bytes, shared.limits.block_size)?;
        let max_bytes = shared.memory.len();
        if new_bytes > max_bytes {
            let what = self.name.to_string();
            return Err(Error::BeyondMaxSize {
                what,
                wanted_bytes: new_bytes,
                max_bytes,
            });
        }
        let old_bytes = shared.block_count() * u64::from(shared.limits.block_size);
        if new_bytes < old_bytes {
            shared.block_count.store(count, Ordering::Release);
            shared.zero(Extent {
                offset: new_bytes,
                len: old_bytes - new_bytes,
            });
        } else {
            // again: an I/O that was checked against a larger size may have written after the shrink
            shared.zero(Extent {
                offset: old_bytes,
                len: new_bytes - old_bytes,
            });
            shared.block_count.store(count, Ordering::Release);
        }
        Ok(self.info())
    }
}

impl Shared {
    fn block_count(&self) -> u64 {
        self.block_count.load(Ordering::Acquire)
    }

    /// Makes a range zero and gives its pages back; in pieces, each atomic to readers and writers.
    fn zero(&self, extent: Extent) {
        const PIECE_BYTES: u64 = 1 << 20;
        let (mut at, end) = (extent.offset, extent.offset + extent.len);
        while at < end {
            let next = (at / PIECE_BYTES + 1).saturating_mul(PIECE_BYTES).min(end);
            let _guard = self
                .locks
                .many(at / locks::UNIT_BYTES..next.div_ceil(locks::UNIT_BYTES));
            self.memory.zero(at, (next - at) as u32);
            at = next;
        }
    }
}
