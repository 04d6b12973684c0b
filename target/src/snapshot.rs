//! What is exported, as an immutable value: threads swap to a new one between two I/Os, so that a
//! change never pauses I/O.

use std::fmt;
use std::sync::Arc;

use flexblk_blockdev::{BlockDevice, Caps, Info};
use flexblk_nvme::features::WriteProtect;
use flexblk_nvme::log::ana::AnaState;
use flexblk_nvme::{Nqn, Nsid, Status, StatusCode};
use uuid::Uuid;

use crate::association::Association;
use crate::config::{AllowedHosts, Discovery, ListenAddress};
use crate::counters::IoCounters;
use crate::histogram::LatencyHistogram;
use crate::iostat::IoStats;
use crate::media::Media;
use crate::port::Port;
use crate::ptpl::State;
use crate::reservation::Reservations;

/// Everything that is exported at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Counts snapshots, from 0.
    pub epoch: u64,
    /// Counts changes of the discovery log: its Generation Counter (Base 5.1.12.3.1).
    pub generation: u64,
    /// The discovery service's name and referrals.
    pub discovery: Arc<Discovery>,
    /// Where hosts reach us.
    pub ports: Vec<Arc<Port>>,
    /// Subsystems by slot; a removed one leaves its slot empty.
    pub subsystems: Vec<Option<Arc<Subsystem>>>,
}

/// An NVM subsystem.
#[derive(Clone, Debug)]
pub struct Subsystem {
    /// Its place in [`Snapshot::subsystems`].
    pub slot: usize,
    /// Its name.
    pub nqn: Nqn,
    /// Serial number, at most 20 characters.
    pub serial: Arc<str>,
    /// Model number, at most 40 characters.
    pub model: Arc<str>,
    /// Who may connect.
    pub hosts: AllowedHosts,
    /// Ports at which it is reached, by identifier; `None` is at every fixed one.
    pub listeners: Option<Vec<u16>>,
    /// Namespaces, by NSID - 1; the vector ends with the highest one ever used.
    pub namespaces: Vec<Option<Arc<Namespace>>>,
    /// ANA groups, ascending; one that is not listed is optimized.
    pub ana_groups: Vec<AnaGroup>,
    /// Counts changes of the ANA log page.
    pub ana_changes: u64,
    /// I/O counters, by thread.
    pub counters: Arc<[IoCounters]>,
}

/// A group of namespaces whose ANA state changes together (Base 8.1.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnaGroup {
    /// Its identifier, from 1 on.
    pub id: u32,
    /// Its state through every port that has none of its own.
    pub state: AnaState,
    /// States of single ports, by port identifier.
    pub ports: Vec<(u16, AnaState)>,
    /// Value of [`Subsystem::ana_changes`] at its last change.
    pub changes: u64,
}

/// Write protection (Base 8.1.15).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protection {
    /// No Write Protect.
    #[default]
    None,
    /// Write Protect, until it is taken back.
    Protect,
    /// Write Protect Until Power Cycle: until the target is started again.
    UntilPowerCycle,
    /// Permanent Write Protect.
    Permanent,
}

impl Protection {
    /// The state with that value of the feature.
    #[must_use]
    pub const fn from_raw(raw: u8) -> Option<Self> {
        Some(match raw {
            WriteProtect::NONE => Self::None,
            WriteProtect::PROTECT => Self::Protect,
            WriteProtect::UNTIL_POWER_CYCLE => Self::UntilPowerCycle,
            WriteProtect::PERMANENT => Self::Permanent,
            _ => return None,
        })
    }

    /// Its value.
    #[must_use]
    pub const fn raw(self) -> u8 {
        match self {
            Self::None => WriteProtect::NONE,
            Self::Protect => WriteProtect::PROTECT,
            Self::UntilPowerCycle => WriteProtect::UNTIL_POWER_CYCLE,
            Self::Permanent => WriteProtect::PERMANENT,
        }
    }

    /// Goes over to `next`. From the last two states there is no way (Feature Not Changeable), and a
    /// state for ever needs a place to be saved.
    pub fn to(self, next: Self, can_persist: bool) -> Result<Self, Status> {
        match (self, next) {
            (Self::UntilPowerCycle | Self::Permanent, _) => {
                Err(StatusCode::FeatureNotChangeable.dnr())
            }
            (_, Self::Permanent) if !can_persist => Err(StatusCode::InvalidField.dnr()),
            _ => Ok(next),
        }
    }
}

