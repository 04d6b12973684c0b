//! Keys that a peer cannot guess: the ChaCha8 stream (D. J. Bernstein, 2008) of the engine's seed.
//!
//! Peers see rkeys, QPNs and PSNs; with a plain generator they could work out the next ones.

/// A stream of random words.
pub(crate) struct Random {
    key: [u32; 8],
    counter: u64,
    block: [u32; 16],
    used: usize,
}

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        let mut key = [0; 8];
        key[0] = seed as u32;
        key[1] = (seed >> 32) as u32;
        Self {
            key,
            counter: 0,
            block: [0; 16],
            used: 16,
        }
    }

    pub(crate) fn next_u32(&mut self) -> u32 {
        if self.used >= self.block.len() {
            self.block = chacha8(&self.key, self.counter);
            self.counter += 1;
            self.used = 0;
        }
        let word = self.block.get(self.used).copied().unwrap_or_default();
        self.used += 1;
        word
    }
}

fn chacha8(key: &[u32; 8], counter: u64) -> [u32; 16] {
    let start: [u32; 16] = [
        0x6170_7865,
        0x3320_646e,
        0x7962_2d32,
        0x6b20_6574,
        key[0],
        key[1],
        key[2],
        key[3],
        key[4],
        key[5],
        key[6],
        key[7],
        counter as u32,
        (counter >> 32) as u32,
        0,
        0,
    ];
    let mut x = start;
    let mut quarter = |a: usize, b: usize, c: usize, d: usize| {
        x[a] = x[a].wrapping_add(x[b]);
        x[d] = (x[d] ^ x[a]).rotate_left(16);
        x[c] = x[c].wrapping_add(x[d]);
        x[b] = (x[b] ^ x[c]).rotate_left(12);
        x[a] = x[a].wrapping_add(x[b]);
        x[d] = (x[d] ^ x[a]).rotate_left(8);
        x[c] = x[c].wrapping_add(x[d]);
        x[b] = (x[b] ^ x[c]).rotate_left(7);
    };
    for _ in 0..4 {
        quarter(0, 4, 8, 12);
        quarter(1, 5, 9, 13);
        quarter(2, 6, 10, 14);
        quarter(3, 7, 11, 15);
        quarter(0, 5, 10, 15);
        quarter(1, 6, 11, 12);
        quarter(2, 7, 8, 13);
        quarter(3, 4, 9, 14);
    }
    for (word, first) in x.iter_mut().zip(start) {
        *word = word.wrapping_add(first);
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chacha8_test_vector() {
        // Zero key and nonce, block 0: draft-strombergson-chacha-test-vectors-01, TC1, 8 rounds.
        let bytes: Vec<u8> = chacha8(&[0; 8], 0)
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect();
        assert_eq!(bytes[..8], [0x3e, 0x00, 0xef, 0x2f, 0x89, 0x5f, 0x40, 0xd6]);
    }

    #[test]
    fn seeds_repeat_and_differ() {
        let take = |seed| {
            let mut random = Random::new(seed);
            (0..40).map(|_| random.next_u32()).collect::<Vec<_>>()
        };
        assert_eq!(take(7), take(7));
        assert_ne!(take(7), take(8));
    }
}
