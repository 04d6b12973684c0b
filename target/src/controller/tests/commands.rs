//! What holds for every Admin command, and Abort.

use super::*;

/// Abort of an I/O command goes to the queue's thread, at most ACL + 1 at a time.
#[test]
fn aborts_are_bounded() {
    let world = World::new();
    let mut controller = world.ready();
    let abort = Abort {
        sqid: Qid::new(1),
        cid: Cid::new(7),
    }
    .emit(Cid::new(50), &Sgl::NONE);
    assert_eq!(world.send(&mut controller, abort), done(1), "no such queue");
    controller
        .association()
        .add_queue(Qid::new(1), 0, 8)
        .unwrap();
    for _ in 0..MAX_ABORTS {
        assert_eq!(
            world.send(&mut controller, abort),
            Reply::Abort(Qid::new(1), Cid::new(7))
        );
    }
    assert_eq!(
        world.send(&mut controller, abort),
        failed(StatusCode::AbortLimitExceeded)
    );
    controller.abort_done();
    assert_eq!(
        world.send(&mut controller, abort),
        Reply::Abort(Qid::new(1), Cid::new(7))
    );
}

/// Fused commands and PRPs do not exist over Fabrics here (Base 4.1.1).
#[test]
fn flags_are_checked() {
    let world = World::new();
    let mut controller = world.ready();
    let mut bytes = Identify::new(Cns::Controller, Nsid::NONE).emit(Cid::new(1), &ANYWHERE);
    bytes[1] = 0;
    assert_eq!(
        world.send(&mut controller, bytes),
        failed(StatusCode::InvalidField)
    );
}
