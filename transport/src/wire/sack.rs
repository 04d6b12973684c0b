//! FlexiNS selective acknowledgement (opcode 0xC0).
//!
//! | byte | field                                                                   |
//! |------|-------------------------------------------------------------------------|
//! | 0-11 | BTH; its PSN is the last one received in order                          |
//! | 12   | flags: bit 0 the echo is valid                                          |
//! | 13   | bitmap length in words of 64 bits, 0-32                                 |
//! | 14-15| reserved, zero                                                          |
//! | 16-19| echo: token of the probe that this answers                              |
//! | 20-  | bitmap: bit i (of word i/64, least significant first) is PSN cum + 2 + i |
//!
//! PSN cum + 1 is missing by definition, so the bitmap starts with the one after it.

use super::{BTH_LEN_BYTES, Bth, Psn, array_at};

/// Words of the bitmap at most: the window of 2048 packets.
pub const WORDS_MAX: usize = 32;
/// Length before the bitmap, after the BTH.
pub const FIXED_LEN_BYTES: usize = 8;
/// Longest message before its trailer.
pub const LEN_MAX_BYTES: usize = BTH_LEN_BYTES + FIXED_LEN_BYTES + WORDS_MAX * 8;

const FLAG_ECHO: u8 = 1 << 0;

/// A selective acknowledgement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sack {
    /// Last PSN received in order.
    pub cumulative: Psn,
    /// Token of the probe that asked.
    pub echo: Option<u32>,
    /// Words of the bitmap that are in use.
    pub words: usize,
    /// What was received beyond `cumulative + 1`.
    pub bitmap: [u64; WORDS_MAX],
}

impl Sack {
    /// Decodes what follows `bth`; `body` is the packet without BTH and trailer.
    #[must_use]
    pub fn parse(bth: &Bth, body: &[u8]) -> Option<Self> {
        let [flags, words, _, _, e0, e1, e2, e3] = array_at(body, 0)?;
        let words = usize::from(words);
        let tail = body.get(FIXED_LEN_BYTES..)?;
        if words > WORDS_MAX || tail.len() != words * 8 {
            return None;
        }
        let mut bitmap = [0; WORDS_MAX];
        for (word, bytes) in bitmap.iter_mut().zip(tail.as_chunks::<8>().0) {
            *word = u64::from_be_bytes(*bytes);
        }
        let echo = (flags & FLAG_ECHO != 0).then(|| u32::from_be_bytes([e0, e1, e2, e3]));
        Some(Self {
            cumulative: bth.psn,
            echo,
            words,
            bitmap,
        })
    }

    /// Length of the body: what [`Sack::emit`] writes.
    #[must_use]
    pub const fn body_len(&self) -> usize {
        FIXED_LEN_BYTES + self.words * 8
    }

    /// Writes the body; false, and nothing useful written, when `body` is not [`Sack::body_len`] long.
    #[must_use]
    pub fn emit(&self, body: &mut [u8]) -> bool {
        if body.len() != self.body_len() {
            return false;
        }
        let Some((fixed, tail)) = body.split_first_chunk_mut::<FIXED_LEN_BYTES>() else {
            return false;
        };
        let flags = if self.echo.is_some() { FLAG_ECHO } else { 0 };
        let [e0, e1, e2, e3] = self.echo.unwrap_or_default().to_be_bytes();
        *fixed = [flags, self.words as u8, 0, 0, e0, e1, e2, e3];
        for (bytes, word) in tail.as_chunks_mut::<8>().0.iter_mut().zip(&self.bitmap) {
            *bytes = word.to_be_bytes();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::verbs::Qpn;
    use crate::wire::Opcode;

    fn bth(psn: u32) -> Bth {
        Bth {
            opcode: Opcode::Sack,
            solicited: false,
            pad: 0,
            dest_qpn: Qpn::new(5),
            ack_req: false,
            psn: Psn::new(psn),
        }
    }

    proptest! {
        #[test]
        fn round_trip(psn: u32, echo: Option<u32>, words in prop::collection::vec(any::<u64>(), 0..=WORDS_MAX)) {
            let mut bitmap = [0; WORDS_MAX];
            bitmap[..words.len()].copy_from_slice(&words);
            let sack = Sack { cumulative: Psn::new(psn), echo, words: words.len(), bitmap };
            let mut body = vec![0; sack.body_len()];
            prop_assert!(sack.emit(&mut body));
            prop_assert_eq!(Sack::parse(&bth(psn), &body), Some(sack));
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Some(sack) = Sack::parse(&bth(0), &bytes) {
                prop_assert_eq!(sack.body_len(), bytes.len());
            }
        }
    }
}
