//! Connect, properties and Admin commands: between a queue and the controller's state machine.

use flexblk_nvme::command::Sqe;
use flexblk_nvme::command::fabrics::{Command as Fabrics, Connect, ConnectData, ConnectReply};
use flexblk_nvme::{Status, StatusCode};
use flexins::engine::Engine;

use super::liveness::Liveness;
use super::mail::AbortFrom;
use super::parts::{Parts, Task};
use super::queue::{Admin, Fabric, Io, Queue, QueueKey, Role, Slot, What};
use super::record::event_of;
use super::respond::refusal;
use super::{NO_DEVICE, parts, queue};
use crate::control;
use crate::controller::{self, Action, Change, Controller, Ending, Environment, Reply};
use crate::directory::{Connected, Refusal};
use crate::queue::data::{self, Source};
use crate::recorder::{Event, Kind};

/// Usual size of an I/O queue, by which the number of queues is answered.
const USUAL_ENTRIES: u16 = 128;

impl Parts {
    /// A command capsule of any queue.
    #[inline]
    pub(crate) fn capsule(&mut self, engine: &mut Engine, queue: &mut Queue, capsule: &[u8]) {
        let Some((sqe, data)) = Sqe::split(capsule) else {
            tracing::warn!(peer = %queue.peer, bytes = capsule.len(), "a message too short for a command; the queue is closed");
            self.to_close.push_back(queue.key);
            return;
        };
        self.command(engine, queue, sqe, data);
    }

    /// A command and its in-capsule data.
    #[inline]
    pub(crate) fn command(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        sqe: &Sqe,
        data: &[u8],
    ) {
        queue.advance_head();
        match queue.role {
            Role::Io(_) if !sqe.is_fabrics() => self.io_command(engine, queue, sqe, data),
            Role::Io(_) => {
                // Of the Fabrics commands only Connect would make sense here, and it has been.
                let status = match Fabrics::parse(sqe) {
                    Ok(Fabrics::Connect(_)) => StatusCode::CommandSequenceError,
                    _ => StatusCode::InvalidOpcode,
                };
                self.refuse(engine, queue, sqe, status.dnr());
            }
            Role::Admin(ref mut admin) => {
                admin.liveness.heard(self.now);
                self.admin_command(engine, queue, sqe, data);
            }
            Role::Unconnected(_) => self.connect_command(engine, queue, sqe, data),
        }
    }

    pub(crate) fn refuse(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        sqe: &Sqe,
        status: Status,
    ) {
        let nsid = if sqe.is_fabrics() {
            flexblk_nvme::Nsid::NONE
        } else {
            sqe.nsid()
        };
        self.finish_new(engine, queue, refusal(sqe.cid(), sqe.opcode, nsid), status);
    }

    /// The first command of a queue, which must be Connect: Base 3.3, else Command Sequence Error.
    fn connect_command(&mut self, engine: &mut Engine, queue: &mut Queue, sqe: &Sqe, data: &[u8]) {
        let sequence_error = StatusCode::CommandSequenceError.dnr();
        if !sqe.is_fabrics() || !sqe.uses_sgl() {
            return self.refuse(engine, queue, sqe, sequence_error);
        }
        match Fabrics::parse(sqe) {
            Ok(Fabrics::Connect(_)) => {
                self.with_data(engine, queue, sqe, data, ConnectData::SIZE as u32)
            }
            Ok(_) => self.refuse(engine, queue, sqe, sequence_error),
            Err(status) => self.refuse(engine, queue, sqe, status),
        }
    }

    fn admin_command(&mut self, engine: &mut Engine, queue: &mut Queue, sqe: &Sqe, data: &[u8]) {
        if sqe.is_fabrics() {
            return self.fabrics_command(engine, queue, sqe);
        }
        match Controller::data_from_host(sqe) {
            0 => self.handle_admin(engine, queue, sqe, &[], None),
            length => self.with_data(engine, queue, sqe, data, length),
        }
    }

