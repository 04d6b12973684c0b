//! Where in which file something was said, for errors.

use std::ops::Range;
use std::path::Path;

use toml::Spanned;

use super::file::ConfigError;

/// Where in which file something was said.
pub(super) struct Place<'a> {
    pub(super) text: &'a str,
    pub(super) path: &'a Path,
}

impl Place<'_> {
    /// An error of the TOML parser: its own message, cut to one line, with the key of its line.
    pub(super) fn syntax(&self, error: &toml::de::Error) -> ConfigError {
        self.parser(error.span().map_or(0, |span| span.start), error.message())
    }

    pub(super) fn parser(&self, offset: usize, message: &str) -> ConfigError {
        let message = message.trim().replace('\n', ", ");
        let key = self.key_at(offset).unwrap_or_else(|| "(none)".to_owned());
        self.line(offset, &key, message)
    }

    pub(super) fn value<T: ToString>(
        &self,
        span: &Range<usize>,
        key: &str,
        what: T,
    ) -> ConfigError {
        self.line(span.start, key, what.to_string())
    }

    pub(super) fn line(&self, offset: usize, key: &str, what: String) -> ConfigError {
        let before = self.text.get(..offset).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        ConfigError::Line {
            path: self.path.to_owned(),
            line,
            key: key.to_owned(),
            what,
        }
    }

    /// The key, or the table's name, on the line of that offset.
    fn key_at(&self, offset: usize) -> Option<String> {
        let start = self
            .text
            .get(..offset)?
            .rfind('\n')
            .map_or(0, |newline| newline + 1);
        let line = self.text.get(start..)?.lines().next()?.trim();
        let key = match line.split_once('=') {
            Some((key, _)) => key,
            None => line.trim_matches(['[', ']']),
        };
        let key = key.trim();
        (!key.is_empty()).then(|| key.to_owned())
    }

    pub(super) fn number<T: TryFrom<u64>>(
        &self,
        value: &Spanned<u64>,
        key: &str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<T, ConfigError> {
        let number = *value.as_ref();
        let refuse = || {
            let what = format!(
                "{number} is out of range, give {} to {}",
                range.start(),
                range.end()
            );
            self.value(&value.span(), key, what)
        };
        if !range.contains(&number) {
            return Err(refuse());
        }
        T::try_from(number).map_err(|_| refuse())
    }

    pub(super) fn ascii(
        &self,
        value: Option<Spanned<String>>,
        key: &str,
        max: usize,
    ) -> Result<Option<String>, ConfigError> {
        let Some(value) = value else { return Ok(None) };
        let text = value.as_ref();
        let printable = text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if text.trim().is_empty() || text.len() > max || !printable {
            let what = format!("must be 1 to {max} characters of ASCII");
            return Err(self.value(&value.span(), key, what));
        }
        Ok(Some(value.into_inner()))
    }
}