/// A namespace.
#[derive(Clone)]
pub struct Namespace {
    /// Its identifier.
    pub nsid: Nsid,
    /// Tells devices apart; two namespaces on one device have the same.
    pub device_id: u64,
    /// The device behind it.
    pub device: Arc<dyn BlockDevice>,
    /// What the device was like when the snapshot was made.
    pub info: Info,
    /// Blocks of the device that must not be read.
    pub media: Arc<Media>,
    /// What is done with the device.
    pub stats: Arc<IoStats>,
    /// The device's latencies, when they are counted.
    pub histogram: Option<Arc<LatencyHistogram>>,
    /// Its UUID.
    pub uuid: Uuid,
    /// Hosts that see it.
    pub hosts: AllowedHosts,
    /// Its ANA group.
    pub anagrpid: u32,
    /// Who has reserved it.
    pub reservations: Arc<Reservations>,
    /// Is it protected?
    pub protection: Protection,
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Namespace")
            .field("nsid", &self.nsid)
            .field("device_id", &self.device_id)
            .field("info", &self.info)
            .field("uuid", &self.uuid)
            .field("hosts", &self.hosts)
            .field("anagrpid", &self.anagrpid)
            .field("reservations", &self.reservations)
            .field("protection", &self.protection)
            .finish_non_exhaustive()
    }
}

impl Snapshot {
    /// The subsystem in that slot.
    #[must_use]
    pub fn subsystem(&self, slot: usize) -> Option<&Arc<Subsystem>> {
        self.subsystems.get(slot)?.as_ref()
    }

    /// The slot of a controller's subsystem; `None` when it is gone, even if its place is taken.
    pub(crate) fn slot_of(&self, association: &Association) -> Option<usize> {
        let slot = association.subsystem?;
        let subsystem = self.subsystem(slot)?;
        (subsystem.nqn == association.subnqn).then_some(slot)
    }

    /// Is that a name of the discovery service?
    #[must_use]
    pub fn is_discovery(&self, nqn: &Nqn) -> bool {
        nqn.is_discovery() || self.discovery.nqn.as_ref() == Some(nqn)
    }

    /// The name that the discovery service tells hosts.
    #[must_use]
    pub fn discovery_nqn(&self) -> Nqn {
        self.discovery.nqn.clone().unwrap_or_else(Nqn::discovery)
    }

    /// The port of that identifier.
    #[must_use]
    pub fn port(&self, id: u16) -> Option<&Arc<Port>> {
        self.ports.iter().find(|port| port.id == id)
    }

    /// The port at that address.
    #[must_use]
    pub fn port_at(&self, listen: &ListenAddress) -> Option<&Arc<Port>> {
        self.ports.iter().find(|port| port.listen == *listen)
    }

    /// Is a subsystem reached through that port?
    #[must_use]
    pub fn is_reached(&self, subsystem: &Subsystem, port: u16) -> bool {
        self.port(port)
            .is_some_and(|port| subsystem.is_reached_at(port))
    }

    /// The subsystem of that name.
    #[must_use]
    pub fn find(&self, nqn: &Nqn) -> Option<&Arc<Subsystem>> {
        self.subsystems
            .iter()
            .flatten()
            .find(|subsystem| subsystem.nqn == *nqn)
    }

    /// Takes over what hosts have changed between `base`, which this was made out of, and `current`.
    pub(crate) fn follow_hosts(&mut self, base: &Self, current: &Self) {
        if current.epoch == base.epoch {
            return;
        }
        for subsystem in current.subsystems.iter().flatten() {
            let slot = subsystem.slot;
            let same = |other: &&Arc<Subsystem>| other.nqn == subsystem.nqn;
            for namespace in subsystem.active() {
                let in_slot = |all: &Self| {
                    let found = all.subsystem(slot).filter(same)?;
                    found.namespace(namespace.nsid).cloned()
                };
                let unchanged = in_slot(base).is_some_and(|was| Arc::ptr_eq(&was, namespace));
                if let Some(ours) = in_slot(self)
                    && !unchanged
                    && ours.device_id == namespace.device_id
                {
                    let next = Namespace {
                        reservations: Arc::clone(&namespace.reservations),
                        protection: namespace.protection,
                        ..Namespace::clone(&ours)
                    };
                    self.set_namespace(slot, next);
                }
            }
        }
    }

    /// Lets namespaces that `base` does not have, or on another device, begin with what is kept for them now: hosts may
    /// have changed it since they were made.
    pub(crate) fn follow_kept(&mut self, base: &Self, kept: &State) {
        let mut changed = Vec::new();
        for subsystem in self.subsystems.iter().flatten() {
            let before = base.find(&subsystem.nqn);
            for namespace in subsystem.active() {
                let was = before.and_then(|before| before.namespace(namespace.nsid));
                if was.is_some_and(|was| was.device_id == namespace.device_id) {
                    continue;
                }
                let (nqn, nsid, uuid) = (&subsystem.nqn, namespace.nsid, namespace.uuid);
                let next = Namespace {
                    reservations: Arc::new(kept.reservations(nqn, nsid, uuid).unwrap_or_default()),
                    protection: kept.protection(nqn, nsid, uuid),
                    ..Namespace::clone(namespace)
                };
                changed.push((subsystem.slot, next));
            }
        }
        for (slot, namespace) in changed {
            self.set_namespace(slot, namespace);
        }
    }

