//! Extended transport headers: RETH, AETH, DETH, and FlexiNS's probe. ImmDt and IETH are one word each.

use super::{array_at, u32_at};

/// Length of an RDMA extended transport header.
pub const RETH_LEN_BYTES: usize = 16;
/// Length of an acknowledge extended transport header.
pub const AETH_LEN_BYTES: usize = 4;
/// Length of immediate data (IBA 9.3.6).
pub const IMM_LEN_BYTES: usize = 4;
/// Length of an invalidate extended transport header (IBA 9.3.7).
pub const IETH_LEN_BYTES: usize = 4;
/// Length of a datagram extended transport header.
pub const DETH_LEN_BYTES: usize = 8;
/// Length of a probe after its BTH.
pub const PROBE_LEN_BYTES: usize = 8;

/// RDMA extended transport header (IBA 9.3.3, figure 92): where a WRITE or READ goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reth {
    /// Address in the responder's region.
    pub addr: u64,
    /// Key of the region.
    pub rkey: u32,
    /// Length of the message. Between FlexiNS peers every packet of a long WRITE has its own RETH:
    /// `addr` is the packet's, `len` still the whole message's.
    pub len: u32,
}

impl Reth {
    /// Decodes at `offset`.
    #[inline]
    #[must_use]
    pub fn parse(bytes: &[u8], offset: usize) -> Option<Self> {
        let b: [u8; RETH_LEN_BYTES] = array_at(bytes, offset)?;
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            k0,
            k1,
            k2,
            k3,
            l0,
            l1,
            l2,
            l3,
        ] = b;
        Some(Self {
            addr: u64::from_be_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            rkey: u32::from_be_bytes([k0, k1, k2, k3]),
            len: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }

    /// Encodes.
    #[inline]
    #[must_use]
    pub fn emit(&self) -> [u8; RETH_LEN_BYTES] {
        let mut bytes = [0; RETH_LEN_BYTES];
        bytes[0..8].copy_from_slice(&self.addr.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.rkey.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.len.to_be_bytes());
        bytes
    }
}

/// Reason of a negative acknowledgement (IBA table 46).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum NakCode {
    /// A packet is missing.
    PsnSequence = 0,
    /// Opcode, length or order not allowed.
    InvalidRequest = 1,
    /// Key, range or access refused.
    RemoteAccess = 2,
    /// The responder could not carry it out.
    RemoteOperational = 3,
}

/// AETH syndrome (IBA 9.7.5.2.1, table 45).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Syndrome {
    /// Acknowledgement; credits are not limited (code 31).
    Ack,
    /// Receiver not ready; retry after the time with this code (IBA table 47).
    RnrNak(u8),
    /// Negative acknowledgement.
    Nak(NakCode),
}

impl Syndrome {
    /// Decodes; `None` for reserved values.
    #[must_use]
    pub const fn from_u8(value: u8) -> Option<Self> {
        match value >> 5 {
            0b000 => Some(Self::Ack),
            0b001 => Some(Self::RnrNak(value & 0x1F)),
            0b011 => match value & 0x1F {
                0 => Some(Self::Nak(NakCode::PsnSequence)),
                1 => Some(Self::Nak(NakCode::InvalidRequest)),
                2 => Some(Self::Nak(NakCode::RemoteAccess)),
                3 => Some(Self::Nak(NakCode::RemoteOperational)),
                _ => None,
            },
            _ => None,
        }
    }

    /// Encodes.
    #[must_use]
    pub const fn to_u8(self) -> u8 {
        match self {
            Self::Ack => 0x1F,
            Self::RnrNak(timer) => 0x20 | timer & 0x1F,
            Self::Nak(code) => 0x60 | code as u8,
        }
    }
}

/// Acknowledge extended transport header (IBA 9.3.5, figure 94).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aeth {
    /// What the responder says.
    pub syndrome: Syndrome,
    /// Messages completed so far (24 bit).
    pub msn: u32,
}

