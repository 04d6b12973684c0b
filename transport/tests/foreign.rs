//! Packets that nobody of ours has sent: random, mutated, for other queue pairs, from other places.
//! They are counted and dropped, nothing panics, nothing grows, and I/O goes on.

mod common;

use std::net::SocketAddr;
use std::time::Duration;

use common::{FRAMINGS, Side, connect_by_hand, full_access, idle, pair, pattern, run, signaled};
use flexins::engine::{Engine, EngineConfig};
use flexins::port::sim::{SimFaults, SimNet, SimSink};
use flexins::verbs::{Framing, QpState, Qpn, RecvWr, SendFlags, SendOp, SendWr, WcStatus};
use flexins::wire::{Opcode, Psn};
use proptest::prelude::*;

const HOLD_BUDGET_BYTES: usize = 100_000;

struct Bench {
    net: SimNet,
    a: Side,
    b: Side,
    qa: Qpn,
    qb: Qpn,
}

fn bench(framing: Framing, in_place: bool) -> Bench {
    let config = EngineConfig {
        hold_budget_bytes: HOLD_BUDGET_BYTES,
        ..EngineConfig::default()
    };
    let (mut net, a, b) = pair(&config);
    let psn = Psn::new(0x00FF_FFF0);
    let sides = [(&a, &a.init(), psn), (&b, &b.init(), psn)];
    let [qa, qb] = connect_by_hand(&mut net, sides, framing, 64, full_access());
    let engine = net.engine(b.node);
    if in_place {
        engine.post_recv_in_place(qb, 60).unwrap();
    } else {
        for wr_id in 0..60 {
            let room = [b.mr.sge(500_000 + wr_id * 5_000, 5_000)];
            engine
                .post_recv(qb, &RecvWr { wr_id, sges: &room })
                .unwrap();
        }
    }
    Bench { net, a, b, qa, qb }
}

/// Real packets of A: one of each kind and some more.
fn packets(bench: &mut Bench) -> Vec<Vec<u8>> {
    let Bench { net, a, b, qa, .. } = bench;
    let (remote, rkey) = (b.addr(0), b.mr.rkey);
    let list = [a.mr.sge(0, 5_000)];
    let short = [a.mr.sge(0, 77)];
    let spare = net
        .engine(b.node)
        .register_memory(b.pd, &b.memory, 0, 64, full_access())
        .unwrap();
    let engine = net.engine(a.node);
    for (op, sges) in [
        (SendOp::Send, &short),
        (SendOp::Write { remote, rkey }, &list),
        (SendOp::Read { remote, rkey }, &list),
        (
            SendOp::WriteImm {
                remote,
                rkey,
                imm: 1,
            },
            &list,
        ),
        (SendOp::SendImm(1), &short),
        (SendOp::SendInv(spare.rkey), &short),
        (SendOp::Send, &short),
    ] {
        engine.post_send(*qa, &signaled(0, op, sges)).unwrap();
    }
    let mut sink = SimSink::with_room(1000);
    let now = net.now();
    let engine = net.engine(a.node);
    while engine.poll_transmit(now, &mut sink) {}
    // The probe that the timer sends is a kind of its own.
    let later = now + Duration::from_secs(1);
    engine.handle_timeout(later);
    while engine.poll_transmit(later, &mut sink) {}
    sink.packets.into_iter().map(|(_, bytes)| bytes).collect()
}

/// Gives B's engine a packet and takes what it delivers and sends; the answers.
fn feed(
    engine: &mut Engine,
    now: std::time::Instant,
    from: SocketAddr,
    packet: &[u8],
) -> Vec<Vec<u8>> {
    engine.handle_packet(now, from, packet);
    while let Some(delivery) = engine.poll_delivery() {
        assert!(delivery.payload.bytes(packet).len() <= 4096);
    }
    let mut sink = SimSink::with_room(1000);
    while engine.poll_transmit(now, &mut sink) {}
    sink.packets.into_iter().map(|(_, bytes)| bytes).collect()
}

