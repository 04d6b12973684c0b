//! The writing side of a pipe.
#![allow(unsafe_code)]

use std::fmt;
use std::sync::atomic::{Ordering, fence};

use super::{
    Doorbell, ENTRY_LEN_BYTES, ENTRY_PAYLOAD_BYTES, Entry, MESSAGE_ENTRIES_MAX,
    MESSAGE_LEN_MAX_BYTES, Memcpy, Mover, PipeError, Ring, Tail,
};

/// Entries that are staged before they are moved. A message is never split over two batches, so a
/// batch holds at least one.
const BATCH: usize = 16;

const _: () = assert!(BATCH >= MESSAGE_ENTRIES_MAX);

/// What a producer has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProducerStats {
    /// Messages pushed.
    pub messages: u64,
    /// Entries moved.
    pub entries: u64,
    /// Batches moved.
    pub batches: u64,
    /// Doorbells rung.
    pub doorbells: u64,
    /// Looks at the consumer's line.
    pub credit_reads: u64,
}

/// The writing side. Dropping it tells the consumer, once it has taken everything.
pub struct Producer<M: Mover = Memcpy> {
    ring: Ring,
    doorbell: Box<dyn Doorbell>,
    mover: M,
    generation: u32,
    /// Whether the consumer has acknowledged the generation.
    acknowledged: bool,
    /// Entries written or staged since the generation began.
    position: u32,
    /// Entries that the consumer has given back, as far as we have looked.
    consumed: u32,
    staged: [Entry; BATCH],
    staged_count: usize,
    stats: ProducerStats,
}

impl<M: Mover> fmt::Debug for Producer<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer")
            .field("generation", &self.generation)
            .field("position", &self.position)
            .field("staged", &self.staged_count)
            .finish_non_exhaustive()
    }
}

impl Producer<Memcpy> {
    /// Becomes the producer of a ring: with a new generation, so that nothing of an earlier
    /// producer is taken for ours. At most one at a time.
    #[must_use]
    pub fn attach(ring: Ring, doorbell: Box<dyn Doorbell>) -> Self {
        Self::attach_with(ring, doorbell, Memcpy)
    }
}

impl<M: Mover> Producer<M> {
    /// As [`Producer::attach`], with another way to move entries.
    #[must_use]
    pub fn attach_with(ring: Ring, doorbell: Box<dyn Doorbell>, mover: M) -> Self {
        let generation = ring.generation().load(Ordering::Acquire);
        let mut producer = Self {
            ring,
            doorbell,
            mover,
            generation,
            acknowledged: false,
            position: 0,
            consumed: 0,
            staged: [Entry::EMPTY; BATCH],
            staged_count: 0,
            stats: ProducerStats::default(),
        };
        producer.ring.producer_gone().store(0, Ordering::Relaxed);
        producer.begin_generation();
        producer
    }

    /// Entries that can be pushed now.
    pub fn credits(&mut self) -> Result<u32, PipeError> {
        self.refresh()?;
        Ok(self.free())
    }

    /// Stages a message. It is visible to the consumer after the next [`Producer::flush`] at the
    /// latest.
    pub fn push(&mut self, message: &[u8]) -> Result<(), PipeError> {
        let count = message.len().div_ceil(ENTRY_PAYLOAD_BYTES).max(1);
        if message.len() > MESSAGE_LEN_MAX_BYTES || count > self.ring.capacity() as usize {
            return Err(PipeError::TooLong(message.len()));
        }
        if self.free() < count as u32 {
            self.refresh()?;
            if self.free() < count as u32 {
                // What is staged must not wait for the room that only its consumption makes.
                self.flush()?;
                return Err(PipeError::Full);
            }
        }
        if self.staged_count + count > BATCH {
            self.move_staged();
        }
        for index in 0..count {
            let chunk = message
                .get(index * ENTRY_PAYLOAD_BYTES..)
                .and_then(|rest| rest.get(..rest.len().min(ENTRY_PAYLOAD_BYTES)))
                .unwrap_or_default();
            let tail = Tail::at(self.generation, self.position, self.ring.capacity());
            let tail = if index + 1 < count {
                tail.with_more()
            } else {
                tail
            };
            if let Some(Entry(entry)) = self.staged.get_mut(self.staged_count) {
                let (payload, rest) = entry.split_at_mut(chunk.len());
                payload.copy_from_slice(chunk);
                rest.fill(0);
                entry[ENTRY_LEN_BYTES - 1] = tail.0;
            }
            self.staged_count += 1;
            self.position = self.position.wrapping_add(1);
        }
        self.stats.messages += 1;
        if self.staged_count >= BATCH {
            self.move_staged();
        }
        Ok(())
    }

