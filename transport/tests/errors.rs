//! Every error status, in both framings: who gets it, and what becomes of the rest of the queue.

mod common;

use std::time::Duration;

use common::{FRAMINGS, Side, connect_by_hand, full_access, idle, pair, run, seal, signaled};
use flexins::engine::{ConnEvent, EngineConfig};
use flexins::port::sim::SimNet;
use flexins::verbs::{
    Access, Framing, Lkey, Modify, PostError, QpInit, QpState, Qpn, RecvWr, Rkey, SendFlags,
    SendOp, SendWr, Sge, WcStatus, WorkCompletion,
};
use flexins::wire::{Aeth, Bth, Opcode, Psn, Syndrome};

struct Pair {
    net: SimNet,
    a: Side,
    b: Side,
    qa: Qpn,
    qb: Qpn,
}

fn set_up(framing: Framing, change: impl FnOnce(&mut QpInit)) -> Pair {
    set_up_with(framing, full_access(), change)
}

fn set_up_with(framing: Framing, access: Access, change: impl FnOnce(&mut QpInit)) -> Pair {
    let config = EngineConfig {
        retry_time: Duration::from_millis(50),
        ..EngineConfig::default()
    };
    let (mut net, a, b) = pair(&config);
    let mut init_b = b.init();
    change(&mut init_b);
    let psn = Psn::new(0x00FF_FFFD);
    let [qa, qb] = connect_by_hand(
        &mut net,
        [(&a, &a.init(), psn), (&b, &init_b, psn)],
        framing,
        64,
        access,
    );
    Pair { net, a, b, qa, qb }
}

impl Pair {
    fn post(&mut self, wr_id: u64, op: SendOp, sges: &[Sge]) {
        self.net
            .engine(self.a.node)
            .post_send(self.qa, &signaled(wr_id, op, sges))
            .unwrap();
    }

    fn post_recv(&mut self, wr_id: u64, sges: &[Sge]) {
        self.net
            .engine(self.b.node)
            .post_recv(self.qb, &RecvWr { wr_id, sges })
            .unwrap();
    }

    /// Runs until A has so many completions.
    fn completions(&mut self, count: usize) -> Vec<WorkCompletion> {
        let (mut done, a) = (Vec::new(), &self.a);
        let enough = run(&mut self.net, Duration::from_secs(10), |net| {
            done.extend(a.sends(net));
            done.len() >= count
        });
        assert!(enough, "{done:?}");
        idle(&mut self.net, Duration::from_secs(1));
        done.extend(self.a.sends(&mut self.net));
        assert_eq!(done.len(), count, "each once, and no more");
        done
    }

    fn statuses(&mut self, count: usize) -> Vec<(u64, WcStatus)> {
        self.completions(count)
            .iter()
            .map(|wc| (wc.wr_id, wc.status))
            .collect()
    }

    fn broken(&mut self, side: usize) -> Option<WcStatus> {
        let node = [self.a.node, self.b.node][side];
        match self.net.engine(node).poll_cm() {
            Some(ConnEvent::Broken { status, .. }) => Some(status),
            None => None,
            event => panic!("{event:?}"),
        }
    }
}

/// An operation that the responder refuses, between good ones.
fn refused(framing: Framing, bad: impl FnOnce(&mut Pair) -> (SendOp, u32), status: WcStatus) {
    let mut pair = set_up(framing, |_| {});
    let (remote, rkey) = (pair.b.addr(0), pair.b.mr.rkey);
    let (op, len) = bad(&mut pair);
    let sge = |pair: &Pair, len| [pair.a.mr.sge(0, len)];
    let small = sge(&pair, 100);
    let list = sge(&pair, len);
    pair.post(0, SendOp::Write { remote, rkey }, &small);
    pair.post(1, op, &list);
    pair.post(2, SendOp::Write { remote, rkey }, &small);
    pair.post(3, SendOp::Read { remote, rkey }, &small);
    let expected = [
        (0, WcStatus::Success),
        (1, status),
        (2, WcStatus::WrFlushErr),
        (3, WcStatus::WrFlushErr),
    ];
    assert_eq!(pair.statuses(4), expected, "{framing:?}");
    assert_eq!(pair.broken(0), Some(status));
    assert_eq!(pair.broken(0), None, "told once");
    assert_eq!(pair.broken(1), Some(status));
    for (node, qpn) in [(pair.a.node, pair.qa), (pair.b.node, pair.qb)] {
        assert_eq!(
            pair.net.engine(node).query_qp(qpn).unwrap().state,
            QpState::Error
        );
    }
    // The error state completes what is posted at once.
    pair.post(9, SendOp::Write { remote, rkey }, &small);
    assert_eq!(pair.a.sends(&mut pair.net)[0].status, WcStatus::WrFlushErr);
}

