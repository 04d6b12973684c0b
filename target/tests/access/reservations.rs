//! Reservations: who is kept out, who is told, what persists.

use std::time::{Duration, Instant};

use flexblk_nvme::command::admin::{GetLogPage, Select, SetFeatures};
use flexblk_nvme::command::nvm::{Copy, CopyRange, Flush, IoControl, Tags};
use flexblk_nvme::command::reservation::{
    ReservationAcquire, ReservationKeys, ReservationReport, ReservationType, acquire_action,
    persist_change, release_action,
};
use flexblk_nvme::features::{
    AsyncEventConfig, FeatureId, ReservationMask, ReservationPersistence,
};
use flexblk_nvme::log::{LogPageId, ReservationNotification};
use flexblk_nvme::{Cid, Lba, Nsid, Sgl, StatusCode, U64};
use flexblk_target::config::{Config, Namespace};

use crate::kept::Kept;
use crate::member::{BLOCK, CONFLICT, Member, NSID, OK, ram};
use crate::world::{World, code, nqn, read, write};

/// Base 8.1.22, Command Behavior in the Presence of a Reservation, for all six types, on one and on
/// several threads: from the moment the host has its answer, every queue goes by it.
#[test]
fn reservations_keep_others_out() {
    use ReservationType::*;
    for threads in [1, 3] {
        let world = ram(threads);
        let (mut a, mut b, mut c) = (
            Member::new(&world, 1),
            Member::new(&world, 2),
            Member::new(&world, 3),
        );
        assert_eq!(
            a.namespace().rescap,
            0xFE,
            "no file for it: nothing persists"
        );
        assert_eq!(
            (
                a.register(persist_change::NONE),
                b.register(persist_change::NONE)
            ),
            (OK, OK)
        );
        for (rtype, registrant, other) in [
            (WriteExclusive, (true, false), (true, false)),
            (ExclusiveAccess, (false, false), (false, false)),
            (WriteExclusiveRegistrantsOnly, (true, true), (true, false)),
            (ExclusiveAccessRegistrantsOnly, (true, true), (false, false)),
            (WriteExclusiveAllRegistrants, (true, true), (true, false)),
            (ExclusiveAccessAllRegistrants, (true, true), (false, false)),
        ] {
            assert_eq!(c.may(), (true, true));
            assert_eq!(c.acquire(acquire_action::ACQUIRE, rtype, 0), CONFLICT);
            assert_eq!(a.acquire(acquire_action::ACQUIRE, rtype, 0), OK);
            assert_eq!(
                (a.may(), b.may(), c.may()),
                ((true, true), registrant, other),
                "{rtype:?}"
            );
            assert_eq!(a.release(release_action::RELEASE, rtype), OK);
        }
        // Every command of the write group, and Copy's source.
        assert_eq!(a.acquire(acquire_action::ACQUIRE, ExclusiveAccess, 0), OK);
        let flush = c
            .host
            .command(c.io, |cid| Flush { nsid: NSID }.emit(cid, &Sgl::NONE));
        assert_eq!(code(&flush), CONFLICT);
        let (head, entries) = c.report();
        assert_eq!(
            (
                head.rtype,
                entries.len(),
                entries[0].status,
                entries[1].status
            ),
            (2, 2, 1, 0)
        );
        assert_eq!((entries[0].key.get(), entries[0].hostid), (10, [1; 16]));
        assert_eq!(b.unregister(), OK);
        assert_eq!(b.may(), (false, false));
        assert_eq!(a.unregister(), OK);
        assert_eq!((b.may(), c.report().1.len()), ((true, true), 0));
    }
}

