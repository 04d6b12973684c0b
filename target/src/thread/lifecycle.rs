//! Queue pairs coming and going: connection requests, tear-down, what is freed when.

use std::net::SocketAddr;
use std::sync::Arc;

use flexblk_nvme::flexins::{NvmeParams, ParamFlags};
use flexblk_nvme::rdma::{AcceptPrivate, RejectPrivate, RejectStatus, RequestPrivate};
use flexblk_nvme::{Cntlid, Qid};
use flexins::cm::{ConnId, Params, RejectReason};
use flexins::engine::{ConnEvent, Engine};
use flexins::verbs::{AckRequest, Cq, QpInit};

use super::mail::Mail;
use super::parts::Task;
use super::queue::{
    Fabric, Queue, QueueKey, QueueTable, Role, queue_bytes, send_requests_for, slots_for,
};
use super::record::kind_of;
use super::{CONNECT_TIMEOUT, Core, MAKE_ROOM};
use crate::association::Association;
use crate::controller::Reason;
use crate::directory::Announced;
use crate::queue::ADMIN_ENTRIES;
use crate::recorder::Kind;

/// Most bytes of data in a command capsule.
pub(crate) const MAX_IN_CAPSULE_BYTES: u32 = 8192;
/// Completions of one completion queue: several queue pairs share one, so that a turn looks at few.
const CQ_CAPACITY: u32 = 16_384;

/// Completion queues, and how much of each is promised.
#[derive(Default)]
pub(super) struct CqPool {
    used: Vec<(Cq, u32)>,
}

impl CqPool {
    pub(super) fn iter(&self) -> impl Iterator<Item = Cq> {
        self.used.iter().map(|(cq, _)| *cq)
    }

    fn take(&mut self, count: u32, engine: &mut Engine) -> Option<Cq> {
        if let Some((cq, used)) = self
            .used
            .iter_mut()
            .find(|(_, used)| used.saturating_add(count) <= CQ_CAPACITY)
        {
            *used += count;
            return Some(*cq);
        }
        let cq = engine.create_cq(CQ_CAPACITY.max(count)).ok()?;
        self.used.push((cq, count));
        Some(cq)
    }

    fn put(&mut self, cq: Cq, count: u32, engine: &mut Engine) {
        let Some(at) = self.used.iter().position(|(own, _)| *own == cq) else {
            return;
        };
        if let Some((_, used)) = self.used.get_mut(at) {
            *used = used.saturating_sub(count);
            // The first one stays: a host that reconnects finds it.
            if *used == 0 && at > 0 && engine.destroy_cq(cq).is_ok() {
                self.used.swap_remove(at);
            }
        }
    }
}

impl Core {
    /// What has happened to connections.
    pub(super) fn poll_connections(&mut self, engine: &mut Engine) {
        while let Some(event) = engine.poll_cm() {
            match event {
                ConnEvent::ConnectRequest {
                    conn,
                    from,
                    service,
                    private,
                    params,
                } => {
                    let at = (from, self.port_of(service));
                    let answer = self.connect_request(engine, conn, at, &private, params);
                    if let Err(status) = answer {
                        tracing::warn!(peer = %from, %status, "connection refused");
                        let private = RejectPrivate::new(status);
                        // Fails when the peer has given up meanwhile.
                        let now = self.parts.now;
                        let _ = engine.reject(conn, RejectReason::Consumer, private.bytes(), now);
                    }
                }
                ConnEvent::Disconnected { user, reason, .. } => {
                    tracing::debug!(queue = %QueueKey::from_word(user), ?reason, "disconnected");
                    self.parts.to_close.push_back(QueueKey::from_word(user));
                }
                ConnEvent::Broken { user, status, .. } => {
                    let key = QueueKey::from_word(user);
                    if let Some(queue) = self.queues.get_mut(key) {
                        tracing::warn!(peer = %queue.peer, %status, "a queue pair has failed");
                    }
                    self.parts.to_close.push_back(key);
                }
                // The accepting end has had everything when it accepted; it never connects.
                ConnEvent::Established { .. }
                | ConnEvent::Rejected { .. }
                | ConnEvent::Unreachable { .. } => {}
            }
        }
    }

