//! Tests of managers that talk through a lossy network in virtual time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::codec_tests::any_message;
use super::mad::{MAD_LEN_BYTES, Mad, Message, Req};
use super::*;
use crate::middleware::random::SplitMix64;

proptest! {
    #[test]
    fn foreign_datagrams_neither_panic_nor_grow(
        datagrams in proptest::collection::vec((any_message(), any::<u16>(), any::<u8>(), 0_usize..256), 0..200)
    ) {
        let config = CmConfig { max_half_open: 8, ..CmConfig::default() };
        let mut manager = CmManager::new(config, 1);
        manager.listen(SERVICE).unwrap();
        let now = Instant::now();
        for (message, port, flip, at) in datagrams {
            let message = match message {
                Message::Req(req) => Message::Req(Req { service: SERVICE, ..req }),
                other => other,
            };
            let mut bytes = Mad { transaction: 7, message }.emit();
            bytes[at] ^= flip;
            manager.handle_mad(now, address(port), &bytes);
            while manager.poll_event().is_some() {}
            while manager.poll_transmit().is_some() {}
        }
        prop_assert!(manager.half_open() <= 8);
        manager.handle_timeout(now + Duration::from_secs(60));
        manager.handle_timeout(now + Duration::from_secs(120));
        prop_assert_eq!(manager.active(), 0);
        prop_assert_eq!(manager.half_open(), 0);
        prop_assert_eq!(manager.next_timeout(), None);
    }
}

const SERVICE: ServiceId = ServiceId::from_port(4420);
const PARAMS: Params = Params {
    mtu_bytes: 8320,
    window: 1024,
    features: Features::all(),
};

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn args(from: u16, to: u16) -> ConnectArgs<'static> {
    ConnectArgs {
        qpn: 0x0001_0000 + u32::from(from),
        starting_psn: 77,
        local: address(from),
        to: address(to),
        service: SERVICE,
        private: b"from the initiator",
        params: Some(PARAMS),
        path_mtu_bytes: 4096,
        read_depth: 16,
        retry_count: 7,
        rnr_retry_count: 7,
    }
}

const ACCEPT: AcceptArgs<'static> = AcceptArgs {
    qpn: 0x00BE_EF00,
    starting_psn: 99,
    private: b"from the target",
    params: Some(Params {
        mtu_bytes: 4096,
        window: 512,
        features: Features::SACK,
    }),
    read_depth: 4,
};

/// What a side does with connect requests.
#[derive(Clone, Copy, PartialEq)]
enum Answer {
    Accept,
    Reject,
    Nothing,
}

struct Side {
    manager: CmManager,
    answer: Answer,
    events: Vec<CmEvent>,
    next_qpn: u32,
}

/// Managers at ports of one address, and a network that loses and duplicates.
struct World {
    now: Instant,
    start: Instant,
    random: SplitMix64,
    loss_percent: u64,
    duplication_percent: u64,
    sides: BTreeMap<u16, Side>,
    /// (arrival, order) -> (from, to, datagram)
    flight: BTreeMap<(Instant, u64), (u16, u16, [u8; MAD_LEN_BYTES])>,
    order: u64,
    /// Ports whose datagrams go nowhere.
    dead: BTreeSet<u16>,
}

impl World {
    fn new(seed: u64) -> Self {
        let start = Instant::now();
        Self {
            now: start,
            start,
            random: SplitMix64::new(seed),
            loss_percent: 0,
            duplication_percent: 0,
            sides: BTreeMap::new(),
            flight: BTreeMap::new(),
            order: 0,
            dead: BTreeSet::new(),
        }
    }

    fn pair(seed: u64) -> Self {
        let mut world = Self::new(seed);
        world.add(1000, CmConfig::default());
        world.add(4791, CmConfig::default());
        world.manager(4791).listen(SERVICE).unwrap();
        world
    }

    fn add(&mut self, port: u16, config: CmConfig) {
        let manager = CmManager::new(config, self.random.next_u64());
        let side = Side {
            manager,
            answer: Answer::Accept,
            events: Vec::new(),
            next_qpn: 0x00BE_EF00,
        };
        self.sides.insert(port, side);
    }

    fn manager(&mut self, port: u16) -> &mut CmManager {
        &mut self.sides.get_mut(&port).unwrap().manager
    }

