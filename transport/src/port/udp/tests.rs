//! The port against itself over 127.0.0.1 and ::1.

use std::net::UdpSocket;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_reactor::{Config, HugePages, SharedMemory, Span, Wait};

use super::*;
use crate::engine::{PacketShape, TrainSink};

const OWNER_A: u8 = 1;
const OWNER_B: u8 = 2;

struct Pair {
    reactor: Reactor,
    a: UdpPort,
    b: UdpPort,
    got_a: Vec<(SocketAddr, Vec<u8>)>,
    got_b: Vec<(SocketAddr, Vec<u8>)>,
}

fn config(bind: &str) -> UdpConfig {
    UdpConfig::new(bind.parse().unwrap())
}

impl Pair {
    fn new(a: &UdpConfig, b: &UdpConfig) -> Self {
        let mut reactor = Reactor::new(&Config::default()).unwrap();
        let b_config = UdpConfig {
            buffer_group: 1,
            ..b.clone()
        };
        let a = UdpPort::bind(&mut reactor, OWNER_A, a).unwrap();
        let b = UdpPort::bind(&mut reactor, OWNER_B, &b_config).unwrap();
        Self {
            reactor,
            a,
            b,
            got_a: Vec::new(),
            got_b: Vec::new(),
        }
    }

    /// Turns until b has `count` packets (and a's trains are back), at most five seconds.
    fn run(&mut self, count: usize) {
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut completions = Vec::new();
        self.turn(Instant::now(), &mut completions);
        while self.got_b.len() < count || self.a.trains_in_flight() > 0 {
            assert!(
                Instant::now() < deadline,
                "{} of {count}: {:?}",
                self.got_b.len(),
                self.a.counters()
            );
            self.turn(deadline, &mut completions);
        }
    }

    fn turn(&mut self, deadline: Instant, completions: &mut Vec<Completion>) {
        self.a.flush(&mut self.reactor, None);
        self.reactor
            .turn(Wait::Until(deadline), completions)
            .unwrap();
        for completion in completions.drain(..) {
            let (port, got) = match completion.token.owner() {
                OWNER_A => (&mut self.a, &mut self.got_a),
                _ => (&mut self.b, &mut self.got_b),
            };
            let mut behind = Vec::new();
            port.on_completion(&mut self.reactor, &completion, &mut |from, packet| {
                assert!(behind.is_empty() || behind == packet.bytes);
                behind = packet.behind.to_vec();
                got.push((from, packet.bytes.to_vec()));
            });
            assert!(
                behind.is_empty(),
                "the last packet of a train has none behind it"
            );
        }
    }

    /// As `run`, with both ports asked where that is quicker, if the thread `spins`.
    fn run_asking(&mut self, count: usize, spins: bool) {
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut completions = Vec::new();
        while self.got_b.len() < count || self.a.trains_in_flight() > 0 {
            assert!(Instant::now() < deadline, "{:?}", self.b.counters());
            let spins = spins && !self.reactor.will_sleep();
            self.a.flush(&mut self.reactor, None);
            self.a.prepare_turn(&mut self.reactor, spins);
            self.b.prepare_turn(&mut self.reactor, spins);
            let (a, b) = (&mut self.a, &mut self.b);
            let mut look = || a.look().max(b.look());
            self.reactor
                .turn_polling(Wait::Until(deadline), &mut completions, &mut look)
                .unwrap();
            let got_b = &mut self.got_b;
            let mut packet = |from, packet: Packet<'_>| got_b.push((from, packet.bytes.to_vec()));
            for completion in completions.drain(..) {
                match completion.token.owner() {
                    OWNER_A => self
                        .a
                        .on_completion(&mut self.reactor, &completion, &mut |_, _| {}),
                    _ => self
                        .b
                        .on_completion(&mut self.reactor, &completion, &mut packet),
                }
            }
            self.b.take_looked(&mut packet);
        }
    }

    /// Puts a packet of head + payload + 8 bytes; false when there is no room.
    fn put(&mut self, mark: u8, head: u16, payload: &[Span]) -> bool {
        let to = self.b.local_addr();
        put(&mut self.a, to, mark, head, payload)
    }
}

fn put(port: &mut UdpPort, to: SocketAddr, mark: u8, head: u16, payload: &[Span]) -> bool {
    let shape = PacketShape {
        to,
        head,
        payload: payload.iter().map(Span::len).sum(),
        trailer: 8,
    };
    let Some(slot) = port.sink().open(&shape) else {
        return false;
    };
    slot.fill(mark);
    payload.iter().for_each(|span| port.sink().gather(*span));
    port.sink().close(&[mark; 8]);
    true
}

