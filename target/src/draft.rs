//! Changes of what is exported, made on a copy and put in force as one: nothing of a change that
//! fails half-way is ever seen by a host.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use flexblk_blockdev::{BdevConfig, BlockDevice};
use flexblk_nvme::log::ana::AnaState;
use flexblk_nvme::{Nqn, Nsid};
use sha2::{Digest as _, Sha256};

use crate::bdevs::{self, Bdev};
use crate::config::{
    self, AllowedHosts, Discovery, ListenAddress, MAX_ANA_GROUPS, MAX_BDEVS, MAX_LISTENERS,
    MAX_NSID, MAX_SUBSYSTEMS, Transport,
};
use crate::counters::IoCounters;
use crate::error::NamespaceError;
use crate::histogram::{HistogramConfig, LatencyHistogram};
use crate::iostat::IoStats;
use crate::media::KeptMedia;
use crate::port::{self, Port};
use crate::ptpl::State;
use crate::snapshot::{Namespace, Snapshot, Subsystem};

/// Model number when none is configured.
const MODEL: &str = "flexblk";

/// What will be exported when the change is done. Opening a device is the only thing here that
/// reaches outside; dropping the draft closes it again.
pub(crate) struct Draft {
    pub(crate) snapshot: Snapshot,
    pub(crate) bdevs: Vec<Bdev>,
    pub(crate) threads: usize,
    /// FlexiNS's address: all of its services are on it.
    pub(crate) flexins: IpAddr,
    pub(crate) next_device: u64,
    /// What is kept of namespaces that are not there.
    pub(crate) state: Arc<State>,
    /// Marks of Write Uncorrectable that are kept; `None` without a file to keep them in.
    pub(crate) kept_media: Option<Arc<KeptMedia>>,
}

impl Draft {
    /// Adds a subsystem without namespaces.
    pub(crate) fn add_subsystem(
        &mut self,
        subsystem: &config::Subsystem,
    ) -> Result<(), NamespaceError> {
        let nqn = &subsystem.nqn;
        if self.snapshot.find(nqn).is_some() {
            return Err(NamespaceError::SubsystemExists(nqn.as_str().to_owned()));
        }
        let slots = &mut self.snapshot.subsystems;
        let slot = slots.iter().position(Option::is_none);
        let slot = slot.unwrap_or(slots.len());
        if slot >= MAX_SUBSYSTEMS {
            return Err(NamespaceError::TooManySubsystems);
        }
        let serial = subsystem.serial.clone();
        let new = Arc::new(Subsystem {
            slot,
            nqn: nqn.clone(),
            serial: serial.unwrap_or_else(|| serial_of(nqn)).into(),
            model: subsystem.model.as_deref().unwrap_or(MODEL).into(),
            hosts: subsystem.hosts.clone(),
            listeners: None,
            ana_groups: Vec::new(),
            ana_changes: 0,
            namespaces: Vec::new(),
            counters: (0..self.threads).map(|_| IoCounters::default()).collect(),
        });
        match slots.get_mut(slot) {
            Some(place) => *place = Some(new),
            None => slots.push(Some(new)),
        }
        self.snapshot.generation += 1;
        if subsystem.listeners.is_some() {
            self.set_listeners(nqn, subsystem.listeners.as_deref())?;
        }
        self.set_ana_groups(nqn, &subsystem.ana_groups)
    }

    /// States of ANA groups as a configuration says them.
    fn set_ana_groups(
        &mut self,
        nqn: &Nqn,
        groups: &[config::AnaGroup],
    ) -> Result<(), NamespaceError> {
        // What is said of all listeners comes first: it takes back what was said of one.
        let all = groups.iter().filter(|group| group.listener.is_none());
        let single = groups.iter().filter(|group| group.listener.is_some());
        for group in all.chain(single) {
            let port = match &group.listener {
                Some(listen) => Some(self.port_of(nqn, listen)?),
                None => None,
            };
            self.set_ana_state(nqn, Some(group.anagrpid), port, group.state)?;
        }
        Ok(())
    }

    /// The port of a subsystem at that address.
    pub(crate) fn port_of(&self, nqn: &Nqn, listen: &ListenAddress) -> Result<u16, NamespaceError> {
        let subsystem = find(&self.snapshot, nqn)?;
        let port = self.snapshot.port_at(listen);
        let port = port.filter(|port| subsystem.is_reached_at(port));
        port.map(|port| port.id)
            .ok_or_else(|| NamespaceError::NoListener {
                subnqn: nqn.as_str().to_owned(),
                listen: *listen,
            })
    }