    fn connect(&mut self, from: u16, to: u16) -> ConnId {
        let now = self.now;
        self.manager(from).connect(now, &args(from, to)).unwrap()
    }

    fn events(&mut self, port: u16) -> Vec<CmEvent> {
        std::mem::take(&mut self.sides.get_mut(&port).unwrap().events)
    }

    fn pump(&mut self) {
        let now = self.now;
        for (&port, side) in &mut self.sides {
            while let Some(event) = side.manager.poll_event() {
                if let CmEvent::ConnectRequest { conn, .. } = event {
                    match side.answer {
                        Answer::Accept => {
                            side.next_qpn += 1;
                            let args = AcceptArgs {
                                qpn: side.next_qpn,
                                ..ACCEPT
                            };
                            side.manager.accept(now, conn, &args).unwrap();
                        }
                        Answer::Reject => {
                            let reason = RejectReason::Consumer;
                            side.manager.reject(now, conn, reason, b"no").unwrap();
                        }
                        Answer::Nothing => {}
                    }
                }
                side.events.push(event);
            }
            while let Some((to, mad)) = side.manager.poll_transmit() {
                let copies = 1 + u64::from(self.random.below(100) < self.duplication_percent);
                for _ in 0..copies {
                    if self.random.below(100) < self.loss_percent {
                        continue;
                    }
                    let delay = Duration::from_micros(10 + self.random.below(200));
                    self.order += 1;
                    self.flight
                        .insert((now + delay, self.order), (port, to.port(), mad));
                }
            }
        }
    }

    /// Runs until nothing is in flight and no timer is armed, or the time is over.
    fn run_for(&mut self, limit: Duration) {
        let end = self.now + limit;
        loop {
            self.pump();
            let arrival = self.flight.keys().next().map(|&(at, _)| at);
            let timer = self
                .sides
                .values()
                .filter_map(|side| side.manager.next_timeout())
                .min();
            let Some(next) = [arrival, timer]
                .into_iter()
                .flatten()
                .min()
                .filter(|&at| at <= end)
            else {
                self.now = end;
                return;
            };
            self.now = self.now.max(next);
            let now = self.now;
            if arrival == Some(next)
                && let Some((_, (from, to, mad))) = self.flight.pop_first()
                && !self.dead.contains(&from)
                && !self.dead.contains(&to)
                && let Some(side) = self.sides.get_mut(&to)
            {
                side.manager.handle_mad(now, address(from), &mad);
            }
            for side in self.sides.values_mut() {
                side.manager.handle_timeout(now);
            }
        }
    }

    fn run(&mut self) {
        self.run_for(Duration::from_secs(1));
    }
}

#[test]
fn connect_transfer_of_parameters_and_disconnect() {
    let mut world = World::pair(1);
    let conn = world.connect(1000, 4791);
    world.run();
    let events = world.events(1000);
    let [
        CmEvent::Established {
            conn: established,
            peer,
            private,
        },
    ] = &events[..]
    else {
        panic!("{events:?}");
    };
    assert_eq!(*established, conn);
    assert_eq!(
        (peer.qpn, peer.starting_psn, peer.address),
        (0xBEEF01, 99, address(4791))
    );
    assert!(private.starts_with(b"from the target"));
    assert_eq!(private.len(), 40);
    let agreed = Params {
        mtu_bytes: 4096,
        window: 512,
        features: Features::SACK | Features::CRC32C,
    };
    assert_eq!(peer.negotiated.params, Some(agreed));
    assert_eq!(
        (
            peer.negotiated.initiator_depth,
            peer.negotiated.responder_resources
        ),
        (4, 4)
    );

    let events = world.events(4791);
    let [
        CmEvent::ConnectRequest {
            private,
            params,
            service,
            from,
            ..
        },
        CmEvent::Established {
            conn: passive,
            peer,
            ..
        },
    ] = &events[..]
    else {
        panic!("{events:?}");
    };
    assert!(private.starts_with(b"from the initiator"));
    assert_eq!(
        (*params, *service, *from),
        (Some(PARAMS), SERVICE, address(1000))
    );
    assert_eq!((peer.qpn, peer.starting_psn), (0x0001_03E8, 77));
    assert_eq!(peer.negotiated.params, Some(agreed));

    let (now, passive) = (world.now, *passive);
    world.manager(1000).disconnect(now, conn).unwrap();
    world.run();
    assert!(matches!(
        world.events(1000)[..],
        [CmEvent::Disconnected { conn: c, reason: DisconnectReason::Local }] if c == conn
    ));
    assert!(matches!(
        world.events(4791)[..],
        [CmEvent::Disconnected { conn: c, reason: DisconnectReason::Peer }] if c == passive
    ));
    world.run_for(Duration::from_secs(5));
    for port in [1000, 4791] {
        assert_eq!(world.manager(port).active(), 0);
        assert_eq!(world.manager(port).next_timeout(), None);
    }
}

