//! The library against a real target in this process: every operation, every way a controller changes or ends.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_initiator::{
    BlockHandle, Command, ConnectOptions, Controller, ControllerState, DiscardRange, Error, Event,
    Host, IoCompletion, IoError, Nqn, Nsid, Op, QueuePair, QueuePairOptions, SharedMemory, Span,
    StatusCode, TrType, discover,
};
use flexblk_reactor::HugePages;
use flexblk_target::Target;
use flexblk_target::config::{AllowedHosts, Config, Namespace, Subsystem, TcpDigest, TcpListener};
use flexblk_tests::ports::free_udp_port;

const NQN: &str = "nqn.2026-11.io.example:disk";
const NSID: Nsid = Nsid::new(1);
const BLOCK: u32 = 512;

fn nqn() -> Nqn {
    NQN.parse().unwrap()
}

fn host() -> Host {
    Host {
        hostnqn: "nqn.2026-11.io.example:host".parse().unwrap(),
        hostid: flexblk_initiator::HostId::random(),
    }
}

/// Over which transport a test runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Flexins,
    Tcp,
}

impl Transport {
    /// A target on a free port with one subsystem, and how to connect to it.
    fn start(self, change: impl FnOnce(&mut Config)) -> (Target, ConnectOptions) {
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

/// Tests of what both transports have to do.
macro_rules! over_both_transports {
    ($($name:ident)*) => {
        mod flexins {
            $(#[test]
            fn $name() {
                super::$name(super::Transport::Flexins);
            })*
        }
        mod tcp {
            $(#[test]
            fn $name() {
                super::$name(super::Transport::Tcp);
            })*
        }
    };
}

over_both_transports! {
    operations
    blocks_are_compared_and_written_at_once
    random_io_on_queue_pairs_of_two_threads
    bytes_at_any_offset
    a_pause_does_no_harm
    namespaces_come_change_and_go
    discovery_lists_the_subsystem
    a_target_that_closes_ends_everything_once
    a_command_that_takes_too_long_times_out
    queue_pairs_of_one_thread_do_not_disturb_each_other
    descriptors_and_memory_return_after_connect_and_disconnect
}

/// A target on a free port with one subsystem, over FlexiNS.
fn start(change: impl FnOnce(&mut Config)) -> (Target, ConnectOptions) {
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

fn free_port() -> u16 {
    free_udp_port().expect("a free port")
}

/// A queue pair with registered memory, and what a test does with it.
struct Bench {
    queue: QueuePair,
    memory: Arc<SharedMemory>,
}

impl Bench {
    fn new(controller: &Controller, depth: u16) -> Bench {
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

    fn span(&self, offset: u64, len: u32) -> Span {
        self.memory.span(offset, len).unwrap()
    }

    /// One command to its end.
    fn run(&mut self, command: Command) -> Result<(), IoError> {
        self.queue.submit(&command, 99).unwrap();
        self.one()
    }

    fn one(&mut self) -> Result<(), IoError> {
        let mut out = Vec::new();
        let started = Instant::now();
        while out.is_empty() {
            assert!(started.elapsed() < Duration::from_secs(20), "no completion");
            self.queue.wait(Duration::from_secs(1), 1, &mut out);
        }
        assert_eq!((out.len(), out[0].tag), (1, 99));
        out[0].result
    }

    fn write(&mut self, lba: u64, data: &[u8]) -> Result<(), IoError> {
        let span = self.span(0, data.len() as u32);
        span.copy_from_slice(data);
        self.run(Command::write(NSID, lba, data.len() as u32 / BLOCK, span))
    }

    fn read(&mut self, lba: u64, len: usize) -> Result<Vec<u8>, IoError> {
        let span = self.span(2 << 20, len as u32);
        span.fill(0xee);
        self.run(Command::read(NSID, lba, len as u32 / BLOCK, span))?;
        let mut data = vec![0; len];
        span.copy_to_slice(&mut data);
        Ok(data)
    }
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
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

fn compare_failure(result: Result<(), IoError>) -> bool {
    match result {
        Ok(()) => false,
        Err(IoError::Nvme(status)) if status.is(StatusCode::CompareFailure) => true,
        Err(other) => panic!("{other:?}"),
    }
}

/// Fused Compare and Write (NVM 3.2.1.1): written when the blocks hold what was expected, else not; two threads that
/// count in one block by it lose no count.
fn blocks_are_compared_and_written_at_once(transport: Transport) {
    const COUNTS: u64 = 200;
    let (target, mut options) = transport.start(|config| config.cores = vec![0, 0]);
    options.nr_io_queues = 3;
    let controller = Controller::connect(&options).unwrap();
    let mut bench = Bench::new(&controller, 16);
    // In the capsule, and fetched.
    for (lba, len) in [(0, 512), (64, 8192), (200, 32_768)] {
        let (old, new) = (pattern(1, len), pattern(2, len));
        bench.write(lba, &old).unwrap();
        let spans = [0, 1 << 20].map(|offset| bench.span(offset, len as u32));
        let swap = |bench: &mut Bench, expected: &[u8], new: &[u8]| {
            spans[0].copy_from_slice(expected);
            spans[1].copy_from_slice(new);
            let queue = &mut bench.queue;
            queue
                .submit_compare_and_write(NSID, lba, spans[0], spans[1], 99)
                .unwrap();
            bench.one()
        };
        assert_eq!(swap(&mut bench, &old, &new), Ok(()));
        assert_eq!(bench.read(lba, len).unwrap(), new, "{len} bytes");
        assert!(compare_failure(swap(&mut bench, &old, &old)));
        assert_eq!(bench.read(lba, len).unwrap(), new, "{len} bytes");
    }
    let counter = 5000;
    bench.write(counter, &[0; 512]).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let controller = &controller;
            scope.spawn(move || {
                let mut bench = Bench::new(controller, 16);
                // Memory that is not registered goes through bounce buffers.
                let (mut expected, mut new) = (vec![0u8; 512], vec![0u8; 512]);
                for _ in 0..COUNTS {
                    loop {
                        let count = u64::from_le_bytes(expected[..8].try_into().unwrap());
                        new[..8].copy_from_slice(&(count + 1).to_le_bytes());
                        // SAFETY: both vectors outlive the command, and are not touched before its end.
                        let [old, next] = [&mut expected, &mut new].map(|memory| unsafe {
                            Span::from_raw_parts(std::ptr::NonNull::from(&mut memory[0]), 512)
                        });
                        let queue = &mut bench.queue;
                        queue
                            .submit_compare_and_write(NSID, counter, old, next, 99)
                            .unwrap();
                        if !compare_failure(bench.one()) {
                            expected.copy_from_slice(&new);
                            break;
                        }
                        expected = bench.read(counter, 512).unwrap();
                    }
                }
            });
        }
    });
    let bytes = bench.read(counter, 512).unwrap();
    assert_eq!(bytes[..8], (2 * COUNTS).to_le_bytes());
    drop((bench, controller));
    assert!(target.shutdown());
}

fn every_operation(options: &ConnectOptions) {
    let controller = Controller::connect(options).unwrap();
    let namespace = controller.namespace(NSID).unwrap();
    assert_eq!(
        (namespace.block_size, namespace.len_bytes()),
        (BLOCK, 64 << 20)
    );
    let mut bench = Bench::new(&controller, 16);
    // Below and above the in-capsule size, one packet and many.
    for (lba, len) in [
        (0, 512),
        (7, 4096),
        (100, 8192),
        (200, 8704),
        (1000, 131_072),
        (4000, 1 << 20),
    ] {
        let data = pattern(lba, len);
        bench.write(lba, &data).unwrap();
        assert_eq!(bench.read(lba, len).unwrap(), data, "{len} bytes");
    }
    let span = bench.span(0, 4096);
    let data = pattern(5, 4096);
    span.copy_from_slice(&data);
    bench
        .run(Command {
            op: Op::Write { fua: true },
            ..Command::write(NSID, 50, 8, span)
        })
        .unwrap();
    bench.run(Command::flush(NSID)).unwrap();
    bench
        .run(Command {
            op: Op::Compare,
            ..Command::read(NSID, 50, 8, span)
        })
        .unwrap();
    span.fill(1);
    let different = bench.run(Command {
        op: Op::Compare,
        ..Command::read(NSID, 50, 8, span)
    });
    assert!(
        matches!(different, Err(IoError::Nvme(status)) if status.is(StatusCode::CompareFailure)),
        "{different:?}"
    );
    bench
        .run(Command::without_data(Op::Verify, NSID, 50, 8))
        .unwrap();
    bench
        .run(Command::without_data(
            Op::WriteZeroes { deallocate: true },
            NSID,
            51,
            2,
        ))
        .unwrap();
    let after = bench.read(50, 4096).unwrap();
    assert_eq!(after[..512], data[..512]);
    assert!(after[512..1536].iter().all(|b| *b == 0));
    assert_eq!(after[1536..], data[1536..]);
    bench
        .run(Command::without_data(Op::Discard, NSID, 50, 1))
        .unwrap();
    let ranges: Vec<_> = (53..58)
        .map(|lba| DiscardRange { lba, blocks: 1 })
        .collect();
    bench.queue.submit_discard(NSID, &ranges, 99).unwrap();
    bench.one().unwrap();
    assert!(bench.read(50, 512).unwrap().iter().all(|b| *b == 0));
    let beyond = bench.read((64 << 20) / 512 - 1, 1024);
    assert!(
        matches!(beyond, Err(IoError::Nvme(status)) if status.is(StatusCode::LbaOutOfRange)),
        "{beyond:?}"
    );
    // The queue pair works on after an error.
    bench.write(0, &pattern(1, 512)).unwrap();
    assert_eq!(bench.queue.counters().bounced, 0);
}

fn operations(transport: Transport) {
    let (target, options) = transport.start(|_| {});
    every_operation(&options);
    assert!(target.shutdown());
}

#[test]
fn operations_over_tcp_with_digests() {
    let (target, mut options) = Transport::Tcp.start(|_| {});
    for (header, data) in [(true, true), (true, false), (false, true)] {
        (options.hdr_digest, options.data_digest) = (header, data);
        every_operation(&options);
    }
    let controller = Controller::connect(&options).unwrap();
    random_io(&controller, 21, 0, 1500);
    drop(controller);
    assert!(target.shutdown());
}

#[test]
fn digests_are_agreed_on() {
    let require = |config: &mut Config, header, data| {
        if let Some(tcp) = &mut config.tcp {
            (tcp.header_digest, tcp.data_digest) = (header, data);
        }
    };
    let (target, mut options) =
        Transport::Tcp.start(|config| require(config, TcpDigest::Require, TcpDigest::Off));
    let error = Controller::connect(&options).unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    options.hdr_digest = true;
    Controller::connect(&options).unwrap();
    options.data_digest = true;
    let error = Controller::connect(&options).unwrap_err().to_string();
    assert!(error.contains("connect without data_digest"), "{error}");
    assert!(target.shutdown());
}

#[test]
fn reads_and_writes_over_tcp_are_not_copied() {
    let (target, options) = Transport::Tcp.start(|_| {});
    let controller = Controller::connect(&options).unwrap();
    let mut bench = Bench::new(&controller, 32);
    let mut out = Vec::new();
    for round in 0..50 {
        for tag in 0..32 {
            let span = bench.span(tag * 4096, 4096);
            let command = Command::read(NSID, tag * 8, 8, span);
            bench.queue.submit(&command, tag).unwrap();
        }
        out.clear();
        bench.queue.wait(Duration::from_secs(5), 32, &mut out);
        assert_eq!(out.len(), 32, "round {round}");
    }
    let counters = bench.queue.transport_counters().tcp;
    assert!(
        counters.payload_bytes_placed > 9 * counters.payload_bytes_copied,
        "{counters:?}"
    );
    assert!(
        counters.sends < 200,
        "many capsules leave together: {counters:?}"
    );
    assert_eq!(bench.queue.counters().bounced, 0);
    drop((bench, controller));
    assert!(target.shutdown());
}

fn random_io_on_queue_pairs_of_two_threads(transport: Transport) {
    let (target, mut options) = transport.start(|_| {});
    options.nr_io_queues = 2;
    let controller = Controller::connect(&options).unwrap();
    std::thread::scope(|scope| {
        let controller = &controller;
        for n in 0..2 {
            scope.spawn(move || random_io(controller, 177 + n, n * 4096, 3000));
        }
    });
    drop(controller);
    assert!(target.shutdown());
}

#[test]
fn operations_with_an_engine_thread() {
    let (target, mut options) = start(|_| {});
    options.set("engine", "thread").unwrap();
    every_operation(&options);
    // Memory that is not shared is reached without a copy, and what the engine does is counted.
    let controller = Controller::connect(&options).unwrap();
    let mut queue = controller.queue_pair(&QueuePairOptions::default()).unwrap();
    let mut memory = vec![7u8; 65_536];
    // SAFETY: the vector outlives the queue pair's registration, and is looked at only after the
    // commands have completed.
    let span = unsafe {
        Span::from_raw_parts(
            std::ptr::NonNull::from(memory.as_mut_slice()).cast(),
            memory.len() as u32,
        )
    };
    let region = queue.register(span).unwrap();
    let before = queue.transport_counters().engine;
    let mut out = Vec::new();
    for (tag, command) in [
        Command::write(NSID, 0, 65_536 / BLOCK, span),
        Command::read(NSID, 8, 65_536 / BLOCK, span),
    ]
    .into_iter()
    .enumerate()
    {
        queue.submit(&command, tag as u64).unwrap();
        queue.wait(Duration::from_secs(10), 1, &mut out);
        assert_eq!(out.pop().map(|done| done.result), Some(Ok(())));
    }
    assert_eq!(queue.counters().bounced, 0);
    let after = queue.transport_counters().engine;
    assert!(after.packets_tx > before.packets_tx, "{after:?}");
    assert!(after.rx_payload_bytes_placed - before.rx_payload_bytes_placed >= 65_536);
    queue.unregister(region).unwrap();
    queue.close(&mut out);
    assert!(
        queue.transport_counters().engine.packets_tx >= after.packets_tx,
        "also after the end"
    );
    assert!(target.shutdown());
}

#[test]
fn operations_copied_without_digest_on_a_lossy_path() {
    let (target, mut options) = start(|config| {
        config.listener.fault = Some("loss=0.02,reorder=0.02,seed=3".parse().unwrap())
    });
    for (word, value) in [
        ("tx", "copy"),
        ("rx", "ring:4"),
        ("fault", "loss=0.02,reorder=0.02,corrupt=0.005,seed=4"),
    ] {
        options.set(word, value).unwrap();
    }
    every_operation(&options);
    assert!(target.shutdown());
}

/// Random reads and writes at depth, from memory that is registered and from memory that is not, against a model.
fn random_io(controller: &Controller, seed: u64, first_lba: u64, ios: u32) {
    const BLOCKS: u64 = 2048;
    let mut bench = Bench::new(controller, 32);
    let mut model: Vec<u64> = vec![0; BLOCKS as usize];
    let zeroes = Command::without_data(
        Op::WriteZeroes { deallocate: false },
        NSID,
        first_lba,
        BLOCKS as u32,
    );
    bench.run(zeroes).unwrap();
    let mut unregistered = vec![0u8; 32 * 8192];
    // SAFETY: the vector outlives the queue pair's last command: all have completed before the function returns,
    // and it is accessed through spans only.
    let unregistered = unsafe {
        Span::from_raw_parts(
            std::ptr::NonNull::from(unregistered.as_mut_slice()).cast(),
            unregistered.len() as u32,
        )
    };
    let mut random = seed | 1;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut busy: BTreeSet<u64> = BTreeSet::new();
    let mut free: Vec<u64> = (0..32).collect();
    let mut running: Vec<Option<(u64, u32, bool, Span)>> = vec![None; 32];
    let (mut submitted, mut stamp) = (0, 0u64);
    let mut out: Vec<IoCompletion> = Vec::new();
    while submitted < ios || free.len() < 32 {
        if submitted < ios && !free.is_empty() {
            let blocks = 1 + (next() % 16) as u32;
            let at = next() % (BLOCKS - u64::from(blocks));
            let range = at..at + u64::from(blocks);
            if range.clone().all(|block| !busy.contains(&block)) {
                let slot = free.pop().unwrap();
                let len = blocks * BLOCK;
                let span = if next() % 4 == 0 {
                    unregistered.sub(slot as u32 * 8192, len).unwrap()
                } else {
                    bench.span(slot * 8192, len)
                };
                let write = next() % 2 == 0;
                let command = if write {
                    for block in 0..blocks {
                        let stamp = stamp + 1 + u64::from(block);
                        let block = span.sub(block * BLOCK, BLOCK).unwrap();
                        block.fill(stamp as u8);
                        block.copy_from_slice(&stamp.to_le_bytes());
                    }
                    Command::write(NSID, first_lba + at, blocks, span)
                } else {
                    span.fill(0xcc);
                    Command::read(NSID, first_lba + at, blocks, span)
                };
                if bench.queue.submit(&command, slot).is_ok() {
                    for block in range.clone().filter(|_| write) {
                        stamp += 1;
                        model[block as usize] = stamp;
                    }
                    busy.extend(range);
                    running[slot as usize] = Some((at, blocks, write, span));
                    submitted += 1;
                } else {
                    free.push(slot); // bounce buffers are few
                }
            }
        }
        bench.queue.poll(&mut out);
        settle(&mut out, &mut running, &mut busy, &mut free, &model);
    }
    assert!(bench.queue.counters().bounced > 0);
}

/// Takes completions off the books; what was read must be what the model has.
fn settle(
    out: &mut Vec<IoCompletion>,
    running: &mut [Option<(u64, u32, bool, Span)>],
    busy: &mut BTreeSet<u64>,
    free: &mut Vec<u64>,
    model: &[u64],
) {
    for completion in out.drain(..) {
        completion.result.unwrap();
        let (at, blocks, write, span) = running[completion.tag as usize]
            .take()
            .expect("completed twice");
        free.push(completion.tag);
        for block in 0..blocks {
            busy.remove(&(at + u64::from(block)));
            if !write {
                let mut bytes = [0u8; BLOCK as usize];
                span.sub(block * BLOCK, BLOCK)
                    .unwrap()
                    .copy_to_slice(&mut bytes);
                let stamp = model[(at + u64::from(block)) as usize];
                assert_eq!(
                    bytes[..8],
                    stamp.to_le_bytes(),
                    "block {}",
                    at + u64::from(block)
                );
                assert!(bytes[8..].iter().all(|byte| *byte == stamp as u8));
            }
        }
    }
}

#[test]
fn random_io_on_two_queue_pairs_with_faults() {
    let (target, mut options) = start(|_| {});
    options
        .set(
            "fault",
            "loss=0.01,reorder=0.01,duplicate=0.01,corrupt=0.001,seed=9",
        )
        .unwrap();
    options.nr_io_queues = 2;
    let controller = Controller::connect(&options).unwrap();
    assert_eq!(controller.granted_io_queues(), 2);
    std::thread::scope(|scope| {
        let controller = &controller;
        let threads: Vec<_> = (0..2)
            .map(|n| scope.spawn(move || random_io(controller, 77 + n, n * 4096, 3000)))
            .collect();
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
    });
    drop(controller);
    assert!(target.shutdown());
}

#[test]
fn random_io_with_an_engine_thread() {
    let (target, mut options) = start(|_| {});
    options.set("engine", "thread").unwrap();
    let controller = Controller::connect(&options).unwrap();
    random_io(&controller, 5, 0, 2000);
    drop(controller);
    assert!(target.shutdown());
}

fn bytes_at_any_offset(transport: Transport) {
    let (target, options) = transport.start(|_| {});
    let controller = Controller::connect(&options).unwrap();
    let mut handle = BlockHandle::open(&controller, NSID).unwrap();
    let mut model = vec![0u8; 1 << 20];
    let mut offset = 1;
    for (n, len) in [1usize, 511, 512, 513, 5000, 131_072, 200_001, 300_000]
        .into_iter()
        .enumerate()
    {
        let data = pattern(n as u64, len);
        handle.write_at(offset as u64, &data).unwrap();
        model[offset..offset + len].copy_from_slice(&data);
        offset += len + 3;
    }
    handle.flush().unwrap();
    let mut all = vec![0; model.len()];
    handle.read_at(0, &mut all).unwrap();
    assert!(all == model);
    let mut middle = vec![0; 700];
    handle.read_at(12_345, &mut middle).unwrap();
    assert_eq!(middle, model[12_345..13_045]);
    assert!(handle.read_at((64 << 20) - 1, &mut [0; 2]).is_err());
    drop((handle, controller));
    assert!(target.shutdown());
}

fn a_pause_does_no_harm(transport: Transport) {
    let (target, options) = transport.start(|_| {});
    let controller = Controller::connect(&options).unwrap();
    let mut bench = Bench::new(&controller, 4);
    std::thread::sleep(Duration::from_secs(4));
    bench.write(0, &pattern(1, 4096)).unwrap();
    bench.queue.pause();
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(bench.read(0, 4096).unwrap(), pattern(1, 4096));
    drop((bench, controller));
    assert!(target.shutdown());
}

fn namespaces_come_change_and_go(transport: Transport) {
    let (target, options) = transport.start(|_| {});
    let controller = Controller::connect(&options).unwrap();
    let absent = controller.namespace(Nsid::new(2)).unwrap_err();
    assert!(
        matches!(&absent, Error::NoNamespace { .. })
            && absent.to_string().contains("active namespaces: 1"),
        "{absent}"
    );
    let mut bench = Bench::new(&controller, 4);
    let nsid = target
        .add_namespace(&nqn(), &Namespace::new("ram:8M"))
        .unwrap();
    assert_eq!(
        controller.next_event(Duration::from_secs(5)),
        Some(Event::NamespacesChanged)
    );
    assert_eq!(controller.namespace(nsid).unwrap().len_bytes(), 8 << 20);
    let span = bench.span(0, 512);
    bench.run(Command::write(nsid, 0, 1, span)).unwrap();
    target.resize_namespace(&nqn(), nsid, 16 << 20).unwrap();
    assert_eq!(
        controller.next_event(Duration::from_secs(5)),
        Some(Event::NamespacesChanged)
    );
    assert_eq!(controller.namespace(nsid).unwrap().len_bytes(), 16 << 20);
    target.remove_namespace(&nqn(), nsid).unwrap();
    assert_eq!(
        controller.next_event(Duration::from_secs(5)),
        Some(Event::NamespacesChanged)
    );
    assert!(controller.namespace(nsid).is_err());
    assert!(bench.run(Command::write(nsid, 0, 1, span)).is_err());
    bench.write(0, &pattern(1, 512)).unwrap();
    drop((bench, controller));
    assert!(target.shutdown());
}

fn discovery_lists_the_subsystem(transport: Transport) {
    let (target, options) = transport.start(|_| {});
    let mut discovery = options.clone();
    discovery.target.subnqn = None;
    let log = discover(&discovery).unwrap();
    assert!(
        log.records
            .iter()
            .any(|record| record.subnqn.as_str() == NQN),
        "{log:?}"
    );
    assert!(target.shutdown());
}

#[test]
fn who_may_not_is_told() {
    let (target, options) = start(|config| {
        config.subsystems[0].hosts =
            AllowedHosts::Only(["nqn.2026-11.io.example:friend".parse().unwrap()].into());
    });
    let error = Controller::connect(&options).unwrap_err();
    assert!(matches!(error, Error::HostNotAllowed { .. }), "{error}");
    let mut friend = options.clone();
    friend.target.hostnqn = Some("nqn.2026-11.io.example:friend".parse().unwrap());
    Controller::connect(&friend).unwrap();
    let mut elsewhere = friend.clone();
    elsewhere.target.subnqn = Some("nqn.2026-11.io.example:nothing".parse().unwrap());
    let error = Controller::connect(&elsewhere).unwrap_err();
    assert!(matches!(error, Error::NoSubsystem { .. }), "{error}");
    let mut deaf = friend;
    deaf.target.trsvcid = Some(4421);
    let error = Controller::connect(&deaf).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("nothing listens on service 4421"),
        "{error}"
    );
    assert!(target.shutdown());
}

fn a_target_that_closes_ends_everything_once(transport: Transport) {
    let (target, options) = transport.start(|_| {});
    let controller = Controller::connect(&options).unwrap();
    let mut bench = Bench::new(&controller, 32);
    let span = bench.span(0, 4096);
    for tag in 0..32 {
        bench
            .queue
            .submit(&Command::read(NSID, tag * 8, 8, span), tag)
            .unwrap();
    }
    let closing = std::thread::spawn(move || target.shutdown());
    let mut out = Vec::new();
    let started = Instant::now();
    let mut next_tag = 32;
    while bench.queue.lost().is_none() {
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "nobody noticed"
        );
        bench.queue.wait(Duration::from_millis(10), 1, &mut out);
        if bench
            .queue
            .submit(&Command::read(NSID, 0, 8, span), next_tag)
            .is_ok()
        {
            next_tag += 1;
        }
    }
    bench.queue.poll(&mut out);
    let tags: BTreeSet<u64> = out.iter().map(|completion| completion.tag).collect();
    assert_eq!(
        (tags.len(), out.len()),
        (next_tag as usize, next_tag as usize)
    );
    let lost_by = Instant::now() + Duration::from_secs(10);
    while controller.state() == ControllerState::Live {
        assert!(Instant::now() < lost_by, "the controller does not notice");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(matches!(
        controller.next_event(Duration::from_secs(1)),
        Some(Event::Lost(_))
    ));
    assert!(matches!(
        controller.queue_pair(&QueuePairOptions::default()),
        Err(Error::Lost(_))
    ));
    assert!(closing.join().unwrap());
}

fn a_command_that_takes_too_long_times_out(transport: Transport) {
    let (target, mut options) = transport.start(|config| {
        let bdevs = r#"
            [[bdev]]
            type = "ram"
            name = "base"
            size = "8M"
            [[bdev]]
            type = "delay"
            name = "slow"
            base_bdev_name = "base"
            avg_read_latency = 3000000
        "#;
        #[derive(serde::Deserialize)]
        struct Bdevs {
            bdev: Vec<flexblk_blockdev::BdevConfig>,
        }
        config.bdevs = toml::from_str::<Bdevs>(bdevs).unwrap().bdev;
        config.subsystems[0].namespaces = vec![Namespace::new("slow")];
    });
    options.io_timeout = Duration::from_millis(300);
    let controller = Controller::connect(&options).unwrap();
    let mut bench = Bench::new(&controller, 4);
    bench.write(0, &pattern(1, 512)).unwrap();
    let started = Instant::now();
    assert_eq!(bench.read(0, 512), Err(IoError::TimedOut));
    let took = started.elapsed();
    assert!(
        took >= Duration::from_millis(300) && took < Duration::from_millis(1500),
        "{took:?}"
    );
    // The queue pair is gone, the controller is not.
    assert!(bench.queue.lost().is_some());
    assert_eq!(controller.state(), ControllerState::Live);
    let mut again = Bench::new(&controller, 4);
    again.write(0, &pattern(1, 512)).unwrap();
    drop((bench, again, controller));
    assert!(target.shutdown());
}

fn queue_pairs_of_one_thread_do_not_disturb_each_other(transport: Transport) {
    const QUEUES: usize = 6;
    const READS: u64 = 16;
    let (target, mut options) = transport.start(|_| {});
    options.nr_io_queues = QUEUES as u16;
    let controller = Controller::connect(&options).unwrap();
    let mut benches: Vec<Bench> = (0..QUEUES)
        .map(|_| Bench::new(&controller, READS as u16))
        .collect();
    let lba_of = |queue: usize| queue as u64 * 8 * READS;
    let data: Vec<Vec<u8>> = (0..QUEUES)
        .map(|queue| pattern(queue as u64 + 1, READS as usize * 4096))
        .collect();
    for (queue, bench) in benches.iter_mut().enumerate() {
        bench.write(lba_of(queue), &data[queue]).unwrap();
    }
    let submit = |bench: &mut Bench, queue: usize| {
        bench.span(2 << 20, READS as u32 * 4096).fill(0xee);
        for tag in 0..READS {
            let span = bench.span((2 << 20) + tag * 4096, 4096);
            let command = Command::read(NSID, lba_of(queue) + 8 * tag, 8, span);
            bench.queue.submit(&command, tag).unwrap();
        }
    };
    for (queue, bench) in benches.iter_mut().enumerate() {
        submit(bench, queue);
    }
    // Waiting for the last sends and receives for all.
    let mut out = Vec::new();
    let last = benches.last_mut().unwrap();
    let all = last
        .queue
        .wait(Duration::from_secs(10), READS as usize, &mut out);
    assert_eq!(all, READS as usize);
    if transport == Transport::Flexins {
        assert_eq!(
            benches[0].queue.transport_counters(),
            benches[1].queue.transport_counters(),
            "one endpoint"
        );
    }
    // One goes with everything outstanding, another in order; the others keep what is theirs.
    drop(benches.remove(0));
    benches.pop().unwrap().queue.close(&mut out);
    for (bench, data) in benches.iter_mut().zip(&data[1..]) {
        out.clear();
        let all = bench
            .queue
            .wait(Duration::from_secs(10), READS as usize, &mut out);
        assert_eq!(all, READS as usize);
        assert!(out.iter().all(|completion| completion.result.is_ok()));
        let mut read = vec![0; READS as usize * 4096];
        bench
            .span(2 << 20, READS as u32 * 4096)
            .copy_to_slice(&mut read);
        assert_eq!(&read, data);
    }
    // Their places serve others.
    for queue in [0, 5] {
        let mut bench = Bench::new(&controller, READS as u16);
        let read = bench.read(lba_of(queue), 4096).unwrap();
        assert_eq!(read, data[queue][..4096]);
    }
    // A thread of its own has an endpoint of its own.
    let elsewhere = controller.clone();
    let counters = std::thread::spawn(move || {
        let mut bench = Bench::new(&elsewhere, 4);
        bench.read(0, 4096).unwrap();
        bench.queue.transport_counters()
    });
    let (theirs, ours) = (
        counters.join().unwrap(),
        benches[0].queue.transport_counters(),
    );
    if transport == Transport::Flexins {
        assert!(theirs.port.segments_rx < ours.port.segments_rx);
    }
    drop((benches, controller));
    assert!(target.shutdown());
}

fn descriptors_and_memory_return_after_connect_and_disconnect(transport: Transport) {
    let (target, options) = transport.start(|_| {});
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let cycle = || {
        let controller = Controller::connect(&options).unwrap();
        let mut bench = Bench::new(&controller, 8);
        bench.write(0, &pattern(1, 4096)).unwrap();
    };
    cycle();
    // Other tests of this process open and close descriptors, too: the lowest number of several looks counts.
    let lowest = || {
        (0..20)
            .map(|_| {
                std::thread::sleep(Duration::from_millis(5));
                descriptors()
            })
            .min()
            .unwrap()
    };
    let before = lowest();
    for _ in 0..100 {
        cycle();
    }
    let after = lowest();
    assert!(
        after <= before + 40,
        "{before} descriptors before, {after} after 100 connections"
    );
    assert!(target.shutdown());
}
