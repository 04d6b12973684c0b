//! The whole of NVMe over FlexiNS in virtual time: the target's queues, controllers and RAM device and the
//! initiator's queue pairs on a network that loses, reorders, duplicates, corrupts, delays and parts.
//! Random commands against a model: every completion exactly once, every byte compared, everything ends in
//! bounded virtual time, and nothing is left behind in the target.
//!
//! `FLEXBLK_SIM_SEEDS=<count>` sets how many seeds are run, `FLEXBLK_SIM_SEED=<n>` repeats one.

mod common;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use flexblk_initiator::sim::{SimHost, World};
use flexblk_initiator::{
    Command, ConnectOptions, Host, HostId, IoCompletion, IoError, Nsid, Op, QueuePair,
    SharedMemory, Span, StatusCode, TransportId,
};
use flexblk_reactor::HugePages;
use flexblk_target::config::parse_nqn;
use flexins::engine::EngineConfig;
use flexins::middleware::random::SplitMix64 as Dice;
use flexins::port::sim::{NodeId, SimFaults, SimNet};

use common::TargetNet;

/// Seeds of a usual run; `cargo xtask soak` takes more.
const SEEDS: u64 = 300;
const SUBNQN: &str = "nqn.2026-11.test:simulation";
const BLOCK_BYTES: usize = 4096;
const BLOCKS: u64 = 256;
/// Longest command in blocks: several packets, several buffers.
const MAX_BLOCKS: u64 = 24;
/// Virtual time in which every command must have ended.
const LIVENESS_LIMIT: Duration = Duration::from_secs(60);
const NSID: Nsid = Nsid::new(1);

/// A network with a target on its first node.
struct Net {
    with_target: TargetNet,
    nodes: usize,
}

impl Net {
    fn new(seed: u64, dice: &mut Dice) -> Self {
        let mut config = common::config(SUBNQN, BLOCK_BYTES, BLOCKS);
        config.listener.mtu = dice
            .chance(50)
            .then(|| dice.one(&[1024, 2048, 4160, 8320, 16_384]));
        config.memory_budget_bytes = dice.one(&[8, 64]) << 20;
        Self {
            with_target: TargetNet::new(seed, config),
            nodes: 1,
        }
    }
}

impl World for Net {
    fn net(&mut self) -> &mut SimNet {
        &mut self.with_target.net
    }

    fn add_node(&mut self, engine: EngineConfig) -> NodeId {
        let address = common::address(self.nodes);
        let node = self.net().add(address, engine);
        self.nodes += 1;
        node
    }

    fn step(&mut self, limit: Instant) -> bool {
        self.with_target.step(limit)
    }
}

/// What a block holds: so many times it was written.
type Version = u64;