    /// Properties; Connect again is Command Sequence Error; there is no authentication.
    fn fabrics_command(&mut self, engine: &mut Engine, queue: &mut Queue, sqe: &Sqe) {
        let command = match Fabrics::parse(sqe) {
            Ok(command) => command,
            Err(status) => return self.refuse(engine, queue, sqe, status),
        };
        let Role::Admin(admin) = &mut queue.role else {
            return;
        };
        let environment = environment(
            &self.shared,
            &self.snapshot,
            admin,
            (queue.fabric, queue.in_capsule_bytes),
            self.now,
        );
        let result = match command {
            Fabrics::PropertyGet(get) => admin.controller.property_get(&get, &environment),
            Fabrics::PropertySet(set) => admin
                .controller
                .property_set(&set, &environment)
                .map(|()| 0),
            Fabrics::Connect(_) => Err(StatusCode::CommandSequenceError.dnr()),
            _ => Err(StatusCode::InvalidOpcode.dnr()),
        };
        let mut slot = refusal(sqe.cid(), sqe.opcode, flexblk_nvme::Nsid::NONE);
        slot.result = result.unwrap_or(0);
        self.finish_new(engine, queue, slot, result.err().unwrap_or(Status::SUCCESS));
        self.after_admin(queue);
    }

    /// A command with `length` bytes of data from the host: at once when they came with the capsule,
    /// else when they have been fetched.
    fn with_data(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        sqe: &Sqe,
        data: &[u8],
        length: u32,
    ) {
        match data::from_host(sqe, data.len(), queue.fabric.addressing(), length) {
            Ok(Source::InCapsule(offset)) => {
                let start = offset as usize;
                let data = data.get(start..start + length as usize).unwrap_or_default();
                self.judge_data(engine, queue, sqe, data, None);
            }
            Ok(Source::Remote(remote)) => {
                let mut slot = Slot::new(What::AdminIn, sqe.opcode, sqe.cid());
                slot.length = length;
                slot.remote = remote;
                if let Some(index) = self.admit(engine, queue, slot) {
                    queue.fetching.push((index, sqe.to_bytes()));
                    self.want_buffers(engine, queue, index, None);
                }
            }
            Err(status) => self.refuse(engine, queue, sqe, status),
        }
    }

    /// Data of an Admin command or Connect has been fetched.
    pub(crate) fn admin_data(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        index: u16,
        data: &[u8],
    ) {
        match queue.take_fetching(index) {
            Some(entry) => self.judge_data(engine, queue, Sqe::cast(&entry), data, Some(index)),
            None => self.end(engine, queue, index),
        }
    }

    fn judge_data(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        sqe: &Sqe,
        data: &[u8],
        index: Option<u16>,
    ) {
        match queue.role {
            Role::Unconnected(_) => {
                let (status, reply) = self.connect(queue, sqe, data);
                self.complete(engine, queue, sqe, index, status, reply.into_bits().into());
            }
            Role::Admin(_) => self.handle_admin(engine, queue, sqe, data, index),
            Role::Io(_) => {}
        }
    }

    /// Completes a command, whether it has a slot or not.
    fn complete(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        sqe: &Sqe,
        index: Option<u16>,
        status: Status,
        result: u64,
    ) {
        match index {
            Some(index) => {
                if let Some(slot) = queue.slot(index) {
                    slot.result = result;
                    slot.remote.invalidate = false;
                }
                self.finish(engine, queue, index, status);
            }
            None => {
                let mut slot = refusal(sqe.cid(), sqe.opcode, flexblk_nvme::Nsid::NONE);
                slot.result = result;
                self.finish_new(engine, queue, slot, status);
            }
        }
    }

