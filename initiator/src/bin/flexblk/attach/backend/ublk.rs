//! The kernel's ublk driver.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use flexblk_initiator::export::ExportCounters;
use flexblk_initiator::export::ublk::{UblkDevice, UblkExport, UblkOptions};

use super::{Backend, Order, RELEASE};
use crate::attach::state::{self, Objects};
use crate::attach::users;
use crate::ublk::unwrapped;

/// How often we look for users of a device that is to go with the last.
const LOOK: Duration = Duration::from_millis(500);

pub(super) struct Ublk {
    /// `None` when it has ended.
    export: Option<UblkExport>,
    number: u32,
    path: PathBuf,
    aborted: bool,
    /// When it was let go: the next look for users.
    next_look: Option<Instant>,
}

pub(super) fn make(order: &Order<'_>) -> Result<Ublk> {
    let options = UblkOptions {
        number: None,
        queues: order.args.nr_io_queues,
        depth: order.args.queue_size,
    };
    let device = UblkDevice::add(order.volume, &options).map_err(unwrapped)?;
    let number = device.number();
    // Before the block device appears, which udev asks about, and which has to go when we are killed.
    order.keep(Objects::Ublk { number })?;
    let properties = state::ublk_properties(number);
    let served = order
        .write_properties(&properties)
        .and_then(|()| device.serve(order.volume).map_err(unwrapped));
    match served {
        Ok(export) => Ok(Ublk::new(export)),
        Err(error) => {
            let _ = std::fs::remove_file(properties);
            Err(error)
        }
    }
}

/// The device, and its size.
pub(super) fn take_over(order: &Order<'_>, number: u32) -> Result<(Ublk, u64)> {
    let export = UblkExport::take_over(order.volume, number).map_err(unwrapped)?;
    let size_bytes = export.len_bytes();
    Ok((Ublk::new(export), size_bytes))
}

impl Ublk {
    fn new(export: UblkExport) -> Ublk {
        Ublk {
            number: export.number(),
            path: export.path(),
            export: Some(export),
            aborted: false,
            next_look: None,
        }
    }
}

impl Backend for Ublk {
    fn path(&self) -> &Path {
        &self.path
    }

    fn objects(&self) -> Objects {
        Objects::Ublk {
            number: self.number,
        }
    }

    fn counters(&self) -> ExportCounters {
        self.export
            .as_ref()
            .map(UblkExport::counters)
            .unwrap_or_default()
    }

    fn resize(&mut self, len_bytes: u64) -> Result<()> {
        match &mut self.export {
            Some(export) => Ok(export.resize(len_bytes)?),
            None => Ok(()),
        }
    }

    fn abort(&mut self) {
        self.aborted = true;
    }

    /// The driver removes no device by itself: we look whether somebody uses it.
    fn let_go(&mut self) {
        self.next_look = Some(Instant::now());
    }

    fn has_ended(&mut self) -> bool {
        if self.export.as_ref().is_none_or(UblkExport::has_ended) {
            return true;
        }
        let now = Instant::now();
        if self.next_look.is_none_or(|at| now < at) {
            return false;
        }
        self.next_look = Some(now + LOOK);
        users::of(&self.path, std::process::id().cast_signed()).is_empty()
    }

    fn end(&mut self) {
        let Some(export) = self.export.take() else {
            return;
        };
        let grace = if self.aborted {
            Duration::ZERO
        } else {
            RELEASE
        };
        if !export.end(grace) {
            tracing::error!(device = %self.path.display(), "the kernel does not let the device go");
        }
        let _ = std::fs::remove_file(state::ublk_properties(self.number));
    }
}