    /// Changes where a subsystem is reached: at these addresses only, or at all from the start.
    /// Addresses that nothing is reached at any more are closed.
    pub(crate) fn set_listeners(
        &mut self,
        nqn: &Nqn,
        listeners: Option<&[ListenAddress]>,
    ) -> Result<(), NamespaceError> {
        find(&self.snapshot, nqn)?;
        if listeners.is_some_and(|listeners| listeners.len() > MAX_LISTENERS) {
            return Err(NamespaceError::TooManyListeners);
        }
        let ids = match listeners {
            Some(listeners) => {
                let ids = listeners.iter().map(|listen| self.open_port(listen));
                Some(ids.collect::<Result<Vec<u16>, _>>()?)
            }
            None => None,
        };
        let ports = self.snapshot.ports.clone();
        self.edit(nqn, |subsystem| {
            subsystem.listeners = ids;
            let reached: Vec<u16> = ports
                .iter()
                .filter(|port| subsystem.is_reached_at(port))
                .map(|port| port.id)
                .collect();
            for group in &mut subsystem.ana_groups {
                group.ports.retain(|(port, _)| reached.contains(port));
            }
            Ok(())
        })?;
        self.snapshot.generation += 1;
        Ok(())
    }

    /// The port at an address, which is opened if it is not there.
    fn open_port(&mut self, listen: &ListenAddress) -> Result<u16, NamespaceError> {
        if let Some(port) = self.snapshot.port_at(listen) {
            return Ok(port.id);
        }
        let refused = |why: String| NamespaceError::Listen {
            listen: *listen,
            why,
        };
        let free = |id: &u16| self.snapshot.port(*id).is_none();
        // The lowest identifiers are those of the ports from the start.
        let id = (port::TCP_PORT + 1..=u16::MAX).find(free);
        let id = id.ok_or(NamespaceError::TooManyListeners)?;
        let address = listen.address;
        let port = match listen.trtype {
            Transport::Flexins if address.ip() != self.flexins => {
                return Err(refused(format!(
                    "FlexiNS is on {} for all of the target's life; choose another service id there",
                    self.flexins
                )));
            }
            Transport::Flexins => Port::flexins(id, address, false),
            Transport::Tcp => {
                let (address, sockets) =
                    port::once_free(|| port::tcp_sockets(address, self.threads))
                        .map_err(|error| refused(error.to_string()))?;
                Port::tcp(id, address, false, sockets)
            }
        };
        self.snapshot.ports.push(Arc::new(port));
        Ok(id)
    }

    /// Closes the ports at which nothing is reached: when the whole change is made, since a later part of it may want
    /// the same address, and since threads know a port by its number, which must not be another's at once.
    pub(crate) fn close_ports(&mut self) {
        let Snapshot {
            ports,
            subsystems,
            discovery,
            ..
        } = &mut self.snapshot;
        ports.retain(|port| {
            port.fixed
                || discovery.listeners.contains(&port.listen)
                || subsystems
                    .iter()
                    .flatten()
                    .any(|subsystem| subsystem.is_reached_at(port))
        });
    }

    /// Removes a subsystem.
    pub(crate) fn remove_subsystem(&mut self, nqn: &Nqn) -> Result<(), NamespaceError> {
        let slot = find(&self.snapshot, nqn)?.slot;
        if let Some(place) = self.snapshot.subsystems.get_mut(slot) {
            *place = None;
        }
        self.snapshot.generation += 1;
        self.close_unused();
        Ok(())
    }

    /// Changes who may connect.
    pub(crate) fn set_allowed_hosts(
        &mut self,
        nqn: &Nqn,
        hosts: AllowedHosts,
    ) -> Result<(), NamespaceError> {
        self.edit(nqn, |subsystem| {
            subsystem.hosts = hosts;
            Ok(())
        })?;
        self.snapshot.generation += 1;
        Ok(())
    }

