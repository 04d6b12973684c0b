//! Packet sequence numbers: 24 bits, compared within half the circle (IBA 9.7.1).

use std::fmt;

const MASK: u32 = 0x00FF_FFFF;
const HALF: u32 = 0x0080_0000;

/// A packet sequence number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Psn(u32);

impl Psn {
    /// The sequence number in the low 24 bits of `value`.
    #[must_use]
    pub const fn new(value: u32) -> Self {
        Self(value & MASK)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }

    /// `count` packets later.
    #[must_use]
    #[allow(clippy::should_implement_trait)] // circular: `+` would promise more
    pub const fn add(self, count: u32) -> Self {
        Self(self.0.wrapping_add(count) & MASK)
    }

    /// `count` packets earlier.
    #[must_use]
    #[allow(clippy::should_implement_trait)]
    pub const fn sub(self, count: u32) -> Self {
        Self(self.0.wrapping_sub(count) & MASK)
    }

    /// The packet after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        self.add(1)
    }

    /// The packet before this one.
    #[must_use]
    pub const fn previous(self) -> Self {
        self.sub(1)
    }

    /// How many packets from `earlier` forward to this one, 0..2^24.
    #[must_use]
    pub const fn distance_from(self, earlier: Self) -> u32 {
        self.0.wrapping_sub(earlier.0) & MASK
    }

    /// Whether this comes strictly before `other` on the shorter way round.
    #[must_use]
    pub const fn is_before(self, other: Self) -> bool {
        let distance = other.distance_from(self);
        distance != 0 && distance < HALF
    }
}

impl fmt::Debug for Psn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Psn({:#08x})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn circular_arithmetic(start in 0..=MASK, step in 0..HALF) {
            let psn = Psn::new(start);
            prop_assert_eq!(psn.add(step).distance_from(psn), step);
            prop_assert_eq!(psn.add(step).sub(step), psn);
            prop_assert_eq!(psn.is_before(psn.add(step)), step != 0);
            prop_assert!(!psn.add(step).is_before(psn));
        }
    }

    #[test]
    fn wraps_after_24_bits() {
        assert_eq!(Psn::new(MASK).next(), Psn::new(0));
        assert_eq!(Psn::new(0).previous(), Psn::new(MASK));
        assert!(Psn::new(MASK).is_before(Psn::new(0)));
    }
}