    /// Judges a connection request by its NVMe/RDMA private data, and makes its queue pair.
    fn connect_request(
        &mut self,
        engine: &mut Engine,
        conn: ConnId,
        (from, port): (SocketAddr, u16),
        private: &[u8],
        params: Option<Params>,
    ) -> Result<(), RejectStatus> {
        if self.draining {
            return Err(RejectStatus::NoResources);
        }
        let request = RequestPrivate::parse(private)?;
        let announced = self.announced(&request, port)?;
        let (in_capsule_bytes, agreed) = agree(&request, params);
        let bytes = queue_bytes(announced.entries);
        let cntlid = if announced.qid.is_admin() {
            Cntlid::DYNAMIC
        } else {
            request.cntlid()
        };
        let memory = self.parts.shared.directory.reserve_queue(cntlid, bytes);
        let Some(memory) = memory else {
            self.make_room();
            return Err(RejectStatus::NoResources);
        };

        let requests = send_requests_for(announced.entries);
        let cq = self
            .cqs
            .take(requests, engine)
            .ok_or(RejectStatus::NoResources)?;
        let key = self.queues.next_key();
        let init = QpInit {
            pd: self.parts.pd,
            send_cq: cq,
            recv_cq: cq,
            max_send_wr: requests,
            max_recv_wr: slots_for(announced.entries),
            // Data in several pieces goes in as many requests: a gather list in every request
            // would cost more than the queue's commands.
            max_sge: 1,
            max_inline: flexblk_nvme::Cqe::SIZE as u32,
            inline_recv: false,
            ack_request: AckRequest::Never,
            user: key.to_word(),
        };
        let now = self.parts.now;
        let accepted = engine
            .create_qp(&init)
            .map_err(|error| error.to_string())
            .and_then(|qpn| {
                let mut accept = AcceptPrivate::new(announced.entries);
                if let Some(agreed) = agreed {
                    accept.extension = agreed.emit();
                }
                let answer = engine.accept(conn, qpn, accept.bytes(), now);
                let answer = answer.map_err(|error| error.to_string()).and_then(|()| {
                    let credits = slots_for(announced.entries);
                    engine
                        .post_recv_in_place(qpn, credits)
                        .map_err(|error| error.to_string())
                });
                match answer {
                    Ok(()) => Ok(qpn),
                    Err(error) => {
                        let _ = engine.destroy_qp(qpn, now);
                        Err(error)
                    }
                }
            });
        let made = accepted.and_then(|qpn| match engine.query_qp(qpn) {
            Ok(attributes) => Ok((qpn, attributes.segments())),
            Err(error) => Err(error.to_string()),
        });
        let (qpn, segments) = match made {
            Ok(made) => made,
            Err(error) => {
                tracing::warn!(peer = %from, %error, "a queue pair could not be made");
                self.cqs.put(cq, requests, engine);
                return Err(RejectStatus::NoResources);
            }
        };
        let immediate =
            agreed.is_some_and(|agreed| agreed.flags.contains(ParamFlags::IMMEDIATE_COMPLETIONS));
        let timer = now + CONNECT_TIMEOUT;
        let fabric = Fabric::Flexins {
            qpn,
            cq,
            immediate,
            segments,
        };
        self.queues.insert(Queue::new(
            key,
            fabric,
            announced,
            from,
            in_capsule_bytes,
            memory,
            timer,
        ));
        self.note_timer(Some(timer));
        Ok(())
    }

