//! Mounting, by mount(2) itself, and the first words with the kernel.
#![allow(unsafe_code)]

use std::ffi::{CString, c_ulong};
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, fcntl_setfl};

use super::wire::{INIT_LEN, Init, Limits};
use crate::Error;

const DEVICE: &str = "/dev/fuse";
/// Where the kernel shows FUSE connections.
const CONNECTIONS: &str = "/sys/fs/fuse/connections";
/// `FUSE_DEV_IOC_CLONE`: `_IOR(229, 0, uint32_t)`.
const CLONE: c_ulong = 0x8004_e500;

/// A mounted FUSE file system.
#[derive(Debug)]
pub(super) struct Mount {
    path: PathBuf,
    connection: u32,
}

impl Mount {
    /// Mounts on the file `path` and settles the protocol. The descriptor does not block.
    pub(super) fn new(
        path: &Path,
        limits: &Limits,
        read_only: bool,
    ) -> Result<(Mount, OwnedFd), Error> {
        let mut device = open_device()?;
        let options = format!(
            "fd={},rootmode=100000,user_id=0,group_id=0,max_read={}",
            device.as_raw_fd(),
            limits.max_write
        );
        mount(path, &options, read_only)?;
        // From here on the drop of `mounted` unmounts.
        let mut mounted = Mount {
            path: path.to_owned(),
            connection: 0,
        };
        let failed = |cause| Error::System {
            what: "the first words with the kernel's FUSE",
            cause,
        };
        // The kernel takes no reader whose buffer could not hold any request that there may be before it is told more.
        let mut message = [0; 8192 + INIT_LEN];
        let len = device.read(&mut message).map_err(failed)?;
        let init = Init::parse(message.get(..len).unwrap_or_default())
            .map_err(|error| Error::Transport(error.to_string()))?;
        device.write_all(&init.reply(limits)).map_err(failed)?;
        fcntl_setfl(&device, OFlags::NONBLOCK | OFlags::RDWR)
            .map_err(|errno| failed(errno.into()))?;
        mounted.connection = connection_of(path)?;
        Ok((mounted, device.into()))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn connection(&self) -> u32 {
        self.connection
    }
}

/// Takes the file system on `path` out of sight, whoever serves it; it is gone when its last user has closed it.
pub fn unmount(path: &Path) -> Result<(), Error> {
    let path = c_path(path)?;
    // SAFETY: a NUL-terminated string that lives across the call.
    let done = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) };
    match done {
        0 => Ok(()),
        _ => Err(Error::System {
            what: "unmounting",
            cause: std::io::Error::last_os_error(),
        }),
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // EINVAL: it is not mounted any more.
        let _ = unmount(&self.path);
    }
}

fn open_device() -> Result<File, Error> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(DEVICE)
        .map_err(|cause| Error::System {
            what: "opening /dev/fuse (is the kernel's module fuse loaded?)",
            cause,
        })
}

/// One more descriptor of the connection: its requests are read, and answered, apart from the others'.
pub(super) fn clone_device(device: &OwnedFd) -> Result<OwnedFd, Error> {
    let clone = open_device()?;
    let source = device.as_raw_fd() as u32;
    // SAFETY: the request takes the address of a u32, which lives across the call.
    let done = unsafe { libc::ioctl(clone.as_raw_fd(), CLONE, &raw const source) };
    if done != 0 {
        return Err(Error::System {
            what: "cloning /dev/fuse",
            cause: std::io::Error::last_os_error(),
        });
    }
    fcntl_setfl(&clone, OFlags::NONBLOCK | OFlags::RDWR).map_err(|errno| Error::System {
        what: "cloning /dev/fuse",
        cause: errno.into(),
    })?;
    Ok(clone.into())
}

fn mount(path: &Path, options: &str, read_only: bool) -> Result<(), Error> {
    let (target, options) = (c_path(path)?, c_string(options)?);
    let mut flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC | libc::MS_NOATIME;
    if read_only {
        flags |= libc::MS_RDONLY;
    }
    // SAFETY: NUL-terminated strings that live across the call.
    let done = unsafe {
        libc::mount(
            c"flexblk".as_ptr(),
            target.as_ptr(),
            c"fuse.flexblk".as_ptr(),
            flags,
            options.as_ptr().cast(),
        )
    };
    if done == 0 {
        return Ok(());
    }
    let cause = std::io::Error::last_os_error();
    Err(Error::System {
        what: match cause.raw_os_error() {
            Some(libc::EPERM) => {
                "mounting FUSE needs the capability CAP_SYS_ADMIN (run it as root)"
            }
            Some(libc::ENODEV) => "mounting FUSE (the kernel has no FUSE: load its module fuse)",
            _ => "mounting FUSE",
        },
        cause,
    })
}

/// The number under which the kernel shows the connection: that of its anonymous device.
fn connection_of(path: &Path) -> Result<u32, Error> {
    let failed = |cause| Error::System {
        what: "reading /proc/self/mountinfo",
        cause,
    };
    // Not by stat(2) on the file: that would ask us, and nobody answers yet.
    let text = fs::read_to_string("/proc/self/mountinfo").map_err(failed)?;
    let wanted = path.to_string_lossy();
    text.lines()
        .rev()
        .find_map(|line| {
            let mut words = line.split(' ').skip(2);
            let device = words.next()?;
            let place = words.nth(1)?;
            (place == wanted).then(|| device.strip_prefix("0:")?.parse().ok())?
        })
        .ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))
}

/// Ends a FUSE connection, whatever its server is doing: all requests end with an error, now and from now on. A
/// connection that is gone already is no error.
pub fn abort_connection(connection: u32) -> std::io::Result<()> {
    let control = Path::new(CONNECTIONS);
    // Empty: there is no connection, or nobody has mounted the control file system (systemd does).
    let mounted = fs::read_dir(control)?.next().is_none() && mount_control();
    let aborted = fs::write(control.join(connection.to_string()).join("abort"), "1");
    if mounted {
        let _ = unmount(control);
    }
    match aborted {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

fn mount_control() -> bool {
    // SAFETY: NUL-terminated strings.
    let done = unsafe {
        libc::mount(
            c"none".as_ptr(),
            c"/sys/fs/fuse/connections".as_ptr(),
            c"fusectl".as_ptr(),
            libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
            std::ptr::null(),
        )
    };
    done == 0
}

fn c_path(path: &Path) -> Result<CString, Error> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::Address(format!("{}: not a path", path.display())))
}

fn c_string(text: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|_| Error::Address(text.to_owned()))
}
