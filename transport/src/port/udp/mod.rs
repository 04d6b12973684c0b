//! A UDP socket as a port: trains out by `UDP_SEGMENT`, trains in by `UDP_GRO`, both through the
//! reactor's io_uring; with little traffic by system calls of their own (`asked`).
//!
//! By the ring everything sent in a turn leaves with the system call that collects what has arrived. On
//! loopback a train stays one piece from the sender's gather list to the receiver's buffer.
#![allow(unsafe_code)]

mod asked;
mod receive;
mod send;
mod socket;
#[cfg(test)]
mod tests;

use std::io;
use std::mem::ManuallyDrop;
use std::net::SocketAddr;

use flexblk_reactor::{Completion, Keeper, Polled, Reactor};

use self::receive::Receiver;
use self::send::Sender;
use self::socket::Socket;
use super::{Packet, Port, PortCounters};
use crate::engine::TxMode;
use crate::train::{Train, TrainId, TrainQueue};

/// UDP port of RoCEv2 (IBA annex A17).
pub const ROCE_UDP_PORT: u16 = 4791;

/// Where received packets lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum RxMode {
    /// Few buffers, used in turn: they stay in the cache however much arrives.
    #[default]
    InCache,
    /// A long ring, filled from end to end.
    Ring {
        /// Its memory.
        bytes: usize,
    },
}

/// How a UDP port is made.
#[derive(Clone, Debug)]
pub struct UdpConfig {
    /// Address to bind; port 0 for any.
    pub bind: SocketAddr,
    /// Share the address with other sockets; the kernel's hash keeps a peer at one of them.
    pub reuse_port: bool,
    /// Copy payload, or gather it.
    pub tx: TxMode,
    /// Where received packets lie.
    pub rx: RxMode,
    /// Buffers of [`RxMode::InCache`], each for a train.
    pub in_cache_buffers: u16,
    /// Let the kernel segment trains.
    pub gso: bool,
    /// Send without the kernel's copy, where the kernel and the device can; no gain on loopback.
    pub zero_copy: bool,
    /// Trains that can be under way.
    pub trains: u16,
    /// Socket buffers in bytes, each way.
    pub socket_buffer_bytes: u32,
    /// Group number of the receive buffers, unique in the reactor.
    pub buffer_group: u16,
}

impl UdpConfig {
    /// The usual, bound to `bind`.
    #[must_use]
    pub fn new(bind: SocketAddr) -> Self {
        Self {
            bind,
            reuse_port: false,
            tx: TxMode::HeaderOnly,
            rx: RxMode::default(),
            in_cache_buffers: 8,
            gso: true,
            zero_copy: false,
            trains: 32,
            socket_buffer_bytes: 16 << 20,
            buffer_group: 0,
        }
    }
}

