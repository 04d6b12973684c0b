//! What has to survive a power loss besides data: reservations with Persist Through Power Loss, write
//! protection, and the marks of Write Uncorrectable. One JSON file, replaced as a whole; checked as a whole when it is read.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use flexblk_nvme::command::reservation::ReservationType;
use flexblk_nvme::{HostId, Nqn, Nsid};
use rustix::fs::{Access, access};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::media::Ranges;
use crate::reservation::{Holder, Registrant, Reservations};
use crate::snapshot::{Namespace, Protection, Snapshot};

/// Largest file that is read: 256 subsystems' worth of full registrant lists is far below.
const MAX_FILE_BYTES: u64 = 256 << 20;
const VERSION: u32 = 1;

/// The file's content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    version: u32,
    namespaces: Vec<Saved>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    uncorrectable: Vec<SavedMarks>,
}

/// The marks of a device, whatever its name is today.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedMarks {
    uuid: Uuid,
    /// First block and number of blocks.
    ranges: Vec<(u64, u64)>,
}

/// A namespace's part. It belongs to the namespace of that name on that device only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    subnqn: String,
    nsid: u32,
    uuid: Uuid,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reservations: Option<SavedReservations>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    write_protect: Option<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedReservations {
    generation: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    holder: Option<SavedHolder>,
    registrants: Vec<SavedRegistrant>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedHolder {
    hostid: Uuid,
    rtype: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedRegistrant {
    hostid: Uuid,
    key: u64,
}

/// Why a state file is not taken.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It could not be read or written.
    #[error("{}: ptpl file: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It could not be replaced when something is to be kept.
    #[error("{}: ptpl file: its directory cannot be written to: {source} (name another place in `ptpl_file`)", path.display())]
    Place {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not what we write.
    #[error("{}: ptpl file: {what} (move it away to start without reservations, write protection and uncorrectable blocks)", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

impl State {
    /// Reads the file; one that does not exist is an empty state.
    pub fn load(path: &Path) -> Result<Self, StateError> {
        let failed = |source| StateError::Io {
            path: path.to_owned(),
            source,
        };
        let damaged = |what: String| StateError::Damaged {
            path: path.to_owned(),
            what,
        };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(failed(error)),
        };
        let mut text = String::new();
        file.take(MAX_FILE_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(failed)?;
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(damaged(format!("longer than {MAX_FILE_BYTES} bytes")));
        }
        let state: Self =
            serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
        if state.version != VERSION {
            return Err(damaged(format!(
                "version {} instead of {VERSION}",
                state.version
            )));
        }
        for saved in &state.namespaces {
            if saved
                .write_protect
                .is_some_and(|raw| Protection::from_raw(raw).is_none())
            {
                let place = format!("write_protect of {} namespace {}", saved.subnqn, saved.nsid);
                return Err(damaged(place + " cannot be"));
            }
            if saved
                .reservations
                .as_ref()
                .is_some_and(|saved| saved.restore().is_none())
            {
                let place = format!("reservations of {} namespace {}", saved.subnqn, saved.nsid);
                return Err(damaged(place + " cannot be"));
            }
        }
        for saved in &state.uncorrectable {
            if Ranges::restore(&saved.ranges).is_none() {
                let place = format!("uncorrectable blocks of device {}", saved.uuid);
                return Err(damaged(place + " cannot be"));
            }
        }
        Ok(state)
    }

    /// What of a snapshot has to survive. Parts of `before` whose namespaces are not there (their
    /// device may be missing today) are kept.
    #[must_use]
    pub fn of(snapshot: &Snapshot, before: &Self) -> Self {
        let mut namespaces = Vec::new();
        for subsystem in snapshot.subsystems.iter().flatten() {
            for namespace in subsystem.active() {
                namespaces.extend(Saved::of(&subsystem.nqn, namespace));
            }
        }
        let present = |saved: &&Saved| {
            let subsystems = &mut snapshot.subsystems.iter().flatten();
            subsystems
                .find(|subsystem| subsystem.nqn.as_str() == saved.subnqn)
                .is_some_and(|subsystem| subsystem.namespace(Nsid::new(saved.nsid)).is_some())
        };
        let absent = before.namespaces.iter().filter(|saved| !present(saved));
        namespaces.extend(absent.cloned());
        Self {
            version: VERSION,
            namespaces,
            uncorrectable: before.uncorrectable.clone(),
        }
    }

    /// The marks of Write Uncorrectable by device, as they were saved.
    pub(crate) fn marks(&self) -> impl Iterator<Item = (Uuid, Ranges)> {
        let all = self.uncorrectable.iter();
        all.filter_map(|saved| Some((saved.uuid, Ranges::restore(&saved.ranges)?)))
    }

    /// The state with other marks of a device.
    pub(crate) fn set_marks(&mut self, uuid: Uuid, ranges: &Ranges) {
        self.version = VERSION;
        self.uncorrectable.retain(|saved| saved.uuid != uuid);
        let ranges = ranges.list();
        if !ranges.is_empty() {
            self.uncorrectable.push(SavedMarks { uuid, ranges });
        }
    }

    /// Ranges that are marked, of all devices.
    pub(crate) fn mark_count(&self) -> usize {
        self.uncorrectable
            .iter()
            .map(|saved| saved.ranges.len())
            .sum()
    }

    /// Fails if [`save`](Self::save) could not: better than when a host wants something to be kept.
    pub fn check_place(path: &Path) -> Result<(), StateError> {
        access(directory_of(path), Access::WRITE_OK | Access::EXEC_OK).map_err(|errno| {
            StateError::Place {
                path: path.to_owned(),
                source: errno.into(),
            }
        })
    }

    /// Replaces the file: readers and a power loss find the old one or the new one, whole.
    pub fn save(&self, path: &Path) -> Result<(), StateError> {
        let replace = || {
            let mut name = path.as_os_str().to_owned();
            name.push(".new");
            let temporary = PathBuf::from(name);
            let mut file = File::create(&temporary)?;
            let text = serde_json::to_string_pretty(self)?;
            file.write_all(text.as_bytes())?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            std::fs::rename(&temporary, path)?;
            File::open(directory_of(path))?.sync_all()
        };
        replace().map_err(|source| StateError::Io {
            path: path.to_owned(),
            source,
        })
    }

    /// Whether anything was ever saved, be it that there is nothing.
    #[must_use]
    pub fn was_saved(&self) -> bool {
        self.version == VERSION
    }

    /// The reservations of a namespace as they were saved.
    #[must_use]
    pub fn reservations(&self, subnqn: &Nqn, nsid: Nsid, uuid: Uuid) -> Option<Reservations> {
        self.find(subnqn, nsid, uuid)?
            .reservations
            .as_ref()?
            .restore()
    }

    /// The write protection of a namespace as it was saved.
    #[must_use]
    pub fn protection(&self, subnqn: &Nqn, nsid: Nsid, uuid: Uuid) -> Protection {
        let saved = self
            .find(subnqn, nsid, uuid)
            .and_then(|saved| saved.write_protect);
        saved.and_then(Protection::from_raw).unwrap_or_default()
    }

    fn find(&self, subnqn: &Nqn, nsid: Nsid, uuid: Uuid) -> Option<&Saved> {
        self.namespaces.iter().find(|saved| {
            saved.subnqn == subnqn.as_str() && saved.nsid == nsid.get() && saved.uuid == uuid
        })
    }
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

impl Saved {
    /// `None` when there is nothing to be kept.
    fn of(subnqn: &Nqn, namespace: &Namespace) -> Option<Self> {
        let reservations = &namespace.reservations;
        let registered = reservations.persist && !reservations.registrants().is_empty();
        let write_protect = match namespace.protection {
            Protection::Protect | Protection::Permanent => Some(namespace.protection.raw()),
            // Goes with the next start.
            Protection::None | Protection::UntilPowerCycle => None,
        };
        (registered || write_protect.is_some()).then(|| Self {
            subnqn: subnqn.as_str().to_owned(),
            nsid: namespace.nsid.get(),
            uuid: namespace.uuid,
            reservations: registered.then(|| SavedReservations::of(reservations)),
            write_protect,
        })
    }
}

impl SavedReservations {
    fn of(reservations: &Reservations) -> Self {
        let registrants = reservations.registrants().iter();
        Self {
            generation: reservations.generation,
            holder: reservations.holder().map(|holder| SavedHolder {
                hostid: holder.host.0,
                rtype: holder.rtype.raw(),
            }),
            registrants: registrants
                .map(|registrant| SavedRegistrant {
                    hostid: registrant.host.0,
                    key: registrant.key,
                })
                .collect(),
        }
    }

    fn restore(&self) -> Option<Reservations> {
        let holder = match &self.holder {
            Some(saved) => Some(Holder {
                host: HostId(saved.hostid),
                rtype: ReservationType::from_raw(saved.rtype)?,
            }),
            None => None,
        };
        let registrants = self.registrants.iter().map(|saved| Registrant {
            host: HostId(saved.hostid),
            key: saved.key,
        });
        Reservations::restore(self.generation, registrants.collect(), holder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> State {
        let saved = SavedReservations {
            generation: 7,
            holder: Some(SavedHolder {
                hostid: Uuid::from_u128(2),
                rtype: 3,
            }),
            registrants: vec![
                SavedRegistrant {
                    hostid: Uuid::from_u128(2),
                    key: 20,
                },
                SavedRegistrant {
                    hostid: Uuid::from_u128(1),
                    key: u64::MAX,
                },
            ],
        };
        State {
            version: VERSION,
            namespaces: vec![Saved {
                subnqn: "nqn.a".into(),
                nsid: 3,
                uuid: Uuid::from_u128(9),
                reservations: Some(saved),
                write_protect: Some(3),
            }],
            uncorrectable: vec![SavedMarks {
                uuid: Uuid::from_u128(10),
                ranges: vec![(0, 8), (1 << 40, 1)],
            }],
        }
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        assert_eq!(State::load(&path).unwrap(), State::default());
        let state = example();
        state.save(&path).unwrap();
        state.save(&path).unwrap();
        let again = State::load(&path).unwrap();
        assert_eq!(again, state);
        assert_eq!(
            std::fs::read_dir(directory.path()).unwrap().count(),
            1,
            "no temporary file is left"
        );
        let nqn = Nqn::opaque("nqn.a").unwrap();
        let found = again
            .reservations(&nqn, Nsid::new(3), Uuid::from_u128(9))
            .unwrap();
        assert!(found.persist && found.generation == 7 && found.registrants().len() == 2);
        assert!(
            again
                .reservations(&nqn, Nsid::new(3), Uuid::from_u128(8))
                .is_none(),
            "another device"
        );
        assert!(
            again
                .reservations(&nqn, Nsid::new(1), Uuid::from_u128(9))
                .is_none()
        );
        let marks: Vec<_> = again.marks().collect();
        assert_eq!(marks[0].0, Uuid::from_u128(10));
        assert_eq!(again.mark_count(), 2);
        let mut without = again.clone();
        without.set_marks(marks[0].0, &Ranges::default());
        assert_eq!(without.mark_count(), 0);
        without.set_marks(marks[0].0, &marks[0].1);
        assert_eq!(without, again);
    }

    #[test]
    fn a_place_that_takes_no_file_is_refused_before_it_is_needed() {
        let directory = tempfile::tempdir().unwrap();
        State::check_place(&directory.path().join("state.json")).unwrap();
        State::check_place(Path::new("state.json")).unwrap();
        let missing = directory.path().join("nowhere/state.json");
        let error = State::check_place(&missing).unwrap_err().to_string();
        assert!(
            error.starts_with(&missing.display().to_string()) && error.contains("`ptpl_file`"),
            "{error}"
        );
    }

    /// A state that cannot be is refused, naming the file: starting without it would give a
    /// reservation away.
    #[test]
    fn damage_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        example().save(&path).unwrap();
        let good = std::fs::read_to_string(&path).unwrap();
        for (from, to) in [
            ("\"version\": 1", "\"version\": 2"),
            ("\"rtype\": 3", "\"rtype\": 9"),
            ("\"write_protect\": 3", "\"write_protect\": 4"),
            ("\"key\": 20", "\"key\": 0"),
            ("000000000002\"", "000000000003\""),
            ("\"nsid\": 3,", "\"nsid\": 3, \"what\": 1,"),
            ("1099511627776", "7"),
            ("]", ""),
        ] {
            let bad = good.replacen(from, to, 1);
            assert_ne!(bad, good);
            std::fs::write(&path, bad).unwrap();
            let error = State::load(&path).unwrap_err().to_string();
            assert!(error.contains("state.json"), "{error}");
        }
    }
}
