//! What the daemon is told: subsystems, listener, limits. Built from TOML ([`Config::from_file`]) or
//! from flags; every value is checked when it gets in, so that the rest of the crate need not.

mod ana;
mod bdev_tables;
mod exports;
mod file;
mod place;
pub mod size;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use flexblk_blockdev::BdevConfig;
use flexblk_nvme::log::ana::AnaState;
use flexblk_nvme::{Nqn, Nsid};
use flexins::middleware::FaultConfig;
use uuid::Uuid;

pub use ana::{ana_state_word, parse_ana_state};
pub use file::ConfigError;

/// Name of the subsystem when none is given.
pub const DEFAULT_SUBNQN: &str = "nqn.2026-11.dev.flexblk:target";
/// Where the target listens when it is not told: this machine only, since a connection needs no
/// password. `0.0.0.0:4420` opens it to the network.
pub const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 4420);
/// UDP port of RoCEv2, on which FlexiNS rides.
pub const DEFAULT_UDP_PORT: u16 = 4791;
/// Default of [`Config::memory_budget_bytes`].
pub const DEFAULT_MEMORY_BUDGET_BYTES: u64 = 256 << 20;
/// Highest namespace identifier (NN in Identify Controller): tables are indexed by it.
pub const MAX_NSID: u32 = 1024;
/// Most ANA groups of a subsystem (Identify's ANAGRPMAX); they are numbered from 1 on.
pub const MAX_ANA_GROUPS: u32 = 128;
/// Most subsystems of one target.
pub const MAX_SUBSYSTEMS: usize = 256;
/// Most block devices of one target.
pub const MAX_BDEVS: usize = 4096;
/// Most addresses at which a subsystem or the discovery service is reached.
pub const MAX_LISTENERS: usize = 64;
/// Most host names in one allow-list.
pub const MAX_ALLOWED_HOSTS: usize = 1024;
/// Most data threads.
pub const MAX_CORES: usize = 64;

/// Everything the target is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where and how to listen for FlexiNS.
    pub listener: Listener,
    /// Where and how to listen for NVMe/TCP; `None` is not at all.
    pub tcp: Option<TcpListener>,
    /// Cores of the data threads, one thread each; empty is one thread on any core.
    pub cores: Vec<usize>,
    /// Bytes for I/O buffers and queues, over all threads. Namespaces in memory are not part of it.
    pub memory_budget_bytes: u64,
    /// How long a thread polls after the last activity before it sleeps.
    pub poll_budget: Duration,
    /// What hosts can get.
    pub limits: Limits,
    /// How the daemon is managed while it runs.
    pub management: Management,
    /// File for what has to survive a power loss besides data: reservations with Persist Through
    /// Power Loss (PTPL) and write protection, which are not offered to hosts with `None`, and the
    /// marks of Write Uncorrectable on files and block devices, which then end with the target.
    pub ptpl_file: Option<PathBuf>,
    /// The discovery service.
    pub discovery: Discovery,
    /// Block devices that namespaces name.
    pub bdevs: Vec<BdevConfig>,
    /// What is exported.
    pub subsystems: Vec<Subsystem>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listener: Listener::default(),
            tcp: None,
            cores: Vec::new(),
            memory_budget_bytes: DEFAULT_MEMORY_BUDGET_BYTES,
            poll_budget: Duration::from_micros(100),
            limits: Limits::default(),
            management: Management::default(),
            ptpl_file: None,
            discovery: Discovery::default(),
            bdevs: Vec::new(),
            subsystems: Vec::new(),
        }
    }
}

/// The FlexiNS listener.
#[derive(Clone, Debug)]
pub struct Listener {
    /// `traddr` and, as the port, `trsvcid`: the RDMA-CM service id, not a UDP port.
    pub address: SocketAddr,
    /// UDP port that FlexiNS rides on.
    pub udp_port: u16,
    /// Payload bytes a packet may carry at most; `None` is what the path carries.
    pub mtu: Option<u32>,
    /// How payload is sent.
    pub tx: Tx,
    /// How packets are received.
    pub rx: Rx,
    /// Checksum over every packet.
    pub digest: Digest,
    /// Faults done to received packets on purpose, for tests.
    pub fault: Option<FaultConfig>,
    /// Write every packet into this pcapng file.
    pub capture: Option<PathBuf>,
}

