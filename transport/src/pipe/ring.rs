//! Where the words of a ring lie in shared memory. The only place that computes their addresses.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use flexblk_reactor::SharedMemory;

use super::{ENTRY_LEN_BYTES, Entry, PipeError};

const MAGIC: u32 = u32::from_le_bytes(*b"FXPR");
const LINE: usize = 64;
const MAGIC_AT: usize = 0;
const CAPACITY_AT: usize = 4;
const GENERATION_AT: usize = LINE;
const ACKNOWLEDGED_AT: usize = 2 * LINE;
const REFUSED_AT: usize = 2 * LINE + 8;
const ASLEEP_AT: usize = 3 * LINE;
const CONSUMER_GONE_AT: usize = 3 * LINE + 4;
const PRODUCER_GONE_AT: usize = 3 * LINE + 8;
const ENTRIES_AT: usize = 4 * LINE;
const CAPACITY_MAX: u32 = 1 << 20;

/// A ring in shared memory, before or while a producer and a consumer use it.
#[derive(Clone, Debug)]
pub struct Ring {
    memory: Arc<SharedMemory>,
    offset: usize,
    capacity: u32,
}

impl Ring {
    /// Bytes that a ring of `capacity` entries takes.
    #[must_use]
    pub const fn len_bytes(capacity: u32) -> u64 {
        ENTRIES_AT as u64 + capacity as u64 * ENTRY_LEN_BYTES as u64
    }

    /// Makes a ring in zeroed memory. The capacity is a power of two from 8 to 2^20, the offset a
    /// multiple of 64.
    pub fn create(
        memory: &Arc<SharedMemory>,
        offset_bytes: u64,
        capacity: u32,
    ) -> Result<Self, PipeError> {
        let ring = Self::place(memory, offset_bytes, capacity)?;
        ring.word(CAPACITY_AT).store(capacity, Ordering::Relaxed);
        ring.word(MAGIC_AT).store(MAGIC, Ordering::Release);
        Ok(ring)
    }

    /// Opens a ring that the other side has made.
    pub fn open(memory: &Arc<SharedMemory>, offset_bytes: u64) -> Result<Self, PipeError> {
        let probe = Self::place(memory, offset_bytes, 8)?;
        if probe.word(MAGIC_AT).load(Ordering::Acquire) != MAGIC {
            return Err(PipeError::Corrupt("no ring here"));
        }
        let capacity = probe.word(CAPACITY_AT).load(Ordering::Relaxed);
        Self::place(memory, offset_bytes, capacity)
    }

    /// Entries.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    fn place(
        memory: &Arc<SharedMemory>,
        offset_bytes: u64,
        capacity: u32,
    ) -> Result<Self, PipeError> {
        let wrong = PipeError::Layout {
            offset_bytes,
            capacity,
        };
        let legal = capacity.is_power_of_two()
            && (8..=CAPACITY_MAX).contains(&capacity)
            && offset_bytes.is_multiple_of(LINE as u64)
            && (memory.as_ptr() as usize).is_multiple_of(LINE);
        let end = offset_bytes.checked_add(Self::len_bytes(capacity));
        if !legal || end.is_none_or(|end| end > memory.len()) {
            return Err(wrong);
        }
        Ok(Self {
            memory: Arc::clone(memory),
            offset: offset_bytes as usize,
            capacity,
        })
    }

    /// The producer's generation.
    pub(super) fn generation(&self) -> &AtomicU32 {
        self.word(GENERATION_AT)
    }

    /// Generation that the consumer follows (upper half) and entries that it has consumed (lower).
    pub(super) fn acknowledged(&self) -> &AtomicU64 {
        debug_assert!(ACKNOWLEDGED_AT.is_multiple_of(8));
        // SAFETY: `place` has checked that the header lies inside the mapping, which `self.memory`
        // keeps alive, and that it is aligned to a line; both sides access it atomically only.
        unsafe { AtomicU64::from_ptr(self.at(ACKNOWLEDGED_AT).cast()) }
    }

    /// Generation that a restarted consumer does not want to continue.
    pub(super) fn refused(&self) -> &AtomicU32 {
        self.word(REFUSED_AT)
    }

    /// Not 0: the consumer wants the doorbell.
    pub(super) fn asleep(&self) -> &AtomicU32 {
        self.word(ASLEEP_AT)
    }

    /// Not 0: the consumer was dropped.
    pub(super) fn consumer_gone(&self) -> &AtomicU32 {
        self.word(CONSUMER_GONE_AT)
    }

    /// Not 0: the producer was dropped.
    pub(super) fn producer_gone(&self) -> &AtomicU32 {
        self.word(PRODUCER_GONE_AT)
    }

    /// Address of the entry at a position (a running count).
    pub(super) fn entry(&self, position: u32) -> *mut Entry {
        let slot = (position & (self.capacity - 1)) as usize;
        self.at(ENTRIES_AT + slot * ENTRY_LEN_BYTES).cast()
    }

    /// Last byte of the entry at a position.
    pub(super) fn tail(&self, position: u32) -> &AtomicU8 {
        // SAFETY: the last byte of an entry inside the mapping (masked to the capacity, whose
        // extent `place` has checked); the mapping lives as long as `self`. While it is polled it
        // is written atomically only.
        unsafe { AtomicU8::from_ptr(self.entry(position).cast::<u8>().add(ENTRY_LEN_BYTES - 1)) }
    }

    /// Copies the entry at a position out.
    pub(super) fn read(&self, position: u32) -> Entry {
        // SAFETY: the entry lies inside the mapping and is aligned (see `entry`). Any bytes are a
        // valid Entry. A producer that keeps the protocol does not write it now; one that does not
        // can only give us wrong bytes.
        unsafe { self.entry(position).read_volatile() }
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        // SAFETY: as for `acknowledged`: inside the header, a multiple of 4, atomic access only.
        unsafe { AtomicU32::from_ptr(self.at(at).cast()) }
    }

    fn at(&self, at: usize) -> *mut u8 {
        // SAFETY: `offset + at` is inside the mapping for every caller, by the check in `place`.
        unsafe { self.memory.as_ptr().add(self.offset + at) }
    }
}
