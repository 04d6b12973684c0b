//! A data thread: its queue pairs, and the loop that drives them.
//!
//! [`Core`] is everything but sockets and clock: it takes messages, completions and time, and posts
//! requests to a FlexiNS engine, whatever port that engine has. [`run`] puts it on a reactor.

mod abort;
mod activities;
mod admin;
mod backend;
mod buffers;
mod copy;
mod devices;
pub(crate) mod fused;
mod gate;
mod io;
mod lifecycle;
mod liveness;
pub(crate) mod mail;
mod measure;
mod outbox;
pub(crate) mod parts;
mod ports;
pub(crate) mod preempt;
mod queue;
mod record;
mod respond;
pub(crate) mod run;
pub(crate) mod tcp;
mod transfer;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use flexblk_blockdev::{IoDone, Tokens};
use flexblk_nvme::command::Sqe;
use flexblk_nvme::{HostId, Nsid, StatusCode};
use flexblk_reactor::mailbox::TrySendError;
use flexblk_reactor::{Completion, Reactor};
use flexins::cm::ServiceId;
use flexins::engine::{Delivery, DeliveryKind, Engine};
use flexins::verbs::WorkCompletion;

use crate::controller::Reason;
use crate::error::StartError;
use crate::reservation::Notice;
use crate::snapshot::Snapshot;
use crate::stats::QueueReport;
use buffers::Buffers;
use devices::Devices;
use lifecycle::CqPool;
use liveness::Due;
use mail::{AbortFrom, Mail};
use outbox::Outbox;
use parts::{Parts, Shared, Task};
use preempt::{Preempt, Purge};
use queue::{Fabric, QueueKey, QueueTable, Role};
use tcp::{Tcp, TcpConfig};

pub(crate) use buffers::MIN_BYTES as MIN_BUFFER_BYTES;
pub(crate) use lifecycle::MAX_IN_CAPSULE_BYTES;
pub(crate) use queue::queue_bytes;

/// Owner number of block devices in the reactor's tokens.
pub(crate) const BDEV_OWNER: u8 = 2;
/// Owner number of the endpoint.
pub(crate) const PORT_OWNER: u8 = 1;
/// No device.
pub(crate) const NO_DEVICE: u32 = u32::MAX;

/// How long a connection may take to send Connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long other threads are not asked to make room again.
const MAKE_ROOM: Duration = Duration::from_millis(10);
/// Rounds of one poll: what the last round leaves comes with the next poll.
const ROUNDS: usize = 4;

/// The queues of a thread, without sockets and clock.
pub(crate) struct Core {
    parts: Parts,
    queues: QueueTable,
    cqs: CqPool,
    completions: Vec<WorkCompletion>,
    done: Vec<IoDone>,
    outbox: Outbox<Mail>,
    /// Rounds in which those who wait for buffers were asked.
    round: u64,
    preempts: Vec<Preempt>,
    purges: Vec<Purge>,
    /// FlexiNS services that are listened to, with their ports.
    services: Vec<(ServiceId, u16)>,
    /// The earliest timer of a queue, or earlier.
    next_timer: Option<Instant>,
    /// When other threads were last asked to make room.
    room_asked: Option<Instant>,
    draining: bool,
}

