//! I/O commands of the NVM Command Set (NVM 3.3) and those common to all sets (Base 7).

use bitfield_struct::bitfield;

use super::reservation::{
    ReservationAcquire, ReservationRegister, ReservationRelease, ReservationReport,
};
use super::{Sqe, bit};
use crate::ids::{Cid, Lba, Nsid};
use crate::sgl::Sgl;
use crate::status::{Status, StatusCode};
use crate::{U16, U32, U64};

/// Opcodes (NVM 3.3, Base 7).
pub mod opcode {
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Write Uncorrectable.
    pub const WRITE_UNCORRECTABLE: u8 = 0x04;
    /// Compare.
    pub const COMPARE: u8 = 0x05;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset Management.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// Verify.
    pub const VERIFY: u8 = 0x0C;
    /// Reservation Register.
    pub const RESERVATION_REGISTER: u8 = 0x0D;
    /// Reservation Report.
    pub const RESERVATION_REPORT: u8 = 0x0E;
    /// Reservation Acquire.
    pub const RESERVATION_ACQUIRE: u8 = 0x11;
    /// Reservation Release.
    pub const RESERVATION_RELEASE: u8 = 0x15;
    /// Copy.
    pub const COPY: u8 = 0x19;
}

/// Most logical blocks that one command names.
pub const MAX_BLOCKS: u32 = 1 << 16;

/// Upper half of command dword 12 of commands that name a range of blocks (NVM 3.3.4, 3.3.6).
#[bitfield(u16)]
#[derive(PartialEq, Eq)]
pub struct IoControl {
    /// Command Extension Type (CETYPE).
    #[bits(4)]
    pub cetype: u8,
    /// Directive Type (DTYPE), of writes.
    #[bits(4)]
    pub dtype: u8,
    /// Storage Tag Check (STC).
    pub stc: bool,
    /// Deallocate (DEAC), of Write Zeroes.
    pub deac: bool,
    /// Protection Information Check (PRCHK).
    #[bits(3)]
    pub prchk: u8,
    /// Protection Information Action (PRACT).
    pub pract: bool,
    /// Force Unit Access (FUA).
    pub fua: bool,
    /// Limited Retry (LR).
    pub lr: bool,
}

/// Protection information tags in command dwords 14 and 15, for 16-bit guard formats
/// (NVM 3.3.4, 5.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tags {
    /// Initial or expected logical block reference tag; with a storage tag, both.
    pub reference: u32,
    /// Application tag.
    pub application: u16,
    /// Application tag mask.
    pub mask: u16,
}

