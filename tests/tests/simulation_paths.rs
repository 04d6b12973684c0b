//! A volume's channel with two paths to one target, in virtual time: paths that are cut, that hold packets for
//! seconds, that hear nothing, and come back. Every request succeeds, every read finds what was written last, and no
//! packet that was held up brings an old write back.
//!
//! `FLEXBLK_SIM_SEEDS=<count>` sets how many seeds are run, `FLEXBLK_SIM_SEED=<n>` repeats one.

mod common;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_initiator::sim::{SimChannel, SimHost, World};
use flexblk_initiator::volume::{IoPolicy, MultipathOptions, Request, WriteFence};
use flexblk_initiator::{ConnectOptions, Host, HostId, Op, SharedMemory, TransportId};
use flexblk_reactor::HugePages;
use flexblk_target::config::parse_nqn;
use flexins::engine::EngineConfig;
use flexins::middleware::random::SplitMix64 as Dice;
use flexins::port::sim::{NodeId, SimLink, SimNet};

use common::TargetNet;

/// Seeds of a usual run.
const SEEDS: u64 = 30;
const SUBNQN: &str = "nqn.2026-11.test:paths";
const BLOCK_BYTES: usize = 4096;
const BLOCKS: u64 = 64;
const PATHS: usize = 2;
const DEPTH: u16 = 16;
const MS: Duration = Duration::from_millis(1);
/// Keep-alive time-out of the controllers.
const KATO: Duration = Duration::from_millis(1000);
/// For how long there are I/O and faults.
const IO_TIME: Duration = Duration::from_secs(12);
/// The retry time tells which path a queue pair is on: so much, and a millisecond for each path.
const RETRY_TIME: Duration = Duration::from_millis(500);

/// A network with a target on its first node. Every queue pair of the host is a node of its own, on one of the paths.
struct Net {
    with_target: TargetNet,
    nodes: Vec<(NodeId, usize)>,
    links: [SimLink; PATHS],
}

impl Net {
    fn new(seed: u64) -> Self {
        Self {
            with_target: TargetNet::new(seed, common::config(SUBNQN, BLOCK_BYTES, BLOCKS)),
            nodes: Vec::new(),
            links: [SimLink::default(); PATHS],
        }
    }

    fn set_link(&mut self, path: usize, link: SimLink) {
        self.links[path] = link;
        for (node, of) in &self.nodes {
            if *of == path {
                self.with_target.net.set_link(*node, link);
            }
        }
    }
}

impl World for Net {
    fn net(&mut self) -> &mut SimNet {
        &mut self.with_target.net
    }

    fn add_node(&mut self, engine: EngineConfig) -> NodeId {
        let path = (engine.retry_time - RETRY_TIME).as_millis() as usize;
        let address = common::address(self.nodes.len() + 1);
        let node = self.net().add(address, engine);
        self.nodes.push((node, path));
        let link = self.links[path];
        self.net().set_link(node, link);
        node
    }

    fn step(&mut self, limit: Instant) -> bool {
        self.with_target.step(limit)
    }
}

fn options(path: usize) -> ConnectOptions {
    let uri = format!("nvme+flexins://10.0.0.0/{SUBNQN}");
    let target: TransportId = uri.parse().expect("an address");
    let host = Host {
        hostnqn: flexblk_initiator::Nqn::opaque("nqn.2026-11.test:host").expect("a name"),
        hostid: HostId::from_bytes([1; 16]),
    };
    ConnectOptions {
        kato: KATO,
        connect_timeout: 300 * MS,
        admin_timeout: 500 * MS,
        ack_timeout: Some(RETRY_TIME + path as u32 * MS),
        ..ConnectOptions::new(target, host)
    }
}

struct Outstanding {
    write: bool,
    lba: u64,
    blocks: u64,
    version: u64,
    place: u64,
}

const PLACES: u64 = DEPTH as u64;
const MAX_BLOCKS: u64 = 4;
const PLACE_BYTES: u64 = MAX_BLOCKS * BLOCK_BYTES as u64;

struct Run {
    dice: Dice,
    net: Rc<RefCell<Net>>,
    world: Rc<RefCell<dyn World>>,
    channel: SimChannel,
    memory: Arc<SharedMemory>,
    places: Vec<u64>,
    versions: Vec<u64>,
    busy: Vec<bool>,
    outstanding: BTreeMap<u64, Outstanding>,
    next_tag: u64,
    version: u64,
    /// By path: when its fault ends, and when a new controller is tried.
    heals: [Option<Instant>; PATHS],
    connects: [Instant; PATHS],
    fail_overs: u64,
}

