//! SPDK as a peer: the programs of a build of it, found by `SPDK_DIR`. Nothing of it is fetched or built by us.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::process::{Finished, Process, run};

/// Names the folder that SPDK was built in.
pub const DIRECTORY_VARIABLE: &str = "SPDK_DIR";

/// Where SPDK's target has its JSON-RPC socket, in the folder it was started in.
pub const RPC_SOCKET: &str = "nvmf_tgt.sock";

/// A RAM disk of SPDK's target.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Size in MiB.
    pub mib: u32,
    /// Bytes of a logical block.
    pub block_size: u32,
}

/// A build of SPDK.
#[derive(Clone, Debug)]
pub struct Spdk {
    directory: PathBuf,
}

impl Spdk {
    /// The build in `SPDK_DIR`, or `None` after noting that `test` is skipped and why.
    pub fn or_skip(test: &str) -> Option<Spdk> {
        match Spdk::find() {
            Ok(Some(spdk)) => return Some(spdk),
            Ok(None) => crate::skip::note(test, "SPDK_DIR names no build of SPDK"),
            Err(error) => crate::skip::note(test, &format!("{error:#}")),
        }
        None
    }

    /// The build in `SPDK_DIR`; `None` when the variable is not set.
    pub fn find() -> Result<Option<Spdk>> {
        let Some(directory) = std::env::var_os(DIRECTORY_VARIABLE) else {
            return Ok(None);
        };
        let spdk = Spdk {
            directory: PathBuf::from(directory),
        };
        spdk.program("spdk_nvme_identify")?;
        Ok(Some(spdk))
    }

    /// A script of its source.
    #[must_use]
    pub fn script(&self, name: &str) -> PathBuf {
        self.directory.join("scripts").join(name)
    }

    /// A program of the build.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        let places = [
            format!("build/bin/{name}"),
            format!("build/examples/{name}"),
            format!("test/nvme/{name}/{name}"),
            format!("test/app/fuzz/{name}/{name}"),
        ];
        places
            .iter()
            .map(|place| self.directory.join(place))
            .find(|path| path.is_file())
            .with_context(|| format!("SPDK_DIR has no {name}"))
    }

    /// A call of a program that may work without huge pages.
    pub fn command(&self, name: &str) -> Result<Command> {
        let mut command = Command::new(self.program(name)?);
        // Enough for the pools of SPDK's block layer.
        command.args(["--no-huge", "-s", "1024"]);
        Ok(command)
    }

    /// Runs `name` with these arguments to its end, which has to be a good one, and returns all that it printed.
    pub fn run(
        &self,
        name: &str,
        arguments: &[&str],
        directory: &Path,
        limit: Duration,
    ) -> Result<String> {
        let mut command = self.command(name)?;
        command.args(arguments).current_dir(directory);
        finish(name, run(&mut command, limit)?)
    }

    /// Starts `name` with these arguments.
    pub fn spawn(&self, name: &str, arguments: &[&str], directory: &Path) -> Result<Process> {
        let mut command = self.command(name)?;
        command.args(arguments).current_dir(directory);
        Process::spawn(&mut command, name, directory)
    }

    /// As [`run`](Self::run), for a program that has no option to work without huge pages.
    pub fn run_with_huge_pages(
        &self,
        name: &str,
        arguments: &[&str],
        directory: &Path,
        limit: Duration,
    ) -> Result<String> {
        let mut command = Command::new(self.program(name)?);
        command.args(arguments).current_dir(directory);
        finish(name, run(&mut command, limit)?)
    }

    /// Starts SPDK's target with one RAM namespace of 64 MiB at 127.0.0.1 and `port`, on core 0.
    pub fn target(&self, subnqn: &str, port: u16, directory: &Path) -> Result<Process> {
        let disk = Disk {
            mib: 64,
            block_size: 512,
        };
        self.target_with(disk, 0, subnqn, port, directory)
    }

    /// As [`target`](Self::target), with this disk, on this core.
    pub fn target_with(
        &self,
        disk: Disk,
        core: usize,
        subnqn: &str,
        port: u16,
        directory: &Path,
    ) -> Result<Process> {
        let address = json!({
            "trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port.to_string(),
        });
        let call = |method: &str, params: Value| json!({ "method": method, "params": params });
        let num_blocks = (u64::from(disk.mib) << 20) / u64::from(disk.block_size);
        let config = json!({ "subsystems": [
            { "subsystem": "bdev", "config": [
                call("bdev_malloc_create", json!({
                    "name": "disk", "num_blocks": num_blocks, "block_size": disk.block_size,
                })),
            ]},
            { "subsystem": "nvmf", "config": [
                // 129 entries hold 128 commands; the default is one less.
                call("nvmf_create_transport", json!({ "trtype": "TCP", "max_queue_depth": 256 })),
                call("nvmf_create_subsystem", json!({ "nqn": subnqn, "allow_any_host": true, "serial_number": "SPDK" })),
                call("nvmf_subsystem_add_ns", json!({ "nqn": subnqn, "namespace": { "bdev_name": "disk", "nsid": 1 } })),
                call("nvmf_subsystem_add_listener", json!({ "nqn": subnqn, "listen_address": address })),
                call("nvmf_subsystem_add_listener", json!({
                    "nqn": "nqn.2014-08.org.nvmexpress.discovery", "listen_address": address,
                })),
            ]},
        ]});
        let path = directory.join("nvmf_tgt.json");
        fs::write(&path, config.to_string())?;
        // Enough for the pools of SPDK's block layer, and the disk.
        let mut command = Command::new(self.program("nvmf_tgt")?);
        command.args(["--no-huge", "-s", &(1024 + disk.mib).to_string()]);
        command.arg("-c").arg(&path);
        command.args(["-m", &format!("{:#x}", 1u64 << core), "-r"]);
        command.arg(directory.join(RPC_SOCKET));
        let mut process = Process::spawn(&mut command, "nvmf_tgt", directory)?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while !format!("{}{}", process.stdout(), process.stderr()).contains("Target Listening on") {
            if process.status()?.is_some() || Instant::now() >= deadline {
                bail!("nvmf_tgt does not start:\n{}", process.tail());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(process)
    }
}

fn finish(name: &str, finished: Finished) -> Result<String> {
    let finished = finished.success().context(name.to_owned())?;
    Ok(format!("{}{}", finished.stdout, finished.stderr))
}

/// Free huge pages of this machine.
pub fn free_huge_pages() -> u64 {
    fs::read_to_string("/proc/meminfo")
        .unwrap_or_default()
        .lines()
        .find_map(|line| line.strip_prefix("HugePages_Free:")?.trim().parse().ok())
        .unwrap_or(0)
}