#[test]
fn a_standard_peer_gets_the_plain_fallback() {
    let mut world = World::new(2);
    // RoCE: both ends use the port of RoCEv2, so the target answers 4791 whatever the source port.
    world.add(4791, CmConfig::default());
    world.manager(4791).listen(SERVICE).unwrap();
    let now = world.now;
    let connect = ConnectArgs {
        params: None,
        path_mtu_bytes: 1500,
        private: &[9; 56],
        ..args(4791, 4791)
    };
    world.manager(4791).connect(now, &connect).unwrap();
    world.run();
    let events = world.events(4791);
    let established: Vec<&Peer> = events
        .iter()
        .filter_map(|event| match event {
            CmEvent::Established { peer, .. } => Some(peer),
            _ => None,
        })
        .collect();
    assert_eq!(established.len(), 2, "{events:?}");
    for peer in established {
        assert_eq!(peer.negotiated.params, None);
        assert_eq!(peer.negotiated.path_mtu_bytes, 1024);
    }
    assert!(events.iter().any(|event| matches!(
        event,
        CmEvent::ConnectRequest { private, params: None, .. } if private[..] == [9; 56]
    )));
}

#[test]
fn both_ends_in_one_manager() {
    let mut world = World::new(3);
    world.add(4791, CmConfig::default());
    world.manager(4791).listen(SERVICE).unwrap();
    let first = world.connect(4791, 4791);
    world.run();
    let established = |events: &[CmEvent]| {
        events
            .iter()
            .filter(|event| matches!(event, CmEvent::Established { .. }))
            .count()
    };
    assert_eq!(established(&world.events(4791)), 2);
    let now = world.now;
    world.manager(4791).disconnect(now, first).unwrap();
    world.run_for(Duration::from_secs(5));
    let events = world.events(4791);
    assert_eq!(events.len(), 2, "{events:?}");
    assert_eq!(world.manager(4791).active(), 0);
}

#[test]
fn every_connection_ends_the_same_way_at_both_ends_whatever_is_lost() {
    let mut retransmissions = 0;
    for seed in 0..300 {
        let mut world = World::pair(seed);
        world.loss_percent = seed % 40;
        world.duplication_percent = seed % 30;
        let conn = world.connect(1000, 4791);
        world.run_for(Duration::from_secs(30));
        let client = world.events(1000);
        let server = world.events(4791);
        let up = |events: &[CmEvent]| {
            events
                .iter()
                .filter(|e| matches!(e, CmEvent::Established { .. }))
                .count()
        };
        let down = |events: &[CmEvent]| {
            events
                .iter()
                .filter(|e| {
                    matches!(
                        e,
                        CmEvent::Disconnected { .. }
                            | CmEvent::Rejected { .. }
                            | CmEvent::Unreachable { .. }
                    )
                })
                .count()
        };
        assert!(
            up(&client) <= 1 && up(&server) <= 1,
            "seed {seed}: {client:?} {server:?}"
        );
        if up(&server) == 1 {
            assert_eq!(up(&client), 1, "seed {seed}");
        }
        let now = world.now;
        let ended = world.manager(1000).disconnect(now, conn).is_err();
        world.run_for(Duration::from_secs(30));
        let client_down = down(&client) + down(&world.events(1000));
        assert_eq!(client_down, 1, "seed {seed}: ended {ended}");
        // The accepting end may miss all DREQs: then its transport finds out.
        let server_down = down(&server) + down(&world.events(4791));
        assert!(server_down <= 1, "seed {seed}");
        assert_eq!(world.manager(1000).active(), 0, "seed {seed}");
        assert_eq!(world.manager(1000).next_timeout(), None, "seed {seed}");
        assert_eq!(world.manager(4791).half_open(), 0, "seed {seed}");
        retransmissions += world.manager(1000).counters().retransmissions;
    }
    assert!(retransmissions > 100, "{retransmissions}");
}

