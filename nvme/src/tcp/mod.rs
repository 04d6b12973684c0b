//! NVMe/TCP: protocol data units (PDUs) and the byte streams they travel in, without I/O.
//!
//! | what | where |
//! |---|---|
//! | headers as they stand on the wire | [`mod@wire`] |
//! | PDUs as values, and [`Framing`], which writes the bytes in front of a PDU's data | [`pdu`], [`framing`] |
//! | [`Stream`]: what comes in, in any fragmentation | [`stream`] |
//! | [`Cursor`]: is a data PDU the one that is due | [`cursor`] |
//! | fatal errors, and the TermReq that tells the other end | [`error`] |
//!
//! Payload is never copied here. Outgoing, [`Framing`] writes the few bytes that go in front of a
//! PDU's data, and [`Crc32c`] gives the four that may go behind: gather them with the data in one
//! send. Incoming, [`Stream::next`] hands out payload as pieces of the received bytes; when a PDU's
//! payload is still on its way ([`Stream::payload_left`]), receive it where it belongs and say so
//! with [`Stream::placed`].
//!
//! ```
//! use flexblk_nvme::command::{Sqe, nvm};
//! use flexblk_nvme::tcp::{End, Event, Established, Framing, HEAD_MAX, Pdu, Stream};
//! use flexblk_nvme::{Cid, Sgl};
//!
//! let data = [7; 512];
//! let sqe = nvm::Write::default().emit(Cid::new(3), &Sgl::InCapsule { offset: 0, length: 512 });
//! let mut head = [0; HEAD_MAX];
//! let len = Framing::default().capsule_cmd(Sqe::cast(&sqe), 512, &mut head);
//! let wire = [&head[..len], &data].concat();
//!
//! let mut stream = Stream::new(End::Controller);
//! stream.establish(Established { max_in_capsule_bytes: 8192, ..Established::default() });
//! let mut input = &wire[..];
//! let Ok(Some(Event::Pdu(Pdu::CapsuleCmd(capsule)))) = stream.next(&mut input) else { panic!() };
//! assert_eq!((capsule.sqe.cid(), capsule.len_bytes), (Cid::new(3), 512));
//! assert_eq!(stream.next(&mut input), Ok(Some(Event::Data(&data))));
//! assert_eq!(stream.next(&mut input), Ok(Some(Event::DataEnd { intact: true })));
//! assert_eq!(stream.next(&mut input), Ok(None));
//! ```
//!
//! Cited as *TCP*: NVM Express TCP Transport Specification, revision 1.0. All fields are little
//! endian.

pub mod cursor;
pub mod digest;
pub mod error;
pub mod framing;
pub mod pdu;
pub mod stream;
#[cfg(test)]
mod tests;
pub mod wire;

use bitflags::bitflags;

pub use cursor::Cursor;
pub use digest::Crc32c;
pub use error::{Error, FatalStatus, TermReq};
pub use framing::{Framing, HEAD_MAX, TERM_MAX};
pub use pdu::{C2hData, CapsuleCmd, H2cData, IcReq, IcResp, Pdu, PduType, R2t};
pub use stream::{Established, Event, Stream};

/// Port of I/O controllers by convention (TCP 3.1, Transport Service Identifier).
pub const PORT: u16 = 4420;
/// Default port of discovery controllers (TCP 3.1, Transport Service Identifier).
pub const DISCOVERY_PORT: u16 = 8009;
/// Most in-capsule data of Admin and Fabrics commands, in bytes; a controller takes that much
/// (TCP 3.3.1).
pub const ADMIN_IN_CAPSULE_BYTES: u32 = 8192;
/// Least MAXH2CDATA, in bytes (TCP 3.6.2.3).
pub const MIN_MAXH2CDATA: u32 = 4096;
/// Length of a digest in bytes (TCP 3.3.1.1).
pub const DIGEST_LEN: usize = 4;

/// One of the two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// Sends H2C PDUs.
    Host,
    /// Sends C2H PDUs.
    Controller,
}

bitflags! {
    /// Digests: of a connection (DGST in ICReq and ICResp) or of a PDU (bits 0 and 1 of FLAGS);
    /// the bits are the same.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Digests: u8 {
        /// HDGST: over the header.
        const HEADER = 1 << 0;
        /// DDGST: over the data.
        const DATA = 1 << 1;
    }
}

impl Digests {
    /// Bytes that a header digest takes.
    #[inline]
    #[must_use]
    pub const fn header_len(self) -> usize {
        if self.contains(Self::HEADER) {
            DIGEST_LEN
        } else {
            0
        }
    }

    /// Bytes that a data digest takes.
    #[inline]
    #[must_use]
    pub const fn data_len(self) -> usize {
        if self.contains(Self::DATA) {
            DIGEST_LEN
        } else {
            0
        }
    }
}

/// Where a PDU's data has to begin (HPDA, CPDA): a multiple of 4 to 128 bytes from the PDU's start
/// (TCP 3.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Alignment(u8);

impl Alignment {
    /// Four bytes: 0 on the wire. Linux's target takes nothing else from a host.
    pub const DWORD: Self = Self(0);

    /// From the number on the wire, dwords less one; `None` above 31.
    #[must_use]
    pub const fn from_raw(raw: u8) -> Option<Self> {
        if raw < 32 { Some(Self(raw)) } else { None }
    }

    /// The number on the wire.
    #[must_use]
    pub const fn raw(self) -> u8 {
        self.0
    }

    /// In bytes.
    #[inline]
    #[must_use]
    pub const fn bytes(self) -> usize {
        (self.0 as usize + 1) * 4
    }
}
