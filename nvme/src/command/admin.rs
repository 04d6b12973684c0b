//! Admin commands (Base 5).

use super::{Sqe, bit};
use crate::features::{FeatureId, FeatureValue};
use crate::ids::{Cid, Cntlid, Nsid, Qid};
use crate::log::LogPageId;
use crate::sgl::Sgl;
use crate::status::{Status, StatusCode};
use crate::{U16, U32};

/// Opcodes (Base 5, Opcodes for Admin Commands).
pub mod opcode {
    /// Delete I/O Submission Queue (memory-based only).
    pub const DELETE_IO_SQ: u8 = 0x00;
    /// Create I/O Submission Queue (memory-based only).
    pub const CREATE_IO_SQ: u8 = 0x01;
    /// Get Log Page.
    pub const GET_LOG_PAGE: u8 = 0x02;
    /// Delete I/O Completion Queue (memory-based only).
    pub const DELETE_IO_CQ: u8 = 0x04;
    /// Create I/O Completion Queue (memory-based only).
    pub const CREATE_IO_CQ: u8 = 0x05;
    /// Identify.
    pub const IDENTIFY: u8 = 0x06;
    /// Abort.
    pub const ABORT: u8 = 0x08;
    /// Set Features.
    pub const SET_FEATURES: u8 = 0x09;
    /// Get Features.
    pub const GET_FEATURES: u8 = 0x0A;
    /// Asynchronous Event Request.
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0C;
    /// Namespace Management.
    pub const NAMESPACE_MANAGEMENT: u8 = 0x0D;
    /// Firmware Commit.
    pub const FIRMWARE_COMMIT: u8 = 0x10;
    /// Firmware Image Download.
    pub const FIRMWARE_DOWNLOAD: u8 = 0x11;
    /// Device Self-test.
    pub const DEVICE_SELF_TEST: u8 = 0x14;
    /// Namespace Attachment.
    pub const NAMESPACE_ATTACHMENT: u8 = 0x15;
    /// Keep Alive.
    pub const KEEP_ALIVE: u8 = 0x18;
    /// Format NVM.
    pub const FORMAT_NVM: u8 = 0x80;
    /// Security Send.
    pub const SECURITY_SEND: u8 = 0x81;
    /// Security Receive.
    pub const SECURITY_RECEIVE: u8 = 0x82;
    /// Sanitize.
    pub const SANITIZE: u8 = 0x84;
}

open_enum! {
    /// Controller or Namespace Structure (CNS) that Identify asks for (Base 5.1.13).
    pub enum Cns {
        /// 00h: Identify Namespace of the NVM command set ([`crate::identify::Namespace`]).
        Namespace = 0x00,
        /// 01h: Identify Controller ([`crate::identify::Controller`]).
        Controller = 0x01,
        /// 02h: active namespace ID list ([`crate::identify::NamespaceList`]).
        ActiveNamespaces = 0x02,
        /// 03h: namespace identification descriptors ([`crate::identify::descriptors`]).
        NamespaceDescriptors = 0x03,
        /// 04h: NVM set list.
        NvmSets = 0x04,
        /// 05h: namespace, specific to an I/O command set ([`crate::identify::NvmNamespace`]).
        CommandSetNamespace = 0x05,
        /// 06h: controller, specific to an I/O command set ([`crate::identify::NvmController`]).
        CommandSetController = 0x06,
        /// 07h: active namespace ID list of an I/O command set.
        CommandSetActiveNamespaces = 0x07,
        /// 08h: namespace, independent of command sets ([`crate::identify::IndependentNamespace`]).
        IndependentNamespace = 0x08,
        /// 10h: allocated namespace ID list.
        AllocatedNamespaces = 0x10,
        /// 11h: Identify Namespace of an allocated namespace.
        AllocatedNamespace = 0x11,
        /// 12h: controllers attached to a namespace.
        AttachedControllers = 0x12,
        /// 13h: controllers of the subsystem.
        Controllers = 0x13,
        /// 14h: primary controller capabilities.
        PrimaryController = 0x14,
        /// 15h: secondary controller list.
        SecondaryControllers = 0x15,
        /// 16h: namespace granularity list.
        Granularity = 0x16,
        /// 17h: UUID list.
        Uuids = 0x17,
        /// 18h: domain list.
        Domains = 0x18,
        /// 19h: endurance group list.
        EnduranceGroups = 0x19,
        /// 1Ch: I/O command set combinations ([`crate::identify::CommandSetVectors`]).
        CommandSets = 0x1C,
    }
}

