//! Sizes as people type them: `512`, `64K`, `1G`, `1GiB`, `2T`.

use std::fmt;

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no size: give a number with K, M, G or T behind it (powers of 1024), as in 64M")]
pub struct SizeError(String);

/// Bytes of a text like `1G`; the unit is a power of 1024, upper or lower case, `iB` and `B` may
/// follow it.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let wrong = || SizeError(text.to_owned());
    let trimmed = text.trim();
    let digits = trimmed
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    number
        .checked_shl(shift)
        .filter(|bytes| bytes >> shift == number)
        .ok_or_else(wrong)
}

/// Shows bytes in the largest unit that divides them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        for (unit, shift) in UNITS {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_1024() {
        assert_eq!(parse("512"), Ok(512));
        assert_eq!(parse("64K"), Ok(65_536));
        assert_eq!(parse("1g"), Ok(1 << 30));
        assert_eq!(parse(" 2 GiB "), Ok(2 << 30));
        assert_eq!(parse("3TB"), Ok(3 << 40));
    }

    #[test]
    fn nonsense_and_overflow_are_refused() {
        for text in [
            "",
            "G",
            "-1",
            "1X",
            "1.5G",
            "99999999999T",
            "18446744073709551616",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn shown_in_the_largest_whole_unit() {
        assert_eq!(Bytes(1 << 30).to_string(), "1 GiB");
        assert_eq!(Bytes(1536 << 10).to_string(), "1536 KiB");
        assert_eq!(Bytes(0).to_string(), "0 bytes");
        assert_eq!(Bytes(1000).to_string(), "1000 bytes");
    }
}