/// Bytes of a block in a version; 0 is all zeroes.
fn block(lba: u64, version: Version) -> [u8; BLOCK_BYTES] {
    let mut bytes = [0; BLOCK_BYTES];
    if version > 0 {
        let mut state = (lba << 32 | version).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        for word in bytes.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
    bytes
}

/// The namespace as it must be: a block whose write failed with its connection is in one of two versions.
#[derive(Clone, Copy, Default)]
struct Block {
    version: Version,
    or: Option<Version>,
    /// A command that is outstanding uses it.
    busy: bool,
}

struct Outstanding {
    op: Op,
    lba: u64,
    blocks: u64,
    version: Version,
    place: u64,
    /// A Compare with other data.
    differs: bool,
    queue: usize,
}

struct Run {
    dice: Dice,
    net: Rc<RefCell<Net>>,
    hosts: Vec<SimHost>,
    queues: Vec<QueuePair>,
    memory: Arc<SharedMemory>,
    places: Vec<u64>,
    model: Vec<Block>,
    versions: Version,
    outstanding: BTreeMap<u64, Outstanding>,
    next_tag: u64,
    to_submit: u64,
    may_fail: bool,
    /// No partition before.
    part_from: Instant,
    /// I/O buffers of a target without hosts.
    whole: (u32, u32),
}

const PLACES: u64 = 64;
const PLACE_BYTES: u64 = MAX_BLOCKS * BLOCK_BYTES as u64;

impl Run {
    fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let net = Rc::new(RefCell::new(Net::new(seed, &mut dice)));
        let memory = SharedMemory::create("simulation", PLACES * PLACE_BYTES, HugePages::No)
            .expect("memory");
        let world: Rc<RefCell<dyn World>> = net.clone();
        let (mut hosts, mut queues) = (Vec::new(), Vec::new());
        let whole = net.borrow_mut().with_target.target.figures().1;
        net.borrow_mut().net().set_faults(faults(&mut dice));
        for number in 0..1 + dice.below(2) {
            let options = options(&mut dice, number);
            let nqn = parse_nqn(SUBNQN).expect("a name");
            let mut host =
                SimHost::connect(&world, &options, common::address(0), &nqn).expect("a controller");
            assert_eq!(host.namespaces()[0].block_count, BLOCKS);
            for qid in 1..=1 + dice.below(2) as u16 {
                let depth = dice.one(&[1, 2, 8, 32]);
                let mut queue = host.queue_pair(qid, depth).expect("a queue pair");
                // Without a registration everything goes through bounce buffers.
                if dice.chance(80) {
                    queue.register_memory(&memory).expect("registered");
                }
                queues.push(queue);
            }
            hosts.push(host);
        }
        Self {
            to_submit: 30 + dice.below(300),
            dice,
            net,
            hosts,
            queues,
            memory,
            places: (0..PLACES).collect(),
            model: vec![Block::default(); BLOCKS as usize],
            versions: 0,
            outstanding: BTreeMap::new(),
            next_tag: 0,
            may_fail: false,
            part_from: Instant::now(),
            whole,
        }
    }

    fn span(&self, place: u64, blocks: u64) -> Span {
        self.memory
            .span(place * PLACE_BYTES, (blocks as usize * BLOCK_BYTES) as u32)
            .expect("in the memory")
    }

    /// Submits one random command on blocks that no other uses.
    fn submit(&mut self) {
        let dice = &mut self.dice;
        let queue = dice.below(self.queues.len() as u64) as usize;
        let blocks = if dice.chance(60) {
            1
        } else {
            1 + dice.below(MAX_BLOCKS)
        };
        let lba = dice.below(BLOCKS - blocks + 1);
        let range = lba as usize..(lba + blocks) as usize;
        let op = match dice.below(20) {
            0..8 => Op::Read,
            8..15 => Op::Write {
                fua: dice.chance(20),
            },
            15 => Op::Compare,
            16 => Op::WriteZeroes {
                deallocate: dice.chance(50),
            },
            17 => Op::Discard,
            18 => Op::Verify,
            _ => Op::Flush,
        };
        let whole = !matches!(op, Op::Flush);
        let uncertain = |block: &Block| block.busy || (op == Op::Compare && block.or.is_some());
        if whole && self.model[range.clone()].iter().any(uncertain) {
            return;
        }
        let Some(place) = self.places.pop() else {
            return;
        };
        let buffer = self.span(place, blocks);
        let differs = op == Op::Compare && self.dice.chance(30);
        let mut bytes = Vec::new();
        let version = self.versions + 1;
        for at in lba..lba + blocks {
            let known = self.model[at as usize].version;
            bytes.extend(match op {
                Op::Write { .. } => block(at, version),
                Op::Compare => block(at, known),
                _ => [0xEE; BLOCK_BYTES],
            });
        }
        if differs {
            let at = self.dice.below(bytes.len() as u64) as usize;
            bytes[at] ^= 0x10;
        }
        buffer.copy_from_slice(&bytes);
        let command = match op {
            Op::Read | Op::Write { .. } | Op::Compare => Command {
                op,
                ..Command::read(NSID, lba, blocks as u32, buffer)
            },
            Op::Flush => Command::flush(NSID),
            _ => Command::without_data(op, NSID, lba, blocks as u32),
        };
        let tag = self.next_tag;
        if self.queues[queue].submit(&command, tag).is_err() {
            self.places.push(place);
            return;
        }
        self.next_tag += 1;
        self.to_submit = self.to_submit.saturating_sub(1);
        self.versions = version;
        if whole {
            for block in &mut self.model[range] {
                block.busy = true;
            }
        }
        self.outstanding.insert(
            tag,
            Outstanding {
                op,
                lba,
                blocks,
                version,
                place,
                differs,
                queue,
            },
        );
    }

    fn complete(&mut self, queue: usize, done: IoCompletion) {
        let command = self
            .outstanding
            .remove(&done.tag)
            .unwrap_or_else(|| panic!("{done:?} again, or never submitted"));
        assert_eq!(command.queue, queue, "completed where it was submitted");
        let mut bytes = vec![0; command.blocks as usize * BLOCK_BYTES];
        self.span(command.place, command.blocks)
            .copy_to_slice(&mut bytes);
        self.places.push(command.place);
        let written = match command.op {
            Op::Write { .. } => Some(command.version),
            Op::WriteZeroes { .. } | Op::Discard => Some(0),
            _ => None,
        };
        match done.result {
            Ok(()) => assert!(!command.differs, "Compare found no difference"),
            Err(IoError::Nvme(status)) if command.differs => {
                assert!(status.is(StatusCode::CompareFailure), "{status}");
            }
            Err(IoError::ConnectionLost | IoError::TimedOut | IoError::Closed) if self.may_fail => {
            }
            Err(error) => panic!("{:?}: {error}", command.op),
        }
        if command.op == Op::Flush {
            return;
        }
        for (number, lba) in (command.lba..command.lba + command.blocks).enumerate() {
            let known = &mut self.model[lba as usize];
            known.busy = false;
            match (written, done.result) {
                (Some(version), Ok(())) => {
                    *known = Block {
                        version,
                        ..Block::default()
                    }
                }
                // It may have been carried out, or may still be.
                (Some(version), Err(_)) => known.or = Some(version),
                (None, Ok(())) if command.op == Op::Read => {
                    let start = number * BLOCK_BYTES;
                    let found = &bytes[start..start + BLOCK_BYTES];
                    let versions = [Some(known.version), known.or];
                    let right = versions
                        .into_iter()
                        .flatten()
                        .find(|version| found == block(lba, *version));
                    assert!(right.is_some(), "block {lba} is not {versions:?}");
                }
                (None, _) => {}
            }
        }
    }

    /// Lets everything go on once. False when there was nothing to do until `limit`.
    fn step(&mut self, limit: Instant) -> bool {
        let mut done = Vec::new();
        for queue in 0..self.queues.len() {
            self.queues[queue].poll(&mut done);
            for completion in std::mem::take(&mut done) {
                self.complete(queue, completion);
            }
        }
        for host in &mut self.hosts {
            if let Err(error) = host.service() {
                assert!(self.may_fail, "{error}");
            }
        }
        self.net.borrow_mut().step(limit)
    }

    fn now(&self) -> Instant {
        self.net.borrow_mut().net().now()
    }

    fn partition(&self, parted: bool) {
        self.net.borrow_mut().net().partition(parted);
    }

    /// Submits what is to be submitted and runs until everything has ended.
    fn finish(&mut self) {
        let deadline = self.now() + LIVENESS_LIMIT;
        let mut parted_until = None;
        while self.to_submit > 0 || !self.outstanding.is_empty() {
            for _ in 0..self.dice.below(8) {
                if self.to_submit > 0 {
                    self.submit();
                }
            }
            // A partition that is shorter than the transport's patience harms nobody, nor do several with
            // time between them to make progress.
            if self.dice.below(2000) == 0 && parted_until.is_none() && self.part_from <= self.now()
            {
                self.partition(true);
                parted_until = Some(self.now() + Duration::from_millis(self.dice.below(1500)));
            }
            if parted_until.is_some_and(|until| until <= self.now()) {
                self.partition(false);
                parted_until = None;
                self.part_from = self.now() + Duration::from_secs(2);
            }
            let mut limit = self.now() + Duration::from_millis(10);
            limit = parted_until.map_or(limit, |until| limit.min(until));
            self.step(limit);
            assert!(
                self.now() < deadline,
                "{} commands have not ended",
                self.outstanding.len()
            );
        }
        if parted_until.is_some() {
            self.partition(false);
            self.part_from = self.now() + Duration::from_secs(2);
        }
    }

    /// Reads the whole namespace.
    fn read_all(&mut self) {
        for lba in (0..BLOCKS).step_by(16) {
            let place = self.places.pop().expect("nothing is outstanding");
            let buffer = self.span(place, 16);
            let tag = self.next_tag;
            self.next_tag += 1;
            self.queues[0]
                .submit(&Command::read(NSID, lba, 16, buffer), tag)
                .expect("submitted");
            let read = Outstanding {
                op: Op::Read,
                lba,
                blocks: 16,
                version: 0,
                place,
                differs: false,
                queue: 0,
            };
            self.outstanding.insert(tag, read);
            self.finish();
        }
    }

    /// Steps until the target has no queues and all its buffers.
    fn expect_nothing_left(&mut self, whole: (u32, u32), limit: Duration) {
        let deadline = self.now() + limit;
        loop {
            let mut net = self.net.borrow_mut();
            let (queues, buffers) = net.with_target.target.figures();
            if queues == 0 {
                assert_eq!(buffers, whole, "buffers of the target are lost");
                return;
            }
            let now = net.net().now();
            assert!(now < deadline, "{queues} queues are left");
            net.step(deadline.min(now + Duration::from_secs(1)));
        }
    }
}

