//! A running `flexblk-target`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use crate::binaries::Binaries;
use crate::ports::free_udp_port;
use crate::process::{Process, find_program};

/// The subsystem's name unless a test says otherwise.
pub const SUBNQN: &str = "nqn.2026-11.dev.flexblk:target";

/// How a target is started.
#[derive(Clone, Debug, Default)]
pub struct TargetOptions {
    /// Block devices, in the daemon's notation (`ram:64M`, `file:disk.img`), as namespaces 1, 2, ...
    pub devices: Vec<String>,
    /// `header-only` or `copy`.
    pub tx: Option<&'static str>,
    /// `in-cache` or `ring`.
    pub rx: Option<&'static str>,
    /// Faults on the packets it sends and receives.
    pub fault: Option<String>,
    /// UDP port; a free one when `None`.
    pub udp_port: Option<u16>,
    /// NVMe/TCP at this port beside FlexiNS.
    pub tcp_port: Option<u16>,
    /// Run on this core only, as a thread that is pinned there.
    pub core: Option<usize>,
    /// Host NQNs that may connect; anybody when `None`.
    pub allow_hosts: Option<Vec<String>>,
    /// Exports nothing, to be filled over its RPC socket.
    pub no_subsystem: bool,
    /// More lines for the `[target]` table.
    pub extra: String,
}

impl TargetOptions {
    /// A target with these devices.
    pub fn with_devices(devices: &[&str]) -> TargetOptions {
        TargetOptions {
            devices: devices.iter().map(|device| (*device).to_owned()).collect(),
            ..TargetOptions::default()
        }
    }

    fn toml(&self, udp_port: u16) -> String {
        let mut text = format!("[target]\n{}\n", self.extra);
        if let Some(core) = self.core {
            text += &format!("cores = \"{core}\"\n");
        }
        text += &format!("[listener]\naddress = \"127.0.0.1:4420\"\nudp_port = {udp_port}\n");
        for (key, value) in [
            ("tx", self.tx),
            ("rx", self.rx),
            ("fault", self.fault.as_deref()),
        ] {
            if let Some(value) = value {
                text += &format!("{key} = \"{value}\"\n");
            }
        }
        if let Some(port) = self.tcp_port {
            text += &format!("[tcp]\naddress = \"127.0.0.1:{port}\"\n");
        }
        if self.no_subsystem {
            return text;
        }
        text += &format!("[[subsystem]]\nnqn = \"{SUBNQN}\"\n");
        if let Some(hosts) = &self.allow_hosts {
            text += &format!("allow_hosts = {hosts:?}\n");
        }
        for device in &self.devices {
            text += &format!("[[subsystem.namespace]]\nbdev = {device:?}\n");
        }
        text
    }
}

/// A target that answers. Dropping it kills it.
pub struct Target {
    process: Process,
    udp_port: u16,
    directory: PathBuf,
    options: TargetOptions,
}

impl Target {
    /// Starts one, its configuration and output in `directory`, and waits until it serves.
    pub fn start(binaries: &Binaries, directory: &Path, options: TargetOptions) -> Result<Target> {
        let udp_port = match options.udp_port {
            Some(port) => port,
            None => free_udp_port()?,
        };
        let config = directory.join(format!("target-{udp_port}.toml"));
        fs::write(&config, options.toml(udp_port))?;
        let mut command = match options.core {
            Some(core) => {
                let mut taskset =
                    Command::new(find_program("taskset").context("util-linux is needed to pin")?);
                taskset
                    .args(["-c", &core.to_string()])
                    .arg(&binaries.target);
                taskset
            }
            None => Command::new(&binaries.target),
        };
        let socket = directory.join(format!("target-{udp_port}.sock"));
        command.arg("-c").arg(&config).arg("-r").arg(&socket);
        let process = Process::spawn(&mut command, &format!("target-{udp_port}"), directory)?;
        let mut target = Target {
            process,
            udp_port,
            directory: directory.to_owned(),
            options,
        };
        target.wait_until_ready(Duration::from_secs(20))?;
        Ok(target)
    }

    fn wait_until_ready(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !self.output().contains("listening") {
            if let Some(status) = self.process.status()? {
                bail!(
                    "flexblk-target ended with {status}:\n{}",
                    self.process.tail()
                );
            }
            if Instant::now() >= deadline {
                bail!(
                    "flexblk-target is not ready after {limit:?}:\n{}",
                    self.process.tail()
                );
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Its UDP port.
    pub fn udp_port(&self) -> u16 {
        self.udp_port
    }

    /// Its RPC socket.
    pub fn rpc_socket(&self) -> PathBuf {
        self.directory
            .join(format!("target-{}.sock", self.udp_port))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Everything it printed.
    pub fn output(&self) -> String {
        format!("{}{}", self.process.stdout(), self.process.stderr())
    }

    /// The arguments by which `flexblk` finds it.
    pub fn address(&self) -> Vec<String> {
        [
            "-a",
            "127.0.0.1",
            "-n",
            SUBNQN,
            "--udp-port",
            &self.udp_port.to_string(),
        ]
        .map(str::to_owned)
        .to_vec()
    }

    /// Its URI with a namespace.
    pub fn uri(&self, nsid: u32) -> String {
        format!("nvme+flexins://127.0.0.1/{SUBNQN}?nsid={nsid}")
    }

    /// Sends it a signal.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// kill -9.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()?;
        Ok(())
    }

    /// Asks it to end, as a service manager does, and waits.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.process.signal(Signal::TERM)?;
        self.process.wait(Duration::from_secs(10))
    }

    /// Starts it again as it was, on the same port.
    pub fn restart(&mut self, binaries: &Binaries) -> Result<()> {
        self.kill()?;
        let options = TargetOptions {
            udp_port: Some(self.udp_port),
            ..self.options.clone()
        };
        *self = Target::start(binaries, &self.directory, options)?;
        Ok(())
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.process.status(), Ok(None))
    }
}
