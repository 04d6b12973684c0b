//! Connection management: InfiniBand CM datagrams (MADs) exchanged on queue pair 1, sans-IO.
//!
//! [`CmManager`] is the state machine, [`mad`] the codec of the 256-byte datagrams, [`params`] the
//! FlexiNS parameters that ride in the private data. The engine frames what
//! [`CmManager::poll_transmit`] returns as SEND ONLY with a datagram extended transport header to
//! [`GSI_QPN`] with [`GSI_QKEY`], as RoCE does, so that Wireshark reads the exchange.
//!
//! ```text
//!  initiator                        target
//!  connect      -- REQ -->          ConnectRequest
//!  Established  <-- REP --          accept
//!               -- RTU -->          Established
//!  disconnect   -- DREQ -->         Disconnected
//!  Disconnected <-- DREP --
//! ```

#[cfg(test)]
mod codec_tests;
mod connection;
mod interface;
pub mod mad;
mod manager;
pub mod params;
mod receive;
#[cfg(test)]
mod tests;

pub use interface::{
    AcceptArgs, CmConfig, CmCounters, CmError, CmEvent, ConnId, ConnectArgs, DisconnectReason,
    Negotiated, Peer,
};
pub use mad::{MAD_LEN_BYTES, PrivateData, RejectReason, ServiceId};
pub use manager::CmManager;
pub use params::{Features, Params};

/// Queue pair of the general services interface, to which CM datagrams go (IBA 3.9.4).
pub const GSI_QPN: u32 = 1;
/// Well-known queue key of the general services interface (IBA 13.5.1.1, `0x80010000`).
pub const GSI_QKEY: u32 = 0x8001_0000;
