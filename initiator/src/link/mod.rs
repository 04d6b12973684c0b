//! What a queue needs from its transport: the seam between NVMe queues and FlexiNS or NVMe/TCP.
//!
//! A link carries one queue: capsules out, data both ways, responses in. It decides how data travels
//! (in the capsule, by RDMA, in PDUs) and tells when it no longer needs a command's buffer.

pub(crate) mod guest;
pub(crate) mod home;
mod inline;
pub(crate) mod open;
pub(crate) mod opening;
pub(crate) mod rdma;
pub(crate) mod sim;
pub(crate) mod tcp;
mod thread;
mod verbs;

use std::sync::Arc;
use std::time::Instant;

use flexblk_nvme::Status;
use flexblk_reactor::{SharedMemory, Span, Wait, Waker};

use crate::{Error, LostReason};

/// The transport's handle of a registered piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryKey {
    /// For our own requests.
    pub(crate) local: u32,
    /// For the peer's.
    pub(crate) remote: u32,
}

/// The data of a command.
#[derive(Clone, Copy)]
pub(crate) enum Data<'a> {
    None,
    /// A few bytes that the link copies into the capsule: at most [`MAX_SMALL_BYTES`].
    Small(&'a [u8]),
    ToController(Span, MemoryKey),
    FromController(Span, MemoryKey),
}

/// Longest [`Data::Small`]: one range of Dataset Management.
pub(crate) const MAX_SMALL_BYTES: usize = 16;

/// What became of a posted capsule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Posted {
    /// The link needs no buffer beyond the response.
    Free,
    /// The buffer is the link's until [`LinkEvent::SendDone`].
    HoldsBuffer,
}

/// Why a capsule was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PostRefused {
    /// No room now: turn, then try again.
    Full,
    /// Never again.
    Lost(LostReason),
}

/// Something that happened on the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinkEvent {
    /// A command's response.
    Response {
        /// Command identifier.
        cid: u16,
        /// Status field.
        status: Status,
        /// Dwords 0 and 1.
        result: u64,
        /// It came as an RDMA immediate.
        immediate: bool,
    },
    /// The buffer of a command posted with [`Posted::HoldsBuffer`] is free.
    SendDone {
        /// Command identifier.
        cid: u16,
    },
}

/// One queue's transport. Dropping it closes it.
pub(crate) trait Link {
    /// The clock as of the last turn.
    fn now(&self) -> Instant;

    /// Reads the clock. In a simulation, the simulation's.
    fn clock(&self) -> Instant {
        Instant::now()
    }

    /// Ends a sleeping turn from another thread, where the link sleeps in this one.
    fn waker(&self) -> Option<Waker>;

    /// Opens memory to the transport and, by its remote key, to the peer. `None`: this link cannot reach such
    /// memory, its data has to be copied.
    fn register(&mut self, memory: Span) -> Result<Option<MemoryKey>, Error>;

    /// The same for shared memory, which every link can reach.
    fn register_memory(&mut self, memory: &Arc<SharedMemory>) -> Result<MemoryKey, Error>;

    /// Closes it again.
    fn unregister(&mut self, key: MemoryKey) -> Result<(), Error>;

    /// Sends a command capsule; the link fills in the data pointer. It leaves with the next turn.
    fn post(&mut self, cid: u16, sqe: &mut [u8; 64], data: Data<'_>)
    -> Result<Posted, PostRefused>;

    /// Sends what was posted, receives, appends events. `Wait::Poll` never sleeps.
    fn turn(&mut self, wait: Wait, events: &mut Vec<LinkEvent>) -> Result<(), LostReason>;

    /// Appends the events that are here already, without letting the thread's reactor work: for whoever turns that
    /// himself.
    fn collect(&mut self, events: &mut Vec<LinkEvent>) -> Result<(), LostReason> {
        self.turn(Wait::Poll, events)
    }

    /// Says how much of a capsule the controller takes (Identify Controller, IOCCSZ).
    fn set_controller_in_capsule_bytes(&mut self, bytes: u32);

    /// Nobody may turn for a while: acknowledges what was received, so that the peer does not take us for dead.
    fn pause(&mut self);

    /// Ends the connection. Afterwards neither we nor the kernel nor the peer touches any memory that was
    /// registered or posted. Tells the peer if that takes no longer than `until`.
    fn close(&mut self, until: Instant);

    /// What the transport counted.
    fn counters(&self) -> crate::TransportCounters;
}
