//! What was written to a device and is not on it yet, when the device is to go.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use flexblk_initiator::export::loop_device;

use super::users;

/// `detach` has five seconds for all that it does.
pub(super) const LIMIT: Duration = Duration::from_millis(1500);
const PAUSE: Duration = Duration::from_millis(2);

/// How far it is on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    All,
    /// Now, or before and nobody was told: what did not reach the device is lost.
    Failed,
    /// It goes on.
    NotInTime,
}

/// Writes back what is in the cache of `device` and its partitions, and waits for what the kernel is writing: of a
/// program that is just closing the device, /proc does not tell that it has it open. In a process of its own, because
/// nobody who waits for a block device can be ended.
pub(super) fn write_back(device: &Path) -> Result<Written> {
    let mut child = Command::new("/proc/self/exe")
        .args(["detach", "--write-back"])
        .arg(device)
        .stdin(Stdio::null())
        // It may outlive us, and whoever reads our output waits for all who could write there.
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("starting a process that writes back what is in the device's cache")?;
    let deadline = Instant::now() + LIMIT;
    loop {
        match child.try_wait()? {
            Some(status) if status.success() => return Ok(Written::All),
            Some(_) => return Ok(Written::Failed),
            None if Instant::now() >= deadline => return Ok(Written::NotInTime),
            None => std::thread::sleep(PAUSE),
        }
    }
}

/// What the process does that [`write_back`] starts.
pub(super) fn write_back_here(device: &Path) -> Result<()> {
    // So that `flexblk detach` tells its users what has the device open.
    let _ = rustix::thread::set_name(c"flexblk-flush");
    for node in users::nodes(device) {
        match loop_device::write_back(&node) {
            Err(error) if is_gone(&error) => {}
            written => written.with_context(|| format!("{}", node.display()))?,
        }
    }
    Ok(())
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENXIO | libc::ENODEV | libc::ENOENT)
    )
}