    /// Adds a namespace, and opens its device if it is given in the short form.
    pub(crate) fn add_namespace(
        &mut self,
        nqn: &Nqn,
        namespace: &config::Namespace,
    ) -> Result<Nsid, NamespaceError> {
        // Before a device is opened in vain.
        let subsystem = find(&self.snapshot, nqn)?;
        let nsid = match namespace.nsid {
            Some(nsid) => nsid,
            None => free_nsid(subsystem)?,
        };
        if !(1..=MAX_NSID).contains(&nsid.get()) {
            return Err(NamespaceError::Range);
        }
        if !(1..=MAX_ANA_GROUPS).contains(&namespace.anagrpid) {
            return Err(NamespaceError::AnaGroup(namespace.anagrpid));
        }
        if subsystem.namespace(nsid).is_some() {
            let subnqn = nqn.as_str().to_owned();
            return Err(NamespaceError::Exists {
                subnqn,
                nsid: nsid.get(),
            });
        }
        let bdev = self.bdev_for(&namespace.bdev)?;
        let info = bdev.device.info();
        let uuid = namespace.uuid.unwrap_or(info.uuid);
        let new = Namespace {
            nsid,
            device_id: bdev.id,
            media: Arc::clone(&bdev.media),
            stats: Arc::clone(&bdev.stats),
            histogram: bdev.histogram.clone(),
            device: Arc::clone(&bdev.device),
            hosts: namespace.hosts.clone(),
            anagrpid: namespace.anagrpid,
            reservations: Arc::new(self.state.reservations(nqn, nsid, uuid).unwrap_or_default()),
            protection: self.state.protection(nqn, nsid, uuid),
            uuid,
            info,
        };
        self.edit(nqn, |subsystem| {
            set(subsystem, nsid, Some(Arc::new(new)));
            Ok(())
        })?;
        Ok(nsid)
    }

    /// Changes which hosts see a namespace.
    pub(crate) fn set_namespace_hosts(
        &mut self,
        nqn: &Nqn,
        nsid: Nsid,
        hosts: AllowedHosts,
    ) -> Result<(), NamespaceError> {
        self.edit(nqn, |subsystem| {
            let mut changed = Namespace::clone(active(subsystem, nsid)?);
            changed.hosts = hosts;
            set(subsystem, nsid, Some(Arc::new(changed)));
            Ok(())
        })
    }

    /// Changes the state of an ANA group, or of all groups, through one port or all.
    pub(crate) fn set_ana_state(
        &mut self,
        nqn: &Nqn,
        group: Option<u32>,
        port: Option<u16>,
        state: AnaState,
    ) -> Result<(), NamespaceError> {
        let all = 1..=MAX_ANA_GROUPS;
        let groups = match group {
            Some(group) if !all.contains(&group) => return Err(NamespaceError::AnaGroup(group)),
            Some(group) => group..=group,
            None => all,
        };
        self.edit(nqn, |subsystem| {
            subsystem.ana_changes += 1;
            let changes = subsystem.ana_changes;
            for id in groups {
                let group = subsystem.ana_group_mut(id);
                group.changes = changes;
                match port {
                    None => {
                        group.state = state;
                        group.ports.clear();
                    }
                    Some(port) => {
                        group.ports.retain(|(other, _)| *other != port);
                        group.ports.push((port, state));
                    }
                }
            }
            Ok(())
        })
    }

    /// Moves a namespace to another ANA group.
    pub(crate) fn set_ana_group(
        &mut self,
        nqn: &Nqn,
        nsid: Nsid,
        group: u32,
    ) -> Result<(), NamespaceError> {
        if !(1..=MAX_ANA_GROUPS).contains(&group) {
            return Err(NamespaceError::AnaGroup(group));
        }
        self.edit(nqn, |subsystem| {
            let mut changed = Namespace::clone(active(subsystem, nsid)?);
            if changed.anagrpid == group {
                return Ok(());
            }
            let left = core::mem::replace(&mut changed.anagrpid, group);
            set(subsystem, nsid, Some(Arc::new(changed)));
            // Hosts find the namespace's group in the ANA log page, too (Base 8.1.1.3).
            subsystem.ana_changes += 1;
            let changes = subsystem.ana_changes;
            for id in [left, group] {
                subsystem.ana_group_mut(id).changes = changes;
            }
            Ok(())
        })
    }

    /// Changes name and referrals of the discovery service.
    pub(crate) fn set_discovery(&mut self, discovery: Discovery) -> Result<(), NamespaceError> {
        if discovery.listeners.len() > MAX_LISTENERS {
            return Err(NamespaceError::TooManyListeners);
        }
        for listen in &discovery.listeners {
            self.open_port(listen)?;
        }
        self.snapshot.discovery = Arc::new(discovery);
        self.snapshot.generation += 1;
        Ok(())
    }

