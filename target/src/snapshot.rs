//! What is exported, as an immutable value: threads swap to a new one between two I/Os, so that a
//! change never pauses I/O.

use std::fmt;
use std::sync::Arc;

use flexblk_blockdev::{BlockDevice, Caps, Info};
use flexblk_nvme::{Nqn, Nsid};
use uuid::Uuid;

use crate::config::AllowedHosts;
use crate::counters::IoCounters;
use crate::media::Media;

/// Everything that is exported at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Counts snapshots, from 0.
    pub epoch: u64,
    /// Counts changes of the discovery log: its Generation Counter (Base 5.1.12.3.1).
    pub generation: u64,
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
    /// Namespaces, by NSID - 1; the vector ends with the highest one ever used.
    pub namespaces: Vec<Option<Arc<Namespace>>>,
    /// I/O counters, by thread.
    pub counters: Arc<[IoCounters]>,
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
    /// Its UUID.
    pub uuid: Uuid,
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Namespace")
            .field("nsid", &self.nsid)
            .field("device_id", &self.device_id)
            .field("info", &self.info)
            .field("uuid", &self.uuid)
            .finish_non_exhaustive()
    }
}

impl Snapshot {
    /// The subsystem in that slot.
    #[must_use]
    pub fn subsystem(&self, slot: usize) -> Option<&Arc<Subsystem>> {
        self.subsystems.get(slot)?.as_ref()
    }

    /// The subsystem of that name.
    #[must_use]
    pub fn find(&self, nqn: &Nqn) -> Option<&Arc<Subsystem>> {
        self.subsystems
            .iter()
            .flatten()
            .find(|subsystem| subsystem.nqn == *nqn)
    }
}

impl Subsystem {
    /// The namespace of that identifier, if it is active.
    #[must_use]
    pub fn namespace(&self, nsid: Nsid) -> Option<&Arc<Namespace>> {
        let index = usize::try_from(nsid.get().checked_sub(1)?).ok()?;
        self.namespaces.get(index)?.as_ref()
    }

    /// The active namespaces, in ascending order.
    pub fn active(&self) -> impl Iterator<Item = &Arc<Namespace>> {
        self.namespaces.iter().flatten()
    }

    /// Does any namespace have a volatile write cache?
    #[must_use]
    pub fn has_write_cache(&self) -> bool {
        self.active()
            .any(|namespace| namespace.info.volatile_write_cache)
    }
}

impl Namespace {
    /// Can nothing be changed?
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.info.caps.contains(Caps::READ_ONLY)
    }

    /// log2 of the block size.
    #[must_use]
    pub fn block_shift(&self) -> u8 {
        // Block sizes are 512 or 4096; the device's own check.
        self.info.block_size.trailing_zeros() as u8
    }
}