impl Core {
    /// A thread without queues; `buffer_bytes` is its share of the memory for I/O buffers.
    pub(crate) fn new(
        id: usize,
        shared: Arc<Shared>,
        buffer_bytes: u64,
        tcp: TcpConfig,
        engine: &mut Engine,
        reactor: &mut Reactor,
    ) -> Result<Self, StartError> {
        let pd = engine.alloc_pd();
        let (small, large) =
            buffers::counts(buffer_bytes).unwrap_or((64, buffers::MAX_PIECES as u32));
        let buffers = Buffers::new(small, large, engine, pd, reactor)?;
        let parts = Parts {
            id,
            shared,
            now: reactor.now(),
            now_us: 0,
            pd,
            buffers,
            devices: Devices::default(),
            tcp: Tcp::new(tcp),
            snapshot: Arc::default(),
            subsystems: Vec::new(),
            device_work: VecDeque::new(),
            fenced: VecDeque::new(),
            pairs: Vec::new(),
            next_pair: 0,
            waiters: VecDeque::new(),
            blocked: VecDeque::new(),
            late: VecDeque::new(),
            to_close: VecDeque::new(),
            tasks: VecDeque::new(),
            connects: (0, 0),
        };
        let mut core = Self {
            parts,
            queues: QueueTable::default(),
            cqs: CqPool::default(),
            completions: Vec::new(),
            done: Vec::new(),
            outbox: Outbox::new(),
            round: 0,
            preempts: Vec::new(),
            purges: Vec::new(),
            services: Vec::new(),
            next_timer: None,
            room_asked: None,
            draining: false,
        };
        let snapshot = core.parts.shared.directory.snapshot();
        core.listen(&snapshot, engine, reactor)?;
        core.apply_snapshot(snapshot, engine, reactor);
        Ok(core)
    }

    /// A message has arrived in place.
    #[inline]
    pub(crate) fn delivery(&mut self, engine: &mut Engine, delivery: &Delivery, packet: &[u8]) {
        let key = QueueKey::from_word(delivery.user);
        let Some(queue) = self.queues.get_mut(key).filter(|queue| !queue.closing) else {
            return;
        };
        match delivery.kind {
            DeliveryKind::Send => {
                self.parts
                    .capsule(engine, queue, delivery.payload.bytes(packet));
            }
            _ => {
                tracing::warn!(peer = %queue.peer, "a message that is no command capsule; the queue is closed");
                self.parts.to_close.push_back(key);
            }
        }
        let (is_short, timer) = (queue.is_short(), queue.timer);
        if timer.is_some() {
            self.note_timer(timer);
        }
        if is_short {
            // A train brings many commands, and with the first of them the acknowledgements.
            self.poll_completions(engine);
        }
    }

    /// Loads the memory that the next packet's command is going to write to. The packet has not been
    /// checked yet.
    #[inline]
    pub(crate) fn look_ahead(&self, engine: &Engine, packet: &[u8]) {
        if let Some((user, capsule)) = engine.foresee(packet)
            && let Some((sqe, data)) = Sqe::split(capsule)
            && let Some(queue) = self.queues.get(QueueKey::from_word(user))
        {
            self.parts.load_ahead(queue, sqe, data.len());
        }
    }

    /// The time as of now; call it before anything else in a turn.
    pub(crate) fn set_now(&mut self, now: Instant) {
        self.parts.now = now;
        let started = self.parts.shared.started;
        self.parts.now_us = now.saturating_duration_since(started).as_micros() as u32;
    }

    /// A completion with the owner number of block devices.
    pub(crate) fn device_completion(
        &mut self,
        engine: &mut Engine,
        reactor: &mut Reactor,
        completion: &Completion,
    ) {
        let index = Tokens::channel_of(completion.token);
        let Some(device) = self.parts.devices.get_mut(index) else {
            return;
        };
        device.channel.complete(reactor, completion, &mut self.done);
        let freed = !self.done.is_empty();
        for done in self.done.drain(..) {
            if let Some((queue, slot)) = self.queues.by_tag(done.tag) {
                self.parts.device_done(engine, queue, slot, done.result);
            }
        }
        // Room in the channel for those who found it full.
        if freed && let Some(device) = self.parts.devices.get_mut(index) {
            let room = device
                .channel
                .depth()
                .saturating_sub(device.channel.in_flight());
            let again = room.min(device.backlog.len());
            self.parts.device_work.extend(device.backlog.drain(..again));
        }
    }

    /// Does everything that has become possible: call it after deliveries, completions, mail and
    /// time-outs, before the endpoint's flush.
    pub(crate) fn poll(&mut self, engine: &mut Engine, reactor: &mut Reactor) {
        for _ in 0..ROUNDS {
            self.poll_completions(engine);
            self.poll_connections(engine);
            self.serve_waiters(engine);
            self.repost(engine);
            self.run_fused(engine);
            self.run_purges(engine);
            self.run_devices(engine, reactor);
            self.run_tasks(engine);
            self.resume_tcp(engine);
            self.close_touched();
            self.close_queues(engine);
            if !self.has_work() {
                break;
            }
        }
        self.send_mail();
    }

