//! End of a packet: CRC32C, before it the piggy-backed acknowledgement of FlexiNS.
//!
//! | framing  | bytes                                             |
//! |----------|---------------------------------------------------|
//! | standard | CRC32C (4), where RoCE has its ICRC               |
//! | FlexiNS  | flags (1), cumulative PSN (3), CRC32C (4)         |
//!
//! The CRC covers everything before it and is little endian, as iSCSI's digests are (RFC 7143,
//! 13.1). It is zero when the connection was set up without digests.

use super::Psn;

/// Trailer towards a standard peer, and of datagrams to queue pair 1.
pub const STANDARD_LEN_BYTES: usize = 4;
/// Trailer between FlexiNS peers.
pub const FLEXINS_LEN_BYTES: usize = 8;
/// Length of the piggy-backed acknowledgement.
pub const FACK_LEN_BYTES: usize = 4;
/// Longest trailer slot of a packet: pad and FlexiNS trailer.
pub const SLOT_MAX_BYTES: usize = 3 + FLEXINS_LEN_BYTES;

const FLAG_VALID: u8 = 1 << 0;

/// Piggy-backed acknowledgement: last PSN that the sender of the packet has received in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fack {
    /// `None`: the packet acknowledges nothing.
    pub cumulative: Option<Psn>,
}

impl Fack {
    /// Decodes.
    #[inline]
    #[must_use]
    pub const fn parse(bytes: [u8; FACK_LEN_BYTES]) -> Self {
        let word = u32::from_be_bytes(bytes);
        let valid = (word >> 24) as u8 & FLAG_VALID != 0;
        Self {
            cumulative: if valid { Some(Psn::new(word)) } else { None },
        }
    }

    /// Encodes.
    #[inline]
    #[must_use]
    pub const fn emit(self) -> [u8; FACK_LEN_BYTES] {
        match self.cumulative {
            Some(psn) => ((FLAG_VALID as u32) << 24 | psn.get()).to_be_bytes(),
            None => [0; FACK_LEN_BYTES],
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trip(psn: Option<u32>) {
            let fack = Fack { cumulative: psn.map(Psn::new) };
            prop_assert_eq!(Fack::parse(fack.emit()), fack);
        }
    }
}