open_enum! {
    /// Command Set Identifier (CSI).
    pub enum Csi {
        /// NVM command set.
        Nvm = 0x00,
        /// Key value.
        KeyValue = 0x01,
        /// Zoned namespaces.
        Zoned = 0x02,
    }
}

/// Identify (Base 5.1.13). The data is 4096 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identify {
    /// What is asked for.
    pub cns: Cns,
    /// Namespace, or where a list starts (exclusive).
    pub nsid: Nsid,
    /// Controller Identifier (CNTID), or where a controller list starts (inclusive).
    pub cntid: Cntlid,
    /// CNS Specific Identifier (CNSSID).
    pub cnssid: u16,
    /// Command set.
    pub csi: Csi,
    /// UUID Index.
    pub uuid_index: u8,
}

impl Identify {
    /// Length of the data in bytes.
    pub const DATA_LEN: usize = 4096;

    /// Asks for that structure of that namespace, NVM command set.
    #[must_use]
    pub const fn new(cns: Cns, nsid: Nsid) -> Self {
        Self {
            cns,
            nsid,
            cntid: Cntlid::new(0),
            cnssid: 0,
            csi: Csi::Nvm,
            uuid_index: 0,
        }
    }

    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        Sqe {
            cdw10: U32::new(u32::from(self.cns.raw()) | u32::from(self.cntid.get()) << 16),
            cdw11: U32::new(u32::from(self.cnssid) | u32::from(self.csi.raw()) << 24),
            cdw14: U32::new(u32::from(self.uuid_index & 0x7F)),
            ..Sqe::blank(opcode::IDENTIFY, cid, self.nsid, sgl)
        }
        .to_bytes()
    }
}

/// Get Log Page (Base 5.1.12).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetLogPage {
    /// Log page.
    pub lid: LogPageId,
    /// Namespace, for pages that have one per namespace.
    pub nsid: Nsid,
    /// Log Specific Parameter (LSP), 7 bits.
    pub lsp: u8,
    /// Retain Asynchronous Event (RAE): reading does not clear the event.
    pub retain_event: bool,
    /// Length in dwords, 0's based (NUMD).
    pub numd: u32,
    /// Offset in bytes, or an index if `offset_is_index` (LPO).
    pub offset: u64,
    /// Offset Type (OT).
    pub offset_is_index: bool,
    /// Log Specific Identifier (LSI).
    pub lsi: u16,
    /// Command set.
    pub csi: Csi,
    /// UUID Index.
    pub uuid_index: u8,
}

impl GetLogPage {
    /// Asks for `len_bytes` bytes (a multiple of 4, at least 4) at byte `offset` of a page of the
    /// whole controller.
    #[must_use]
    pub fn new(lid: LogPageId, offset: u64, len_bytes: u32) -> Self {
        debug_assert!(len_bytes >= 4 && len_bytes.is_multiple_of(4));
        Self {
            lid,
            nsid: Nsid::BROADCAST,
            lsp: 0,
            retain_event: false,
            numd: (len_bytes / 4).saturating_sub(1),
            offset,
            offset_is_index: false,
            lsi: 0,
            csi: Csi::Nvm,
            uuid_index: 0,
        }
    }

    /// Length asked for in bytes, up to 16 GiB.
    #[must_use]
    pub const fn len_bytes(&self) -> u64 {
        (self.numd as u64 + 1) * 4
    }

