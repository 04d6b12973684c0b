//! The TOML file. Unknown keys are errors; every error names the file, the line and the key.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flexblk_blockdev::BdevConfig;
use flexblk_nvme::Nqn;
use flexblk_reactor::affinity::{CoreList, ParseCoreListError};
use serde::Deserialize;
use toml::Spanned;

use super::exports::{DiscoveryTable, SubsystemTable};
use super::place::Place;
use super::{
    Config, Digest, Limits, Listener, MAX_CORES, MAX_SUBSYSTEMS, Management, RpcSocket, Rx,
    TcpDigest, TcpListener, Tx, bdev_tables, size,
};

/// Largest configuration file that is read.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// Why a configuration file was refused. The text is one line.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It could not be read.
    #[error("{}: cannot read the configuration: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is longer than any configuration.
    #[error("{}: longer than {} bytes, that is no configuration file", path.display(), MAX_FILE_BYTES)]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// A line of it is wrong.
    #[error("{}:{line}: key `{key}`: {what}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The key on that line.
        key: String,
        /// What is wrong and what would be right.
        what: String,
    },
}

impl Config {
    /// Reads and checks a TOML file.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        if std::fs::metadata(path).map_err(read)?.len() > MAX_FILE_BYTES {
            return Err(ConfigError::TooLong {
                path: path.to_owned(),
            });
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        let mut config = Self::from_toml(&text, path)?;
        let state_directories = std::env::var_os("STATE_DIRECTORY");
        config
            .ptpl_file
            .get_or_insert_with(|| default_ptpl_file(path, state_directories.as_deref()));
        Ok(config)
    }

    /// Checks the text of a TOML file; `path` is for the messages only.
    pub fn from_toml(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let at = Place { text, path };
        let file: File = toml::from_str(text).map_err(|error| {
            bdev_tables::first_mistake(text).map_or_else(
                || at.syntax(&error),
                |mistake| at.parser(mistake.span.start, &mistake.message),
            )
        })?;
        file.check(&at)
    }
}

