//! Codec of communication-management datagrams: 256 bytes, class 0x07 version 2 (IBA 13.4, 12.6).
//!
//! Offsets below are from the start of the datagram: 24 bytes of common MAD header, then the 232
//! bytes of the message. Fields that only InfiniBand fabrics use (alternate path, EE contexts) are
//! sent as zero and ignored.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Length of every datagram.
pub const MAD_LEN_BYTES: usize = 256;
/// Private data of a ConnectRequest (IBA 12.6.5), the addressing header of RDMA-CM included.
pub const REQ_PRIVATE_LEN_BYTES: usize = 92;
/// Length of the RDMA IP CM addressing header at the start of it (IBA annex A11.4.1).
pub const IP_HEADER_LEN_BYTES: usize = 36;
/// What that leaves to the application (and to FlexiNS).
pub const REQ_USER_LEN_BYTES: usize = REQ_PRIVATE_LEN_BYTES - IP_HEADER_LEN_BYTES;
/// Private data of a ConnectReply (IBA 12.6.8).
pub const REP_PRIVATE_LEN_BYTES: usize = 196;
/// Private data of a ConnectReject (IBA 12.6.7).
pub const REJ_PRIVATE_LEN_BYTES: usize = 148;

const BASE_VERSION: u8 = 1;
const CLASS_CM: u8 = 0x07;
const CLASS_VERSION: u8 = 2;
const METHOD_SEND: u8 = 0x03;
const HEADER: usize = 24;

const ATTR_REQ: u16 = 0x0010;
const ATTR_MRA: u16 = 0x0011;
const ATTR_REJ: u16 = 0x0012;
const ATTR_REP: u16 = 0x0013;
const ATTR_RTU: u16 = 0x0014;
const ATTR_DREQ: u16 = 0x0015;
const ATTR_DREP: u16 = 0x0016;

const U24_MAX: u32 = 0x00FF_FFFF;

const _: () = {
    assert!(HEADER + 140 + REQ_PRIVATE_LEN_BYTES == MAD_LEN_BYTES);
    assert!(HEADER + 36 + REP_PRIVATE_LEN_BYTES == MAD_LEN_BYTES);
    assert!(HEADER + 84 + REJ_PRIVATE_LEN_BYTES == MAD_LEN_BYTES);
    assert!(REQ_USER_LEN_BYTES == 56);
};

/// 64-bit service identifier of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceId(pub u64);

impl ServiceId {
    /// The identifier that RDMA-CM gives to a port of its TCP port space (IBA annex A11.2).
    #[must_use]
    pub const fn from_port(port: u16) -> Self {
        Self(0x0000_0000_0106_0000 | port as u64)
    }

    /// The port, when this is an identifier of RDMA-CM's TCP port space.
    #[must_use]
    pub const fn port(self) -> Option<u16> {
        if self.0 >> 16 == 0x0106 {
            Some((self.0 & 0xFFFF) as u16)
        } else {
            None
        }
    }
}

/// Private data of a message, as far as it belongs to the application.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct PrivateData(arrayvec::ArrayVec<u8, REP_PRIVATE_LEN_BYTES>);

impl PrivateData {
    /// Takes as many bytes of `bytes` as fit.
    #[must_use]
    pub fn from_prefix(bytes: &[u8]) -> Self {
        Self(bytes.iter().copied().take(REP_PRIVATE_LEN_BYTES).collect())
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }
}

impl std::ops::Deref for PrivateData {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for PrivateData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateData({} bytes)", self.0.len())
    }
}

/// Why a connection is refused (IBA 12.6.7.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RejectReason {
    /// 1: no queue pair available.
    NoQp,
    /// 3: no resources.
    NoResources,
    /// 4: no answer within the time allowed.
    Timeout,
    /// 5: not supported.
    Unsupported,
    /// 6: no connection of that communication id.
    InvalidCommId,
    /// 8: nobody listens at that service.
    InvalidServiceId,
    /// 10: the peer's queue pair is still connected from an earlier life.
    StaleConnection,
    /// 21: path MTU refused.
    InvalidMtu,
    /// 28: the application refuses; its private data says why.
    Consumer,
    /// Any other code.
    Other(u16),
}

impl RejectReason {
    /// Code on the wire.
    #[must_use]
    pub const fn code(self) -> u16 {
        match self {
            Self::NoQp => 1,
            Self::NoResources => 3,
            Self::Timeout => 4,
            Self::Unsupported => 5,
            Self::InvalidCommId => 6,
            Self::InvalidServiceId => 8,
            Self::StaleConnection => 10,
            Self::InvalidMtu => 21,
            Self::Consumer => 28,
            Self::Other(code) => code,
        }
    }

