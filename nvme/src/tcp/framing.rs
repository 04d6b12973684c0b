//! The bytes in front of a PDU's data.

use super::digest::crc32c;
use super::error::FatalStatus;
use super::pdu::{C2hData, H2cData, IcReq, IcResp, PduType, R2t};
use super::wire::{
    CapsuleCmdHeader, CapsuleRespHeader, CommonHeader, DataHeader, IcReqHeader, IcRespHeader,
    LAST_PDU, R2tHeader, SUCCESS, TermReqHeader,
};
use super::{Alignment, DIGEST_LEN, Digests, End};
use crate::command::Sqe;
use crate::completion::Cqe;
use crate::ids::Cid;
use crate::{U16, U32};

/// Most bytes in front of a PDU's data: header, header digest and padding. A TermReq is longer.
/// Reached with a command capsule of 76 bytes aligned to 72.
pub const HEAD_MAX: usize = 144;
/// Length of the two PDUs of connection set-up.
const SETUP_LEN: usize = IcReqHeader::SIZE;
/// Longest TermReq: its header and a copy of the header that was wrong (TCP 3.5).
pub const TERM_MAX: usize = TermReqHeader::SIZE + 128;

const _: () = {
    let mut alignment = 4;
    while alignment <= 128 {
        assert!((CapsuleCmdHeader::SIZE + DIGEST_LEN).next_multiple_of(alignment) <= HEAD_MAX);
        assert!((DataHeader::SIZE + DIGEST_LEN).next_multiple_of(alignment) <= HEAD_MAX);
        alignment += 4;
    }
    assert!(SETUP_LEN == IcRespHeader::SIZE);
};

/// How one end writes its PDUs on a connection: the digests in use, and the alignment that the other
/// end asked for. The default is that of a connection without either.
///
/// Every function writes what goes in front of the data (header, header digest, padding) to the
/// front of `out` and returns its length. Data and, with [`Digests::DATA`], the [`super::Crc32c`]
/// of the data follow it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Framing {
    /// Digests in use.
    pub digests: Digests,
    /// Where data has to begin.
    pub alignment: Alignment,
}

impl Framing {
    /// Is data followed by its digest?
    #[inline]
    #[must_use]
    pub const fn has_data_digest(&self) -> bool {
        self.digests.contains(Digests::DATA)
    }

    /// Command Capsule with `data_len` bytes of in-capsule data.
    #[inline]
    pub fn capsule_cmd(&self, sqe: &Sqe, data_len: u32, out: &mut [u8; HEAD_MAX]) -> usize {
        let data = (data_len > 0).then_some(data_len);
        let (common, len) = self.common(PduType::CapsuleCmd, 0, data);
        let (head, rest) = out.split_at_mut(CommonHeader::SIZE);
        head.copy_from_slice(&common.to_le_bytes());
        let (body, _) = rest.split_at_mut(Sqe::SIZE);
        body.copy_from_slice(sqe.bytes());
        self.seal(CapsuleCmdHeader::SIZE, len, out)
    }

    /// Response Capsule.
    #[inline]
    pub fn capsule_resp(&self, cqe: &Cqe, out: &mut [u8; HEAD_MAX]) -> usize {
        let (common, len) = self.common(PduType::CapsuleResp, 0, None);
        let [low, high] = cqe.to_words();
        self.words([common, low, high], len, out)
    }

    /// Host to Controller Data Transfer.
    #[inline]
    pub fn h2c_data(&self, data: &H2cData, out: &mut [u8; HEAD_MAX]) -> usize {
        let flags = if data.last { LAST_PDU } else { 0 };
        let (common, len) = self.common(PduType::H2cData, flags, Some(data.len_bytes));
        let second = transfer(data.cid, data.ttag, data.offset);
        self.words([common, second, data.len_bytes.into()], len, out)
    }

    /// Controller to Host Data Transfer.
    #[inline]
    pub fn c2h_data(&self, data: &C2hData, out: &mut [u8; HEAD_MAX]) -> usize {
        let flags = if data.last { LAST_PDU } else { 0 } | if data.success { SUCCESS } else { 0 };
        let (common, len) = self.common(PduType::C2hData, flags, Some(data.len_bytes));
        let second = transfer(data.cid, 0, data.offset);
        self.words([common, second, data.len_bytes.into()], len, out)
    }

    /// Ready to Transfer.
    #[inline]
    pub fn r2t(&self, r2t: &R2t, out: &mut [u8; HEAD_MAX]) -> usize {
        let (common, len) = self.common(PduType::R2t, 0, None);
        let second = transfer(r2t.cid, r2t.ttag, r2t.offset);
        self.words([common, second, r2t.len_bytes.into()], len, out)
    }

