//! A thread's way to a file: each I/O is a small state machine over io_uring operations.
//!
//! submit -> [`Step`] -> [`FileChannel::issue`] -> completion -> [`FileChannel::advance`] -> next
//! step, or the end.
#![allow(unsafe_code)]

use std::{
    collections::VecDeque,
    mem,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use flexblk_reactor::{
    Completion, Error as ReactorError, HugePages, Keeper, Op, Order, Pool, Reactor, SharedMemory,
    Span,
};

use super::{
    Counters, Shared,
    pieces::{EMPTY_VECTOR, Vector, copy_in, copy_out, equal, fill_vector},
    slots::{Bounced, Slot, Step},
};
use crate::{Caps, Channel, Io, IoDone, IoError, IoOp, Submitted, Tokens};

pub(super) struct FileChannel {
    shared: Arc<Shared>,
    tokens: Tokens,
    slots: Box<[Slot]>,
    free: Vec<u32>,
    /// One vector per slot; the kernel reads it while the slot's operation is in flight.
    vectors: Box<[Vector]>,
    bounce: Pool,
    /// Slots that wait for a bounce buffer, longest first.
    waiting: VecDeque<u32>,
    /// A page-aligned range that nobody writes to.
    zeroes: Span,
    flushes: Flushes,
    /// Where all of that goes if it is still needed when the channel is dropped.
    keeper: Keeper,
}

/// Flushes share system calls: while one `fdatasync` runs, later flushes wait for the next one. (They
/// must not join the running one: it may already have passed the data they are about.)
struct Flushes {
    running: Vec<u32>,
    next: Vec<u32>,
    retries: u32,
    /// [`Shared::sync_failures`] as of the last flush.
    failures_seen: u64,
}

/// Longer I/Os go through a bounce buffer in several rounds.
const BOUNCE_BYTES: u32 = 128 << 10;
const BOUNCE_COUNT: u32 = 16;

/// Zeroes written at once where the kernel cannot zero.
const ZEROES_BYTES: u32 = 128 << 10;

/// `EAGAIN` and `EINTR` are tried again at once this often, then after a pause, then reported.
const RETRIES_AT_ONCE: u32 = 8;
const RETRIES: u32 = 1000;
const RETRY_PAUSE: Duration = Duration::from_millis(1);

impl FileChannel {
    pub(super) fn new(
        keeper: Keeper,
        shared: Arc<Shared>,
        tokens: Tokens,
        depth: u32,
    ) -> Result<Self, ReactorError> {
        let bounce_bytes = u64::from(BOUNCE_BYTES) * u64::from(BOUNCE_COUNT);
        let memory = SharedMemory::create(
            "bounce",
            bounce_bytes + u64::from(ZEROES_BYTES),
            HugePages::No,
        )?;
        let zeroes = memory
            .span(bounce_bytes, ZEROES_BYTES)
            .unwrap_or_else(Span::empty);
        Ok(Self {
            keeper,
            tokens,
            slots: (0..depth).map(|_| Slot::free()).collect(),
            free: (0..depth).rev().collect(),
            vectors: vec![EMPTY_VECTOR; depth as usize].into(),
            bounce: Pool::new(memory, BOUNCE_BYTES, BOUNCE_COUNT, Order::LastFreedFirst)?,
            waiting: VecDeque::with_capacity(depth as usize),
            zeroes,
            flushes: Flushes {
                running: Vec::with_capacity(depth as usize),
                next: Vec::with_capacity(depth as usize),
                retries: 0,
                failures_seen: shared.sync_failures.load(Ordering::Acquire),
            },
            shared,
        })
    }

    /// The slot number that stands for the shared `fdatasync`.
    fn flush_slot(&self) -> u32 {
        self.slots.len() as u32
    }

    fn first_step(&self, io: &Io) -> Step {
        match io.op {
            IoOp::Read if self.in_place(&io.data.spans) => Step::Read,
            IoOp::Read => Step::ReadBounced(Bounced::Copy),
            IoOp::Write { .. } if self.in_place(&io.data.spans) => Step::Write,
            IoOp::Write { .. } => Step::WriteBounced,
            IoOp::Compare => Step::ReadBounced(Bounced::Compare),
            IoOp::Verify => Step::ReadBounced(Bounced::Forget),
            IoOp::Discard => Step::Punch { must_zero: false },
            IoOp::WriteZeroes { unmap: true, .. }
                if !self.shared.cannot_punch.load(Ordering::Relaxed) =>
            {
                Step::Punch { must_zero: true }
            }
            IoOp::WriteZeroes { .. } => self.zero_step(),
            IoOp::Flush => Step::Flush,
        }
    }

    /// The best way left to write zeroes.
    fn zero_step(&self) -> Step {
        if self.shared.cannot_zero_range.load(Ordering::Relaxed) {
            Step::WriteZeroes
        } else {
            Step::ZeroRange
        }
    }

    /// Whether the kernel takes this memory as it is.
    fn in_place(&self, spans: &[Span]) -> bool {
        let Some(align) = self.shared.direct else {
            return true;
        };
        let ok = |span: &Span| {
            (span.as_ptr() as usize).is_multiple_of(align.memory as usize)
                // one piece has the whole length, which is a multiple of the block size; of several,
                // kernels before 6.0 want each to be
                && span.len().is_multiple_of(align.offset)
        };
        let ok = spans.iter().all(ok);
        if !ok {
            Counters::add(&self.shared.counters.bounced_ios, 1);
        }
        ok
    }

    /// Takes a bounce buffer for the slot; false if it has to wait for one.
    fn take_bounce(&mut self, index: u32) -> bool {
        let Some(slot) = self.slots.get_mut(index as usize) else {
            return false;
        };
        if !slot.step.needs_bounce() || slot.bounce.is_some() {
            return true;
        }
        slot.bounce = self.bounce.take();
        if slot.bounce.is_none() {
            Counters::add(&self.shared.counters.bounce_waits, 1);
            self.waiting.push_back(index);
            return false;
        }
        true
    }

    /// Asks the kernel for what the slot's step still needs.
    fn issue(&mut self, reactor: &mut Reactor, index: u32) {
        if !self.take_bounce(index) {
            return;
        }
        let fd = self.shared.fd();
        let (Some(slot), Some(vector)) = (
            self.slots.get_mut(index as usize),
            self.vectors.get_mut(index as usize),
        ) else {
            return;
        };
        let (offset, rest, dsync) = (slot.offset(), slot.rest(), slot.force);
        let at_most = |limit: u32| u32::try_from(rest).map_or(limit, |rest| rest.min(limit));
        let op = match slot.step {
            Step::Read | Step::Write => {
                let writing = slot.step == Step::Write;
                let n = fill_vector(vector, &slot.data.spans, slot.done);
                slot.asked = at_most(u32::MAX); // checked against max_io_bytes
                let fixed = slot.data.fixed.filter(|_| slot.data.spans.len() == 1);
                let [first, ..] = vector;
                let (ptr, len) = (first.iov_base.cast::<u8>(), first.iov_len as u32);
                match (writing, n) {
                    (false, 1) => Op::Read {
                        fd,
                        ptr,
                        len,
                        offset,
                        fixed,
                    },
                    (true, 1) => Op::Write {
                        fd,
                        ptr,
                        len,
                        offset,
                        fixed,
                        dsync,
                    },
                    (false, n) => Op::Readv {
                        fd,
                        iov: vector.as_ptr(),
                        n,
                        offset,
                    },
                    (true, n) => Op::Writev {
                        fd,
                        iov: vector.as_ptr(),
                        n,
                        offset,
                        dsync,
                    },
                }
            }
            Step::ReadBounced(_) | Step::WriteBounced => {
                let Some(span) = slot.bounce.as_ref().map(flexblk_reactor::Buffer::span) else {
                    return;
                };
                let (ptr, len) = (span.as_ptr(), at_most(span.len()));
                slot.asked = len;
                if slot.step == Step::WriteBounced {
                    copy_out(&slot.data.spans, slot.done, &span, len);
                    Op::Write {
                        fd,
                        ptr,
                        len,
                        offset,
                        fixed: None,
                        dsync,
                    }
                } else {
                    Op::Read {
                        fd,
                        ptr,
                        len,
                        offset,
                        fixed: None,
                    }
                }
            }
            Step::WriteZeroes => {
                let (ptr, len) = (self.zeroes.as_ptr(), at_most(self.zeroes.len()));
                slot.asked = len;
                Op::Write {
                    fd,
                    ptr,
                    len,
                    offset,
                    fixed: None,
                    dsync,
                }
            }
            Step::Punch { .. } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                Op::Fallocate {
                    fd,
                    mode,
                    offset,
                    len: rest,
                }
            }
            Step::ZeroRange => {
                let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
                Op::Fallocate {
                    fd,
                    mode,
                    offset,
                    len: rest,
                }
            }
            Step::Sync => Op::Fsync {
                fd,
                data_only: true,
            },
            Step::Flush | Step::Free => return,
        };
        let token = self.tokens.slot(index);
        // SAFETY: the file, the vector, the bounce memory and the zeroes live as long as the channel,
        // whose drop hands them to the reactor if anything is in flight; the vector is rewritten only by `issue` for
        // the same slot, after its completion. Spans of the caller stay in place until the I/O is
        // done, by their contract.
        unsafe { reactor.submit(op, token) };
    }

    /// Takes the result of the slot's operation; the I/O's result if that was its end.
    fn advance(
        &mut self,
        reactor: &mut Reactor,
        index: u32,
        result: i32,
    ) -> Option<Result<(), IoError>> {
        let shared = Arc::clone(&self.shared);
        let zero_step = self.zero_step();
        let slot = self.slots.get_mut(index as usize)?;
        if matches!(result.wrapping_neg(), libc::EAGAIN | libc::EINTR) && slot.retries < RETRIES {
            self.retry(reactor, index);
            return None;
        }
        if result < 0 {
            let errno = result.wrapping_neg();
            let step = slot.step;
            if step.was_forced(slot.force)
                && matches!(errno, libc::EIO | libc::ENOSPC | libc::EDQUOT)
            {
                // this may have been the only report of somebody else's lost data: the next flush of
                // every channel fails
                shared.sync_failures.fetch_add(1, Ordering::AcqRel);
            }
            slot.step = match (step, errno) {
                (Step::Punch { must_zero }, libc::EOPNOTSUPP | libc::ENOSYS) => {
                    shared.cannot_punch.store(true, Ordering::Relaxed);
                    if !must_zero {
                        return Some(Err(IoError::Unsupported));
                    }
                    zero_step
                }
                (Step::ZeroRange, libc::EOPNOTSUPP | libc::ENOSYS) => {
                    shared.cannot_zero_range.store(true, Ordering::Relaxed);
                    Step::WriteZeroes
                }
                (Step::Punch { must_zero: true } | Step::ZeroRange, libc::EINVAL) => {
                    Step::WriteZeroes
                }
                _ => return Some(Err(step.error(errno))),
            };
            self.issue(reactor, index);
            return None;
        }
        match slot.step {
            Step::Punch { .. } | Step::ZeroRange if slot.force => slot.step = Step::Sync,
            Step::Punch { .. } | Step::ZeroRange | Step::Sync => return Some(Ok(())),
            Step::Flush | Step::Free => return None,
            Step::Read
            | Step::Write
            | Step::ReadBounced(_)
            | Step::WriteBounced
            | Step::WriteZeroes => {
                if let Some(end) = self.transferred(index, result as u32) {
                    return Some(end);
                }
            }
        }
        self.issue(reactor, index);
        None
    }

    /// `bytes` of what was asked for were read or written; the I/O's result if it has ended.
    fn transferred(&mut self, index: u32, bytes: u32) -> Option<Result<(), IoError>> {
        let counters = &self.shared.counters;
        let slot = self.slots.get_mut(index as usize)?;
        // after a short transfer direct I/O goes on at an aligned place
        let align = self.shared.direct.map_or(1, |align| align.offset);
        let bytes = if bytes < slot.asked {
            Counters::add(&counters.short_transfers, 1);
            bytes - bytes % align
        } else {
            slot.asked
        };
        if bytes == 0 {
            slot.retries += 1;
            if slot.retries >= RETRIES_AT_ONCE {
                // nothing, again and again: the file was cut behind our back
                return Some(Err(slot.step.error(libc::EIO)));
            }
            return None;
        }
        match (slot.step, slot.bounce.as_ref()) {
            (Step::ReadBounced(Bounced::Copy), Some(bounce)) => {
                copy_in(&slot.data.spans, slot.done, &bounce.span(), bytes);
            }
            (Step::ReadBounced(Bounced::Compare), Some(bounce))
                if !equal(&slot.data.spans, slot.done, &bounce.span(), bytes) =>
            {
                return Some(Err(IoError::CompareMismatch));
            }
            (Step::WriteZeroes, _) => {
                Counters::add(&counters.zeroes_written_bytes, u64::from(bytes))
            }
            _ => {}
        }
        slot.done += u64::from(bytes);
        (slot.rest() == 0).then_some(Ok(()))
    }

    fn retry(&mut self, reactor: &mut Reactor, index: u32) {
        Counters::add(&self.shared.counters.retries, 1);
        let Some(slot) = self.slots.get_mut(index as usize) else {
            return;
        };
        slot.retries += 1;
        if slot.retries <= RETRIES_AT_ONCE {
            self.issue(reactor, index);
        } else {
            reactor.arm(reactor.now() + RETRY_PAUSE, self.tokens.slot(index));
        }
    }

    /// Frees the slot, and lets the next one have its bounce buffer.
    fn release(&mut self, reactor: &mut Reactor, index: u32) -> u64 {
        let Some(slot) = self.slots.get_mut(index as usize) else {
            return 0;
        };
        let Slot { tag, bounce, .. } = mem::replace(slot, Slot::free());
        self.free.push(index);
        if let Some(buffer) = bounce {
            self.bounce.put(buffer);
            if let Some(next) = self.waiting.pop_front() {
                self.issue(reactor, next);
            }
        }
        tag
    }

    // ---- flush -----------------------------------------------------------------------------------

    fn flush(&mut self, reactor: &mut Reactor, index: u32) {
        self.flushes.next.push(index);
        if self.flushes.running.is_empty() {
            self.start_flush(reactor);
        }
    }

    fn start_flush(&mut self, reactor: &mut Reactor) {
        let flushes = &mut self.flushes;
        mem::swap(&mut flushes.running, &mut flushes.next);
        flushes.retries = 0;
        if flushes.running.len() > 1 {
            Counters::add(
                &self.shared.counters.flushes_coalesced,
                flushes.running.len() as u64 - 1,
            );
        }
        if !flushes.running.is_empty() {
            self.submit_flush(reactor);
        }
    }

    fn submit_flush(&mut self, reactor: &mut Reactor) {
        let op = Op::Fsync {
            fd: self.shared.fd(),
            data_only: true,
        };
        // SAFETY: no memory; the file lives as long as the channel, whose drop hands it to the reactor if anything is
        // in flight.
        unsafe { reactor.submit(op, self.tokens.slot(self.flush_slot())) };
    }

    fn flushed(&mut self, reactor: &mut Reactor, result: i32, out: &mut Vec<IoDone>) {
        let flushes = &mut self.flushes;
        if matches!(result.wrapping_neg(), libc::EAGAIN | libc::EINTR) && flushes.retries < RETRIES
        {
            flushes.retries += 1;
            Counters::add(&self.shared.counters.retries, 1);
            if flushes.retries <= RETRIES_AT_ONCE {
                self.submit_flush(reactor);
            } else {
                reactor.arm(
                    reactor.now() + RETRY_PAUSE,
                    self.tokens.slot(self.flush_slot()),
                );
            }
            return;
        }
        let result = if result < 0 {
            let errno = result.wrapping_neg();
            tracing::error!(path = %self.shared.path.display(), errno, "flush failed: written data may be lost");
            flushes.failures_seen = self.shared.sync_failures.fetch_add(1, Ordering::AcqRel) + 1;
            Err(Step::Sync.error(errno))
        } else {
            let failures = self.shared.sync_failures.load(Ordering::Acquire);
            if failures == mem::replace(&mut flushes.failures_seen, failures) {
                Ok(())
            } else {
                Err(IoError::MediaWrite) // told to another channel, concerns this one as well
            }
        };
        let mut running = mem::take(&mut self.flushes.running);
        for index in running.drain(..) {
            let tag = self.release(reactor, index);
            out.push(IoDone { tag, result });
        }
        self.flushes.running = running;
        self.start_flush(reactor);
    }
}

