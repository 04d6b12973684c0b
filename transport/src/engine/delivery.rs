//! Messages handed out where they lie.

use std::ops::Range;

use crate::verbs::{Qpn, Rkey};

/// What kind of message arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryKind {
    /// SEND.
    Send,
    /// SEND_WITH_IMM.
    SendImm(u32),
    /// SEND_WITH_INV; the key has been invalidated.
    SendInv(Rkey),
    /// WRITE_WITH_IMM: the data is already in memory.
    WriteImm(u32),
}

/// A message that used up an in-place receive credit.
#[derive(Debug)]
pub struct Delivery {
    /// Queue pair.
    pub qpn: Qpn,
    /// The queue pair's `user` word.
    pub user: u64,
    /// Kind.
    pub kind: DeliveryKind,
    /// The message; empty for WRITE_WITH_IMM.
    pub payload: Payload,
    /// Length of the message; for WRITE_WITH_IMM of what was written.
    pub len: u32,
}

/// Where the bytes of a delivery are.
#[derive(Debug)]
pub enum Payload {
    /// In the packet that was just handled.
    InPacket(Range<u32>),
    /// In a buffer of the hold store, because the message had arrived ahead of a gap.
    Held(HeldBuffer),
}

/// Bytes of a message that had to wait; freed when dropped.
pub struct HeldBuffer(pub(crate) Box<[u8]>);

impl std::fmt::Debug for HeldBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HeldBuffer({} bytes)", self.0.len())
    }
}

impl Payload {
    /// The bytes; `packet` is what was given to `handle_packet` just before.
    #[must_use]
    pub fn bytes<'a>(&'a self, packet: &'a [u8]) -> &'a [u8] {
        match self {
            Self::InPacket(range) => packet
                .get(range.start as usize..range.end as usize)
                .unwrap_or(&[]),
            Self::Held(buffer) => &buffer.0,
        }
    }
}
