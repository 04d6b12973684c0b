//! Base transport header (IBA 9.2, figure 87): 12 bytes at the start of every packet.

use super::{Opcode, Psn};
use crate::verbs::Qpn;

/// Length of a BTH.
pub const BTH_LEN_BYTES: usize = 12;

/// The default partition with full membership (IBA 10.9.1.2): what RoCE always uses.
pub const PARTITION_KEY: u16 = 0xFFFF;

/// Base transport header.
///
/// | byte | field                                                      |
/// |------|------------------------------------------------------------|
/// | 0    | opcode                                                     |
/// | 1    | solicited event, migration state, pad count, version       |
/// | 2-3  | partition key                                              |
/// | 4    | reserved (FECN, BECN in RoCEv2)                            |
/// | 5-7  | destination queue pair                                     |
/// | 8    | acknowledge request, reserved                              |
/// | 9-11 | packet sequence number                                     |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bth {
    /// Operation.
    pub opcode: Opcode,
    /// The receiver shall raise an event.
    pub solicited: bool,
    /// Bytes that round the payload up to a multiple of four (0-3).
    pub pad: u8,
    /// Receiving queue pair.
    pub dest_qpn: Qpn,
    /// An acknowledgement is wanted now.
    pub ack_req: bool,
    /// Packet sequence number.
    pub psn: Psn,
}

impl Bth {
    /// Decodes the first 12 bytes. `None`: too short, other header version, or unknown opcode.
    #[inline]
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let b: &[u8; BTH_LEN_BYTES] = bytes.first_chunk()?;
        if b[1] & 0x0F != 0 {
            return None;
        }
        Some(Self {
            opcode: Opcode::from_u8(b[0])?,
            solicited: b[1] & 0x80 != 0,
            pad: (b[1] >> 4) & 0x03,
            dest_qpn: Qpn::new(u32::from_be_bytes([0, b[5], b[6], b[7]])),
            ack_req: b[8] & 0x80 != 0,
            psn: Psn::new(u32::from_be_bytes([0, b[9], b[10], b[11]])),
        })
    }

    /// Encodes. The migration-state bit is set as every RoCE sender does.
    #[inline]
    #[must_use]
    pub fn emit(&self) -> [u8; BTH_LEN_BYTES] {
        let word0 = (self.opcode as u32) << 24
            | u32::from(self.solicited) << 23
            | 1 << 22
            | u32::from(self.pad & 3) << 20
            | PARTITION_KEY as u32;
        let word1 = self.dest_qpn.get();
        let word2 = u32::from(self.ack_req) << 31 | self.psn.get();
        let mut bytes = [0; BTH_LEN_BYTES];
        bytes[0..4].copy_from_slice(&word0.to_be_bytes());
        bytes[4..8].copy_from_slice(&word1.to_be_bytes());
        bytes[8..12].copy_from_slice(&word2.to_be_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trip(index in 0..Opcode::ALL.len(), solicited: bool, pad in 0u8..4, qpn: u32, ack_req: bool, psn: u32) {
            let bth = Bth {
                opcode: Opcode::ALL[index],
                solicited,
                pad,
                dest_qpn: Qpn::new(qpn),
                ack_req,
                psn: Psn::new(psn),
            };
            prop_assert_eq!(Bth::parse(&bth.emit()), Some(bth));
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..20)) {
            if let Some(bth) = Bth::parse(&bytes) {
                prop_assert_eq!(Bth::parse(&bth.emit()), Some(bth));
            }
        }
    }

    #[test]
    fn layout_of_the_figure() {
        let bth = Bth {
            opcode: Opcode::WriteOnlyImm,
            solicited: true,
            pad: 2,
            dest_qpn: Qpn::new(0x0012_3456),
            ack_req: true,
            psn: Psn::new(0x00AB_CDEF),
        };
        assert_eq!(
            bth.emit(),
            [
                0x0B, 0xE0, 0xFF, 0xFF, 0, 0x12, 0x34, 0x56, 0x80, 0xAB, 0xCD, 0xEF
            ]
        );
    }
}