    /// The common header, and where the data begins. `None` for a PDU without data.
    #[inline]
    fn common(&self, pdu_type: PduType, flags: u8, data: Option<u32>) -> (u64, usize) {
        let head_len = pdu_type.hlen() + self.digests.header_len();
        let (data_at, plen, digests) = match data {
            Some(len) => {
                let data_at = head_len.next_multiple_of(self.alignment.bytes());
                let around = (data_at + self.digests.data_len()) as u32;
                debug_assert!(len.checked_add(around).is_some(), "a PDU beyond 32 bits");
                (data_at, len.wrapping_add(around), self.digests)
            }
            None => (head_len, head_len as u32, self.digests & Digests::HEADER),
        };
        // Fits a byte: at most HEAD_MAX.
        let pdo = if data.is_some() { data_at as u8 } else { 0 };
        let bytes = [
            pdu_type.raw(),
            flags | digests.bits(),
            pdu_type.hlen() as u8,
            pdo,
        ];
        let word = u64::from(u32::from_le_bytes(bytes)) | u64::from(plen) << 32;
        (word, data_at)
    }

    /// A header of 24 bytes as words: put together in registers, three stores. (A profile of writes to
    /// a namespace beyond the cache shows a tenth of the time here. It is the store buffer that drains
    /// the 4 KiB before it; a header written field by field waits just as long.)
    #[inline]
    fn words(&self, words: [u64; 3], len: usize, out: &mut [u8; HEAD_MAX]) -> usize {
        let (head, _) = out.as_chunks_mut();
        for (to, word) in head.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
        self.seal(3 * size_of::<u64>(), len, out)
    }

    /// Behind the header its digest, if there is one, and zeros up to `len`.
    #[inline]
    fn seal(&self, header_len: usize, len: usize, out: &mut [u8; HEAD_MAX]) -> usize {
        if len == header_len {
            return len;
        }
        let (header, rest) = out.split_at_mut(header_len);
        let pad = rest.get_mut(..len - header_len).unwrap_or_default();
        pad.fill(0);
        if self.digests.contains(Digests::HEADER)
            && let Some(digest) = pad.first_chunk_mut()
        {
            *digest = crc32c(header).to_le_bytes();
        }
        len
    }
}

/// Bytes 8 to 15 of the headers of data PDUs and R2T.
#[inline]
fn transfer(cid: Cid, ttag: u16, offset: u32) -> u64 {
    u64::from(cid.get()) | u64::from(ttag) << 16 | u64::from(offset) << 32
}

const _: () = assert!(
    CapsuleRespHeader::SIZE == 24 && DataHeader::SIZE == 24 && R2tHeader::SIZE == 24,
    "words"
);

impl IcReq {
    /// The whole PDU.
    #[must_use]
    pub fn emit(&self) -> [u8; SETUP_LEN] {
        let header = IcReqHeader {
            common: setup(PduType::IcReq),
            hpda: self.hpda.raw(),
            dgst: self.digests.bits(),
            maxr2t: U32::new(self.maxr2t),
            ..IcReqHeader::zeroed()
        };
        zerocopy::transmute!(header)
    }
}

impl IcResp {
    /// The whole PDU.
    #[must_use]
    pub fn emit(&self) -> [u8; SETUP_LEN] {
        let header = IcRespHeader {
            common: setup(PduType::IcResp),
            cpda: self.cpda.raw(),
            dgst: self.digests.bits(),
            maxh2cdata: U32::new(self.maxh2cdata),
            ..IcRespHeader::zeroed()
        };
        zerocopy::transmute!(header)
    }
}

fn setup(pdu_type: PduType) -> CommonHeader {
    CommonHeader {
        pdu_type: pdu_type.raw(),
        hlen: SETUP_LEN as u8,
        plen: U32::new(SETUP_LEN as u32),
        ..CommonHeader::zeroed()
    }
}

/// Writes the TermReq of `from` about `wrong`, the header in which the error was found; returns its
/// length. It never has digests (TCP 3.3.1.1).
pub fn term_req(
    from: End,
    fes: FatalStatus,
    fei: u32,
    wrong: &[u8],
    out: &mut [u8; TERM_MAX],
) -> usize {
    let wrong = wrong.get(..TERM_MAX - TermReqHeader::SIZE).unwrap_or(wrong);
    let pdu_type = match from {
        End::Host => PduType::H2cTermReq,
        End::Controller => PduType::C2hTermReq,
    };
    let len = TermReqHeader::SIZE + wrong.len();
    let header = TermReqHeader {
        common: CommonHeader {
            pdu_type: pdu_type.raw(),
            hlen: TermReqHeader::SIZE as u8,
            plen: U32::new(len as u32),
            ..CommonHeader::zeroed()
        },
        fes: U16::new(fes.raw()),
        fei: U32::new(fei),
        ..TermReqHeader::zeroed()
    };
    let (head, data) = out.split_at_mut(TermReqHeader::SIZE);
    head.copy_from_slice(header.bytes());
    for (to, from) in data.iter_mut().zip(wrong) {
        *to = *from;
    }
    len
}
