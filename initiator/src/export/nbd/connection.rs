//! One client's socket on its worker's reactor: one receive and one send in flight at most.
//!
//! Receives: headers of many requests at once into a buffer of the connection, small payloads with them; of a long
//! payload what is still to come goes straight into the request's I/O buffers, with the next header behind it.
//! Sends: the replies that are ready in one `sendmsg`, data gathered from where the target has put them.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use flexblk_reactor::{Completion, Op, Reactor, Token};
use rustix::net::{Shutdown, shutdown};

use super::protocol::{
    Answer, Broken, Command, Export, Handshake, MAX_REPLY_HEAD_BYTES, MAX_REQUEST_BYTES, ReplyHead,
    RequestHeader, Session, Step, Style,
};
use super::shared::Shared;
use crate::link::tcp::batch::Batch;

/// Requests of one client from header to reply.
const MAX_PENDING: u32 = 256;
/// Replies that one send carries about.
const BATCH_REPLIES: u16 = 128;
/// Bytes after which a send gets no more replies: their buffers come back soon, while they are in the cache.
const BATCH_BYTES: usize = 1 << 20;
/// For headers and short payloads.
const RECEIVE_BYTES: usize = 64 << 10;
/// Payload still to come from which on nothing but one header is received behind it: the next payload is as long, most
/// likely, and shall not be copied.
const LONG_BYTES: u32 = 16 << 10;
/// Answers to options that are made at once.
const TALK_BYTES: usize = 64 << 10;

const OPERATIONS: u64 = 4;
const RECEIVE: u64 = 0;
const SEND: u64 = 1;

/// The connection that a token belongs to.
pub(super) fn index_of(token: Token) -> u32 {
    u32::try_from(token.slot() / OPERATIONS).unwrap_or(u32::MAX)
}

/// Everything that the kernel may use; boxed, so that it stays where it is.
#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    owner: u8,
    /// Its number in the worker.
    index: u32,
    phase: Phase,
    style: Style,
    input: Input,
    /// Received and not looked at: `start..end`.
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
    receiving: bool,
    /// Of the receive in flight, what goes into a request's buffers.
    direct_bytes: u32,
    receive_header: libc::msghdr,
    receive_entries: Vec<libc::iovec>,
    /// The last payload was a long one.
    long_payloads: bool,
    /// No more requests are taken before replies are sent, or there is memory.
    stalled: bool,
    /// Replies that are ready.
    replies: VecDeque<Reply>,
    sending: bool,
    batch: Batch,
    batch_jobs: Vec<u32>,
    /// Replies in the batch, jobs or not.
    batch_replies: u32,
    send_header: libc::msghdr,
    /// Negotiation: to be sent, and how much of it is.
    talk: Vec<u8>,
    talk_sent: usize,
    /// Requests taken and not answered.
    pending: u32,
    /// Bytes of buffers that these have.
    held_bytes: u64,
    pub(super) since: Instant,
    /// When the client last read or sent something.
    progress: Instant,
    /// On the server's list of those with something to submit.
    pub(super) dirty: bool,
}

#[derive(Debug)]
enum Phase {
    Handshake(Box<Handshake>),
    Session(Box<Session>),
    /// Nothing more is taken; what is under way is answered.
    Leaving,
    /// The kernel and the volume let go of what they have.
    Closed,
}

#[derive(Clone, Copy, Debug)]
enum Input {
    /// A request's header, or options.
    Header,
    /// The data of a write.
    Payload { job: u32, at: u32, len: u32 },
    /// The payload of a request that is refused.
    Skip { left: u32, reply: Reply },
}

#[derive(Clone, Copy, Debug)]
enum Reply {
    Job(u32),
    Plain {
        cookie: u64,
        offset: u64,
        answer: Answer,
    },
}