fn content(lba: u64, version: u64) -> Vec<u8> {
    let words = (0..BLOCK_BYTES / 16).flat_map(|_| [lba, version]);
    words.flat_map(u64::to_le_bytes).collect()
}

impl Run {
    fn new(seed: u64, write_fence: WriteFence) -> Self {
        let mut dice = Dice::new(seed);
        let net = Rc::new(RefCell::new(Net::new(seed)));
        let world: Rc<RefCell<dyn World>> = net.clone();
        let policies = [
            IoPolicy::RoundRobin,
            IoPolicy::QueueDepth,
            IoPolicy::Latency,
        ];
        let multipath = MultipathOptions {
            iopolicy: dice.one(&policies),
            write_fence,
            cqt: 300 * MS,
            ..MultipathOptions::default()
        };
        let mut channel =
            SimChannel::new(&world, PATHS, DEPTH, BLOCK_BYTES as u32, &multipath).expect("memory");
        let memory = SharedMemory::create("simulation", PLACES * PLACE_BYTES, HugePages::No)
            .expect("memory");
        channel.register_memory(&memory).expect("room");
        let now = net.borrow_mut().net().now();
        Self {
            dice,
            net,
            world,
            channel,
            memory,
            places: (0..PLACES).collect(),
            versions: vec![0; BLOCKS as usize],
            busy: vec![false; BLOCKS as usize],
            outstanding: BTreeMap::new(),
            next_tag: 0,
            version: 0,
            heals: [None; PATHS],
            connects: [now; PATHS],
            fail_overs: 0,
        }
    }

    fn now(&self) -> Instant {
        self.net.borrow_mut().net().now()
    }

    fn submit(&mut self) {
        let blocks = 1 + self.dice.below(MAX_BLOCKS);
        let lba = self.dice.below(BLOCKS - blocks + 1);
        let range = lba as usize..(lba + blocks) as usize;
        if self.busy[range.clone()].contains(&true) {
            return;
        }
        let write = self.dice.below(3) > 0;
        self.request(write, lba, blocks);
    }

    fn request(&mut self, write: bool, lba: u64, blocks: u64) {
        let Some(place) = self.places.pop() else {
            return;
        };
        let len = blocks as u32 * BLOCK_BYTES as u32;
        let buffer = self.memory.span(place * PLACE_BYTES, len).expect("inside");
        self.version += 1;
        let version = self.version;
        let bytes: Vec<u8> = (lba..lba + blocks)
            .flat_map(|lba| content(lba, version))
            .collect();
        if write {
            buffer.copy_from_slice(&bytes);
        } else {
            buffer.fill(0xEE);
        }
        let op = if write {
            Op::Write { fua: false }
        } else {
            Op::Read
        };
        let request = Request {
            op,
            lba,
            blocks: blocks as u32,
            buffer: Some(buffer),
        };
        let tag = self.next_tag;
        self.channel.submit(&request, tag).expect("a place is free");
        self.next_tag += 1;
        self.busy[lba as usize..(lba + blocks) as usize].fill(true);
        let outstanding = Outstanding {
            write,
            lba,
            blocks,
            version,
            place,
        };
        self.outstanding.insert(tag, outstanding);
    }

