//! Times of RNR NAKs (IBA table 47).

/// Times by code, in units of 10 us.
const UNITS_10US: [u64; 32] = [
    65_536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1_024,
    1_536, 2_048, 3_072, 4_096, 6_144, 8_192, 12_288, 16_384, 24_576, 32_768, 49_152,
];

/// The time that a code stands for.
pub(crate) fn delay_ns(code: u8) -> u64 {
    UNITS_10US
        .get(usize::from(code & 0x1F))
        .map_or(0, |units| units * 10_000)
}

/// The code of the shortest time that is at least `delay_ns`; the longest one if there is none.
pub(crate) fn code_for(delay_ns: u64) -> u8 {
    let wanted = delay_ns.div_ceil(10_000);
    (1..32)
        .find(|&code| UNITS_10US[usize::from(code)] >= wanted)
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_round_up() {
        assert_eq!(code_for(0), 1);
        assert_eq!(code_for(320_000), 10);
        assert_eq!(code_for(320_001), 11);
        assert_eq!(code_for(u64::MAX), 0);
        assert_eq!(delay_ns(0), 655_360_000);
        for code in 1..32 {
            assert_eq!(code_for(delay_ns(code)), code);
        }
    }
}
