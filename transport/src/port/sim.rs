//! A network in virtual time: engines exchange packets with seeded loss, reordering, duplication,
//! corruption, delay and partitions. The same seed gives the same run, so a failure is a test.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use flexblk_reactor::Span;

use crate::engine::{Delivery, Engine, EngineConfig, PacketShape, TrainSink};
use crate::middleware::random::SplitMix64;

/// What the network does to packets; probabilities in parts per million.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimFaults {
    /// A packet vanishes.
    pub loss_ppm: u32,
    /// A packet arrives twice.
    pub duplicate_ppm: u32,
    /// A packet arrives with some bits flipped.
    pub corrupt_ppm: u32,
    /// A packet is held up for as long as `reorder_delay`.
    pub reorder_ppm: u32,
    /// One-way delay of every packet.
    pub delay: Duration,
    /// Random delay on top, which does not change the order of a direction's packets.
    pub jitter: Duration,
    /// Longest extra delay of a packet that is reordered.
    pub reorder_delay: Duration,
}

impl SimFaults {
    /// A network without faults and with a one-way delay of 10 us.
    pub const NONE: Self = Self {
        loss_ppm: 0,
        duplicate_ppm: 0,
        corrupt_ppm: 0,
        reorder_ppm: 0,
        delay: Duration::from_micros(10),
        jitter: Duration::ZERO,
        reorder_delay: Duration::ZERO,
    };
}

/// What the network has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SimCounters {
    /// Packets that engines sent.
    pub sent: u64,
    /// Packets that engines got.
    pub delivered: u64,
    /// Packets lost, partitions included.
    pub lost: u64,
    /// Packets duplicated.
    pub duplicated: u64,
    /// Packets corrupted.
    pub corrupted: u64,
    /// Packets held up.
    pub reordered: u64,
}

/// Gets the messages that a node's engine hands out in place, with the packet they may lie in.
pub type SimHandler<'a> = &'a mut dyn FnMut(NodeId, &mut Engine, Delivery, &[u8]);

/// An engine of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(usize);

struct Node {
    address: SocketAddr,
    engine: Engine,
    /// No packet of this node arrives before the one it sent last, unless it is reordered.
    last_arrival: Instant,
    link: SimLink,
}

/// How one node is connected to the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SimLink {
    /// What it sends is lost.
    pub deaf_network: bool,
    /// What is sent to it is lost.
    pub deaf_node: bool,
    /// What it sends takes so much longer.
    pub hold: Duration,
}

struct Arrival {
    from: SocketAddr,
    to: SocketAddr,
    bytes: Vec<u8>,
}

/// Engines and the network between them.
pub struct SimNet {
    now: Instant,
    start: Instant,
    random: SplitMix64,
    faults: SimFaults,
    partitioned: bool,
    nodes: Vec<Node>,
    /// By time, then in the order of sending.
    arrivals: BTreeMap<(Instant, u64), Arrival>,
    sequence: u64,
    counters: SimCounters,
    sink: SimSink,
}

impl SimNet {
    /// An empty network.
    #[must_use]
    pub fn new(seed: u64, faults: SimFaults) -> Self {
        // The only use of a clock: virtual times are this one plus what the simulation adds.
        let start = Instant::now();
        Self {
            now: start,
            start,
            random: SplitMix64::new(seed ^ 0x5349_4D4E_4554),
            faults,
            partitioned: false,
            nodes: Vec::new(),
            arrivals: BTreeMap::new(),
            sequence: 0,
            counters: SimCounters::default(),
            sink: SimSink::default(),
        }
    }

    /// Adds an engine at an address.
    pub fn add(&mut self, address: SocketAddr, config: EngineConfig) -> NodeId {
        let mut engine = Engine::new(config, self.random.next_u64());
        engine.set_local_address(address);
        self.nodes.push(Node {
            address,
            engine,
            last_arrival: self.start,
            link: SimLink::default(),
        });
        NodeId(self.nodes.len() - 1)
    }

    /// An engine.
    ///
    /// # Panics
    /// For a node of another network.
    pub fn engine(&mut self, node: NodeId) -> &mut Engine {
        &mut self.nodes[node.0].engine
    }

    /// Address of a node.
    ///
    /// # Panics
    /// For a node of another network.
    #[must_use]
    pub fn address(&self, node: NodeId) -> SocketAddr {
        self.nodes[node.0].address
    }

    /// Virtual time.
    #[must_use]
    pub const fn now(&self) -> Instant {
        self.now
    }

