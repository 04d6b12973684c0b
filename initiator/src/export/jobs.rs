//! Requests of any length, in memory of any shape, as commands that a channel takes.
//!
//! A request becomes as many commands as its length and its memory ask for. What lies in one piece goes as it is;
//! what does not is gathered into (or scattered from) a bounce buffer. It ends when its last command has, with the first error.

use std::collections::VecDeque;
use std::sync::Arc;

use flexblk_reactor::{Buffer, HugePages, Order, Pool, SharedMemory, Span};

use crate::volume::{Channel, Request};
use crate::{Busy, Error, IoCompletion, IoError, MaxBlocks, Namespace, Op};

/// Most bytes of one piece: a larger one would only make the first wait for the last.
const MAX_PIECE_BYTES: u32 = 1 << 20;
/// A run of memory that is shorter than this, and not the rest, is cheaper to copy than to send on its own.
const MIN_RUN_BYTES: u32 = 32 << 10;

/// What takes commands.
pub(crate) trait Submit {
    fn submit(&mut self, request: &Request, tag: u64) -> Result<(), Busy>;
}

impl Submit for Channel {
    #[inline]
    fn submit(&mut self, request: &Request, tag: u64) -> Result<(), Busy> {
        Channel::submit(self, request, tag)
    }
}

/// A request as somebody wants it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) op: Op,
    pub(crate) lba: u64,
    pub(crate) blocks: u64,
    /// A flush follows when it has succeeded, and the request ends with that.
    pub(crate) then_flush: bool,
}

/// A request that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    /// As given to [`Jobs::start`].
    pub(crate) tag: u64,
    /// How it went.
    pub(crate) result: Result<(), IoError>,
}

/// Requests under way on one channel.
#[derive(Debug)]
pub(crate) struct Jobs {
    block_size: u32,
    max_blocks: MaxBlocks,
    piece_bytes: u32,
    bounce: Pool,
    jobs: Vec<Job>,
    free_jobs: Vec<u32>,
    pieces: Vec<Piece>,
    free_pieces: Vec<u32>,
    /// Jobs of which something is yet to be submitted.
    waiting: VecDeque<u32>,
}

#[derive(Debug)]
struct Job {
    op: Op,
    lba: u64,
    /// Bytes; in blocks, if it carries no data.
    len: u64,
    /// What was submitted of that.
    next: u64,
    outstanding: u32,
    then_flush: bool,
    result: Result<(), IoError>,
    tag: u64,
    /// The memory; empty without data. Keeps its room from one request to the next.
    spans: Vec<Span>,
}

#[derive(Debug, Default)]
struct Piece {
    job: u32,
    bounce: Option<Buffer>,
    offset: u64,
    len: u32,
}

impl Jobs {
    /// For up to `capacity` requests on a channel of `depth`; `bounce_bytes` is for memory in several pieces.
    pub(crate) fn new(
        namespace: &Namespace,
        capacity: usize,
        depth: u16,
        bounce_bytes: u64,
    ) -> Result<Jobs, Error> {
        let piece_bytes = namespace
            .max_transfer_bytes
            .min(MAX_PIECE_BYTES)
            .max(namespace.block_size);
        let count = (bounce_bytes / u64::from(piece_bytes)).max(2) as u32;
        let bounce = SharedMemory::create(
            "flexblk export",
            u64::from(piece_bytes) * u64::from(count),
            HugePages::No,
        )
        .and_then(|memory| Pool::new(memory, piece_bytes, count, Order::LastFreedFirst))
        .map_err(|error| Error::Transport(format!("allocating bounce buffers: {error}")))?;
        let job = |_| Job {
            op: Op::Flush,
            lba: 0,
            len: 0,
            next: 0,
            outstanding: 0,
            then_flush: false,
            result: Ok(()),
            tag: 0,
            spans: Vec::new(),
        };
        Ok(Jobs {
            block_size: namespace.block_size,
            max_blocks: namespace.max_blocks,
            piece_bytes,
            bounce,
            jobs: (0..capacity).map(job).collect(),
            free_jobs: (0..capacity as u32).rev().collect(),
            pieces: (0..depth).map(|_| Piece::default()).collect(),
            free_pieces: (0..u32::from(depth)).rev().collect(),
            waiting: VecDeque::with_capacity(capacity),
        })
    }