/// The short form of the report is not for hosts with 128-bit identifiers (Base 7.8), and a Copy
/// reads its source.
#[test]
fn reports_and_copies_are_judged() {
    let world = World::new(&["ram:1M,block_size=4096", "ram:1M,block_size=4096"]);
    let (mut a, mut b) = (Member::new(&world, 1), Member::new(&world, 2));
    let report = ReservationReport {
        nsid: NSID,
        dwords: 15,
        extended: false,
    };
    let sgl = a.host.keyed(0, 64);
    let answer = a.host.command(a.io, |cid| report.emit(cid, &sgl));
    assert_eq!(code(&answer), StatusCode::HostIdInconsistentFormat);
    assert_eq!(a.register(persist_change::NONE), OK);
    assert_eq!(
        a.acquire(acquire_action::ACQUIRE, ReservationType::ExclusiveAccess, 0),
        OK
    );
    let mut behavior = flexblk_nvme::features::HostBehavior::zeroed();
    behavior.cdfe = flexblk_nvme::U16::new(4);
    b.host.put(0, behavior.bytes());
    let sgl = b.host.keyed(0, 512);
    let set = SetFeatures {
        fid: FeatureId::HostBehavior,
        ..SetFeatures::new(AsyncEventConfig::new().into())
    };
    assert!(
        b.host
            .command(b.admin, |cid| set.emit(cid, &sgl))
            .status()
            .is_success()
    );
    let mut source = CopyRange::zeroed();
    source.snsid = flexblk_nvme::U32::new(1);
    b.host.put(0, source.bytes());
    let sgl = b.host.keyed(0, 32);
    let copy = Copy {
        nsid: Nsid::new(2),
        sdlba: Lba::new(0),
        ranges: 1,
        format: 2,
        prinfo_read: 0,
        control: IoControl::new(),
        dspec: 0,
        tags: Tags::default(),
    };
    let answer = b.host.command(b.io, |cid| copy.emit(cid, &sgl));
    assert_eq!(code(&answer), CONFLICT, "the source is reserved");
}

/// Base 5.1.12.1.32: who loses something is told by an event and the log page, one page for each
/// notification; a mask suppresses both.
#[test]
fn losers_are_told() {
    use ReservationType::*;
    let world = ram(2);
    let (mut a, mut b) = (Member::new(&world, 1), Member::new(&world, 2));
    assert_eq!(a.notification(), (0, 0, 0, 0));
    assert_eq!((a.register(0), b.register(0)), (OK, OK));
    let event = b.listen();
    assert_eq!(
        a.acquire(acquire_action::ACQUIRE, WriteExclusiveRegistrantsOnly, 0),
        OK
    );
    assert_eq!(
        b.host.try_answer(b.admin, event, Duration::from_millis(50)),
        None
    );
    assert_eq!(
        a.release(release_action::RELEASE, WriteExclusiveRegistrantsOnly),
        OK
    );
    assert_eq!(b.host.answer(b.admin, event).result(), 0x0080_0006);
    assert_eq!(b.notification(), (1, 2, 0, 1), "reservation released");
    // Two that wait: the second is an event of its own when the first has been read.
    let event = b.listen();
    assert_eq!(
        a.acquire(acquire_action::PREEMPT, WriteExclusive, b.key),
        OK
    );
    assert_eq!(b.register(0), OK);
    assert_eq!(a.release(release_action::CLEAR, WriteExclusive), OK);
    assert_eq!(b.host.answer(b.admin, event).result(), 0x0080_0006);
    // Reading it with Retain Asynchronous Event changes nothing. The second may still be on its way
    // from one thread to the other.
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let mut get = GetLogPage::new(LogPageId::Reservation, 0, 64);
        get.retain_event = true;
        let page = b.host.log(b.admin, &get);
        let page = ReservationNotification::view(&page).unwrap();
        assert_eq!((page.count.get(), page.kind), (2, 1));
        if page.available == 1 {
            break;
        }
        assert!(Instant::now() < deadline);
    }
    let event = b.listen();
    assert_eq!(b.notification(), (2, 1, 1, 1), "registration preempted");
    assert_eq!(b.host.answer(b.admin, event).result(), 0x0080_0006);
    assert_eq!(b.notification(), (3, 3, 0, 1), "reservation preempted");
    assert_eq!(b.notification(), (0, 0, 0, 0));
    // Masked.
    let mask = ReservationMask::new().with_registration_preempted(true);
    assert_eq!(b.set(mask.into(), Nsid::BROADCAST), OK);
    assert_eq!(b.get(FeatureId::ReservationMask, NSID, Select::Current), 2);
    assert_eq!((a.register(0), b.register(0)), (OK, OK));
    assert_eq!(
        a.acquire(acquire_action::PREEMPT, WriteExclusive, b.key),
        OK
    );
    assert_eq!(b.notification(), (0, 0, 0, 0));
}

