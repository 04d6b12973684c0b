//! Flags, and what they make of the configuration.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};
use flexblk_nvme::Nqn;
use flexblk_rpc::{RpcClient, RpcError};
use flexblk_target::StartError;
use flexblk_target::config::{
    AllowedHosts, Config, ConfigError, DEFAULT_SUBNQN, Digest, Discovery, Namespace, RpcSocket, Rx,
    Subsystem, TcpDigest, Tx, parse_cores, parse_listen, parse_nqn, size,
};
use flexblk_target::manage::DEFAULT_RPC_SOCKET;
use flexins::middleware::FaultConfig;
use serde_json::{Value, json};

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
  flexblk-target --ram 1G --tcp 192.0.2.1:4420
      for hosts with NVMe/TCP, such as the kernel's, besides FlexiNS

A host then connects with, for instance
  flexblk info nvme+flexins://127.0.0.1:4420/nqn.2026-11.dev.flexblk:target

A running target is changed over its RPC socket: by SPDK's rpc.py, or with
  flexblk-target apply --dry-run target.toml
  flexblk-target apply --yes target.toml

When hosts can connect, `listening on ...` and one line `ready: URI` for each subsystem are written to
standard output. Signals: SIGTERM and SIGINT close every connection and end; SIGUSR1 writes counters.
At the end a line of JSON with all counters is written to --stats-file, or to standard output.
Messages go to standard error; FLEXBLK_LOG=debug (or a tracing filter) shows more.

Exit codes:
  0  ended by a signal, everything closed
  1  failed while serving
  2  wrong flag or configuration (the line and key are named)
  3  cannot start: port in use, image missing or unusable, no permission, memory budget too small";

/// NVMe-oF target: exports memory, files and block devices over FlexiNS (RDMA verbs on UDP) and NVMe/TCP.
#[derive(Debug, Parser)]
#[command(version, after_help = AFTER_HELP, max_term_width = 100, args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    /// Read the configuration from a TOML file
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Export memory: a size, and options as in 1G,block_size=4096,hugepages=transparent (repeatable)
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
    /// Listen for NVMe/TCP too, at 127.0.0.1:4420 unless an address is given
    #[arg(long, value_name = "TRADDR:TRSVCID", value_parser = parse_listen, num_args = 0..=1, default_missing_value = "127.0.0.1:4420")]
    tcp: Option<SocketAddr>,
    /// NVMe/TCP: digest over the header of every PDU [default: allow]
    #[arg(long)]
    tcp_header_digest: Option<TcpDigest>,
    /// NVMe/TCP: digest over the data of every PDU [default: allow]
    #[arg(long)]
    tcp_data_digest: Option<TcpDigest>,
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
    /// Keep what runs in this file, and start with what it holds if it exists
    #[arg(long, value_name = "FILE")]
    state_file: Option<PathBuf>,
    /// Serve OpenMetrics over HTTP at this address, path /metrics
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,
    /// Log commands that take at least so long
    #[arg(long, value_name = "MICROSECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    slow_io_us: Option<u32>,
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

/// What else than serving.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a running target what a TOML file says, all of it or nothing
    Apply(Apply),
    /// Write the manual pages to a folder
    #[command(hide = true)]
    Manuals {
        /// The folder; it exists
        directory: PathBuf,
    },
}

/// Writes `flexblk-target.1` and a page for each subcommand.
pub(crate) fn write_manuals(directory: &Path) -> Result<(), Failure> {
    clap_mangen::generate_to(Args::command(), directory)
        .map_err(|error| Failure::runtime(format!("{}: {error}", directory.display())))
}

/// Make a running target what a TOML file says, all of it or nothing.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true))]
pub(crate) struct Apply {
    /// Only show what would change
    #[arg(long, group = "what")]
    dry_run: bool,
    /// Show it and do it
    #[arg(long, group = "what")]
    yes: bool,
    /// RPC socket of the target
    #[arg(short, long, value_name = "PATH", default_value = DEFAULT_RPC_SOCKET)]
    rpc_socket: PathBuf,
    /// The configuration
    file: PathBuf,
}

impl Apply {
    /// Does it; the differences go to standard output.
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let text = std::fs::read_to_string(&self.file)
            .map_err(|error| Failure::usage(format!("{}: {error}", self.file.display())))?;
        // Mistakes are told without a target.
        Config::from_toml(&text, &self.file).map_err(Failure::usage)?;
        let failed = |error: RpcError| Failure {
            kind: ExitKind::Runtime,
            message: error.to_string(),
        };
        let mut target = RpcClient::connect(&self.rpc_socket).map_err(failed)?;
        let mut ask = |dry_run: bool, epoch: Option<u64>| {
            let params = json!({
                "toml": text, "path": self.file.display().to_string(), "dry_run": dry_run,
                "epoch": epoch,
            });
            target.call("flexblk_apply", params).map_err(failed)
        };
        let plan = ask(true, None)?;
        let lines = |key: &str| -> Vec<String> {
            let list = plan
                .get(key)
                .and_then(Value::as_array)
                .into_iter()
                .flatten();
            list.filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let (changes, impossible) = (lines("changes"), lines("impossible"));
        for line in &impossible {
            println!("! {line}");
        }
        for line in &changes {
            println!("{line}");
        }
        if !impossible.is_empty() {
            return Err(Failure {
                kind: ExitKind::Runtime,
                message: "not everything can be changed while the target runs (lines with !): \
                          nothing was done"
                    .to_owned(),
            });
        }
        if changes.is_empty() {
            println!("nothing to change");
        } else if self.yes {
            ask(false, plan.get("epoch").and_then(Value::as_u64))?;
            println!("done");
        }
        Ok(())
    }
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
        self.tcp(&mut config)?;
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
        if self.state_file.is_some() {
            config.management.state_file.clone_from(&self.state_file);
        }
        let management = &mut config.management;
        management.metrics = self.metrics.or(management.metrics);
        if let Some(us) = self.slow_io_us {
            management.slow_io = Some(Duration::from_micros(us.into()));
        }
        self.add_devices(&mut config)?;
        if let Some(path) = config
            .management
            .state_file
            .as_deref()
            .filter(|path| path.exists())
        {
            if !(config.subsystems.is_empty() && config.bdevs.is_empty()) {
                tracing::info!(path = %path.display(), "exporting what the state file holds, not what the configuration does");
            }
            config.subsystems.clear();
            config.bdevs.clear();
            config.discovery = Discovery::default();
            return Ok(config);
        }
        // With an RPC socket of its own it may be waiting for calls that fill it.
        let is_managed = matches!(config.management.rpc_socket, RpcSocket::Path(_));
        if config.subsystems.is_empty() && !is_managed {
            let message = "nothing to export: give --ram 1G, --file disk.img or -c target.toml (see --help), or --rpc-socket to add subsystems later";
            return Err(Failure::usage(message));
        }
        Ok(config)
    }

    /// The NVMe/TCP listener.
    fn tcp(&self, config: &mut Config) -> Result<(), Failure> {
        if let Some(address) = self.tcp {
            config.tcp.get_or_insert_default().address = address;
        }
        match &mut config.tcp {
            Some(tcp) => {
                tcp.header_digest = self.tcp_header_digest.unwrap_or(tcp.header_digest);
                tcp.data_digest = self.tcp_data_digest.unwrap_or(tcp.data_digest);
            }
            None if self.tcp_header_digest.is_some() || self.tcp_data_digest.is_some() => {
                let message = "--tcp-header-digest and --tcp-data-digest go with --tcp, or with [tcp] in the file";
                return Err(Failure::usage(message));
            }
            None => {}
        }
        Ok(())
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