#[test]
fn nobody_there() {
    let mut world = World::new(4);
    world.add(1000, CmConfig::default());
    let conn = world.connect(1000, 4791);
    world.run_for(Duration::from_secs(60));
    assert!(matches!(
        world.events(1000)[..],
        [CmEvent::Unreachable { conn: c }] if c == conn
    ));
    assert_eq!(world.manager(1000).counters().retransmissions, 7);
    assert_eq!(world.manager(1000).active(), 0);
}

#[test]
fn nobody_listens_and_nobody_wants() {
    let mut world = World::pair(5);
    world.manager(4791).unlisten(SERVICE);
    let conn = world.connect(1000, 4791);
    world.run();
    assert!(matches!(
        world.events(1000)[..],
        [CmEvent::Rejected { conn: c, reason: RejectReason::InvalidServiceId, .. }] if c == conn
    ));
    assert_eq!(world.manager(4791).counters().refused_service, 1);

    world.manager(4791).listen(SERVICE).unwrap();
    assert_eq!(
        world.manager(4791).listen(SERVICE),
        Err(CmError::ServiceInUse)
    );
    world.sides.get_mut(&4791).unwrap().answer = Answer::Reject;
    world.connect(1000, 4791);
    world.run();
    let events = world.events(1000);
    assert!(matches!(
        &events[..],
        [CmEvent::Rejected { reason: RejectReason::Consumer, private, .. }]
            if private.starts_with(b"no")
    ));
}

#[test]
fn an_undecided_request_is_refused_in_the_end() {
    let mut world = World::pair(6);
    world.sides.get_mut(&4791).unwrap().answer = Answer::Nothing;
    world.connect(1000, 4791);
    world.run_for(Duration::from_secs(30));
    let events = world.events(1000);
    assert!(
        matches!(
            events[..],
            [CmEvent::Rejected {
                reason: RejectReason::Timeout,
                ..
            }]
        ),
        "{events:?}"
    );
    let events = world.events(4791);
    let [
        CmEvent::ConnectRequest { conn, .. },
        CmEvent::Disconnected {
            reason: DisconnectReason::Timeout,
            ..
        },
    ] = events[..]
    else {
        panic!("{events:?}");
    };
    let now = world.now;
    assert_eq!(
        world.manager(4791).accept(now, conn, &ACCEPT).unwrap_err(),
        CmError::UnknownConnection
    );
    // The repeated requests made no second event: 7 retransmissions within the 5 seconds.
    assert!(world.manager(4791).counters().duplicates > 3);
}

#[test]
fn data_replaces_a_lost_ready_to_use() {
    let mut world = World::pair(7);
    world.connect(1000, 4791);
    world.pump();
    let (_, (_, _, request)) = world.flight.pop_first().unwrap();
    let now = world.now;
    world.manager(4791).handle_mad(now, address(1000), &request);
    world.pump();
    let [CmEvent::ConnectRequest { conn, .. }] = world.events(4791)[..] else {
        panic!()
    };
    world.manager(4791).communication_established(conn);
    world.pump();
    assert!(matches!(
        world.events(4791)[..],
        [CmEvent::Established { .. }]
    ));
    assert_eq!(world.manager(4791).next_timeout(), None);
}

#[test]
fn simultaneous_disconnect() {
    let mut world = World::pair(8);
    let conn = world.connect(1000, 4791);
    world.run();
    world.events(1000);
    let passive = match world.events(4791)[..] {
        [_, CmEvent::Established { conn, .. }] => conn,
        _ => panic!(),
    };
    let now = world.now;
    world.manager(1000).disconnect(now, conn).unwrap();
    world.manager(4791).disconnect(now, passive).unwrap();
    world.run_for(Duration::from_secs(10));
    for port in [1000, 4791] {
        assert!(matches!(
            world.events(port)[..],
            [CmEvent::Disconnected {
                reason: DisconnectReason::Local,
                ..
            }]
        ));
        assert_eq!(world.manager(port).active(), 0);
    }
}

#[test]
fn disconnect_from_a_dead_peer_ends() {
    let mut world = World::pair(9);
    let conn = world.connect(1000, 4791);
    world.run();
    world.events(1000);
    world.dead.insert(4791);
    let now = world.now;
    world.manager(1000).disconnect(now, conn).unwrap();
    world.run_for(Duration::from_secs(1));
    assert!(matches!(
        world.events(1000)[..],
        [CmEvent::Disconnected {
            reason: DisconnectReason::Local,
            ..
        }]
    ));
}

