//! Free ports on the loopback interface.

use std::net::{Ipv4Addr, UdpSocket};

use anyhow::Result;

/// A UDP port that nobody has now. Ports below the kernel's own range, so that no client gets it by chance.
pub fn free_udp_port() -> Result<u16> {
    // Spread by process id and call, so that tests that run at the same time rarely try the same port.
    use std::sync::atomic::{AtomicU16, Ordering};
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = (std::process::id() as u16).wrapping_mul(13);
    for _ in 0..20_000 {
        let offset = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000;
        let port = 10_000 + offset;
        if UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    anyhow::bail!("no UDP port between 10000 and 30000 is free")
}

/// A TCP port that nobody has now.
pub fn free_tcp_port() -> Result<u16> {
    // The kernel gives out ports of its own range in turn: it is long until this one comes again.
    let socket = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(socket.local_addr()?.port())
}
