//! The receiving side: one multishot `recvmsg` into a ring of provided buffers, or, with little traffic, what
//! [`asked`](super::asked) has found.
//!
//! `rx=in-cache` keeps few buffers in the ring, so that the same memory is filled again and again
//! however much arrives; `rx=ring` walks through as many as asked for.
#![allow(unsafe_code)]

use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::sync::Arc;

use flexblk_reactor::{
    BufferRing, Completion, HugePages, Op, Polled, Reactor, ReceivedMessage, SharedMemory, Span,
    Token,
};

use super::asked::{Asked, Change};
use super::socket::{UDP_GRO, read_address};
use super::{RxMode, UdpConfig, UdpError};
use crate::port::{Packet, PortCounters};

/// Room for the sender's address: the larger of the two families.
pub(super) const NAME_ROOM: usize = size_of::<libc::sockaddr_in6>();
/// Room for one control message with an `int`: `CMSG_SPACE(4)`.
pub(super) const CONTROL_ROOM: usize = size_of::<libc::cmsghdr>() + 8;
/// A buffer holds the largest datagram (or coalesced train) and what is in front of it.
const BUFFER_BYTES: u32 = 68 << 10;
const _: () = assert!(
    BUFFER_BYTES as usize >= ReceivedMessage::payload_offset(NAME_ROOM, CONTROL_ROOM) + (64 << 10)
);
/// Errors in a row after which the port gives up receiving.
const MAX_ERRORS_IN_A_ROW: u32 = 64;

#[derive(Debug)]
pub(super) struct Receiver {
    ring: Option<BufferRing>,
    memory: Arc<SharedMemory>,
    /// Boxed so that the kernel's pointer stays good.
    header: Box<libc::msghdr>,
    fd: RawFd,
    owner: u8,
    /// The ring has a receive.
    armed: bool,
    /// Nothing is received any more.
    closed: bool,
    errors_in_a_row: u32,
    /// Receiving without the ring; `None` for a long ring, which is to be walked through.
    asked: Option<Box<Asked>>,
    /// The address of the last datagram as the kernel wrote it (and its length), and decoded: trains
    /// come from the same peer again and again. Packets get a copy of `from` as it lies here: one
    /// decoded afresh in pieces for each call would make its reader wait until all stores before it
    /// (the copy of the packet before) have drained, which cost 13 % of a receiving core.
    name: [u8; NAME_ROOM],
    name_len: usize,
    from: SocketAddr,
}

impl Receiver {
    pub(super) fn start(
        reactor: &mut Reactor,
        fd: RawFd,
        owner: u8,
        config: &UdpConfig,
    ) -> Result<Self, UdpError> {
        if !reactor.features().recv_multishot {
            return Err(UdpError::Unsupported("multishot recvmsg (Linux 6.0)"));
        }
        let wanted = match config.rx {
            RxMode::InCache => u64::from(config.in_cache_buffers),
            RxMode::Ring { bytes } => bytes as u64 / u64::from(BUFFER_BYTES),
        };
        let count = wanted.clamp(2, 32_768).next_power_of_two().min(32_768) as u16;
        // Fewer than the ring's power of two may be wanted; a ring of entries costs little.
        let filled = wanted.clamp(2, u64::from(count)) as u16;
        // One more than few, for what comes without the ring.
        let looked_into = u64::from(config.rx == RxMode::InCache);
        let bytes = (u64::from(filled) + looked_into) * u64::from(BUFFER_BYTES);
        let memory = SharedMemory::create("flexins-rx", bytes, HugePages::Try)?;
        let mut ring = reactor.register_buffer_ring(config.buffer_group, count)?;
        for bid in 0..filled {
            if let Some(buffer) = buffer(&memory, bid) {
                // SAFETY: the memory lives as long as this receiver, whose owner keeps it until the
                // operation has ended; the buffer is read only between completion and this call.
                unsafe { ring.push(bid, buffer) };
            }
        }
        ring.publish();
        // SAFETY: all zeroes is a valid msghdr.
        let mut header: Box<libc::msghdr> = Box::new(unsafe { std::mem::zeroed() });
        header.msg_namelen = NAME_ROOM as u32;
        header.msg_controllen = CONTROL_ROOM as _;
        let asked = match config.rx {
            RxMode::InCache => buffer(&memory, filled).map(Asked::new).map(Box::new),
            RxMode::Ring { .. } => None,
        };
        let mut receiver = Self {
            ring: Some(ring),
            memory,
            header,
            fd,
            owner,
            armed: false,
            closed: false,
            errors_in_a_row: 0,
            asked,
            name: [0; NAME_ROOM],
            name_len: 0,
            from: SocketAddr::from(([0, 0, 0, 0], 0)),
        };
        receiver.arm(reactor);
        Ok(receiver)
    }

