//! Sockets and their operations: the part of NVMe/TCP that hands memory to the kernel.
#![allow(unsafe_code)]

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use arrayvec::ArrayVec;
use flexblk_reactor::{BufferRing, HugePages, Op, Reactor, SharedMemory, Span, Token};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::super::buffers::MAX_PIECES;

/// Group of the ring of receive buffers; FlexiNS has group 0.
const GROUP: u16 = 1;
/// A receive buffer: about 30 writes of 4 KiB, or 1800 reads, in one system call.
const BUFFER_BYTES: u32 = 128 << 10;
/// Receive buffers of a thread. One is in use for each connection whose data has arrived and has not
/// been looked at; who finds none asks again in the next round.
const BUFFERS: u16 = 16;
/// Connections that the kernel keeps until we accept them.
const BACKLOG: i32 = 1024;

/// A listening socket. With `reuse_port` several threads share the port, and the kernel deals
/// connections out by a hash of their addresses.
pub(crate) fn listen(address: SocketAddr, reuse_port: bool) -> io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // A target that is started again need not wait for connections of the last one to time out.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if reuse_port {
        sockopt::set_socket_reuseport(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Buffers that the kernel fills, and the ring in which it finds them.
pub(super) struct ReceiveBuffers {
    ring: BufferRing,
    memory: Arc<SharedMemory>,
}

impl ReceiveBuffers {
    /// The number of a buffer that is not the kernel's.
    pub(super) const OURS: u16 = BUFFERS;

    pub(super) fn new(reactor: &mut Reactor) -> Result<Self, flexblk_reactor::Error> {
        let bytes = (u64::from(BUFFERS) + 1) * u64::from(BUFFER_BYTES);
        let memory = SharedMemory::create("nvme-tcp-rx", bytes, HugePages::Try)?;
        let ring = reactor.register_buffer_ring(GROUP, BUFFERS)?;
        let mut buffers = Self { ring, memory };
        for bid in 0..BUFFERS {
            buffers.give(bid);
        }
        Ok(buffers)
    }

    fn span(&self, bid: u16) -> Option<Span> {
        self.memory
            .span(u64::from(bid) * u64::from(BUFFER_BYTES), BUFFER_BYTES)
    }

    /// Receives what there is, now, into the buffer [`ReceiveBuffers::OURS`].
    pub(super) fn receive_now(&mut self, fd: &OwnedFd) -> Result<u32, i32> {
        let Some(span) = self.span(Self::OURS) else {
            return Err(libc::EAGAIN);
        };
        // SAFETY: the buffer never goes to the kernel's ring, and nobody reads it meanwhile: `self` is borrowed.
        let len = unsafe {
            libc::recv(
                fd.as_raw_fd(),
                span.as_ptr().cast(),
                span.len() as usize,
                libc::MSG_DONTWAIT,
            )
        };
        u32::try_from(len).map_err(|_| last_errno())
    }

    /// The first `len` bytes of a buffer that the kernel has filled.
    pub(super) fn bytes(&self, bid: u16, len: u32) -> &[u8] {
        match self.span(bid).and_then(|span| span.sub(0, len)) {
            // SAFETY: the kernel has taken the buffer out of the ring and completed the receive, and
            // it comes back to the ring by `give` only, which the borrow of `self` keeps away.
            Some(span) => unsafe { span.as_slice() },
            None => &[],
        }
    }

    /// A buffer goes back to the kernel, if it is the kernel's.
    pub(super) fn give(&mut self, bid: u16) {
        if bid == Self::OURS {
            return;
        }
        if let Some(span) = self.span(bid) {
            // SAFETY: the memory lives as long as this value, which its owner keeps until the
            // reactor is gone; nobody reads the buffer between here and its completion.
            unsafe { self.ring.push(bid, span) };
            self.ring.publish();
        }
    }

    /// Receives what there is into a buffer that the kernel takes.
    pub(super) fn receive(&self, reactor: &mut Reactor, fd: RawFd, token: Token) {
        let op = Op::RecvProvided {
            fd,
            len: 0,
            group: self.ring.group(),
        };
        // SAFETY: the buffers as above; the socket stays open until the completion, see
        // `Tcp::settle`.
        unsafe { reactor.submit_passive(op, token) };
    }
}

/// Begins to accept.
pub(super) fn accept(reactor: &mut Reactor, listener: &OwnedFd, token: Token) {
    let op = Op::Accept {
        fd: listener.as_raw_fd(),
        multi: true,
    };
    // SAFETY: no memory is named; the listener stays open as long as the table of connections.
    unsafe { reactor.submit(op, token) };
}

/// A message header and its vector, in place while the kernel uses them.
pub(super) struct Vector {
    header: libc::msghdr,
    entries: Vec<libc::iovec>,
}

impl Vector {
    pub(super) fn new() -> Box<Self> {
        Box::new(Self {
            // SAFETY: all zeroes is a valid msghdr.
            header: unsafe { std::mem::zeroed() },
            entries: Vec::new(),
        })
    }

    pub(super) fn clear(&mut self) {
        self.entries.clear();
    }

    pub(super) fn push(&mut self, base: *mut u8, len: usize) {
        self.entries.push(libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        });
    }

    fn seal(&mut self) -> *mut libc::msghdr {
        self.header.msg_iov = self.entries.as_mut_ptr();
        self.header.msg_iovlen = self.entries.len() as _;
        &raw mut self.header
    }

    /// Sends all of it.
    pub(super) fn send(self: &mut Box<Self>, reactor: &mut Reactor, fd: RawFd, token: Token) {
        let op = Op::SendMsg {
            fd,
            msg: self.seal(),
            flags: (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32,
        };
        // SAFETY: the vector is boxed and not touched until the completion; what its entries name
        // are header bytes that stay as long, and memory of commands whose slots are not freed
        // before. The socket stays open, see `Tcp::settle`.
        unsafe { reactor.submit(op, token) };
    }

    /// Sends what the socket takes now; `None`: nothing, and the ring is to find out why.
    pub(super) fn send_now(self: &mut Box<Self>, fd: RawFd) -> Option<u32> {
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: what the entries name is as for `send`, and the call has ended before anybody changes it.
        let len = unsafe { libc::sendmsg(fd, self.seal(), flags) };
        u32::try_from(len).ok()
    }

    /// Sends all of it without the kernel's copy: the memory is free with the second completion.
    pub(super) fn send_zero_copy(
        self: &mut Box<Self>,
        reactor: &mut Reactor,
        fd: RawFd,
        token: Token,
    ) {
        let op = Op::SendMsgZc {
            fd,
            msg: self.seal(),
            flags: (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32,
        };
        // SAFETY: as for `send`, and `Lent` keeps header bytes and slots until the second completion.
        unsafe { reactor.submit(op, token) };
    }

    /// Receives until it is full.
    pub(super) fn receive(self: &mut Box<Self>, reactor: &mut Reactor, fd: RawFd, token: Token) {
        let op = Op::RecvMsg {
            fd,
            msg: self.seal(),
            flags: libc::MSG_WAITALL as u32,
        };
        // SAFETY: as for `send`: a command in stage Fetch keeps its memory until the receive has
        // ended.
        unsafe { reactor.submit(op, token) };
    }
}

fn last_errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Pieces of a command's memory.
pub(crate) type Spans = ArrayVec<Span, MAX_PIECES>;

/// Pieces of memory as bytes, for a checksum over what has just been received into them.
pub(super) fn slices(spans: &[Span]) -> impl Iterator<Item = &[u8]> {
    // SAFETY: the spans are mapped while their command has them, and the receive into them has
    // ended; should another command of the host change them meanwhile, the checksum is wrong.
    spans.iter().map(|span| unsafe { span.as_slice() })
}

/// Adds pieces of memory to a checksum. If somebody changes them meanwhile, it is of neither version
/// and the receiver finds out.
pub(super) fn digest(crc: &mut flexblk_nvme::tcp::Crc32c, spans: &[Span]) {
    for bytes in slices(spans) {
        crc.update(bytes);
    }
}
