//! The verbs: names, requests and completions that applications use.
//!
//! The words are those of the InfiniBand verbs (IBA volume 1, chapter 11) and of libibverbs, so that
//! a reader who knows `ibv_post_send` knows this module. The methods themselves are on
//! [`Engine`](crate::engine::Engine).

use std::fmt;
use std::net::SocketAddr;

use bitflags::bitflags;

use crate::rc::request::segment_of;
use crate::wire::Psn;

/// Bytes of a message that travel inside a work completion at most.
pub const INLINE_RECV_MAX_BYTES: usize = 32;

/// Gather or scatter entries of one work request at most.
pub const MAX_SGE: usize = 16;

/// A protection domain: keys and queue pairs of different domains do not work together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pd(pub(crate) u32);

/// A completion queue of this engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cq(pub(crate) u32);

/// Which completion raises the event of an armed completion queue (IBA 11.4.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum NotifyOn {
    /// The next one.
    #[default]
    Next,
    /// The next one that is an error, or a message that its sender marked as solicited.
    Solicited,
}

/// Number of a queue pair: 24 bits on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Qpn(u32);

impl Qpn {
    /// Largest queue pair number.
    pub const MAX: u32 = 0x00FF_FFFF;

    /// The queue pair number in the low 24 bits of `value`.
    #[must_use]
    pub const fn new(value: u32) -> Self {
        Self(value & Self::MAX)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Qpn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#08x}", self.0)
    }
}

/// Local key of a memory region; never leaves the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lkey(pub(crate) u32);

impl Lkey {
    /// The key as an integer, for rings between processes.
    #[must_use]
    pub const fn to_bits(self) -> u32 {
        self.0
    }

    /// The key from [`Lkey::to_bits`]. A wrong one makes a work request fail, nothing worse.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }
}

/// Remote key of a memory region: 32 random bits, handed to a peer to give it access.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rkey(pub u32);

impl fmt::Debug for Rkey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rkey({:#010x})", self.0)
    }
}

bitflags! {
    /// What may be done with a memory region, or to a queue pair by its peer (IBA 10.6.3).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct Access: u8 {
        /// The transport may write received data into it.
        const LOCAL_WRITE = 1 << 0;
        /// A peer may RDMA WRITE it. Needs `LOCAL_WRITE`.
        const REMOTE_WRITE = 1 << 1;
        /// A peer may RDMA READ it.
        const REMOTE_READ = 1 << 2;
    }
}

/// A registered memory region. Addresses in it start at `addr`, which is the address in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mr {
    /// Key for our own work requests.
    pub lkey: Lkey,
    /// Key for the peer's.
    pub rkey: Rkey,
    /// First address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Mr {
    /// A gather or scatter entry of `len` bytes at `offset` of the region; bounds are checked when it is used.
    #[must_use]
    pub fn sge(&self, offset: u64, len: u32) -> Sge {
        Sge {
            addr: self.addr.wrapping_add(offset),
            len,
            lkey: self.lkey,
        }
    }
}

/// A piece of registered memory in a work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sge {
    /// First address, inside the region of `lkey`.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// The region.
    pub lkey: Lkey,
}

/// What a send request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendOp {
    /// Message into a receive buffer of the peer.
    Send,
    /// The same with an immediate value.
    SendImm(u32),
    /// The same; the peer invalidates this key of its own before it reports the message.
    SendInv(Rkey),
    /// Write into memory of the peer.
    Write {
        /// Address there.
        remote: u64,
        /// Key that the peer gave us.
        rkey: Rkey,
    },
    /// The same, and the peer gets a completion with an immediate value (uses up a receive request).
    WriteImm {
        /// Address there.
        remote: u64,
        /// Key that the peer gave us.
        rkey: Rkey,
        /// Value that the peer gets.
        imm: u32,
    },
    /// Read memory of the peer into the gather list.
    Read {
        /// Address there.
        remote: u64,
        /// Key that the peer gave us.
        rkey: Rkey,
    },
}

bitflags! {
    /// Options of a send request.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct SendFlags: u8 {
        /// A successful request reports a completion (a failed one always does).
        const SIGNALED = 1 << 0;
        /// Starts only when every RDMA READ before it has finished.
        const FENCE = 1 << 1;
        /// Asks the peer to raise a solicited event.
        const SOLICITED = 1 << 2;
    }
}