macro_rules! block_commands {
    ($($(#[$meta:meta])* $name:ident = $opcode:expr;)+) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name {
            /// Namespace.
            pub nsid: Nsid,
            /// First logical block (SLBA).
            pub slba: Lba,
            /// Number of logical blocks, 1 to 65536 (on the wire 0's based).
            pub blocks: u32,
            /// Flags in the upper half of dword 12.
            pub control: IoControl,
            /// Dataset Management (DSM) hints: access frequency 3:0, latency 5:4, sequential 6,
            /// incompressible 7.
            pub dsm: u8,
            /// Directive Specific (DSPEC), of writes.
            pub dspec: u16,
            /// Protection information tags.
            pub tags: Tags,
        }

        impl Default for $name {
            /// One block at LBA 0 of namespace 0, no flags.
            fn default() -> Self {
                Self {
                    nsid: Nsid::NONE,
                    slba: Lba::new(0),
                    blocks: 1,
                    control: IoControl::new(),
                    dsm: 0,
                    dspec: 0,
                    tags: Tags::default(),
                }
            }
        }

        impl $name {
            /// Opcode.
            pub const OPCODE: u8 = $opcode;

            #[inline]
            fn decode(sqe: &Sqe) -> Self {
                let (cdw12, cdw13) = (sqe.cdw12.get(), sqe.cdw13.get());
                let cdw15 = sqe.cdw15.get();
                Self {
                    nsid: sqe.nsid(),
                    slba: Lba::new(Sqe::wide(sqe.cdw10, sqe.cdw11)),
                    blocks: (cdw12 & 0xFFFF) + 1,
                    control: IoControl::from_bits((cdw12 >> 16) as u16),
                    dsm: cdw13 as u8,
                    dspec: (cdw13 >> 16) as u16,
                    tags: Tags {
                        reference: sqe.cdw14.get(),
                        application: cdw15 as u16,
                        mask: (cdw15 >> 16) as u16,
                    },
                }
            }

            /// The 64 bytes. `blocks` outside 1 to 65536 is a bug of the caller.
            #[inline]
            #[must_use]
            pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
                debug_assert!((1..=MAX_BLOCKS).contains(&self.blocks), "{} blocks", self.blocks);
                let slba = self.slba.get();
                let count = self.blocks.wrapping_sub(1) & 0xFFFF;
                Sqe {
                    cdw10: U32::new(slba as u32),
                    cdw11: U32::new((slba >> 32) as u32),
                    cdw12: U32::new(count | u32::from(self.control.into_bits()) << 16),
                    cdw13: U32::new(u32::from(self.dsm) | u32::from(self.dspec) << 16),
                    cdw14: U32::new(self.tags.reference),
                    cdw15: U32::new(
                        u32::from(self.tags.application) | u32::from(self.tags.mask) << 16,
                    ),
                    ..Sqe::blank(Self::OPCODE, cid, self.nsid, sgl)
                }
                .to_bytes()
            }

            /// The last block named; `None` if the range wraps around.
            #[inline]
            #[must_use]
            pub const fn last_lba(&self) -> Option<Lba> {
                match self.slba.get().checked_add(self.blocks as u64 - 1) {
                    Some(last) => Some(Lba::new(last)),
                    None => None,
                }
            }
        }
    )+};
}

block_commands! {
    /// Read (NVM 3.3.4).
    Read = opcode::READ;
    /// Write (NVM 3.3.6).
    Write = opcode::WRITE;
    /// Compare (NVM 3.3.1).
    Compare = opcode::COMPARE;
    /// Verify (NVM 3.3.5): the controller reads, nothing is transferred.
    Verify = opcode::VERIFY;
    /// Write Uncorrectable (NVM 3.3.7).
    WriteUncorrectable = opcode::WRITE_UNCORRECTABLE;
    /// Write Zeroes (NVM 3.3.8).
    WriteZeroes = opcode::WRITE_ZEROES;
}

/// Flush (Base 7.2). With [`Nsid::BROADCAST`] all namespaces, when Identify's VWC says so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flush {
    /// Namespace.
    pub nsid: Nsid,
}

/// Dataset Management (NVM 3.3.3). Its data are [`DsmRange`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DatasetManagement {
    /// Namespace.
    pub nsid: Nsid,
    /// Number of ranges (NR), 1 to 256 (on the wire 0's based).
    pub ranges: u16,
    /// What the host says about them.
    pub attributes: DsmAttributes,
}

/// Attributes of Dataset Management (dword 11).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct DsmAttributes {
    /// Integral Dataset for Read (IDR).
    pub integral_read: bool,
    /// Integral Dataset for Write (IDW).
    pub integral_write: bool,
    /// Deallocate (AD).
    pub deallocate: bool,
    #[bits(29)]
    __: u32,
}

wire! {
    /// A range of Dataset Management (NVM 3.3.3, Range Definition).
    pub struct DsmRange: 16 {
        /// Context Attributes.
        0 => pub cattr: U32,
        /// Length in logical blocks (not 0's based).
        4 => pub nlb: U32,
        /// First logical block.
        8 => pub slba: U64,
    }
}