    /// Once around; the error is a read that found something else.
    fn turn(&mut self) -> Result<(), String> {
        let limit = self.now() + MS;
        let mut done = Vec::new();
        self.channel.turn(limit, &mut done);
        for completion in done {
            let request = self.outstanding.remove(&completion.tag).expect("once");
            assert_eq!(completion.result, Ok(()), "requests wait for a path");
            self.places.push(request.place);
            let range = request.lba as usize..(request.lba + request.blocks) as usize;
            self.busy[range.clone()].fill(false);
            if request.write {
                self.versions[range].fill(request.version);
                continue;
            }
            let len = request.blocks as usize * BLOCK_BYTES;
            let buffer = self
                .memory
                .span(request.place * PLACE_BYTES, len as u32)
                .expect("inside");
            let mut bytes = vec![0; len];
            buffer.copy_to_slice(&mut bytes);
            for (lba, found) in range.zip(bytes.chunks_exact(BLOCK_BYTES)) {
                let version = self.versions[lba];
                let expected = match version {
                    0 => vec![0; BLOCK_BYTES],
                    version => content(lba as u64, version),
                };
                if found != expected {
                    let mut word = [0; 8];
                    word.copy_from_slice(&found[8..16]);
                    let there = u64::from_le_bytes(word);
                    return Err(format!(
                        "block {lba} has version {there} instead of {version}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Faults come and go; controllers that are lost are connected again when their path works.
    fn paths(&mut self, faults: bool) {
        let now = self.now();
        for path in 0..PATHS {
            if self.heals[path].is_some_and(|at| at <= now) {
                self.heals[path] = None;
                self.net.borrow_mut().set_link(path, SimLink::default());
            }
            if !faults && self.heals[path].is_some() {
                self.heals[path] = Some(now);
            }
            if faults && self.heals[path].is_none() && self.dice.below(1500) == 0 {
                let hold = Duration::from_micros(self.dice.below(2_200_000));
                let link = match self.dice.below(4) {
                    0 => SimLink {
                        deaf_network: true,
                        deaf_node: true,
                        ..SimLink::default()
                    },
                    // The target gets everything, and its answers are lost.
                    1 => SimLink {
                        deaf_node: true,
                        ..SimLink::default()
                    },
                    _ => SimLink {
                        hold,
                        deaf_node: self.dice.below(2) == 0,
                        ..SimLink::default()
                    },
                };
                self.net.borrow_mut().set_link(path, link);
                let lasts = 300 * MS + Duration::from_micros(self.dice.below(3_000_000));
                self.heals[path] = Some(now + lasts);
            }
            if !self.channel.has_host(path)
                && self.heals[path].is_none()
                && self.connects[path] <= now
            {
                let nqn = parse_nqn(SUBNQN).expect("a name");
                let connected =
                    SimHost::connect(&self.world, &options(path), common::address(0), &nqn);
                match connected {
                    Ok(host) => {
                        self.channel.set_host(path, host);
                        self.fail_overs += 1;
                    }
                    Err(_) => self.connects[path] = self.now() + 100 * MS,
                }
            }
        }
    }

    fn run(mut self) -> Result<u64, String> {
        let io_until = self.now() + IO_TIME;
        let end = io_until + Duration::from_secs(60);
        while self.now() < io_until || !self.outstanding.is_empty() {
            let io = self.now() < io_until;
            if io {
                for _ in 0..self.dice.below(3) {
                    self.submit();
                }
            }
            self.paths(io);
            self.turn()?;
            assert!(
                self.now() < end,
                "{} requests have not ended",
                self.outstanding.len()
            );
        }
        // Whatever is still under way arrives.
        let quiet = self.now() + Duration::from_secs(5);
        while self.now() < quiet {
            self.paths(false);
            self.turn()?;
        }
        for lba in 0..BLOCKS {
            self.request(false, lba, 1);
            while !self.outstanding.is_empty() {
                self.paths(false);
                self.turn()?;
            }
        }
        Ok(self.fail_overs)
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn two_paths_on_a_bad_network() {
    let (first, count) = match number("FLEXBLK_SIM_SEED") {
        Some(seed) => (seed, 1),
        None => (0, number("FLEXBLK_SIM_SEEDS").unwrap_or(SEEDS)),
    };
    let mut fail_overs = 0;
    for seed in first..first + count {
        let run = || Run::new(seed, WriteFence::Strict).run();
        let repeat = format!(
            "repeat it with\n    FLEXBLK_SIM_SEED={seed} cargo test -p flexblk-tests --test simulation_paths two_paths"
        );
        match std::panic::catch_unwind(run) {
            Ok(Ok(connected)) => fail_overs += connected - PATHS as u64,
            Ok(Err(wrong)) => panic!("seed {seed}: {wrong}; {repeat}"),
            Err(_) => panic!("seed {seed} failed; {repeat}"),
        }
    }
    println!("{count} seeds passed, {fail_overs} paths were lost and came back");
    assert!(count < 10 || fail_overs > count, "{fail_overs} paths lost");
}

#[test]
fn without_the_fence_old_writes_come_back() {
    let found = (0..30).find_map(|seed| Run::new(seed, WriteFence::Off).run().err());
    println!("{found:?}");
    assert!(found.is_some(), "30 seeds found nothing");
}