#[test]
fn a_restarted_initiator_makes_its_old_connection_stale() {
    let mut world = World::pair(10);
    world.connect(1000, 4791);
    world.run();
    let old = match world.events(4791)[..] {
        [_, CmEvent::Established { conn, .. }] => conn,
        _ => panic!(),
    };
    // The same port and queue pair, but a manager that knows nothing.
    world.add(1000, CmConfig::default());
    world.connect(1000, 4791);
    world.run();
    assert!(matches!(
        world.events(1000)[..],
        [CmEvent::Rejected {
            reason: RejectReason::StaleConnection,
            ..
        }]
    ));
    assert!(matches!(
        world.events(4791)[..],
        [CmEvent::Disconnected { conn, reason: DisconnectReason::Stale }] if conn == old
    ));
    world.connect(1000, 4791);
    world.run();
    assert!(matches!(
        world.events(1000)[..],
        [CmEvent::Established { .. }]
    ));
}

#[test]
fn half_open_connections_are_bounded_and_do_not_harm_others() {
    let mut world = World::new(11);
    world.add(
        4791,
        CmConfig {
            max_half_open: 4,
            ..CmConfig::default()
        },
    );
    world.manager(4791).listen(SERVICE).unwrap();
    world.add(1000, CmConfig::default());
    world.connect(1000, 4791);
    world.run();
    // Requests from hosts that never confirm.
    let now = world.now;
    for port in 2000..2100 {
        let mut ghost = CmManager::new(CmConfig::default(), u64::from(port));
        ghost.connect(now, &args(port, 4791)).unwrap();
        let (_, mad) = ghost.poll_transmit().unwrap();
        world.manager(4791).handle_mad(now, address(port), &mad);
    }
    world.pump();
    assert_eq!(world.manager(4791).half_open(), 4);
    assert_eq!(world.manager(4791).active(), 5);
    assert_eq!(world.manager(4791).counters().refused_half_open, 96);
    world.run_for(Duration::from_secs(30));
    assert_eq!(world.manager(4791).half_open(), 0);
    assert_eq!(world.manager(4791).active(), 1);
}

#[test]
fn many_connections_at_once() {
    let mut world = World::pair(12);
    world.loss_percent = 10;
    for qpn in 0..200 {
        let now = world.now;
        let connect = ConnectArgs {
            qpn,
            ..args(1000, 4791)
        };
        world.manager(1000).connect(now, &connect).unwrap();
    }
    world.run_for(Duration::from_secs(30));
    let up = world
        .events(1000)
        .iter()
        .filter(|event| matches!(event, CmEvent::Established { .. }))
        .count();
    assert_eq!(up, 200);
    assert_eq!(world.manager(4791).active(), 200);
    assert!(world.now > world.start);
}

#[test]
fn arguments_are_checked() {
    let mut manager = CmManager::new(
        CmConfig {
            max_connections: 1,
            ..CmConfig::default()
        },
        1,
    );
    let now = Instant::now();
    let good = args(1, 2);
    let connect = |manager: &mut CmManager, args: ConnectArgs<'_>| manager.connect(now, &args);
    assert_eq!(
        connect(
            &mut manager,
            ConnectArgs {
                qpn: 1 << 24,
                ..good
            }
        ),
        Err(CmError::Range)
    );
    assert_eq!(
        connect(
            &mut manager,
            ConnectArgs {
                private: &[0; 41],
                ..good
            }
        ),
        Err(CmError::PrivateTooLong { max_bytes: 40 })
    );
    assert_eq!(
        connect(
            &mut manager,
            ConnectArgs {
                private: &[0; 57],
                params: None,
                ..good
            }
        ),
        Err(CmError::PrivateTooLong { max_bytes: 56 })
    );
    let conn = connect(&mut manager, good).unwrap();
    assert_eq!(
        connect(&mut manager, good),
        Err(CmError::TooManyConnections)
    );
    assert_eq!(
        manager.accept(now, conn, &ACCEPT).unwrap_err(),
        CmError::State
    );
    manager.disconnect(now, conn).unwrap();
    assert_eq!(
        manager.disconnect(now, conn),
        Err(CmError::UnknownConnection)
    );
    assert_eq!(manager.next_timeout(), None);
}
