//! What the kernel's ublk driver reads and writes (Linux: include/uapi/linux/ublk_cmd.h, Documentation/block/ublk.rst).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Namespace, Op};

/// Most requests of a queue.
pub(crate) const MAX_QUEUE_DEPTH: u16 = 4096;
/// The kernel's units.
pub(crate) const SECTOR_BYTES: u32 = 512;
/// A request was delivered.
pub(crate) const IO_RES_OK: i32 = 0;

/// Features (UBLK_F_*).
pub(crate) mod feature {
    /// The device survives its server.
    pub(crate) const USER_RECOVERY: u64 = 1 << 3;
    /// What the server had not answered is given to the next one.
    pub(crate) const USER_RECOVERY_REISSUE: u64 = 1 << 4;
    /// Commands are numbered as ioctls are.
    pub(crate) const CMD_IOCTL_ENCODE: u64 = 1 << 6;
    /// UPDATE_SIZE.
    pub(crate) const UPDATE_SIZE: u64 = 1 << 10;
}

/// Control commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    GetDevInfo = 0x02,
    AddDev = 0x04,
    DelDev = 0x05,
    StartDev = 0x06,
    StopDev = 0x07,
    SetParams = 0x08,
    GetParams = 0x09,
    StartUserRecovery = 0x10,
    EndUserRecovery = 0x11,
    GetFeatures = 0x13,
    DelDevAsync = 0x14,
    UpdateSize = 0x15,
}

impl Command {
    /// The number as the driver wants it: `_IOR` or `_IOWR('u', number, struct ublksrv_ctrl_cmd)`, or the bare number.
    pub(crate) const fn code(self, ioctl_encoded: bool) -> u32 {
        let only_read = matches!(
            self,
            Command::GetDevInfo | Command::GetParams | Command::GetFeatures | Command::DelDevAsync
        );
        let number = self as u32;
        if ioctl_encoded {
            encode(number, only_read, size_of::<ControlCommand>())
        } else {
            number
        }
    }
}

/// Commands on `/dev/ublkcN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IoCommandCode {
    /// Wants a request.
    Fetch = 0x20,
    /// Has done one, wants the next.
    CommitAndFetch = 0x21,
}

impl IoCommandCode {
    /// As for [`Command::code`], always `_IOWR`.
    pub(crate) const fn code(self, ioctl_encoded: bool) -> u32 {
        if ioctl_encoded {
            encode(self as u32, false, size_of::<IoCommand>())
        } else {
            self as u32
        }
    }
}

/// ioctl numbers (include/uapi/asm-generic/ioctl.h).
const fn encode(number: u32, only_read: bool, size: usize) -> u32 {
    let direction = if only_read { 2 } else { 3 };
    direction << 30 | (size as u32) << 16 | (b'u' as u32) << 8 | number
}

/// struct ublksrv_ctrl_cmd.
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct ControlCommand {
    pub(crate) dev_id: u32,
    /// No queue: [`NO_QUEUE`].
    pub(crate) queue_id: u16,
    /// Of the buffer at `addr`.
    pub(crate) len: u16,
    pub(crate) addr: u64,
    pub(crate) data: u64,
    /// For unprivileged devices only.
    pub(crate) dev_path_len: u16,
    pub(crate) pad: u16,
    pub(crate) reserved: u32,
}

pub(crate) const NO_QUEUE: u16 = u16::MAX;
/// The driver chooses a number.
pub(crate) const ANY_DEVICE: u32 = u32::MAX;

const _: () = assert!(size_of::<ControlCommand>() == 32);
const _: () = assert!(std::mem::offset_of!(ControlCommand, addr) == 8);
const _: () = assert!(std::mem::offset_of!(ControlCommand, dev_path_len) == 24);

/// struct ublksrv_ctrl_dev_info.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, FromBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub(crate) struct DeviceInfo {
    pub(crate) nr_hw_queues: u16,
    pub(crate) queue_depth: u16,
    pub(crate) state: u16,
    pub(crate) pad0: u16,
    pub(crate) max_io_buf_bytes: u32,
    pub(crate) dev_id: u32,
    pub(crate) ublksrv_pid: i32,
    pub(crate) pad1: u32,
    pub(crate) flags: u64,
    /// Ours: see `Identity`.
    pub(crate) ublksrv_flags: u64,
    pub(crate) owner_uid: u32,
    pub(crate) owner_gid: u32,
    pub(crate) reserved1: u64,
    pub(crate) reserved2: u64,
}

const _: () = assert!(size_of::<DeviceInfo>() == 64);
const _: () = assert!(std::mem::offset_of!(DeviceInfo, max_io_buf_bytes) == 8);
const _: () = assert!(std::mem::offset_of!(DeviceInfo, flags) == 24);
const _: () = assert!(std::mem::offset_of!(DeviceInfo, owner_uid) == 40);

