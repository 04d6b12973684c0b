//! The NBD protocol, server's side, without I/O: `doc/proto.md` of the NetworkBlockDevice project (called "proto" here).
//!
//! | part | what |
//! |---|---|
//! | [`Handshake`] | fixed newstyle negotiation: bytes in, bytes out, and at the end a [`Session`] |
//! | [`RequestHeader`], [`Session::command`] | a request of the client, and what it asks for |
//! | [`ReplyHead`] | what goes before the data of an answer |
//!
//! Nothing a client sends can make these panic or grow.

mod command;
mod handshake;
mod reply;
mod request;

pub use command::{Command, Io, Session};
pub use handshake::{Handshake, Step};
pub use reply::{Answer, MAX_REPLY_HEAD_BYTES, ReplyHead};
pub use request::{MAX_REQUEST_BYTES, RequestHeader};

/// Largest payload of a read or write: what proto tells clients to assume when nobody says anything.
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;

/// How requests and replies of a connection look (proto, "Structured reply extension", "Extended headers extension").
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Style {
    /// Simple replies.
    Simple,
    /// Structured replies.
    Structured,
    /// Extended requests and replies, with lengths of 64 bits.
    Extended,
}

/// What is offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The name that clients ask for. The empty name means it, too.
    pub name: String,
    /// For people.
    pub description: String,
    /// Bytes.
    pub len_bytes: u64,
    /// Requests are multiples of this; a power of two.
    pub block_bytes: u32,
    /// Requests are best multiples of this.
    pub preferred_bytes: u32,
    /// Nothing can be changed.
    pub read_only: bool,
    /// There is TRIM.
    pub trim: bool,
    /// There is WRITE_ZEROES. It never transfers the zeroes, so each one is a fast one.
    pub write_zeroes: bool,
    /// There is CACHE.
    pub cache: bool,
}

impl Export {
    /// Transmission flags (proto, "Transmission flags").
    #[must_use]
    pub fn flags(&self, style: Style) -> u16 {
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::CAN_MULTI_CONN;
        if self.read_only {
            flags |= flag::READ_ONLY;
        } else {
            if self.trim {
                flags |= flag::SEND_TRIM;
            }
            if self.write_zeroes {
                flags |= flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
            }
        }
        if self.cache {
            flags |= flag::SEND_CACHE;
        }
        if style >= Style::Structured {
            flags |= flag::SEND_DF;
        }
        flags
    }

    fn is_called(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }
}

/// Transmission flags.
mod flag {
    pub(super) const HAS_FLAGS: u16 = 1 << 0;
    pub(super) const READ_ONLY: u16 = 1 << 1;
    pub(super) const SEND_FLUSH: u16 = 1 << 2;
    pub(super) const SEND_FUA: u16 = 1 << 3;
    pub(super) const SEND_TRIM: u16 = 1 << 5;
    pub(super) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(super) const SEND_DF: u16 = 1 << 7;
    pub(super) const CAN_MULTI_CONN: u16 = 1 << 8;
    pub(super) const SEND_CACHE: u16 = 1 << 10;
    pub(super) const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// The error numbers that a reply may carry (proto, "Error values").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Operation not permitted: the export is read-only.
    Perm = 1,
    /// Input/output error.
    Io = 5,
    /// Cannot allocate memory.
    NoMem = 12,
    /// Invalid argument.
    Inval = 22,
    /// No space left on device.
    NoSpc = 28,
    /// Operation not supported.
    NotSup = 95,
    /// Server is in the process of being shut down.
    Shutdown = 108,
}

impl Errno {
    /// The nearest one to an errno of the host.
    #[must_use]
    pub fn from_host(errno: i32) -> Errno {
        match errno {
            // EBADE is a reservation conflict: another host may write, we may not.
            libc::EPERM | libc::EROFS | libc::EACCES | libc::EBADE => Errno::Perm,
            libc::ENOMEM => Errno::NoMem,
            libc::EINVAL => Errno::Inval,
            libc::ENOSPC => Errno::NoSpc,
            libc::EOPNOTSUPP => Errno::NotSup,
            libc::ECANCELED => Errno::Shutdown,
            _ => Errno::Io,
        }
    }
}

/// The client does not speak the protocol: nothing can be answered, the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// A magic number is wrong.
    #[error("wrong magic number: not NBD, or out of step")]
    Magic,
    /// Client flags that the server did not offer.
    #[error("the client wants what was not offered (flags {0:#x})")]
    ClientFlags(u32),
    /// A payload or an option that nobody takes.
    #[error("a length of {0} bytes is more than anybody takes")]
    Length(u64),
    /// NBD_OPT_EXPORT_NAME has no way to say so.
    #[error("no export of that name")]
    UnknownExport,
    /// Haggling without the fixed newstyle.
    #[error("the client negotiates without fixed newstyle")]
    NotFixed,
}

/// Big-endian integers from the front of `bytes`.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests;
