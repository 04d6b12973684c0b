//! A loop device over a file, with direct I/O: the block device of a volume where there is no ublk.
//!
//! Numbers and layouts are those of `include/uapi/linux/loop.h`.
#![allow(unsafe_code)]

use std::ffi::c_ulong;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::Error;

const CONTROL: &str = "/dev/loop-control";
const CTL_GET_FREE: c_ulong = 0x4C82;
const CLR_FD: c_ulong = 0x4C01;
const SET_CAPACITY: c_ulong = 0x4C07;
const CONFIGURE: c_ulong = 0x4C0A;

const FLAG_READ_ONLY: u32 = 1;
const FLAG_PARTSCAN: u32 = 8;
const FLAG_DIRECT_IO: u32 = 16;

/// Others may take the free device that we were told of; how often we ask again.
const ATTEMPTS: u32 = 32;
/// A device that is not used any more is let go of asynchronously.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// `struct loop_info64`.
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

const _: () = assert!(size_of::<Info>() == 232);

/// `struct loop_config`.
#[repr(C)]
struct Configuration {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Configuration>() == 304);

/// How a file becomes a block device.
#[derive(Clone, Copy, Debug)]
pub struct LoopOptions {
    /// Logical block size in bytes: a power of two from 512 to the size of a page.
    pub block_size: u32,
    /// No writes.
    pub read_only: bool,
    /// Look for partitions.
    pub partitions: bool,
}

/// A loop device that is bound to a file, until [`release`](Self::release), drop, or [`release_by_number`].
///
/// It is not open in here. The kernel writes a block device's cache back when the last one closes it: were that always
/// us, what others had written would wait in the cache for us, and be lost with us. And a process that serves the file
/// would, killed, have to write into its own file before its end, for ever.
#[derive(Debug)]
pub struct LoopDevice {
    number: u32,
    file: PathBuf,
    released: bool,
}