    fn arm(&mut self, reactor: &mut Reactor) {
        let Some(ring) = &self.ring else { return };
        let op = Op::RecvMsgMulti {
            fd: self.fd,
            msg: &raw const *self.header,
            group: ring.group(),
        };
        // SAFETY: the header is boxed and not changed; it, the buffers and the socket outlive the
        // operation, see `UdpPort`.
        unsafe { reactor.submit_passive(op, Token::new(self.owner, super::RECEIVE_SLOT)) };
        self.armed = true;
    }

    fn cancel(&self, reactor: &mut Reactor) -> usize {
        let token = Token::new(self.owner, super::RECEIVE_SLOT);
        let cancel = Token::new(self.owner, super::CANCEL_SLOT);
        // SAFETY: no pointers.
        unsafe { reactor.submit(Op::Cancel { token }, cancel) };
        1
    }

    pub(super) fn on_completion(
        &mut self,
        reactor: &mut Reactor,
        completion: &Completion,
        counters: &mut PortCounters,
        packet: &mut dyn FnMut(SocketAddr, Packet<'_>),
    ) {
        if let Some(bid) = completion.flags.buffer_id() {
            if let (Ok(len), Some(buffer)) = (completion.bytes(), buffer(&self.memory, bid))
                && let Some(filled) = buffer.sub(0, len)
            {
                self.errors_in_a_row = 0;
                // SAFETY: the kernel has handed the buffer out and writes to it only after it was
                // pushed again, which happens after this.
                let bytes = unsafe { filled.as_slice() };
                if let Some(message) = ReceivedMessage::parse(bytes, NAME_ROOM, CONTROL_ROOM) {
                    self.cut(&message, counters, packet);
                }
            }
            if let (Some(ring), Some(buffer)) = (&mut self.ring, buffer(&self.memory, bid)) {
                // SAFETY: as in `start`; the kernel had taken this buffer out of the ring.
                unsafe { ring.push(bid, buffer) };
                ring.publish();
            }
        }
        if completion.flags.more() {
            return;
        }
        self.armed = false;
        if self.closed {
            self.give_ring_back(reactor);
            return;
        }
        if self.asked.as_mut().is_some_and(|asked| asked.left()) {
            return;
        }
        match -completion.result {
            libc::ECANCELED => return,
            // All buffers were full, which is what a short ring is for: go on with the freed ones.
            libc::ENOBUFS => {}
            errno if errno > 0 => {
                counters.rx_errors += 1;
                self.errors_in_a_row += 1;
                if self.errors_in_a_row > MAX_ERRORS_IN_A_ROW {
                    tracing::error!(errno, "the UDP socket cannot receive any more");
                    return;
                }
            }
            _ => {}
        }
        counters.rx_restarts += 1;
        self.arm(reactor);
    }

    /// How the next turn is to receive: see [`Asked`]. How many cancellations will complete.
    #[inline]
    pub(super) fn choose(&mut self, reactor: &mut Reactor, spins: bool) -> usize {
        match &mut self.asked {
            Some(asked) if !self.closed => match asked.choose(spins) {
                Change::None => 0,
                Change::Arm => {
                    self.arm(reactor);
                    0
                }
                Change::Cancel => self.cancel(reactor),
            },
            _ => 0,
        }
    }

    /// Whether the socket is asked without the ring.
    #[inline]
    pub(super) fn is_asked(&self) -> bool {
        self.asked.as_ref().is_some_and(|asked| asked.is_asked())
    }

    /// Something was sent: an answer may come soon.
    #[inline]
    pub(super) fn expect(&mut self) {
        if let Some(asked) = &mut self.asked {
            asked.expect();
        }
    }

    /// Asks the socket, if that is how it receives just now.
    #[inline]
    pub(super) fn look(&mut self) -> Polled {
        match &mut self.asked {
            Some(asked) if !self.closed => asked.look(self.fd),
            _ => Polled::Nothing,
        }
    }

    /// Takes what a look has found.
    #[inline]
    pub(super) fn take_looked(
        &mut self,
        counters: &mut PortCounters,
        packet: &mut dyn FnMut(SocketAddr, Packet<'_>),
    ) {
        let Some((heard, bytes)) = self.asked.as_mut().and_then(|asked| asked.take()) else {
            return;
        };
        counters.looks_found += 1;
        let message = ReceivedMessage {
            name: heard.name.get(..heard.name_len).unwrap_or_default(),
            control: heard.control.0.get(..heard.control_len).unwrap_or_default(),
            // SAFETY: the next look is the next to write to it.
            payload: unsafe { bytes.as_slice() },
            flags: heard.flags as u32,
        };
        self.cut(&message, counters, packet);
    }

    /// Cuts a received train into its packets.
    fn cut(
        &mut self,
        message: &ReceivedMessage<'_>,
        counters: &mut PortCounters,
        packet: &mut dyn FnMut(SocketAddr, Packet<'_>),
    ) {
        if !self.decode_sender(message.name) {
            return;
        }
        if message.is_truncated() {
            counters.rx_truncated += 1;
            return;
        }
        counters.trains_rx += 1;
        counters.bytes_rx += message.payload.len() as u64;
        let segment_len = segment_len(message.control).unwrap_or(message.payload.len());
        if let Some(asked) = &mut self.asked {
            asked.note(message.payload.len().div_ceil(segment_len.max(1)));
        }
        let mut segments = message.payload.chunks(segment_len.max(1)).peekable();
        while let Some(bytes) = segments.next() {
            let behind = segments.peek().copied().unwrap_or_default();
            counters.segments_rx += 1;
            packet(self.from, Packet { bytes, behind });
        }
    }

    fn decode_sender(&mut self, name: &[u8]) -> bool {
        if self.name.get(..self.name_len) == Some(name) && !name.is_empty() {
            return true;
        }
        let (Some(from), Some(room)) = (read_address(name), self.name.get_mut(..name.len())) else {
            return false;
        };
        room.copy_from_slice(name);
        self.name_len = name.len();
        self.from = from;
        true
    }

    /// Receives nothing from now on. How many cancellations will complete.
    pub(super) fn close(&mut self, reactor: &mut Reactor) -> usize {
        self.closed = true;
        if self.armed {
            self.cancel(reactor)
        } else {
            self.give_ring_back(reactor);
            0
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether the kernel has nothing of it any more.
    pub(super) fn has_ended(&self) -> bool {
        !self.armed && self.ring.is_none()
    }

    fn give_ring_back(&mut self, reactor: &mut Reactor) {
        if let Some(ring) = self.ring.take() {
            reactor.unregister_buffer_ring(ring);
        }
    }
}

fn buffer(memory: &SharedMemory, bid: u16) -> Option<Span> {
    memory.span(u64::from(bid) * u64::from(BUFFER_BYTES), BUFFER_BYTES)
}

/// The value of the `UDP_GRO` control message: present when packets were coalesced.
fn segment_len(control: &[u8]) -> Option<usize> {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    let header = control.get(..HEADER)?;
    let level = i32::from_ne_bytes(header.get(HEADER - 8..HEADER - 4)?.try_into().ok()?);
    let kind = i32::from_ne_bytes(header.get(HEADER - 4..)?.try_into().ok()?);
    if (level, kind) != (libc::SOL_UDP, UDP_GRO) {
        return None;
    }
    let value = i32::from_ne_bytes(control.get(HEADER..HEADER + 4)?.try_into().ok()?);
    usize::try_from(value).ok().filter(|&len| len > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_messages_of_others_and_short_ones_are_no_segment_length() {
        let mut control = vec![0_u8; CONTROL_ROOM];
        control[..8].copy_from_slice(&20_usize.to_ne_bytes());
        control[8..12].copy_from_slice(&libc::SOL_UDP.to_ne_bytes());
        control[12..16].copy_from_slice(&UDP_GRO.to_ne_bytes());
        control[16..20].copy_from_slice(&4136_i32.to_ne_bytes());
        assert_eq!(segment_len(&control), Some(4136));
        for len in 0..20 {
            assert_eq!(segment_len(&control[..len]), None);
        }
        control[16..20].copy_from_slice(&(-1_i32).to_ne_bytes());
        assert_eq!(segment_len(&control), None);
        control[12] = 1;
        assert_eq!(segment_len(&control), None);
    }
}
