//! Why a device could not be made, opened or changed.

use std::path::PathBuf;

/// Each message is one line that says what to do, or leaves no doubt about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such image or device.
    #[error("{path}: no such file or device (create an image with `truncate -s 1G {path}`)", path = path.display())]
    Missing {
        /// As configured.
        path: PathBuf,
    },
    /// Not allowed.
    #[error("{path}: permission denied for {wanted}{hint}", path = path.display(), wanted = if *.read_only { "reading" } else { "reading and writing" }, hint = if *.read_only { "" } else { " (readonly = true asks for less)" })]
    Permission {
        /// As configured.
        path: PathBuf,
        /// What was asked for.
        read_only: bool,
    },
    /// Somebody else has it.
    #[error("{path}: in use by another process (a running target, a mount, a loop device?)", path = path.display())]
    InUse {
        /// As configured.
        path: PathBuf,
    },
    /// A directory, pipe, socket ...
    #[error("{path}: neither a regular file nor a block device", path = path.display())]
    NotAnImage {
        /// As configured.
        path: PathBuf,
    },
    /// The size does not divide.
    #[error("{what}: size {size_bytes} is not a multiple of the block size {block_size}")]
    NotMultiple {
        /// File or device name.
        what: String,
        /// Bytes.
        size_bytes: u64,
        /// Bytes.
        block_size: u32,
    },
    /// No blocks.
    #[error("{what}: size is 0")]
    Empty {
        /// File or device name.
        what: String,
    },
    /// Not 512 or 4096.
    #[error("{what}: block size {block_size} is not supported (512 or 4096)")]
    BlockSize {
        /// File or device name.
        what: String,
        /// Bytes.
        block_size: u32,
    },
    /// A device with larger blocks.
    #[error("{path}: block size {block_size} is smaller than the device's own {device_block_size}; use that", path = path.display())]
    BlockSizeTooSmall {
        /// As configured.
        path: PathBuf,
        /// As configured, bytes.
        block_size: u32,
        /// Bytes.
        device_block_size: u32,
    },
    /// `direct = "on"` cannot be met.
    #[error("{path}: direct I/O is not possible: {reason}", path = path.display())]
    NoDirect {
        /// As configured.
        path: PathBuf,
        /// What is in the way.
        reason: &'static str,
    },
    /// Resize.
    #[error("{what}: cannot be resized{reason}")]
    NoResize {
        /// File or device name.
        what: String,
        /// Starts with `: ` if there is one.
        reason: &'static str,
    },
    /// Resize of a RAM device.
    #[error("{what}: cannot grow to {wanted_bytes} bytes: max_size is {max_bytes}")]
    BeyondMaxSize {
        /// Device name.
        what: String,
        /// Bytes.
        wanted_bytes: u64,
        /// Bytes.
        max_bytes: u64,
    },
    /// A wrapper's base is not there.
    #[error("{name}: base_bdev_name {base:?} is not a device defined before it")]
    NoBase {
        /// The wrapper.
        name: String,
        /// What it asked for.
        base: String,
    },
    /// Two devices of one name.
    #[error("two devices are named {name:?}")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A value in the configuration.
    #[error("{what}: {reason}")]
    Config {
        /// Device name or the text that was parsed.
        what: String,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// More than 255 wrappers around one another.
    #[error("{what}: too many wrappers around one another")]
    TooDeep {
        /// Device name.
        what: String,
    },
    /// The reactor or shared memory.
    #[error("{what}: {source}")]
    Reactor {
        /// Device name.
        what: String,
        /// Cause.
        source: flexblk_reactor::Error,
    },
    /// The operating system.
    #[error("{path}: {action}: {source}", path = path.display())]
    System {
        /// As configured.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Cause.
        source: std::io::Error,
    },
}

impl Error {
    /// For a device of which nothing can change under I/O.
    pub(crate) fn fixed(name: &str) -> Self {
        Self::Config {
            what: name.to_owned(),
            reason: "nothing of it can be changed while it is in use; delete it and create another"
                .to_owned(),
        }
    }
}