/// Where `ptpl_file` is unless the configuration says so: where a service has its state if systemd runs us
/// (`StateDirectory=`, systemd.exec(5)), else beside the configuration.
fn default_ptpl_file(config: &Path, state_directories: Option<&OsStr>) -> PathBuf {
    let beside = config.with_extension("ptpl.json");
    let first = state_directories.and_then(|list| std::env::split_paths(list).next());
    match (first, beside.file_name()) {
        (Some(directory), Some(name)) if directory.is_absolute() => directory.join(name),
        _ => beside,
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    target: TargetTable,
    #[serde(default)]
    listener: ListenerTable,
    tcp: Option<TcpTable>,
    #[serde(default)]
    discovery: DiscoveryTable,
    #[serde(default)]
    management: ManagementTable,
    #[serde(default)]
    bdev: Vec<BdevConfig>,
    #[serde(default)]
    subsystem: Vec<SubsystemTable>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetTable {
    cores: Option<Spanned<String>>,
    memory_budget: Option<Spanned<Size>>,
    poll_budget_us: Option<Spanned<u64>>,
    max_controllers: Option<Spanned<u64>>,
    max_io_queues: Option<Spanned<u64>>,
    max_queue_entries: Option<Spanned<u64>>,
    longest_silence_s: Option<Spanned<u64>>,
    ptpl_file: Option<PathBuf>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListenerTable {
    address: Option<Spanned<String>>,
    udp_port: Option<Spanned<u64>>,
    mtu: Option<Spanned<u64>>,
    tx: Option<Tx>,
    rx: Option<Rx>,
    digest: Option<Digest>,
    fault: Option<Spanned<String>>,
    capture: Option<PathBuf>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ManagementTable {
    rpc_socket: Option<String>,
    state_file: Option<PathBuf>,
    metrics: Option<SocketAddr>,
    slow_io_us: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TcpTable {
    address: Option<Spanned<String>>,
    header_digest: Option<TcpDigest>,
    data_digest: Option<TcpDigest>,
    zerocopy_threshold: Option<Spanned<u64>>,
}

/// A size: a number of bytes, or a text like `"1G"`.
#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "a size is a number of bytes, or a text such as \"1G\""
)]
enum Size {
    Bytes(u64),
    Text(String),
}

impl File {
    fn check(self, at: &Place<'_>) -> Result<Config, ConfigError> {
        let mut config = Config::default();
        self.target.check(at, &mut config)?;
        config.listener = self.listener.check(at)?;
        config.management = self.management.check();
        config.tcp = self.tcp.map(|table| table.check(at)).transpose()?;
        if self.subsystem.len() > MAX_SUBSYSTEMS {
            let what = format!(
                "{} subsystems, at most {MAX_SUBSYSTEMS} are possible",
                self.subsystem.len()
            );
            return Err(at.line(0, "subsystem", what));
        }
        config.discovery = self.discovery.check(at)?;
        config.bdevs = self.bdev;
        let names: Vec<&str> = config.bdevs.iter().map(BdevConfig::name).collect();
        for table in self.subsystem {
            let nqn_span = table.nqn.span();
            let subsystem = table.check(at, &names)?;
            if config
                .subsystems
                .iter()
                .any(|other| other.nqn == subsystem.nqn)
            {
                return Err(at.value(
                    &nqn_span,
                    "nqn",
                    "another subsystem has this name; names must differ",
                ));
            }
            config.subsystems.push(subsystem);
        }
        Ok(config)
    }
}

impl TargetTable {
    fn check(self, at: &Place<'_>, config: &mut Config) -> Result<(), ConfigError> {
        if let Some(cores) = self.cores {
            config.cores = super::parse_cores(cores.as_ref())
                .map_err(|what| at.value(&cores.span(), "cores", what))?;
        }
        if let Some(budget) = self.memory_budget {
            config.memory_budget_bytes = match budget.as_ref() {
                Size::Bytes(bytes) => *bytes,
                Size::Text(text) => size::parse(text)
                    .map_err(|error| at.value(&budget.span(), "memory_budget", error))?,
            };
        }
        if let Some(micros) = self.poll_budget_us {
            let micros = at.number(&micros, "poll_budget_us", 0..=10_000_000)?;
            config.poll_budget = Duration::from_micros(micros);
        }
        let mut limits = Limits::default();
        if let Some(n) = self.max_controllers {
            limits.controllers = at.number(&n, "max_controllers", 1..=0xFFEF)?;
        }
        if let Some(n) = self.max_io_queues {
            limits.io_queues = at.number(&n, "max_io_queues", 1..=1024)?;
        }
        if let Some(n) = self.max_queue_entries {
            limits.queue_entries = at.number(&n, "max_queue_entries", 32..=4096)?;
        }
        if let Some(seconds) = self.longest_silence_s {
            let seconds = at.number(&seconds, "longest_silence_s", 5..=86_400)?;
            limits.longest_silence = Duration::from_secs(seconds);
        }
        config.limits = limits;
        config.ptpl_file = self.ptpl_file;
        Ok(())
    }
}

impl ListenerTable {
    fn check(self, at: &Place<'_>) -> Result<Listener, ConfigError> {
        let mut listener = Listener::default();
        if let Some(address) = self.address {
            listener.address = parse_listen(address.as_ref())
                .map_err(|what| at.value(&address.span(), "address", what))?;
        }
        if let Some(port) = self.udp_port {
            listener.udp_port = at.number(&port, "udp_port", 1..=65535)?;
        }
        if let Some(mtu) = self.mtu {
            listener.mtu = Some(at.number(&mtu, "mtu", 1024..=61440)?);
        }
        listener.tx = self.tx.unwrap_or_default();
        listener.rx = self.rx.unwrap_or_default();
        listener.digest = self.digest.unwrap_or_default();
        if let Some(fault) = self.fault {
            let parsed = fault
                .as_ref()
                .parse()
                .map_err(|e| at.value(&fault.span(), "fault", e))?;
            listener.fault = Some(parsed);
        }
        listener.capture = self.capture;
        Ok(listener)
    }
}

impl ManagementTable {
    fn check(self) -> Management {
        Management {
            rpc_socket: self
                .rpc_socket
                .as_deref()
                .map(RpcSocket::from)
                .unwrap_or_default(),
            state_file: self.state_file,
            metrics: self.metrics,
            slow_io: self.slow_io_us.map(|us| Duration::from_micros(us.into())),
        }
    }
}

impl TcpTable {
    fn check(self, at: &Place<'_>) -> Result<TcpListener, ConfigError> {
        let mut tcp = TcpListener::default();
        if let Some(address) = self.address {
            tcp.address = parse_listen(address.as_ref())
                .map_err(|what| at.value(&address.span(), "address", what))?;
        }
        tcp.header_digest = self.header_digest.unwrap_or_default();
        tcp.data_digest = self.data_digest.unwrap_or_default();
        if let Some(bytes) = self.zerocopy_threshold {
            tcp.zerocopy_threshold =
                Some(at.number(&bytes, "zerocopy_threshold", 4096..=1 << 30)?);
        }
        Ok(tcp)
    }
}

/// `traddr:trsvcid`, as `127.0.0.1:4420` or `[::1]:4420`; the port may be left out.
pub(super) fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        if address.port() == 0 {
            return Err(
                "the service id (after the colon) must be 1-65535, as in 127.0.0.1:4420".into(),
            );
        }
        return Ok(address);
    }
    match text.trim_start_matches('[').trim_end_matches(']').parse() {
        Ok(ip) => Ok(SocketAddr::new(ip, 4420)),
        Err(_) => Err(format!(
            "`{text}` is no address: give an IP address and a service id, as in 127.0.0.1:4420"
        )),
    }
}

/// The name of a subsystem that we serve: well-formed, and not the discovery service's.
pub(super) fn parse_nqn(text: &str) -> Result<Nqn, String> {
    let nqn = Nqn::new(text).map_err(|error| error.to_string())?;
    if nqn.is_discovery() {
        return Err(
            "this is the discovery service's name, which is always served; choose another".into(),
        );
    }
    Ok(nqn)
}

/// A list of cores like `0,2-3`.
pub(super) fn parse_cores(text: &str) -> Result<Vec<usize>, String> {
    let list: CoreList = text
        .parse()
        .map_err(|error: ParseCoreListError| error.to_string())?;
    if list.cores().len() > MAX_CORES {
        return Err(format!("at most {MAX_CORES} cores, as in 0,2-3"));
    }
    Ok(list.cores().to_vec())
}

#[cfg(test)]
mod tests;