    /// The bounce buffers, for registration with the channel.
    pub(crate) fn memory(&self) -> &Arc<SharedMemory> {
        self.bounce.memory()
    }

    /// Requests that have not ended.
    #[cfg(test)]
    pub(crate) fn outstanding(&self) -> usize {
        self.jobs.len() - self.free_jobs.len()
    }

    /// Whether one more fits.
    pub(crate) fn has_room(&self) -> bool {
        !self.free_jobs.is_empty()
    }

    /// Takes a request, with `spans` as its memory if it carries data (as many bytes, which is for
    /// the caller to see to). What can be submitted is. `Busy`: as many as there may be are under way.
    pub(crate) fn start(
        &mut self,
        channel: &mut impl Submit,
        wanted: &Wanted,
        spans: &[Span],
        tag: u64,
    ) -> Result<(), Busy> {
        let index = self.free_jobs.pop().ok_or(Busy)?;
        let Some(job) = self.jobs.get_mut(index as usize) else {
            return Err(Busy);
        };
        let carries_data = !spans.is_empty();
        job.op = wanted.op;
        job.lba = wanted.lba;
        job.len = if carries_data {
            wanted.blocks.saturating_mul(u64::from(self.block_size))
        } else {
            wanted.blocks
        };
        job.then_flush = wanted.then_flush;
        job.next = 0;
        job.outstanding = 0;
        job.result = Ok(());
        job.tag = tag;
        job.spans.clear();
        job.spans.extend_from_slice(spans);
        self.waiting.push_back(index);
        self.submit_waiting(channel);
        Ok(())
    }

    /// Submits what waits, as far as there is room.
    #[inline]
    pub(crate) fn submit_waiting(&mut self, channel: &mut impl Submit) {
        while let Some(&index) = self.waiting.front() {
            if !self.submit_job(channel, index) {
                return;
            }
            self.waiting.pop_front();
        }
    }

    /// A command has ended; `Some` when its request has. [`submit_waiting`](Self::submit_waiting) sends what follows.
    #[inline]
    pub(crate) fn completed(&mut self, completion: &IoCompletion) -> Option<Done> {
        let piece_index = u32::try_from(completion.tag).ok()?;
        let piece = std::mem::take(self.pieces.get_mut(piece_index as usize)?);
        self.free_pieces.push(piece_index);
        let job = self.jobs.get_mut(piece.job as usize)?;
        if let Some(buffer) = piece.bounce {
            if completion.result.is_ok()
                && job.op == Op::Read
                && let Some(from) = buffer.span().sub(0, piece.len)
            {
                scatter(&job.spans, piece.offset, &from);
            }
            self.bounce.put(buffer);
        }
        job.outstanding -= 1;
        if let (Ok(()), Err(error)) = (job.result, completion.result) {
            job.result = Err(error);
            // What was not sent yet is not any more.
            if job.next < job.len {
                job.next = job.len;
                self.waiting.retain(|waiting| *waiting != piece.job);
            }
        }
        if job.outstanding > 0 || job.next < job.len {
            return None;
        }
        if std::mem::take(&mut job.then_flush) && job.result.is_ok() {
            job.become_flush();
            self.waiting.push_back(piece.job);
            return None;
        }
        let done = Done {
            tag: job.tag,
            result: job.result,
        };
        self.free_jobs.push(piece.job);
        Some(done)
    }

    /// Forgets everything; the channel has ended, so nobody uses any of the memory. The tags of what had not ended.
    pub(crate) fn abandon(&mut self) -> Vec<u64> {
        let free = std::mem::take(&mut self.free_jobs);
        let tags = (self.jobs.iter().enumerate())
            .filter(|(index, _)| !free.contains(&(*index as u32)))
            .map(|(_, job)| job.tag)
            .collect();
        self.free_jobs = (0..self.jobs.len() as u32).rev().collect();
        self.free_pieces = (0..self.pieces.len() as u32).rev().collect();
        self.waiting.clear();
        for piece in &mut self.pieces {
            if let Some(buffer) = piece.bounce.take() {
                self.bounce.put(buffer);
            }
        }
        tags
    }