#[test]
fn only_a_send_of_one_packet_to_a_queue_pair_that_there_is_can_be_foreseen() {
    for framing in FRAMINGS {
        let mut bench = bench(framing, true);
        let packets = packets(&mut bench);
        let engine = bench.net.engine(bench.b.node);
        let user = bench.b.init().user;
        let mut foreseen = 0;
        for packet in &packets {
            let is_send = Opcode::from_u8(packet[0]) == Some(Opcode::SendOnly);
            let seen = engine.foresee(packet);
            assert_eq!(seen.is_some(), is_send, "{:?}", Opcode::from_u8(packet[0]));
            if let Some((word, message)) = seen {
                assert_eq!(word, user);
                // Padded to a multiple of four: lengths are not looked at.
                assert_eq!(message.len(), 80);
                foreseen += 1;
            }
            for len in 0..packet.len().min(60) {
                let cut = engine.foresee(&packet[..len]);
                assert!(cut.is_none_or(|(_, message)| message.len() < len));
            }
            let mut stranger = packet.clone();
            stranger[5] ^= 1;
            assert!(engine.foresee(&stranger).is_none());
        }
        assert!(foreseen > 0);
        assert_eq!(engine.counters().packets_rx, 0);
    }
}

#[derive(Clone, Debug)]
enum Mutation {
    Flip { at: usize, bit: u8 },
    Set { at: usize, value: u8 },
    Opcode(u8),
    Psn(i16),
    Cut(usize),
    Grow(Vec<u8>),
    Random(Vec<u8>),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        (0usize..80, 0u8..8).prop_map(|(at, bit)| Mutation::Flip { at, bit }),
        (0usize..80, any::<u8>()).prop_map(|(at, value)| Mutation::Set { at, value }),
        prop_oneof![
            any::<u8>(),
            (0..Opcode::ALL.len()).prop_map(|i| Opcode::ALL[i] as u8)
        ]
        .prop_map(Mutation::Opcode),
        (-40i16..40).prop_map(Mutation::Psn),
        (0usize..120).prop_map(Mutation::Cut),
        prop::collection::vec(any::<u8>(), 1..40).prop_map(Mutation::Grow),
        prop::collection::vec(any::<u8>(), 0..200).prop_map(Mutation::Random),
    ]
}

fn mutate(packet: &mut Vec<u8>, mutation: &Mutation, qpn: Qpn) {
    match mutation {
        Mutation::Flip { at, bit } => {
            if let Some(byte) = packet.get_mut(*at) {
                *byte ^= 1 << bit;
            }
        }
        Mutation::Set { at, value } => {
            if let Some(byte) = packet.get_mut(*at) {
                *byte = *value;
            }
        }
        Mutation::Opcode(value) => {
            if let Some(byte) = packet.first_mut() {
                *byte = *value;
            }
        }
        Mutation::Psn(step) => {
            if let Some(bytes) = packet.get_mut(8..12) {
                let word = u32::from_be_bytes(bytes.try_into().unwrap());
                let psn = Psn::new(word.wrapping_add_signed(i32::from(*step))).get();
                bytes.copy_from_slice(&(word & 0xFF00_0000 | psn).to_be_bytes());
            }
        }
        Mutation::Cut(len) => packet.truncate(*len),
        Mutation::Grow(bytes) => packet.extend(bytes),
        Mutation::Random(bytes) => {
            *packet = bytes.clone();
            // Most random bytes would end at the first look.
            if let Some(place) = packet.get_mut(5..8) {
                place.copy_from_slice(&qpn.get().to_be_bytes()[1..]);
            }
            if let Some(byte) = packet.get_mut(1) {
                *byte &= 0xF0;
            }
        }
    }
}