impl Connection {
    pub(super) fn new(
        owner: u8,
        index: u32,
        socket: OwnedFd,
        export: Export,
        now: Instant,
    ) -> Box<Connection> {
        // SAFETY: all zeroes is valid for this C structure.
        let (receive_header, send_header) = unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        Box::new(Connection {
            socket,
            owner,
            index,
            phase: Phase::Handshake(Box::new(Handshake::new(export))),
            style: Style::Simple,
            input: Input::Header,
            bytes: vec![0; RECEIVE_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            receiving: false,
            direct_bytes: 0,
            receive_header,
            receive_entries: Vec::with_capacity(4),
            long_payloads: false,
            stalled: false,
            replies: VecDeque::with_capacity(MAX_PENDING as usize),
            sending: false,
            batch: Batch::new(BATCH_REPLIES, 0),
            batch_jobs: Vec::with_capacity(usize::from(BATCH_REPLIES)),
            batch_replies: 0,
            send_header,
            talk: Handshake::greeting().to_vec(),
            talk_sent: 0,
            pending: 0,
            held_bytes: 0,
            since: now,
            progress: now,
            dirty: false,
        })
    }

    fn token(&self, operation: u64) -> Token {
        Token::new(self.owner, u64::from(self.index) * OPERATIONS + operation)
    }

    /// Nothing of it is in use any more.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Closed) && !self.receiving && !self.sending && self.pending == 0
    }

    pub(super) fn is_negotiating(&self) -> bool {
        matches!(self.phase, Phase::Handshake(_))
    }

    /// It keeps buffers from others because the client neither reads nor sends, since this time.
    pub(super) fn stuck_since(&self) -> Option<Instant> {
        let on_the_client =
            self.sending || (self.receiving && matches!(self.input, Input::Payload { .. }));
        (self.held_bytes > 0 && on_the_client).then_some(self.progress)
    }

    // ---- input ---------------------------------------------------------------------------------

    /// Looks at what has been received, as far as there is room for requests.
    pub(super) fn pump(&mut self, shared: &mut Shared) {
        self.stalled = false;
        if let Err(broken) = self.take_input(shared) {
            tracing::info!(client = self.index, %broken, "an NBD client is closed");
            self.close(shared);
        }
        self.end_if_done(shared);
    }

    fn take_input(&mut self, shared: &mut Shared) -> Result<(), Broken> {
        self.negotiate()?;
        loop {
            let Phase::Session(session) = &self.phase else {
                return Ok(());
            };
            let received = self.bytes.get(self.start..self.end).unwrap_or_default();
            match self.input {
                Input::Header => {
                    let Some(header) = RequestHeader::parse(self.style, received)? else {
                        return Ok(());
                    };
                    if self.pending >= MAX_PENDING {
                        self.stalled = true;
                        return Ok(());
                    }
                    let command = session.command(&header)?;
                    if !self.start_command(shared, &header, &command) {
                        self.stalled = true;
                        return Ok(());
                    }
                    self.start += RequestHeader::len_of(self.style);
                }
                Input::Payload { job, at, len } => {
                    let here = received.len().min((len - at) as usize);
                    let copied = shared.fill(job, at, received.get(..here).unwrap_or_default());
                    self.start += copied as usize;
                    let at = at + copied;
                    if at < len {
                        self.input = Input::Payload { job, at, len };
                        return Ok(());
                    }
                    self.input = Input::Header;
                    shared.begin(job);
                }
                Input::Skip { left, reply } => {
                    let skipped = left.min(u32::try_from(received.len()).unwrap_or(u32::MAX));
                    self.start += skipped as usize;
                    let left = left - skipped;
                    if left > 0 {
                        self.input = Input::Skip { left, reply };
                        return Ok(());
                    }
                    self.input = Input::Header;
                    self.replies.push_back(reply);
                }
            }
        }
    }

