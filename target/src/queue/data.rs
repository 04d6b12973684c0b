//! Where a command's data is: in its capsule, or in memory of the host that a descriptor names.

use flexblk_nvme::command::Sqe;
use flexblk_nvme::{Sgl, Status, StatusCode};

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

/// Whether a descriptor must have the length of the data, or may have more.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Exactly {
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
pub(super) fn remote(
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
pub fn from_host(
    sqe: &Sqe,
    data_len: usize,
    addressing: Addressing,
    length: u32,
) -> Result<Source, Status> {
    source(sqe, data_len, addressing, length, Exactly::AtLeast)
}

/// Where `length` bytes of data of an Admin command go; the host may have room for more.
pub fn to_host(sqe: &Sqe, addressing: Addressing, length: u32) -> Result<Remote, Status> {
    remote(sqe, addressing, length, Exactly::AtLeast)
}

/// The descriptor of data that comes from the host: its memory, or an offset into the capsule.
#[inline]
pub(super) fn source(
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
