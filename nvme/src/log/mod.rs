//! Log pages (Base 5.1.12).

pub mod ana;
pub mod discovery;
pub mod telemetry;

use bitfield_struct::bitfield;
use bitflags::bitflags;

use crate::ids::{Cid, Lba, Nsid, Qid};
use crate::status::Status;
use crate::{U16, U32, U64, U128};

pub use crate::identify::NamespaceList as ChangedNamespaces;

open_enum! {
    /// Log Page Identifier (LID, Base 5.1.12.1).
    pub enum LogPageId {
        /// 00h: Supported Log Pages ([`SupportedLogPages`]).
        Supported = 0x00,
        /// 01h: Error Information ([`ErrorEntry`]).
        Error = 0x01,
        /// 02h: SMART / Health Information ([`Smart`]).
        Smart = 0x02,
        /// 03h: Firmware Slot Information ([`FirmwareSlot`]).
        FirmwareSlot = 0x03,
        /// 04h: Changed Attached Namespace List ([`ChangedNamespaces`]).
        ChangedNamespaces = 0x04,
        /// 05h: Commands Supported and Effects ([`Effects`]).
        Effects = 0x05,
        /// 06h: Device Self-test.
        SelfTest = 0x06,
        /// 07h: Telemetry Host-Initiated ([`telemetry`]).
        TelemetryHost = 0x07,
        /// 08h: Telemetry Controller-Initiated ([`telemetry`]).
        TelemetryController = 0x08,
        /// 09h: Endurance Group Information.
        EnduranceGroup = 0x09,
        /// 0Ah: Predictable Latency Per NVM Set.
        PredictableLatency = 0x0A,
        /// 0Bh: Predictable Latency Event Aggregate.
        PredictableLatencyAggregate = 0x0B,
        /// 0Ch: Asymmetric Namespace Access ([`ana`]).
        Ana = 0x0C,
        /// 0Dh: Persistent Event Log.
        PersistentEvent = 0x0D,
        /// 0Fh: Endurance Group Event Aggregate.
        EnduranceGroupAggregate = 0x0F,
        /// 12h: Feature Identifiers Supported and Effects.
        FeatureEffects = 0x12,
        /// 70h: Discovery ([`discovery`]).
        Discovery = 0x70,
        /// 71h: Host Discovery.
        HostDiscovery = 0x71,
        /// 80h: Reservation Notification ([`ReservationNotification`]).
        Reservation = 0x80,
        /// 81h: Sanitize Status.
        Sanitize = 0x81,
        /// BFh: Changed Zone List (zoned command set).
        ChangedZones = 0xBF,
    }
}

wire! {
    /// Supported Log Pages (LID 00h, Base 5.1.12.1.1): an entry per LID.
    pub struct SupportedLogPages: 1024 {
        /// Bit 0 supported (LSUPP), bit 1 offset may be an index (IOS), 31:16 page specific.
        0 => pub entry: [U32; 256],
    }
}

impl SupportedLogPages {
    /// Marks those pages as supported.
    #[must_use]
    pub fn with(pages: &[LogPageId]) -> Self {
        let mut log = Self::zeroed();
        for page in pages {
            if let Some(entry) = log.entry.get_mut(usize::from(page.raw())) {
                *entry = U32::new(1);
            }
        }
        log
    }

    /// Is that page supported?
    #[must_use]
    pub fn supports(&self, page: LogPageId) -> bool {
        self.entry
            .get(usize::from(page.raw()))
            .is_some_and(|entry| entry.get() & 1 != 0)
    }
}

wire! {
    /// Error Information Log Entry (LID 01h, Base 5.1.12.1.2). The newest comes first; an error
    /// count of 0 is an entry that is not used.
    pub struct ErrorEntry: 64 {
        /// Error Count: unique, ascending, 0 is not used.
        0 => pub count: U64,
        /// Submission Queue ID, or FFFFh.
        8 => pub sqid: U16,
        /// Command ID, or FFFFh.
        10 => pub cid: U16,
        /// Status Field 15:1, phase tag 0.
        12 => pub status: U16,
        /// Parameter Error Location: byte 7:0, bit 10:8; FFFFh when not of a parameter.
        14 => pub location: U16,
        /// First logical block that had the error.
        16 => pub lba: U64,
        /// Namespace.
        24 => pub nsid: U32,
        /// Vendor Specific Information Available: a log page, or 0.
        28 => pub vendor_page: u8,
        /// Transport Type (TRTYPE).
        29 => pub trtype: u8,
        /// Command Set Indicator (CSI).
        30 => pub csi: u8,
        /// Opcode (OPC).
        31 => pub opcode: u8,
        /// Command Specific Information.
        32 => pub command_specific: U64,
        /// Transport Type Specific Information.
        40 => pub transport_specific: U16,
        42 => _r42: [u8; 21],
        /// Log Page Version: 1 means that `opcode` and `csi` are filled.
        63 => pub version: u8,
    }
}

