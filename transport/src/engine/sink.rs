//! Where the engine writes packets: the current train of a port, or a buffer in a test.

use std::net::SocketAddr;

use flexblk_reactor::Span;

/// Lengths of a packet before it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketShape {
    /// Destination.
    pub to: SocketAddr,
    /// Headers and inline prefix.
    pub head: u16,
    /// Payload that will be gathered.
    pub payload: u32,
    /// Pad and trailer: at most [`SLOT_MAX_BYTES`](crate::wire::trailer::SLOT_MAX_BYTES).
    pub trailer: u8,
}

impl PacketShape {
    /// Length of the whole packet.
    #[must_use]
    pub const fn len(&self) -> u32 {
        self.head as u32 + self.payload + self.trailer as u32
    }

    /// Never: a packet has a header.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Takes packets one after another: `open`, `gather` as often as needed, `close`.
pub trait TrainSink {
    /// Begins a packet and lends its header slot of exactly `shape.head` bytes, which the engine
    /// writes once. The sink decides whether the packet joins the current train (same destination,
    /// equal sizes but the last) or begins another. `None`: no room now; nothing was begun.
    fn open(&mut self, shape: &PacketShape) -> Option<&mut [u8]>;

    /// Appends payload. Lengths sum up to `shape.payload`.
    fn gather(&mut self, span: Span);

    /// Ends the packet with exactly `shape.trailer` bytes.
    fn close(&mut self, trailer: &[u8]);
}
