//! What NVMe over FlexiNS adds to NVMe/RDMA: parameters in the connection request, and completions
//! that fit into a 32-bit immediate.
//!
//! Both are offers: the initiator writes [`NvmeParams`] into reserved bytes of its NVMe/RDMA
//! private data ([`crate::rdma::RequestPrivate::extension`]), a target that knows them answers with
//! the parameters in force, and any other leaves zeros, which [`NvmeParams::parse`] does not take.

use bitflags::bitflags;

use crate::ids::Cid;
use crate::status::Status;
use crate::{U16, U32};

/// A completion in the immediate data of RDMA WRITE WITH IMMEDIATE or SEND WITH IMMEDIATE.
///
/// Laid out as dword 3 of a CQE with its halves exchanged: command identifier in 31:16, Status
/// Field in 15:1. Bit 0 is 1 in every completion, so that an immediate of 0 is never one. The
/// result (dwords 0 and 1) of such a completion is 0 and SQHD has no meaning: they are sent only
/// for commands without a result and with SQ flow control disabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Immediate {
    /// Command completed.
    pub cid: Cid,
    /// How it ended.
    pub status: Status,
}

impl Immediate {
    const MARK: u32 = 1;

    /// A successful completion.
    #[inline]
    #[must_use]
    pub const fn success(cid: Cid) -> Self {
        Self {
            cid,
            status: Status::SUCCESS,
        }
    }

    /// The 32 bits.
    #[inline]
    #[must_use]
    pub const fn to_bits(self) -> u32 {
        (self.cid.get() as u32) << 16 | (self.status.bits() as u32) << 1 | Self::MARK
    }

    /// From the 32 bits; `None` when bit 0 says that it is no completion.
    #[inline]
    #[must_use]
    pub const fn from_bits(bits: u32) -> Option<Self> {
        if bits & Self::MARK == 0 {
            return None;
        }
        Some(Self {
            cid: Cid::new((bits >> 16) as u16),
            status: Status::from_bits((bits as u16) >> 1),
        })
    }
}

wire! {
    /// The 8 bytes that carry [`NvmeParams`].
    pub struct NvmeParamsWire: 8 {
        /// [`NvmeParams::MAGIC`].
        0 => pub magic: U16,
        /// [`NvmeParams::VERSION`].
        2 => pub version: u8,
        /// [`ParamFlags`].
        3 => pub flags: u8,
        /// Most bytes of data in a command capsule, beyond its SQE.
        4 => pub in_capsule_bytes: U32,
    }
}

bitflags! {
    /// Switches of [`NvmeParams`]. A bit that is not known is not offered back.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ParamFlags: u8 {
        /// Successful completions without a result may come as [`Immediate`].
        const IMMEDIATE_COMPLETIONS = 1 << 0;
    }
}

/// FlexiNS parameters of an NVMe queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NvmeParams {
    /// Most bytes of data in a command capsule, beyond its SQE. On the Admin queue the
    /// specification's 8192 at least.
    pub in_capsule_bytes: u32,
    /// Switches.
    pub flags: ParamFlags,
}

impl NvmeParams {
    /// "FX", little endian.
    pub const MAGIC: u16 = u16::from_le_bytes(*b"FX");
    /// Version of the layout. Later versions may only give reserved bits a meaning.
    pub const VERSION: u8 = 1;

    /// The 8 bytes.
    #[must_use]
    pub fn emit(&self) -> [u8; 8] {
        zerocopy::transmute!(NvmeParamsWire {
            magic: U16::new(Self::MAGIC),
            version: Self::VERSION,
            flags: self.flags.bits(),
            in_capsule_bytes: U32::new(self.in_capsule_bytes),
        })
    }

    /// Reads them; `None` when the peer does not speak FlexiNS-NVMe (no magic, version 0).
    #[must_use]
    pub fn parse(bytes: &[u8; 8]) -> Option<Self> {
        let wire: NvmeParamsWire = zerocopy::transmute!(*bytes);
        if wire.magic.get() != Self::MAGIC || wire.version == 0 {
            return None;
        }
        Some(Self {
            in_capsule_bytes: wire.in_capsule_bytes.get(),
            flags: ParamFlags::from_bits_truncate(wire.flags),
        })
    }

    /// What is in force between an offer and what this side can do: the lesser of each.
    #[must_use]
    pub fn agree(&self, own: &Self) -> Self {
        Self {
            in_capsule_bytes: self.in_capsule_bytes.min(own.in_capsule_bytes),
            flags: self.flags & own.flags,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::StatusCode;
    use proptest::prelude::*;

    #[test]
    fn immediate_bits() {
        assert_eq!(Immediate::success(Cid::new(0x1234)).to_bits(), 0x1234_0001);
        let failed = Immediate {
            cid: Cid::new(1),
            status: StatusCode::LbaOutOfRange.dnr(),
        };
        assert_eq!(failed.to_bits(), 0x0001_8101);
        assert_eq!(Immediate::from_bits(0), None);
    }

    #[test]
    fn zeros_are_no_parameters() {
        assert_eq!(NvmeParams::parse(&[0; 8]), None);
    }

    #[test]
    fn agreement_is_the_lesser() {
        let offer = NvmeParams {
            in_capsule_bytes: 8192,
            flags: ParamFlags::IMMEDIATE_COMPLETIONS,
        };
        let own = NvmeParams {
            in_capsule_bytes: 16384,
            flags: ParamFlags::empty(),
        };
        let agreed = NvmeParams {
            in_capsule_bytes: 8192,
            flags: ParamFlags::empty(),
        };
        assert_eq!(offer.agree(&own), agreed);
    }

    proptest! {
        #[test]
        fn immediates_round_trip(bits in any::<u32>()) {
            match Immediate::from_bits(bits) {
                Some(immediate) => prop_assert_eq!(immediate.to_bits(), bits),
                None => prop_assert_eq!(bits & 1, 0),
            }
        }

        #[test]
        fn parameters_round_trip(in_capsule_bytes: u32, flags: u8) {
            let params = NvmeParams { in_capsule_bytes, flags: ParamFlags::from_bits_truncate(flags) };
            prop_assert_eq!(NvmeParams::parse(&params.emit()), Some(params));
        }

        #[test]
        fn random_bytes_are_judged(bytes in any::<[u8; 8]>()) {
            let _ = NvmeParams::parse(&bytes);
        }
    }
}
