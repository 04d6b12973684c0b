//! The protocol where it is delicate: wrap of sequence numbers, duplicates, windows, states,
//! acknowledgements that ride along, memory.

mod common;

use std::time::Duration;

use common::{
    FRAMINGS, SERVICE, Side, connect, connect_by_hand, full_access, idle, no_delivery, pair,
    pattern, run, seal, signaled,
};
use flexins::engine::{ConnEvent, DeliveryKind, Engine, EngineConfig};
use flexins::port::sim::{SimFaults, SimNet, SimSink};
use flexins::verbs::{
    AckRequest, Digest, Framing, Modify, QpInit, QpState, RecvWr, SendFlags, SendOp, SendWr,
    VerbsError, WcOpcode, WcStatus,
};
use flexins::wire::{Bth, Opcode, Psn, Reth};

/// Posts WRITEs, READs and SENDs from A until `count` have completed.
fn traffic(net: &mut SimNet, a: &Side, b: &Side, qps: [flexins::verbs::Qpn; 2], count: u64) {
    let [qa, qb] = qps;
    let (rkey, mut posted, mut done, mut received) = (b.mr.rkey, 0, 0, 0);
    let mut recv_posted = 0;
    let finished = run(net, Duration::from_secs(100), |net| {
        while recv_posted < received + 32 {
            let room = [b.mr.sge(900_000, 6_000)];
            net.engine(b.node)
                .post_recv(
                    qb,
                    &RecvWr {
                        wr_id: recv_posted,
                        sges: &room,
                    },
                )
                .unwrap();
            recv_posted += 1;
        }
        while posted < count && posted - done < 30 {
            let place = posted % 32 * 8_192;
            let len = 1 + (posted * 677 % 6_000) as u32;
            let remote = b.addr(place);
            let op = match posted % 4 {
                0 => SendOp::Send,
                1 => SendOp::Write { remote, rkey },
                2 => SendOp::Read { remote, rkey },
                _ => SendOp::WriteImm {
                    remote,
                    rkey,
                    imm: posted as u32,
                },
            };
            if posted % 4 == 2 {
                b.write(place, &pattern(posted, len as usize));
            } else {
                a.write(place, &pattern(posted, len as usize));
            }
            let list = [a.mr.sge(place, len)];
            net.engine(a.node)
                .post_send(qa, &signaled(posted, op, &list))
                .unwrap();
            posted += 1;
        }
        for wc in a.sends(net) {
            assert_eq!((wc.wr_id, wc.status), (done, WcStatus::Success));
            let (place, len) = (done % 32 * 8_192, 1 + (done * 677 % 6_000) as usize);
            match done % 4 {
                1 | 3 => assert_eq!(b.read(place, len), pattern(done, len)),
                2 => assert_eq!(a.read(place, len), pattern(done, len)),
                _ => {}
            }
            done += 1;
        }
        for wc in b.recvs(net) {
            assert_eq!((wc.wr_id, wc.status), (received, WcStatus::Success));
            received += 1;
        }
        done == count
    });
    assert!(finished, "{done} of {count}");
}

#[test]
fn sequence_numbers_wrap() {
    for framing in FRAMINGS {
        for loss_ppm in [0, 50_000] {
            for before_wrap in [1, 5, 100] {
                let (mut net, a, b) = pair(&EngineConfig::default());
                net.set_faults(SimFaults {
                    loss_ppm,
                    ..SimFaults::NONE
                });
                let psn = Psn::new(0).sub(before_wrap);
                let sides = [(&a, &a.init(), psn), (&b, &b.init(), psn.add(3))];
                let qps = connect_by_hand(&mut net, sides, framing, 64, full_access());
                traffic(&mut net, &a, &b, qps, 300);
            }
        }
    }
}

