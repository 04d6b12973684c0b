//! Fatal errors of a connection and the PDU that tells the other end of one (TCP 3.5).

use core::fmt;

use super::End;
use super::wire::TermReqHeader;

/// A fatal transport error that this end has found: the connection is over. Send
/// [`Stream::term_req`](super::Stream::term_req), then close.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Error {
    /// A field of the header says what it must not.
    #[error("invalid PDU header field at byte {offset}")]
    InvalidField {
        /// Of the field, in bytes from the start of the header.
        offset: u8,
    },
    /// A PDU that must not come now.
    #[error("PDU sequence error")]
    Sequence,
    /// The header digest does not match the header.
    #[error("header digest error: received {received:#010x}")]
    HeaderDigest {
        /// HDGST as received.
        received: u32,
    },
    /// Data beyond what was asked for.
    #[error("data transfer out of range")]
    OutOfRange,
    /// To a controller: an H2CData PDU longer than MAXH2CDATA. To a host: more R2Ts than MAXR2T.
    #[error("transfer limit exceeded")]
    LimitExceeded,
    /// A parameter of connection set-up that this end cannot do.
    #[error("unsupported parameter at byte {offset}")]
    Unsupported {
        /// Of the parameter, in bytes from the start of the header.
        offset: u8,
    },
    /// A TermReq whose length is wrong: it is ignored and the connection closed without an answer.
    #[error("malformed TermReq")]
    BadTermReq,
}

impl Error {
    /// FES and FEI of the TermReq; `None` when none is sent.
    #[must_use]
    pub const fn status(self) -> Option<(FatalStatus, u32)> {
        Some(match self {
            Self::InvalidField { offset } => (FatalStatus::InvalidPduHeaderField, offset as u32),
            Self::Sequence => (FatalStatus::PduSequenceError, 0),
            Self::HeaderDigest { received } => (FatalStatus::HeaderDigestError, received),
            Self::OutOfRange => (FatalStatus::DataTransferOutOfRange, 0),
            Self::LimitExceeded => (FatalStatus::LimitExceeded, 0),
            Self::Unsupported { offset } => (FatalStatus::UnsupportedParameter, offset as u32),
            Self::BadTermReq => return None,
        })
    }
}

/// Fatal Error Status (FES; TCP 3.6.2.4 and 3.6.2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FatalStatus {
    /// 01h; FEI is the byte offset of the field.
    InvalidPduHeaderField,
    /// 02h.
    PduSequenceError,
    /// 03h; FEI is the digest that was received.
    HeaderDigestError,
    /// 04h.
    DataTransferOutOfRange,
    /// 05h: Data Transfer Limit Exceeded from a controller, R2T Limit Exceeded from a host.
    LimitExceeded,
    /// 06h; FEI is the byte offset of the parameter.
    UnsupportedParameter,
    /// A reserved value.
    Other(u16),
}

impl FatalStatus {
    /// From the number on the wire.
    #[must_use]
    pub const fn from_raw(raw: u16) -> Self {
        match raw {
            1 => Self::InvalidPduHeaderField,
            2 => Self::PduSequenceError,
            3 => Self::HeaderDigestError,
            4 => Self::DataTransferOutOfRange,
            5 => Self::LimitExceeded,
            6 => Self::UnsupportedParameter,
            other => Self::Other(other),
        }
    }

    /// The number on the wire.
    #[must_use]
    pub const fn raw(self) -> u16 {
        match self {
            Self::InvalidPduHeaderField => 1,
            Self::PduSequenceError => 2,
            Self::HeaderDigestError => 3,
            Self::DataTransferOutOfRange => 4,
            Self::LimitExceeded => 5,
            Self::UnsupportedParameter => 6,
            Self::Other(raw) => raw,
        }
    }

    /// The specification's name, in a TermReq that `from` sent.
    #[must_use]
    pub const fn name(self, from: End) -> &'static str {
        match (self, from) {
            (Self::InvalidPduHeaderField, _) => "Invalid PDU Header Field",
            (Self::PduSequenceError, _) => "PDU Sequence Error",
            (Self::HeaderDigestError, _) => "Header Digest Error",
            (Self::DataTransferOutOfRange, _) => "Data Transfer Out of Range",
            (Self::LimitExceeded, End::Controller) => "Data Transfer Limit Exceeded",
            (Self::LimitExceeded, End::Host) => "R2T Limit Exceeded",
            (Self::UnsupportedParameter, _) => "Unsupported Parameter",
            (Self::Other(_), _) => "Reserved",
        }
    }
}

/// A TermReq that was received: the other end has found an error and the connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TermReq {
    /// Who sent it.
    pub from: End,
    /// What is wrong.
    pub fes: FatalStatus,
    /// More about it.
    pub fei: u32,
}

impl TermReq {
    pub(super) fn parse(from: End, header: &TermReqHeader) -> Self {
        Self {
            from,
            fes: FatalStatus::from_raw(header.fes.get()),
            fei: header.fei.get(),
        }
    }
}

impl fmt::Display for TermReq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let from = match self.from {
            End::Host => "H2CTermReq",
            End::Controller => "C2HTermReq",
        };
        let (name, raw) = (self.fes.name(self.from), self.fes.raw());
        write!(f, "{from}: {name} (FES {raw:02x}h, FEI {:#x})", self.fei)
    }
}
