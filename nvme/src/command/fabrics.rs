//! Fabrics commands (Base 6): Connect, properties, authentication, Disconnect.

use bitfield_struct::bitfield;

use super::{FABRICS_OPCODE, Sqe, bit};
use crate::ids::{Cid, Cntlid, HostId, Nsid, Qid};
use crate::nqn::{Nqn, NqnError};
use crate::property::Width;
use crate::sgl::Sgl;
use crate::status::{Status, StatusCode};
use crate::{U16, U32};

/// Fabrics Command Types (FCTYPE, Base 6).
pub mod fctype {
    /// Property Set.
    pub const PROPERTY_SET: u8 = 0x00;
    /// Connect.
    pub const CONNECT: u8 = 0x01;
    /// Property Get.
    pub const PROPERTY_GET: u8 = 0x04;
    /// Authentication Send.
    pub const AUTH_SEND: u8 = 0x05;
    /// Authentication Receive.
    pub const AUTH_RECEIVE: u8 = 0x06;
    /// Disconnect.
    pub const DISCONNECT: u8 = 0x08;
}

/// Connect (Base 6.3). Its data is [`ConnectData`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connect {
    /// Queue to create.
    pub qid: Qid,
    /// Submission queue size in entries, 0's based (SQSIZE). 0 is not allowed; see
    /// [`Connect::check`].
    pub sqsize: u16,
    /// Connect attributes.
    pub cattr: ConnectAttributes,
    /// Keep Alive Timeout in milliseconds (KATO); of the Admin queue, 0 is off.
    pub kato_ms: u32,
}

/// Connect Attributes (CATTR, Base 6.3).
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct ConnectAttributes {
    /// Priority class of the queue.
    #[bits(2)]
    pub priority: u8,
    /// Disable SQ flow control: SQHD in completions has no meaning.
    pub disable_sq_flow_control: bool,
    /// Individual I/O queue deletion is supported (Disconnect).
    pub individual_queue_deletion: bool,
    #[bits(4)]
    __: u8,
}

impl Connect {
    /// What any Connect must satisfy: the size is not 0 (Base 6.3). The error is *Connect Invalid
    /// Parameters*; the completion's result is then [`ConnectReply::invalid_sqe`] of
    /// [`Connect::SQSIZE_OFFSET`].
    pub fn check(&self) -> Result<(), Status> {
        if self.sqsize == 0 {
            Err(StatusCode::ConnectInvalidParameters.dnr())
        } else {
            Ok(())
        }
    }

    /// Offset of QID in the SQE, for [`ConnectReply::invalid_sqe`].
    pub const QID_OFFSET: u16 = 42;
    /// Offset of SQSIZE in the SQE.
    pub const SQSIZE_OFFSET: u16 = 44;
    /// Offset of CATTR in the SQE.
    pub const CATTR_OFFSET: u16 = 46;
    /// Offset of KATO in the SQE.
    pub const KATO_OFFSET: u16 = 48;

    fn decode(sqe: &Sqe) -> Result<Self, Status> {
        // RECFMT in bytes 41:40: format 0 is the only one.
        if sqe.cdw10.get() & 0xFFFF != 0 {
            return Err(StatusCode::ConnectIncompatibleFormat.dnr());
        }
        let cdw11 = sqe.cdw11.get();
        Ok(Self {
            qid: Qid::new((sqe.cdw10.get() >> 16) as u16),
            sqsize: cdw11 as u16,
            cattr: ConnectAttributes::from_bits((cdw11 >> 16) as u8 & 0xF),
            kato_ms: sqe.cdw12.get(),
        })
    }

    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        Sqe {
            cdw10: U32::new(u32::from(self.qid.get()) << 16),
            cdw11: U32::new(u32::from(self.sqsize) | u32::from(self.cattr.into_bits() & 0xF) << 16),
            cdw12: U32::new(self.kato_ms),
            ..blank(fctype::CONNECT, cid, sgl)
        }
        .to_bytes()
    }
}