impl Channel for FileChannel {
    fn submit(&mut self, reactor: &mut Reactor, io: Io) -> Submitted {
        let extent = match self.shared.limits.check(&io, self.shared.block_count()) {
            Ok(extent) => extent,
            Err(error) => return Submitted::Done(Err(error)),
        };
        if io.op == IoOp::Flush {
            if self.shared.limits.caps.contains(Caps::READ_ONLY) {
                return Submitted::Done(Ok(()));
            }
        } else if extent.len == 0 {
            return Submitted::Done(Ok(()));
        }
        let step = self.first_step(&io);
        let Some(index) = self.free.pop() else {
            return Submitted::Done(Err(IoError::Busy));
        };
        let Some(slot) = self.slots.get_mut(index as usize) else {
            return Submitted::Done(Err(IoError::Busy));
        };
        let force = matches!(
            io.op,
            IoOp::Write { fua: true } | IoOp::WriteZeroes { fua: true, .. }
        );
        *slot = Slot {
            tag: io.tag,
            step,
            extent,
            force,
            data: io.data,
            ..Slot::free()
        };
        if step == Step::Flush {
            self.flush(reactor, index);
        } else {
            self.issue(reactor, index);
        }
        Submitted::Pending
    }

    fn complete(&mut self, reactor: &mut Reactor, completion: &Completion, out: &mut Vec<IoDone>) {
        let Some(index) = self.tokens.own(completion.token) else {
            tracing::warn!(
                ?completion,
                "a completion for a file device that is not its own"
            );
            return;
        };
        let pause_over = completion.flags.timer();
        if index == self.flush_slot() {
            if pause_over {
                self.submit_flush(reactor);
            } else {
                self.flushed(reactor, completion.result, out);
            }
        } else if pause_over {
            self.issue(reactor, index);
        } else if let Some(result) = self.advance(reactor, index, completion.result) {
            let tag = self.release(reactor, index);
            out.push(IoDone { tag, result });
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn depth(&self) -> usize {
        self.slots.len()
    }
}

impl Drop for FileChannel {
    fn drop(&mut self) {
        if self.in_flight() == 0 {
            return;
        }
        tracing::warn!(
            path = %self.shared.path.display(),
            in_flight = self.in_flight(),
            "a channel is dropped with I/O in flight; the reactor keeps what the kernel may touch"
        );
        let memory = Arc::clone(self.bounce.memory());
        let vectors = mem::take(&mut self.vectors);
        self.keeper
            .keep(Box::new((Arc::clone(&self.shared), memory, vectors)));
    }
}
