//! Scatter gather list descriptors (Base 4.3.2): the one that a capsule carries in its data pointer.

use crate::status::{Status, StatusCode};

/// Length of a descriptor in bytes.
pub const SIZE: usize = 16;

/// A descriptor: where a command's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sgl {
    /// Data Block (0h), sub type Address: memory of the host.
    Address {
        /// Host memory address.
        address: u64,
        /// Length in bytes.
        length: u32,
    },
    /// Data Block (0h), sub type Offset: data in the capsule itself.
    InCapsule {
        /// From the start of the capsule's data, which follows its SQE and ICDOFF.
        offset: u64,
        /// Length in bytes.
        length: u32,
    },
    /// Bit Bucket (1h): data that the host does not want.
    BitBucket {
        /// Length in bytes.
        length: u32,
    },
    /// Segment (2h): address of more descriptors.
    Segment {
        /// Address, or offset into the capsule.
        address: u64,
        /// Length in bytes.
        length: u32,
        /// The address is an offset into the capsule.
        in_capsule: bool,
    },
    /// Last Segment (3h): address of the last descriptors.
    LastSegment {
        /// Address, or offset into the capsule.
        address: u64,
        /// Length in bytes.
        length: u32,
        /// The address is an offset into the capsule.
        in_capsule: bool,
    },
    /// Keyed Data Block (4h): memory of the host that an RDMA key opens.
    Keyed {
        /// Address within the keyed region.
        address: u64,
        /// Length in bytes, 24 bits.
        length: u32,
        /// Remote key.
        key: u32,
        /// Sub type Fh: the key is to be invalidated remotely with the response.
        invalidate: bool,
    },
    /// Transport Data Block (5h), sub type Ah: the transport knows where (NVMe/TCP).
    Transport {
        /// Length in bytes.
        length: u32,
    },
}

// Byte 15: descriptor type in 7:4, sub type in 3:0 (Base 4.3.2, SGL Descriptor Type and Sub Type).
const DATA_ADDRESS: u8 = 0x00;
const DATA_OFFSET: u8 = 0x01;
const BIT_BUCKET: u8 = 0x10;
const SEGMENT: u8 = 0x20;
const SEGMENT_OFFSET: u8 = 0x21;
const LAST_SEGMENT: u8 = 0x30;
const LAST_SEGMENT_OFFSET: u8 = 0x31;
const KEYED: u8 = 0x40;
const KEYED_INVALIDATE: u8 = 0x4F;
const TRANSPORT: u8 = 0x5A;

impl Sgl {
    /// No data, as NVMe/RDMA hosts write it: a keyed descriptor of length 0.
    pub const NONE: Self = Self::Keyed {
        address: 0,
        length: 0,
        key: 0,
        invalidate: false,
    };

    /// No data, as NVMe/TCP hosts write it: a transport descriptor of length 0.
    pub const NONE_TRANSPORT: Self = Self::Transport { length: 0 };

    /// Longest keyed data block.
    pub const MAX_KEYED_LEN: u32 = (1 << 24) - 1;

