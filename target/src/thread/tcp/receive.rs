//! What comes in on connections, and what queues do with it.

use std::os::fd::RawFd;

use flexblk_nvme::command::Sqe;
use flexblk_nvme::command::fabrics::{Command as Fabrics, ConnectData};
use flexblk_nvme::tcp::{
    Alignment, CapsuleCmd, Error, Established, Event, Framing, H2cData, HEAD_MAX, IcReq, Pdu,
};
use flexblk_nvme::{Cntlid, Cqe, Qid, StatusCode};
use flexblk_reactor::{Completion, Polled, Reactor};
use flexins::engine::Engine;

use super::socket::{ReceiveBuffers, Spans, Vector, slices};
use super::table::{ConnKey, Expect, Operation, Receiver, State};
use super::{IN_CAPSULE_BYTES, MAX_H2C_DATA_BYTES};
use crate::directory::Announced;
use crate::queue::ADMIN_ENTRIES;
use crate::queue::request::Range;
use crate::recorder::{self, Kind};
use crate::thread::parts::Parts;
use crate::thread::queue::{Fabric, Place, Queue, Role, Slot, Stage, What, queue_bytes, slots_for};
use crate::thread::record::event_of;
use crate::thread::respond::whole_parts;
use crate::thread::{CONNECT_TIMEOUT, Core};

/// Payload still to come from which on it is received straight to where it belongs: below, a copy
/// out of the receive buffer costs less than a receive of its own.
const DIRECT_BYTES: u32 = 16 << 10;

/// Why a connection's input is not gone on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// The queue has no room.
    Full,
    /// The connection ends.
    Ended,
}

impl Core {
    /// A completion with the owner number of NVMe/TCP.
    pub(crate) fn tcp_completion(
        &mut self,
        engine: &mut Engine,
        reactor: &mut Reactor,
        completion: &Completion,
    ) {
        match Operation::of(completion.token) {
            Some((Operation::Accept, index)) => {
                let now = self.parts.now;
                self.parts.tcp.accepted(reactor, index, completion, now);
            }
            Some((Operation::Receive, index)) => {
                let buffer = completion.flags.buffer_id();
                self.received(engine, index, completion.bytes(), buffer);
            }
            Some((Operation::Send, index)) => self.sent_tcp(engine, index, completion),
            None => {}
        }
    }

    /// Gives the kernel what is to be sent and received: call it after [`Core::poll`]. `spins`: the thread looks for
    /// news before it sleeps.
    pub(crate) fn flush_tcp(&mut self, reactor: &mut Reactor, spins: bool) {
        if self.parts.tcp.accept_due {
            self.parts.tcp.accept_all(reactor);
        }
        let chosen = self.parts.tcp.choose_asked(spins);
        if self.parts.tcp.dirty.is_empty() {
            return;
        }
        let mut dirty = core::mem::take(&mut self.parts.tcp.dirty);
        for index in dirty.drain(..) {
            self.parts.tcp.unmark(index);
            let now = chosen == Some(index);
            let Some(connection) = self.parts.tcp.at(index) else {
                continue;
            };
            let fd = connection.raw_fd();
            let mut sent = None;
            if connection.state != State::Closing {
                sent = connection.sender.flush(reactor, fd, index, now);
            }
            if !connection.receiving && !connection.paused && connection.state != State::Closing {
                if now {
                    self.parts.tcp.ask(index);
                } else {
                    connection.receiving = true;
                    self.receive(reactor, index, fd);
                }
            }
            if let Some(bytes) = sent {
                self.parts.tcp.note_sent(index, bytes);
            }
        }
        // Its memory is used again.
        self.parts.tcp.dirty = dirty;
    }

    /// Looks at the socket of the connection that is asked, if there is one.
    #[inline]
    pub(crate) fn look_tcp(&mut self) -> Polled {
        self.parts.tcp.look()
    }

    /// Is there news of NVMe/TCP that no completion tells? See [`super::asked`].
    pub(crate) fn has_tcp_news(&self) -> bool {
        self.parts.tcp.asked.has_news()
    }

