//! What every device checks before it starts an I/O.

use crate::{Caps, Io, IoError, IoOp};

/// The fixed facts an I/O is checked against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) block_size: u32,
    pub(crate) max_io_bytes: u32,
    pub(crate) caps: Caps,
}

/// The bytes of the device that an accepted I/O is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Limits {
    /// The extent of an I/O on a device that has `block_count` blocks now; empty for a flush.
    pub(crate) fn check(&self, io: &Io, block_count: u64) -> Result<Extent, IoError> {
        if io.op == IoOp::Flush {
            return Ok(Extent { offset: 0, len: 0 });
        }
        if io.op.modifies() && self.caps.contains(Caps::READ_ONLY) {
            return Err(IoError::ReadOnly);
        }
        if io.op == IoOp::Discard && !self.caps.contains(Caps::DISCARD) {
            return Err(IoError::Unsupported);
        }
        let extent = self
            .extent(io.lba, io.blocks, block_count)
            .ok_or(IoError::OutOfRange)?;
        if io.op.has_data()
            && (io.data.len_bytes() != extent.len || extent.len > u64::from(self.max_io_bytes))
        {
            return Err(IoError::Invalid);
        }
        Ok(extent)
    }

    /// The extent of a range of blocks, if it lies within `block_count`.
    pub(crate) fn extent(&self, lba: u64, blocks: u32, block_count: u64) -> Option<Extent> {
        let end = lba.checked_add(u64::from(blocks))?;
        let block_size = u64::from(self.block_size);
        // block_count * block_size fits 63 bits (checked when the device was made), hence so does this
        (end <= block_count).then_some(Extent {
            offset: lba * block_size,
            len: u64::from(blocks) * block_size,
        })
    }
}
