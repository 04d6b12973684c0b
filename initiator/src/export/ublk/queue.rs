//! One queue of a device: what the kernel asks for in its requests, on the reactor of the thread that serves it.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use flexblk_reactor::{Completion, HugePages, Op as ReactorOp, Reactor, SharedMemory, Token};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use zerocopy::{FromBytes, IntoBytes};

use super::abi::{
    DESCRIPTOR_BYTES, IO_RES_OK, IoCommand, IoCommandCode, IoDescriptor, MAX_QUEUE_DEPTH,
    SECTOR_BYTES,
};
use crate::export::{Counters, Kind, Server};
use crate::link::guest::Guest;
use crate::volume::{Channel, Request};
use crate::{Error, IoCompletion, IoError, Op};

const PAGE_BYTES: usize = 4096;

/// How a queue is made.
#[derive(Clone, Debug)]
pub(crate) struct QueueConfig {
    pub(crate) node: Arc<File>,
    pub(crate) q_id: u16,
    pub(crate) depth: u16,
    pub(crate) buffer_bytes: u32,
    pub(crate) block_size: u32,
    pub(crate) ioctl_encoded: bool,
}

/// The kernel's descriptions of requests, by tag.
#[derive(Debug)]
struct Descriptors {
    ptr: NonNull<u8>,
    mapped_bytes: usize,
    depth: u16,
}

impl Descriptors {
    fn map(config: &QueueConfig) -> rustix::io::Result<Descriptors> {
        let area = usize::from(MAX_QUEUE_DEPTH) * DESCRIPTOR_BYTES;
        let offset = usize::from(config.q_id) * area.next_multiple_of(PAGE_BYTES);
        let bytes = usize::from(config.depth) * DESCRIPTOR_BYTES;
        let mapped_bytes = bytes.next_multiple_of(PAGE_BYTES);
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing object.
        let ptr = unsafe {
            mmap(
                std::ptr::null_mut(),
                mapped_bytes,
                ProtFlags::READ,
                MapFlags::SHARED | MapFlags::POPULATE,
                &config.node,
                offset as u64,
            )
        }?;
        Ok(Descriptors {
            ptr: NonNull::new(ptr.cast()).ok_or(rustix::io::Errno::INVAL)?,
            mapped_bytes,
            depth: config.depth,
        })
    }

    /// What the kernel wrote before it completed the command of that tag.
    #[inline]
    fn get(&self, tag: u16) -> Option<IoDescriptor> {
        if tag >= self.depth {
            return None;
        }
        let mut bytes = [0_u8; DESCRIPTOR_BYTES];
        // SAFETY: inside the mapping, since tag < depth; the kernel writes a descriptor only while the command of its tag is
        // with it, and we read it only while it is not.
        unsafe {
            let from = self.ptr.as_ptr().add(usize::from(tag) * DESCRIPTOR_BYTES);
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), DESCRIPTOR_BYTES);
        }
        IoDescriptor::read_from_bytes(&bytes).ok()
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: pointer and length are those of our mmap, and nobody else has them.
        let _ = unsafe { munmap(self.ptr.as_ptr().cast(), self.mapped_bytes) };
    }
}

/// Where a tag is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// With the kernel, which will come back with a request.
    Kernel,
    /// A request that waits for room in the channel.
    Waiting,
    /// On its way to the target and back.
    Volume { started: std::time::Instant, op: Op },
    /// The kernel was told of the end while the channel still had it, and its buffer.
    Abandoned,
    /// It will not come back.
    Ended,
}

/// A request that the kernel gets back; its tag waits for the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Commit {
    tag: u16,
    result: i32,
    buffer: TagBuffer,
}

/// Where the kernel finds the data of what was read, and copies that of the next write to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TagBuffer {
    /// The tag's own.
    Own,
    /// The one behind those of all tags, whose contents nobody looks at.
    Spare,
}

/// One queue.
#[derive(Debug)]
pub(crate) struct Queue {
    config: QueueConfig,
    owner: u8,
    descriptors: Descriptors,
    /// A buffer for each tag: the kernel copies a write's data there and a read's data from there. Then the spare one.
    memory: Arc<SharedMemory>,
    places: Vec<Place>,
    ended: u16,
    /// Tags with requests that nobody has looked at.
    incoming: VecDeque<u16>,
    commits: Vec<Commit>,
    counters: Arc<Counters>,
    /// Requests are answered with an error from now on: the device goes, and nothing may hold it back.
    aborting: bool,
}