    /// Deals with it.
    pub(crate) fn tcp_news(&mut self, engine: &mut Engine) {
        if let Some((index, bytes)) = self.parts.tcp.take_sent() {
            self.send_ended(engine, index, Ok(bytes), false);
        }
        if let Some((index, result)) = self.parts.tcp.take_heard() {
            self.received(engine, index, result, Some(ReceiveBuffers::OURS));
        }
    }

    /// Asks the kernel for more: straight into a command's memory when a payload is under way, else
    /// into whatever buffer it takes.
    fn receive(&mut self, reactor: &mut Reactor, index: u32, fd: RawFd) {
        let Self { parts, queues, .. } = self;
        let token = Operation::Receive.token(index);
        let Some(connection) = parts.tcp.at(index) else {
            return;
        };
        let (open, queue) = (connection.state == State::Open, connection.queue);
        let Some(mut receiver) = connection.receiver.take() else {
            return;
        };
        receiver.is_direct = false;
        if let Expect::Data { slot, at } = receiver.expect
            && open
            && receiver.stream.payload_left() >= DIRECT_BYTES
            && let Some(queue) = queue.and_then(|key| queues.get_mut(key))
        {
            let spans = parts.memory_of(queue, slot, at, receiver.stream.payload_left());
            let vector = receiver.direct.get_or_insert_with(Vector::new);
            vector.clear();
            for span in &spans {
                vector.push(span.as_ptr(), span.len() as usize);
            }
            receiver.is_direct = !spans.is_empty();
            if receiver.is_direct {
                vector.receive(reactor, fd, token);
            }
        }
        if !receiver.is_direct
            && let Some(buffers) = &parts.tcp.buffers
        {
            buffers.receive(reactor, fd, token);
        }
        if let Some(connection) = parts.tcp.at(index) {
            connection.receiver = Some(receiver);
        }
    }

    fn received(
        &mut self,
        engine: &mut Engine,
        index: u32,
        result: Result<u32, i32>,
        buffer: Option<u16>,
    ) {
        let Some(connection) = self.parts.tcp.at(index) else {
            return self.give_back(buffer);
        };
        connection.receiving = false;
        let state = connection.state;
        self.parts.tcp.counters.receives += 1;
        match result {
            Ok(0) => {
                // Every buffer of a direct receive has room: this is the end of the stream.
                self.parts.tcp.shut_down(index);
            }
            Ok(len) => {
                self.parts.tcp.counters.bytes_rx += u64::from(len);
                if state == State::Open {
                    self.input(engine, index, buffer, len);
                }
                self.parts.tcp.mark(index);
                self.parts.tcp.settle(index);
            }
            Err(libc::ENOBUFS) => {
                self.parts.tcp.counters.no_buffer += 1;
                self.parts.tcp.mark(index);
                self.parts.tcp.settle(index);
            }
            Err(libc::EINTR | libc::EAGAIN) => {
                self.parts.tcp.mark(index);
                self.parts.tcp.settle(index);
            }
            Err(errno) => {
                if let Some(connection) = self.parts.tcp.at(index)
                    && state == State::Open
                {
                    tracing::info!(peer = %connection.peer, errno, "a connection has failed");
                }
                self.parts.tcp.shut_down(index);
            }
        }
        self.give_back(buffer);
    }

    fn give_back(&mut self, buffer: Option<u16>) {
        if let (Some(bid), Some(buffers)) = (buffer, &mut self.parts.tcp.buffers) {
            buffers.give(bid);
        }
    }

