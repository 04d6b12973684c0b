//! Who this host is towards a target: host NQN and host identifier.

use std::path::{Path, PathBuf};

use flexblk_nvme::{HostId, Nqn};
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// The host's identity (NVMe Base 2.0c §4.5.1 "NVMe Qualified Names", Fabrics Connect HOSTID and HOSTNQN).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Host NVMe Qualified Name.
    pub hostnqn: Nqn,
    /// Host identifier.
    pub hostid: HostId,
}

/// Why the identity files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A file is there and does not hold what it should.
    #[error("{path}: {reason}; correct the file or pass --hostnqn and --hostid")]
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// No machine id to derive a stable identity from.
    #[error("no /etc/nvme/hostnqn and no /etc/machine-id to derive one from: pass --hostnqn")]
    NoMachineId,
}

impl Host {
    /// The identity of this machine: `/etc/nvme/hostnqn` and `/etc/nvme/hostid` where they exist (as
    /// nvme-cli), else one derived from the machine id, the same after every reboot.
    pub fn load() -> Result<Host, HostError> {
        Host::load_from(
            Path::new("/etc/nvme"),
            &[
                Path::new("/etc/machine-id"),
                Path::new("/proc/sys/kernel/random/boot_id"),
            ],
        )
    }

    /// As [`load`](Self::load), with the directory of the two files and the files that may hold a machine id.
    pub fn load_from(nvme_dir: &Path, machine_ids: &[&Path]) -> Result<Host, HostError> {
        let nqn_path = nvme_dir.join("hostnqn");
        let id_path = nvme_dir.join("hostid");
        let nqn = read_line(&nqn_path)?
            .map(|text| parse_nqn(&nqn_path, &text))
            .transpose()?;
        let id = read_line(&id_path)?
            .map(|text| {
                Uuid::parse_str(&text).map_err(|e| HostError::File {
                    path: id_path.clone(),
                    reason: format!("not a UUID: {e}"),
                })
            })
            .transpose()?;
        // As nvme-cli: a host NQN of the UUID form names the host id, and the other way round.
        let id = id.or_else(|| nqn.as_ref().and_then(|n| uuid_of_nqn(n.as_str())));
        let id = match id {
            Some(id) => id,
            None => derived_uuid(machine_ids)?,
        };
        let hostnqn = match nqn {
            Some(nqn) => nqn,
            None => nqn_of_uuid(id)?,
        };
        Ok(Host {
            hostnqn,
            hostid: HostId(id),
        })
    }
}

impl Host {
    /// This identity with a host NQN or host identifier given by the user. A host NQN of the UUID form
    /// without a host identifier brings its UUID along, as nvme-cli does.
    pub fn overridden(&self, hostnqn: Option<&Nqn>, hostid: Option<HostId>) -> Host {
        let mut host = self.clone();
        if let Some(nqn) = hostnqn {
            host.hostnqn = nqn.clone();
            if let Some(id) = uuid_of_nqn(nqn.as_str()) {
                host.hostid = HostId(id);
            }
        }
        if let Some(id) = hostid {
            host.hostid = id;
        }
        host
    }
}

/// NVMe Base 2.0c §4.7 "NVMe Qualified Names", the UUID form.
const UUID_NQN_PREFIX: &str = "nqn.2014-08.org.nvmexpress:uuid:";

fn uuid_of_nqn(nqn: &str) -> Option<Uuid> {
    nqn.strip_prefix(UUID_NQN_PREFIX)
        .and_then(|text| Uuid::parse_str(text).ok())
}

fn nqn_of_uuid(id: Uuid) -> Result<Nqn, HostError> {
    let text = format!("{UUID_NQN_PREFIX}{id}");
    parse_nqn(Path::new("derived host NQN"), &text)
}

fn parse_nqn(path: &Path, text: &str) -> Result<Nqn, HostError> {
    text.parse().map_err(|e| HostError::File {
        path: path.to_owned(),
        reason: format!("{e}"),
    })
}

/// The first line without white space; `None` when the file is not there or empty.
fn read_line(path: &Path) -> Result<Option<String>, HostError> {
    match std::fs::read_to_string(path) {
        Ok(text) => {
            let line = text.lines().next().unwrap_or_default().trim();
            Ok((!line.is_empty()).then(|| line.to_owned()))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(HostError::File {
            path: path.to_owned(),
            reason: e.to_string(),
        }),
    }
}

/// machine-id(5): the id itself must not be sent over a network, a keyed hash of it may.
fn derived_uuid(machine_ids: &[&Path]) -> Result<Uuid, HostError> {
    for path in machine_ids {
        if let Some(id) = read_line(path)? {
            let hash = Sha256::new()
                .chain_update(b"flexblk host identifier\0")
                .chain_update(id.as_bytes())
                .finalize();
            let mut bytes = [0u8; 16];
            bytes
                .iter_mut()
                .zip(hash.iter())
                .for_each(|(to, from)| *to = *from);
            return Ok(uuid::Builder::from_custom_bytes(bytes).into_uuid());
        }
    }
    Err(HostError::NoMachineId)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn the_files_of_nvme_cli_are_used() {
        let d = dir(&[
            ("hostnqn", "nqn.2026-11.io.example:host1\n"),
            ("hostid", "0f2ef15e-66a4-4a1c-9b58-6b7bb6bcdd4c\n"),
        ]);
        let host = Host::load_from(d.path(), &[]).unwrap();
        assert_eq!(host.hostnqn.as_str(), "nqn.2026-11.io.example:host1");
        assert_eq!(
            host.hostid.0.to_string(),
            "0f2ef15e-66a4-4a1c-9b58-6b7bb6bcdd4c"
        );
    }

    #[test]
    fn a_uuid_nqn_brings_its_host_id() {
        let d = dir(&[(
            "hostnqn",
            "nqn.2014-08.org.nvmexpress:uuid:0f2ef15e-66a4-4a1c-9b58-6b7bb6bcdd4c",
        )]);
        let host = Host::load_from(d.path(), &[]).unwrap();
        assert_eq!(
            host.hostid.0.to_string(),
            "0f2ef15e-66a4-4a1c-9b58-6b7bb6bcdd4c"
        );
    }

    #[test]
    fn without_files_the_identity_is_stable_and_differs_between_machines() {
        let d = dir(&[("a", "one\n"), ("b", "two\n")]);
        let load = |name: &str| {
            Host::load_from(d.path(), &[&d.path().join("absent"), &d.path().join(name)]).unwrap()
        };
        assert_eq!(load("a"), load("a"));
        assert_ne!(load("a"), load("b"));
        assert!(!load("a").hostnqn.as_str().contains("one"));
        assert!(matches!(
            Host::load_from(d.path(), &[]),
            Err(HostError::NoMachineId)
        ));
    }

    #[test]
    fn a_wrong_file_is_named() {
        let d = dir(&[("hostid", "rubbish")]);
        let error = Host::load_from(d.path(), &[]).unwrap_err().to_string();
        assert!(
            error.contains("hostid") && error.contains("UUID"),
            "{error}"
        );
    }
}