    fn connect(&mut self, queue: &mut Queue, sqe: &Sqe, data: &[u8]) -> (Status, ConnectReply) {
        let Role::Unconnected(announced) = queue.role else {
            return (StatusCode::CommandSequenceError.dnr(), ConnectReply::new());
        };
        let (connect, data) = match (Fabrics::parse(sqe), ConnectData::view(data)) {
            (Ok(Fabrics::Connect(connect)), Some(data)) => (connect, data),
            (Ok(_), _) => return (StatusCode::DataSglLengthInvalid.dnr(), ConnectReply::new()),
            (Err(status), _) => return (status, ConnectReply::new()),
        };
        match self
            .shared
            .directory
            .connect(&connect, data, announced, self.id)
        {
            Ok(connected) => {
                let cntlid = self.connected(queue, &connect, connected);
                (Status::SUCCESS, ConnectReply::connected(cntlid))
            }
            Err(Refusal {
                status,
                reply,
                reason,
            }) => {
                let host = data.hostnqn().ok();
                self.record(Event {
                    status: status.bits(),
                    qid: connect.qid.get(),
                    cid: sqe.cid().get(),
                    ..Event::new(Kind::ConnectRefused, queue.peer)
                });
                tracing::warn!(peer = %queue.peer, host = ?host.as_ref().map(|nqn| nqn.as_str()), qid = %connect.qid, %reason, "Connect refused");
                (status, reply)
            }
        }
    }

    fn connected(
        &mut self,
        queue: &mut Queue,
        connect: &Connect,
        connected: Connected,
    ) -> flexblk_nvme::Cntlid {
        queue.flow_control = !connect.cattr.disable_sq_flow_control();
        match connected {
            Connected::Admin(association) => {
                let cntlid = association.cntlid;
                tracing::info!(%cntlid, host = association.hostnqn.as_str(), subsystem = association.subnqn.as_str(), peer = %queue.peer, "controller connected");
                self.record_controller(Kind::Connect, &association, queue.peer);
                let controller = Controller::new(association, connect.kato_ms, self.now);
                let liveness =
                    Liveness::new(self.shared.directory.limits().longest_silence, self.now);
                // Only the discovery log tells addresses.
                let own_ip = match controller.kind() {
                    controller::Kind::Discovery => parts::address_towards(queue.peer),
                    controller::Kind::Io => None,
                };
                self.connects.0 += 1;
                let admin = Admin {
                    controller,
                    own_ip,
                    liveness,
                };
                queue.timer = admin.next_timeout();
                queue.role = Role::Admin(Box::new(admin));
                cntlid
            }
            Connected::Io {
                association,
                queue: shared,
            } => {
                let cntlid = association.cntlid;
                tracing::debug!(%cntlid, qid = %connect.qid, thread = self.id, "I/O queue connected");
                let event = event_of(Kind::ConnectQueue, &association, connect.qid, queue.peer);
                self.record(event);
                queue.timer = None;
                let subsystem = self.snapshot.slot_of(&association).unwrap_or(usize::MAX);
                self.connects.1 += 1;
                queue.role = Role::Io(Io {
                    qid: connect.qid,
                    subsystem,
                    association,
                    shared,
                    series: Vec::new(),
                });
                cntlid
            }
        }
    }

    /// Lets the controller handle a command, and answers.
    fn handle_admin(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        sqe: &Sqe,
        data: &[u8],
        index: Option<u16>,
    ) {
        let Role::Admin(admin) = &mut queue.role else {
            return;
        };
        let environment = environment(
            &self.shared,
            &self.snapshot,
            admin,
            (queue.fabric, queue.in_capsule_bytes),
            self.now,
        );
        let reply = admin.controller.handle(sqe, data, &environment);
        match reply {
            Reply::Done(status, result) => self.complete(engine, queue, sqe, index, status, result),
            Reply::Data(bytes) => self.send_data(engine, queue, sqe, index, &bytes),
            Reply::Later => match index {
                Some(index) => self.end(engine, queue, index),
                None => self.credit(engine, queue),
            },
            Reply::Order(nsid, what) => {
                let cid = sqe.cid();
                if let Some(index) = index {
                    self.end(engine, queue, index);
                }
                let what = match what {
                    Change::Persist(on) => control::What::Persist(on),
                    Change::Protect(protection) => control::What::Protect(protection),
                };
                if !self.order(queue, None, cid, nsid, what) {
                    let status = Status::from(StatusCode::CommandInterrupted);
                    self.set_feature_answered(engine, queue, cid, status);
                }
                return;
            }
            Reply::Abort(sqid, cid) => {
                let association = std::sync::Arc::clone(admin.controller.association());
                let from = AbortFrom {
                    thread: self.id,
                    queue: queue.key,
                    cid: sqe.cid(),
                };
                self.tasks.push_back(Task::Abort {
                    association,
                    sqid,
                    cid,
                    from,
                });
            }
        }
        self.after_admin(queue);
    }