/// UBLK_ATTR_*.
pub(crate) mod attribute {
    pub(crate) const READ_ONLY: u32 = 1 << 0;
    pub(crate) const VOLATILE_CACHE: u32 = 1 << 2;
    pub(crate) const FUA: u32 = 1 << 3;
}

const PARAM_BASIC: u32 = 1 << 0;
const PARAM_DISCARD: u32 = 1 << 1;

/// struct ublk_params as far as we set it: `len` says where it ends.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, IntoBytes, FromBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub(crate) struct Parameters {
    pub(crate) len: u32,
    pub(crate) types: u32,
    pub(crate) attrs: u32,
    pub(crate) logical_bs_shift: u8,
    pub(crate) physical_bs_shift: u8,
    pub(crate) io_opt_shift: u8,
    pub(crate) io_min_shift: u8,
    pub(crate) max_sectors: u32,
    pub(crate) chunk_sectors: u32,
    pub(crate) dev_sectors: u64,
    pub(crate) virt_boundary_mask: u64,
    pub(crate) discard_alignment: u32,
    pub(crate) discard_granularity: u32,
    pub(crate) max_discard_sectors: u32,
    pub(crate) max_write_zeroes_sectors: u32,
    pub(crate) max_discard_segments: u16,
    pub(crate) reserved0: u16,
    /// What follows of the kernel's structure begins at a multiple of 4, so this is all of it.
    pub(crate) end: u32,
}

const _: () = assert!(std::mem::offset_of!(Parameters, attrs) == 8);
const _: () = assert!(std::mem::offset_of!(Parameters, dev_sectors) == 24);
const _: () = assert!(std::mem::offset_of!(Parameters, discard_alignment) == 40);
const _: () = assert!(std::mem::offset_of!(Parameters, max_discard_segments) == 56);
const _: () = assert!(size_of::<Parameters>() == 64);

/// Longest discard and write of zeroes: 1 GiB, whose bytes a result can tell.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
const _: () = assert!(MAX_DISCARD_SECTORS <= i32::MAX as u32 / SECTOR_BYTES);

impl Parameters {
    /// Of a device that is the namespace. Every request is then one command, since none is longer than one.
    pub(crate) fn of(namespace: &Namespace, max_io_bytes: u32) -> Parameters {
        let has = |condition: bool, value: u32| if condition { value } else { 0 };
        let writable = !namespace.read_only;
        let shift = namespace.block_size.trailing_zeros() as u8;
        let per_block = namespace.block_size / SECTOR_BYTES;
        let optimal = namespace.optimal_io_bytes;
        let (discard, zeroes) = (
            namespace.discard && writable,
            namespace.write_zeroes && writable,
        );
        // The kernel cuts what is longer.
        let sectors = |op| {
            let blocks = namespace.max_blocks.for_op(op);
            blocks.saturating_mul(per_block).min(MAX_DISCARD_SECTORS)
        };
        Parameters {
            len: size_of::<Parameters>() as u32,
            types: PARAM_BASIC | has(discard || zeroes, PARAM_DISCARD),
            attrs: has(namespace.read_only, attribute::READ_ONLY)
                | has(
                    namespace.volatile_write_cache,
                    attribute::VOLATILE_CACHE | attribute::FUA,
                ),
            logical_bs_shift: shift,
            physical_bs_shift: shift,
            io_opt_shift: if optimal.is_power_of_two() {
                shift.max(optimal.trailing_zeros() as u8)
            } else {
                shift
            },
            io_min_shift: shift,
            max_sectors: max_io_bytes / SECTOR_BYTES,
            dev_sectors: namespace.len_bytes() / u64::from(SECTOR_BYTES),
            discard_granularity: has(discard || zeroes, namespace.block_size),
            max_discard_sectors: has(discard, sectors(Op::Discard)),
            max_write_zeroes_sectors: has(zeroes, sectors(Op::WriteZeroes { deallocate: true })),
            max_discard_segments: has(discard, 1) as u16,
            ..Parameters::default()
        }
    }
}

/// struct ublksrv_io_cmd.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct IoCommand {
    pub(crate) q_id: u16,
    pub(crate) tag: u16,
    pub(crate) result: i32,
    /// Where the driver copies data from and to.
    pub(crate) addr: u64,
}

const _: () = assert!(size_of::<IoCommand>() == 16);

/// struct ublksrv_io_desc.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct IoDescriptor {
    pub(crate) op_flags: u32,
    pub(crate) nr_sectors: u32,
    pub(crate) start_sector: u64,
    pub(crate) addr: u64,
}