impl Queue {
    /// In the thread that will serve it; `channel` gets its memory.
    pub(crate) fn new(
        config: QueueConfig,
        counters: Arc<Counters>,
        channel: &mut Channel,
    ) -> Result<Queue, Error> {
        let descriptors = Descriptors::map(&config).map_err(|cause| Error::System {
            what: "mapping the requests of a ublk queue",
            cause: cause.into(),
        })?;
        let queue = Queue::with_descriptors(config, counters, descriptors)?;
        channel.register_memory(&queue.memory)?;
        Ok(queue)
    }

    fn with_descriptors(
        config: QueueConfig,
        counters: Arc<Counters>,
        descriptors: Descriptors,
    ) -> Result<Queue, Error> {
        let bytes = (u64::from(config.depth) + 1) * u64::from(config.buffer_bytes);
        let memory = SharedMemory::create("flexblk ublk", bytes, HugePages::No)
            .map_err(|error| Error::Transport(error.to_string()))?;
        let depth = usize::from(config.depth);
        Ok(Queue {
            owner: 0,
            descriptors,
            memory,
            places: vec![Place::Kernel; depth],
            ended: 0,
            incoming: VecDeque::with_capacity(depth),
            commits: Vec::with_capacity(depth),
            counters,
            aborting: false,
            config,
        })
    }

    /// What the driver is told, with a fetch as if there were something to give back.
    fn io_command(&self, commit: &Commit) -> IoCommand {
        let index = match commit.buffer {
            TagBuffer::Own => commit.tag,
            TagBuffer::Spare => self.config.depth,
        };
        let offset = u64::from(index) * u64::from(self.config.buffer_bytes);
        IoCommand {
            q_id: self.config.q_id,
            tag: commit.tag,
            result: commit.result,
            addr: self.memory.as_ptr() as u64 + offset,
        }
    }

    fn command(&self, reactor: &mut Reactor, code: IoCommandCode, commit: &Commit) {
        let command = self.io_command(commit);
        let mut cmd = [0; 16];
        cmd.copy_from_slice(command.as_bytes());
        let op = ReactorOp::UringCmd {
            fd: self.config.node.as_raw_fd(),
            cmd_op: code.code(self.config.ioctl_encoded),
            cmd,
        };
        // SAFETY: the driver copies at most `buffer_bytes` (its max_io_buf_bytes) to and from the buffer, which is memory of
        // ours as long as the reactor lives: a worker that ends gives the server to its keeper, the file with it. While a
        // request is ours the driver does not touch the buffer, and while the channel still has the buffer of one that was
        // given back the driver gets the spare one, which nobody reads.
        unsafe { reactor.submit(op, Token::new(self.owner, u64::from(commit.tag))) };
    }

    /// Begins a request; false when there was no room.
    fn begin(&mut self, channel: &mut Channel, tag: u16) -> bool {
        let Some(descriptor) = self.descriptors.get(tag) else {
            return true;
        };
        let Some((request, op)) = self.request(tag, &descriptor) else {
            tracing::warn!(?descriptor, "a request that a ublk device does not have");
            self.counters.begin();
            self.counters.count(Kind::Other, 0, true, Duration::ZERO);
            self.commit(tag, -libc::EOPNOTSUPP);
            return true;
        };
        let started = channel.now();
        if channel.submit(&request, u64::from(tag)).is_err() {
            return false;
        }
        self.counters.begin();
        self.set(tag, Place::Volume { started, op });
        true
    }

    fn request(&self, tag: u16, descriptor: &IoDescriptor) -> Option<(Request, Op)> {
        let op = descriptor.op()?;
        let per_block = self.config.block_size / SECTOR_BYTES;
        let bytes = descriptor.nr_sectors.checked_mul(SECTOR_BYTES);
        let buffer = match op {
            Op::Read | Op::Write { .. } => {
                let offset = u64::from(tag) * u64::from(self.config.buffer_bytes);
                let bytes = bytes.filter(|bytes| *bytes <= self.config.buffer_bytes)?;
                Some(self.memory.span(offset, bytes)?)
            }
            _ => None,
        };
        let request = Request {
            op,
            lba: descriptor.start_sector / u64::from(per_block),
            blocks: descriptor.nr_sectors / per_block,
            buffer,
        };
        Some((request, op))
    }

    fn set(&mut self, tag: u16, place: Place) {
        if let Some(slot) = self.places.get_mut(usize::from(tag)) {
            *slot = place;
        }
    }

