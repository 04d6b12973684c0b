//! A loop device over a FUSE file.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use flexblk_initiator::export::ExportCounters;
use flexblk_initiator::export::fuse::{FuseExport, FuseOptions, abort_connection};
use flexblk_initiator::export::loop_device::{LoopDevice, LoopOptions, follow_size, wait_released};

use super::{Backend, Order, RELEASE};
use crate::attach::state::Objects;

pub(super) struct FuseLoop {
    objects: Objects,
    disk: PathBuf,
    /// `None` when it was let go. Goes before the file below it.
    device: Option<LoopDevice>,
    export: FuseExport,
    number: u32,
    path: PathBuf,
}

pub(super) fn make(order: &Order<'_>) -> Result<FuseLoop> {
    order.keep(Objects::FuseLoop {
        fuse_connection: None,
        loop_number: None,
    })?;
    let disk = order.name.disk();
    File::create(&disk).with_context(|| format!("{}", disk.display()))?;
    let export = FuseExport::start(
        order.volume,
        &FuseOptions {
            mount_point: disk.clone(),
            threads: order.args.nr_io_queues,
            depth: order.args.queue_size,
        },
    )?;
    let fuse_connection = Some(export.connection());
    order.keep(Objects::FuseLoop {
        fuse_connection,
        loop_number: None,
    })?;
    order.write_properties(&disk.with_extension("udev"))?;
    let device = LoopDevice::attach(
        &disk,
        &LoopOptions {
            block_size: order.namespace.block_size,
            read_only: order.namespace.read_only,
            partitions: !order.args.no_partitions,
        },
    )?;
    let number = device.number();
    Ok(FuseLoop {
        objects: Objects::FuseLoop {
            fuse_connection,
            loop_number: Some(number),
        },
        disk,
        number,
        path: device.path(),
        device: Some(device),
        export,
    })
}

impl FuseLoop {
    /// Lets the loop device go. In a thread of its own, because opening and closing a block device waits for its I/O.
    fn release(&mut self) {
        if let Some(device) = self.device.take().filter(LoopDevice::is_bound) {
            let release = move || {
                if let Err(error) = device.release() {
                    tracing::error!(%error, "releasing the loop device");
                }
            };
            if let Err(error) = std::thread::Builder::new().spawn(release) {
                tracing::error!(%error, "starting a thread");
            }
        }
    }
}

impl Backend for FuseLoop {
    fn path(&self) -> &Path {
        &self.path
    }

    fn objects(&self) -> Objects {
        self.objects
    }

    fn counters(&self) -> ExportCounters {
        self.export.counters()
    }

    fn resize(&mut self, len_bytes: u64) -> Result<()> {
        self.export.resize(len_bytes);
        // Lets the kernel ask for the file's size; only then does the loop device find it.
        fs::metadata(self.export.path())?;
        if self.device.is_none() {
            return Ok(());
        }
        let number = self.number;
        let (done, over) = mpsc::sync_channel(1);
        std::thread::Builder::new().spawn(move || done.send(follow_size(number)))?;
        match over.recv_timeout(RELEASE) {
            Ok(followed) => Ok(followed?),
            Err(_) => bail!("the kernel holds the loop device for longer than {RELEASE:?}"),
        }
    }

    fn abort(&mut self) {
        if let Err(error) = abort_connection(self.export.connection()) {
            tracing::error!(%error, "aborting the FUSE connection");
        }
    }

    fn let_go(&mut self) {
        self.release();
        if let Err(error) = self.export.unmount() {
            tracing::warn!(%error, "unmounting");
        }
    }

    /// We do not have the loop device open, so others can release it.
    fn has_ended(&mut self) -> bool {
        let released = self
            .device
            .as_ref()
            .is_some_and(|device| !device.is_bound());
        released || self.export.has_ended()
    }

    fn end(&mut self) {
        self.release();
        if !wait_released(self.number, &self.disk, Instant::now() + RELEASE) {
            self.abort();
            // When it is in use it stays bound, and every access fails, until the last user has gone.
            wait_released(self.number, &self.disk, Instant::now() + RELEASE);
        }
        let _ = self.export.unmount();
    }
}
