//! What threads say to one another.

use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use flexblk_nvme::{Cid, Cntlid, HostId, Nsid, Qid, Status};

use super::fused::Claim;
use super::preempt::Purge;
use super::queue::QueueKey;
use crate::association::Association;
use crate::captures::CaptureOrder;
use crate::control::From;
use crate::reservation::Notice;
use crate::snapshot::Snapshot;
use crate::stats::{QueueReport, ThreadStats};

/// Messages that may wait for a thread. Beyond it the sender keeps them and tries again.
pub(crate) const CAPACITY: usize = 1024;

/// A message to a data thread.
pub(crate) enum Mail {
    /// What is exported has changed.
    Snapshot(Arc<Snapshot>),
    /// Close every I/O queue of a controller.
    CloseQueues(Cntlid),
    /// An I/O queue of a controller of yours is gone.
    QueueClosed(Arc<Association>),
    /// Try to abort a command.
    Abort {
        /// Controller.
        cntlid: Cntlid,
        /// Its queue on this thread.
        sqid: Qid,
        /// The command to abort.
        cid: Cid,
        /// Whom to tell.
        from: AbortFrom,
    },
    /// Answer to [`Mail::Abort`].
    Aborted {
        /// Who asked.
        from: AbortFrom,
        /// Was it aborted?
        aborted: bool,
    },
    /// Memory, which all threads share, has run out: end a queue that has not been connected to a controller.
    MakeRoom,
    /// Keep I/O from those blocks for a fused operation of a thread.
    Fence {
        /// Which.
        claim: Claim,
        /// Whom to tell when the devices have left them.
        from: usize,
    },
    /// Answer to [`Mail::Fence`].
    Fenced(u64),
    /// The fused operation is over.
    Unfence(u64),
    /// Answer of the control thread.
    Ordered {
        /// The command that asked.
        from: From,
        /// The namespace.
        subsystem: usize,
        /// The namespace.
        nsid: Nsid,
        /// How it ended.
        status: Status,
        /// Hosts whose commands are to be aborted first.
        abort: Arc<[HostId]>,
    },
    /// Tell hosts about reservations.
    Reservations {
        /// The namespace.
        subsystem: usize,
        /// The namespace.
        nsid: Nsid,
        /// Whom what.
        notices: Arc<[(HostId, Notice)]>,
    },
    /// The host with that tag in the flight recorder has lost a connection.
    Loss(u64),
    /// Abort the commands of preempted hosts.
    Purge(Purge),
    /// Answer to [`Mail::Purge`].
    Purged(u64),
    /// Capture packets, or no more.
    Capture(Arc<CaptureOrder>),
    /// Report counters.
    Stats(SyncSender<ThreadStats>),
    /// Report queue pairs.
    Queues(SyncSender<Vec<QueueReport>>),
    /// Close everything and end.
    Shutdown,
}

/// A queue of a thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) thread: usize,
    pub(crate) queue: QueueKey,
}

/// The Abort command that asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AbortFrom {
    /// Thread of its Admin queue.
    pub(crate) thread: usize,
    /// The Admin queue.
    pub(crate) queue: QueueKey,
    /// The Abort command.
    pub(crate) cid: Cid,
}
