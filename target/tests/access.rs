//! What keeps a host from a namespace, on the wire: reservations, ANA states, masking, write
//! protection.

mod host;
mod world;

use std::time::{Duration, Instant};

use flexblk_nvme::command::admin::{
    AsyncEventRequest, Cns, GetFeatures, GetLogPage, Identify, Select, SetFeatures,
};
use flexblk_nvme::command::nvm::{Copy, CopyRange, Flush, IoControl, Read, Tags, Write};
use flexblk_nvme::command::reservation::{
    RegisteredController, ReservationAcquire, ReservationKeys, ReservationRegister,
    ReservationRelease, ReservationReport, ReservationStatus, ReservationType, acquire_action,
    persist_change, register_action, release_action,
};
use flexblk_nvme::features::{
    AsyncEventConfig, Capabilities, FeatureId, FeatureValue, ReservationMask,
    ReservationPersistence, WriteProtect,
};
use flexblk_nvme::identify::{self, NamespaceList};
use flexblk_nvme::log::ana::{self, AnaState};
use flexblk_nvme::log::discovery::Page;
use flexblk_nvme::log::{LogPageId, ReservationNotification};
use flexblk_nvme::{Cid, HostId, Lba, Nqn, Nsid, Sgl, StatusCode, U64};
use flexblk_target::config::{AllowedHosts, Config, Discovery, Namespace, Referral, Transport};
use host::{Answer, Host, Queue};
use world::{World, code, nqn, open, read, write};

const BLOCK: u32 = 4096;
const NSID: Nsid = Nsid::new(1);

/// A host of that number with a controller and an I/O queue.
struct Member {
    host: Host,
    admin: Queue,
    io: Queue,
    key: u64,
}

impl Member {
    fn new(world: &World, number: u8) -> Self {
        let mut host = world.host();
        host.hostid = HostId::from_bytes([number; 16]);
        host.nqn = Nqn::opaque(&format!("nqn.2026-11.test:host{number}")).unwrap();
        let (admin, _, io) = open(&mut host);
        Self {
            host,
            admin,
            io,
            key: u64::from(number) * 10,
        }
    }

    fn with_keys(
        &mut self,
        keys: (u64, u64),
        emit: impl FnOnce(Cid, &Sgl) -> [u8; 64],
    ) -> StatusCode {
        let mut data = ReservationKeys::zeroed();
        (data.current, data.second) = (U64::new(keys.0), U64::new(keys.1));
        self.host.put(3 << 20, data.bytes());
        let sgl = self.host.keyed(3 << 20, 16);
        code(&self.host.command(self.io, |cid| emit(cid, &sgl)))
    }

    fn register(&mut self, persist: u8) -> StatusCode {
        let register = ReservationRegister {
            nsid: NSID,
            persist,
            ..Default::default()
        };
        self.with_keys((0, self.key), |cid, sgl| register.emit(cid, sgl))
    }

    fn unregister(&mut self) -> StatusCode {
        let register = ReservationRegister {
            nsid: NSID,
            action: register_action::UNREGISTER,
            ..Default::default()
        };
        self.with_keys((self.key, 0), |cid, sgl| register.emit(cid, sgl))
    }

    fn acquire(&mut self, action: u8, rtype: ReservationType, preempt: u64) -> StatusCode {
        let acquire = ReservationAcquire {
            nsid: NSID,
            action,
            ignore_key: false,
            rtype: rtype.raw(),
        };
        self.with_keys((self.key, preempt), |cid, sgl| acquire.emit(cid, sgl))
    }

    fn release(&mut self, action: u8, rtype: ReservationType) -> StatusCode {
        let release = ReservationRelease {
            nsid: NSID,
            action,
            ignore_key: false,
            rtype: rtype.raw(),
        };
        self.with_keys((self.key, 0), |cid, sgl| release.emit(cid, sgl))
    }

    fn report(&mut self) -> (ReservationStatus, Vec<RegisteredController>) {
        let report = ReservationReport {
            nsid: NSID,
            dwords: 4096 / 4 - 1,
            extended: true,
        };
        let sgl = self.host.keyed(0, 4096);
        let answer = self.host.command(self.io, |cid| report.emit(cid, &sgl));
        assert!(answer.status().is_success(), "{answer:?}");
        ReservationStatus::parse(&self.host.get(0, 4096)).unwrap()
    }

