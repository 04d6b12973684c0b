//! Where a JSON value ends in a stream of bytes: SPDK's clients write bare objects, or an array of
//! them as a batch, one after the other without any framing. No I/O here.

/// Deepest nesting that is taken; the parser behind it stops at 128.
const MAX_DEPTH: u32 = 64;

/// How far a client's bytes have been looked at.
#[derive(Debug, Default)]
pub(crate) struct JsonFraming {
    scanned: usize,
    depth: u32,
    in_string: bool,
    escaped: bool,
}

/// What the bytes so far hold.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// Not a whole value yet.
    More,
    /// An object or array; it has been taken out of the bytes.
    Value(Vec<u8>),
    /// Nothing that could become one, and why.
    Broken(&'static str),
}

impl JsonFraming {
    /// Takes the first whole value out of `input`. Every byte is looked at once, however small the
    /// pieces in which they come.
    pub(crate) fn take(&mut self, input: &mut Vec<u8>, max_bytes: usize) -> Frame {
        if self.scanned == 0 {
            let blank = input
                .iter()
                .take_while(|byte| byte.is_ascii_whitespace())
                .count();
            input.drain(..blank);
        }
        let mut end = None;
        for (at, byte) in input.iter().enumerate().skip(self.scanned) {
            match (self.in_string, byte) {
                (true, _) if self.escaped => self.escaped = false,
                (true, b'\\') => self.escaped = true,
                (true, b'"') => self.in_string = false,
                (true, _) => {}
                (false, b'{' | b'[') => self.depth += 1,
                (false, _) if self.depth == 0 => {
                    return Frame::Broken("a request is a JSON object, or an array of them");
                }
                (false, b'"') => self.in_string = true,
                (false, b'}' | b']') => self.depth -= 1,
                (false, _) => {}
            }
            if self.depth > MAX_DEPTH {
                return Frame::Broken("nested too deeply");
            }
            if self.depth == 0 {
                end = Some(at + 1);
                break;
            }
        }
        match end {
            Some(end) if end <= max_bytes => {
                *self = Self::default();
                let rest = input.split_off(end);
                Frame::Value(core::mem::replace(input, rest))
            }
            None if input.len() < max_bytes => {
                self.scanned = input.len();
                Frame::More
            }
            _ => Frame::Broken("the request is too long"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(framing: &mut JsonFraming, input: &mut Vec<u8>) -> Vec<Vec<u8>> {
        let mut values = Vec::new();
        while let Frame::Value(value) = framing.take(input, 1 << 20) {
            values.push(value);
        }
        values
    }

    #[test]
    fn objects_and_batches_without_framing() {
        let mut input = b" {\"a\":\"}\\\"{\"}\n[{},[{}]]{\"b\":1}{\"c\"".to_vec();
        let mut framing = JsonFraming::default();
        let values = all(&mut framing, &mut input);
        let wanted: [&[u8]; 3] = [b"{\"a\":\"}\\\"{\"}", b"[{},[{}]]", b"{\"b\":1}"];
        assert_eq!(values, wanted);
        assert_eq!(input, b"{\"c\"");
        input.extend_from_slice(b":2}");
        assert_eq!(all(&mut framing, &mut input), [b"{\"c\":2}"]);
    }

    #[test]
    fn what_cannot_become_a_request() {
        let broken = |text: &[u8], max| {
            let mut framing = JsonFraming::default();
            matches!(framing.take(&mut text.to_vec(), max), Frame::Broken(_))
        };
        assert!(broken(b"hello", 100));
        assert!(broken(b"}", 100));
        assert!(broken(b"GET / HTTP/1.1\r\n", 100));
        assert!(broken(&[b'['; 1000], 10_000));
        assert!(broken(b"{\"a\":1}", 6));
        assert!(broken(b"{\"aaaaaaaaaaaaa", 10));
        assert!(!broken(b"", 10) && !broken(b" \n", 10));
    }

    proptest! {
        /// However the bytes are cut, the same values come out.
        #[test]
        fn any_fragmentation(cuts in proptest::collection::vec(1_usize..9, 1..80)) {
            let text = br#"{"method":"a{[\"}"} [{"x":[1,2,{"y":"]"}]},{}]{"z":{}}"#;
            let mut whole = text.to_vec();
            let expected = all(&mut JsonFraming::default(), &mut whole);
            prop_assert_eq!(expected.len(), 3);
            let (mut framing, mut input, mut values) = (JsonFraming::default(), Vec::new(), Vec::new());
            let mut rest = &text[..];
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                input.extend_from_slice(now);
                values.extend(all(&mut framing, &mut input));
                rest = later;
                if rest.is_empty() { break; }
            }
            prop_assert_eq!(values, expected);
        }

        /// Foreign bytes never panic, and what is kept is bounded.
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut framing = JsonFraming::default();
            let mut input = bytes;
            while let Frame::Value(_) = framing.take(&mut input, 100) {}
        }
    }
}
