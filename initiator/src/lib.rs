//! The NVMe-oF host: discovery, controllers and queue pairs over FlexiNS or NVMe/TCP.
//!
//! [`Controller::connect`] brings a controller up; a control thread of its own keeps it alive.
//! [`Controller::queue_pair`] makes an I/O queue pair for the calling thread. [`BlockHandle`] is the
//! blocking convenience on top.
//!
//! ```no_run
//! use flexblk_initiator::{Command, ConnectOptions, Controller, Host, Nsid, QueuePairOptions};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let options = ConnectOptions::parse("nvme+flexins://192.0.2.7/nqn.2026-11.io.example:disk1", Host::load()?)?;
//! let controller = Controller::connect(&options)?;
//! let memory = flexblk_initiator::SharedMemory::create("example", 4096, flexblk_reactor::HugePages::No)?;
//! let buffer = memory.span(0, 4096).ok_or("no memory")?;
//! let mut queue = controller.queue_pair(&QueuePairOptions { memory: vec![buffer], ..Default::default() })?;
//! let namespace = controller.namespace(Nsid::new(1))?;
//! queue.submit(&Command::read(namespace.nsid, 0, 4096 / namespace.block_size, buffer), 7)?;
//! let mut completions = Vec::new();
//! queue.wait(std::time::Duration::from_secs(1), 1, &mut completions);
//! assert_eq!(completions[0].tag, 7);
//! # Ok(())
//! # }
//! ```

mod admin;
mod block_handle;
mod command;
mod controller;
mod counters;
mod discovery;
mod error;
pub mod export;
mod host;
mod link;
mod namespace;
mod options;
mod passthrough;
mod queue;
mod queue_pair;
pub mod sim;
mod view;
pub mod volume;

pub use block_handle::BlockHandle;
pub use command::{Busy, Command, DiscardRange, InvalidCommand, IoCompletion, IoError, Op};
pub use controller::{AdminCommand, AdminReply, Controller, ControllerState, Event};
pub use counters::{TcpCounters, TransportCounters};
pub use discovery::{
    AddressFamily, DiscoveryController, DiscoveryLog, DiscoveryRecord, SubsystemType,
    TransportType, discover,
};
pub use error::{Error, LostReason, NamespaceList};
pub use host::{Host, HostError};
pub use namespace::{MaxBlocks, Namespace};
pub use options::{
    ConnectOptions, Digest, EngineMode, FaultConfig, QueuePairOptions, RxMode, TxMode,
};
pub use passthrough::Data;
pub use queue_pair::{QueueCounters, QueuePair, RegionId};

/// The types of the NVMe crate that appear in this API.
pub use flexblk_nvme::command::admin::Cns;
pub use flexblk_nvme::identify::Controller as IdentifyController;
pub use flexblk_nvme::log::LogPageId;
pub use flexblk_nvme::log::ana::AnaState;
pub use flexblk_nvme::transport_id::TrType;
pub use flexblk_nvme::{Cntlid, HostId, Nqn, Nsid, Status, StatusCode, TransportId};
/// Lent memory.
pub use flexblk_reactor::{SharedMemory, Span};
