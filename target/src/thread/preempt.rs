//! Orders to the control thread and their answers; Preempt and Abort (Base 8.1.22.6), which ends
//! only when no command of a preempted host is under way any more.

use std::sync::Arc;

use flexblk_nvme::command::reservation::{
    ReservationAcquire, ReservationKeys, ReservationRegister, ReservationRelease,
};
use flexblk_nvme::{Cid, HostId, Nsid, Status, StatusCode};
use flexins::engine::Engine;

use super::Core;
use super::mail::{Mail, Place};
use super::parts::Parts;
use super::queue::{Queue, QueueTable, Role, Slot, Stage};
use super::respond::RETRY_SOON;
use crate::control::{Asker, From, Order, What};
use crate::queue::request::Reserve;
use crate::reservation::Action;

/// A Preempt and Abort of ours that waits for the threads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Preempt {
    id: u64,
    from: From,
    threads: usize,
}

/// Commands of preempted hosts on this thread that are to end.
#[derive(Clone, Debug)]
pub(crate) struct Purge {
    pub(crate) id: u64,
    /// Whom to tell when they have.
    pub(crate) thread: usize,
    pub(crate) subsystem: usize,
    pub(crate) nsid: Nsid,
    pub(crate) hosts: Arc<[HostId]>,
}

impl Parts {
    /// Gives the control thread something to do for a command; false when it has too much.
    pub(super) fn order(
        &mut self,
        queue: &Queue,
        slot: Option<u16>,
        cid: Cid,
        nsid: Nsid,
        what: What,
    ) -> bool {
        let association = match &queue.role {
            Role::Io(io) => Some(&io.association),
            Role::Admin(admin) => Some(admin.controller.association()),
            Role::Unconnected(_) => None,
        };
        let place = Place {
            thread: self.id,
            queue: queue.key,
        };
        association.is_some_and(|association| {
            self.shared.desk.order(Order {
                subsystem: association.subsystem.unwrap_or(usize::MAX),
                subnqn: association.subnqn.clone(),
                nsid,
                what,
                from: Asker::Command(From { place, slot, cid }),
            })
        })
    }

    /// The data of a reservation command has come.
    pub(super) fn reserve(&mut self, engine: &mut Engine, queue: &mut Queue, index: u16) {
        let Some(slot) = queue.slot(index).copied() else {
            return;
        };
        let (Some(action), Role::Io(io)) = (self.reserve_action(&slot), &queue.role) else {
            return self.finish(engine, queue, index, StatusCode::InternalError.into());
        };
        let what = What::Reserve(io.association.hostid, action);
        self.order_for(engine, queue, index, what);
    }

    /// Gives the control thread what a command waits for; the command ends when there is no room.
    pub(super) fn order_for(
        &mut self,
        engine: &mut Engine,
        queue: &mut Queue,
        index: u16,
        what: What,
    ) {
        let Some(slot) = queue.slot(index).copied() else {
            return;
        };
        if self.order(queue, Some(index), slot.cid, slot.nsid, what) {
            if let Some(slot) = queue.slot(index) {
                slot.stage = Stage::Control;
            }
        } else {
            let status = Status::from(StatusCode::CommandInterrupted).with_crd(RETRY_SOON);
            self.finish(engine, queue, index, status);
        }
    }
}

impl Core {
    /// The control thread has answered.
    pub(super) fn ordered(
        &mut self,
        engine: &mut Engine,
        from: From,
        subsystem: usize,
        nsid: Nsid,
        status: Status,
        hosts: &Arc<[HostId]>,
    ) {
        if hosts.is_empty() {
            return self.answer_order(engine, from, status);
        }
        self.parts.next_pair += 1;
        let id = self.parts.next_pair;
        self.preempts.push(Preempt {
            id,
            from,
            threads: self.parts.shared.threads,
        });
        for thread in 0..self.parts.shared.threads {
            let purge = Purge {
                id,
                thread: self.parts.id,
                subsystem,
                nsid,
                hosts: Arc::clone(hosts),
            };
            if thread == self.parts.id {
                self.begin_purge(engine, purge);
            } else {
                self.outbox.push(thread, Mail::Purge(purge));
            }
        }
    }

