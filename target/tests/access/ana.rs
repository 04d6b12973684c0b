//! ANA states: I/O in each, the log page, the change event.

use std::time::{Duration, Instant};

use flexblk_nvme::command::admin::{Cns, GetLogPage, Identify};
use flexblk_nvme::command::nvm::Read;
use flexblk_nvme::features::AsyncEventConfig;
use flexblk_nvme::log::ana::AnaState;
use flexblk_nvme::log::{LogPageId, ana};
use flexblk_nvme::{Nqn, Nsid, StatusCode, identify};
use flexblk_target::config::AllowedHosts;

use crate::member::{BLOCK, Member, OK};
use crate::world::{World, code, nqn, read};

/// Base 8.1.1: I/O in each state, the log, the change event; another group does not notice.
#[test]
fn ana_states() {
    let world = World::with(
        &["ram:1M,block_size=4096", "ram:1M,block_size=4096"],
        |config| {
            config.cores = vec![0, 0];
            for subsystem in &mut config.subsystems {
                subsystem.namespaces[1].anagrpid = 7;
            }
        },
    );
    let mut a = Member::new(&world, 1);
    let bytes = a
        .host
        .identify(a.admin, &Identify::new(Cns::Controller, Nsid::NONE));
    let id = identify::Controller::view(&bytes).unwrap();
    assert_eq!(
        (
            id.cmic & 8,
            id.anacap,
            id.anagrpmax.get(),
            id.nanagrpid.get()
        ),
        (8, 0x5F, 128, 128)
    );
    assert!(id.anatt > 0);
    assert_eq!(a.namespace().anagrpid.get(), 1);
    assert_eq!(
        a.ana_log(),
        (
            0,
            vec![
                (1, AnaState::Optimized, vec![1]),
                (7, AnaState::Optimized, vec![2])
            ]
        )
    );
    assert_eq!(
        a.set(
            AsyncEventConfig::new().with_ana_change(true).into(),
            Nsid::NONE
        ),
        OK
    );
    let mut changes = 0;
    for (state, wanted) in [
        (AnaState::NonOptimized, OK),
        (AnaState::Inaccessible, StatusCode::AnaInaccessible),
        (AnaState::PersistentLoss, StatusCode::AnaPersistentLoss),
        (AnaState::Change, StatusCode::AnaTransition),
        (AnaState::Optimized, OK),
    ] {
        let event = a.listen();
        world
            .target
            .set_ana_state(&nqn(), Some(1), None, state)
            .unwrap();
        assert_eq!(a.host.answer(a.admin, event).result(), 0x000C_0302);
        changes += 1;
        assert_eq!(
            a.ana_log(),
            (
                changes,
                vec![(1, state, vec![1]), (7, AnaState::Optimized, vec![2])]
            )
        );
        // The Admin queue's thread has told us; the I/O queue's goes by it within a turn.
        let deadline = Instant::now() + Duration::from_secs(5);
        while a.reads() != wanted {
            assert!(Instant::now() < deadline, "{state:?}");
        }
        assert_eq!(a.writes(), wanted, "{state:?}");
        let sgl = a.host.keyed(0, BLOCK);
        let other = Read {
            nsid: Nsid::new(2),
            ..read(0, 1)
        };
        assert_eq!(code(&a.host.command(a.io, |cid| other.emit(cid, &sgl))), OK);
    }
    // Of one port only: ours, then another.
    world
        .target
        .set_ana_state(&nqn(), Some(1), Some(2), AnaState::Inaccessible)
        .unwrap();
    assert_eq!(a.reads(), OK);
    world
        .target
        .set_ana_state(&nqn(), Some(1), Some(1), AnaState::Inaccessible)
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while a.reads() != StatusCode::AnaInaccessible {
        assert!(Instant::now() < deadline);
    }
    assert!(
        world
            .target
            .set_ana_state(&nqn(), Some(129), None, AnaState::Change)
            .is_err()
    );
    // Groups only: the namespaces are left out.
    let mut get = GetLogPage::new(LogPageId::Ana, 0, 4096);
    get.lsp = ana::RETURN_GROUPS_ONLY;
    let page = a.host.log(a.admin, &get);
    let (_, mut groups) = ana::parse(&page).unwrap();
    assert!(groups.all(|group| group.unwrap().namespaces.is_empty()));
}

/// "Information related to an ANA Group that contains namespaces attached to this controller has changed"
/// (Asymmetric Namespace Access Change, Base 5.1.2): who sees no namespace of the group is not told, nor is
/// anybody of a port that has a state of its own.
#[test]
fn ana_changes_are_told_to_who_sees_them() {
    let world = World::with(
        &["ram:1M,block_size=4096", "ram:1M,block_size=4096"],
        |config| {
            config.cores = vec![0, 0];
            for subsystem in &mut config.subsystems {
                subsystem.namespaces[0].anagrpid = 7;
                let only = Nqn::opaque("nqn.2026-11.test:host1").unwrap();
                subsystem.namespaces[0].hosts = AllowedHosts::Only(vec![only]);
            }
        },
    );
    let (mut a, mut b) = (Member::new(&world, 1), Member::new(&world, 2));
    let config = AsyncEventConfig::new().with_ana_change(true);
    for member in [&mut a, &mut b] {
        assert_eq!(member.set(config.into(), Nsid::NONE), OK);
    }
    let (event_a, event_b) = (a.listen(), b.listen());
    let set = |group, port, state| {
        let target = &world.target;
        target.set_ana_state(&nqn(), Some(group), port, state)
    };
    set(7, None, AnaState::NonOptimized).unwrap();
    assert_eq!(a.host.answer(a.admin, event_a).result(), 0x000C_0302);
    assert_eq!(a.ana_log().1[1].1, AnaState::NonOptimized);
    let event_a = a.listen();
    // Of another port: nobody's here.
    set(7, Some(2), AnaState::Inaccessible).unwrap();
    set(1, Some(2), AnaState::Inaccessible).unwrap();
    let soon = Duration::from_millis(100);
    assert_eq!(b.host.try_answer(b.admin, event_b, soon), None);
    assert_eq!(a.host.try_answer(a.admin, event_a, soon), None);
    set(1, Some(1), AnaState::Inaccessible).unwrap();
    assert_eq!(b.host.answer(b.admin, event_b).result(), 0x000C_0302);
    assert_eq!(a.host.answer(a.admin, event_a).result(), 0x000C_0302);
    assert_eq!((a.ana_log().1.len(), b.ana_log().1.len()), (2, 1));
}
