//! Reservation commands (Base 7.5 to 7.8), part of [`super::nvm::Command`].

use super::Sqe;
use super::nvm::opcode;
use crate::ids::{Cid, Nsid};
use crate::sgl::Sgl;
use crate::{U16, U32, U64};

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

/// Values of Reservation Register's action (RREGA).
pub mod register_action {
    /// Register Reservation Key.
    pub const REGISTER: u8 = 0;
    /// Unregister Reservation Key.
    pub const UNREGISTER: u8 = 1;
    /// Replace Reservation Key.
    pub const REPLACE: u8 = 2;
}

/// Values of Reservation Acquire's action (RACQA).
pub mod acquire_action {
    /// Acquire.
    pub const ACQUIRE: u8 = 0;
    /// Preempt.
    pub const PREEMPT: u8 = 1;
    /// Preempt and Abort.
    pub const PREEMPT_AND_ABORT: u8 = 2;
}

/// Values of Reservation Release's action (RRELA).
pub mod release_action {
    /// Release.
    pub const RELEASE: u8 = 0;
    /// Clear.
    pub const CLEAR: u8 = 1;
}

/// Values of Reservation Register's Change Persist Through Power Loss State (CPTPL).
pub mod persist_change {
    /// No change.
    pub const NONE: u8 = 0;
    /// Reservations are released and registrants cleared on a power loss.
    pub const CLEAR: u8 = 2;
    /// Reservations and registrants persist.
    pub const SET: u8 = 3;
}

/// Reservation Type (RTYPE, Base 7.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReservationType {
    /// 1h: the holder writes, all read.
    WriteExclusive,
    /// 2h: the holder reads and writes.
    ExclusiveAccess,
    /// 3h: registrants write, all read.
    WriteExclusiveRegistrantsOnly,
    /// 4h: registrants read and write.
    ExclusiveAccessRegistrantsOnly,
    /// 5h: registrants write, all read; every registrant is a holder.
    WriteExclusiveAllRegistrants,
    /// 6h: registrants read and write; every registrant is a holder.
    ExclusiveAccessAllRegistrants,
}

impl ReservationType {
    /// All six.
    pub const ALL: [Self; 6] = [
        Self::WriteExclusive,
        Self::ExclusiveAccess,
        Self::WriteExclusiveRegistrantsOnly,
        Self::ExclusiveAccessRegistrantsOnly,
        Self::WriteExclusiveAllRegistrants,
        Self::ExclusiveAccessAllRegistrants,
    ];

    /// The type with that value; `None` for 0 (no reservation) and reserved ones.
    #[must_use]
    pub const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            1 => Self::WriteExclusive,
            2 => Self::ExclusiveAccess,
            3 => Self::WriteExclusiveRegistrantsOnly,
            4 => Self::ExclusiveAccessRegistrantsOnly,
            5 => Self::WriteExclusiveAllRegistrants,
            6 => Self::ExclusiveAccessAllRegistrants,
            _ => return None,
        })
    }

    /// Its value.
    #[must_use]
    pub const fn raw(self) -> u8 {
        match self {
            Self::WriteExclusive => 1,
            Self::ExclusiveAccess => 2,
            Self::WriteExclusiveRegistrantsOnly => 3,
            Self::ExclusiveAccessRegistrantsOnly => 4,
            Self::WriteExclusiveAllRegistrants => 5,
            Self::ExclusiveAccessAllRegistrants => 6,
        }
    }

    /// Every registrant is a holder.
    #[must_use]
    pub const fn is_all_registrants(self) -> bool {
        self.raw() >= 5
    }

    /// Only the holder has what others have not; registrants do not.
    #[must_use]
    pub const fn is_holder_only(self) -> bool {
        self.raw() <= 2
    }

    /// Others cannot even read.
    #[must_use]
    pub const fn is_exclusive_access(self) -> bool {
        self.raw().is_multiple_of(2)
    }
}

