//! Capability fields of Identify Controller, bit by bit (Base 5.1.13.2.1).

use bitflags::bitflags;

open_enum! {
    /// Controller Type (CNTRLTYPE).
    pub enum ControllerType {
        /// Not reported (before revision 1.4).
        NotReported = 0,
        /// I/O controller.
        Io = 1,
        /// Discovery controller.
        Discovery = 2,
        /// Administrative controller.
        Administrative = 3,
    }
}

bitflags! {
    /// Controller Multi-Path I/O and Namespace Sharing Capabilities (CMIC).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Cmic: u8 {
        /// The subsystem may have more than one port.
        const MULTI_PORT = 1 << 0;
        /// The subsystem may have more than one controller.
        const MULTI_CONTROLLER = 1 << 1;
        /// SR-IOV virtual function.
        const SR_IOV = 1 << 2;
        /// Reports asymmetric namespace access.
        const ANA = 1 << 3;
    }

    /// Optional Asynchronous Events Supported (OAES).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Oaes: u32 {
        /// Attached Namespace Attribute Notices.
        const NAMESPACE_ATTRIBUTE = 1 << 8;
        /// Firmware Activation Notices.
        const FIRMWARE_ACTIVATION = 1 << 9;
        /// Asymmetric Namespace Access Change Notices.
        const ANA_CHANGE = 1 << 11;
        /// Predictable Latency Event Aggregate Log Change Notices.
        const PREDICTABLE_LATENCY = 1 << 12;
        /// LBA Status Information Alert Notices.
        const LBA_STATUS = 1 << 13;
        /// Endurance Group Event Aggregate Log Page Change Notices.
        const ENDURANCE_GROUP = 1 << 14;
        /// Normal NVM Subsystem Shutdown.
        const NORMAL_SHUTDOWN = 1 << 15;
        /// Temperature Threshold Hysteresis Recovery.
        const TEMPERATURE_RECOVERY = 1 << 16;
        /// Reachability Group and Association Change Notices.
        const REACHABILITY = 1 << 17;
        /// Allocated Namespace Attribute Notices.
        const ALLOCATED_NAMESPACE_ATTRIBUTE = 1 << 19;
        /// Zone Descriptor Changed Notices.
        const ZONE_DESCRIPTOR = 1 << 27;
        /// Discovery Log Page Change Notification.
        const DISCOVERY_LOG = 1 << 31;
    }

    /// Controller Attributes (CTRATT).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Ctratt: u32 {
        /// 128-bit host identifier; Fabrics requires it.
        const HOST_ID_128 = 1 << 0;
        /// Non-Operational Power State Permissive Mode.
        const NON_OPERATIONAL = 1 << 1;
        /// NVM Sets.
        const NVM_SETS = 1 << 2;
        /// Read Recovery Levels.
        const READ_RECOVERY = 1 << 3;
        /// Endurance Groups.
        const ENDURANCE_GROUPS = 1 << 4;
        /// Predictable Latency Mode.
        const PREDICTABLE_LATENCY = 1 << 5;
        /// Traffic Based Keep Alive Support (TBKAS).
        const TRAFFIC_BASED_KEEP_ALIVE = 1 << 6;
        /// Namespace Granularity.
        const NAMESPACE_GRANULARITY = 1 << 7;
        /// SQ Associations.
        const SQ_ASSOCIATIONS = 1 << 8;
        /// UUID List.
        const UUID_LIST = 1 << 9;
        /// Multi-Domain Subsystem.
        const MULTI_DOMAIN = 1 << 10;
        /// Fixed Capacity Management.
        const FIXED_CAPACITY = 1 << 11;
        /// Variable Capacity Management.
        const VARIABLE_CAPACITY = 1 << 12;
        /// Delete Endurance Group.
        const DELETE_ENDURANCE_GROUP = 1 << 13;
        /// Delete NVM Set.
        const DELETE_NVM_SET = 1 << 14;
        /// Extended LBA Formats.
        const EXTENDED_LBA_FORMATS = 1 << 15;
        /// MDTS and Size Limits Exclude Metadata (MEM).
        const MDTS_EXCLUDES_METADATA = 1 << 16;
        /// HMB Restrict Non-Operational Power State Access.
        const HMB_RESTRICT = 1 << 17;
        /// Reservations and Host Identifier Interaction (RHII).
        const RESERVATIONS_HOST_ID = 1 << 18;
        /// Flexible Data Placement Support.
        const FDP = 1 << 19;
    }

    /// Optional Admin Command Support (OACS).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Oacs: u16 {
        /// Security Send and Receive.
        const SECURITY = 1 << 0;
        /// Format NVM.
        const FORMAT = 1 << 1;
        /// Firmware Commit and Download.
        const FIRMWARE = 1 << 2;
        /// Namespace Management and Attachment.
        const NAMESPACE_MANAGEMENT = 1 << 3;
        /// Device Self-test.
        const SELF_TEST = 1 << 4;
        /// Directives.
        const DIRECTIVES = 1 << 5;
        /// NVMe-MI Send and Receive.
        const MANAGEMENT_INTERFACE = 1 << 6;
        /// Virtualization Management.
        const VIRTUALIZATION = 1 << 7;
        /// Doorbell Buffer Config.
        const DOORBELL_BUFFER = 1 << 8;
        /// Get LBA Status.
        const GET_LBA_STATUS = 1 << 9;
        /// Command and Feature Lockdown.
        const LOCKDOWN = 1 << 10;
        /// Host Managed Live Migration.
        const LIVE_MIGRATION = 1 << 11;
    }

    /// Log Page Attributes (LPA).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Lpa: u8 {
        /// SMART per namespace.
        const SMART_PER_NAMESPACE = 1 << 0;
        /// Commands Supported and Effects log page.
        const EFFECTS = 1 << 1;
        /// Extended data: offset and full-size NUMD of Get Log Page.
        const EXTENDED = 1 << 2;
        /// Telemetry.
        const TELEMETRY = 1 << 3;
        /// Persistent Event log.
        const PERSISTENT_EVENT = 1 << 4;
        /// Supported log pages, commands and feature effects logs (LIDs 0h, 12h, 13h).
        const SUPPORTED_PAGES = 1 << 5;
        /// Data Area 4 for telemetry.
        const DATA_AREA_4 = 1 << 6;
    }

    /// Asymmetric Namespace Access Capabilities (ANACAP).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Anacap: u8 {
        /// Reports ANA Optimized state.
        const OPTIMIZED = 1 << 0;
        /// Reports ANA Non-Optimized state.
        const NON_OPTIMIZED = 1 << 1;
        /// Reports ANA Inaccessible state.
        const INACCESSIBLE = 1 << 2;
        /// Reports ANA Persistent Loss state.
        const PERSISTENT_LOSS = 1 << 3;
        /// Reports ANA Change state.
        const CHANGE = 1 << 4;
        /// ANAGRPID does not change while attached.
        const GROUP_ID_STATIC = 1 << 6;
        /// Non-zero ANAGRPID in Namespace Management.
        const GROUP_ID_NON_ZERO = 1 << 7;
    }

    /// Optional NVM Command Support (ONCS).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Oncs: u16 {
        /// Compare.
        const COMPARE = 1 << 0;
        /// Write Uncorrectable.
        const WRITE_UNCORRECTABLE = 1 << 1;
        /// Dataset Management.
        const DATASET_MANAGEMENT = 1 << 2;
        /// Write Zeroes.
        const WRITE_ZEROES = 1 << 3;
        /// Save and Select fields of features.
        const SAVE_SELECT = 1 << 4;
        /// Reservations.
        const RESERVATIONS = 1 << 5;
        /// Timestamp feature.
        const TIMESTAMP = 1 << 6;
        /// Verify.
        const VERIFY = 1 << 7;
        /// Copy.
        const COPY = 1 << 8;
        /// Copy may be done in one atomic operation.
        const COPY_SINGLE_ATOMICITY = 1 << 9;
        /// All Fast Copy.
        const ALL_FAST_COPY = 1 << 10;
        /// Maximum size for Write Zeroes is given if DEAC is set.
        const WRITE_ZEROES_DEALLOCATE = 1 << 11;
        /// Namespace Zeroes bit of Write Zeroes.
        const NAMESPACE_ZEROES = 1 << 12;
    }

    /// Volatile Write Cache (VWC).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Vwc: u8 {
        /// There is a volatile write cache.
        const PRESENT = 1 << 0;
        /// Flush with NSID FFFFFFFFh is refused (bits 2:1 = 10b).
        const NO_BROADCAST_FLUSH = 0b10 << 1;
        /// Flush with NSID FFFFFFFFh flushes all namespaces (bits 2:1 = 11b).
        const BROADCAST_FLUSH = 0b11 << 1;
    }

    /// SGL Support (SGLS).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Sgls: u32 {
        /// Supported, no alignment or granularity (bits 1:0 = 01b).
        const SUPPORTED = 1 << 0;
        /// Keyed SGL Data Block descriptor.
        const KEYED = 1 << 2;
        /// SGL Bit Bucket descriptor.
        const BIT_BUCKET = 1 << 16;
        /// Metadata pointer may be a byte-aligned contiguous buffer.
        const METADATA_BUFFER = 1 << 17;
        /// Lengths larger than the data are fine.
        const OVERSIZED = 1 << 18;
        /// Metadata pointer may be an SGL.
        const METADATA_SGL = 1 << 19;
        /// Address field may be an offset: in-capsule data.
        const OFFSET = 1 << 20;
        /// Transport SGL Data Block descriptor.
        const TRANSPORT = 1 << 21;
    }

    /// Optional Fabrics Commands Support (OFCS).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Ofcs: u16 {
        /// Disconnect.
        const DISCONNECT = 1 << 0;
    }
}
