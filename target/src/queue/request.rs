//! From a command capsule to a request that can be carried out, or the status that says why not.
//!
//! No I/O, no allocation: a namespace is what [`View`] says, data is where [`Source`] or [`Remote`]
//! say. The checks stand in the order in which the specification's figures list the fields.

use flexblk_nvme::command::{Sqe, nvm};
use flexblk_nvme::{Nsid, Sgl, Status, StatusCode};

/// Longest data transfer of one command in bytes: Identify's MDTS (Base 5.1.13.2.1).
pub const MAX_TRANSFER_BYTES: u32 = 1 << 20;
/// Most bytes that one Write Zeroes may name: Identify's WZSL (NVM 4.1.5.4). A RAM namespace is
/// cleared by the thread that serves the queue; this bounds how long others wait (about 0.4 ms).
pub const MAX_WRITE_ZEROES_BYTES: u64 = 4 << 20;
/// Most ranges of one Dataset Management: Identify's DMRL (NVM 4.1.5.4), and the field's own limit.
pub const MAX_DSM_RANGES: u16 = 256;
/// Length of a range of Dataset Management.
pub const DSM_RANGE_BYTES: u32 = 16;
/// Most bytes that one Copy may copy: MSSRL and MCL in Identify Namespace are this in blocks
/// (NVM 4.1.5.1).
pub const MAX_COPY_BYTES: u32 = MAX_TRANSFER_BYTES;
/// Most source ranges of one Copy: Identify's MSRC + 1. Their descriptors fit into one small buffer.
pub const MAX_COPY_RANGES: u16 = 128;
/// Length of a source range of Copy.
pub const COPY_RANGE_BYTES: u32 = 32;

/// What a queue needs to know of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// Logical blocks.
    pub block_count: u64,
    /// Which of the thread's devices is behind it.
    pub device: u32,
    /// log2 of the block size in bytes.
    pub block_shift: u8,
    /// Nothing can be changed.
    pub read_only: bool,
    /// Dataset Management deallocates.
    pub discard: bool,
    /// Not every host may do everything: there is more to look at.
    pub gated: bool,
}

/// A reservation command without its namespace and data: small, since every slot has room for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserve {
    /// Reservation Register.
    Register {
        /// RREGA.
        action: u8,
        /// IEKEY.
        ignore_key: bool,
        /// CPTPL.
        persist: u8,
    },
    /// Reservation Acquire.
    Acquire {
        /// RACQA.
        action: u8,
        /// IEKEY.
        ignore_key: bool,
        /// RTYPE.
        rtype: u8,
    },
    /// Reservation Release.
    Release {
        /// RRELA.
        action: u8,
        /// IEKEY.
        ignore_key: bool,
        /// RTYPE.
        rtype: u8,
    },
}

impl Reserve {
    /// Bytes of its data.
    #[must_use]
    pub const fn data_bytes(&self) -> u32 {
        match self {
            Self::Register { .. } | Self::Acquire { .. } => 16,
            Self::Release { .. } => 8,
        }
    }
}

/// Memory of the host, opened by a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Address within the region of the key.
    pub address: u64,
    /// Remote key.
    pub key: u32,
    /// The key is to be invalidated with the response.
    pub invalidate: bool,
}

impl Remote {
    /// Memory that only the host can name.
    pub const NONE: Self = Self {
        address: 0,
        key: 0,
        invalidate: false,
    };
}

/// How the commands of a transport name memory of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addressing {
    /// By keyed data blocks (NVMe/RDMA and so FlexiNS; RDMA 3.2).
    Keyed,
    /// By transport data blocks: the host knows by the command's identifier (TCP 3.3.2).
    Transport,
}

impl Addressing {
    /// The memory that a descriptor names, and its length; `None` for one of another kind.
    #[inline]
    fn remote(self, sgl: Sgl) -> Option<(Remote, u32)> {
        match (sgl, self) {
            (
                Sgl::Keyed {
                    address,
                    length,
                    key,
                    invalidate,
                },
                Self::Keyed,
            ) => {
                let remote = Remote {
                    address,
                    key,
                    invalidate,
                };
                Some((remote, length))
            }
            (Sgl::Transport { length }, Self::Transport) => Some((Remote::NONE, length)),
            _ => None,
        }
    }
}

/// Where a command's data comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// It came with the capsule, at this offset behind the entry.
    InCapsule(u32),
    /// It lies in the host's memory.
    Remote(Remote),
}

