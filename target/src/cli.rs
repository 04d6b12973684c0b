//! Flags, and what they make of the configuration.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use flexblk_nvme::Nqn;
use flexblk_target::StartError;
use flexblk_target::config::{
    AllowedHosts, Config, ConfigError, DEFAULT_SUBNQN, Digest, Namespace, RpcSocket, Rx, Subsystem,
    Tx, parse_cores, parse_listen, parse_nqn, size,
};
use flexins::middleware::FaultConfig;

/// What the process ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum ExitKind {
    /// Failed while it was serving.
    Runtime = 1,
    /// Flags or configuration file (clap's own errors have the same number).
    Usage = 2,
    /// What it needs is not there: port, image, permission, memory.
    Start = 3,
}

/// Why the process ends, in one line.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) kind: ExitKind,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn usage<T: ToString>(message: T) -> Self {
        Self {
            kind: ExitKind::Usage,
            message: message.to_string(),
        }
    }

    pub(crate) fn start(error: &StartError) -> Self {
        let kind = match error {
            StartError::Config(_) | StartError::Namespace(_) => ExitKind::Usage,
            _ => ExitKind::Start,
        };
        Self {
            kind,
            message: error.to_string(),
        }
    }
}

const AFTER_HELP: &str = "\
Examples:
  flexblk-target --ram 1G
      one namespace in memory, for hosts on this machine
  flexblk-target --file disk.img --listen 192.0.2.1:4420 --allow-host nqn.2014-08.org.nvmexpress:uuid:...
      a disk image for one host on the network
  flexblk-target -c target.toml
      everything from a file; flags given besides it win

A host then connects with, for instance
  flexblk info nvme+flexins://127.0.0.1:4420/nqn.2026-11.dev.flexblk:target

When hosts can connect, `listening on ...` and one line `ready: URI` for each subsystem are written to
standard output. Signals: SIGTERM and SIGINT close every connection and end; SIGUSR1 writes counters.
At the end a line of JSON with all counters is written to --stats-file, or to standard output.
Messages go to standard error; FLEXBLK_LOG=debug (or a tracing filter) shows more.

Exit codes:
  0  ended by a signal, everything closed
  1  failed while serving
  2  wrong flag or configuration (the line and key are named)
  3  cannot start: port in use, image missing or unusable, no permission, memory budget too small";

/// NVMe-oF target: exports memory, files and block devices over FlexiNS (RDMA verbs on UDP).
#[derive(Debug, Parser)]
#[command(version, after_help = AFTER_HELP, max_term_width = 100)]
pub(crate) struct Args {
    /// Read the configuration from a TOML file
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Export memory: a size, and options as in 1G,block_size=4096 (repeatable)
    #[arg(long, value_name = "SIZE[,KEY=VALUE]")]
    ram: Vec<String>,
    /// Export a file or block device, with options as in disk.img,block_size=512,readonly (repeatable)
    #[arg(long, value_name = "PATH[,KEY=VALUE]")]
    file: Vec<String>,
    /// Export any block device in its short form, as in null:1T (repeatable)
    #[arg(long, value_name = "TYPE:ARGUMENT[,KEY=VALUE]")]
    bdev: Vec<String>,
    /// Address and service id to listen on [default: 127.0.0.1:4420, this machine only]
    #[arg(short, long, value_name = "TRADDR:TRSVCID", value_parser = parse_listen)]
    listen: Option<SocketAddr>,
    /// UDP port that FlexiNS rides on [default: 4791]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    udp_port: Option<u16>,
    /// Cores of the data threads, one thread each, as in 0,2-3 [default: one thread, not pinned]
    #[arg(long, value_name = "LIST")]
    cores: Option<String>,
    /// Name of the subsystem that --ram, --file and --bdev are in
    #[arg(long, value_name = "NQN", value_parser = parse_nqn, default_value = DEFAULT_SUBNQN)]
    subnqn: Nqn,
    /// Let only this host connect to that subsystem [default: any host] (repeatable)
    #[arg(long, value_name = "NQN", value_parser = |text: &str| Nqn::opaque(text))]
    allow_host: Vec<Nqn>,
    /// How payload is sent [default: header-only]
    #[arg(long)]
    tx: Option<Tx>,
    /// How packets are received [default: in-cache]
    #[arg(long)]
    rx: Option<Rx>,
    /// Checksum over every packet [default: crc32c]
    #[arg(long)]
    digest: Option<Digest>,
    /// Payload bytes that a packet may carry at most [default: 8320]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1024..=61440))]
    mtu: Option<u32>,
    /// Test aid: do this to received packets, as in loss=1%,reorder=1%,corrupt=0.1%,seed=7
    #[arg(long, value_name = "FAULTS")]
    fault: Option<FaultConfig>,
    /// Write every packet into a pcapng file (slow)
    #[arg(long, value_name = "FILE")]
    capture: Option<PathBuf>,
    /// How long a thread polls after the last activity before it sleeps [default: 100]
    #[arg(long, value_name = "MICROSECONDS", value_parser = clap::value_parser!(u64).range(..=10_000_000))]
    poll_budget_us: Option<u64>,
    /// Memory for I/O buffers and queues; namespaces in memory come on top [default: 256M]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory_budget: Option<u64>,
    /// Unix socket for JSON-RPC, or `off` [default: /var/tmp/flexblk.sock if it can be had]
    #[arg(short, long, value_name = "PATH", value_parser = |text: &str| Ok::<_, String>(RpcSocket::from(text)))]
    rpc_socket: Option<RpcSocket>,
    /// Append counters (a line of JSON) to this file instead of standard output
    #[arg(long, value_name = "FILE")]
    pub(crate) stats_file: Option<PathBuf>,
    /// Write counters every so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    stats_interval: Option<u64>,
    /// Show debug messages
    #[arg(short, long)]
    pub(crate) verbose: bool,
}

