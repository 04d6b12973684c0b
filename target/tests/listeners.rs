//! Listeners of a subsystem that come and go while the target runs, over NVMe/TCP and FlexiNS, and ANA
//! states that differ between them.

mod host;
mod tcp_host;
mod world;

use std::io::Read as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use flexblk_nvme::features::AsyncEventConfig;
use flexblk_nvme::log::LogPageId;
use flexblk_nvme::log::ana::{self, AnaState};
use flexblk_nvme::log::discovery::{Page, SubsystemType};
use flexblk_nvme::property::Cc;
use flexblk_nvme::status::CodeSpace;
use flexblk_nvme::tcp::IcReq;
use flexblk_nvme::{Cid, Cntlid, Nqn, StatusCode};
use flexblk_target::config::{ListenAddress, Transport};
use host::Host;
use tcp_host::world::{World, nqn, pattern, read, read_back, transport, write_in_capsule};
use tcp_host::{Conn, Got, Pair};

/// An address of this machine with a port that nobody has.
fn free(ip: [u8; 4]) -> SocketAddr {
    // Below the kernel's own range, so that no client gets it by chance.
    SocketAddr::from((ip, flexblk_tests::ports::free_udp_port().unwrap()))
}

fn tcp(address: SocketAddr) -> ListenAddress {
    ListenAddress {
        trtype: Transport::Tcp,
        address,
    }
}

fn pair_at(address: SocketAddr) -> Pair {
    Pair::new(address, IcReq::default(), &nqn(), 32, true)
}

/// How a Connect at an address ends.
fn connect_at(address: SocketAddr, subnqn: &Nqn) -> StatusCode {
    let mut conn = Conn::open(address, IcReq::default());
    let cqe = conn.connect(0, 32, Cntlid::DYNAMIC, subnqn, true);
    cqe.status().code_in(CodeSpace::Fabrics)
}

fn expect_closed(conn: &mut Conn) {
    let limit = Some(Duration::from_secs(10));
    conn.socket.set_read_timeout(limit).unwrap();
    let mut rest = Vec::new();
    conn.socket.read_to_end(&mut rest).unwrap_or_default();
}

/// `traddr`, `trsvcid` and `portid` of the entries of a discovery log that are of that type.
fn entries(at: SocketAddr, subtype: SubsystemType) -> Vec<(SocketAddr, u16)> {
    let mut conn = Conn::open(at, IcReq::default());
    let cqe = conn.connect(0, 32, Cntlid::DYNAMIC, &Nqn::discovery(), true);
    assert!(cqe.status().is_success());
    conn.set_cc(Cc::ENABLE);
    // More was asked for than there is.
    let bytes = conn.log(LogPageId::Discovery, 8192);
    let page = Page::parse(&bytes).unwrap();
    let records = page.entries().map(|entry| entry.record().unwrap());
    let shown = records.filter(|record| record.subtype == subtype);
    shown
        .map(|record| {
            let address = format!("{}:{}", record.traddr, record.trsvcid);
            (address.parse().unwrap(), record.portid)
        })
        .collect()
}

