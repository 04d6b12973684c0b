//! Get and Set Features (Base 5.1.11, 5.1.25). Nothing is saveable; values live until a reset.

use std::collections::BTreeMap;

use flexblk_nvme::command::admin::{GetFeatures, Select, SetFeatures};
use flexblk_nvme::features::{
    Arbitration, AsyncEventConfig, Capabilities, ErrorRecovery, FeatureId, FeatureValue,
    HostBehavior, HostIdFormat, NumberOfQueues, PowerManagement, ReservationMask,
    TemperatureThreshold, VolatileWriteCache, WriteAtomicity,
};
use flexblk_nvme::{Nsid, Status, StatusCode, U16};

use super::{Change, Controller, Environment, Kind, Reply, done};
use crate::reservation::Notice;
use crate::snapshot::Protection;

/// Values that a host can change and that we only keep for it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Features {
    arbitration: Arbitration,
    power: PowerManagement,
    temperature: [TemperatureThreshold; 2],
    error_recovery: ErrorRecovery,
    write_atomicity: WriteAtomicity,
    behavior: HostBehavior,
}

impl Default for Features {
    fn default() -> Self {
        // Base 5.1.25.1.3: over temperature FFFFh, under temperature 0.
        let over = TemperatureThreshold::new().with_kelvin(0xFFFF);
        let under = TemperatureThreshold::new().with_kind(1);
        Self {
            arbitration: Arbitration::new(),
            power: PowerManagement::new(),
            temperature: [over, under],
            error_recovery: ErrorRecovery::new(),
            write_atomicity: WriteAtomicity::new(),
            behavior: HostBehavior::zeroed(),
        }
    }
}

/// Features of an I/O controller, for the log page that lists them.
pub(super) const IO_FEATURES: &[FeatureId] = &[
    FeatureId::Arbitration,
    FeatureId::PowerManagement,
    FeatureId::TemperatureThreshold,
    FeatureId::ErrorRecovery,
    FeatureId::VolatileWriteCache,
    FeatureId::NumberOfQueues,
    FeatureId::WriteAtomicity,
    FeatureId::AsyncEventConfig,
    FeatureId::KeepAlive,
    FeatureId::HostBehavior,
    FeatureId::HostId,
    FeatureId::ReservationMask,
    FeatureId::ReservationPersistence,
    FeatureId::WriteProtect,
];

/// Has the feature a value for each namespace?
pub(super) const fn is_of_namespace(fid: FeatureId) -> bool {
    matches!(
        fid,
        FeatureId::ReservationMask | FeatureId::ReservationPersistence | FeatureId::WriteProtect
    )
}

/// Reservation Notification Masks: what the host does not want to know, by namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ReservationMasks {
    by_nsid: BTreeMap<u32, ReservationMask>,
}

impl ReservationMasks {
    pub(super) fn is_masked(&self, nsid: Nsid, notice: Notice) -> bool {
        let mask = self.get(nsid);
        match notice {
            Notice::RegistrationPreempted => mask.registration_preempted(),
            Notice::ReservationReleased => mask.reservation_released(),
            Notice::ReservationPreempted => mask.reservation_preempted(),
        }
    }

    fn get(&self, nsid: Nsid) -> ReservationMask {
        self.by_nsid.get(&nsid.get()).copied().unwrap_or_default()
    }
}

/// Events that an I/O and a discovery controller can report.
const IO_EVENTS: AsyncEventConfig = AsyncEventConfig::new()
    .with_critical_warnings(0xFF)
    .with_namespace_attribute(true)
    .with_telemetry(true)
    .with_ana_change(true);
const DISCOVERY_EVENTS: AsyncEventConfig = AsyncEventConfig::new().with_discovery_log(true);

fn invalid() -> Status {
    StatusCode::InvalidField.dnr()
}

