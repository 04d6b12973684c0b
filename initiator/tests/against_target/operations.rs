//! Every operation, on every kind of queue pair.

use std::time::Duration;

use flexblk_initiator::{
    BlockHandle, Command, ConnectOptions, Controller, DiscardRange, Error, IoError, Op,
    QueuePairOptions, Span, StatusCode,
};
use flexblk_target::config::{Config, TcpDigest};

use crate::random_io::random_io;
use crate::setup::{BLOCK, Bench, NSID, Transport, compare_failure, pattern, start};

over_both_transports! {
    operations
    blocks_are_compared_and_written_at_once
    bytes_at_any_offset
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

/// Sockets are asked without the ring by a thread that spins, with little outstanding and an answer that comes soon;
/// in all other cases the ring tells. Data arrives with either and with both in turn.
#[test]
fn a_spinning_thread_asks_the_socket_and_a_sleeping_one_is_told() {
    for (budget, depths, asked) in [
        (Duration::from_secs(1), vec![1, 2, 32], true),
        (Duration::ZERO, vec![1, 32], false),
        (
            Duration::from_micros(100),
            vec![1, 128, 3, 64, 32, 33],
            true,
        ),
    ] {
        let (target, mut options) = Transport::Tcp.start(|_| {});
        options.poll_budget = budget;
        let controller = Controller::connect(&options).unwrap();
        let mut bench = Bench::new(&controller, 128);
        let before = bench.queue.transport_counters().tcp;
        for round in 0..20 {
            for depth in &depths {
                let patterns: Vec<u8> = (0..*depth).map(|tag| (round * 7 + tag) as u8).collect();
                for (write, lba) in [(true, round % 2), (false, round % 2)] {
                    for (tag, pattern) in patterns.iter().enumerate() {
                        let span = bench.span(tag as u64 * 4096, 4096);
                        span.copy_from_slice(&[if write { *pattern } else { 0xee }; 4096]);
                        let at = lba * 1024 + tag as u64 * 8;
                        let command = match write {
                            true => Command::write(NSID, at, 8, span),
                            false => Command::read(NSID, at, 8, span),
                        };
                        bench.queue.submit(&command, tag as u64).unwrap();
                    }
                    let mut out = Vec::new();
                    bench
                        .queue
                        .wait(Duration::from_secs(5), patterns.len(), &mut out);
                    assert_eq!(out.len(), patterns.len(), "round {round}");
                    assert!(out.iter().all(|completion| completion.result.is_ok()));
                }
                for (tag, pattern) in patterns.iter().enumerate() {
                    let mut read = [0; 4096];
                    bench.span(tag as u64 * 4096, 4096).copy_to_slice(&mut read);
                    assert!(read.iter().all(|byte| byte == pattern), "round {round}");
                }
            }
            if round == 10 {
                // Long enough for a thread to sleep over.
                let mut out = Vec::new();
                std::thread::sleep(Duration::from_millis(5));
                bench.queue.poll(&mut out);
            }
        }
        let after = bench.queue.transport_counters().tcp;
        let looks = after.looks_found - before.looks_found;
        match asked {
            true => assert!(looks > 20, "{budget:?} {depths:?}: {after:?}"),
            false => assert_eq!(looks, 0, "{budget:?} {depths:?}: {after:?}"),
        }
        drop((bench, controller));
        assert!(target.shutdown());
    }
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
