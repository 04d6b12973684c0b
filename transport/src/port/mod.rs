//! Ports: where trains of packets leave and packets arrive.
//!
//! `udp` is a socket on a reactor's io_uring; `sim` is a network in virtual time for tests.

pub mod sim;
pub mod udp;

use std::net::SocketAddr;

use flexblk_reactor::{Completion, Reactor};

use crate::engine::TrainSink;
use crate::train::Train;

/// A received packet where it lies, until the next one is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Its bytes.
    pub bytes: &'a [u8],
    /// The bytes of the packet that came behind it in the same train and will be given out next;
    /// empty when there is none. Nobody has checked it: it is good for loading memory ahead that it
    /// seems to name (see [`Engine::foresee`](crate::engine::Engine::foresee)), and for nothing else.
    pub behind: &'a [u8],
}

impl<'a> Packet<'a> {
    /// A packet with none behind it.
    #[must_use]
    pub const fn alone(bytes: &'a [u8]) -> Self {
        Self { bytes, behind: &[] }
    }
}

/// What an endpoint needs of a network device on a reactor.
pub trait Port {
    /// Where the engine writes packets.
    type Sink: TrainSink;

    /// The place itself.
    fn sink(&mut self) -> &mut Self::Sink;

    /// Address that peers answer to.
    fn local_addr(&self) -> SocketAddr;

    /// Queues everything written so far for sending; it leaves with the reactor's next turn, or at once.
    /// `sent` sees every train that leaves now.
    fn flush(&mut self, reactor: &mut Reactor, sent: Option<&mut dyn FnMut(&Train)>);

    /// Takes a completion of the port's operations and gives `packet` what has arrived.
    fn on_completion(
        &mut self,
        reactor: &mut Reactor,
        completion: &Completion,
        packet: &mut dyn FnMut(SocketAddr, Packet<'_>),
    );

    /// Counters.
    fn counters(&self) -> PortCounters;
}

/// What a port has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortCounters {
    /// Trains handed to the kernel.
    pub trains_tx: u64,
    /// Packets in them.
    pub segments_tx: u64,
    /// Bytes in them.
    pub bytes_tx: u64,
    /// Entries of their gather lists.
    pub gather_entries: u64,
    /// Trains by length: 1, 2-3, 4-7, 8-15, 16-31, 32-63, 64 and more packets.
    pub trains_tx_by_segments: [u64; 7],
    /// Header, inline and trailer bytes written.
    pub header_bytes: u64,
    /// Payload bytes put on gather lists.
    pub payload_bytes_gathered: u64,
    /// Payload bytes that were copied to send them.
    pub payload_bytes_copied: u64,
    /// Datagrams or trains received.
    pub trains_rx: u64,
    /// Of those, found by asking the socket without the ring.
    pub looks_found: u64,
    /// Packets in them.
    pub segments_rx: u64,
    /// Bytes in them.
    pub bytes_rx: u64,
    /// Trains that the kernel refused to send.
    pub send_errors: u64,
    /// Zero-copy sends that the kernel copied after all.
    pub zero_copy_copied: u64,
    /// Times that segmentation was given up (EIO, EINVAL).
    pub gso_fallbacks: u64,
    /// Receives that had to be started anew (no buffer was free, or an error).
    pub rx_restarts: u64,
    /// Of those, with an error other than "no buffer".
    pub rx_errors: u64,
    /// Datagrams longer than a buffer, dropped.
    pub rx_truncated: u64,
    /// Datagrams that the kernel dropped because the socket's buffer was full.
    pub rx_dropped_by_kernel: u64,
}
