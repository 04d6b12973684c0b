//! A target of a test, and what hosts of tests do again and again.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use flexblk_nvme::command::nvm::{Read, Write};
use flexblk_nvme::tcp::{Digests, IcReq};
use flexblk_nvme::{Lba, Nqn, Nsid, Sgl};
use flexblk_target::Target;
use flexblk_target::config::{Config, Namespace, Subsystem, TcpListener};

use super::{Conn, Pair};

pub(crate) fn nqn() -> Nqn {
    Nqn::new("nqn.2026-11.test:tcp").unwrap()
}

pub(crate) struct World {
    pub(crate) target: Target,
    pub(crate) address: SocketAddr,
}

impl World {
    pub(crate) fn new(bdev: &str) -> Self {
        Self::with(bdev, |_| {})
    }

    pub(crate) fn with(bdev: &str, change: impl FnOnce(&mut Config)) -> Self {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut subsystem = Subsystem::new(nqn());
        subsystem.namespaces.push(Namespace::new(bdev));
        let mut config = Config {
            subsystems: vec![subsystem],
            tcp: Some(TcpListener {
                address: "127.0.0.1:0".parse().unwrap(),
                ..TcpListener::default()
            }),
            ..Config::default()
        };
        config.listener.udp_port = udp.local_addr().unwrap().port();
        drop(udp);
        change(&mut config);
        let target = Target::start(config).unwrap();
        let address = target.tcp_address().unwrap();
        Self { target, address }
    }

    pub(crate) fn pair(&self, request: IcReq) -> Pair {
        Pair::new(self.address, request, &nqn(), 32, true)
    }

    pub(crate) fn counter(&self, name: &str) -> u64 {
        self.target.stats().counters.get(name).copied().unwrap_or(0)
    }

    /// Waits until a counter has that value.
    pub(crate) fn expect(&self, name: &str, value: u64) {
        let deadline = Instant::now() + Duration::from_secs(15);
        while self.counter(name) != value {
            assert!(
                Instant::now() < deadline,
                "{name} is {}, not {value}",
                self.counter(name)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Everything is as it was before the first host came.
    pub(crate) fn expect_idle(&self) {
        self.expect("tcp_connections", 0);
        let stats = self.target.stats();
        assert_eq!(stats.controllers, 0);
        for thread in &stats.threads {
            assert_eq!(thread.queues, 0);
            assert_eq!(thread.free_buffers, stats.threads[0].free_buffers);
        }
        let buffers = (16 << 20) * stats.threads.len() as u64;
        assert_eq!(stats.budget_free_bytes, (256 << 20) - buffers);
    }
}

pub(crate) fn read(lba: u64, blocks: u32) -> Read {
    Read {
        nsid: Nsid::new(1),
        slba: Lba::new(lba),
        blocks,
        ..Default::default()
    }
}

pub(crate) fn write(lba: u64, blocks: u32) -> Write {
    Write {
        nsid: Nsid::new(1),
        slba: Lba::new(lba),
        blocks,
        ..Default::default()
    }
}

pub(crate) fn transport(length: usize) -> Sgl {
    Sgl::Transport {
        length: length as u32,
    }
}

pub(crate) fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ seed)
        .collect()
}

pub(crate) fn write_remote(
    io: &mut Conn,
    lba: u64,
    bytes: &[u8],
    block: usize,
) -> flexblk_nvme::Cqe {
    let cid = io.cid();
    let command = write(lba, (bytes.len() / block) as u32);
    io.run(&command.emit(cid, &transport(bytes.len())), bytes).0
}

pub(crate) fn write_in_capsule(
    io: &mut Conn,
    lba: u64,
    bytes: &[u8],
    block: usize,
) -> flexblk_nvme::Cqe {
    let cid = io.cid();
    let sgl = Sgl::InCapsule {
        offset: 0,
        length: bytes.len() as u32,
    };
    let command = write(lba, (bytes.len() / block) as u32);
    io.send(&command.emit(cid, &sgl), bytes);
    io.finish(cid, &[]).0
}

pub(crate) fn read_back(io: &mut Conn, lba: u64, len: usize, block: usize) -> Vec<u8> {
    let cid = io.cid();
    let command = read(lba, (len / block) as u32);
    let (cqe, bytes) = io.run(&command.emit(cid, &transport(len)), &[]);
    assert!(cqe.status().is_success(), "{:?}", cqe.status());
    bytes
}

pub(crate) fn with(digests: Digests) -> IcReq {
    IcReq {
        digests,
        ..IcReq::default()
    }
}
