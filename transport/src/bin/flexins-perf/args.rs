//! Command line.

use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use flexblk_reactor::affinity::CoreList;

/// Measures FlexiNS and the UDP below it over 127.0.0.1.
#[derive(Debug, Parser)]
#[command(version, about)]
pub(crate) struct Args {
    /// Test.
    #[command(subcommand)]
    pub(crate) test: Test,
    /// Cores of the server (receiver) and of the client (sender); one core for both if one is given
    #[arg(long, global = true, default_value = "0,1")]
    pub(crate) cores: CoreList,
    /// How long to measure, in seconds
    #[arg(long, global = true, default_value_t = 3.0, value_parser = seconds)]
    pub(crate) seconds: f64,
    /// Print one JSON object instead of a table
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

impl Args {
    /// How long to measure.
    pub(crate) fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    /// Core of the client's engine thread.
    pub(crate) fn engine_core(&self) -> usize {
        let (_, client) = self.server_and_client();
        self.cores.cores().get(2).copied().unwrap_or(client)
    }

    /// Cores of server and client.
    pub(crate) fn server_and_client(&self) -> (usize, usize) {
        let cores = self.cores.cores();
        let server = cores.first().copied().unwrap_or(0);
        (server, cores.get(1).copied().unwrap_or(server))
    }
}

/// What is measured.
#[derive(Debug, Subcommand)]
pub(crate) enum Test {
    /// Ceiling of throughput: plain UDP GSO trains one way, blocks that arrive are counted
    UdpStream(StreamArgs),
    /// Ceiling of NVMe/TCP's throughput: a plain TCP stream one way, blocks that arrive are counted
    TcpStream(StreamArgs),
    /// Ceiling of an export's throughput: bytes moved between a TCP connection and a Unix socket, whose other end is
    /// used on the same core (the client's)
    Relay(RelayArgs),
    /// Ceiling of latency: plain UDP round trips, both sides polling
    UdpRtt(RttArgs),
    /// The UDP port without the engine: trains one way
    PortStream(StreamArgs),
    /// RDMA WRITE
    Write(VerbsArgs),
    /// RDMA READ
    Read(VerbsArgs),
    /// SEND
    Send(VerbsArgs),
}

/// A one-way stream.
#[derive(Debug, clap::Args)]
pub(crate) struct StreamArgs {
    /// Payload of a block in bytes
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=61440))]
    pub(crate) size: u32,
    /// Header (and trailer) bytes of a block
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u32).range(12..=256))]
    pub(crate) header: u32,
    /// Blocks of a train, or of one send of tcp-stream (as many as fit into 64 KiB, if fewer)
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) train: u32,
    /// Memory that the payload is taken from in turn, in KiB
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(64..=1 << 20))]
    pub(crate) working_set_kib: u32,
    /// How payload gets into datagrams (port-stream)
    #[arg(long, value_enum, default_value_t = Tx::HeaderOnly)]
    pub(crate) tx: Tx,
    /// Where received packets lie (port-stream)
    #[arg(long, value_enum, default_value_t = Rx::InCache)]
    pub(crate) rx: Rx,
    /// Buffers of rx=in-cache (port-stream)
    #[arg(long, default_value_t = 8)]
    pub(crate) rx_buffers: u16,
    /// Memory of rx=ring in MiB (port-stream)
    #[arg(long, default_value_t = 64)]
    pub(crate) ring_mib: u32,
    /// Trains under way at most (port-stream)
    #[arg(long, default_value_t = 32)]
    pub(crate) trains: u16,
}

impl StreamArgs {
    /// Memory that the payload is taken from, at least so much.
    pub(crate) fn memory_bytes(&self, least: usize) -> usize {
        ((self.working_set_kib as usize) << 10).max(least)
    }
}

/// A stream through a process in the middle.
#[derive(Debug, clap::Args)]
pub(crate) struct RelayArgs {
    /// Where to: as reads through an export go, or as writes
    #[arg(long, value_enum, default_value_t = To::Host)]
    pub(crate) to: To,
    /// Bytes of a block
    #[arg(long, default_value_t = 128 << 10, value_parser = clap::value_parser!(u32).range(1..=16 << 20))]
    pub(crate) size: u32,
    /// Memory that the end behind the network takes in turn, in KiB; at least one block
    #[arg(long, default_value_t = 64 << 10, value_parser = clap::value_parser!(u32).range(4..=1 << 20))]
    pub(crate) working_set_kib: u32,
    /// Blocks that the end on the host takes in turn, as a program does with so many I/Os under way
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) depth: u32,
}