fn faults(dice: &mut Dice) -> SimFaults {
    let mut ppm = |max: u64| {
        if dice.chance(70) {
            dice.below(max) as u32
        } else {
            0
        }
    };
    SimFaults {
        loss_ppm: ppm(100_000),
        duplicate_ppm: ppm(50_000),
        corrupt_ppm: ppm(20_000),
        reorder_ppm: ppm(100_000),
        delay: Duration::from_micros(1 + dice.below(60)),
        jitter: Duration::from_micros(dice.below(20)),
        reorder_delay: Duration::from_micros(dice.below(400)),
    }
}

fn options(dice: &mut Dice, number: u64) -> ConnectOptions {
    let uri = format!("nvme+flexins://10.0.0.0/{SUBNQN}");
    let target: TransportId = uri.parse().expect("an address");
    let host = Host {
        hostnqn: flexblk_initiator::Nqn::opaque(&format!("nqn.2026-11.test:host-{number}"))
            .expect("a name"),
        hostid: HostId::from_bytes([number as u8 + 1; 16]),
    };
    let mut options = ConnectOptions::new(target, host);
    options.nr_io_queues = 4;
    options.mtu = dice.chance(50).then(|| dice.one(&[1024, 4160, 8320]));
    // With keep-alive off, a dead host is found by asking its transport.
    options.kato = if dice.chance(50) {
        Duration::from_secs(5)
    } else {
        Duration::ZERO
    };
    options
}

