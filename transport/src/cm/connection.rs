//! One connection of the manager, and how its private data and timers are laid out.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::interface::{CmError, ConnId, Peer};
use super::mad::{
    About, MAD_LEN_BYTES, Mad, Message, PrivateData, REJ_PRIVATE_LEN_BYTES, REQ_USER_LEN_BYTES,
    Rej, RejectReason,
};
use super::params::{PARAMS_LEN_BYTES, PARAMS_OFFSET, Params};

/// UDP port of RoCEv2 (IBA annex A17), where standard peers are answered.
const ROCE_PORT: u16 = 4791;
const U24_MAX: u32 = 0x00FF_FFFF;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    ReqSent,
    ReqReceived,
    RepSent,
    Established,
    DreqSent,
    TimeWait,
}

#[derive(Debug)]
pub(super) struct Conn {
    pub(super) state: State,
    pub(super) transaction: u64,
    /// Peer's communication id, once known.
    pub(super) peer_id: Option<u32>,
    /// Parameters that we offered, until they are negotiated.
    pub(super) offer: Option<Params>,
    pub(super) local_qpn: u32,
    pub(super) peer: Peer,
    /// Datagram to repeat by timer, or in answer to a duplicate.
    pub(super) repeat: Option<Box<[u8; MAD_LEN_BYTES]>>,
    pub(super) deadline: Option<Instant>,
    pub(super) attempts: u8,
}

impl State {
    pub(super) const fn is_half_open(self) -> bool {
        matches!(self, Self::ReqReceived | Self::RepSent)
    }
}

impl Conn {
    /// Whether a datagram from that address can be the peer's. A standard RoCE peer chooses its
    /// source port freely (flow label), a FlexiNS peer has one.
    pub(super) fn comes_from(&self, from: SocketAddr, exact: bool) -> bool {
        let exact = exact || self.peer.negotiated.params.is_some();
        if exact {
            self.peer.address == from
        } else {
            self.peer.address.ip() == from.ip()
        }
    }

    pub(super) fn is_peer(&self, from: SocketAddr, peer_id: u32) -> bool {
        self.peer_id == Some(peer_id) && self.comes_from(from, false)
    }

    pub(super) fn reject_mad(
        &self,
        conn_id: ConnId,
        about: About,
        reason: RejectReason,
        private: [u8; REJ_PRIVATE_LEN_BYTES],
    ) -> [u8; MAD_LEN_BYTES] {
        let remote_id = self.peer_id.unwrap_or_default();
        let message = Message::Rej(Rej {
            local_id: conn_id.0,
            remote_id,
            about,
            reason,
            private,
        });
        Mad {
            transaction: self.transaction,
            message,
        }
        .emit()
    }

    pub(super) fn rtu_mad(&self, conn_id: ConnId) -> [u8; MAD_LEN_BYTES] {
        let remote_id = self.peer_id.unwrap_or_default();
        let message = Message::Rtu {
            local_id: conn_id.0,
            remote_id,
        };
        Mad {
            transaction: self.transaction,
            message,
        }
        .emit()
    }
}

/// FlexiNS peers are answered where they send from, standard ones at the port of RoCEv2.
pub(super) fn reply_address(from: SocketAddr, params: Option<Params>) -> SocketAddr {
    if params.is_some() {
        from
    } else {
        SocketAddr::new(from.ip(), ROCE_PORT)
    }
}

/// Puts the application's bytes and, behind them, the parameters into a private-data area.
pub(super) fn fill_private(
    area: &mut [u8],
    user: &[u8],
    params: Option<Params>,
) -> Result<(), CmError> {
    let max_bytes = if params.is_some() {
        PARAMS_OFFSET
    } else {
        area.len()
    };
    let Some(target) = area
        .get_mut(..user.len())
        .filter(|_| user.len() <= max_bytes)
    else {
        return Err(CmError::PrivateTooLong { max_bytes });
    };
    target.copy_from_slice(user);
    if let Some(params) = params {
        let _fits = params.clamped().emit(area);
        debug_assert!(_fits, "every area with parameters has 56 bytes");
    }
    Ok(())
}

/// The application's part of a received private-data area.
pub(super) fn application_private(area: &[u8], with_params: bool) -> PrivateData {
    let len_bytes = if with_params {
        PARAMS_OFFSET
    } else {
        area.len()
    };
    PrivateData::from_prefix(area.get(..len_bytes).unwrap_or(area))
}

/// Exponent of a time in units of 4.096 us (IBA 12.6.5), rounded up, 5 bit.
pub(super) fn timeout_code(time: Duration) -> u8 {
    let units = (time.as_nanos() / 4096).max(1);
    (128 - (units - 1).leading_zeros()).min(31) as u8
}

pub(super) const fn check_u24(value: u32) -> Result<(), CmError> {
    if value <= U24_MAX {
        Ok(())
    } else {
        Err(CmError::Range)
    }
}

const _: () = assert!(REQ_USER_LEN_BYTES >= PARAMS_OFFSET + PARAMS_LEN_BYTES);