/// With listeners of its own a subsystem is reached, and in the discovery log, at these only; what is
/// connected elsewhere is closed; an address at which nothing is reached is closed itself.
#[test]
fn a_subsystem_is_reached_at_its_own_listeners_only() {
    let world = World::new("ram:1M");
    let start = world.address;
    let (first, second) = (free([127, 0, 0, 2]), free([127, 0, 0, 1]));
    let mut before = pair_at(start);
    world
        .target
        .set_listeners(&nqn(), Some(&[tcp(first), tcp(second)]))
        .unwrap();
    expect_closed(&mut before.admin);
    expect_closed(&mut before.io);
    assert_eq!(
        connect_at(start, &nqn()),
        StatusCode::ConnectInvalidParameters
    );
    let mut one = pair_at(first);
    let mut two = pair_at(second);
    let bytes = pattern(3, 4096);
    assert!(
        write_in_capsule(&mut one.io, 8, &bytes, 512)
            .status()
            .is_success()
    );
    assert_eq!(read_back(&mut two.io, 8, 4096, 512), bytes);

    // The discovery service is at all addresses, and tells where the subsystem is. FlexiNS has port 1,
    // NVMe/TCP from the start port 2.
    for at in [start, first] {
        assert_eq!(
            entries(at, SubsystemType::Nvm),
            [(first, 3), (second, 4)],
            "asked at {at}"
        );
        let services = entries(at, SubsystemType::CurrentDiscovery);
        assert_eq!(services[1..], [(start, 2), (first, 3), (second, 4)]);
    }
    // An I/O queue belongs to the port of its controller.
    let mut stray = Conn::open(second, IcReq::default());
    let cqe = stray.connect(2, 32, one.cntlid, &nqn(), true);
    assert_eq!(
        cqe.status().code_in(CodeSpace::Fabrics),
        StatusCode::ConnectInvalidParameters
    );

    let uris = world.target.uris();
    assert_eq!(uris.len(), 2, "{uris:?}");
    assert!(
        uris[0].starts_with(&format!("nvme+tcp://{first}/")),
        "{uris:?}"
    );

    // One goes: its controller with it, the other one does not notice.
    world
        .target
        .set_listeners(&nqn(), Some(&[tcp(second)]))
        .unwrap();
    expect_closed(&mut one.admin);
    assert_eq!(read_back(&mut two.io, 8, 4096, 512), bytes);
    let deadline = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(first).is_ok() {
        assert!(Instant::now() < deadline, "still open");
    }
    // It can be opened again, also by others.
    drop(TcpListener::bind(first).unwrap());

    world.target.set_listeners(&nqn(), Some(&[])).unwrap();
    expect_closed(&mut two.admin);
    assert_eq!(
        connect_at(start, &nqn()),
        StatusCode::ConnectInvalidParameters
    );
    assert_eq!(connect_at(start, &Nqn::discovery()), StatusCode::Success);
    world.target.set_listeners(&nqn(), None).unwrap();
    let mut again = pair_at(start);
    assert_eq!(read_back(&mut again.io, 8, 4096, 512), bytes);

    // What cannot be listened on changes nothing.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let wrong = [tcp(first), tcp(taken.local_addr().unwrap())];
    let error = world
        .target
        .set_listeners(&nqn(), Some(&wrong))
        .unwrap_err();
    assert!(
        error.to_string().contains("cannot listen on tcp"),
        "{error}"
    );
    assert!(TcpStream::connect(first).is_err());
    assert_eq!(read_back(&mut again.io, 8, 4096, 512), bytes);
    drop((before, one, two, again, stray));
    world.expect_idle();
    assert!(world.target.shutdown());
}

/// The ANA log through a controller: the state of group 1.
fn state(admin: &mut Conn) -> AnaState {
    let page = admin.log(LogPageId::Ana, 4096);
    let (_, mut groups) = ana::parse(&page).unwrap();
    groups.next().unwrap().unwrap().state
}

fn wait_for_event(admin: &mut Conn, event: Cid) -> u32 {
    match admin.next_of(event) {
        Got::Response(cqe) => cqe.dword0(),
        other => panic!("{other:?}"),
    }
}

