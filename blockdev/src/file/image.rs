//! Opening, locking and looking at an image, before any I/O.

use std::{
    os::{
        fd::{AsFd, OwnedFd},
        linux::fs::MetadataExt,
        unix::fs::FileTypeExt,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::{
        AtFlags, FallocateFlags, FlockOperation, Mode, OFlags, SeekFrom, StatxFlags, fallocate,
        fcntl_getfl, fcntl_setfl, flock, open as open_fd, seek, statx,
    },
    io::Errno,
};
use uuid::Uuid;

use crate::{Error, identity};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Node {
    RegularFile,
    BlockDevice,
}

/// What direct I/O asks for, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of addresses.
    pub(super) memory: u32,
    /// Of offsets and lengths; divides the block size.
    pub(super) offset: u32,
}

/// An open, locked image.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) file: OwnedFd,
    pub(super) path: PathBuf,
    pub(super) node: Node,
    /// `st_rdev` of a block device, for sysfs.
    device: u64,
    preferred_io_bytes: u64,
}

/// How long to wait for a lock. The kernel gives back the files of a killed process only when its
/// io_uring is torn down, a moment after the process is gone: a target restarted at once must not
/// trip over its predecessor. On block devices udev also takes the lock for a look now and then.
const LOCK_WAIT: Duration = Duration::from_millis(1000);
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Bounce buffers are pages; more than that no known device asks for.
const PAGE_BYTES: u32 = 4096;