/// One seed: I/O, then an end by disconnecting, by a partition for ever, or by hosts that vanish.
fn simulate(seed: u64) {
    let mut run = Run::new(seed);
    let whole = run.whole;
    run.finish();
    run.read_all();
    match run.dice.below(3) {
        0 => {
            for mut queue in std::mem::take(&mut run.queues) {
                let mut done = Vec::new();
                queue.close(&mut done);
                assert_eq!(done, [], "nothing was outstanding");
            }
            for host in std::mem::take(&mut run.hosts) {
                host.disconnect();
            }
            run.expect_nothing_left(whole, Duration::from_secs(60));
        }
        1 => {
            // Every command ends exactly once, also those that are lost with the connection.
            run.may_fail = true;
            run.to_submit = 40;
            for _ in 0..20 {
                run.submit();
            }
            for _ in 0..run.dice.below(60) {
                let soon = run.now() + Duration::from_millis(1);
                run.step(soon);
            }
            run.partition(true);
            let deadline = run.now() + LIVENESS_LIMIT;
            while !run.outstanding.is_empty() {
                let soon = run.now() + Duration::from_millis(100);
                run.step(soon);
                assert!(run.now() < deadline, "commands outlive the connection");
            }
            run.expect_nothing_left(whole, Duration::from_secs(600));
        }
        _ => {
            run.may_fail = true;
            run.to_submit = 40;
            for _ in 0..20 {
                run.submit();
            }
            // As with kill -9: nobody answers any more. (The queue pairs are dropped after the partition.)
            run.partition(true);
            run.expect_nothing_left(whole, Duration::from_secs(600));
        }
    }
}

#[test]
fn random_commands_on_a_bad_network() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    if let Some(seed) = number("FLEXBLK_SIM_SEED") {
        return simulate(seed);
    }
    let count = number("FLEXBLK_SIM_SEEDS").unwrap_or(SEEDS);
    let next = AtomicU64::new(0);
    let failed = std::sync::Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= count {
                        return;
                    }
                    if std::panic::catch_unwind(|| simulate(seed)).is_err() {
                        eprintln!(
                            "seed {seed} failed; repeat it with\n    FLEXBLK_SIM_SEED={seed} cargo test -p \
                             flexblk-tests --test simulation"
                        );
                        if let Ok(mut failed) = failed.lock() {
                            failed.push(seed);
                        }
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("no panic while it was locked");
    assert!(failed.is_empty(), "failing seeds: {failed:?}");
    println!("{count} seeds passed");
}
