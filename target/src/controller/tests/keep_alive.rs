//! Keep Alive.

use super::*;

/// Base 3.9: no command within the Keep Alive Timeout ends the controller; traffic of any queue
/// keeps it (TBKAS).
#[test]
fn a_silent_host_is_gone() {
    let mut world = World::new();
    let mut controller = world.controller(Some(0), 1000);
    world.set_cc(&mut controller, Cc::ENABLE);
    let first = controller.next_timeout().unwrap();
    assert_eq!(first, world.now + Duration::from_secs(1));
    world.csts(&mut controller);
    controller.handle_timeout(first);
    assert_eq!(
        controller.poll_action(),
        None,
        "there was traffic in the first interval"
    );
    let second = controller.next_timeout().unwrap();
    world.now = second - Duration::from_millis(1);
    assert_eq!(
        world.send(&mut controller, KeepAlive.emit(Cid::new(1), &Sgl::NONE)),
        done(0)
    );
    controller.handle_timeout(second);
    assert_eq!(controller.poll_action(), None);
    let third = controller.next_timeout().unwrap();
    controller.handle_timeout(third);
    assert_eq!(
        controller.poll_action(),
        Some(Action::Terminate(Reason::KeepAlive))
    );
    assert!(!controller.association().is_ready());
}

/// "KATO": once a transport that requires Keep Alive has it on, 0h is Keep Alive Timeout Invalid, any
/// other value is rounded up and counts at once (Base 5.1.25.1.8). With 0h in Connect it is off until the
/// host turns it on.
#[test]
fn the_timeout_can_be_changed_and_not_be_taken_away() {
    let world = World::new();
    let kato = |ms| flexblk_nvme::features::KeepAlive::new().with_timeout_ms(ms);
    let mut controller = world.ready();
    assert_eq!(controller.next_timeout(), None);
    assert_eq!(world.set(&mut controller, kato(0)), done(0));
    assert_eq!(world.set(&mut controller, kato(450)), done(0));
    let due = world.now + Duration::from_millis(500);
    assert_eq!(controller.next_timeout(), Some(due));
    let off = world.set(&mut controller, kato(0));
    assert_eq!(off, failed(StatusCode::KeepAliveTimeoutInvalid));
    assert_eq!(controller.next_timeout(), Some(due));
    let reply = world.feature(&mut controller, FeatureId::KeepAlive);
    assert_eq!(reply, done(500));
}

/// The timer is active only while CC.EN and CSTS.RDY are 1, CC.SHN and CSTS.SHST 0 (Base 3.9.1); after
/// that "the association shall be preserved for at least 2 minutes" (3.5.2), in which a reset controller
/// can be enabled again.
#[test]
fn a_controller_that_is_not_enabled_is_kept_for_two_minutes() {
    let world = World::new();
    let minutes = world.now + IDLE;
    let end = |mut controller: Controller| {
        assert_eq!(controller.next_timeout(), Some(minutes));
        controller.handle_timeout(minutes);
        // The commands of before were in this interval.
        let second = controller.next_timeout().unwrap();
        assert_eq!(second, minutes + IDLE);
        controller.handle_timeout(second);
        std::iter::from_fn(|| controller.poll_action()).last()
    };
    let idle = Some(Action::Terminate(Reason::Idle));
    let mut fresh = world.controller(Some(0), 1000);
    world.csts(&mut fresh);
    assert_eq!(end(fresh), idle);
    for cc in [Cc::new(), Cc::ENABLE.with_shn(1)] {
        let mut controller = world.controller(Some(0), 1000);
        world.set_cc(&mut controller, Cc::ENABLE);
        let active = world.now + Duration::from_secs(1);
        assert_eq!(controller.next_timeout(), Some(active));
        world.set_cc(&mut controller, cc);
        assert!(!world.csts(&mut controller).cfs());
        assert_eq!(end(controller), idle);
    }
}