/// Copy (NVM 3.3.2). Its data are source ranges in the format named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Namespace of the destination.
    pub nsid: Nsid,
    /// First block of the destination (SDLBA).
    pub sdlba: Lba,
    /// Number of source ranges (NR), 1 to 256 (on the wire 0's based).
    pub ranges: u16,
    /// Format of the source ranges (CDFT).
    pub format: u8,
    /// Protection Information Read (PRINFOR).
    pub prinfo_read: u8,
    /// Flags of the write side; bit 9 here is Storage Tag Check Read (STCR).
    pub control: IoControl,
    /// Directive Specific (DSPEC).
    pub dspec: u16,
    /// Protection information tags of the write side.
    pub tags: Tags,
}

wire! {
    /// A source range of Copy, format 0h or 2h (NVM 3.3.2).
    pub struct CopyRange: 32 {
        /// Source Namespace Identifier (SNSID), of format 2h.
        0 => pub snsid: U32,
        4 => _r4: [u8; 4],
        /// First logical block.
        8 => pub slba: U64,
        /// Number of logical blocks, 0's based.
        16 => pub nlb: U16,
        18 => _r18: [u8; 4],
        /// Source Options (SOPT), of format 2h.
        22 => pub sopt: U16,
        /// Expected initial logical block reference tag.
        24 => pub reference: U32,
        /// Expected application tag.
        28 => pub application: U16,
        /// Expected application tag mask.
        30 => pub mask: U16,
    }
}

/// An I/O command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Flush.
    Flush(Flush),
    /// Write.
    Write(Write),
    /// Read.
    Read(Read),
    /// Write Uncorrectable.
    WriteUncorrectable(WriteUncorrectable),
    /// Compare.
    Compare(Compare),
    /// Write Zeroes.
    WriteZeroes(WriteZeroes),
    /// Dataset Management.
    DatasetManagement(DatasetManagement),
    /// Verify.
    Verify(Verify),
    /// Reservation Register.
    ReservationRegister(ReservationRegister),
    /// Reservation Report.
    ReservationReport(ReservationReport),
    /// Reservation Acquire.
    ReservationAcquire(ReservationAcquire),
    /// Reservation Release.
    ReservationRelease(ReservationRelease),
    /// Copy.
    Copy(Copy),
}

impl Command {
    /// What the entry means. An unknown opcode is *Invalid Command Opcode*.
    #[inline]
    pub fn parse(sqe: &Sqe) -> Result<Self, Status> {
        Ok(match sqe.opcode {
            opcode::READ => Self::Read(Read::decode(sqe)),
            opcode::WRITE => Self::Write(Write::decode(sqe)),
            opcode::FLUSH => Self::Flush(Flush { nsid: sqe.nsid() }),
            _ => return Self::parse_rare(sqe),
        })
    }