impl ErrorEntry {
    /// An entry about that command; the parameter location is "none".
    #[must_use]
    pub fn new(count: u64, sqid: Qid, cid: Cid, opcode: u8, status: Status) -> Self {
        Self {
            count: U64::new(count),
            sqid: U16::new(sqid.get()),
            cid: U16::new(cid.get()),
            status: U16::new(status.to_cqe()),
            location: U16::new(0xFFFF),
            opcode,
            version: 1,
            ..Self::zeroed()
        }
    }

    /// The same with namespace and block.
    #[must_use]
    pub fn at(mut self, nsid: Nsid, lba: Lba) -> Self {
        self.nsid = U32::new(nsid.get());
        self.lba = U64::new(lba.get());
        self
    }

    /// How the command ended.
    #[must_use]
    pub fn status(&self) -> Status {
        Status::from_cqe(self.status.get())
    }
}

wire! {
    /// SMART / Health Information (LID 02h, Base 5.1.12.1.3).
    pub struct Smart: 512 {
        /// Critical Warning (CW), [`CriticalWarning`].
        0 => pub critical_warning: u8,
        /// Composite Temperature in kelvins.
        1 => pub temperature: U16,
        /// Available Spare in per cent.
        3 => pub available_spare: u8,
        /// Available Spare Threshold in per cent.
        4 => pub spare_threshold: u8,
        /// Percentage Used, up to 255.
        5 => pub percentage_used: u8,
        /// Endurance Group Critical Warning Summary (EGCWS).
        6 => pub endurance_warning: u8,
        7 => _r7: [u8; 25],
        /// Data Units Read, units of 1000 blocks of 512 bytes, rounded up.
        32 => pub data_units_read: U128,
        /// Data Units Written, units of 1000 blocks of 512 bytes, rounded up.
        48 => pub data_units_written: U128,
        /// Host Read Commands.
        64 => pub host_reads: U128,
        /// Host Write Commands.
        80 => pub host_writes: U128,
        /// Controller Busy Time in minutes.
        96 => pub busy_minutes: U128,
        /// Power Cycles.
        112 => pub power_cycles: U128,
        /// Power On Hours.
        128 => pub power_on_hours: U128,
        /// Unexpected Power Losses.
        144 => pub unsafe_shutdowns: U128,
        /// Media and Data Integrity Errors.
        160 => pub media_errors: U128,
        /// Number of Error Information Log Entries over the controller's life.
        176 => pub error_entries: U128,
        /// Warning Composite Temperature Time in minutes.
        192 => pub warning_minutes: U32,
        /// Critical Composite Temperature Time in minutes.
        196 => pub critical_minutes: U32,
        /// Temperature Sensors 1 to 8 in kelvins.
        200 => pub sensors: [U16; 8],
        /// Thermal Management Temperature 1 Transition Count.
        216 => pub tmt1_transitions: U32,
        /// Thermal Management Temperature 2 Transition Count.
        220 => pub tmt2_transitions: U32,
        /// Total Time For Thermal Management Temperature 1 in seconds.
        224 => pub tmt1_seconds: U32,
        /// Total Time For Thermal Management Temperature 2 in seconds.
        228 => pub tmt2_seconds: U32,
        232 => _r232: [u8; 280],
    }
}

bitflags! {
    /// Critical Warning of [`Smart`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct CriticalWarning: u8 {
        /// Available spare is below its threshold.
        const SPARE = 1 << 0;
        /// Temperature is over or under a threshold.
        const TEMPERATURE = 1 << 1;
        /// Reliability is degraded.
        const RELIABILITY = 1 << 2;
        /// All media are read only.
        const READ_ONLY = 1 << 3;
        /// Volatile memory backup failed.
        const BACKUP = 1 << 4;
        /// Persistent memory region is read only or unreliable.
        const PERSISTENT_MEMORY = 1 << 5;
    }
}

