//! The discovery controller.

use super::*;

/// A discovery subsystem with a name of its own says so in Identify and in its own entry (Base
/// 3.1.3.3); referrals are entries of type 1 for the hosts that they are for; the log can be read at
/// any offset and length, and its generation counter tells when it has changed (5.1.12.3.1).
#[test]
fn unique_name_and_referrals() {
    let mut world = World::new();
    let own = nqn("nqn.2026-11.test:discovery");
    let referral = |port, hosts| Referral {
        trtype: Transport::Tcp,
        address: SocketAddr::from(([192, 0, 2, 9], port)),
        nqn: None,
        hosts,
    };
    let only = AllowedHosts::Only(vec![nqn("other")]);
    world.snapshot.discovery = Arc::new(Discovery {
        nqn: Some(own.clone()),
        listeners: Vec::new(),
        referrals: vec![referral(8009, AllowedHosts::Any), referral(8010, only)],
    });
    assert!(world.snapshot.is_discovery(&own) && world.snapshot.is_discovery(&Nqn::discovery()));
    let mut controller = world.discovery();
    let bytes = data(world.log(&mut controller, LogPageId::Discovery, 0, 8192));
    let page = Page::parse(&bytes).unwrap();
    let records: Vec<_> = page
        .entries()
        .map(|entry| entry.record().unwrap())
        .collect();
    assert_eq!(records.len(), 3);
    assert_eq!(records[0].subnqn, own);
    let referral = &records[2];
    assert_eq!(referral.subtype, SubsystemType::Referral);
    assert_eq!(
        (referral.traddr.as_str(), referral.trsvcid.as_str()),
        ("192.0.2.9", "8009")
    );
    assert!(referral.subnqn.is_discovery());
    for (offset, len) in [
        (0, 16),
        (4, 4),
        (1020, 8),
        (2048, 1024),
        (4092, 4),
        (4096, 4),
    ] {
        let piece = data(world.log(&mut controller, LogPageId::Discovery, offset, len));
        let at = offset as usize;
        assert_eq!(piece, bytes[at..at + len as usize], "{offset}+{len}");
    }
    let beyond = world.log(&mut controller, LogPageId::Discovery, 4100, 4);
    assert_eq!(beyond, Reply::Done(StatusCode::InvalidField.dnr(), 0));
}

/// The discovery log shows a host what it may connect to, can be read in pieces, and a change is an
/// event (Base 3.1.3.3, 5.1.12.3.1).
#[test]
fn discovery() {
    let world = World::new();
    let mut controller = world.discovery();
    let bytes = data(world.log(&mut controller, LogPageId::Discovery, 0, 4096));
    let page = Page::parse(&bytes).unwrap();
    assert_eq!(
        (page.generation(), page.record_count()),
        (7, 2),
        "the private one is not shown"
    );
    let records: Vec<_> = page
        .entries()
        .map(|entry| entry.record().unwrap())
        .collect();
    assert_eq!(records[0].subtype, SubsystemType::CurrentDiscovery);
    assert_eq!(records[1].subnqn, nqn("nqn.2026-11.test:a"));
    assert_eq!(
        (records[1].traddr.as_str(), records[1].trsvcid.as_str()),
        ("192.0.2.1", "4420")
    );
    let piece = data(world.log(&mut controller, LogPageId::Discovery, 2048, 1024));
    assert_eq!(piece, bytes[2048..3072]);

    world.set(
        &mut controller,
        AsyncEventConfig::new().with_discovery_log(true),
    );
    world.send(
        &mut controller,
        AsyncEventRequest.emit(Cid::new(3), &Sgl::NONE),
    );
    controller.note_discovery_changed();
    assert_eq!(controller.poll_event(), Some((Cid::new(3), 0x0070_F002)));

    let id = data(world.identify(&mut controller, Cns::Controller, 0));
    assert_eq!(identify::Controller::view(&id).unwrap().cntrltype, 2);
    assert_eq!(
        world.identify(&mut controller, Cns::Namespace, 1),
        failed(StatusCode::InvalidField)
    );
    let smart = world.log(&mut controller, LogPageId::Smart, 0, 512);
    assert_eq!(smart, failed(StatusCode::InvalidLogPage));
    let abort = Abort::default().emit(Cid::new(1), &Sgl::NONE);
    assert_eq!(
        world.send(&mut controller, abort),
        failed(StatusCode::InvalidOpcode)
    );
}
