//! Limits and choices of an engine.

use std::time::Duration;

use crate::verbs::Digest;

/// How payload gets into datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum TxMode {
    /// Headers are written, payload is gathered from where it lies.
    #[default]
    HeaderOnly,
    /// Payload is copied behind its header, as a classic stack does.
    Copy,
}

/// Configuration of an engine. Everything is bounded by it.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Queue pairs at a time.
    pub max_qps: usize,
    /// Completion queues at a time.
    pub max_cqs: usize,
    /// Memory regions at a time, at most 65535.
    pub max_mrs: usize,
    /// Packets that a queue pair may have outstanding (at most 2048).
    pub window: u32,
    /// Payload bytes of a packet that we offer; the peer's offer may be smaller.
    pub mtu: u32,
    /// Checksums that we ask for; either end can impose them.
    pub digest: Digest,
    /// How payload is sent; read by the port.
    pub tx: TxMode,
    /// Longest time that a received request waits for a packet to carry its acknowledgement.
    pub ack_delay: Duration,
    /// Received requests after which an acknowledgement is sent at once.
    pub ack_coalesce: u32,
    /// Shortest retransmission timeout.
    pub min_rto: Duration,
    /// Longest retransmission timeout after back-off.
    pub max_rto: Duration,
    /// Timeouts in a row without an answer until `RETRY_EXC_ERR` (0-7), but see `retry_time`.
    pub retry_count: u8,
    /// Shortest time without progress until `RETRY_EXC_ERR`. First timeouts come after about a
    /// millisecond and only cost a probe; a peer that is not scheduled for a while is not dead.
    pub retry_time: Duration,
    /// RNR NAKs in a row until `RNR_RETRY_EXC_ERR` (0-7, 7 without limit).
    pub rnr_retry: u8,
    /// What we ask peers to wait after an RNR NAK, rounded up to a value of IBA table 47.
    pub rnr_delay: Duration,
    /// RDMA READ requests outstanding per queue pair, and responder resources (at most 255).
    pub max_reads: u8,
    /// Bytes of messages that are held because they arrived ahead of a gap.
    pub hold_budget_bytes: usize,
    /// Offer FlexiNS framing when connecting, accept it when offered.
    pub flexins: bool,
    /// Limits and times of the connection manager.
    pub cm: crate::cm::CmConfig,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_qps: 4096,
            max_cqs: 4096,
            max_mrs: 16_384,
            window: 1024,
            mtu: 8320,
            digest: Digest::Crc32c,
            tx: TxMode::HeaderOnly,
            ack_delay: Duration::from_micros(100),
            ack_coalesce: 64,
            min_rto: Duration::from_millis(1),
            max_rto: Duration::from_millis(250),
            retry_count: 7,
            retry_time: Duration::from_secs(3),
            rnr_retry: 7,
            rnr_delay: Duration::from_micros(320),
            max_reads: 128,
            hold_budget_bytes: 16 << 20,
            flexins: true,
            cm: crate::cm::CmConfig::default(),
        }
    }
}
