//! The state file: what runs, in the shape of SPDK's `save_config`, replaced as a whole after each
//! change and replayed at the start.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::jsonrpc::RpcError;
use super::methods::{self, Context};
use super::params::Params;
use super::save;
use crate::target::Target;

/// Longest state file that is read.
const MAX_BYTES: u64 = 64 << 20;

/// Why a state file cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It cannot be read.
    #[error("the state file {} cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not what the target writes there.
    #[error("the state file {} is damaged ({what}); move it away to start from the configuration", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A call of it fails.
    #[error("the state file {} cannot be restored: {method}: {what}", path.display())]
    Call {
        /// The file.
        path: PathBuf,
        /// The method.
        method: String,
        /// Why.
        what: String,
    },
}

/// Writes what runs. A crash at any moment leaves the old file or the new one.
pub(super) fn save(target: &Target, path: &Path) -> io::Result<()> {
    let config = json!({ "subsystems": [
        { "subsystem": "bdev", "config": save::bdevs(target) },
        { "subsystem": "nvmf", "config": save::nvmf(target) },
    ]});
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let mut file = File::create(&new)?;
    file.write_all(format!("{config:#}\n").as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    // The rename is safe when its directory is.
    let directory = path.parent().filter(|parent| *parent != Path::new(""));
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

/// Replays a state file on a target without anything.
pub(super) fn restore(context: &Context, path: &Path) -> Result<(), StateError> {
    let read = |source| StateError::Read {
        path: path.to_owned(),
        source,
    };
    let damaged = |what: &dyn std::fmt::Display| StateError::Damaged {
        path: path.to_owned(),
        what: what.to_string(),
    };
    if fs::metadata(path).map_err(read)?.len() > MAX_BYTES {
        return Err(damaged(&"too long"));
    }
    let text = fs::read_to_string(path).map_err(read)?;
    let config: Value = serde_json::from_str(&text).map_err(|error| damaged(&error))?;
    let subsystems = config.get("subsystems").and_then(Value::as_array);
    let subsystems = subsystems.ok_or_else(|| damaged(&"no `subsystems`"))?;
    let calls = subsystems
        .iter()
        .filter_map(|subsystem| subsystem.get("config")?.as_array())
        .flatten();
    let has_kept = context.target.has_kept();
    for call in calls {
        let method = call.get("method").and_then(Value::as_str);
        let method = method.ok_or_else(|| damaged(&"a call without `method`"))?;
        if method == "flexblk_ns_set_write_protect" && has_kept {
            // The file for what has to survive has it, with what hosts have made of it since. A new one does not yet.
            continue;
        }
        let found = methods::find(method).ok_or_else(|| RpcError::method(method));
        let result = found.and_then(|found| {
            let params = Params::new(call.get("params").cloned())?;
            (found.run)(context, params)
        });
        result.map_err(|error| StateError::Call {
            path: path.to_owned(),
            method: method.to_owned(),
            what: error.message,
        })?;
    }
    Ok(())
}
