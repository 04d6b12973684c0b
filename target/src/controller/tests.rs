//! The controller as hosts see it; each test names the requirement it holds us to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_blockdev::BdevConfig;
use flexblk_nvme::command::admin::{Abort, AsyncEventRequest};
use flexblk_nvme::command::admin::{
    Cns, Csi, GetFeatures, GetLogPage, Identify, KeepAlive, Select, SetFeatures,
};
use flexblk_nvme::command::fabrics::{PropertyGet, PropertySet};
use flexblk_nvme::features::{AsyncEventConfig, VolatileWriteCache};
use flexblk_nvme::features::{FeatureId, FeatureValue, HostIdFormat, NumberOfQueues};
use flexblk_nvme::identify;
use flexblk_nvme::log::discovery::{Page, SubsystemType};
use flexblk_nvme::log::{ChangedNamespaces, ErrorEntry, LogPageId, Smart};
use flexblk_nvme::property::{Cap, Cc, Csts, Property, Width};
use flexblk_nvme::{Cid, Cntlid, HostId, Lba, Nqn, Nsid, Qid, Sgl, Sqe, Status, StatusCode};

use super::*;
use crate::association::Association;
use crate::budget::Budget;
use crate::config::{AllowedHosts, Discovery, Limits, Referral, Transport};
use crate::counters::IoCounters;
use crate::port::Port;
use crate::recorder::{self, Recorder};
use crate::snapshot::Namespace;

struct World {
    snapshot: Snapshot,
    directory: Directory,
    start: Instant,
    now: Instant,
    recorders: [Recorder; 1],
}

fn nqn(name: &str) -> Nqn {
    Nqn::opaque(name).unwrap()
}

fn namespace(nsid: u32, bdev: &str) -> Namespace {
    let config: BdevConfig = bdev.parse().unwrap();
    let device = flexblk_blockdev::open(&config).unwrap();
    let info = device.info();
    Namespace {
        nsid: Nsid::new(nsid),
        device_id: nsid.into(),
        media: Arc::default(),
        hosts: AllowedHosts::Any,
        anagrpid: 1,
        reservations: Arc::default(),
        protection: Protection::None,
        uuid: info.uuid,
        info,
        device,
    }
}

fn subsystem(
    slot: usize,
    name: &str,
    hosts: AllowedHosts,
    namespaces: Vec<Option<Arc<Namespace>>>,
) -> Subsystem {
    Subsystem {
        slot,
        nqn: nqn(name),
        serial: "S1".into(),
        model: "flexblk test".into(),
        hosts,
        listeners: None,
        ana_groups: Vec::new(),
        ana_changes: 0,
        namespaces,
        counters: [IoCounters::default(), IoCounters::default()].into(),
    }
}

impl World {
    fn new() -> Self {
        let ram = |nsid| Some(Arc::new(namespace(nsid, "ram:1M,block_size=4096")));
        let open = subsystem(
            0,
            "nqn.2026-11.test:a",
            AllowedHosts::Any,
            vec![ram(1), None, ram(3)],
        );
        let only = AllowedHosts::Only(vec![nqn("other")]);
        let private = subsystem(1, "nqn.2026-11.test:private", only, Vec::new());
        let limits = Limits {
            controllers: 4,
            io_queues: 8,
            queue_entries: 256,
            ..Limits::default()
        };
        let start = Instant::now();
        Self {
            snapshot: Snapshot {
                epoch: 1,
                generation: 7,
                discovery: Arc::default(),
                ports: vec![Arc::new(Port::flexins(
                    1,
                    SocketAddr::from(([192, 0, 2, 1], 4420)),
                    true,
                ))],
                subsystems: vec![Some(Arc::new(open)), Some(Arc::new(private))],
            },
            directory: Directory::new(limits, Budget::new(1_000_000)),
            recorders: [Recorder::default()],
            start,
            now: start,
        }
    }