    /// Meaning of a code.
    #[must_use]
    pub const fn from_code(code: u16) -> Self {
        match code {
            1 => Self::NoQp,
            3 => Self::NoResources,
            4 => Self::Timeout,
            5 => Self::Unsupported,
            6 => Self::InvalidCommId,
            8 => Self::InvalidServiceId,
            10 => Self::StaleConnection,
            21 => Self::InvalidMtu,
            28 => Self::Consumer,
            other => Self::Other(other),
        }
    }
}

/// Which message a REJ or MRA is about (IBA 12.6.7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// ConnectRequest.
    Req,
    /// ConnectReply.
    Rep,
    /// None of them (REJ only).
    Nothing,
}

/// Addresses and source port of the RDMA IP CM service (IBA annex A11.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpHeader {
    /// Source port in the RDMA port space.
    pub source_port: u16,
    /// Source address.
    pub source: IpAddr,
    /// Destination address, of the same family.
    pub destination: IpAddr,
}

/// ConnectRequest (IBA 12.6.5, table 99).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Req {
    /// Sender's communication id.
    pub local_id: u32,
    /// Service wanted.
    pub service: ServiceId,
    /// GUID of the sender's channel adapter.
    pub ca_guid: u64,
    /// Sender's queue pair (24 bit).
    pub qpn: u32,
    /// RDMA READs that the sender answers at a time.
    pub responder_resources: u8,
    /// RDMA READs that the sender has outstanding at most.
    pub initiator_depth: u8,
    /// Exponent of the peer's response time-out (4.096 us x 2^n, 5 bit).
    pub remote_response_timeout: u8,
    /// First PSN that the sender will use (24 bit).
    pub starting_psn: u32,
    /// Exponent of the sender's response time-out (5 bit).
    pub local_response_timeout: u8,
    /// Transport retries (3 bit).
    pub retry_count: u8,
    /// Partition key.
    pub pkey: u16,
    /// Path MTU code: 1 = 256 ... 5 = 4096 bytes (4 bit).
    pub path_mtu: u8,
    /// Receiver-not-ready retries (3 bit, 7 = for ever).
    pub rnr_retry_count: u8,
    /// Retries of the connection manager (4 bit).
    pub max_cm_retries: u8,
    /// Sender's GID of the primary path: for RoCEv2 its (mapped) IPv6 address.
    pub local_gid: [u8; 16],
    /// Receiver's GID of the primary path.
    pub remote_gid: [u8; 16],
    /// Hop limit of the primary path.
    pub hop_limit: u8,
    /// Exponent of the local ACK time-out (5 bit).
    pub ack_timeout: u8,
    /// Private data, the addressing header of RDMA-CM first.
    pub private: [u8; REQ_PRIVATE_LEN_BYTES],
}

/// ConnectReply (IBA 12.6.8, table 103).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rep {
    /// Sender's communication id.
    pub local_id: u32,
    /// Receiver's communication id.
    pub remote_id: u32,
    /// Sender's queue pair (24 bit).
    pub qpn: u32,
    /// First PSN that the sender will use (24 bit).
    pub starting_psn: u32,
    /// RDMA READs that the sender answers at a time.
    pub responder_resources: u8,
    /// RDMA READs that the sender has outstanding at most.
    pub initiator_depth: u8,
    /// Exponent of the target's ACK delay (5 bit).
    pub ack_delay: u8,
    /// Receiver-not-ready retries (3 bit).
    pub rnr_retry_count: u8,
    /// GUID of the sender's channel adapter.
    pub ca_guid: u64,
    /// Private data.
    pub private: [u8; REP_PRIVATE_LEN_BYTES],
}

