//! A target of a test, and what hosts of tests do again and again.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use flexblk_nvme::command::nvm::{Read, Write};
use flexblk_nvme::status::CodeSpace;
use flexblk_nvme::{Cntlid, Lba, Nqn, Nsid, Sgl, StatusCode};
use flexblk_target::Target;
use flexblk_target::config::{Config, Namespace, Subsystem};

use crate::host::{Answer, Host, Queue};

pub(crate) fn nqn() -> Nqn {
    Nqn::new("nqn.2026-11.test:wire").unwrap()
}

pub(crate) struct World {
    pub(crate) target: Target,
    pub(crate) port: u16,
}

impl World {
    pub(crate) fn new(bdevs: &[&str]) -> Self {
        Self::with(bdevs, |_| {})
    }

    pub(crate) fn with(bdevs: &[&str], change: impl FnOnce(&mut Config)) -> Self {
        let port = UdpSocket::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let mut subsystem = Subsystem::new(nqn());
        subsystem
            .namespaces
            .extend(bdevs.iter().map(|bdev| Namespace::new(*bdev)));
        let mut config = Config {
            subsystems: vec![subsystem],
            ..Config::default()
        };
        config.listener.udp_port = port;
        change(&mut config);
        Self {
            target: Target::start(config).unwrap(),
            port,
        }
    }

    pub(crate) fn host(&self) -> Host {
        Host::new(self.port)
    }

    /// Everything is as it was before the first host came.
    pub(crate) fn expect_idle(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let stats = self.target.stats();
            let queues: usize = stats.threads.iter().map(|thread| thread.queues).sum();
            let whole = stats
                .threads
                .iter()
                .all(|thread| thread.free_buffers == stats.threads[0].free_buffers);
            if queues == 0
                && stats.controllers == 0
                && whole
                && stats.budget_free_bytes == self.budget()
            {
                return;
            }
            assert!(Instant::now() < deadline, "not freed: {stats:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn budget(&self) -> u64 {
        (256 << 20) - (16 << 20) * self.target.stats().threads.len() as u64
    }
}

pub(crate) fn code(answer: &Answer) -> StatusCode {
    answer.status().code_in(CodeSpace::Nvm)
}

pub(crate) fn fabrics_code(answer: &Answer) -> StatusCode {
    answer.status().code_in(CodeSpace::Fabrics)
}

pub(crate) fn write(lba: u64, blocks: u32) -> Write {
    Write {
        nsid: Nsid::new(1),
        slba: Lba::new(lba),
        blocks,
        ..Default::default()
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

/// A controller with one I/O queue.
pub(crate) fn open(host: &mut Host) -> (Queue, Cntlid, Queue) {
    let (admin, cntlid) = host.controller(&nqn());
    assert_eq!(host.queues(admin, 4), 4);
    let io = host.io_queue(1, 64, cntlid, &nqn());
    (admin, cntlid, io)
}

pub(crate) fn write_in_capsule(host: &mut Host, io: Queue, write: &Write, bytes: &[u8]) -> Answer {
    host.put(0, bytes);
    let cid = host.cid();
    let length = bytes.len() as u32;
    host.send(
        io,
        &write.emit(cid, &Sgl::InCapsule { offset: 0, length }),
        Some((0, length)),
    );
    host.answer(io, cid)
}

pub(crate) fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| {
            (at as u8)
                .wrapping_mul(31)
                .wrapping_add(seed)
                .wrapping_add((at >> 8) as u8)
        })
        .collect()
}