#[test]
fn remote_access_errors() {
    for framing in FRAMINGS {
        for is_read in [false, true] {
            let op = |remote, rkey| {
                if is_read {
                    SendOp::Read { remote, rkey }
                } else {
                    SendOp::Write { remote, rkey }
                }
            };
            let error = WcStatus::RemAccessErr;
            refused(
                framing,
                |p| (op(p.b.addr(0), Rkey(p.b.mr.rkey.0 ^ 1)), 10),
                error,
            );
            refused(
                framing,
                |p| (op(p.b.addr((1 << 20) - 9), p.b.mr.rkey), 10),
                error,
            );
            refused(framing, |p| (op(p.b.addr(0) - 1, p.b.mr.rkey), 10), error);
            refused(framing, |p| (op(u64::MAX - 3, p.b.mr.rkey), 10_000), error);
            refused(
                framing,
                |p| (op(p.b.addr((1 << 20) - 9_999), p.b.mr.rkey), 10_000),
                error,
            );
            // Registered, but not for that, or of another domain, or no more.
            let with = |access| {
                move |p: &mut Pair| {
                    let memory = &p.b.memory;
                    let engine = p.net.engine(p.b.node);
                    let mr = engine
                        .register_memory(p.b.pd, memory, 0, 4096, access)
                        .unwrap();
                    (op(mr.addr, mr.rkey), 10)
                }
            };
            let wrong = if is_read {
                Access::LOCAL_WRITE | Access::REMOTE_WRITE
            } else {
                Access::LOCAL_WRITE | Access::REMOTE_READ
            };
            refused(framing, with(wrong), error);
            refused(
                framing,
                |p| {
                    let engine = p.net.engine(p.b.node);
                    let other = engine.alloc_pd();
                    let mr = engine
                        .register_memory(other, &p.b.memory, 0, 64, full_access())
                        .unwrap();
                    (op(mr.addr, mr.rkey), 10)
                },
                error,
            );
            refused(
                framing,
                |p| {
                    let engine = p.net.engine(p.b.node);
                    let mr = engine
                        .register_memory(p.b.pd, &p.b.memory, 0, 64, full_access())
                        .unwrap();
                    engine.deregister(mr.lkey).unwrap();
                    (op(mr.addr, mr.rkey), 10)
                },
                error,
            );
        }
    }
}

#[test]
fn queue_pair_access_is_checked_too() {
    for framing in FRAMINGS {
        for (allowed, is_read) in [(Access::REMOTE_READ, false), (Access::REMOTE_WRITE, true)] {
            let mut pair = set_up_with(framing, allowed, |_| {});
            let (remote, rkey) = (pair.b.addr(0), pair.b.mr.rkey);
            let list = [pair.a.mr.sge(0, 10)];
            let (good, bad) = if is_read {
                (
                    SendOp::Write { remote, rkey },
                    SendOp::Read { remote, rkey },
                )
            } else {
                (
                    SendOp::Read { remote, rkey },
                    SendOp::Write { remote, rkey },
                )
            };
            pair.post(0, good, &list);
            pair.post(1, bad, &list);
            assert_eq!(
                pair.statuses(2),
                [(0, WcStatus::Success), (1, WcStatus::RemAccessErr)]
            );
        }
    }
}

#[test]
fn an_invalidated_key_is_refused() {
    for framing in FRAMINGS {
        let mut pair = set_up(framing, |_| {});
        let list = [pair.a.mr.sge(0, 8)];
        let (remote, rkey) = (pair.b.addr(0), pair.b.mr.rkey);
        pair.post_recv(0, &[]);
        pair.post_recv(1, &[]);
        pair.post(0, SendOp::Write { remote, rkey }, &list);
        pair.post(1, SendOp::SendInv(rkey), &[]);
        assert_eq!(
            pair.statuses(2),
            [(0, WcStatus::Success), (1, WcStatus::Success)]
        );
        assert_eq!(pair.b.recvs(&mut pair.net)[0].invalidated(), Some(rkey));
        pair.post(2, SendOp::Write { remote, rkey }, &list);
        assert_eq!(pair.statuses(1), [(2, WcStatus::RemAccessErr)]);
        let fresh = pair.net.engine(pair.b.node).rekey(pair.b.mr.lkey).unwrap();
        assert_ne!(fresh, rkey);
    }
}