/// What one run did, for the table below.
fn table_row(framing: Framing, loss_ppm: u32) -> String {
    let (mut net, a, b) = pair(&EngineConfig::default());
    net.set_faults(SimFaults {
        loss_ppm,
        ..SimFaults::NONE
    });
    let sides = [(&a, &a.init(), Psn::new(7)), (&b, &b.init(), Psn::new(9))];
    let qps = connect_by_hand(&mut net, sides, framing, 256, full_access());
    traffic(&mut net, &a, &b, qps, 2_000);
    let (sender, receiver) = (
        *net.engine(a.node).counters(),
        *net.engine(b.node).counters(),
    );
    let row = format!(
        "{framing:?} loss {:>2} %: packets {:>6} {:>6} retransmissions {:>4} probes {:>3} acks {:>4} \
         sacks {:>4} naks {:>3} duplicates {:>3}",
        loss_ppm / 10_000,
        sender.packets_tx,
        receiver.packets_tx,
        sender.retransmissions + receiver.retransmissions,
        sender.probes_tx,
        receiver.acks_tx,
        receiver.sacks_tx,
        receiver.naks_tx,
        receiver.duplicates,
    );
    if loss_ppm == 0 {
        for counters in [sender, receiver] {
            let repeated = counters.retransmissions + counters.duplicates + counters.timeouts;
            assert_eq!(repeated + counters.sacks_tx + counters.naks_tx, 0, "{row}");
        }
    } else {
        assert!(sender.retransmissions > 0);
    }
    row
}

#[test]
fn without_loss_nothing_is_repeated() {
    for framing in FRAMINGS {
        for loss_ppm in [0, 10_000, 50_000, 100_000] {
            println!("{}", table_row(framing, loss_ppm));
        }
    }
}

#[test]
fn selective_repeat_repeats_less_than_go_back_n() {
    let repeated = |framing| {
        let (mut net, a, b) = pair(&EngineConfig::default());
        net.set_faults(SimFaults {
            loss_ppm: 20_000,
            ..SimFaults::NONE
        });
        let sides = [(&a, &a.init(), Psn::new(7)), (&b, &b.init(), Psn::new(9))];
        let qps = connect_by_hand(&mut net, sides, framing, 256, full_access());
        traffic(&mut net, &a, &b, qps, 2_000);
        net.engine(a.node).counters().retransmissions
    };
    assert!(repeated(Framing::Flexins) * 2 < repeated(Framing::Standard));
}

/// Request and answer by SEND: the acknowledgements ride along, none is sent of its own.
#[test]
fn acknowledgements_ride_along() {
    let (mut net, a, b) = pair(&EngineConfig::default());
    let (qa, qb) = connect(&mut net, &a, &b, &a.init(), &b.init());
    for (side, qpn) in [(&a, qa), (&b, qb)] {
        net.engine(side.node).post_recv_in_place(qpn, 64).unwrap();
    }
    let list = [a.mr.sge(0, 4096)];
    let start = [
        net.engine(a.node).counters().packets_tx,
        net.engine(b.node).counters().packets_tx,
    ];
    net.engine(a.node)
        .post_send(
            qa,
            &SendWr {
                inline: &[7; 64],
                ..signaled(0, SendOp::Send, &list)
            },
        )
        .unwrap();
    let mut answers = 0;
    let limit = net.now() + Duration::from_secs(1);
    while answers < 1_000 {
        let (node_a, list) = (a.node, list);
        assert!(
            net.step(limit, &mut |node, engine: &mut Engine, delivery, packet| {
                let bytes = delivery.payload.bytes(packet);
                let qpn = delivery.qpn;
                engine.post_recv_in_place(qpn, 1).unwrap();
                let (inline, sges): (&[u8], &[_]) = if node == node_a {
                    assert_eq!(
                        (delivery.len, delivery.kind),
                        (16, DeliveryKind::SendImm(3))
                    );
                    answers += 1;
                    (&[7; 64], &list)
                } else {
                    assert_eq!((bytes[0], delivery.len), (7, 4160));
                    (&[9; 16], &[])
                };
                let op = if node == node_a {
                    SendOp::Send
                } else {
                    SendOp::SendImm(3)
                };
                let flags = SendFlags::empty();
                engine
                    .post_send(
                        qpn,
                        &SendWr {
                            wr_id: 0,
                            op,
                            inline,
                            sges,
                            flags,
                        },
                    )
                    .unwrap();
            })
        );
    }
    for (side, start) in [(&a, start[0]), (&b, start[1])] {
        let counters = net.engine(side.node).counters();
        assert_eq!(counters.acks_tx + counters.sacks_tx, 0);
        assert!(
            (1_000..=1_002).contains(&(counters.packets_tx - start)),
            "one packet each way"
        );
    }
    assert_eq!(
        net.engine(a.node).query_qp(qa).unwrap().send_wrs,
        1,
        "completed by the answers"
    );
}