/// A send request: payload is `inline` followed by the gather list.
///
/// The memory of `sges` belongs to the transport until the request completes, because a
/// retransmission gathers it again; `inline` is copied when it is posted.
#[derive(Clone, Copy, Debug)]
pub struct SendWr<'a> {
    /// Comes back in the completion.
    pub wr_id: u64,
    /// Operation.
    pub op: SendOp,
    /// Bytes copied into the request, at most the queue pair's `max_inline`; not for READ.
    pub inline: &'a [u8],
    /// Registered memory that follows (for READ: that is filled).
    pub sges: &'a [Sge],
    /// Options.
    pub flags: SendFlags,
}

/// A receive request: memory for one message.
#[derive(Clone, Copy, Debug)]
pub struct RecvWr<'a> {
    /// Comes back in the completion.
    pub wr_id: u64,
    /// Memory that the message is scattered into.
    pub sges: &'a [Sge],
}

/// When a request asks for an acknowledgement, instead of leaving it to the peer when it sends one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum AckRequest {
    /// The last of the requests that are posted, if it is signalled: its completion takes a round trip.
    #[default]
    Last,
    /// Only where the window is full. For protocols in which the peer answers each message: the answer
    /// carries the acknowledgement, and one of its own would be a packet too many. Without an answer a
    /// completion takes the peer's [`ack_delay`](crate::engine::EngineConfig::ack_delay) longer.
    Never,
}

/// Parameters of a queue pair that are fixed when it is created; its memory is sized from them.
#[derive(Clone, Copy, Debug)]
pub struct QpInit {
    /// Protection domain.
    pub pd: Pd,
    /// Where send requests complete.
    pub send_cq: Cq,
    /// Where receive requests complete.
    pub recv_cq: Cq,
    /// Send requests that may be posted at a time.
    pub max_send_wr: u32,
    /// Receive requests (or in-place credits) that may be posted at a time.
    pub max_recv_wr: u32,
    /// Entries of the list of a request.
    pub max_sge: u32,
    /// Inline bytes of a send request.
    pub max_inline: u32,
    /// With in-place receive: messages of at most [`INLINE_RECV_MAX_BYTES`] and WRITE_WITH_IMM
    /// arrive inside work completions, only longer messages as deliveries.
    pub inline_recv: bool,
    /// When requests ask for their acknowledgement (FlexiNS framing; the standard's do so always).
    pub ack_request: AckRequest,
    /// Comes back in deliveries and completions.
    pub user: u64,
}

/// States of a queue pair (IBA 10.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QpState {
    /// Just created. Receive requests can be posted already, because the connection manager takes a
    /// queue pair from here to ready in one go.
    Reset,
    /// Receive requests can be posted.
    Init,
    /// Receives.
    ReadyToReceive,
    /// Receives and sends.
    ReadyToSend,
    /// Send queue drained or draining: posted requests wait.
    SendQueueDrain,
    /// Send queue in error (unreliable services; a reliable connection goes to `Error`).
    SendQueueError,
    /// Everything that was and will be posted completes with `WR_FLUSH_ERR`.
    Error,
}

/// How packets of a connection are framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Framing {
    /// RoCEv2 as in the standard: FIRST/MIDDLE/LAST, go-back-N, 4-byte trailer.
    Standard,
    /// Negotiated FlexiNS: self-contained packets, selective repeat, 8-byte trailer with FACK.
    Flexins,
}

/// Whether packets carry a CRC32C.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Digest {
    /// The field is zero and not looked at.
    None,
    /// CRC32C over everything before it.
    #[default]
    Crc32c,
}

/// What a queue pair must know to receive: what the connection manager has agreed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadyToReceive {
    /// Address of the peer; packets from elsewhere are dropped.
    pub peer: SocketAddr,
    /// The peer's queue pair.
    pub peer_qpn: Qpn,
    /// First sequence number that the peer sends.
    pub expected_psn: Psn,
    /// Payload bytes of a packet at most, both directions.
    pub mtu_bytes: u32,
    /// Framing of the connection.
    pub framing: Framing,
    /// Checksum of the connection.
    pub digest: Digest,
    /// Packets that either side may have outstanding.
    pub window: u32,
}

/// What a queue pair must know to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadyToSend {
    /// Our first sequence number.
    pub first_psn: Psn,
    /// RDMA READ requests outstanding at a time (the peer's responder resources).
    pub max_reads: u16,
    /// Timeouts in a row without progress until `RETRY_EXC_ERR`.
    pub retry_count: u8,
    /// RNR NAKs in a row until `RNR_RETRY_EXC_ERR`; 7 is without limit (IBA 9.7.5.2.8).
    pub rnr_retry: u8,
}

