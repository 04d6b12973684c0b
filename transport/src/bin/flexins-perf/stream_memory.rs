//! What the plain streams send.
#![allow(unsafe_code)]

use std::ops::Deref;
use std::sync::Arc;

use flexblk_reactor::{HugePages, SharedMemory};

/// Memory as a RAM namespace with transparent huge pages has it, so that a stream from it is what such a namespace
/// could reach.
pub(crate) struct StreamMemory(Arc<SharedMemory>);

impl StreamMemory {
    pub(crate) fn new(bytes: usize) -> anyhow::Result<Self> {
        let len = u32::try_from(bytes)?;
        let memory = SharedMemory::private("stream", len.into(), HugePages::Transparent)?;
        if let Some(span) = memory.span(0, len) {
            span.fill(0x5a);
        }
        Ok(Self(memory))
    }
}

impl Deref for StreamMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the whole mapping, which lives as long as self, and which nobody writes to any more.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), self.0.len() as usize) }
    }
}
