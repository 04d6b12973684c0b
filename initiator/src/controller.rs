//! A controller on the host's side: handle of the control thread.

use std::time::Duration;

use flexblk_nvme::{Nsid, identify::IdentifyController};

use crate::{ConnectOptions, Error, LostReason, Namespace, QueuePair, QueuePairOptions};

/// A connected controller. Cheap to clone; any thread may use it. The last clone (queue pairs included) disconnects.
#[derive(Clone)]
pub struct Controller {}

/// How a controller is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControllerState {
    /// Ready and kept alive.
    Live,
    /// Gone for good; make a new one.
    Lost(LostReason),
}

/// What a controller tells without being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The list or an attribute (size) of namespaces changed; `namespaces()` is already fresh.
    NamespacesChanged,
    /// The controller is lost.
    Lost(LostReason),
}

impl Controller {
    /// Connects, enables the controller and reads its identity and namespaces. Takes at most a few times `connect_timeout`.
    pub fn connect(_options: &ConnectOptions) -> Result<Controller, Error> { todo!() }
    /// The options it was connected with.
    pub fn options(&self) -> &ConnectOptions { todo!() }
    /// Its identity as read at connect time.
    pub fn identify(&self) -> &IdentifyController { todo!() }
    /// How it is now.
    pub fn state(&self) -> ControllerState { todo!() }
    /// Active namespaces.
    pub fn namespaces(&self) -> Vec<Namespace> { todo!() }
    /// One of them.
    pub fn namespace(&self, _nsid: Nsid) -> Result<Namespace, Error> { todo!() }
    /// I/O queue pairs that the controller granted.
    pub fn granted_io_queues(&self) -> u16 { todo!() }
    /// A new I/O queue pair for the calling thread.
    pub fn queue_pair(&self, _options: &QueuePairOptions) -> Result<QueuePair, Error> { todo!() }
    /// Waits for the next event.
    pub fn next_event(&self, _timeout: Duration) -> Option<Event> { todo!() }
    /// Get Log Page.
    pub fn log_page(&self, _log: u8, _nsid: Nsid, _offset: u64, _len: u32) -> Result<Vec<u8>, Error> { todo!() }
    /// Disconnects now, instead of with the last clone.
    pub fn disconnect(&self) { todo!() }
}
