//! An I/O queue pair: owned by one thread, polled by it, never blocking unless asked to.

use std::time::Duration;

use crate::{Busy, Command, DiscardRange, Error, IoCompletion};
use flexblk_nvme::Nsid;
use flexblk_reactor::memory::Span;

/// A registered piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionId(pub(crate) u32);

/// What a queue pair counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Commands taken.
    pub submitted: u64,
    /// Completions handed out.
    pub completed: u64,
    /// Of those, with an error.
    pub failed: u64,
    /// Commands whose buffer was not registered and went through a bounce buffer.
    pub bounced: u64,
    /// Bytes copied to and from bounce buffers.
    pub bounced_bytes: u64,
    /// Successful reads whose completion came as an RDMA immediate.
    pub immediate_completions: u64,
}

/// An I/O queue pair. Made by [`Controller::queue_pair`](crate::Controller::queue_pair) in the thread
/// that uses it (it is not `Send`); dropping it disconnects.
///
/// Calling order: `submit` as often as wanted, then `flush_submissions` or `poll`; `poll` or `wait`
/// until every tag came back. Each submitted command completes exactly once, also after a time-out
/// or a lost connection; after `drop` no buffer is in use any more.
pub struct QueuePair {
    _not_send: std::marker::PhantomData<*const ()>,
}

impl QueuePair {
    /// Commands that fit at once.
    pub fn depth(&self) -> u16 { todo!() }
    /// Commands submitted and not yet handed out as completed.
    pub fn outstanding(&self) -> usize { todo!() }
    /// Largest transfer of one command.
    pub fn max_transfer_bytes(&self) -> u32 { todo!() }
    /// `None` while it works, else why it does not any more.
    pub fn lost(&self) -> Option<crate::LostReason> { todo!() }

    /// Registers memory, so that commands on any part of it need no copy. Never on the I/O path.
    ///
    /// The memory stays mapped until [`unregister`](Self::unregister) or the end of the queue pair.
    pub fn register(&mut self, _memory: Span) -> Result<RegionId, Error> { todo!() }
    /// Ends a registration; fails while a command uses the region.
    pub fn unregister(&mut self, _region: RegionId) -> Result<(), Error> { todo!() }

    /// Takes one command; `tag` comes back in its completion. Nothing is sent before
    /// [`flush_submissions`](Self::flush_submissions), [`poll`](Self::poll) or [`wait`](Self::wait).
    ///
    /// A command that can never work (wrong length, unknown namespace, connection lost) is taken, too, and
    /// completes with its error at the next poll.
    pub fn submit(&mut self, _command: &Command, _tag: u64) -> Result<(), Busy> { todo!() }
    /// A discard of up to 256 ranges in one command. `ranges` is copied.
    pub fn submit_discard(&mut self, _nsid: Nsid, _ranges: &[DiscardRange], _tag: u64) -> Result<(), Busy> { todo!() }
    /// Hands everything submitted to the kernel.
    pub fn flush_submissions(&mut self) { todo!() }
    /// Sends, receives, appends the completions to `out`; never sleeps. Returns how many were appended.
    pub fn poll(&mut self, _out: &mut Vec<IoCompletion>) -> usize { todo!() }
    /// As `poll`, until at least `min` completions were appended or `timeout` is over. Spins for the
    /// poll budget, then sleeps. `min` is capped by what is outstanding.
    pub fn wait(&mut self, _timeout: Duration, _min: usize, _out: &mut Vec<IoCompletion>) -> usize { todo!() }
    /// Disconnects. Everything outstanding completes into `out`. Afterwards every submit completes with `Closed`.
    pub fn close(&mut self, _out: &mut Vec<IoCompletion>) { todo!() }

    /// What this queue pair counted.
    pub fn counters(&self) -> QueueCounters { todo!() }
    /// What the transport engine below counted (of this queue pair alone in inline mode).
    pub fn transport_counters(&self) -> flexins::counters::Counters { todo!() }
}
