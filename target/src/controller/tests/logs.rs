//! Log pages.

use super::*;
use crate::metrics::Operation;

/// A host that asks for the commands of a set that is not supported gets those of all sets (Base 5.1.12.1.6).
#[test]
fn effects_of_a_set_without_commands() {
    let world = World::new();
    let mut controller = world.ready();
    for (csi, read) in [(Csi::Nvm, true), (Csi::Zoned, false)] {
        let get = GetLogPage {
            csi,
            ..GetLogPage::new(LogPageId::Effects, 0, 4096)
        };
        let page = data(world.send(&mut controller, get.emit(Cid::new(1), &ANYWHERE)));
        let page = flexblk_nvme::log::Effects::view(&page).unwrap();
        assert_eq!(page.io[2].get() & 1 == 1, read, "{csi:?}");
        assert_eq!(page.admin[6].get() & 1, 1, "Identify");
    }
}

/// The error log has what failed, newest first; SMART counts true numbers (Base 5.1.12.1).
#[test]
fn logs_have_true_numbers() {
    let world = World::new();
    let mut controller = world.ready();
    for cid in [1, 2] {
        controller
            .association()
            .log_error(crate::association::ErrorEntry {
                sqid: Qid::new(1),
                cid: Cid::new(cid),
                opcode: 2,
                status: StatusCode::LbaOutOfRange.dnr(),
                lba: Lba::new(99),
                nsid: Nsid::new(1),
            });
    }
    let page = data(world.log(&mut controller, LogPageId::Error, 0, 64));
    let entry = ErrorEntry::view(&page).unwrap();
    assert_eq!(
        (entry.count.get(), entry.cid.get(), entry.lba.get()),
        (2, 2, 99)
    );
    assert_eq!(entry.status(), StatusCode::LbaOutOfRange.dnr());

    let counters = &world.snapshot.subsystem(0).unwrap().counters;
    counters[0].read(512_001);
    counters[1].written(4096);
    counters[1].failed(Operation::Read, true);
    counters[0].failed(Operation::Write, false);
    counters[0].failed(Operation::Other, false);
    let page = data(world.log(&mut controller, LogPageId::Smart, 0, 512));
    let smart = Smart::view(&page).unwrap();
    assert_eq!(
        (smart.data_units_read.get(), smart.host_reads.get()),
        (2, 2)
    );
    assert_eq!(
        (smart.data_units_written.get(), smart.host_writes.get()),
        (1, 2)
    );
    assert_eq!(
        (smart.media_errors.get(), smart.error_entries.get()),
        (1, 2)
    );
}

/// An offset behind the page is Invalid Field, an unknown page Invalid Log Page (Base 5.1.12).
#[test]
fn log_pages_are_bounded() {
    let world = World::new();
    let mut controller = world.ready();
    let beyond = world.log(&mut controller, LogPageId::Smart, 516, 4);
    assert_eq!(beyond, failed(StatusCode::InvalidField));
    let huge = world.log(&mut controller, LogPageId::Smart, 0, 2 << 20);
    assert_eq!(huge, failed(StatusCode::InvalidField));
    let unknown = world.log(&mut controller, LogPageId::Sanitize, 0, 4);
    assert_eq!(unknown, failed(StatusCode::InvalidLogPage));
    let discovery = world.log(&mut controller, LogPageId::Discovery, 0, 4);
    assert_eq!(discovery, failed(StatusCode::InvalidLogPage));
    for lid in [
        LogPageId::Supported,
        LogPageId::Effects,
        LogPageId::FirmwareSlot,
        LogPageId::FeatureEffects,
    ] {
        assert_eq!(data(world.log(&mut controller, lid, 0, 512)).len(), 512);
    }
}

