use proptest::prelude::*;

use super::*;
use crate::export::Buffers;

const GEOMETRY: Geometry = Geometry {
    block_bytes: 512,
    len_bytes: 1 << 40,
    max_transfer_bytes: 4096,
    max_without_data: MaxBlocks::EXPRESSIBLE,
};

fn wanted(op: Op, lba: u64, blocks: u64) -> Wanted {
    Wanted {
        op,
        extent: Extent { lba, blocks },
        then_flush: false,
    }
}

fn done(tag: u64) -> IoCompletion {
    IoCompletion {
        tag,
        result: Ok(()),
    }
}

/// Submits all that fits into `depth`, and returns the parts.
fn submit(requests: &mut Requests, depth: usize) -> Vec<(Request, u64)> {
    let mut parts = Vec::new();
    let mut ended = Vec::new();
    requests.submit(
        |part, tag| {
            if parts.len() == depth {
                return Err(Busy);
            }
            parts.push((*part, tag));
            Ok(())
        },
        &mut ended,
    );
    assert_eq!(ended, []);
    parts
}

#[test]
fn a_byte_range_becomes_blocks_or_is_refused() {
    let geometry = Geometry {
        block_bytes: 4096,
        len_bytes: 1 << 20,
        max_transfer_bytes: 4096,
        ..GEOMETRY
    };
    let blocks = |offset, len| geometry.extent(offset, len);
    assert_eq!(blocks(8192, 4096), Ok(Extent { lba: 2, blocks: 1 }));
    assert_eq!(
        blocks(1 << 20, 0),
        Ok(Extent {
            lba: 256,
            blocks: 0
        })
    );
    assert_eq!(blocks(512, 4096), Err(Refusal::Unaligned));
    assert_eq!(blocks(0, 512), Err(Refusal::Unaligned));
    assert_eq!(blocks(1 << 20, 4096), Err(Refusal::OutOfRange));
    assert_eq!(blocks(u64::MAX - 4095, 8192), Err(Refusal::OutOfRange));
}

#[test]
fn a_long_discard_is_cut_and_takes_only_a_share_of_the_queue() {
    let mut requests = Requests::new(2, &GEOMETRY);
    let blocks = 5 * u64::from(u32::MAX) + 7;
    requests
        .begin(&wanted(Op::Discard, 3, blocks), [], 1)
        .unwrap();
    requests.begin(&wanted(Op::Flush, 0, 0), [], 2).unwrap();
    assert!(!requests.has_room());
    let parts = submit(&mut requests, 100);
    assert_eq!(
        parts.len(),
        5,
        "four of the discard, and the flush overtakes the rest"
    );
    assert_eq!(requests.completed(&done(parts[4].1)).unwrap().user, 2);
    let mut seen: u64 = parts[..4]
        .iter()
        .map(|(part, _)| u64::from(part.blocks))
        .sum();
    for _ in 0..2 {
        assert_eq!(requests.completed(&done(parts[0].1)), None);
        for (part, _) in submit(&mut requests, 100) {
            assert_eq!(part.lba, 3 + seen);
            seen += u64::from(part.blocks);
        }
    }
    assert_eq!(seen, blocks);
    let ends: Vec<_> = (0..4)
        .filter_map(|_| requests.completed(&done(parts[0].1)))
        .collect();
    assert_eq!(
        ends,
        [Ended {
            user: 1,
            result: Ok(())
        }]
    );
    assert_eq!(requests.outstanding(), 0);
}

#[test]
fn zeroes_are_cut_as_the_controller_wants_them() {
    let geometry = Geometry {
        max_without_data: MaxBlocks {
            write_zeroes: 100,
            verify: 7,
            discard: 1000,
        },
        ..GEOMETRY
    };
    for (op, most) in [
        (Op::WriteZeroes { deallocate: true }, 100),
        (Op::Verify, 7),
        (Op::Discard, 1000),
    ] {
        let mut requests = Requests::new(1, &geometry);
        requests
            .begin(&wanted(op, 5, 2 * u64::from(most) + 1), [], 1)
            .unwrap();
        let parts = submit(&mut requests, 8);
        let parts: Vec<_> = (parts.iter())
            .map(|(part, _)| (part.lba, part.blocks))
            .collect();
        let at = |n: u32| 5 + u64::from(n * most);
        assert_eq!(parts, [(at(0), most), (at(1), most), (at(2), 1)], "{op:?}");
    }
}

