//! What a queue pair is asked to do, and how it answers.

use flexblk_nvme::{Nsid, Status};
use flexblk_reactor::Span;

/// One I/O command, in the namespace's own logical blocks.
///
/// `buffer` is lent to the queue pair from [`submit`](crate::QueuePair::submit) until the
/// command's completion is handed out (or the queue pair is closed or dropped): until then the
/// memory stays mapped and nobody else changes it (for reads: looks at it).
#[derive(Clone, Copy)]
pub struct Command {
    /// What to do.
    pub op: Op,
    /// The namespace.
    pub nsid: Nsid,
    /// First logical block. Ignored by [`Op::Flush`].
    pub lba: u64,
    /// Number of logical blocks. Ignored by [`Op::Flush`].
    pub blocks: u32,
    /// The data: exactly `blocks` times the block size for reads, writes and compares, else `None`.
    pub buffer: Option<Span>,
}

/// The operations of the NVM command set that a queue pair carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Op {
    /// Read blocks into the buffer.
    Read,
    /// Write blocks from the buffer.
    Write {
        /// Force unit access: complete only when the data is on stable media.
        fua: bool,
    },
    /// Make every completed write of the namespace durable.
    Flush,
    /// Write zeroes without transferring them.
    WriteZeroes {
        /// The controller may deallocate the blocks instead of writing them.
        deallocate: bool,
    },
    /// Deallocate one range (Dataset Management). Several ranges at once: [`submit_discard`](crate::QueuePair::submit_discard).
    Discard,
    /// Compare the blocks with the buffer.
    Compare,
    /// Let the controller read and check the blocks without transferring them.
    Verify,
}

/// One range of a discard with several ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardRange {
    /// First logical block.
    pub lba: u64,
    /// Number of logical blocks.
    pub blocks: u32,
}

impl Command {
    /// A read of `blocks` blocks into `buffer`.
    pub fn read(nsid: Nsid, lba: u64, blocks: u32, buffer: Span) -> Command {
        Command {
            op: Op::Read,
            nsid,
            lba,
            blocks,
            buffer: Some(buffer),
        }
    }

    /// A write of `blocks` blocks from `buffer`.
    pub fn write(nsid: Nsid, lba: u64, blocks: u32, buffer: Span) -> Command {
        Command {
            op: Op::Write { fua: false },
            nsid,
            lba,
            blocks,
            buffer: Some(buffer),
        }
    }

    /// A flush of the whole namespace.
    pub fn flush(nsid: Nsid) -> Command {
        Command {
            op: Op::Flush,
            nsid,
            lba: 0,
            blocks: 0,
            buffer: None,
        }
    }

    /// A command that carries no data: write zeroes, discard, verify.
    pub fn without_data(op: Op, nsid: Nsid, lba: u64, blocks: u32) -> Command {
        Command {
            op,
            nsid,
            lba,
            blocks,
            buffer: None,
        }
    }
}

/// The queue pair holds as many commands as it can: poll, then submit again. The command was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("every slot of the queue is in use")]
pub struct Busy;

/// The end of a submitted command; there is exactly one for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoCompletion {
    /// What the caller passed to `submit`.
    pub tag: u64,
    /// How it went.
    pub result: Result<(), IoError>,
}

/// Why a command failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IoError {
    /// The controller completed the command with this status.
    #[error("{0}")]
    Nvme(Status),
    /// The command could not be sent as it was given.
    #[error("invalid command: {0}")]
    Invalid(InvalidCommand),
    /// No answer within the I/O time-out; the connection was torn down.
    #[error("no answer within the I/O time-out")]
    TimedOut,
    /// The connection was lost while the command was outstanding; it may or may not have been executed.
    #[error("connection lost")]
    ConnectionLost,
    /// The caller closed the queue pair while the command was outstanding; it may or may not have been executed.
    #[error("queue pair closed")]
    Closed,
}

/// What is wrong with a command that was never sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidCommand {
    /// `nsid` is no active namespace of this controller.
    #[error("no such namespace")]
    Namespace,
    /// No blocks, or more than one command may carry.
    #[error("number of blocks is 0 or more than one command may carry")]
    Blocks,
    /// The buffer is missing, superfluous, or not `blocks` times the block size.
    #[error("the buffer does not fit the number of blocks")]
    Buffer,
    /// The namespace ends before the last block.
    #[error("beyond the end of the namespace")]
    OutOfRange,
    /// No range, or more than 256.
    #[error("a discard takes 1 to 256 ranges")]
    Ranges,
    /// The controller does not have this command.
    #[error("the controller does not support this command")]
    Unsupported,
}

impl IoError {
    /// The errno that a block device would report.
    pub fn errno(&self) -> i32 {
        crate::error::errno_of(self)
    }
}