    /// Reads a descriptor. An unknown type or sub type is *SGL Descriptor Type Invalid*.
    #[inline]
    pub fn parse(bytes: &[u8; SIZE]) -> Result<Self, Status> {
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            l0,
            l1,
            l2,
            l3,
            k1,
            k2,
            k3,
            kind,
        ] = *bytes;
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        Ok(match kind {
            DATA_ADDRESS => Self::Address { address, length },
            DATA_OFFSET => Self::InCapsule {
                offset: address,
                length,
            },
            BIT_BUCKET => Self::BitBucket { length },
            SEGMENT | SEGMENT_OFFSET => Self::Segment {
                address,
                length,
                in_capsule: kind == SEGMENT_OFFSET,
            },
            LAST_SEGMENT | LAST_SEGMENT_OFFSET => Self::LastSegment {
                address,
                length,
                in_capsule: kind == LAST_SEGMENT_OFFSET,
            },
            // Keyed: length in bytes 10:8, key in bytes 14:11.
            KEYED | KEYED_INVALIDATE => Self::Keyed {
                address,
                length: length & Self::MAX_KEYED_LEN,
                key: u32::from_le_bytes([l3, k1, k2, k3]),
                invalidate: kind == KEYED_INVALIDATE,
            },
            TRANSPORT => Self::Transport { length },
            _ => return Err(StatusCode::SglDescriptorTypeInvalid.dnr()),
        })
    }

    /// The 16 bytes. A keyed length above 24 bits is a bug of the caller and is cut in release
    /// builds.
    #[inline]
    #[must_use]
    pub fn emit(&self) -> [u8; SIZE] {
        let (address, length, key, kind) = match *self {
            Self::Address { address, length } => (address, length, 0, DATA_ADDRESS),
            Self::InCapsule { offset, length } => (offset, length, 0, DATA_OFFSET),
            Self::BitBucket { length } => (0, length, 0, BIT_BUCKET),
            Self::Segment {
                address,
                length,
                in_capsule,
            } => (
                address,
                length,
                0,
                if in_capsule { SEGMENT_OFFSET } else { SEGMENT },
            ),
            Self::LastSegment {
                address,
                length,
                in_capsule,
            } => (
                address,
                length,
                0,
                if in_capsule {
                    LAST_SEGMENT_OFFSET
                } else {
                    LAST_SEGMENT
                },
            ),
            Self::Keyed {
                address,
                length,
                key,
                invalidate,
            } => {
                debug_assert!(length <= Self::MAX_KEYED_LEN);
                let [k0, _, _, _] = key.to_le_bytes();
                let length = length & Self::MAX_KEYED_LEN | u32::from(k0) << 24;
                (
                    address,
                    length,
                    key >> 8,
                    if invalidate { KEYED_INVALIDATE } else { KEYED },
                )
            }
            Self::Transport { length } => (0, length, 0, TRANSPORT),
        };
        let mut bytes = [0; SIZE];
        let last = u64::from(length) | u64::from(key & 0xFF_FFFF) << 32 | u64::from(kind) << 56;
        let (low, high) = bytes.split_at_mut(8);
        low.copy_from_slice(&address.to_le_bytes());
        high.copy_from_slice(&last.to_le_bytes());
        bytes
    }

    /// Length of the data it describes, in bytes (of the descriptors, for segments).
    #[inline]
    #[must_use]
    pub const fn length(&self) -> u32 {
        match *self {
            Self::Address { length, .. }
            | Self::InCapsule { length, .. }
            | Self::BitBucket { length }
            | Self::Segment { length, .. }
            | Self::LastSegment { length, .. }
            | Self::Keyed { length, .. }
            | Self::Transport { length } => length,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keyed_bytes() {
        let sgl = Sgl::Keyed {
            address: 0x0102_0304_0506_0708,
            length: 0x00A1_B2C3,
            key: 0xDEAD_BEEF,
            invalidate: true,
        };
        let bytes = [
            8, 7, 6, 5, 4, 3, 2, 1, 0xC3, 0xB2, 0xA1, 0xEF, 0xBE, 0xAD, 0xDE, 0x4F,
        ];
        assert_eq!(sgl.emit(), bytes);
        assert_eq!(Sgl::parse(&bytes), Ok(sgl));
    }

    #[test]
    fn unknown_types_are_refused() {
        let mut bytes = [0; SIZE];
        for kind in [0x02, 0x11, 0x41, 0x50, 0x60, 0xF0] {
            bytes[15] = kind;
            assert_eq!(
                Sgl::parse(&bytes),
                Err(StatusCode::SglDescriptorTypeInvalid.dnr())
            );
        }
    }

    proptest! {
        #[test]
        fn what_is_understood_round_trips(mut bytes in any::<[u8; SIZE]>(), kind in 0usize..16) {
            const KINDS: [u8; 10] = [0, 1, 0x10, 0x20, 0x21, 0x30, 0x31, 0x40, 0x4F, 0x5A];
            if let Some(kind) = KINDS.get(kind) {
                bytes[15] = *kind;
            }
            if let Ok(sgl) = Sgl::parse(&bytes) {
                prop_assert_eq!(Sgl::parse(&sgl.emit()), Ok(sgl));
                prop_assert!(sgl.length() == u32::from_le_bytes(bytes[8..12].try_into().unwrap()) || bytes[15] & 0xF0 == 0x40);
            }
        }
    }
}
