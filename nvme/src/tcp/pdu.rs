//! PDUs as values.

use super::error::{Error, TermReq};
use super::wire::{
    CapsuleCmdHeader, CapsuleRespHeader, CommonHeader, DataHeader, IcReqHeader, IcRespHeader,
    LAST_PDU, R2tHeader, SUCCESS, TermReqHeader,
};
use super::{Alignment, Digests, End, MIN_MAXH2CDATA};
use crate::command::Sqe;
use crate::completion::Cqe;
use crate::ids::Cid;

/// PDU types (TCP 3.3, figure 10).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PduType {
    /// Initialize Connection Request.
    IcReq = 0x00,
    /// Initialize Connection Response.
    IcResp = 0x01,
    /// Host to Controller Terminate Connection Request.
    H2cTermReq = 0x02,
    /// Controller to Host Terminate Connection Request.
    C2hTermReq = 0x03,
    /// Command Capsule.
    CapsuleCmd = 0x04,
    /// Response Capsule.
    CapsuleResp = 0x05,
    /// Host to Controller Data.
    H2cData = 0x06,
    /// Controller to Host Data.
    C2hData = 0x07,
    /// Ready to Transfer.
    R2t = 0x09,
}

impl PduType {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::IcReq,
        Self::IcResp,
        Self::H2cTermReq,
        Self::C2hTermReq,
        Self::CapsuleCmd,
        Self::CapsuleResp,
        Self::H2cData,
        Self::C2hData,
        Self::R2t,
    ];

    /// From the number on the wire; `None` for reserved ones.
    #[inline]
    #[must_use]
    pub const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            0x00 => Self::IcReq,
            0x01 => Self::IcResp,
            0x02 => Self::H2cTermReq,
            0x03 => Self::C2hTermReq,
            0x04 => Self::CapsuleCmd,
            0x05 => Self::CapsuleResp,
            0x06 => Self::H2cData,
            0x07 => Self::C2hData,
            0x09 => Self::R2t,
            _ => return None,
        })
    }

    /// The number on the wire.
    #[inline]
    #[must_use]
    pub const fn raw(self) -> u8 {
        self as u8
    }

    /// Who sends it: bit 0 of the number (TCP 3.3, figure 10, note 1).
    #[inline]
    #[must_use]
    pub const fn from(self) -> End {
        if self.raw() & 1 == 0 {
            End::Host
        } else {
            End::Controller
        }
    }

    /// HLEN, in bytes.
    #[inline]
    #[must_use]
    pub const fn hlen(self) -> usize {
        match self {
            Self::IcReq => IcReqHeader::SIZE,
            Self::IcResp => IcRespHeader::SIZE,
            Self::H2cTermReq | Self::C2hTermReq => TermReqHeader::SIZE,
            Self::CapsuleCmd => CapsuleCmdHeader::SIZE,
            Self::CapsuleResp => CapsuleRespHeader::SIZE,
            Self::H2cData | Self::C2hData => DataHeader::SIZE,
            Self::R2t => R2tHeader::SIZE,
        }
    }

    /// Does it carry a header digest when the connection has them? (TCP 3.3.1.1)
    #[inline]
    #[must_use]
    pub const fn has_header_digest(self) -> bool {
        !self.is_setup() && !self.is_term()
    }

    /// May it carry data? (TermReq's is a copy of a header.)
    #[inline]
    #[must_use]
    pub const fn has_data(self) -> bool {
        matches!(self, Self::CapsuleCmd | Self::H2cData | Self::C2hData)
    }

    /// One of the two of connection set-up.
    #[inline]
    #[must_use]
    pub const fn is_setup(self) -> bool {
        matches!(self, Self::IcReq | Self::IcResp)
    }

    /// One of the two that end a connection.
    #[inline]
    #[must_use]
    pub const fn is_term(self) -> bool {
        matches!(self, Self::H2cTermReq | Self::C2hTermReq)
    }
}

/// Initialize Connection Request (TCP 3.6.2.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct IcReq {
    /// Alignment of data towards the host.
    pub hpda: Alignment,
    /// Digests asked for.
    pub digests: Digests,
    /// MAXR2T as on the wire, 0's based.
    pub maxr2t: u32,
}