    /// Makes every staged message visible and rings if the consumer sleeps. Call it when there is
    /// nothing more to push for the moment.
    pub fn flush(&mut self) -> Result<(), PipeError> {
        self.move_staged();
        if self.ring.consumer_gone().load(Ordering::Relaxed) != 0 {
            return Err(PipeError::Closed);
        }
        Ok(())
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> &ProducerStats {
        &self.stats
    }

    fn free(&self) -> u32 {
        if !self.acknowledged {
            return 0;
        }
        let used = self.position.wrapping_sub(self.consumed);
        self.ring.capacity().saturating_sub(used)
    }

    /// Looks at the consumer's line.
    fn refresh(&mut self) -> Result<(), PipeError> {
        self.stats.credit_reads += 1;
        if self.ring.consumer_gone().load(Ordering::Relaxed) != 0 {
            return Err(PipeError::Closed);
        }
        // Acquire: entries given back are no longer read when we write them again.
        let word = self.ring.acknowledged().load(Ordering::Acquire);
        let (generation, consumed) = ((word >> 32) as u32, word as u32);
        if generation == self.generation {
            if !self.acknowledged {
                self.acknowledged = true;
                self.clear();
            }
            let used = self.position.wrapping_sub(consumed);
            if used > self.ring.capacity() || used > self.position.wrapping_sub(self.consumed) {
                return Err(PipeError::Corrupt("more entries consumed than written"));
            }
            self.consumed = consumed;
            return Ok(());
        }
        if self.acknowledged || self.ring.refused().load(Ordering::Acquire) == self.generation {
            self.begin_generation();
            return Err(PipeError::Restarted);
        }
        Ok(())
    }

    fn begin_generation(&mut self) {
        self.generation = match self.generation.wrapping_add(1) {
            0 => 1,
            next => next,
        };
        self.acknowledged = false;
        self.position = 0;
        self.consumed = 0;
        self.staged_count = 0;
        self.ring
            .generation()
            .store(self.generation, Ordering::Release);
        self.wake();
    }

    /// Empties the ring at the start of a generation, so that a tag that comes round after 63
    /// generations finds nothing of its last life.
    fn clear(&self) {
        for position in 0..self.ring.capacity() {
            self.ring.tail(position).store(0, Ordering::Relaxed);
        }
    }

    fn move_staged(&mut self) {
        let staged = self.staged.get(..self.staged_count).unwrap_or_default();
        if staged.is_empty() {
            return;
        }
        let first = self.position.wrapping_sub(staged.len() as u32);
        // Up to the end of the ring, then from its start.
        let capacity = self.ring.capacity();
        let until_end = (capacity - (first & (capacity - 1))) as usize;
        let (front, back) = staged.split_at(staged.len().min(until_end));
        // SAFETY: `front.len()` slots from `first` and `back.len()` from the ring's start lie inside
        // the ring; `push` staged them only against credits, so the consumer has given them back
        // and reads nothing of them but the tail, atomically. The staging area is not touched
        // before `complete`.
        unsafe {
            self.mover.copy_entries(front, self.ring.entry(first));
            let second = first.wrapping_add(front.len() as u32);
            self.mover.copy_entries(back, self.ring.entry(second));
        }
        while !self.mover.complete() {
            std::hint::spin_loop();
        }
        self.stats.entries += self.staged_count as u64;
        self.stats.batches += 1;
        self.staged_count = 0;
        self.wake();
    }

    /// Rings if the consumer sleeps.
    fn wake(&mut self) {
        // Pairs with the fence in Consumer::prepare_sleep: either it sees our entries after its
        // declaration, or we see its declaration after our entries.
        fence(Ordering::SeqCst);
        if self.ring.asleep().load(Ordering::Relaxed) != 0
            && self.ring.asleep().swap(0, Ordering::AcqRel) != 0
        {
            self.stats.doorbells += 1;
            self.doorbell.ring();
        }
    }
}

impl<M: Mover> Drop for Producer<M> {
    fn drop(&mut self) {
        self.move_staged();
        self.ring.producer_gone().store(1, Ordering::Release);
        self.wake();
    }
}