    fn reads(&mut self) -> StatusCode {
        let sgl = self.host.keyed(0, BLOCK);
        code(&self.host.command(self.io, |cid| read(0, 1).emit(cid, &sgl)))
    }

    fn writes(&mut self) -> StatusCode {
        let sgl = self.host.keyed(0, BLOCK);
        code(
            &self
                .host
                .command(self.io, |cid| write(0, 1).emit(cid, &sgl)),
        )
    }

    fn may(&mut self) -> (bool, bool) {
        let fine = |code| match code {
            StatusCode::Success => true,
            StatusCode::ReservationConflict => false,
            other => panic!("{other:?}"),
        };
        (fine(self.reads()), fine(self.writes()))
    }

    fn listen(&mut self) -> Cid {
        let cid = self.host.cid();
        self.host
            .send(self.admin, &AsyncEventRequest.emit(cid, &Sgl::NONE), None);
        cid
    }

    fn set(&mut self, value: FeatureValue, nsid: Nsid) -> StatusCode {
        let set = SetFeatures {
            nsid,
            ..SetFeatures::new(value)
        };
        code(
            &self
                .host
                .command(self.admin, |cid| set.emit(cid, &Sgl::NONE)),
        )
    }

    fn get(&mut self, fid: FeatureId, nsid: Nsid, select: Select) -> u32 {
        let get = GetFeatures {
            nsid,
            select,
            ..GetFeatures::new(fid)
        };
        let answer = self
            .host
            .command(self.admin, |cid| get.emit(cid, &Sgl::NONE));
        assert!(answer.status().is_success(), "{answer:?}");
        answer.result() as u32
    }

    fn notification(&mut self) -> (u64, u8, u8, u32) {
        let get = GetLogPage::new(LogPageId::Reservation, 0, 64);
        let page = self.host.log(self.admin, &get);
        let page = ReservationNotification::view(&page).unwrap();
        (page.count.get(), page.kind, page.available, page.nsid.get())
    }

    fn namespace(&mut self) -> identify::Namespace {
        let bytes = self
            .host
            .identify(self.admin, &Identify::new(Cns::Namespace, NSID));
        *identify::Namespace::view(&bytes).unwrap()
    }

    fn active(&mut self) -> Vec<u32> {
        let identify = Identify::new(Cns::ActiveNamespaces, Nsid::NONE);
        let page = self.host.identify(self.admin, &identify);
        NamespaceList::view(&page)
            .unwrap()
            .iter()
            .map(Nsid::get)
            .collect()
    }

    fn ana_log(&mut self) -> (u64, Vec<(u32, AnaState, Vec<u32>)>) {
        let page = self
            .host
            .log(self.admin, &GetLogPage::new(LogPageId::Ana, 0, 4096));
        let (count, groups) = ana::parse(&page).unwrap();
        let groups = groups.map(|group| {
            let group = group.unwrap();
            (
                group.id,
                group.state,
                group.nsids().map(Nsid::get).collect(),
            )
        });
        (count, groups.collect())
    }
}

const OK: StatusCode = StatusCode::Success;
const CONFLICT: StatusCode = StatusCode::ReservationConflict;

fn ram(threads: usize) -> World {
    World::with(&["ram:1M,block_size=4096"], |config| {
        config.cores = vec![0; threads]
    })
}

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

/// An image and a state file, which a target finds again when it is started again.
struct Kept {
    _directory: tempfile::TempDir,
    bdev: String,
    state: std::path::PathBuf,
}

impl Kept {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.img");
        std::fs::write(&image, vec![0; 4 << 20]).unwrap();
        Self {
            bdev: format!("file:{},block_size=4096", image.display()),
            state: directory.path().join("ptpl.json"),
            _directory: directory,
        }
    }

    fn start(&self) -> World {
        World::with(&[&self.bdev], |config| {
            config.ptpl_file = Some(self.state.clone());
        })
    }
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