// Offsets of fields in errors.
const HLEN: u8 = 2;
const PFV: u8 = 8;
const PDA: u8 = 10;
const DGST: u8 = 11;
const MAXH2CDATA: u8 = 12;

impl IcReq {
    /// R2Ts that a command may have outstanding, 1 or more.
    #[must_use]
    pub const fn max_outstanding_r2t(&self) -> u32 {
        self.maxr2t.saturating_add(1)
    }

    pub(super) fn parse(header: &IcReqHeader) -> Result<Self, Error> {
        if header.pfv.get() != 0 {
            return Err(Error::Unsupported { offset: PFV });
        }
        Ok(Self {
            hpda: Alignment::from_raw(header.hpda).ok_or(Error::InvalidField { offset: PDA })?,
            digests: Digests::from_bits_truncate(header.dgst),
            maxr2t: header.maxr2t.get(),
        })
    }

    /// The answer of a controller that allows some digests and insists on some: the connection uses
    /// what the host asks for and the controller allows. Digests that the controller requires and
    /// the host does not ask for are an unsupported parameter.
    pub fn answer(
        &self,
        allowed: Digests,
        required: Digests,
        maxh2cdata: u32,
    ) -> Result<IcResp, Error> {
        let digests = self.digests & (allowed | required);
        if !digests.contains(required) {
            return Err(Error::Unsupported { offset: DGST });
        }
        Ok(IcResp {
            cpda: Alignment::DWORD,
            digests,
            maxh2cdata,
        })
    }
}

/// Initialize Connection Response (TCP 3.6.2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IcResp {
    /// Alignment of data towards the controller.
    pub cpda: Alignment,
    /// Digests in use.
    pub digests: Digests,
    /// Most data of one H2CData PDU, in bytes.
    pub maxh2cdata: u32,
}

impl IcResp {
    pub(super) fn parse(header: &IcRespHeader) -> Result<Self, Error> {
        if header.pfv.get() != 0 {
            return Err(Error::Unsupported { offset: PFV });
        }
        let cpda = Alignment::from_raw(header.cpda).ok_or(Error::InvalidField { offset: PDA })?;
        let maxh2cdata = header.maxh2cdata.get();
        if maxh2cdata < MIN_MAXH2CDATA || !maxh2cdata.is_multiple_of(4) {
            return Err(Error::InvalidField { offset: MAXH2CDATA });
        }
        Ok(Self {
            cpda,
            digests: Digests::from_bits_truncate(header.dgst),
            maxh2cdata,
        })
    }

    /// What a host has to check: a digest in use that it did not ask for is an invalid field
    /// (TCP 3.3.1.1).
    pub fn check(&self, request: &IcReq) -> Result<(), Error> {
        if request.digests.contains(self.digests) {
            Ok(())
        } else {
            Err(Error::InvalidField { offset: DGST })
        }
    }
}

/// Command Capsule (TCP 3.6.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CapsuleCmd {
    /// The command.
    pub sqe: Sqe,
    /// In-capsule data that follows, in bytes.
    pub len_bytes: u32,
}

impl CapsuleCmd {
    /// The entry of a command capsule with data that `bytes` seem to begin with, and the length of its
    /// data. Neither digest nor state nor limits are checked: for loading ahead what the command names,
    /// before [`Stream::next`](super::Stream::next) takes it.
    #[inline]
    #[must_use]
    pub fn foresee(bytes: &[u8]) -> Option<(&Sqe, usize)> {
        let header = CapsuleCmdHeader::view(bytes)?;
        let common = &header.common;
        if common.pdu_type != PduType::CapsuleCmd.raw() {
            return None;
        }
        let data_len = common.plen.get().checked_sub(common.pdo.into())?;
        (common.pdo != 0 && data_len != 0).then_some((&header.sqe, data_len as usize))
    }
}