    /// Puts another value in the place of a namespace that is there.
    pub(crate) fn set_namespace(&mut self, slot: usize, namespace: Namespace) {
        let Some(Some(place)) = self.subsystems.get_mut(slot) else {
            return;
        };
        let mut changed = Subsystem::clone(place);
        let index = namespace
            .nsid
            .get()
            .checked_sub(1)
            .map(|index| index as usize);
        if let Some(entry) = index.and_then(|index| changed.namespaces.get_mut(index)) {
            *entry = Some(Arc::new(namespace));
        }
        *place = Arc::new(changed);
    }
}

impl Subsystem {
    /// The namespace of that identifier, if it is active.
    #[must_use]
    pub fn namespace(&self, nsid: Nsid) -> Option<&Arc<Namespace>> {
        let index = usize::try_from(nsid.get().checked_sub(1)?).ok()?;
        self.namespaces.get(index)?.as_ref()
    }

    /// Is it reached there?
    #[must_use]
    pub fn is_reached_at(&self, port: &Port) -> bool {
        match &self.listeners {
            None => port.fixed,
            Some(own) => own.contains(&port.id),
        }
    }

    /// The active namespaces, in ascending order.
    pub fn active(&self) -> impl Iterator<Item = &Arc<Namespace>> {
        self.namespaces.iter().flatten()
    }

    /// The namespace of that identifier, if it is active and the host sees it.
    #[must_use]
    pub fn visible(&self, nsid: Nsid, host: &Nqn) -> Option<&Arc<Namespace>> {
        self.namespace(nsid)
            .filter(|namespace| namespace.hosts.allows(host))
    }

    /// The active namespaces that the host sees, in ascending order.
    pub fn visible_to<'a>(&'a self, host: &'a Nqn) -> impl Iterator<Item = &'a Arc<Namespace>> {
        self.active()
            .filter(|namespace| namespace.hosts.allows(host))
    }

    /// The state of an ANA group through a port.
    #[must_use]
    pub fn ana_state(&self, group: u32, port: u16) -> AnaState {
        self.ana_group(group)
            .map_or(AnaState::Optimized, |group| group.state_of(port))
    }

    /// Is the access of a host through a port to a namespace that it sees here and in `before` another
    /// one? That is what the ANA change event tells; namespaces that come and go have an event of their
    /// own.
    #[must_use]
    pub fn ana_differs(&self, before: &Self, host: &Nqn, port: u16) -> bool {
        if self.ana_changes == before.ana_changes {
            return false;
        }
        let access = |subsystem: &Self, namespace: &Namespace| {
            let group = namespace.anagrpid;
            (group, subsystem.ana_state(group, port))
        };
        self.visible_to(host).any(|namespace| {
            let other = before.visible(namespace.nsid, host);
            other.is_some_and(|other| access(before, other) != access(self, namespace))
        })
    }

    /// An ANA group, if anything was ever said about it.
    #[must_use]
    pub fn ana_group(&self, id: u32) -> Option<&AnaGroup> {
        let at = self.ana_groups.binary_search_by_key(&id, |group| group.id);
        self.ana_groups.get(at.ok()?)
    }

    /// An ANA group, to be changed.
    pub(crate) fn ana_group_mut(&mut self, id: u32) -> &mut AnaGroup {
        let groups = &mut self.ana_groups;
        let at = groups
            .binary_search_by_key(&id, |group| group.id)
            .unwrap_or_else(|at| {
                groups.insert(at, AnaGroup::new(id, AnaState::Optimized));
                at
            });
        &mut groups[at]
    }

    /// Does any namespace have a volatile write cache?
    #[must_use]
    pub fn has_write_cache(&self) -> bool {
        self.active()
            .any(|namespace| namespace.info.volatile_write_cache)
    }
}

impl AnaGroup {
    /// A group in that state through every port.
    #[must_use]
    pub fn new(id: u32, state: AnaState) -> Self {
        Self {
            id,
            state,
            ports: Vec::new(),
            changes: 0,
        }
    }

    /// Its state through a port.
    #[must_use]
    pub fn state_of(&self, port: u16) -> AnaState {
        let own = self.ports.iter().find(|(other, _)| *other == port);
        own.map_or(self.state, |(_, state)| *state)
    }
}

impl Namespace {
    /// Can nothing be changed?
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.info.caps.contains(Caps::READ_ONLY) || self.protection != Protection::None
    }

    /// Would Identify say the same of `other`? (Reservations are not part of it.)
    #[must_use]
    pub fn looks_like(&self, other: &Self) -> bool {
        self.device_id == other.device_id
            && self.info == other.info
            && self.uuid == other.uuid
            && self.anagrpid == other.anagrpid
            && self.protection == other.protection
    }

    /// log2 of the block size.
    #[must_use]
    pub fn block_shift(&self) -> u8 {
        // Block sizes are 512 or 4096; the device's own check.
        self.info.block_size.trailing_zeros() as u8
    }
}