    fn environment(&self) -> Environment<'_> {
        Environment {
            snapshot: &self.snapshot,
            directory: &self.directory,
            own_ip: None,
            port: 1,
            transport: TransportType::Flexins,
            started: self.start,
            queue_bytes: 100_000,
            can_persist: true,
            in_capsule_bytes: 8192,
            recorders: &self.recorders,
            now: self.now,
        }
    }

    fn controller(&self, subsystem: Option<usize>, kato_ms: u32) -> Controller {
        let name = match subsystem {
            Some(slot) => self.snapshot.subsystem(slot).unwrap().nqn.clone(),
            None => Nqn::discovery(),
        };
        let host = (nqn("host"), HostId::from_bytes([7; 16]));
        let association = Association::new(Cntlid::new(5), (subsystem, name), host, (1, 0));
        Controller::new(Arc::new(association), kato_ms, self.now)
    }

    fn ready(&self) -> Controller {
        let mut controller = self.controller(Some(0), 0);
        self.set_cc(&mut controller, Cc::ENABLE);
        assert!(self.csts(&mut controller).rdy());
        controller
    }

    fn discovery(&self) -> Controller {
        let mut controller = self.controller(None, 0);
        self.set_cc(&mut controller, Cc::ENABLE);
        controller
    }

    fn get(&self, controller: &mut Controller, property: Property) -> Result<u64, Status> {
        let get = PropertyGet {
            offset: property.offset(),
            width: property.width(),
        };
        controller.property_get(&get, &self.environment())
    }

    fn csts(&self, controller: &mut Controller) -> Csts {
        Csts::from_bits(self.get(controller, Property::Csts).unwrap() as u32)
    }

    fn set_cc(&self, controller: &mut Controller, cc: Cc) {
        let value = cc.into_bits().into();
        let set = PropertySet {
            offset: Property::Cc.offset(),
            width: Width::Four,
            value,
        };
        controller.property_set(&set, &self.environment()).unwrap();
    }

    fn send(&self, controller: &mut Controller, bytes: [u8; 64]) -> Reply {
        controller.handle(Sqe::cast(&bytes), &[], &self.environment())
    }

    fn identify(&self, controller: &mut Controller, cns: Cns, nsid: u32) -> Reply {
        self.send(
            controller,
            Identify::new(cns, Nsid::new(nsid)).emit(Cid::new(1), &ANYWHERE),
        )
    }

    fn log(&self, controller: &mut Controller, lid: LogPageId, offset: u64, len: u32) -> Reply {
        self.send(
            controller,
            GetLogPage::new(lid, offset, len).emit(Cid::new(1), &ANYWHERE),
        )
    }

    fn set(&self, controller: &mut Controller, value: impl Into<FeatureValue>) -> Reply {
        self.send(
            controller,
            SetFeatures::new(value.into()).emit(Cid::new(1), &Sgl::NONE),
        )
    }

    fn feature(&self, controller: &mut Controller, fid: FeatureId) -> Reply {
        self.send(
            controller,
            GetFeatures::new(fid).emit(Cid::new(1), &Sgl::NONE),
        )
    }
}

const ANYWHERE: Sgl = Sgl::Keyed {
    address: 0x1000,
    length: 1 << 20,
    key: 1,
    invalidate: false,
};

fn failed(code: StatusCode) -> Reply {
    Reply::Done(code.dnr(), 0)
}

fn data(reply: Reply) -> Vec<u8> {
    match reply {
        Reply::Data(bytes) => bytes,
        other => panic!("no data but {other:?}"),
    }
}

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
    assert_eq!(controller.poll_action(), Some(Action::CloseQueues));
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
}

/// CC.SHN (Base 3.6.1): SHST is 01b until data is safe, then 10b; no queue is added meanwhile.
#[test]
fn shutdown_flushes_first() {
    let world = World::new();
    let mut controller = world.ready();
    world.set_cc(&mut controller, Cc::ENABLE.with_shn(1));
    assert_eq!(controller.poll_action(), Some(Action::Flush));
    assert_eq!(world.csts(&mut controller).shst(), 1);
    assert!(!controller.association().is_ready());
    controller.note_flushed();
    assert_eq!(world.csts(&mut controller).shst(), 2);
}

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

