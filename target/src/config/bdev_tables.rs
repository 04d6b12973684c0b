//! Where in a `[[bdev]]` table a mistake is.
//!
//! The type of a device decides which keys its table has, so serde reads the table into a buffer first
//! and forgets where each key stood: its errors name the table. This reads the tables once more, each as
//! the type that it says it is, and finds the key.

use std::ops::Range;

use flexblk_blockdev::BdevConfig;
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

/// A mistake and the bytes of the text that it is about.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mistake {
    pub(super) span: Range<usize>,
    pub(super) message: String,
}

/// The first mistake in the `[[bdev]]` tables of `text`, which is TOML otherwise.
pub(super) fn first_mistake(text: &str) -> Option<Mistake> {
    let mut document = DeTable::parse(text).ok()?.into_inner();
    let DeValue::Array(tables) = document.remove("bdev")?.into_inner() else {
        return None;
    };
    tables.into_iter().find_map(mistake)
}

fn mistake(table: Spanned<DeValue<'_>>) -> Option<Mistake> {
    let span = table.span();
    let DeValue::Table(mut table) = table.into_inner() else {
        return None;
    };
    // Without a type, what serde says of the table is exact.
    let kind = table.remove("type")?;
    let DeValue::String(name) = kind.as_ref() else {
        return Some(Mistake {
            span: kind.span(),
            message: "the type is a text, such as \"ram\"".to_owned(),
        });
    };
    let keys = ValueDeserializer::from(Spanned::new(span.clone(), DeValue::Table(table)));
    let refused = match BdevConfig::of_type(name, keys) {
        None => {
            return Some(Mistake {
                span: kind.span(),
                message: format!(
                    "there is no type `{name}`, give one of {}",
                    BdevConfig::TYPES.join(", ")
                ),
            });
        }
        Some(Ok(_)) => return None,
        Some(Err(error)) => error,
    };
    Some(Mistake {
        span: refused.span().unwrap_or(span),
        message: refused.message().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(text: &str) -> (usize, String) {
        let mistake = first_mistake(text).expect("there is one");
        let line = text[..mistake.span.start].matches('\n').count() + 1;
        (line, mistake.message)
    }

    #[test]
    fn the_line_of_the_key() {
        let good = "[[bdev]]\ntype = \"ram\"\nname = \"a\"\nsize = \"1M\"\n";
        assert_eq!(first_mistake(good), None);
        for (table, line, words) in [
            (
                "type = \"ram\"\nname = \"b\"\nsizee = \"1G\"\n",
                8,
                "unknown field `sizee`",
            ),
            (
                "size = \"1G\"\ntype = \"ram\"\nblock_size = \"big\"\nname = \"b\"\n",
                8,
                "expected u32",
            ),
            ("type = \"ram\"\nname = \"b\"\nsize = \"1X\"\n", 8, "1X"),
            (
                "name = \"b\"\ntype = \"tape\"\n",
                7,
                "no type `tape`, give one of null, ram",
            ),
            ("name = \"b\"\n\ntype = 7\n", 8, "a text"),
            (
                "type = \"file\"\nname = \"b\"\n",
                5,
                "missing field `filename`",
            ),
            (
                "type = \"error\"\nname = \"b\"\nbase_bdev_name = \"a\"\nmedia_errors = [\n{ lba = 1 },\n{ lbaa = 1 },\n]\n",
                11,
                "unknown field `lbaa`",
            ),
        ] {
            let (at, message) = place(&format!("{good}[[bdev]]\n{table}"));
            assert!(message.contains(words), "{message}");
            assert_eq!(at, line, "{table}{message}");
        }
    }

    #[test]
    fn what_is_no_table_is_left_to_the_parser() {
        for text in [
            "",
            "bdev = 3\n",
            "bdev = [3]\n",
            "[[bdev]]\nname = \"a\"\n",
            "[bdev\n",
        ] {
            assert_eq!(first_mistake(text), None, "{text}");
        }
    }
}