pub(crate) const DESCRIPTOR_BYTES: usize = size_of::<IoDescriptor>();
const _: () = assert!(DESCRIPTOR_BYTES == 24);

const IO_OP_MASK: u32 = 0xff;
const IO_F_FUA: u32 = 1 << 13;
const IO_F_NOUNMAP: u32 = 1 << 15;

impl IoDescriptor {
    /// What it asks for; `None`: what we do not know, zones for example.
    pub(crate) fn op(&self) -> Option<Op> {
        let has = |flag: u32| self.op_flags & flag != 0;
        match self.op_flags & IO_OP_MASK {
            0 => Some(Op::Read),
            1 => Some(Op::Write { fua: has(IO_F_FUA) }),
            2 => Some(Op::Flush),
            3 => Some(Op::Discard),
            5 => Some(Op::WriteZeroes {
                deallocate: !has(IO_F_NOUNMAP),
            }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MaxBlocks;

    /// Numbers as the kernel's header computes them.
    #[test]
    fn commands_have_the_kernel_s_numbers() {
        assert_eq!(Command::AddDev.code(true), 0xc020_7504);
        assert_eq!(Command::GetFeatures.code(true), 0x8020_7513);
        assert_eq!(Command::DelDevAsync.code(true), 0x8020_7514);
        assert_eq!(Command::UpdateSize.code(true), 0xc020_7515);
        assert_eq!(Command::GetParams.code(true), 0x8020_7509);
        assert_eq!(Command::AddDev.code(false), 4);
        assert_eq!(IoCommandCode::Fetch.code(true), 0xc010_7520);
        assert_eq!(IoCommandCode::CommitAndFetch.code(false), 0x21);
    }

    #[test]
    fn structures_have_their_fields_where_the_kernel_looks() {
        let command = ControlCommand {
            dev_id: 0x0403_0201,
            queue_id: NO_QUEUE,
            len: 0x0605,
            addr: 0x1112_1314_1516_1718,
            data: 9,
            ..ControlCommand::default()
        };
        let bytes = command.as_bytes();
        assert_eq!(&bytes[..8], [1, 2, 3, 4, 0xff, 0xff, 5, 6]);
        assert_eq!((bytes[8], bytes[16]), (0x18, 9));
        let parameters = Parameters::of(&Namespace::example(), 64 << 10);
        let bytes = parameters.as_bytes();
        assert_eq!(bytes[..8], [64, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(bytes[12..16], [9, 9, 9, 9]);
        let descriptor = IoDescriptor::read_from_bytes(&[
            1, 0x20, 0, 0, 8, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ])
        .unwrap();
        assert_eq!(descriptor.op(), Some(Op::Write { fua: true }));
        assert_eq!((descriptor.nr_sectors, descriptor.start_sector), (8, 16));
    }

    #[test]
    fn a_device_can_what_its_namespace_can() {
        let namespace = Namespace {
            block_size: 4096,
            optimal_io_bytes: 65536,
            ..Namespace::example()
        };
        let all = Parameters::of(&namespace, 128 << 10);
        assert_eq!((all.logical_bs_shift, all.io_opt_shift), (12, 16));
        assert_eq!((all.max_sectors, all.max_discard_segments), (256, 1));
        assert_eq!(all.max_write_zeroes_sectors, 65536 * 8);
        assert_eq!(all.max_discard_sectors, 1 << 21);
        assert_eq!(all.attrs, attribute::VOLATILE_CACHE | attribute::FUA);
        let read_only = Namespace {
            read_only: true,
            volatile_write_cache: false,
            ..namespace.clone()
        };
        let read_only = Parameters::of(&read_only, 128 << 10);
        assert_eq!(read_only.attrs, attribute::READ_ONLY);
        assert_eq!(
            (read_only.types, read_only.max_discard_sectors),
            (PARAM_BASIC, 0)
        );
        let limited = Namespace {
            max_blocks: MaxBlocks {
                write_zeroes: 1024,
                discard: 100,
                ..MaxBlocks::EXPRESSIBLE
            },
            ..namespace.clone()
        };
        let limited = Parameters::of(&limited, 128 << 10);
        assert_eq!(limited.max_write_zeroes_sectors, 1024 * 8);
        assert_eq!(limited.max_discard_sectors, 100 * 8);
        let no_zeroes = Namespace {
            write_zeroes: false,
            ..namespace
        };
        let no_zeroes = Parameters::of(&no_zeroes, 128 << 10);
        assert_eq!(no_zeroes.max_write_zeroes_sectors, 0);
        assert!(no_zeroes.max_discard_sectors > 0);
    }
}
