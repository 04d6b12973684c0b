//! The UDP socket: options, addresses, what the kernel granted.
#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, socket_with};

use super::UdpError;

/// `UDP_SEGMENT`: control message with the length of the segments (include/uapi/linux/udp.h).
pub(super) const UDP_SEGMENT: libc::c_int = 103;
/// `UDP_GRO`: option, and control message with the length of the segments.
pub(super) const UDP_GRO: libc::c_int = 104;
/// `SO_MEMINFO` gives nine words (include/uapi/linux/sock_diag.h), the last is the drops.
const SK_MEMINFO_VARS: usize = 9;
const SK_MEMINFO_DROPS: usize = 8;

/// A bound socket.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    local: SocketAddr,
    receive_buffer_bytes: u32,
}

impl Socket {
    pub(super) fn open(
        address: SocketAddr,
        reuse_port: bool,
        buffer_bytes: u32,
    ) -> Result<Self, UdpError> {
        let bind_error = |source: rustix::io::Errno| UdpError::Bind {
            address,
            source: source.into(),
        };
        let family = match address {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        // Not NONBLOCK: io_uring would then answer EAGAIN instead of waiting for the socket.
        let flags = SocketFlags::CLOEXEC;
        let fd = socket_with(family, SocketType::DGRAM, flags, None).map_err(bind_error)?;
        let raw = fd.as_raw_fd();
        match address {
            // Never fragments, and the kernel's idea of the path's MTU is used, not changed by
            // forged ICMP messages.
            SocketAddr::V4(_) => set(
                raw,
                libc::IPPROTO_IP,
                libc::IP_MTU_DISCOVER,
                libc::IP_PMTUDISC_PROBE,
                "IP_MTU_DISCOVER",
            )?,
            SocketAddr::V6(_) => {
                set(raw, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1, "IPV6_V6ONLY")?;
                set(
                    raw,
                    libc::IPPROTO_IPV6,
                    libc::IPV6_MTU_DISCOVER,
                    libc::IPV6_PMTUDISC_PROBE,
                    "IPV6_MTU_DISCOVER",
                )?;
            }
        }
        if reuse_port {
            set(raw, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1, "SO_REUSEPORT")?;
        }
        // Linux 5.0; without it every packet arrives by itself.
        if let Err(error) = set(raw, libc::SOL_UDP, UDP_GRO, 1, "UDP_GRO") {
            tracing::warn!(%error, "receiving without UDP_GRO");
        }
        let wanted = i32::try_from(buffer_bytes).unwrap_or(i32::MAX);
        for (forced, plain) in [
            (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF),
            (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF),
        ] {
            // FORCE needs CAP_NET_ADMIN; the plain option is clamped to net.core.[rw]mem_max.
            if set(raw, libc::SOL_SOCKET, forced, wanted, "SO_RCVBUFFORCE").is_err() {
                set(raw, libc::SOL_SOCKET, plain, wanted, "SO_RCVBUF")?;
            }
        }
        bind(&fd, &address).map_err(bind_error)?;
        let local = getsockname(&fd)
            .map_err(bind_error)?
            .try_into()
            .map_err(bind_error)?;
        // The kernel doubles what is asked for, to cover its bookkeeping.
        let receive_buffer_bytes = get(raw, libc::SOL_SOCKET, libc::SO_RCVBUF)
            .ok()
            .and_then(|bytes| u32::try_from(bytes / 2).ok())
            .unwrap_or(0);
        if receive_buffer_bytes < buffer_bytes {
            tracing::warn!(
                wanted = buffer_bytes,
                granted = receive_buffer_bytes,
                "small UDP receive buffer: raise net.core.rmem_max or grant CAP_NET_ADMIN"
            );
        }
        Ok(Self {
            fd,
            local,
            receive_buffer_bytes,
        })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    pub(super) fn local_addr(&self) -> SocketAddr {
        self.local
    }

    pub(super) fn receive_buffer_bytes(&self) -> u32 {
        self.receive_buffer_bytes
    }

    #[cfg(test)]
    pub(super) fn disable_checksums(&self) -> Result<(), UdpError> {
        set(
            self.fd(),
            libc::SOL_SOCKET,
            libc::SO_NO_CHECK,
            1,
            "SO_NO_CHECK",
        )
    }

    /// Datagrams that found the receive buffer full.
    pub(super) fn dropped(&self) -> u64 {
        let mut words = [0_u32; SK_MEMINFO_VARS];
        let mut len = size_of_val(&words) as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes into `words`.
        let result = unsafe {
            libc::getsockopt(
                self.fd(),
                libc::SOL_SOCKET,
                libc::SO_MEMINFO,
                words.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        if result == 0 {
            words[SK_MEMINFO_DROPS].into()
        } else {
            0
        }
    }
}

/// Largest IP packet on the way to `peer` as the kernel knows it now.
pub(super) fn path_mtu_bytes(peer: SocketAddr) -> io::Result<u32> {
    let (any, level, option) = match peer {
        SocketAddr::V4(_) => (
            IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            libc::IPPROTO_IP,
            libc::IP_MTU,
        ),
        SocketAddr::V6(_) => (
            IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU,
        ),
    };
    let socket = std::net::UdpSocket::bind((any, 0))?;
    socket.connect(peer)?;
    let bytes = get(socket.as_raw_fd(), level, option)?;
    u32::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
}

fn set(
    fd: RawFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
    name: &'static str,
) -> Result<(), UdpError> {
    // SAFETY: the kernel reads the four bytes of `value`.
    let result = unsafe {
        libc::setsockopt(
            fd,
            level,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(UdpError::Option {
        name,
        source: io::Error::last_os_error(),
    })
}

fn get(fd: RawFd, level: libc::c_int, option: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the kernel writes at most the four bytes of `value`.
    let result =
        unsafe { libc::getsockopt(fd, level, option, (&raw mut value).cast(), &raw mut len) };
    if result == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Writes `address` as the kernel wants it; returns the length.
pub(super) fn write_address(address: SocketAddr, to: &mut libc::sockaddr_storage) -> u32 {
    let to: *mut libc::sockaddr_storage = to;
    match address {
        SocketAddr::V4(v4) => {
            let raw = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(v4.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: sockaddr_storage is larger and at least as aligned.
            unsafe { to.cast::<libc::sockaddr_in>().write(raw) };
            size_of::<libc::sockaddr_in>() as u32
        }
        SocketAddr::V6(v6) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: v6.ip().octets(),
                },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: sockaddr_storage is larger and at least as aligned.
            unsafe { to.cast::<libc::sockaddr_in6>().write(raw) };
            size_of::<libc::sockaddr_in6>() as u32
        }
    }
}

/// Reads a `struct sockaddr_in` or `sockaddr_in6`.
pub(super) fn read_address(name: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(*name.first_chunk()?);
    let port = u16::from_be_bytes(name.get(2..4)?.try_into().ok()?);
    if family == libc::AF_INET as u16 {
        let ip: [u8; 4] = name.get(4..8)?.try_into().ok()?;
        Some(SocketAddrV4::new(Ipv4Addr::from(ip), port).into())
    } else if family == libc::AF_INET6 as u16 {
        let ip: [u8; 16] = name.get(8..24)?.try_into().ok()?;
        let scope = u32::from_ne_bytes(name.get(24..28)?.try_into().ok()?);
        Some(SocketAddrV6::new(Ipv6Addr::from(ip), port, 0, scope).into())
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip() {
        for text in [
            "127.0.0.1:4791",
            "255.1.2.3:1",
            "[::1]:4791",
            "[fe80::1%7]:65535",
        ] {
            let address: SocketAddr = text.parse().unwrap();
            // SAFETY: all zeroes is a valid sockaddr_storage.
            let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
            let len = write_address(address, &mut storage) as usize;
            // SAFETY: plain bytes of a zero-initialised structure.
            let bytes =
                unsafe { std::slice::from_raw_parts((&raw const storage).cast::<u8>(), len) };
            assert_eq!(read_address(bytes), Some(address));
            assert_eq!(read_address(&bytes[..len.min(7)]), None);
        }
        assert_eq!(read_address(&[0; 28]), None);
        assert_eq!(read_address(&[]), None);
    }

    #[test]
    fn loopback_carries_large_packets() {
        assert!(path_mtu_bytes("127.0.0.1:1".parse().unwrap()).unwrap() >= 16_384);
    }

    #[test]
    fn an_address_in_use_is_named() {
        let any = "127.0.0.1:0".parse().unwrap();
        let first = Socket::open(any, false, 1 << 20).unwrap();
        let error = Socket::open(first.local_addr(), false, 1 << 20).unwrap_err();
        assert!(
            error.to_string().contains(&first.local_addr().to_string()),
            "{error}"
        );
        let shared = Socket::open(any, true, 1 << 20).unwrap();
        assert!(Socket::open(shared.local_addr(), true, 1 << 20).is_ok());
    }
}