impl Default for Listener {
    fn default() -> Self {
        Self {
            address: DEFAULT_LISTEN,
            udp_port: DEFAULT_UDP_PORT,
            mtu: None,
            tx: Tx::default(),
            rx: Rx::default(),
            digest: Digest::default(),
            fault: None,
            capture: None,
        }
    }
}

/// The NVMe/TCP listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpListener {
    /// `traddr` and `trsvcid`. Port 0 lets the kernel choose one
    /// ([`Target::tcp_address`](crate::Target::tcp_address)).
    pub address: SocketAddr,
    /// CRC32C over the header of every PDU.
    pub header_digest: TcpDigest,
    /// CRC32C over the data of every PDU.
    pub data_digest: TcpDigest,
    /// Payload in bytes of one `sendmsg` from which on the kernel does not copy it (`SENDMSG_ZC`); `None`: it always
    /// does. Memory is then kept until the host has acknowledged it. Not for connections with a data digest, nor for
    /// those where the kernel reports that it has copied after all, as on loopback.
    pub zerocopy_threshold: Option<u32>,
}

impl Default for TcpListener {
    fn default() -> Self {
        Self {
            address: DEFAULT_LISTEN,
            header_digest: TcpDigest::default(),
            data_digest: TcpDigest::default(),
            zerocopy_threshold: None,
        }
    }
}

/// A digest of NVMe/TCP, on which both ends have to agree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum TcpDigest {
    /// If the host asks for it.
    #[default]
    Allow,
    /// A host that does not ask for it is refused.
    Require,
    /// Never.
    Off,
}

/// How payload is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Tx {
    /// Gathered from where it lies; the transport writes only headers.
    #[default]
    HeaderOnly,
    /// Copied behind the header, as a classic stack does (for comparison).
    Copy,
}

/// How packets are received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Rx {
    /// A few buffers, recycled last-freed-first, so that they stay in the cache.
    #[default]
    InCache,
    /// A long ring in first-in first-out order (for comparison).
    Ring,
}

/// Checksum over every packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Digest {
    /// CRC32C.
    #[default]
    Crc32c,
    /// None, unless the host wants it.
    None,
}

/// What hosts can get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Controllers that may exist at a time, over all subsystems (at most 65519).
    pub controllers: u16,
    /// I/O queues of a controller, before the memory budget is asked.
    pub io_queues: u16,
    /// Entries of a queue (CAP.MQES + 1).
    pub queue_entries: u16,
    /// How long the transport of a host that turned Keep Alive off may be silent until its controller
    /// ends. It is asked in time; a host that is there answers without its application.
    pub longest_silence: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            controllers: 1024,
            io_queues: 64,
            queue_entries: 1024,
            longest_silence: Duration::from_secs(300),
        }
    }
}

/// How the daemon is managed while it runs; a [`crate::Target`] by itself ignores it.
#[derive(Clone, Debug, Default)]
pub struct Management {
    /// Where the RPC socket is.
    pub rpc_socket: RpcSocket,
    /// What runs is kept in this file, and restored from it.
    pub state_file: Option<PathBuf>,
    /// Where metrics are scraped from, over HTTP.
    pub metrics: Option<SocketAddr>,
    /// Commands that take at least so long are logged.
    pub slow_io: Option<Duration>,
}

/// Where the RPC socket is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RpcSocket {
    /// At [`crate::manage::DEFAULT_RPC_SOCKET`], or nowhere when that cannot be had.
    #[default]
    Default,
    /// At this path.
    Path(PathBuf),
    /// Nowhere.
    Off,
}

impl From<&str> for RpcSocket {
    fn from(text: &str) -> Self {
        match text {
            "off" => Self::Off,
            path => Self::Path(path.into()),
        }
    }
}

/// The discovery service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Discovery {
    /// A name of its own, beside the well-known one: hosts that come by either are served, and both
    /// tell them this name.
    pub nqn: Option<Nqn>,
    /// Addresses at which it is reached although no subsystem is. It is reached at every address that
    /// the target listens on.
    pub listeners: Vec<ListenAddress>,
    /// Other discovery services that hosts are told of.
    pub referrals: Vec<Referral>,
}

/// Another discovery service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Referral {
    /// How it is reached.
    pub trtype: Transport,
    /// Where.
    pub address: SocketAddr,
    /// Its name, if it is not the well-known one.
    pub nqn: Option<Nqn>,
    /// Who is told of it.
    pub hosts: AllowedHosts,
}

/// How NVMe-oF is carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// FlexiNS.
    #[default]
    Flexins,
    /// NVMe/TCP.
    Tcp,
}

