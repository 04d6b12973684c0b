//! A thread's way to a RAM device: copies under the unit's lock.

use std::sync::{Arc, atomic::Ordering};

use flexblk_reactor::{Completion, Reactor, Span};

use super::{Shared, locks::UNIT_BYTES};
use crate::{
    Channel, Io, IoDone, IoError, IoOp, Submitted, Tokens, check::Extent, spans::same_bytes,
};

pub(super) struct RamChannel {
    shared: Arc<Shared>,
    tokens: Tokens,
    /// Zeroings that take several turns.
    long: Box<[Option<Long>]>,
    free: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Long {
    tag: u64,
    rest: Extent,
}

/// Bytes zeroed in one turn: at about 10 GB/s, the longest that other I/O waits is 1 ms.
const STEP_BYTES: u64 = 8 << 20;

/// Up to this length, zeroes are written if the space need not be given back: a system call and the
/// page faults later cost more.
const FILL_BYTES: u64 = 64 << 10;

impl RamChannel {
    pub(super) fn new(shared: Arc<Shared>, tokens: Tokens, depth: u32) -> Self {
        shared.channels.fetch_add(1, Ordering::AcqRel);
        Self {
            shared,
            tokens,
            long: vec![None; depth as usize].into(),
            free: (0..depth).rev().collect(),
        }
    }

    /// Calls `each` with pieces of the device's memory and of the caller's, equally long, under the
    /// lock of their unit, as long as it says to go on.
    fn copy(
        &self,
        extent: Extent,
        spans: &[Span],
        each: impl Fn(Span, Span) -> bool,
    ) -> Result<(), IoError> {
        let mut spans = spans.iter().copied();
        let mut rest = Span::empty();
        let (mut at, end) = (extent.offset, extent.offset + extent.len);
        while at < end {
            let unit = at / UNIT_BYTES;
            let unit_end = ((unit + 1) * UNIT_BYTES).min(end);
            let _guard = self.shared.locks.one(unit);
            while at < unit_end {
                if rest.is_empty() {
                    // lengths were checked: the spans sum to the extent
                    rest = spans.next().ok_or(IoError::Invalid)?;
                    continue;
                }
                let len = rest.len().min((unit_end - at) as u32);
                let (Some(device), Some(caller), Some(after)) = (
                    self.shared.memory.span(at, len),
                    rest.sub(0, len),
                    rest.sub(len, rest.len() - len),
                ) else {
                    return Err(IoError::OutOfRange);
                };
                if !each(device, caller) {
                    return Ok(());
                }
                rest = after;
                at += u64::from(len);
            }
        }
        Ok(())
    }

    fn zero(&mut self, reactor: &mut Reactor, tag: u64, extent: Extent) -> Submitted {
        if extent.len <= STEP_BYTES {
            self.shared.zero(extent);
            return Submitted::Done(Ok(()));
        }
        let Some(slot) = self.free.pop() else {
            return Submitted::Done(Err(IoError::Busy));
        };
        if let Some(long) = self.long.get_mut(slot as usize) {
            *long = Some(Long { tag, rest: extent });
        }
        reactor.arm(reactor.now(), self.tokens.slot(slot));
        Submitted::Pending
    }

    fn fill(&self, extent: Extent) -> Result<(), IoError> {
        let (mut at, end) = (extent.offset, extent.offset + extent.len);
        while at < end {
            let unit = at / UNIT_BYTES;
            let next = ((unit + 1) * UNIT_BYTES).min(end);
            let span = self
                .shared
                .memory
                .span(at, (next - at) as u32)
                .ok_or(IoError::OutOfRange)?;
            let _guard = self.shared.locks.one(unit);
            span.fill(0);
            at = next;
        }
        Ok(())
    }

    fn compare(&self, extent: Extent, spans: &[Span]) -> Result<(), IoError> {
        let differ = std::cell::Cell::new(false);
        self.copy(extent, spans, |device, caller| {
            differ.set(!same_bytes(&device, &caller));
            !differ.get()
        })?;
        if differ.get() {
            Err(IoError::CompareMismatch)
        } else {
            Ok(())
        }
    }
}

impl Channel for RamChannel {
    fn submit(&mut self, reactor: &mut Reactor, io: Io) -> Submitted {
        let extent = match self.shared.limits.check(&io, self.shared.block_count()) {
            Ok(extent) => extent,
            Err(error) => return Submitted::Done(Err(error)),
        };
        let spans = io.data.spans.as_slice();
        Submitted::Done(match io.op {
            IoOp::Read => self.copy(extent, spans, |device, caller| {
                caller.copy_from_span(&device);
                true
            }),
            IoOp::Write { .. } => self.copy(extent, spans, |device, caller| {
                device.copy_from_span(&caller);
                true
            }),
            IoOp::Compare => self.compare(extent, spans),
            IoOp::WriteZeroes { unmap: false, .. } if extent.len <= FILL_BYTES => self.fill(extent),
            IoOp::WriteZeroes { .. } | IoOp::Discard => return self.zero(reactor, io.tag, extent),
            IoOp::Flush | IoOp::Verify => Ok(()),
        })
    }

    fn complete(&mut self, reactor: &mut Reactor, completion: &Completion, out: &mut Vec<IoDone>) {
        let slot = self.tokens.own(completion.token);
        let Some((slot, long)) =
            slot.and_then(|slot| Some((slot, self.long.get_mut(slot as usize)?)))
        else {
            tracing::warn!(
                ?completion,
                "a completion for a RAM device that is not its own"
            );
            return;
        };
        let Some(Long { tag, rest }) = *long else {
            return;
        };
        let step = rest.len.min(STEP_BYTES);
        self.shared.zero(Extent {
            offset: rest.offset,
            len: step,
        });
        let rest = Extent {
            offset: rest.offset + step,
            len: rest.len - step,
        };
        if rest.len == 0 {
            *long = None;
            self.free.push(slot);
            out.push(IoDone {
                tag,
                result: Ok(()),
            });
        } else {
            *long = Some(Long { tag, rest });
            reactor.arm(reactor.now(), self.tokens.slot(slot));
        }
    }

    fn in_flight(&self) -> usize {
        self.long.len() - self.free.len()
    }

    fn depth(&self) -> usize {
        self.long.len()
    }

    fn may_tear_blocks(&self) -> bool {
        !self.shared.atomic_blocks
    }

    fn direct_read(&self, lba: u64, blocks: u32) -> Option<Span> {
        let shared = &self.shared;
        // With one channel, reads and writes are one thread's, so a block in the device's memory is always
        // whole. With several, nothing between here and the last retransmission holds a lock: the kernel
        // copies the payload later than we decide, and again when a packet is lost. A checksum does not
        // help: a writer that is not scheduled in the middle of a block leaves it half-written for both
        // the checksum and the copy. So the block is read into a buffer, under its unit's lock.
        if shared.atomic_blocks && shared.channels.load(Ordering::Acquire) > 1 {
            return None;
        }
        let extent = shared.limits.extent(lba, blocks, shared.block_count())?;
        shared
            .memory
            .span(extent.offset, u32::try_from(extent.len).ok()?)
    }
}

impl Drop for RamChannel {
    fn drop(&mut self) {
        self.shared.channels.fetch_sub(1, Ordering::AcqRel);
    }
}