/// Direction of a relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum To {
    /// From the TCP connection to the Unix socket
    Host,
    /// From the Unix socket to the TCP connection
    Network,
}

/// Round trips.
#[derive(Debug, clap::Args)]
pub(crate) struct RttArgs {
    /// Bytes of a request
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=65507))]
    pub(crate) size: u32,
    /// Bytes of a reply; as the request when absent
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65507))]
    pub(crate) reply_size: Option<u32>,
}

/// Operations of the verbs.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct VerbsArgs {
    /// Bytes of an operation
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=16 << 20))]
    pub(crate) size: u32,
    /// Where the client's engine runs
    #[arg(long, value_enum, default_value_t = Mode::Inline)]
    pub(crate) mode: Mode,
    /// Operations outstanding on each connection
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=8192))]
    pub(crate) depth: u32,
    /// Connections
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) connections: u32,
    /// Memory that each side takes its payload from in turn, in KiB; at least one operation each
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(4..=1 << 20))]
    pub(crate) working_set_kib: u32,
    /// How payload gets into datagrams
    #[arg(long, value_enum, default_value_t = Tx::HeaderOnly)]
    pub(crate) tx: Tx,
    /// Where received packets lie
    #[arg(long, value_enum, default_value_t = Rx::InCache)]
    pub(crate) rx: Rx,
    /// Buffers of rx=in-cache
    #[arg(long, default_value_t = 8)]
    pub(crate) rx_buffers: u16,
    /// Memory of rx=ring in MiB
    #[arg(long, default_value_t = 64)]
    pub(crate) ring_mib: u32,
    /// Checksums
    #[arg(long, value_enum, default_value_t = Digest::Crc32c)]
    pub(crate) digest: Digest,
    /// Payload bytes of a packet at most
    #[arg(long, default_value_t = 8320, value_parser = clap::value_parser!(u32).range(1024..=61440))]
    pub(crate) mtu: u32,
    /// Send packet by packet instead of in trains
    #[arg(long)]
    pub(crate) no_gso: bool,
    /// Trains under way at most
    #[arg(long, default_value_t = 32)]
    pub(crate) trains: u16,
    /// Socket buffers asked for, in KiB (208 is what an unprivileged process gets by default)
    #[arg(long, default_value_t = 16 << 10)]
    pub(crate) socket_buffer_kib: u32,
    /// Time without work after which a thread sleeps, in microseconds
    #[arg(long, default_value_t = 1_000_000)]
    pub(crate) poll_budget_us: u32,
    /// Faults done to packets that both sides receive, as in `loss=0.01,reorder=0.01`
    #[arg(long)]
    pub(crate) fault: Option<flexins::middleware::FaultConfig>,
}

/// Where an engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// In the thread that posts
    Inline,
    /// On a thread of its own, on the same core unless --cores has a third one
    Thread,
}

/// How payload gets into datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tx {
    /// Gathered from where it lies
    HeaderOnly,
    /// Copied behind its header
    Copy,
}

/// Where received packets lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Rx {
    /// A few buffers
    InCache,
    /// A long ring
    Ring,
}

/// Checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Digest {
    /// CRC32C over every packet
    Crc32c,
    /// None
    None,
}

impl From<Tx> for flexins::engine::TxMode {
    fn from(tx: Tx) -> Self {
        match tx {
            Tx::HeaderOnly => Self::HeaderOnly,
            Tx::Copy => Self::Copy,
        }
    }
}

impl Rx {
    /// As the library says it.
    pub(crate) fn mode(self, ring_mib: u32) -> flexins::port::udp::RxMode {
        match self {
            Self::InCache => flexins::port::udp::RxMode::InCache,
            Self::Ring => flexins::port::udp::RxMode::Ring {
                bytes: (ring_mib as usize) << 20,
            },
        }
    }
}

impl From<Digest> for flexins::verbs::Digest {
    fn from(digest: Digest) -> Self {
        match digest {
            Digest::Crc32c => Self::Crc32c,
            Digest::None => Self::None,
        }
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.01..=3600.0).contains(&value) {
        Ok(value)
    } else {
        Err("0.01 to 3600".to_owned())
    }
}
