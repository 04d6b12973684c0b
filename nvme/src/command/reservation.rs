//! Reservation commands (Base 7.5 to 7.8), part of [`super::nvm::Command`].

use super::Sqe;
use super::nvm::opcode;
use crate::ids::{Cid, Nsid};
use crate::sgl::Sgl;
use crate::{U32, U64};

/// Reservation Register (Base 7.6). Its data is [`ReservationKeys`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReservationRegister {
    /// Namespace.
    pub nsid: Nsid,
    /// Action (RREGA): 0 register, 1 unregister, 2 replace.
    pub action: u8,
    /// Ignore Existing Key (IEKEY).
    pub ignore_key: bool,
    /// Change Persist Through Power Loss State (CPTPL): 0 no change, 2 clear, 3 set.
    pub persist: u8,
}

/// Reservation Report (Base 7.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReservationReport {
    /// Namespace.
    pub nsid: Nsid,
    /// Length of the data in dwords, 0's based (NUMD).
    pub dwords: u32,
    /// Extended Data Structure (EDS): 128-bit host identifiers.
    pub extended: bool,
}

/// Reservation Acquire (Base 7.5). Its data is [`ReservationKeys`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReservationAcquire {
    /// Namespace.
    pub nsid: Nsid,
    /// Action (RACQA): 0 acquire, 1 preempt, 2 preempt and abort.
    pub action: u8,
    /// Ignore Existing Key (IEKEY).
    pub ignore_key: bool,
    /// Reservation Type (RTYPE).
    pub rtype: u8,
}

/// Reservation Release (Base 7.7). Its data is the current key, 8 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReservationRelease {
    /// Namespace.
    pub nsid: Nsid,
    /// Action (RRELA): 0 release, 1 clear.
    pub action: u8,
    /// Ignore Existing Key (IEKEY).
    pub ignore_key: bool,
    /// Reservation Type (RTYPE).
    pub rtype: u8,
}

wire! {
    /// Data of Reservation Register and Reservation Acquire (Base 7.5, 7.6).
    pub struct ReservationKeys: 16 {
        /// Current Reservation Key (CRKEY).
        0 => pub current: U64,
        /// New (NRKEY) or preempted (PRKEY) key.
        8 => pub second: U64,
    }
}

impl ReservationRegister {
    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        let cdw10 = u32::from(self.action & 7)
            | u32::from(self.ignore_key) << 3
            | u32::from(self.persist & 3) << 30;
        Sqe {
            cdw10: U32::new(cdw10),
            ..Sqe::blank(opcode::RESERVATION_REGISTER, cid, self.nsid, sgl)
        }
        .to_bytes()
    }
}

impl ReservationReport {
    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        Sqe {
            cdw10: U32::new(self.dwords),
            cdw11: U32::new(u32::from(self.extended)),
            ..Sqe::blank(opcode::RESERVATION_REPORT, cid, self.nsid, sgl)
        }
        .to_bytes()
    }
}

impl ReservationAcquire {
    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        let cdw10 = reservation_dword(self.action, self.ignore_key, self.rtype);
        Sqe {
            cdw10,
            ..Sqe::blank(opcode::RESERVATION_ACQUIRE, cid, self.nsid, sgl)
        }
        .to_bytes()
    }
}

impl ReservationRelease {
    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        let cdw10 = reservation_dword(self.action, self.ignore_key, self.rtype);
        Sqe {
            cdw10,
            ..Sqe::blank(opcode::RESERVATION_RELEASE, cid, self.nsid, sgl)
        }
        .to_bytes()
    }
}

fn reservation_dword(action: u8, ignore_key: bool, rtype: u8) -> U32 {
    U32::new(u32::from(action & 7) | u32::from(ignore_key) << 3 | u32::from(rtype) << 8)
}