/// Identify Controller: what Fabrics requires (Base 5.1.13.2.1).
#[test]
fn identify_controller() {
    let world = World::new();
    let mut controller = world.ready();
    let bytes = data(world.identify(&mut controller, Cns::Controller, 0));
    let id = identify::Controller::view(&bytes).unwrap();
    assert_eq!(
        (id.serial_number(), id.model_number()),
        ("S1".into(), "flexblk test".into())
    );
    assert_eq!(
        (id.cntlid().get(), id.nn.get(), id.in_capsule_bytes()),
        (5, 1024, 8192)
    );
    assert_eq!(id.max_transfer_bytes(0), Some(1 << 20));
    assert_eq!(
        (id.sqes, id.cqes, id.maxcmd.get(), id.kas.get()),
        (0x66, 0x44, 256, 1)
    );
    assert_eq!(
        id.sgls.get() & 0x10_0005,
        0x10_0005,
        "SGLs, keyed, in-capsule offset"
    );
    assert_eq!(
        id.ctratt.get() & 0x41,
        0x41,
        "128-bit host identifier, traffic-based keep-alive"
    );
    assert_eq!(id.subnqn().unwrap(), nqn("nqn.2026-11.test:a"));
    assert_eq!(
        id.vwc & 1,
        0,
        "memory has no volatile write cache that a flush would empty"
    );
    assert_eq!(id.tnvmcap.get(), 2 << 20);
}

/// CNS 00h: an inactive namespace is all zeros, an invalid identifier Invalid Namespace or Format
/// (Base 5.1.13.2, NVM 4.1.5.1).
#[test]
fn identify_namespace() {
    let world = World::new();
    let mut controller = world.ready();
    let bytes = data(world.identify(&mut controller, Cns::Namespace, 3));
    let id = identify::Namespace::view(&bytes).unwrap();
    assert_eq!((id.nsze.get(), id.block_bytes()), (256, Some(4096)));
    assert!(
        data(world.identify(&mut controller, Cns::Namespace, 2))
            .iter()
            .all(|byte| *byte == 0)
    );
    for nsid in [0, 1025, u32::MAX] {
        let reply = world.identify(&mut controller, Cns::Namespace, nsid);
        assert_eq!(
            reply,
            failed(StatusCode::InvalidNamespaceOrFormat),
            "{nsid}"
        );
    }
    let reply = world.identify(&mut controller, Cns::NamespaceDescriptors, 2);
    assert_eq!(reply, failed(StatusCode::InvalidNamespaceOrFormat));
    let list = data(world.identify(&mut controller, Cns::ActiveNamespaces, 1));
    let list = identify::NamespaceList::view(&list).unwrap();
    assert_eq!(list.iter().map(Nsid::get).collect::<Vec<_>>(), [3]);
    let reply = world.identify(&mut controller, Cns::ActiveNamespaces, 0xFFFF_FFFE);
    assert_eq!(reply, failed(StatusCode::InvalidNamespaceOrFormat));
    for cns in [
        Cns::CommandSetNamespace,
        Cns::IndependentNamespace,
        Cns::CommandSetController,
    ] {
        assert_eq!(data(world.identify(&mut controller, cns, 1)).len(), 4096);
    }
    let zoned = Identify {
        csi: Csi::Zoned,
        ..Identify::new(Cns::CommandSetNamespace, Nsid::new(1))
    };
    let reply = world.send(&mut controller, zoned.emit(Cid::new(1), &ANYWHERE));
    assert_eq!(reply, failed(StatusCode::InvalidField));
    assert_eq!(
        world.identify(&mut controller, Cns::Uuids, 0),
        failed(StatusCode::InvalidField)
    );
}

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

