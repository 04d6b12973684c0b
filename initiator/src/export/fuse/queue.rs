//! One descriptor of `/dev/fuse` on a thread's reactor: requests come in, replies go out, both through the ring
//! (before Linux 6.9 by system calls).
//!
//! A slot is one stretch of memory, `[ ... head | payload ... ]`, with the payload at a page boundary. A request is read
//! so that its arguments end where the payload begins, and a reply to a read begins as far before it as its header is
//! long. So each message is one piece, what a write carries is used where it was read, and what was read from the
//! namespace is answered from where it arrived.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use flexblk_reactor::{Completion, HugePages, Op, Reactor, SharedMemory, Span, Token};
use rustix::io::Errno;

use super::Settings;
use super::wire::{OUT_HEADER_LEN, Operation, REPLY_LEN, REQUEST_LEN, Reply, Request};
use crate::export::{Counters, Ended, Extent, Kind, Requests, Server, Wanted};
use crate::link::guest::Guest;
use crate::volume::Channel;
use crate::{Error, IoCompletion, IoError};

const PAGE: u32 = 4096;
/// What a token's low 16 bits leave for saying what ended.
const READ: u64 = 0 << 16;
const WRITE: u64 = 1 << 16;
const POLL: u64 = 2 << 16;
/// Reads submitted together at most. Each one too many costs a look at an empty queue.
const LARGEST_BATCH: u16 = 16;

/// Index of a slot.
type SlotIndex = u16;

#[derive(Clone, Copy)]
struct Slot {
    /// Head and payload.
    message: Span,
    payload: Span,
    /// Of the request in it.
    unique: u64,
    operation: Operation,
    /// Bytes that its reply is about.
    bytes: u32,
    since: Instant,
    /// The part of `message` that answers it.
    reply: Span,
}

/// How we hear of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listening {
    /// The kernel may have some: read.
    Hungry,
    /// It had none; a poll tells when it has.
    Polling,
    /// The connection is over: unmounted or aborted.
    Ended,
}

/// How messages are moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    /// Through the ring, if that works.
    Untried,
    Ring,
    /// Before Linux 6.9, io_uring answers EAGAIN to whatever is asked of `/dev/fuse` without blocking, ready or not
    /// (since then it looks with poll): plain system calls.
    SystemCalls,
}

/// One descriptor of a FUSE connection.
pub(super) struct Queue {
    fd: OwnedFd,
    /// The slots' memory: the kernel and the channel use it as long as this lives.
    _memory: Arc<SharedMemory>,
    settings: Arc<Settings>,
    counters: Arc<Counters>,
    owner: u8,
    slots: Vec<Slot>,
    free: Vec<SlotIndex>,
    /// Requests that need I/O and are not yet in `requests`.
    arrived: VecDeque<SlotIndex>,
    requests: Requests,
    ended: Vec<Ended>,
    /// Whose replies leave with the next flush.
    replies: Vec<SlotIndex>,
    listening: Listening,
    /// Reads in flight, and how many of the last ones brought nothing.
    reads: u16,
    empty: u16,
    batch: u16,
    engine: Engine,
    /// A poll has said that there is something to read.
    polled: bool,
}

impl Queue {
    /// On the channel's thread; `fd` does not block.
    pub(super) fn new(
        fd: OwnedFd,
        settings: Arc<Settings>,
        counters: Arc<Counters>,
        channel: &mut Channel,
    ) -> Result<Queue, Error> {
        let (depth, max_write) = (settings.depth, settings.max_write);
        let len = u64::from(depth) * u64::from(PAGE + max_write);
        let memory = SharedMemory::create("flexblk fuse", len, HugePages::No)
            .map_err(|error| Error::Transport(error.to_string()))?;
        channel.register_memory(&memory)?;
        let now = channel.now();
        let slot = |index: SlotIndex| {
            let payload_at = u64::from(index) * u64::from(PAGE + max_write) + u64::from(PAGE);
            let head = REQUEST_LEN as u32;
            Some(Slot {
                message: memory.span(payload_at - u64::from(head), head + max_write)?,
                payload: memory.span(payload_at, max_write)?,
                unique: 0,
                operation: Operation::Unknown,
                bytes: 0,
                since: now,
                reply: Span::empty(),
            })
        };
        let slots: Vec<Slot> = (0..depth).map_while(slot).collect();
        let count = slots.len();
        Ok(Queue {
            fd,
            owner: 0,
            free: (0..count as SlotIndex).rev().collect(),
            arrived: VecDeque::with_capacity(count),
            requests: Requests::new(u32::from(depth), &settings.geometry.now()),
            ended: Vec::with_capacity(count),
            replies: Vec::with_capacity(count),
            slots,
            _memory: memory,
            settings,
            counters,
            listening: Listening::Hungry,
            reads: 0,
            empty: 0,
            batch: 1,
            engine: Engine::Untried,
            polled: false,
        })
    }

