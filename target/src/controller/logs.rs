//! Get Log Page (Base 5.1.12): true numbers, and the discovery log.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use flexblk_nvme::command::admin::{Csi, GetLogPage, opcode as admin};
use flexblk_nvme::command::nvm::opcode as nvm;
use flexblk_nvme::identify::NamespaceList;
use flexblk_nvme::log::discovery::{
    self, AddressFamily, EntryFlags, Record, SubsystemType, TransportType, Treq, TsasRdma, TsasTcp,
};
use flexblk_nvme::log::{
    self, ChangedNamespaces, CommandEffects, CriticalWarning, Effects, ErrorEntry, FirmwareSlot,
    LogPageId, ReservationNotification, Smart, SupportedLogPages, ana, data_units,
};
use flexblk_nvme::{Cntlid, Nqn, Nsid, Status, StatusCode, U32, U64, U128};

use super::events::Event;
use super::features::{IO_FEATURES, is_of_namespace};
use super::{Controller, Environment, Kind, identify};
use crate::config::{ListenAddress, Referral, Transport};
use crate::counters;
use crate::queue::request::MAX_TRANSFER_BYTES;
use crate::reservation::Notice;
use crate::snapshot::Snapshot;

/// Log pages of an I/O controller.
const IO_PAGES: &[LogPageId] = &[
    LogPageId::Supported,
    LogPageId::Error,
    LogPageId::Smart,
    LogPageId::FirmwareSlot,
    LogPageId::ChangedNamespaces,
    LogPageId::Effects,
    LogPageId::TelemetryHost,
    LogPageId::TelemetryController,
    LogPageId::FeatureEffects,
    LogPageId::Ana,
    LogPageId::Reservation,
];
/// Log pages of a discovery controller.
const DISCOVERY_PAGES: &[LogPageId] = &[LogPageId::Supported, LogPageId::Discovery];

impl Controller {
    /// The bytes asked for, or the status that says why not.
    pub(super) fn log_page(
        &mut self,
        get: &GetLogPage,
        environment: &Environment<'_>,
    ) -> Result<Vec<u8>, Status> {
        let invalid = || StatusCode::InvalidField.dnr();
        let len = u32::try_from(get.len_bytes())
            .ok()
            .filter(|len| *len <= MAX_TRANSFER_BYTES);
        let len = len
            .and_then(|len| usize::try_from(len).ok())
            .ok_or_else(invalid)?;
        // No page is a list that an index (OT 1) could count; offsets are of dwords (Base 5.1.12).
        if get.offset_is_index || !get.offset.is_multiple_of(4) || !csi_fits(get) {
            return Err(invalid());
        }
        self.capture_telemetry(get, environment.recorders)?;
        let page = self.page(get, environment)?;
        let part = log::window(&page, get.offset, len).ok_or_else(invalid)?;
        if !get.retain_event {
            match get.lid {
                LogPageId::ChangedNamespaces => {
                    self.changed = Default::default();
                    self.events.clear(Event::NamespaceChanged);
                }
                LogPageId::Ana => self.events.clear(Event::AnaChanged),
                LogPageId::TelemetryController => self.events.clear(Event::TelemetryChanged),
                LogPageId::Reservation => {
                    // Base 5.1.12.1.32: what was read is gone; the next one is an event of its own.
                    self.reservations.log.pop_front();
                    self.events.clear(Event::ReservationLog);
                    if !self.reservations.log.is_empty() {
                        self.events.raise(Event::ReservationLog);
                    }
                }
                LogPageId::Discovery => self.events.clear(Event::DiscoveryChanged),
                _ => {}
            }
        }
        Ok(part)
    }

    fn page(&self, get: &GetLogPage, environment: &Environment<'_>) -> Result<Vec<u8>, Status> {
        let pages = match self.kind {
            Kind::Io => IO_PAGES,
            Kind::Discovery => DISCOVERY_PAGES,
        };
        if !pages.contains(&get.lid) {
            return Err(StatusCode::InvalidLogPage.dnr());
        }
        Ok(match get.lid {
            LogPageId::Supported => SupportedLogPages::with(pages).bytes().to_vec(),
            LogPageId::Error => self.error_page(environment.transport),
            LogPageId::Smart => self.smart(get.nsid, environment)?.bytes().to_vec(),
            LogPageId::FirmwareSlot => FirmwareSlot::single(identify::FIRMWARE).bytes().to_vec(),
            LogPageId::ChangedNamespaces => self.changed_page().bytes().to_vec(),
            LogPageId::Effects => effects(get.csi).bytes().to_vec(),
            LogPageId::FeatureEffects => feature_effects(),
            LogPageId::Ana => self.ana_page(get.lsp & ana::RETURN_GROUPS_ONLY != 0, environment)?,
            LogPageId::TelemetryHost | LogPageId::TelemetryController => {
                self.telemetry_page(get.lid)
            }
            LogPageId::Reservation => self.reservation_page().bytes().to_vec(),
            LogPageId::Discovery => {
                let host = &self.association.hostnqn;
                discovery_log(environment.snapshot, environment.own_ip, host)
            }
            _ => return Err(StatusCode::InvalidLogPage.dnr()),
        })
    }