impl Controller {
    /// Sets a feature; the result is dword 0 of the completion.
    pub(super) fn set_feature(
        &mut self,
        set: &SetFeatures,
        data: &[u8],
        environment: &Environment<'_>,
    ) -> Result<u32, Status> {
        self.check_supported(set.fid)?;
        // Base 5.1.25: SV on a feature that cannot be saved.
        if set.save {
            return Err(StatusCode::FeatureNotSaveable.dnr());
        }
        if set.fid == FeatureId::HostBehavior {
            let behavior = HostBehavior::view(data).ok_or_else(invalid)?;
            // LBAFEE and others would switch on what we do not have; ACRE is a host's own matter.
            if behavior.acre > 1 {
                return Err(invalid());
            }
            self.features.behavior = HostBehavior::zeroed();
            self.features.behavior.acre = behavior.acre;
            // Of Copy's formats 2h to 4h (bit = format) we have 2h.
            let formats = behavior.cdfe.get() & 1 << 2;
            self.features.behavior.cdfe = U16::new(formats);
            self.association.set_copies_between_namespaces(formats != 0);
            return Ok(0);
        }
        match set.value().ok_or_else(invalid)? {
            FeatureValue::Arbitration(value) => self.features.arbitration = value,
            // NPSS is 0: state 0 is the only one.
            FeatureValue::PowerManagement(value) if value.state() == 0 => {
                self.features.power = value
            }
            FeatureValue::TemperatureThreshold(value) => self.set_temperature(value)?,
            FeatureValue::ErrorRecovery(value) if !value.dulbe() => {
                self.features.error_recovery = value;
            }
            FeatureValue::WriteAtomicity(value) => self.features.write_atomicity = value,
            FeatureValue::VolatileWriteCache(value) => {
                // Base 5.1.25.1.4: without a volatile write cache, Invalid Field in Command.
                if !self.subsystem(environment)?.has_write_cache() {
                    return Err(invalid());
                }
                self.association.set_write_through(!value.enable());
            }
            FeatureValue::NumberOfQueues(value) => return self.set_queues(value, environment),
            FeatureValue::AsyncEventConfig(value) => {
                let known = match self.kind {
                    Kind::Io => IO_EVENTS,
                    Kind::Discovery => DISCOVERY_EVENTS,
                };
                let had_telemetry = AsyncEventConfig::from_bits(self.events.config()).telemetry();
                // Hosts ask for what OAES does not list only by mistake; such bits stay 0.
                self.events
                    .set_config(value.into_bits() & known.into_bits());
                if value.telemetry() && !had_telemetry && self.has_lost(environment.recorders) {
                    self.note_loss();
                }
            }
            FeatureValue::KeepAlive(value) => {
                // RDMA and TCP require Keep Alive: once it is on, the timer can be changed and not be
                // taken away (Base 5.1.25.1.8). Hosts that never set it may leave it at 0.
                if value.timeout_ms() == 0 && self.keep_alive.timeout_ms() != 0 {
                    return Err(StatusCode::KeepAliveTimeoutInvalid.dnr());
                }
                self.keep_alive.set(value.timeout_ms(), environment.now);
            }
            // Base 5.1.25.1.27: Connect has set it; Command Sequence Error.
            FeatureValue::HostId(_) => return Err(StatusCode::CommandSequenceError.dnr()),
            _ => return Err(invalid()),
        }
        Ok(0)
    }

    /// Sets a feature of a namespace. What other controllers see too is changed by the control
    /// thread.
    pub(super) fn set_namespace_feature(
        &mut self,
        set: &SetFeatures,
        environment: &Environment<'_>,
    ) -> Result<Reply, Status> {
        self.check_supported(set.fid)?;
        if set.save {
            return Err(StatusCode::FeatureNotSaveable.dnr());
        }
        let subsystem = self.subsystem(environment)?;
        let host = &self.association.hostnqn;
        let visible = |nsid| subsystem.visible(nsid, host).is_some();
        let value = set.value().ok_or_else(invalid)?;
        if let (FeatureValue::ReservationMask(mask), Nsid::BROADCAST) = (value, set.nsid) {
            let masks = &mut self.reservations.masks.by_nsid;
            for namespace in subsystem.visible_to(host) {
                masks.insert(namespace.nsid.get(), mask);
            }
            return Ok(done(0));
        }
        // Base 5.1.25: an NSID that is not active.
        if !visible(set.nsid) {
            return Err(StatusCode::InvalidNamespaceOrFormat.dnr());
        }
        match value {
            FeatureValue::ReservationMask(mask) => {
                self.reservations.masks.by_nsid.insert(set.nsid.get(), mask);
                Ok(done(0))
            }
            FeatureValue::ReservationPersistence(value) => {
                Ok(Reply::Order(set.nsid, Change::Persist(value.persist())))
            }
            FeatureValue::WriteProtect(value) => {
                let protection = Protection::from_raw(value.state()).ok_or_else(invalid)?;
                Ok(Reply::Order(set.nsid, Change::Protect(protection)))
            }
            _ => Err(invalid()),
        }
    }

    fn namespace_feature(
        &self,
        get: &GetFeatures,
        environment: &Environment<'_>,
    ) -> Result<u32, Status> {
        let subsystem = self.subsystem(environment)?;
        let namespace = subsystem
            .visible(get.nsid, &self.association.hostnqn)
            .ok_or_else(|| StatusCode::InvalidNamespaceOrFormat.dnr())?;
        Ok(match get.fid {
            FeatureId::ReservationMask => self.reservations.masks.get(get.nsid).into_bits(),
            FeatureId::ReservationPersistence => u32::from(namespace.reservations.persist),
            FeatureId::WriteProtect => namespace.protection.raw().into(),
            _ => return Err(invalid()),
        })
    }

    fn set_temperature(&mut self, value: TemperatureThreshold) -> Result<(), Status> {
        // There is no sensor: composite or all.
        if !matches!(value.sensor(), 0 | 15) {
            return Err(invalid());
        }
        let slot = self
            .features
            .temperature
            .get_mut(usize::from(value.kind()))
            .ok_or_else(invalid)?;
        *slot = value.with_sensor(0);
        Ok(())
    }

