//! NVMe Qualified Names (Base 4.7).

use core::fmt;
use core::str::FromStr;
use std::sync::Arc;

use uuid::Uuid;

use crate::text;

/// Longest name in bytes, without the terminating NUL (Base 4.7).
pub const MAX_LEN: usize = 223;
/// Width of a name's field on the wire.
pub const FIELD_LEN: usize = 256;
/// The well-known name that every discovery service answers to (Base 3.1.3.3).
pub const DISCOVERY: &str = "nqn.2014-08.org.nvmexpress.discovery";

const UUID_PREFIX: &str = "nqn.2014-08.org.nvmexpress:uuid:";

/// The name of a host or an NVM subsystem: 1 to 223 bytes of UTF-8 without control characters or
/// white space. Cheap to clone.
///
/// [`Nqn::new`] also asks for the form that the specification prescribes and is what names of our
/// own are made with; [`Nqn::opaque`] takes what other implementations use in practice (the Linux
/// target serves any string as a name).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nqn(Arc<str>);

/// Why a string is not a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NqnError {
    /// Nothing there.
    #[error("the name is empty")]
    Empty,
    /// More than 223 bytes.
    #[error("the name has {0} bytes, at most {MAX_LEN} are allowed")]
    TooLong(usize),
    /// No NUL within the field.
    #[error("the name is not terminated within its field")]
    Unterminated,
    /// Not UTF-8.
    #[error("the name is not UTF-8")]
    NotUtf8,
    /// White space or a control character.
    #[error("the name has a character that is not allowed: {0:?}")]
    Character(char),
    /// Not `nqn.yyyy-mm.reverse.domain[:anything]`.
    #[error("the name does not have the form nqn.yyyy-mm.reverse.domain:name")]
    Form,
    /// `nqn.2014-08.org.nvmexpress:uuid:` not followed by a UUID.
    #[error("the name's UUID is malformed")]
    Uuid,
}

impl Nqn {
    /// A name in the form of Base 4.7: `nqn.yyyy-mm.reverse.domain[:string]`, or
    /// `nqn.2014-08.org.nvmexpress:uuid:` and a UUID.
    pub fn new(name: &str) -> Result<Self, NqnError> {
        check_characters(name)?;
        check_form(name)?;
        Ok(Self(name.into()))
    }

    /// Any name of legal length and characters, whatever its form.
    pub fn opaque(name: &str) -> Result<Self, NqnError> {
        check_characters(name)?;
        Ok(Self(name.into()))
    }

    /// The name in a 256-byte field, any form.
    pub fn from_field(field: &[u8; FIELD_LEN]) -> Result<Self, NqnError> {
        if !field.contains(&0) {
            return Err(NqnError::Unterminated);
        }
        Self::opaque(text::trim_nul(field).ok_or(NqnError::NotUtf8)?)
    }

    /// The name as a NUL-padded 256-byte field.
    #[must_use]
    pub fn to_field(&self) -> [u8; FIELD_LEN] {
        let mut field = [0; FIELD_LEN];
        text::pad_nul(&mut field, &self.0);
        field
    }

    /// The well-known discovery name.
    #[must_use]
    pub fn discovery() -> Self {
        Self(DISCOVERY.into())
    }

    /// A name made from a UUID.
    #[must_use]
    pub fn from_uuid(uuid: Uuid) -> Self {
        Self(format!("{UUID_PREFIX}{uuid}").into())
    }

    /// The UUID of a UUID-based name.
    #[must_use]
    pub fn uuid(&self) -> Option<Uuid> {
        self.0.strip_prefix(UUID_PREFIX)?.parse().ok()
    }

    /// Is this the well-known discovery name?
    #[must_use]
    pub fn is_discovery(&self) -> bool {
        &*self.0 == DISCOVERY
    }

