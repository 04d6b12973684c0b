//! A packet of the peer, taken apart.

use crate::wire::{Bth, Opcode, Psn, Reth, u32_at};

/// A packet of the peer, taken apart; lengths have been checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    pub(crate) opcode: Opcode,
    pub(crate) psn: Psn,
    pub(crate) ack_req: bool,
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
            reth,
            word,
            payload,
            payload_at: Some(start as u32),
        })
    }
}

/// Sequence numbers that the answer to a READ of `len` bytes takes.
pub(crate) fn packets_of(len: u32, mtu: u32) -> u32 {
    len.div_ceil(mtu).max(1)
}