    fn decode(sqe: &Sqe) -> Self {
        let (cdw10, cdw11, cdw14) = (sqe.cdw10.get(), sqe.cdw11.get(), sqe.cdw14.get());
        Self {
            lid: LogPageId::from_raw(cdw10 as u8),
            nsid: sqe.nsid(),
            lsp: (cdw10 >> 8 & 0x7F) as u8,
            retain_event: bit(cdw10, 15),
            numd: cdw10 >> 16 | cdw11 << 16,
            offset: Sqe::wide(sqe.cdw12, sqe.cdw13),
            offset_is_index: bit(cdw14, 23),
            lsi: (cdw11 >> 16) as u16,
            csi: Csi::from_raw((cdw14 >> 24) as u8),
            uuid_index: (cdw14 & 0x7F) as u8,
        }
    }

    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        Sqe {
            cdw10: U32::new(
                u32::from(self.lid.raw())
                    | u32::from(self.lsp & 0x7F) << 8
                    | u32::from(self.retain_event) << 15
                    | self.numd << 16,
            ),
            cdw11: U32::new(self.numd >> 16 | u32::from(self.lsi) << 16),
            cdw12: U32::new(self.offset as u32),
            cdw13: U32::new((self.offset >> 32) as u32),
            cdw14: U32::new(
                u32::from(self.uuid_index & 0x7F)
                    | u32::from(self.offset_is_index) << 23
                    | u32::from(self.csi.raw()) << 24,
            ),
            ..Sqe::blank(opcode::GET_LOG_PAGE, cid, self.nsid, sgl)
        }
        .to_bytes()
    }
}

/// Which value Get Features asks for (SEL, Base 5.1.11).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Select {
    /// 0: current value.
    #[default]
    Current,
    /// 1: default value.
    Default,
    /// 2: saved value.
    Saved,
    /// 3: supported capabilities ([`crate::features::Capabilities`]).
    Capabilities,
}

/// Get Features (Base 5.1.11). Dword 0 of the completion holds the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetFeatures {
    /// Feature.
    pub fid: FeatureId,
    /// Namespace, for features that have one per namespace.
    pub nsid: Nsid,
    /// Which value.
    pub select: Select,
    /// Dword 11, used by some features.
    pub cdw11: u32,
    /// UUID Index.
    pub uuid_index: u8,
}

impl GetFeatures {
    /// Asks for the current value of a feature of the controller.
    #[must_use]
    pub const fn new(fid: FeatureId) -> Self {
        Self {
            fid,
            nsid: Nsid::NONE,
            select: Select::Current,
            cdw11: 0,
            uuid_index: 0,
        }
    }

    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        let select = match self.select {
            Select::Current => 0,
            Select::Default => 1,
            Select::Saved => 2,
            Select::Capabilities => 3,
        };
        Sqe {
            cdw10: U32::new(u32::from(self.fid.raw()) | select << 8),
            cdw11: U32::new(self.cdw11),
            cdw14: U32::new(u32::from(self.uuid_index & 0x7F)),
            ..Sqe::blank(opcode::GET_FEATURES, cid, self.nsid, sgl)
        }
        .to_bytes()
    }
}

/// Set Features (Base 5.1.25).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetFeatures {
    /// Feature.
    pub fid: FeatureId,
    /// Namespace, for features that have one per namespace.
    pub nsid: Nsid,
    /// Save (SV): keep the value over resets.
    pub save: bool,
    /// The value; see [`SetFeatures::value`].
    pub cdw11: u32,
    /// Used by some features.
    pub cdw12: u32,
    /// Used by some features.
    pub cdw13: u32,
    /// Used by some features.
    pub cdw15: u32,
    /// UUID Index.
    pub uuid_index: u8,
}

