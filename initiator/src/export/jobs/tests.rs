use super::*;
use proptest::prelude::*;

/// A disk that takes so many commands at once and does them in any order.
struct Disk {
    bytes: Vec<u8>,
    depth: usize,
    taken: Vec<(Request, u64)>,
    most_bytes: u32,
    bad_lba: Option<u64>,
}

impl Submit for Disk {
    fn submit(&mut self, request: &Request, tag: u64) -> Result<(), Busy> {
        if self.taken.len() >= self.depth {
            return Err(Busy);
        }
        if let Some(buffer) = request.buffer {
            assert!(buffer.len() <= self.most_bytes);
            assert_eq!(buffer.len(), request.blocks * 512);
        }
        self.taken.push((*request, tag));
        Ok(())
    }
}

impl Disk {
    fn new(blocks: usize, depth: usize) -> Disk {
        Disk {
            bytes: (0..blocks * 512).map(|at| (at / 7) as u8).collect(),
            depth,
            taken: Vec::new(),
            most_bytes: 64 << 10,
            bad_lba: None,
        }
    }

    fn complete(&mut self, which: usize) -> IoCompletion {
        let (request, tag) = self.taken.swap_remove(which % self.taken.len());
        let bad = |lba| (request.lba..request.lba + u64::from(request.blocks)).contains(&lba);
        if self.bad_lba.is_some_and(bad) {
            let result = Err(IoError::TimedOut);
            return IoCompletion { tag, result };
        }
        let from = request.lba as usize * 512;
        let range = from..from + request.blocks as usize * 512;
        match (request.op, request.buffer) {
            (Op::Read, Some(buffer)) => {
                buffer.copy_from_slice(&self.bytes[range]);
            }
            (Op::Write { .. }, Some(buffer)) => {
                buffer.copy_to_slice(&mut self.bytes[range]);
            }
            (Op::WriteZeroes { .. }, None) => self.bytes[range].fill(0),
            (Op::Discard | Op::Flush, None) => {}
            other => panic!("{:?} with {:?}", other.0, other.1),
        }
        let result = Ok(());
        IoCompletion { tag, result }
    }
}

fn wanted(op: Op, lba: u64, blocks: u64) -> Wanted {
    Wanted {
        op,
        lba,
        blocks,
        then_flush: false,
    }
}

/// Memory in pieces of these lengths, each away from the others.
fn pieces(memory: &Arc<SharedMemory>, lengths: &[u32]) -> Vec<Span> {
    let mut at = 0;
    let mut spans = Vec::new();
    for len in lengths {
        spans.push(memory.span(at, *len).unwrap());
        at += u64::from(*len) + 64;
    }
    spans
}

proptest! {
    #[test]
    fn bytes_arrive_whatever_the_shape_of_the_memory(
        cuts in proptest::collection::vec(1u32..60_000, 1..12),
        lba in 0u64..64,
        depth in 1usize..5,
        order in proptest::collection::vec(0usize..8, 1..40),
        write in any::<bool>(),
    ) {
        let total: u32 = cuts.iter().sum();
        let mut lengths = cuts;
        *lengths.last_mut().unwrap() += total.next_multiple_of(512) - total;
        let total = u64::from(total.next_multiple_of(512));
        let memory = SharedMemory::create("guest", total + 64 * 12, HugePages::No).unwrap();
        let spans = pieces(&memory, &lengths);
        let mut disk = Disk::new(64 + total as usize / 512, depth);
        let mut jobs = Jobs::new(&Namespace::example(), 4, depth as u16, 0).unwrap();
        let pattern: Vec<u8> = (0..total).map(|at| (at % 251) as u8).collect();
        let mut expected = disk.bytes.clone();
        let range = lba as usize * 512..lba as usize * 512 + total as usize;
        if write {
            let mut from = 0;
            for span in &spans {
                from += span.copy_from_slice(&pattern[from..]);
            }
            expected[range.clone()].copy_from_slice(&pattern);
        }
        let op = if write { Op::Write { fua: false } } else { Op::Read };
        jobs.start(&mut disk, &wanted(op, lba, total / 512), &spans, 77).unwrap();
        let mut order = order.iter().cycle();
        let done = loop {
            let completion = disk.complete(*order.next().unwrap());
            if let Some(done) = jobs.completed(&completion) {
                break done;
            }
            jobs.submit_waiting(&mut disk);
        };
        prop_assert_eq!(done, Done { tag: 77, result: Ok(()) });
        prop_assert_eq!(jobs.outstanding(), 0);
        prop_assert!(disk.taken.is_empty());
        prop_assert_eq!(jobs.bounce.available(), jobs.bounce.count());
        if write {
            prop_assert_eq!(disk.bytes, expected);
        } else {
            let mut read = vec![0; total as usize];
            let mut to = 0;
            for span in &spans {
                to += span.copy_to_slice(&mut read[to..]);
            }
            prop_assert_eq!(&read, &expected[range]);
        }
    }
}

