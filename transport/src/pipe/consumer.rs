//! The reading side of a pipe.

use std::sync::atomic::{Ordering, fence};

use super::{
    ENTRY_PAYLOAD_BYTES, Entry, MESSAGE_ENTRIES_MAX, MESSAGE_LEN_MAX_BYTES, PipeError, Ring, Tail,
};

/// Empty polls between two looks at the producer's line, which changes only at a restart.
const EMPTY_POLLS_PER_LOOK: u32 = 256;

/// The reading side. Dropping it tells the producer.
#[derive(Debug)]
pub struct Consumer {
    ring: Ring,
    /// Generation that we follow; 0: none yet.
    generation: u32,
    /// Generation of an earlier consumer, which we do not continue; 0: none.
    refused: u32,
    /// Entries taken since the generation began.
    position: u32,
    /// Entries given back to the producer.
    given_back: u32,
    empty_polls: u32,
    message: [u8; MESSAGE_LEN_MAX_BYTES],
}

impl Consumer {
    /// Becomes the consumer of a ring. At most one at a time. Entries that an earlier consumer has
    /// not taken are lost, and the producer is told.
    #[must_use]
    pub fn attach(ring: Ring) -> Self {
        let generation = ring.generation().load(Ordering::Acquire);
        let followed = (ring.acknowledged().load(Ordering::Acquire) >> 32) as u32;
        let in_use = generation != 0
            && (followed == generation || ring.refused().load(Ordering::Acquire) == generation);
        let refused = if in_use { generation } else { 0 };
        ring.refused().store(refused, Ordering::Release);
        ring.acknowledged().store(0, Ordering::Release);
        ring.asleep().store(0, Ordering::Relaxed);
        ring.consumer_gone().store(0, Ordering::Release);
        let mut consumer = Self {
            ring,
            generation: 0,
            refused,
            position: 0,
            given_back: 0,
            empty_polls: 0,
            message: [0; MESSAGE_LEN_MAX_BYTES],
        };
        // The first generation is no restart.
        let _ = consumer.follow();
        consumer
    }

    /// Takes the next message, if there is one. It is padded with zeros to a multiple of
    /// [`ENTRY_PAYLOAD_BYTES`].
    pub fn pop(&mut self) -> Result<Option<&[u8]>, PipeError> {
        let Some(count) = self.ready()? else {
            return self.nothing();
        };
        for (index, chunk) in self
            .message
            .chunks_exact_mut(ENTRY_PAYLOAD_BYTES)
            .take(count)
            .enumerate()
        {
            let Entry(entry) = self.ring.read(self.position.wrapping_add(index as u32));
            chunk.copy_from_slice(entry.split_at(ENTRY_PAYLOAD_BYTES).0);
        }
        self.position = self.position.wrapping_add(count as u32);
        self.empty_polls = 0;
        if self.position.wrapping_sub(self.given_back) >= self.ring.capacity() / 4 {
            self.give_back();
        }
        Ok(self.message.get(..count * ENTRY_PAYLOAD_BYTES))
    }

    /// Whether [`Consumer::pop`] would give something (a message or an error) now.
    #[must_use]
    pub fn has_something(&self) -> bool {
        !matches!(self.ready(), Ok(None))
            || self.ring.generation().load(Ordering::Acquire) != self.followed_or_refused()
            || self.ring.producer_gone().load(Ordering::Acquire) != 0
    }

    /// Declares that the thread is about to sleep, so that the producer rings. False: something has
    /// come, do not sleep. After sleeping call [`Consumer::awake`].
    pub fn prepare_sleep(&mut self) -> bool {
        self.give_back();
        self.ring.asleep().store(1, Ordering::Relaxed);
        // Pairs with the fence in Producer::wake.
        fence(Ordering::SeqCst);
        if self.has_something() {
            self.awake();
            return false;
        }
        true
    }

    /// Takes the declaration back.
    pub fn awake(&mut self) {
        self.ring.asleep().store(0, Ordering::Relaxed);
    }

    /// Gives entries taken so far back to the producer now. Happens by itself a quarter ring at a
    /// time, and when the ring is found empty.
    pub fn give_back(&mut self) {
        if self.generation != 0 && self.given_back != self.position {
            self.given_back = self.position;
            self.acknowledge();
        }
    }

    /// Entries of the complete message at the head of the ring.
    fn ready(&self) -> Result<Option<usize>, PipeError> {
        if self.generation == 0 {
            return Ok(None);
        }
        for index in 0..MESSAGE_ENTRIES_MAX {
            let position = self.position.wrapping_add(index as u32);
            let expected = Tail::at(self.generation, position, self.ring.capacity());
            // Acquire: the entry's other bytes were written before its tail.
            let tail = Tail(self.ring.tail(position).load(Ordering::Acquire));
            if !tail.is(expected) {
                return Ok(None);
            }
            if !tail.has_more() {
                return Ok(Some(index + 1));
            }
        }
        Err(PipeError::Corrupt("endless message"))
    }

    /// The ring is empty: give credits back, look now and then whether the producer is another.
    fn nothing(&mut self) -> Result<Option<&[u8]>, PipeError> {
        self.give_back();
        let look = self.generation == 0 || self.empty_polls.is_multiple_of(EMPTY_POLLS_PER_LOOK);
        self.empty_polls = self.empty_polls.wrapping_add(1);
        if !look {
            return Ok(None);
        }
        self.follow()?;
        if self.ring.producer_gone().load(Ordering::Acquire) != 0 && self.ready()?.is_none() {
            return Err(PipeError::Closed);
        }
        Ok(None)
    }

    /// Follows the producer's generation.
    fn follow(&mut self) -> Result<(), PipeError> {
        let generation = self.ring.generation().load(Ordering::Acquire);
        if generation == self.followed_or_refused() {
            return Ok(());
        }
        let restarted = self.generation != 0;
        self.generation = generation;
        self.refused = 0;
        self.position = 0;
        self.given_back = 0;
        self.empty_polls = 0;
        self.acknowledge();
        if restarted {
            Err(PipeError::Restarted)
        } else {
            Ok(())
        }
    }

    fn followed_or_refused(&self) -> u32 {
        if self.generation == 0 {
            self.refused
        } else {
            self.generation
        }
    }

    fn acknowledge(&self) {
        let word = u64::from(self.generation) << 32 | u64::from(self.position);
        // Release: our reads of the entries are done.
        self.ring.acknowledged().store(word, Ordering::Release);
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.ring.consumer_gone().store(1, Ordering::Release);
    }
}
