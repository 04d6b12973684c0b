//! Asynchronous events: dword 0 of an Asynchronous Event Request's completion (Base 5.1.2.1).

use crate::log::LogPageId;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AsyncEvent {
    /// Type 0h, Error Status.
    Error(ErrorEvent),
    /// Type 1h, SMART / Health Status.
    Health(HealthEvent),
    /// Type 2h, Notice.
    Notice(Notice),
    /// Type 6h, I/O Command Specific Status.
    IoCommandSet(IoCommandSetEvent),
    /// Any other type (2:0) with its information (15:8).
    Other {
        /// Asynchronous Event Type.
        event_type: u8,
        /// Asynchronous Event Information.
        information: u8,
    },
}

open_enum! {
    /// Error Status.
    pub enum ErrorEvent {
        /// Write to Invalid Doorbell Register.
        InvalidDoorbellRegister = 0x00,
        /// Invalid Doorbell Write Value.
        InvalidDoorbellValue = 0x01,
        /// Diagnostic Failure.
        DiagnosticFailure = 0x02,
        /// Persistent Internal Error.
        PersistentInternalError = 0x03,
        /// Transient Internal Error.
        TransientInternalError = 0x04,
        /// Firmware Image Load Error.
        FirmwareLoadError = 0x05,
    }
}

open_enum! {
    /// SMART / Health Status.
    pub enum HealthEvent {
        /// NVM subsystem Reliability.
        Reliability = 0x00,
        /// Temperature Threshold.
        Temperature = 0x01,
        /// Spare Below Threshold.
        SpareBelowThreshold = 0x02,
    }
}

open_enum! {
    /// Notice.
    pub enum Notice {
        /// Attached Namespace Attribute Changed; see the changed namespace list.
        NamespaceAttributeChanged = 0x00,
        /// Firmware Activation Starting.
        FirmwareActivationStarting = 0x01,
        /// Telemetry Log Changed.
        TelemetryLogChanged = 0x02,
        /// Asymmetric Namespace Access Change.
        AnaChange = 0x03,
        /// Predictable Latency Event Aggregate Log Change.
        PredictableLatencyChange = 0x04,
        /// LBA Status Information Alert.
        LbaStatusAlert = 0x05,
        /// Endurance Group Event Aggregate Log Page Change.
        EnduranceGroupChange = 0x06,
        /// Zone Descriptor Changed (zoned command set).
        ZoneDescriptorChanged = 0xEF,
        /// Discovery Log Page Change.
        DiscoveryLogChange = 0xF0,
        /// Host Discovery Log Page Change.
        HostDiscoveryLogChange = 0xF1,
    }
}

open_enum! {
    /// I/O Command Specific Status.
    pub enum IoCommandSetEvent {
        /// Reservation Log Page Available.
        ReservationLog = 0x00,
        /// Sanitize Operation Completed.
        SanitizeCompleted = 0x01,
        /// Sanitize Operation Completed With Unexpected Deallocation.
        SanitizeUnexpectedDeallocation = 0x02,
    }
}

/// Result of an Asynchronous Event Request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AsyncEventResult {
    /// What happened.
    pub event: AsyncEvent,
    /// The page to read, which also re-arms the event.
    pub log_page: LogPageId,
}

impl AsyncEvent {
    /// Attached Namespace Attribute Changed.
    pub const NAMESPACE_CHANGED: Self = Self::Notice(Notice::NamespaceAttributeChanged);
    /// Asymmetric Namespace Access Change.
    pub const ANA_CHANGED: Self = Self::Notice(Notice::AnaChange);
    /// Telemetry Log Changed: controller-initiated data is available.
    pub const TELEMETRY_CHANGED: Self = Self::Notice(Notice::TelemetryLogChanged);
    /// Reservation Log Page Available.
    pub const RESERVATION_LOG: Self = Self::IoCommandSet(IoCommandSetEvent::ReservationLog);
    /// Discovery Log Page Change.
    pub const DISCOVERY_CHANGED: Self = Self::Notice(Notice::DiscoveryLogChange);

