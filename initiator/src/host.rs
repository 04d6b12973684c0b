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
            &[Path::new("/etc/machine-id"), Path::new("/proc/sys/kernel/random/boot_id")],
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
            None => nqn_of_uuid(id),
        };
        Ok(Host { hostnqn, hostid: HostId(id) })
    }
}
