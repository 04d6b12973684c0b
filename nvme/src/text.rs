//! Fixed-width text fields: space-padded ASCII and NUL-padded UTF-8 (Base 1.4.2).

/// Writes `text` into a space-padded ASCII field. Characters outside 20h-7Eh become `?`; what does
/// not fit is cut.
pub fn pad_ascii(field: &mut [u8], text: &str) {
    field.fill(b' ');
    for (to, from) in field.iter_mut().zip(text.chars()) {
        *to = match from {
            ' '..='~' => from as u8,
            _ => b'?',
        };
    }
}

/// The text of a space-padded ASCII field, without padding; bytes that are not printable ASCII
/// become `?`.
#[must_use]
pub fn trim_ascii(field: &[u8]) -> String {
    let text: String = field
        .iter()
        .take_while(|byte| **byte != 0)
        .map(|byte| {
            if (b' '..=b'~').contains(byte) {
                char::from(*byte)
            } else {
                '?'
            }
        })
        .collect();
    text.trim_matches(' ').to_owned()
}

/// Writes `text` into a NUL-padded field; what does not fit is cut at a character boundary, and
/// one NUL is always left.
pub fn pad_nul(field: &mut [u8], text: &str) {
    field.fill(0);
    let room = field.len().saturating_sub(1);
    let mut end = text.len().min(room);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    for (to, from) in field.iter_mut().zip(text.bytes().take(end)) {
        *to = from;
    }
}

/// The text before the first NUL of a NUL-terminated field. `None` if it is not UTF-8.
#[must_use]
pub fn trim_nul(field: &[u8]) -> Option<&str> {
    let text = field.split(|byte| *byte == 0).next().unwrap_or_default();
    core::str::from_utf8(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ascii_is_padded_cut_and_cleaned() {
        let mut field = [0u8; 8];
        pad_ascii(&mut field, "ab");
        assert_eq!(&field, b"ab      ");
        pad_ascii(&mut field, "0123456789");
        assert_eq!(&field, b"01234567");
        pad_ascii(&mut field, "a\u{e9}\n");
        assert_eq!(&field, b"a??     ");
        assert_eq!(trim_ascii(&field), "a??");
        assert_eq!(trim_ascii(b"  x\0y"), "x");
    }

    proptest! {
        #[test]
        fn nul_padding_round_trips(text in "[^\0]{0,40}") {
            let mut field = [0xAAu8; 32];
            pad_nul(&mut field, &text);
            let back = trim_nul(&field).unwrap();
            prop_assert!(text.starts_with(back));
            prop_assert!(back.len() == text.len() || back.len() > 27);
        }

        #[test]
        fn any_bytes_are_read(field in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = trim_nul(&field);
            prop_assert!(trim_ascii(&field).is_ascii());
        }
    }
}