/// ConnectReject (IBA 12.6.7, table 101).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rej {
    /// Sender's communication id, 0 when it has none.
    pub local_id: u32,
    /// Receiver's communication id, 0 when unknown.
    pub remote_id: u32,
    /// Message refused.
    pub about: About,
    /// Why.
    pub reason: RejectReason,
    /// Private data.
    pub private: [u8; REJ_PRIVATE_LEN_BYTES],
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// ConnectRequest.
    Req(Req),
    /// "Message receipt acknowledged": the answer takes longer (IBA 12.6.6).
    Mra {
        /// Sender's communication id.
        local_id: u32,
        /// Receiver's communication id.
        remote_id: u32,
        /// Message received.
        about: About,
        /// Exponent of the time that the answer takes (5 bit).
        service_timeout: u8,
    },
    /// ConnectReject.
    Rej(Rej),
    /// ConnectReply.
    Rep(Rep),
    /// ReadyToUse (IBA 12.6.9).
    Rtu {
        /// Sender's communication id.
        local_id: u32,
        /// Receiver's communication id.
        remote_id: u32,
    },
    /// DisconnectRequest (IBA 12.6.10).
    Dreq {
        /// Sender's communication id.
        local_id: u32,
        /// Receiver's communication id.
        remote_id: u32,
        /// Receiver's queue pair (24 bit).
        remote_qpn: u32,
    },
    /// DisconnectReply (IBA 12.6.11).
    Drep {
        /// Sender's communication id.
        local_id: u32,
        /// Receiver's communication id.
        remote_id: u32,
    },
}

/// A datagram: transaction id and message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mad {
    /// Transaction id: the same in all messages of an exchange.
    pub transaction: u64,
    /// Message.
    pub message: Message,
}

/// Why bytes are not a CM datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MadError {
    /// Not 256 bytes long.
    #[error("management datagram of {0} bytes instead of 256")]
    Length(usize),
    /// Another base version, class, class version, method or status.
    #[error("not a communication management datagram of class version 2")]
    Class,
    /// An attribute that is not supported (service id resolution, alternate paths).
    #[error("connection manager attribute {0:#06x} is not supported")]
    Attribute(u16),
    /// A field with a value that no specification gives it.
    #[error("connection manager message with an illegal {0}")]
    Field(&'static str),
}

impl Mad {
    /// Parses a datagram.
    pub fn parse(bytes: &[u8]) -> Result<Self, MadError> {
        let mad: &[u8; MAD_LEN_BYTES] = bytes
            .try_into()
            .map_err(|_| MadError::Length(bytes.len()))?;
        if mad[..4] != [BASE_VERSION, CLASS_CM, CLASS_VERSION, METHOD_SEND] || be16(mad, 4) != 0 {
            return Err(MadError::Class);
        }
        let local_id = be32(mad, HEADER);
        let remote_id = be32(mad, HEADER + 4);
        let message = match be16(mad, 16) {
            ATTR_REQ => Message::Req(Req::parse(mad)?),
            ATTR_MRA => Message::Mra {
                local_id,
                remote_id,
                about: About::parse(mad[HEADER + 8] >> 6)?,
                service_timeout: mad[HEADER + 9] >> 3,
            },
            ATTR_REJ => Message::Rej(Rej::parse(mad)?),
            ATTR_REP => Message::Rep(Rep::parse(mad)),
            ATTR_RTU => Message::Rtu {
                local_id,
                remote_id,
            },
            ATTR_DREQ => Message::Dreq {
                local_id,
                remote_id,
                remote_qpn: be24(mad, HEADER + 8),
            },
            ATTR_DREP => Message::Drep {
                local_id,
                remote_id,
            },
            other => return Err(MadError::Attribute(other)),
        };
        Ok(Self {
            transaction: be64(mad, 8),
            message,
        })
    }

    /// Writes the datagram. Numbers wider than their field are truncated to it.
    #[must_use]
    pub fn emit(&self) -> [u8; MAD_LEN_BYTES] {
        let mut mad = [0; MAD_LEN_BYTES];
        put(
            &mut mad,
            0,
            [BASE_VERSION, CLASS_CM, CLASS_VERSION, METHOD_SEND],
        );
        put(&mut mad, 8, self.transaction.to_be_bytes());
        let (attribute, local_id, remote_id) = match &self.message {
            Message::Req(req) => {
                req.emit(&mut mad);
                (ATTR_REQ, req.local_id, 0)
            }
            Message::Mra {
                local_id,
                remote_id,
                about,
                service_timeout,
            } => {
                mad[HEADER + 8] = about.code() << 6;
                mad[HEADER + 9] = service_timeout << 3;
                (ATTR_MRA, *local_id, *remote_id)
            }
            Message::Rej(rej) => {
                rej.emit(&mut mad);
                (ATTR_REJ, rej.local_id, rej.remote_id)
            }
            Message::Rep(rep) => {
                rep.emit(&mut mad);
                (ATTR_REP, rep.local_id, rep.remote_id)
            }
            Message::Rtu {
                local_id,
                remote_id,
            } => (ATTR_RTU, *local_id, *remote_id),
            Message::Dreq {
                local_id,
                remote_id,
                remote_qpn,
            } => {
                put24(&mut mad, HEADER + 8, *remote_qpn);
                (ATTR_DREQ, *local_id, *remote_id)
            }
            Message::Drep {
                local_id,
                remote_id,
            } => (ATTR_DREP, *local_id, *remote_id),
        };
        put(&mut mad, 16, attribute.to_be_bytes());
        put(&mut mad, HEADER, local_id.to_be_bytes());
        put(&mut mad, HEADER + 4, remote_id.to_be_bytes());
        mad
    }
}

