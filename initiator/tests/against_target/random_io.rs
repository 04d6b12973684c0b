//! Random I/O at depth, against a model.

use std::collections::BTreeSet;

use flexblk_initiator::{Command, Controller, IoCompletion, Op, Span};

use crate::setup::{BLOCK, Bench, NSID, Transport, start};

over_both_transports! {
    random_io_on_queue_pairs_of_two_threads
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

/// Random reads and writes at depth, from memory that is registered and from memory that is not, against a model.
pub(crate) fn random_io(controller: &Controller, seed: u64, first_lba: u64, ios: u32) {
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
