//! The I/Os in flight of one channel, in slots made at start.

use flexblk_reactor::Buffer;

use crate::{IoBuffers, IoError, check::Extent};

/// What the kernel is doing for an I/O, or will as soon as there is a bounce buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// No I/O in this slot.
    Free,
    /// Read into the caller's memory.
    Read,
    /// Write from the caller's memory.
    Write,
    /// Read into the bounce buffer, then copy to the caller, compare, or forget.
    ReadBounced(Bounced),
    /// Write from the bounce buffer.
    WriteBounced,
    /// `fallocate` punch hole: what a discard, or a write zeroes that may unmap, tries first.
    Punch {
        /// Failing means going on with other ways to get zeroes.
        must_zero: bool,
    },
    /// `fallocate` zero range.
    ZeroRange,
    /// Write real zeroes.
    WriteZeroes,
    /// `fdatasync` behind a forced write zeroes.
    Sync,
    /// Waits for an `fdatasync` that it shares with others.
    Flush,
}

/// What happens to data in a bounce buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bounced {
    /// To the caller's memory.
    Copy,
    /// Must equal the caller's memory.
    Compare,
    /// It could be read: enough.
    Forget,
}

impl Step {
    pub(super) fn needs_bounce(self) -> bool {
        matches!(self, Self::ReadBounced(_) | Self::WriteBounced)
    }

    /// Whether the kernel made data durable in this step.
    pub(super) fn was_forced(self, force: bool) -> bool {
        match self {
            Self::Sync => true,
            Self::Write | Self::WriteBounced | Self::WriteZeroes => force,
            _ => false,
        }
    }

    /// How an errno of this step reads in NVMe's terms.
    pub(super) fn error(self, errno: i32) -> IoError {
        let reading = matches!(self, Self::Read | Self::ReadBounced(_));
        match errno {
            // EILSEQ and ENODATA: the block layer's protection and medium errors
            libc::EIO | libc::EILSEQ | libc::ENODATA | libc::EUCLEAN | libc::EBADMSG if reading => {
                IoError::MediaRead
            }
            libc::EIO | libc::EILSEQ | libc::ENODATA | libc::EUCLEAN => IoError::MediaWrite,
            libc::ENOSPC | libc::EDQUOT => IoError::NoSpace,
            libc::EROFS | libc::EPERM | libc::EBADF if !reading => IoError::ReadOnly,
            libc::EOPNOTSUPP | libc::ENOSYS => IoError::Unsupported,
            other => IoError::Io(other),
        }
    }
}

/// One I/O.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) tag: u64,
    pub(super) step: Step,
    pub(super) extent: Extent,
    /// Bytes of the extent that are finished.
    pub(super) done: u64,
    /// Bytes the kernel has been asked for.
    pub(super) asked: u32,
    pub(super) force: bool,
    /// `EAGAIN`, `EINTR` and fruitless rounds so far.
    pub(super) retries: u32,
    pub(super) data: IoBuffers,
    pub(super) bounce: Option<Buffer>,
}

impl Slot {
    pub(super) fn free() -> Self {
        Self {
            tag: 0,
            step: Step::Free,
            extent: Extent { offset: 0, len: 0 },
            done: 0,
            asked: 0,
            force: false,
            retries: 0,
            data: IoBuffers::none(),
            bounce: None,
        }
    }

    /// Device offset of the first byte that is not finished.
    pub(super) fn offset(&self) -> u64 {
        self.extent.offset + self.done
    }

    /// Bytes that are not finished.
    pub(super) fn rest(&self) -> u64 {
        self.extent.len.saturating_sub(self.done)
    }
}