impl SetFeatures {
    /// Sets a feature of the controller, unsaved.
    #[must_use]
    pub fn new(value: FeatureValue) -> Self {
        Self {
            fid: value.id(),
            nsid: Nsid::NONE,
            save: false,
            cdw11: value.dword(),
            cdw12: 0,
            cdw13: 0,
            cdw15: 0,
            uuid_index: 0,
        }
    }

    /// What dword 11 means; `None` for features that are not known here.
    #[must_use]
    pub fn value(&self) -> Option<FeatureValue> {
        FeatureValue::parse(self.fid, self.cdw11)
    }

    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        Sqe {
            cdw10: U32::new(u32::from(self.fid.raw()) | u32::from(self.save) << 31),
            cdw11: U32::new(self.cdw11),
            cdw12: U32::new(self.cdw12),
            cdw13: U32::new(self.cdw13),
            cdw14: U32::new(u32::from(self.uuid_index & 0x7F)),
            cdw15: U32::new(self.cdw15),
            ..Sqe::blank(opcode::SET_FEATURES, cid, self.nsid, sgl)
        }
        .to_bytes()
    }
}

/// Abort (Base 5.1.1). Bit 0 of dword 0 of the completion is 1 when nothing was aborted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Abort {
    /// Queue of the command to abort.
    pub sqid: Qid,
    /// Its identifier.
    pub cid: Cid,
}

impl Abort {
    /// Dword 0 of the completion: the command was aborted.
    pub const ABORTED: u32 = 0;
    /// Dword 0 of the completion: it was not.
    pub const NOT_ABORTED: u32 = 1;

    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        Sqe {
            cdw10: U32::new(u32::from(self.sqid.get()) | u32::from(self.cid.get()) << 16),
            ..Sqe::blank(opcode::ABORT, cid, Nsid::NONE, sgl)
        }
        .to_bytes()
    }
}

/// Asynchronous Event Request (Base 5.1.2). See [`crate::aer`] for the completion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AsyncEventRequest;

impl AsyncEventRequest {
    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        Sqe::blank(opcode::ASYNC_EVENT_REQUEST, cid, Nsid::NONE, sgl).to_bytes()
    }
}

/// Keep Alive (Base 5.1.14).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeepAlive;

impl KeepAlive {
    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        Sqe::blank(opcode::KEEP_ALIVE, cid, Nsid::NONE, sgl).to_bytes()
    }
}

/// An Admin command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Get Log Page.
    GetLogPage(GetLogPage),
    /// Identify.
    Identify(Identify),
    /// Abort.
    Abort(Abort),
    /// Set Features.
    SetFeatures(SetFeatures),
    /// Get Features.
    GetFeatures(GetFeatures),
    /// Asynchronous Event Request.
    AsyncEventRequest(AsyncEventRequest),
    /// Keep Alive.
    KeepAlive(KeepAlive),
}

impl Command {
    /// What the entry means. An unknown opcode, or one that Fabrics does not have, is *Invalid
    /// Command Opcode*.
    pub fn parse(sqe: &Sqe) -> Result<Self, Status> {
        let (cdw10, cdw11, cdw14) = (sqe.cdw10.get(), sqe.cdw11.get(), sqe.cdw14.get());
        let nsid = sqe.nsid();
        let uuid_index = (cdw14 & 0x7F) as u8;
        Ok(match sqe.opcode {
            opcode::GET_LOG_PAGE => Self::GetLogPage(GetLogPage::decode(sqe)),
            opcode::IDENTIFY => Self::Identify(Identify {
                cns: Cns::from_raw(cdw10 as u8),
                nsid,
                cntid: Cntlid::new((cdw10 >> 16) as u16),
                cnssid: cdw11 as u16,
                csi: Csi::from_raw((cdw11 >> 24) as u8),
                uuid_index,
            }),
            opcode::ABORT => Self::Abort(Abort {
                sqid: Qid::new(cdw10 as u16),
                cid: Cid::new((cdw10 >> 16) as u16),
            }),
            opcode::SET_FEATURES => Self::SetFeatures(SetFeatures {
                fid: FeatureId::from_raw(cdw10 as u8),
                nsid,
                save: bit(cdw10, 31),
                cdw11,
                cdw12: sqe.cdw12.get(),
                cdw13: sqe.cdw13.get(),
                cdw15: sqe.cdw15.get(),
                uuid_index,
            }),
            opcode::GET_FEATURES => Self::GetFeatures(GetFeatures {
                fid: FeatureId::from_raw(cdw10 as u8),
                nsid,
                select: match cdw10 >> 8 & 7 {
                    0 => Select::Current,
                    1 => Select::Default,
                    2 => Select::Saved,
                    3 => Select::Capabilities,
                    _ => return Err(StatusCode::InvalidField.dnr()),
                },
                cdw11,
                uuid_index,
            }),
            opcode::ASYNC_EVENT_REQUEST => Self::AsyncEventRequest(AsyncEventRequest),
            opcode::KEEP_ALIVE => Self::KeepAlive(KeepAlive),
            _ => return Err(StatusCode::InvalidOpcode.dnr()),
        })
    }