fn memory(len: u32) -> Arc<SharedMemory> {
    let memory = SharedMemory::create("payload", len.into(), HugePages::No).unwrap();
    let bytes: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
    memory.span(0, len).unwrap().copy_from_slice(&bytes);
    memory
}

#[test]
fn a_train_arrives_as_its_packets_with_the_senders_address() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        for tx in [TxMode::HeaderOnly, TxMode::Copy] {
            for gso in [true, false] {
                let a = UdpConfig {
                    tx,
                    gso,
                    ..config(address)
                };
                let mut pair = Pair::new(&a, &config(address));
                let memory = memory(16 * 4096);
                for n in 0..15_u8 {
                    let span = memory.span(u64::from(15 - n) * 4096, 4096).unwrap();
                    assert!(pair.put(n, 28, &[span]));
                }
                assert!(pair.put(15, 20, &[])); // the last may be shorter
                pair.run(16);
                let from = pair.a.local_addr();
                for (n, (sender, packet)) in pair.got_b.iter().enumerate() {
                    assert_eq!(*sender, from);
                    let len = if n < 15 { 28 + 4096 + 8 } else { 28 };
                    assert_eq!(packet.len(), len, "packet {n} {tx:?} gso={gso}");
                    assert_eq!((packet[0], packet[len - 1]), (n as u8, n as u8));
                    if n < 15 {
                        let first = (15 - n) * 4096;
                        assert_eq!(usize::from(packet[28]), first % 251);
                        assert_eq!(usize::from(packet[28 + 4095]), (first + 4095) % 251);
                    }
                }
                let (tx_counters, rx) = (pair.a.counters(), pair.b.counters());
                assert_eq!(tx_counters.segments_tx, 16);
                assert_eq!(tx_counters.trains_tx, if gso { 1 } else { 16 });
                assert_eq!((rx.segments_rx, rx.rx_errors, rx.rx_truncated), (16, 0, 0));
                let copied = if tx == TxMode::Copy { 15 * 4096 } else { 0 };
                assert_eq!(tx_counters.payload_bytes_copied, copied);
                assert_eq!(tx_counters.payload_bytes_gathered, 15 * 4096 - copied);
            }
        }
    }
}

/// Little traffic is asked for, much and what wakes a sleeping thread is told; nothing is lost or overtaken when one
/// way is left for the other.
#[test]
fn packets_come_in_order_whether_asked_for_or_told() {
    for rx in [RxMode::InCache, RxMode::Ring { bytes: 1 << 20 }] {
        let config = UdpConfig {
            rx,
            ..config("127.0.0.1:0")
        };
        let mut pair = Pair::new(&config, &config);
        let memory = memory(8 * 4096);
        let span = memory.span(4096, 4096).unwrap();
        let mut sent = 0_usize;
        // Packets together; in trains so many times; the thread spins.
        for (together, times, spins) in [
            (1, 100, true),
            (60, 3, true),
            (1, 100, true),
            (2, 3, false),
            (10, 100, true),
            (1, 20, false),
            (40, 10, true),
            (3, 200, true),
        ] {
            let looks_before = pair.b.counters().looks_found;
            for _ in 0..times {
                // A peer takes a while to answer.
                assert_ne!(pair.b.look(), Polled::Ready);
                for _ in 0..together {
                    while !pair.put(sent as u8, 28, &[span]) {
                        pair.run_asking(0, spins);
                    }
                    sent += 1;
                }
                pair.run_asking(sent, spins);
            }
            let looks = pair.b.counters().looks_found - looks_before;
            assert!(spins || looks == 0, "{looks} without spinning");
            assert!(rx == RxMode::InCache || looks == 0, "{looks}, {rx:?}");
        }
        let counters = pair.b.counters();
        assert_eq!(counters.segments_rx, sent as u64);
        let asked = counters.looks_found > 50;
        assert_eq!(asked, rx == RxMode::InCache, "{counters:?}");
        for (n, (from, packet)) in pair.got_b.iter().enumerate() {
            assert_eq!(*from, pair.a.local_addr());
            assert_eq!(
                (packet.len(), packet[0]),
                (28 + 4096 + 8, n as u8),
                "packet {n}"
            );
            assert_eq!(usize::from(packet[28 + 4095]), (2 * 4096 - 1) % 251);
        }
    }
}

