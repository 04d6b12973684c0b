//! What most tests start with: the programs, a folder of their own, and short ways to call `flexblk`.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use flexblk_rpc::RpcClient;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::binaries::Binaries;
use crate::fio::Fio;
use crate::process::{Finished, run};
use crate::target::{SUBNQN, Target, TargetOptions};

/// A test's own folder and the programs under test.
pub struct Setup {
    directory: TempDir,
    binaries: &'static Binaries,
}

impl Setup {
    /// Builds the programs if need be.
    pub fn new() -> Result<Setup> {
        Ok(Setup {
            directory: tempfile::Builder::new().prefix("flexblk-").tempdir()?,
            binaries: Binaries::get()?,
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The programs.
    pub fn binaries(&self) -> &'static Binaries {
        self.binaries
    }

    /// A target with these devices on a free port.
    pub fn target(&self, devices: &[&str]) -> Result<Target> {
        self.target_with(TargetOptions::with_devices(devices))
    }

    /// A target.
    pub fn target_with(&self, options: TargetOptions) -> Result<Target> {
        Target::start(self.binaries, self.path(), options)
    }

    /// A target with 16 MiB as namespace 1, on the device `EE_m` that errors can be injected into.
    pub fn target_with_errors(&self) -> Result<(Target, RpcClient)> {
        let target = self.target_with(TargetOptions {
            no_subsystem: true,
            ..TargetOptions::default()
        })?;
        let mut rpc = RpcClient::connect(&target.rpc_socket())?;
        for (method, params) in [
            (
                "bdev_malloc_create",
                json!({ "name": "m", "num_blocks": 4096, "block_size": 4096 }),
            ),
            ("bdev_error_create", json!({ "base_name": "m" })),
            (
                "nvmf_create_subsystem",
                json!({ "nqn": SUBNQN, "allow_any_host": true }),
            ),
            (
                "nvmf_subsystem_add_ns",
                json!({ "nqn": SUBNQN, "namespace": { "bdev_name": "EE_m" } }),
            ),
        ] {
            rpc.call(method, params)?;
        }
        Ok((target, rpc))
    }

    /// A fio job on a namespace.
    pub fn fio(&self, target: &Target, nsid: u32, name: &str) -> Fio {
        Fio::new(self.binaries, target, nsid, name, self.path())
    }

    /// Runs `flexblk` in the folder.
    pub fn flexblk<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Finished> {
        run(
            Command::new(&self.binaries.flexblk)
                .current_dir(self.path())
                .args(arguments),
            Duration::from_secs(60),
        )
    }

    /// Runs `flexblk VERB` with a target's address.
    pub fn flexblk_at(&self, target: &Target, verb: &str, arguments: &[&str]) -> Result<Finished> {
        let mut all = vec![verb.to_owned()];
        all.extend(target.address());
        all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self.flexblk(&all)
    }

    /// A file of `len` bytes that look random and are the same each time for one `seed`.
    pub fn file(&self, name: &str, len: usize, seed: u64) -> Result<Vec<u8>> {
        let data = noise(len, seed);
        fs::write(self.path().join(name), &data)?;
        Ok(data)
    }
}

/// What a target counted, asked while it runs.
pub fn target_counter(counters: &Value, name: &str) -> u64 {
    counters.get(name).and_then(Value::as_u64).unwrap_or(0)
}

/// The counters in a target's output: the last line of JSON that has them.
pub fn counters_in(output: &str) -> Result<Value> {
    output
        .lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find_map(|json| json.get("counters").cloned())
        .with_context(|| format!("no counters in:\n{output}"))
}

/// `len` bytes that look random.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut data = Vec::with_capacity(len.next_multiple_of(8));
    let mut state = seed;
    while data.len() < len {
        data.extend_from_slice(&next(&mut state).to_le_bytes());
    }
    data.truncate(len);
    data
}

/// SplitMix64: the next number of a sequence.
pub fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
