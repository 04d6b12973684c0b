//! Is a data PDU the one that is due?

use super::Error;

/// The part of a command's data buffer that the other end may send, and how far it has come: of a
/// command on the host (C2HData, TCP 3.3.2.1), of an R2T on the controller (H2CData, TCP 3.3.2.2).
///
/// A transfer that ends early, with LAST_PDU before the end of the range, is for the caller to
/// judge: a controller treats it as [`Error::Sequence`], a host leaves it to the command's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    start: u32,
    next: u32,
    end: u32,
    ended: bool,
}

impl Cursor {
    /// `len` bytes from `offset` are due. `None` when they do not fit 32 bits.
    #[must_use]
    pub const fn new(offset: u32, len: u32) -> Option<Self> {
        match offset.checked_add(len) {
            Some(end) => Some(Self {
                start: offset,
                next: offset,
                end,
                ended: false,
            }),
            None => None,
        }
    }

    /// A PDU with `len` bytes for `offset`: counts it when it is the one that is due.
    #[inline]
    pub fn accept(&mut self, offset: u32, len: u32, last: bool) -> Result<(), Error> {
        // Out of range comes first: such a PDU is not contiguous either.
        let end = offset.checked_add(len).ok_or(Error::OutOfRange)?;
        if offset < self.start || end > self.end {
            return Err(Error::OutOfRange);
        }
        if self.ended || offset != self.next {
            return Err(Error::Sequence);
        }
        self.next = end;
        self.ended = last;
        Ok(())
    }

    /// Bytes that have been announced by accepted PDUs, from the start of the range.
    #[inline]
    #[must_use]
    pub const fn accepted(&self) -> u32 {
        self.next - self.start
    }

    /// Has the whole range been announced?
    #[inline]
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        self.next == self.end
    }

    /// Has a PDU said that it is the last?
    #[inline]
    #[must_use]
    pub const fn has_ended(&self) -> bool {
        self.ended
    }
}