    /// Its type (2:0).
    #[must_use]
    pub const fn event_type(self) -> u8 {
        match self {
            Self::Error(_) => 0,
            Self::Health(_) => 1,
            Self::Notice(_) => 2,
            Self::IoCommandSet(_) => 6,
            Self::Other { event_type, .. } => event_type & 7,
        }
    }

    /// Its information (15:8).
    #[must_use]
    pub const fn information(self) -> u8 {
        match self {
            Self::Error(event) => event.raw(),
            Self::Health(event) => event.raw(),
            Self::Notice(event) => event.raw(),
            Self::IoCommandSet(event) => event.raw(),
            Self::Other { information, .. } => information,
        }
    }

    /// The log page that tells more about the event (Base 5.1.2.1).
    #[must_use]
    pub const fn log_page(self) -> LogPageId {
        match self {
            Self::Health(_) => LogPageId::Smart,
            Self::Notice(Notice::NamespaceAttributeChanged) => LogPageId::ChangedNamespaces,
            Self::Notice(Notice::FirmwareActivationStarting) => LogPageId::FirmwareSlot,
            Self::Notice(Notice::TelemetryLogChanged) => LogPageId::TelemetryController,
            Self::Notice(Notice::AnaChange) => LogPageId::Ana,
            Self::Notice(Notice::ZoneDescriptorChanged) => LogPageId::ChangedZones,
            Self::Notice(Notice::DiscoveryLogChange) => LogPageId::Discovery,
            Self::Notice(Notice::HostDiscoveryLogChange) => LogPageId::HostDiscovery,
            Self::IoCommandSet(IoCommandSetEvent::ReservationLog) => LogPageId::Reservation,
            Self::IoCommandSet(_) => LogPageId::Sanitize,
            _ => LogPageId::Error,
        }
    }

    /// The result that reports it.
    #[must_use]
    pub const fn result(self) -> AsyncEventResult {
        AsyncEventResult {
            event: self,
            log_page: self.log_page(),
        }
    }
}

impl AsyncEventResult {
    /// From dword 0 of the completion.
    #[must_use]
    pub const fn from_dword(dword: u32) -> Self {
        let information = (dword >> 8) as u8;
        let event = match (dword & 7) as u8 {
            0 => AsyncEvent::Error(ErrorEvent::from_raw(information)),
            1 => AsyncEvent::Health(HealthEvent::from_raw(information)),
            2 => AsyncEvent::Notice(Notice::from_raw(information)),
            6 => AsyncEvent::IoCommandSet(IoCommandSetEvent::from_raw(information)),
            event_type => AsyncEvent::Other {
                event_type,
                information,
            },
        };
        Self {
            event,
            log_page: LogPageId::from_raw((dword >> 16) as u8),
        }
    }

    /// Dword 0 of the completion.
    #[must_use]
    pub const fn to_dword(self) -> u32 {
        self.event.event_type() as u32
            | (self.event.information() as u32) << 8
            | (self.log_page.raw() as u32) << 16
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn dwords() {
        assert_eq!(
            AsyncEvent::NAMESPACE_CHANGED.result().to_dword(),
            0x0004_0002
        );
        assert_eq!(AsyncEvent::RESERVATION_LOG.result().to_dword(), 0x0080_0006);
        assert_eq!(AsyncEvent::ANA_CHANGED.result().to_dword(), 0x000C_0302);
        assert_eq!(
            AsyncEvent::TELEMETRY_CHANGED.result().to_dword(),
            0x0008_0202
        );
        assert_eq!(
            AsyncEvent::DISCOVERY_CHANGED.result().to_dword(),
            0x0070_F002
        );
    }

    proptest! {
        #[test]
        fn round_trips(dword in any::<u32>()) {
            let dword = dword & 0x00FF_FF07;
            prop_assert_eq!(AsyncEventResult::from_dword(dword).to_dword(), dword);
        }
    }
}