impl Aeth {
    /// Decodes at `offset`.
    #[inline]
    #[must_use]
    pub fn parse(bytes: &[u8], offset: usize) -> Option<Self> {
        let word = u32_at(bytes, offset)?;
        Some(Self {
            syndrome: Syndrome::from_u8((word >> 24) as u8)?,
            msn: word & 0x00FF_FFFF,
        })
    }

    /// Encodes.
    #[inline]
    #[must_use]
    pub const fn emit(&self) -> [u8; AETH_LEN_BYTES] {
        ((self.syndrome.to_u8() as u32) << 24 | self.msn & 0x00FF_FFFF).to_be_bytes()
    }
}

/// Datagram extended transport header (IBA 9.3.2): of MADs to queue pair 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deth {
    /// Queue key.
    pub qkey: u32,
    /// Queue pair of the sender.
    pub source_qpn: u32,
}

impl Deth {
    /// Decodes at `offset`.
    #[must_use]
    pub fn parse(bytes: &[u8], offset: usize) -> Option<Self> {
        Some(Self {
            qkey: u32_at(bytes, offset)?,
            source_qpn: u32_at(bytes, offset + 4)? & 0x00FF_FFFF,
        })
    }

    /// Encodes.
    #[must_use]
    pub fn emit(&self) -> [u8; DETH_LEN_BYTES] {
        let mut bytes = [0; DETH_LEN_BYTES];
        bytes[0..4].copy_from_slice(&self.qkey.to_be_bytes());
        bytes[4..8].copy_from_slice(&(self.source_qpn & 0x00FF_FFFF).to_be_bytes());
        bytes
    }
}

/// Body of a FlexiNS probe (opcode 0xC1): the PSN in its BTH is the next one to be sent.
///
/// The answer is a selective acknowledgement with the same token, sent after everything that the
/// responder had queued before. So the requester learns what is missing without repeating payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Comes back in the answer; the requester's transmission order.
    pub token: u32,
}

impl Probe {
    /// Decodes at `offset`.
    #[must_use]
    pub fn parse(bytes: &[u8], offset: usize) -> Option<Self> {
        Some(Self {
            token: u32_at(bytes, offset)?,
        })
    }

    /// Encodes; the last four bytes are reserved.
    #[must_use]
    pub fn emit(&self) -> [u8; PROBE_LEN_BYTES] {
        let mut bytes = [0; PROBE_LEN_BYTES];
        bytes[0..4].copy_from_slice(&self.token.to_be_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn reth_round_trip(addr: u64, rkey: u32, len: u32) {
            let reth = Reth { addr, rkey, len };
            prop_assert_eq!(Reth::parse(&reth.emit(), 0), Some(reth));
        }

        #[test]
        fn aeth_round_trip(syndrome: u8, msn in 0u32..0x0100_0000) {
            if let Some(syndrome) = Syndrome::from_u8(syndrome) {
                let aeth = Aeth { syndrome, msn };
                prop_assert_eq!(Aeth::parse(&aeth.emit(), 0), Some(aeth));
            }
        }

        #[test]
        fn deth_and_probe_round_trip(qkey: u32, source_qpn in 0u32..0x0100_0000, token: u32) {
            let deth = Deth { qkey, source_qpn };
            prop_assert_eq!(Deth::parse(&deth.emit(), 0), Some(deth));
            let probe = Probe { token };
            prop_assert_eq!(Probe::parse(&probe.emit(), 0), Some(probe));
        }

        #[test]
        fn short_bytes_are_none(bytes in prop::collection::vec(any::<u8>(), 0..4), offset in 0usize..9) {
            prop_assert_eq!(Reth::parse(&bytes, offset), None);
            prop_assert_eq!(Deth::parse(&bytes, offset), None);
            prop_assert_eq!(Aeth::parse(&bytes, offset), None);
            prop_assert_eq!(Probe::parse(&bytes, offset), None);
        }
    }

    #[test]
    fn syndromes_of_the_table() {
        assert_eq!(Syndrome::Nak(NakCode::RemoteAccess).to_u8(), 0x62);
        assert_eq!(Syndrome::RnrNak(14).to_u8(), 0x2E);
        assert_eq!(Syndrome::from_u8(0x40), None);
    }
}
