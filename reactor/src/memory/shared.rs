//! Memory that another process can map: an anonymous file, mapped here.
#![allow(unsafe_code)]

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::{Error, Span};

/// Whether to use large pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum HugePages {
    /// Ordinary pages.
    #[default]
    No,
    /// Reserved 2 MiB pages if there are enough, else transparent ones if the kernel likes, else
    /// ordinary ones.
    Try,
}

/// A memfd mapped read-write for as long as this object lives. Zeroed; pages appear when touched.
pub struct SharedMemory {
    fd: OwnedFd,
    ptr: NonNull<u8>,
    len_bytes: u64,
    mapped_bytes: usize,
    huge: bool,
}

// SAFETY: the mapping is plain memory reached only through raw copies (see `Span`).
unsafe impl Send for SharedMemory {}
// SAFETY: as for Send.
unsafe impl Sync for SharedMemory {}

const HUGE_PAGE_BYTES: u64 = 2 << 20;

impl SharedMemory {
    /// Creates and maps `len_bytes`; `name` shows up in `/proc/*/maps`.
    ///
    /// # Errors
    /// [`Error::Memory`] with the step that failed, [`Error::Argument`] for an unusable length.
    pub fn create(name: &str, len_bytes: u64, huge: HugePages) -> Result<Arc<Self>, Error> {
        if len_bytes == 0
            || usize::try_from(len_bytes).is_err()
            || i64::try_from(len_bytes).is_err()
        {
            return Err(Error::Argument(
                "shared memory needs a length between 1 byte and 2^63",
            ));
        }
        if huge == HugePages::Try {
            // Reserved huge pages: mmap fails at once when there are too few, so this is the probe.
            let rounded = len_bytes.next_multiple_of(HUGE_PAGE_BYTES);
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
            if let Ok(memory) = Self::create_with(name, len_bytes, rounded, flags, true) {
                return Ok(Arc::new(memory));
            }
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = Self::create_with(name, len_bytes, len_bytes, flags, false)?;
        // Nobody who gets the descriptor can shrink it under our mapping (SIGBUS).
        fcntl_add_seals(&memory.fd, SealFlags::SHRINK | SealFlags::SEAL).map_err(|error| {
            Error::Memory {
                what: "sealing shared memory",
                len_bytes,
                source: error.into(),
            }
        })?;
        if huge == HugePages::Try {
            // Advice only: with transparent_hugepage/shmem_enabled = never it changes nothing.
            // SAFETY: the range is our mapping; the advice does not change its contents.
            let _ = unsafe {
                madvise(
                    memory.ptr.as_ptr().cast(),
                    memory.mapped_bytes,
                    Advice::LinuxHugepage,
                )
            };
        }
        Ok(Arc::new(memory))
    }

    /// Maps the first `len_bytes` of memory that another process made: a virtual machine's, for example. Whoever
    /// holds the descriptor can truncate the file, unless it is sealed against that; the accesses that follow then
    /// end this process with SIGBUS.
    ///
    /// # Errors
    /// [`Error::Argument`] when the file is shorter, [`Error::Memory`] when it cannot be mapped readable and writable.
    pub fn map(fd: OwnedFd, len_bytes: u64) -> Result<Arc<Self>, Error> {
        let failed = |what| {
            move |error: rustix::io::Errno| Error::Memory {
                what,
                len_bytes,
                source: error.into(),
            }
        };
        let stat = rustix::fs::fstat(&fd).map_err(failed("looking at shared memory"))?;
        let file_bytes = u64::try_from(stat.st_size).unwrap_or(0);
        if len_bytes == 0 || len_bytes > file_bytes {
            return Err(Error::Argument("shared memory ends beyond its file"));
        }
        // Whole pages, of whatever size the file has them: otherwise huge ones cannot be unmapped.
        let page_bytes = u64::try_from(stat.st_blksize).unwrap_or(0).max(4096);
        let mapped_bytes = len_bytes
            .checked_next_multiple_of(page_bytes)
            .and_then(|bytes| usize::try_from(bytes).ok())
            .ok_or(Error::Argument(
                "shared memory is larger than the address space",
            ))?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing object.
        let ptr = unsafe {
            mmap(
                std::ptr::null_mut(),
                mapped_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )
        }
        .map_err(failed("mapping shared memory"))?;
        let ptr = NonNull::new(ptr.cast()).ok_or(Error::Argument("mmap returned null"))?;
        Ok(Arc::new(Self {
            fd,
            ptr,
            len_bytes,
            mapped_bytes,
            huge: false,
        }))
    }

    fn create_with(
        name: &str,
        len_bytes: u64,
        file_bytes: u64,
        flags: MemfdFlags,
        huge: bool,
    ) -> Result<Self, Error> {
        let failed = |what| {
            move |error: rustix::io::Errno| Error::Memory {
                what,
                len_bytes,
                source: error.into(),
            }
        };
        let fd = memfd_create(name, flags).map_err(failed("creating shared memory"))?;
        ftruncate(&fd, file_bytes).map_err(failed("sizing shared memory"))?;
        let mapped_bytes = file_bytes as usize;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing object.
        let ptr = unsafe {
            mmap(
                std::ptr::null_mut(),
                mapped_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )
        }
        .map_err(failed("mapping shared memory"))?;
        let ptr = NonNull::new(ptr.cast()).ok_or(Error::Argument("mmap returned null"))?;
        Ok(Self {
            fd,
            ptr,
            len_bytes,
            mapped_bytes,
            huge,
        })
    }

    /// The descriptor, for passing to another process.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> u64 {
        self.len_bytes
    }