/// Base 8.1.22.6: Preempt and Abort is complete when no command of the preempted host is left; what
/// could be aborted says so.
#[test]
fn preempt_and_abort() {
    use ReservationType::*;
    let world = World::with(&[], |config| {
        let text = format!(
            "[[bdev]]\ntype = \"ram\"\nname = \"base\"\nsize = \"4M\"\nblock_size = 4096\n[[bdev]]\ntype = \"delay\"\nname = \"slow\"\nbase_bdev_name = \"base\"\navg_read_latency = 300000\navg_write_latency = 300000\n[[subsystem]]\nnqn = \"{}\"\n[[subsystem.namespace]]\nbdev = \"slow\"\n",
            nqn().as_str()
        );
        let parsed = Config::from_toml(&text, std::path::Path::new("test")).unwrap();
        config.bdevs = parsed.bdevs;
        config.subsystems = parsed.subsystems;
        config.cores = vec![0, 0];
    });
    let (mut a, mut b) = (Member::new(&world, 1), Member::new(&world, 2));
    assert_eq!((a.register(0), b.register(0)), (OK, OK));
    assert_eq!(
        b.acquire(acquire_action::ACQUIRE, WriteExclusiveRegistrantsOnly, 0),
        OK
    );
    let begin = Instant::now();
    let sgl = b.host.keyed(0, BLOCK);
    let (reading, writing) = (b.host.cid(), b.host.cid());
    b.host.send(b.io, &read(0, 1).emit(reading, &sgl), None);
    b.host.send(b.io, &write(1, 1).emit(writing, &sgl), None);
    let beyond = b.host.command(b.io, |cid| read(1 << 40, 1).emit(cid, &sgl));
    assert_eq!(code(&beyond), StatusCode::LbaOutOfRange);
    // Time for the data of the write to come over.
    b.host
        .try_answer(b.io, Cid::new(0xFFFF), Duration::from_millis(50));
    let acquire = ReservationAcquire {
        nsid: NSID,
        action: acquire_action::PREEMPT_AND_ABORT,
        ignore_key: false,
        rtype: WriteExclusive.raw(),
    };
    let mut keys = ReservationKeys::zeroed();
    (keys.current, keys.second) = (U64::new(a.key), U64::new(b.key));
    a.host.put(3 << 20, keys.bytes());
    let sgl = a.host.keyed(3 << 20, 16);
    let preempting = a.host.cid();
    a.host.send(a.io, &acquire.emit(preempting, &sgl), None);
    let answer = loop {
        a.host.turn();
        if let Some(answer) = b.host.try_answer(b.io, reading, Duration::ZERO) {
            break answer;
        }
        b.host.turn();
    };
    assert_eq!(code(&answer), StatusCode::AbortedPreemptAndAbort);
    let early = begin.elapsed() < Duration::from_millis(290);
    assert!(early, "the read's answer did not wait for the device");
    assert_eq!(code(&a.host.answer(a.io, preempting)), OK);
    let waited = begin.elapsed() >= Duration::from_millis(300);
    assert!(waited, "the write was waited for");
    assert_eq!(code(&b.host.answer(b.io, writing)), OK, "the device had it");
    assert_eq!(b.writes(), CONFLICT);
    assert_eq!(a.report().1.len(), 1);
}

/// A host that disappears keeps what it has reserved, until somebody preempts it; what it reserved
/// is its own again when it comes back.
#[test]
fn hosts_that_disappear_keep_their_reservations() {
    use ReservationType::*;
    let world = ram(2);
    let mut b = Member::new(&world, 2);
    assert_eq!(b.register(0), OK);
    {
        let mut a = Member::new(&world, 1);
        assert_eq!(a.register(0), OK);
        assert_eq!(a.acquire(acquire_action::ACQUIRE, WriteExclusive, 0), OK);
        a.host.hang_up(a.io);
        a.host.hang_up(a.admin);
    }
    assert_eq!(b.may(), (true, false));
    let mut again = Member::new(&world, 1);
    assert_eq!(again.may(), (true, true));
    drop(again);
    assert_eq!(b.acquire(acquire_action::PREEMPT, WriteExclusive, 10), OK);
    assert_eq!(b.may(), (true, true));
    assert_eq!(b.report().1.len(), 1);
}