    /// Is there work that does not wait for anything?
    pub(crate) fn has_work(&self) -> bool {
        let parts = &self.parts;
        !(parts.device_work.is_empty() && parts.tasks.is_empty() && parts.to_close.is_empty())
    }

    /// Is there mail that found its mailbox full?
    pub(crate) fn has_unsent_mail(&self) -> bool {
        !self.outbox.is_empty()
    }

    fn poll_completions(&mut self, engine: &mut Engine) {
        for cq in self.cqs.iter() {
            engine.poll_cq(cq, &mut self.completions);
        }
        for wc in self.completions.drain(..) {
            if let Some(queue) = self.queues.get_mut(QueueKey::from_word(wc.user)) {
                self.parts.sent(engine, queue, &wc);
                if !matches!(queue.role, Role::Io(_)) {
                    self.next_timer = self.next_timer.into_iter().chain(queue.timer).min();
                }
            }
        }
    }

    /// Buffers for those who wait, first come first served among those whose queue may have more.
    fn serve_waiters(&mut self, engine: &mut Engine) {
        if !core::mem::take(&mut self.parts.buffers.returned) {
            return;
        }
        // A queue that has been refused is not asked again in this round: a host with all it may have, and hundreds
        // of commands behind that, keeps nobody else from what is there.
        self.round += 1;
        for _ in 0..self.parts.waiters.len() {
            let Some((key, slot)) = self.parts.waiters.pop_front() else {
                break;
            };
            let served = match self.queues.get_mut(key) {
                Some(queue) if queue.refused_in != self.round => {
                    let served = self.parts.buffers_for_waiter(engine, queue, slot);
                    if !served {
                        queue.refused_in = self.round;
                    }
                    served
                }
                Some(_) => false,
                None => true,
            };
            if !served {
                // All go round once, so the order stays.
                self.parts.waiters.push_back((key, slot));
            }
        }
    }

    fn repost(&mut self, engine: &mut Engine) {
        for _ in 0..self.parts.blocked.len() {
            let Some((key, slot)) = self.parts.blocked.pop_front() else {
                break;
            };
            if let Some(queue) = self.queues.get_mut(key) {
                self.parts.repost(engine, queue, slot);
            }
        }
        for _ in 0..self.parts.late.len() {
            let Some((key, cqe)) = self.parts.late.pop_front() else {
                break;
            };
            if let Some(queue) = self.queues.get_mut(key)
                && !self.parts.send_late(engine, queue, cqe)
            {
                self.parts.late.push_back((key, cqe));
            }
        }
    }

    fn run_devices(&mut self, engine: &mut Engine, reactor: &mut Reactor) {
        // A command may come back at once for its next step; that is the next round's.
        for _ in 0..self.parts.device_work.len() {
            let Some((key, slot)) = self.parts.device_work.pop_front() else {
                break;
            };
            if let Some(queue) = self.queues.get_mut(key) {
                self.parts.submit(engine, reactor, queue, slot);
            }
        }
    }

