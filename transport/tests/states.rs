//! The states of a queue pair: every move from every state, and what may be posted in each.

mod common;

use common::{Side, full_access, pair};
use flexins::engine::{Engine, EngineConfig};
use flexins::verbs::{
    Digest, Framing, Modify, NotifyOn, PostError, QpState, Qpn, ReadyToReceive, ReadyToSend,
    RecvWr, SendFlags, SendOp, SendWr, VerbsError, WcStatus,
};
use flexins::wire::Psn;
use std::time::Instant;

use QpState::{
    Error, Init, ReadyToReceive as Rtr, ReadyToSend as Rts, Reset, SendQueueDrain as Sqd,
};

fn receive() -> ReadyToReceive {
    ReadyToReceive {
        peer: "10.0.0.2:4791".parse().unwrap(),
        peer_qpn: Qpn::new(77),
        expected_psn: Psn::new(1),
        mtu_bytes: 4096,
        framing: Framing::Flexins,
        digest: Digest::Crc32c,
        window: 64,
    }
}

const SEND: ReadyToSend = ReadyToSend {
    first_psn: Psn::new(1),
    max_reads: 1,
    retry_count: 7,
    rnr_retry: 7,
};

/// Every move there is, and the state it names.
fn moves() -> [(Modify, QpState); 7] {
    [
        (Modify::ToReset, Reset),
        (Modify::ToInit(full_access()), Init),
        (Modify::ToReadyToReceive(receive()), Rtr),
        (Modify::ToReadyToSend(SEND), Rts),
        (Modify::ToSendQueueDrain, Sqd),
        (Modify::Resume, Rts),
        (Modify::ToError, Error),
    ]
}

/// IBA 10.3.1, figure 124, for a reliable connection: from a state, how it is reached, and for each of
/// [`moves`] whether it is allowed. SQE is not there: only unreliable services have it.
const ALLOWED: [(QpState, usize, [bool; 7]); 6] = [
    // to:         RESET INIT   RTR    RTS    SQD    resume ERR
    (Reset, 0, [true, true, false, false, false, false, true]),
    (Init, 1, [true, true, true, false, false, false, true]),
    (Rtr, 2, [true, false, false, true, false, false, true]),
    (Rts, 3, [true, false, false, false, true, false, true]),
    (Sqd, 4, [true, false, false, false, true, true, true]),
    (Error, 6, [true, false, false, false, false, false, true]),
];

/// A queue pair in a state: the moves before it in [`moves`], in their order.
fn reach(engine: &mut Engine, side: &Side, now: Instant, last: usize) -> Qpn {
    let qpn = engine.create_qp(&side.init()).unwrap();
    let way = if last == 6 {
        &[6][..]
    } else {
        &[1, 2, 3, 4][..last]
    };
    for &step in way {
        engine.modify_qp(qpn, moves()[step].0, now).unwrap();
    }
    qpn
}

#[test]
fn every_move_from_every_state() {
    let (mut net, a, _) = pair(&EngineConfig::default());
    let now = net.now();
    let engine = net.engine(a.node);
    for (from, way, allowed) in ALLOWED {
        for ((modify, to), allowed) in moves().into_iter().zip(allowed) {
            let qpn = reach(engine, &a, now, way);
            assert_eq!(engine.query_qp(qpn).unwrap().state, from);
            let moved = engine.modify_qp(qpn, modify, now);
            let (wanted, after) = if allowed {
                (Ok(to), to)
            } else {
                (Err(VerbsError::IllegalTransition { from, to }), from)
            };
            assert_eq!(moved, wanted, "{from:?} {modify:?}");
            assert_eq!(engine.query_qp(qpn).unwrap().state, after, "{modify:?}");
            engine.destroy_qp(qpn, now).unwrap();
        }
    }
}

#[test]
fn what_may_be_posted_in_each_state() {
    let (mut net, a, b) = pair(&EngineConfig::default());
    let now = net.now();
    let engine = net.engine(a.node);
    let (send_list, recv_list) = ([a.mr.sge(0, 64)], [a.mr.sge(64, 64)]);
    let op = SendOp::Write {
        remote: b.addr(0),
        rkey: b.mr.rkey,
    };
    for (state, way, _) in ALLOWED {
        let qpn = reach(engine, &a, now, way);
        let sent = engine.post_send(qpn, &common::signaled(1, op, &send_list));
        let received = engine.post_recv(
            qpn,
            &RecvWr {
                wr_id: 2,
                sges: &recv_list,
            },
        );
        let sends = matches!(state, Rts | Sqd | Error);
        let wanted = if sends {
            Ok(())
        } else {
            Err(PostError::State(state))
        };
        assert_eq!(sent, wanted, "send in {state:?}");
        assert_eq!(received, Ok(()), "receive in {state:?}");
        // In the error state, and when it comes, everything posted completes, once, flushed.
        engine.modify_qp(qpn, Modify::ToError, now).unwrap();
        let mut flushed = Vec::new();
        engine.poll_cq(a.send_cq, &mut flushed);
        engine.poll_cq(a.recv_cq, &mut flushed);
        let expected = usize::from(sends) + 1;
        assert_eq!(flushed.len(), expected, "{state:?}");
        assert!(flushed.iter().all(|wc| wc.status == WcStatus::WrFlushErr));
        engine.destroy_qp(qpn, now).unwrap();
    }
}