    /// `len` bytes have come: in a buffer, or in the memory of the command that waits for them.
    fn input(&mut self, engine: &mut Engine, index: u32, buffer: Option<u16>, len: u32) {
        let connection = self.parts.tcp.at(index);
        let Some(mut receiver) = connection.and_then(|connection| connection.receiver.take())
        else {
            return;
        };
        let stop = match (buffer, &mut receiver.expect) {
            (Some(bid), _) => {
                // Out of the table while its bytes are looked at.
                let Some(buffers) = self.parts.tcp.buffers.take() else {
                    return;
                };
                let bytes = buffers.bytes(bid, len);
                let stop = self.bytes(engine, index, &mut receiver, bytes);
                self.parts.tcp.buffers = Some(buffers);
                stop
            }
            (None, Expect::Data { slot, at }) => {
                let (slot, start) = (*slot, *at);
                *at += len;
                self.parts.tcp.counters.bytes_direct_rx += u64::from(len);
                self.placed(index, &mut receiver, slot, start, len);
                self.bytes(engine, index, &mut receiver, &[])
            }
            (None, _) => Err(Stop::Ended),
        };
        self.put_back(index, receiver, stop);
    }

    fn placed(&mut self, index: u32, receiver: &mut Receiver, slot: u16, at: u32, len: u32) {
        let Self { parts, queues, .. } = self;
        let queue = parts.tcp.at(index).and_then(|connection| connection.queue);
        let spans = match queue.and_then(|key| queues.get_mut(key)) {
            Some(queue) => parts.memory_of(queue, slot, at, len),
            None => Spans::new(),
        };
        receiver.stream.placed(len, || slices(&spans));
    }

    fn put_back(&mut self, index: u32, receiver: Box<Receiver>, stop: Result<(), Stop>) {
        let Some(connection) = self.parts.tcp.at(index) else {
            return;
        };
        connection.receiver = Some(receiver);
        if stop == Err(Stop::Full) && connection.state == State::Open {
            connection.paused = true;
            self.parts.tcp.counters.paused += 1;
        }
    }

    /// Goes on with connections whose queue has room again.
    pub(crate) fn resume_tcp(&mut self, engine: &mut Engine) {
        if self.parts.tcp.resumable.is_empty() {
            return;
        }
        let mut resumable = core::mem::take(&mut self.parts.tcp.resumable);
        for index in resumable.drain(..) {
            // It is listed once for every command that has ended.
            if !self.has_room(index) {
                continue;
            }
            let Some(connection) = self
                .parts
                .tcp
                .at(index)
                .filter(|connection| connection.paused && connection.state == State::Open)
            else {
                continue;
            };
            connection.paused = false;
            let Some(mut receiver) = connection.receiver.take() else {
                continue;
            };
            let stash = core::mem::take(&mut receiver.stash);
            let stop = self.bytes(engine, index, &mut receiver, &stash);
            self.put_back(index, receiver, stop);
            self.parts.tcp.mark(index);
        }
        // Those that have stopped again have come to the new list.
        if self.parts.tcp.resumable.is_empty() {
            self.parts.tcp.resumable = resumable;
        }
    }

    /// May another command of the connection be taken? Those that have a slot and the responses that
    /// have none are counted: a host that reads nothing must not make us pile up answers.
    fn has_room(&mut self, index: u32) -> bool {
        let Some(connection) = self.parts.tcp.at(index) else {
            return false;
        };
        let untracked = connection.sender.untracked();
        let queue = connection.queue.and_then(|key| self.queues.get_mut(key));
        queue.is_none_or(|queue| queue.has_room() && untracked < slots_for(queue.entries))
    }

