//! A packet of the peer, taken apart.

use crate::verbs::Framing;
use crate::wire::{Bth, Opcode, Psn, Reth, u32_at};

/// A packet of the peer, taken apart; lengths have been checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    pub(crate) opcode: Opcode,
    pub(crate) psn: Psn,
    pub(crate) ack_req: bool,
    /// The sender wants the receiver's owner to be woken.
    pub(crate) solicited: bool,
    pub(crate) reth: Reth,
    /// Immediate value, key to invalidate, or AETH.
    pub(crate) word: u32,
    pub(crate) payload: &'a [u8],
    /// Where the payload is in the packet; `None` for a held message.
    pub(crate) payload_at: Option<u32>,
}

impl<'a> Request<'a> {
    /// Takes a packet apart; `end` is where its trailer begins.
    #[inline]
    pub(crate) fn parse(bth: &Bth, packet: &'a [u8], end: usize) -> Option<Self> {
        let opcode = bth.opcode;
        let start = opcode.header_len();
        let payload = packet.get(start..end.checked_sub(usize::from(bth.pad))?)?;
        let reth = if opcode.has_reth() {
            Reth::parse(packet, crate::wire::BTH_LEN_BYTES)?
        } else {
            Reth {
                addr: 0,
                rkey: 0,
                len: 0,
            }
        };
        let word = if opcode.has_imm() || opcode.has_ieth() || opcode.has_aeth() {
            u32_at(packet, start - 4)?
        } else {
            0
        };
        Some(Self {
            opcode,
            psn: bth.psn,
            ack_req: bth.ack_req,
            solicited: bth.solicited,
            reth,
            word,
            payload,
            payload_at: Some(start as u32),
        })
    }
}

/// Sequence numbers that a message of `len` bytes, or the answer to a READ of them, takes.
pub(crate) fn packets_of(len: u32, mtu: u32) -> u32 {
    len.div_ceil(mtu).max(1)
}

/// FlexiNS segments are multiples of a cache line.
const SEGMENT_STEP_BYTES: u32 = 64;

/// Payload bytes of each packet of a message but the last, which has the rest.
///
/// Between FlexiNS peers a message is cut evenly: packets of one length make one train, and a full
/// one with a short rest makes two. The standard wants full packets (IBA 9.7.2.1).
///
/// A whole number of such segments, at most as many as the message has, is cut into the same
/// segments again. So a part of a READ can be asked for by its length alone.
pub(crate) fn segment_of(len: u32, mtu: u32, framing: Framing) -> u32 {
    match framing {
        Framing::Standard => mtu,
        Framing::Flexins => len
            .div_ceil(packets_of(len, mtu))
            .next_multiple_of(SEGMENT_STEP_BYTES)
            .clamp(SEGMENT_STEP_BYTES, mtu),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn segments_are_even_lines() {
        let cut = |len| segment_of(len, 8320, Framing::Flexins);
        assert_eq!(cut(128 << 10), 8192);
        assert_eq!(cut(8321), 4224);
        assert_eq!((cut(0), cut(1), cut(8320)), (64, 64, 8320));
        assert_eq!(segment_of(5000, 4096, Framing::Standard), 4096);
    }

    proptest! {
        #[test]
        fn even_cuts_take_no_more_packets_and_repeat(
            len in 1..1_u32 << 24, lines in 16..960_u32, run in 1..2048_u32,
        ) {
            let mtu = lines * SEGMENT_STEP_BYTES;
            let segment = segment_of(len, mtu, Framing::Flexins);
            let packets = packets_of(len, mtu);
            prop_assert!(segment <= mtu && segment.is_multiple_of(SEGMENT_STEP_BYTES));
            prop_assert_eq!(len.div_ceil(segment), packets);
            let run = run.min(packets);
            let part = if run == packets { len } else { run * segment };
            prop_assert_eq!(packets_of(part, mtu), run);
            prop_assert_eq!(run == 1 || segment_of(part, mtu, Framing::Flexins) == segment, true);
        }
    }
}