wire! {
    /// Data of a Connect command (Base 6.3, Connect Command Data).
    pub struct ConnectData: 1024 {
        /// Host Identifier (HOSTID).
        0 => pub hostid: [u8; 16],
        /// Controller ID (CNTLID): FFFFh with the dynamic controller model.
        16 => pub cntlid: U16,
        18 => _r18: [u8; 238],
        /// NVM Subsystem NVMe Qualified Name (SUBNQN).
        256 => pub subnqn: [u8; 256],
        /// Host NVMe Qualified Name (HOSTNQN).
        512 => pub hostnqn: [u8; 256],
        768 => _r768: [u8; 256],
    }
}

impl ConnectData {
    /// Offset of HOSTID, for [`ConnectReply::invalid_data`].
    pub const HOSTID_OFFSET: u16 = 0;
    /// Offset of CNTLID.
    pub const CNTLID_OFFSET: u16 = 16;
    /// Offset of SUBNQN.
    pub const SUBNQN_OFFSET: u16 = 256;
    /// Offset of HOSTNQN.
    pub const HOSTNQN_OFFSET: u16 = 512;

    /// Filled in.
    #[must_use]
    pub fn new(hostid: HostId, cntlid: Cntlid, subnqn: &Nqn, hostnqn: &Nqn) -> Self {
        Self {
            hostid: hostid.to_bytes(),
            cntlid: U16::new(cntlid.get()),
            subnqn: subnqn.to_field(),
            hostnqn: hostnqn.to_field(),
            ..Self::zeroed()
        }
    }

    /// Host identifier.
    #[must_use]
    pub fn hostid(&self) -> HostId {
        HostId::from_bytes(self.hostid)
    }

    /// Controller identifier.
    #[must_use]
    pub fn cntlid(&self) -> Cntlid {
        Cntlid::new(self.cntlid.get())
    }

    /// Name of the subsystem.
    pub fn subnqn(&self) -> Result<Nqn, NqnError> {
        Nqn::from_field(&self.subnqn)
    }

    /// Name of the host.
    pub fn hostnqn(&self) -> Result<Nqn, NqnError> {
        Nqn::from_field(&self.hostnqn)
    }
}

/// Dword 0 of a Connect's completion (Base 6.3, Connect Response).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct ConnectReply {
    /// On success the controller's identifier (CNTLID); on *Connect Invalid Parameters* the
    /// offset of the offending field (IPO).
    pub cntlid_or_offset: u16,
    /// On *Connect Invalid Parameters*: the offset is in the data, not in the SQE (IATTR).
    pub in_data: bool,
    /// On success: in-band authentication is required (AUTHREQ.ATR).
    pub authentication_required: bool,
    /// On success: authentication and secure channel are required (AUTHREQ.ASCR).
    pub secure_channel_required: bool,
    #[bits(13)]
    __: u16,
}

impl ConnectReply {
    /// Connected to that controller.
    #[must_use]
    pub const fn connected(cntlid: Cntlid) -> Self {
        Self::new().with_cntlid_or_offset(cntlid.get())
    }

    /// The field at that offset of the SQE is wrong.
    #[must_use]
    pub const fn invalid_sqe(offset: u16) -> Self {
        Self::new().with_cntlid_or_offset(offset)
    }

    /// The field at that offset of the data is wrong.
    #[must_use]
    pub const fn invalid_data(offset: u16) -> Self {
        Self::new().with_cntlid_or_offset(offset).with_in_data(true)
    }

    /// The controller, of a successful completion.
    #[must_use]
    pub const fn cntlid(&self) -> Cntlid {
        Cntlid::new(self.cntlid_or_offset())
    }

    /// Name of the field that *Connect Invalid Parameters* points at, for messages.
    #[must_use]
    pub const fn invalid_field(&self) -> &'static str {
        match (self.in_data(), self.cntlid_or_offset()) {
            (false, Connect::QID_OFFSET) => "QID",
            (false, Connect::SQSIZE_OFFSET) => "SQSIZE",
            (false, Connect::CATTR_OFFSET) => "CATTR",
            (false, Connect::KATO_OFFSET) => "KATO",
            (true, ConnectData::HOSTID_OFFSET) => "HOSTID",
            (true, ConnectData::CNTLID_OFFSET) => "CNTLID",
            (true, ConnectData::SUBNQN_OFFSET) => "SUBNQN",
            (true, ConnectData::HOSTNQN_OFFSET) => "HOSTNQN",
            _ => "unknown field",
        }
    }
}