/// Host to Controller Data Transfer (TCP 3.6.2.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct H2cData {
    /// Command that the data belongs to.
    pub cid: Cid,
    /// Tag of the R2T that asked for it.
    pub ttag: u16,
    /// Where in the command's data buffer, in bytes.
    pub offset: u32,
    /// Data that follows, in bytes.
    pub len_bytes: u32,
    /// The last PDU of the R2T.
    pub last: bool,
}

/// Controller to Host Data Transfer (TCP 3.6.2.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct C2hData {
    /// Command that the data belongs to.
    pub cid: Cid,
    /// Where in the command's data buffer, in bytes.
    pub offset: u32,
    /// Data that follows, in bytes.
    pub len_bytes: u32,
    /// The last PDU of the command.
    pub last: bool,
    /// The command has succeeded, and no response capsule follows. Only together with `last`.
    pub success: bool,
}

/// Ready to Transfer (TCP 3.6.2.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct R2t {
    /// Command whose data is wanted.
    pub cid: Cid,
    /// The controller's tag for this transfer.
    pub ttag: u16,
    /// Where in the command's data buffer, in bytes.
    pub offset: u32,
    /// How many bytes.
    pub len_bytes: u32,
}

/// A PDU's header, understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pdu {
    /// Initialize Connection Request.
    IcReq(IcReq),
    /// Initialize Connection Response.
    IcResp(IcResp),
    /// Terminate Connection Request.
    TermReq(TermReq),
    /// Command Capsule; in-capsule data follows if there is any.
    CapsuleCmd(CapsuleCmd),
    /// Response Capsule.
    CapsuleResp(Cqe),
    /// Host to Controller Data; its data follows.
    H2cData(H2cData),
    /// Controller to Host Data; its data follows.
    C2hData(C2hData),
    /// Ready to Transfer.
    R2t(R2t),
}

impl Pdu {
    /// Reads a whole header of that type. `data_len` is what the lengths in the common header leave
    /// for data.
    pub(super) fn parse(pdu_type: PduType, header: &[u8], data_len: u32) -> Result<Self, Error> {
        // Cannot be too short: the caller has gathered HLEN bytes.
        const SHORT: Error = Error::InvalidField { offset: HLEN };
        Ok(match pdu_type {
            PduType::IcReq => Self::IcReq(IcReq::parse(IcReqHeader::view(header).ok_or(SHORT)?)?),
            PduType::IcResp => {
                Self::IcResp(IcResp::parse(IcRespHeader::view(header).ok_or(SHORT)?)?)
            }
            PduType::H2cTermReq | PduType::C2hTermReq => Self::TermReq(TermReq::parse(
                pdu_type.from(),
                TermReqHeader::view(header).ok_or(SHORT)?,
            )),
            PduType::CapsuleCmd => Self::CapsuleCmd(CapsuleCmd {
                sqe: CapsuleCmdHeader::view(header).ok_or(SHORT)?.sqe,
                len_bytes: data_len,
            }),
            PduType::CapsuleResp => {
                Self::CapsuleResp(CapsuleRespHeader::view(header).ok_or(SHORT)?.cqe)
            }
            PduType::H2cData => {
                let header = DataHeader::view(header).ok_or(SHORT)?;
                Self::H2cData(H2cData {
                    cid: Cid::new(header.cccid.get()),
                    ttag: header.ttag.get(),
                    offset: header.datao.get(),
                    len_bytes: checked_data_len(header, data_len)?,
                    last: header.common.flags & LAST_PDU != 0,
                })
            }
            PduType::C2hData => {
                let header = DataHeader::view(header).ok_or(SHORT)?;
                let data = C2hData {
                    cid: Cid::new(header.cccid.get()),
                    offset: header.datao.get(),
                    len_bytes: checked_data_len(header, data_len)?,
                    last: header.common.flags & LAST_PDU != 0,
                    success: header.common.flags & SUCCESS != 0,
                };
                // TCP 3.3.2.1: SUCCESS without LAST_PDU is an invalid FLAGS field.
                if data.success && !data.last {
                    return Err(Error::InvalidField { offset: FLAGS });
                }
                Self::C2hData(data)
            }
            PduType::R2t => {
                let header = R2tHeader::view(header).ok_or(SHORT)?;
                Self::R2t(R2t {
                    cid: Cid::new(header.cccid.get()),
                    ttag: header.ttag.get(),
                    offset: header.r2to.get(),
                    len_bytes: header.r2tl.get(),
                })
            }
        })
    }
}

