//! Memory in common with a virtual machine, read and written as the single numbers that rings are made of.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use flexblk_reactor::{SharedMemory, Span};

/// A part of shared memory that stays mapped with it. The other side changes it at any time: every read may give
/// another answer, and none is believed.
#[derive(Clone, Debug)]
pub(crate) struct Cells {
    span: Span,
    _memory: Arc<SharedMemory>,
}

impl Cells {
    /// `len` bytes from `offset`, at an address that is a multiple of `align`.
    pub(crate) fn new(
        memory: &Arc<SharedMemory>,
        offset: u64,
        len: u32,
        align: usize,
    ) -> Option<Cells> {
        let span = memory.span(offset, len)?;
        (span.as_ptr() as usize)
            .is_multiple_of(align)
            .then(|| Cells {
                span,
                _memory: Arc::clone(memory),
            })
    }

    /// A copy of `N` bytes; zeroes beyond the end.
    #[inline]
    pub(crate) fn read<const N: usize>(&self, offset: u32) -> [u8; N] {
        let mut bytes = [0; N];
        if let Some(span) = self.span.sub(offset, N as u32) {
            span.copy_to_slice(&mut bytes);
        }
        bytes
    }

    /// Writes; nothing beyond the end.
    #[inline]
    pub(crate) fn write(&self, offset: u32, bytes: &[u8]) {
        if let Some(span) = self.span.sub(offset, bytes.len() as u32) {
            span.copy_from_slice(bytes);
        }
    }

    /// A number that the other side publishes: what it wrote before is seen after this.
    #[inline]
    pub(crate) fn acquire(&self, offset: u32) -> u16 {
        self.cell(offset)
            .map_or(0, |cell| u16::from_le(cell.load(Ordering::Acquire)))
    }

    /// Publishes a number: what was written before is seen by whoever sees it.
    #[inline]
    pub(crate) fn release(&self, offset: u32, value: u16) {
        if let Some(cell) = self.cell(offset) {
            cell.store(value.to_le(), Ordering::Release);
        }
    }

    #[inline]
    fn cell(&self, offset: u32) -> Option<&AtomicU16> {
        let at = self.span.sub(offset, 2)?.as_ptr();
        if !(at as usize).is_multiple_of(align_of::<AtomicU16>()) {
            return None;
        }
        // SAFETY: two aligned bytes inside a mapping that lives as long as self. The other process changes them, too,
        // which is what the atomic is for; our own copies (`read`, `write`) touch other bytes of the ring.
        Some(unsafe { AtomicU16::from_ptr(at.cast()) })
    }
}

/// What was written before is written for everybody before anything after it is read: between saying "notify me" and
/// the last look, and between publishing and reading whether the other side wants to know.
#[inline]
pub(crate) fn full_fence() {
    fence(Ordering::SeqCst);
}