/// `shared`: with others who write, too.
pub(super) fn open(path: &Path, read_only: bool, shared: bool) -> Result<Image, Error> {
    let failed = |action| move |errno: Errno| explain(path, read_only, action, errno);
    let metadata = std::fs::metadata(path).map_err(|error| {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
        explain(path, read_only, "looking at it", errno)
    })?;
    let kind = metadata.file_type();
    let node = if kind.is_file() {
        Node::RegularFile
    } else if kind.is_block_device() {
        Node::BlockDevice
    } else {
        return Err(Error::NotAnImage {
            path: path.to_owned(),
        });
    };
    let mut flags = OFlags::CLOEXEC
        | if read_only {
            OFlags::RDONLY
        } else {
            OFlags::RDWR
        };
    if node == Node::BlockDevice && !read_only && !shared {
        flags |= OFlags::EXCL; // without CREATE: refuse one that is mounted or held by another driver
    }
    let deadline = Instant::now() + LOCK_WAIT;
    let file = retry(deadline, Errno::BUSY, || {
        open_fd(path, flags, Mode::empty())
    })
    .map_err(failed("opening"))?;
    let lock = if read_only || shared {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    retry(deadline, Errno::WOULDBLOCK, || flock(&file, lock)).map_err(failed("locking"))?;
    let image = Image {
        file,
        path: path.to_owned(),
        node,
        device: metadata.st_rdev(),
        preferred_io_bytes: metadata.st_blksize(),
    };
    // a write-protected device can be opened for writing; only the writes would fail
    if node == Node::BlockDevice && !read_only && image.device_number("ro") == Some(1) {
        return Err(explain(path, read_only, "opening", Errno::ROFS));
    }
    Ok(image)
}

/// The size of a file or block device.
pub(super) fn size_bytes(file: &OwnedFd, path: &Path) -> Result<u64, Error> {
    // the end is what both kinds agree on; the file's position is used by nobody
    seek(file, SeekFrom::End(0)).map_err(|errno| Error::System {
        path: path.to_owned(),
        action: "finding its size",
        source: errno.into(),
    })
}

fn retry<T>(
    deadline: Instant,
    on: Errno,
    mut attempt: impl FnMut() -> Result<T, Errno>,
) -> Result<T, Errno> {
    loop {
        match attempt() {
            Err(errno) if errno == Errno::INTR => {}
            Err(errno) if errno == on && Instant::now() < deadline => {
                std::thread::sleep(LOCK_PAUSE)
            }
            other => return other,
        }
    }
}

fn explain(path: &Path, read_only: bool, action: &'static str, errno: Errno) -> Error {
    let path = path.to_owned();
    match errno {
        Errno::NOENT | Errno::NOTDIR | Errno::NODEV | Errno::NXIO => Error::Missing { path },
        Errno::ACCESS | Errno::PERM | Errno::ROFS => Error::Permission { path, read_only },
        Errno::BUSY | Errno::WOULDBLOCK | Errno::TXTBSY => Error::InUse { path },
        _ => Error::System {
            path,
            action,
            source: errno.into(),
        },
    }
}

impl Image {
    pub(super) fn size_bytes(&self) -> Result<u64, Error> {
        size_bytes(&self.file, &self.path)
    }

    /// The block size to use: the one asked for, if it is possible.
    pub(super) fn block_size(&self, wanted: Option<u32>) -> Result<u32, Error> {
        let device_block_size = match self.node {
            Node::RegularFile => 512,
            Node::BlockDevice => {
                rustix::fs::ioctl_blksszget(&self.file).map_err(|errno| Error::System {
                    path: self.path.clone(),
                    action: "asking for its block size",
                    source: errno.into(),
                })?
            }
        };
        let block_size = wanted.unwrap_or(device_block_size);
        crate::config::check_block_size(&self.path.display().to_string(), block_size)?;
        if block_size < device_block_size {
            return Err(Error::BlockSizeTooSmall {
                path: self.path.clone(),
                block_size,
                device_block_size,
            });
        }
        Ok(block_size)
    }

    /// Switches to direct I/O if `block_size` suits it; otherwise says why not, and nothing changes.
    pub(super) fn enable_direct(&self, block_size: u32) -> Result<Alignment, &'static str> {
        let alignment = self.direct_alignment()?;
        if !alignment.offset.is_power_of_two() || !block_size.is_multiple_of(alignment.offset) {
            return Err("the file system or device asks for larger blocks; try block_size = 4096");
        }
        if !alignment.memory.is_power_of_two() || alignment.memory > PAGE_BYTES {
            return Err("the device asks for memory aligned to more than a page");
        }
        // a flag of the open file, so that there is only one to lock; EINVAL where it is not possible
        let flags = fcntl_getfl(&self.file).map_err(|_| "its open flags cannot be read")?;
        fcntl_setfl(&self.file, flags | OFlags::DIRECT)
            .map_err(|_| "the file system does not support it")?;
        Ok(alignment)
    }

    fn direct_alignment(&self) -> Result<Alignment, &'static str> {
        // STATX_DIOALIGN: Linux 6.1; a file system that cannot do direct I/O gives zeroes
        let known = statx(&self.file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
        let known = known.filter(|stat| stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
        match known {
            Some(stat) if stat.stx_dio_mem_align == 0 || stat.stx_dio_offset_align == 0 => {
                Err("the file system does not support it for this file")
            }
            Some(stat) => Ok(Alignment {
                memory: stat.stx_dio_mem_align,
                offset: stat.stx_dio_offset_align,
            }),
            None if self.node == Node::BlockDevice => {
                // its logical block size is always enough
                let size = rustix::fs::ioctl_blksszget(&self.file)
                    .map_err(|_| "its block size cannot be read")?;
                Ok(Alignment {
                    memory: size,
                    offset: size,
                })
            }
            None => Err("the file system does not say what it needs (statx DIOALIGN)"),
        }
    }

    /// Whether holes can be punched. For a file it is tried out behind its end, where there is
    /// nothing; for a block device the kernel passes a punch on as "write zeroes, may unmap".
    pub(super) fn can_punch(&self, size_bytes: u64, block_size: u32) -> bool {
        match self.node {
            Node::RegularFile => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let behind = size_bytes.next_multiple_of(u64::from(PAGE_BYTES));
                fallocate(self.file.as_fd(), flags, behind, u64::from(block_size)).is_ok()
            }
            Node::BlockDevice => {
                self.queue_limit("write_zeroes_max_bytes") > 0
                    && self.queue_limit("discard_max_bytes") > 0
            }
        }
    }

    pub(super) fn optimal_io_bytes(&self) -> u32 {
        let bytes = match self.node {
            Node::RegularFile => self.preferred_io_bytes,
            Node::BlockDevice => self
                .queue_limit("optimal_io_size")
                .max(u64::from(PAGE_BYTES)),
        };
        u32::try_from(bytes)
            .ok()
            .filter(|bytes| bytes.is_power_of_two())
            .unwrap_or(PAGE_BYTES)
    }

    /// The same at each start: of this machine and the image's real path.
    pub(super) fn identity(&self) -> Uuid {
        let path = self
            .path
            .canonicalize()
            .unwrap_or_else(|_| self.path.clone());
        identity::derived(&[&identity::machine_id(), path.as_os_str().as_encoded_bytes()])
    }

    /// A limit of a block device's queue, which a partition shares with its disk; 0 if unknown.
    fn queue_limit(&self, name: &str) -> u64 {
        let of = |dir: &str| self.device_number(&format!("{dir}/{name}"));
        of("queue").or_else(|| of("../queue")).unwrap_or(0)
    }

    /// A number the kernel shows about a block device, by its path below `/sys/dev/block/M:m`.
    fn device_number(&self, name: &str) -> Option<u64> {
        let (major, minor) = (
            rustix::fs::major(self.device),
            rustix::fs::minor(self.device),
        );
        let path = format!("/sys/dev/block/{major}:{minor}/{name}");
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_errors_become_advice() {
        let path = Path::new("/images/disk.img");
        let text = |read_only, errno| explain(path, read_only, "opening", errno).to_string();
        assert_eq!(
            text(false, Errno::ACCESS),
            "/images/disk.img: permission denied for reading and writing (readonly = true asks for less)"
        );
        assert_eq!(
            text(true, Errno::ACCESS),
            "/images/disk.img: permission denied for reading"
        );
        assert!(text(false, Errno::NOENT).contains("no such file or device"));
        assert!(text(false, Errno::BUSY).contains("in use"));
        assert!(
            text(false, Errno::MFILE).starts_with("/images/disk.img: opening: Too many open files")
        );
    }
}
