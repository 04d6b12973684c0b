//! A queue's socket: one send and one receive under way at most, on its thread's reactor or without it.
//!
//! The ring carries out many operations in one system call, and tells when something comes to a thread that sleeps.
//! With little under way that is the longer way: `sendmsg` and `recvmsg` of our own cost less than what the ring
//! does around them. So a thread that spins asks the socket itself while few commands are outstanding, and leaves it
//! to the ring with many, before it sleeps, and when the answer takes long.
#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use flexblk_nvme::tcp::TERM_MAX;
use flexblk_reactor::{Completion, LOOKS_IN_VAIN, Op, Polled, Reactor, Token};
use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketAddrAny, SocketFlags, SocketType, bind, ipproto,
    send, shutdown, socket_with, sockopt,
};

use super::batch::Batch;
use super::queue::{Broken, Queue};
use crate::LostReason;

/// Owner of every TCP connection's operations on the reactor; which connection it is and what it does is in the
/// token's slot.
pub(crate) const OWNER: u8 = 200;
const OPERATIONS: u64 = 4;
const SEND: u64 = 0;
const RECEIVE: u64 = 1;
const CONNECT: u64 = 2;
const CANCEL: u64 = 3;

/// Commands outstanding up to which the socket is asked without the ring. With 1 that made an I/O 5 to 11 % faster
/// (4 KiB over loopback), with 32 1 to 3 %; with 128 it was 3 to 6 % slower.
const FEW_COMMANDS: u16 = 32;

/// The connection that a token of [`OWNER`] belongs to.
pub(crate) fn index_of(token: Token) -> usize {
    usize::try_from(token.slot() / OPERATIONS).unwrap_or(usize::MAX)
}

/// Everything that the kernel may use; boxed, so that it stays where it is.
pub(crate) struct Connection {
    fd: OwnedFd,
    /// Its number on the reactor.
    index: u64,
    pub(super) queue: Queue,
    state: State,
    /// In the kernel, or with something left to send.
    sending: Option<Batch>,
    send_in_flight: bool,
    send_header: libc::msghdr,
    receive_in_flight: bool,
    receive_header: libc::msghdr,
    receive_entries: Vec<libc::iovec>,
    /// The socket is to be asked: see [`Connection::look`]. What was planned is good.
    looking: bool,
    /// Looks in vain since something was sent or came.
    looks: u32,
    connect_in_flight: bool,
    address: libc::sockaddr_storage,
    address_len: u32,
    lost: Option<LostReason>,
    /// It waits for the kernel to let go of it.
    removed: bool,
}

#[derive(Debug)]
enum State {
    Connecting,
    Open,
    /// Connecting failed; the error is to be taken.
    Failed(Option<io::Error>),
}

