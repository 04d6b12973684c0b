//! Asking a discovery controller what there is.

use flexblk_nvme::TransportId;

use crate::{ConnectOptions, Error};

/// What a discovery controller offers to this host.
#[derive(Clone, Debug)]
pub struct DiscoveryLog {
    /// Generation counter: changes when the records do.
    pub generation: u64,
    /// The records.
    pub records: Vec<DiscoveryRecord>,
}

/// One path to one subsystem.
#[derive(Clone, Debug)]
pub struct DiscoveryRecord {
    /// Address and subsystem, ready to connect to; `None` when the transport is not one of ours.
    pub target: Option<TransportId>,
    /// Transport type as text.
    pub trtype: String,
    /// Address family as text.
    pub adrfam: String,
    /// Subsystem type as text (`nvme subsystem`, `discovery subsystem referral`, `current discovery subsystem`).
    pub subtype: String,
    /// Address.
    pub traddr: String,
    /// Service id.
    pub trsvcid: String,
    /// Subsystem NQN.
    pub subnqn: String,
    /// Port id.
    pub port_id: u16,
    /// Controller id to ask for (FFFFh: dynamic).
    pub controller_id: u16,
    /// Largest admin submission queue.
    pub admin_queue_size: u16,
}

/// Connects to the discovery subsystem at `options.target` (its `subnqn` is ignored unless it is a unique discovery
/// NQN) and reads the whole log, again when it changes underneath.
pub fn discover(_options: &ConnectOptions) -> Result<DiscoveryLog, Error> { todo!() }