/// A range of logical blocks of a device, checked against its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Which of the thread's devices.
    pub device: u32,
    /// How many blocks; at least 1.
    pub blocks: u32,
    /// First block.
    pub lba: u64,
    /// log2 of the block size in bytes.
    pub block_shift: u8,
}

impl Range {
    /// Where it starts, in bytes from the device's start.
    #[inline]
    #[must_use]
    pub const fn offset_bytes(&self) -> u64 {
        self.lba << self.block_shift
    }

    /// Its length in bytes.
    #[inline]
    #[must_use]
    pub const fn len_bytes(&self) -> u64 {
        (self.blocks as u64) << self.block_shift
    }
}

/// What a command asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read into the host's memory.
    Read {
        /// What.
        range: Range,
        /// Where to.
        to: Remote,
    },
    /// Write.
    Write {
        /// What.
        range: Range,
        /// Where from.
        from: Source,
        /// Complete only when it would survive a power loss.
        fua: bool,
    },
    /// Compare with what the host sends.
    Compare {
        /// What.
        range: Range,
        /// Where from.
        from: Source,
    },
    /// Make what was written survive a power loss.
    Flush {
        /// Which of the thread's devices.
        device: u32,
    },
    /// Make a range read as zeroes.
    WriteZeroes {
        /// What.
        range: Range,
        /// The space may be given back.
        unmap: bool,
        /// Complete only when it would survive a power loss.
        fua: bool,
    },
    /// Read a range and say whether that worked.
    Verify {
        /// What.
        range: Range,
    },
    /// Give the space of up to 256 ranges back.
    Deallocate {
        /// Where the ranges are.
        from: Source,
        /// How many.
        ranges: u16,
        /// The namespace; the ranges are checked against it when they have come.
        view: View,
    },
    /// Copy ranges that the host names.
    Copy {
        /// Where the source ranges are.
        from: Source,
        /// Where the copy begins; how long it gets the source ranges say.
        destination: Range,
        /// How many source ranges.
        ranges: u16,
        /// Their format: 0 or 2.
        format: u8,
        /// Complete only when it would survive a power loss.
        fua: bool,
    },
    /// Make a range unreadable until it is written.
    WriteUncorrectable {
        /// What.
        range: Range,
    },
    /// Register, acquire or release a reservation.
    Reserve {
        /// Which.
        command: Reserve,
        /// Where its keys are.
        from: Source,
    },
    /// Report reservations.
    Report {
        /// Bytes asked for.
        bytes: u32,
    },
    /// Nothing to be done: hints that we do not use.
    Nothing,
}