/// Base 5.1.12.1.8: with Create Telemetry Host-Initiated Data the controller "shall capture" its state,
/// and the data stays as it was until the next time; offsets are of 512 bytes. A host is told of what
/// is its own only. 5.1.12.1.9: what the controller captures of its own accord.
#[test]
fn telemetry() {
    use flexblk_nvme::log::telemetry::{CREATE, TelemetryHeader};
    let world = World::new();
    let mut controller = world.ready();
    let id = data(world.identify(&mut controller, Cns::Controller, 0));
    let lpa = identify::Controller::view(&id).unwrap().lpa;
    assert_ne!(lpa & identify::Lpa::TELEMETRY.bits(), 0);
    let own = controller.association().host_tag;
    let record = |kind, host, value| {
        world.recorders[0].record(recorder::Event {
            host,
            value,
            ..recorder::Event::new(kind, ([192, 0, 2, 7], 1234).into())
        });
    };
    record(recorder::Kind::Error, own, 11);
    record(recorder::Kind::Error, own + 1, 22);
    let get = |controller: &mut Controller, lid, lsp, offset, len| {
        let mut get = GetLogPage::new(lid, offset, len);
        get.lsp = lsp;
        world.send(controller, get.emit(Cid::new(1), &ANYWHERE))
    };
    let host = LogPageId::TelemetryHost;
    let header = |bytes: &[u8]| *TelemetryHeader::view(bytes).unwrap();
    // Nothing was captured: a header and no data.
    let before = header(&data(get(&mut controller, host, 0, 0, 512)));
    assert_eq!((before.lid, before.data_area_1_last.get()), (7, 0));
    let bytes = data(get(&mut controller, host, CREATE, 0, 1024));
    let after = header(&bytes);
    assert_eq!(
        (after.data_area_1_last.get(), after.host_generation),
        (1, 1)
    );
    assert_eq!(after.controller_available, 0);
    let text = std::str::from_utf8(&bytes[512..]).unwrap();
    assert!(text.contains("\"event\":\"error\""), "{text}");
    assert!(
        text.contains("\"value\":11,\"peer\":\"192.0.2.7:1234\""),
        "{text}"
    );
    assert!(!text.contains("22"), "another host's: {text}");
    record(recorder::Kind::KeepAliveExpired, own, 33);
    let again = data(get(&mut controller, host, 0, 512, 512));
    assert_eq!(again, bytes[512..], "not captured anew");
    for (lid, offset) in [(host, 4), (LogPageId::TelemetryController, 256)] {
        let wrong = get(&mut controller, lid, 0, offset, 512);
        assert_eq!(wrong, failed(StatusCode::InvalidField));
    }
    // The controller of before was lost: that is there without having been asked for.
    let bytes = data(get(
        &mut controller,
        LogPageId::TelemetryController,
        0,
        0,
        1024,
    ));
    let own = header(&bytes);
    assert_eq!((own.lid, own.controller_available), (8, 1));
    let text = std::str::from_utf8(&bytes[512..]).unwrap();
    assert!(text.contains("keep-alive-expired"), "{text}");
    let next = header(&data(get(&mut controller, host, CREATE, 0, 512)));
    assert_eq!((next.host_generation, next.controller_available), (2, 1));
}

/// Base 5.1.2.1, Telemetry Log Changed: a host that asks for it is told that there is controller-initiated
/// data, also when that is older than its controller; reading the page makes room for the next event.
#[test]
fn telemetry_is_announced() {
    let world = World::new();
    let mut controller = world.ready();
    let own = controller.association().host_tag;
    let peer = ([192, 0, 2, 7], 1234).into();
    let config = |on: bool| {
        let value = AsyncEventConfig::new().with_telemetry(on);
        SetFeatures::new(FeatureValue::AsyncEventConfig(value)).emit(Cid::new(1), &Sgl::NONE)
    };
    for cid in [7, 8] {
        let request = AsyncEventRequest.emit(Cid::new(cid), &Sgl::NONE);
        assert_eq!(world.send(&mut controller, request), Reply::Later);
    }
    assert_eq!(world.send(&mut controller, config(true)), done(0));
    assert_eq!(controller.poll_event(), None, "nothing was lost");
    controller.note_loss();
    let event = AsyncEvent::TELEMETRY_CHANGED.result().to_dword();
    assert_eq!(controller.poll_event(), Some((Cid::new(7), event)));
    controller.note_loss();
    assert_eq!(controller.poll_event(), None, "not read yet");
    let page = LogPageId::TelemetryController;
    data(world.log(&mut controller, page, 0, 512));

    world.recorders[0].record(recorder::Event {
        host: own,
        ..recorder::Event::new(recorder::Kind::ProtocolError, peer)
    });
    assert_eq!(world.send(&mut controller, config(false)), done(0));
    assert_eq!(world.send(&mut controller, config(true)), done(0));
    assert_eq!(controller.poll_event(), Some((Cid::new(8), event)));
}
