//! A remote namespace as one block device, however it is reached.
//!
//! A [`Volume`] is the namespace with the paths to it; any thread may hold it. A [`Channel`] is one thread's way to do
//! I/O on it. What serves the volume to the host (`export`) does so through channels, in the thread that polls them.

mod channel;

use std::sync::Arc;
use std::time::Duration;

use flexblk_nvme::Nsid;
use flexblk_reactor::Span;

use crate::{Command, ConnectOptions, Controller, Error, Event, Namespace, Op};

pub use channel::Channel;

/// One way to the namespace.
#[derive(Clone, Debug)]
pub struct PathOptions {
    /// The controller to connect to.
    pub connect: ConnectOptions,
    /// The namespace there; `None`: the only one.
    pub nsid: Option<Nsid>,
}

/// How a volume is opened.
#[derive(Clone, Debug)]
pub struct VolumeOptions {
    /// At least one.
    pub paths: Vec<PathOptions>,
    /// How long a thread with a channel spins after the last activity before it sleeps.
    pub poll_budget: Duration,
}

/// What a volume tells without being asked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VolumeEvent {
    /// The namespace is not what it was: its size, for example. [`Volume::namespace`] is already fresh.
    NamespaceChanged,
    /// There is no path left, and there will be none.
    Lost,
}

/// One I/O on a volume, in its logical blocks. As to `buffer`, see [`Command`].
#[derive(Clone, Copy)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// First logical block. Ignored by [`Op::Flush`].
    pub lba: u64,
    /// Number of logical blocks. Ignored by [`Op::Flush`].
    pub blocks: u32,
    /// The data: exactly `blocks` times the block size for reads, writes and compares, else `None`.
    pub buffer: Option<Span>,
}

impl Request {
    fn on(&self, nsid: Nsid) -> Command {
        Command {
            op: self.op,
            nsid,
            lba: self.lba,
            blocks: self.blocks,
            buffer: self.buffer,
        }
    }
}

/// A remote namespace with the paths to it. Cheap to clone; the last clone (channels included) disconnects.
#[derive(Clone, Debug)]
pub struct Volume {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    controller: Controller,
    nsid: Nsid,
    poll_budget: Duration,
}

impl Volume {
    /// Connects.
    pub fn open(options: &VolumeOptions) -> Result<Volume, Error> {
        let path = options
            .paths
            .first()
            .ok_or_else(|| Error::Address("no address given".into()))?;
        let mut connect = path.connect.clone();
        connect.poll_budget = options.poll_budget;
        let controller = Controller::connect(&connect)?;
        let nsid = match path.nsid {
            Some(nsid) => nsid,
            None => only_namespace(&controller)?,
        };
        controller.namespace(nsid)?;
        Ok(Volume {
            shared: Arc::new(Shared {
                controller,
                nsid,
                poll_budget: options.poll_budget,
            }),
        })
    }

    /// The namespace as it is now.
    pub fn namespace(&self) -> Result<Namespace, Error> {
        self.shared.controller.namespace(self.shared.nsid)
    }

    /// A way to do I/O for the calling thread, with up to `depth` requests under way.
    pub fn channel(&self, depth: u16) -> Result<Channel, Error> {
        Channel::open(self, depth)
    }

    /// Waits for the next event.
    pub fn next_event(&self, timeout: Duration) -> Option<VolumeEvent> {
        self.shared
            .controller
            .next_event(timeout)
            .map(|event| match event {
                Event::NamespacesChanged => VolumeEvent::NamespaceChanged,
                Event::Lost(_) => VolumeEvent::Lost,
            })
    }
}

fn only_namespace(controller: &Controller) -> Result<Nsid, Error> {
    match controller.namespaces().as_slice() {
        [namespace] => Ok(namespace.nsid),
        [] => Err(Error::Address(format!(
            "subsystem {} has no namespace for this host",
            controller.subnqn()
        ))),
        several => Err(Error::Address(format!(
            "subsystem {} has {} namespaces: say which one (--namespace-id, or ?nsid= in the URI)",
            controller.subnqn(),
            several.len()
        ))),
    }
}
