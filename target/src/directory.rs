//! Which controllers there are, and who gets one: Connect (Base 6.3), controller identifiers, and
//! the current snapshot. Locked at connect, tear-down and management, never for an I/O.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use flexblk_nvme::command::fabrics::{Connect, ConnectData, ConnectReply};
use flexblk_nvme::nqn::NqnError;
use flexblk_nvme::{Cntlid, HostId, Nqn, Qid, Status, StatusCode};

use crate::association::{Association, QueueRefusal, QueueShared, lock};
use crate::budget::{Budget, Reservation};
use crate::config::Limits;
use crate::snapshot::Snapshot;

/// Most hosts whose commands are logged.
const MAX_TRACED: usize = 64;

/// The target's controllers and what they may see.
#[derive(Debug)]
pub struct Directory {
    state: Mutex<State>,
    limits: Limits,
    budget: Budget,
}

#[derive(Debug, Default)]
struct State {
    snapshot: Arc<Snapshot>,
    controllers: BTreeMap<u16, Arc<Association>>,
    last_cntlid: u16,
    /// Hosts whose commands are logged.
    traced: Vec<Nqn>,
}

/// A queue as its transport connection announced it (NVMe/RDMA private data).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announced {
    /// Queue identifier.
    pub qid: Qid,
    /// Entries of the submission queue that the connection was made for.
    pub entries: u16,
    /// Port by which its connection came.
    pub port: u16,
}

/// A successful Connect.
#[derive(Debug)]
pub enum Connected {
    /// Of an Admin queue: a new controller.
    Admin(Arc<Association>),
    /// Of an I/O queue of an existing controller.
    Io {
        /// The controller.
        association: Arc<Association>,
        /// The queue.
        queue: Arc<QueueShared>,
    },
}

/// A refused Connect: what its completion says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Status.
    pub status: Status,
    /// Dword 0.
    pub reply: ConnectReply,
    /// For the log.
    pub reason: &'static str,
}

impl Refusal {
    fn new(code: StatusCode, reason: &'static str) -> Self {
        Self {
            status: code.dnr(),
            reply: ConnectReply::new(),
            reason,
        }
    }

    fn sqe(offset: u16, reason: &'static str) -> Self {
        let reply = ConnectReply::invalid_sqe(offset);
        Self {
            reply,
            ..Self::new(StatusCode::ConnectInvalidParameters, reason)
        }
    }

    fn data(offset: u16, reason: &'static str) -> Self {
        let reply = ConnectReply::invalid_data(offset);
        Self {
            reply,
            ..Self::new(StatusCode::ConnectInvalidParameters, reason)
        }
    }

    /// May succeed later: Do Not Retry is 0.
    fn busy(reason: &'static str) -> Self {
        Self {
            status: StatusCode::ConnectControllerBusy.into(),
            ..Self::new(StatusCode::ConnectControllerBusy, reason)
        }
    }
}

impl Directory {
    /// An empty one.
    #[must_use]
    pub fn new(limits: Limits, budget: Budget) -> Self {
        Self {
            state: Mutex::default(),
            limits,
            budget,
        }
    }