/// Number of data units (thousands of 512 bytes, rounded up) as [`Smart`] counts them.
#[must_use]
pub const fn data_units(bytes: u128) -> u128 {
    bytes.div_ceil(512_000)
}

wire! {
    /// Firmware Slot Information (LID 03h, Base 5.1.12.1.4).
    pub struct FirmwareSlot: 512 {
        /// Active Firmware Info (AFI): active slot 2:0, slot after the next reset 6:4.
        0 => pub afi: u8,
        1 => _r1: [u8; 7],
        /// Firmware Revision for slots 1 to 7 (FRS), ASCII.
        8 => pub frs: [[u8; 8]; 7],
        64 => _r64: [u8; 448],
    }
}

impl FirmwareSlot {
    /// That revision, active in slot 1.
    #[must_use]
    pub fn single(revision: &str) -> Self {
        let mut log = Self {
            afi: 1,
            ..Self::zeroed()
        };
        if let Some(slot) = log.frs.first_mut() {
            crate::text::pad_ascii(slot, revision);
        }
        log
    }
}

impl ChangedNamespaces {
    /// The list that says "more than 1024 have changed" (Base 5.1.12.1.5).
    #[must_use]
    pub fn overflow() -> Self {
        let mut list = Self::zeroed();
        if let Some(first) = list.nsid.first_mut() {
            *first = U32::new(Nsid::BROADCAST.get());
        }
        list
    }

    /// Have more than 1024 changed?
    #[must_use]
    pub fn is_overflow(&self) -> bool {
        self.nsid
            .first()
            .is_some_and(|first| first.get() == Nsid::BROADCAST.get())
    }
}

wire! {
    /// Commands Supported and Effects (LID 05h, Base 5.1.12.1.6).
    pub struct Effects: 4096 {
        /// Admin Command Supported (ACS0 to ACS255), [`CommandEffects`].
        0 => pub admin: [U32; 256],
        /// I/O Command Supported (IOCS0 to IOCS255), [`CommandEffects`].
        1024 => pub io: [U32; 256],
        2048 => _r2048: [u8; 2048],
    }
}

/// What a command does besides its purpose (Base 5.1.12.1.6).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CommandEffects {
    /// Command Supported (CSUPP).
    pub supported: bool,
    /// Logical Block Content Change (LBCC).
    pub content_change: bool,
    /// Namespace Capability Change (NCC).
    pub namespace_capability_change: bool,
    /// Namespace Inventory Change (NIC).
    pub namespace_inventory_change: bool,
    /// Controller Capability Change (CCC).
    pub controller_capability_change: bool,
    #[bits(9)]
    __: u16,
    /// Command Submission and Execution Relaxations (CSER).
    #[bits(2)]
    pub relaxations: u8,
    /// Command Submission and Execution (CSE): 0 no restriction.
    #[bits(3)]
    pub restriction: u8,
    /// UUID Selection Supported (USS).
    pub uuid: bool,
    /// Command Scope (CSP).
    #[bits(12)]
    pub scope: u16,
}

impl CommandEffects {
    /// Supported, no effects.
    pub const SUPPORTED: Self = Self::new().with_supported(true);
    /// Supported, changes the content of blocks.
    pub const WRITES: Self = Self::SUPPORTED.with_content_change(true);
}

impl Effects {
    /// Sets the effects of an Admin command.
    pub fn set_admin(&mut self, opcode: u8, effects: CommandEffects) {
        if let Some(entry) = self.admin.get_mut(usize::from(opcode)) {
            *entry = U32::new(effects.into_bits());
        }
    }

    /// Sets the effects of an I/O command.
    pub fn set_io(&mut self, opcode: u8, effects: CommandEffects) {
        if let Some(entry) = self.io.get_mut(usize::from(opcode)) {
            *entry = U32::new(effects.into_bits());
        }
    }

    /// Effects of an I/O command.
    #[must_use]
    pub fn io(&self, opcode: u8) -> CommandEffects {
        CommandEffects::from_bits(
            self.io
                .get(usize::from(opcode))
                .map_or(0, |entry| entry.get()),
        )
    }
}

