//! Two engines on a simulated network, with memory that tests can write and compare.
#![allow(dead_code)] // each test file uses its part

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use flexblk_reactor::{HugePages, SharedMemory};
use flexins::cm::ServiceId;
use flexins::engine::{ConnEvent, Delivery, Engine, EngineConfig};
use flexins::port::sim::{NodeId, SimFaults, SimNet};
use flexins::verbs::{
    Access, AckRequest, Cq, Digest, Framing, Modify, Mr, Pd, QpInit, Qpn, ReadyToReceive,
    ReadyToSend, SendFlags, SendOp, SendWr, Sge, WorkCompletion,
};
use flexins::wire::Psn;
use flexins::wire::trailer::Fack;

/// Service that listeners of tests use.
pub(crate) const SERVICE: ServiceId = ServiceId::from_port(4420);

/// Everything a peer may do.
pub(crate) fn full_access() -> Access {
    Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE
}

/// One side: its node, domain, queues, memory.
pub(crate) struct Side {
    pub(crate) node: NodeId,
    pub(crate) pd: Pd,
    pub(crate) send_cq: Cq,
    pub(crate) recv_cq: Cq,
    pub(crate) memory: Arc<SharedMemory>,
    pub(crate) mr: Mr,
}

impl Side {
    /// A node with `memory_bytes` of registered memory.
    pub(crate) fn new(
        net: &mut SimNet,
        address: &str,
        config: EngineConfig,
        memory_bytes: u64,
    ) -> Self {
        let address: SocketAddr = address.parse().unwrap();
        let node = net.add(address, config);
        let engine = net.engine(node);
        let pd = engine.alloc_pd();
        let memory = SharedMemory::create("flexins-test", memory_bytes, HugePages::No).unwrap();
        let mr = engine
            .register_memory(pd, &memory, 0, memory_bytes, full_access())
            .unwrap();
        let send_cq = engine.create_cq(4096).unwrap();
        let recv_cq = engine.create_cq(4096).unwrap();
        Self {
            node,
            pd,
            send_cq,
            recv_cq,
            memory,
            mr,
        }
    }

    /// Usual parameters of a queue pair.
    pub(crate) fn init(&self) -> QpInit {
        QpInit {
            pd: self.pd,
            send_cq: self.send_cq,
            recv_cq: self.recv_cq,
            max_send_wr: 64,
            max_recv_wr: 64,
            max_sge: 4,
            max_inline: 64,
            inline_recv: false,
            ack_request: AckRequest::Last,
            user: 0,
        }
    }

    /// Writes bytes into the memory.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        self.memory
            .span(offset, bytes.len() as u32)
            .unwrap()
            .copy_from_slice(bytes);
    }

    /// Reads bytes of the memory.
    pub(crate) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .span(offset, len as u32)
            .unwrap()
            .copy_to_slice(&mut bytes);
        bytes
    }

    /// Address at an offset, for the peer.
    pub(crate) fn addr(&self, offset: u64) -> u64 {
        self.mr.addr + offset
    }

    /// Completions of sends.
    pub(crate) fn sends(&self, net: &mut SimNet) -> Vec<WorkCompletion> {
        let mut out = Vec::new();
        net.engine(self.node).poll_cq(self.send_cq, &mut out);
        out
    }

    /// Completions of receives.
    pub(crate) fn recvs(&self, net: &mut SimNet) -> Vec<WorkCompletion> {
        let mut out = Vec::new();
        net.engine(self.node).poll_cq(self.recv_cq, &mut out);
        out
    }
}

/// Bytes that tell where they come from.
pub(crate) fn pattern(id: u64, len: usize) -> Vec<u8> {
    let mut state = id.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A signalled send request.
pub(crate) fn signaled<'a>(wr_id: u64, op: SendOp, sges: &'a [Sge]) -> SendWr<'a> {
    SendWr {
        wr_id,
        op,
        inline: &[],
        sges,
        flags: SendFlags::SIGNALED,
    }
}