impl Connection {
    /// A socket that is not connected yet.
    pub(super) fn new(
        index: usize,
        peer: SocketAddr,
        from: Option<IpAddr>,
        ack_timeout: Option<Duration>,
        queue: Queue,
    ) -> io::Result<Box<Connection>> {
        let family = match peer {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        let fd = socket_with(
            family,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            Some(ipproto::TCP),
        )?;
        // Batches are built here; the kernel shall not wait for more.
        sockopt::set_tcp_nodelay(&fd, true)?;
        if let Some(limit) = ack_timeout {
            let limit_ms = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
            sockopt::set_tcp_user_timeout(&fd, limit_ms)?;
        }
        if let Some(from) = from {
            bind(&fd, &SocketAddr::new(from, 0))?;
        }
        let any: SocketAddrAny = peer.into();
        // SAFETY: all zeroes is valid for these C structures.
        let (mut address, send_header, receive_header): (libc::sockaddr_storage, _, _) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed(), std::mem::zeroed()) };
        let address_len = any.addr_len().min(size_of_val(&address) as u32);
        // SAFETY: `any` holds `addr_len` bytes of a socket address, and sockaddr_storage has room for every one.
        unsafe {
            std::ptr::copy_nonoverlapping(
                any.as_ptr().cast::<u8>(),
                (&raw mut address).cast::<u8>(),
                address_len as usize,
            );
        }
        Ok(Box::new(Connection {
            fd,
            index: index as u64,
            queue,
            state: State::Connecting,
            sending: None,
            send_in_flight: false,
            send_header,
            receive_in_flight: false,
            receive_header,
            receive_entries: Vec::with_capacity(64),
            looking: false,
            looks: 0,
            connect_in_flight: false,
            address,
            address_len,
            lost: None,
            removed: false,
        }))
    }

    fn token(&self, operation: u64) -> Token {
        Token::new(OWNER, self.index * OPERATIONS + operation)
    }

    /// Starts to connect.
    pub(crate) fn connect(&mut self, reactor: &mut Reactor) {
        let op = Op::Connect {
            fd: self.fd.as_raw_fd(),
            addr: &raw const self.address,
            addr_len: self.address_len,
        };
        self.connect_in_flight = true;
        let token = self.token(CONNECT);
        // SAFETY: the address is boxed with us, and we stay until nothing is in flight.
        unsafe { reactor.submit(op, token) };
    }

    /// The error of an attempt to connect that failed.
    pub(crate) fn take_connect_error(&mut self) -> Option<io::Error> {
        match &mut self.state {
            State::Failed(error) => error.take(),
            _ => None,
        }
    }

    pub(crate) fn lost(&self) -> Option<LostReason> {
        self.lost
    }

    /// Whether the kernel uses memory of ours or of the queue's commands.
    pub(crate) fn is_busy(&self) -> bool {
        self.send_in_flight || self.receive_in_flight || self.connect_in_flight
    }

    /// Nobody wants it any more.
    pub(crate) fn remove(&mut self) {
        self.lose(LostReason::Closed);
        self.removed = true;
    }

    /// Whether nobody has anything of it any more: dropped now, its socket is closed.
    #[inline]
    pub(crate) fn is_over(&self) -> bool {
        self.removed && !self.is_busy()
    }

    /// Whether a command waits for its answer.
    pub(crate) fn is_waiting(&self) -> bool {
        self.lost.is_none() && self.queue.outstanding_commands() > 0
    }

    /// Sends what was posted and asks for more, where neither is under way; with little to do without the ring, when
    /// the thread is going to spin.
    #[inline]
    pub(crate) fn flush(&mut self, reactor: &mut Reactor, spins: bool) {
        if self.lost.is_some() || !matches!(self.state, State::Open) {
            return;
        }
        let direct = spins && self.queue.outstanding_commands() <= FEW_COMMANDS;
        while !self.send_in_flight {
            if self.sending.is_none() {
                self.sending = self.queue.take_batch();
            }
            if self.sending.is_none() {
                break;
            }
            // What is planned does not know of these commands.
            self.looking = false;
            self.looks = 0;
            if direct && self.send_now() {
                reactor.note_asked();
                continue;
            }
            if self.lost.is_some() {
                self.wake_up(reactor);
                return;
            }
            self.submit_send(reactor);
        }
        if self.receive_in_flight {
            return;
        }
        if direct && self.looks < LOOKS_IN_VAIN {
            if !self.looking {
                self.plan_receive();
                self.looking = true;
            }
        } else {
            self.looking = false;
            self.plan_receive();
            self.submit_receive(reactor);
        }
    }

    /// Sends without the ring; false when the ring has to send what is left.
    fn send_now(&mut self) -> bool {
        let Some(mut batch) = self.sending.take() else {
            return true;
        };
        self.point_at(&batch);
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: header and gather list are ours; what the list names is as in `submit_send`.
        let sent =
            unsafe { libc::sendmsg(self.fd.as_raw_fd(), &raw const self.send_header, flags) };
        match u32::try_from(sent) {
            Ok(len) => {
                self.count_sent(len);
                if batch.sent(len as usize) {
                    self.queue.batch_sent(batch);
                    return true;
                }
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                match error.raw_os_error().unwrap_or(0) {
                    libc::EAGAIN | libc::EINTR | libc::ENOBUFS | libc::ENOMEM => {}
                    // A socket says once why it is over; whoever asks next is told that it is. The ring may have been told
                    // already, and nobody has looked at it yet: it keeps the order.
                    libc::EPIPE => {}
                    errno => self.lose(lost_by(errno)),
                }
            }
        }
        self.sending = Some(batch);
        false
    }

    /// The ring does not know that the connection is lost: the end of a receive makes the thread look.
    #[cold]
    fn wake_up(&mut self, reactor: &mut Reactor) {
        // Not connected any more: then the receive ends all the same.
        let _ = shutdown(&self.fd, Shutdown::Both);
        if !self.receive_in_flight {
            self.looking = false;
            self.plan_receive();
            self.submit_receive(reactor);
        }
    }

    fn point_at(&mut self, batch: &Batch) {
        let entries = batch.entries();
        self.send_header.msg_iov = entries.as_ptr().cast_mut();
        self.send_header.msg_iovlen = entries.len() as _;
    }

    fn count_sent(&mut self, len: u32) {
        self.queue.counters.sends += 1;
        self.queue.counters.bytes_tx += u64::from(len);
    }

    /// Asks the socket without the ring, if that is how this connection receives just now.
    #[inline]
    pub(crate) fn look(&mut self, scratch: &mut Vec<u8>) -> Polled {
        if !self.looking || self.lost.is_some() {
            return Polled::Nothing;
        }
        // SAFETY: header, scatter list and the queue's memory are ours; the commands whose buffers were planned are
        // outstanding still, since none ends without a received byte, and after that the plan is a new one.
        let came = unsafe {
            libc::recvmsg(
                self.fd.as_raw_fd(),
                &raw mut self.receive_header,
                libc::MSG_DONTWAIT,
            )
        };
        let result = match u32::try_from(came) {
            Ok(len) => Ok(len),
            Err(_) => Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        };
        if let Err(libc::EAGAIN | libc::EINTR) = result {
            self.looks += 1;
            return match self.looks {
                LOOKS_IN_VAIN.. => Polled::Enough,
                _ => Polled::Nothing,
            };
        }
        if let (true, Ok(0) | Err(libc::EPIPE)) = (self.send_in_flight, result) {
            // That it is over, not why: the ring may have been told with the send, and keeps the order.
            (self.looking, self.looks) = (false, LOOKS_IN_VAIN);
            return Polled::Ready;
        }
        (self.looking, self.looks) = (false, 0);
        self.queue.counters.looks_found += 1;
        self.take(result, scratch);
        Polled::Ready
    }

    fn submit_send(&mut self, reactor: &mut Reactor) {
        let Some(batch) = self.sending.take() else {
            return;
        };
        self.point_at(&batch);
        self.sending = Some(batch);
        let op = Op::SendMsg {
            fd: self.fd.as_raw_fd(),
            msg: &raw const self.send_header,
            // A full socket buffer ends it short. With WAITALL the ring would go on by itself, and, when the connection
            // ends then, keep to itself why, since it has sent a part.
            flags: libc::MSG_NOSIGNAL as u32,
        };
        self.send_in_flight = true;
        let token = self.token(SEND);
        // SAFETY: header, gather list and the bytes of the batch are ours and untouched until the completion, and we
        // are boxed and stay so long; payload is lent by commands that complete only after their batch was sent.
        unsafe { reactor.submit(op, token) };
    }

    fn plan_receive(&mut self) {
        self.queue.plan();
        self.receive_entries.clear();
        self.receive_entries
            .extend(self.queue.planned.iter().map(|piece| libc::iovec {
                iov_base: piece.span.as_ptr().cast(),
                iov_len: piece.span.len() as usize,
            }));
        self.receive_header.msg_iov = self.receive_entries.as_mut_ptr();
        self.receive_header.msg_iovlen = self.receive_entries.len() as _;
    }

    /// Receives as was planned.
    fn submit_receive(&mut self, reactor: &mut Reactor) {
        let op = Op::RecvMsg {
            fd: self.fd.as_raw_fd(),
            msg: &raw mut self.receive_header,
            flags: 0,
        };
        self.receive_in_flight = true;
        let token = self.token(RECEIVE);
        // SAFETY: header, scatter list and the queue's memory are ours and untouched until the completion, and we are
        // boxed and stay so long; buffers of commands are lent until these complete, which takes a received byte.
        unsafe { reactor.submit_passive(op, token) };
    }

    pub(crate) fn on_completion(&mut self, completion: &Completion, scratch: &mut Vec<u8>) {
        match completion.token.slot() % OPERATIONS {
            SEND => self.on_sent(completion),
            RECEIVE => self.on_received(completion, scratch),
            CONNECT => {
                self.connect_in_flight = false;
                self.state = match completion.bytes() {
                    Ok(_) => State::Open,
                    Err(errno) => State::Failed(Some(io::Error::from_raw_os_error(errno))),
                };
            }
            _ => {}
        }
    }

    fn on_sent(&mut self, completion: &Completion) {
        self.send_in_flight = false;
        let Some(mut batch) = self.sending.take() else {
            return;
        };
        match completion.bytes() {
            Ok(len) => {
                self.count_sent(len);
                if batch.sent(len as usize) {
                    self.queue.batch_sent(batch);
                    return;
                }
            }
            Err(libc::EINTR | libc::EAGAIN) => {}
            Err(errno) => self.lose(lost_by(errno)),
        }
        self.sending = Some(batch);
    }

    fn on_received(&mut self, completion: &Completion, scratch: &mut Vec<u8>) {
        self.receive_in_flight = false;
        self.looks = 0;
        if self.lost.is_none() {
            self.take(completion.bytes(), scratch);
        }
    }

    /// Takes what a receive has brought.
    fn take(&mut self, received: Result<u32, i32>, scratch: &mut Vec<u8>) {
        match received {
            Ok(0) => {
                if !self.queue.stream.is_between_pdus() {
                    tracing::warn!("the target closed the connection in the middle of a PDU");
                }
                self.lose(LostReason::PeerClosed);
            }
            Ok(len) => {
                if let Err(broken) = self.queue.received(len as usize, scratch) {
                    self.end(broken);
                }
            }
            Err(libc::EINTR | libc::EAGAIN) => {}
            Err(errno) => self.lose(lost_by(errno)),
        }
    }

    fn lose(&mut self, reason: LostReason) {
        self.lost.get_or_insert(reason);
    }

    /// The protocol is broken: the peer is told when that is possible at once.
    #[cold]
    fn end(&mut self, broken: Broken) {
        tracing::warn!(reason = %broken, "NVMe/TCP connection ends");
        let mut bytes = [0; TERM_MAX];
        let len = self.queue.term_req(broken, &mut bytes);
        // In the middle of another PDU it would only be taken for its data.
        if len > 0
            && self.sending.is_none()
            && let Some(term) = bytes.get(..len)
        {
            // Nobody waits for it: it is a courtesy to whoever reads the other end's log.
            let _ = send(&self.fd, term, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
        self.lose(broken.reason());
    }

    /// Ends the connection: what is in flight completes soon. Of a connection that is lost the kernel sends nothing any
    /// more: a write of it that the target gets later could overwrite a newer one (see `volume::fence`).
    pub(crate) fn shut_down(&mut self) {
        if self.lost.is_some() {
            // Closing then resets the connection, and what the kernel still has of it goes.
            let _ = sockopt::set_socket_linger(&self.fd, Some(Duration::ZERO));
        }
        self.lose(LostReason::Closed);
        // Not connected, or reset by the peer: then it is down already.
        let _ = shutdown(&self.fd, Shutdown::Both);
    }

    /// For what the end of the connection did not end.
    pub(crate) fn cancel(&mut self, reactor: &mut Reactor) {
        for operation in [SEND, RECEIVE, CONNECT] {
            let token = self.token(operation);
            let cancel = self.token(CANCEL);
            // SAFETY: no pointers.
            unsafe { reactor.submit(Op::Cancel { token }, cancel) };
        }
    }
}

/// What the first to be told of a connection's end is told (tcp(7)): a reset says that the target is done with it (EPIPE:
/// after it had closed its side). Whatever else ends it, the kernel has only given up: with the last ICMP message as the
/// reason if there was one, such as ECONNREFUSED for a firewall's "port unreachable". Then the target may still carry out
/// what it has got (see `volume::fence`).
fn lost_by(errno: i32) -> LostReason {
    match errno {
        libc::ECONNRESET | libc::EPIPE => LostReason::PeerClosed,
        _ => LostReason::Retries,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::ptr::NonNull;
    use std::time::Instant;

    use flexblk_nvme::tcp::Digests;
    use flexblk_reactor::{Config, Span, Wait};

    use super::super::NO_KEY;
    use super::super::queue::Kind;
    use super::*;
    use crate::link::Data;

    #[test]
    fn only_a_reset_says_that_the_target_ended_it() {
        for errno in [libc::ECONNRESET, libc::EPIPE] {
            assert_eq!(lost_by(errno), LostReason::PeerClosed);
        }
        for errno in [libc::ETIMEDOUT, libc::ECONNREFUSED, libc::EHOSTDOWN] {
            assert_eq!(lost_by(errno), LostReason::Retries);
        }
    }

    /// The other end is there and reads nothing: after a while the kernel gives up, with a part of a batch sent.
    #[test]
    fn whoever_reads_nothing_has_not_ended_it() {
        const PAYLOAD_BYTES: usize = 1 << 20;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut payload = vec![7; PAYLOAD_BYTES];
        let start = NonNull::new(payload.as_mut_ptr()).unwrap();
        // SAFETY: it lives until the reactor has gone, and nobody changes it.
        let payload = unsafe { Span::from_raw_parts(start, PAYLOAD_BYTES as u32) };
        for spins in [false, true] {
            let mut queue = Queue::new(16, Kind::Io, Digests::empty()).unwrap();
            queue.set_in_capsule_bytes(PAYLOAD_BYTES as u32);
            let limit = Some(Duration::from_millis(200));
            let peer = listener.local_addr().unwrap();
            let mut connection = Connection::new(0, peer, None, limit, queue).unwrap();
            let mut reactor = Reactor::new(&Config::default()).unwrap();
            connection.connect(&mut reactor);
            let (mut scratch, mut out) = (Vec::new(), Vec::new());
            let deadline = Instant::now() + Duration::from_secs(20);
            let mut posted = false;
            while connection.lost().is_none() {
                assert!(Instant::now() < deadline);
                if !posted && connection.receive_in_flight {
                    posted = true;
                    // After the receive, so that the send is the first to be woken; more than the sockets hold.
                    for cid in 0..16 {
                        let data = Data::ToController(payload, NO_KEY);
                        connection.queue.post(cid, &mut [0; 64], data).unwrap();
                    }
                }
                connection.flush(&mut reactor, spins);
                let wait = Wait::Until(Instant::now() + Duration::from_millis(20));
                let mut look = || connection.look(&mut scratch);
                reactor.turn_polling(wait, &mut out, &mut look).unwrap();
                for completion in out.drain(..) {
                    connection.on_completion(&completion, &mut scratch);
                }
            }
            assert_eq!(connection.lost(), Some(LostReason::Retries), "{spins}");
            connection.shut_down();
            while connection.is_busy() {
                assert!(Instant::now() < deadline);
                reactor.turn(Wait::Until(deadline), &mut out).unwrap();
                for completion in out.drain(..) {
                    connection.on_completion(&completion, &mut scratch);
                }
            }
        }
    }
}