#[test]
fn a_flush_follows_success_only() {
    let zeroes = Op::WriteZeroes { deallocate: true };
    for fails in [false, true] {
        let mut requests = Requests::new(1, &GEOMETRY);
        let wanted = Wanted {
            then_flush: true,
            ..wanted(zeroes, 0, u64::from(MAX_BLOCKS) + 1)
        };
        requests.begin(&wanted, [], 9).unwrap();
        let parts = submit(&mut requests, 8);
        assert_eq!(parts.len(), 2);
        let error = IoError::ConnectionLost;
        let first = IoCompletion {
            tag: parts[0].1,
            result: if fails { Err(error) } else { Ok(()) },
        };
        assert_eq!(requests.completed(&first), None);
        let last = requests.completed(&done(parts[1].1));
        let flush = submit(&mut requests, 8);
        if fails {
            assert_eq!(last.map(|ended| ended.result), Some(Err(error)));
            assert!(flush.is_empty());
        } else {
            assert_eq!(last, None);
            assert_eq!(flush.len(), 1);
            assert_eq!(flush[0].0.op, Op::Flush);
            assert!(requests.completed(&done(flush[0].1)).is_some());
        }
    }
}

#[test]
fn a_request_without_blocks_ends_without_the_target() {
    let mut requests = Requests::new(1, &GEOMETRY);
    requests.begin(&wanted(Op::Discard, 0, 0), [], 5).unwrap();
    let mut ended = Vec::new();
    requests.submit(|_, _| panic!("nothing to submit"), &mut ended);
    assert_eq!(
        ended,
        [Ended {
            user: 5,
            result: Ok(())
        }]
    );
    assert!(requests.has_room());
}

proptest! {
    /// However the memory lies and however little room there is: the parts cover the request once, in order, each
    /// within the limit, and each with its own piece of the memory.
    #[test]
    fn parts_cover_the_request(pieces in proptest::collection::vec(1_u32..40, 1..6), depth in 1_usize..5, lba in 0_u64..1000) {
        let mut buffers = Buffers::new("test", 1 << 20, 64 << 10).unwrap();
        let memory: Vec<_> = pieces.iter().map(|blocks| buffers.take(blocks * 512).unwrap()).collect();
        let spans: Vec<_> = memory.iter().map(crate::export::Buffer::span).collect();
        let total: u64 = pieces.iter().map(|blocks| u64::from(*blocks)).sum();
        let mut requests = Requests::new(1, &GEOMETRY);
        requests.begin(&wanted(Op::Read, lba, total), spans.iter().copied(), 77).unwrap();
        let (mut at, mut end) = (lba, None);
        let mut bytes: Vec<usize> = spans.iter().flat_map(|span| (0..span.len() as usize).map(|n| span.as_ptr() as usize + n)).collect();
        while end.is_none() {
            let parts = submit(&mut requests, depth);
            prop_assert!(!parts.is_empty());
            for (part, tag) in parts {
                prop_assert_eq!(part.lba, at);
                at += u64::from(part.blocks);
                let buffer = part.buffer.unwrap();
                prop_assert_eq!(buffer.len(), part.blocks * 512);
                prop_assert!(buffer.len() <= 4096);
                let rest = bytes.split_off(buffer.len() as usize);
                prop_assert_eq!(bytes[0], buffer.as_ptr() as usize);
                prop_assert_eq!(bytes[bytes.len() - 1], buffer.as_ptr() as usize + buffer.len() as usize - 1);
                bytes = rest;
                prop_assert!(end.is_none());
                end = requests.completed(&done(tag));
            }
        }
        prop_assert_eq!(at, lba + total);
        prop_assert_eq!(end, Some(Ended { user: 77, result: Ok(()) }));
        memory.into_iter().for_each(|buffer| buffers.put(buffer));
    }
}
