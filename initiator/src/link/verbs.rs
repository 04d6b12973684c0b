//! The verbs that the NVMe/RDMA binding needs, wherever the engine runs.

use std::sync::Arc;
use std::time::Instant;

use crate::TransportCounters;
use flexblk_reactor::{SharedMemory, Span, Wait, Waker};
use flexins::verbs::{Mr, PostError, SendWr, VerbsError, WorkCompletion};

use crate::LostReason;

/// One connected queue pair of an engine.
pub(crate) trait Verbs {
    fn now(&self) -> Instant;
    fn clock(&self) -> Instant {
        Instant::now()
    }
    fn waker(&self) -> Option<Waker>;
    fn register(&mut self, memory: Span) -> Result<Mr, VerbsError>;
    fn register_memory(&mut self, memory: &Arc<SharedMemory>) -> Result<Mr, VerbsError>;
    fn deregister(&mut self, lkey: u32) -> Result<(), VerbsError>;
    fn post_send(&mut self, wr: &SendWr<'_>) -> Result<(), PostError>;
    /// Credits for messages that come inside work completions.
    fn post_receives(&mut self, count: u32) -> Result<(), PostError>;
    /// Lets the engine work; appends completions. The error is the end of the connection.
    fn turn(&mut self, wait: Wait, out: &mut Vec<WorkCompletion>) -> Result<(), LostReason>;
    /// Appends the completions that are there already, without letting the thread's reactor work.
    fn collect(&mut self, out: &mut Vec<WorkCompletion>) -> Result<(), LostReason> {
        self.turn(Wait::Poll, out)
    }
    /// Acknowledges what was received, now.
    fn pause(&mut self);
    /// Disconnects and destroys the queue pair; afterwards no memory is touched any more.
    fn close(&mut self, until: Instant);
    fn counters(&self) -> TransportCounters;
}