wire! {
    /// Reservation Notification (LID 80h, Base 5.1.12.1.32).
    pub struct ReservationNotification: 64 {
        /// Log Page Count: ascending; 0 when there is no notification.
        0 => pub count: U64,
        /// Type: 0 empty, 1 registration preempted, 2 reservation released, 3 preempted.
        8 => pub kind: u8,
        /// Number of further pages, up to 255.
        9 => pub available: u8,
        10 => _r10: [u8; 2],
        /// Namespace.
        12 => pub nsid: U32,
        16 => _r16: [u8; 48],
    }
}

/// The part of a log page that Get Log Page asks for: `len` bytes from `offset` on, which is what
/// is there, and zeros beyond. `None` when the offset is behind the end, which is *Invalid Field in
/// Command* (Base 5.1.12).
#[must_use]
pub fn window(page: &[u8], offset: u64, len: usize) -> Option<Vec<u8>> {
    let rest = page.get(usize::try_from(offset).ok()?..)?;
    let mut part = rest.get(..len.min(rest.len()))?.to_vec();
    part.resize(len, 0);
    Some(part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::StatusCode;
    use proptest::prelude::*;

    #[test]
    fn supported_pages() {
        let log = SupportedLogPages::with(&[LogPageId::Supported, LogPageId::Discovery]);
        assert!(log.supports(LogPageId::Discovery) && !log.supports(LogPageId::Ana));
        assert_eq!(log.bytes()[0x70 * 4], 1);
    }

    #[test]
    fn error_entry() {
        let entry = ErrorEntry::new(
            1,
            Qid::new(2),
            Cid::new(3),
            2,
            StatusCode::LbaOutOfRange.dnr(),
        )
        .at(Nsid::new(4), Lba::new(5));
        assert_eq!(entry.status(), StatusCode::LbaOutOfRange.dnr());
        assert_eq!(entry.bytes()[24], 4);
    }

    #[test]
    fn smaller_pages() {
        assert_eq!(data_units(1), 1);
        assert_eq!(data_units(512_000), 1);
        assert_eq!(data_units(512_001), 2);
        assert_eq!(
            &FirmwareSlot::single("0.1").bytes()[..12],
            b"\x01\0\0\0\0\0\0\x000.1 "
        );
        assert!(ChangedNamespaces::overflow().is_overflow());
        assert!(!ChangedNamespaces::zeroed().is_overflow());
        let mut effects = Effects::zeroed();
        effects.set_io(1, CommandEffects::WRITES);
        effects.set_admin(6, CommandEffects::SUPPORTED);
        assert_eq!(effects.io(1), CommandEffects::WRITES);
        assert_eq!((effects.bytes()[1028], effects.bytes()[24]), (3, 1));
    }

    #[test]
    fn windows() {
        assert_eq!(window(b"abcdef", 2, 2).as_deref(), Some(&b"cd"[..]));
        assert_eq!(window(b"abcdef", 4, 4).as_deref(), Some(&b"ef\0\0"[..]));
        assert_eq!(window(b"abcdef", 6, 1).as_deref(), Some(&b"\0"[..]));
        assert_eq!(window(b"abcdef", 7, 1), None);
        assert_eq!(window(b"abcdef", u64::MAX, 1), None);
    }

    proptest! {
        #[test]
        fn random_bytes_are_read(bytes in proptest::collection::vec(any::<u8>(), 4096)) {
            prop_assert_eq!(SupportedLogPages::view(&bytes).unwrap().bytes(), &bytes[..1024]);
            prop_assert_eq!(ErrorEntry::view(&bytes).unwrap().bytes(), &bytes[..64]);
            prop_assert_eq!(Smart::view(&bytes).unwrap().bytes(), &bytes[..512]);
            prop_assert_eq!(FirmwareSlot::view(&bytes).unwrap().bytes(), &bytes[..512]);
            prop_assert_eq!(Effects::view(&bytes).unwrap().bytes(), &bytes[..]);
            prop_assert_eq!(ChangedNamespaces::view(&bytes).unwrap().bytes(), &bytes[..]);
            prop_assert_eq!(ReservationNotification::view(&bytes).unwrap().bytes(), &bytes[..64]);
            let bits = u32::from_le_bytes(bytes[..4].try_into().unwrap());
            prop_assert_eq!(CommandEffects::from_bits(bits).into_bits(), bits);
        }
    }
}