impl Args {
    /// How often to write counters.
    pub(crate) fn stats_interval(&self) -> Option<Duration> {
        self.stats_interval.map(Duration::from_secs)
    }

    /// The file's configuration with the flags on top of it.
    pub(crate) fn config(&self) -> Result<Config, Failure> {
        let mut config = match &self.config {
            Some(path) => Config::from_file(path).map_err(|error| match error {
                ConfigError::Read { .. } => Failure {
                    kind: ExitKind::Usage,
                    message: error.to_string(),
                },
                error => Failure::usage(error),
            })?,
            None => Config::default(),
        };
        let listener = &mut config.listener;
        listener.address = self.listen.unwrap_or(listener.address);
        listener.udp_port = self.udp_port.unwrap_or(listener.udp_port);
        listener.mtu = self.mtu.or(listener.mtu);
        listener.tx = self.tx.unwrap_or(listener.tx);
        listener.rx = self.rx.unwrap_or(listener.rx);
        listener.digest = self.digest.unwrap_or(listener.digest);
        listener.fault = self.fault.or(listener.fault);
        if self.capture.is_some() {
            listener.capture.clone_from(&self.capture);
        }
        if let Some(cores) = &self.cores {
            config.cores =
                parse_cores(cores).map_err(|error| Failure::usage(format!("--cores: {error}")))?;
        }
        if let Some(micros) = self.poll_budget_us {
            config.poll_budget = Duration::from_micros(micros);
        }
        config.memory_budget_bytes = self.memory_budget.unwrap_or(config.memory_budget_bytes);
        if let Some(socket) = &self.rpc_socket {
            config.management.rpc_socket = socket.clone();
        }
        self.add_devices(&mut config)?;
        // With an RPC socket of its own it may be waiting for calls that fill it.
        let is_managed = matches!(config.management.rpc_socket, RpcSocket::Path(_));
        if config.subsystems.is_empty() && !is_managed {
            let message = "nothing to export: give --ram 1G, --file disk.img or -c target.toml (see --help), or --rpc-socket to add subsystems later";
            return Err(Failure::usage(message));
        }
        Ok(config)
    }

    /// The devices of flags, in the subsystem of --subnqn.
    fn add_devices(&self, config: &mut Config) -> Result<(), Failure> {
        let ram = self.ram.iter().map(|text| ("--ram", format!("ram:{text}")));
        let file = self
            .file
            .iter()
            .map(|text| ("--file", format!("file:{text}")));
        let bdev = self.bdev.iter().map(|text| ("--bdev", text.clone()));
        let devices: Vec<(&str, String)> = ram.chain(file).chain(bdev).collect();
        if devices.is_empty() {
            if !self.allow_host.is_empty() {
                let message =
                    "--allow-host goes with --ram, --file or --bdev; in a file it is allow_hosts";
                return Err(Failure::usage(message));
            }
            return Ok(());
        }
        let known = config
            .subsystems
            .iter()
            .position(|subsystem| subsystem.nqn == self.subnqn);
        if known.is_none() {
            config.subsystems.push(Subsystem::new(self.subnqn.clone()));
        }
        let index = known.unwrap_or(config.subsystems.len() - 1);
        let Some(subsystem) = config.subsystems.get_mut(index) else {
            return Ok(());
        };
        if !self.allow_host.is_empty() {
            subsystem.hosts = AllowedHosts::Only(self.allow_host.clone());
        }
        for (flag, text) in devices {
            let checked: Result<flexblk_blockdev::BdevConfig, _> = text.parse();
            checked.map_err(|error| Failure::usage(format!("{flag}: {error}")))?;
            subsystem.namespaces.push(Namespace::new(text));
        }
        Ok(())
    }
}
