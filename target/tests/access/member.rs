//! A host with a controller and an I/O queue, and what a test has it do.

use flexblk_nvme::command::admin::{
    AsyncEventRequest, Cns, GetFeatures, GetLogPage, Identify, Select, SetFeatures,
};
use flexblk_nvme::command::nvm::Compare;
use flexblk_nvme::command::reservation::{
    RegisteredController, ReservationAcquire, ReservationKeys, ReservationRegister,
    ReservationRelease, ReservationReport, ReservationStatus, ReservationType, register_action,
};
use flexblk_nvme::command::{Fuse, Sqe};
use flexblk_nvme::features::{FeatureId, FeatureValue};
use flexblk_nvme::identify::NamespaceList;
use flexblk_nvme::log::ana::AnaState;
use flexblk_nvme::log::{LogPageId, ReservationNotification, ana};
use flexblk_nvme::{Cid, HostId, Lba, Nqn, Nsid, Sgl, StatusCode, U64, identify};

use crate::host::{Host, Queue};
use crate::world::{World, code, open, read, write};

pub(crate) const BLOCK: u32 = 4096;
pub(crate) const NSID: Nsid = Nsid::new(1);

/// A host of that number with a controller and an I/O queue.
pub(crate) struct Member {
    pub(crate) host: Host,
    pub(crate) admin: Queue,
    pub(crate) io: Queue,
    pub(crate) key: u64,
}

impl Member {
    pub(crate) fn new(world: &World, number: u8) -> Self {
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

    pub(crate) fn with_keys(
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

    pub(crate) fn register(&mut self, persist: u8) -> StatusCode {
        let register = ReservationRegister {
            nsid: NSID,
            persist,
            ..Default::default()
        };
        self.with_keys((0, self.key), |cid, sgl| register.emit(cid, sgl))
    }

    pub(crate) fn unregister(&mut self) -> StatusCode {
        let register = ReservationRegister {
            nsid: NSID,
            action: register_action::UNREGISTER,
            ..Default::default()
        };
        self.with_keys((self.key, 0), |cid, sgl| register.emit(cid, sgl))
    }

    pub(crate) fn acquire(
        &mut self,
        action: u8,
        rtype: ReservationType,
        preempt: u64,
    ) -> StatusCode {
        let acquire = ReservationAcquire {
            nsid: NSID,
            action,
            ignore_key: false,
            rtype: rtype.raw(),
        };
        self.with_keys((self.key, preempt), |cid, sgl| acquire.emit(cid, sgl))
    }

    pub(crate) fn release(&mut self, action: u8, rtype: ReservationType) -> StatusCode {
        let release = ReservationRelease {
            nsid: NSID,
            action,
            ignore_key: false,
            rtype: rtype.raw(),
        };
        self.with_keys((self.key, 0), |cid, sgl| release.emit(cid, sgl))
    }

    pub(crate) fn report(&mut self) -> (ReservationStatus, Vec<RegisteredController>) {
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

    pub(crate) fn reads(&mut self) -> StatusCode {
        let sgl = self.host.keyed(0, BLOCK);
        code(&self.host.command(self.io, |cid| read(0, 1).emit(cid, &sgl)))
    }

    pub(crate) fn writes(&mut self) -> StatusCode {
        let sgl = self.host.keyed(0, BLOCK);
        code(
            &self
                .host
                .command(self.io, |cid| write(0, 1).emit(cid, &sgl)),
        )
    }

    /// Compare and Write as one of the first block.
    pub(crate) fn compares_and_writes(&mut self) -> [StatusCode; 2] {
        let (first, second) = (self.host.cid(), self.host.cid());
        let (expected, new) = (self.host.keyed(0, BLOCK), self.host.keyed(BLOCK, BLOCK));
        let compare = Compare {
            nsid: NSID,
            slba: Lba::new(0),
            blocks: 1,
            ..Default::default()
        };
        for (mut entry, fuse) in [
            (compare.emit(first, &expected), Fuse::First),
            (write(0, 1).emit(second, &new), Fuse::Second),
        ] {
            let mut sqe = *Sqe::cast(&entry);
            sqe.set_fuse(fuse);
            entry = sqe.to_bytes();
            self.host.send(self.io, &entry, None);
        }
        [first, second].map(|cid| code(&self.host.answer(self.io, cid)))
    }

    pub(crate) fn may(&mut self) -> (bool, bool) {
        let fine = |code| match code {
            StatusCode::Success => true,
            StatusCode::ReservationConflict => false,
            other => panic!("{other:?}"),
        };
        (fine(self.reads()), fine(self.writes()))
    }

    pub(crate) fn listen(&mut self) -> Cid {
        let cid = self.host.cid();
        self.host
            .send(self.admin, &AsyncEventRequest.emit(cid, &Sgl::NONE), None);
        cid
    }

    pub(crate) fn set(&mut self, value: FeatureValue, nsid: Nsid) -> StatusCode {
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

    pub(crate) fn get(&mut self, fid: FeatureId, nsid: Nsid, select: Select) -> u32 {
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

    pub(crate) fn notification(&mut self) -> (u64, u8, u8, u32) {
        let get = GetLogPage::new(LogPageId::Reservation, 0, 64);
        let page = self.host.log(self.admin, &get);
        let page = ReservationNotification::view(&page).unwrap();
        (page.count.get(), page.kind, page.available, page.nsid.get())
    }

    pub(crate) fn namespace(&mut self) -> identify::Namespace {
        let bytes = self
            .host
            .identify(self.admin, &Identify::new(Cns::Namespace, NSID));
        *identify::Namespace::view(&bytes).unwrap()
    }

    pub(crate) fn active(&mut self) -> Vec<u32> {
        let identify = Identify::new(Cns::ActiveNamespaces, Nsid::NONE);
        let page = self.host.identify(self.admin, &identify);
        NamespaceList::view(&page)
            .unwrap()
            .iter()
            .map(Nsid::get)
            .collect()
    }

    pub(crate) fn ana_log(&mut self) -> (u64, Vec<(u32, AnaState, Vec<u32>)>) {
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

pub(crate) const OK: StatusCode = StatusCode::Success;
pub(crate) const CONFLICT: StatusCode = StatusCode::ReservationConflict;

pub(crate) fn ram(threads: usize) -> World {
    World::with(&["ram:1M,block_size=4096"], |config| {
        config.cores = vec![0; threads]
    })
}