#[test]
fn invalid_requests() {
    for framing in FRAMINGS {
        // Longer than the receive buffer: one packet, and several.
        for len in [101, 10_000] {
            let mut pair = set_up(framing, |_| {});
            let room = [pair.b.mr.sge(0, 60), pair.b.mr.sge(200, 40)];
            pair.post_recv(7, &room);
            pair.post_recv(8, &room);
            let list = [pair.a.mr.sge(0, len)];
            pair.post(0, SendOp::Send, &list);
            assert_eq!(pair.statuses(1), [(0, WcStatus::RemInvReqErr)]);
            let got: Vec<_> = pair
                .b
                .recvs(&mut pair.net)
                .iter()
                .map(|wc| (wc.wr_id, wc.status))
                .collect();
            assert_eq!(got, [(7, WcStatus::LocLenErr), (8, WcStatus::WrFlushErr)]);
        }
        // More than a packet cannot be handed out in place.
        let mut pair = set_up(framing, |_| {});
        pair.net
            .engine(pair.b.node)
            .post_recv_in_place(pair.qb, 4)
            .unwrap();
        let list = [pair.a.mr.sge(0, 4097)];
        pair.post(0, SendOp::Send, &list);
        assert_eq!(pair.statuses(1), [(0, WcStatus::RemInvReqErr)]);
    }
}

#[test]
fn remote_operational_error_for_a_bad_receive_buffer() {
    for framing in FRAMINGS {
        let mut pair = set_up(framing, |_| {});
        let bad = [Sge {
            lkey: Lkey::from_bits(0xDEAD_BEEF),
            ..pair.b.mr.sge(0, 100)
        }];
        pair.post_recv(7, &bad);
        let list = [pair.a.mr.sge(0, 100)];
        pair.post(0, SendOp::Send, &list);
        assert_eq!(pair.statuses(1), [(0, WcStatus::RemOpErr)]);
        assert_eq!(pair.b.recvs(&mut pair.net)[0].status, WcStatus::LocProtErr);
    }
}

#[test]
fn local_protection_errors_come_in_their_turn() {
    for framing in FRAMINGS {
        for bad in [
            |p: &Pair| Sge {
                lkey: Lkey::from_bits(0x0001_7777),
                ..p.a.mr.sge(0, 10)
            },
            |p: &Pair| p.a.mr.sge((1 << 20) - 5, 10),
        ] {
            let mut pair = set_up(framing, |_| {});
            let (remote, rkey) = (pair.b.addr(0), pair.b.mr.rkey);
            let (good, bad) = ([pair.a.mr.sge(0, 50_000)], [bad(&pair)]);
            pair.post(0, SendOp::Read { remote, rkey }, &good);
            pair.post(1, SendOp::Write { remote, rkey }, &bad);
            pair.post(2, SendOp::Write { remote, rkey }, &good);
            let expected = [
                (0, WcStatus::Success),
                (1, WcStatus::LocProtErr),
                (2, WcStatus::WrFlushErr),
            ];
            assert_eq!(pair.statuses(3), expected);
        }
        // Where READ data would go.
        let mut pair = set_up(framing, |_| {});
        let (remote, rkey) = (pair.b.addr(0), pair.b.mr.rkey);
        let lkey = {
            let engine = pair.net.engine(pair.a.node);
            engine
                .register_memory(pair.a.pd, &pair.a.memory, 0, 64, Access::empty())
                .unwrap()
                .lkey
        };
        let list = [Sge {
            lkey,
            ..pair.a.mr.sge(0, 10)
        }];
        pair.post(0, SendOp::Read { remote, rkey }, &list);
        assert_eq!(pair.statuses(1), [(0, WcStatus::LocProtErr)]);
    }
}

#[test]
fn deregistered_memory_fails_what_is_posted() {
    let mut pair = set_up(Framing::Flexins, |_| {});
    let (remote, rkey) = (pair.b.addr(0), pair.b.mr.rkey);
    let list = [pair.a.mr.sge(0, 100)];
    pair.post(0, SendOp::Write { remote, rkey }, &list);
    pair.net
        .engine(pair.a.node)
        .deregister(pair.a.mr.lkey)
        .unwrap();
    assert_eq!(pair.statuses(1), [(0, WcStatus::LocProtErr)]);
}

/// The responder has taken the READ, but the memory is gone before the data has left.
#[test]
fn a_read_fails_when_its_memory_goes_away() {
    for framing in FRAMINGS {
        let mut pair = set_up(framing, |_| {});
        let (remote, rkey) = (pair.b.addr(0), pair.b.mr.rkey);
        let list = [pair.a.mr.sge(0, 10_000)];
        pair.post(0, SendOp::Read { remote, rkey }, &list);
        let b = pair.b.node;
        assert!(run(&mut pair.net, Duration::from_secs(1), |net| {
            net.engine(b).counters().packets_rx > 0
        }));
        pair.net.engine(b).deregister(pair.b.mr.lkey).unwrap();
        assert_eq!(pair.statuses(1), [(0, WcStatus::RemAccessErr)]);
    }
}