/// CPTPL (Base 7.6): with 11b registrants and reservation survive a restart, else they do not; a
/// damaged file stops the start.
#[test]
fn reservations_survive_a_restart() {
    use ReservationType::*;
    let kept = Kept::new();
    let start = || kept.start();
    {
        let world = start();
        let (mut a, mut b) = (Member::new(&world, 1), Member::new(&world, 2));
        assert_eq!(a.namespace().rescap, 0xFF);
        assert_eq!(
            (
                a.register(persist_change::SET),
                b.register(persist_change::NONE)
            ),
            (OK, OK)
        );
        assert_eq!(a.acquire(acquire_action::ACQUIRE, WriteExclusive, 0), OK);
        assert_eq!(
            a.get(FeatureId::ReservationPersistence, NSID, Select::Current),
            1
        );
    }
    {
        let world = start();
        let (mut a, mut b) = (Member::new(&world, 1), Member::new(&world, 2));
        let (head, entries) = b.report();
        assert_eq!(
            (
                head.rtype,
                head.persist,
                head.generation.get(),
                entries.len()
            ),
            (1, 1, 2, 2)
        );
        assert_eq!((a.may(), b.may()), ((true, true), (true, false)));
        // Taken back by the feature.
        assert_eq!(a.set(ReservationPersistence::new().into(), NSID), OK);
    }
    {
        let world = start();
        let mut b = Member::new(&world, 2);
        assert_eq!((b.report().1.len(), b.may()), (0, (true, true)));
    }
    std::fs::write(&kept.state, "{}").unwrap();
    let config = Config {
        ptpl_file: Some(kept.state.clone()),
        ..Config::default()
    };
    let error = flexblk_target::Target::start(config)
        .unwrap_err()
        .to_string();
    assert!(error.contains("ptpl.json"), "{error}");
}

/// What is kept is what hosts have made of it last, not what was there when the target started.
#[test]
fn a_namespace_that_is_added_again_has_what_is_kept_by_then() {
    use ReservationType::*;
    let kept = Kept::new();
    {
        let world = kept.start();
        let mut a = Member::new(&world, 1);
        assert_eq!(a.register(persist_change::SET), OK);
        assert_eq!(a.acquire(acquire_action::ACQUIRE, WriteExclusive, 0), OK);
    }
    let world = kept.start();
    {
        let mut b = Member::new(&world, 2);
        assert_eq!(
            (b.register(persist_change::NONE), b.may()),
            (OK, (true, false))
        );
        assert_eq!(b.acquire(acquire_action::PREEMPT, WriteExclusive, 10), OK);
        assert_eq!(b.may(), (true, true));
        b.host.hang_up(b.io);
        b.host.hang_up(b.admin);
    }
    world.target.remove_namespace(&nqn(), NSID).unwrap();
    let again = Namespace::new(&kept.bdev);
    assert_eq!(world.target.add_namespace(&nqn(), &again).unwrap(), NSID);
    let (mut a, mut b) = (Member::new(&world, 1), Member::new(&world, 2));
    assert_eq!((a.may(), b.may()), ((true, false), (true, true)));
    assert_eq!(b.report().1.len(), 1);
}

/// Fused commands are kept out as their halves are alone.
#[test]
fn fused_commands_are_kept_out_too() {
    let world = ram(1);
    let (mut a, mut b) = (Member::new(&world, 1), Member::new(&world, 2));
    let zeroes = vec![0; BLOCK as usize];
    for member in [&mut a, &mut b] {
        member.host.put(0, &zeroes);
        member.host.put(BLOCK, &zeroes);
    }
    assert_eq!(b.compares_and_writes(), [OK, OK]);
    assert_eq!(a.register(persist_change::NONE), OK);
    let exclusive = ReservationType::ExclusiveAccess;
    assert_eq!(a.acquire(acquire_action::ACQUIRE, exclusive, 0), OK);
    assert_eq!(a.compares_and_writes(), [OK, OK]);
    let [compare, write] = b.compares_and_writes();
    assert_eq!(compare, CONFLICT);
    assert_ne!(write, OK);
}
