//! What a request asks for (proto, "Request types", "Command flags").

use super::{Broken, Errno, Export, MAX_PAYLOAD_BYTES, RequestHeader, Style};
use crate::export::{Extent, Geometry, Refusal, Wanted};
use crate::{MaxBlocks, Op};

const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const CMD_CACHE: u16 = 5;
const CMD_WRITE_ZEROES: u16 = 6;

const FLAG_FUA: u16 = 1 << 0;
const FLAG_NO_HOLE: u16 = 1 << 1;
const FLAG_DF: u16 = 1 << 2;
const FLAG_FAST_ZERO: u16 = 1 << 4;
const FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// An export as one client has negotiated it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// How the client speaks.
    pub style: Style,
    export: Export,
    geometry: Geometry,
}

/// What to do about a request.
#[derive(Clone, Copy, Debug)]
pub enum Command {
    /// I/O on the volume.
    Io(Io),
    /// Nothing; the answer is success.
    Nothing,
    /// The answer is an error. So many bytes of payload follow the header and are thrown away first.
    Refuse {
        /// Which one.
        errno: Errno,
        /// Why.
        text: &'static str,
        /// Bytes to be skipped.
        payload_bytes: u32,
    },
    /// The client is done; what is under way is answered, then the connection ends.
    Disconnect,
}

/// I/O on the volume.
#[derive(Clone, Copy, Debug)]
pub struct Io {
    pub(crate) wanted: Wanted,
    /// Bytes of data, to or from the client; 0 when there are none.
    pub data_bytes: u32,
    /// The data comes from the client, behind the header.
    pub is_write: bool,
}

impl Session {
    pub(super) fn new(export: Export, style: Style) -> Session {
        let geometry = Geometry {
            block_bytes: export.block_bytes,
            len_bytes: export.len_bytes,
            max_transfer_bytes: MAX_PAYLOAD_BYTES,
            max_without_data: MaxBlocks::EXPRESSIBLE,
        };
        Session {
            style,
            export,
            geometry,
        }
    }

    /// What the request asks for.
    ///
    /// # Errors
    /// [`Broken`] when what follows the header in the stream cannot be known or is too long.
    #[inline]
    pub fn command(&self, header: &RequestHeader) -> Result<Command, Broken> {
        // With extended headers, proto has a flag for it; qemu sends writes without.
        let carries_payload = header.kind == CMD_WRITE
            || (self.style == Style::Extended && header.flags & FLAG_PAYLOAD_LEN != 0);
        let mut payload_bytes = 0;
        if carries_payload {
            payload_bytes = u32::try_from(header.len_bytes)
                .ok()
                .filter(|len| *len <= MAX_PAYLOAD_BYTES)
                .ok_or(Broken::Length(header.len_bytes))?;
        }
        let refuse = |errno, text| {
            Ok(Command::Refuse {
                errno,
                text,
                payload_bytes,
            })
        };
        let offered = match header.kind {
            CMD_READ | CMD_WRITE | CMD_FLUSH => true,
            CMD_DISC => return Ok(Command::Disconnect),
            CMD_TRIM => self.export.trim,
            CMD_CACHE => self.export.cache,
            CMD_WRITE_ZEROES => self.export.write_zeroes,
            _ => false,
        };
        if !offered {
            return refuse(Errno::Inval, "no such request here");
        }
        let flags = match header.kind {
            CMD_READ if self.style >= Style::Structured => FLAG_FUA | FLAG_DF,
            CMD_WRITE if self.style == Style::Extended => FLAG_FUA | FLAG_PAYLOAD_LEN,
            CMD_WRITE_ZEROES => FLAG_FUA | FLAG_NO_HOLE | FLAG_FAST_ZERO,
            // proto: FUA means nothing for the others, and is no error.
            _ => FLAG_FUA,
        };
        if header.flags & !flags != 0 {
            return refuse(Errno::Inval, "a flag that this request does not have");
        }
        if self.export.read_only && matches!(header.kind, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES) {
            return refuse(Errno::Perm, "the export is read-only");
        }
        let fua = header.flags & FLAG_FUA != 0;
        if header.kind == CMD_FLUSH {
            let nowhere = Extent { lba: 0, blocks: 0 };
            return Ok(io(Op::Flush, nowhere, false));
        }
        let extent = match self.geometry.extent(header.offset, header.len_bytes) {
            Ok(extent) => extent,
            Err(Refusal::OutOfRange)
                if header.kind == CMD_WRITE || header.kind == CMD_WRITE_ZEROES =>
            {
                return refuse(Errno::NoSpc, "beyond the end of the export");
            }
            Err(Refusal::OutOfRange) => {
                return refuse(Errno::Inval, "beyond the end of the export");
            }
            Err(Refusal::Unaligned) => {
                return refuse(Errno::Inval, "not a multiple of the minimum block size");
            }
        };
        if extent.blocks == 0 {
            return Ok(Command::Nothing);
        }
        Ok(match header.kind {
            CMD_READ => {
                let Some(len) = u32::try_from(header.len_bytes)
                    .ok()
                    .filter(|len| *len <= MAX_PAYLOAD_BYTES)
                else {
                    return refuse(Errno::Inval, "more than the maximum block size");
                };
                with_data(Op::Read, extent, len, false)
            }
            CMD_WRITE => with_data(Op::Write { fua }, extent, payload_bytes, true),
            CMD_TRIM => io(Op::Discard, extent, fua),
            // The target reads and checks the blocks: what it keeps in its cache is there afterwards.
            CMD_CACHE => io(Op::Verify, extent, false),
            _ => {
                let deallocate = header.flags & FLAG_NO_HOLE == 0;
                io(Op::WriteZeroes { deallocate }, extent, fua)
            }
        })
    }
}

fn io(op: Op, extent: Extent, then_flush: bool) -> Command {
    Command::Io(Io {
        wanted: Wanted {
            op,
            extent,
            then_flush,
        },
        data_bytes: 0,
        is_write: false,
    })
}

fn with_data(op: Op, extent: Extent, data_bytes: u32, is_write: bool) -> Command {
    Command::Io(Io {
        wanted: Wanted {
            op,
            extent,
            then_flush: false,
        },
        data_bytes,
        is_write,
    })
}

impl Io {
    /// For a place that is not used yet.
    pub(crate) fn nothing() -> Io {
        Io {
            wanted: Wanted {
                op: Op::Flush,
                extent: Extent { lba: 0, blocks: 0 },
                then_flush: false,
            },
            data_bytes: 0,
            is_write: false,
        }
    }
}
