//! A ring of buffers provided to the kernel: it fills one per received message and tells its id.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::{Error, Span};

/// One entry (io_uring UAPI, `struct io_uring_buf`); in entry 0 `resv` is the ring's tail.
#[repr(C)]
struct Entry {
    addr: u64,
    len: u32,
    bid: u16,
    resv: u16,
}

const _: () = assert!(size_of::<Entry>() == 16 && std::mem::offset_of!(Entry, resv) == 14);

/// The producer side of a provided-buffer ring. Made by [`crate::Reactor::register_buffer_ring`],
/// given back to [`crate::Reactor::unregister_buffer_ring`].
#[derive(Debug)]
pub struct BufferRing {
    entries: NonNull<Entry>,
    mask: u16,
    tail: u16,
    group: u16,
}

impl BufferRing {
    pub(crate) fn map(group: u16, entries: u16) -> Result<Self, Error> {
        if entries == 0 || !entries.is_power_of_two() || entries > 1 << 15 {
            return Err(Error::Argument(
                "a buffer ring has a power of two of entries, at most 32768",
            ));
        }
        let len = usize::from(entries) * size_of::<Entry>();
        // SAFETY: a new private mapping touches no existing object.
        let ptr = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::POPULATE,
            )
        }
        .map_err(|error| Error::Memory {
            what: "mapping a buffer ring",
            len_bytes: len as u64,
            source: error.into(),
        })?;
        Ok(Self {
            entries: NonNull::new(ptr.cast()).ok_or(Error::Argument("mmap returned null"))?,
            mask: entries - 1,
            tail: 0,
            group,
        })
    }

    /// The group number that operations name.
    #[must_use]
    pub const fn group(&self) -> u16 {
        self.group
    }

    /// Entries.
    #[must_use]
    pub const fn capacity(&self) -> u16 {
        self.mask + 1
    }

    /// Adds a buffer; the kernel sees it after [`BufferRing::publish`].
    ///
    /// # Safety
    /// The buffer stays mapped and is not read or written by anyone else until a completion hands
    /// `bid` back or the ring has been unregistered. There are never more than `capacity` buffers
    /// in the ring.
    pub unsafe fn push(&mut self, bid: u16, buffer: Span) {
        let slot = usize::from(self.tail & self.mask);
        // SAFETY: slot is below the entry count; fields are written one by one, so that `resv` of
        // entry 0, the shared tail, is not touched. The kernel reads them only below the tail.
        unsafe {
            let entry = self.entries.as_ptr().add(slot);
            (&raw mut (*entry).addr).write(buffer.as_ptr() as u64);
            (&raw mut (*entry).len).write(buffer.len());
            (&raw mut (*entry).bid).write(bid);
        }
        self.tail = self.tail.wrapping_add(1);
    }

    /// Shows the kernel what was pushed.
    pub fn publish(&mut self) {
        // SAFETY: entry 0 exists, `resv` is aligned to 2 and only accessed atomically.
        let tail = unsafe { AtomicU16::from_ptr(&raw mut (*self.entries.as_ptr()).resv) };
        tail.store(self.tail, Ordering::Release);
    }

    pub(crate) fn address(&self) -> u64 {
        self.entries.as_ptr() as u64
    }
}

impl Drop for BufferRing {
    fn drop(&mut self) {
        let len = usize::from(self.capacity()) * size_of::<Entry>();
        // SAFETY: our mapping. The kernel pins the ring's pages while it is registered, so it never
        // reads reused memory even if the reactor still has the group.
        let _ = unsafe { munmap(self.entries.as_ptr().cast(), len) };
    }
}