pub(super) const FLAGS: u8 = 1;
pub(super) const PDO: u8 = 3;
pub(super) const PLEN: u8 = 4;
const DATAL: u8 = 16;

/// DATAL has to agree with what PLEN leaves. That it is a multiple of four is not asked: a
/// pass-through command of five bytes has no other way, and nothing here depends on it.
fn checked_data_len(header: &DataHeader, data_len: u32) -> Result<u32, Error> {
    if header.datal.get() == data_len {
        Ok(data_len)
    } else {
        Err(Error::InvalidField { offset: DATAL })
    }
}

/// What a common header says about its PDU's lengths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) pdu_type: PduType,
    /// Header and its digest.
    pub(super) head_len: usize,
    pub(super) has_header_digest: bool,
    /// Padding between them and the data.
    pub(super) pad_len: usize,
    pub(super) data_len: u32,
    pub(super) has_data_digest: bool,
}

impl Layout {
    /// Checks a common header that `receiver` has received, on a connection with those digests and
    /// its own data alignment.
    pub(super) fn parse(
        header: &CommonHeader,
        receiver: End,
        digests: Digests,
        alignment: Alignment,
    ) -> Result<Self, Error> {
        let invalid = |offset| Err(Error::InvalidField { offset });
        let Some(pdu_type) = PduType::from_raw(header.pdu_type).filter(|t| t.from() != receiver)
        else {
            // Reserved, or of the opposite direction (TCP 3.3).
            return invalid(0);
        };
        let plen = header.plen.get() as usize;
        let hlen = pdu_type.hlen();
        if pdu_type.is_term() {
            // TCP 3.5: one of a wrong length is ignored.
            if plen < hlen || plen > super::TERM_MAX || usize::from(header.hlen) != hlen {
                return Err(Error::BadTermReq);
            }
            return Ok(Self {
                pdu_type,
                head_len: plen,
                has_header_digest: false,
                pad_len: 0,
                data_len: 0,
                has_data_digest: false,
            });
        }
        let flags = Digests::from_bits_truncate(header.flags);
        let has_header_digest = pdu_type.has_header_digest() && digests.contains(Digests::HEADER);
        if pdu_type.has_header_digest() && flags.contains(Digests::HEADER) != has_header_digest {
            return invalid(FLAGS);
        }
        if usize::from(header.hlen) != hlen {
            return invalid(HLEN);
        }
        let head_len = hlen
            + if has_header_digest {
                super::DIGEST_LEN
            } else {
                0
            };
        let mut layout = Self {
            pdu_type,
            head_len,
            has_header_digest,
            pad_len: 0,
            data_len: 0,
            has_data_digest: false,
        };
        // A capsule without data: PDO and DDGSTF have no meaning.
        let has_data = match pdu_type {
            PduType::CapsuleCmd => plen != head_len,
            other => other.has_data(),
        };
        if !has_data {
            return if plen == head_len {
                Ok(layout)
            } else {
                invalid(PLEN)
            };
        }
        layout.has_data_digest = digests.contains(Digests::DATA);
        if flags.contains(Digests::DATA) != layout.has_data_digest {
            return invalid(FLAGS);
        }
        let pdo = usize::from(header.pdo);
        if pdo < head_len || !pdo.is_multiple_of(alignment.bytes()) {
            return invalid(PDO);
        }
        layout.pad_len = pdo - head_len;
        let around = pdo
            + if layout.has_data_digest {
                super::DIGEST_LEN
            } else {
                0
            };
        let Some(data_len) = plen.checked_sub(around) else {
            return invalid(PLEN);
        };
        if data_len == 0 && pdu_type == PduType::CapsuleCmd {
            // Padding or a digest without data.
            return invalid(PLEN);
        }
        // Fits: PLEN has 32 bits.
        layout.data_len = data_len as u32;
        Ok(layout)
    }
}
