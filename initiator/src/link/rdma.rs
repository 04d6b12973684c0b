//! The NVMe/RDMA binding: commands by SEND, data by RDMA, responses by SEND or as an immediate.

use std::sync::Arc;
use std::time::Instant;

use crate::TransportCounters;
use flexblk_nvme::{Cqe, Sgl, flexins::Immediate};
use flexblk_reactor::{SharedMemory, Span, Wait, Waker};
use flexins::verbs::{
    Lkey, Mr, PostError, SendFlags, SendOp, SendWr, Sge, VerbsError, WcOpcode, WcStatus,
    WorkCompletion,
};

use super::verbs::Verbs;
use super::{Data, Link, LinkEvent, MAX_SMALL_BYTES, MemoryKey, PostRefused, Posted};
use crate::{Error, LostReason};

/// Inline bytes of a send request: the SQE and small data.
pub(crate) const MAX_INLINE_BYTES: usize = 64 + MAX_SMALL_BYTES;

/// Room in the queues of a queue pair for `depth` commands.
///
/// A command's send request may outlive its response (the acknowledgement was lost), so there are twice as
/// many; receive credits are given back in batches of `depth`. Rings have a power of two of places: twice a depth
/// that is one stays one.
pub(crate) const fn queue_sizes(depth: u16) -> QueueSizes {
    let twice = 2 * depth as u32;
    let twice = if twice < FEWEST { FEWEST } else { twice };
    QueueSizes {
        sends: twice,
        receives: twice,
        completions: 2 * twice,
    }
}

/// Requests of a queue, however shallow.
const FEWEST: u32 = 32;

pub(crate) struct QueueSizes {
    pub(crate) sends: u32,
    pub(crate) receives: u32,
    pub(crate) completions: u32,
}

/// What the two ends agreed on when they connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Agreed {
    /// Largest in-capsule data of the FlexiNS parameters; `None`: the peer is a plain NVMe/RDMA target, Identify
    /// Controller decides.
    pub(crate) in_capsule_bytes: Option<u32>,
    /// Successful reads may complete by immediate.
    pub(crate) immediate_completions: bool,
}

/// A queue over a verbs queue pair.
pub(crate) struct RdmaLink<V: Verbs> {
    verbs: V,
    agreed: Agreed,
    in_capsule_bytes: u32,
    /// Credits used and not yet given back.
    used_credits: u32,
    credit_batch: u32,
    completions: Vec<WorkCompletion>,
    closed: bool,
}

impl<V: Verbs> RdmaLink<V> {
    pub(crate) fn new(verbs: V, depth: u16, agreed: Agreed) -> RdmaLink<V> {
        RdmaLink {
            verbs,
            agreed,
            in_capsule_bytes: 0,
            used_credits: 0,
            credit_batch: u32::from(depth).max(1),
            completions: Vec::with_capacity(queue_sizes(depth).completions as usize),
            closed: false,
        }
    }

    /// What the completions that `turn` brings mean.
    #[inline]
    fn take(
        &mut self,
        events: &mut Vec<LinkEvent>,
        turn: impl FnOnce(&mut V, &mut Vec<WorkCompletion>) -> Result<(), LostReason>,
    ) -> Result<(), LostReason> {
        if self.closed {
            return Err(LostReason::Closed);
        }
        let mut completions = std::mem::take(&mut self.completions);
        let turned = turn(&mut self.verbs, &mut completions);
        // What completed before the connection ended did complete.
        let handled = completions
            .iter()
            .try_for_each(|wc| self.on_completion(wc, events));
        completions.clear();
        self.completions = completions;
        turned.and(handled)?;
        if self.used_credits >= self.credit_batch {
            self.verbs
                .post_receives(self.used_credits)
                .map_err(|_| LostReason::PeerClosed)?;
            self.used_credits = 0;
        }
        Ok(())
    }

    fn on_completion(
        &mut self,
        wc: &WorkCompletion,
        events: &mut Vec<LinkEvent>,
    ) -> Result<(), LostReason> {
        if wc.status != WcStatus::Success {
            return Err(match wc.status {
                WcStatus::RetryExcErr | WcStatus::RnrRetryExcErr => LostReason::Retries,
                WcStatus::WrFlushErr => LostReason::PeerClosed,
                _ => LostReason::Protocol,
            });
        }
        match wc.opcode {
            WcOpcode::Recv if wc.imm().is_none() => {
                self.used_credits += 1;
                let bytes: &[u8; Cqe::SIZE] = wc
                    .inline_bytes()
                    .try_into()
                    .map_err(|_| LostReason::Protocol)?;
                let cqe = Cqe::from_bytes(bytes);
                events.push(LinkEvent::Response {
                    cid: cqe.cid().get(),
                    status: cqe.status(),
                    result: cqe.result(),
                    immediate: false,
                });
            }
            WcOpcode::Recv | WcOpcode::RecvRdmaWithImm => {
                self.used_credits += 1;
                let immediate = wc
                    .imm()
                    .and_then(Immediate::from_bits)
                    .filter(|_| self.agreed.immediate_completions)
                    .ok_or(LostReason::Protocol)?;
                events.push(LinkEvent::Response {
                    cid: immediate.cid.get(),
                    status: immediate.status,
                    result: 0,
                    immediate: true,
                });
            }
            WcOpcode::Send => events.push(LinkEvent::SendDone {
                cid: wc.wr_id as u16,
            }),
            WcOpcode::RdmaWrite | WcOpcode::RdmaRead => return Err(LostReason::Protocol),
        }
        Ok(())
    }
}