impl Request {
    /// Reads and checks the capsule of an I/O command. `data_len` is how many bytes came behind the
    /// entry.
    #[inline]
    pub fn parse<'a>(
        sqe: &Sqe,
        data_len: usize,
        addressing: Addressing,
        view: impl FnOnce(Nsid) -> Option<&'a View>,
    ) -> Result<Self, Status> {
        sqe.check_flags()?;
        let command = nvm::Command::parse(sqe)?;
        let nsid = nsid_of(&command);
        // Base 3.2.1.2: an inactive or invalid NSID is Invalid Namespace or Format. Flush with
        // FFFFFFFFh too, since Identify's VWC bits 2:1 are 10b (Base 5.1.13.2.1).
        let view = view(nsid).ok_or_else(|| StatusCode::InvalidNamespaceOrFormat.dnr())?;
        match command {
            nvm::Command::Read(read) => {
                let range = block_range(read.slba.get(), read.blocks, view)?;
                check_control(read.control)?;
                let length = transfer_len(&range)?;
                Ok(Self::Read {
                    range,
                    to: remote(sqe, addressing, length, Exactly::This)?,
                })
            }
            nvm::Command::Write(write) => {
                let range = block_range(write.slba.get(), write.blocks, view)?;
                check_control(write.control)?;
                let length = transfer_len(&range)?;
                let from = source(sqe, data_len, addressing, length, Exactly::This)?;
                check_writable(view)?;
                Ok(Self::Write {
                    range,
                    from,
                    fua: write.control.fua(),
                })
            }
            nvm::Command::Compare(compare) => {
                let range = block_range(compare.slba.get(), compare.blocks, view)?;
                check_control(compare.control)?;
                let length = transfer_len(&range)?;
                Ok(Self::Compare {
                    range,
                    from: source(sqe, data_len, addressing, length, Exactly::This)?,
                })
            }
            nvm::Command::Flush(_) => Ok(Self::Flush {
                device: view.device,
            }),
            nvm::Command::WriteZeroes(zeroes) => {
                let range = block_range(zeroes.slba.get(), zeroes.blocks, view)?;
                check_control(zeroes.control)?;
                // NVM 3.3.8: beyond WZSL the command is aborted with Invalid Field in Command.
                if range.len_bytes() > MAX_WRITE_ZEROES_BYTES {
                    return Err(StatusCode::InvalidField.dnr());
                }
                check_writable(view)?;
                let (unmap, fua) = (zeroes.control.deac(), zeroes.control.fua());
                Ok(Self::WriteZeroes { range, unmap, fua })
            }
            nvm::Command::Verify(verify) => {
                let range = block_range(verify.slba.get(), verify.blocks, view)?;
                check_control(verify.control)?;
                // NVM 3.3.5: beyond VSL, which is MDTS here, Invalid Field in Command.
                transfer_len(&range)?;
                Ok(Self::Verify { range })
            }
            nvm::Command::DatasetManagement(dsm) => {
                if !dsm.attributes.deallocate() || !view.discard {
                    // NVM 3.3.3: the other attributes, and deallocation where it cannot be done,
                    // are advice.
                    return Ok(Self::Nothing);
                }
                check_writable(view)?;
                let length = u32::from(dsm.ranges) * DSM_RANGE_BYTES;
                // Hosts send whole pages of ranges: more than NR names is allowed.
                let from = source(sqe, data_len, addressing, length, Exactly::AtLeast)?;
                Ok(Self::Deallocate {
                    from,
                    ranges: dsm.ranges,
                    view: *view,
                })
            }
            nvm::Command::ReservationRegister(command) => {
                let (action, ignore_key) = (command.action, command.ignore_key);
                let persist = command.persist;
                let command = Reserve::Register {
                    action,
                    ignore_key,
                    persist,
                };
                reserve(sqe, data_len, addressing, command)
            }
            nvm::Command::ReservationAcquire(command) => {
                let (action, ignore_key) = (command.action, command.ignore_key);
                let rtype = command.rtype;
                let command = Reserve::Acquire {
                    action,
                    ignore_key,
                    rtype,
                };
                reserve(sqe, data_len, addressing, command)
            }
            nvm::Command::ReservationRelease(command) => {
                let (action, ignore_key) = (command.action, command.ignore_key);
                let rtype = command.rtype;
                let command = Reserve::Release {
                    action,
                    ignore_key,
                    rtype,
                };
                reserve(sqe, data_len, addressing, command)
            }
            nvm::Command::ReservationReport(report) => {
                // Base 7.8: hosts with 128-bit identifiers, as all are over Fabrics, must ask for
                // the extended form: else Host Identifier Inconsistent Format.
                if !report.extended {
                    return Err(StatusCode::HostIdInconsistentFormat.dnr());
                }
                let bytes = (u64::from(report.dwords) + 1) * 4;
                match u32::try_from(bytes) {
                    Ok(bytes) if bytes <= MAX_TRANSFER_BYTES => Ok(Self::Report { bytes }),
                    _ => Err(StatusCode::InvalidField.dnr()),
                }
            }
            nvm::Command::WriteUncorrectable(command) => {
                let range = block_range(command.slba.get(), command.blocks, view)?;
                check_control(command.control)?;
                check_writable(view)?;
                Ok(Self::WriteUncorrectable { range })
            }
            nvm::Command::Copy(copy) => {
                // NVM 3.3.2: a format that Identify's CDFS does not list is Invalid Field.
                if !matches!(copy.format, 0 | 2) {
                    return Err(StatusCode::InvalidField.dnr());
                }
                check_control(copy.control)?;
                check_writable(view)?;
                // "If the number of Source Range entries is greater than MSRC ... Command Size
                // Limit Exceeded".
                if copy.ranges > MAX_COPY_RANGES {
                    return Err(StatusCode::CommandSizeLimitExceeded.dnr());
                }
                let destination = block_range(copy.sdlba.get(), 1, view)?;
                let length = u32::from(copy.ranges) * COPY_RANGE_BYTES;
                Ok(Self::Copy {
                    from: source(sqe, data_len, addressing, length, Exactly::AtLeast)?,
                    destination,
                    ranges: copy.ranges,
                    format: copy.format,
                    fua: copy.control.fua(),
                })
            }
        }
    }
}