    fn run_tasks(&mut self, engine: &mut Engine) {
        while let Some(task) = self.parts.tasks.pop_front() {
            match task {
                Task::CloseQueues(association) => {
                    for thread in association.threads() {
                        if thread == self.parts.id {
                            self.close_queues_of(association.cntlid);
                        } else {
                            self.outbox
                                .push(thread, Mail::CloseQueues(association.cntlid));
                        }
                    }
                    self.note_queues_closed(&association);
                }
                Task::Terminate(key, reason) => self.terminate(key, reason),
                Task::Ask(key) => {
                    if let Some(queue) = self.queues.get_mut(key).filter(|queue| !queue.closing) {
                        match queue.fabric {
                            // Refused: then something before it waits for its acknowledgement.
                            Fabric::Flexins { qpn, .. } => {
                                let _ = liveness::ask(engine, qpn);
                            }
                            // The kernel asks, and ends the connection of a host that is dead.
                            Fabric::Tcp(_) => {
                                if let Role::Admin(admin) = &mut queue.role {
                                    admin.liveness.heard(self.parts.now);
                                }
                            }
                        }
                    }
                }
                Task::Flush(key) => {
                    if let Some(queue) = self.queues.get_mut(key) {
                        self.parts.begin_flush(engine, queue);
                    }
                }
                Task::Abort {
                    association,
                    sqid,
                    cid,
                    from,
                } => match association.thread_of(sqid) {
                    Some(thread) if thread == self.parts.id => {
                        let aborted = self.abort(engine, association.cntlid, sqid, cid);
                        self.aborted(engine, from, aborted);
                    }
                    Some(thread) => {
                        let cntlid = association.cntlid;
                        self.outbox.push(
                            thread,
                            Mail::Abort {
                                cntlid,
                                sqid,
                                cid,
                                from,
                            },
                        );
                    }
                    None => self.aborted(engine, from, false),
                },
            }
        }
    }

    /// Aborts a command, if it can be (see [`Parts::abort_command`]).
    fn abort(
        &mut self,
        engine: &mut Engine,
        cntlid: flexblk_nvme::Cntlid,
        sqid: flexblk_nvme::Qid,
        cid: flexblk_nvme::Cid,
    ) -> bool {
        let Some(queue) = self
            .queues
            .iter_mut()
            .find(|queue| admin::is_queue_of(queue, cntlid, sqid))
        else {
            return false;
        };
        let Some(slot) = queue.find(cid) else {
            return false;
        };
        let status = StatusCode::AbortRequested.into();
        self.parts.abort_command(engine, queue, slot, status)
    }

    fn aborted(&mut self, engine: &mut Engine, from: AbortFrom, aborted: bool) {
        if from.thread != self.parts.id {
            self.outbox
                .push(from.thread, Mail::Aborted { from, aborted });
        } else if let Some(queue) = self.queues.get_mut(from.queue) {
            self.parts.abort_answered(engine, queue, from.cid, aborted);
        }
    }

    /// A message from another thread. What it asks for is done by the next [`Core::poll`].
    pub(crate) fn mail(&mut self, mail: Mail, engine: &mut Engine, reactor: &mut Reactor) {
        match mail {
            Mail::Snapshot(snapshot) => self.apply_snapshot(snapshot, engine, reactor),
            Mail::CloseQueues(cntlid) => self.close_queues_of(cntlid),
            Mail::QueueClosed(association) => self.note_queues_closed(&association),
            Mail::Abort {
                cntlid,
                sqid,
                cid,
                from,
            } => {
                let aborted = self.abort(engine, cntlid, sqid, cid);
                self.aborted(engine, from, aborted);
            }
            Mail::Aborted { from, aborted } => self.aborted(engine, from, aborted),
            Mail::Fence { claim, from } => self.put_fence(claim, from),
            Mail::Fenced(id) => self.fence_drained(id),
            Mail::Unfence(id) => self.remove_fence(id),
            Mail::Queues(reply) => {
                // Whoever asked may have stopped waiting.
                let _ = reply.try_send(self.queue_reports());
            }
            Mail::Ordered {
                from,
                subsystem,
                nsid,
                status,
                abort,
            } => self.ordered(engine, from, subsystem, nsid, status, &abort),
            Mail::Reservations {
                subsystem,
                nsid,
                notices,
            } => self.tell_hosts(subsystem, nsid, &notices),
            Mail::Loss(host) => self.note_loss(host),
            Mail::MakeRoom => self.evict_stranger(),
            Mail::Purge(purge) => self.begin_purge(engine, purge),
            Mail::Purged(id) => self.purged(engine, id),
            // The loop's own.
            Mail::Capture(_) | Mail::Stats(_) | Mail::Shutdown => {}
        }
    }

