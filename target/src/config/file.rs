//! The TOML file. Unknown keys are errors; every error names the file, the line and the key.

use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flexblk_blockdev::BdevConfig;
use flexblk_nvme::log::ana::AnaState;
use flexblk_nvme::{Nqn, Nsid};
use flexblk_reactor::affinity::{CoreList, ParseCoreListError};
use serde::Deserialize;
use toml::Spanned;
use uuid::Uuid;

use super::{
    AllowedHosts, Config, Digest, Discovery, Limits, Listener, MAX_ALLOWED_HOSTS, MAX_ANA_GROUPS,
    MAX_CORES, MAX_NSID, MAX_REFERRALS, MAX_SUBSYSTEMS, Management, Namespace, Referral,
    ReferralTransport, RpcSocket, Rx, Subsystem, TcpDigest, TcpListener, Tx, bdev_tables, size,
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
        // Beside the configuration, unless it says otherwise.
        config
            .ptpl_file
            .get_or_insert_with(|| path.with_extension("ptpl.json"));
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
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SubsystemTable {
    nqn: Spanned<String>,
    serial: Option<Spanned<String>>,
    model: Option<Spanned<String>>,
    allow_hosts: Option<Spanned<Vec<Spanned<String>>>>,
    #[serde(default)]
    ana_group: Vec<AnaGroupTable>,
    #[serde(default)]
    namespace: Vec<NamespaceTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NamespaceTable {
    nsid: Option<Spanned<u64>>,
    bdev: Spanned<String>,
    uuid: Option<Spanned<String>>,
    allow_hosts: Option<Spanned<Vec<Spanned<String>>>>,
    anagrpid: Option<Spanned<u64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AnaGroupTable {
    anagrpid: Spanned<u64>,
    ana_state: AnaStateName,
}

/// SPDK's words.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AnaStateName {
    Optimized,
    NonOptimized,
    Inaccessible,
    PersistentLoss,
    Change,
}

impl AnaStateName {
    fn state(self) -> AnaState {
        match self {
            Self::Optimized => AnaState::Optimized,
            Self::NonOptimized => AnaState::NonOptimized,
            Self::Inaccessible => AnaState::Inaccessible,
            Self::PersistentLoss => AnaState::PersistentLoss,
            Self::Change => AnaState::Change,
        }
    }
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
        Ok(tcp)
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct DiscoveryTable {
    nqn: Option<Spanned<String>>,
    #[serde(default)]
    referral: Vec<ReferralTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReferralTable {
    #[serde(default)]
    trtype: ReferralTransport,
    address: Spanned<String>,
    nqn: Option<Spanned<String>>,
    allow_hosts: Option<Spanned<Vec<Spanned<String>>>>,
}

impl DiscoveryTable {
    fn check(self, at: &Place<'_>) -> Result<Discovery, ConfigError> {
        let name = |nqn: Option<Spanned<String>>| {
            nqn.map(|nqn| parse_nqn(nqn.as_ref()).map_err(|e| at.value(&nqn.span(), "nqn", e)))
                .transpose()
        };
        if self.referral.len() > MAX_REFERRALS {
            let what = format!("at most {MAX_REFERRALS} referrals are possible");
            return Err(at.line(0, "referral", what));
        }
        let mut discovery = Discovery {
            nqn: name(self.nqn)?,
            referrals: Vec::new(),
        };
        for table in self.referral {
            let span = table.address.span();
            let address = table.address.as_ref().parse().map_err(|_| {
                let what = "write an address and a port, such as \"192.0.2.7:8009\"";
                at.value(&span, "address", what)
            })?;
            discovery.referrals.push(Referral {
                trtype: table.trtype,
                address,
                nqn: name(table.nqn)?,
                hosts: allowed_hosts(at, table.allow_hosts)?,
            });
        }
        Ok(discovery)
    }
}

fn allowed_hosts(
    at: &Place<'_>,
    hosts: Option<Spanned<Vec<Spanned<String>>>>,
) -> Result<AllowedHosts, ConfigError> {
    let Some(hosts) = hosts else {
        return Ok(AllowedHosts::Any);
    };
    if hosts.as_ref().len() > MAX_ALLOWED_HOSTS {
        let what = format!("at most {MAX_ALLOWED_HOSTS} hosts can be listed");
        return Err(at.value(&hosts.span(), "allow_hosts", what));
    }
    let names = hosts.into_inner().into_iter().map(|host| {
        Nqn::opaque(host.as_ref()).map_err(|e| at.value(&host.span(), "allow_hosts", e))
    });
    Ok(AllowedHosts::Only(names.collect::<Result<_, _>>()?))
}

impl SubsystemTable {
    fn check(self, at: &Place<'_>, bdevs: &[&str]) -> Result<Subsystem, ConfigError> {
        let nqn = parse_nqn(self.nqn.as_ref()).map_err(|e| at.value(&self.nqn.span(), "nqn", e))?;
        let mut subsystem = Subsystem::new(nqn);
        subsystem.serial = at.ascii(self.serial, "serial", 20)?;
        subsystem.model = at.ascii(self.model, "model", 40)?;
        subsystem.hosts = allowed_hosts(at, self.allow_hosts)?;
        for group in self.ana_group {
            let id = at.number(&group.anagrpid, "anagrpid", 1..=u64::from(MAX_ANA_GROUPS))?;
            if subsystem.ana_groups.iter().any(|(other, _)| *other == id) {
                let span = group.anagrpid.span();
                return Err(at.value(&span, "anagrpid", "the group is listed twice"));
            }
            subsystem.ana_groups.push((id, group.ana_state.state()));
        }
        for table in self.namespace {
            let span = table.nsid.as_ref().map(Spanned::span);
            let namespace = table.check(at, bdevs)?;
            let taken = |other: &Namespace| other.nsid.is_some() && other.nsid == namespace.nsid;
            if let Some(span) = span
                && subsystem.namespaces.iter().any(taken)
            {
                return Err(at.value(&span, "nsid", "another namespace of this subsystem has it"));
            }
            subsystem.namespaces.push(namespace);
        }
        Ok(subsystem)
    }
}

impl NamespaceTable {
    fn check(self, at: &Place<'_>, bdevs: &[&str]) -> Result<Namespace, ConfigError> {
        let mut namespace = Namespace::new(self.bdev.as_ref().clone());
        if !bdevs.contains(&self.bdev.as_ref().as_str()) {
            // Not a name: a short form, which carries its own device.
            let short: Result<BdevConfig, _> = self.bdev.as_ref().parse();
            short.map_err(|e| at.value(&self.bdev.span(), "bdev", e))?;
        }
        if let Some(nsid) = self.nsid {
            let number = at.number(&nsid, "nsid", 1..=u64::from(MAX_NSID))?;
            namespace.nsid = Some(Nsid::new(number));
        }
        if let Some(uuid) = self.uuid {
            let parsed: Uuid = uuid
                .as_ref()
                .parse()
                .map_err(|e| at.value(&uuid.span(), "uuid", e))?;
            namespace.uuid = Some(parsed);
        }
        namespace.hosts = allowed_hosts(at, self.allow_hosts)?;
        if let Some(group) = self.anagrpid {
            let groups = 1..=u64::from(MAX_ANA_GROUPS);
            namespace.anagrpid = at.number(&group, "anagrpid", groups)?;
        }
        Ok(namespace)
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

/// Where in which file something was said.
struct Place<'a> {
    text: &'a str,
    path: &'a Path,
}

impl Place<'_> {
    /// An error of the TOML parser: its own message, cut to one line, with the key of its line.
    fn syntax(&self, error: &toml::de::Error) -> ConfigError {
        self.parser(error.span().map_or(0, |span| span.start), error.message())
    }

    fn parser(&self, offset: usize, message: &str) -> ConfigError {
        let message = message.trim().replace('\n', ", ");
        let key = self.key_at(offset).unwrap_or_else(|| "(none)".to_owned());
        self.line(offset, &key, message)
    }

    fn value<T: ToString>(&self, span: &Range<usize>, key: &str, what: T) -> ConfigError {
        self.line(span.start, key, what.to_string())
    }

    fn line(&self, offset: usize, key: &str, what: String) -> ConfigError {
        let before = self.text.get(..offset).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        ConfigError::Line {
            path: self.path.to_owned(),
            line,
            key: key.to_owned(),
            what,
        }
    }

    /// The key, or the table's name, on the line of that offset.
    fn key_at(&self, offset: usize) -> Option<String> {
        let start = self
            .text
            .get(..offset)?
            .rfind('\n')
            .map_or(0, |newline| newline + 1);
        let line = self.text.get(start..)?.lines().next()?.trim();
        let key = match line.split_once('=') {
            Some((key, _)) => key,
            None => line.trim_matches(['[', ']']),
        };
        let key = key.trim();
        (!key.is_empty()).then(|| key.to_owned())
    }

    fn number<T: TryFrom<u64>>(
        &self,
        value: &Spanned<u64>,
        key: &str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<T, ConfigError> {
        let number = *value.as_ref();
        let refuse = || {
            let what = format!(
                "{number} is out of range, give {} to {}",
                range.start(),
                range.end()
            );
            self.value(&value.span(), key, what)
        };
        if !range.contains(&number) {
            return Err(refuse());
        }
        T::try_from(number).map_err(|_| refuse())
    }

    fn ascii(
        &self,
        value: Option<Spanned<String>>,
        key: &str,
        max: usize,
    ) -> Result<Option<String>, ConfigError> {
        let Some(value) = value else { return Ok(None) };
        let text = value.as_ref();
        let printable = text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if text.trim().is_empty() || text.len() > max || !printable {
            let what = format!("must be 1 to {max} characters of ASCII");
            return Err(self.value(&value.span(), key, what));
        }
        Ok(Some(value.into_inner()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::from_toml(text, Path::new("t.toml"))
    }

    fn refused(text: &str) -> String {
        let message = parse(text).unwrap_err().to_string();
        assert!(!message.contains('\n'), "one line: {message}");
        message
    }

    #[test]
    fn the_example_is_a_configuration() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/target.toml");
        let config = Config::from_file(&path).unwrap();
        assert_eq!(config.subsystems.len(), 2);
        assert_eq!(config.bdevs.len(), 2);
        assert_eq!(config.subsystems[0].namespaces[0].nsid, Some(Nsid::new(1)));
        assert!(
            matches!(&config.subsystems[1].hosts, AllowedHosts::Only(hosts) if hosts.len() == 1)
        );
        assert_eq!(config.memory_budget_bytes, 256 << 20);
        assert_eq!(config.cores, [0]);
    }

    #[test]
    fn nothing_is_a_configuration_with_defaults() {
        let config = parse("").unwrap();
        assert_eq!(config.listener.address, super::super::DEFAULT_LISTEN);
        assert!(config.subsystems.is_empty());
    }

    #[test]
    fn file_line_and_key_are_named() {
        let unknown = refused("[target]\n\ncorse = \"0\"\n");
        assert!(
            unknown.starts_with("t.toml:3: key `corse`: unknown field"),
            "{unknown}"
        );
        let kind = refused("[listener]\nudp_port = \"x\"\n");
        assert!(
            kind.starts_with("t.toml:2: key `udp_port`: invalid type"),
            "{kind}"
        );
        let range = refused("[listener]\nudp_port = 70000\n");
        assert_eq!(
            range,
            "t.toml:2: key `udp_port`: 70000 is out of range, give 1 to 65535"
        );
        let device = refused("[[bdev]]\ntype = \"ram\"\nname = \"a\"\nsizee = \"1G\"\n");
        assert!(
            device.starts_with("t.toml:4: key `sizee`: unknown field"),
            "{device}"
        );
        let neither = refused("[target]\nmemory_budget = true\n");
        assert!(
            neither.starts_with("t.toml:2: key `memory_budget`: a size is"),
            "{neither}"
        );
        let syntax = refused("[listener]\naddress = 127.0.0.1\n");
        assert!(syntax.starts_with("t.toml:2: key `address`:"), "{syntax}");
        let missing = refused("[[subsystem]]\nserial = \"1\"\n");
        assert!(
            missing.starts_with("t.toml:1:") && missing.contains("`nqn`"),
            "{missing}"
        );
    }

    #[test]
    fn values_are_judged() {
        let subsystem = "[[subsystem]]\nnqn = \"nqn.2026-11.test:a\"\n";
        for (text, wanted) in [
            (
                "[[subsystem]]\nnqn = \"a b\"\n".to_owned(),
                "t.toml:2: key `nqn`: the name",
            ),
            (
                format!(
                    "[[subsystem]]\nnqn = \"{}\"\n",
                    flexblk_nvme::nqn::DISCOVERY
                ),
                "discovery service",
            ),
            (
                format!("{subsystem}{subsystem}"),
                "t.toml:4: key `nqn`: another subsystem",
            ),
            (
                format!("{subsystem}serial = \"{}\"\n", "x".repeat(21)),
                "t.toml:3: key `serial`: must be 1 to 20",
            ),
            (
                format!("{subsystem}allow_hosts = [\"\"]\n"),
                "t.toml:3: key `allow_hosts`: the name is empty",
            ),
            (
                format!("{subsystem}[[subsystem.namespace]]\nnsid = 0\nbdev = \"ram:1M\"\n"),
                "t.toml:4: key `nsid`: 0 is out of range",
            ),
            (
                format!("{subsystem}[[subsystem.namespace]]\nbdev = \"rom:1M\"\n"),
                "t.toml:4: key `bdev`:",
            ),
            (
                "[target]\nmemory_budget = \"lots\"\n".to_owned(),
                "t.toml:2: key `memory_budget`: `lots` is no size",
            ),
            (
                "[target]\ncores = \"x\"\n".to_owned(),
                "t.toml:2: key `cores`:",
            ),
            (
                "[listener]\naddress = \"somewhere\"\n".to_owned(),
                "t.toml:2: key `address`: `somewhere` is no address",
            ),
            (
                "[listener]\nfault = \"rain=1\"\n".to_owned(),
                "t.toml:2: key `fault`: fault \"rain\"",
            ),
        ] {
            let message = refused(&text);
            assert!(
                message.contains(wanted),
                "{message}\n  should have: {wanted}"
            );
        }
    }

    #[test]
    fn tcp_is_listened_on_when_there_is_a_table() {
        assert_eq!(parse("").unwrap().tcp, None);
        assert_eq!(parse("[tcp]\n").unwrap().tcp, Some(TcpListener::default()));
        let text =
            "[tcp]\naddress = \"[::1]:4421\"\ndata_digest = \"require\"\nheader_digest = \"off\"\n";
        let tcp = parse(text).unwrap().tcp.unwrap();
        assert_eq!(tcp.address, "[::1]:4421".parse().unwrap());
        assert_eq!(
            (tcp.header_digest, tcp.data_digest),
            (TcpDigest::Off, TcpDigest::Require)
        );
        let message = refused("[tcp]\nheader_digest = \"maybe\"\n");
        assert!(
            message.starts_with("t.toml:2: key `header_digest`: unknown variant"),
            "{message}"
        );
    }

    #[test]
    fn addresses() {
        assert_eq!(parse_listen("::1"), Ok("[::1]:4420".parse().unwrap()));
        assert_eq!(
            parse_listen("[::1]:5000"),
            Ok("[::1]:5000".parse().unwrap())
        );
        assert_eq!(
            parse_listen("10.0.0.1"),
            Ok("10.0.0.1:4420".parse().unwrap())
        );
        assert!(parse_listen("10.0.0.1:0").is_err());
    }

    #[test]
    fn a_file_that_is_not_there() {
        let error = Config::from_file(Path::new("/nonexistent/t.toml"))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("/nonexistent/t.toml: cannot read"),
            "{error}"
        );
    }
}