    /// Removes a namespace, and closes its device if it came with it.
    pub(crate) fn remove_namespace(&mut self, nqn: &Nqn, nsid: Nsid) -> Result<(), NamespaceError> {
        self.edit(nqn, |subsystem| {
            active(subsystem, nsid)?;
            set(subsystem, nsid, None);
            Ok(())
        })?;
        self.close_unused();
        Ok(())
    }

    /// Opens a device.
    pub(crate) fn create_bdev(
        &mut self,
        config: BdevConfig,
        implicit: bool,
    ) -> Result<&Bdev, NamespaceError> {
        if self.bdevs.iter().any(|bdev| bdev.name() == config.name()) {
            return Err(NamespaceError::BdevExists(config.name().to_owned()));
        }
        if self.bdevs.len() >= MAX_BDEVS {
            return Err(NamespaceError::TooManyBdevs);
        }
        let bases: HashMap<String, Arc<dyn BlockDevice>> = self
            .bdevs
            .iter()
            .filter(|bdev| config.base() == Some(bdev.name()))
            .map(|bdev| (bdev.name().to_owned(), Arc::clone(&bdev.device)))
            .collect();
        let device = flexblk_blockdev::open_over(&config, &bases)?;
        let media = match &self.kept_media {
            Some(kept) if bdevs::outlives_us(&config, &self.bdevs) => kept.of(device.info().uuid),
            _ => Arc::default(),
        };
        let id = self.next_device;
        self.next_device += 1;
        self.bdevs.push(Bdev {
            id,
            config,
            device,
            media,
            stats: Arc::new(IoStats::new(self.threads)),
            histogram: None,
            implicit,
        });
        self.bdevs.last().ok_or(NamespaceError::TooManyBdevs)
    }

    /// Closes a device: the namespaces on it are removed with it. A device below another stays.
    pub(crate) fn delete_bdev(&mut self, name: &str) -> Result<(), NamespaceError> {
        let at = self.bdevs.iter().position(|bdev| bdev.name() == name);
        let no_bdev = || NamespaceError::NoBdev(name.to_owned());
        let id = at.and_then(|at| self.bdevs.get(at)).ok_or_else(no_bdev)?.id;
        let above = self
            .bdevs
            .iter()
            .find(|bdev| bdev.config.base() == Some(name));
        if let Some(above) = above {
            return Err(NamespaceError::BdevInUse {
                name: name.to_owned(),
                by: above.name().to_owned(),
            });
        }
        for place in self.snapshot.subsystems.iter_mut().flatten() {
            if place.active().any(|namespace| namespace.device_id == id) {
                let mut changed = Subsystem::clone(place);
                for namespace in &mut changed.namespaces {
                    namespace.take_if(|namespace| namespace.device_id == id);
                }
                *place = Arc::new(changed);
            }
        }
        self.bdevs.retain(|bdev| bdev.id != id);
        Ok(())
    }

    /// Changes what can change of a device under I/O; see [`BlockDevice::reconfigure`].
    pub(crate) fn reconfigure_bdev(&mut self, config: BdevConfig) -> Result<(), NamespaceError> {
        let name = config.name();
        let bdev = self.bdevs.iter_mut().find(|bdev| bdev.name() == name);
        let bdev = bdev.ok_or_else(|| NamespaceError::NoBdev(name.to_owned()))?;
        bdev.device.reconfigure(&config)?;
        bdev.config = config;
        Ok(())
    }

    /// Counts a device's latencies so, or no more. A histogram of the same kind goes on.
    pub(crate) fn set_histogram(
        &mut self,
        name: &str,
        config: Option<HistogramConfig>,
    ) -> Result<(), NamespaceError> {
        let threads = self.threads;
        let bdev = self.bdevs.iter_mut().find(|bdev| bdev.name() == name);
        let bdev = bdev.ok_or_else(|| NamespaceError::NoBdev(name.to_owned()))?;
        if bdev.histogram.as_ref().map(|is| *is.config()) == config {
            return Ok(());
        }
        bdev.histogram = match config {
            Some(config) => Some(Arc::new(LatencyHistogram::new(config, threads)?)),
            None => None,
        };
        let (id, histogram) = (bdev.id, bdev.histogram.clone());
        self.renew(id, |namespace| Namespace {
            histogram: histogram.clone(),
            ..Namespace::clone(namespace)
        });
        Ok(())
    }

    /// Takes a device's size over into every namespace on it.
    pub(crate) fn refresh(&mut self, device_id: u64) {
        self.renew(device_id, |namespace| Namespace {
            info: namespace.device.info(),
            ..Namespace::clone(namespace)
        });
    }

