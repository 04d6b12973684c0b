//! A regular file or a block device through the thread's io_uring.
//!
//! - Direct I/O (past the page cache) when device and file system allow it for the block size;
//!   memory that is not aligned for it goes through a bounce buffer. Else buffered.
//! - A forced write is `RWF_DSYNC`, a flush `fdatasync`; a failed write-back is reported to every
//!   channel at its next flush, not only to the one that happened to ask first.
//! - One image, one user: `flock`, and for block devices also an exclusive open.
//! - Blocks are as atomic as the layer below: a device's sector for direct I/O; for buffered I/O
//!   what the file system promises for a read beside a write (XFS: all of it; ext4: nothing within
//!   a page). Use direct I/O where several hosts read and write the same block at the same time.

mod channel;
mod image;
mod pieces;
mod slots;

use std::{
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use flexblk_reactor::Reactor;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{BlockDevice, Caps, Channel, Error, FileConfig, Info, Tokens, check::Limits, config};

/// Whether to go past the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DirectMode {
    /// If device and file system allow it with the block size.
    #[default]
    Auto,
    /// It is an error if they do not.
    On,
    /// Never.
    Off,
}

/// See [`crate::BdevConfig::File`].
#[derive(Debug)]
pub struct FileDevice {
    name: Arc<str>,
    kind: Arc<str>,
    uuid: Uuid,
    depth: u32,
    optimal_io_bytes: u32,
    shared: Arc<Shared>,
}

/// What all channels of a device have in common.
#[derive(Debug)]
struct Shared {
    file: OwnedFd,
    path: PathBuf,
    node: image::Node,
    limits: Limits,
    /// Set: direct I/O, with these alignments.
    direct: Option<image::Alignment>,
    block_count: AtomicU64,
    /// Learnt from the first refusal, so that it is asked for only once.
    cannot_punch: AtomicBool,
    cannot_zero_range: AtomicBool,
    /// Failed write-backs. A channel whose last flush saw a smaller number fails its next one.
    sync_failures: AtomicU64,
    counters: Counters,
}

/// Rare events; the usual path touches none of them.
#[derive(Debug, Default)]
struct Counters {
    bounced_ios: AtomicU64,
    short_transfers: AtomicU64,
    retries: AtomicU64,
    zeroes_written_bytes: AtomicU64,
    flushes_coalesced: AtomicU64,
    bounce_waits: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}

/// The longest read, write or compare: with vectors of 16 pieces, and far below the kernel's 2 GiB.
const MAX_IO_BYTES: u32 = 64 << 20;

impl FileDevice {
    /// Opens and locks the image.
    pub fn new(config: &FileConfig) -> Result<Self, Error> {
        config::check_depth(&config.name, config.depth)?;
        let image = image::open(&config.filename, config.readonly, config.share_rw)?;
        let block_size = image.block_size(config.block_size)?;
        let size_bytes = image.size_bytes()?;
        let count = config::whole_blocks(
            &config.filename.display().to_string(),
            size_bytes,
            block_size,
        )?;
        let direct = match config.direct {
            DirectMode::Off => None,
            DirectMode::Auto => image.enable_direct(block_size).ok(),
            DirectMode::On => {
                Some(
                    image
                        .enable_direct(block_size)
                        .map_err(|reason| Error::NoDirect {
                            path: config.filename.clone(),
                            reason,
                        })?,
                )
            }
        };
        let caps = if config.readonly {
            Caps::READ_ONLY | Caps::FLUSH
        } else {
            let mut caps = Caps::WRITE_ZEROES | Caps::FLUSH | Caps::FUA;
            caps.set(
                Caps::DISCARD | Caps::DISCARD_ZEROES,
                image.can_punch(size_bytes, block_size),
            );
            caps.set(Caps::RESIZE, image.node == image::Node::RegularFile);
            caps
        };
        let kind = match (image.node, direct) {
            (image::Node::RegularFile, Some(_)) => "file (direct)",
            (image::Node::RegularFile, None) => "file (buffered)",
            (image::Node::BlockDevice, Some(_)) => "block device (direct)",
            (image::Node::BlockDevice, None) => "block device (buffered)",
        };
        tracing::info!(name = config.name, path = %config.filename.display(), kind, size_bytes, block_size, "opened");
        Ok(Self {
            name: config.name.as_str().into(),
            kind: kind.into(),
            uuid: config.uuid.unwrap_or_else(|| image.identity()),
            depth: config.depth,
            optimal_io_bytes: image.optimal_io_bytes().max(block_size),
            shared: Arc::new(Shared {
                file: image.file,
                path: image.path,
                node: image.node,
                limits: Limits {
                    block_size,
                    max_io_bytes: MAX_IO_BYTES,
                    caps,
                },
                direct,
                block_count: AtomicU64::new(count),
                cannot_punch: AtomicBool::new(!caps.contains(Caps::DISCARD)),
                cannot_zero_range: AtomicBool::new(false),
                sync_failures: AtomicU64::new(0),
                counters: Counters::default(),
            }),
        })
    }
}

