//! After warm-up the path of an I/O allocates nothing: post, transmit, receive, deliver, complete.
#![allow(unsafe_code)] // a counting allocator

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::SocketAddr;

use common::{Side, connect_by_hand, full_access, pair, signaled};
use flexblk_reactor::Span;
use flexins::engine::{EngineConfig, PacketShape, TrainSink};
use flexins::port::sim::SimNet;
use flexins::verbs::{AckRequest, Framing, QpInit, Qpn, SendOp, SendWr};
use flexins::wire::Psn;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: hands every call to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // The thread may be on its way out.
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract; `ptr` came from `System`.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Packets in one buffer that is allocated once.
struct Wire {
    bytes: Vec<u8>,
    packets: Vec<(usize, usize)>,
    end: usize,
}

impl TrainSink for Wire {
    fn open(&mut self, shape: &PacketShape) -> Option<&mut [u8]> {
        let (start, head) = (self.end, usize::from(shape.head));
        self.packets.push((start, start + shape.len() as usize));
        self.end += head;
        self.bytes.get_mut(start..start + head)
    }

    fn gather(&mut self, span: Span) {
        let end = self.end + span.len() as usize;
        span.copy_to_slice(&mut self.bytes[self.end..end]);
        self.end = end;
    }

    fn close(&mut self, trailer: &[u8]) {
        let end = self.end + trailer.len();
        self.bytes[self.end..end].copy_from_slice(trailer);
        self.end = end;
    }
}

/// A round of requests with short and long answers and a READ.
fn round(
    net: &mut SimNet,
    sides: [&Side; 2],
    qpns: [Qpn; 2],
    wire: &mut Wire,
    completions: &mut Vec<flexins::verbs::WorkCompletion>,
) {
    let now = net.now();
    let [a, b] = sides;
    let list = [a.mr.sge(0, 4096)];
    let (remote, rkey) = (b.addr(0), b.mr.rkey);
    for op in [
        SendOp::Send,
        SendOp::WriteImm {
            remote,
            rkey,
            imm: 1,
        },
        SendOp::Read { remote, rkey },
        SendOp::SendImm(4),
    ] {
        let sges = if matches!(op, SendOp::SendImm(_)) {
            &[]
        } else {
            &list[..]
        };
        net.engine(a.node)
            .post_send(qpns[0], &signaled(1, op, sges))
            .unwrap();
    }
    let answer = SendWr {
        inline: &[1; 16],
        ..signaled(2, SendOp::Send, &[])
    };
    net.engine(b.node).post_send(qpns[1], &answer).unwrap();
    // To B and back until nothing is left to say.
    for _ in 0..4 {
        for me in 0..2 {
            let from: SocketAddr = net.address(sides[me].node);
            (wire.end, _) = (0, wire.packets.clear());
            net.engine(sides[me].node).poll_transmit(now, wire);
            let peer = net.engine(sides[1 - me].node);
            for &(start, end) in &wire.packets {
                peer.handle_packet(now, from, &wire.bytes[start..end]);
                while let Some(delivery) = peer.poll_delivery() {
                    assert_eq!(delivery.len, 4096);
                }
            }
            peer.flush_acks();
        }
    }
    for (side, (qpn, used)) in sides.into_iter().zip([(qpns[0], 1), (qpns[1], 3)]) {
        let engine = net.engine(side.node);
        engine.poll_cq(side.send_cq, completions);
        engine.poll_cq(side.recv_cq, completions);
        engine.post_recv_in_place(qpn, used).unwrap();
    }
    // Four sends of A, one of B; received: one at A; WRITE_IMM and the empty message at B.
    assert_eq!(completions.len(), 8);
    completions.clear();
}

#[test]
fn nothing_is_allocated_after_warm_up() {
    for framing in [Framing::Flexins, Framing::Standard] {
        let (mut net, a, b) = pair(&EngineConfig::default());
        let init = |side: &Side| QpInit {
            inline_recv: true,
            ack_request: AckRequest::Last,
            ..side.init()
        };
        let psn = Psn::new(3);
        let sides = [(&a, &init(&a), psn), (&b, &init(&b), psn)];
        let qpns = connect_by_hand(&mut net, sides, framing, 256, full_access());
        for (side, qpn) in [&a, &b].into_iter().zip(qpns) {
            net.engine(side.node).post_recv_in_place(qpn, 60).unwrap();
        }
        let mut wire = Wire {
            bytes: vec![0; 1 << 20],
            packets: Vec::with_capacity(256),
            end: 0,
        };
        let mut completions = Vec::with_capacity(64);
        for _ in 0..10 {
            round(&mut net, [&a, &b], qpns, &mut wire, &mut completions);
        }
        let before = ALLOCATIONS.get();
        for _ in 0..1_000 {
            round(&mut net, [&a, &b], qpns, &mut wire, &mut completions);
        }
        assert_eq!(ALLOCATIONS.get() - before, 0, "{framing:?}");
    }
}
