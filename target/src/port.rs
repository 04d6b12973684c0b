//! Ports: the addresses at which hosts reach subsystems. They are part of the snapshot: a data thread
//! begins to listen at a port when it takes over the first snapshot that has it, and ends with the
//! first that has it not.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::association::lock;
use crate::config::{ListenAddress, Transport};
use crate::thread::tcp::listen;

/// Identifier of FlexiNS's port from the start (PORTID, Base 5.1.12.3.1).
pub const FLEXINS_PORT: u16 = 1;
/// Identifier of NVMe/TCP's port from the start.
pub const TCP_PORT: u16 = 2;

/// A port.
#[derive(Debug)]
pub struct Port {
    /// Its identifier, not 0: PORTID of the discovery log. ANA states of single ports go by it.
    pub id: u16,
    /// Transport, `traddr` and, as the port, `trsvcid`.
    pub listen: ListenAddress,
    /// It was there from the start and stays: subsystems without listeners of their own are reached
    /// there.
    pub fixed: bool,
    /// NVMe/TCP's listening sockets by thread, until the threads have taken them.
    sockets: Box<[Mutex<Option<OwnedFd>>]>,
}

impl Port {
    /// A FlexiNS port: a service on the thread's one UDP port.
    #[must_use]
    pub fn flexins(id: u16, address: SocketAddr, fixed: bool) -> Self {
        let trtype = Transport::Flexins;
        Self {
            id,
            listen: ListenAddress { trtype, address },
            fixed,
            sockets: Box::default(),
        }
    }

    /// An NVMe/TCP port with a listening socket for each thread.
    pub(crate) fn tcp(id: u16, address: SocketAddr, fixed: bool, sockets: Vec<OwnedFd>) -> Self {
        let trtype = Transport::Tcp;
        let sockets = sockets.into_iter();
        Self {
            id,
            listen: ListenAddress { trtype, address },
            fixed,
            sockets: sockets.map(|socket| Mutex::new(Some(socket))).collect(),
        }
    }

    /// The thread's listening socket; only the first call gives it.
    pub(crate) fn take_socket(&self, thread: usize) -> Option<OwnedFd> {
        lock(self.sockets.get(thread)?).take()
    }
}

/// How long a port in use is waited for. The kernel gives back the sockets of a killed process only when
/// its io_uring is torn down, a moment after the process is gone: a target restarted at once must not
/// trip over its predecessor. So it is with a listener that was removed, and is added again at once.
const PORT_WAIT: Duration = Duration::from_millis(1000);
const PORT_PAUSE: Duration = Duration::from_millis(10);

/// Repeats an attempt to get a port that is in use.
pub(crate) fn once_free<T>(mut attempt: impl FnMut() -> std::io::Result<T>) -> std::io::Result<T> {
    let deadline = Instant::now() + PORT_WAIT;
    loop {
        match attempt() {
            Err(error)
                if error.raw_os_error() == Some(libc::EADDRINUSE) && Instant::now() < deadline =>
            {
                std::thread::sleep(PORT_PAUSE);
            }
            other => return other,
        }
    }
}

/// A listening socket for each thread, and the address on which they listen: port 0 lets the kernel
/// choose one.
pub(crate) fn tcp_sockets(
    mut address: SocketAddr,
    threads: usize,
) -> std::io::Result<(SocketAddr, Vec<OwnedFd>)> {
    let reuse_port = threads > 1;
    if reuse_port && address.port() != 0 {
        // With SO_REUSEPORT a second target would get part of the connections: find out with a
        // socket that has it not.
        drop(listen(address, false)?);
    }
    let mut sockets = Vec::with_capacity(threads);
    for _ in 0..threads {
        let socket = listen(address, reuse_port)?;
        // The port that the kernel has chosen for the first is the others' too.
        address = rustix::net::getsockname(&socket).and_then(SocketAddr::try_from)?;
        sockets.push(socket);
    }
    Ok((address, sockets))
}