    /// Virtual time since the start.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.now - self.start
    }

    /// What happens to packets from now on.
    pub const fn set_faults(&mut self, faults: SimFaults) {
        self.faults = faults;
    }

    /// Cuts all connections, or heals them. Packets under way still arrive.
    pub const fn partition(&mut self, partitioned: bool) {
        self.partitioned = partitioned;
    }

    /// How a node is connected from now on. Packets under way still arrive.
    ///
    /// # Panics
    /// For a node of another network.
    pub fn set_link(&mut self, node: NodeId, link: SimLink) {
        self.nodes[node.0].link = link;
    }

    /// What the network has done.
    #[must_use]
    pub const fn counters(&self) -> &SimCounters {
        &self.counters
    }

    /// Lets a packet of anybody arrive now.
    pub fn inject(&mut self, from: SocketAddr, to: SocketAddr, bytes: Vec<u8>) {
        self.arrive(self.now, Arrival { from, to, bytes });
    }

    /// Goes to the next packet or deadline, but not beyond `limit`, and lets engines act on it;
    /// `deliver` gets messages that are handed out in place. False when `limit` was reached first.
    pub fn step(&mut self, limit: Instant, deliver: SimHandler<'_>) -> bool {
        self.transmit();
        let packet = self.arrivals.first_key_value().map(|((at, _), _)| *at);
        let timeout = self
            .nodes
            .iter()
            .filter_map(|node| node.engine.next_timeout())
            .min();
        let Some(at) = packet
            .into_iter()
            .chain(timeout)
            .min()
            .filter(|at| *at <= limit)
        else {
            self.now = self.now.max(limit);
            return false;
        };
        self.now = self.now.max(at);
        for node in &mut self.nodes {
            if node.engine.next_timeout().is_some_and(|at| at <= self.now) {
                node.engine.handle_timeout(self.now);
            }
        }
        while let Some(entry) = self.arrivals.first_entry() {
            if entry.key().0 > self.now {
                break;
            }
            let arrival = entry.remove();
            let target = self
                .nodes
                .iter_mut()
                .enumerate()
                .find(|(_, node)| node.address == arrival.to);
            let Some((index, node)) = target else {
                continue;
            };
            self.counters.delivered += 1;
            node.engine
                .handle_packet(self.now, arrival.from, &arrival.bytes);
            while let Some(delivery) = node.engine.poll_delivery() {
                deliver(NodeId(index), &mut node.engine, delivery, &arrival.bytes);
            }
        }
        true
    }

    /// Takes what engines have to send and decides its fate.
    fn transmit(&mut self) {
        for index in 0..self.nodes.len() {
            loop {
                // Sometimes little room, so that engines have to stop in the middle.
                self.sink.room = if self.random.below(4) == 0 { 3 } else { 1000 };
                let node = &mut self.nodes[index];
                let more = node.engine.poll_transmit(self.now, &mut self.sink);
                let from = node.address;
                let packets = std::mem::take(&mut self.sink.packets);
                for (to, bytes) in packets {
                    self.send(index, from, to, bytes);
                }
                if !more {
                    break;
                }
            }
        }
    }

    fn send(&mut self, index: usize, from: SocketAddr, to: SocketAddr, bytes: Vec<u8>) {
        self.counters.sent += 1;
        let copies = 1 + u64::from(self.happens(self.faults.duplicate_ppm));
        self.counters.duplicated += copies - 1;
        let link = self.nodes[index].link;
        let unheard = link.deaf_network
            || self
                .nodes
                .iter()
                .any(|node| node.link.deaf_node && node.address == to);
        for _ in 0..copies {
            if self.partitioned || unheard || self.happens(self.faults.loss_ppm) {
                self.counters.lost += 1;
                continue;
            }
            let mut bytes = bytes.clone();
            if self.happens(self.faults.corrupt_ppm) {
                self.counters.corrupted += 1;
                self.corrupt(&mut bytes);
            }
            let jitter = self.below(self.faults.jitter);
            let mut at = self.now + self.faults.delay + link.hold + jitter;
            if self.happens(self.faults.reorder_ppm) {
                self.counters.reordered += 1;
                at += self.below(self.faults.reorder_delay);
            } else {
                at = at.max(self.nodes[index].last_arrival);
                self.nodes[index].last_arrival = at;
            }
            self.arrive(at, Arrival { from, to, bytes });
        }
    }

    /// Flips one to three bits, or cuts the packet short.
    fn corrupt(&mut self, bytes: &mut Vec<u8>) {
        let len = bytes.len() as u64;
        if self.random.below(8) == 0 {
            bytes.truncate(self.random.below(len) as usize);
            return;
        }
        for _ in 0..=self.random.below(3) {
            let at = self.random.below(len) as usize;
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << self.random.below(8);
            }
        }
    }

    fn arrive(&mut self, at: Instant, arrival: Arrival) {
        self.sequence += 1;
        self.arrivals.insert((at, self.sequence), arrival);
    }

    fn happens(&mut self, ppm: u32) -> bool {
        ppm > 0 && self.random.below(1_000_000) < u64::from(ppm)
    }

    fn below(&mut self, limit: Duration) -> Duration {
        Duration::from_nanos(self.random.below(limit.as_nanos() as u64 + 1))
    }
}

/// A sink that writes packets into buffers of their own.
#[derive(Default)]
pub struct SimSink {
    /// Finished packets and where they go.
    pub packets: Vec<(SocketAddr, Vec<u8>)>,
    /// Packets for which there is room.
    pub room: usize,
    open: Option<(SocketAddr, Vec<u8>, usize)>,
}

impl SimSink {
    /// A sink with room for so many packets.
    #[must_use]
    pub fn with_room(packets: usize) -> Self {
        Self {
            room: packets,
            ..Self::default()
        }
    }
}

impl TrainSink for SimSink {
    fn open(&mut self, shape: &PacketShape) -> Option<&mut [u8]> {
        assert!(self.open.is_none(), "the packet before was closed");
        if self.room == 0 {
            return None;
        }
        self.room -= 1;
        let mut bytes = Vec::with_capacity(shape.len() as usize);
        bytes.resize(usize::from(shape.head), 0);
        let (_, bytes, _) = self.open.insert((shape.to, bytes, shape.len() as usize));
        Some(bytes)
    }

    fn gather(&mut self, span: Span) {
        if let Some((_, bytes, _)) = &mut self.open {
            let start = bytes.len();
            bytes.resize(start + span.len() as usize, 0);
            span.copy_to_slice(&mut bytes[start..]);
        }
    }

    fn close(&mut self, trailer: &[u8]) {
        if let Some((to, mut bytes, len)) = self.open.take() {
            bytes.extend_from_slice(trailer);
            assert_eq!(bytes.len(), len, "lengths are those of the shape");
            self.packets.push((to, bytes));
        }
    }
}