    /// Bytes of the stream, in order.
    fn bytes(
        &mut self,
        engine: &mut Engine,
        index: u32,
        receiver: &mut Receiver,
        bytes: &[u8],
    ) -> Result<(), Stop> {
        let mut input = bytes;
        // In-capsule data that lies in one piece in the buffer.
        let mut whole: &[u8] = &[];
        loop {
            let event = match receiver.stream.next(&mut input) {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(error) => return self.fail(index, receiver, error),
            };
            let done = match event {
                Event::Pdu(pdu) => self.pdu(engine, index, receiver, pdu),
                Event::Data(data) => {
                    match &mut receiver.expect {
                        Expect::Capsule(_) if receiver.carry.is_empty() && whole.is_empty() => {
                            whole = data;
                        }
                        Expect::Capsule(_) => receiver.carry.extend_from_slice(data),
                        Expect::Data { slot, at } => {
                            self.place(index, *slot, *at, data);
                            *at += data.len() as u32;
                        }
                        Expect::Nothing => {}
                    }
                    Ok(())
                }
                Event::DataEnd { intact } => {
                    let expect = core::mem::replace(&mut receiver.expect, Expect::Nothing);
                    if !intact {
                        self.parts.tcp.counters.data_digest_errors += 1;
                    }
                    match expect {
                        Expect::Capsule(sqe) if receiver.carry.is_empty() => {
                            let data = core::mem::take(&mut whole);
                            self.look_ahead_tcp(index, input);
                            self.capsule(engine, index, &sqe, data, intact)
                        }
                        Expect::Capsule(sqe) => {
                            let mut carry = core::mem::take(&mut receiver.carry);
                            let result = self.capsule(engine, index, &sqe, &carry, intact);
                            carry.clear();
                            self.parts.tcp.spare.push(carry);
                            result
                        }
                        Expect::Data { slot, .. } => self.fetched(engine, index, slot, intact),
                        Expect::Nothing => Ok(()),
                    }
                }
            };
            match done {
                Ok(()) => {}
                Err(Stop::Full) => {
                    receiver.stash.clear();
                    receiver.stash.extend_from_slice(input);
                    return Err(Stop::Full);
                }
                Err(Stop::Ended) => return Err(Stop::Ended),
            }
        }
        if !whole.is_empty() {
            // The rest of the capsule, or its digest, has not come yet.
            if receiver.carry.capacity() == 0 {
                receiver.carry = self.parts.tcp.spare.pop().unwrap_or_default();
            }
            receiver.carry.extend_from_slice(whole);
        }
        Ok(())
    }

    /// Loads the memory that the next command in the buffer is going to write to.
    #[inline]
    fn look_ahead_tcp(&mut self, index: u32, input: &[u8]) {
        if let Some((sqe, data_len)) = CapsuleCmd::foresee(input)
            && let Some(connection) = self.parts.tcp.at(index)
            && let Some(queue) = connection.queue.and_then(|key| self.queues.get(key))
        {
            self.parts.load_ahead(queue, sqe, data_len);
        }
    }

    fn pdu(
        &mut self,
        engine: &mut Engine,
        index: u32,
        receiver: &mut Receiver,
        pdu: Pdu,
    ) -> Result<(), Stop> {
        match pdu {
            Pdu::CapsuleCmd(CapsuleCmd { sqe, len_bytes: 0 }) => {
                self.capsule(engine, index, &sqe, &[], true)
            }
            Pdu::CapsuleCmd(CapsuleCmd { sqe, .. }) => {
                receiver.expect = Expect::Capsule(sqe);
                Ok(())
            }
            Pdu::H2cData(data) => self.h2c_data(index, receiver, &data),
            Pdu::IcReq(request) => self.ic_req(index, receiver, &request),
            Pdu::TermReq(term) => {
                if let Some(connection) = self.parts.tcp.at(index) {
                    tracing::warn!(peer = %connection.peer, %term, "the host ends the connection");
                }
                self.parts.tcp.shut_down(index);
                Err(Stop::Ended)
            }
            // The stream lets no PDU of the other direction pass.
            Pdu::IcResp(_) | Pdu::CapsuleResp(_) | Pdu::C2hData(_) | Pdu::R2t(_) => Ok(()),
        }
    }