impl About {
    const fn code(self) -> u8 {
        match self {
            Self::Req => 0,
            Self::Rep => 1,
            Self::Nothing => 2,
        }
    }

    const fn parse(code: u8) -> Result<Self, MadError> {
        match code {
            0 => Ok(Self::Req),
            1 => Ok(Self::Rep),
            2 => Ok(Self::Nothing),
            _ => Err(MadError::Field("message code")),
        }
    }
}

impl Req {
    fn parse(mad: &[u8; MAD_LEN_BYTES]) -> Result<Self, MadError> {
        let byte = |at: usize| mad[HEADER + at];
        // IBA 12.6.5: transport service type 0 is reliable connected, the only one we speak.
        if byte(43) >> 1 & 0b11 != 0 {
            return Err(MadError::Field("transport service type"));
        }
        let path_mtu = byte(50) >> 4;
        if !(1..=5).contains(&path_mtu) {
            return Err(MadError::Field("path MTU"));
        }
        Ok(Self {
            local_id: be32(mad, HEADER),
            service: ServiceId(be64(mad, HEADER + 8)),
            ca_guid: be64(mad, HEADER + 16),
            qpn: be24(mad, HEADER + 32),
            responder_resources: byte(35),
            initiator_depth: byte(39),
            remote_response_timeout: byte(43) >> 3,
            starting_psn: be24(mad, HEADER + 44),
            local_response_timeout: byte(47) >> 3,
            retry_count: byte(47) & 0b111,
            pkey: be16(mad, HEADER + 48),
            path_mtu,
            rnr_retry_count: byte(50) & 0b111,
            max_cm_retries: byte(51) >> 4,
            local_gid: array(mad, HEADER + 56),
            remote_gid: array(mad, HEADER + 72),
            hop_limit: byte(93),
            ack_timeout: byte(95) >> 3,
            private: array(mad, HEADER + 140),
        })
    }

    fn emit(&self, mad: &mut [u8; MAD_LEN_BYTES]) {
        put(mad, HEADER + 8, self.service.0.to_be_bytes());
        put(mad, HEADER + 16, self.ca_guid.to_be_bytes());
        put24(mad, HEADER + 32, self.qpn);
        mad[HEADER + 35] = self.responder_resources;
        mad[HEADER + 39] = self.initiator_depth;
        mad[HEADER + 43] = self.remote_response_timeout << 3;
        put24(mad, HEADER + 44, self.starting_psn);
        mad[HEADER + 47] = self.local_response_timeout << 3 | self.retry_count & 0b111;
        put(mad, HEADER + 48, self.pkey.to_be_bytes());
        mad[HEADER + 50] = self.path_mtu << 4 | self.rnr_retry_count & 0b111;
        mad[HEADER + 51] = self.max_cm_retries << 4;
        // RoCE has no LIDs: the permissive 0xFFFF, as RDMA-CM on Ethernet sends.
        put(mad, HEADER + 52, [0xFF; 4]);
        put(mad, HEADER + 56, self.local_gid);
        put(mad, HEADER + 72, self.remote_gid);
        mad[HEADER + 93] = self.hop_limit;
        mad[HEADER + 95] = self.ack_timeout << 3;
        put(mad, HEADER + 140, self.private);
    }

    /// Addressing header of RDMA-CM at the start of the private data, when there is one.
    #[must_use]
    pub fn ip_header(&self) -> Option<IpHeader> {
        IpHeader::parse(&self.private)
    }

    /// Private data behind the addressing header (all of it when there is no header).
    #[must_use]
    pub fn user_private(&self) -> &[u8] {
        let start = if self.ip_header().is_some() {
            IP_HEADER_LEN_BYTES
        } else {
            0
        };
        self.private.get(start..).unwrap_or_default()
    }
}