fn reserve(
    sqe: &Sqe,
    data_len: usize,
    addressing: Addressing,
    command: Reserve,
) -> Result<Request, Status> {
    let from = source(
        sqe,
        data_len,
        addressing,
        command.data_bytes(),
        Exactly::AtLeast,
    )?;
    Ok(Request::Reserve { command, from })
}

/// A source range of Copy, checked against the namespace it names and the limits of `view`, the
/// namespace that is copied to.
pub fn copy_source(range: &nvm::CopyRange, from: &View, view: &View) -> Result<Range, Status> {
    // NVM 3.3.2: namespaces of different formats, Incompatible Namespace or Format.
    if from.block_shift != view.block_shift {
        return Err(StatusCode::IncompatibleNamespaceOrFormat.dnr());
    }
    // Fast copy operations cannot be asked for: NVMSR and ONCS do not offer them.
    if range.sopt.get() != 0 {
        return Err(StatusCode::InvalidField.dnr());
    }
    let blocks = u32::from(range.nlb.get()) + 1;
    if blocks > MAX_COPY_BYTES >> view.block_shift {
        return Err(StatusCode::CommandSizeLimitExceeded.dnr());
    }
    block_range(range.slba.get(), blocks, from)
}

/// Where all of a Copy goes.
pub fn copy_destination(lba: u64, blocks: u32, view: &View) -> Result<Range, Status> {
    if blocks > MAX_COPY_BYTES >> view.block_shift {
        return Err(StatusCode::CommandSizeLimitExceeded.dnr());
    }
    check_writable(view)?;
    block_range(lba, blocks, view)
}

/// A range of Dataset Management, checked; `None` when it names no block.
pub fn dsm_range(range: &nvm::DsmRange, view: &View) -> Result<Option<Range>, Status> {
    match range.nlb.get() {
        0 => Ok(None),
        blocks => block_range(range.slba.get(), blocks, view).map(Some),
    }
}

/// The namespace that a command names.
#[inline]
fn nsid_of(command: &nvm::Command) -> Nsid {
    match command {
        nvm::Command::Read(command) => command.nsid,
        nvm::Command::Write(command) => command.nsid,
        nvm::Command::Flush(command) => command.nsid,
        nvm::Command::Compare(command) => command.nsid,
        nvm::Command::WriteZeroes(command) => command.nsid,
        nvm::Command::Verify(command) => command.nsid,
        nvm::Command::DatasetManagement(command) => command.nsid,
        nvm::Command::WriteUncorrectable(command) => command.nsid,
        nvm::Command::Copy(command) => command.nsid,
        nvm::Command::ReservationRegister(command) => command.nsid,
        nvm::Command::ReservationAcquire(command) => command.nsid,
        nvm::Command::ReservationRelease(command) => command.nsid,
        nvm::Command::ReservationReport(command) => command.nsid,
    }
}

/// NVM 2.1.1, 3.3.4: a range beyond the namespace is LBA Out of Range.
#[inline]
fn block_range(lba: u64, blocks: u32, view: &View) -> Result<Range, Status> {
    match lba.checked_add(u64::from(blocks)) {
        Some(end) if end <= view.block_count => Ok(Range {
            device: view.device,
            blocks,
            lba,
            block_shift: view.block_shift,
        }),
        _ => Err(StatusCode::LbaOutOfRange.dnr()),
    }
}

/// NVM 3.3.6: we have no directives and no command extensions. Protection information fields are
/// ignored, as for any namespace that is not formatted with it.
#[inline]
fn check_control(control: nvm::IoControl) -> Result<(), Status> {
    if control.dtype() == 0 && control.cetype() == 0 {
        Ok(())
    } else {
        Err(StatusCode::InvalidField.dnr())
    }
}

/// Base 5.1.13.2.1, MDTS: a longer transfer is Invalid Field in Command.
#[inline]
fn transfer_len(range: &Range) -> Result<u32, Status> {
    match u32::try_from(range.len_bytes()) {
        Ok(length) if length <= MAX_TRANSFER_BYTES => Ok(length),
        _ => Err(StatusCode::InvalidField.dnr()),
    }
}

/// Base 8.1.15: a change to a write-protected namespace is Namespace is Write Protected.
#[inline]
fn check_writable(view: &View) -> Result<(), Status> {
    if view.read_only {
        Err(StatusCode::NamespaceWriteProtected.dnr())
    } else {
        Ok(())
    }
}

/// Whether a descriptor must have the length of the data, or may have more.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Exactly {
    This,
    AtLeast,
}

