//! The flight recorder of a target that hosts use: what happened is there, for management and, as far as
//! it is its own, for the host.

mod tcp_host;

use std::time::{Duration, Instant};

use flexblk_nvme::aer::AsyncEvent;
use flexblk_nvme::command::admin::{AsyncEventRequest, GetLogPage, SetFeatures};
use flexblk_nvme::features::{AsyncEventConfig, FeatureValue};
use flexblk_nvme::log::LogPageId;
use flexblk_nvme::log::telemetry::{CREATE, TelemetryHeader};
use flexblk_nvme::tcp::IcReq;
use flexblk_nvme::{Cntlid, Nqn, Sgl, StatusCode};
use flexblk_target::recorder::Kind;
use tcp_host::world::{World, nqn, read, transport};
use tcp_host::{Conn, Pair};

#[test]
fn what_happened_is_told_afterwards() {
    let world = World::new("ram:1M");
    let mut pair = Pair::new(world.address, IcReq::default(), &nqn(), 32, true);
    let cid = pair.io.cid();
    let beyond = read(1 << 30, 8).emit(cid, &transport(4096));
    assert!(!pair.io.run(&beyond, &[]).0.status().is_success());
    let cntlid = pair.cntlid.get();
    let peer = pair.admin.socket.local_addr().unwrap();
    drop(pair);
    let mut stranger = Conn::open(world.address, IcReq::default());
    let unknown = Nqn::new("nqn.2026-11.test:unknown").unwrap();
    let refused = stranger.connect(0, 32, Cntlid::DYNAMIC, &unknown, true);
    assert!(!refused.status().is_success());
    drop(stranger);
    world.expect_idle();

    let deadline = Instant::now() + Duration::from_secs(10);
    let events = loop {
        let events: Vec<_> = world.target.flight_recorder();
        if events
            .iter()
            .any(|(_, event)| event.kind == Kind::Disconnect)
        {
            break events;
        }
        assert!(Instant::now() < deadline, "{events:?}");
    };
    let of = |kind| {
        let found = events.iter().find(|(_, event)| event.kind == kind);
        found
            .unwrap_or_else(|| panic!("no {kind:?} in {events:?}"))
            .1
    };
    let connect = of(Kind::Connect);
    assert_eq!(
        (connect.cntlid, connect.qid, connect.peer),
        (cntlid, 0, peer)
    );
    assert_eq!(of(Kind::ConnectQueue).qid, 1);
    let error = of(Kind::Error);
    assert_eq!(
        (error.qid, error.opcode, error.nsid, error.value),
        (1, 2, 1, 1 << 30)
    );
    assert_eq!(error.cid, cid.get());
    assert_eq!(of(Kind::ConnectRefused).host, 0);
    assert!(events.is_sorted_by_key(|(_, event)| event.at_us));

    // The same host, with another controller, by the telemetry log.
    let mut pair = Pair::new(world.address, IcReq::default(), &nqn(), 32, true);
    let mut get = GetLogPage::new(LogPageId::TelemetryHost, 0, 4096);
    get.lsp = CREATE;
    let cid = pair.admin.cid();
    let (cqe, page) = pair.admin.run(&get.emit(cid, &transport(4096)), &[]);
    assert!(cqe.status().is_success(), "{:?}", cqe.status());
    let blocks = TelemetryHeader::view(&page).unwrap().data_area_1_last.get();
    assert!(blocks >= 1);
    let text = std::str::from_utf8(&page[512..]).unwrap();
    for wanted in [
        "\"connect\"",
        "\"connect-queue\"",
        "\"error\"",
        "\"disconnect\"",
    ] {
        assert!(text.contains(wanted), "{wanted} in {text}");
    }
    assert!(!text.contains("connect-refused"), "of nobody known: {text}");
    let status = StatusCode::LbaOutOfRange.dnr().bits();
    assert_eq!(error.status & 0x7FF, status & 0x7FF);
}

/// Whoever breaks the protocol of a connection is in the recorder, and its controller, which is alive,
/// says by an event that there is something to read in the controller-initiated telemetry log.
#[test]
fn a_broken_protocol_is_recorded_and_announced() {
    let world = World::new("ram:1M");
    let mut pair = Pair::new(world.address, IcReq::default(), &nqn(), 32, true);
    let admin = &mut pair.admin;
    let config = AsyncEventConfig::new().with_telemetry(true);
    let cid = admin.cid();
    let set = SetFeatures::new(FeatureValue::AsyncEventConfig(config));
    assert!(
        admin
            .run(&set.emit(cid, &Sgl::NONE), &[])
            .0
            .status()
            .is_success()
    );
    let waiting = admin.cid();
    admin.send(&AsyncEventRequest.emit(waiting, &Sgl::NONE), &[]);

    let peer = pair.io.socket.local_addr().unwrap();
    pair.io.write(&[0xFF; 24]);
    let (event, _) = admin.finish(waiting, &[]);
    let changed = AsyncEvent::TELEMETRY_CHANGED.result().to_dword();
    assert_eq!(event.result.get() as u32, changed);
    let events = world.target.flight_recorder();
    let found = events
        .iter()
        .find(|(_, event)| event.kind == Kind::ProtocolError);
    let (_, broken) = found.unwrap_or_else(|| panic!("{events:?}"));
    assert_eq!((broken.cntlid, broken.qid), (pair.cntlid.get(), 1));
    assert_eq!((broken.peer, broken.value), (peer, 1));

    let get = GetLogPage::new(LogPageId::TelemetryController, 0, 1024);
    let cid = admin.cid();
    let (cqe, page) = admin.run(&get.emit(cid, &transport(1024)), &[]);
    assert!(cqe.status().is_success(), "{:?}", cqe.status());
    let header = TelemetryHeader::view(&page).unwrap();
    assert_eq!((header.lid, header.controller_available), (8, 1));
    let text = std::str::from_utf8(&page[512..]).unwrap();
    assert!(text.contains("\"connect\""), "{text}");

    // Somebody without a queue is written down, too, and nobody is told.
    let mut stranger = Conn::open(world.address, IcReq::default());
    stranger.write(&[0xFF; 24]);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !(world.target.flight_recorder().iter())
        .any(|(_, event)| event.kind == Kind::ProtocolError && event.host == 0)
    {
        assert!(
            Instant::now() < deadline,
            "{:?}",
            world.target.flight_recorder()
        );
    }
}