/// Number of Queues is answered from what there is (Base 5.1.25.1.5): the budget has room for ten
/// queues, the limit is eight, a second host gets what is left without the reserve.
#[test]
fn number_of_queues_comes_from_the_budget() {
    let world = World::new();
    let mut first = world.ready();
    let reply = world.set(&mut first, NumberOfQueues::of(64));
    assert_eq!(reply, done(NumberOfQueues::of(8).into_bits().into()));
    assert_eq!(world.directory.budget().free_bytes(), 200_000);
    let mut second = world.ready();
    let reply = world.set(&mut second, NumberOfQueues::of(4));
    assert_eq!(reply, done(NumberOfQueues::of(1).into_bits().into()));
    let reply = world.feature(&mut second, FeatureId::NumberOfQueues);
    assert_eq!(reply, done(NumberOfQueues::of(1).into_bits().into()));
    let reply = world.set(&mut second, NumberOfQueues::from_bits(0xFFFF_0000));
    assert_eq!(reply, failed(StatusCode::InvalidField));
    second.association().add_queue(Qid::new(1), 0, 8).unwrap();
    let reply = world.set(&mut second, NumberOfQueues::of(1));
    assert_eq!(reply, failed(StatusCode::CommandSequenceError));
    drop(first);
    assert_eq!(world.directory.budget().free_bytes(), 900_000);
}