#[test]
fn delayed_acknowledgement_comes_after_its_time_or_before_sleep() {
    for flush in [false, true] {
        let (mut net, a, b) = pair(&EngineConfig::default());
        let init = QpInit {
            ack_request: AckRequest::Never,
            ..a.init()
        };
        let (qa, _) = connect(&mut net, &a, &b, &init, &b.init());
        idle(&mut net, Duration::from_millis(10));
        let op = SendOp::Write {
            remote: b.addr(0),
            rkey: b.mr.rkey,
        };
        let list = [a.mr.sge(0, 100)];
        net.engine(a.node)
            .post_send(qa, &signaled(0, op, &list))
            .unwrap();
        let sent = net.elapsed();
        let limit = net.now() + Duration::from_secs(1);
        assert!(net.step(limit, &mut no_delivery));
        if flush {
            net.engine(b.node).flush_acks();
        }
        assert!(run(&mut net, Duration::from_secs(1), |net| !a
            .sends(net)
            .is_empty()));
        let took = net.elapsed() - sent;
        let expected = if flush { 20 } else { 120 };
        assert_eq!(took, Duration::from_micros(expected));
        assert_eq!(net.engine(b.node).counters().acks_tx, 1);
    }
}

/// The delay of acknowledgements is not part of a lone request's latency: its last packet asks.
#[test]
fn a_lone_signalled_request_takes_one_round_trip() {
    for (len, inline) in [(100, 0), (100_000, 0), (0, 64)] {
        let (mut net, a, b) = pair(&EngineConfig::default());
        let (qa, qb) = connect(&mut net, &a, &b, &a.init(), &b.init());
        net.engine(b.node)
            .post_recv(
                qb,
                &RecvWr {
                    wr_id: 0,
                    sges: &[b.mr.sge(500_000, 100_000)],
                },
            )
            .unwrap();
        idle(&mut net, Duration::from_millis(10));
        let list = [a.mr.sge(0, len)];
        let remote = b.addr(0);
        let rkey = b.mr.rkey;
        for (round, op) in [SendOp::Write { remote, rkey }, SendOp::Send]
            .into_iter()
            .enumerate()
        {
            let wr = SendWr {
                inline: &[7; 64][..inline],
                ..signaled(0, op, if len > 0 { &list } else { &[] })
            };
            net.engine(a.node).post_send(qa, &wr).unwrap();
            let sent = net.elapsed();
            assert!(run(&mut net, Duration::from_secs(1), |net| !a
                .sends(net)
                .is_empty()));
            assert_eq!(net.elapsed() - sent, Duration::from_micros(20), "{op:?}");
            let acks = net.engine(b.node).counters().acks_tx;
            assert_eq!(acks, round as u64 + 1, "one acknowledgement each");
        }
        // What is not signalled, nobody waits for.
        let wr = SendWr {
            flags: SendFlags::empty(),
            ..signaled(0, SendOp::Write { remote, rkey }, &list)
        };
        let before = net.engine(b.node).counters().acks_tx;
        net.engine(a.node).post_send(qa, &wr).unwrap();
        idle(&mut net, Duration::from_micros(50));
        assert_eq!(net.engine(b.node).counters().acks_tx, before);
    }
}

