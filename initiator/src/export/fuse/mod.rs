//! A volume as one file of a FUSE file system: on Linux 5.4 and newer, and the ground for a loop device.
//!
//! The file is the root of its file system, mounted on an empty file: the kernel asks for nothing but what a block
//! device needs. Own server instead of libfuse's because requests move on the thread's own ring, beside the queue pair
//! that carries them on, and are neither copied nor handed to other threads.

mod mount;
mod queue;
mod wire;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Counters, ExportCounters, Worker, WorkerConfig};
use crate::volume::Volume;
use crate::{Error, MaxBlocks, Namespace, Op};

pub use mount::{abort_connection, unmount};

/// How a volume becomes a file.
#[derive(Clone, Debug)]
pub struct FuseOptions {
    /// An empty file; the volume appears in its place.
    pub mount_point: PathBuf,
    /// Threads, each with a queue of its own.
    pub threads: u16,
    /// Requests under way per thread.
    pub depth: u16,
}

/// Bytes of one read or write at most: as many pages as FUSE passes at once.
const LARGEST_TRANSFER: u32 = 1 << 20;

/// What the file is like.
#[derive(Debug)]
struct Geometry {
    block_bytes: u32,
    max_transfer_bytes: u32,
    max_without_data: MaxBlocks,
    read_only: bool,
    write_zeroes: bool,
    /// Discarding makes blocks read as zeroes.
    discard_zeroes: bool,
    len_bytes: AtomicU64,
}

impl Geometry {
    fn of(namespace: &Namespace) -> Option<Geometry> {
        let common = super::Geometry::of(namespace)?;
        Some(Geometry {
            block_bytes: common.block_bytes,
            max_transfer_bytes: common.max_transfer_bytes,
            max_without_data: common.max_without_data,
            read_only: namespace.read_only,
            write_zeroes: namespace.write_zeroes,
            discard_zeroes: namespace.discard && namespace.deallocated_reads_zero,
            len_bytes: AtomicU64::new(common.len_bytes),
        })
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes.load(Ordering::Relaxed)
    }

    /// As it is now.
    fn now(&self) -> super::Geometry {
        super::Geometry {
            block_bytes: self.block_bytes,
            len_bytes: self.len_bytes(),
            max_transfer_bytes: self.max_transfer_bytes,
            max_without_data: self.max_without_data,
        }
    }

    /// The command that makes a range read as zeroes, as fallocate(2) promises; a discard alone promises nothing.
    fn zeroing(&self, deallocate: bool) -> Option<Op> {
        if self.write_zeroes {
            Some(Op::WriteZeroes { deallocate })
        } else if deallocate && self.discard_zeroes {
            Some(Op::Discard)
        } else {
            None
        }
    }
}

#[derive(Debug)]
struct Settings {
    geometry: Arc<Geometry>,
    depth: u16,
    max_write: u32,
}

/// A mounted volume. Dropping it unmounts; what is open keeps working until it is closed or the connection aborted.
#[derive(Debug)]
pub struct FuseExport {
    mount: mount::Mount,
    geometry: Arc<Geometry>,
    counters: Vec<Arc<Counters>>,
    workers: Vec<Worker>,
}

impl FuseExport {
    /// Mounts, and serves in threads of its own. Needs CAP_SYS_ADMIN.
    pub fn start(volume: &Volume, options: &FuseOptions) -> Result<FuseExport, Error> {
        let namespace = volume.namespace()?;
        let geometry = Geometry::of(&namespace).ok_or_else(|| {
            Error::Address(format!(
                "blocks of {} B: a FUSE file takes powers of two from 512 B",
                namespace.block_size
            ))
        })?;
        let geometry = Arc::new(geometry);
        let max_write = (LARGEST_TRANSFER.min(geometry.max_transfer_bytes) / 4096).max(1) * 4096;
        let settings = Arc::new(Settings {
            geometry: Arc::clone(&geometry),
            depth: options.depth,
            max_write,
        });
        let limits = wire::Limits {
            max_background: options.depth.saturating_mul(options.threads),
            max_write,
        };
        let (mount, first) = mount::Mount::new(&options.mount_point, &limits, namespace.read_only)?;
        let mut descriptors = Vec::new();
        for _ in 1..options.threads {
            descriptors.push(mount::clone_device(&first)?);
        }
        descriptors.push(first);
        let mut export = FuseExport {
            mount,
            geometry,
            counters: Vec::new(),
            workers: Vec::new(),
        };
        let config = WorkerConfig {
            name: "flexblk-fuse".into(),
            core: None,
            depth: options.depth,
        };
        for fd in descriptors {
            let counters = Arc::<Counters>::default();
            export.counters.push(Arc::clone(&counters));
            let settings = Arc::clone(&settings);
            let (worker, ()) = Worker::spawn(&config, volume, move |channel| {
                Ok((queue::Queue::new(fd, settings, counters, channel)?, ()))
            })?;
            export.workers.push(worker);
        }
        Ok(export)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.mount.path()
    }

    /// The number of the FUSE connection, for [`abort_connection`].
    pub fn connection(&self) -> u32 {
        self.mount.connection()
    }

    /// The namespace has another size now; the file follows.
    pub fn resize(&self, len_bytes: u64) {
        self.geometry.len_bytes.store(len_bytes, Ordering::Relaxed);
    }

    /// What it did so far.
    pub fn counters(&self) -> ExportCounters {
        ExportCounters::sum(&self.counters)
    }

    /// Nobody finds the file any more; it is gone when its last user closes it.
    pub fn unmount(&self) -> Result<(), Error> {
        unmount(self.mount.path())
    }

    /// Whether all users are gone (or the connection was aborted) and serving has ended.
    pub fn has_ended(&self) -> bool {
        self.workers.iter().all(Worker::has_ended)
    }
}
