//! What a host asks for, in bytes, and the requests to the volume that it becomes.

use std::collections::VecDeque;

use flexblk_nvme::command::nvm::MAX_BLOCKS;
use flexblk_reactor::Span;

use crate::volume::Request;
use crate::{Busy, InvalidCommand, IoCompletion, IoError, MaxBlocks, Namespace, Op};

/// Parts of one request without data that are under way at a time: a discard of a whole disk shall not fill the queue.
const PARTS_WITHOUT_DATA: u32 = 4;

/// A namespace as an export offers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Bytes per logical block, a power of two.
    pub(crate) block_bytes: u32,
    /// Capacity.
    pub(crate) len_bytes: u64,
    /// Longest transfer of one request, a multiple of the block size.
    pub(crate) max_transfer_bytes: u32,
    /// Longest commands without data.
    pub(crate) max_without_data: MaxBlocks,
}

/// Logical blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) lba: u64,
    pub(crate) blocks: u64,
}

/// Why a byte range is no range of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// Offset or length is not a multiple of the block size.
    #[error("not a multiple of the block size")]
    Unaligned,
    /// It ends after the last block.
    #[error("beyond the end of the namespace")]
    OutOfRange,
}

impl Geometry {
    /// `None` for a block size that is no power of two of 512 and more.
    pub(crate) fn of(namespace: &Namespace) -> Option<Geometry> {
        let block_bytes = namespace.block_size;
        if !block_bytes.is_power_of_two() || block_bytes < 512 {
            return None;
        }
        let max_blocks = (namespace.max_transfer_bytes / block_bytes).clamp(1, MAX_BLOCKS);
        Some(Geometry {
            block_bytes,
            len_bytes: namespace.len_bytes(),
            max_transfer_bytes: max_blocks.checked_mul(block_bytes)?,
            max_without_data: namespace.max_blocks,
        })
    }

    /// The blocks of a byte range.
    #[inline]
    pub(crate) fn extent(&self, offset: u64, len_bytes: u64) -> Result<Extent, Refusal> {
        let mask = u64::from(self.block_bytes) - 1;
        let end = offset.checked_add(len_bytes).ok_or(Refusal::OutOfRange)?;
        if end > self.len_bytes {
            return Err(Refusal::OutOfRange);
        }
        if (offset | len_bytes) & mask != 0 {
            return Err(Refusal::Unaligned);
        }
        let shift = self.block_bytes.trailing_zeros();
        Ok(Extent {
            lba: offset >> shift,
            blocks: len_bytes >> shift,
        })
    }
}

/// One request of the host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) op: Op,
    /// Ignored by [`Op::Flush`].
    pub(crate) extent: Extent,
    /// A flush follows when it has succeeded: for what has no FUA of its own.
    pub(crate) then_flush: bool,
}

/// A request of the host is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    /// As given to [`Requests::begin`].
    pub(crate) user: u64,
    /// Success, or the first error.
    pub(crate) result: Result<(), IoError>,
}

/// The host's requests under way, a fixed number. Those that the target cannot take in one are cut; the parts run at
/// the same time.
#[derive(Debug)]
pub(crate) struct Requests {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// With parts to be submitted, in order.
    waiting: VecDeque<u32>,
    block_bytes: u32,
    max_blocks: u32,
    max_without_data: MaxBlocks,
}

#[derive(Debug)]
struct Slot {
    wanted: Wanted,
    user: u64,
    /// Not submitted yet.
    left: Extent,
    /// Its memory; what is before `span` and `span_offset` is submitted.
    spans: Vec<Span>,
    span: usize,
    span_offset: u32,
    parts: u32,
    /// Flushes still to be submitted: 0 or 1.
    flushes: u32,
    queued: bool,
    result: Result<(), IoError>,
}

/// What can be submitted next of a request.
enum Next {
    Part(Request),
    /// Not before a part has ended.
    Wait,
    /// All is submitted.
    Nothing,
}

impl Requests {
    /// Up to `count` at once.
    pub(crate) fn new(count: u32, geometry: &Geometry) -> Requests {
        let empty = Slot {
            wanted: Wanted {
                op: Op::Flush,
                extent: Extent { lba: 0, blocks: 0 },
                then_flush: false,
            },
            user: 0,
            left: Extent { lba: 0, blocks: 0 },
            spans: Vec::new(),
            span: 0,
            span_offset: 0,
            parts: 0,
            flushes: 0,
            queued: false,
            result: Ok(()),
        };
        Requests {
            slots: (0..count)
                .map(|_| Slot {
                    spans: Vec::with_capacity(4),
                    ..empty
                })
                .collect(),
            free: (0..count).rev().collect(),
            waiting: VecDeque::with_capacity(count as usize),
            block_bytes: geometry.block_bytes,
            max_blocks: geometry.max_transfer_bytes / geometry.block_bytes,
            max_without_data: geometry.max_without_data,
        }
    }

