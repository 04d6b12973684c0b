//! What is told about a path.

use std::time::Duration;

use flexblk_nvme::log::ana::AnaState;
use flexblk_nvme::transport_id::TrType;

/// How a path is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PathState {
    /// Connected, and requests can go there.
    Live,
    /// Connected, but no access to the namespace that way now (ANA).
    Inaccessible,
    /// Not connected; it is tried again and again.
    Connecting,
    /// Given up after `ctrl_loss_tmo`.
    Lost,
}

impl std::fmt::Display for PathState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            PathState::Live => "live",
            PathState::Inaccessible => "inaccessible",
            PathState::Connecting => "connecting",
            PathState::Lost => "lost",
        })
    }
}

/// One path of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PathReport {
    /// Its address.
    pub address: String,
    /// Its transport.
    pub transport: TrType,
    /// How it is.
    pub state: PathState,
    /// ANA state of the namespace there, while it is connected.
    pub ana: Option<AnaState>,
    /// Requests that it completed.
    pub ios: u64,
    /// Average latency lately, over the channels that use it.
    pub latency: Option<Duration>,
    /// How often it was connected.
    pub connects: u64,
    /// What was wrong last.
    pub last_error: Option<String>,
}