    fn send_mail(&mut self) {
        let Some(mailboxes) = self.parts.shared.mail.get() else {
            return;
        };
        self.outbox.send(|thread, mail| {
            match mailboxes.get(thread).map(|mailbox| mailbox.try_send(mail)) {
                Some(Err(TrySendError::Full(mail))) => Err(mail),
                // A thread that is gone has closed its queues: what it cannot take any more is no loss.
                _ => Ok(()),
            }
        });
    }

    fn apply_snapshot(
        &mut self,
        snapshot: Arc<Snapshot>,
        engine: &mut Engine,
        reactor: &mut Reactor,
    ) {
        if let Err(error) = self.listen(&snapshot, engine, reactor) {
            let thread = self.parts.id;
            tracing::error!(%error, thread, "an address cannot be listened on by this thread");
        }
        let generation = self.parts.snapshot.generation;
        let before = Arc::clone(&self.parts.snapshot);
        let changes = self.parts.apply(snapshot, engine, reactor);
        let epoch = self.parts.snapshot.epoch;
        if let Some(own) = self.parts.shared.epochs.get(self.parts.id) {
            own.store(epoch, Ordering::Release);
        }
        let discovery = self.parts.snapshot.generation != generation;
        for queue in self.queues.iter_mut() {
            if let Role::Io(io) = &mut queue.role {
                let snapshot = &self.parts.snapshot;
                io.subsystem = snapshot.slot_of(&io.association).unwrap_or(usize::MAX);
            }
            if let Role::Io(io) = &mut queue.role
                && changes.iter().any(|(slot, _)| *slot == io.subsystem)
            {
                // Another device has numbers of its own.
                io.series.clear();
            }
            let Role::Admin(admin) = &mut queue.role else {
                continue;
            };
            let association = admin.controller.association();
            match association.subsystem {
                Some(slot) => match self.parts.snapshot.subsystem(slot) {
                    Some(subsystem)
                        if subsystem.nqn == association.subnqn
                            && subsystem.hosts.allows(&association.hostnqn)
                            && self.parts.snapshot.is_reached(subsystem, queue.port) =>
                    {
                        let own = changes.iter().filter(|(changed, _)| *changed == slot);
                        let host = &association.hostnqn;
                        let nsids: Vec<_> = own
                            .flat_map(|(_, changes)| changes)
                            .filter_map(|changed| changed.seen_by(host))
                            .collect();
                        let ana = before.subsystem(slot).is_some_and(|before| {
                            subsystem.ana_differs(before, host, association.port)
                        });
                        admin.controller.note_namespaces_changed(&nsids);
                        if ana {
                            admin.controller.note_ana_changed();
                        }
                    }
                    _ => admin.controller.note_not_allowed(),
                },
                None if self.parts.snapshot.port(queue.port).is_none() => {
                    admin.controller.note_not_allowed();
                }
                None if discovery => admin.controller.note_discovery_changed(),
                None => {}
            }
            self.parts.after_admin(queue);
        }
    }

    /// Hosts of a subsystem get notices about reservations of a namespace.
    fn tell_hosts(&mut self, subsystem: usize, nsid: Nsid, notices: &[(HostId, Notice)]) {
        for queue in self.queues.iter_mut() {
            let Role::Admin(admin) = &mut queue.role else {
                continue;
            };
            let association = Arc::clone(admin.controller.association());
            if association.subsystem != Some(subsystem) {
                continue;
            }
            for (host, notice) in notices {
                if *host == association.hostid {
                    admin.controller.note_reservation(nsid, *notice);
                }
            }
            self.parts.after_admin(queue);
        }
    }

    /// A host has lost a connection without having asked for it: its controllers, of all threads, are
    /// told.
    pub(super) fn tell_of_loss(&mut self, host: u64) {
        for thread in 0..self.parts.shared.recorders.len() {
            if thread != self.parts.id {
                self.outbox.push(thread, Mail::Loss(host));
            }
        }
        self.note_loss(host);
    }

    fn note_loss(&mut self, host: u64) {
        for queue in self.queues.iter_mut() {
            if let Role::Admin(admin) = &mut queue.role
                && admin.controller.association().host_tag == host
                && admin.controller.association().is_ready()
            {
                admin.controller.note_loss();
                self.parts.after_admin(queue);
            }
        }
    }