    /// The groups of namespaces that the host sees, with their states through its port.
    fn ana_page(
        &self,
        groups_only: bool,
        environment: &Environment<'_>,
    ) -> Result<Vec<u8>, Status> {
        let subsystem = self.subsystem(environment)?;
        let mut members: BTreeMap<u32, Vec<U32>> = BTreeMap::new();
        for namespace in subsystem.visible_to(&self.association.hostnqn) {
            let group = members.entry(namespace.anagrpid).or_default();
            group.push(U32::new(namespace.nsid.get()));
        }
        let groups = members.iter().map(|(id, namespaces)| {
            let known = subsystem.ana_group(*id);
            ana::Group {
                id: *id,
                state: subsystem.ana_state(*id, environment.port),
                change_count: known.map_or(0, |group| group.changes),
                namespaces: if groups_only { &[] } else { namespaces },
            }
        });
        Ok(ana::emit(subsystem.ana_changes, groups))
    }

    /// The oldest notification, or an empty page.
    fn reservation_page(&self) -> ReservationNotification {
        let mut page = ReservationNotification::zeroed();
        let waiting = &self.reservations.log;
        if let Some((count, nsid, notice)) = waiting.front() {
            page.count = U64::new(*count);
            page.kind = match notice {
                Notice::RegistrationPreempted => 1,
                Notice::ReservationReleased => 2,
                Notice::ReservationPreempted => 3,
            };
            page.available = u8::try_from(waiting.len() - 1).unwrap_or(u8::MAX);
            page.nsid = U32::new(nsid.get());
        }
        page
    }

    fn error_page(&self, transport: TransportType) -> Vec<u8> {
        let (_, entries) = self.association.errors();
        let mut page = Vec::with_capacity(crate::association::ERROR_LOG_ENTRIES * ErrorEntry::SIZE);
        for (count, error) in &entries {
            let mut entry =
                ErrorEntry::new(*count, error.sqid, error.cid, error.opcode, error.status)
                    .at(error.nsid, error.lba);
            // Transport type of the connection; the specification has no number for FlexiNS, whose
            // binding is NVMe/RDMA's.
            entry.trtype = match transport {
                TransportType::Flexins => TransportType::Rdma.raw(),
                other => other.raw(),
            };
            page.extend_from_slice(entry.bytes());
        }
        page.resize(crate::association::ERROR_LOG_ENTRIES * ErrorEntry::SIZE, 0);
        page
    }

    /// SMART / Health (Base 5.1.12.1.3): of the subsystem; per namespace it is not kept (LPA bit 0).
    /// Its life begins with the target's start: one power cycle, no unsafe shutdown yet.
    fn smart(&self, nsid: Nsid, environment: &Environment<'_>) -> Result<Smart, Status> {
        if nsid != Nsid::NONE && nsid != Nsid::BROADCAST {
            return Err(StatusCode::InvalidField.dnr());
        }
        let subsystem = self.subsystem(environment)?;
        let totals = counters::total(&subsystem.counters);
        let mut smart = Smart::zeroed();
        let mut active = subsystem.visible_to(&self.association.hostnqn).peekable();
        if active.peek().is_some() && active.all(|namespace| namespace.read_only()) {
            smart.critical_warning = CriticalWarning::READ_ONLY.bits();
        }
        smart.available_spare = 100;
        smart.data_units_read = U128::new(data_units(totals.read_bytes.into()));
        smart.data_units_written = U128::new(data_units(totals.written_bytes.into()));
        // "The number of commands completed by the controller", failed ones too.
        smart.host_reads = U128::new((totals.reads + totals.failed_reads).into());
        smart.host_writes = U128::new((totals.writes + totals.failed_writes).into());
        smart.busy_minutes = U128::new((totals.busy_us / 60_000_000).into());
        smart.power_cycles = U128::new(1);
        let up = environment
            .now
            .saturating_duration_since(environment.started);
        smart.power_on_hours = U128::new((up.as_secs() / 3600).into());
        smart.media_errors = U128::new(totals.media_errors.into());
        smart.error_entries = U128::new(self.association.errors().0.into());
        Ok(smart)
    }

    fn changed_page(&self) -> ChangedNamespaces {
        if self.changed.overflow {
            return ChangedNamespaces::overflow();
        }
        NamespaceList::above(
            Nsid::NONE,
            self.changed.nsids.iter().copied().map(Nsid::new),
        )
    }
}

/// Only Commands Supported and Effects is a page per I/O command set. Of a set that is not supported it has no I/O
/// command: nvme-cli's `effects-log` asks for the zoned set whatever the namespaces are, and fails where that fails.
fn csi_fits(get: &GetLogPage) -> bool {
    get.csi == Csi::Nvm || get.lid == LogPageId::Effects
}