/// Property Get (Base 6.5). Dwords 0 and 1 of the completion hold the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PropertyGet {
    /// Offset of the property (see [`crate::property::Property`]).
    pub offset: u32,
    /// Its width.
    pub width: Width,
}

/// Property Set (Base 6.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PropertySet {
    /// Offset of the property (see [`crate::property::Property`]).
    pub offset: u32,
    /// Its width.
    pub width: Width,
    /// New value.
    pub value: u64,
}

impl PropertyGet {
    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        Sqe {
            cdw10: U32::new(self.width.raw()),
            cdw11: U32::new(self.offset),
            ..blank(fctype::PROPERTY_GET, cid, sgl)
        }
        .to_bytes()
    }
}

impl PropertySet {
    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        Sqe {
            cdw10: U32::new(self.width.raw()),
            cdw11: U32::new(self.offset),
            cdw12: U32::new(self.value as u32),
            cdw13: U32::new((self.value >> 32) as u32),
            ..blank(fctype::PROPERTY_SET, cid, sgl)
        }
        .to_bytes()
    }
}

/// Disconnect (Base 6.4): deletes the I/O queue that it is sent on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Disconnect;

impl Disconnect {
    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        blank(fctype::DISCONNECT, cid, sgl).to_bytes()
    }
}

/// Authentication Send (Base 6.2) or Receive (Base 6.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Authentication {
    /// Security protocol (SECP): E9h is NVMe.
    pub protocol: u8,
    /// Security Protocol Specific (SPSP), SPSP0 in the low byte.
    pub specific: u16,
    /// Transfer (TL) or allocation (AL) length in bytes.
    pub length: u32,
}

impl Authentication {
    fn decode(sqe: &Sqe) -> Self {
        let cdw10 = sqe.cdw10.get();
        Self {
            protocol: (cdw10 >> 24) as u8,
            specific: (cdw10 >> 8) as u16,
            length: sqe.cdw11.get(),
        }
    }

    fn emit(&self, fctype: u8, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        Sqe {
            cdw10: U32::new(u32::from(self.specific) << 8 | u32::from(self.protocol) << 24),
            cdw11: U32::new(self.length),
            ..blank(fctype, cid, sgl)
        }
        .to_bytes()
    }
}

/// A Fabrics command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Property Set.
    PropertySet(PropertySet),
    /// Connect.
    Connect(Connect),
    /// Property Get.
    PropertyGet(PropertyGet),
    /// Authentication Send.
    AuthSend(Authentication),
    /// Authentication Receive.
    AuthReceive(Authentication),
    /// Disconnect.
    Disconnect(Disconnect),
}

impl Command {
    /// What the entry means. An unknown FCTYPE or property width is *Invalid Field in Command*; an
    /// unknown record format *Connect Incompatible Format*.
    pub fn parse(sqe: &Sqe) -> Result<Self, Status> {
        let cdw10 = sqe.cdw10.get();
        Ok(match sqe.fctype() {
            fctype::PROPERTY_SET => Self::PropertySet(PropertySet {
                offset: sqe.cdw11.get(),
                width: Width::from_raw(cdw10)?,
                value: Sqe::wide(sqe.cdw12, sqe.cdw13),
            }),
            fctype::CONNECT => Self::Connect(Connect::decode(sqe)?),
            fctype::PROPERTY_GET => Self::PropertyGet(PropertyGet {
                offset: sqe.cdw11.get(),
                width: Width::from_raw(cdw10)?,
            }),
            fctype::AUTH_SEND => Self::AuthSend(Authentication::decode(sqe)),
            fctype::AUTH_RECEIVE => Self::AuthReceive(Authentication::decode(sqe)),
            fctype::DISCONNECT if cdw10 & 0xFFFF != 0 => {
                return Err(StatusCode::ConnectIncompatibleFormat.dnr());
            }
            fctype::DISCONNECT => Self::Disconnect(Disconnect),
            _ => return Err(StatusCode::InvalidField.dnr()),
        })
    }

    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        match self {
            Self::PropertySet(command) => command.emit(cid, sgl),
            Self::Connect(command) => command.emit(cid, sgl),
            Self::PropertyGet(command) => command.emit(cid, sgl),
            Self::AuthSend(command) => command.emit(fctype::AUTH_SEND, cid, sgl),
            Self::AuthReceive(command) => command.emit(fctype::AUTH_RECEIVE, cid, sgl),
            Self::Disconnect(command) => command.emit(cid, sgl),
        }
    }
}

