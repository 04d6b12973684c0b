//! Why the target does not start, in one line that says what to do.

use std::net::SocketAddr;

use crate::config::size::Bytes;
use crate::config::{ConfigError, ListenAddress};

/// Why the target does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A namespace.
    #[error("namespace on `{bdev}` of {subnqn}: {source}")]
    Device {
        /// As configured.
        bdev: String,
        /// Its subsystem.
        subnqn: String,
        /// Why.
        source: flexblk_blockdev::Error,
    },
    /// What survived from before cannot be read.
    #[error("{0}")]
    State(#[from] crate::ptpl::StateError),
    /// A namespace cannot get its identifier.
    #[error("{0}")]
    Namespace(#[from] NamespaceError),
    /// The port is taken.
    #[error(
        "UDP {0} is in use by another process (a running flexblk-target?); stop it, or give another port with --udp-port or address with --listen"
    )]
    PortInUse(SocketAddr),
    /// The address is not one of this machine's.
    #[error("{0} is no address of this machine; give one with --listen (see `ip address`)")]
    NoSuchAddress(SocketAddr),
    /// The transport.
    #[error("FlexiNS on UDP {address}: {source}")]
    Endpoint {
        /// Where it was to listen.
        address: SocketAddr,
        /// Why.
        source: flexins::endpoint::EndpointError,
    },
    /// NVMe/TCP.
    #[error("NVMe/TCP on {address}: {source}")]
    Tcp {
        /// Where it was to listen.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The TCP port is taken.
    #[error(
        "TCP {0} is in use by another process (a running flexblk-target?); stop it, or give another address with --tcp"
    )]
    TcpPortInUse(SocketAddr),
    /// Too little memory.
    #[error(
        "a memory budget of {} is too small for {threads} data thread(s): give at least {} with --memory-budget, or use fewer --cores", Bytes(*.budget_bytes), Bytes(*.needed_bytes)
    )]
    MemoryBudget {
        /// What was given.
        budget_bytes: u64,
        /// What is needed.
        needed_bytes: u64,
        /// For how many threads.
        threads: usize,
    },
    /// The reactor, or memory for buffers.
    #[error("{0}")]
    Reactor(#[from] flexblk_reactor::Error),
    /// The transport refused an object.
    #[error("{0}")]
    Verbs(#[from] flexins::verbs::VerbsError),
    /// The service cannot be listened to.
    #[error("{0}")]
    Connect(#[from] flexins::engine::ConnectError),
    /// A thread.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] std::io::Error),
    /// A thread ended before it was ready.
    #[error("a data thread ended while it was starting; its last words are above")]
    ThreadEnded,
}

/// Why a namespace cannot be added, removed or changed.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// A histogram of latencies.
    #[error(transparent)]
    Histogram(#[from] crate::histogram::HistogramError),
    /// No such ANA group can be.
    #[error("ANA group {0}: groups are numbered from 1 to {max}", max = crate::config::MAX_ANA_GROUPS)]
    AnaGroup(u32),
    /// No such subsystem.
    #[error("no subsystem is named {0}")]
    NoSubsystem(String),
    /// No such namespace.
    #[error("{subnqn} has no namespace {nsid}")]
    NoNamespace {
        /// The subsystem.
        subnqn: String,
        /// The identifier.
        nsid: u32,
    },
    /// The identifier is taken.
    #[error("{subnqn} already has a namespace {nsid}")]
    Exists {
        /// The subsystem.
        subnqn: String,
        /// The identifier.
        nsid: u32,
    },
    /// The identifier is out of range, or there is none left.
    #[error("namespace identifiers go from 1 to {max}", max = crate::config::MAX_NSID)]
    Range,
    /// A subsystem of that name exists.
    #[error("a subsystem named {0} exists already")]
    SubsystemExists(String),
    /// Too many subsystems.
    #[error("at most {max} subsystems are possible", max = crate::config::MAX_SUBSYSTEMS)]
    TooManySubsystems,
    /// No such block device.
    #[error("no block device is named {0} (and it is no short form such as ram:1G)")]
    NoBdev(String),
    /// A block device of that name exists.
    #[error("a block device named {0} exists already")]
    BdevExists(String),
    /// Another block device is on top of it.
    #[error("block device {name} is in use: {by} is on top of it; delete that first")]
    BdevInUse {
        /// The device.
        name: String,
        /// The one above.
        by: String,
    },
    /// Too many block devices.
    #[error("at most {max} block devices are possible", max = crate::config::MAX_BDEVS)]
    TooManyBdevs,
    /// It is not reached at that address.
    #[error("{subnqn} has no listener {listen}")]
    NoListener {
        /// The subsystem.
        subnqn: String,
        /// The address.
        listen: ListenAddress,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {listen}: {why}")]
    Listen {
        /// The address.
        listen: ListenAddress,
        /// Why.
        why: String,
    },
    /// Too many addresses.
    #[error("at most {max} listeners are possible", max = crate::config::MAX_LISTENERS)]
    TooManyListeners,
    /// Write protection goes from there nowhere, or needs a place to be saved.
    #[error("write protection of namespace {nsid} of {subnqn} cannot be changed so: {status}")]
    WriteProtect {
        /// The subsystem.
        subnqn: String,
        /// The identifier.
        nsid: u32,
        /// What a host would be answered.
        status: flexblk_nvme::Status,
    },
    /// The device.
    #[error(transparent)]
    Device(#[from] flexblk_blockdev::Error),
}