    /// Answers a request; the reply leaves with the next turn.
    fn reply(&mut self, index: SlotIndex, reply: &Reply) {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return;
        };
        let mut bytes = [0; REPLY_LEN];
        let len = reply.emit(slot.unique, &mut bytes) as u32;
        let message = match *reply {
            Reply::Data(data) => {
                let at = (REQUEST_LEN - OUT_HEADER_LEN) as u32;
                slot.message.sub(at, len + data)
            }
            _ => slot.message.sub(0, len),
        };
        if let (Some(message), Some(bytes)) = (message, bytes.get(..len as usize)) {
            message.copy_from_slice(bytes);
            slot.reply = message;
            self.replies.push(index);
        }
    }

    fn token(&self, kind: u64, index: SlotIndex) -> Token {
        Token::new(self.owner, kind | u64::from(index))
    }

    fn submit(&mut self, reactor: &mut Reactor, op: Op, token: Token) {
        // SAFETY: slots are part of `memory`, which lives until the completion, with the descriptor: a worker leaves its
        // server to the reactor's keeper. A slot belongs to one operation, or to the request in it.
        unsafe { reactor.submit(op, token) };
    }

    fn submit_reads(&mut self, reactor: &mut Reactor) {
        while self.reads < self.batch {
            let Some(index) = self.free.pop() else { break };
            let Some(slot) = self.slots.get(usize::from(index)) else {
                break;
            };
            let op = Op::Read {
                fd: self.fd.as_raw_fd(),
                ptr: slot.message.as_ptr(),
                len: slot.message.len(),
                offset: u64::MAX,
                fixed: None,
            };
            let token = self.token(READ, index);
            self.reads += 1;
            self.submit(reactor, op, token);
        }
    }

    /// The same with system calls; until there is nothing left.
    fn read_directly(&mut self) {
        while self.listening == Listening::Hungry {
            let Some(index) = self.free.pop() else { return };
            let Some(slot) = self.slots.get(usize::from(index)) else {
                return;
            };
            // SAFETY: the slot was free, so nobody else touches its memory.
            let message = unsafe { slot.message.as_mut_slice() };
            let result = rustix::io::read(&self.fd, message)
                .map(|len| len as u32)
                .map_err(Errno::raw_os_error);
            if result == Err(libc::EAGAIN) {
                self.free.push(index);
                self.listening = Listening::Polling;
                return;
            }
            self.on_read(index, result);
        }
    }

    fn write_directly(&mut self, index: SlotIndex) {
        if let Some(slot) = self.slots.get(usize::from(index)) {
            // SAFETY: the reply was written before, and its slot is not given to anybody until it is free.
            let result = rustix::io::write(&self.fd, unsafe { slot.reply.as_slice() });
            self.on_written(result.map_or_else(|error| -error.raw_os_error(), |_| 0));
        }
        self.free.push(index);
    }

    fn on_read(&mut self, index: SlotIndex, result: Result<u32, i32>) {
        match result {
            Ok(len) => self.on_request(index, len as usize),
            Err(errno) => {
                self.free.push(index);
                match errno {
                    libc::EAGAIN => self.empty += 1,
                    // The request that we were to get was interrupted, or we were.
                    libc::ENOENT | libc::EINTR => {}
                    libc::ENODEV | libc::ECONNABORTED | libc::ECANCELED => {
                        self.listening = Listening::Ended;
                    }
                    errno => {
                        let error = std::io::Error::from_raw_os_error(errno);
                        tracing::error!(%error, "reading /dev/fuse");
                        self.listening = Listening::Ended;
                    }
                }
            }
        }
    }

    fn on_request(&mut self, index: SlotIndex, len: usize) {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return;
        };
        let mut head = [0; REQUEST_LEN];
        slot.message.copy_to_slice(&mut head);
        let request = match Request::parse(&head, len) {
            Ok(request) => request,
            Err(error) => {
                // Nobody can say which request to answer: no kernel does that, and its caller would wait for ever.
                tracing::error!(%error, "the FUSE connection ends");
                self.listening = Listening::Ended;
                self.free.push(index);
                return;
            }
        };
        slot.unique = request.unique;
        slot.operation = request.operation;
        let geometry = &self.settings.geometry;
        let reply = match request.operation {
            Operation::Read { .. }
            | Operation::Write { .. }
            | Operation::Sync
            | Operation::Zero { .. } => {
                self.arrived.push_back(index);
                return;
            }
            Operation::Forget => {
                self.free.push(index);
                return;
            }
            Operation::Attributes => Reply::Attributes {
                size: geometry.len_bytes(),
                block_size: geometry.block_bytes,
                read_only: geometry.read_only,
            },
            Operation::StatFs => Reply::StatFs {
                size: geometry.len_bytes(),
                block_size: geometry.block_bytes,
            },
            Operation::Open => Reply::Opened,
            Operation::Release | Operation::Destroy => Reply::Done,
            Operation::Unknown => Reply::Error(libc::ENOSYS),
        };
        self.reply(index, &reply);
    }

    fn on_written(&mut self, result: i32) {
        match -result {
            errno if errno <= 0 => {}
            // Nobody waits for the reply any more.
            libc::ENOENT => {}
            libc::ENODEV | libc::ECONNABORTED | libc::ECANCELED => {
                self.listening = Listening::Ended;
            }
            errno => {
                let error = std::io::Error::from_raw_os_error(errno);
                tracing::error!(%error, "answering /dev/fuse");
            }
        }
    }
}