fn blank(fctype: u8, cid: Cid, sgl: &Sgl) -> Sqe {
    Sqe::blank(FABRICS_OPCODE, cid, Nsid::new(u32::from(fctype)), sgl)
}

impl Width {
    /// From ATTRIB in byte 40, bits 2:0 (Base 6.5).
    fn from_raw(cdw10: u32) -> Result<Self, Status> {
        match (bit(cdw10, 0), cdw10 & 6) {
            (false, 0) => Ok(Self::Four),
            (true, 0) => Ok(Self::Eight),
            _ => Err(StatusCode::InvalidField.dnr()),
        }
    }

    const fn raw(self) -> u32 {
        match self {
            Self::Four => 0,
            Self::Eight => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn connect_bytes() {
        let connect = Connect {
            qid: Qid::new(3),
            sqsize: 127,
            cattr: ConnectAttributes::new().with_disable_sq_flow_control(true),
            kato_ms: 0x0102_0304,
        };
        let bytes = connect.emit(
            Cid::new(1),
            &Sgl::InCapsule {
                offset: 0,
                length: 1024,
            },
        );
        assert_eq!(bytes[..8], [0x7F, 0x40, 1, 0, 1, 0, 0, 0]);
        assert_eq!(bytes[40..52], [0, 0, 3, 0, 127, 0, 4, 0, 4, 3, 2, 1]);
        let mut wrong = bytes;
        wrong[40] = 1;
        assert_eq!(
            Command::parse(Sqe::cast(&wrong)),
            Err(StatusCode::ConnectIncompatibleFormat.dnr())
        );
        assert!(connect.check().is_ok());
        assert!(Connect::default().check().is_err());
    }

    #[test]
    fn property_widths() {
        let get = PropertyGet {
            offset: 0x1C,
            width: Width::Four,
        };
        let mut bytes = get.emit(Cid::new(1), &Sgl::NONE);
        assert_eq!(bytes[44], 0x1C);
        bytes[40] = 2;
        assert_eq!(
            Command::parse(Sqe::cast(&bytes)),
            Err(StatusCode::InvalidField.dnr())
        );
    }

    #[test]
    fn connect_reply() {
        assert_eq!(ConnectReply::connected(Cntlid::new(5)).into_bits(), 5);
        assert_eq!(
            ConnectReply::invalid_data(ConnectData::SUBNQN_OFFSET).into_bits(),
            0x1_0100
        );
        assert_eq!(ConnectReply::from_bits(0x1_0100).invalid_field(), "SUBNQN");
        // AUTHREQ is in bits 31:16: ATR its bit 1, ASCR its bit 2.
        assert!(ConnectReply::from_bits(1 << 17).authentication_required());
        assert!(ConnectReply::from_bits(1 << 18).secure_channel_required());
    }

    proptest! {
        #[test]
        fn connect_data_round_trips(host in "[!-~]{1,223}", sub in "[!-~]{1,223}", id: [u8; 16], cntlid: u16) {
            let (host, sub) = (Nqn::opaque(&host).unwrap(), Nqn::opaque(&sub).unwrap());
            let data = ConnectData::new(HostId::from_bytes(id), Cntlid::new(cntlid), &sub, &host);
            let again = ConnectData::view(data.bytes()).unwrap();
            prop_assert_eq!(again, &data);
            prop_assert_eq!(again.hostid().to_bytes(), id);
            prop_assert_eq!(again.cntlid().get(), cntlid);
            prop_assert_eq!(again.subnqn(), Ok(sub));
            prop_assert_eq!(again.hostnqn(), Ok(host));
        }

        #[test]
        fn any_connect_data_is_judged(bytes in proptest::collection::vec(any::<u8>(), 0..1100)) {
            match ConnectData::view(&bytes) {
                Some(data) => { let _ = (data.subnqn(), data.hostnqn()); }
                None => prop_assert!(bytes.len() < 1024),
            }
        }
    }
}
