//! PDU headers, byte for byte (TCP 3.6.2).

use crate::command::Sqe;
use crate::completion::Cqe;
use crate::{U16, U32};

wire! {
    /// PDU Common Header (TCP 3.6.2.1, figure 19).
    pub struct CommonHeader: 8 {
        /// PDU-Type.
        0 => pub pdu_type: u8,
        /// FLAGS.
        1 => pub flags: u8,
        /// HLEN: length of the header without its digest, in bytes.
        2 => pub hlen: u8,
        /// PDO: where the data begins, in bytes from the start of the PDU.
        3 => pub pdo: u8,
        /// PLEN: length of the whole PDU in bytes, digests and padding included.
        4 => pub plen: U32,
    }
}

wire! {
    /// Initialize Connection Request (TCP 3.6.2.2, figure 20).
    pub struct IcReqHeader: 128 {
        /// Common header.
        0 => pub common: CommonHeader,
        /// PFV: format version, 0.
        8 => pub pfv: U16,
        /// HPDA: alignment of data towards the host.
        10 => pub hpda: u8,
        /// DGST: digests that the host asks for.
        11 => pub dgst: u8,
        /// MAXR2T: outstanding R2Ts for a command, 0's based.
        12 => pub maxr2t: U32,
        16 => pub(super) _r16: [u8; 112],
    }
}

wire! {
    /// Initialize Connection Response (TCP 3.6.2.3, figure 21).
    pub struct IcRespHeader: 128 {
        /// Common header.
        0 => pub common: CommonHeader,
        /// PFV: format version, 0.
        8 => pub pfv: U16,
        /// CPDA: alignment of data towards the controller.
        10 => pub cpda: u8,
        /// DGST: digests in use.
        11 => pub dgst: u8,
        /// MAXH2CDATA: most data of one H2CData PDU, in bytes.
        12 => pub maxh2cdata: U32,
        16 => pub(super) _r16: [u8; 112],
    }
}

wire! {
    /// Terminate Connection Request of either direction (TCP 3.6.2.4 and 3.6.2.5, figures 22, 23).
    pub struct TermReqHeader: 24 {
        /// Common header.
        0 => pub common: CommonHeader,
        /// FES: Fatal Error Status.
        8 => pub fes: U16,
        /// FEI: Fatal Error Information.
        10 => pub fei: U32,
        14 => pub(super) _r14: [u8; 10],
    }
}

wire! {
    /// Command Capsule (TCP 3.6.2.6, figure 24).
    pub struct CapsuleCmdHeader: 72 {
        /// Common header.
        0 => pub common: CommonHeader,
        /// CCSQE.
        8 => pub sqe: Sqe,
    }
}

wire! {
    /// Response Capsule (TCP 3.6.2.7, figure 25).
    pub struct CapsuleRespHeader: 24 {
        /// Common header.
        0 => pub common: CommonHeader,
        /// RCCQE.
        8 => pub cqe: Cqe,
    }
}

wire! {
    /// Data Transfer of either direction (TCP 3.6.2.8 and 3.6.2.9, figures 26, 27).
    pub struct DataHeader: 24 {
        /// Common header.
        0 => pub common: CommonHeader,
        /// CCCID: command that the data belongs to.
        8 => pub cccid: U16,
        /// TTAG: tag of the R2T (reserved in C2HData).
        10 => pub ttag: U16,
        /// DATAO: where in the command's data buffer, in bytes.
        12 => pub datao: U32,
        /// DATAL: how many bytes.
        16 => pub datal: U32,
        20 => pub(super) _r20: [u8; 4],
    }
}

wire! {
    /// Ready to Transfer (TCP 3.6.2.10, figure 28).
    pub struct R2tHeader: 24 {
        /// Common header.
        0 => pub common: CommonHeader,
        /// CCCID: command whose data is wanted.
        8 => pub cccid: U16,
        /// TTAG: the controller's tag for this transfer.
        10 => pub ttag: U16,
        /// R2TO: where in the command's data buffer, in bytes.
        12 => pub r2to: U32,
        /// R2TL: how many bytes.
        16 => pub r2tl: U32,
        20 => pub(super) _r20: [u8; 4],
    }
}

/// FLAGS bit 2 of data PDUs: the last of the command (C2H) or of the R2T (H2C).
pub const LAST_PDU: u8 = 1 << 2;
/// FLAGS bit 3 of C2HData: the command has succeeded and no response capsule follows.
pub const SUCCESS: u8 = 1 << 3;
