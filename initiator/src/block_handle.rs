//! Blocking byte-granular access to a namespace: for tools, not for the fast path.

use crate::{Controller, Error, Namespace, QueuePair};
use flexblk_nvme::Nsid;

/// A namespace as a blocking block device, on a queue pair of its own.
pub struct BlockHandle {
    queue: QueuePair,
    namespace: Namespace,
}

impl BlockHandle {
    /// Opens a namespace for the calling thread.
    pub fn open(_controller: &Controller, _nsid: Nsid) -> Result<BlockHandle, Error> { todo!() }
    /// The namespace.
    pub fn namespace(&self) -> &Namespace { &self.namespace }
    /// The queue pair below.
    pub fn queue_pair(&mut self) -> &mut QueuePair { &mut self.queue }
    /// Reads `data.len()` bytes at any byte offset.
    pub fn read_at(&mut self, _offset: u64, _data: &mut [u8]) -> Result<(), Error> { todo!() }
    /// Writes at any byte offset; blocks written in part are read first (not atomic towards other writers).
    pub fn write_at(&mut self, _offset: u64, _data: &[u8]) -> Result<(), Error> { todo!() }
    /// Makes completed writes durable.
    pub fn flush(&mut self) -> Result<(), Error> { todo!() }
}