wire! {
    /// Head of the Reservation Status Data Structure, extended form (Base 7.8, EDS 1).
    /// [`RegisteredController`]s follow.
    pub struct ReservationStatus: 64 {
        /// Generation (GEN): counts Register, Preempt and Clear.
        0 => pub generation: U32,
        /// Reservation Type (RTYPE), 0 when there is none.
        4 => pub rtype: u8,
        /// Number of Registrants (REGSTRNT): entries that follow.
        5 => pub registrants: U16,
        7 => _r7: [u8; 2],
        /// Persist Through Power Loss State (PTPLS).
        9 => pub persist: u8,
        10 => _r10: [u8; 54],
    }
}

wire! {
    /// Registrant Extended Data Structure (Base 7.8).
    pub struct RegisteredController: 64 {
        /// Controller ID; FFFFh where controllers are dynamic.
        0 => pub cntlid: U16,
        /// Reservation Status (RCSTS): bit 0, the host holds the reservation.
        2 => pub status: u8,
        3 => _r3: [u8; 5],
        /// Reservation Key.
        8 => pub key: U64,
        /// Host Identifier, 128 bits.
        16 => pub hostid: [u8; 16],
        32 => _r32: [u8; 32],
    }
}

impl ReservationStatus {
    /// The page of head and registrants.
    #[must_use]
    pub fn emit(&self, registrants: &[RegisteredController]) -> Vec<u8> {
        let head = Self {
            registrants: U16::new(u16::try_from(registrants.len()).unwrap_or(u16::MAX)),
            ..*self
        };
        let mut page = head.bytes().to_vec();
        for registrant in registrants {
            page.extend_from_slice(registrant.bytes());
        }
        page
    }

    /// Head and registrants of a page; of a page that was cut off, the registrants that are whole.
    #[must_use]
    pub fn parse(page: &[u8]) -> Option<(Self, Vec<RegisteredController>)> {
        let head = *Self::view(page)?;
        let rest = page.get(Self::SIZE..)?;
        let entries = rest
            .chunks_exact(RegisteredController::SIZE)
            .filter_map(RegisteredController::view)
            .take(usize::from(head.registrants.get()))
            .copied();
        Some((head, entries.collect()))
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn types_have_the_values_of_the_specification() {
        for (number, rtype) in (1..).zip(ReservationType::ALL) {
            assert_eq!(rtype.raw(), number);
            assert_eq!(ReservationType::from_raw(number), Some(rtype));
        }
        assert_eq!(ReservationType::from_raw(0), None);
        assert_eq!(ReservationType::from_raw(7), None);
        assert!(ReservationType::ExclusiveAccess.is_exclusive_access());
        assert!(!ReservationType::WriteExclusiveAllRegistrants.is_exclusive_access());
    }

    proptest! {
        #[test]
        fn reports_round_trip(
            generation: u32,
            rtype in 0u8..7,
            entries in proptest::collection::vec((any::<bool>(), any::<u64>(), any::<[u8; 16]>()), 0..300),
            cut: bool,
        ) {
            let entries: Vec<_> = entries.into_iter().map(|(holds, key, hostid)| RegisteredController {
                cntlid: U16::new(0xFFFF),
                status: holds.into(),
                key: U64::new(key),
                hostid,
                ..RegisteredController::zeroed()
            }).collect();
            let head = ReservationStatus { generation: U32::new(generation), rtype, ..ReservationStatus::zeroed() };
            let mut page = head.emit(&entries);
            prop_assert_eq!(page.len(), 64 + 64 * entries.len());
            if cut {
                page.truncate(page.len() - 1);
            }
            if let Some((again, listed)) = ReservationStatus::parse(&page) {
                prop_assert_eq!(usize::from(again.registrants.get()), entries.len());
                prop_assert_eq!((again.generation.get(), again.rtype), (generation, rtype));
                prop_assert_eq!(&listed[..], &entries[..entries.len() - usize::from(cut)]);
            } else {
                prop_assert!(cut && entries.is_empty());
            }
        }
    }
}