fn fix_checksum(packet: &mut [u8]) {
    if let Some((body, crc)) = packet.split_last_chunk_mut::<4>() {
        *crc = flexins::digest::crc32c(body).to_le_bytes();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    /// Without a right checksum a packet changes nothing; with one (a peer that has gone mad) it may
    /// end the connection, but never more than that.
    #[test]
    fn mutated_packets_never_panic_and_nothing_grows(
        flexins: bool,
        in_place: bool,
        fix: bool,
        steps in prop::collection::vec((any::<prop::sample::Index>(), prop::collection::vec(mutation(), 0..4)), 1..60),
    ) {
        let framing = if flexins { Framing::Flexins } else { Framing::Standard };
        let mut bench = bench(framing, in_place);
        let real = packets(&mut bench);
        let Bench { mut net, a, b, qa, qb } = bench;
        let (from, now) = (net.address(a.node), net.now());
        let memory = net.engine(b.node).qp_memory_bytes(qb).unwrap();
        for (index, mutations) in &steps {
            let mut packet = index.get(&real).clone();
            for step in mutations {
                mutate(&mut packet, step, qb);
            }
            if fix {
                fix_checksum(&mut packet);
            }
            let answers = feed(net.engine(b.node), now, from, &packet);
            // A answers to what B says; it must survive that too, and the packet itself.
            let to = net.address(b.node);
            for answer in answers {
                let mut answer = answer;
                if let (true, Some(step)) = (fix, mutations.first()) {
                    mutate(&mut answer, step, qa);
                    fix_checksum(&mut answer);
                }
                feed(net.engine(a.node), now, to, &answer);
            }
        }
        for (side, qpn) in [(&a, qa), (&b, qb)] {
            let engine = net.engine(side.node);
            prop_assert!(engine.held_bytes() <= HOLD_BUDGET_BYTES);
            prop_assert!(engine.qp_memory_bytes(qpn).unwrap() <= memory + HOLD_BUDGET_BYTES);
            prop_assert!(engine.memory_regions() <= 2);
            engine.destroy_qp(qpn, now).unwrap();
            prop_assert_eq!(engine.held_bytes(), 0);
            let mut sink = SimSink::with_room(1000);
            prop_assert!(!engine.poll_transmit(now, &mut sink));
            engine.handle_timeout(now + Duration::from_secs(10));
        }
    }
}

/// Random and mutated packets from the peer's own address during I/O: all of it is dropped.
#[test]
fn io_goes_on_under_foreign_packets() {
    for framing in FRAMINGS {
        let mut bench = bench(framing, false);
        let mut real = packets(&mut bench);
        let Bench {
            mut net,
            a,
            b,
            qa,
            qb,
        } = bench;
        net.set_faults(SimFaults {
            loss_ppm: 10_000,
            ..SimFaults::NONE
        });
        let (from, to) = (net.address(a.node), net.address(b.node));
        let stranger: SocketAddr = "10.6.6.6:4791".parse().unwrap();
        // The real ones were taken away before they could be sent: those are lost packets.
        let mut done = a.sends(&mut net).len();
        assert_eq!(done, 0);
        let mut dice = 1u64;
        let mut random = move |bound: usize| {
            dice ^= dice << 13;
            dice ^= dice >> 7;
            dice ^= dice << 17;
            (dice % bound as u64) as usize
        };
        let mut injected = 0;
        let mut last = net.elapsed();
        let finished = run(&mut net, Duration::from_secs(30), |net| {
            // What is injected arrives at once: once per moment, or time would stand still.
            let moment = net.elapsed() > last;
            last = net.elapsed();
            for _ in 0..if moment { 5 } else { 0 } {
                let index = random(real.len());
                let mut packet = real[index].clone();
                match random(4) {
                    0 => packet = (0..random(300)).map(|_| random(256) as u8).collect(),
                    1 => packet.truncate(random(packet.len())),
                    // Valid, but from elsewhere.
                    2 => {
                        net.inject(stranger, to, packet.clone());
                        packet[random(12)] ^= 0x55;
                    }
                    _ => {
                        let at = random(packet.len());
                        packet[at] ^= 1 << random(8);
                    }
                }
                net.inject(from, to, packet.clone());
                net.inject(to, from, packet);
                injected += 1;
            }
            for wc in a.sends(net) {
                assert_eq!(wc.status, WcStatus::Success);
                done += 1;
            }
            done == 7
        });
        assert!(finished, "{framing:?}: {done} of 7");
        real.clear();
        assert!(injected > 10);
        for (side, qpn) in [(&a, qa), (&b, qb)] {
            let engine = net.engine(side.node);
            assert_eq!(engine.query_qp(qpn).unwrap().state, QpState::ReadyToSend);
            let counters = engine.counters();
            let dropped = counters.crc_failures + counters.malformed + counters.unknown_qpn;
            assert!(dropped > 0);
        }
        assert!(net.engine(b.node).counters().wrong_peer > 0);
        idle(&mut net, Duration::from_secs(1));
        assert_eq!(net.engine(b.node).held_bytes(), 0);
    }
}

/// Each reason for which a packet is dropped has its counter.
#[test]
fn drops_are_counted_by_reason() {
    let mut bench = bench(Framing::Flexins, true);
    let real = packets(&mut bench);
    let Bench {
        mut net, a, b, qb, ..
    } = bench;
    let (from, now) = (net.address(a.node), net.now());
    let engine = net.engine(b.node);
    let good = &real[0];
    let mut drop = |packet: &[u8], from: SocketAddr| {
        let before: Vec<_> = engine.counters().entries().collect();
        assert!(feed(engine, now, from, packet).is_empty());
        let after = engine.counters().entries();
        let changed: Vec<_> = before
            .into_iter()
            .zip(after)
            .filter(|(a, b)| a != b)
            .collect();
        let names: Vec<_> = changed.iter().map(|((name, _), _)| *name).collect();
        names
            .into_iter()
            .filter(|name| *name != "packets_rx")
            .collect::<Vec<_>>()
    };
    assert_eq!(drop(b"", from), ["malformed"]);
    assert_eq!(drop(&good[..11], from), ["malformed"]);
    assert_eq!(drop(&good[..14], from), ["crc_failures"]);
    assert_eq!(drop(&good[..good.len() - 1], from), ["crc_failures"]);
    assert_eq!(drop(good, "10.0.0.1:4792".parse().unwrap()), ["wrong_peer"]);
    let changed = |at: usize, xor: u8| {
        let mut packet = good.clone();
        packet[at] ^= xor;
        packet
    };
    assert_eq!(
        drop(&changed(0, 0x20), from),
        ["malformed"],
        "unknown opcode"
    );
    assert_eq!(
        drop(&changed(1, 0x01), from),
        ["malformed"],
        "header version"
    );
    assert_eq!(drop(&changed(5, 0x80), from), ["unknown_qpn"]);
    assert_eq!(drop(&changed(40, 0x01), from), ["crc_failures"]);
    // A queue pair that is not set up takes nothing.
    let init = b.init();
    let fresh = engine.create_qp(&init).unwrap();
    let mut packet = good.clone();
    packet[5..8].copy_from_slice(&fresh.get().to_be_bytes()[1..]);
    fix_checksum(&mut packet);
    engine.handle_packet(now, "0.0.0.0:0".parse().unwrap(), &packet);
    assert_eq!(engine.counters().wrong_state, 1);
    assert_eq!(engine.query_qp(qb).unwrap().recv_wrs, 60);
}

/// A message whose delivery was not taken is not lost: the next packets wait for it.
#[test]
fn packets_are_refused_while_deliveries_wait() {
    let mut bench = bench(Framing::Flexins, true);
    let real = packets(&mut bench);
    let Bench { mut net, a, b, .. } = bench;
    let (from, now) = (net.address(a.node), net.now());
    let engine = net.engine(b.node);
    engine.handle_packet(now, from, &real[0]);
    engine.handle_packet(now, from, &real[1]);
    assert_eq!(engine.counters().undrained, 1);
    let delivery = engine.poll_delivery().unwrap();
    assert_eq!(delivery.payload.bytes(&real[0]), &a.read(0, 77)[..]);
    engine.handle_packet(now, from, &real[1]);
    assert_eq!(engine.counters().undrained, 1);
}

/// Messages ahead of a gap are held within the budget; what is beyond it comes again.
#[test]
fn the_hold_store_is_bounded() {
    let config = EngineConfig {
        hold_budget_bytes: 10_000,
        ..EngineConfig::default()
    };
    let (mut net, a, b) = pair(&config);
    let psn = Psn::new(5);
    let sides = [(&a, &a.init(), psn), (&b, &b.init(), psn)];
    let [qa, qb] = connect_by_hand(&mut net, sides, Framing::Flexins, 64, full_access());
    for wr_id in 0..40 {
        let room = [b.mr.sge(wr_id * 4096, 4096)];
        net.engine(b.node)
            .post_recv(qb, &RecvWr { wr_id, sges: &room })
            .unwrap();
    }
    for wr_id in 0..40 {
        a.write(wr_id * 4096, &pattern(wr_id, 4096));
        let list = [a.mr.sge(wr_id * 4096, 4096)];
        let wr = SendWr {
            flags: SendFlags::SIGNALED,
            ..signaled(wr_id, SendOp::Send, &list)
        };
        net.engine(a.node).post_send(qa, &wr).unwrap();
        if wr_id == 0 {
            // The first packet is lost.
            net.partition(true);
            let now = net.now();
            net.step(now, &mut common::no_delivery);
            net.partition(false);
        }
    }
    let mut most = 0;
    let mut done = 0;
    assert!(run(&mut net, Duration::from_secs(10), |net| {
        most = most.max(net.engine(b.node).held_bytes());
        done += a.sends(net).len();
        done == 40
    }));
    assert!(most > 4096 && most <= 10_000, "{most}");
    assert!(net.engine(b.node).counters().hold_overflows > 0);
    for wr_id in 0..40 {
        assert_eq!(b.read(wr_id * 4096, 4096), pattern(wr_id, 4096));
    }
}
