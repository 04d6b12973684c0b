//! Marks of Write Uncorrectable that are kept: what they survive, and what ends them.

use std::time::{Duration, Instant};

use flexblk_nvme::command::nvm::WriteUncorrectable;
use flexblk_nvme::{Lba, Sgl, StatusCode};

use crate::kept::Kept;
use crate::member::{Member, NSID, OK};
use crate::world::{code, nqn};

const UNREADABLE: StatusCode = StatusCode::UnrecoveredReadError;

fn mark(member: &mut Member, slba: u64, blocks: u32) -> StatusCode {
    let bad = WriteUncorrectable {
        nsid: NSID,
        slba: Lba::new(slba),
        blocks,
        ..Default::default()
    };
    code(
        &member
            .host
            .command(member.io, |cid| bad.emit(cid, &Sgl::NONE)),
    )
}

/// NVM 3.3.7: until the blocks are written, and a restart writes nothing.
#[test]
fn marks_survive_until_they_are_written() {
    let kept = Kept::new();
    {
        let world = kept.start();
        let mut a = Member::new(&world, 1);
        assert_eq!((mark(&mut a, 0, 8), a.reads()), (OK, UNREADABLE));
        let saved = std::fs::read_to_string(&kept.state).unwrap();
        assert!(saved.contains("uncorrectable"), "{saved}");
    }
    {
        let world = kept.start();
        let mut a = Member::new(&world, 1);
        assert_eq!(a.reads(), UNREADABLE);
        // Its device is closed with it, and opened again with another namespace.
        world.target.remove_namespace(&nqn(), NSID).unwrap();
        let again = flexblk_target::config::Namespace::new(&kept.bdev);
        let deadline = Instant::now() + Duration::from_secs(10);
        while let Err(error) = world.target.add_namespace(&nqn(), &again) {
            // It is closed when the host's transport has acknowledged what was read from it.
            assert!(Instant::now() < deadline, "{error}");
            a.host.turn();
        }
        let mut b = Member::new(&world, 2);
        assert_eq!(b.reads(), UNREADABLE);
        assert_eq!((b.writes(), b.reads()), (OK, OK));
    }
    {
        let world = kept.start();
        let mut a = Member::new(&world, 1);
        assert_eq!(a.reads(), OK);
        assert_eq!(mark(&mut a, 7, 1), OK);
        let saved = std::fs::read_to_string(&kept.state).unwrap();
        let compact: String = saved.split_whitespace().collect();
        assert!(compact.contains("\"ranges\":[[1,7]]"), "{saved}");
    }
}

/// A mark that cannot be kept is refused, and a write that cannot end one is told so; both may be tried
/// again.
#[test]
fn what_cannot_be_saved_is_refused() {
    let kept = Kept::new();
    let world = kept.start();
    let mut a = Member::new(&world, 1);
    let in_the_way = kept.state.with_extension("json.new");
    std::fs::create_dir(&in_the_way).unwrap();
    let refused = StatusCode::InternalError;
    assert_eq!((mark(&mut a, 0, 1), a.reads()), (refused, OK));
    std::fs::remove_dir(&in_the_way).unwrap();
    assert_eq!((mark(&mut a, 0, 1), a.reads()), (OK, UNREADABLE));
    std::fs::create_dir(&in_the_way).unwrap();
    assert_eq!((a.writes(), a.reads()), (refused, UNREADABLE));
    std::fs::remove_dir(&in_the_way).unwrap();
    assert_eq!((a.writes(), a.reads()), (OK, OK));
}
