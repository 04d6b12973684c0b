//! Features: what Get Features and Set Features read and write (Base 5.1.25.1, NVM 4.1.3).

use bitfield_struct::bitfield;

use crate::U32;

open_enum! {
    /// Feature Identifier (FID, Base 5.1.25.1).
    pub enum FeatureId {
        /// 01h: Arbitration.
        Arbitration = 0x01,
        /// 02h: Power Management.
        PowerManagement = 0x02,
        /// 03h: LBA Range Type.
        LbaRangeType = 0x03,
        /// 04h: Temperature Threshold.
        TemperatureThreshold = 0x04,
        /// 05h: Error Recovery.
        ErrorRecovery = 0x05,
        /// 06h: Volatile Write Cache.
        VolatileWriteCache = 0x06,
        /// 07h: Number of Queues.
        NumberOfQueues = 0x07,
        /// 08h: Interrupt Coalescing (memory-based only).
        InterruptCoalescing = 0x08,
        /// 09h: Interrupt Vector Configuration (memory-based only).
        InterruptVector = 0x09,
        /// 0Ah: Write Atomicity Normal.
        WriteAtomicity = 0x0A,
        /// 0Bh: Asynchronous Event Configuration.
        AsyncEventConfig = 0x0B,
        /// 0Ch: Autonomous Power State Transition.
        AutonomousPowerState = 0x0C,
        /// 0Eh: Timestamp; its data is [`Timestamp`].
        Timestamp = 0x0E,
        /// 0Fh: Keep Alive Timer.
        KeepAlive = 0x0F,
        /// 10h: Host Controlled Thermal Management.
        ThermalManagement = 0x10,
        /// 16h: Host Behavior Support; its data is [`HostBehavior`].
        HostBehavior = 0x16,
        /// 19h: I/O Command Set Profile.
        CommandSetProfile = 0x19,
        /// 81h: Host Identifier; its data is 8 or 16 bytes.
        HostId = 0x81,
        /// 82h: Reservation Notification Mask.
        ReservationMask = 0x82,
        /// 83h: Reservation Persistence.
        ReservationPersistence = 0x83,
        /// 84h: Namespace Write Protection Config.
        WriteProtect = 0x84,
    }
}

/// Dword 0 of Get Features with [`crate::command::admin::Select::Capabilities`] (Base 5.1.11).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Capabilities {
    /// Can be saved.
    pub saveable: bool,
    /// Has a value per namespace.
    pub namespace_specific: bool,
    /// Can be changed.
    pub changeable: bool,
    #[bits(29)]
    __: u32,
}

/// Arbitration (Base 5.1.25.1.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Arbitration {
    /// Arbitration Burst (AB): 2 to the power of this, 7 is no limit.
    #[bits(3)]
    pub burst: u8,
    #[bits(5)]
    __: u8,
    /// Low Priority Weight (LPW), 0's based.
    pub low: u8,
    /// Medium Priority Weight (MPW), 0's based.
    pub medium: u8,
    /// High Priority Weight (HPW), 0's based.
    pub high: u8,
}

/// Power Management (Base 5.1.25.1.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct PowerManagement {
    /// Power State (PS).
    #[bits(5)]
    pub state: u8,
    /// Workload Hint (WH).
    #[bits(3)]
    pub workload: u8,
    #[bits(24)]
    __: u32,
}

/// Temperature Threshold (Base 5.1.25.1.3).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct TemperatureThreshold {
    /// Threshold in kelvins (TMPTH).
    pub kelvin: u16,
    /// Threshold Temperature Select (TMPSEL): 0 composite, 1-8 a sensor, 15 all.
    #[bits(4)]
    pub sensor: u8,
    /// Threshold Type Select (THSEL): 0 over, 1 under.
    #[bits(2)]
    pub kind: u8,
    /// Temperature Threshold Hysteresis (TMPTHH) in kelvins.
    #[bits(3)]
    pub hysteresis: u8,
    #[bits(7)]
    __: u8,
}