    /// What is exported now.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&lock(&self.state).snapshot)
    }

    /// Replaces it. The epoch is counted here.
    pub fn replace(&self, mut next: Snapshot) -> Arc<Snapshot> {
        let mut state = lock(&self.state);
        next.epoch = state.snapshot.epoch + 1;
        state.snapshot = Arc::new(next);
        Arc::clone(&state.snapshot)
    }

    /// Logs, or no longer logs, every command of a host.
    pub fn trace_host(&self, host: &Nqn, on: bool) -> Result<(), String> {
        let mut state = lock(&self.state);
        state.traced.retain(|traced| traced != host);
        if on {
            if state.traced.len() >= MAX_TRACED {
                return Err(format!("at most {MAX_TRACED} hosts can be traced"));
            }
            state.traced.push(host.clone());
        }
        for association in state.controllers.values() {
            if association.hostnqn == *host {
                association.set_traced(on);
            }
        }
        Ok(())
    }

    /// The controllers there are, by identifier.
    #[must_use]
    pub fn controllers(&self) -> Vec<Arc<Association>> {
        lock(&self.state).controllers.values().cloned().collect()
    }

    /// What hosts can get.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Memory for queues.
    #[must_use]
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Controllers at the moment.
    #[must_use]
    pub fn controller_count(&self) -> usize {
        lock(&self.state).controllers.len()
    }

    /// Memory for a queue that is about to be connected: out of what its controller was granted,
    /// else out of the budget.
    #[must_use]
    pub fn reserve_queue(&self, cntlid: Cntlid, bytes: u64) -> Option<Reservation> {
        let association = lock(&self.state)
            .controllers
            .get(&cntlid.get())
            .map(Arc::clone);
        let granted = association.and_then(|association| association.take_granted(bytes));
        granted.or_else(|| self.budget.reserve(bytes))
    }

    /// Judges a Connect (Base 6.3) that arrived on `thread`.
    pub fn connect(
        &self,
        connect: &Connect,
        data: &ConnectData,
        announced: Announced,
        thread: usize,
    ) -> Result<Connected, Refusal> {
        if connect.qid != announced.qid {
            return Err(Refusal::sqe(
                Connect::QID_OFFSET,
                "QID differs from the connection's",
            ));
        }
        // SQSIZE is 0's based; 0 and more than the connection or CAP.MQES has are not allowed.
        let entries = u32::from(connect.sqsize) + 1;
        let most = announced.entries.min(self.limits.queue_entries);
        if connect.sqsize == 0 || entries > u32::from(most) {
            return Err(Refusal::sqe(
                Connect::SQSIZE_OFFSET,
                "SQSIZE is 0 or too large",
            ));
        }
        let subnqn = data
            .subnqn()
            .map_err(|_| Refusal::data(ConnectData::SUBNQN_OFFSET, "SUBNQN is malformed"))?;
        let hostnqn = match data.hostnqn() {
            Ok(hostnqn) => Some(hostnqn),
            Err(NqnError::Empty) => None,
            Err(_) => {
                let reason = "HOSTNQN is malformed";
                return Err(Refusal::data(ConnectData::HOSTNQN_OFFSET, reason));
            }
        };
        if connect.qid.is_admin() {
            if data.hostid == [0; 16] {
                return Err(Refusal::data(ConnectData::HOSTID_OFFSET, "HOSTID is 0"));
            }
            let hostnqn = hostnqn.unwrap_or_else(|| stand_in(data.hostid()));
            self.connect_admin(data, subnqn, hostnqn, (announced.port, thread))
        } else {
            self.connect_io(announced, data, &subnqn, hostnqn.as_ref(), thread)
        }
    }

    fn connect_admin(
        &self,
        data: &ConnectData,
        subnqn: Nqn,
        hostnqn: Nqn,
        (port, thread): (u16, usize),
    ) -> Result<Connected, Refusal> {
        let mut state = lock(&self.state);
        let subsystem = if state.snapshot.is_discovery(&subnqn) {
            None
        } else {
            let subsystem = state
                .snapshot
                .find(&subnqn)
                .ok_or_else(|| Refusal::data(ConnectData::SUBNQN_OFFSET, "no such subsystem"))?;
            if !state.snapshot.is_reached(subsystem, port) {
                let reason = "the subsystem is not reached at this address";
                return Err(Refusal::data(ConnectData::SUBNQN_OFFSET, reason));
            }
            if !subsystem.hosts.allows(&hostnqn) {
                let reason = "the host is not on the subsystem's allow-list";
                return Err(Refusal::new(StatusCode::ConnectInvalidHost, reason));
            }
            Some(subsystem.slot)
        };
        // Base 3.1.2.1: with the dynamic controller model CNTLID is FFFFh.
        if data.cntlid() != Cntlid::DYNAMIC {
            let reason = "CNTLID is not FFFFh (controllers are dynamic)";
            return Err(Refusal::data(ConnectData::CNTLID_OFFSET, reason));
        }
        let cntlid = state
            .free_cntlid(self.limits.controllers)
            .ok_or_else(|| Refusal::busy("all controllers are in use"))?;
        let traced = state.traced.contains(&hostnqn);
        let host = (hostnqn, data.hostid());
        let association = Arc::new(Association::new(
            cntlid,
            (subsystem, subnqn),
            host,
            (port, thread),
        ));
        association.set_traced(traced);
        state
            .controllers
            .insert(cntlid.get(), Arc::clone(&association));
        Ok(Connected::Admin(association))
    }

    fn connect_io(
        &self,
        announced: Announced,
        data: &ConnectData,
        subnqn: &Nqn,
        hostnqn: Option<&Nqn>,
        thread: usize,
    ) -> Result<Connected, Refusal> {
        let association = {
            let state = lock(&self.state);
            let found = state.controllers.get(&data.cntlid().get()).map(Arc::clone);
            found.ok_or_else(|| Refusal::data(ConnectData::CNTLID_OFFSET, "no such controller"))?
        };
        // Base 6.3: the fields must be those of the Admin queue's Connect. HOSTID is not looked at: like
        // nvmet and SPDK we go by the Admin queue's (reservations, Identify), since there are hosts that
        // make one up for each Connect (truenas_pynvmeof_client). It gives nobody anything: a host that
        // knows CNTLID, SUBNQN and HOSTNQN could as well send the right one.
        if association.subnqn != *subnqn {
            return Err(Refusal::data(
                ConnectData::SUBNQN_OFFSET,
                "not the controller's SUBNQN",
            ));
        }
        let unnamed = || stand_in(association.hostid);
        if association.hostnqn != *hostnqn.unwrap_or(&unnamed()) {
            return Err(Refusal::data(
                ConnectData::HOSTNQN_OFFSET,
                "not the controller's HOSTNQN",
            ));
        }
        // Base 3.1: a controller belongs to one port of the subsystem.
        if association.port != announced.port {
            let reason = "the controller was connected at another address";
            return Err(Refusal::data(ConnectData::CNTLID_OFFSET, reason));
        }
        if association.subsystem.is_none() {
            let reason = "a discovery controller has no I/O queues";
            return Err(Refusal::sqe(Connect::QID_OFFSET, reason));
        }
        let queue = association
            .add_queue(announced.qid, thread, self.limits.io_queues)
            .map_err(|refusal| match refusal {
                QueueRefusal::NotReady => Refusal::new(
                    StatusCode::CommandSequenceError,
                    "the controller is not ready",
                ),
                QueueRefusal::Exists => {
                    Refusal::new(StatusCode::CommandSequenceError, "the queue exists")
                }
                QueueRefusal::BeyondGrant => {
                    Refusal::sqe(Connect::QID_OFFSET, "QID is above the number of queues")
                }
            })?;
        Ok(Connected::Io { association, queue })
    }

    /// Forgets a controller; its identifier can be used again.
    pub fn remove(&self, association: &Association) {
        lock(&self.state)
            .controllers
            .remove(&association.cntlid.get());
    }
}

