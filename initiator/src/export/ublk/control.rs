//! `/dev/ublk-control`: making, starting, stopping and taking over devices.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flexblk_reactor::CommandRing;
use zerocopy::{FromZeros, IntoBytes};

use super::abi::{Command, ControlCommand, DeviceInfo, NO_QUEUE, Parameters, feature};

const CONTROL: &str = "/dev/ublk-control";

/// Why there is no ublk, or a command failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UblkError {
    /// The kernel has no driver, or it is not loaded.
    #[error(
        "this kernel has no ublk, or its module is not loaded: {CONTROL} is not there (`modprobe ublk_drv`)"
    )]
    Absent,
    /// We may not.
    #[error("{CONTROL} can only be used with CAP_SYS_ADMIN (as root)")]
    Permission,
    /// The kernel's io_uring is too old, or not to be used.
    #[error("ublk needs io_uring with commands to drivers (Linux 5.19): {0}")]
    Ring(flexblk_reactor::Error),
    /// The driver refused.
    #[error("{what}: {source}")]
    Command {
        /// What we asked for.
        what: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// A device's node does not appear.
    #[error("{}: {source}", .path.display())]
    Node {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The device is not of this namespace.
    #[error("ublk device {0} is not of this namespace, or not of flexblk")]
    Foreign(u32),
    /// The device is served by a process that lives.
    #[error("ublk device {0} is served by process {1}")]
    Served(u32, i32),
    /// The kernel does not let go of a device in time.
    #[error("the kernel still holds ublk device {0}")]
    Held(u32),
    /// The namespace can't be a block device.
    #[error("a namespace with blocks of {0} bytes cannot be a block device: 512 to 4096 can")]
    BlockSize(u32),
    /// The kernel cannot change a device's size.
    #[error(
        "this kernel does not change the size of ublk devices (Linux 6.16 does): detach it and attach it again"
    )]
    FixedSize,
    /// Serving it.
    #[error(transparent)]
    Volume(#[from] crate::Error),
}

/// The driver.
#[derive(Debug)]
pub(crate) struct Control {
    file: File,
    ring: CommandRing,
    features: u64,
}