/// A reset queue pair starts over with other sequence numbers, and forgets what was posted.
#[test]
fn a_reset_forgets() {
    let (mut net, a, _) = pair(&EngineConfig::default());
    let now = net.now();
    let engine = net.engine(a.node);
    let qpn = reach(engine, &a, now, 3);
    let before = engine.query_qp(qpn).unwrap().first_psn;
    let list = [a.mr.sge(0, 64)];
    engine
        .post_recv(
            qpn,
            &RecvWr {
                wr_id: 1,
                sges: &list,
            },
        )
        .unwrap();
    engine
        .post_send(qpn, &common::signaled(1, SendOp::Send, &list))
        .unwrap();
    engine.modify_qp(qpn, Modify::ToReset, now).unwrap();
    let attributes = engine.query_qp(qpn).unwrap();
    assert_eq!((attributes.send_wrs, attributes.recv_wrs), (0, 0));
    assert_ne!(attributes.first_psn, before);
    assert_eq!(engine.cq_len(a.send_cq) + engine.cq_len(a.recv_cq), 0);
}

/// Arm, poll once more, sleep: one event for each arming, for any completion or for those that matter.
#[test]
fn armed_completion_queues_raise_one_event() {
    for framing in common::FRAMINGS {
        let (mut net, a, b) = pair(&EngineConfig::default());
        let sides = [(&a, &a.init(), Psn::new(5)), (&b, &b.init(), Psn::new(6))];
        let [qa, qb] = common::connect_by_hand(&mut net, sides, framing, 64, full_access());
        let list = [a.mr.sge(0, 64)];
        let send = |net: &mut flexins::port::sim::SimNet, flags| {
            let room = [b.mr.sge(64, 64)];
            let wr = RecvWr {
                wr_id: 0,
                sges: &room,
            };
            net.engine(b.node).post_recv(qb, &wr).unwrap();
            let wr = SendWr {
                flags,
                ..common::signaled(0, SendOp::Send, &list)
            };
            net.engine(a.node).post_send(qa, &wr).unwrap();
            common::idle(net, std::time::Duration::from_millis(1));
        };
        let events = |net: &mut flexins::port::sim::SimNet| {
            std::iter::from_fn(|| net.engine(b.node).poll_cq_event()).collect::<Vec<_>>()
        };
        send(&mut net, SendFlags::SIGNALED);
        assert_eq!(events(&mut net), [], "not armed");
        let arm = |net: &mut flexins::port::sim::SimNet, on| {
            net.engine(b.node).req_notify_cq(b.recv_cq, on).unwrap();
        };
        arm(&mut net, NotifyOn::Next);
        assert_eq!(events(&mut net), [], "what was there before raises none");
        // A weaker arming takes nothing back.
        arm(&mut net, NotifyOn::Solicited);
        send(&mut net, SendFlags::SIGNALED);
        send(&mut net, SendFlags::SIGNALED);
        assert_eq!(events(&mut net), [b.recv_cq], "one for two completions");
        arm(&mut net, NotifyOn::Solicited);
        send(&mut net, SendFlags::SIGNALED);
        assert_eq!(events(&mut net), []);
        send(&mut net, SendFlags::SIGNALED | SendFlags::SOLICITED);
        assert_eq!(events(&mut net), [b.recv_cq]);
        // Errors are always worth waking for.
        arm(&mut net, NotifyOn::Solicited);
        let room = [b.mr.sge(64, 64)];
        let wr = RecvWr {
            wr_id: 9,
            sges: &room,
        };
        let now = net.now();
        let engine = net.engine(b.node);
        engine.post_recv(qb, &wr).unwrap();
        engine.modify_qp(qb, Modify::ToError, now).unwrap();
        assert_eq!(events(&mut net), [b.recv_cq]);
        let engine = net.engine(b.node);
        engine.destroy_qp(qb, now).unwrap();
        engine.destroy_cq(b.recv_cq).unwrap();
        assert!(engine.req_notify_cq(b.recv_cq, NotifyOn::Next).is_err());
    }
}
