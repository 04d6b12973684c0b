//! The Unix socket: whose it is, and what a target that died has left there.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 512;

/// Why there is no socket at a path.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process serves it.
    #[error("the RPC socket {} is another process's (a running flexblk-target?); give another path with --rpc-socket, or `--rpc-socket off`", .0.display())]
    InUse(PathBuf),
    /// There is something else.
    #[error("{} exists and is no socket; it is left as it is", .0.display())]
    NoSocket(PathBuf),
    /// The system.
    #[error("the RPC socket {} cannot be made: {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A socket that is bound, and the lock that says so. Dropping it removes both.
pub(crate) struct RpcSocket {
    path: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl RpcSocket {
    /// Binds a path for its owner only. A lock beside it, which the system frees with the process,
    /// tells a socket in use from one that was left behind.
    pub(crate) fn bind(path: &Path) -> Result<(Self, OwnedFd), SocketError> {
        let io = |source: io::Error| SocketError::Io {
            path: path.to_owned(),
            source,
        };
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock_path = PathBuf::from(lock_path);
        let lock = take_lock(&lock_path)
            .map_err(io)?
            .ok_or_else(|| SocketError::InUse(path.to_owned()))?;
        match std::fs::symlink_metadata(path) {
            Ok(meta) if meta.file_type().is_socket() => std::fs::remove_file(path).map_err(io)?,
            Ok(_) => return Err(SocketError::NoSocket(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io(error)),
        }
        let bound = || -> Result<OwnedFd, rustix::io::Errno> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket =
                rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
            // Nobody can connect before it listens, so nobody gets in before this.
            rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR)?;
            rustix::net::listen(&socket, BACKLOG)?;
            Ok(socket)
        };
        let socket = bound().map_err(|errno| io(errno.into()))?;
        let owner = Self {
            path: path.to_owned(),
            lock_path,
            _lock: lock,
        };
        Ok((owner, socket))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RpcSocket {
    fn drop(&mut self) {
        // While we hold the lock nobody else has made a new one.
        let _ = std::fs::remove_file(&self.path);
        let _ = std::fs::remove_file(&self.lock_path);
    }
}

/// The lock, or `None` when another process has it.
fn take_lock(path: &Path) -> io::Result<Option<File>> {
    loop {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        // Its last owner may have removed it between our opening and our locking.
        match std::fs::metadata(path) {
            Ok(meta) if meta.ino() == file.metadata()?.ino() => return Ok(Some(file)),
            _ => {}
        }
    }
}