impl Control {
    /// Opens it and asks what it can do.
    pub(crate) fn open() -> Result<Control, UblkError> {
        let opened = File::options().read(true).write(true).open(CONTROL);
        let file = opened.map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => UblkError::Permission,
            _ => UblkError::Absent,
        })?;
        let mut control = Control {
            file,
            ring: CommandRing::new().map_err(UblkError::Ring)?,
            features: feature::CMD_IOCTL_ENCODE,
        };
        let mut features = 0_u64;
        // Since Linux 6.5; before, the driver says that it does not know the command.
        control.features = match control.run(Command::GetFeatures, 0, 0, features.as_mut_bytes()) {
            Ok(_) => features,
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                return Err(UblkError::Permission);
            }
            Err(_) => 0,
        };
        tracing::debug!(features = format!("{:#x}", control.features), "ublk");
        Ok(control)
    }

    /// UBLK_F_* of the driver; 0 when it is too old to say.
    pub(crate) fn features(&self) -> u64 {
        self.features
    }

    /// Whether commands are numbered as ioctls are.
    pub(crate) fn ioctl_encoded(&self) -> bool {
        self.features & feature::CMD_IOCTL_ENCODE != 0
    }

    pub(crate) fn add(&mut self, info: &mut DeviceInfo) -> Result<(), UblkError> {
        let dev_id = info.dev_id;
        self.run(Command::AddDev, dev_id, 0, info.as_mut_bytes())
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => UblkError::Permission,
                _ => failed("adding a ublk device")(error),
            })?;
        Ok(())
    }

    pub(crate) fn set_parameters(
        &mut self,
        dev_id: u32,
        parameters: &Parameters,
    ) -> Result<(), UblkError> {
        let mut parameters = *parameters;
        self.run(Command::SetParams, dev_id, 0, parameters.as_mut_bytes())
            .map_err(failed("setting the parameters of a ublk device"))?;
        Ok(())
    }

    pub(crate) fn parameters(&mut self, dev_id: u32) -> Result<Parameters, UblkError> {
        let mut parameters = Parameters {
            len: size_of::<Parameters>() as u32,
            ..Parameters::default()
        };
        self.run(Command::GetParams, dev_id, 0, parameters.as_mut_bytes())
            .map_err(failed("asking for the parameters of a ublk device"))?;
        Ok(parameters)
    }

    pub(crate) fn info(&mut self, dev_id: u32) -> Result<DeviceInfo, UblkError> {
        let mut info = DeviceInfo::new_zeroed();
        self.run(Command::GetDevInfo, dev_id, 0, info.as_mut_bytes())
            .map_err(failed("asking for a ublk device"))?;
        Ok(info)
    }

    /// Returns when every queue is served and the block device is there.
    pub(crate) fn start(&mut self, dev_id: u32) -> Result<(), UblkError> {
        let pid = u64::from(std::process::id());
        self.run(Command::StartDev, dev_id, pid, &mut [])
            .map_err(failed("starting a ublk device"))?;
        Ok(())
    }

    /// Returns when no request is under way any more.
    pub(crate) fn stop(&mut self, dev_id: u32) -> Result<(), UblkError> {
        self.run(Command::StopDev, dev_id, 0, &mut [])
            .map_err(failed("stopping a ublk device"))?;
        Ok(())
    }

    /// Does not wait for who still has it open, where the kernel can do that (Linux 6.9).
    pub(crate) fn delete(&mut self, dev_id: u32) -> Result<(), UblkError> {
        let deleted = match self.run(Command::DelDevAsync, dev_id, 0, &mut []) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) => {
                self.run(Command::DelDev, dev_id, 0, &mut [])
            }
            other => other,
        };
        deleted.map_err(failed("deleting a ublk device"))?;
        Ok(())
    }

    /// The device whose server has died is to get another one; false: it has not died within `limit`.
    pub(crate) fn start_recovery(
        &mut self,
        dev_id: u32,
        limit: Duration,
    ) -> Result<bool, UblkError> {
        let deadline = Instant::now() + limit;
        loop {
            // EBUSY as long as the kernel has not noticed the end of the old one.
            match self.run(Command::StartUserRecovery, dev_id, 0, &mut []) {
                Ok(_) => return Ok(true),
                Err(error) if error.raw_os_error() != Some(libc::EBUSY) => {
                    return Err(failed("taking over a ublk device")(error));
                }
                Err(_) if Instant::now() >= deadline => return Ok(false),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Every queue has its new server.
    pub(crate) fn end_recovery(&mut self, dev_id: u32) -> Result<(), UblkError> {
        let pid = u64::from(std::process::id());
        self.run(Command::EndUserRecovery, dev_id, pid, &mut [])
            .map_err(failed("taking over a ublk device"))?;
        Ok(())
    }

    /// The size in sectors from now on.
    pub(crate) fn update_size(&mut self, dev_id: u32, sectors: u64) -> Result<(), UblkError> {
        if self.features & feature::UPDATE_SIZE == 0 {
            return Err(UblkError::FixedSize);
        }
        self.run(Command::UpdateSize, dev_id, sectors, &mut [])
            .map_err(failed("changing the size of a ublk device"))?;
        Ok(())
    }

    fn run(
        &mut self,
        command: Command,
        dev_id: u32,
        data: u64,
        buffer: &mut [u8],
    ) -> io::Result<i32> {
        let code = command.code(self.ioctl_encoded());
        let command = ControlCommand {
            dev_id,
            queue_id: NO_QUEUE,
            len: buffer.len() as u16,
            addr: if buffer.is_empty() {
                0
            } else {
                buffer.as_mut_ptr() as u64
            },
            data,
            ..ControlCommand::default()
        };
        let mut bytes = [0; 80];
        let (front, _) = bytes.split_at_mut(size_of::<ControlCommand>());
        front.copy_from_slice(command.as_bytes());
        // SAFETY: the command names `buffer` with its length, writable and ours until `run` returns.
        unsafe { self.ring.run(self.file.as_fd(), code, bytes) }
    }
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> UblkError {
    move |source| UblkError::Command { what, source }
}

/// Opens `/dev/ublkcN`, which may take a moment to appear.
pub(crate) fn open_node(dev_id: u32, limit: Duration) -> Result<File, UblkError> {
    let path = PathBuf::from(format!("/dev/ublkc{dev_id}"));
    let deadline = Instant::now() + limit;
    loop {
        match File::options().read(true).write(true).open(&path) {
            Ok(file) => return Ok(file),
            Err(error) if is_early(&error) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(source) => return Err(UblkError::Node { path, source }),
        }
    }
}

/// udev has not made it yet, or has not set its owner; or the old server has not let go of it.
fn is_early(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ENXIO | libc::EACCES | libc::EBUSY)
    )
}

/// Whether ublk can be used here: why not, otherwise.
pub fn probe() -> Result<(), UblkError> {
    if !Path::new(CONTROL).exists() {
        return Err(UblkError::Absent);
    }
    Control::open().map(drop)
}
