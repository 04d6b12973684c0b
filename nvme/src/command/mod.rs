//! Commands: the submission queue entry (SQE) and what it means on an Admin or an I/O queue.

pub mod admin;
pub mod fabrics;
pub mod nvm;
pub mod reservation;

use crate::ids::{Cid, Nsid};
use crate::sgl::Sgl;
use crate::status::{CodeSpace, Status, StatusCode};
use crate::{U16, U32, U64};

/// Opcode of every Fabrics command (Base 6).
pub const FABRICS_OPCODE: u8 = 0x7F;

wire! {
    /// A submission queue entry: the head of a command capsule (Base 4.1.1, Common Command Format).
    pub struct Sqe: 64 {
        /// Opcode (OPC).
        0 => pub opcode: u8,
        /// FUSE 1:0, PSDT 7:6.
        1 => pub flags: u8,
        /// Command Identifier.
        2 => pub cid: U16,
        /// Namespace Identifier. Byte 4 is the command type (FCTYPE) in Fabrics commands.
        4 => pub nsid: U32,
        /// Command dword 2.
        8 => pub cdw2: U32,
        /// Command dword 3.
        12 => pub cdw3: U32,
        /// Metadata Pointer (MPTR).
        16 => pub mptr: U64,
        /// Data Pointer (DPTR): SGL 1.
        24 => pub dptr: [u8; 16],
        /// Command dword 10.
        40 => pub cdw10: U32,
        /// Command dword 11.
        44 => pub cdw11: U32,
        /// Command dword 12.
        48 => pub cdw12: U32,
        /// Command dword 13.
        52 => pub cdw13: U32,
        /// Command dword 14.
        56 => pub cdw14: U32,
        /// Command dword 15.
        60 => pub cdw15: U32,
    }
}

/// Fused operation (FUSE, Base 4.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fuse {
    /// 00b: a command of its own.
    Normal,
    /// 01b: the first of two.
    First,
    /// 10b: the second of two.
    Second,
    /// 11b.
    Reserved,
}

/// Which way a command's data goes: bits 1:0 of its opcode, of its FCTYPE in Fabrics commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataTransfer {
    /// 00b.
    None,
    /// 01b: as a write does.
    HostToController,
    /// 10b: as a read does.
    ControllerToHost,
    /// 11b.
    Bidirectional,
}

/// The kind of queue on which a command arrived; opcodes mean something else on each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueKind {
    /// Queue 0.
    Admin,
    /// All others.
    Io,
}

/// PSDT 01b: SGLs, metadata pointer is an address. The only value Fabrics allows besides 10b.
const PSDT_SGL: u8 = 0x40;
const PSDT_MASK: u8 = 0xC0;
const FUSE_MASK: u8 = 0x03;

impl Sqe {
    /// The entry at the start of a capsule.
    #[inline]
    #[must_use]
    pub fn cast(bytes: &[u8; Self::SIZE]) -> &Self {
        zerocopy::transmute_ref!(bytes)
    }

    /// A command capsule's entry and its in-capsule data; `None` when it is shorter than an entry.
    #[inline]
    #[must_use]
    pub fn split(capsule: &[u8]) -> Option<(&Self, &[u8])> {
        let (entry, data) = capsule.split_first_chunk()?;
        Some((Self::cast(entry), data))
    }

    /// The 64 bytes.
    #[inline]
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        zerocopy::transmute!(self)
    }

    /// Command identifier.
    #[inline]
    #[must_use]
    pub fn cid(&self) -> Cid {
        Cid::new(self.cid.get())
    }

    /// Namespace identifier; without meaning in Fabrics commands.
    #[inline]
    #[must_use]
    pub fn nsid(&self) -> Nsid {
        Nsid::new(self.nsid.get())
    }

    /// The data pointer, which Fabrics always fills with an SGL descriptor.
    #[inline]
    pub fn sgl(&self) -> Result<Sgl, Status> {
        Sgl::parse(&self.dptr)
    }

    /// Replaces the data pointer.
    #[inline]
    pub fn set_sgl(&mut self, sgl: &Sgl) {
        self.dptr = sgl.emit();
    }

    /// Replaces the command identifier.
    #[inline]
    pub fn set_cid(&mut self, cid: Cid) {
        self.cid = U16::new(cid.get());
    }

    /// Is it half of a fused operation?
    #[inline]
    #[must_use]
    pub fn fuse(&self) -> Fuse {
        match self.flags & FUSE_MASK {
            0 => Fuse::Normal,
            1 => Fuse::First,
            2 => Fuse::Second,
            _ => Fuse::Reserved,
        }
    }

    /// Makes it half of a fused operation, or a command of its own.
    #[inline]
    pub fn set_fuse(&mut self, fuse: Fuse) {
        let bits = match fuse {
            Fuse::Normal => 0,
            Fuse::First => 1,
            Fuse::Second => 2,
            Fuse::Reserved => 3,
        };
        self.flags = self.flags & !FUSE_MASK | bits;
    }

    /// Is the data pointer an SGL (PSDT 01b or 10b)?
    #[inline]
    #[must_use]
    pub fn uses_sgl(&self) -> bool {
        matches!(self.flags & PSDT_MASK, 0x40 | 0x80)
    }

    /// What a Fabrics controller without fused operations asks of the flags byte: FUSE 0, reserved
    /// bits ignored, PSDT saying SGL (Base 4.1.1).
    #[inline]
    pub fn check_flags(&self) -> Result<(), Status> {
        if self.uses_sgl() && self.flags & FUSE_MASK == 0 {
            Ok(())
        } else {
            Err(StatusCode::InvalidField.dnr())
        }
    }

    /// Is it a Fabrics command?
    #[inline]
    #[must_use]
    pub fn is_fabrics(&self) -> bool {
        self.opcode == FABRICS_OPCODE
    }

    /// Fabrics Command Type (FCTYPE), byte 4; only of Fabrics commands.
    #[inline]
    #[must_use]
    pub fn fctype(&self) -> u8 {
        self.nsid.get() as u8
    }

    /// Which way the data goes.
    #[inline]
    #[must_use]
    pub fn data_transfer(&self) -> DataTransfer {
        let code = if self.is_fabrics() {
            self.fctype()
        } else {
            self.opcode
        };
        match code & 3 {
            0 => DataTransfer::None,
            1 => DataTransfer::HostToController,
            2 => DataTransfer::ControllerToHost,
            _ => DataTransfer::Bidirectional,
        }
    }

    /// In which space the command's specific status codes are.
    #[must_use]
    pub fn code_space(&self) -> CodeSpace {
        if self.is_fabrics() {
            CodeSpace::Fabrics
        } else {
            CodeSpace::Nvm
        }
    }

    /// A 64-bit field in two consecutive dwords, the lower one first.
    #[inline]
    fn wide(low: U32, high: U32) -> u64 {
        u64::from(low.get()) | u64::from(high.get()) << 32
    }

    /// An entry with those head fields, SGL as data pointer and zero elsewhere.
    #[inline]
    fn blank(opcode: u8, cid: Cid, nsid: Nsid, sgl: &Sgl) -> Self {
        Self {
            opcode,
            flags: PSDT_SGL,
            cid: U16::new(cid.get()),
            nsid: U32::new(nsid.get()),
            dptr: sgl.emit(),
            ..Self::zeroed()
        }
    }
}

