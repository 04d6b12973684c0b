//! What a worker's clients share: I/O buffers and requests to the volume.

use std::collections::VecDeque;

use flexblk_reactor::Span;

use super::protocol::{Answer, Errno, Io};
use crate::export::{Buffer, Buffers, Ended, Requests};
use crate::{IoError, Op};

/// A client's request under way: from its header to the end of its reply.
#[derive(Debug)]
pub(super) struct Job {
    /// Whose it is.
    pub(super) client: u32,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) io: Io,
    /// Its data.
    pub(super) buffers: Vec<Buffer>,
    pub(super) answer: Answer,
}

/// Buffers and requests of a worker.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) buffers: Buffers,
    pub(super) requests: Requests,
    jobs: Vec<Job>,
    free: Vec<u32>,
    /// Clients for whose next request there is no memory or no job, in order.
    waiting: VecDeque<u32>,
    /// Requests that ended without the target.
    pub(super) ended: Vec<Ended>,
}

impl Shared {
    /// For `count` jobs; `requests` has as many.
    pub(super) fn new(buffers: Buffers, requests: Requests, count: u32) -> Shared {
        let idle = Io::nothing();
        Shared {
            buffers,
            requests,
            jobs: (0..count)
                .map(|_| Job {
                    client: 0,
                    cookie: 0,
                    offset: 0,
                    io: idle,
                    buffers: Vec::with_capacity(1),
                    answer: Answer::Done,
                })
                .collect(),
            free: (0..count).rev().collect(),
            waiting: VecDeque::new(),
            ended: Vec::new(),
        }
    }

    /// The longest that one client may hold at once, when it is not a single request.
    pub(super) fn share_bytes(&self) -> u64 {
        self.buffers.budget_bytes() / 2
    }

    /// A job with its buffers. `None`: the client is on the list of those that wait, and will be called.
    pub(super) fn take(&mut self, client: u32, cookie: u64, offset: u64, io: &Io) -> Option<u32> {
        if self.waiting.front().is_some_and(|first| *first != client) {
            self.wait(client);
            return None;
        }
        // As many requests as jobs.
        let free = self.free.last().filter(|_| self.requests.has_room());
        let Some(&index) = free else {
            self.wait(client);
            return None;
        };
        let job = self.jobs.get_mut(index as usize)?;
        if !self
            .buffers
            .take_all(u64::from(io.data_bytes), &mut job.buffers)
        {
            self.wait(client);
            return None;
        }
        self.free.pop();
        if self.waiting.front() == Some(&client) {
            self.waiting.pop_front();
        }
        (job.client, job.cookie, job.offset, job.io) = (client, cookie, offset, *io);
        job.answer = Answer::Done;
        Some(index)
    }

    fn wait(&mut self, client: u32) {
        if !self.waiting.contains(&client) {
            self.waiting.push_back(client);
        }
    }

    /// The first of those that wait.
    pub(super) fn first_waiting(&self) -> Option<u32> {
        self.waiting.front().copied()
    }

    /// It waits no more.
    pub(super) fn forget(&mut self, client: u32) {
        self.waiting.retain(|waiting| *waiting != client);
    }

    pub(super) fn job(&self, index: u32) -> Option<&Job> {
        self.jobs.get(index as usize)
    }

    /// Its memory from byte `at` on.
    pub(super) fn rest_of(&self, index: u32, at: u32) -> impl Iterator<Item = Span> {
        let mut skip = at;
        let buffers = self.job(index).map(|job| job.buffers.as_slice());
        buffers
            .unwrap_or_default()
            .iter()
            .filter_map(move |buffer| {
                let span = buffer.span();
                let skipped = skip.min(span.len());
                skip -= skipped;
                span.sub(skipped, span.len() - skipped)
                    .filter(|rest| !rest.is_empty())
            })
    }

    /// Copies payload into a job's memory; returns how many bytes fitted.
    pub(super) fn fill(&self, index: u32, at: u32, bytes: &[u8]) -> u32 {
        let mut left = bytes;
        for span in self.rest_of(index, at) {
            let copied = span.copy_from_slice(left);
            left = left.get(copied..).unwrap_or_default();
        }
        (bytes.len() - left.len()) as u32
    }

    /// The job's data are complete, or it needs none: it goes to the volume.
    pub(super) fn begin(&mut self, index: u32) {
        let Some(job) = self.jobs.get(index as usize) else {
            return;
        };
        let spans = job.buffers.iter().map(Buffer::span);
        let begun = self.requests.begin(&job.io.wanted, spans, u64::from(index));
        debug_assert_eq!(begun, Ok(()), "as many requests as jobs");
    }

    /// The volume has done it, or not: whose job it is.
    pub(super) fn end(&mut self, ended: &Ended) -> Option<(u32, u32)> {
        let index = u32::try_from(ended.user).ok()?;
        let job = self.jobs.get_mut(index as usize)?;
        job.answer = match ended.result {
            Ok(()) if job.io.wanted.op == Op::Read => Answer::Data {
                offset: job.offset,
                len_bytes: job.io.data_bytes,
            },
            Ok(()) => Answer::Done,
            Err(error) => {
                tracing::debug!(%error, cookie = job.cookie, "an NBD request has failed");
                Answer::Failed(Errno::from_host(error.errno()), text_of(&error))
            }
        };
        Some((job.client, index))
    }

    /// The job is over: answered, or nobody is there for it. Returns the bytes it had.
    pub(super) fn release(&mut self, index: u32) -> u32 {
        let Some(job) = self.jobs.get_mut(index as usize) else {
            return 0;
        };
        for buffer in job.buffers.drain(..) {
            self.buffers.put(buffer);
        }
        self.free.push(index);
        job.io.data_bytes
    }
}

fn text_of(error: &IoError) -> &'static str {
    match error {
        IoError::Nvme(_) => "the target reported an error",
        IoError::Invalid(_) => "the target does not take this",
        IoError::TimedOut => "the target has not answered in time",
        IoError::ConnectionLost => "the connection to the target is lost",
        IoError::Closed => "the export ends",
    }
}
