//! Memory that lives as long as its last user: an anonymous file that another process can map, or pages of our own.
#![allow(unsafe_code)]

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::{Error, Span};

/// Whether to use large pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum HugePages {
    /// Not asked for: what the kernel does by itself.
    #[default]
    No,
    /// Transparent ones where the kernel does not refuse them altogether (Linux
    /// `Documentation/admin-guide/mm/transhuge.rst`). To make room for one it may move other memory about while the
    /// thread that touches the page waits, for up to seconds: [`SharedMemory::populate`] before it matters.
    Transparent,
    /// Reserved 2 MiB pages if there are enough, else as [`HugePages::Transparent`].
    Try,
}

/// Memory mapped read-write for as long as this object lives. Zeroed; pages appear when touched.
pub struct SharedMemory {
    fd: Option<OwnedFd>,
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
const PAGE_BYTES: usize = 4096;

impl SharedMemory {
    /// Creates and maps an anonymous file of `len_bytes`; `name` shows up in `/proc/*/maps`. Transparent huge pages
    /// are rarely had here: `transparent_hugepage/shmem_enabled` is `never` by default.
    ///
    /// # Errors
    /// [`Error::Memory`] with the step that failed, [`Error::Argument`] for an unusable length.
    pub fn create(name: &str, len_bytes: u64, huge: HugePages) -> Result<Arc<Self>, Error> {
        check_length(len_bytes)?;
        if huge == HugePages::Try
            && let Some(memory) = Self::reserved(name, len_bytes)
        {
            return Ok(Arc::new(memory));
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = Self::create_with(name, len_bytes, len_bytes, flags, false)?;
        // Nobody who gets the descriptor can shrink it under our mapping (SIGBUS).
        if let Some(fd) = &memory.fd {
            fcntl_add_seals(fd, SealFlags::SHRINK | SealFlags::SEAL)
                .map_err(failed("sealing shared memory", len_bytes))?;
        }
        memory.advise(huge);
        Ok(Arc::new(memory))
    }

    /// Maps `len_bytes` that no other process can have, unless they are of reserved huge pages. The kernel backs such
    /// memory with transparent huge pages where they are wanted, unless it is told `never`.
    ///
    /// # Errors
    /// As [`SharedMemory::create`].
    pub fn private(name: &str, len_bytes: u64, huge: HugePages) -> Result<Arc<Self>, Error> {
        check_length(len_bytes)?;
        if huge == HugePages::Try
            && let Some(memory) = Self::reserved(name, len_bytes)
        {
            return Ok(Arc::new(memory));
        }
        let mapped_bytes = len_bytes as usize;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing object.
        let ptr = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                mapped_bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(failed("mapping memory", len_bytes))?;
        let memory = Self {
            fd: None,
            ptr: NonNull::new(ptr.cast()).ok_or(Error::Argument("mmap returned null"))?,
            len_bytes,
            mapped_bytes,
            huge: false,
        };
        memory.advise(huge);
        Ok(Arc::new(memory))
    }

    /// Memory of reserved huge pages: mmap fails at once when there are too few, so this is the probe.
    fn reserved(name: &str, len_bytes: u64) -> Option<Self> {
        let rounded = len_bytes.next_multiple_of(HUGE_PAGE_BYTES);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        Self::create_with(name, len_bytes, rounded, flags, true).ok()
    }

    /// Tells the kernel that huge pages are wanted. It may do otherwise.
    fn advise(&self, huge: HugePages) {
        if huge == HugePages::No {
            return;
        }
        let (start, len) = (self.ptr.as_ptr().cast(), self.mapped_bytes);
        // SAFETY: the range is our mapping; the advice does not change its contents.
        let _ = unsafe { madvise(start, len, Advice::LinuxHugepage) };
    }

    /// Maps the first `len_bytes` of memory that another process made: a virtual machine's, for example. Whoever
    /// holds the descriptor can truncate the file, unless it is sealed against that; the accesses that follow then
    /// end this process with SIGBUS.
    ///
    /// # Errors
    /// [`Error::Argument`] when the file is shorter, [`Error::Memory`] when it cannot be mapped readable and writable.
    pub fn map(fd: OwnedFd, len_bytes: u64) -> Result<Arc<Self>, Error> {
        let stat = rustix::fs::fstat(&fd).map_err(failed("looking at shared memory", len_bytes))?;
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
        .map_err(failed("mapping shared memory", len_bytes))?;
        let ptr = NonNull::new(ptr.cast()).ok_or(Error::Argument("mmap returned null"))?;
        Ok(Arc::new(Self {
            fd: Some(fd),
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
        let fd = memfd_create(name, flags).map_err(failed("creating shared memory", len_bytes))?;
        ftruncate(&fd, file_bytes).map_err(failed("sizing shared memory", len_bytes))?;
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
        .map_err(failed("mapping shared memory", len_bytes))?;
        let ptr = NonNull::new(ptr.cast()).ok_or(Error::Argument("mmap returned null"))?;
        Ok(Self {
            fd: Some(fd),
            ptr,
            len_bytes,
            mapped_bytes,
            huge,
        })
    }

    /// The descriptor, for passing to another process; private memory has none.
    #[must_use]
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
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
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(error) => Err(failed("populating shared memory", self.len_bytes)(error)),
        }
    }

    /// Makes a range zero and gives the pages that lie in it back to the kernel. The caller sees to it that nobody
    /// else is at these bytes meanwhile.
    pub fn zero(&self, offset: u64, len: u32) {
        let Some(span) = self.span(offset, len) else {
            debug_assert!(false, "{len} bytes from {offset} of {}", self.len_bytes);
            return;
        };
        // Without memory for the kernel's bookkeeping, say, zeroes are still what was asked for.
        if len != 0 && !self.give_back(offset, &span) {
            span.fill(0);
        }
    }

    /// True: done.
    fn give_back(&self, offset: u64, span: &Span) -> bool {
        let Some(fd) = &self.fd else {
            return give_back_private(span);
        };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match fallocate(fd, flags, offset, span.len().into()) {
                Err(Errno::INTR) => {}
                done => return done.is_ok(),
            }
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

/// Whole pages are dropped and read as zeroes from then on (madvise(2), `MADV_DONTNEED`); what hangs over is filled.
fn give_back_private(span: &Span) -> bool {
    let start = span.as_ptr() as usize;
    let (first, end) = (
        start.next_multiple_of(PAGE_BYTES),
        (start + span.len() as usize) / PAGE_BYTES * PAGE_BYTES,
    );
    if first >= end {
        return false;
    }
    let (head, tail) = ((first - start) as u32, (end - start) as u32);
    let parts = [span.sub(0, head), span.sub(tail, span.len() - tail)];
    parts.iter().flatten().for_each(|part| part.fill(0));
    let pages = span.as_ptr().wrapping_add(head as usize);
    // SAFETY: whole pages inside of the span, which is ours to overwrite.
    let done = unsafe { madvise(pages.cast(), end - first, Advice::LinuxDontNeed) };
    done.is_ok()
}

/// For `map_err`: which step failed, of how much memory.
fn failed(what: &'static str, len_bytes: u64) -> impl Fn(Errno) -> Error {
    move |error| Error::Memory {
        what,
        len_bytes,
        source: error.into(),
    }
}

fn check_length(len_bytes: u64) -> Result<(), Error> {
    match (usize::try_from(len_bytes), i64::try_from(len_bytes)) {
        (Ok(1..), Ok(_)) => Ok(()),
        _ => Err(Error::Argument(
            "shared memory needs a length between 1 byte and 2^63",
        )),
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
        rustix::io::pread(memory.fd().unwrap(), &mut tail, 99_996).unwrap();
        assert_eq!(&tail, b"tail");
        assert!(
            ftruncate(memory.fd().unwrap(), 10).is_err(),
            "sealed against shrinking"
        );
        memory.populate().unwrap();
        memory.span(99_996, 4).unwrap().copy_to_slice(&mut tail);
        assert_eq!(&tail, b"tail");
    }

    #[test]
    fn memory_of_another_process_is_mapped_only_as_far_as_it_goes() {
        let made = SharedMemory::create("made", 3 * 4096, HugePages::No).unwrap();
        let fd = || made.fd().unwrap().try_clone_to_owned().unwrap();
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
    fn what_is_zeroed_is_exactly_what_was_named_and_its_pages_go() {
        const LEN: u32 = 8 << 20;
        for huge in [HugePages::No, HugePages::Transparent] {
            for memory in [SharedMemory::create, SharedMemory::private]
                .map(|make| make("zero", LEN.into(), huge).unwrap())
            {
                let whole = memory.span(0, LEN).unwrap();
                for (offset, len) in [
                    (1 << 20, 4 << 20),
                    (4096, 4096),
                    (5000, 100),
                    (4000, 10_000),
                    (LEN - 4096, 4096),
                    (10, 0),
                ] {
                    whole.fill(7);
                    memory.zero(offset.into(), len);
                    // SAFETY: nobody else has this memory.
                    let bytes = unsafe { whole.as_slice() };
                    let (before, rest) = bytes.split_at(offset as usize);
                    let (zeroed, after) = rest.split_at(len as usize);
                    assert!(zeroed.iter().all(|byte| *byte == 0), "{len} at {offset}");
                    assert!(before.iter().chain(after).all(|byte| *byte == 7));
                }
            }
        }
    }

    #[test]
    fn huge_pages_are_never_required() {
        for make in [SharedMemory::create, SharedMemory::private] {
            for huge in [HugePages::Try, HugePages::Transparent] {
                let memory = make("huge", 3 << 20, huge).unwrap();
                assert_eq!(memory.len(), 3 << 20);
                memory.span((3 << 20) - 1, 1).unwrap().fill(1);
            }
        }
        assert!(SharedMemory::create("none", 0, HugePages::No).is_err());
        assert!(SharedMemory::create("all", u64::MAX, HugePages::No).is_err());
    }
}
