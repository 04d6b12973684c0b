//! Sizes as people type them (`4k`, `1GiB`) and as people read them.

/// Bytes of `4096`, `4k`, `4K`, `4KiB`, `1m`, `2GiB`, `1T`: powers of 1024, as fio and dd have them.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("'{text}' is not a size (examples: 4096, 4k, 1GiB)"))?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => {
            return Err(format!(
                "'{unit}' is not a unit (k, M, G, T: powers of 1024)"
            ));
        }
    };
    number
        .checked_shl(shift)
        .filter(|bytes| bytes >> shift == number)
        .ok_or_else(|| format!("'{text}' is too large"))
}

/// As [`parse`], not 0 and at most 4 GiB - 1: the size of one I/O.
pub(crate) fn parse_io(text: &str) -> Result<u32, String> {
    match u32::try_from(parse(text)?) {
        Ok(0) => Err("must not be 0".into()),
        Ok(bytes) => Ok(bytes),
        Err(_) => Err(format!("'{text}' is too large for one I/O")),
    }
}

/// Milliseconds of `500ms`, `5`, `5s`, `2m`: plain numbers are seconds.
pub(crate) fn parse_duration(text: &str) -> Result<std::time::Duration, String> {
    use std::time::Duration;
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number
        .parse()
        .map_err(|_| format!("'{text}' is not a time (examples: 5, 500ms, 2m)"))?;
    let scale = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("'{unit}' is not a unit of time (us, ms, s, m, h)")),
    };
    Duration::try_from_secs_f64(number * scale).map_err(|_| format!("'{text}' is too large"))
}

/// `1.50 GiB`, `4096 B`: what a person reads.
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or("B");
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.2} {name}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("4k"), Ok(4096));
        assert_eq!(parse("2GiB"), Ok(2 << 30));
        assert_eq!(parse("16777215T"), Ok(16777215 << 40));
        for wrong in [
            "",
            "k",
            "4q",
            "-1",
            "1.5G",
            "16777216T",
            "99999999999999999999",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert!(parse_io("0").is_err() && parse_io("4G").is_err());
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("5").unwrap().as_secs(), 5);
        assert_eq!(parse_duration("0.5").unwrap().as_millis(), 500);
        assert_eq!(parse_duration("250ms").unwrap().as_millis(), 250);
        assert!(parse_duration("5 parsecs").is_err() && parse_duration("").is_err());
    }

    #[test]
    fn people_read() {
        assert_eq!(human(512), "512 B");
        assert_eq!(human(1536), "1.50 KiB");
        assert_eq!(human(u64::MAX), "16384.00 PiB");
    }
}