#[test]
fn what_lies_in_one_piece_is_not_copied() {
    let memory = SharedMemory::create("guest", 256 << 10, HugePages::No).unwrap();
    let span = memory.span(512, 200 << 10).unwrap();
    let mut disk = Disk::new(1024, 8);
    let mut jobs = Jobs::new(&Namespace::example(), 1, 8, 0).unwrap();
    jobs.start(&mut disk, &wanted(Op::Read, 0, 400), &[span], 1)
        .unwrap();
    let lengths: Vec<u32> = disk.taken.iter().map(|(it, _)| it.blocks).collect();
    assert_eq!(lengths, [128, 128, 128, 16]);
    for (request, _) in &disk.taken {
        let at = request.buffer.unwrap().as_ptr() as usize - span.as_ptr() as usize;
        assert_eq!(at as u64, request.lba * 512);
    }
    assert!(!jobs.has_room());
    let again = jobs.start(&mut disk, &wanted(Op::Read, 0, 1), &[span], 2);
    assert_eq!(again, Err(Busy));
}

#[test]
fn an_error_ends_the_request_once_and_spares_the_rest() {
    let memory = SharedMemory::create("guest", 1 << 20, HugePages::No).unwrap();
    let span = memory.span(0, 1 << 20).unwrap();
    let mut disk = Disk::new(2048, 2);
    disk.bad_lba = Some(130);
    let mut jobs = Jobs::new(&Namespace::example(), 2, 2, 0).unwrap();
    let write = Op::Write { fua: true };
    jobs.start(&mut disk, &wanted(write, 0, 2048), &[span], 5)
        .unwrap();
    assert_eq!(disk.taken.len(), 2);
    let bad = disk.complete(1);
    assert_eq!(jobs.completed(&bad), None);
    jobs.submit_waiting(&mut disk);
    assert_eq!(disk.taken.len(), 1, "the rest is not sent");
    let good = disk.complete(0);
    let result = Err(IoError::TimedOut);
    assert_eq!(jobs.completed(&good), Some(Done { tag: 5, result }));
}

#[test]
fn without_data_only_the_number_of_blocks_counts() {
    let mut disk = Disk::new(0, 8);
    let namespace = Namespace {
        max_blocks: MaxBlocks {
            write_zeroes: 60_000,
            ..MaxBlocks::EXPRESSIBLE
        },
        ..Namespace::example()
    };
    let mut jobs = Jobs::new(&namespace, 8, 8, 0).unwrap();
    let zeroes = Op::WriteZeroes { deallocate: true };
    jobs.start(&mut disk, &wanted(zeroes, 10, 150_000), &[], 1)
        .unwrap();
    jobs.start(&mut disk, &wanted(Op::Discard, 10, 150_000), &[], 2)
        .unwrap();
    jobs.start(&mut disk, &wanted(Op::Flush, 0, 0), &[], 3)
        .unwrap();
    let taken: Vec<(u64, u32)> = (disk.taken.iter())
        .map(|(it, _)| (it.lba, it.blocks))
        .collect();
    let zeroed = [(10, 60_000), (60_010, 60_000), (120_010, 30_000)];
    assert_eq!(taken, [&zeroed[..], &[(10, 150_000), (0, 0)]].concat());
    let mut left = jobs.abandon();
    left.sort_unstable();
    assert_eq!((left, jobs.outstanding()), (vec![1, 2, 3], 0));
}

#[test]
fn what_has_to_be_durable_ends_with_a_flush() {
    let mut disk = Disk::new(1024, 2);
    let namespace = Namespace {
        max_blocks: MaxBlocks {
            write_zeroes: 64,
            ..MaxBlocks::EXPRESSIBLE
        },
        ..Namespace::example()
    };
    let mut jobs = Jobs::new(&namespace, 2, 2, 0).unwrap();
    let zeroes = Wanted {
        then_flush: true,
        ..wanted(Op::WriteZeroes { deallocate: false }, 0, 160)
    };
    jobs.start(&mut disk, &zeroes, &[], 9).unwrap();
    // All of it, which takes longer than there is room for at once, before the flush.
    for _ in 0..3 {
        assert!((disk.taken.iter()).all(|(it, _)| it.op != Op::Flush));
        let part = disk.complete(0);
        assert_eq!(jobs.completed(&part), None);
        jobs.submit_waiting(&mut disk);
    }
    let ops: Vec<Op> = disk.taken.iter().map(|(it, _)| it.op).collect();
    assert_eq!(ops, [Op::Flush]);
    assert!(disk.bytes[..160 * 512].iter().all(|byte| *byte == 0));
    let flushed = disk.complete(0);
    let result = Ok(());
    assert_eq!(jobs.completed(&flushed), Some(Done { tag: 9, result }));
    // What failed is not flushed, and the next request is one of its own.
    disk.bad_lba = Some(3);
    jobs.start(&mut disk, &zeroes, &[], 10).unwrap();
    let bad = disk.taken.iter().position(|(it, _)| it.lba == 0).unwrap();
    let bad = disk.complete(bad);
    assert_eq!(jobs.completed(&bad), None);
    let other = disk.complete(0);
    let result = Err(IoError::TimedOut);
    assert_eq!(jobs.completed(&other), Some(Done { tag: 10, result }));
    jobs.submit_waiting(&mut disk);
    assert!(disk.taken.is_empty());
    assert_eq!(jobs.outstanding(), 0);
}