impl LoopDevice {
    /// Binds the first free loop device (Linux 5.8). Needs CAP_SYS_ADMIN. The file must be served by another thread.
    pub fn attach(file: &Path, options: &LoopOptions) -> Result<LoopDevice, Error> {
        let page = u32::try_from(rustix::param::page_size()).unwrap_or(4096);
        if options.block_size > page {
            return Err(Error::Address(format!(
                "blocks of {} B: a loop device takes blocks of up to {page} B (one page)",
                options.block_size
            )));
        }
        let open_file = |what, path: &Path, flags| {
            OpenOptions::new()
                .read(true)
                .write(!options.read_only)
                .custom_flags(flags)
                .open(path)
                .map_err(|cause| Error::System { what, cause })
        };
        let backing = open_file("opening the FUSE file", file, libc::O_DIRECT)?;
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open(CONTROL)
            .map_err(|cause| Error::System {
                what: "opening /dev/loop-control (is the kernel's module loop loaded?)",
                cause,
            })?;
        let mut last = io::Error::from_raw_os_error(libc::EBUSY);
        for _ in 0..ATTEMPTS {
            // SAFETY: the request has no argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), CTL_GET_FREE) };
            let Ok(number) = u32::try_from(number) else {
                let cause = io::Error::last_os_error();
                return Err(Error::System {
                    what: match cause.raw_os_error() {
                        Some(libc::EPERM) => {
                            "a loop device needs the capability CAP_SYS_ADMIN (run it as root)"
                        }
                        _ => "asking for a free loop device",
                    },
                    cause,
                });
            };
            let device = OpenOptions::new()
                .read(true)
                .write(!options.read_only)
                .open(path_of(number))
                .map_err(|cause| Error::System {
                    what: "opening the free loop device",
                    cause,
                })?;
            // What failed for whoever had this device before is told nobody who has it now.
            let _ = write_back_open(&device);
            match configure(&device, &backing, file, options) {
                Ok(()) => {
                    return Ok(LoopDevice {
                        number,
                        file: file.to_owned(),
                        released: false,
                    });
                }
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => last = error,
                Err(cause) => {
                    return Err(Error::System {
                        what: match cause.raw_os_error() {
                            Some(libc::EINVAL | libc::ENOTTY) => {
                                "LOOP_CONFIGURE with direct I/O (needs Linux 5.8)"
                            }
                            _ => "LOOP_CONFIGURE",
                        },
                        cause,
                    });
                }
            }
        }
        Err(Error::System {
            what: "others take every free loop device",
            cause: last,
        })
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Its node in `/dev`.
    pub fn path(&self) -> PathBuf {
        path_of(self.number)
    }

    /// Whether it still is: others may have released it, and bound it to another file.
    pub fn is_bound(&self) -> bool {
        // Unmounted, the file's path is that of a root.
        is_bound_to(self.number, &self.file)
            || backing_file(self.number).is_some_and(|bound| bound == Path::new("/"))
    }

    /// Lets the file go when the last user of the device has closed it. What is in the cache is written before: in
    /// another thread than those that serve the file.
    pub fn release(mut self) -> io::Result<()> {
        self.released = true;
        clear_after_last_close(self.number)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if !self.released
            && self.is_bound()
            && let Err(error) = clear_after_last_close(self.number)
        {
            tracing::error!(%error, number = self.number, "releasing a loop device");
        }
    }
}

fn configure(device: &File, backing: &File, file: &Path, options: &LoopOptions) -> io::Result<()> {
    let mut file_name = [0; 64];
    let name = file.as_os_str().as_encoded_bytes();
    for (to, from) in file_name.iter_mut().take(63).zip(name) {
        *to = *from;
    }
    let flag = |on: bool, flag: u32| if on { flag } else { 0 };
    let configuration = Configuration {
        fd: backing.as_raw_fd() as u32,
        block_size: options.block_size,
        info: Info {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: FLAG_DIRECT_IO
                | flag(options.read_only, FLAG_READ_ONLY)
                | flag(options.partitions, FLAG_PARTSCAN),
            file_name,
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    // SAFETY: the request takes the address of a loop_config, which lives across the call.
    match unsafe { libc::ioctl(device.as_raw_fd(), CONFIGURE, &raw const configuration) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn clear(device: &File) -> io::Result<()> {
    // SAFETY: the request has no argument.
    match unsafe { libc::ioctl(device.as_raw_fd(), CLR_FD) } {
        0 => Ok(()),
        _ => {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                // It is not bound to anything.
                Some(libc::ENXIO) => Ok(()),
                _ => Err(error),
            }
        }
    }
}

/// The kernel fails every request from `LOOP_CLR_FD` on when the device is open once, and with that what is in its cache.
/// Open twice, it is let go by the last close instead, which writes the cache before.
fn clear_after_last_close(number: u32) -> io::Result<()> {
    let device = File::open(path_of(number))?;
    let _second = File::open(path_of(number))?;
    clear(&device)
}

/// Takes the size of the file over (`LOOP_SET_CAPACITY`). In another thread than those that serve the file: opening and
/// closing a block device may wait for its I/O.
pub fn follow_size(number: u32) -> Result<(), Error> {
    let failed = |cause| Error::System {
        what: "LOOP_SET_CAPACITY",
        cause,
    };
    let device = File::open(path_of(number)).map_err(failed)?;
    // SAFETY: the request's argument is not used.
    match unsafe { libc::ioctl(device.as_raw_fd(), SET_CAPACITY, 0) } {
        0 => Ok(()),
        _ => Err(failed(io::Error::last_os_error())),
    }
}

/// Writes what is in the cache of a block device to the device. What was being written when somebody else closed it is
/// waited for, too. An error may be one of earlier that nobody has been told of.
pub fn write_back(device: &Path) -> io::Result<()> {
    write_back_open(&File::open(device)?)
}

fn write_back_open(device: &File) -> io::Result<()> {
    let all = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // Not fsync(2): that asks the device for a flush, too, with nothing to write as well.
    // SAFETY: the call takes no memory.
    match unsafe { libc::sync_file_range(device.as_raw_fd(), 0, 0, all) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The node of a loop device.
pub fn path_of(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

/// The file that a loop device is bound to, as the kernel tells it.
pub fn backing_file(number: u32) -> Option<PathBuf> {
    let attribute = format!("/sys/block/loop{number}/loop/backing_file");
    let text = fs::read_to_string(attribute).ok()?;
    Some(PathBuf::from(text.trim_end_matches('\n')))
}

/// Whether it is bound to `file`. The kernel adds " (deleted)" when the path does not lead to the file any more.
fn is_bound_to(number: u32, file: &Path) -> bool {
    backing_file(number).is_some_and(|bound| {
        bound
            .to_string_lossy()
            .starts_with(&*file.to_string_lossy())
    })
}

/// The loop devices that are bound to files below `directory`.
pub fn bound_below(directory: &Path) -> Vec<u32> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    devices
        .filter_map(|device| {
            let name = device.file_name();
            let number = name.to_str()?.strip_prefix("loop")?.parse().ok()?;
            backing_file(number)?
                .starts_with(directory)
                .then_some(number)
        })
        .collect()
}

/// Lets the file go of a device whose process has gone, at once: nobody answers what is in the cache.
pub fn release_by_number(number: u32) -> io::Result<()> {
    match File::open(path_of(number)) {
        Ok(device) => clear(&device),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENOENT)) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Waits until a device is bound to `file` no more; false when it still is at `deadline`.
pub fn wait_released(number: u32, file: &Path, deadline: Instant) -> bool {
    loop {
        if !is_bound_to(number, file) {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_longer_than_a_page_are_refused() {
        let options = LoopOptions {
            block_size: 1 << 20,
            read_only: false,
            partitions: false,
        };
        let refused = LoopDevice::attach(Path::new("/nonexistent"), &options).unwrap_err();
        assert!(refused.to_string().contains("up to"), "{refused}");
    }
}
