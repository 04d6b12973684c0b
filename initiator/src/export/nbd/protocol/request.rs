//! Headers of requests (proto, "Request message").

use super::{Broken, Style, u16_at, u32_at, u64_at};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// The longest header.
pub const MAX_REQUEST_BYTES: usize = 32;

/// A request's header. Neither type nor flags are checked yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// Command flags.
    pub flags: u16,
    /// Type of the request.
    pub kind: u16,
    /// Comes back in the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len_bytes: u64,
}

impl RequestHeader {
    /// Length of a header.
    #[must_use]
    pub const fn len_of(style: Style) -> usize {
        match style {
            Style::Simple | Style::Structured => 28,
            Style::Extended => MAX_REQUEST_BYTES,
        }
    }

    /// The header at the front of `bytes`; `None` when it is not all there.
    ///
    /// # Errors
    /// [`Broken::Magic`].
    #[inline]
    pub fn parse(style: Style, bytes: &[u8]) -> Result<Option<RequestHeader>, Broken> {
        let magic = match style {
            Style::Simple | Style::Structured => REQUEST_MAGIC,
            Style::Extended => EXTENDED_REQUEST_MAGIC,
        };
        let Some(first) = u32_at(bytes, 0) else {
            return Ok(None);
        };
        if first != magic {
            return Err(Broken::Magic);
        }
        let fields = || {
            Some(RequestHeader {
                flags: u16_at(bytes, 4)?,
                kind: u16_at(bytes, 6)?,
                cookie: u64_at(bytes, 8)?,
                offset: u64_at(bytes, 16)?,
                len_bytes: match style {
                    Style::Simple | Style::Structured => u64::from(u32_at(bytes, 24)?),
                    Style::Extended => u64_at(bytes, 24)?,
                },
            })
        };
        Ok(fields())
    }

    /// The header as a client sends it; a length beyond 32 bits is cut where there are only 32.
    #[must_use]
    pub fn emit(&self, style: Style) -> ([u8; MAX_REQUEST_BYTES], usize) {
        let mut bytes = [0; MAX_REQUEST_BYTES];
        let len = Self::len_of(style);
        let (magic, length) = match style {
            Style::Simple | Style::Structured => (REQUEST_MAGIC, self.len_bytes << 32),
            Style::Extended => (EXTENDED_REQUEST_MAGIC, self.len_bytes),
        };
        bytes[0..4].copy_from_slice(&magic.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.kind.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..32].copy_from_slice(&length.to_be_bytes());
        (bytes, len)
    }
}