    /// The queue that a request announces, within our limits (RDMA 3.2).
    fn announced(&self, request: &RequestPrivate, port: u16) -> Result<Announced, RejectStatus> {
        let limits = self.parts.shared.directory.limits();
        let qid = request.qid();
        let most = match qid {
            Qid::ADMIN => ADMIN_ENTRIES.max(limits.queue_entries),
            _ => limits.queue_entries,
        };
        // Its Number of Queues may be less; that is known when Connect has named the controller.
        if qid.get() > limits.io_queues {
            return Err(RejectStatus::InvalidQid);
        }
        let entries = u16::try_from(request.send_entries())
            .ok()
            .filter(|entries| *entries <= most);
        let entries = entries
            .filter(|entries| *entries >= 2)
            .ok_or(RejectStatus::InvalidHsqsize)?;
        // Every command may be answered while the host has no other answer read.
        if request.hrqsize.get() < entries.saturating_sub(1) {
            return Err(RejectStatus::InvalidHrqsize);
        }
        Ok(Announced { qid, entries, port })
    }

    /// Closes the queues that are to be closed, and frees the closing ones whose commands have ended.
    pub(super) fn close_queues(&mut self, engine: &mut Engine) {
        for _ in 0..self.parts.to_close.len() {
            let Some(key) = self.parts.to_close.pop_front() else {
                return;
            };
            let Some(queue) = self.queues.get_mut(key) else {
                continue;
            };
            if !queue.closing {
                queue.closing = true;
                queue.timer = None;
                match queue.fabric {
                    // Fails when the connection is gone already; the queue pair is flushed then.
                    Fabric::Flexins { qpn, .. } => {
                        let _ = engine.disconnect(qpn, self.parts.now);
                    }
                    Fabric::Tcp(conn) => self.parts.tcp.close(conn),
                }
                if let Role::Admin(admin) = &queue.role {
                    // The controller ends with its Admin queue (Base 3.3.1).
                    let association = Arc::clone(admin.controller.association());
                    association.set_ready(false);
                    self.parts.shared.directory.remove(&association);
                    self.parts
                        .record_controller(Kind::Disconnect, &association, queue.peer);
                    tracing::info!(cntlid = %association.cntlid, host = association.hostnqn.as_str(), "controller disconnected");
                    self.parts.tasks.push_back(Task::CloseQueues(association));
                }
                // Commands that wait for buffers or room end now; the flushed ones with their
                // completions, those with a device when it has finished.
                self.end_waiting(engine, key);
            }
            let Some(queue) = self.queues.get_mut(key) else {
                continue;
            };
            if let Fabric::Tcp(conn) = queue.fabric {
                self.parts.end_with_connection(engine, queue, conn);
            }
            if !queue.is_busy() {
                self.free_queue(engine, key);
            }
        }
    }

    /// Memory has run out, which all threads share: each takes a queue from whoever has had it for longest without
    /// connecting it to a controller, so that somebody who may get one does with the next attempt.
    pub(super) fn make_room(&mut self) {
        self.evict_stranger();
        let now = self.parts.now;
        if self.room_asked.is_some_and(|at| now < at + MAKE_ROOM) {
            return;
        }
        self.room_asked = Some(now);
        for thread in 0..self.parts.shared.recorders.len() {
            if thread != self.parts.id {
                self.outbox.push(thread, Mail::MakeRoom);
            }
        }
    }

    pub(super) fn evict_stranger(&mut self) {
        let strangers = self.queues.iter_mut();
        let strangers =
            strangers.filter(|queue| matches!(queue.role, Role::Unconnected(_)) && !queue.closing);
        if let Some(oldest) = strangers.min_by_key(|queue| queue.timer) {
            tracing::info!(peer = %oldest.peer, "a queue that has not been connected goes: memory is short");
            self.parts.to_close.push_back(oldest.key);
        }
    }

    fn end_waiting(&mut self, engine: &mut Engine, key: QueueKey) {
        let Some(queue) = self.queues.get_mut(key) else {
            return;
        };
        for slot in queue.waiting() {
            self.parts.end(engine, queue, slot);
        }
        self.parts.waiters.retain(|(owner, _)| *owner != key);
        self.parts.blocked.retain(|(owner, _)| *owner != key);
    }