/// Error Recovery (NVM 4.1.3.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct ErrorRecovery {
    /// Time Limited Error Recovery (TLER), units of 100 ms.
    pub tler: u16,
    /// Deallocated or Unwritten Logical Block Error Enable (DULBE).
    pub dulbe: bool,
    #[bits(15)]
    __: u16,
}

/// Volatile Write Cache (Base 5.1.25.1.4).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct VolatileWriteCache {
    /// Volatile Write Cache Enable (WCE).
    pub enable: bool,
    #[bits(31)]
    __: u32,
}

/// Number of Queues (Base 5.1.25.1.5), in Set Features what is asked for and in its completion
/// what is given. Numbers of I/O queues are 0's based; see [`NumberOfQueues::of`].
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct NumberOfQueues {
    /// Submission queues (NSQR, NSQA), 0's based.
    pub submission_zeroes_based: u16,
    /// Completion queues (NCQR, NCQA), 0's based.
    pub completion_zeroes_based: u16,
}

impl NumberOfQueues {
    /// That many I/O queue pairs, 1 to 65535.
    #[must_use]
    pub const fn of(pairs: u16) -> Self {
        let zeroes_based = pairs.saturating_sub(1);
        Self::new()
            .with_submission_zeroes_based(zeroes_based)
            .with_completion_zeroes_based(zeroes_based)
    }

    /// I/O queue pairs that both numbers allow, 1 to 65536. FFFFh is not allowed in a request;
    /// see [`NumberOfQueues::is_valid`].
    #[must_use]
    pub const fn pairs(&self) -> u32 {
        let (submission, completion) = (
            self.submission_zeroes_based(),
            self.completion_zeroes_based(),
        );
        (if submission < completion {
            submission
        } else {
            completion
        }) as u32
            + 1
    }

    /// Neither number is the forbidden FFFFh.
    #[must_use]
    pub const fn is_valid(&self) -> bool {
        self.submission_zeroes_based() != u16::MAX && self.completion_zeroes_based() != u16::MAX
    }
}

/// Interrupt Coalescing (Base 5.1.25.2.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct InterruptCoalescing {
    /// Aggregation Threshold (THR), 0's based.
    pub threshold: u8,
    /// Aggregation Time (TIME), units of 100 us.
    pub time: u8,
    __: u16,
}

/// Interrupt Vector Configuration (Base 5.1.25.2.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct InterruptVector {
    /// Interrupt Vector (IV).
    pub vector: u16,
    /// Coalescing Disable (CD).
    pub coalescing_disable: bool,
    #[bits(15)]
    __: u16,
}

/// Write Atomicity Normal (NVM 4.1.3.4).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct WriteAtomicity {
    /// Disable Normal (DN): the host needs no more than AWUPF.
    pub disable_normal: bool,
    #[bits(31)]
    __: u32,
}

/// Asynchronous Event Configuration (Base 5.1.25.1.6): which events the host wants.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct AsyncEventConfig {
    /// SMART / Health Critical Warnings (SHCW), bits as in the log page.
    pub critical_warnings: u8,
    /// Attached Namespace Attribute Notices (NAN).
    pub namespace_attribute: bool,
    /// Firmware Activation Notices (FAN).
    pub firmware_activation: bool,
    /// Telemetry Log Notices (TLN).
    pub telemetry: bool,
    /// Asymmetric Namespace Access Change Notices (ANACN).
    pub ana_change: bool,
    /// Predictable Latency Event Aggregate Log Change Notices (PLEALCN).
    pub predictable_latency: bool,
    /// LBA Status Information Alert Notices (LBASIAN).
    pub lba_status: bool,
    /// Endurance Group Event Aggregate Log Page Change Notices (EGEALPCN).
    pub endurance_group: bool,
    /// Normal NVM Subsystem Shutdown (NNVMSS).
    pub normal_shutdown: bool,
    #[bits(11)]
    __: u16,
    /// Zone Descriptor Changed Notices (ZDCN), zoned command set.
    pub zone_descriptor: bool,
    #[bits(3)]
    __: u8,
    /// Discovery Log Page Change Notification (DLPCN).
    pub discovery_log: bool,
}