#[test]
fn retries_are_exhausted_in_bounded_time() {
    for framing in FRAMINGS {
        let mut pair = set_up(framing, |_| {});
        let (remote, rkey) = (pair.b.addr(0), pair.b.mr.rkey);
        let list = [pair.a.mr.sge(0, 100)];
        pair.net.partition(true);
        let started = pair.net.elapsed();
        for wr_id in 0..3 {
            pair.post(wr_id, SendOp::Write { remote, rkey }, &list);
        }
        let (mut done, a) = (Vec::new(), &pair.a);
        assert!(run(&mut pair.net, Duration::from_secs(5), |net| {
            done.extend(a.sends(net));
            done.len() == 3
        }));
        let took = pair.net.elapsed() - started;
        assert!(
            (Duration::from_millis(50)..Duration::from_secs(1)).contains(&took),
            "{took:?}"
        );
        let statuses: Vec<_> = done.iter().map(|wc| wc.status).collect();
        assert_eq!(
            statuses,
            [
                WcStatus::RetryExcErr,
                WcStatus::WrFlushErr,
                WcStatus::WrFlushErr
            ]
        );
        assert_eq!(pair.broken(0), Some(WcStatus::RetryExcErr));
        idle(&mut pair.net, Duration::from_secs(10));
        assert_eq!(
            pair.net.engine(pair.a.node).next_timeout(),
            None,
            "no timer is left"
        );
    }
}

#[test]
fn receiver_not_ready() {
    for framing in FRAMINGS {
        // Two retries are allowed; nobody posts.
        let mut pair = set_up(framing, |_| {});
        let list = [pair.a.mr.sge(0, 100)];
        pair.post(0, SendOp::Send, &list);
        pair.post(1, SendOp::Send, &list);
        assert_eq!(
            pair.statuses(2),
            [(0, WcStatus::RnrRetryExcErr), (1, WcStatus::WrFlushErr)]
        );
        let counters = *pair.net.engine(pair.a.node).counters();
        assert_eq!(counters.rnr_naks_rx, 3);
        // Somebody posts between the first NAK and the last retry.
        let mut pair = set_up(framing, |_| {});
        let list = [pair.a.mr.sge(0, 100)];
        pair.post(0, SendOp::Send, &list);
        pair.post(1, SendOp::SendImm(5), &list);
        let (a, b) = (pair.a.node, pair.b.node);
        assert!(run(&mut pair.net, Duration::from_secs(1), |net| {
            net.engine(a).counters().rnr_naks_rx > 0
        }));
        let room = [pair.b.mr.sge(0, 100)];
        pair.post_recv(0, &room);
        pair.post_recv(1, &room);
        assert_eq!(
            pair.statuses(2),
            [(0, WcStatus::Success), (1, WcStatus::Success)]
        );
        let got = pair.b.recvs(&mut pair.net);
        assert_eq!((got[0].wr_id, got[1].wr_id, got[1].imm()), (0, 1, Some(5)));
        assert_eq!(pair.net.engine(b).counters().deliveries, 0);
    }
}