/// A namespace that a host does not see is not there for it: not in lists, not for I/O, not in the
/// ANA log; who sees a difference is told, and nobody else.
#[test]
fn namespaces_are_masked_by_host() {
    let world = World::with(
        &["ram:1M,block_size=4096", "ram:1M,block_size=4096"],
        |config| {
            config.cores = vec![0, 0];
        },
    );
    let (mut a, mut b) = (Member::new(&world, 1), Member::new(&world, 2));
    for member in [&mut a, &mut b] {
        let config = AsyncEventConfig::new().with_namespace_attribute(true);
        assert_eq!(member.set(config.into(), Nsid::NONE), OK);
    }
    let (event_a, event_b) = (a.listen(), b.listen());
    let only = AllowedHosts::Only(vec![a.host.nqn.clone()]);
    world
        .target
        .set_namespace_hosts(&nqn(), NSID, only)
        .unwrap();
    assert_eq!(b.host.answer(b.admin, event_b).result(), 0x0004_0002);
    assert_eq!(
        a.host
            .try_answer(a.admin, event_a, Duration::from_millis(100)),
        None
    );
    assert_eq!((a.active(), b.active()), (vec![1, 2], vec![2]));
    assert_eq!(
        (a.reads(), b.reads()),
        (OK, StatusCode::InvalidNamespaceOrFormat)
    );
    assert_eq!(b.namespace(), identify::Namespace::zeroed());
    assert_eq!((a.ana_log().1[0].2.len(), b.ana_log().1[0].2.len()), (2, 1));
    let wrong = WriteProtect::new().with_state(1);
    assert_eq!(
        b.set(wrong.into(), NSID),
        StatusCode::InvalidNamespaceOrFormat
    );
    let nobody = AllowedHosts::Only(Vec::new());
    world
        .target
        .set_namespace_hosts(&nqn(), NSID, nobody)
        .unwrap();
    assert_eq!(a.host.answer(a.admin, event_a).result(), 0x0004_0002);
    assert_eq!(a.active(), [2]);
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

/// Base 8.1.15: the states of write protection, the ways between them, what survives a restart, and
/// the event for the other hosts.
#[test]
fn write_protection() {
    let kept = Kept::new();
    let start = || kept.start();
    let protect = |state| FeatureValue::from(WriteProtect::new().with_state(state));
    let expect = |member: &mut Member, state: u8| {
        assert_eq!(
            member.get(FeatureId::WriteProtect, NSID, Select::Current),
            u32::from(state)
        );
        let wanted = if state == 0 {
            OK
        } else {
            StatusCode::NamespaceWriteProtected
        };
        assert_eq!((member.reads(), member.writes()), (OK, wanted));
        assert_eq!(member.namespace().nsattr, u8::from(state != 0));
    };
    {
        let world = start();
        let (mut a, mut b) = (Member::new(&world, 1), Member::new(&world, 2));
        let bytes = a
            .host
            .identify(a.admin, &Identify::new(Cns::Controller, Nsid::NONE));
        assert_eq!(identify::Controller::view(&bytes).unwrap().nwpc, 0b111);
        let capabilities = a.get(FeatureId::WriteProtect, NSID, Select::Capabilities);
        let capabilities = Capabilities::from_bits(capabilities);
        assert!(
            capabilities.changeable()
                && capabilities.namespace_specific()
                && !capabilities.saveable()
        );
        assert_eq!(
            b.set(
                AsyncEventConfig::new()
                    .with_namespace_attribute(true)
                    .into(),
                Nsid::NONE
            ),
            OK
        );
        let event = b.listen();
        expect(&mut a, 0);
        assert_eq!(a.set(protect(WriteProtect::PROTECT), NSID), OK);
        assert_eq!(b.host.answer(b.admin, event).result(), 0x0004_0002);
        expect(&mut b, 1);
        assert_eq!(a.set(protect(WriteProtect::NONE), NSID), OK);
        expect(&mut b, 0);
        assert_eq!(a.set(protect(7), NSID), StatusCode::InvalidField);
        assert_eq!(
            a.set(protect(1), Nsid::new(9)),
            StatusCode::InvalidNamespaceOrFormat
        );
        assert_eq!(a.set(protect(WriteProtect::UNTIL_POWER_CYCLE), NSID), OK);
        expect(&mut b, 2);
        assert_eq!(
            a.set(protect(WriteProtect::NONE), NSID),
            StatusCode::FeatureNotChangeable
        );
    }
    for state in [WriteProtect::PROTECT, WriteProtect::PERMANENT] {
        let world = start();
        let mut a = Member::new(&world, 1);
        let before = if state == WriteProtect::PERMANENT {
            1
        } else {
            0
        };
        expect(&mut a, before);
        assert_eq!(a.set(protect(state), NSID), OK);
        expect(&mut a, state);
    }
    let world = start();
    let mut a = Member::new(&world, 1);
    expect(&mut a, 3);
    assert_eq!(
        a.set(protect(WriteProtect::NONE), NSID),
        StatusCode::FeatureNotChangeable
    );
}

/// One device under two subsystems: both see one another's data.
#[test]
fn one_device_in_two_subsystems() {
    let other = Nqn::new("nqn.2026-11.test:second").unwrap();
    let world = World::with(&[], |config| {
        let text = format!(
            "[[bdev]]\ntype = \"ram\"\nname = \"base\"\nsize = \"1M\"\nblock_size = 4096\n[[subsystem]]\nnqn = \"{}\"\n[[subsystem.namespace]]\nbdev = \"base\"\n[[subsystem]]\nnqn = \"{}\"\n[[subsystem.namespace]]\nbdev = \"base\"\nnsid = 5\n",
            nqn().as_str(),
            other.as_str()
        );
        let parsed = Config::from_toml(&text, std::path::Path::new("test")).unwrap();
        config.bdevs = parsed.bdevs;
        config.subsystems = parsed.subsystems;
    });
    let mut a = Member::new(&world, 1);
    a.host.put(0, &[7; BLOCK as usize]);
    assert_eq!(a.writes(), OK);
    let mut host = world.host();
    let (_, cntlid) = host.controller(&other);
    let io = host.io_queue(1, 32, cntlid, &other);
    let sgl = host.keyed(0, BLOCK);
    let answer: Answer = host.command(io, |cid| {
        Read {
            nsid: Nsid::new(5),
            ..read(0, 1)
        }
        .emit(cid, &sgl)
    });
    assert!(answer.status().is_success());
    assert!(host.get(0, BLOCK).iter().all(|byte| *byte == 7));
    let second = Write {
        nsid: Nsid::new(5),
        ..write(0, 1)
    };
    assert!(
        host.command(io, |cid| second.emit(cid, &sgl))
            .status()
            .is_success()
    );
    world
        .target
        .add_namespace(&nqn(), &Namespace::new("base"))
        .unwrap();
}

/// The discovery service by both of its names; a change of its referrals is an event.
#[test]
fn discovery_by_both_names() {
    let own = Nqn::new("nqn.2026-11.test:discovery").unwrap();
    let world = World::with(&["ram:1M"], |config| {
        config.discovery.nqn = Some(own.clone())
    });
    for name in [own.clone(), Nqn::discovery()] {
        let mut host = world.host();
        let (admin, _) = host.controller(&name);
        let bytes = host.identify(admin, &Identify::new(Cns::Controller, Nsid::NONE));
        assert_eq!(
            identify::Controller::view(&bytes).unwrap().subnqn,
            own.to_field()
        );
        let config = AsyncEventConfig::new().with_discovery_log(true);
        let set = SetFeatures::new(config.into());
        assert!(
            host.command(admin, |cid| set.emit(cid, &Sgl::NONE))
                .status()
                .is_success()
        );
        let event = host.cid();
        host.send(admin, &AsyncEventRequest.emit(event, &Sgl::NONE), None);
        let referral = Referral {
            trtype: Transport::Tcp,
            address: "192.0.2.7:8009".parse().unwrap(),
            nqn: None,
            hosts: AllowedHosts::Any,
        };
        let discovery = Discovery {
            nqn: Some(own.clone()),
            listeners: Vec::new(),
            referrals: vec![referral],
        };
        world.target.set_discovery(discovery).unwrap();
        assert_eq!(host.answer(admin, event).result(), 0x0070_F002);
        let page = host.log(admin, &GetLogPage::new(LogPageId::Discovery, 0, 4096));
        assert_eq!(Page::parse(&page).unwrap().record_count(), 3);
    }
}