impl Exactly {
    /// Base 4.3.2: too short is Data SGL Length Invalid; too long too, since SGLS bit 18 is 0.
    #[inline]
    fn check(self, actual: u32, wanted: u32) -> Result<(), Status> {
        let fits = match self {
            Self::This => actual == wanted,
            Self::AtLeast => actual >= wanted,
        };
        if fits {
            Ok(())
        } else {
            Err(StatusCode::DataSglLengthInvalid.dnr())
        }
    }
}

/// The descriptor of data that goes to the host.
#[inline]
fn remote(
    sqe: &Sqe,
    addressing: Addressing,
    length: u32,
    exactly: Exactly,
) -> Result<Remote, Status> {
    let Some((remote, actual)) = addressing.remote(sqe.sgl()?) else {
        return Err(StatusCode::SglDescriptorTypeInvalid.dnr());
    };
    exactly.check(actual, length)?;
    Ok(remote)
}

/// Where at least `length` bytes of data for an Admin or Fabrics command come from.
pub fn data_from_host(
    sqe: &Sqe,
    data_len: usize,
    addressing: Addressing,
    length: u32,
) -> Result<Source, Status> {
    source(sqe, data_len, addressing, length, Exactly::AtLeast)
}

/// Where `length` bytes of data of an Admin command go; the host may have room for more.
pub fn data_to_host(sqe: &Sqe, addressing: Addressing, length: u32) -> Result<Remote, Status> {
    remote(sqe, addressing, length, Exactly::AtLeast)
}