impl Guest for Queue {
    fn flush(&mut self, reactor: &mut Reactor) {
        if self.engine == Engine::SystemCalls {
            while let Some(index) = self.replies.pop() {
                self.write_directly(index);
            }
            if self.listening == Listening::Hungry {
                self.read_directly();
                if self.listening == Listening::Polling {
                    self.poll(reactor);
                }
            }
            return;
        }
        while let Some(index) = self.replies.pop() {
            let message = self
                .slots
                .get(usize::from(index))
                .map_or(Span::empty(), |slot| slot.reply);
            let op = Op::Write {
                fd: self.fd.as_raw_fd(),
                ptr: message.as_ptr(),
                len: message.len(),
                offset: u64::MAX,
                fixed: None,
                dsync: false,
            };
            let token = self.token(WRITE, index);
            self.submit(reactor, op, token);
        }
        if self.listening == Listening::Hungry && self.reads == 0 {
            self.submit_reads(reactor);
        }
    }

    fn on_completion(&mut self, reactor: &mut Reactor, completion: &Completion) {
        let slot = completion.token.slot();
        let index = (slot & 0xFFFF) as SlotIndex;
        match slot & !0xFFFF {
            POLL => {
                self.polled = true;
                if self.listening == Listening::Polling {
                    self.listening = Listening::Hungry;
                }
            }
            READ => {
                self.reads -= 1;
                let result = completion.bytes();
                if result.is_ok() {
                    self.engine = Engine::Ring;
                }
                self.on_read(index, result);
                if self.reads == 0 {
                    self.after_reads(reactor);
                }
            }
            _ => {
                self.on_written(completion.result);
                self.free.push(index);
            }
        }
    }
}

impl Queue {
    /// All of a batch are back.
    fn after_reads(&mut self, reactor: &mut Reactor) {
        let empty = std::mem::take(&mut self.empty);
        if self.listening != Listening::Hungry {
            return;
        }
        if empty == 0 {
            self.batch = (self.batch * 2).min(LARGEST_BATCH);
            return;
        }
        self.batch = (self.batch - empty.min(self.batch)).max(1);
        if self.engine == Engine::Untried && self.polled {
            // Poll had said that there is something.
            self.engine = Engine::SystemCalls;
            return;
        }
        self.listening = Listening::Polling;
        self.poll(reactor);
    }

    fn poll(&mut self, reactor: &mut Reactor) {
        let op = Op::PollAdd {
            fd: self.fd.as_raw_fd(),
            mask: libc::POLLIN as u32,
            multi: false,
        };
        let token = self.token(POLL, 0);
        self.submit(reactor, op, token);
    }
}

/// What becomes of the request in a slot.
enum Turn {
    Begin(Wanted),
    /// With no blocks there is nothing to do.
    Answer(Reply),
}

