//! What moves bytes between application and engine memory: here `memcpy`; on a SmartNIC its DMA
//! engine, on a Xeon the data streaming accelerator.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU8, Ordering};

use super::{ENTRY_LEN_BYTES, ENTRY_PAYLOAD_BYTES, Entry};

/// Moves entries and payload. Copies may be asynchronous: sources and destinations stay in place
/// until [`Mover::complete`] has returned true.
///
/// # Safety
/// Whoever sees the last byte of an entry (acquire) must see its other bytes, and entries become
/// visible in order.
pub unsafe trait Mover: Send {
    /// Starts to copy entries to consecutive slots.
    ///
    /// # Safety
    /// `to` is aligned and valid for writes of all entries until [`Mover::complete`]; others look at
    /// it with volatile and atomic reads only. `entries` stay in place as long.
    unsafe fn copy_entries(&mut self, entries: &[Entry], to: *mut Entry);

    /// Starts to copy payload.
    ///
    /// # Safety
    /// `from` is valid for reads and `to` for writes of `len_bytes` until [`Mover::complete`], and
    /// they do not overlap.
    unsafe fn copy(&mut self, from: *const u8, to: *mut u8, len_bytes: usize);

    /// Whether everything that was started is finished.
    fn complete(&mut self) -> bool;
}

/// The processor copies.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memcpy;

// SAFETY: the last byte of each entry is stored with release ordering, after its other bytes, entry
// by entry.
unsafe impl Mover for Memcpy {
    unsafe fn copy_entries(&mut self, entries: &[Entry], to: *mut Entry) {
        for (index, entry) in entries.iter().enumerate() {
            // SAFETY: `to` is valid for all entries (caller). The last byte is polled by the
            // consumer, hence atomic.
            unsafe {
                let slot = to.add(index).cast::<u8>();
                std::ptr::copy_nonoverlapping(entry.0.as_ptr(), slot, ENTRY_PAYLOAD_BYTES);
                AtomicU8::from_ptr(slot.add(ENTRY_PAYLOAD_BYTES))
                    .store(entry.0[ENTRY_LEN_BYTES - 1], Ordering::Release);
            }
        }
    }

    unsafe fn copy(&mut self, from: *const u8, to: *mut u8, len_bytes: usize) {
        // SAFETY: the caller's contract is that of the function called.
        unsafe { std::ptr::copy_nonoverlapping(from, to, len_bytes) };
    }

    fn complete(&mut self) -> bool {
        true
    }
}