    fn negotiate(&mut self) -> Result<(), Broken> {
        // One answer is read before the next question is looked at.
        if !self.talk.is_empty() {
            return Ok(());
        }
        while let Phase::Handshake(handshake) = &mut self.phase
            && self.talk.len() < TALK_BYTES
        {
            let mut input = self.bytes.get(self.start..self.end).unwrap_or_default();
            let before = input.len();
            let step = handshake.handle(&mut input, &mut self.talk)?;
            self.start += before - input.len();
            match step {
                Step::More => return Ok(()),
                Step::Again => {}
                Step::Session(session) => {
                    tracing::info!(client = self.index, style = ?session.style, "an NBD client uses the export");
                    self.style = session.style;
                    self.phase = Phase::Session(Box::new(session));
                }
                Step::Abort => self.phase = Phase::Leaving,
            }
        }
        Ok(())
    }

    /// False when there is no room for it now.
    #[inline]
    fn start_command(
        &mut self,
        shared: &mut Shared,
        header: &RequestHeader,
        command: &Command,
    ) -> bool {
        let &RequestHeader { cookie, offset, .. } = header;
        let plain = |answer| Reply::Plain {
            cookie,
            offset,
            answer,
        };
        match *command {
            Command::Io(io) => {
                let held_bytes = self.held_bytes + u64::from(io.data_bytes);
                if self.held_bytes > 0 && held_bytes > shared.share_bytes() {
                    return false;
                }
                let Some(job) = shared.take(self.index, cookie, offset, &io) else {
                    return false;
                };
                self.held_bytes = held_bytes;
                if io.is_write {
                    let len = io.data_bytes;
                    self.long_payloads = len >= LONG_BYTES;
                    self.input = Input::Payload { job, at: 0, len };
                } else {
                    self.long_payloads = false;
                    shared.begin(job);
                }
            }
            Command::Nothing => self.replies.push_back(plain(Answer::Done)),
            Command::Refuse {
                errno,
                text,
                payload_bytes,
            } => {
                let reply = plain(Answer::Failed(errno, text));
                if payload_bytes > 0 {
                    let left = payload_bytes;
                    self.input = Input::Skip { left, reply };
                } else {
                    self.replies.push_back(reply);
                }
            }
            Command::Disconnect => {
                self.phase = Phase::Leaving;
                return true;
            }
        }
        self.pending += 1;
        true
    }

    // ---- output --------------------------------------------------------------------------------

    /// A job of this client has ended.
    #[inline]
    pub(super) fn answer(&mut self, shared: &mut Shared, job: u32) {
        if matches!(self.phase, Phase::Closed) {
            self.release(shared, job);
        } else {
            self.replies.push_back(Reply::Job(job));
        }
    }

    fn release(&mut self, shared: &mut Shared, job: u32) {
        self.held_bytes -= u64::from(shared.release(job));
        self.pending -= 1;
    }

    fn fill_batch(&mut self, shared: &Shared) {
        let mut bytes = 0;
        while let Some(&reply) = self.replies.front() {
            let (cookie, offset, answer, entries) = match reply {
                Reply::Plain {
                    cookie,
                    offset,
                    answer,
                } => (cookie, offset, answer, 1),
                Reply::Job(index) => match shared.job(index) {
                    Some(job) => (job.cookie, job.offset, job.answer, 1 + job.buffers.len()),
                    None => return,
                },
            };
            let fits =
                bytes < BATCH_BYTES && self.batch.has_room_for(MAX_REPLY_HEAD_BYTES, entries);
            if !fits {
                return;
            }
            let head = ReplyHead::new(self.style, cookie, offset, answer);
            self.batch.put(head.bytes());
            if let Reply::Job(index) = reply {
                if let Answer::Data { len_bytes, .. } = answer {
                    shared
                        .rest_of(index, 0)
                        .for_each(|span| self.batch.gather(span));
                    bytes += len_bytes as usize;
                }
                self.batch_jobs.push(index);
            }
            self.batch_replies += 1;
            self.replies.pop_front();
        }
    }

    /// Nothing more is taken from the client; what is under way is answered.
    pub(super) fn leave(&mut self, shared: &mut Shared) {
        match self.phase {
            Phase::Handshake(_) => self.close(shared),
            Phase::Session(_) => {
                self.phase = Phase::Leaving;
                shared.forget(self.index);
                if self.receiving {
                    // Ends the receive. Not connected any more: then it has ended.
                    let _ = shutdown(&self.socket, Shutdown::Read);
                } else {
                    self.drop_input(shared);
                }
                self.end_if_done(shared);
            }
            Phase::Leaving | Phase::Closed => {}
        }
    }