    /// A closing queue without commands: everything of it goes back.
    fn free_queue(&mut self, engine: &mut Engine, key: QueueKey) {
        let Some(queue) = self.queues.remove(key) else {
            return;
        };
        match queue.fabric {
            Fabric::Flexins { qpn, cq, .. } => {
                if let Err(error) = engine.destroy_qp(qpn, self.parts.now) {
                    tracing::warn!(%error, "removing a queue pair");
                }
                self.cqs.put(cq, send_requests_for(queue.entries), engine);
            }
            Fabric::Tcp(conn) => self.parts.tcp.queue_freed(conn),
        }
        if let Role::Io(io) = &queue.role {
            io.association.remove_queue(io.qid);
            let association = Arc::clone(&io.association);
            if association.thread == self.parts.id {
                self.note_queues_closed(&association);
            } else {
                self.outbox
                    .push(association.thread, Mail::QueueClosed(association));
            }
        }
    }

    /// Closes every I/O queue of a controller on this thread.
    pub(super) fn close_queues_of(&mut self, cntlid: Cntlid) {
        for queue in self.queues.iter_mut() {
            if matches!(&queue.role, Role::Io(io) if io.association.cntlid == cntlid) {
                self.parts.to_close.push_back(queue.key);
            }
        }
    }

    /// I/O queues of a controller whose Admin queue is here are gone.
    pub(super) fn note_queues_closed(&mut self, association: &Association) {
        let admin = self
            .queues
            .iter_mut()
            .find(|queue| super::admin::is_admin_of(queue, association));
        let Some(queue) = admin else { return };
        if let Role::Admin(admin) = &mut queue.role {
            admin.controller.note_queues_closed();
        }
        self.parts.after_admin(queue);
    }

    pub(super) fn terminate(&mut self, key: QueueKey, reason: Reason) {
        let Some(queue) = self.queues.get_mut(key) else {
            return;
        };
        let mut host = None;
        if let Role::Admin(admin) = &queue.role {
            let association = admin.controller.association();
            host = Some(association.host_tag);
            self.parts
                .record_controller(kind_of(reason), association, queue.peer);
            let reason = match reason {
                Reason::KeepAlive => "no command within the keep-alive time-out",
                Reason::Idle => "no command for two minutes, and Keep Alive is not active",
                Reason::Silence => {
                    "keep-alive is off, and the host's transport does not answer any more"
                }
                Reason::NotAllowed => {
                    "the subsystem, its listener, or the host's right to it is gone"
                }
            };
            tracing::warn!(cntlid = %association.cntlid, host = association.hostnqn.as_str(), peer = %queue.peer, reason, "controller closed");
        }
        self.parts.to_close.push_back(key);
        if let Some(host) = host {
            self.tell_of_loss(host);
        }
    }

    /// Closes every queue, and takes no more.
    pub(crate) fn drain(&mut self, engine: &mut Engine) {
        self.draining = true;
        for (service, _) in self.services.drain(..) {
            engine.unlisten(service);
        }
        let queues: &mut QueueTable = &mut self.queues;
        for queue in queues.iter_mut() {
            self.parts.to_close.push_back(queue.key);
        }
        self.parts.tcp.drain();
    }

    /// Is everything closed, and nothing with a device any more?
    pub(crate) fn is_drained(&self) -> bool {
        self.queues.len() == 0
            && !self.parts.devices.is_busy()
            && self.outbox.is_empty()
            && self.parts.tcp.is_empty()
    }
}

/// In-capsule data and FlexiNS features that both ends have. A capsule must fit into one packet.
fn agree(request: &RequestPrivate, params: Option<Params>) -> (u32, Option<NvmeParams>) {
    let entry = flexblk_nvme::Sqe::SIZE as u32;
    let fits = params.map_or(MAX_IN_CAPSULE_BYTES, |params| {
        u32::from(params.mtu_bytes).saturating_sub(entry) / 16 * 16
    });
    let own = NvmeParams {
        in_capsule_bytes: fits.min(MAX_IN_CAPSULE_BYTES),
        flags: ParamFlags::IMMEDIATE_COMPLETIONS,
    };
    let agreed = NvmeParams::parse(&request.extension).map(|offer| offer.agree(&own));
    (
        agreed.map_or(own.in_capsule_bytes, |agreed| agreed.in_capsule_bytes),
        agreed,
    )
}
