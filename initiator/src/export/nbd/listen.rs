//! The socket that clients connect to.

use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use flexblk_reactor::mailbox;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{Mode, chmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
    sockopt,
};

use super::protocol::Export;
use crate::Error;

/// Where clients connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdAddress {
    /// A Unix socket; only the owner may connect.
    Unix(PathBuf),
    /// A TCP address; port 0 is one that the kernel chooses.
    Tcp(SocketAddr),
}

/// Connections that nobody has accepted yet.
const BACKLOG: i32 = 64;
/// How long accepting pauses when there are no descriptors left.
const PAUSE: Duration = Duration::from_millis(100);

/// A client that has connected, and what it is offered.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) socket: OwnedFd,
    pub(super) export: Export,
}

/// A worker as the acceptor sees it: its mailbox, and how many clients it has.
pub(super) type Target = (mailbox::Sender<Client>, Arc<AtomicUsize>);

/// A listening socket.
#[derive(Debug)]
pub(super) struct Door {
    socket: OwnedFd,
    address: NbdAddress,
}

impl Door {
    /// Binds and listens. The file of a Unix socket that nobody listens on any more is replaced.
    pub(super) fn open(address: &NbdAddress) -> Result<Door, Error> {
        let failed = |cause: std::io::Error| Error::System {
            what: "listening for NBD clients",
            cause,
        };
        match address {
            NbdAddress::Unix(path) => {
                remove_stale(path)?;
                let socket = listen_unix(path).map_err(|e| match e {
                    Errno::ADDRINUSE => Error::Option {
                        name: "socket".into(),
                        reason: format!("{} exists and is in use", path.display()),
                    },
                    e => failed(e.into()),
                })?;
                Ok(Door {
                    socket,
                    address: address.clone(),
                })
            }
            NbdAddress::Tcp(wanted) => {
                let listener = TcpListener::bind(wanted).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                let address = NbdAddress::Tcp(listener.local_addr().map_err(failed)?);
                Ok(Door {
                    socket: listener.into(),
                    address,
                })
            }
        }
    }

    fn accept(&self) -> Result<OwnedFd, Errno> {
        let socket = accept_with(&self.socket, SocketFlags::CLOEXEC)?;
        if matches!(self.address, NbdAddress::Tcp(_)) {
            // Replies leave in batches made here; the kernel shall not wait for more.
            sockopt::set_tcp_nodelay(&socket, true)?;
            // A client that is gone without a word is found within minutes, not hours.
            sockopt::set_socket_keepalive(&socket, true)?;
            sockopt::set_tcp_keepidle(&socket, Duration::from_secs(60))?;
        } else {
            // The usual 208 KiB hold less than two requests of 128 KiB. The kernel's limit for everybody may be lower.
            sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES)?;
        }
        Ok(socket)
    }

    fn uri(&self, name: &str) -> String {
        let name = escaped(name.as_bytes(), b"/");
        match &self.address {
            NbdAddress::Unix(path) => {
                use std::os::unix::ffi::OsStrExt;
                let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                format!(
                    "nbd+unix:///{name}?socket={}",
                    escaped(path.as_os_str().as_bytes(), b"/")
                )
            }
            NbdAddress::Tcp(address) if name.is_empty() => format!("nbd://{address}"),
            NbdAddress::Tcp(address) => format!("nbd://{address}/{name}"),
        }
    }
}

const SOCKET_BUFFER_BYTES: usize = 1 << 20;

impl Drop for Door {
    fn drop(&mut self) {
        if let NbdAddress::Unix(path) = &self.address {
            // Somebody else may have removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn listen_unix(path: &Path) -> Result<OwnedFd, Errno> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    bind(&socket, &address)?;
    // Whoever connects can change the disk. Nobody can before `listen`.
    chmod(path, Mode::RUSR | Mode::WUSR)
        .and_then(|()| listen(&socket, BACKLOG))
        .inspect_err(|_| {
            let _ = std::fs::remove_file(path);
        })?;
    Ok(socket)
}

/// Removes the file of a Unix socket whose server is gone.
fn remove_stale(path: &Path) -> Result<(), Error> {
    use std::io::ErrorKind::ConnectionRefused;
    use std::os::unix::fs::FileTypeExt;
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err_and(|error| error.kind() == ConnectionRefused)
    {
        std::fs::remove_file(path).map_err(|cause| Error::System {
            what: "removing the socket of a server that is gone",
            cause,
        })?;
    }
    Ok(())
}

/// The thread that accepts. Dropping it closes the door and waits for its end, which is at once.
pub(super) struct Acceptor {
    uri: String,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Acceptor {
    /// `describe` says what the next client is offered.
    pub(super) fn start(
        door: Door,
        targets: Vec<Target>,
        name: &str,
        describe: impl Fn() -> Result<Export, Error> + Send + 'static,
    ) -> Result<Acceptor, Error> {
        let failed = |what| move |cause| Error::System { what, cause };
        let uri = door.uri(name);
        let stop =
            eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| failed("making an eventfd")(e.into()))?;
        let stop = Arc::new(stop);
        let thread = {
            let stop = Arc::clone(&stop);
            std::thread::Builder::new()
                .name("nbd accept".into())
                .spawn(move || run(&door, &stop, &targets, describe))
                .map_err(failed("starting a thread"))?
        };
        Ok(Acceptor {
            uri,
            stop,
            thread: Some(thread),
        })
    }

    pub(super) fn uri(&self) -> &str {
        &self.uri
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        // It cannot fail: the descriptor is ours and the value is small.
        let _ = rustix::io::write(self.stop.as_fd(), &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic was reported by its hook already.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acceptor")
            .field("uri", &self.uri)
            .finish_non_exhaustive()
    }
}

fn run(
    door: &Door,
    stop: &OwnedFd,
    targets: &[Target],
    describe: impl Fn() -> Result<Export, Error>,
) {
    loop {
        let mut events = [
            PollFd::new(stop, PollFlags::IN),
            PollFd::new(&door.socket, PollFlags::IN),
        ];
        match poll(&mut events, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "accepting NBD clients");
                return;
            }
        }
        if !events[0].revents().is_empty() {
            return;
        }
        if events[1].revents().is_empty() {
            continue;
        }
        match door.accept() {
            Ok(socket) => match describe() {
                Ok(export) => hand_over(targets, Client { socket, export }),
                Err(error) => tracing::error!(%error, "an NBD client is turned away"),
            },
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(error) => {
                tracing::warn!(%error, "accepting an NBD client");
                std::thread::sleep(PAUSE);
            }
        }
    }
}

fn hand_over(targets: &[Target], client: Client) {
    let least = targets
        .iter()
        .min_by_key(|(_, clients)| clients.load(Ordering::Relaxed));
    if let Some((mail, clients)) = least {
        clients.fetch_add(1, Ordering::Relaxed);
        if mail.try_send(client).is_err() {
            // Full of clients that the worker has not come to: the socket closes.
            clients.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!("an NBD client is turned away: too many at once");
        }
    }
}

/// Percent-encoding of RFC 3986, which keeps its unreserved characters and `also`.
fn escaped(bytes: &[u8], also: &[u8]) -> String {
    let mut text = String::new();
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || also.contains(&byte) {
            text.push(char::from(byte));
        } else {
            text += &format!("%{byte:02X}");
        }
    }
    text
}