    /// The 64 bytes.
    #[must_use]
    pub fn emit(&self, cid: Cid, sgl: &Sgl) -> [u8; Sqe::SIZE] {
        match self {
            Self::GetLogPage(command) => command.emit(cid, sgl),
            Self::Identify(command) => command.emit(cid, sgl),
            Self::Abort(command) => command.emit(cid, sgl),
            Self::SetFeatures(command) => command.emit(cid, sgl),
            Self::GetFeatures(command) => command.emit(cid, sgl),
            Self::AsyncEventRequest(command) => command.emit(cid, sgl),
            Self::KeepAlive(command) => command.emit(cid, sgl),
        }
    }
}

wire! {
    /// A controller list (Base 4.6.1), data of Identify CNS 12h and 13h.
    pub struct ControllerList: 4096 {
        /// Number of entries that are filled.
        0 => pub count: U16,
        /// Identifiers in ascending order.
        2 => pub cntlid: [U16; 2047],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identify_bytes() {
        let identify = Identify {
            csi: Csi::Zoned,
            cntid: Cntlid::new(0x0102),
            ..Identify::new(Cns::CommandSetNamespace, Nsid::new(7))
        };
        let bytes = identify.emit(Cid::new(1), &Sgl::NONE);
        assert_eq!(bytes[..8], [6, 0x40, 1, 0, 7, 0, 0, 0]);
        assert_eq!(bytes[40..48], [5, 0, 2, 1, 0, 0, 0, 2]);
    }

    #[test]
    fn log_page_bytes() {
        let get = GetLogPage {
            retain_event: true,
            lsp: 1,
            ..GetLogPage::new(LogPageId::Discovery, 0x1_0000_0400, 0x4_0008)
        };
        assert_eq!(get.len_bytes(), 0x4_0008);
        let bytes = get.emit(Cid::new(1), &Sgl::NONE);
        assert_eq!(
            bytes[40..56],
            [0x70, 0x81, 1, 0, 1, 0, 0, 0, 0, 4, 0, 0, 1, 0, 0, 0]
        );
    }

    #[test]
    fn reserved_select_is_refused() {
        let mut bytes = GetFeatures::new(FeatureId::KeepAlive).emit(Cid::new(1), &Sgl::NONE);
        assert_eq!(bytes[40], 0x0F);
        bytes[41] = 4;
        assert_eq!(
            Command::parse(Sqe::cast(&bytes)),
            Err(StatusCode::InvalidField.dnr())
        );
    }

    #[test]
    fn queues_of_memory_based_controllers_are_unknown() {
        for opcode in [
            opcode::CREATE_IO_SQ,
            opcode::DELETE_IO_CQ,
            opcode::FORMAT_NVM,
        ] {
            let sqe = Sqe {
                opcode,
                ..Sqe::zeroed()
            };
            assert_eq!(Command::parse(&sqe), Err(StatusCode::InvalidOpcode.dnr()));
        }
    }
}