    /// Submits the rest of a job; false when there was no room for all.
    fn submit_job(&mut self, channel: &mut impl Submit, index: u32) -> bool {
        let Some(job) = self.jobs.get_mut(index as usize) else {
            return true;
        };
        loop {
            let Some(piece_index) = self.free_pieces.pop() else {
                return false;
            };
            let left = job.len - job.next;
            let mut bounce = None;
            let (lba, blocks, len, buffer) = if job.spans.is_empty() {
                let blocks = left.min(self.max_blocks.for_op(job.op).into());
                (job.lba.saturating_add(job.next), blocks, blocks, None)
            } else {
                let most = left.min(u64::from(self.piece_bytes)) as u32;
                let run = run_at(&job.spans, job.next, most);
                let whole = run.len() - run.len() % self.block_size;
                let span = if whole == most || whole >= MIN_RUN_BYTES {
                    run.sub(0, whole)
                } else {
                    bounce = self.bounce.take();
                    let room = bounce.as_ref().and_then(|it| it.span().sub(0, most));
                    if let Some(room) = room
                        && job.op != Op::Read
                    {
                        gather(&job.spans, job.next, &room);
                    }
                    room
                };
                let Some(span) = span else {
                    // Every bounce buffer is in use; one of them comes back with the next completion.
                    self.free_pieces.push(piece_index);
                    return false;
                };
                let block_size = u64::from(self.block_size);
                let len = u64::from(span.len());
                let lba = job.lba.saturating_add(job.next / block_size);
                (lba, len / block_size, len, Some(span))
            };
            let request = Request {
                op: job.op,
                lba,
                blocks: blocks as u32,
                buffer,
            };
            if channel.submit(&request, u64::from(piece_index)).is_err() {
                if let Some(buffer) = bounce {
                    self.bounce.put(buffer);
                }
                self.free_pieces.push(piece_index);
                return false;
            }
            if let Some(piece) = self.pieces.get_mut(piece_index as usize) {
                *piece = Piece {
                    job: index,
                    bounce,
                    offset: job.next,
                    len: len as u32,
                };
            }
            job.outstanding += 1;
            job.next += len;
            if job.next >= job.len {
                return true;
            }
        }
    }
}

impl Job {
    /// All of it is done, and has to be durable before it ends.
    fn become_flush(&mut self) {
        self.op = Op::Flush;
        (self.lba, self.len, self.next) = (0, 0, 0);
        self.spans.clear();
    }
}

/// The memory at `offset` as far as it goes in one piece, `most` bytes at most.
fn run_at(spans: &[Span], offset: u64, most: u32) -> Span {
    let mut skip = offset;
    for span in spans {
        let len = u64::from(span.len());
        if skip < len {
            let at = skip as u32;
            let run = (span.len() - at).min(most);
            return span.sub(at, run).unwrap_or(Span::empty());
        }
        skip -= len;
    }
    Span::empty()
}

/// Fills `to` from the memory at `offset`.
fn gather(spans: &[Span], offset: u64, to: &Span) {
    walk(spans, offset, to, |far, near| {
        near.copy_from_span(far);
    });
}

/// Distributes `from` over the memory at `offset`.
fn scatter(spans: &[Span], offset: u64, from: &Span) {
    walk(spans, offset, from, |far, near| {
        far.copy_from_span(near);
    });
}

fn walk(spans: &[Span], offset: u64, whole: &Span, mut copy: impl FnMut(&Span, &Span)) {
    let mut skip = offset;
    let mut done = 0;
    for span in spans {
        let len = u64::from(span.len());
        if skip >= len {
            skip -= len;
            continue;
        }
        let run = (len - skip).min(u64::from(whole.len() - done)) as u32;
        if let (Some(far), Some(near)) = (span.sub(skip as u32, run), whole.sub(done, run)) {
            copy(&far, &near);
        }
        skip = 0;
        done += run;
        if done == whole.len() {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
