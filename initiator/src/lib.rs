//! The NVMe-oF host: discovery, controllers and queue pairs over FlexiNS.
//!
//! [`Controller::connect`] brings a controller up; a control thread of its own keeps it alive.
//! [`Controller::queue_pair`] makes an I/O queue pair for the calling thread. [`BlockHandle`] is the
//! blocking convenience on top.

mod block_handle;
mod command;
mod controller;
mod discovery;
mod error;
mod host;
mod namespace;
mod options;
mod queue_pair;

pub use block_handle::BlockHandle;
pub use command::{Busy, Command, DiscardRange, InvalidCommand, IoCompletion, IoError, Op};
pub use controller::{Controller, ControllerState, Event};
pub use discovery::{DiscoveryLog, DiscoveryRecord, discover};
pub use error::{Error, LostReason, NamespaceList};
pub use host::{Host, HostError};
pub use namespace::Namespace;
pub use options::{
    ConnectOptions, Digest, EngineMode, FaultConfig, QueuePairOptions, RxMode, TxMode,
};
pub use queue_pair::{QueueCounters, QueuePair, RegionId};

/// The types of the NVMe crate that appear in this API.
pub use flexblk_nvme::{HostId, Nqn, Nsid, Status, StatusCode, TrType, TransportId};
/// Lent memory.
pub use flexblk_reactor::memory::{SharedMemory, Span};