impl BlockDevice for FileDevice {
    fn info(&self) -> Info {
        let shared = &self.shared;
        Info {
            name: Arc::clone(&self.name),
            kind: Arc::clone(&self.kind),
            block_size: shared.limits.block_size,
            block_count: shared.block_count(),
            caps: shared.limits.caps,
            optimal_io_bytes: self.optimal_io_bytes,
            max_io_bytes: shared.limits.max_io_bytes,
            volatile_write_cache: !shared.limits.caps.contains(Caps::READ_ONLY),
            uuid: self.uuid,
            memory_alignment: shared.direct.map_or(1, |align| align.memory),
        }
    }

    fn open(&self, reactor: &mut Reactor, tokens: Tokens) -> Result<Box<dyn Channel>, Error> {
        let channel = channel::FileChannel::new(
            reactor.keeper(),
            Arc::clone(&self.shared),
            tokens,
            self.depth,
        )
        .map_err(|source| Error::Reactor {
            what: self.name.to_string(),
            source,
        })?;
        Ok(Box::new(channel))
    }

    /// Sets the length of a regular file. Block devices are resized by whoever made them, then
    /// [rescanned](BlockDevice::rescan).
    fn resize(&self, new_bytes: u64) -> Result<Info, Error> {
        let shared = &self.shared;
        let refused = |reason| Error::NoResize {
            what: self.name.to_string(),
            reason,
        };
        if shared.limits.caps.contains(Caps::READ_ONLY) {
            return Err(refused(": it is read-only"));
        }
        if shared.node == image::Node::BlockDevice {
            return Err(refused(": it is a block device; resize that, then rescan"));
        }
        let count = config::whole_blocks(&self.name, new_bytes, shared.limits.block_size)?;
        if count < shared.block_count() {
            // first for us, then for the file: an I/O in between is refused and not cut short
            shared.block_count.store(count, Ordering::Release);
        }
        rustix::fs::ftruncate(&shared.file, new_bytes).map_err(|errno| Error::System {
            path: shared.path.clone(),
            action: "setting its length",
            source: errno.into(),
        })?;
        shared.block_count.store(count, Ordering::Release);
        Ok(self.info())
    }

    /// Reads the length again. A length that is no multiple of the block size is an error and
    /// changes nothing.
    fn rescan(&self) -> Result<Info, Error> {
        let shared = &self.shared;
        let size_bytes = image::size_bytes(&shared.file, &shared.path)?;
        let count = config::whole_blocks(
            &shared.path.display().to_string(),
            size_bytes,
            shared.limits.block_size,
        )?;
        shared.block_count.store(count, Ordering::Release);
        Ok(self.info())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.shared.counters;
        [
            ("bounced_ios", &counters.bounced_ios),
            ("short_transfers", &counters.short_transfers),
            ("retries", &counters.retries),
            ("zeroes_written_bytes", &counters.zeroes_written_bytes),
            ("flushes_coalesced", &counters.flushes_coalesced),
            ("bounce_waits", &counters.bounce_waits),
            ("sync_failures", &self.shared.sync_failures),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
        .to_vec()
    }
}

impl Shared {
    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn block_count(&self) -> u64 {
        self.block_count.load(Ordering::Acquire)
    }
}
