//! Two endpoints on real sockets: verbs, faults, foreign packets, a peer that dies, idleness.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_reactor::{Completion, Config, HugePages, Reactor, SharedMemory, Wait};
use flexins::cm::ServiceId;
use flexins::endpoint::{Endpoint, EndpointConfig, EndpointError, RxMode};
use flexins::engine::{ConnEvent, DeliveryKind, EngineConfig, TxMode};
use flexins::verbs::{
    Access, AckRequest, Cq, Digest, Mr, QpInit, Qpn, SendFlags, SendOp, SendWr, WcOpcode, WcStatus,
    WorkCompletion,
};

const MEMORY_BYTES: u32 = 4 << 20;
const DEPTH: u32 = 64;
const SERVICE_PORT: u16 = 4420;

/// One end: endpoint, memory, queue pair.
struct Node {
    endpoint: Endpoint,
    memory: Arc<SharedMemory>,
    mr: Mr,
    cq: Cq,
    init: QpInit,
    qpn: Option<Qpn>,
    connected: bool,
    messages: Vec<(DeliveryKind, Vec<u8>)>,
    done: Vec<WorkCompletion>,
    events: Vec<ConnEvent>,
}

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

impl Node {
    fn new(reactor: &mut Reactor, owner: u8, config: EndpointConfig) -> Self {
        let config = EndpointConfig {
            buffer_group: owner.into(),
            ..config
        };
        let mut endpoint = Endpoint::bind(reactor, owner, config).unwrap();
        let memory = SharedMemory::create("node", MEMORY_BYTES.into(), HugePages::No).unwrap();
        let engine = endpoint.engine();
        let pd = engine.alloc_pd();
        let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ;
        let mr = engine
            .register_memory(pd, &memory, 0, MEMORY_BYTES.into(), access)
            .unwrap();
        let cq = engine.create_cq(4 * DEPTH).unwrap();
        let init = QpInit {
            pd,
            send_cq: cq,
            recv_cq: cq,
            max_send_wr: DEPTH,
            max_recv_wr: 2 * DEPTH,
            max_sge: 2,
            max_inline: 64,
            inline_recv: false,
            ack_request: AckRequest::Last,
            user: 7,
        };
        Self {
            endpoint,
            memory,
            mr,
            cq,
            init,
            qpn: None,
            connected: false,
            messages: Vec::new(),
            done: Vec::new(),
            events: Vec::new(),
        }
    }

    fn make_qp(&mut self) -> Qpn {
        let engine = self.endpoint.engine();
        let qpn = engine.create_qp(&self.init).unwrap();
        engine.post_recv_in_place(qpn, 2 * DEPTH).unwrap();
        self.qpn = Some(qpn);
        qpn
    }

    fn fill(&self, offset: u32, bytes: &[u8]) {
        let span = self.memory.span(offset.into(), bytes.len() as u32).unwrap();
        assert_eq!(span.copy_from_slice(bytes), bytes.len());
    }

    fn bytes(&self, offset: u32, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.memory
            .span(offset.into(), len)
            .unwrap()
            .copy_to_slice(&mut bytes);
        bytes
    }

    fn post(&mut self, wr_id: u64, op: SendOp, inline: &[u8], offset: u32, len: u32) {
        let sges = [self.mr.sge(offset.into(), len)];
        let wr = SendWr {
            wr_id,
            op,
            inline,
            sges: if len == 0 { &[] } else { &sges },
            flags: SendFlags::SIGNALED,
        };
        let qpn = self.qpn.unwrap();
        self.endpoint.engine().post_send(qpn, &wr).unwrap();
    }

    fn on_completion(&mut self, reactor: &mut Reactor, completion: &Completion) {
        let messages = &mut self.messages;
        self.endpoint
            .on_completion(reactor, completion, &mut |engine, delivery, packet| {
                messages.push((delivery.kind, delivery.payload.bytes(packet.bytes).to_vec()));
                engine.post_recv_in_place(delivery.qpn, 1).unwrap();
            });
    }

