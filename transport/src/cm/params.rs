//! FlexiNS parameters in the private data of ConnectRequest and ConnectReply, and their negotiation.
//!
//! The first 40 bytes of private data are the application's (32 of NVMe/RDMA and 8 more), the next
//! 16 are ours. A peer that is not FlexiNS leaves them zero and gets standard RoCEv2.
//!
//! | byte | field                                                       |
//! |------|-------------------------------------------------------------|
//! | 0-3  | magic `FXNS`                                                |
//! | 4    | version                                                     |
//! | 5    | features ([`Features`])                                     |
//! | 6-7  | MTU: payload bytes per packet, a multiple of 64             |
//! | 8-9  | window: packets the sender of this may have outstanding     |
//! | 10-15| reserved, sent as zero, ignored                             |

use bitflags::bitflags;

/// Private-data bytes of the application before the parameters.
pub const PARAMS_OFFSET: usize = 40;
/// Encoded length of the parameters.
pub const PARAMS_LEN_BYTES: usize = 16;
/// Smallest FlexiNS MTU (payload bytes).
pub const MTU_MIN_BYTES: u16 = 1024;
/// Largest FlexiNS MTU (payload bytes): headers, trailer and payload fit a 64 KiB datagram.
pub const MTU_MAX_BYTES: u16 = 61_440;
/// Largest window: the receiver's bitmap (packets).
pub const WINDOW_MAX: u16 = 2048;

const MAGIC: [u8; 4] = *b"FXNS";
const VERSION: u8 = 1;

bitflags! {
    /// What a FlexiNS end can do, or, once negotiated, what the connection uses.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Features: u8 {
        /// CRC32C over every packet. The one feature that either end can impose.
        const CRC32C = 1 << 0;
        /// Selective acknowledgement (opcode 0xC0) and selective repeat.
        const SACK = 1 << 1;
        /// Cumulative acknowledgement in the trailer of every packet.
        const FACK = 1 << 2;
        /// Several self-contained packets in one datagram (opcode 0xC2).
        const PACKED = 1 << 3;
    }
}

/// Offered, or negotiated, FlexiNS parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Payload bytes that a packet may carry.
    pub mtu_bytes: u16,
    /// Packets that may be outstanding.
    pub window: u16,
    /// Features.
    pub features: Features,
}

impl Params {
    /// Brings every field into its legal range: the MTU is rounded down to a multiple of 64.
    #[must_use]
    pub fn clamped(self) -> Self {
        Self {
            mtu_bytes: self.mtu_bytes.clamp(MTU_MIN_BYTES, MTU_MAX_BYTES) / 64 * 64,
            window: self.window.clamp(1, WINDOW_MAX),
            features: self.features & Features::all(),
        }
    }

    /// What two ends with these parameters use: the smaller of each number, the features that both
    /// have, and CRC32C when either wants it.
    #[must_use]
    pub fn negotiate(self, peer: Self) -> Self {
        let both = self.features & peer.features;
        let digest = (self.features | peer.features) & Features::CRC32C;
        Self {
            mtu_bytes: self.mtu_bytes.min(peer.mtu_bytes),
            window: self.window.min(peer.window),
            features: both | digest,
        }
        .clamped()
    }

    /// Reads the parameters out of a private-data area; `None` when the peer sent none, or none
    /// that this version understands.
    #[must_use]
    pub fn parse(private: &[u8]) -> Option<Self> {
        let area: &[u8; PARAMS_LEN_BYTES] = private.get(PARAMS_OFFSET..)?.first_chunk()?;
        let [
            m0,
            m1,
            m2,
            m3,
            version,
            features,
            mtu0,
            mtu1,
            win0,
            win1,
            ..,
        ] = *area;
        if [m0, m1, m2, m3] != MAGIC || version < VERSION {
            return None;
        }
        let mtu_bytes = u16::from_be_bytes([mtu0, mtu1]);
        let window = u16::from_be_bytes([win0, win1]);
        if mtu_bytes < MTU_MIN_BYTES || window == 0 {
            return None;
        }
        let features = Features::from_bits_truncate(features);
        Some(
            Self {
                mtu_bytes,
                window,
                features,
            }
            .clamped(),
        )
    }

    /// Writes the parameters into a private-data area. False, and nothing written, when the area
    /// is too short.
    pub fn emit(&self, private: &mut [u8]) -> bool {
        let Some(area) = private.get_mut(PARAMS_OFFSET..PARAMS_OFFSET + PARAMS_LEN_BYTES) else {
            return false;
        };
        let [mtu0, mtu1] = self.mtu_bytes.to_be_bytes();
        let [win0, win1] = self.window.to_be_bytes();
        let [m0, m1, m2, m3] = MAGIC;
        let features = self.features.bits();
        area.copy_from_slice(&[
            m0, m1, m2, m3, VERSION, features, mtu0, mtu1, win0, win1, 0, 0, 0, 0, 0, 0,
        ]);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_params() -> impl Strategy<Value = Params> {
        (any::<u16>(), any::<u16>(), any::<u8>()).prop_map(|(mtu_bytes, window, features)| {
            let features = Features::from_bits_truncate(features);
            Params {
                mtu_bytes,
                window,
                features,
            }
            .clamped()
        })
    }

    proptest! {
        #[test]
        fn round_trip(params in any_params(), fill in any::<u8>()) {
            let mut private = [fill; 56];
            prop_assert!(params.emit(&mut private));
            prop_assert_eq!(Params::parse(&private), Some(params));
            prop_assert_eq!(&private[..PARAMS_OFFSET], &[fill; PARAMS_OFFSET]);
        }

        #[test]
        fn negotiation_is_symmetric_idempotent_and_never_exceeds(a in any_params(), b in any_params()) {
            let agreed = a.negotiate(b);
            prop_assert_eq!(agreed, b.negotiate(a));
            prop_assert_eq!(agreed, agreed.negotiate(a));
            prop_assert!(agreed.mtu_bytes <= a.mtu_bytes.min(b.mtu_bytes));
            prop_assert!(agreed.window <= a.window.min(b.window));
            let optional = agreed.features - Features::CRC32C;
            prop_assert!((a.features & b.features).contains(optional));
        }

        #[test]
        fn parse_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Some(params) = Params::parse(&bytes) {
                prop_assert_eq!(params, params.clamped());
            }
        }
    }

    #[test]
    fn zeroes_are_no_parameters() {
        assert_eq!(Params::parse(&[0; 56]), None);
        assert_eq!(Params::parse(&[]), None);
    }

    #[test]
    fn digest_wins() {
        let features = Features::SACK | Features::FACK;
        let without = Params {
            mtu_bytes: 4096,
            window: 1024,
            features,
        };
        let with = Params {
            features: features | Features::CRC32C,
            ..without
        };
        assert_eq!(
            without.negotiate(with).features,
            features | Features::CRC32C
        );
        assert_eq!(without.negotiate(without).features, features);
    }
}