/// A move of a queue pair to another state, with what that state needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Modify {
    /// Forget everything that is posted.
    ToReset,
    /// Allow the peer these kinds of access.
    ToInit(Access),
    /// Start to receive.
    ToReadyToReceive(ReadyToReceive),
    /// Start to send.
    ToReadyToSend(ReadyToSend),
    /// Stop starting send requests.
    ToSendQueueDrain,
    /// Go on after a drain.
    Resume,
    /// Flush.
    ToError,
}

/// Answer of `query_qp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QpAttributes {
    /// State.
    pub state: QpState,
    /// Framing, from ready-to-receive on.
    pub framing: Framing,
    /// Address of the peer, from ready-to-receive on.
    pub peer: Option<SocketAddr>,
    /// The peer's queue pair number.
    pub peer_qpn: Qpn,
    /// Payload bytes of a packet.
    pub mtu_bytes: u32,
    /// Checksum.
    pub digest: Digest,
    /// First sequence number that this queue pair will use (random, chosen when it was created).
    pub first_psn: Psn,
    /// Send requests posted and not completed.
    pub send_wrs: u32,
    /// Receive requests or credits posted and not used.
    pub recv_wrs: u32,
    /// Send requests that can be posted at a time.
    pub max_send_wr: u32,
    /// Whether a drain has finished: nothing is outstanding.
    pub drained: bool,
    /// The caller's word.
    pub user: u64,
}

impl QpAttributes {
    /// How messages are cut into packets.
    #[must_use]
    pub fn segments(&self) -> Segments {
        Segments::new(self.mtu_bytes, self.framing)
    }
}

/// How a queue pair cuts messages into packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    mtu_bytes: u32,
    framing: Framing,
}

impl Segments {
    /// Of packets with so much payload at most.
    #[must_use]
    pub const fn new(mtu_bytes: u32, framing: Framing) -> Self {
        Self { mtu_bytes, framing }
    }

    /// Whether each packet of a message of `len` bytes carries whole units of `unit` bytes. Then each unit is read from
    /// memory, and written there, in one piece.
    #[inline]
    #[must_use]
    pub fn hold_whole(self, unit: u32, len: u32) -> bool {
        len <= self.mtu_bytes || segment_of(len, self.mtu_bytes, self.framing).is_multiple_of(unit)
    }

    /// How much of what is left, `len` bytes, one message may have so that its packets [hold whole](Self::hold_whole)
    /// units; `None`: a unit is larger than a packet.
    #[inline]
    #[must_use]
    pub fn whole_part(self, unit: u32, len: u32) -> Option<u32> {
        if self.hold_whole(unit, len) {
            return Some(len);
        }
        let packet = self.mtu_bytes - self.mtu_bytes % unit;
        // An even cut gives each packet as much as long as that takes no packet less.
        let packets = match (self.framing, self.mtu_bytes - packet) {
            (Framing::Standard, _) => 1,
            (Framing::Flexins, spare) => {
                (self.mtu_bytes - 1).checked_div(spare).unwrap_or(u32::MAX)
            }
        };
        (packet > 0).then(|| packets.min(len / packet).max(1) * packet)
    }
}

/// Result of a work request: the names of `enum ibv_wc_status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum WcStatus {
    /// `IBV_WC_SUCCESS`
    #[default]
    Success = 0,
    /// `IBV_WC_LOC_LEN_ERR`: a message was longer than the receive request.
    LocLenErr = 1,
    /// `IBV_WC_LOC_QP_OP_ERR`: the queue pair was used inconsistently.
    LocQpOpErr = 2,
    /// `IBV_WC_LOC_PROT_ERR`: a local key or range was wrong.
    LocProtErr = 4,
    /// `IBV_WC_WR_FLUSH_ERR`: the queue pair went to the error state first.
    WrFlushErr = 5,
    /// `IBV_WC_BAD_RESP_ERR`: the peer answered with what cannot be.
    BadRespErr = 7,
    /// `IBV_WC_REM_INV_REQ_ERR`: the peer could not take the request (length, opcode).
    RemInvReqErr = 9,
    /// `IBV_WC_REM_ACCESS_ERR`: remote key, range or access refused.
    RemAccessErr = 10,
    /// `IBV_WC_REM_OP_ERR`: the peer failed to carry it out.
    RemOpErr = 11,
    /// `IBV_WC_RETRY_EXC_ERR`: no acknowledgement after all retries.
    RetryExcErr = 12,
    /// `IBV_WC_RNR_RETRY_EXC_ERR`: the peer had no receive request after all retries.
    RnrRetryExcErr = 13,
}

