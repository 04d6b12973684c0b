//! Wire formats of RoCEv2 (IBA volume 1 chapter 9, annex A17) and FlexiNS's additions.
//!
//! `BTH 12 | RETH 16 / AETH 4 | ImmDt 4 / IETH 4 | payload | pad | trailer`, big endian. The trailer
//! is a 4-byte CRC32C towards a standard peer and [`trailer::Fack`] plus CRC32C between FlexiNS
//! peers. Decoding never panics: it answers `None` for what is too short.

mod bth;
mod headers;
mod opcode;
mod psn;
pub mod sack;
pub mod trailer;

pub use bth::{BTH_LEN_BYTES, Bth, PARTITION_KEY};
pub use headers::{
    AETH_LEN_BYTES, Aeth, DETH_LEN_BYTES, Deth, IETH_LEN_BYTES, IMM_LEN_BYTES, NakCode,
    PROBE_LEN_BYTES, Probe, RETH_LEN_BYTES, Reth, Syndrome,
};
pub use opcode::Opcode;
pub use psn::Psn;

/// UDP port of RoCEv2 (IBA annex A17.7).
pub const ROCE_UDP_PORT: u16 = 4791;

/// Bytes of `bytes` at `offset` as an array.
pub(crate) fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

/// Big-endian word at `offset`.
pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    array_at(bytes, offset).map(u32::from_be_bytes)
}
