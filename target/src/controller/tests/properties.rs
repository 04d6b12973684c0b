//! Properties: capabilities, enabling, reset, shutdown.

use super::*;

/// "CAP.CQR shall be set to 1 for NVMe over Fabrics" and 64-bit access (Base 3.1.4.1).
#[test]
fn capabilities() {
    let world = World::new();
    let mut controller = world.controller(Some(0), 0);
    let cap = Cap::from_bits(world.get(&mut controller, Property::Cap).unwrap());
    assert_eq!(
        (cap.mqes(), cap.cqr(), cap.mpsmin(), cap.dstrd()),
        (255, true, 0, 0)
    );
    assert_eq!(cap.css() & 1, 1, "the NVM command set");
    let narrow = PropertyGet {
        offset: 0,
        width: Width::Four,
    };
    let answer = controller.property_get(&narrow, &world.environment());
    assert_eq!(answer, Err(StatusCode::InvalidField.dnr()));
    assert_eq!(
        world.get(&mut controller, Property::Nssr),
        Err(StatusCode::InvalidField.dnr())
    );
    assert_eq!(world.get(&mut controller, Property::Vs), Ok(0x0002_0000));
}

/// CC.EN to 1 makes CSTS.RDY 1; commands before it are Command Sequence Error (Base 3.5.1).
#[test]
fn commands_wait_for_ready() {
    let world = World::new();
    let mut controller = world.controller(Some(0), 0);
    assert_eq!(
        world.identify(&mut controller, Cns::Controller, 0),
        failed(StatusCode::CommandSequenceError)
    );
    assert!(!controller.association().is_ready());
    world.set_cc(&mut controller, Cc::ENABLE);
    assert!(world.csts(&mut controller).rdy() && controller.association().is_ready());
    data(world.identify(&mut controller, Cns::Controller, 0));
}

/// Values that CAP does not offer make the controller fatal rather than ready.
#[test]
fn unsupported_configurations_are_fatal() {
    let world = World::new();
    for cc in [
        Cc::ENABLE.with_mps(1),
        Cc::ENABLE.with_ams(1),
        Cc::ENABLE.with_css(1),
        Cc::ENABLE.with_iosqes(0),
        Cc::ENABLE.with_iocqes(5),
    ] {
        let mut controller = world.controller(Some(0), 0);
        world.set_cc(&mut controller, cc);
        let csts = world.csts(&mut controller);
        assert!(csts.cfs() && !csts.rdy(), "{cc:?}");
    }
}

/// Controller Level Reset (Base 3.7.2): CSTS.RDY is 1 until the I/O queues are gone, features and
/// event requests start afresh.
#[test]
fn reset_closes_the_queues_first() {
    let world = World::new();
    let mut controller = world.ready();
    let association = Arc::clone(controller.association());
    association.add_queue(Qid::new(1), 0, 8).unwrap();
    let mut config = AsyncEventConfig::new();
    config.set_namespace_attribute(true);
    world.set(&mut controller, config);
    assert_eq!(
        world.send(
            &mut controller,
            AsyncEventRequest.emit(Cid::new(9), &Sgl::NONE)
        ),
        Reply::Later
    );

    world.set_cc(&mut controller, Cc::new());
    assert_eq!(
        controller.poll_action(),
        Some(Action::CloseQueues(Ending::Reset))
    );
    assert!(
        world.csts(&mut controller).rdy(),
        "not before the queues are closed"
    );
    assert!(association.add_queue(Qid::new(2), 0, 8).is_err());
    association.remove_queue(Qid::new(1));
    controller.note_queues_closed();
    assert!(!world.csts(&mut controller).rdy());

    world.set_cc(&mut controller, Cc::ENABLE);
    assert_eq!(
        world.feature(&mut controller, FeatureId::AsyncEventConfig),
        done(0)
    );
    controller.note_namespaces_changed(&[Nsid::new(1)]);
    assert_eq!(controller.poll_event(), None, "the request was forgotten");
    // A new life may settle its number of queues anew.
    let reply = world.set(&mut controller, NumberOfQueues::of(3));
    assert_eq!(reply, done(NumberOfQueues::of(3).into_bits().into()));
}

