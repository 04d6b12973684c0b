//! Notification pipe: single-producer single-consumer rings of 64-byte entries in shared memory,
//! the only thing that an application and an engine on another core have in common.
//!
//! ```text
//! line 0   magic, capacity                                  constant
//! line 1   generation                                       written by the producer, at a restart
//! line 2   acknowledged generation, entries consumed        written by the consumer, in batches
//! line 3   consumer asleep, consumer gone, producer gone    written at a change
//! line 4.. entries, last byte: generation tag (6 bits), more follows (1 bit), phase (1 bit)
//! ```
//!
//! - The consumer polls the last byte of the next entry and nothing else; the producer writes it
//!   last (release) and looks at the consumer's line only when its credits are used up. An idle
//!   pipe moves no cache line.
//! - Credits: the producer never writes an entry that the consumer has not given back.
//! - A message longer than an entry takes consecutive entries and is seen as a whole.
//! - Entries are staged and moved in batches by a [`Mover`]; [`Producer::flush`] moves what is
//!   there, however little, and is called before idling.
//! - Either side may restart: a producer comes with a new generation and writes nothing before the
//!   consumer has acknowledged it; a consumer refuses the generation that was in use before it came.
//!   The other side is told once ([`PipeError::Restarted`]) and goes on with an empty ring.
//! - A [`Doorbell`] is rung only when the consumer has declared itself asleep.
//!
//! What the other side writes is never trusted: wrong counts or chains are [`PipeError::Corrupt`].

mod consumer;
mod doorbell;
mod mover;
mod producer;
mod ring;
#[cfg(test)]
mod tests;

pub use consumer::Consumer;
pub use doorbell::{Doorbell, EventFd};
pub use mover::{Memcpy, Mover};
pub use producer::{Producer, ProducerStats};
pub use ring::Ring;

/// Length of an entry: one cache line.
pub const ENTRY_LEN_BYTES: usize = 64;
/// Message bytes in an entry; the last byte is the pipe's.
pub const ENTRY_PAYLOAD_BYTES: usize = ENTRY_LEN_BYTES - 1;
/// Entries of one message at most.
pub const MESSAGE_ENTRIES_MAX: usize = 8;
/// Longest message.
pub const MESSAGE_LEN_MAX_BYTES: usize = MESSAGE_ENTRIES_MAX * ENTRY_PAYLOAD_BYTES;

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Entry(pub [u8; ENTRY_LEN_BYTES]);

const _: () = assert!(size_of::<Entry>() == ENTRY_LEN_BYTES && align_of::<Entry>() == 64);

impl Entry {
    /// All zero: an entry that nobody takes for a message.
    pub const EMPTY: Self = Self([0; ENTRY_LEN_BYTES]);
}

/// What can go wrong with a pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PipeError {
    /// No room now: the consumer has to take something first.
    #[error("the pipe is full")]
    Full,
    /// The message is longer than [`MESSAGE_LEN_MAX_BYTES`], or than the ring.
    #[error("a message of {0} bytes does not fit the pipe")]
    TooLong(usize),
    /// The other side has restarted. Told once; what was in the ring is gone, the ring is usable.
    #[error("the other side of the pipe has restarted")]
    Restarted,
    /// The other side is gone for good (and, for the consumer, nothing is left to take).
    #[error("the other side of the pipe is gone")]
    Closed,
    /// The shared memory holds what the other side cannot have written in good faith.
    #[error("the pipe is corrupt: {0}")]
    Corrupt(&'static str),
    /// The ring does not lie in the memory, is not aligned, or has an illegal capacity.
    #[error("no ring of {capacity} entries fits at offset {offset_bytes}")]
    Layout {
        /// Where it should lie.
        offset_bytes: u64,
        /// Entries wanted.
        capacity: u32,
    },
}

/// Last byte of an entry: generation tag, "more entries of this message follow", phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tail(u8);

impl Tail {
    const PHASE: u8 = 1 << 0;
    const MORE: u8 = 1 << 1;

    /// Tail of the entry at a position (a running count) of a ring. The tag is never 0, so that an
    /// empty entry matches nothing.
    const fn at(generation: u32, position: u32, capacity: u32) -> Self {
        let tag = (1 + generation % 63) as u8;
        let phase = ((position / capacity) & 1) as u8 ^ Self::PHASE;
        Self(tag << 2 | phase)
    }

    const fn with_more(self) -> Self {
        Self(self.0 | Self::MORE)
    }

    const fn is(self, expected: Self) -> bool {
        self.0 & !Self::MORE == expected.0
    }

    const fn has_more(self) -> bool {
        self.0 & Self::MORE != 0
    }
}