    fn parse_rare(sqe: &Sqe) -> Result<Self, Status> {
        let nsid = sqe.nsid();
        let cdw10 = sqe.cdw10.get();
        let action = (cdw10 & 7) as u8;
        let ignore_key = bit(cdw10, 3);
        let rtype = (cdw10 >> 8) as u8;
        Ok(match sqe.opcode {
            opcode::WRITE_UNCORRECTABLE => {
                Self::WriteUncorrectable(WriteUncorrectable::decode(sqe))
            }
            opcode::COMPARE => Self::Compare(Compare::decode(sqe)),
            opcode::WRITE_ZEROES => Self::WriteZeroes(WriteZeroes::decode(sqe)),
            opcode::VERIFY => Self::Verify(Verify::decode(sqe)),
            opcode::DATASET_MANAGEMENT => Self::DatasetManagement(DatasetManagement {
                nsid,
                ranges: (cdw10 & 0xFF) as u16 + 1,
                attributes: DsmAttributes::from_bits(sqe.cdw11.get() & 7),
            }),
            opcode::COPY => Self::Copy(Copy::decode(sqe)),
            opcode::RESERVATION_REGISTER => Self::ReservationRegister(ReservationRegister {
                nsid,
                action,
                ignore_key,
                persist: (cdw10 >> 30) as u8,
            }),
            opcode::RESERVATION_REPORT => Self::ReservationReport(ReservationReport {
                nsid,
                dwords: cdw10,
                extended: bit(sqe.cdw11.get(), 0),
            }),
            opcode::RESERVATION_ACQUIRE => Self::ReservationAcquire(ReservationAcquire {
                nsid,
                action,
                ignore_key,
                rtype,
            }),
            opcode::RESERVATION_RELEASE => Self::ReservationRelease(ReservationRelease {
                nsid,
                action,
                ignore_key,
                rtype,
            }),
            _ => return Err(StatusCode::InvalidOpcode.dnr()),
        })
    }

    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        match self {
            Self::Flush(command) => command.emit(cid, sgl),
            Self::Write(command) => command.emit(cid, sgl),
            Self::Read(command) => command.emit(cid, sgl),
            Self::WriteUncorrectable(command) => command.emit(cid, sgl),
            Self::Compare(command) => command.emit(cid, sgl),
            Self::WriteZeroes(command) => command.emit(cid, sgl),
            Self::DatasetManagement(command) => command.emit(cid, sgl),
            Self::Verify(command) => command.emit(cid, sgl),
            Self::ReservationRegister(command) => command.emit(cid, sgl),
            Self::ReservationReport(command) => command.emit(cid, sgl),
            Self::ReservationAcquire(command) => command.emit(cid, sgl),
            Self::ReservationRelease(command) => command.emit(cid, sgl),
            Self::Copy(command) => command.emit(cid, sgl),
        }
    }

    /// Namespace that the command names.
    #[inline]
    #[must_use]
    pub const fn nsid(&self) -> Nsid {
        match self {
            Self::Flush(command) => command.nsid,
            Self::Write(command) => command.nsid,
            Self::Read(command) => command.nsid,
            Self::WriteUncorrectable(command) => command.nsid,
            Self::Compare(command) => command.nsid,
            Self::WriteZeroes(command) => command.nsid,
            Self::DatasetManagement(command) => command.nsid,
            Self::Verify(command) => command.nsid,
            Self::ReservationRegister(command) => command.nsid,
            Self::ReservationReport(command) => command.nsid,
            Self::ReservationAcquire(command) => command.nsid,
            Self::ReservationRelease(command) => command.nsid,
            Self::Copy(command) => command.nsid,
        }
    }
}

impl Flush {
    /// The 64 bytes.
    #[inline]
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        Sqe::blank(opcode::FLUSH, cid, self.nsid, sgl).to_bytes()
    }
}

impl DatasetManagement {
    /// The 64 bytes. `ranges` outside 1 to 256 is a bug of the caller.
    #[inline]
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        debug_assert!((1..=256).contains(&self.ranges), "{} ranges", self.ranges);
        Sqe {
            cdw10: U32::new(u32::from(self.ranges.wrapping_sub(1)) & 0xFF),
            cdw11: U32::new(self.attributes.into_bits()),
            ..Sqe::blank(opcode::DATASET_MANAGEMENT, cid, self.nsid, sgl)
        }
        .to_bytes()
    }
}

impl DsmRange {
    /// `blocks` blocks from `slba` on, no attributes.
    #[must_use]
    pub fn new(slba: Lba, blocks: u32) -> Self {
        Self {
            cattr: U32::ZERO,
            nlb: U32::new(blocks),
            slba: U64::new(slba.get()),
        }
    }

    /// The ranges at the front of `data`, at most `count`; `None` when there are fewer bytes.
    #[must_use]
    pub fn list(data: &[u8], count: u16) -> Option<&[Self]> {
        let (list, _) =
            <[Self] as zerocopy::FromBytes>::ref_from_prefix_with_elems(data, usize::from(count))
                .ok()?;
        Some(list)
    }
}

impl Copy {
    fn decode(sqe: &Sqe) -> Self {
        let cdw12 = sqe.cdw12.get();
        let cdw15 = sqe.cdw15.get();
        Self {
            nsid: sqe.nsid(),
            sdlba: Lba::new(Sqe::wide(sqe.cdw10, sqe.cdw11)),
            ranges: (cdw12 & 0xFF) as u16 + 1,
            format: (cdw12 >> 8 & 0xF) as u8,
            prinfo_read: (cdw12 >> 12 & 0xF) as u8,
            control: IoControl::from_bits((cdw12 >> 16) as u16),
            dspec: (sqe.cdw13.get() >> 16) as u16,
            tags: Tags {
                reference: sqe.cdw14.get(),
                application: cdw15 as u16,
                mask: (cdw15 >> 16) as u16,
            },
        }
    }