    /// The end: nothing is taken or answered any more.
    pub(super) fn close(&mut self, shared: &mut Shared) {
        if matches!(self.phase, Phase::Closed) {
            return;
        }
        self.phase = Phase::Closed;
        // Ends what is in flight. Not connected any more: then it has ended.
        let _ = shutdown(&self.socket, Shutdown::Both);
        shared.forget(self.index);
        while let Some(reply) = self.replies.pop_front() {
            match reply {
                Reply::Job(job) => self.release(shared, job),
                Reply::Plain { .. } => self.pending -= 1,
            }
        }
        if !self.receiving {
            self.drop_input(shared);
        }
        if !self.sending {
            self.drop_batch(shared);
        }
    }

    /// A request whose payload will not come. No receive is in flight.
    fn drop_input(&mut self, shared: &mut Shared) {
        match std::mem::replace(&mut self.input, Input::Header) {
            Input::Header => {}
            Input::Payload { job, .. } => self.release(shared, job),
            Input::Skip { .. } => self.pending -= 1,
        }
    }

    /// No send is in flight, or all is sent.
    fn drop_batch(&mut self, shared: &mut Shared) {
        self.pending -= self.batch_replies - self.batch_jobs.len() as u32;
        while let Some(job) = self.batch_jobs.pop() {
            self.release(shared, job);
        }
        self.batch_replies = 0;
        self.batch.restart(0);
    }

    fn end_if_done(&mut self, shared: &mut Shared) {
        if matches!(self.phase, Phase::Leaving)
            && self.pending == 0
            && self.talk.is_empty()
            && !self.receiving
            && !self.sending
        {
            self.close(shared);
        }
    }

    // ---- the socket ----------------------------------------------------------------------------

    /// Submits a send of what is ready and a receive, where none is in flight.
    #[inline]
    pub(super) fn flush(&mut self, reactor: &mut Reactor, shared: &Shared) {
        if matches!(self.phase, Phase::Closed) {
            return;
        }
        if !self.sending {
            self.submit_send(reactor, shared);
        }
        if !self.receiving {
            self.submit_receive(reactor, shared);
        }
    }

    fn submit_send(&mut self, reactor: &mut Reactor, shared: &Shared) {
        let fd = self.socket.as_raw_fd();
        let op = if let Some(rest) = self.talk.get(self.talk_sent..)
            && !rest.is_empty()
        {
            Op::Send {
                fd,
                ptr: rest.as_ptr(),
                len: u32::try_from(rest.len()).unwrap_or(u32::MAX),
                flags: libc::MSG_NOSIGNAL,
            }
        } else {
            if self.batch.is_empty() {
                self.fill_batch(shared);
            }
            let entries = self.batch.entries();
            if entries.is_empty() {
                return;
            }
            self.send_header.msg_iov = entries.as_ptr().cast_mut();
            self.send_header.msg_iovlen = entries.len() as _;
            Op::SendMsg {
                fd,
                msg: &raw const self.send_header,
                // Without WAITALL: each piece that the client takes is progress to be seen.
                flags: libc::MSG_NOSIGNAL as u32,
            }
        };
        self.sending = true;
        let token = self.token(SEND);
        // SAFETY: `talk`, header, gather list and the batch's bytes are ours and untouched until the completion, and
        // we are boxed and stay so long (`is_over`); so do the buffers of the batch's jobs, which are released after it.
        unsafe { reactor.submit(op, token) };
    }