/// The name of a host that has sent none. The specification wants one, but `spdk_nvme_perf` and others
/// send an empty field, and nvmet and SPDK take that wherever any host may connect. So do we; the host
/// then goes by the name that the specification gives hosts with a UUID (Base 4.7), made of its HOSTID,
/// so that logs, numbers and masking tell such hosts apart. An allow-list lets it in under that name.
fn stand_in(hostid: HostId) -> Nqn {
    Nqn::from_uuid(hostid.0)
}

impl State {
    /// The next free identifier after the last one given out, so that one is not used again soon.
    fn free_cntlid(&mut self, limit: u16) -> Option<Cntlid> {
        let limit = limit.min(Cntlid::MAX.get());
        if self.controllers.len() >= usize::from(limit) {
            return None;
        }
        let last = self.last_cntlid;
        let mut candidates = (last.saturating_add(1)..=Cntlid::MAX.get()).chain(1..=last);
        let free = candidates.find(|id| !self.controllers.contains_key(id))?;
        self.last_cntlid = free;
        Some(Cntlid::new(free))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AllowedHosts;
    use crate::port::Port;
    use crate::snapshot::Subsystem;
    use flexblk_nvme::HostId;
    use flexblk_nvme::command::fabrics::ConnectAttributes;

    const SUBNQN: &str = "nqn.2026-11.test:a";

    fn nqn(name: &str) -> Nqn {
        Nqn::opaque(name).unwrap()
    }

    fn directory() -> Directory {
        let limits = Limits {
            controllers: 2,
            io_queues: 2,
            queue_entries: 64,
            ..Limits::default()
        };
        let directory = Directory::new(limits, Budget::new(1000));
        let subsystem = Subsystem {
            slot: 0,
            nqn: nqn(SUBNQN),
            serial: "1".into(),
            model: "m".into(),
            hosts: AllowedHosts::Only(vec![nqn("host"), nqn("second")]),
            listeners: None,
            ana_groups: Vec::new(),
            ana_changes: 0,
            namespaces: Vec::new(),
            counters: [].into(),
        };
        let snapshot = Snapshot {
            epoch: 0,
            generation: 1,
            discovery: Arc::default(),
            ports: [1, 2]
                .map(|id| {
                    Arc::new(Port::flexins(
                        id,
                        ([192, 0, 2, 1], 4420 + id).into(),
                        id == 1,
                    ))
                })
                .into(),
            subsystems: vec![Some(Arc::new(subsystem))],
        };
        directory.replace(snapshot);
        directory
    }

    fn connect(qid: u16, sqsize: u16) -> Connect {
        Connect {
            qid: Qid::new(qid),
            sqsize,
            cattr: ConnectAttributes::new(),
            kato_ms: 0,
        }
    }

    fn data(cntlid: Cntlid, subnqn: &str, hostnqn: &str) -> ConnectData {
        ConnectData::new(
            HostId::from_bytes([1; 16]),
            cntlid,
            &nqn(subnqn),
            &nqn(hostnqn),
        )
    }

    fn attempt(
        directory: &Directory,
        connect: &Connect,
        data: &ConnectData,
    ) -> Result<Connected, Refusal> {
        let announced = Announced {
            qid: connect.qid,
            entries: 64,
            port: 1,
        };
        directory.connect(connect, data, announced, 0)
    }

    fn admin(directory: &Directory, hostnqn: &str) -> Result<Arc<Association>, Refusal> {
        let connected = attempt(
            directory,
            &connect(0, 31),
            &data(Cntlid::DYNAMIC, SUBNQN, hostnqn),
        )?;
        match connected {
            Connected::Admin(association) => Ok(association),
            Connected::Io { .. } => panic!("an Admin queue"),
        }
    }

    fn refused(result: Result<Connected, Refusal>) -> (StatusCode, &'static str) {
        let refusal = result.expect_err("refused");
        let code = refusal
            .status
            .code_in(flexblk_nvme::status::CodeSpace::Fabrics);
        let field = match code {
            StatusCode::ConnectInvalidParameters => refusal.reply.invalid_field(),
            _ => "",
        };
        (code, field)
    }

    /// Connect Invalid Parameters names the field by IATTR and IPO (Base 6.3); a host that is not
    /// allowed is Connect Invalid Host.
    #[test]
    fn each_wrong_field_is_named() {
        let directory = directory();
        let parameters = |field| (StatusCode::ConnectInvalidParameters, field);
        let good = data(Cntlid::DYNAMIC, SUBNQN, "host");
        let try_data = |data: &ConnectData| refused(attempt(&directory, &connect(0, 31), data));
        assert_eq!(
            refused(attempt(&directory, &connect(0, 0), &good)),
            parameters("SQSIZE")
        );
        assert_eq!(
            refused(attempt(&directory, &connect(0, 64), &good)),
            parameters("SQSIZE")
        );
        assert_eq!(
            try_data(&data(Cntlid::DYNAMIC, "nqn.other", "host")),
            parameters("SUBNQN")
        );
        assert_eq!(
            try_data(&data(Cntlid::new(1), SUBNQN, "host")),
            parameters("CNTLID")
        );
        let stranger = try_data(&data(Cntlid::DYNAMIC, SUBNQN, "stranger"));
        assert_eq!(stranger.0, StatusCode::ConnectInvalidHost);
        let mut anonymous = good;
        anonymous.hostid = [0; 16];
        assert_eq!(try_data(&anonymous), parameters("HOSTID"));
        let mut unterminated = good;
        unterminated.hostnqn = [b'x'; 256];
        assert_eq!(try_data(&unterminated), parameters("HOSTNQN"));
        let announced = Announced {
            qid: Qid::new(1),
            entries: 64,
            port: 1,
        };
        let other = directory.connect(&connect(0, 31), &good, announced, 0);
        assert_eq!(refused(other), parameters("QID"));
        assert_eq!(directory.controller_count(), 0);
    }

    /// A host without a name is let in where any host may connect, and then has the name that goes with
    /// its identifier; on an allow-list it is only by that name. HOSTID of an I/O queue may be any.
    #[test]
    fn hosts_without_a_name() {
        let directory = directory();
        let unnamed = |cntlid, hostid| {
            let mut data = data(cntlid, SUBNQN, "x");
            data.hostnqn = [0; 256];
            data.hostid = hostid;
            data
        };
        let first = unnamed(Cntlid::DYNAMIC, [1; 16]);
        let refusal = refused(attempt(&directory, &connect(0, 31), &first));
        assert_eq!(refusal.0, StatusCode::ConnectInvalidHost);
        let allow = |hosts| {
            let mut snapshot = Snapshot::clone(&directory.snapshot());
            let mut subsystem = Subsystem::clone(snapshot.subsystem(0).unwrap());
            subsystem.hosts = hosts;
            snapshot.subsystems[0] = Some(Arc::new(subsystem));
            directory.replace(snapshot);
        };
        let name = "nqn.2014-08.org.nvmexpress:uuid:01010101-0101-0101-0101-010101010101";
        for hosts in [AllowedHosts::Any, AllowedHosts::Only(vec![nqn(name)])] {
            allow(hosts);
            let controller = match attempt(&directory, &connect(0, 31), &first) {
                Ok(Connected::Admin(controller)) => controller,
                other => panic!("{other:?}"),
            };
            assert_eq!(controller.hostnqn.as_str(), name);
            controller.set_ready(true);
            let io = |qid, data: &ConnectData| attempt(&directory, &connect(qid, 31), data);
            assert!(io(1, &unnamed(controller.cntlid, [1; 16])).is_ok());
            assert!(io(2, &unnamed(controller.cntlid, [9; 16])).is_ok());
            assert_eq!(
                refused(io(3, &data(controller.cntlid, SUBNQN, "host"))).1,
                "HOSTNQN"
            );
            directory.remove(&controller);
        }
    }

    #[test]
    fn controllers_are_bounded_and_identifiers_come_back() {
        let directory = directory();
        let first = admin(&directory, "host").unwrap();
        let second = admin(&directory, "second").unwrap();
        assert_ne!(first.cntlid, second.cntlid);
        let busy = admin(&directory, "host").unwrap_err();
        assert_eq!(
            busy.status,
            StatusCode::ConnectControllerBusy.into(),
            "DNR is 0"
        );
        directory.remove(&first);
        let third = admin(&directory, "host").unwrap();
        assert!(
            third.cntlid > second.cntlid,
            "an identifier is not used again at once"
        );
    }

    /// An I/O queue belongs to a controller of the same host and subsystem that is ready (Base 6.3).
    #[test]
    fn io_queues_need_their_controller() {
        let directory = directory();
        let controller = admin(&directory, "host").unwrap();
        let good = data(controller.cntlid, SUBNQN, "host");
        let io = |qid, data: &ConnectData| attempt(&directory, &connect(qid, 31), data);
        assert_eq!(refused(io(1, &good)).0, StatusCode::CommandSequenceError);
        controller.set_ready(true);
        let parameters = |field| (StatusCode::ConnectInvalidParameters, field);
        assert_eq!(
            refused(io(1, &data(Cntlid::new(99), SUBNQN, "host"))),
            parameters("CNTLID")
        );
        assert_eq!(
            refused(io(1, &data(controller.cntlid, SUBNQN, "second"))),
            parameters("HOSTNQN")
        );
        assert_eq!(
            refused(io(1, &data(controller.cntlid, "nqn.x", "host"))),
            parameters("SUBNQN")
        );
        // Of another port, although the subsystem is reached there, too.
        let elsewhere = Announced {
            qid: Qid::new(1),
            entries: 64,
            port: 2,
        };
        let stray = directory.connect(&connect(1, 31), &good, elsewhere, 0);
        assert_eq!(refused(stray), parameters("CNTLID"));
        assert!(io(1, &good).is_ok());
        assert_eq!(
            refused(io(1, &good)).0,
            StatusCode::CommandSequenceError,
            "it exists"
        );
        assert_eq!(refused(io(3, &good)), parameters("QID"));
        controller.remove_queue(Qid::new(1));
        assert!(io(1, &good).is_ok());
    }

    #[test]
    fn granted_memory_is_used_before_the_budget() {
        let directory = directory();
        let controller = admin(&directory, "host").unwrap();
        controller.grant(2, directory.budget().reserve(800));
        assert!(directory.reserve_queue(Cntlid::DYNAMIC, 300).is_none());
        let queue = directory.reserve_queue(controller.cntlid, 300).unwrap();
        assert_eq!(directory.budget().free_bytes(), 200);
        drop(queue);
        assert_eq!(directory.budget().free_bytes(), 500);
    }
}