    /// The peer has broken the protocol: that is written down, and the connection ends.
    #[cold]
    fn fail(&mut self, index: u32, receiver: &Receiver, error: Error) -> Result<(), Stop> {
        let now = self.parts.now;
        if let Some(connection) = self.parts.tcp.at(index) {
            let (peer, queue) = (connection.peer, connection.queue);
            let queue = queue.and_then(|queue| self.queues.get_mut(queue));
            let mut event = match queue.as_ref().map(|queue| &queue.role) {
                Some(Role::Io(io)) => event_of(Kind::ProtocolError, &io.association, io.qid, peer),
                Some(Role::Admin(admin)) => {
                    let association = admin.controller.association();
                    event_of(Kind::ProtocolError, association, Qid::ADMIN, peer)
                }
                _ => recorder::Event::new(Kind::ProtocolError, peer),
            };
            event.value = error.status().map_or(0, |(fes, _)| fes.raw().into());
            self.parts.record(event);
            if event.host != 0 {
                self.tell_of_loss(event.host);
            }
        }
        self.parts
            .tcp
            .protocol_error(index, &receiver.stream, error, now);
        Err(Stop::Ended)
    }

    fn ic_req(&mut self, index: u32, receiver: &mut Receiver, request: &IcReq) -> Result<(), Stop> {
        let tcp = &mut self.parts.tcp;
        match request.answer(tcp.allowed, tcp.required, MAX_H2C_DATA_BYTES) {
            Ok(response) => {
                receiver.stream.establish(Established {
                    digests: response.digests,
                    alignment: Alignment::DWORD,
                    max_in_capsule_bytes: IN_CAPSULE_BYTES,
                    max_data_bytes: MAX_H2C_DATA_BYTES,
                });
                let key = tcp.key(index);
                if let Some(sender) = tcp.sender(key) {
                    sender.bytes(&response.emit());
                    // From here on: ICResp itself has no digest.
                    sender.framing = Framing {
                        digests: response.digests,
                        alignment: request.hpda,
                    };
                }
                Ok(())
            }
            Err(error) => self.fail(index, receiver, error),
        }
    }

    /// A command and all of its in-capsule data.
    fn capsule(
        &mut self,
        engine: &mut Engine,
        index: u32,
        sqe: &Sqe,
        data: &[u8],
        intact: bool,
    ) -> Result<(), Stop> {
        let Some(connection) = self.parts.tcp.at(index) else {
            return Err(Stop::Ended);
        };
        if connection.queue.is_none() {
            self.make_queue(index, sqe, data)?;
        }
        let Self { parts, queues, .. } = self;
        let key = parts.tcp.at(index).and_then(|connection| connection.queue);
        let Some(queue) = key
            .and_then(|key| queues.get_mut(key))
            .filter(|queue| !queue.closing)
        else {
            return Err(Stop::Ended);
        };
        if intact {
            parts.command(engine, queue, sqe, data);
        } else {
            queue.advance_head();
            parts.refuse(
                engine,
                queue,
                sqe,
                StatusCode::TransientTransportError.into(),
            );
        }
        let timer = queue.timer;
        if timer.is_some() {
            self.note_timer(timer);
        }
        match self.has_room(index) {
            true => Ok(()),
            false => Err(Stop::Full),
        }
    }