/// Features: SV is Feature Identifier Not Saveable, unknown ones Invalid Field; the host identifier
/// is Connect's (Base 5.1.25).
#[test]
fn features() {
    let world = World::new();
    let mut controller = world.ready();
    let kato = flexblk_nvme::features::KeepAlive::new().with_timeout_ms(2001);
    assert_eq!(world.set(&mut controller, kato), done(0));
    assert_eq!(
        world.feature(&mut controller, FeatureId::KeepAlive),
        done(2100)
    );
    let save = SetFeatures {
        save: true,
        ..SetFeatures::new(kato.into())
    };
    let reply = world.send(&mut controller, save.emit(Cid::new(1), &Sgl::NONE));
    assert_eq!(reply, failed(StatusCode::FeatureNotSaveable));
    assert_eq!(
        world.set(&mut controller, HostIdFormat::new().with_extended(true)),
        failed(StatusCode::CommandSequenceError)
    );
    let get = GetFeatures {
        cdw11: 1,
        ..GetFeatures::new(FeatureId::HostId)
    };
    let reply = world.send(&mut controller, get.emit(Cid::new(1), &ANYWHERE));
    assert_eq!(data(reply), [7; 16]);
    assert_eq!(
        world.feature(&mut controller, FeatureId::HostId),
        failed(StatusCode::HostIdInconsistentFormat)
    );
    assert_eq!(
        world.feature(&mut controller, FeatureId::Timestamp),
        failed(StatusCode::InvalidField)
    );
    let cache = VolatileWriteCache::new().with_enable(false);
    assert_eq!(
        world.set(&mut controller, cache),
        failed(StatusCode::InvalidField)
    );
    let select = GetFeatures {
        select: Select::Capabilities,
        ..GetFeatures::new(FeatureId::KeepAlive)
    };
    assert_eq!(
        world.send(&mut controller, select.emit(Cid::new(1), &Sgl::NONE)),
        done(1 << 2)
    );
}

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
    counters[1].failed(true);
    let page = data(world.log(&mut controller, LogPageId::Smart, 0, 512));
    let smart = Smart::view(&page).unwrap();
    assert_eq!(
        (smart.data_units_read.get(), smart.host_reads.get()),
        (2, 1)
    );
    assert_eq!(
        (smart.data_units_written.get(), smart.host_writes.get()),
        (1, 1)
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

/// A discovery subsystem with a name of its own says so in Identify and in its own entry (Base
/// 3.1.3.3); referrals are entries of type 1 for the hosts that they are for; the log can be read at
/// any offset and length, and its generation counter tells when it has changed (5.1.12.3.1).
#[test]
fn unique_name_and_referrals() {
    let mut world = World::new();
    let own = nqn("nqn.2026-11.test:discovery");
    let referral = |port, hosts| Referral {
        trtype: Transport::Tcp,
        address: SocketAddr::from(([192, 0, 2, 9], port)),
        nqn: None,
        hosts,
    };
    let only = AllowedHosts::Only(vec![nqn("other")]);
    world.snapshot.discovery = Arc::new(Discovery {
        nqn: Some(own.clone()),
        listeners: Vec::new(),
        referrals: vec![referral(8009, AllowedHosts::Any), referral(8010, only)],
    });
    assert!(world.snapshot.is_discovery(&own) && world.snapshot.is_discovery(&Nqn::discovery()));
    let mut controller = world.discovery();
    let bytes = data(world.log(&mut controller, LogPageId::Discovery, 0, 8192));
    let page = Page::parse(&bytes).unwrap();
    let records: Vec<_> = page
        .entries()
        .map(|entry| entry.record().unwrap())
        .collect();
    assert_eq!(records.len(), 3);
    assert_eq!(records[0].subnqn, own);
    let referral = &records[2];
    assert_eq!(referral.subtype, SubsystemType::Referral);
    assert_eq!(
        (referral.traddr.as_str(), referral.trsvcid.as_str()),
        ("192.0.2.9", "8009")
    );
    assert!(referral.subnqn.is_discovery());
    for (offset, len) in [
        (0, 16),
        (4, 4),
        (1020, 8),
        (2048, 1024),
        (4092, 4),
        (4096, 4),
    ] {
        let piece = data(world.log(&mut controller, LogPageId::Discovery, offset, len));
        let at = offset as usize;
        assert_eq!(piece, bytes[at..at + len as usize], "{offset}+{len}");
    }
    let beyond = world.log(&mut controller, LogPageId::Discovery, 4100, 4);
    assert_eq!(beyond, Reply::Done(StatusCode::InvalidField.dnr(), 0));
}

/// The discovery log shows a host what it may connect to, can be read in pieces, and a change is an
/// event (Base 3.1.3.3, 5.1.12.3.1).
#[test]
fn discovery() {
    let world = World::new();
    let mut controller = world.discovery();
    let bytes = data(world.log(&mut controller, LogPageId::Discovery, 0, 4096));
    let page = Page::parse(&bytes).unwrap();
    assert_eq!(
        (page.generation(), page.record_count()),
        (7, 2),
        "the private one is not shown"
    );
    let records: Vec<_> = page
        .entries()
        .map(|entry| entry.record().unwrap())
        .collect();
    assert_eq!(records[0].subtype, SubsystemType::CurrentDiscovery);
    assert_eq!(records[1].subnqn, nqn("nqn.2026-11.test:a"));
    assert_eq!(
        (records[1].traddr.as_str(), records[1].trsvcid.as_str()),
        ("192.0.2.1", "4420")
    );
    let piece = data(world.log(&mut controller, LogPageId::Discovery, 2048, 1024));
    assert_eq!(piece, bytes[2048..3072]);

    world.set(
        &mut controller,
        AsyncEventConfig::new().with_discovery_log(true),
    );
    world.send(
        &mut controller,
        AsyncEventRequest.emit(Cid::new(3), &Sgl::NONE),
    );
    controller.note_discovery_changed();
    assert_eq!(controller.poll_event(), Some((Cid::new(3), 0x0070_F002)));

    let id = data(world.identify(&mut controller, Cns::Controller, 0));
    assert_eq!(identify::Controller::view(&id).unwrap().cntrltype, 2);
    assert_eq!(
        world.identify(&mut controller, Cns::Namespace, 1),
        failed(StatusCode::InvalidField)
    );
    let smart = world.log(&mut controller, LogPageId::Smart, 0, 512);
    assert_eq!(smart, failed(StatusCode::InvalidLogPage));
    let abort = Abort::default().emit(Cid::new(1), &Sgl::NONE);
    assert_eq!(
        world.send(&mut controller, abort),
        failed(StatusCode::InvalidOpcode)
    );
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