    /// Whether another one fits.
    pub(crate) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Requests under way.
    pub(crate) fn outstanding(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes a request, to be submitted by [`submit`](Self::submit). `spans` is its memory, lent until it has ended,
    /// in pieces of whole blocks that together have its length; empty for what carries no data.
    pub(crate) fn begin(
        &mut self,
        wanted: &Wanted,
        spans: impl IntoIterator<Item = Span>,
        user: u64,
    ) -> Result<(), Busy> {
        let index = self.free.pop().ok_or(Busy)?;
        let Some(slot) = self.slots.get_mut(index as usize) else {
            return Err(Busy);
        };
        slot.wanted = *wanted;
        slot.user = user;
        slot.left = wanted.extent;
        slot.spans.clear();
        slot.spans.extend(spans);
        (slot.span, slot.span_offset, slot.parts) = (0, 0, 0);
        slot.flushes = 0;
        if wanted.op == Op::Flush {
            slot.left.blocks = 0;
            slot.flushes = 1;
        }
        slot.result = Ok(());
        slot.queued = true;
        self.waiting.push_back(index);
        Ok(())
    }

    /// Submits what there is room for. A request that needs none (no blocks) ends at once, into `ended`.
    pub(crate) fn submit(
        &mut self,
        mut submit: impl FnMut(&Request, u64) -> Result<(), Busy>,
        ended: &mut Vec<Ended>,
    ) {
        while let Some(&index) = self.waiting.front() {
            let Some(slot) = self.slots.get_mut(index as usize) else {
                self.waiting.pop_front();
                continue;
            };
            loop {
                match slot.next(self.block_bytes, self.max_blocks, &self.max_without_data) {
                    Next::Part(part) => {
                        if submit(&part, u64::from(index)).is_err() {
                            return;
                        }
                        slot.submitted(&part, self.block_bytes);
                    }
                    Next::Wait => break,
                    Next::Nothing => {
                        if slot.parts == 0 {
                            ended.push(Ended {
                                user: slot.user,
                                result: slot.result,
                            });
                            self.free.push(index);
                        }
                        break;
                    }
                }
            }
            slot.queued = false;
            self.waiting.pop_front();
        }
    }

    /// A part has ended; perhaps its request with it.
    pub(crate) fn completed(&mut self, completion: &IoCompletion) -> Option<Ended> {
        let index = u32::try_from(completion.tag).ok()?;
        let slot = self.slots.get_mut(index as usize)?;
        slot.parts = slot.parts.checked_sub(1)?;
        if let Err(error) = completion.result {
            slot.result = slot.result.and(Err(error));
            slot.left.blocks = 0;
            slot.flushes = 0;
        }
        if slot.parts == 0 && slot.left.blocks == 0 && slot.flushes == 0 {
            if slot.wanted.then_flush && slot.result.is_ok() {
                slot.wanted.then_flush = false;
                slot.flushes = 1;
            } else if !slot.queued {
                let ended = Ended {
                    user: slot.user,
                    result: slot.result,
                };
                self.free.push(index);
                return Some(ended);
            }
        }
        if !slot.queued && (slot.left.blocks > 0 || slot.flushes > 0) {
            slot.queued = true;
            self.waiting.push_back(index);
        }
        None
    }
}

impl Slot {
    fn next(&mut self, block_bytes: u32, max_blocks: u32, without_data: &MaxBlocks) -> Next {
        if self.left.blocks == 0 {
            if self.flushes == 0 && self.parts == 0 && self.wanted.then_flush && self.result.is_ok()
            {
                // It had no blocks.
                self.wanted.then_flush = false;
                self.flushes = 1;
            }
            if self.flushes == 0 {
                return Next::Nothing;
            }
            return Next::Part(Request {
                op: Op::Flush,
                lba: 0,
                blocks: 0,
                buffer: None,
            });
        }
        let op = self.wanted.op;
        let carries_data = matches!(op, Op::Read | Op::Write { .. } | Op::Compare);
        if !carries_data {
            if self.parts >= PARTS_WITHOUT_DATA {
                return Next::Wait;
            }
            let most = without_data.for_op(op);
            return Next::Part(Request {
                op,
                lba: self.left.lba,
                blocks: self.left.blocks.min(u64::from(most)) as u32,
                buffer: None,
            });
        }
        let most = self.left.blocks.min(u64::from(max_blocks)) as u32;
        let piece = self.spans.get(self.span).and_then(|span| {
            let blocks = most.min((span.len() - self.span_offset) / block_bytes);
            let buffer = span.sub(self.span_offset, blocks * block_bytes)?;
            (blocks > 0).then_some((blocks, buffer))
        });
        let Some((blocks, buffer)) = piece else {
            // Memory that is too short or not of whole blocks: the caller's mistake, not one to corrupt data by.
            debug_assert!(false, "the memory does not fit the blocks");
            self.result = self
                .result
                .and(Err(IoError::Invalid(InvalidCommand::Buffer)));
            self.left.blocks = 0;
            self.wanted.then_flush = false;
            return Next::Nothing;
        };
        Next::Part(Request {
            op,
            lba: self.left.lba,
            blocks,
            buffer: Some(buffer),
        })
    }

    fn submitted(&mut self, part: &Request, block_bytes: u32) {
        self.parts += 1;
        if part.op == Op::Flush {
            self.flushes = 0;
            return;
        }
        self.left.lba += u64::from(part.blocks);
        self.left.blocks -= u64::from(part.blocks);
        if part.buffer.is_some() {
            self.span_offset += part.blocks * block_bytes;
            if self.spans.get(self.span).map(Span::len) == Some(self.span_offset) {
                self.span += 1;
                self.span_offset = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests;