/// Packets of one length make one train: a message beyond the MTU is cut evenly.
#[test]
fn long_messages_are_cut_evenly() {
    let config = EngineConfig {
        mtu: 8320,
        ..EngineConfig::default()
    };
    let len = 128 << 10;
    let (mut net, a, b) = pair(&config);
    let init = QpInit {
        ack_request: AckRequest::Never,
        ..a.init()
    };
    let (qa, qb) = connect(&mut net, &a, &b, &init, &b.init());
    let room = [b.mr.sge(500_000, len)];
    let wr = RecvWr {
        wr_id: 0,
        sges: &room,
    };
    net.engine(b.node).post_recv(qb, &wr).unwrap();
    let (remote, rkey) = (b.addr(0), b.mr.rkey);
    let list = [a.mr.sge(0, len)];
    for op in [
        SendOp::Write { remote, rkey },
        SendOp::Send,
        SendOp::Read { remote, rkey },
    ] {
        net.engine(a.node)
            .post_send(qa, &signaled(0, op, &list))
            .unwrap();
        let sender = if matches!(op, SendOp::Read { .. }) {
            // The request arrives; its answer has not left yet.
            let limit = net.now() + Duration::from_micros(10);
            assert!(net.step(limit, &mut no_delivery));
            b.node
        } else {
            a.node
        };
        let mut sink = SimSink::with_room(100);
        let now = net.now();
        net.engine(sender).poll_transmit(now, &mut sink);
        let payloads: Vec<usize> = sink
            .packets
            .iter()
            .map(|(_, packet)| {
                let opcode = Bth::parse(packet).unwrap().opcode;
                packet.len() - opcode.header_len() - 8
            })
            .collect();
        assert_eq!(payloads, [8192; 16], "{op:?}");
        // They are lost now; the operation succeeds all the same.
        assert!(run(&mut net, Duration::from_secs(5), |net| !a
            .sends(net)
            .is_empty()));
    }
}

#[test]
fn the_window_limits_what_is_outstanding() {
    for framing in FRAMINGS {
        let (mut net, a, b) = pair(&EngineConfig::default());
        let sides = [(&a, &a.init(), Psn::new(7)), (&b, &b.init(), Psn::new(9))];
        let [qa, _] = connect_by_hand(&mut net, sides, framing, 16, full_access());
        net.partition(true);
        let op = SendOp::Write {
            remote: b.addr(0),
            rkey: b.mr.rkey,
        };
        let list = [a.mr.sge(0, 100_000)];
        net.engine(a.node)
            .post_send(qa, &signaled(0, op, &list))
            .unwrap();
        let limit = net.now();
        net.step(limit, &mut no_delivery);
        assert_eq!(net.engine(a.node).counters().packets_tx, 16);
        net.partition(false);
        assert!(run(&mut net, Duration::from_secs(1), |net| !a
            .sends(net)
            .is_empty()));
    }
}

/// A packet of A's queue pair, made by hand.
fn forged(opcode: Opcode, dest: flexins::verbs::Qpn, psn: Psn, rest: &[u8]) -> Vec<u8> {
    let pad = (rest.len().wrapping_neg() & 3) as u8;
    let bth = Bth {
        opcode,
        solicited: false,
        pad,
        dest_qpn: dest,
        ack_req: false,
        psn,
    };
    let mut packet = bth.emit().to_vec();
    packet.extend(rest);
    packet.extend(&[0; 3][..usize::from(pad)]);
    seal(packet, None)
}

#[test]
fn requests_are_carried_out_once_and_reads_answered_again() {
    let (mut net, a, b) = pair(&EngineConfig::default());
    let psn = Psn::new(0x00FF_FFFF);
    let sides = [(&a, &a.init(), psn), (&b, &b.init(), psn)];
    let [_, qb] = connect_by_hand(&mut net, sides, Framing::Flexins, 64, full_access());
    net.engine(b.node).post_recv_in_place(qb, 10).unwrap();
    let (from, to) = (net.address(a.node), net.address(b.node));
    let limit = net.now();
    let mut messages = Vec::new();
    let mut send = |net: &mut SimNet, packet: Vec<u8>| {
        net.inject(from, to, packet);
        net.step(limit, &mut |_, _, delivery, packet| {
            messages.push(delivery.payload.bytes(packet).to_vec());
        });
    };
    let second = forged(Opcode::SendOnly, qb, psn.next(), b"two");
    for _ in 0..3 {
        send(&mut net, second.clone());
    }
    let first = forged(Opcode::SendOnly, qb, psn, b"one");
    for _ in 0..3 {
        send(&mut net, first.clone());
        send(&mut net, second.clone());
    }
    let reth = Reth {
        addr: b.addr(0),
        rkey: b.mr.rkey.0,
        len: 5_000,
    };
    let read = forged(Opcode::ReadRequest, qb, psn.add(2), &reth.emit());
    for _ in 0..3 {
        send(&mut net, read.clone());
    }
    assert_eq!(messages, [b"one", b"two"]);
    let before = net.engine(b.node).counters().packets_tx;
    net.step(limit, &mut no_delivery);
    let counters = *net.engine(b.node).counters();
    assert_eq!(counters.duplicates, 2 + 5 + 2);
    assert!(
        counters.packets_tx - before >= 2,
        "the answer of the last READ"
    );
    assert_eq!(net.engine(b.node).held_bytes(), 0);
    assert_eq!(net.engine(b.node).query_qp(qb).unwrap().recv_wrs, 8);
}