    /// When [`Core::handle_timeout`] is due.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        let buried = self.parts.devices.next_timeout();
        let tcp = self.parts.tcp.next_timeout();
        self.next_timer.into_iter().chain(buried).chain(tcp).min()
    }

    /// Keep-alive, connections that never sent Connect, memory whose time of grace is over.
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        self.parts.devices.bury(now);
        self.parts.tcp.handle_timeout(now);
        if self.next_timer.is_none_or(|at| at > now) {
            return;
        }
        self.next_timer = None;
        for queue in self.queues.iter_mut() {
            if queue.closing {
                continue;
            }
            if queue.timer.is_some_and(|at| at <= now) {
                match &mut queue.role {
                    Role::Admin(admin) => {
                        if admin.controller.next_timeout().is_some() {
                            admin.controller.handle_timeout(now);
                        } else {
                            match admin.liveness.due(now) {
                                Due::Nothing => {}
                                Due::Ask => self.parts.tasks.push_back(Task::Ask(queue.key)),
                                Due::Dead => {
                                    let dead = Task::Terminate(queue.key, Reason::Silence);
                                    self.parts.tasks.push_back(dead);
                                }
                            }
                        }
                        self.parts.after_admin(queue);
                    }
                    Role::Unconnected(_) => {
                        tracing::info!(peer = %queue.peer, "a connection without Connect is closed");
                        queue.timer = None;
                        self.parts.to_close.push_back(queue.key);
                    }
                    Role::Io(_) => queue.timer = None,
                }
            }
            self.next_timer = self.next_timer.into_iter().chain(queue.timer).min();
        }
    }

    /// Timers of queues may have changed: find the earliest.
    fn note_timer(&mut self, at: Option<Instant>) {
        self.next_timer = self.next_timer.into_iter().chain(at).min();
    }

    /// Queues, controllers, open devices, free buffers, waits for buffers.
    pub(crate) fn figures(&mut self) -> Figures {
        let (mut controllers, mut unconnected) = (0, 0);
        for queue in self.queues.iter_mut() {
            match queue.role {
                Role::Admin(_) => controllers += 1,
                Role::Unconnected(_) => unconnected += 1,
                Role::Io(_) => {}
            }
        }
        Figures {
            queues: self.queues.len(),
            unconnected_queues: unconnected,
            connects: self.parts.connects,
            controllers,
            devices: self.parts.devices.len(),
            pending_bdev_io: self.parts.devices.in_flight(),
            free_buffers: self.parts.buffers.available(),
            buffer_waits: self.parts.buffers.waits,
            tcp: self.parts.tcp.counters(),
        }
    }

    fn queue_reports(&mut self) -> Vec<QueueReport> {
        let thread = self.parts.id;
        let report = |queue: &mut queue::Queue| {
            let (association, qid) = match &queue.role {
                Role::Admin(admin) => (admin.controller.association(), flexblk_nvme::Qid::ADMIN),
                Role::Io(io) => (&io.association, io.qid),
                Role::Unconnected(_) => return None,
            };
            Some(QueueReport {
                thread,
                cntlid: association.cntlid,
                qid,
                subnqn: association.subnqn.clone(),
                hostnqn: association.hostnqn.clone(),
                transport: queue.fabric.transport(),
                port: queue.port,
                peer: queue.peer,
                closing: queue.closing,
            })
        };
        self.queues.iter_mut().filter_map(report).collect()
    }
}

/// Numbers of a thread, for statistics.
pub(crate) struct Figures {
    pub(crate) queues: usize,
    pub(crate) unconnected_queues: usize,
    pub(crate) connects: (u64, u64),
    pub(crate) controllers: usize,
    pub(crate) devices: usize,
    pub(crate) pending_bdev_io: usize,
    pub(crate) free_buffers: (u32, u32),
    pub(crate) buffer_waits: u64,
    pub(crate) tcp: std::collections::BTreeMap<&'static str, u64>,
}