    /// Has it the form that the specification prescribes?
    #[must_use]
    pub fn is_well_formed(&self) -> bool {
        check_form(&self.0).is_ok()
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn check_characters(name: &str) -> Result<(), NqnError> {
    if name.is_empty() {
        return Err(NqnError::Empty);
    }
    if name.len() > MAX_LEN {
        return Err(NqnError::TooLong(name.len()));
    }
    match name.chars().find(|c| c.is_whitespace() || c.is_control()) {
        Some(c) => Err(NqnError::Character(c)),
        None => Ok(()),
    }
}

fn check_form(name: &str) -> Result<(), NqnError> {
    if let Some(uuid) = name.strip_prefix(UUID_PREFIX) {
        // Only the hyphenated form is a UUID here (RFC 9562, section 4).
        let hyphenated = uuid.len() == 36 && Uuid::try_parse(uuid).is_ok();
        return if hyphenated {
            Ok(())
        } else {
            Err(NqnError::Uuid)
        };
    }
    let rest = name.strip_prefix("nqn.").ok_or(NqnError::Form)?;
    let (date, rest) = rest.split_once('.').ok_or(NqnError::Form)?;
    let (year, month) = date.split_once('-').ok_or(NqnError::Form)?;
    let digits = |text: &str, len| text.len() == len && text.bytes().all(|b| b.is_ascii_digit());
    let month_is_real = month
        .parse()
        .is_ok_and(|month: u8| (1..=12).contains(&month));
    if !digits(year, 4) || !digits(month, 2) || !month_is_real {
        return Err(NqnError::Form);
    }
    let domain = rest.split_once(':').map_or(rest, |(domain, _)| domain);
    let label = |text: &str| {
        !text.is_empty()
            && !text.starts_with('-')
            && !text.ends_with('-')
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if domain.split('.').all(label) {
        Ok(())
    } else {
        Err(NqnError::Form)
    }
}

impl FromStr for Nqn {
    type Err = NqnError;

    /// As [`Nqn::opaque`].
    fn from_str(name: &str) -> Result<Self, NqnError> {
        Self::opaque(name)
    }
}

impl AsRef<str> for Nqn {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Nqn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Nqn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn forms() {
        for good in [
            DISCOVERY,
            "nqn.2014-08.org.nvmexpress:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6",
            "nqn.2016-06.io.spdk:cnode1",
            "nqn.2026-01.io.flexblk:a:b",
        ] {
            assert!(Nqn::new(good).is_ok(), "{good}");
        }
        for (bad, why) in [
            ("", NqnError::Empty),
            ("testnqn", NqnError::Form),
            ("nqn.2014-13.org.x", NqnError::Form),
            ("nqn.2014-8.org.x", NqnError::Form),
            ("nqn.2014-08.", NqnError::Form),
            ("nqn.2014-08.org..x", NqnError::Form),
            ("nqn.2014-08.org.x y", NqnError::Character(' ')),
            ("nqn.2014-08.org.nvmexpress:uuid:1234", NqnError::Uuid),
        ] {
            assert_eq!(Nqn::new(bad), Err(why), "{bad}");
        }
        assert!(Nqn::opaque("testnqn").is_ok());
        let long = format!("nqn.2014-08.org.x:{}", "a".repeat(300));
        assert_eq!(Nqn::new(&long), Err(NqnError::TooLong(318)));
    }

    #[test]
    fn uuid_names() {
        let uuid = Uuid::from_u128(0x1234);
        let name = Nqn::from_uuid(uuid);
        assert_eq!(name.uuid(), Some(uuid));
        assert!(name.is_well_formed());
        assert_eq!(Nqn::discovery().uuid(), None);
    }

    proptest! {
        #[test]
        fn field_round_trips(name in "[!-~]{1,223}") {
            let name = Nqn::opaque(&name).unwrap();
            prop_assert_eq!(Nqn::from_field(&name.to_field()), Ok(name));
        }

        #[test]
        fn any_field_is_judged(bytes in proptest::collection::vec(any::<u8>(), FIELD_LEN)) {
            let field: [u8; FIELD_LEN] = bytes.try_into().unwrap();
            if let Ok(name) = Nqn::from_field(&field) {
                prop_assert!(name.as_str().len() <= MAX_LEN);
            }
        }

        #[test]
        fn any_text_is_judged(name in "\\PC{0,300}") {
            let _ = Nqn::new(&name);
        }
    }
}