    /// Sends `bytes` to where the command wants them, and its completion.
    pub(super) fn send_data(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        sqe: &Sqe,
        index: Option<u16>,
        bytes: &[u8],
    ) {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let remote = match data::to_host(sqe, queue.fabric.addressing(), length) {
            Ok(remote) => remote,
            Err(status) => return self.complete(engine, queue, sqe, index, status, 0),
        };
        let mut slot = Slot::new(What::AdminOut, sqe.opcode, sqe.cid());
        slot.length = length;
        slot.remote = remote;
        slot.nsid = sqe.nsid();
        if let Some(index) = index {
            // No command has data both ways; should one appear, its first slot is not needed.
            self.end(engine, queue, index);
        }
        if let Some(index) = self.admit(engine, queue, slot) {
            self.want_buffers(engine, queue, index, Some(bytes));
        }
    }

    /// What the controller wants done after something has happened to it.
    pub(crate) fn after_admin(&mut self, queue: &mut Queue) {
        loop {
            let Role::Admin(admin) = &mut queue.role else {
                return;
            };
            if let Some((cid, dword)) = admin.controller.poll_event() {
                self.answer_event(queue, cid, Status::SUCCESS, dword.into());
                continue;
            }
            let Some(action) = admin.controller.poll_action() else {
                break;
            };
            match action {
                Action::CloseQueues(ending) => {
                    let association = std::sync::Arc::clone(admin.controller.association());
                    // A shutdown is recorded with its flush.
                    if ending == Ending::Reset {
                        self.record_controller(Kind::Reset, &association, queue.peer);
                    }
                    self.tasks.push_back(Task::CloseQueues(association));
                }
                Action::Flush => {
                    let association = std::sync::Arc::clone(admin.controller.association());
                    self.record_controller(Kind::Shutdown, &association, queue.peer);
                    self.tasks.push_back(Task::Flush(queue.key));
                }
                Action::AbortedEvent(cid) => {
                    let aborted = StatusCode::AbortRequested.into();
                    self.answer_event(queue, cid, aborted, 0);
                }
                Action::Terminate(reason) => {
                    self.tasks.push_back(Task::Terminate(queue.key, reason))
                }
            }
        }
        if let Role::Admin(admin) = &queue.role {
            queue.timer = admin.next_timeout();
        }
    }

    /// Completes an Asynchronous Event Request, whose credit the host has had back already.
    fn answer_event(&mut self, queue: &Queue, cid: flexblk_nvme::Cid, status: Status, result: u64) {
        let cqe = flexblk_nvme::Cqe::new(cid, status)
            .with_result(result)
            .with_sqhd(queue.head());
        self.late.push_back((queue.key, cqe));
    }

    /// The answer of an Abort command has come.
    pub(crate) fn abort_answered(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        cid: flexblk_nvme::Cid,
        aborted: bool,
    ) {
        use flexblk_nvme::command::admin::Abort;
        let Role::Admin(admin) = &mut queue.role else {
            return;
        };
        admin.controller.abort_done();
        let association = std::sync::Arc::clone(admin.controller.association());
        self.record(Event {
            cid: cid.get(),
            value: u64::from(aborted),
            ..event_of(
                Kind::Abort,
                &association,
                flexblk_nvme::Qid::ADMIN,
                queue.peer,
            )
        });
        let result = if aborted {
            Abort::ABORTED
        } else {
            Abort::NOT_ABORTED
        };
        let mut slot = refusal(
            cid,
            flexblk_nvme::command::admin::opcode::ABORT,
            flexblk_nvme::Nsid::NONE,
        );
        slot.result = result.into();
        slot.range.device = NO_DEVICE;
        self.finish_new(engine, queue, slot, Status::SUCCESS);
    }