#[test]
fn stale_and_far_sequence_numbers_are_dropped() {
    let (mut net, a, b) = pair(&EngineConfig::default());
    let psn = Psn::new(100);
    let sides = [(&a, &a.init(), psn), (&b, &b.init(), psn)];
    let [qa, qb] = connect_by_hand(&mut net, sides, Framing::Flexins, 64, full_access());
    net.engine(b.node).post_recv_in_place(qb, 10).unwrap();
    let (from, to) = (net.address(a.node), net.address(b.node));
    let limit = net.now();
    let mut stale = 0;
    for far in [2_048, 5_000, 0x7F_FFFF, 0x80_0000, 0x80_0001, 0xFF_0000] {
        let packet = forged(Opcode::SendOnly, qb, psn.add(far), b"far");
        net.inject(from, to, packet);
        net.step(limit, &mut no_delivery);
        stale += 1;
        assert_eq!(net.engine(b.node).counters().stale_psn, stale, "{far:#x}");
        let probe = forged(Opcode::Probe, qb, psn.add(far + 5_000), &[0; 8]);
        net.inject(from, to, probe);
        net.step(limit, &mut no_delivery);
        stale += u64::from(far + 5_000 < 0xFF_0000);
    }
    // Acknowledgements and answers of what was never sent.
    for opcode in [Opcode::ReadResponseOnly, Opcode::Acknowledge] {
        net.inject(to, from, forged(opcode, qa, psn, &[0x60, 0, 0, 0]));
        net.step(limit, &mut no_delivery);
    }
    assert_eq!(net.engine(a.node).counters().stale_psn, 2);
    assert_eq!(
        net.engine(a.node).query_qp(qa).unwrap().state,
        QpState::ReadyToSend
    );
    assert_eq!(net.engine(b.node).held_bytes(), 0);
}

#[test]
fn illegal_moves_are_typed_errors() {
    let (mut net, a, _) = pair(&EngineConfig::default());
    let now = net.now();
    let engine = net.engine(a.node);
    let qpn = engine.create_qp(&a.init()).unwrap();
    let illegal = |from, to| Err(VerbsError::IllegalTransition { from, to });
    let (reset, ready) = (QpState::Reset, QpState::ReadyToSend);
    assert_eq!(
        engine.modify_qp(qpn, Modify::Resume, now),
        illegal(reset, ready)
    );
    assert_eq!(
        engine.modify_qp(qpn, Modify::ToSendQueueDrain, now),
        illegal(reset, QpState::SendQueueDrain)
    );
    assert_eq!(
        engine.modify_qp(qpn, Modify::ToError, now),
        Ok(QpState::Error)
    );
    assert_eq!(
        engine.modify_qp(qpn, Modify::Resume, now),
        illegal(QpState::Error, ready)
    );
    assert_eq!(engine.modify_qp(qpn, Modify::ToReset, now), Ok(reset));
}