/// A host that enables again before CSTS.RDY is 0 (Base 3.5.1 wants it to wait) gets a controller that
/// is fatal rather than one whose queues are being closed.
#[test]
fn enabling_too_early_is_fatal() {
    let world = World::new();
    let mut controller = world.ready();
    let association = Arc::clone(controller.association());
    association.add_queue(Qid::new(1), 0, 8).unwrap();
    world.set_cc(&mut controller, Cc::new());
    world.set_cc(&mut controller, Cc::ENABLE);
    assert!(world.csts(&mut controller).cfs() && !association.is_ready());
    association.remove_queue(Qid::new(1));
    controller.note_queues_closed();
    world.set_cc(&mut controller, Cc::new());
    world.set_cc(&mut controller, Cc::ENABLE);
    let csts = world.csts(&mut controller);
    assert!(csts.rdy() && !csts.cfs());
}

/// CC.SHN (Base 3.6.1), normal and abrupt: SHST is 01b until the I/O queues are closed and what was written
/// is safe, then 10b. "To start executing commands on the controller after a shutdown operation, a reset is
/// required" (CSTS.SHST, 3.1.4.6): until then they are Command Sequence Error, and taking SHN back is no
/// reset.
#[test]
fn shutdown_ends_what_runs_and_flushes() {
    let world = World::new();
    for shn in [1, 2] {
        let mut controller = world.ready();
        let association = Arc::clone(controller.association());
        association.add_queue(Qid::new(1), 0, 8).unwrap();
        world.set_cc(&mut controller, Cc::ENABLE.with_shn(shn));
        let close = Action::CloseQueues(Ending::Shutdown);
        assert_eq!(controller.poll_action(), Some(close));
        assert_eq!(controller.poll_action(), None, "not flushed yet");
        assert_eq!(world.csts(&mut controller).shst(), 1);
        assert!(association.add_queue(Qid::new(2), 0, 8).is_err());
        association.remove_queue(Qid::new(1));
        controller.note_queues_closed();
        assert_eq!(controller.poll_action(), Some(Action::Flush));
        assert_eq!(world.csts(&mut controller).shst(), 1);
        controller.note_flushed();
        let refused = |controller: &mut Controller| {
            let reply = world.identify(controller, Cns::Controller, 0);
            assert_eq!(reply, failed(StatusCode::CommandSequenceError));
            let csts = world.csts(controller);
            assert_eq!((csts.shst(), csts.rdy()), (2, true));
        };
        refused(&mut controller);
        world.set_cc(&mut controller, Cc::ENABLE);
        refused(&mut controller);
        world.set_cc(&mut controller, Cc::new());
        let csts = world.csts(&mut controller);
        assert_eq!((csts.shst(), csts.rdy()), (0, false));
        world.set_cc(&mut controller, Cc::ENABLE);
        data(world.identify(&mut controller, Cns::Controller, 0));
    }
}

/// A reset in the middle of a shutdown takes its place.
#[test]
fn reset_during_a_shutdown() {
    let world = World::new();
    let mut controller = world.ready();
    let association = Arc::clone(controller.association());
    association.add_queue(Qid::new(1), 0, 8).unwrap();
    world.set_cc(&mut controller, Cc::ENABLE.with_shn(1));
    world.set_cc(&mut controller, Cc::new());
    association.remove_queue(Qid::new(1));
    controller.note_queues_closed();
    controller.note_flushed();
    let csts = world.csts(&mut controller);
    assert_eq!((csts.shst(), csts.rdy()), (0, false));
}

/// SHN 11b is reserved.
#[test]
fn reserved_shutdown_is_refused() {
    let world = World::new();
    let mut controller = world.ready();
    let set = PropertySet {
        offset: Property::Cc.offset(),
        width: Width::Four,
        value: Cc::ENABLE.with_shn(3).into_bits().into(),
    };
    let answer = controller.property_set(&set, &world.environment());
    assert_eq!(answer, Err(StatusCode::InvalidField.dnr()));
    assert_eq!(world.csts(&mut controller).shst(), 0);
}