impl WcStatus {
    /// Every value.
    pub const ALL: [Self; 11] = [
        Self::Success,
        Self::LocLenErr,
        Self::LocQpOpErr,
        Self::LocProtErr,
        Self::WrFlushErr,
        Self::BadRespErr,
        Self::RemInvReqErr,
        Self::RemAccessErr,
        Self::RemOpErr,
        Self::RetryExcErr,
        Self::RnrRetryExcErr,
    ];

    /// The name in the verbs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Success => "SUCCESS",
            Self::LocLenErr => "LOC_LEN_ERR",
            Self::LocQpOpErr => "LOC_QP_OP_ERR",
            Self::LocProtErr => "LOC_PROT_ERR",
            Self::WrFlushErr => "WR_FLUSH_ERR",
            Self::BadRespErr => "BAD_RESP_ERR",
            Self::RemInvReqErr => "REM_INV_REQ_ERR",
            Self::RemAccessErr => "REM_ACCESS_ERR",
            Self::RemOpErr => "REM_OP_ERR",
            Self::RetryExcErr => "RETRY_EXC_ERR",
            Self::RnrRetryExcErr => "RNR_RETRY_EXC_ERR",
        }
    }

    /// The status with this number, as in `enum ibv_wc_status`.
    #[must_use]
    pub fn from_u8(value: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|status| *status as u8 == value)
    }
}

