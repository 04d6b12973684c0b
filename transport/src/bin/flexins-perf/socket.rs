//! Plain UDP sockets with the kernel's segmentation, for the ceilings.
#![allow(unsafe_code)]

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use anyhow::Context as _;

const UDP_SEGMENT: libc::c_int = 103;
const UDP_GRO: libc::c_int = 104;

/// A non-blocking socket on 127.0.0.1 with large buffers and receive coalescing.
pub(crate) fn bind() -> anyhow::Result<UdpSocket> {
    let socket = UdpSocket::bind("127.0.0.1:0").context("binding a UDP socket")?;
    socket.set_nonblocking(true)?;
    for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
        // Without CAP_NET_ADMIN the default buffer stays: the result is lower, not wrong.
        let _ = set(&socket, libc::SOL_SOCKET, option, 16 << 20);
    }
    set(&socket, libc::SOL_UDP, UDP_GRO, 1).context("UDP_GRO (Linux 5.0)")?;
    Ok(socket)
}

/// Connects and cuts everything sent into segments of that length.
pub(crate) fn connect(socket: &UdpSocket, to: SocketAddr, segment: u32) -> anyhow::Result<()> {
    socket.connect(to)?;
    let segment = libc::c_int::try_from(segment)?;
    set(socket, libc::SOL_UDP, UDP_SEGMENT, segment).context("UDP_SEGMENT (Linux 4.18)")?;
    Ok(())
}

fn set(
    socket: &UdpSocket,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the kernel reads the four bytes of `value`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