    /// Number of Queues (Base 5.1.25.1.5): as many as asked for, as there are, and as the memory
    /// budget carries; the memory is set aside for them.
    fn set_queues(
        &mut self,
        asked: NumberOfQueues,
        environment: &Environment<'_>,
    ) -> Result<u32, Status> {
        if !asked.is_valid() {
            return Err(invalid());
        }
        // "shall only be issued prior to creation of any I/O queues": Command Sequence Error.
        if self.association.has_queues() {
            return Err(StatusCode::CommandSequenceError.dnr());
        }
        // "The controller shall not change the value allocated between resets."
        if let Some(granted) = self.association.granted() {
            return Ok(NumberOfQueues::of(granted).into_bits());
        }
        let limits = environment.directory.limits();
        let wanted = asked.pairs().min(limits.io_queues.into());
        let budget = environment.directory.budget();
        let (count, memory) = budget.reserve_up_to(wanted, environment.queue_bytes);
        // There is no way to say "none": one is promised, and its Connect decides.
        let count = u16::try_from(count.max(1)).unwrap_or(u16::MAX);
        self.association.grant(count, memory);
        Ok(NumberOfQueues::of(count).into_bits())
    }

    /// Gets a feature.
    pub(super) fn get_feature(
        &self,
        get: &GetFeatures,
        environment: &Environment<'_>,
    ) -> Result<Reply, Status> {
        self.check_supported(get.fid)?;
        match get.select {
            Select::Current => self.current(get, environment),
            Select::Capabilities => {
                let fixed = matches!(get.fid, FeatureId::HostId);
                Ok(done(
                    Capabilities::new()
                        .with_changeable(!fixed)
                        .with_namespace_specific(is_of_namespace(get.fid))
                        .into_bits()
                        .into(),
                ))
            }
            // Nothing can be saved: the saved value is the default (Base 4.4).
            Select::Default | Select::Saved => self.default_value(get, environment),
        }
    }

    fn current(&self, get: &GetFeatures, environment: &Environment<'_>) -> Result<Reply, Status> {
        let features = &self.features;
        Ok(done(
            match get.fid {
                FeatureId::Arbitration => features.arbitration.into_bits(),
                FeatureId::PowerManagement => features.power.into_bits(),
                FeatureId::TemperatureThreshold => temperature(&features.temperature, get)?,
                FeatureId::ErrorRecovery => features.error_recovery.into_bits(),
                FeatureId::WriteAtomicity => features.write_atomicity.into_bits(),
                FeatureId::VolatileWriteCache => {
                    if !self.subsystem(environment)?.has_write_cache() {
                        return Err(invalid());
                    }
                    let enable = !self.association.write_through();
                    VolatileWriteCache::new().with_enable(enable).into_bits()
                }
                FeatureId::NumberOfQueues => {
                    let limit = environment.directory.limits().io_queues;
                    NumberOfQueues::of(self.association.granted().unwrap_or(limit)).into_bits()
                }
                FeatureId::AsyncEventConfig => self.events.config(),
                FeatureId::KeepAlive => self.keep_alive.timeout_ms(),
                FeatureId::HostBehavior => {
                    return Ok(Reply::Data(features.behavior.bytes().to_vec()));
                }
                FeatureId::HostId => {
                    // Over Fabrics it has 128 bits; the short form is Host Identifier Inconsistent
                    // Format (Base 5.1.25.1.27).
                    if !HostIdFormat::from_bits(get.cdw11).extended() {
                        return Err(StatusCode::HostIdInconsistentFormat.dnr());
                    }
                    return Ok(Reply::Data(self.association.hostid.to_bytes().to_vec()));
                }
                fid if is_of_namespace(fid) => self.namespace_feature(get, environment)?,
                _ => return Err(invalid()),
            }
            .into(),
        ))
    }

    fn default_value(
        &self,
        get: &GetFeatures,
        environment: &Environment<'_>,
    ) -> Result<Reply, Status> {
        let default = Features::default();
        Ok(done(match get.fid {
            FeatureId::TemperatureThreshold => temperature(&default.temperature, get)?.into(),
            FeatureId::VolatileWriteCache => VolatileWriteCache::new()
                .with_enable(true)
                .into_bits()
                .into(),
            FeatureId::NumberOfQueues => {
                NumberOfQueues::of(environment.directory.limits().io_queues)
                    .into_bits()
                    .into()
            }
            FeatureId::HostBehavior => return Ok(Reply::Data(default.behavior.bytes().to_vec())),
            FeatureId::HostId => return self.current(get, environment),
            _ => 0,
        }))
    }

    /// Base 5.1.25: a feature that is not supported is Invalid Field in Command.
    fn check_supported(&self, fid: FeatureId) -> Result<(), Status> {
        let known: &[FeatureId] = match self.kind {
            Kind::Io => IO_FEATURES,
            Kind::Discovery => &[FeatureId::AsyncEventConfig, FeatureId::KeepAlive],
        };
        if known.contains(&fid) {
            Ok(())
        } else {
            Err(invalid())
        }
    }
}

fn temperature(values: &[TemperatureThreshold; 2], get: &GetFeatures) -> Result<u32, Status> {
    let asked = TemperatureThreshold::from_bits(get.cdw11);
    let value = values
        .get(usize::from(asked.kind()))
        .filter(|_| asked.sensor() == 0);
    value.map(|value| value.into_bits()).ok_or_else(invalid)
}