    fn place(&self, tag: u16) -> Place {
        self.places
            .get(usize::from(tag))
            .copied()
            .unwrap_or(Place::Ended)
    }

    fn commit(&mut self, tag: u16, result: i32) {
        self.set(tag, Place::Kernel);
        // The kernel makes another request of the tag at once. The channel may still have the tag's own buffer then, and
        // send what that request puts there as the data of the one that was given back. Once we abort, every result is
        // an error, so there is nothing in the buffer to be looked at either.
        let buffer = if self.aborting {
            TagBuffer::Spare
        } else {
            TagBuffer::Own
        };
        self.commits.push(Commit {
            tag,
            result,
            buffer,
        });
    }
}

impl Guest for Queue {
    fn flush(&mut self, reactor: &mut Reactor) {
        let mut commits = std::mem::take(&mut self.commits);
        for commit in commits.drain(..) {
            self.command(reactor, IoCommandCode::CommitAndFetch, &commit);
        }
        self.commits = commits;
    }

    fn on_completion(&mut self, _: &mut Reactor, completion: &Completion) {
        let Ok(tag) = u16::try_from(completion.token.slot()) else {
            return;
        };
        if completion.result == IO_RES_OK {
            self.set(tag, Place::Waiting);
            self.incoming.push_back(tag);
            return;
        }
        // -ENODEV: the device stops. Anything else: the kernel does not take the tag back.
        if completion.result != -libc::ENODEV && completion.result != -libc::ECANCELED {
            tracing::error!(tag, result = completion.result, "ublk refused a command");
        }
        if self.place(tag) != Place::Ended {
            self.set(tag, Place::Ended);
            self.ended += 1;
        }
    }
}

impl Server for Queue {
    fn start(&mut self, owner: u8, reactor: &mut Reactor) -> Result<(), Error> {
        self.owner = owner;
        for tag in 0..self.config.depth {
            let fetch = Commit {
                tag,
                result: 0,
                buffer: TagBuffer::Own,
            };
            self.command(reactor, IoCommandCode::Fetch, &fetch);
        }
        // The kernel starts the device when it has them all.
        reactor
            .submit_queued()
            .map(drop)
            .map_err(|error| Error::Transport(error.to_string()))
    }

    fn on_io(&mut self, completion: &IoCompletion) {
        let Ok(tag) = u16::try_from(completion.tag) else {
            return;
        };
        let Place::Volume { started, op } = self.place(tag) else {
            return;
        };
        let sectors = self.descriptors.get(tag).map_or(0, |it| it.nr_sectors);
        let bytes = sectors.saturating_mul(SECTOR_BYTES);
        let result = match completion.result {
            Ok(()) => result_of(op, bytes),
            Err(error) => {
                tracing::warn!(%error, "request failed");
                error_of(&error)
            }
        };
        let failed = completion.result.is_err();
        self.counters
            .count(Kind::of(op), bytes, failed, started.elapsed());
        self.commit(tag, result);
    }

    fn submit(&mut self, channel: &mut Channel) {
        while let Some(tag) = self.incoming.pop_front() {
            if self.aborting {
                self.commit(tag, -libc::EIO);
            } else if !self.begin(channel, tag) {
                self.incoming.push_front(tag);
                return;
            }
        }
    }

    fn stop(&mut self, _: &mut Reactor) {
        self.aborting = true;
        for tag in 0..self.config.depth {
            if let Place::Volume { started, op } = self.place(tag) {
                self.counters
                    .count(Kind::of(op), 0, true, started.elapsed());
                self.commit(tag, -libc::EIO);
                self.set(tag, Place::Abandoned);
            }
        }
        while let Some(tag) = self.incoming.pop_front() {
            self.commit(tag, -libc::EIO);
        }
    }

    fn is_stopped(&self) -> bool {
        self.ended >= self.config.depth
    }
}

/// What the driver is told of a request that was done: bytes, if it carries data. Of others it looks at the sign only, and
/// 2 GiB would be an error.
fn result_of(op: Op, bytes: u32) -> i32 {
    match op {
        Op::Read | Op::Write { .. } => i32::try_from(bytes).unwrap_or(i32::MAX),
        _ => 0,
    }
}

/// What the kernel makes a block status of.
fn error_of(error: &IoError) -> i32 {
    -error.errno().abs()
}

#[cfg(test)]
mod tests;