impl fmt::Display for WcStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What completed: the names of `enum ibv_wc_opcode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum WcOpcode {
    /// A send request of any SEND kind.
    #[default]
    Send = 0,
    /// A send request of a WRITE kind.
    RdmaWrite = 1,
    /// An RDMA READ.
    RdmaRead = 2,
    /// A received message.
    Recv = 128,
    /// A received WRITE_WITH_IMM.
    RecvRdmaWithImm = 129,
}

impl WcOpcode {
    /// The opcode with this number.
    #[must_use]
    pub const fn from_u8(value: u8) -> Option<Self> {
        Some(match value {
            0 => Self::Send,
            1 => Self::RdmaWrite,
            2 => Self::RdmaRead,
            128 => Self::Recv,
            129 => Self::RecvRdmaWithImm,
            _ => return None,
        })
    }
}

/// What the 32-bit word of a completion means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum WcWord {
    /// Nothing.
    #[default]
    None = 0,
    /// The immediate value.
    Imm = 1,
    /// The key that was invalidated.
    Invalidated = 2,
}

/// The end of a work request: one cache line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct WorkCompletion {
    /// The request's id. For a message against an in-place credit: zero.
    pub wr_id: u64,
    /// The queue pair's `user` word.
    pub user: u64,
    /// The queue pair.
    pub qpn: u32,
    /// Bytes received (receive requests and READ).
    pub byte_len: u32,
    /// Immediate value or invalidated key, as `word_kind` says.
    pub word: u32,
    /// Meaning of `word`.
    pub word_kind: WcWord,
    /// What completed. For an error on the receive side: `Recv`.
    pub opcode: WcOpcode,
    /// How it ended.
    pub status: WcStatus,
    /// Valid bytes of `inline`.
    pub inline_len: u8,
    /// The message itself when the queue pair has `inline_recv` and it is short.
    pub inline: [u8; INLINE_RECV_MAX_BYTES],
}

const _: () = assert!(size_of::<WorkCompletion>() == 64);

impl WorkCompletion {
    /// The queue pair's number.
    #[must_use]
    pub const fn qpn(&self) -> Qpn {
        Qpn::new(self.qpn)
    }

    /// The immediate value, if the message had one.
    #[must_use]
    pub const fn imm(&self) -> Option<u32> {
        match self.word_kind {
            WcWord::Imm => Some(self.word),
            _ => None,
        }
    }

    /// The key that the message invalidated.
    #[must_use]
    pub const fn invalidated(&self) -> Option<Rkey> {
        match self.word_kind {
            WcWord::Invalidated => Some(Rkey(self.word)),
            _ => None,
        }
    }

    /// The message that travelled inside this completion.
    #[must_use]
    pub fn inline_bytes(&self) -> &[u8] {
        self.inline
            .get(..usize::from(self.inline_len))
            .unwrap_or(&[])
    }

    /// Whether this is the end of a receive request.
    #[must_use]
    pub const fn is_recv(&self) -> bool {
        matches!(self.opcode, WcOpcode::Recv | WcOpcode::RecvRdmaWithImm)
    }
}

/// Why an object could not be made, changed or removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerbsError {
    /// The engine's table is full.
    #[error("no room for another {0}: raise the engine's limit")]
    TableFull(&'static str),
    /// No such object, or of an earlier generation.
    #[error("unknown {0}")]
    Unknown(&'static str),
    /// Still used by something else.
    #[error("{0} is still in use")]
    InUse(&'static str),
    /// A parameter is out of range.
    #[error("parameter out of range: {0}")]
    Parameter(&'static str),
    /// `REMOTE_WRITE` without `LOCAL_WRITE`.
    #[error("remote write access needs local write access")]
    Access,
    /// The state machine has no such move.
    #[error("a queue pair cannot go from {from:?} to {to:?}")]
    IllegalTransition {
        /// Present state.
        from: QpState,
        /// Wanted state.
        to: QpState,
    },
}

/// Why a work request was not taken. Nothing of it was kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    /// No such queue pair.
    #[error("unknown queue pair")]
    UnknownQp,
    /// The state of the queue pair takes no such request.
    #[error("queue pair in state {0:?} takes no such request")]
    State(QpState),
    /// Every request of the queue is in use.
    #[error("queue full")]
    QueueFull,
    /// The completion queue could not hold the completion: poll it first.
    #[error("completion queue full")]
    CompletionQueueFull,
    /// List longer than `max_sge`.
    #[error("too many gather or scatter entries")]
    TooManySges,
    /// Inline bytes beyond `max_inline`, or with READ.
    #[error("inline data too long")]
    InlineTooLong,
    /// Longer than 2^31 bytes (IBA 9.7.2.1).
    #[error("message too long")]
    TooLong,
    /// Posted buffers and in-place credits do not mix on one queue pair.
    #[error("receive requests and in-place credits on one queue pair")]
    MixedReceive,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn segments_that_hold_whole_blocks() {
        let even = Segments::new(8320, Framing::Flexins);
        for len in [512, 4096, 8192, 16 << 10, 128 << 10, 512 << 10] {
            assert!(even.hold_whole(512, len) && even.hold_whole(4096, len));
        }
        // 6144, and as much as a packet may have.
        assert!(even.hold_whole(512, 12 << 10) && !even.hold_whole(4096, 12 << 10));
        assert!(!even.hold_whole(512, 1 << 20));
        assert_eq!(even.whole_part(512, 1 << 20), Some(512 << 10));
        assert_eq!(even.whole_part(4096, 12 << 10), Some(8 << 10));
        let narrow = Segments::new(1408, Framing::Flexins);
        assert!(narrow.hold_whole(512, 1024) && !narrow.hold_whole(4096, 4096));
        let standard = Segments::new(1024, Framing::Standard);
        assert!(standard.hold_whole(512, 4096) && !standard.hold_whole(4096, 4096));
        for none in [narrow, standard] {
            assert_eq!(none.whole_part(4096, 4096), None);
        }
    }

    proptest! {
        #[test]
        fn parts_hold_whole_units_and_end(
            lines in 16..960_u32, shift in 9..13_u32, blocks in 1..2048_u32, standard: bool,
        ) {
            let framing = if standard { Framing::Standard } else { Framing::Flexins };
            let (segments, unit) = (Segments::new(lines * 64, framing), 1 << shift);
            let mut left = blocks * unit;
            while left > 0 {
                let Some(part) = segments.whole_part(unit, left) else {
                    prop_assert!(unit > lines * 64);
                    break;
                };
                prop_assert!(part > 0 && part <= left && part.is_multiple_of(unit));
                prop_assert!(segments.hold_whole(unit, part));
                left -= part;
            }
        }
    }

    #[test]
    fn statuses_have_the_numbers_and_names_of_libibverbs() {
        for status in WcStatus::ALL {
            assert_eq!(WcStatus::from_u8(status as u8), Some(status));
        }
        assert_eq!(WcStatus::from_u8(12).unwrap().to_string(), "RETRY_EXC_ERR");
        assert_eq!(WcStatus::from_u8(200), None);
        for value in 0..=255 {
            assert!(WcOpcode::from_u8(value).is_none_or(|opcode| opcode as u8 == value));
        }
    }

    #[test]
    fn word_of_a_completion_has_one_meaning() {
        let mut wc = WorkCompletion {
            word: 7,
            ..Default::default()
        };
        assert_eq!((wc.imm(), wc.invalidated()), (None, None));
        wc.word_kind = WcWord::Imm;
        assert_eq!((wc.imm(), wc.invalidated()), (Some(7), None));
        wc.word_kind = WcWord::Invalidated;
        assert_eq!((wc.imm(), wc.invalidated()), (None, Some(Rkey(7))));
    }
}
