//! The controller as hosts see it; each test names the requirement it holds us to.

mod commands;
mod discovery;
mod events;
mod features;
mod identification;
mod keep_alive;
mod logs;
mod properties;

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
use crate::iostat::IoStats;
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
        stats: Arc::new(IoStats::new(1)),
        histogram: None,
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
