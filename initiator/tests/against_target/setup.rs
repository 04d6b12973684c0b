//! A target in this process, and a queue pair with memory.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_initiator::{
    Command, ConnectOptions, Controller, Host, IoError, Nqn, Nsid, QueuePair, QueuePairOptions,
    SharedMemory, Span, StatusCode, TrType,
};
use flexblk_reactor::HugePages;
use flexblk_target::Target;
use flexblk_target::config::{Config, Namespace, Subsystem, TcpListener};
use flexblk_tests::ports::free_udp_port;

pub(crate) const NQN: &str = "nqn.2026-11.io.example:disk";
pub(crate) const NSID: Nsid = Nsid::new(1);
pub(crate) const BLOCK: u32 = 512;

pub(crate) fn nqn() -> Nqn {
    NQN.parse().unwrap()
}

pub(crate) fn host() -> Host {
    Host {
        hostnqn: "nqn.2026-11.io.example:host".parse().unwrap(),
        hostid: flexblk_initiator::HostId::random(),
    }
}

/// Over which transport a test runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Flexins,
    Tcp,
}

impl Transport {
    /// A target on a free port with one subsystem, and how to connect to it.
    pub(crate) fn start(self, change: impl FnOnce(&mut Config)) -> (Target, ConnectOptions) {
        if self == Transport::Flexins {
            return start(change);
        }
        let (target, mut options) = start(|config| {
            config.tcp = Some(TcpListener {
                address: (Ipv4Addr::LOCALHOST, 0).into(),
                ..TcpListener::default()
            });
            change(config);
        });
        options.target.trtype = TrType::Tcp;
        options.target.trsvcid = target.tcp_address().map(|address| address.port());
        (target, options)
    }
}

/// A target on a free port with one subsystem, over FlexiNS.
pub(crate) fn start(change: impl FnOnce(&mut Config)) -> (Target, ConnectOptions) {
    let mut subsystem = Subsystem::new(nqn());
    subsystem.namespaces.push(Namespace::new("ram:64M"));
    let mut config = Config {
        subsystems: vec![subsystem],
        ..Config::default()
    };
    change(&mut config);
    for _ in 0..50 {
        config.listener.udp_port = free_port();
        if let Ok(target) = Target::start(config.clone()) {
            let uri = target.uris().into_iter().next().unwrap();
            return (target, ConnectOptions::parse(&uri, host()).unwrap());
        }
    }
    panic!("no free UDP port");
}

pub(crate) fn free_port() -> u16 {
    free_udp_port().expect("a free port")
}

/// A queue pair with registered memory, and what a test does with it.
pub(crate) struct Bench {
    pub(crate) queue: QueuePair,
    pub(crate) memory: Arc<SharedMemory>,
}

impl Bench {
    pub(crate) fn new(controller: &Controller, depth: u16) -> Bench {
        let memory = SharedMemory::create("test", 4 << 20, HugePages::No).unwrap();
        let mut queue = controller
            .queue_pair(&QueuePairOptions {
                depth: Some(depth),
                ..Default::default()
            })
            .unwrap();
        queue.register_memory(&memory).unwrap();
        Bench { queue, memory }
    }

    pub(crate) fn span(&self, offset: u64, len: u32) -> Span {
        self.memory.span(offset, len).unwrap()
    }

    /// One command to its end.
    pub(crate) fn run(&mut self, command: Command) -> Result<(), IoError> {
        self.queue.submit(&command, 99).unwrap();
        self.one()
    }

    pub(crate) fn one(&mut self) -> Result<(), IoError> {
        let mut out = Vec::new();
        let started = Instant::now();
        while out.is_empty() {
            assert!(started.elapsed() < Duration::from_secs(20), "no completion");
            self.queue.wait(Duration::from_secs(1), 1, &mut out);
        }
        assert_eq!((out.len(), out[0].tag), (1, 99));
        out[0].result
    }

    pub(crate) fn write(&mut self, lba: u64, data: &[u8]) -> Result<(), IoError> {
        let span = self.span(0, data.len() as u32);
        span.copy_from_slice(data);
        self.run(Command::write(NSID, lba, data.len() as u32 / BLOCK, span))
    }

    pub(crate) fn read(&mut self, lba: u64, len: usize) -> Result<Vec<u8>, IoError> {
        let span = self.span(2 << 20, len as u32);
        span.fill(0xee);
        self.run(Command::read(NSID, lba, len as u32 / BLOCK, span))?;
        let mut data = vec![0; len];
        span.copy_to_slice(&mut data);
        Ok(data)
    }
}

pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect()
}

pub(crate) fn compare_failure(result: Result<(), IoError>) -> bool {
    match result {
        Ok(()) => false,
        Err(IoError::Nvme(status)) if status.is(StatusCode::CompareFailure) => true,
        Err(other) => panic!("{other:?}"),
    }
}