#[test]
fn flush_completes_everything_once() {
    for framing in FRAMINGS {
        let mut pair = set_up(framing, |init| init.inline_recv = true);
        let (remote, rkey) = (pair.b.addr(0), pair.b.mr.rkey);
        let list = [pair.a.mr.sge(0, 5_000)];
        for wr_id in 0..20 {
            // Unsignalled ones too report an error.
            let flags = if wr_id % 2 == 0 {
                SendFlags::SIGNALED
            } else {
                SendFlags::empty()
            };
            let wr = SendWr {
                flags,
                ..signaled(wr_id, SendOp::Write { remote, rkey }, &list)
            };
            pair.net
                .engine(pair.a.node)
                .post_send(pair.qa, &wr)
                .unwrap();
        }
        for wr_id in 0..5 {
            let wr = RecvWr { wr_id, sges: &list };
            pair.net
                .engine(pair.a.node)
                .post_recv(pair.qa, &wr)
                .unwrap();
        }
        pair.net
            .engine(pair.b.node)
            .post_recv_in_place(pair.qb, 5)
            .unwrap();
        let limit = pair.net.now();
        pair.net.step(limit, &mut common::no_delivery);
        for (node, qpn) in [(pair.a.node, pair.qa), (pair.b.node, pair.qb)] {
            let state = pair
                .net
                .engine(node)
                .modify_qp(qpn, Modify::ToError, limit)
                .unwrap();
            assert_eq!(state, QpState::Error);
        }
        let done = pair.completions(20);
        assert!(done.iter().all(|wc| wc.status == WcStatus::WrFlushErr));
        assert!(done.iter().map(|wc| wc.wr_id).eq(0..20));
        let got = pair.a.recvs(&mut pair.net);
        assert!(
            got.iter()
                .map(|wc| (wc.wr_id, wc.status))
                .eq((0..5).map(|i| (i, WcStatus::WrFlushErr)))
        );
        assert_eq!(pair.broken(0), None, "it did not fail by itself");
        // Every place in the completion queues is free again: as many can be posted as before.
        let now = pair.net.now();
        for (side, qpn) in [(&pair.a, pair.qa), (&pair.b, pair.qb)] {
            let engine = pair.net.engine(side.node);
            engine.destroy_qp(qpn, now).unwrap();
            engine.destroy_cq(side.send_cq).unwrap();
            engine.destroy_cq(side.recv_cq).unwrap();
            assert_eq!(
                engine.query_qp(qpn).unwrap_err().to_string(),
                "unknown queue pair"
            );
        }
    }
}

#[test]
fn bad_response_error_for_data_of_the_wrong_length() {
    let mut pair = set_up(Framing::Flexins, |_| {});
    let (remote, rkey) = (pair.b.addr(0), pair.b.mr.rkey);
    let list = [pair.a.mr.sge(0, 100)];
    pair.post(0, SendOp::Read { remote, rkey }, &list);
    let limit = pair.net.now();
    pair.net.step(limit, &mut common::no_delivery);
    let psn = Psn::new(0x00FF_FFFD);
    let bth = Bth {
        opcode: Opcode::ReadResponseOnly,
        solicited: false,
        pad: 0,
        dest_qpn: pair.qa,
        ack_req: false,
        psn,
    };
    let mut packet = bth.emit().to_vec();
    packet.extend(
        Aeth {
            syndrome: Syndrome::Ack,
            msn: 1,
        }
        .emit(),
    );
    packet.extend([0; 96]);
    let (from, to) = (pair.net.address(pair.b.node), pair.net.address(pair.a.node));
    pair.net.inject(from, to, seal(packet, None));
    assert_eq!(pair.statuses(1), [(0, WcStatus::BadRespErr)]);
}

#[test]
fn a_lost_nak_is_repeated() {
    for framing in FRAMINGS {
        let mut pair = set_up(framing, |_| {});
        let list = [pair.a.mr.sge(0, 100)];
        pair.post(
            0,
            SendOp::Write {
                remote: pair.b.addr(0),
                rkey: Rkey(1),
            },
            &list,
        );
        let b = pair.b.node;
        assert!(run(&mut pair.net, Duration::from_secs(1), |net| net
            .engine(b)
            .counters()
            .packets_rx
            > 0));
        pair.net.partition(true);
        let limit = pair.net.now();
        pair.net.step(limit, &mut common::no_delivery);
        assert_eq!(pair.net.engine(b).counters().naks_tx, 1);
        pair.net.partition(false);
        assert_eq!(pair.statuses(1), [(0, WcStatus::RemAccessErr)]);
    }
}

#[test]
fn posts_are_refused_with_a_reason() {
    let (mut net, a, _) = pair(&EngineConfig::default());
    let engine = net.engine(a.node);
    let small = engine.create_cq(3).unwrap();
    let init = QpInit {
        max_send_wr: 2,
        send_cq: small,
        recv_cq: small,
        ..a.init()
    };
    let qpn = engine.create_qp(&init).unwrap();
    let wr = signaled(0, SendOp::Send, &[]);
    assert_eq!(
        engine.post_send(qpn, &wr),
        Err(PostError::State(QpState::Reset))
    );
    let gone = Qpn::new(qpn.get() ^ 0x0080_0000);
    assert_eq!(engine.post_send(gone, &wr), Err(PostError::UnknownQp));
    let recv = RecvWr {
        wr_id: 0,
        sges: &[],
    };
    for _ in 0..3 {
        engine.post_recv(qpn, &recv).unwrap();
    }
    // The queue has room for more, the completion queue has not: nothing can overflow.
    assert_eq!(
        engine.post_recv(qpn, &recv),
        Err(PostError::CompletionQueueFull)
    );
    assert_eq!(
        engine.post_recv_in_place(qpn, 1),
        Err(PostError::MixedReceive)
    );
    assert!(engine.destroy_cq(small).is_err());
}