#[test]
fn a_drained_send_queue_waits_and_goes_on() {
    for framing in FRAMINGS {
        let (mut net, a, b) = pair(&EngineConfig::default());
        let sides = [(&a, &a.init(), Psn::new(7)), (&b, &b.init(), Psn::new(9))];
        let [qa, _] = connect_by_hand(&mut net, sides, framing, 4, full_access());
        let op = SendOp::Write {
            remote: b.addr(0),
            rkey: b.mr.rkey,
        };
        let list = [a.mr.sge(0, 50_000)];
        for wr_id in 0..3 {
            net.engine(a.node)
                .post_send(qa, &signaled(wr_id, op, &list))
                .unwrap();
        }
        let now = net.now();
        net.step(now, &mut no_delivery);
        net.engine(a.node)
            .modify_qp(qa, Modify::ToSendQueueDrain, now)
            .unwrap();
        assert!(!net.engine(a.node).query_qp(qa).unwrap().drained);
        idle(&mut net, Duration::from_secs(1));
        // What had begun ends, the rest waits.
        assert_eq!(a.sends(&mut net).len(), 1);
        let attributes = net.engine(a.node).query_qp(qa).unwrap();
        assert!(attributes.drained);
        assert_eq!(attributes.send_wrs, 2);
        let now = net.now();
        net.engine(a.node)
            .modify_qp(qa, Modify::Resume, now)
            .unwrap();
        idle(&mut net, Duration::from_secs(1));
        assert_eq!(a.sends(&mut net).len(), 2);
    }
}

/// A READ and a fenced WRITE to the same place: the READ sees what was there before.
#[test]
fn a_fence_waits_for_reads() {
    for framing in FRAMINGS {
        let (mut net, a, b) = pair(&EngineConfig::default());
        net.set_faults(SimFaults {
            loss_ppm: 100_000,
            ..SimFaults::NONE
        });
        let sides = [(&a, &a.init(), Psn::new(7)), (&b, &b.init(), Psn::new(9))];
        let [qa, _] = connect_by_hand(&mut net, sides, framing, 64, full_access());
        let (remote, rkey, len) = (b.addr(0), b.mr.rkey, 20_000);
        for round in 0..20 {
            b.write(0, &pattern(round, len as usize));
            a.write(100_000, &pattern(round + 1000, len as usize));
            let (into, from) = ([a.mr.sge(0, len)], [a.mr.sge(100_000, len)]);
            let read = signaled(0, SendOp::Read { remote, rkey }, &into);
            let flags = SendFlags::SIGNALED | SendFlags::FENCE;
            let write = SendWr {
                flags,
                ..signaled(1, SendOp::Write { remote, rkey }, &from)
            };
            net.engine(a.node).post_send(qa, &read).unwrap();
            net.engine(a.node).post_send(qa, &write).unwrap();
            let mut done = 0;
            assert!(run(&mut net, Duration::from_secs(5), |net| {
                done += a.sends(net).len();
                done == 2
            }));
            assert_eq!(a.read(0, len as usize), pattern(round, len as usize));
            assert_eq!(b.read(0, len as usize), pattern(round + 1000, len as usize));
        }
    }
}

#[test]
fn an_idle_queue_pair_takes_less_than_64_kib() {
    let (mut net, a, b) = pair(&EngineConfig::default());
    let init = |side: &Side| QpInit {
        max_send_wr: 128,
        max_recv_wr: 128,
        max_sge: 4,
        max_inline: 64,
        inline_recv: true,
        ack_request: AckRequest::Last,
        ..side.init()
    };
    let (qa, qb) = connect(&mut net, &a, &b, &init(&a), &init(&b));
    for (side, qpn) in [(&a, qa), (&b, qb)] {
        let engine = net.engine(side.node);
        engine.post_recv_in_place(qpn, 128).unwrap();
        let bytes = engine.qp_memory_bytes(qpn).unwrap();
        println!("idle queue pair with 128 send requests: {bytes} bytes");
        assert!(bytes < 64 << 10, "{bytes}");
    }
}