impl Rep {
    fn parse(mad: &[u8; MAD_LEN_BYTES]) -> Self {
        let byte = |at: usize| mad[HEADER + at];
        Self {
            local_id: be32(mad, HEADER),
            remote_id: be32(mad, HEADER + 4),
            qpn: be24(mad, HEADER + 12),
            starting_psn: be24(mad, HEADER + 20),
            responder_resources: byte(24),
            initiator_depth: byte(25),
            ack_delay: byte(26) >> 3,
            rnr_retry_count: byte(27) >> 5,
            ca_guid: be64(mad, HEADER + 28),
            private: array(mad, HEADER + 36),
        }
    }

    fn emit(&self, mad: &mut [u8; MAD_LEN_BYTES]) {
        put24(mad, HEADER + 12, self.qpn);
        put24(mad, HEADER + 20, self.starting_psn);
        mad[HEADER + 24] = self.responder_resources;
        mad[HEADER + 25] = self.initiator_depth;
        mad[HEADER + 26] = self.ack_delay << 3;
        mad[HEADER + 27] = self.rnr_retry_count << 5;
        put(mad, HEADER + 28, self.ca_guid.to_be_bytes());
        put(mad, HEADER + 36, self.private);
    }
}

impl Rej {
    fn parse(mad: &[u8; MAD_LEN_BYTES]) -> Result<Self, MadError> {
        Ok(Self {
            local_id: be32(mad, HEADER),
            remote_id: be32(mad, HEADER + 4),
            about: About::parse(mad[HEADER + 8] >> 6)?,
            reason: RejectReason::from_code(be16(mad, HEADER + 10)),
            private: array(mad, HEADER + 84),
        })
    }

    fn emit(&self, mad: &mut [u8; MAD_LEN_BYTES]) {
        mad[HEADER + 8] = self.about.code() << 6;
        put(mad, HEADER + 10, self.reason.code().to_be_bytes());
        put(mad, HEADER + 84, self.private);
    }
}

impl IpHeader {
    /// Parses the header at the start of a ConnectRequest's private data.
    #[must_use]
    pub fn parse(private: &[u8]) -> Option<Self> {
        let header: &[u8; IP_HEADER_LEN_BYTES] = private.first_chunk()?;
        // Version 0.0; the upper half of the second byte is the IP version.
        if header[0] != 0 {
            return None;
        }
        let (source, destination): (IpAddr, IpAddr) = match header[1] >> 4 {
            4 => (
                Ipv4Addr::from(array::<4>(header, 16)).into(),
                Ipv4Addr::from(array::<4>(header, 32)).into(),
            ),
            6 => (
                Ipv6Addr::from(array::<16>(header, 4)).into(),
                Ipv6Addr::from(array::<16>(header, 20)).into(),
            ),
            _ => return None,
        };
        Some(Self {
            source_port: be16(header, 2),
            source,
            destination,
        })
    }

    /// Writes the header. Addresses of different families are both written as IPv6.
    #[must_use]
    pub fn emit(&self) -> [u8; IP_HEADER_LEN_BYTES] {
        let mut header = [0; IP_HEADER_LEN_BYTES];
        put(&mut header, 2, self.source_port.to_be_bytes());
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                header[1] = 4 << 4;
                put(&mut header, 16, source.octets());
                put(&mut header, 32, destination.octets());
            }
            (source, destination) => {
                header[1] = 6 << 4;
                put(&mut header, 4, gid_of(source));
                put(&mut header, 20, gid_of(destination));
            }
        }
        header
    }
}

/// GID of an address on RoCEv2: the IPv6 address, or the IPv4 address mapped to one (IBA annex A17).
#[must_use]
pub fn gid_of(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// Path MTU code (IBA 12.6.5) of the largest standard MTU that is at most `mtu_bytes`.
#[must_use]
pub const fn path_mtu_code(mtu_bytes: u32) -> u8 {
    match mtu_bytes {
        0..512 => 1,
        512..1024 => 2,
        1024..2048 => 3,
        2048..4096 => 4,
        _ => 5,
    }
}

/// Payload bytes of a path MTU code.
#[must_use]
pub const fn path_mtu_bytes(code: u8) -> u32 {
    128 << (if code < 1 {
        1
    } else if code > 5 {
        5
    } else {
        code
    })
}

// Field access at constant offsets in buffers of constant length.

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array(bytes, at))
}

fn be24(bytes: &[u8], at: usize) -> u32 {
    be32(bytes, at) >> 8
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array(bytes, at))
}

fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    if let Some(field) = bytes.get_mut(at..at + N) {
        field.copy_from_slice(&value);
    }
}

fn put24(bytes: &mut [u8], at: usize, value: u32) {
    let [_, high, middle, low] = (value & U24_MAX).to_be_bytes();
    put(bytes, at, [high, middle, low]);
}