/// The descriptor of data that comes from the host: its memory, or an offset into the capsule.
#[inline]
fn source(
    sqe: &Sqe,
    data_len: usize,
    addressing: Addressing,
    length: u32,
    exactly: Exactly,
) -> Result<Source, Status> {
    let sgl = sqe.sgl()?;
    if let Sgl::InCapsule {
        offset,
        length: actual,
    } = sgl
    {
        exactly.check(actual, length)?;
        // Base 4.3.2: beyond the capsule's data is SGL Offset Invalid.
        return match offset.checked_add(u64::from(actual)) {
            Some(end) if end <= data_len as u64 => Ok(Source::InCapsule(offset as u32)),
            _ => Err(StatusCode::SglOffsetInvalid.dnr()),
        };
    }
    let Some((remote, actual)) = addressing.remote(sgl) else {
        return Err(StatusCode::SglDescriptorTypeInvalid.dnr());
    };
    exactly.check(actual, length)?;
    Ok(Source::Remote(remote))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flexblk_nvme::{Cid, Lba};
    use proptest::prelude::*;

    const VIEW: View = View {
        block_count: 1 << 20,
        device: 3,
        block_shift: 12,
        read_only: false,
        discard: true,
        gated: false,
    };
    const NSID: Nsid = Nsid::new(7);

    fn parse_with(view: &View, bytes: [u8; 64], data_len: usize) -> Result<Request, Status> {
        Request::parse(Sqe::cast(&bytes), data_len, Addressing::Keyed, |nsid| {
            (nsid == NSID).then_some(view)
        })
    }

    fn parse(bytes: [u8; 64], data_len: usize) -> Result<Request, Status> {
        parse_with(&VIEW, bytes, data_len)
    }

    fn keyed(length: u32) -> Sgl {
        Sgl::Keyed {
            address: 0x1000,
            length,
            key: 9,
            invalidate: false,
        }
    }

    fn in_capsule(offset: u64, length: u32) -> Sgl {
        Sgl::InCapsule { offset, length }
    }

    fn write(lba: u64, blocks: u32) -> nvm::Write {
        nvm::Write {
            nsid: NSID,
            slba: Lba::new(lba),
            blocks,
            ..Default::default()
        }
    }

    fn read(lba: u64, blocks: u32) -> nvm::Read {
        nvm::Read {
            nsid: NSID,
            slba: Lba::new(lba),
            blocks,
            ..Default::default()
        }
    }

    #[test]
    fn read_and_write_become_ranges() {
        let to = Remote {
            address: 0x1000,
            key: 9,
            invalidate: false,
        };
        let range = Range {
            device: 3,
            lba: 5,
            blocks: 2,
            block_shift: 12,
        };
        let got = parse(read(5, 2).emit(Cid::new(1), &keyed(8192)), 0);
        assert_eq!(got, Ok(Request::Read { range, to }));
        let got = parse(write(5, 2).emit(Cid::new(1), &in_capsule(0, 8192)), 8192);
        assert_eq!(
            got,
            Ok(Request::Write {
                range,
                from: Source::InCapsule(0),
                fua: false
            })
        );
        assert_eq!((range.offset_bytes(), range.len_bytes()), (20_480, 8192));
    }

    /// "If the specified LBA range extends beyond the size of the namespace, the controller shall
    /// abort with LBA Out of Range" (NVM 2.1.1).
    #[test]
    fn ranges_end_with_the_namespace() {
        let last = VIEW.block_count - 1;
        assert!(parse(read(last, 1).emit(Cid::new(1), &keyed(4096)), 0).is_ok());
        for (lba, blocks) in [
            (last, 2),
            (VIEW.block_count, 1),
            (u64::MAX, 1),
            (u64::MAX - 1, 65_536),
        ] {
            let bytes = read(lba, blocks).emit(Cid::new(1), &keyed(4096));
            assert_eq!(
                parse(bytes, 0),
                Err(StatusCode::LbaOutOfRange.dnr()),
                "{lba}+{blocks}"
            );
        }
    }

    /// "If a command is submitted that exceeds this transfer size, then the command is aborted with
    /// a status code of Invalid Field in Command" (Base, MDTS).
    #[test]
    fn transfers_are_bounded() {
        let blocks = MAX_TRANSFER_BYTES >> 12;
        assert!(
            parse(
                read(0, blocks).emit(Cid::new(1), &keyed(MAX_TRANSFER_BYTES)),
                0
            )
            .is_ok()
        );
        let longer = read(0, blocks + 1).emit(Cid::new(1), &keyed(MAX_TRANSFER_BYTES + 4096));
        assert_eq!(parse(longer, 0), Err(StatusCode::InvalidField.dnr()));
    }

    /// TCP 3.3.2: in-capsule data and the Command Data Buffer descriptor are the only ones.
    #[test]
    fn each_transport_has_descriptors_of_its_own() {
        let parse = |bytes: [u8; 64], addressing| {
            Request::parse(Sqe::cast(&bytes), 0, addressing, |_| Some(&VIEW))
        };
        let transport = Sgl::Transport { length: 4096 };
        let kind = Err(StatusCode::SglDescriptorTypeInvalid.dnr());
        let read = |sgl: &Sgl| read(0, 1).emit(Cid::new(1), sgl);
        let write = |sgl: &Sgl| write(0, 1).emit(Cid::new(1), sgl);
        let (keyed, tcp) = (Addressing::Keyed, Addressing::Transport);
        assert_eq!(parse(read(&self::keyed(4096)), tcp), kind);
        assert_eq!(parse(write(&self::keyed(4096)), tcp), kind);
        assert_eq!(parse(read(&transport), keyed), kind);
        assert!(matches!(
            parse(read(&transport), tcp),
            Ok(Request::Read {
                to: Remote::NONE,
                ..
            })
        ));
        assert!(matches!(
            parse(write(&transport), tcp),
            Ok(Request::Write {
                from: Source::Remote(Remote::NONE),
                ..
            })
        ));
        assert_eq!(
            parse(read(&Sgl::Transport { length: 4095 }), tcp),
            Err(StatusCode::DataSglLengthInvalid.dnr())
        );
    }

    #[test]
    fn descriptors_must_fit_the_command() {
        let length = Err(StatusCode::DataSglLengthInvalid.dnr());
        let kind = Err(StatusCode::SglDescriptorTypeInvalid.dnr());
        let offset = Err(StatusCode::SglOffsetInvalid.dnr());
        assert_eq!(parse(read(0, 1).emit(Cid::new(1), &keyed(4095)), 0), length);
        assert_eq!(parse(read(0, 1).emit(Cid::new(1), &keyed(8192)), 0), length);
        assert_eq!(
            parse(read(0, 1).emit(Cid::new(1), &in_capsule(0, 4096)), 4096),
            kind
        );
        assert_eq!(
            parse(
                read(0, 1).emit(Cid::new(1), &Sgl::Transport { length: 4096 }),
                0
            ),
            kind
        );
        assert_eq!(
            parse(write(0, 1).emit(Cid::new(1), &in_capsule(0, 512)), 512),
            length
        );
        assert_eq!(
            parse(write(0, 1).emit(Cid::new(1), &in_capsule(1, 4096)), 4096),
            offset
        );
        assert_eq!(
            parse(
                write(0, 1).emit(Cid::new(1), &in_capsule(u64::MAX, 4096)),
                4096
            ),
            offset
        );
        assert_eq!(
            parse(write(0, 1).emit(Cid::new(1), &in_capsule(0, 4096)), 4095),
            offset
        );
    }

    /// PSDT other than SGL, and fused operations that Identify's FUSES does not list, are Invalid
    /// Field in Command (Base 4.1.1).
    #[test]
    fn flags_must_say_sgl_and_not_fused() {
        for flags in [0x00, 0x41, 0x42, 0xC0] {
            let mut bytes = read(0, 1).emit(Cid::new(1), &keyed(4096));
            bytes[1] = flags;
            assert_eq!(
                parse(bytes, 0),
                Err(StatusCode::InvalidField.dnr()),
                "{flags:#x}"
            );
        }
    }

    #[test]
    fn unknown_namespaces_and_opcodes() {
        let other = nvm::Read {
            nsid: Nsid::BROADCAST,
            ..Default::default()
        };
        let bytes = other.emit(Cid::new(1), &keyed(4096));
        assert_eq!(
            parse(bytes, 0),
            Err(StatusCode::InvalidNamespaceOrFormat.dnr())
        );
        let mut bytes = read(0, 1).emit(Cid::new(1), &keyed(4096));
        for opcode in [0x0A, 0x7D, 0xFF] {
            bytes[0] = opcode;
            assert_eq!(
                parse(bytes, 0),
                Err(StatusCode::InvalidOpcode.dnr()),
                "{opcode:#x}"
            );
        }
    }

    /// "Namespace is Write Protected" for everything that would change a read-only namespace.
    #[test]
    fn read_only_namespaces_can_be_read() {
        let view = View {
            read_only: true,
            ..VIEW
        };
        let protected = Err(StatusCode::NamespaceWriteProtected.dnr());
        assert_eq!(
            parse_with(&view, write(0, 1).emit(Cid::new(1), &keyed(4096)), 0),
            protected
        );
        let zeroes = nvm::WriteZeroes {
            nsid: NSID,
            ..Default::default()
        };
        assert_eq!(
            parse_with(&view, zeroes.emit(Cid::new(1), &Sgl::NONE), 0),
            protected
        );
        assert!(parse_with(&view, read(0, 1).emit(Cid::new(1), &keyed(4096)), 0).is_ok());
    }

    #[test]
    fn write_zeroes_is_bounded_and_takes_no_data() {
        let zeroes = |blocks| nvm::WriteZeroes {
            nsid: NSID,
            blocks,
            ..Default::default()
        };
        let most = (MAX_WRITE_ZEROES_BYTES >> 12) as u32;
        assert!(parse(zeroes(most).emit(Cid::new(1), &Sgl::NONE), 0).is_ok());
        let more = zeroes(most + 1).emit(Cid::new(1), &Sgl::NONE);
        assert_eq!(parse(more, 0), Err(StatusCode::InvalidField.dnr()));
    }

    /// "If the total number of logical blocks ... is greater than MCL", "if a Source Range is longer
    /// than MSSRL", "if the number of Source Ranges is greater than MSRC": Command Size Limit
    /// Exceeded (NVM 3.3.2).
    #[test]
    fn copies_are_bounded() {
        let copy = |ranges, format| nvm::Copy {
            nsid: NSID,
            sdlba: Lba::new(3),
            ranges,
            format,
            prinfo_read: 0,
            control: nvm::IoControl::new(),
            dspec: 0,
            tags: nvm::Tags::default(),
        };
        let emit = |ranges: u16, format| {
            let sgl = keyed(u32::from(ranges) * COPY_RANGE_BYTES);
            parse(copy(ranges, format).emit(Cid::new(1), &sgl), 0)
        };
        assert!(emit(MAX_COPY_RANGES, 0).is_ok() && emit(1, 2).is_ok());
        assert_eq!(emit(1, 1), Err(StatusCode::InvalidField.dnr()));
        let exceeded = Err(StatusCode::CommandSizeLimitExceeded.dnr());
        assert_eq!(
            emit(MAX_COPY_RANGES + 1, 0),
            exceeded.map(|()| unreachable!())
        );

        let source = |slba: u64, blocks: u32| {
            let mut range = nvm::CopyRange::zeroed();
            range.slba = flexblk_nvme::U64::new(slba);
            range.nlb = flexblk_nvme::U16::new((blocks - 1) as u16);
            copy_source(&range, &VIEW, &VIEW)
        };
        let most = MAX_COPY_BYTES >> VIEW.block_shift;
        assert_eq!(source(0, most).map(|range| range.blocks), Ok(most));
        assert_eq!(
            source(0, most + 1),
            Err(StatusCode::CommandSizeLimitExceeded.dnr())
        );
        assert_eq!(
            source(VIEW.block_count, 1),
            Err(StatusCode::LbaOutOfRange.dnr())
        );
        let other = View {
            block_shift: 9,
            ..VIEW
        };
        let differs = copy_source(&nvm::CopyRange::zeroed(), &other, &VIEW);
        assert_eq!(
            differs,
            Err(StatusCode::IncompatibleNamespaceOrFormat.dnr())
        );
        let beyond = copy_destination(0, most + 1, &VIEW);
        assert_eq!(beyond, Err(StatusCode::CommandSizeLimitExceeded.dnr()));
        let protected = View {
            read_only: true,
            ..VIEW
        };
        assert_eq!(
            copy_destination(0, 1, &protected),
            Err(StatusCode::NamespaceWriteProtected.dnr())
        );
    }

    #[test]
    fn dataset_management_takes_a_page_for_its_ranges() {
        let dsm = nvm::DatasetManagement {
            nsid: NSID,
            ranges: 2,
            attributes: nvm::DsmAttributes::new().with_deallocate(true),
        };
        assert!(parse(dsm.emit(Cid::new(1), &keyed(4096)), 0).is_ok());
        assert!(parse(dsm.emit(Cid::new(1), &keyed(32)), 0).is_ok());
        let short = parse(dsm.emit(Cid::new(1), &keyed(31)), 0);
        assert_eq!(short, Err(StatusCode::DataSglLengthInvalid.dnr()));
        let advice = nvm::DatasetManagement {
            attributes: nvm::DsmAttributes::new(),
            ..dsm
        };
        assert_eq!(
            parse(advice.emit(Cid::new(1), &keyed(32)), 0),
            Ok(Request::Nothing)
        );
    }

    proptest! {
        /// Whatever a host sends: no panic, and what is accepted lies within the namespace, the
        /// limits and the capsule.
        #[test]
        fn accepted_requests_are_in_bounds(mut bytes: [u8; 64], opcode in 0u8..16, small: bool, data_len in 0usize..9000) {
            bytes[0] = opcode;
            bytes[1] = 0x40;
            bytes[4..8].copy_from_slice(&7u32.to_le_bytes());
            if small {
                bytes[42..48].fill(0);
                bytes[49..52].fill(0);
            }
            let inside = |range: Range| {
                range.blocks > 0 && range.lba + u64::from(range.blocks) <= VIEW.block_count
            };
            let fits = |from: Source, len: u64| match from {
                Source::InCapsule(offset) => u64::from(offset) + len <= data_len as u64,
                Source::Remote(_) => true,
            };
            if let Ok(request) = parse(bytes, data_len) {
                match request {
                    Request::Read { range, .. } | Request::Verify { range } => {
                        prop_assert!(inside(range) && range.len_bytes() <= u64::from(MAX_TRANSFER_BYTES));
                    }
                    Request::Write { range, from, .. } | Request::Compare { range, from } => {
                        prop_assert!(inside(range) && fits(from, range.len_bytes()));
                    }
                    Request::WriteZeroes { range, .. } => {
                        prop_assert!(inside(range) && range.len_bytes() <= MAX_WRITE_ZEROES_BYTES);
                    }
                    Request::Deallocate { from, ranges, .. } => {
                        prop_assert!((1..=MAX_DSM_RANGES).contains(&ranges));
                        prop_assert!(fits(from, u64::from(ranges) * 16));
                    }
                    Request::Copy { from, destination, ranges, format, .. } => {
                        prop_assert!(inside(destination) && (1..=MAX_COPY_RANGES).contains(&ranges));
                        prop_assert!(format == 0 || format == 2);
                        prop_assert!(fits(from, u64::from(ranges) * 32));
                    }
                    Request::Reserve { command, from } => {
                        prop_assert!(fits(from, command.data_bytes().into()));
                    }
                    Request::Report { bytes } => prop_assert!(bytes <= MAX_TRANSFER_BYTES),
                    Request::WriteUncorrectable { range } => prop_assert!(inside(range)),
                    Request::Flush { .. } | Request::Nothing => {}
                }
            }
        }
    }
}
