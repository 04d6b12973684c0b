//! How the layers of a channel share the 56 slot bits of a reactor token.

use flexblk_reactor::Token;

/// The tokens that one channel may use: `owner` (8 bits), `channel` (24), layer (8), slot (24).
///
/// A thread with many channels gives them all one owner number and tells them apart with
/// [`Tokens::channel_of`]. Layers are the wrappers around a device, counted from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokens {
    owner: u8,
    channel: u32,
    layer: u8,
}

const SLOT_BITS: u32 = 24;
const LAYER_BITS: u32 = 8;
const CHANNEL_MASK: u32 = 0xff_ffff;

impl Tokens {
    /// The largest number of slots that a layer can name.
    pub(crate) const MAX_SLOTS: u32 = 1 << SLOT_BITS;

    /// Tokens with that owner number; only the low 24 bits of `channel` are kept.
    #[must_use]
    pub const fn new(owner: u8, channel: u32) -> Self {
        Self {
            owner,
            channel: channel & CHANNEL_MASK,
            layer: 0,
        }
    }

    /// The channel number in a token that came back.
    #[must_use]
    pub const fn channel_of(token: Token) -> u32 {
        (token.slot() >> (SLOT_BITS + LAYER_BITS)) as u32 & CHANNEL_MASK
    }

    /// The tokens of the device below a wrapper. `None`: more than 255 wrappers.
    pub(crate) fn below(self) -> Option<Self> {
        Some(Self {
            layer: self.layer.checked_add(1)?,
            ..self
        })
    }

    pub(crate) fn slot(self, slot: u32) -> Token {
        debug_assert!(slot < Self::MAX_SLOTS);
        Token::new(self.owner, self.prefix() | u64::from(slot))
    }

    /// The slot, if the token is of this owner, channel and layer.
    pub(crate) fn own(self, token: Token) -> Option<u32> {
        let ours =
            token.owner() == self.owner && token.slot() >> SLOT_BITS == self.prefix() >> SLOT_BITS;
        ours.then_some(token.slot() as u32 & (Self::MAX_SLOTS - 1))
    }

    fn prefix(self) -> u64 {
        (u64::from(self.channel) << LAYER_BITS | u64::from(self.layer)) << SLOT_BITS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_channels_and_layers_do_not_collide() {
        let outer = Tokens::new(3, 0xff_fffe);
        let inner = outer.below().expect("one wrapper");
        let token = inner.slot(Tokens::MAX_SLOTS - 1);
        assert_eq!(Tokens::channel_of(token), 0xff_fffe);
        assert_eq!(inner.own(token), Some(Tokens::MAX_SLOTS - 1));
        assert_eq!(outer.own(token), None);
        assert_eq!(Tokens::new(3, 1).own(token), None);
        assert_eq!(Tokens::new(4, 0xff_fffe).own(outer.slot(0)), None);
    }

    #[test]
    fn wrappers_are_bounded() {
        let mut tokens = Tokens::new(0, 0);
        for _ in 0..255 {
            tokens = tokens.below().expect("a layer");
        }
        assert_eq!(tokens.below(), None);
    }
}