    /// The queue that the first command of a connection is for. Connect says how large; for anything
    /// else there is a queue of the smallest size, whose only answer is that Connect comes first.
    fn make_queue(&mut self, index: u32, sqe: &Sqe, data: &[u8]) -> Result<(), Stop> {
        let limits = self.parts.shared.directory.limits();
        let mut announced = Announced {
            qid: Qid::ADMIN,
            entries: 2,
            port: 0,
        };
        if let Ok(Fabrics::Connect(connect)) = Fabrics::parse(sqe)
            && sqe.is_fabrics()
        {
            let most = match connect.qid {
                Qid::ADMIN => ADMIN_ENTRIES.max(limits.queue_entries),
                _ => limits.queue_entries,
            };
            announced = Announced {
                qid: connect.qid,
                // More is refused by Connect, which names the field.
                entries: connect.sqsize.saturating_add(1).clamp(2, most),
                port: 0,
            };
        }
        let cntlid = match ConnectData::view(data) {
            Some(data) if !announced.qid.is_admin() => data.cntlid(),
            _ => Cntlid::DYNAMIC,
        };
        let now = self.parts.now;
        let bytes = queue_bytes(announced.entries);
        let memory = self.parts.shared.directory.reserve_queue(cntlid, bytes);
        let conn = self.parts.tcp.key(index);
        let Some(connection) = self.parts.tcp.at(index) else {
            return Err(Stop::Ended);
        };
        let (peer, since) = (connection.peer, connection.since);
        announced.port = connection.port;
        let Some(memory) = memory.filter(|_| !self.draining) else {
            tracing::warn!(%peer, "no memory for a queue; the connection is closed");
            let cqe = Cqe::new(sqe.cid(), StatusCode::ConnectControllerBusy.into());
            let mut out = [0; HEAD_MAX];
            let len = connection.sender.framing.capsule_resp(&cqe, &mut out);
            let response = out.get(..len).unwrap_or_default();
            self.parts.tcp.end_after(index, response, now);
            self.make_room();
            return Err(Stop::Ended);
        };
        let key = self.queues.next_key();
        let timer = since + CONNECT_TIMEOUT;
        self.queues.insert(Queue::new(
            key,
            Fabric::Tcp(conn),
            announced,
            peer,
            IN_CAPSULE_BYTES,
            memory,
            timer,
        ));
        self.parts.tcp.queue_made(index, key);
        self.note_timer(Some(timer));
        Ok(())
    }

    /// The header of an H2CData PDU: is it what was asked for (TCP 3.3.2.2)?
    fn h2c_data(
        &mut self,
        index: u32,
        receiver: &mut Receiver,
        data: &H2cData,
    ) -> Result<(), Stop> {
        // Byte offsets of the fields (TCP 3.6.2.8).
        const CCCID: u8 = 8;
        const TTAG: u8 = 10;
        let Self { parts, queues, .. } = self;
        let queue = parts.tcp.at(index).and_then(|connection| connection.queue);
        let Some(queue) = queue.and_then(|key| queues.get_mut(key)) else {
            return self.fail(index, receiver, Error::Sequence);
        };
        let slot = queue
            .slot(data.ttag)
            .filter(|slot| slot.stage == Stage::Fetch);
        let error = match slot {
            None => Error::InvalidField { offset: TTAG },
            Some(slot) if slot.cid != data.cid => Error::InvalidField { offset: CCCID },
            Some(slot) => match accept(slot, data) {
                Ok(()) => {
                    receiver.expect = Expect::Data {
                        slot: data.ttag,
                        at: data.offset,
                    };
                    return Ok(());
                }
                Err(error) => error,
            },
        };
        self.fail(index, receiver, error)
    }

    /// Payload that lay in a receive buffer goes where it belongs.
    fn place(&mut self, index: u32, slot: u16, at: u32, bytes: &[u8]) {
        let Self { parts, queues, .. } = self;
        let queue = parts.tcp.at(index).and_then(|connection| connection.queue);
        if let Some(queue) = queue.and_then(|key| queues.get_mut(key)) {
            let mut rest = bytes;
            for span in parts.memory_of(queue, slot, at, bytes.len() as u32) {
                let copied = span.copy_from_slice(rest);
                rest = rest.get(copied..).unwrap_or_default();
            }
        }
    }

    /// An H2CData PDU has come whole.
    fn fetched(
        &mut self,
        engine: &mut Engine,
        index: u32,
        slot: u16,
        intact: bool,
    ) -> Result<(), Stop> {
        let Self { parts, queues, .. } = self;
        let key = parts.tcp.at(index).and_then(|connection| connection.queue);
        let Some(queue) = key
            .and_then(|key| queues.get_mut(key))
            .filter(|queue| !queue.closing)
        else {
            return Err(Stop::Ended);
        };
        let Some(command) = queue.slot(slot) else {
            return Ok(());
        };
        if !intact {
            command.doomed = StatusCode::TransientTransportError.into();
        }
        if command.fetched == command.length {
            parts.data_ready(engine, queue, slot);
            let timer = queue.timer;
            if timer.is_some() {
                self.note_timer(timer);
            }
        }
        Ok(())
    }