    fn submit_receive(&mut self, reactor: &mut Reactor, shared: &Shared) {
        let talking = matches!(self.phase, Phase::Handshake(_)) && !self.talk.is_empty();
        let listening = matches!(self.phase, Phase::Handshake(_) | Phase::Session(_));
        if !listening || talking || self.stalled {
            return;
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.bytes.len() - self.end < RECEIVE_BYTES / 2 {
            // Part of a header or an option.
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        self.receive_entries.clear();
        self.direct_bytes = 0;
        let mut room = self.bytes.len() - self.end;
        if let Input::Payload { job, at, len } = self.input {
            self.direct_bytes = len - at;
            self.receive_entries
                .extend(shared.rest_of(job, at).map(|span| libc::iovec {
                    iov_base: span.as_ptr().cast(),
                    iov_len: span.len() as usize,
                }));
            if self.direct_bytes >= LONG_BYTES {
                room = room.min(RequestHeader::len_of(self.style));
            }
        } else if self.long_payloads && matches!(self.input, Input::Header) {
            room = room.min(MAX_REQUEST_BYTES.min(RequestHeader::len_of(self.style)));
            room -= (self.end - self.start).min(room);
            room = room.max(1);
        }
        self.receive_entries.push(libc::iovec {
            iov_base: self.bytes.as_mut_ptr().wrapping_add(self.end).cast(),
            iov_len: room,
        });
        self.receive_header.msg_iov = self.receive_entries.as_mut_ptr();
        self.receive_header.msg_iovlen = self.receive_entries.len() as _;
        let op = Op::RecvMsg {
            fd: self.socket.as_raw_fd(),
            msg: &raw mut self.receive_header,
            flags: 0,
        };
        self.receiving = true;
        let token = self.token(RECEIVE);
        // SAFETY: header, scatter list and `bytes` are ours and untouched until the completion, and we are boxed and
        // stay so long (`is_over`); the job's buffers are kept by `input`, which changes only after the completion.
        unsafe { reactor.submit(op, token) };
    }

    /// A send or a receive has ended.
    #[inline]
    pub(super) fn on_completion(
        &mut self,
        completion: &Completion,
        shared: &mut Shared,
        now: Instant,
    ) {
        if completion.token.slot() % OPERATIONS == SEND {
            self.on_sent(completion, shared, now);
        } else {
            self.on_received(completion, shared, now);
        }
    }

    fn on_sent(&mut self, completion: &Completion, shared: &mut Shared, now: Instant) {
        self.sending = false;
        match completion.bytes() {
            Ok(len) => {
                self.progress = now;
                if self.talk.is_empty() {
                    if self.batch.sent(len as usize) {
                        self.drop_batch(shared);
                    }
                } else {
                    self.talk_sent += len as usize;
                    if self.talk_sent >= self.talk.len() {
                        self.talk.clear();
                        self.talk_sent = 0;
                        self.stalled = true; // what has come meanwhile is to be looked at
                    }
                }
            }
            Err(libc::EINTR | libc::EAGAIN) => {}
            Err(errno) => {
                tracing::debug!(client = self.index, errno, "sending to an NBD client");
                self.close(shared);
            }
        }
        if matches!(self.phase, Phase::Closed) {
            self.drop_batch(shared);
        } else if self.stalled && !self.receiving {
            self.pump(shared);
        }
        self.end_if_done(shared);
    }

    fn on_received(&mut self, completion: &Completion, shared: &mut Shared, now: Instant) {
        self.receiving = false;
        if !matches!(self.phase, Phase::Handshake(_) | Phase::Session(_)) {
            self.drop_input(shared);
            return self.end_if_done(shared);
        }
        match completion.bytes() {
            // There is always room: this is the end of the stream.
            Ok(0) => {
                tracing::debug!(client = self.index, "an NBD client has hung up");
                self.leave(shared);
            }
            Ok(len) => {
                self.progress = now;
                let direct = len.min(self.direct_bytes);
                if let Input::Payload { at, .. } = &mut self.input {
                    *at += direct;
                }
                self.end += (len - direct) as usize;
                self.pump(shared);
            }
            Err(libc::EINTR | libc::EAGAIN) => {}
            Err(errno) => {
                tracing::debug!(client = self.index, errno, "receiving from an NBD client");
                self.close(shared);
            }
        }
    }
}