    /// The 64 bytes. `ranges` outside 1 to 256 is a bug of the caller.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        debug_assert!((1..=256).contains(&self.ranges), "{} ranges", self.ranges);
        let sdlba = self.sdlba.get();
        Sqe {
            cdw10: U32::new(sdlba as u32),
            cdw11: U32::new((sdlba >> 32) as u32),
            cdw12: U32::new(
                u32::from(self.ranges.wrapping_sub(1)) & 0xFF
                    | u32::from(self.format & 0xF) << 8
                    | u32::from(self.prinfo_read & 0xF) << 12
                    | u32::from(self.control.into_bits()) << 16,
            ),
            cdw13: U32::new(u32::from(self.dspec) << 16),
            cdw14: U32::new(self.tags.reference),
            cdw15: U32::new(u32::from(self.tags.application) | u32::from(self.tags.mask) << 16),
            ..Sqe::blank(opcode::COPY, cid, self.nsid, sgl)
        }
        .to_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn read_bytes() {
        let read = Read {
            nsid: Nsid::new(1),
            slba: Lba::new(0x0102_0304_0506_0708),
            blocks: MAX_BLOCKS,
            control: IoControl::new().with_fua(true).with_prchk(5),
            ..Default::default()
        };
        let bytes = read.emit(Cid::new(0xABCD), &Sgl::NONE);
        assert_eq!(bytes[..8], [0x02, 0x40, 0xCD, 0xAB, 1, 0, 0, 0]);
        assert_eq!(bytes[39], 0x40);
        assert_eq!(
            bytes[40..52],
            [8, 7, 6, 5, 4, 3, 2, 1, 0xFF, 0xFF, 0x00, 0x54]
        );
        assert_eq!(bytes[52..], [0; 12]);
    }

    #[test]
    fn last_block() {
        let mut write = Write {
            slba: Lba::new(u64::MAX - 1),
            blocks: 2,
            ..Default::default()
        };
        assert_eq!(write.last_lba(), Some(Lba::new(u64::MAX)));
        write.blocks = 3;
        assert_eq!(write.last_lba(), None);
    }

    #[test]
    fn dsm_ranges_are_listed() {
        let mut data = DsmRange::new(Lba::new(3), 4).bytes().to_vec();
        data.extend_from_slice(DsmRange::new(Lba::new(9), 1).bytes());
        let list = DsmRange::list(&data, 2).unwrap();
        assert_eq!(
            list.iter()
                .map(|range| range.slba.get())
                .collect::<Vec<_>>(),
            [3, 9]
        );
        assert!(DsmRange::list(&data, 3).is_none());
        assert_eq!(DsmRange::list(&data, 0).unwrap().len(), 0);
    }

    #[test]
    fn unknown_opcode() {
        let sqe = Sqe {
            opcode: 0x77,
            ..Sqe::zeroed()
        };
        assert_eq!(Command::parse(&sqe), Err(StatusCode::InvalidOpcode.dnr()));
    }

    proptest! {
        #[test]
        fn write_round_trips(nsid: u32, slba: u64, blocks in 1..=MAX_BLOCKS, control: u16, dsm: u8, dspec: u16, tags: (u32, u16, u16)) {
            let write = Write {
                nsid: Nsid::new(nsid),
                slba: Lba::new(slba),
                blocks,
                control: IoControl::from_bits(control),
                dsm,
                dspec,
                tags: Tags { reference: tags.0, application: tags.1, mask: tags.2 },
            };
            let bytes = write.emit(Cid::new(1), &Sgl::NONE);
            prop_assert_eq!(Command::parse(Sqe::cast(&bytes)), Ok(Command::Write(write)));
        }
    }
}
