//! Status of a completed command (Base 4.2.3): the 15-bit field, and every code with its name.

use core::fmt;

/// The Status Field of a completion: 15 bits, without the phase tag.
///
/// Laid out as in CQE dword 3 bits 31:17: SC 7:0, SCT 10:8, CRD 12:11, M 13, DNR 14. Parsers return
/// it as their error, so that what is wrong with a command is what its host is told.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Status(u16);

/// Status Code Type (Base 4.2.3, Status Code Type field).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StatusType {
    /// 0h: Generic Command Status.
    Generic,
    /// 1h: Command Specific Status; its meaning depends on the command.
    CommandSpecific,
    /// 2h: Media and Data Integrity Errors.
    Media,
    /// 3h: Path Related Status.
    Path,
    /// 7h: Vendor Specific.
    VendorSpecific,
    /// 4h-6h.
    Reserved(u8),
}

/// Whose command specific codes 80h-BFh are meant: their meanings overlap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CodeSpace {
    /// Admin commands and I/O commands of the NVM and zoned command sets.
    #[default]
    Nvm,
    /// Fabrics commands.
    Fabrics,
}

impl Status {
    /// Successful completion.
    pub const SUCCESS: Self = Self(0);

    const DNR: u16 = 1 << 14;
    const MORE: u16 = 1 << 13;

    /// From the 15 bits; the 16th is ignored.
    #[inline]
    #[must_use]
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits & 0x7FFF)
    }

    /// The 15 bits.
    #[inline]
    #[must_use]
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// From the last 16 bits of a completion, whose bit 0 is the phase tag.
    #[inline]
    #[must_use]
    pub const fn from_cqe(field: u16) -> Self {
        Self(field >> 1)
    }

    /// The last 16 bits of a completion, phase tag 0 (Fabrics has none, Base 4.2.2).
    #[inline]
    #[must_use]
    pub const fn to_cqe(self) -> u16 {
        self.0 << 1
    }

    /// Status Code Type (SCT).
    #[inline]
    #[must_use]
    pub const fn sct(self) -> StatusType {
        match (self.0 >> 8) & 7 {
            0 => StatusType::Generic,
            1 => StatusType::CommandSpecific,
            2 => StatusType::Media,
            3 => StatusType::Path,
            7 => StatusType::VendorSpecific,
            other => StatusType::Reserved(other as u8),
        }
    }

    /// Status Code (SC), to be read together with [`Status::sct`].
    #[inline]
    #[must_use]
    pub const fn sc(self) -> u8 {
        self.0 as u8
    }

    /// Command Retry Delay (CRD): 0 none, 1-3 the delay of that number in Identify Controller.
    #[inline]
    #[must_use]
    pub const fn crd(self) -> u8 {
        ((self.0 >> 11) & 3) as u8
    }

    /// More (M): the Error Information log page has an entry about this.
    #[inline]
    #[must_use]
    pub const fn more(self) -> bool {
        self.0 & Self::MORE != 0
    }

    /// Do Not Retry (DNR): the same command is expected to fail again.
    #[inline]
    #[must_use]
    pub const fn dnr(self) -> bool {
        self.0 & Self::DNR != 0
    }

    /// Same status with Do Not Retry set.
    #[inline]
    #[must_use]
    pub const fn with_dnr(self) -> Self {
        Self(self.0 | Self::DNR)
    }

    /// Same status with Do Not Retry cleared.
    #[inline]
    #[must_use]
    pub const fn without_dnr(self) -> Self {
        Self(self.0 & !Self::DNR)
    }

    /// Same status with More set.
    #[inline]
    #[must_use]
    pub const fn with_more(self) -> Self {
        Self(self.0 | Self::MORE)
    }

    /// Same status with that Command Retry Delay (0-3).
    #[inline]
    #[must_use]
    pub const fn with_crd(self, crd: u8) -> Self {
        Self(self.0 & !(3 << 11) | ((crd as u16 & 3) << 11))
    }

    /// Did the command succeed?
    #[inline]
    #[must_use]
    pub const fn is_success(self) -> bool {
        self.0 & 0x7FF == 0
    }

    /// Is it that code, whatever CRD, M and DNR say?
    #[inline]
    #[must_use]
    pub fn is(self, code: StatusCode) -> bool {
        self.0 & 0x7FF == code.raw()
    }

    /// The code, read as one of an Admin or I/O command.
    #[must_use]
    pub fn code(self) -> StatusCode {
        StatusCode::from_raw(self.0, CodeSpace::Nvm)
    }

    /// The code, read as one of a command of that kind.
    #[must_use]
    pub fn code_in(self, space: CodeSpace) -> StatusCode {
        StatusCode::from_raw(self.0, space)
    }

    /// The code's wording for a command of that kind, as `Display` does for Admin and I/O commands.
    #[must_use]
    pub fn describe(self, space: CodeSpace) -> impl fmt::Display {
        Description(self, space)
    }

    /// `Ok` on success, itself as an error otherwise.
    #[inline]
    pub const fn ok(self) -> Result<(), Self> {
        if self.is_success() { Ok(()) } else { Err(self) }
    }
}