/// A connected pair of queue pairs between `a` (which connects) and `b`.
pub(crate) fn connect(
    net: &mut SimNet,
    a: &Side,
    b: &Side,
    init_a: &QpInit,
    init_b: &QpInit,
) -> (Qpn, Qpn) {
    let qa = net.engine(a.node).create_qp(init_a).unwrap();
    let qb = net.engine(b.node).create_qp(init_b).unwrap();
    // A second pair of the same nodes finds the service listened to already.
    let _ = net.engine(b.node).listen(SERVICE);
    let (to, now) = (net.address(b.node), net.now());
    net.engine(a.node)
        .connect(qa, to, SERVICE, b"hello", now)
        .unwrap();
    let limit = net.now() + Duration::from_secs(30);
    let (mut a_up, mut b_up) = (false, false);
    while !(a_up && b_up) {
        assert!(net.step(limit, &mut no_delivery), "connected in time");
        let now = net.now();
        while let Some(event) = net.engine(b.node).poll_cm() {
            match event {
                ConnEvent::ConnectRequest { conn, private, .. } => {
                    assert_eq!(&private.as_slice()[..5], b"hello");
                    net.engine(b.node)
                        .accept(conn, qb, b"welcome", now)
                        .unwrap();
                }
                ConnEvent::Established { qpn, .. } => {
                    assert_eq!(qpn, qb);
                    b_up = true;
                }
                event => panic!("{event:?}"),
            }
        }
        while let Some(event) = net.engine(a.node).poll_cm() {
            match event {
                ConnEvent::Established { qpn, private, .. } => {
                    assert_eq!(qpn, qa);
                    assert_eq!(&private.as_slice()[..7], b"welcome");
                    a_up = true;
                }
                event => panic!("{event:?}"),
            }
        }
    }
    (qa, qb)
}

/// For steps in which nothing can be handed out.
pub(crate) fn no_delivery(_: NodeId, _: &mut Engine, delivery: Delivery, _: &[u8]) {
    panic!("unexpected {delivery:?}");
}

/// Steps until `done` or `limit` of virtual time; whether it was done.
pub(crate) fn run(
    net: &mut SimNet,
    limit: Duration,
    mut done: impl FnMut(&mut SimNet) -> bool,
) -> bool {
    let limit = net.now() + limit;
    loop {
        if done(net) {
            return true;
        }
        if !net.step(limit, &mut no_delivery) {
            return done(net);
        }
    }
}

/// Steps for so long.
pub(crate) fn idle(net: &mut SimNet, time: Duration) {
    let limit = net.now() + time;
    while net.step(limit, &mut no_delivery) {}
}

/// Two sides on a quiet network.
pub(crate) fn pair(config: &EngineConfig) -> (SimNet, Side, Side) {
    let mut net = SimNet::new(1, SimFaults::NONE);
    let a = Side::new(&mut net, "10.0.0.1:4791", config.clone(), 1 << 20);
    let b = Side::new(&mut net, "10.0.0.2:4791", config.clone(), 1 << 20);
    (net, a, b)
}

/// A pair of queue pairs that is set up by hand: with these first sequence numbers.
pub(crate) fn connect_by_hand(
    net: &mut SimNet,
    sides: [(&Side, &QpInit, Psn); 2],
    framing: Framing,
    window: u32,
    access: Access,
) -> [Qpn; 2] {
    let now = net.now();
    let qpns = sides.map(|(side, init, _)| net.engine(side.node).create_qp(init).unwrap());
    for me in 0..2 {
        let (side, _, first_psn) = sides[me];
        let (peer, _, expected_psn) = sides[1 - me];
        let peer_address = net.address(peer.node);
        let engine = net.engine(side.node);
        let receive = ReadyToReceive {
            peer: peer_address,
            peer_qpn: qpns[1 - me],
            expected_psn,
            mtu_bytes: 4096,
            framing,
            digest: Digest::Crc32c,
            window,
        };
        let send = ReadyToSend {
            first_psn,
            max_reads: 16,
            retry_count: 3,
            rnr_retry: 2,
        };
        for step in [
            Modify::ToInit(access),
            Modify::ToReadyToReceive(receive),
            Modify::ToReadyToSend(send),
        ] {
            engine.modify_qp(qpns[me], step, now).unwrap();
        }
    }
    qpns
}

/// Both framings.
pub(crate) const FRAMINGS: [Framing; 2] = [Framing::Flexins, Framing::Standard];

/// Closes a packet as a FlexiNS sender does: acknowledgement and checksum.
pub(crate) fn seal(mut packet: Vec<u8>, fack: Option<Psn>) -> Vec<u8> {
    packet.extend(Fack { cumulative: fack }.emit());
    let crc = flexins::digest::crc32c(&packet);
    packet.extend(crc.to_le_bytes());
    packet
}