    fn after_turn(&mut self, now: Instant) {
        if self.endpoint.next_timeout().is_some_and(|at| at <= now) {
            let messages = &mut self.messages;
            self.endpoint
                .handle_timeout(now, &mut |engine, delivery, packet| {
                    messages.push((delivery.kind, delivery.payload.bytes(packet.bytes).to_vec()));
                    engine.post_recv_in_place(delivery.qpn, 1).unwrap();
                });
        }
        while let Some(event) = self.endpoint.engine().poll_cm() {
            match event {
                ConnEvent::ConnectRequest { conn, private, .. } => {
                    assert!(private.as_slice().starts_with(b"hello"));
                    let qpn = self.make_qp();
                    self.endpoint
                        .engine()
                        .accept(conn, qpn, b"welcome", now)
                        .unwrap();
                }
                ConnEvent::Established { user, .. } => {
                    assert_eq!(user, 7);
                    self.connected = true;
                }
                other => self.events.push(other),
            }
        }
        self.endpoint.engine().poll_cq(self.cq, &mut self.done);
    }
}

/// Client (0) and server (1) on one reactor.
struct World {
    reactor: Reactor,
    nodes: [Node; 2],
    completions: Vec<Completion>,
}

impl World {
    fn new(config: &EndpointConfig) -> Self {
        let mut reactor = Reactor::new(&Config::default()).unwrap();
        let nodes = [1, 2].map(|owner| Node::new(&mut reactor, owner, config.clone()));
        let mut world = Self {
            reactor,
            nodes,
            completions: Vec::new(),
        };
        let to = world.nodes[1].endpoint.local_addr();
        let service = ServiceId::from_port(SERVICE_PORT);
        world.nodes[1].endpoint.engine().listen(service).unwrap();
        let qpn = world.nodes[0].make_qp();
        let now = Instant::now();
        world.nodes[0]
            .endpoint
            .engine()
            .connect(qpn, to, service, b"hello", now)
            .unwrap();
        world.run("connection", |world| {
            world.nodes.iter().all(|node| node.connected)
        });
        world
    }

    fn turn(&mut self, until: Instant) {
        let now = self.reactor.now();
        let mut wait = until;
        for node in &mut self.nodes {
            if self.reactor.will_sleep() {
                node.endpoint.prepare_sleep(now);
            }
            node.endpoint.flush(&mut self.reactor, now);
            wait = node.endpoint.next_timeout().map_or(wait, |at| at.min(wait));
        }
        self.reactor
            .turn(Wait::Until(wait), &mut self.completions)
            .unwrap();
        for completion in std::mem::take(&mut self.completions) {
            let node = &mut self.nodes[usize::from(completion.token.owner()) - 1];
            node.on_completion(&mut self.reactor, &completion);
        }
        let now = self.reactor.now();
        self.nodes.iter_mut().for_each(|node| node.after_turn(now));
    }

    /// Turns until `done` says so, at most twenty seconds.
    fn run(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done(self) {
            assert!(
                Instant::now() < deadline,
                "no {what}: {:?} {:?}",
                self.nodes[0].endpoint.counters(),
                self.nodes[1].endpoint.counters()
            );
            self.turn(deadline);
        }
    }

    /// Runs until the client has `count` completions and takes them; all must be good.
    fn completions(&mut self, count: usize) -> Vec<WorkCompletion> {
        self.run("completions", |world| world.nodes[0].done.len() >= count);
        let done = std::mem::take(&mut self.nodes[0].done);
        for completion in &done {
            assert_eq!(completion.status, WcStatus::Success, "{completion:?}");
        }
        done
    }
}