#[test]
fn many_trains_pass_through_few_buffers_in_order() {
    for (rx, in_cache_buffers) in [
        (RxMode::InCache, 2),
        (RxMode::InCache, 5),
        (RxMode::Ring { bytes: 4 << 20 }, 0),
    ] {
        let b = UdpConfig {
            rx,
            in_cache_buffers,
            ..config("127.0.0.1:0")
        };
        let mut pair = Pair::new(&config("127.0.0.1:0"), &b);
        let memory = memory(8192);
        let span = memory.span(0, 8192).unwrap();
        let (mut sent, total) = (0_u32, 2000_u32);
        while sent < total {
            while sent < total && pair.put(sent as u8, 40, &[span]) {
                sent += 1;
            }
            pair.run(sent as usize);
        }
        assert_eq!(pair.got_b.len(), total as usize);
        for (n, (_, packet)) in pair.got_b.iter().enumerate() {
            assert_eq!((packet.len(), packet[0]), (8240, n as u8));
        }
        let counters = pair.b.counters();
        assert_eq!(counters.rx_dropped_by_kernel, 0);
        assert!(counters.trains_rx < u64::from(total) / 4, "{counters:?}");
    }
}

#[test]
fn when_the_kernel_refuses_to_segment_packets_go_one_by_one() {
    let mut pair = Pair::new(&config("127.0.0.1:0"), &config("127.0.0.1:0"));
    // Without checksums the kernel answers EINVAL to UDP_SEGMENT (net/ipv4/udp.c, udp_send_skb).
    pair.a
        .inner
        .socket
        .as_ref()
        .unwrap()
        .disable_checksums()
        .unwrap();
    for n in 0..3 {
        assert!(pair.put(n, 20, &[]));
    }
    pair.run(0);
    let counters = pair.a.counters();
    assert_eq!(
        (
            counters.send_errors,
            counters.gso_fallbacks,
            counters.trains_tx
        ),
        (1, 1, 1)
    );
    for n in 0..3 {
        assert!(pair.put(n, 20, &[])); // as the engine's recovery would
    }
    pair.run(3);
    assert_eq!(
        pair.got_b
            .iter()
            .map(|(_, packet)| packet[0])
            .collect::<Vec<_>>(),
        [0, 1, 2]
    );
    let counters = pair.a.counters();
    assert_eq!(
        (
            counters.send_errors,
            counters.gso_fallbacks,
            counters.trains_tx
        ),
        (1, 1, 4)
    );
}

#[test]
fn an_exhausted_pool_refuses_and_recovers() {
    let a = UdpConfig {
        trains: 3,
        ..config("127.0.0.1:0")
    };
    let mut pair = Pair::new(&a, &config("127.0.0.1:0"));
    let memory = memory(32 << 10);
    let span = memory.span(0, 32 << 10).unwrap();
    let fitted = (0..100).take_while(|&n| pair.put(n, 20, &[span])).count();
    assert_eq!(
        fitted, 3,
        "a train takes one packet of more than half of it"
    );
    assert!(pair.a.is_exhausted());
    pair.run(3);
    assert!(!pair.a.is_exhausted());
    assert!(pair.put(9, 20, &[span]));
    pair.run(4);
}

#[test]
fn foreign_datagrams_arrive_one_by_one_and_empty_ones_do_no_harm() {
    let mut pair = Pair::new(&config("127.0.0.1:0"), &config("127.0.0.1:0"));
    let foreign = UdpSocket::bind("127.0.0.1:0").unwrap();
    let to = pair.b.local_addr();
    for len in [0_usize, 1, 3, 65_507] {
        foreign.send_to(&vec![7; len], to).unwrap();
    }
    pair.run(3);
    let mut lens: Vec<_> = pair.got_b.iter().map(|(_, packet)| packet.len()).collect();
    lens.sort_unstable();
    assert_eq!(lens, [1, 3, 65_507]);
    assert!(
        pair.got_b
            .iter()
            .all(|(from, _)| *from == foreign.local_addr().unwrap())
    );
}

#[test]
fn zero_copy_sends_arrive_and_copies_are_counted() {
    let a = UdpConfig {
        zero_copy: true,
        ..config("127.0.0.1:0")
    };
    let mut pair = Pair::new(&a, &config("127.0.0.1:0"));
    let zero_copy = pair.reactor.features().send_zc;
    let memory = memory(4 * 4096);
    for n in 0..4_u8 {
        assert!(pair.put(n, 28, &[memory.span(u64::from(n) * 4096, 4096).unwrap()]));
    }
    pair.run(4);
    assert_eq!(pair.got_b.len(), 4);
    for (n, (_, packet)) in pair.got_b.iter().enumerate() {
        assert_eq!(usize::from(packet[28]), n * 4096 % 251);
    }
    let counters = pair.a.counters();
    assert_eq!(counters.send_errors, 0);
    assert!(
        counters.zero_copy_copied <= u64::from(zero_copy),
        "{counters:?}"
    );
}