    /// A send has ended, or the memory of a zero-copy one is back.
    fn sent_tcp(&mut self, engine: &mut Engine, index: u32, completion: &Completion) {
        if !completion.flags.notification() {
            let lends = completion.flags.more();
            return self.send_ended(engine, index, completion.bytes(), lends);
        }
        let copied = completion.was_copied();
        let number = Operation::number(completion.token);
        let mut ended = core::mem::take(&mut self.parts.tcp.ended);
        if let Some(connection) = self.parts.tcp.at(index) {
            connection.sender.came_back(number, copied, &mut ended);
            self.parts.tcp.counters.zerocopy_sends += 1;
            self.parts.tcp.counters.zerocopy_copied += u64::from(copied);
        }
        self.end_commands(engine, index, ended);
        self.parts.tcp.mark(index);
        self.parts.tcp.settle(index);
    }

    /// A send has ended; `lends`: what it sent comes back later.
    fn send_ended(
        &mut self,
        engine: &mut Engine,
        index: u32,
        result: Result<u32, i32>,
        lends: bool,
    ) {
        let tcp = &mut self.parts.tcp;
        let mut ended = core::mem::take(&mut tcp.ended);
        let mut failed = false;
        if let Some(connection) = tcp.at(index) {
            let sender = &mut connection.sender;
            sender.ended(lends, &mut ended);
            match result {
                Ok(bytes) => {
                    let had = sender.untracked();
                    sender.sent(bytes as usize, &mut ended);
                    if sender.untracked() < had && connection.paused {
                        tcp.resumable.push(index);
                    }
                    tcp.counters.sends += 1;
                    tcp.counters.bytes_tx += u64::from(bytes);
                }
                // No more memory may be pinned.
                Err(libc::ENOBUFS | libc::ENOMEM) if sender.may_lend() => sender.copy_always(),
                Err(errno) => {
                    failed = true;
                    if connection.state == State::Open {
                        tracing::info!(peer = %connection.peer, errno, "a connection has failed");
                    }
                }
            }
        }
        self.end_commands(engine, index, ended);
        if failed {
            self.parts.tcp.shut_down(index);
        } else {
            self.parts.tcp.mark(index);
            self.parts.tcp.settle(index);
        }
    }

    /// The memory of these commands is free.
    fn end_commands(&mut self, engine: &mut Engine, index: u32, mut ended: Vec<u16>) {
        let Self { parts, queues, .. } = self;
        let queue = parts.tcp.at(index).and_then(|connection| connection.queue);
        if let Some(queue) = queue.and_then(|key| queues.get_mut(key)) {
            for slot in ended.drain(..) {
                parts.end(engine, queue, slot);
            }
        }
        ended.clear();
        parts.tcp.ended = ended;
    }

    /// Queues whose connection has ended are closed, closing ones looked at again.
    pub(crate) fn close_touched(&mut self) {
        let touched = &mut self.parts.tcp.touched;
        if !touched.is_empty() {
            self.parts.to_close.extend(touched.drain(..));
        }
    }
}

/// Counts the data that a PDU announces, when it is the next of what was asked for.
fn accept(slot: &mut Slot, data: &H2cData) -> Result<(), Error> {
    let end = data
        .offset
        .checked_add(data.len_bytes)
        .filter(|end| *end <= slot.length)
        .ok_or(Error::OutOfRange)?;
    // We ask for all of a command's data at once: it is short when the last PDU says so too early.
    if data.offset != slot.fetched || data.last && end != slot.length {
        return Err(Error::Sequence);
    }
    slot.fetched = end;
    Ok(())
}