fn random(len: u32, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

fn config(tx: TxMode, rx: RxMode, digest: Digest) -> EndpointConfig {
    let engine = EngineConfig {
        tx,
        digest,
        ..EngineConfig::default()
    };
    EndpointConfig {
        engine,
        rx,
        ..EndpointConfig::new(loopback())
    }
}

#[test]
fn every_operation_carries_its_bytes_in_every_mode() {
    let ring = RxMode::Ring { bytes: 4 << 20 };
    for (config, gso) in [
        (
            config(TxMode::HeaderOnly, RxMode::InCache, Digest::Crc32c),
            true,
        ),
        (
            config(TxMode::HeaderOnly, RxMode::InCache, Digest::None),
            false,
        ),
        (config(TxMode::Copy, ring, Digest::Crc32c), true),
        (
            EndpointConfig {
                bind: "[::1]:0".parse().unwrap(),
                ..config(TxMode::HeaderOnly, ring, Digest::Crc32c)
            },
            true,
        ),
    ] {
        let copying = config.engine.tx == TxMode::Copy;
        let mut world = World::new(&EndpointConfig { gso, ..config });
        let (mr, mut wr_id, mut sent) = (world.nodes[1].mr, 0, 0);
        for (n, len) in [1_u32, 511, 4096, 8192, 8320, 65_536, 1 << 20]
            .into_iter()
            .enumerate()
        {
            let data = random(len, n as u64 + 1);
            world.nodes[0].fill(0, &data);
            let (remote, rkey) = (mr.addr + 13, mr.rkey);
            world.nodes[0].post(wr_id, SendOp::Write { remote, rkey }, b"", 0, len);
            let imm = 0xabcd_0000 + n as u32;
            world.nodes[0].post(
                wr_id + 1,
                SendOp::WriteImm { remote, rkey, imm },
                b"",
                0,
                len,
            );
            world.nodes[0].post(wr_id + 2, SendOp::Read { remote, rkey }, b"", 2 << 20, len);
            let done = world.completions(3);
            let expected = [WcOpcode::RdmaWrite, WcOpcode::RdmaWrite, WcOpcode::RdmaRead];
            assert_eq!(
                done.iter().map(|wc| wc.opcode).collect::<Vec<_>>(),
                expected
            );
            assert_eq!(
                done.iter().map(|wc| wc.wr_id).collect::<Vec<_>>(),
                [wr_id, wr_id + 1, wr_id + 2]
            );
            assert!(world.nodes[1].bytes(13, len) == data, "written {len}");
            assert!(
                world.nodes[0].bytes(2 << 20, len) == data,
                "read back {len}"
            );
            assert_eq!(
                world.nodes[1].messages.pop(),
                Some((DeliveryKind::WriteImm(imm), Vec::new()))
            );
            wr_id += 3;
            sent += u64::from(len);
            if len <= 4096 {
                world.nodes[0].post(wr_id, SendOp::SendImm(5), b"head ", 0, len);
                world.completions(1);
                let (kind, bytes) = world.nodes[1].messages.pop().unwrap();
                assert_eq!(
                    (kind, &bytes[..5]),
                    (DeliveryKind::SendImm(5), &b"head "[..])
                );
                assert!(bytes[5..] == data, "sent {len}");
                wr_id += 1;
            }
        }
        let (client, server) = (
            world.nodes[0].endpoint.port_counters(),
            world.nodes[1].endpoint.port_counters(),
        );
        let (copied, gathered) = (client.payload_bytes_copied, client.payload_bytes_gathered);
        if copying {
            assert!(copied >= 2 * sent && gathered == 0, "{copied} {gathered}");
            assert!(server.payload_bytes_copied >= sent);
        } else {
            assert!(gathered >= 2 * sent && copied == 0, "{copied} {gathered}");
            assert_eq!(server.payload_bytes_copied, 0);
        }
        let longest = client
            .trains_tx_by_segments
            .iter()
            .rposition(|&trains| trains > 0);
        assert!(
            if gso {
                longest >= Some(2)
            } else {
                longest == Some(0)
            },
            "{client:?}"
        );
        assert_eq!(
            (client.send_errors, client.gso_fallbacks, server.send_errors),
            (0, 0, 0)
        );
    }
}

#[test]
fn lossy_paths_lose_no_operation_and_no_byte() {
    let fault = "loss=0.02,reorder=0.02,corrupt=0.005,duplicate=0.01,seed=5"
        .parse()
        .unwrap();
    let config = EndpointConfig {
        fault: Some(fault),
        ..EndpointConfig::new(loopback())
    };
    let mut world = World::new(&config);
    let mr = world.nodes[1].mr;
    let data = random(2 << 20, 99);
    world.nodes[0].fill(0, &data);
    // Blocks of 4 to 32 KiB, each to its own place, then everything back.
    let mut pieces = Vec::new();
    let mut offset = 0;
    while offset < 2 << 20 {
        let len = (4096_u32 << (pieces.len() % 4)).min((2 << 20) - offset);
        pieces.push((offset, len));
        offset += len;
    }
    for (read, batch) in [false, true].into_iter().flat_map(|read| {
        pieces
            .chunks(DEPTH as usize)
            .map(move |batch| (read, batch))
    }) {
        for &(offset, len) in batch {
            let (remote, rkey) = (mr.addr + u64::from(offset), mr.rkey);
            if read {
                world.nodes[0].post(
                    offset.into(),
                    SendOp::Read { remote, rkey },
                    b"",
                    offset,
                    len,
                );
            } else {
                world.nodes[0].post(
                    offset.into(),
                    SendOp::Write { remote, rkey },
                    b"",
                    offset,
                    len,
                );
            }
        }
        let ids: Vec<_> = world
            .completions(batch.len())
            .iter()
            .map(|wc| wc.wr_id as u32)
            .collect();
        assert_eq!(
            ids,
            batch.iter().map(|&(offset, _)| offset).collect::<Vec<_>>()
        );
        if !read && batch.last() == pieces.last() {
            assert!(world.nodes[1].bytes(0, 2 << 20) == data);
            world.nodes[0].fill(0, &vec![0; 2 << 20]);
        }
    }
    assert!(world.nodes[0].bytes(0, 2 << 20) == data);
    let counters = world.nodes.each_ref().map(|node| *node.endpoint.counters());
    assert!(counters[0].retransmissions > 0, "{counters:?}");
    assert!(
        counters
            .iter()
            .map(|counters| counters.crc_failures)
            .sum::<u64>()
            > 0
    );
    let faults = world.nodes[1].endpoint.fault_counters().unwrap();
    assert!(
        faults.lost > 0 && faults.reordered > 0 && faults.duplicated > 0,
        "{faults:?}"
    );
}

#[test]
fn foreign_datagrams_change_nothing() {
    let mut world = World::new(&EndpointConfig::new(loopback()));
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    let to = world.nodes[1].endpoint.local_addr();
    let mr = world.nodes[1].mr;
    for round in 0..50_u64 {
        let data = random(4096, round);
        world.nodes[0].fill(0, &data);
        for n in 0..10_u64 {
            let len = (round * 131 + n * 977) % 9000;
            stranger
                .send_to(&random(len as u32, round * 10 + n), to)
                .unwrap();
        }
        let (remote, rkey) = (mr.addr, mr.rkey);
        world.nodes[0].post(round, SendOp::Write { remote, rkey }, b"", 0, 4096);
        world.completions(1);
        assert!(world.nodes[1].bytes(0, 4096) == data);
    }
    let counters = world.nodes[1].endpoint.counters();
    let dropped =
        counters.malformed + counters.unknown_qpn + counters.crc_failures + counters.wrong_peer;
    assert!(dropped >= 400, "{counters:?}");
    assert!(world.nodes[1].messages.is_empty() && world.nodes[1].events.is_empty());
}

#[test]
fn a_peer_that_dies_is_an_error_in_bounded_time() {
    let engine = EngineConfig {
        retry_count: 3,
        max_rto: Duration::from_millis(50),
        ..EngineConfig::default()
    };
    let mut world = World::new(&EndpointConfig {
        engine,
        ..EndpointConfig::new(loopback())
    });
    let mr = world.nodes[1].mr;
    // The server's socket vanishes, as with kill -9: its endpoint is replaced by an unconnected one.
    let other = Endpoint::bind(
        &mut world.reactor,
        2,
        EndpointConfig {
            buffer_group: 9,
            ..EndpointConfig::new(loopback())
        },
    );
    std::mem::replace(&mut world.nodes[1].endpoint, other.unwrap()).close(&mut world.reactor);
    let started = Instant::now();
    for n in 0..10 {
        let (remote, rkey) = (mr.addr, mr.rkey);
        world.nodes[0].post(n, SendOp::Write { remote, rkey }, b"", 0, 4096);
    }
    world.run("error", |world| world.nodes[0].done.len() == 10);
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
    let statuses: Vec<_> = world.nodes[0].done.iter().map(|wc| wc.status).collect();
    assert_eq!(statuses[0], WcStatus::RetryExcErr);
    assert!(
        statuses[1..]
            .iter()
            .all(|&status| status == WcStatus::WrFlushErr)
    );
    assert!(
        world.nodes[0]
            .events
            .iter()
            .any(|event| matches!(event, ConnEvent::Broken { .. }))
    );
}

#[test]
fn a_connection_at_rest_costs_nothing() {
    let mut world = World::new(&EndpointConfig::new(loopback()));
    let mr = world.nodes[1].mr;
    let (remote, rkey) = (mr.addr, mr.rkey);
    world.nodes[0].post(1, SendOp::Write { remote, rkey }, b"", 0, 4096);
    world.completions(1);
    let cpu = || {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    };
    let (until, before) = (Instant::now() + Duration::from_secs(2), cpu());
    while Instant::now() < until {
        world.turn(until);
    }
    let used = cpu() - before;
    assert!(used < Duration::from_millis(20), "{used:?} of 2 s");
    assert!(
        world.reactor.stats().sleeps < 50,
        "{:?}",
        world.reactor.stats()
    );
}

#[test]
fn the_capture_has_both_directions() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.pcapng");
    let mut reactor = Reactor::new(&Config::default()).unwrap();
    let with_capture = EndpointConfig {
        capture: Some(path.clone()),
        ..EndpointConfig::new(loopback())
    };
    let client = Node::new(&mut reactor, 1, with_capture);
    let server = Node::new(&mut reactor, 2, EndpointConfig::new(loopback()));
    let mut world = World {
        reactor,
        nodes: [client, server],
        completions: Vec::new(),
    };
    let to = world.nodes[1].endpoint.local_addr();
    let service = ServiceId::from_port(SERVICE_PORT);
    world.nodes[1].endpoint.engine().listen(service).unwrap();
    let qpn = world.nodes[0].make_qp();
    world.nodes[0]
        .endpoint
        .engine()
        .connect(qpn, to, service, b"hello", Instant::now())
        .unwrap();
    world.run("connection", |world| {
        world.nodes.iter().all(|node| node.connected)
    });
    let mr = world.nodes[1].mr;
    let data = random(3 * 4096, 4);
    world.nodes[0].fill(0, &data);
    let (remote, rkey) = (mr.addr, mr.rkey);
    world.nodes[0].post(1, SendOp::Write { remote, rkey }, b"", 0, 3 * 4096);
    world.nodes[0].post(2, SendOp::Read { remote, rkey }, b"", 0, 4096);
    world.completions(2);
    world.nodes[0].endpoint.prepare_sleep(Instant::now());
    let file = std::fs::read(&path).unwrap();
    let (mut at, mut sent, mut received) = (0, 0, 0);
    while let Some(head) = file.get(at..at + 8) {
        let kind = u32::from_le_bytes(head[..4].try_into().unwrap());
        let len = u32::from_le_bytes(head[4..].try_into().unwrap()) as usize;
        let block = &file[at..at + len];
        if kind == 6 {
            // epb_flags (option 2, length 4) at the end: direction in the low bits
            let flags = block
                .windows(4)
                .rposition(|option| option == [2, 0, 4, 0])
                .unwrap();
            match block[flags + 4] & 3 {
                1 => received += 1,
                2 => sent += 1,
                other => panic!("direction {other}"),
            }
        }
        at += len;
    }
    assert_eq!(at, file.len());
    let counters = world.nodes[0].endpoint.port_counters();
    assert_eq!(
        (sent, received),
        (counters.segments_tx, counters.segments_rx)
    );
    let marker = &data[4000..4016];
    assert!(
        file.windows(16).any(|bytes| bytes == marker),
        "payload is in the capture"
    );
}

#[test]
fn errors_say_what_is_wrong() {
    let mut reactor = Reactor::new(&Config::default()).unwrap();
    let first = Endpoint::bind(&mut reactor, 1, EndpointConfig::new(loopback())).unwrap();
    let taken = EndpointConfig {
        buffer_group: 1,
        ..EndpointConfig::new(first.local_addr())
    };
    let error = Endpoint::bind(&mut reactor, 2, taken).err().unwrap();
    assert!(
        matches!(&error, EndpointError::Port(_)) && error.to_string().contains("in use"),
        "{error}"
    );
    let nowhere = EndpointConfig {
        capture: Some("/nonexistent/trace".into()),
        ..EndpointConfig::new(loopback())
    };
    let error = Endpoint::bind(&mut reactor, 2, nowhere).err().unwrap();
    assert!(matches!(error, EndpointError::Capture { .. }), "{error}");
}
