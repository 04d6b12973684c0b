//! Asynchronous events.

use super::*;

/// A namespace change is an event with log page 04h; reading the page clears both (Base 5.1.2,
/// 5.1.12.1.5).
#[test]
fn namespace_changes_are_told() {
    let world = World::new();
    let mut controller = world.ready();
    world.send(
        &mut controller,
        AsyncEventRequest.emit(Cid::new(40), &Sgl::NONE),
    );
    controller.note_namespaces_changed(&[Nsid::new(3)]);
    assert_eq!(
        controller.poll_event(),
        None,
        "the host has not asked for notices"
    );
    world.set(
        &mut controller,
        AsyncEventConfig::new().with_namespace_attribute(true),
    );
    controller.note_namespaces_changed(&[Nsid::new(2), Nsid::new(9)]);
    assert_eq!(controller.poll_event(), Some((Cid::new(40), 0x0004_0002)));

    let page = data(world.log(&mut controller, LogPageId::ChangedNamespaces, 0, 4096));
    let page = ChangedNamespaces::view(&page).unwrap();
    assert_eq!(page.iter().map(Nsid::get).collect::<Vec<_>>(), [2, 3, 9]);
    let page = data(world.log(&mut controller, LogPageId::ChangedNamespaces, 0, 4096));
    assert!(page.iter().all(|byte| *byte == 0), "reading has cleared it");

    let many: Vec<Nsid> = (1..=1024).map(Nsid::new).chain([Nsid::new(5000)]).collect();
    controller.note_namespaces_changed(&many);
    let page = data(world.log(&mut controller, LogPageId::ChangedNamespaces, 0, 4096));
    assert!(ChangedNamespaces::view(&page).unwrap().is_overflow());
}

/// "more than AERL": Asynchronous Event Request Limit Exceeded; Abort takes one back (Base 5.1.1,
/// 5.1.2).
#[test]
fn event_requests_are_bounded_and_can_be_aborted() {
    let world = World::new();
    let mut controller = world.ready();
    for cid in 0..4 {
        let reply = world.send(
            &mut controller,
            AsyncEventRequest.emit(Cid::new(cid), &Sgl::NONE),
        );
        assert_eq!(reply, Reply::Later);
    }
    let fifth = world.send(
        &mut controller,
        AsyncEventRequest.emit(Cid::new(4), &Sgl::NONE),
    );
    assert_eq!(fifth, failed(StatusCode::AsyncEventLimitExceeded));
    let abort = |cid| {
        Abort {
            sqid: Qid::ADMIN,
            cid: Cid::new(cid),
        }
        .emit(Cid::new(50), &Sgl::NONE)
    };
    assert_eq!(world.send(&mut controller, abort(2)), done(0));
    assert_eq!(
        controller.poll_action(),
        Some(Action::AbortedEvent(Cid::new(2)))
    );
    assert_eq!(
        world.send(&mut controller, abort(2)),
        done(1),
        "it is not there any more"
    );
}