/// Keep Alive Timer (Base 5.1.25.1.8).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct KeepAlive {
    /// Keep Alive Timeout (KATO) in milliseconds; 0 is off.
    #[bits(32)]
    pub timeout_ms: u32,
}

/// Host Identifier (Base 5.1.25.1.27). Over Fabrics it is set by Connect and read only.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct HostIdFormat {
    /// Enable Extended Host Identifier (EXHID): 128 bits; Fabrics requires it.
    pub extended: bool,
    #[bits(31)]
    __: u32,
}

/// Reservation Notification Mask (Base 5.1.25.1.28); a set bit suppresses.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct ReservationMask {
    #[bits(1)]
    __: u8,
    /// Registration Preempted (REGPRE).
    pub registration_preempted: bool,
    /// Reservation Released (RESREL).
    pub reservation_released: bool,
    /// Reservation Preempted (RESPRE).
    pub reservation_preempted: bool,
    #[bits(28)]
    __: u32,
}

/// Reservation Persistence (Base 5.1.25.1.29).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct ReservationPersistence {
    /// Persist Through Power Loss (PTPL).
    pub persist: bool,
    #[bits(31)]
    __: u32,
}

/// Namespace Write Protection Config (Base 5.1.25.1.30).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct WriteProtect {
    /// Write Protection State (WPS), see the constants.
    #[bits(3)]
    pub state: u8,
    #[bits(29)]
    __: u32,
}

impl WriteProtect {
    /// No Write Protect.
    pub const NONE: u8 = 0;
    /// Write Protect.
    pub const PROTECT: u8 = 1;
    /// Write Protect Until Power Cycle.
    pub const UNTIL_POWER_CYCLE: u8 = 2;
    /// Permanent Write Protect.
    pub const PERMANENT: u8 = 3;
}

wire! {
    /// Data of the Timestamp feature (Base 5.1.25.1.7).
    pub struct Timestamp: 8 {
        /// Milliseconds since 1970-01-01 UTC, 48 bits.
        0 => pub milliseconds: [u8; 6],
        /// Synch in bit 0, Timestamp Origin in 3:1.
        6 => pub attributes: u8,
        7 => _r7: u8,
    }
}

wire! {
    /// Data of the Host Behavior Support feature (Base 5.1.25.1.14).
    pub struct HostBehavior: 512 {
        /// Advanced Command Retry Enable (ACRE): 1 enables Command Retry Delay.
        0 => pub acre: u8,
        /// Extended Telemetry Data Area 4 Supported.
        1 => pub etdas: u8,
        /// LBA Format Extension Enable (LBAFEE): 1 enables LBA formats beyond 16.
        2 => pub lbafee: u8,
        /// Host Dispersed Namespace Support.
        3 => pub hdisns: u8,
        /// Copy Descriptor Formats Enable.
        4 => pub cdfe: crate::U16,
        6 => _r6: [u8; 506],
    }
}