    /// Puts other values in the place of the namespaces on a device.
    fn renew(&mut self, device_id: u64, renewed: impl Fn(&Namespace) -> Namespace) {
        for place in self.snapshot.subsystems.iter_mut().flatten() {
            let stale: Vec<Namespace> = place
                .active()
                .filter(|namespace| namespace.device_id == device_id)
                .map(|namespace| renewed(namespace))
                .collect();
            if !stale.is_empty() {
                let mut changed = Subsystem::clone(place);
                for namespace in stale {
                    set(&mut changed, namespace.nsid, Some(Arc::new(namespace)));
                }
                *place = Arc::new(changed);
            }
        }
    }

    /// The open device of that name, or the one that the short form describes.
    fn bdev_for(&mut self, text: &str) -> Result<Bdev, NamespaceError> {
        if let Some(bdev) = self.bdevs.iter().find(|bdev| bdev.name() == text) {
            return Ok(bdev.clone());
        }
        if !text.contains(':') {
            return Err(NamespaceError::NoBdev(text.to_owned()));
        }
        let mut config: BdevConfig = text.parse()?;
        // Two short forms may have the same name, as `ram:1G` twice.
        let wanted = config.name().to_owned();
        let mut number = 1;
        while self.bdevs.iter().any(|bdev| bdev.name() == config.name()) {
            number += 1;
            config.rename(&format!("{wanted}-{number}"));
        }
        self.create_bdev(config, true).cloned()
    }

    /// Closes devices that came with namespaces, when nothing is left on them.
    fn close_unused(&mut self) {
        let snapshot = &self.snapshot;
        let bases: Vec<String> = self
            .bdevs
            .iter()
            .filter_map(|bdev| bdev.config.base().map(str::to_owned))
            .collect();
        self.bdevs.retain(|bdev| {
            let mut namespaces = snapshot
                .subsystems
                .iter()
                .flatten()
                .flat_map(|s| s.active());
            !bdev.implicit
                || bases.iter().any(|base| base == bdev.name())
                || namespaces.any(|namespace| namespace.device_id == bdev.id)
        });
    }

    fn edit(
        &mut self,
        nqn: &Nqn,
        change: impl FnOnce(&mut Subsystem) -> Result<(), NamespaceError>,
    ) -> Result<(), NamespaceError> {
        let mut changed = Subsystem::clone(find(&self.snapshot, nqn)?);
        change(&mut changed)?;
        if let Some(place) = self.snapshot.subsystems.get_mut(changed.slot) {
            *place = Some(Arc::new(changed));
        }
        Ok(())
    }
}

pub(crate) fn find<'a>(
    snapshot: &'a Snapshot,
    nqn: &Nqn,
) -> Result<&'a Arc<Subsystem>, NamespaceError> {
    snapshot
        .find(nqn)
        .ok_or_else(|| NamespaceError::NoSubsystem(nqn.as_str().to_owned()))
}

pub(crate) fn active(subsystem: &Subsystem, nsid: Nsid) -> Result<&Arc<Namespace>, NamespaceError> {
    let gone = || NamespaceError::NoNamespace {
        subnqn: subsystem.nqn.as_str().to_owned(),
        nsid: nsid.get(),
    };
    subsystem.namespace(nsid).ok_or_else(gone)
}

fn free_nsid(subsystem: &Subsystem) -> Result<Nsid, NamespaceError> {
    let free = (1..=MAX_NSID)
        .map(Nsid::new)
        .find(|nsid| subsystem.namespace(*nsid).is_none());
    free.ok_or(NamespaceError::Range)
}

/// A namespace, or none, under an identifier that was checked.
fn set(subsystem: &mut Subsystem, nsid: Nsid, namespace: Option<Arc<Namespace>>) {
    let Some(index) = nsid.get().checked_sub(1).map(|index| index as usize) else {
        return;
    };
    if subsystem.namespaces.len() <= index {
        subsystem.namespaces.resize(index + 1, None);
    }
    if let Some(place) = subsystem.namespaces.get_mut(index) {
        *place = namespace;
    }
}

/// A serial number that a subsystem keeps over restarts: 20 hexadecimal digits of its name's hash.
fn serial_of(nqn: &Nqn) -> String {
    let hash = Sha256::digest(nqn.as_str().as_bytes());
    hash.iter()
        .take(10)
        .map(|byte| format!("{byte:02X}"))
        .collect()
}