    fn answer_order(&mut self, engine: &mut Engine, from: From, status: Status) {
        let Some(queue) = self.queues.get_mut(from.place.queue) else {
            return;
        };
        match from.slot {
            Some(index) => {
                let waits = |slot: &mut Slot| slot.stage == Stage::Control && slot.cid == from.cid;
                if queue.slot(index).is_some_and(waits) {
                    self.parts.finish(engine, queue, index, status);
                }
            }
            None => self
                .parts
                .set_feature_answered(engine, queue, from.cid, status),
        }
    }

    /// Aborts what can be of the preempted hosts' commands; the rest is waited for.
    pub(super) fn begin_purge(&mut self, engine: &mut Engine, purge: Purge) {
        let status: Status = StatusCode::AbortedPreemptAndAbort.dnr();
        for queue in self.queues.iter_mut() {
            if is_preempted(queue, &purge) {
                for index in queue.matching(|slot| concerns(slot, &purge)) {
                    self.parts.abort_command(engine, queue, index, status);
                }
            }
        }
        self.purges.push(purge);
    }

    /// Tells the threads that wait for it when a purge is over.
    pub(super) fn run_purges(&mut self, engine: &mut Engine) {
        if self.purges.is_empty() {
            return;
        }
        for at in (0..self.purges.len()).rev() {
            let busy = self
                .purges
                .get(at)
                .is_some_and(|purge| is_busy(&mut self.queues, purge));
            if busy {
                continue;
            }
            let purge = self.purges.swap_remove(at);
            if purge.thread == self.parts.id {
                self.purged(engine, purge.id);
            } else {
                self.outbox.push(purge.thread, Mail::Purged(purge.id));
            }
        }
    }

    /// A thread has no command of the preempted hosts any more.
    pub(super) fn purged(&mut self, engine: &mut Engine, id: u64) {
        let Some(at) = self.preempts.iter().position(|preempt| preempt.id == id) else {
            return;
        };
        let Some(preempt) = self.preempts.get_mut(at) else {
            return;
        };
        preempt.threads = preempt.threads.saturating_sub(1);
        if preempt.threads == 0 {
            let from = self.preempts.swap_remove(at).from;
            self.answer_order(engine, from, Status::SUCCESS);
        }
    }
}

fn is_preempted(queue: &Queue, purge: &Purge) -> bool {
    match &queue.role {
        Role::Io(io) => {
            io.subsystem == purge.subsystem && purge.hosts.contains(&io.association.hostid)
        }
        _ => false,
    }
}

/// Could the command still change something, or begin to?
fn concerns(slot: &Slot, purge: &Purge) -> bool {
    let answered = matches!(
        slot.stage,
        Stage::Free | Stage::Response | Stage::Abandoned | Stage::Control
    ) || slot.stage == Stage::Post && !slot.fetches;
    // Of data that is still to come into buffers nothing is written.
    let doomed = slot.stage == Stage::Fetch && !slot.doomed.is_success();
    slot.nsid == purge.nsid && !answered && !doomed
}

fn is_busy(queues: &mut QueueTable, purge: &Purge) -> bool {
    queues.iter_mut().any(|queue| {
        is_preempted(queue, purge) && !queue.matching(|slot| concerns(slot, purge)).is_empty()
    })
}

impl Parts {
    /// What a reservation command asks for, with the keys out of its buffers.
    fn reserve_action(&self, slot: &Slot) -> Option<Action> {
        let super::queue::What::Reserve(command) = slot.what else {
            return None;
        };
        let super::queue::Place::Held(held) = slot.place else {
            return None;
        };
        let mut bytes = [0; ReservationKeys::SIZE];
        let (keys, _) = bytes.split_at_mut_checked(command.data_bytes() as usize)?;
        self.buffers.copy_out(held, 0, keys);
        let keys = ReservationKeys::view(&bytes)?;
        let (current, second) = (keys.current.get(), keys.second.get());
        let nsid = slot.nsid;
        Some(match command {
            Reserve::Register {
                action,
                ignore_key,
                persist,
            } => Action::Register {
                command: ReservationRegister {
                    nsid,
                    action,
                    ignore_key,
                    persist,
                },
                current,
                new: second,
            },
            Reserve::Acquire {
                action,
                ignore_key,
                rtype,
            } => Action::Acquire {
                command: ReservationAcquire {
                    nsid,
                    action,
                    ignore_key,
                    rtype,
                },
                current,
                preempt: second,
            },
            Reserve::Release {
                action,
                ignore_key,
                rtype,
            } => Action::Release {
                command: ReservationRelease {
                    nsid,
                    action,
                    ignore_key,
                    rtype,
                },
                current,
            },
        })
    }
}