/// Two listeners of one subsystem have ANA states of their own (Base 8.1.1: a state is of a group
/// through a controller); a change is told by the event, and I/O through the other listener goes on.
#[test]
fn ana_states_by_listener_under_io() {
    let world = World::new("ram:1M");
    let (first, second) = (free([127, 0, 0, 1]), free([127, 0, 0, 2]));
    let both = [tcp(first), tcp(second)];
    world.target.set_listeners(&nqn(), Some(&both)).unwrap();
    let snapshot = world.target.snapshot();
    let port = snapshot.port_at(&tcp(second)).unwrap().id;
    let set = |state| {
        world
            .target
            .set_ana_state(&nqn(), Some(1), Some(port), state)
            .unwrap();
    };
    set(AnaState::Inaccessible);
    let mut good = pair_at(first);
    let mut bad = pair_at(second);
    assert_eq!(state(&mut good.admin), AnaState::Optimized);
    assert_eq!(state(&mut bad.admin), AnaState::Inaccessible);
    let config = AsyncEventConfig::new().with_ana_change(true);
    let set_to = |admin: &mut Conn| assert!(admin.set_features(config).status().is_success());
    set_to(&mut bad.admin);
    // The other listener is not concerned, and its host is told nothing.
    set_to(&mut good.admin);
    let unconcerned = good.admin.request_event();

    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let (stop, done) = (&stop, &done);
        let io = &mut good.io;
        scope.spawn(move || {
            for seed in 0.. {
                let bytes = pattern(seed as u8, 4096);
                let cqe = write_in_capsule(io, 16, &bytes, 512);
                assert!(cqe.status().is_success(), "{:?}", cqe.status());
                assert_eq!(read_back(io, 16, 4096, 512), bytes);
                done.fetch_add(1, Ordering::Relaxed);
                if stop.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        for (wanted, code) in [
            (AnaState::Optimized, StatusCode::Success),
            (AnaState::NonOptimized, StatusCode::Success),
            (AnaState::Inaccessible, StatusCode::AnaInaccessible),
            (AnaState::Change, StatusCode::AnaTransition),
            (AnaState::PersistentLoss, StatusCode::AnaPersistentLoss),
            (AnaState::Optimized, StatusCode::Success),
        ] {
            let before = done.load(Ordering::Relaxed);
            let event = bad.admin.request_event();
            set(wanted);
            assert_eq!(wait_for_event(&mut bad.admin, event), 0x000C_0302);
            assert_eq!(state(&mut bad.admin), wanted);
            let cid = bad.io.cid();
            let cqe = bad.io.run(&read(0, 8).emit(cid, &transport(4096)), &[]).0;
            assert_eq!(cqe.status().code_in(CodeSpace::Nvm), code, "{wanted:?}");
            let deadline = Instant::now() + Duration::from_secs(10);
            while done.load(Ordering::Relaxed) < before + 3 {
                assert!(Instant::now() < deadline, "I/O stands still");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(state(&mut good.admin), AnaState::Optimized);
    assert!(!good.admin.is_answered(unconcerned), "told of another port");
    let everywhere = |state| {
        let target = &world.target;
        target.set_ana_state(&nqn(), Some(1), None, state).unwrap();
    };
    everywhere(AnaState::NonOptimized);
    assert_eq!(wait_for_event(&mut good.admin, unconcerned), 0x000C_0302);
    assert_eq!(state(&mut good.admin), AnaState::NonOptimized);
    everywhere(AnaState::Optimized);
    // A listener that comes back has nothing left of what was said about it.
    set(AnaState::Inaccessible);
    world
        .target
        .set_listeners(&nqn(), Some(&both[..1]))
        .unwrap();
    world.target.set_listeners(&nqn(), Some(&both)).unwrap();
    let mut back = pair_at(second);
    assert_eq!(state(&mut back.admin), AnaState::Optimized);
}

/// FlexiNS's listeners are services on its one UDP port.
#[test]
fn flexins_services_come_and_go() {
    let world = world::World::new(&["ram:1M"]);
    let flexins = |address: &str| ListenAddress {
        trtype: Transport::Flexins,
        address: address.parse().unwrap(),
    };
    let other = flexins("127.0.0.1:4777");
    let elsewhere = [flexins("127.0.0.9:4420")];
    let error = world.target.set_listeners(&world::nqn(), Some(&elsewhere));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("FlexiNS is on 127.0.0.1"), "{error}");

    let at = |service: u16| {
        let mut host = Host::new(world.port);
        host.service = service;
        host
    };
    let mut before = at(4420);
    let (admin, ..) = world::open(&mut before);
    world
        .target
        .set_listeners(&world::nqn(), Some(&[other]))
        .unwrap();
    before.wait_closed(admin);
    let mut host = at(4777);
    let (_admin, _, io) = world::open(&mut host);
    let bytes = pattern(7, 4096);
    let answer = world::write_in_capsule(&mut host, io, &world::write(0, 8), &bytes);
    assert!(answer.status().is_success());
    // At the address from the start there is the discovery service, and not the subsystem.
    let mut start = at(4420);
    let (queue, _) = start.connect_queue(host::Offer::admin()).unwrap();
    let refused = start.nvme_connect(
        queue,
        &host::connect(0),
        Cntlid::DYNAMIC,
        &world::nqn(),
        true,
    );
    assert_eq!(
        world::fabrics_code(&refused),
        StatusCode::ConnectInvalidParameters
    );
    world.target.set_listeners(&world::nqn(), None).unwrap();
    let mut after = at(4420);
    world::open(&mut after);
}