    /// Whether reserved huge pages back it.
    #[must_use]
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    /// The first byte.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Makes every page present now, so that no page fault happens later.
    ///
    /// # Errors
    /// [`Error::Memory`] when there is not enough.
    pub fn populate(&self) -> Result<(), Error> {
        // SAFETY: the range is our mapping; populating does not change its contents.
        let done = unsafe {
            madvise(
                self.ptr.as_ptr().cast(),
                self.mapped_bytes,
                Advice::LinuxPopulateWrite,
            )
        };
        match done {
            // EINVAL: before Linux 5.14. Pages then appear when touched, which is only slower.
            Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
            Err(error) => Err(Error::Memory {
                what: "populating shared memory",
                len_bytes: self.len_bytes,
                source: error.into(),
            }),
        }
    }

    /// `len` bytes from `offset`, if they lie inside. The caller keeps the `Arc` for as long as the
    /// span is used: that is the loan.
    #[must_use]
    pub fn span(&self, offset: u64, len: u32) -> Option<Span> {
        if offset.checked_add(u64::from(len))? > self.len_bytes {
            return None;
        }
        // SAFETY: inside the mapping by the check above, which lives as long as self; see the doc
        // for who keeps it alive.
        Some(unsafe { Span::from_raw_parts(self.ptr.add(offset as usize), len) })
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: ptr and mapped_bytes are those of our mmap; loans have ended by their contract.
        let _ = unsafe { munmap(self.ptr.as_ptr().cast(), self.mapped_bytes) };
    }
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedMemory")
            .field("len_bytes", &self.len_bytes)
            .field("huge", &self.huge)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_mapping_of_the_descriptor_sees_the_same_bytes() {
        let memory = SharedMemory::create("test", 100_000, HugePages::No).unwrap();
        memory.span(99_996, 4).unwrap().copy_from_slice(b"tail");
        assert!(memory.span(99_997, 4).is_none() && memory.span(u64::MAX, 1).is_none());
        let mut tail = [0_u8; 4];
        rustix::io::pread(memory.fd(), &mut tail, 99_996).unwrap();
        assert_eq!(&tail, b"tail");
        assert!(
            ftruncate(memory.fd(), 10).is_err(),
            "sealed against shrinking"
        );
        memory.populate().unwrap();
        memory.span(99_996, 4).unwrap().copy_to_slice(&mut tail);
        assert_eq!(&tail, b"tail");
    }

    #[test]
    fn memory_of_another_process_is_mapped_only_as_far_as_it_goes() {
        let made = SharedMemory::create("made", 3 * 4096, HugePages::No).unwrap();
        let fd = || made.fd().try_clone_to_owned().unwrap();
        let mapped = SharedMemory::map(fd(), 5000).unwrap();
        made.span(4996, 4).unwrap().copy_from_slice(b"here");
        let mut seen = [0_u8; 4];
        mapped.span(4996, 4).unwrap().copy_to_slice(&mut seen);
        assert_eq!((&seen, mapped.len()), (b"here", 5000));
        assert!(mapped.span(4997, 4).is_none());
        for len in [0, 3 * 4096 + 1, u64::MAX] {
            assert!(SharedMemory::map(fd(), len).is_err(), "{len}");
        }
        let (read_only, _) = rustix::pipe::pipe().unwrap();
        assert!(SharedMemory::map(read_only, 1).is_err());
    }

    #[test]
    fn huge_pages_are_never_required() {
        let memory = SharedMemory::create("huge", 3 << 20, HugePages::Try).unwrap();
        assert_eq!(memory.len(), 3 << 20);
        memory.span((3 << 20) - 1, 1).unwrap().fill(1);
        assert!(SharedMemory::create("none", 0, HugePages::No).is_err());
        assert!(SharedMemory::create("all", u64::MAX, HugePages::No).is_err());
    }
}