impl Queue {
    /// What a request means on the namespace, or an errno. Notes the bytes that its reply is about.
    fn plan(slot: &mut Slot, settings: &Settings) -> Result<Turn, i32> {
        let geometry = &settings.geometry;
        let now = geometry.now();
        let io = |op, offset, bytes| {
            let extent = now.extent(offset, bytes).map_err(|_| libc::EINVAL)?;
            let then_flush = false;
            Ok(Turn::Begin(Wanted {
                op,
                extent,
                then_flush,
            }))
        };
        let writable = |offset: u64, bytes: u64| {
            if geometry.read_only {
                return Err(libc::EROFS);
            }
            // The file does not grow.
            match offset.checked_add(bytes) {
                Some(end) if end <= now.len_bytes => Ok(()),
                _ => Err(libc::ENOSPC),
            }
        };
        slot.bytes = 0;
        match slot.operation {
            Operation::Read { offset, size } => {
                // At the end of the file there is less, as read(2) has it.
                let there = now.len_bytes.saturating_sub(offset);
                let size = u64::from(size.min(slot.payload.len())).min(there);
                slot.bytes = size as u32;
                if size == 0 {
                    return Ok(Turn::Answer(Reply::Data(0)));
                }
                io(crate::Op::Read, offset, size)
            }
            Operation::Write { offset, size } => {
                writable(offset, u64::from(size))?;
                if size > slot.payload.len() {
                    return Err(libc::EINVAL);
                }
                slot.bytes = size;
                if size == 0 {
                    return Ok(Turn::Answer(Reply::Written(0)));
                }
                io(crate::Op::Write { fua: false }, offset, u64::from(size))
            }
            Operation::Zero {
                offset,
                length,
                deallocate,
            } => {
                writable(offset, length)?;
                let op = geometry.zeroing(deallocate).ok_or(libc::EOPNOTSUPP)?;
                io(op, offset, length)
            }
            Operation::Sync => Ok(Turn::Begin(Wanted {
                op: crate::Op::Flush,
                extent: Extent { lba: 0, blocks: 0 },
                then_flush: false,
            })),
            _ => Err(libc::ENOSYS),
        }
    }

    fn begin(&mut self, index: SlotIndex, now: Instant) {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return;
        };
        slot.since = now;
        let reply = match Self::plan(slot, &self.settings) {
            Ok(Turn::Begin(wanted)) => {
                let data = slot.payload.sub(0, slot.bytes);
                let data = data.filter(|span| !span.is_empty());
                match self.requests.begin(&wanted, data, u64::from(index)) {
                    Ok(()) => return self.counters.begin(),
                    // There are as many requests as slots.
                    Err(_) => Reply::Error(libc::EIO),
                }
            }
            Ok(Turn::Answer(reply)) => reply,
            Err(errno) => Reply::Error(errno),
        };
        self.reply(index, &reply);
    }

    fn finish(&mut self, ended: &Ended, now: Instant) {
        let index = ended.user as SlotIndex;
        let Some(slot) = self.slots.get(usize::from(index)) else {
            return;
        };
        let (kind, good) = match slot.operation {
            Operation::Read { .. } => (Kind::Read, Reply::Data(slot.bytes)),
            Operation::Write { .. } => (Kind::Write, Reply::Written(slot.bytes)),
            _ => (Kind::Other, Reply::Done),
        };
        let took = now.saturating_duration_since(slot.since);
        let failed = ended.result.is_err();
        self.counters.count(kind, slot.bytes, failed, took);
        let reply = match ended.result {
            Ok(()) => good,
            Err(error) => Reply::Error(errno_of(&error)),
        };
        self.reply(index, &reply);
    }
}

impl Server for Queue {
    fn start(&mut self, owner: u8, _: &mut Reactor) -> Result<(), Error> {
        self.owner = owner;
        Ok(())
    }

    fn on_io(&mut self, completion: &IoCompletion) {
        self.ended.extend(self.requests.completed(completion));
    }

    fn submit(&mut self, channel: &mut Channel) {
        let now = channel.now();
        while let Some(index) = self.arrived.pop_front() {
            self.begin(index, now);
        }
        self.requests
            .submit(|request, tag| channel.submit(request, tag), &mut self.ended);
        while let Some(ended) = self.ended.pop() {
            self.finish(&ended, now);
        }
    }

    fn stop(&mut self, _: &mut Reactor) {
        self.listening = Listening::Ended;
    }

    /// Unmounted or aborted: nobody waits for what is under way.
    fn is_stopped(&self) -> bool {
        self.listening == Listening::Ended
    }
}

/// What the block layer above shall see. It knows few errors, and a lost connection is an I/O error to it.
fn errno_of(error: &IoError) -> i32 {
    match error.errno() {
        errno @ (libc::ENOSPC | libc::EOPNOTSUPP | libc::EROFS | libc::ETIMEDOUT | libc::EBADE) => {
            errno
        }
        _ => libc::EIO,
    }
}
