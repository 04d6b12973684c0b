//! From a command capsule to a request that can be carried out, or the status that says why not.
//!
//! No I/O, no allocation: a namespace is what [`View`] says, data is where [`Source`] or [`Remote`]
//! say. The checks stand in the order in which the specification's figures list the fields.

use flexblk_nvme::command::{Sqe, nvm};
use flexblk_nvme::{Nsid, Status, StatusCode};

use super::data::{Addressing, Exactly, Remote, Source, remote, source};

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

#[cfg(test)]
mod tests;