    /// The answer to a Set Features that the control thread had to carry out has come.
    pub(crate) fn set_feature_answered(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        cid: flexblk_nvme::Cid,
        status: Status,
    ) {
        let opcode = flexblk_nvme::command::admin::opcode::SET_FEATURES;
        let slot = refusal(cid, opcode, flexblk_nvme::Nsid::NONE);
        self.finish_new(engine, queue, slot, status);
    }

    /// Flushes the next device of the subsystem after the one of the slot, for a shutdown; after the
    /// last the controller is told.
    pub(crate) fn shutdown_flush(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
        let Some(slot) = queue.slot(index).copied() else {
            return;
        };
        let next = self.next_flushable(queue, slot.range.device);
        self.devices.end(slot.range.device, engine, self.now);
        let Some(slot) = queue.slot(index) else {
            return;
        };
        slot.range.device = next.unwrap_or(NO_DEVICE);
        slot.counted = next.is_some();
        match next {
            Some(device) => {
                self.devices.begin(device);
                self.device_work.push_back((queue.key, index));
            }
            None => {
                self.end(engine, queue, index);
                self.flushed(queue);
            }
        }
    }

    /// Begins the flush of a shutdown.
    pub(crate) fn begin_flush(&mut self, engine: &mut Engine, queue: &mut Queue) {
        let Some(device) = self.next_flushable(queue, NO_DEVICE) else {
            return self.flushed(queue);
        };
        let mut slot = Slot::new(What::Shutdown, 0, flexblk_nvme::Cid::new(0));
        slot.range.device = device;
        slot.stage = queue::Stage::Device;
        match self.admit(engine, queue, slot) {
            Some(index) => self.device_work.push_back((queue.key, index)),
            None => self.flushed(queue),
        }
    }

    fn flushed(&mut self, queue: &mut Queue) {
        if let Role::Admin(admin) = &mut queue.role {
            admin.controller.note_flushed();
        }
        self.after_admin(queue);
    }

    /// The flushable device with the lowest number above `after` ([`NO_DEVICE`]: of all).
    fn next_flushable(&self, queue: &Queue, after: u32) -> Option<u32> {
        let Role::Admin(admin) = &queue.role else {
            return None;
        };
        let slot = admin.controller.association().subsystem?;
        let devices = self.subsystems.get(slot)?.as_ref()?.devices();
        let above = |device: &u32| after == NO_DEVICE || *device > after;
        devices
            .filter(above)
            .filter(|device| self.devices.is_flushable(*device))
            .min()
    }
}

/// What the controller sees.
fn environment<'a>(
    shared: &'a super::parts::Shared,
    snapshot: &'a crate::snapshot::Snapshot,
    admin: &Admin,
    (fabric, in_capsule_bytes): (Fabric, u32),
    now: std::time::Instant,
) -> Environment<'a> {
    Environment {
        snapshot,
        directory: &shared.directory,
        own_ip: admin.own_ip,
        port: admin.controller.association().port,
        transport: fabric.transport(),
        started: shared.started,
        can_persist: shared.can_persist,
        recorders: &shared.recorders,
        queue_bytes: queue::queue_bytes(USUAL_ENTRIES.min(shared.directory.limits().queue_entries)),
        in_capsule_bytes,
        now,
    }
}

/// Used by the abort of a thread: finds the queue of a controller.
pub(crate) fn is_queue_of(
    queue: &Queue,
    cntlid: flexblk_nvme::Cntlid,
    sqid: flexblk_nvme::Qid,
) -> bool {
    match &queue.role {
        Role::Io(io) => io.association.cntlid == cntlid && io.qid == sqid && !queue.closing,
        _ => false,
    }
}

/// The Admin queue of a controller.
pub(crate) fn is_admin_of(queue: &Queue, association: &crate::association::Association) -> bool {
    match &queue.role {
        Role::Admin(admin) => std::ptr::eq(&**admin.controller.association(), association),
        _ => false,
    }
}

/// A queue's key, for the log.
impl std::fmt::Display for QueueKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.index, self.generation)
    }
}