#[test]
fn closing_frees_the_address_at_once_and_dropping_with_the_reactor() {
    let mut reactor = Reactor::new(&Config::default()).unwrap();
    let mut port = UdpPort::bind(&mut reactor, 1, &config("127.0.0.1:0")).unwrap();
    let address = port.local_addr();
    assert!(UdpSocket::bind(address).is_err());
    port.close(&mut reactor);
    assert!(UdpSocket::bind(address).is_ok());
    assert!(!port.has_ended(), "the kernel has not told of it yet");
    end(&mut reactor, &mut port);
    drop(port);
    let mut out = Vec::new();
    // The same owner number, and the same group of buffers.
    let again = UdpPort::bind(&mut reactor, 1, &UdpConfig::new(address)).unwrap();
    reactor.turn(Wait::Poll, &mut out).unwrap();
    drop(again);
    assert!(UdpSocket::bind(address).is_err(), "in flight: kept");
    drop(reactor);
    assert!(UdpSocket::bind(address).is_ok());
}

/// Turns until a closed port has ended.
fn end(reactor: &mut Reactor, port: &mut UdpPort) {
    let mut out = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(5);
    while !port.has_ended() {
        assert!(Instant::now() < deadline);
        port.prepare_turn(reactor, true);
        port.flush(reactor, None);
        reactor.turn(Wait::Until(deadline), &mut out).unwrap();
        port.look();
        for completion in out.drain(..) {
            port.on_completion(reactor, &completion, &mut |_, _| panic!("closed"));
        }
    }
}

#[test]
fn a_closed_port_ends_however_it_received() {
    let mut reactor = Reactor::new(&Config::default()).unwrap();
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    for asks in [false, true] {
        let mut port = UdpPort::bind(&mut reactor, 1, &config("127.0.0.1:0")).unwrap();
        let (mut got, mut out) = (0, Vec::new());
        let deadline = Instant::now() + Duration::from_secs(5);
        // After enough of them one by one, the socket is asked.
        while got < 40 || port.inner.receiver.is_asked() != asks {
            assert!(Instant::now() < deadline, "{got}");
            if got < 40 || asks {
                peer.send_to(b"hi", port.local_addr()).unwrap();
            }
            port.prepare_turn(&mut reactor, asks);
            reactor.turn(Wait::Poll, &mut out).unwrap();
            port.look();
            port.take_looked(&mut |_, _| got += 1);
            for completion in out.drain(..) {
                port.on_completion(&mut reactor, &completion, &mut |_, _| got += 1);
            }
        }
        port.close(&mut reactor);
        end(&mut reactor, &mut port);
    }
}

#[test]
fn sockets_sharing_an_address_each_keep_their_peers() {
    let mut reactor = Reactor::new(&Config::default()).unwrap();
    let shared = UdpConfig {
        reuse_port: true,
        ..config("127.0.0.1:0")
    };
    let a = UdpPort::bind(&mut reactor, 0, &shared).unwrap();
    let same = UdpConfig {
        bind: a.local_addr(),
        buffer_group: 1,
        ..shared
    };
    let b = UdpPort::bind(&mut reactor, 1, &same).unwrap();
    let mut ports = [a, b];
    let peers: Vec<_> = (0..16)
        .map(|_| UdpSocket::bind("127.0.0.1:0").unwrap())
        .collect();
    let mut home = std::collections::HashMap::new();
    let (mut got, mut out) = (0, Vec::new());
    let deadline = Instant::now() + Duration::from_secs(5);
    for _ in 0..4 {
        for peer in &peers {
            peer.send_to(b"hi", ports[0].local_addr()).unwrap();
        }
    }
    while got < 64 {
        assert!(Instant::now() < deadline, "{got}");
        reactor.turn(Wait::Until(deadline), &mut out).unwrap();
        for completion in out.drain(..) {
            let owner = completion.token.owner();
            ports[usize::from(owner)].on_completion(&mut reactor, &completion, &mut |from, _| {
                got += 1;
                assert_eq!(*home.entry(from).or_insert(owner), owner);
            });
        }
    }
    assert_eq!(home.len(), 16);
}
