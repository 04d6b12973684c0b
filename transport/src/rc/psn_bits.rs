//! A bit per sequence number of a window: a ring of 2048 bits that moves with the window.

use crate::wire::Psn;

/// Sequence numbers that a ring can tell apart.
pub(crate) const WINDOW_BITS: u32 = 2048;
const WORDS: usize = WINDOW_BITS as usize / 64;

/// The ring. Bits outside the window are zero.
#[derive(Clone)]
pub(crate) struct PsnBits([u64; WORDS]);

/// Pieces of a range that lie in one word each: (word, mask).
fn pieces(from: Psn, count: u32) -> impl Iterator<Item = (usize, u64)> {
    let mut at = from.get() % WINDOW_BITS;
    let mut left = count.min(WINDOW_BITS);
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let bit = at % 64;
        let len = left.min(64 - bit);
        let mask = (u64::MAX >> (64 - len)) << bit;
        let word = (at / 64) as usize;
        at = (at + len) % WINDOW_BITS;
        left -= len;
        Some((word, mask))
    })
}

impl PsnBits {
    pub(crate) const fn new() -> Self {
        Self([0; WORDS])
    }

    pub(crate) fn reset(&mut self) {
        self.0 = [0; WORDS];
    }

    #[inline]
    const fn place(psn: Psn) -> (usize, u64) {
        let at = psn.get() % WINDOW_BITS;
        ((at / 64) as usize, 1 << (at % 64))
    }

    #[inline]
    pub(crate) fn get(&self, psn: Psn) -> bool {
        let (word, bit) = Self::place(psn);
        self.0[word] & bit != 0
    }

    /// Sets a bit; true when it was clear.
    #[inline]
    pub(crate) fn set(&mut self, psn: Psn) -> bool {
        let (word, bit) = Self::place(psn);
        let fresh = self.0[word] & bit == 0;
        self.0[word] |= bit;
        fresh
    }

    #[inline]
    pub(crate) fn clear(&mut self, psn: Psn) {
        let (word, bit) = Self::place(psn);
        self.0[word] &= !bit;
    }

    pub(crate) fn set_range(&mut self, from: Psn, count: u32) {
        for (word, mask) in pieces(from, count) {
            self.0[word] |= mask;
        }
    }

    pub(crate) fn clear_range(&mut self, from: Psn, count: u32) {
        for (word, mask) in pieces(from, count) {
            self.0[word] &= !mask;
        }
    }

    /// Sets the bits of a range where `except` is clear; how many were clear before.
    pub(crate) fn set_range_except(&mut self, from: Psn, count: u32, except: &Self) -> u32 {
        let mut fresh = 0;
        for (word, mask) in pieces(from, count) {
            let add = mask & !except.0[word] & !self.0[word];
            fresh += add.count_ones();
            self.0[word] |= add;
        }
        fresh
    }

    /// Clears the bits that are set in `done`.
    pub(crate) fn clear_where(&mut self, done: &Self) {
        for (word, done) in self.0.iter_mut().zip(&done.0) {
            *word &= !done;
        }
    }

    pub(crate) fn count_range(&self, from: Psn, count: u32) -> u32 {
        pieces(from, count)
            .map(|(word, mask)| (self.0[word] & mask).count_ones())
            .sum()
    }

    /// How many set bits follow each other from `from` on, at most `limit`.
    pub(crate) fn ones_from(&self, from: Psn, limit: u32) -> u32 {
        let mut run = 0;
        for (word, mask) in pieces(from, limit) {
            let shift = mask.trailing_zeros();
            let ones = (self.0[word] >> shift)
                .trailing_ones()
                .min(mask.count_ones());
            run += ones;
            if ones < mask.count_ones() {
                break;
            }
        }
        run
    }

    /// Distance from `from` to the first set bit, within `limit`.
    pub(crate) fn first_set(&self, from: Psn, limit: u32) -> Option<u32> {
        let mut before = 0;
        for (word, mask) in pieces(from, limit) {
            let found = self.0[word] & mask;
            if found != 0 {
                return Some(before + found.trailing_zeros() - mask.trailing_zeros());
            }
            before += mask.count_ones();
        }
        None
    }

    /// Distance from `from` to the last set bit, within `limit`.
    pub(crate) fn last_set(&self, from: Psn, limit: u32) -> Option<u32> {
        let mut before = 0;
        let mut last = None;
        for (word, mask) in pieces(from, limit) {
            let found = self.0[word] & mask;
            if found != 0 {
                last = Some(before + 63 - found.leading_zeros() - mask.trailing_zeros());
            }
            before += mask.count_ones();
        }
        last
    }

    /// 64 bits from `from` on, the first in the lowest bit.
    pub(crate) fn word_from(&self, from: Psn) -> u64 {
        let at = from.get() % WINDOW_BITS;
        let (word, shift) = ((at / 64) as usize, at % 64);
        let low = self.0[word] >> shift;
        if shift == 0 {
            low
        } else {
            low | self.0[(word + 1) % WORDS] << (64 - shift)
        }
    }

    #[cfg(test)]
    pub(crate) fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Every operation against a plain array, across the wrap of the ring and of the PSN.
        #[test]
        fn equals_an_array(
            start in prop_oneof![Just(0x00FF_FF00u32), 0u32..0x0100_0000],
            sets in prop::collection::vec((0u32..WINDOW_BITS, 1u32..200), 0..12),
            from in 0u32..WINDOW_BITS,
            limit in 0u32..WINDOW_BITS,
        ) {
            let base = Psn::new(start);
            let mut bits = PsnBits::new();
            let mut model = vec![false; WINDOW_BITS as usize];
            for (index, (at, count)) in sets.into_iter().enumerate() {
                let count = count.min(WINDOW_BITS - at);
                let on = index % 3 != 2;
                if on { bits.set_range(base.add(at), count) } else { bits.clear_range(base.add(at), count) }
                model[at as usize..(at + count) as usize].fill(on);
            }
            let limit = limit.min(WINDOW_BITS - from);
            let part = &model[from as usize..(from + limit) as usize];
            let at = base.add(from);
            prop_assert_eq!(bits.first_set(at, limit), part.iter().position(|b| *b).map(|p| p as u32));
            prop_assert_eq!(bits.last_set(at, limit), part.iter().rposition(|b| *b).map(|p| p as u32));
            prop_assert_eq!(bits.ones_from(at, limit), part.iter().take_while(|b| **b).count() as u32);
            prop_assert_eq!(bits.count_range(at, limit), part.iter().filter(|b| **b).count() as u32);
            let word = bits.word_from(at);
            for (i, bit) in part.iter().take(64).enumerate() {
                prop_assert_eq!(word >> i & 1 == 1, *bit);
                prop_assert_eq!(bits.get(at.add(i as u32)), *bit);
            }
            prop_assert_eq!(bits.count(), model.iter().filter(|b| **b).count() as u32);
        }
    }
}