fn effects(csi: Csi) -> Effects {
    let mut effects = Effects::zeroed();
    for opcode in [
        admin::GET_LOG_PAGE,
        admin::IDENTIFY,
        admin::ABORT,
        admin::SET_FEATURES,
        admin::GET_FEATURES,
        admin::ASYNC_EVENT_REQUEST,
        admin::KEEP_ALIVE,
    ] {
        effects.set_admin(opcode, CommandEffects::SUPPORTED);
    }
    if csi != Csi::Nvm {
        return effects;
    }
    for opcode in [
        nvm::FLUSH,
        nvm::READ,
        nvm::COMPARE,
        nvm::VERIFY,
        nvm::RESERVATION_REGISTER,
        nvm::RESERVATION_REPORT,
        nvm::RESERVATION_ACQUIRE,
        nvm::RESERVATION_RELEASE,
    ] {
        effects.set_io(opcode, CommandEffects::SUPPORTED);
    }
    for opcode in [
        nvm::WRITE,
        nvm::WRITE_UNCORRECTABLE,
        nvm::WRITE_ZEROES,
        nvm::DATASET_MANAGEMENT,
        nvm::COPY,
    ] {
        effects.set_io(opcode, CommandEffects::WRITES);
    }
    effects
}

/// Feature Identifiers Supported and Effects (Base 5.1.12.1.19): a dword per feature, bit 0
/// supported, bits 31:20 the scope, of which bit 0 is the namespace and bit 1
/// the controller.
fn feature_effects() -> Vec<u8> {
    const NAMESPACE_SCOPE: u32 = 1 << 20;
    const CONTROLLER_SCOPE: u32 = 1 << 21;
    let mut page = vec![0; 1024];
    for feature in IO_FEATURES {
        let scope = match is_of_namespace(*feature) {
            true => NAMESPACE_SCOPE,
            false => CONTROLLER_SCOPE,
        };
        let at = usize::from(feature.raw()) * 4;
        if let Some(entry) = page.get_mut(at..at + 4) {
            entry.copy_from_slice(&(scope | 1).to_le_bytes());
        }
    }
    page
}

/// The discovery log as `host` may see it: for each port the discovery service itself, and the
/// subsystems that are reached there and let the host in. Ports on any address are told with
/// `own_ip`, by which the host has come.
#[must_use]
pub fn discovery_log(snapshot: &Snapshot, own_ip: Option<IpAddr>, host: &Nqn) -> Vec<u8> {
    let discovery = (SubsystemType::CurrentDiscovery, snapshot.discovery_nqn());
    let mut records = Vec::new();
    for port in &snapshot.ports {
        let ListenAddress { trtype, address } = port.listen;
        let ip = match address.ip() {
            any if any.is_unspecified() => own_ip.unwrap_or(any),
            ip => ip,
        };
        let address = SocketAddr::new(ip, address.port());
        let subsystems = snapshot.subsystems.iter().flatten();
        let shown = subsystems
            .filter(|subsystem| subsystem.hosts.allows(host) && subsystem.is_reached_at(port))
            .map(|subsystem| (SubsystemType::Nvm, subsystem.nqn.clone()));
        for (subtype, subnqn) in std::iter::once(discovery.clone()).chain(shown) {
            let transport = transport_type(trtype);
            records.push(record(subtype, subnqn, transport, address, port.id));
        }
    }
    let referrals = snapshot.discovery.referrals.iter();
    records.extend(
        referrals
            .filter(|referral| referral.hosts.allows(host))
            .map(refer),
    );
    discovery::emit(snapshot.generation, &records)
}

fn transport_type(transport: Transport) -> TransportType {
    match transport {
        Transport::Flexins => TransportType::Flexins,
        Transport::Tcp => TransportType::Tcp,
    }
}

/// The entry of another discovery service. The specification says nothing of its port; the field is
/// 0.
fn refer(referral: &Referral) -> Record {
    let transport = transport_type(referral.trtype);
    let nqn = referral.nqn.clone().unwrap_or_else(Nqn::discovery);
    record(SubsystemType::Referral, nqn, transport, referral.address, 0)
}

fn record(
    subtype: SubsystemType,
    subnqn: Nqn,
    transport: TransportType,
    address: SocketAddr,
    portid: u16,
) -> Record {
    let persistent = match subtype {
        SubsystemType::CurrentDiscovery => EntryFlags::PERSISTENT_DISCOVERY,
        _ => EntryFlags::empty(),
    };
    let mut tsas = [0; 256];
    match transport {
        // SECTYPE 0: no security (TCP 3.6.1.1).
        TransportType::Tcp => tsas.copy_from_slice(TsasTcp::zeroed().bytes()),
        _ => tsas.copy_from_slice(TsasRdma::roce_v2().bytes()),
    }
    Record {
        trtype: transport,
        adrfam: match address.ip() {
            IpAddr::V4(_) => AddressFamily::Ipv4,
            IpAddr::V6(_) => AddressFamily::Ipv6,
        },
        subtype,
        treq: Treq::new()
            .with_secure_channel(2)
            .with_sq_flow_control_disable(true),
        portid,
        cntlid: Cntlid::DYNAMIC,
        asqsz: crate::queue::ADMIN_ENTRIES,
        eflags: persistent,
        trsvcid: address.port().to_string(),
        subnqn,
        traddr: address.ip().to_string(),
        tsas,
    }
}