/// Where hosts reach something: a transport, `traddr` and, as the port, `trsvcid`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ListenAddress {
    /// How.
    pub trtype: Transport,
    /// Where.
    pub address: SocketAddr,
}

impl std::fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let trtype = match self.trtype {
            Transport::Flexins => "flexins",
            Transport::Tcp => "tcp",
        };
        write!(f, "{trtype} {}", self.address)
    }
}

/// Most referrals.
pub const MAX_REFERRALS: usize = 256;

/// One NVM subsystem.
#[derive(Clone, Debug)]
pub struct Subsystem {
    /// Its name.
    pub nqn: Nqn,
    /// Serial number, at most 20 characters of ASCII; `None` derives one from the name.
    pub serial: Option<String>,
    /// Model number, at most 40 characters of ASCII.
    pub model: Option<String>,
    /// Who may connect.
    pub hosts: AllowedHosts,
    /// Where hosts reach it; `None` is at every address that the target listens on from the start.
    pub listeners: Option<Vec<ListenAddress>>,
    /// ANA groups that are not optimized from the start.
    pub ana_groups: Vec<AnaGroup>,
    /// What it holds.
    pub namespaces: Vec<Namespace>,
}

impl Subsystem {
    /// A subsystem of that name, open to any host, without namespaces.
    #[must_use]
    pub fn new(nqn: Nqn) -> Self {
        Self {
            nqn,
            serial: None,
            model: None,
            hosts: AllowedHosts::Any,
            listeners: None,
            ana_groups: Vec::new(),
            namespaces: Vec::new(),
        }
    }
}

/// State of an ANA group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnaGroup {
    /// Which, 1 to [`MAX_ANA_GROUPS`].
    pub anagrpid: u32,
    /// Its state.
    pub state: AnaState,
    /// Through this listener only; `None` is through all that nothing else is said about.
    pub listener: Option<ListenAddress>,
}

/// Who may connect to a subsystem.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AllowedHosts {
    /// Any host.
    #[default]
    Any,
    /// Any host; the list is kept for when that ends.
    AnyAnd(Vec<Nqn>),
    /// Hosts with these names.
    Only(Vec<Nqn>),
}

impl AllowedHosts {
    /// May the host of that name connect?
    #[must_use]
    pub fn allows(&self, host: &Nqn) -> bool {
        match self {
            Self::Any | Self::AnyAnd(_) => true,
            Self::Only(names) => names.contains(host),
        }
    }

    /// The names listed.
    #[must_use]
    pub fn names(&self) -> &[Nqn] {
        match self {
            Self::Any => &[],
            Self::AnyAnd(names) | Self::Only(names) => names,
        }
    }

    /// May any host connect?
    #[must_use]
    pub fn any(&self) -> bool {
        !matches!(self, Self::Only(_))
    }

    /// A list, and whether it matters.
    #[must_use]
    pub fn new(any: bool, names: Vec<Nqn>) -> Self {
        match any {
            true if names.is_empty() => Self::Any,
            true => Self::AnyAnd(names),
            false => Self::Only(names),
        }
    }
}

/// One namespace.
#[derive(Clone, Debug)]
pub struct Namespace {
    /// Its identifier; `None` takes the lowest free one.
    pub nsid: Option<Nsid>,
    /// The block device behind it: the name of one of [`Config::bdevs`], or a short form such as
    /// `ram:1G` (see [`BdevConfig`]).
    pub bdev: String,
    /// Its UUID; `None` takes the device's own.
    pub uuid: Option<Uuid>,
    /// Hosts that see it, of those that may connect.
    pub hosts: AllowedHosts,
    /// Its ANA group, 1 to [`MAX_ANA_GROUPS`].
    pub anagrpid: u32,
}

impl Namespace {
    /// A namespace on that block device.
    #[must_use]
    pub fn new(bdev: impl Into<String>) -> Self {
        Self {
            nsid: None,
            bdev: bdev.into(),
            uuid: None,
            hosts: AllowedHosts::Any,
            anagrpid: 1,
        }
    }
}

/// Parses `traddr[:trsvcid]`, as `127.0.0.1:4420`. The error says what to write.
pub fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    file::parse_listen(text)
}

/// Parses the name of a subsystem that we are to serve.
pub fn parse_nqn(text: &str) -> Result<Nqn, String> {
    file::parse_nqn(text)
}

/// Parses a list of cores like `0,2-3`.
pub fn parse_cores(text: &str) -> Result<Vec<usize>, String> {
    file::parse_cores(text)
}