/// A command of any kind, without identifier and data pointer (see [`Sqe::cid`], [`Sqe::sgl`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Of the Admin queue.
    Admin(admin::Command),
    /// Of an I/O queue.
    Nvm(nvm::Command),
    /// Fabrics commands come on both.
    Fabrics(fabrics::Command),
}

impl Command {
    /// What the entry means on a queue of that kind. The error is the status to complete it with.
    #[inline]
    pub fn parse(queue: QueueKind, sqe: &Sqe) -> Result<Self, Status> {
        if sqe.is_fabrics() {
            return fabrics::Command::parse(sqe).map(Self::Fabrics);
        }
        match queue {
            QueueKind::Io => nvm::Command::parse(sqe).map(Self::Nvm),
            QueueKind::Admin => admin::Command::parse(sqe).map(Self::Admin),
        }
    }

    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        match self {
            Self::Admin(command) => command.emit(cid, sgl),
            Self::Nvm(command) => command.emit(cid, sgl),
            Self::Fabrics(command) => command.emit(cid, sgl),
        }
    }
}

/// A bit of a dword.
#[inline]
const fn bit(dword: u32, bit: u32) -> bool {
    dword >> bit & 1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn flags() {
        let mut sqe = Sqe::zeroed();
        assert_eq!(sqe.check_flags(), Err(StatusCode::InvalidField.dnr()));
        sqe.flags = 0x40;
        assert_eq!((sqe.check_flags(), sqe.fuse()), (Ok(()), Fuse::Normal));
        sqe.flags = 0x81;
        assert_eq!(
            (sqe.check_flags().is_err(), sqe.fuse()),
            (true, Fuse::First)
        );
        for fuse in [Fuse::Normal, Fuse::First, Fuse::Second, Fuse::Reserved] {
            sqe.set_fuse(fuse);
            assert_eq!((sqe.fuse(), sqe.flags & 0xFC), (fuse, 0x80));
        }
    }

    #[test]
    fn capsule_is_split() {
        assert!(Sqe::split(&[0; 63]).is_none());
        let (_, data) = Sqe::split(&[7; 70]).unwrap();
        assert_eq!(data, [7; 6]);
    }

    /// Random entries with a bias towards opcodes that exist.
    fn entries() -> impl Strategy<Value = [u8; 64]> {
        let opcode = prop_oneof![0u8..0x20, Just(FABRICS_OPCODE), any::<u8>()];
        (any::<[u8; 64]>(), opcode, 0u8..10).prop_map(|(mut bytes, opcode, fctype)| {
            bytes[0] = opcode;
            if opcode == FABRICS_OPCODE {
                bytes[4] = fctype;
            }
            bytes
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2048))]

        /// Whatever is understood means the same after emitting it again.
        #[test]
        fn meaning_survives(bytes in entries(), admin in any::<bool>()) {
            let queue = if admin { QueueKind::Admin } else { QueueKind::Io };
            let sqe = Sqe::cast(&bytes);
            if let Ok(command) = Command::parse(queue, sqe) {
                let emitted = command.emit(sqe.cid(), &Sgl::NONE);
                let again = Sqe::cast(&emitted);
                prop_assert_eq!(Command::parse(queue, again), Ok(command));
                prop_assert_eq!(again.cid(), sqe.cid());
                prop_assert_eq!(again.sgl(), Ok(Sgl::NONE));
                prop_assert_eq!(again.check_flags(), Ok(()));
                prop_assert_eq!(again.data_transfer(), sqe.data_transfer());
                // What is emitted is made of what was there: no bit appears from nowhere.
                for (offset, (ours, theirs)) in emitted.iter().zip(bytes).enumerate() {
                    if !(24..40).contains(&offset) && offset != 1 {
                        prop_assert_eq!(ours & !theirs, 0, "byte {}", offset);
                    }
                }
            }
        }

        #[test]
        fn entry_round_trips(bytes in any::<[u8; 64]>()) {
            prop_assert_eq!(Sqe::cast(&bytes).to_bytes(), bytes);
        }
    }
}