#[test]
fn disconnect_and_connect_again() {
    let (mut net, a, b) = pair(&EngineConfig::default());
    for round in 0..20 {
        let (qa, qb) = connect(&mut net, &a, &b, &a.init(), &b.init());
        let (first, second) = if round % 2 == 0 {
            ((&a, qa), (&b, qb))
        } else {
            ((&b, qb), (&a, qa))
        };
        let room = [second.0.mr.sge(0, 10)];
        net.engine(second.0.node)
            .post_recv(
                second.1,
                &RecvWr {
                    wr_id: 1,
                    sges: &room,
                },
            )
            .unwrap();
        let now = net.now();
        net.engine(first.0.node).disconnect(first.1, now).unwrap();
        idle(&mut net, Duration::from_secs(5));
        for (side, qpn) in [first, second] {
            let engine = net.engine(side.node);
            let Some(ConnEvent::Disconnected { qpn: gone, .. }) = engine.poll_cm() else {
                panic!("disconnected")
            };
            assert_eq!(gone, qpn);
            assert!(engine.poll_cm().is_none());
            assert_eq!(engine.query_qp(qpn).unwrap().state, QpState::Error);
            let now = net.now();
            net.engine(side.node).destroy_qp(qpn, now).unwrap();
        }
        let flushed = second.0.recvs(&mut net);
        // Destroyed without having been polled: forgotten.
        assert!(flushed.is_empty());
    }
}

#[test]
fn refusals_of_connections_name_their_reason() {
    let (mut net, a, b) = pair(&EngineConfig::default());
    let qa = net.engine(a.node).create_qp(&a.init()).unwrap();
    let (to, now) = (net.address(b.node), net.now());
    net.engine(a.node)
        .connect(qa, to, SERVICE, &[], now)
        .unwrap();
    idle(&mut net, Duration::from_secs(1));
    let Some(ConnEvent::Rejected { qpn, .. }) = net.engine(a.node).poll_cm() else {
        panic!("nobody listens")
    };
    assert_eq!(qpn, qa);
    // The same queue pair can try again; nobody at all answers.
    let now = net.now();
    net.engine(a.node)
        .connect(qa, "10.9.9.9:4791".parse().unwrap(), SERVICE, &[], now)
        .unwrap();
    idle(&mut net, Duration::from_secs(30));
    assert!(matches!(
        net.engine(a.node).poll_cm(),
        Some(ConnEvent::Unreachable { .. })
    ));
}

#[test]
fn digests_are_used_when_either_end_wants_them() {
    for (a_digest, b_digest) in [
        (Digest::None, Digest::None),
        (Digest::None, Digest::Crc32c),
        (Digest::Crc32c, Digest::None),
    ] {
        let mut net = SimNet::new(1, SimFaults::NONE);
        let config = |digest| EngineConfig {
            digest,
            ..EngineConfig::default()
        };
        let a = Side::new(&mut net, "10.0.0.1:1000", config(a_digest), 1 << 16);
        let b = Side::new(&mut net, "10.0.0.2:1000", config(b_digest), 1 << 16);
        let (qa, qb) = connect(&mut net, &a, &b, &a.init(), &b.init());
        let expected = if a_digest == b_digest {
            a_digest
        } else {
            Digest::Crc32c
        };
        assert_eq!(net.engine(a.node).query_qp(qa).unwrap().digest, expected);
        assert_eq!(net.engine(b.node).query_qp(qb).unwrap().digest, expected);
    }
}

/// WRITE_WITH_IMM of several packets: one completion with the whole length, in either framing.
#[test]
fn length_of_a_long_write_with_immediate() {
    for framing in FRAMINGS {
        let (mut net, a, b) = pair(&EngineConfig::default());
        let init_b = QpInit {
            inline_recv: true,
            ack_request: AckRequest::Last,
            ..b.init()
        };
        let sides = [(&a, &a.init(), Psn::new(7)), (&b, &init_b, Psn::new(9))];
        let [qa, qb] = connect_by_hand(&mut net, sides, framing, 64, full_access());
        net.engine(b.node).post_recv_in_place(qb, 1).unwrap();
        let op = SendOp::WriteImm {
            remote: b.addr(0),
            rkey: b.mr.rkey,
            imm: 77,
        };
        let list = [a.mr.sge(0, 100_001)];
        net.engine(a.node)
            .post_send(qa, &signaled(0, op, &list))
            .unwrap();
        idle(&mut net, Duration::from_millis(100));
        let got = b.recvs(&mut net);
        assert_eq!(
            (got[0].opcode, got[0].imm(), got[0].byte_len),
            (WcOpcode::RecvRdmaWithImm, Some(77), 100_001)
        );
    }
}
