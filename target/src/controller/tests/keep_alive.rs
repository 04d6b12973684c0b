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
