//! Bounce buffers: registered memory for commands whose own memory is not.

use std::sync::Arc;

use flexblk_reactor::{HugePages, SharedMemory, Span};

use crate::Error;

/// Buffers of one size in one piece of memory, last freed first.
pub(crate) struct Bounce {
    memory: Arc<SharedMemory>,
    buffer_bytes: u32,
    free: Vec<u16>,
}

impl Bounce {
    /// As many buffers of `buffer_bytes` as fit into `total_bytes`, at least one.
    pub(crate) fn new(total_bytes: usize, buffer_bytes: u32) -> Result<Bounce, Error> {
        let buffer_bytes = buffer_bytes.max(4096);
        let count =
            (total_bytes / buffer_bytes as usize).clamp(1, usize::from(u16::MAX) - 1) as u16;
        let len = u64::from(buffer_bytes) * u64::from(count);
        let memory = SharedMemory::create("flexblk bounce", len, HugePages::No)
            .map_err(|e| Error::Transport(format!("allocating bounce buffers: {e}")))?;
        Ok(Bounce {
            memory,
            buffer_bytes,
            free: (0..count).rev().collect(),
        })
    }

    /// All of it, for registration.
    pub(crate) fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    pub(crate) fn buffer_bytes(&self) -> u32 {
        self.buffer_bytes
    }

    pub(crate) fn take(&mut self, len: u32) -> Option<(u16, Span)> {
        if len > self.buffer_bytes {
            return None;
        }
        let index = self.free.pop()?;
        match self.span(index, len) {
            Some(span) => Some((index, span)),
            None => {
                self.free.push(index);
                None
            }
        }
    }

    pub(crate) fn put(&mut self, index: u16) {
        debug_assert!(!self.free.contains(&index), "returned twice");
        self.free.push(index);
    }

    /// The buffer, cut to `len`.
    pub(crate) fn span(&self, index: u16, len: u32) -> Option<Span> {
        self.memory
            .span(u64::from(index) * u64::from(self.buffer_bytes), len)
    }
}