impl Parts {
    /// May data be fetched straight into a device's memory? With data digests it has to be seen whole
    /// first: wrong data must not be written. And where a stream, or a packet, ends inside of a block, that
    /// could be read, or stay when the host goes, half-written, which a device has to be told to allow.
    #[inline]
    pub(crate) fn may_fetch_in_place(&mut self, queue: &Queue, range: &Range) -> bool {
        match queue.fabric {
            Fabric::Flexins { segments, .. } => {
                whole_parts(segments, range).is_some() || self.may_tear_blocks(range)
            }
            Fabric::Tcp(conn) => self.may_tear_blocks(range) && !self.tcp.has_data_digest(conn),
        }
    }

    /// May data be sent straight out of a device's memory? As for fetching; a TCP socket takes what it has room for at
    /// once, nearly always all of it.
    #[inline]
    pub(crate) fn may_send_in_place(&self, queue: &Queue, range: &Range) -> bool {
        match queue.fabric {
            Fabric::Flexins { segments, .. } => {
                whole_parts(segments, range).is_some() || self.may_tear_blocks(range)
            }
            Fabric::Tcp(_) => true,
        }
    }

    fn may_tear_blocks(&self, range: &Range) -> bool {
        let device = self.devices.get(range.device);
        device.is_some_and(|device| device.channel.may_tear_blocks())
    }

    /// Asks the host for a command's data, all at once: its memory is there, and what one command
    /// may have outstanding (MAXR2T) is at least one request.
    pub(crate) fn fetch_tcp(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        conn: ConnKey,
        index: u16,
    ) {
        let Some(slot) = queue.slot(index) else {
            return;
        };
        slot.stage = Stage::Fetch;
        slot.fetched = 0;
        let (cid, length) = (slot.cid, slot.length);
        match self.tcp.sender(conn) {
            Some(sender) => sender.r2t(cid, index, length),
            None => self.end(engine, queue, index),
        }
    }

    /// Sends a command's data, if it has some for the host, and its completion.
    pub(crate) fn respond_tcp(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        conn: ConnKey,
        index: u16,
    ) {
        let (head, flow_control) = (queue.head(), queue.flow_control);
        let Some(slot) = queue.slot(index) else {
            return;
        };
        slot.stage = Stage::Response;
        let with_data = matches!(slot.what, What::Read | What::AdminOut) && !slot.data_moved;
        let cqe = Cqe::new(slot.cid, slot.status)
            .with_result(slot.result)
            .with_sqhd(head);
        // TCP 3.3.2.1: SUCCESS stands for a completion of zeros, which SQHD is not with flow control.
        let success = !flow_control && slot.status.is_success() && slot.result == 0;
        let slot = *slot;
        if with_data {
            let spans = self.spans(&slot, 0, slot.length);
            if let Some(sender) = self.tcp.sender(conn) {
                sender.data(index, &spans, &cqe, success);
                self.count_read(queue, index);
                return;
            }
        } else if let Some(sender) = self.tcp.sender(conn) {
            sender.response(&cqe);
        }
        self.end(engine, queue, index);
    }

    /// `len` bytes from `at` of a command's data, where it lies.
    fn memory_of(&self, queue: &mut Queue, slot: u16, at: u32, len: u32) -> Spans {
        match queue.slot(slot) {
            Some(slot) => {
                let slot = *slot;
                self.spans(&slot, at, len)
            }
            None => Spans::new(),
        }
    }

    fn spans(&self, slot: &Slot, at: u32, len: u32) -> Spans {
        match slot.place {
            Place::Held(held) => self.buffers.spans(held, at, len),
            Place::Device => {
                let span = self.devices.span(&slot.range);
                span.and_then(|span| span.sub(at, len))
                    .into_iter()
                    .collect()
            }
            Place::None => Spans::new(),
        }
    }

    /// Ends commands of a closing queue whose memory its connection no longer uses.
    pub(crate) fn end_with_connection(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        conn: ConnKey,
    ) {
        let (receives, sends) = self.tcp.is_quiet(conn);
        if receives {
            for slot in queue.with_fabric(Stage::Fetch) {
                self.end(engine, queue, slot);
            }
        }
        if sends {
            for slot in queue.with_fabric(Stage::Response) {
                self.end(engine, queue, slot);
            }
        }
    }
}