/// Why there is no port.
#[derive(Debug, thiserror::Error)]
pub enum UdpError {
    /// The address cannot be bound.
    #[error("cannot bind UDP {address}: {source}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A socket option was refused.
    #[error("socket option {name}: {source}")]
    Option {
        /// Which.
        name: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel lacks something that has no substitute here.
    #[error("this kernel has no {0}")]
    Unsupported(&'static str),
    /// The reactor refused.
    #[error(transparent)]
    Reactor(#[from] flexblk_reactor::Error),
}

/// A UDP socket on a reactor.
///
/// What the kernel uses while operations are in flight goes to the reactor's [`Keeper`] when the port is dropped.
/// [`UdpPort::close`] frees the address at once, and the rest as soon as [`UdpPort::has_ended`].
#[derive(Debug)]
pub struct UdpPort {
    inner: ManuallyDrop<Box<Inner>>,
    keeper: Keeper,
}

/// Everything that the kernel may use; boxed so that it moves to the keeper in one piece.
#[derive(Debug)]
struct Inner {
    sender: Sender,
    receiver: Receiver,
    counters: PortCounters,
    /// `None` once closed.
    socket: Option<Socket>,
    local: SocketAddr,
    /// Cancellations that have not completed.
    cancels: usize,
}

/// Slot numbers of the port's tokens: the receive, its cancellation, and trains from `SEND_SLOTS`.
const RECEIVE_SLOT: u64 = 0;
const CANCEL_SLOT: u64 = 1;
const SEND_SLOTS: u64 = 1 << 32;

impl UdpPort {
    /// Binds a socket and starts to receive; `owner` marks the port's tokens on this reactor.
    ///
    /// # Errors
    /// [`UdpError`].
    pub fn bind(reactor: &mut Reactor, owner: u8, config: &UdpConfig) -> Result<Self, UdpError> {
        let socket = Socket::open(config.bind, config.reuse_port, config.socket_buffer_bytes)?;
        let zero_copy = config.zero_copy && reactor.features().send_zc;
        let fd = socket.fd();
        let (trains, tx) = (config.trains.max(1), config.tx);
        let sender = Sender::new(fd, owner, trains, tx, config.gso, zero_copy)?;
        let receiver = Receiver::start(reactor, fd, owner, config)?;
        let inner = Inner {
            sender,
            receiver,
            counters: PortCounters::default(),
            local: socket.local_addr(),
            socket: Some(socket),
            cancels: 0,
        };
        Ok(Self {
            inner: ManuallyDrop::new(Box::new(inner)),
            keeper: reactor.keeper(),
        })
    }

    /// Frees the address: no packet is received or sent any more. Completions with the owner's tokens still come, until
    /// the port [has ended](UdpPort::has_ended). If the kernel takes no operations just now, the address is free only
    /// after another call.
    pub fn close(&mut self, reactor: &mut Reactor) {
        let Inner {
            receiver,
            sender,
            cancels,
            socket,
            ..
        } = &mut **self.inner;
        if !receiver.is_closed() {
            *cancels += receiver.close(reactor);
            if sender.queue.in_flight() > 0 {
                *cancels += sender.cancel(reactor);
            }
        }
        // Nothing may name the descriptor after it is closed; what is in flight holds the file.
        if socket.is_some()
            && let Ok(true) = reactor.submit_queued()
        {
            *socket = None;
        }
    }

    /// Whether it is closed, and no completion with the owner's tokens comes any more: dropped now, it leaves nothing, and
    /// its owner number and buffer group are free.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let inner = &self.inner;
        inner.socket.is_none()
            && inner.receiver.has_ended()
            && inner.cancels == 0
            && inner.sender.queue.in_flight() == 0
    }

    /// Bytes of datagrams that may wait in the socket, as granted by the kernel.
    #[must_use]
    pub fn receive_buffer_bytes(&self) -> u32 {
        self.inner
            .socket
            .as_ref()
            .map_or(0, Socket::receive_buffer_bytes)
    }

    /// Trains handed to the kernel that it has not finished with.
    #[must_use]
    pub fn trains_in_flight(&self) -> usize {
        self.inner.sender.queue.in_flight()
    }

    /// Asks the kernel to give up on trains that it has not sent yet; they complete soon after.
    pub fn cancel_trains(&mut self, reactor: &mut Reactor) {
        self.inner.cancels += self.inner.sender.cancel(reactor);
    }

    /// How the reactor's next turn receives. A port whose owner calls this before every turn receives without the ring
    /// while little comes and the thread `spins`: then [`UdpPort::look`] during the turn, and
    /// [`UdpPort::take_looked`] after it.
    #[inline]
    pub fn prepare_turn(&mut self, reactor: &mut Reactor, spins: bool) {
        self.inner.cancels += self.inner.receiver.choose(reactor, spins);
    }

    /// Asks the socket by a system call of its own, if that is how the port receives just now.
    #[inline]
    pub fn look(&mut self) -> Polled {
        self.inner.receiver.look()
    }

    /// Gives `packet` what a look has found.
    #[inline]
    pub fn take_looked(&mut self, packet: &mut dyn FnMut(SocketAddr, Packet<'_>)) {
        let Inner {
            receiver, counters, ..
        } = &mut **self.inner;
        receiver.take_looked(counters, packet);
    }

    /// Whether no train is left for the engine until completions come.
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        self.inner.sender.queue.is_exhausted()
    }

    /// Largest IP packet on the way to `peer` as the kernel knows it now.
    ///
    /// # Errors
    /// When the kernel has no route.
    pub fn path_mtu_bytes(peer: SocketAddr) -> io::Result<u32> {
        socket::path_mtu_bytes(peer)
    }
}

impl Port for UdpPort {
    type Sink = TrainQueue;

    fn sink(&mut self) -> &mut TrainQueue {
        &mut self.inner.sender.queue
    }

    fn local_addr(&self) -> SocketAddr {
        self.inner.local
    }

    fn flush(&mut self, reactor: &mut Reactor, sent: Option<&mut dyn FnMut(&Train)>) {
        let Inner {
            sender,
            receiver,
            counters,
            socket: Some(_),
            ..
        } = &mut **self.inner
        else {
            return;
        };
        if sender.flush(reactor, counters, receiver.is_asked(), sent) {
            receiver.expect();
        }
    }

    fn on_completion(
        &mut self,
        reactor: &mut Reactor,
        completion: &Completion,
        packet: &mut dyn FnMut(SocketAddr, Packet<'_>),
    ) {
        let Inner {
            sender,
            receiver,
            counters,
            cancels,
            ..
        } = &mut **self.inner;
        match completion.token.slot() {
            RECEIVE_SLOT => receiver.on_completion(reactor, completion, counters, packet),
            CANCEL_SLOT => *cancels = cancels.saturating_sub(1),
            slot => {
                let id = TrainId::from_index((slot & 0xffff) as u16);
                sender.on_completion(id, completion, counters);
            }
        }
    }

    fn counters(&self) -> PortCounters {
        let trains = *self.inner.sender.queue.counters();
        PortCounters {
            payload_bytes_gathered: trains.payload_bytes_gathered,
            payload_bytes_copied: trains.payload_bytes_copied,
            header_bytes: trains.header_bytes,
            rx_dropped_by_kernel: self.inner.socket.as_ref().map_or(0, Socket::dropped),
            ..self.inner.counters
        }
    }
}

impl Drop for UdpPort {
    fn drop(&mut self) {
        let ended = self.has_ended();
        // SAFETY: taken once, here, and never used again.
        let inner = unsafe { ManuallyDrop::take(&mut self.inner) };
        if !ended {
            self.keeper.keep(inner);
        }
    }
}
