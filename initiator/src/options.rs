//! How to connect: the words of nvme-cli, SPDK and FlexiNS with their defaults.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use flexblk_nvme::TransportId;

use crate::Host;

pub use flexins::endpoint::RxMode;
pub use flexins::middleware::fault::FaultConfig;
pub use flexins::verbs::{Digest, TxMode};

/// Where the transport engine of the I/O queue pairs runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineMode {
    /// In the caller's thread, driven by its polls: lowest latency.
    #[default]
    Inline,
    /// In a thread of its own; the caller meets it in shared-memory rings.
    Thread {
        /// Pin that thread to this core.
        core: Option<usize>,
    },
}

/// Everything that decides how a controller is reached. `ConnectOptions::new(target)` gives the defaults.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// Transport, address, service id and subsystem. `hostnqn`/`hostid` in it override [`host`](Self::host).
    pub target: TransportId,
    /// Who we are.
    pub host: Host,
    /// Local address to connect from.
    pub host_traddr: Option<IpAddr>,
    /// UDP port of the target's FlexiNS responder (not `trsvcid`, which is the service id). Default 4791.
    pub udp_port: u16,
    /// Keep-alive time-out; zero turns it off. Default 5 s.
    pub kato: Duration,
    /// Limit for one I/O command. Default 30 s.
    pub io_timeout: Duration,
    /// Limit for reaching the target and for each step of bringing a controller up. Default 5 s.
    pub connect_timeout: Duration,
    /// Limit for one admin command. Default 10 s.
    pub admin_timeout: Duration,
    /// Number of I/O queue pairs asked for. Default: number of CPUs.
    pub nr_io_queues: u16,
    /// Commands a queue pair may have outstanding unless it asks otherwise. Default 128.
    pub queue_size: u16,
    /// Where the engine runs. Default inline.
    pub engine: EngineMode,
    /// `header-only` or `copy`.
    pub tx: TxMode,
    /// `in-cache` or `ring`.
    pub rx: RxMode,
    /// Packet checksum.
    pub digest: Digest,
    /// Largest payload per packet that we offer; `None`: the transport's default.
    pub mtu: Option<u32>,
    /// How long to spin after the last activity before going to sleep. Default 100 us.
    pub poll_budget: Duration,
    /// Deliberate faults on our own packets, for tests.
    pub fault: Option<FaultConfig>,
    /// Write every packet to this pcapng file; queue `n` of the controller adds `.q<n>` before the extension.
    pub capture: Option<PathBuf>,
}

/// How one queue pair differs from the controller's defaults.
#[derive(Clone, Debug, Default)]
pub struct QueuePairOptions {
    /// Commands outstanding at once; default [`ConnectOptions::queue_size`], capped by the controller's MQES.
    pub depth: Option<u16>,
    /// Memory to register before the first command (more can be registered later).
    pub memory: Vec<flexblk_reactor::memory::Span>,
    /// Bytes of bounce buffers for commands whose memory is not registered. Default 1 MiB; 0: such commands fail.
    pub bounce_bytes: Option<usize>,
}