impl<V: Verbs> Link for RdmaLink<V> {
    fn now(&self) -> Instant {
        self.verbs.now()
    }

    fn clock(&self) -> Instant {
        self.verbs.clock()
    }

    fn waker(&self) -> Option<Waker> {
        self.verbs.waker()
    }

    fn register(&mut self, memory: Span) -> Result<Option<MemoryKey>, Error> {
        let region = self.verbs.register(memory).map_err(not_registered)?;
        Ok(Some(key_of(&region)))
    }

    fn register_memory(&mut self, memory: &Arc<SharedMemory>) -> Result<MemoryKey, Error> {
        let region = self.verbs.register_memory(memory).map_err(not_registered)?;
        Ok(key_of(&region))
    }

    fn unregister(&mut self, key: MemoryKey) -> Result<(), Error> {
        if self.closed {
            return Ok(());
        }
        self.verbs
            .deregister(key.local)
            .map_err(|e| Error::Transport(format!("unregistering memory: {e}")))
    }

    fn post(
        &mut self,
        cid: u16,
        sqe: &mut [u8; 64],
        data: Data<'_>,
    ) -> Result<Posted, PostRefused> {
        let mut capsule = [0u8; MAX_INLINE_BYTES];
        let mut inline_bytes = 64;
        let mut gather = None;
        let sgl = match data {
            Data::None => Sgl::NONE,
            Data::Small(bytes) => {
                if let Some(room) = capsule.get_mut(64..64 + bytes.len()) {
                    room.copy_from_slice(bytes);
                    inline_bytes += bytes.len();
                }
                Sgl::InCapsule {
                    offset: 0,
                    length: bytes.len() as u32,
                }
            }
            Data::ToController(span, key) if span.len() <= self.in_capsule_bytes => {
                gather = Some(Sge {
                    addr: span.as_ptr() as u64,
                    len: span.len(),
                    lkey: Lkey::from_bits(key.local),
                });
                Sgl::InCapsule {
                    offset: 0,
                    length: span.len(),
                }
            }
            Data::ToController(span, key) | Data::FromController(span, key) => Sgl::Keyed {
                address: span.as_ptr() as u64,
                length: span.len(),
                key: key.remote,
                invalidate: false,
            },
        };
        if let Some(pointer) = sqe.get_mut(24..40) {
            pointer.copy_from_slice(&sgl.emit());
        }
        if let Some(head) = capsule.first_chunk_mut() {
            *head = *sqe;
        }
        // Only a capsule that gathers from the application's buffer has to tell when it is through: everything
        // else was copied into the request, and a lost connection shows on the receive side as well.
        let flags = if gather.is_some() {
            SendFlags::SIGNALED
        } else {
            SendFlags::empty()
        };
        let posted = self.verbs.post_send(&SendWr {
            wr_id: u64::from(cid),
            op: SendOp::Send,
            inline: capsule.get(..inline_bytes).unwrap_or_default(),
            sges: gather.as_slice(),
            flags,
        });
        match posted {
            Ok(()) if gather.is_some() => Ok(Posted::HoldsBuffer),
            Ok(()) => Ok(Posted::Free),
            Err(PostError::QueueFull | PostError::CompletionQueueFull) => Err(PostRefused::Full),
            Err(PostError::State(_) | PostError::UnknownQp) => {
                Err(PostRefused::Lost(LostReason::PeerClosed))
            }
            Err(_) => Err(PostRefused::Lost(LostReason::Protocol)),
        }
    }

    fn turn(&mut self, wait: Wait, events: &mut Vec<LinkEvent>) -> Result<(), LostReason> {
        self.take(events, |verbs, completions| verbs.turn(wait, completions))
    }

    fn collect(&mut self, events: &mut Vec<LinkEvent>) -> Result<(), LostReason> {
        self.take(events, V::collect)
    }

    fn set_controller_in_capsule_bytes(&mut self, bytes: u32) {
        self.in_capsule_bytes = self
            .agreed
            .in_capsule_bytes
            .map_or(bytes, |agreed| agreed.min(bytes));
    }

    fn pause(&mut self) {
        if !self.closed {
            self.verbs.pause();
        }
    }

    fn close(&mut self, until: Instant) {
        if !self.closed {
            self.closed = true;
            self.verbs.close(until);
        }
    }

    fn counters(&self) -> TransportCounters {
        self.verbs.counters()
    }
}

impl<V: Verbs> Drop for RdmaLink<V> {
    fn drop(&mut self) {
        let now = self.verbs.now();
        self.close(now);
    }
}

const fn key_of(region: &Mr) -> MemoryKey {
    MemoryKey {
        local: region.lkey.to_bits(),
        remote: region.rkey.0,
    }
}

fn not_registered(error: VerbsError) -> Error {
    Error::Transport(format!("registering memory: {error}"))
}