macro_rules! values {
    ($($(#[$meta:meta])* $variant:ident($ty:ty),)+) => {
        /// A feature whose value is a dword: dword 11 of Set Features and, mostly, dword 0 of a
        /// Get Features completion.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum FeatureValue {
            $($(#[$meta])* $variant($ty),)+
        }

        impl FeatureValue {
            /// Which feature it is a value of.
            #[must_use]
            pub const fn id(&self) -> FeatureId {
                match self {
                    $(Self::$variant(_) => FeatureId::$variant,)+
                }
            }

            /// The dword.
            #[must_use]
            pub const fn dword(&self) -> u32 {
                match self {
                    $(Self::$variant(value) => value.into_bits(),)+
                }
            }

            /// What the dword means; `None` for features without a dword value or not known here.
            #[must_use]
            pub const fn parse(id: FeatureId, dword: u32) -> Option<Self> {
                match id {
                    $(FeatureId::$variant => Some(Self::$variant(<$ty>::from_bits(dword))),)+
                    _ => None,
                }
            }
        }

        $(impl From<$ty> for FeatureValue {
            fn from(value: $ty) -> Self {
                Self::$variant(value)
            }
        })+
    };
}

values! {
    /// Arbitration.
    Arbitration(Arbitration),
    /// Power Management.
    PowerManagement(PowerManagement),
    /// Temperature Threshold.
    TemperatureThreshold(TemperatureThreshold),
    /// Error Recovery.
    ErrorRecovery(ErrorRecovery),
    /// Volatile Write Cache.
    VolatileWriteCache(VolatileWriteCache),
    /// Number of Queues.
    NumberOfQueues(NumberOfQueues),
    /// Interrupt Coalescing.
    InterruptCoalescing(InterruptCoalescing),
    /// Interrupt Vector Configuration.
    InterruptVector(InterruptVector),
    /// Write Atomicity Normal.
    WriteAtomicity(WriteAtomicity),
    /// Asynchronous Event Configuration.
    AsyncEventConfig(AsyncEventConfig),
    /// Keep Alive Timer.
    KeepAlive(KeepAlive),
    /// Host Identifier: the format of its data.
    HostId(HostIdFormat),
    /// Reservation Notification Mask.
    ReservationMask(ReservationMask),
    /// Reservation Persistence.
    ReservationPersistence(ReservationPersistence),
    /// Namespace Write Protection Config.
    WriteProtect(WriteProtect),
}

impl Timestamp {
    /// That time, set by the host, ticking without a stop.
    #[must_use]
    pub fn from_milliseconds(milliseconds: u64) -> Self {
        let [a, b, c, d, e, f, _, _] = milliseconds.to_le_bytes();
        Self {
            milliseconds: [a, b, c, d, e, f],
            attributes: 1 << 1,
            ..Self::zeroed()
        }
    }

    /// The time in milliseconds since 1970-01-01 UTC.
    #[must_use]
    pub fn to_milliseconds(&self) -> u64 {
        let [a, b, c, d, e, f] = self.milliseconds;
        u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
    }
}

/// A dword value as it goes on the wire.
impl From<FeatureValue> for U32 {
    fn from(value: FeatureValue) -> Self {
        Self::new(value.dword())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bits_are_where_the_specification_has_them() {
        assert_eq!(NumberOfQueues::of(4).into_bits(), 0x0003_0003);
        assert_eq!(NumberOfQueues::from_bits(0x0001_0007).pairs(), 2);
        assert!(!NumberOfQueues::from_bits(0xFFFF_0000).is_valid());
        assert_eq!(
            AsyncEventConfig::new()
                .with_namespace_attribute(true)
                .into_bits(),
            1 << 8
        );
        assert_eq!(
            AsyncEventConfig::new().with_ana_change(true).into_bits(),
            1 << 11
        );
        assert_eq!(
            AsyncEventConfig::new()
                .with_zone_descriptor(true)
                .into_bits(),
            1 << 27
        );
        assert_eq!(
            AsyncEventConfig::new().with_discovery_log(true).into_bits(),
            1 << 31
        );
        assert_eq!(
            TemperatureThreshold::new().with_kind(1).into_bits(),
            1 << 20
        );
        assert_eq!(ErrorRecovery::new().with_dulbe(true).into_bits(), 1 << 16);
        assert_eq!(KeepAlive::new().with_timeout_ms(5000).into_bits(), 5000);
        assert_eq!(
            ReservationMask::new()
                .with_reservation_preempted(true)
                .into_bits(),
            8
        );
    }

    #[test]
    fn identifiers_are_found_again() {
        for id in FeatureId::ALL {
            assert_eq!(FeatureId::from_raw(id.raw()), *id);
        }
        assert_eq!(FeatureId::from_raw(0xC0), FeatureId::Other(0xC0));
    }

    proptest! {
        #[test]
        fn values_round_trip(id in any::<u8>(), dword in any::<u32>()) {
            let id = FeatureId::from_raw(id);
            if let Some(value) = FeatureValue::parse(id, dword) {
                prop_assert_eq!(value.dword(), dword);
                prop_assert_eq!(value.id(), id);
            }
        }

        #[test]
        fn timestamps_round_trip(ms in 0u64..1 << 48) {
            prop_assert_eq!(Timestamp::from_milliseconds(ms).to_milliseconds(), ms);
        }
    }
}
