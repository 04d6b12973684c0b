//! One I/O: what is asked, its memory, and how it ends.

use arrayvec::ArrayVec;
use flexblk_reactor::Span;

/// Pieces of memory that one I/O may consist of.
pub const MAX_SPANS: usize = 16;

/// What an I/O does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoOp {
    /// Device to memory.
    Read,
    /// Memory to device.
    Write {
        /// Force unit access: done only when it would survive a power loss.
        fua: bool,
    },
    /// Everything that had completed on the device, through any channel, before this was submitted
    /// survives a power loss once this has completed. Carries no range.
    Flush,
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// The space may be given back.
        unmap: bool,
        /// As for a write.
        fua: bool,
    },
    /// The space of the range may be given back; it reads as zeroes or as before.
    Discard,
    /// Succeeds if device and memory hold the same bytes.
    Compare,
    /// Reads the range, and says only whether that worked.
    Verify,
}

impl IoOp {
    /// Whether the I/O has data of `blocks` blocks with it.
    #[must_use]
    pub const fn has_data(self) -> bool {
        matches!(self, Self::Read | Self::Write { .. } | Self::Compare)
    }

    /// Whether the I/O may change what the device holds.
    #[must_use]
    pub const fn modifies(self) -> bool {
        matches!(
            self,
            Self::Write { .. } | Self::WriteZeroes { .. } | Self::Discard
        )
    }
}

/// The memory of an I/O, in order. It is lent to the device until the I/O is done (see
/// [`flexblk_reactor::Span`] for what the lender promises).
#[derive(Clone, Debug, Default)]
pub struct IoBuffers {
    /// The pieces; their lengths sum to the length of the I/O.
    pub spans: ArrayVec<Span, MAX_SPANS>,
    /// Index of the reactor's registered buffer that contains the span, if there is only one.
    pub fixed: Option<u16>,
}

impl IoBuffers {
    /// No memory: for flush, write zeroes, discard and verify.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// One piece.
    #[must_use]
    pub fn one(span: Span) -> Self {
        let mut spans = ArrayVec::new();
        spans.push(span);
        Self { spans, fixed: None }
    }

    /// One piece that lies in the registered buffer `index`.
    #[must_use]
    pub fn fixed(span: Span, index: u16) -> Self {
        Self {
            fixed: Some(index),
            ..Self::one(span)
        }
    }

    /// Bytes of all pieces.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.spans.iter().map(|span| u64::from(span.len())).sum()
    }
}

/// An I/O as given to [`crate::Channel::submit`].
#[derive(Clone, Debug)]
pub struct Io {
    /// The caller's; comes back in [`IoDone`].
    pub tag: u64,
    /// What to do.
    pub op: IoOp,
    /// First block. Not looked at for a flush.
    pub lba: u64,
    /// Number of blocks. Not looked at for a flush; 0 does nothing.
    pub blocks: u32,
    /// Memory, for the operations that [have data](IoOp::has_data).
    pub data: IoBuffers,
}

impl Io {
    /// A flush.
    #[must_use]
    pub fn flush(tag: u64) -> Self {
        Self {
            tag,
            op: IoOp::Flush,
            lba: 0,
            blocks: 0,
            data: IoBuffers::none(),
        }
    }
}

/// What became of an I/O when it was submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Submitted {
    /// It is done; no [`IoDone`] follows.
    Done(Result<(), IoError>),
    /// An [`IoDone`] with its tag will come out of [`crate::Channel::complete`].
    Pending,
}

/// The end of an I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoDone {
    /// The tag of the [`Io`].
    pub tag: u64,
    /// How it ended.
    pub result: Result<(), IoError>,
}

/// Why an I/O failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum IoError {
    /// The range does not lie within the device.
    #[error("the range is outside the device")]
    OutOfRange,
    /// The memory's length is not the I/O's length, or the I/O is longer than
    /// [`crate::Info::max_io_bytes`].
    #[error("the length of the memory does not fit the I/O")]
    Invalid,
    /// The medium could not be read.
    #[error("unrecovered read error")]
    MediaRead,
    /// The medium could not be written.
    #[error("write fault")]
    MediaWrite,
    /// A compare found different bytes.
    #[error("compare mismatch")]
    CompareMismatch,
    /// The file system or the thin device below is full.
    #[error("no space left")]
    NoSpace,
    /// The device is read-only.
    #[error("the device is read-only")]
    ReadOnly,
    /// The device cannot do this.
    #[error("not supported by the device")]
    Unsupported,
    /// The channel has [`crate::Channel::depth`] I/Os in flight. Nothing was done; submit again
    /// after one has ended.
    #[error("too many I/Os in flight")]
    Busy,
    /// An NVMe status, from a device that has one.
    #[error("NVMe status type {sct:x}h, code {sc:x}h")]
    Nvme {
        /// Status code type (Base 4.2.3, SCT).
        sct: u8,
        /// Status code.
        sc: u8,
    },
    /// Another error of the operating system, as errno.
    #[error("{}", std::io::Error::from_raw_os_error(*.0))]
    Io(i32),
}