impl From<StatusCode> for Status {
    /// The code alone: CRD, M and DNR are 0.
    #[inline]
    fn from(code: StatusCode) -> Self {
        Self(code.raw())
    }
}

struct Description(Status, CodeSpace);

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({:#x})", self.0.code_in(self.1), self.0.0)
    }
}

/// The wording of nvme-cli: the name and the field in hexadecimal, `Invalid Field in
/// Command(0x4002)`.
impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Description(*self, CodeSpace::Nvm).fmt(f)
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Status({:?}", self.code())?;
        if self.crd() != 0 {
            write!(f, ", crd {}", self.crd())?;
        }
        if self.more() {
            f.write_str(", more")?;
        }
        if self.dnr() {
            f.write_str(", dnr")?;
        }
        f.write_str(")")
    }
}

impl std::error::Error for Status {}

impl StatusCode {
    /// The same as a [`Status`], with Do Not Retry set.
    #[inline]
    #[must_use]
    pub fn dnr(self) -> Status {
        Status::from(self).with_dnr()
    }
}

impl fmt::Display for StatusCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.pad(name),
            None if self.raw() >> 8 == 7 => f.pad("Vendor Specific Status"),
            None => f.pad("Unknown"),
        }
    }
}

macro_rules! codes {
    (
        common { $($(#[$meta:meta])* $raw:literal $code:ident = $name:literal;)+ }
        nvm { $($(#[$nvm_meta:meta])* $nvm_raw:literal $nvm_code:ident = $nvm_name:literal;)+ }
        fabrics { $($(#[$fab_meta:meta])* $fab_raw:literal $fab_code:ident = $fab_name:literal;)+ }
    ) => {
        /// Every status code of Base 4.2.3 and of the NVM, zoned and key-value command sets, under
        /// its specification name. The number is SCT << 8 | SC.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum StatusCode {
            $(#[doc = concat!("`", stringify!($raw), "` ", $name, ".")] $(#[$meta])* $code,)+
            $(#[doc = concat!("`", stringify!($nvm_raw), "` ", $nvm_name, ".")] $(#[$nvm_meta])* $nvm_code,)+
            $(#[doc = concat!("`", stringify!($fab_raw), "` ", $fab_name, " (Fabrics commands).")] $(#[$fab_meta])* $fab_code,)+
            /// A reserved or vendor specific code: SCT << 8 | SC.
            Other(u16),
        }

        impl StatusCode {
            /// All codes that have a name.
            pub const ALL: &[Self] = &[
                $(Self::$code,)+ $(Self::$nvm_code,)+ $(Self::$fab_code,)+
            ];

            /// SCT << 8 | SC.
            #[inline]
            #[must_use]
            pub const fn raw(self) -> u16 {
                match self {
                    $(Self::$code => $raw,)+
                    $(Self::$nvm_code => $nvm_raw,)+
                    $(Self::$fab_code => $fab_raw,)+
                    Self::Other(raw) => raw & 0x7FF,
                }
            }

            /// The code for SCT << 8 | SC; higher bits are ignored.
            #[must_use]
            pub const fn from_raw(raw: u16, space: CodeSpace) -> Self {
                let raw = raw & 0x7FF;
                match raw {
                    $($raw => return Self::$code,)+
                    _ => {}
                }
                match space {
                    CodeSpace::Nvm => match raw {
                        $($nvm_raw => Self::$nvm_code,)+
                        _ => Self::Other(raw),
                    },
                    CodeSpace::Fabrics => match raw {
                        $($fab_raw => Self::$fab_code,)+
                        _ => Self::Other(raw),
                    },
                }
            }

            /// The specification's name; `None` for reserved and vendor specific codes.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$code => Some($name),)+
                    $(Self::$nvm_code => Some($nvm_name),)+
                    $(Self::$fab_code => Some($fab_name),)+
                    Self::Other(_) => None,
                }
            }
        }
    };
}

codes! {
    common {
        // Generic Command Status (Base 4.2.3.1)
        0x000 Success = "Successful Completion";
        0x001 InvalidOpcode = "Invalid Command Opcode";
        0x002 InvalidField = "Invalid Field in Command";
        0x003 CommandIdConflict = "Command ID Conflict";
        0x004 DataTransferError = "Data Transfer Error";
        0x005 AbortedPowerLoss = "Commands Aborted due to Power Loss Notification";
        0x006 InternalError = "Internal Error";
        0x007 AbortRequested = "Command Abort Requested";
        0x008 AbortedSqDeletion = "Command Aborted due to SQ Deletion";
        0x009 AbortedFailedFused = "Command Aborted due to Failed Fused Command";
        0x00A AbortedMissingFused = "Command Aborted due to Missing Fused Command";
        0x00B InvalidNamespaceOrFormat = "Invalid Namespace or Format";
        0x00C CommandSequenceError = "Command Sequence Error";
        0x00D InvalidSglSegmentDescriptor = "Invalid SGL Segment Descriptor";
        0x00E InvalidSglDescriptorCount = "Invalid Number of SGL Descriptors";
        0x00F DataSglLengthInvalid = "Data SGL Length Invalid";
        0x010 MetadataSglLengthInvalid = "Metadata SGL Length Invalid";
        0x011 SglDescriptorTypeInvalid = "SGL Descriptor Type Invalid";
        0x012 InvalidUseOfCmb = "Invalid Use of Controller Memory Buffer";
        0x013 PrpOffsetInvalid = "PRP Offset Invalid";
        0x014 AtomicWriteUnitExceeded = "Atomic Write Unit Exceeded";
        0x015 OperationDenied = "Operation Denied";
        0x016 SglOffsetInvalid = "SGL Offset Invalid";
        0x018 HostIdInconsistentFormat = "Host Identifier Inconsistent Format";
        0x019 KeepAliveExpired = "Keep Alive Timer Expired";
        0x01A KeepAliveTimeoutInvalid = "Keep Alive Timeout Invalid";
        0x01B AbortedPreemptAndAbort = "Command Aborted due to Preempt and Abort";
        0x01C SanitizeFailed = "Sanitize Failed";
        0x01D SanitizeInProgress = "Sanitize In Progress";
        0x01E SglDataBlockGranularityInvalid = "SGL Data Block Granularity Invalid";
        0x01F CommandNotSupportedForQueueInCmb = "Command Not Supported for Queue in CMB";
        0x020 NamespaceWriteProtected = "Namespace is Write Protected";
        0x021 CommandInterrupted = "Command Interrupted";
        0x022 TransientTransportError = "Transient Transport Error";
        0x023 ProhibitedByLockdown = "Command Prohibited by Command and Feature Lockdown";
        0x024 AdminCommandMediaNotReady = "Admin Command Media Not Ready";
        0x025 InvalidKeyTag = "Invalid Key Tag";
        0x026 HostDispersedNamespaceNotEnabled = "Host Dispersed Namespace Support Not Enabled";
        0x027 HostIdNotInitialized = "Host Identifier Not Initialized";
        0x028 IncorrectKey = "Incorrect Key";
        0x029 FdpDisabled = "FDP Disabled";
        0x02A InvalidPlacementHandleList = "Invalid Placement Handle List";
        0x080 LbaOutOfRange = "LBA Out of Range";
        0x081 CapacityExceeded = "Capacity Exceeded";
        0x082 NamespaceNotReady = "Namespace Not Ready";
        0x083 ReservationConflict = "Reservation Conflict";
        0x084 FormatInProgress = "Format In Progress";
        0x085 InvalidValueSize = "Invalid Value Size";
        0x086 InvalidKeySize = "Invalid Key Size";
        0x087 KeyDoesNotExist = "KV Key Does Not Exist";
        0x088 UnrecoveredError = "Unrecovered Error";
        0x089 KeyExists = "Key Exists";
        // Command Specific Status (Base 4.2.3.2)
        0x100 CompletionQueueInvalid = "Completion Queue Invalid";
        0x101 InvalidQueueId = "Invalid Queue Identifier";
        0x102 InvalidQueueSize = "Invalid Queue Size";
        0x103 AbortLimitExceeded = "Abort Command Limit Exceeded";
        0x105 AsyncEventLimitExceeded = "Asynchronous Event Request Limit Exceeded";
        0x106 InvalidFirmwareSlot = "Invalid Firmware Slot";
        0x107 InvalidFirmwareImage = "Invalid Firmware Image";
        0x108 InvalidInterruptVector = "Invalid Interrupt Vector";
        0x109 InvalidLogPage = "Invalid Log Page";
        0x10A InvalidFormat = "Invalid Format";
        0x10B FirmwareNeedsConventionalReset = "Firmware Activation Requires Conventional Reset";
        0x10C InvalidQueueDeletion = "Invalid Queue Deletion";
        0x10D FeatureNotSaveable = "Feature Identifier Not Saveable";
        0x10E FeatureNotChangeable = "Feature Not Changeable";
        0x10F FeatureNotNamespaceSpecific = "Feature Not Namespace Specific";
        0x110 FirmwareNeedsSubsystemReset = "Firmware Activation Requires NVM Subsystem Reset";
        0x111 FirmwareNeedsControllerReset = "Firmware Activation Requires Controller Level Reset";
        0x112 FirmwareNeedsMaximumTime = "Firmware Activation Requires Maximum Time Violation";
        0x113 FirmwareActivationProhibited = "Firmware Activation Prohibited";
        0x114 OverlappingRange = "Overlapping Range";
        0x115 NamespaceInsufficientCapacity = "Namespace Insufficient Capacity";
        0x116 NamespaceIdUnavailable = "Namespace Identifier Unavailable";
        0x118 NamespaceAlreadyAttached = "Namespace Already Attached";
        0x119 NamespaceIsPrivate = "Namespace Is Private";
        0x11A NamespaceNotAttached = "Namespace Not Attached";
        0x11B ThinProvisioningNotSupported = "Thin Provisioning Not Supported";
        0x11C ControllerListInvalid = "Controller List Invalid";
        0x11D SelfTestInProgress = "Device Self-test In Progress";
        0x11E BootPartitionWriteProhibited = "Boot Partition Write Prohibited";
        0x11F InvalidControllerId = "Invalid Controller Identifier";
        0x120 InvalidSecondaryControllerState = "Invalid Secondary Controller State";
        0x121 InvalidControllerResourceCount = "Invalid Number of Controller Resources";
        0x122 InvalidResourceId = "Invalid Resource Identifier";
        0x123 SanitizeProhibitedPmr = "Sanitize Prohibited While Persistent Memory Region is Enabled";
        0x124 AnaGroupIdInvalid = "ANA Group Identifier Invalid";
        0x125 AnaAttachFailed = "ANA Attach Failed";
        0x126 InsufficientCapacity = "Insufficient Capacity";
        0x127 NamespaceAttachmentLimitExceeded = "Namespace Attachment Limit Exceeded";
        0x128 ProhibitionNotSupported = "Prohibition of Command Execution Not Supported";
        0x129 IoCommandSetNotSupported = "I/O Command Set Not Supported";
        0x12A IoCommandSetNotEnabled = "I/O Command Set Not Enabled";
        0x12B IoCommandSetCombinationRejected = "I/O Command Set Combination Rejected";
        0x12C InvalidIoCommandSet = "Invalid I/O Command Set";
        0x12D IdentifierUnavailable = "Identifier Unavailable";
        0x12E NamespaceIsDispersed = "Namespace Is Dispersed";
        0x12F InvalidDiscoveryInformation = "Invalid Discovery Information";
        0x130 ZoningStructureLocked = "Zoning Data Structure Locked";
        0x131 ZoningStructureNotFound = "Zoning Data Structure Not Found";
        0x132 InsufficientDiscoveryResources = "Insufficient Discovery Resources";
        0x133 RequestedFunctionDisabled = "Requested Function Disabled";
        0x134 ZoneGroupOriginatorInvalid = "ZoneGroup Originator Invalid";
        0x135 InvalidHost = "Invalid Host";
        0x136 InvalidNvmSubsystem = "Invalid NVM Subsystem";
        0x137 InvalidControllerDataQueue = "Invalid Controller Data Queue";
        0x138 NotEnoughResources = "Not Enough Resources";
        0x139 ControllerSuspended = "Controller Suspended";
        0x13A ControllerNotSuspended = "Controller Not Suspended";
        0x13B ControllerDataQueueFull = "Controller Data Queue Full";
        // Media and Data Integrity Errors (Base 4.2.3.3)
        0x280 WriteFault = "Write Fault";
        0x281 UnrecoveredReadError = "Unrecovered Read Error";
        0x282 GuardCheckError = "End-to-end Guard Check Error";
        0x283 ApplicationTagCheckError = "End-to-end Application Tag Check Error";
        0x284 ReferenceTagCheckError = "End-to-end Reference Tag Check Error";
        0x285 CompareFailure = "Compare Failure";
        0x286 AccessDenied = "Access Denied";
        0x287 DeallocatedOrUnwritten = "Deallocated or Unwritten Logical Block";
        0x288 StorageTagCheckError = "End-to-End Storage Tag Check Error";
        // Path Related Status (Base 4.2.3.4)
        0x300 InternalPathError = "Internal Path Error";
        0x301 AnaPersistentLoss = "Asymmetric Access Persistent Loss";
        0x302 AnaInaccessible = "Asymmetric Access Inaccessible";
        0x303 AnaTransition = "Asymmetric Access Transition";
        0x360 ControllerPathingError = "Controller Pathing Error";
        0x370 HostPathingError = "Host Pathing Error";
        0x371 AbortedByHost = "Command Aborted By Host";
    }
    nvm {
        // Command Specific Status of I/O commands (NVM 3.1.1.2, Zoned 3.1.1)
        0x180 ConflictingAttributes = "Conflicting Attributes";
        0x181 InvalidProtectionInformation = "Invalid Protection Information";
        0x182 WriteToReadOnlyRange = "Attempted Write to Read Only Range";
        0x183 CommandSizeLimitExceeded = "Command Size Limit Exceeded";
        0x185 IncompatibleNamespaceOrFormat = "Incompatible Namespace or Format";
        0x186 FastCopyNotPossible = "Fast Copy Not Possible";
        0x187 OverlappingIoRange = "Overlapping I/O Range";
        0x189 InsufficientResources = "Insufficient Resources";
        0x1B6 InvalidZoneOperation = "Invalid Zone Operation Request";
        0x1B7 ZrwaResourcesUnavailable = "ZRWA Resources Unavailable";
        0x1B8 ZoneBoundaryError = "Zone Boundary Error";
        0x1B9 ZoneIsFull = "Zone Is Full";
        0x1BA ZoneIsReadOnly = "Zone Is Read Only";
        0x1BB ZoneIsOffline = "Zone Is Offline";
        0x1BC ZoneInvalidWrite = "Zone Invalid Write";
        0x1BD TooManyActiveZones = "Too Many Active Zones";
        0x1BE TooManyOpenZones = "Too Many Open Zones";
        0x1BF InvalidZoneStateTransition = "Invalid Zone State Transition";
    }
    fabrics {
        // Command Specific Status of Fabrics commands (Base 6)
        0x180 ConnectIncompatibleFormat = "Connect Incompatible Format";
        0x181 ConnectControllerBusy = "Connect Controller Busy";
        0x182 ConnectInvalidParameters = "Connect Invalid Parameters";
        0x183 ConnectRestartDiscovery = "Connect Restart Discovery";
        0x184 ConnectInvalidHost = "Connect Invalid Host";
        0x185 DisconnectInvalidQueueType = "Invalid Queue Type";
        0x190 DiscoverRestart = "Discover Restart";
        0x191 AuthenticationRequired = "Authentication Required";
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn codes_are_found_again_by_number() {
        let mut names = HashSet::new();
        for code in StatusCode::ALL {
            let spaces = [CodeSpace::Nvm, CodeSpace::Fabrics];
            assert!(
                spaces
                    .iter()
                    .any(|space| Status::from(*code).code_in(*space) == *code),
                "{code:?}"
            );
            assert!(names.insert(code.name().unwrap()), "{code:?}");
        }
        assert_eq!(
            StatusCode::from_raw(0x7C0, CodeSpace::Nvm),
            StatusCode::Other(0x7C0)
        );
    }

    #[test]
    fn wording() {
        assert_eq!(
            StatusCode::InvalidField.dnr().to_string(),
            "Invalid Field in Command(0x4002)"
        );
        let busy = Status::from(StatusCode::ConnectControllerBusy);
        assert_eq!(
            busy.describe(CodeSpace::Fabrics).to_string(),
            "Connect Controller Busy(0x181)"
        );
        assert_eq!(
            Status::from_bits(0x7C0).to_string(),
            "Vendor Specific Status(0x7c0)"
        );
        assert_eq!(Status::from_bits(0x4C0).to_string(), "Unknown(0x4c0)");
        assert_eq!(
            format!(
                "{:?}",
                StatusCode::LbaOutOfRange.dnr().with_more().with_crd(2)
            ),
            "Status(LbaOutOfRange, crd 2, more, dnr)"
        );
    }

    proptest! {
        #[test]
        fn field_round_trips(bits in any::<u16>()) {
            let status = Status::from_bits(bits);
            prop_assert_eq!(Status::from_cqe(status.to_cqe()), status);
            prop_assert_eq!(status.to_cqe() & 1, 0);
            let rebuilt = Status::from(status.code()).with_crd(status.crd());
            let rebuilt = if status.more() { rebuilt.with_more() } else { rebuilt };
            let rebuilt = if status.dnr() { rebuilt.with_dnr() } else { rebuilt };
            prop_assert_eq!(rebuilt, status);
            prop_assert_eq!(status.without_dnr().dnr(), false);
            prop_assert_eq!(status.ok().is_ok(), status.is(StatusCode::Success));
            let _ = (status.to_string(), status.sct(), format!("{status:?}"));
        }
    }
}
