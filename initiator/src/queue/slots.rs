//! The commands of one queue: which are outstanding, what each still waits for, when it expires.
//!
//! Sans-IO. A slot's index is the command identifier. A command is finished when its response arrived
//! *and* the transport no longer needs its buffer; a queue that is torn down finishes all of them at once.
//! All commands of a queue have the same time-out, so the order of submission is the order of expiry and
//! a doubly linked list in the slots replaces a timer per command.

use std::time::{Duration, Instant};

use crate::IoError;

/// End of the list.
const NONE: u16 = u16::MAX;

/// What a command still waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Free,
    /// Neither answered nor sent to the end.
    Both,
    /// The buffer is no longer needed, the response is missing.
    Response,
    /// Answered; the transport still holds the buffer.
    SendDone(Result<(), IoError>),
}

struct Slot<C> {
    phase: Phase,
    tag: u64,
    deadline: Instant,
    newer: u16,
    older: u16,
    context: C,
}

/// A command that is over, with what its owner stored beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Finished<C> {
    /// The caller's tag.
    pub(crate) tag: u64,
    /// How it went.
    pub(crate) result: Result<(), IoError>,
    /// What was stored with it.
    pub(crate) context: C,
}

/// An event that names no outstanding command, or one that had this event already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unexpected;

/// The slots of one queue. `C` is stored beside each command.
pub(crate) struct Slots<C> {
    slots: Box<[Slot<C>]>,
    /// Free slots, last freed first: their lines are warm.
    free: Vec<u16>,
    oldest: u16,
    newest: u16,
    timeout: Duration,
}

impl<C: Copy + Default> Slots<C> {
    /// `depth` slots, all free.
    pub(crate) fn new(depth: u16, timeout: Duration, now: Instant) -> Slots<C> {
        let depth = depth.clamp(1, NONE - 1);
        let slots = (0..depth)
            .map(|_| Slot {
                phase: Phase::Free,
                tag: 0,
                deadline: now,
                newer: NONE,
                older: NONE,
                context: C::default(),
            })
            .collect();
        Slots {
            slots,
            free: (0..depth).rev().collect(),
            oldest: NONE,
            newest: NONE,
            timeout,
        }
    }

    pub(crate) fn depth(&self) -> u16 {
        // At most NONE - 1 by construction.
        self.slots.len() as u16
    }

    pub(crate) fn outstanding(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Slots that are free.
    pub(crate) fn room(&self) -> usize {
        self.free.len()
    }

    /// Takes a slot; its index is the command identifier.
    pub(crate) fn take(&mut self, tag: u64, now: Instant, context: C) -> Option<u16> {
        let index = self.free.pop()?;
        let older = self.newest;
        let deadline = now.checked_add(self.timeout).unwrap_or(now);
        let slot = self.slots.get_mut(usize::from(index))?;
        debug_assert_eq!(slot.phase, Phase::Free);
        slot.phase = Phase::Response;
        slot.tag = tag;
        slot.deadline = deadline;
        slot.older = older;
        slot.newer = NONE;
        slot.context = context;
        match self.slots.get_mut(usize::from(older)) {
            Some(before) => before.newer = index,
            None => self.oldest = index,
        }
        self.newest = index;
        Some(index)
    }

    /// The transport holds the command's buffer until it reports by [`send_done`](Self::send_done).
    pub(crate) fn hold_buffer(&mut self, index: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(index))
            && slot.phase == Phase::Response
        {
            slot.phase = Phase::Both;
        }
    }

    /// What was stored beside each outstanding command.
    pub(crate) fn contexts(&self) -> impl Iterator<Item = &C> {
        self.slots
            .iter()
            .filter(|slot| slot.phase != Phase::Free)
            .map(|slot| &slot.context)
    }

    /// Gives a slot back whose command was never sent.
    pub(crate) fn untake(&mut self, index: u16) {
        let _ = self.release(index);
    }

    /// The response of command `index` arrived.
    pub(crate) fn response(
        &mut self,
        index: u16,
        result: Result<(), IoError>,
    ) -> Result<Option<Finished<C>>, Unexpected> {
        let slot = self.slots.get_mut(usize::from(index)).ok_or(Unexpected)?;
        match slot.phase {
            Phase::Both => {
                slot.phase = Phase::SendDone(result);
                Ok(None)
            }
            Phase::Response => Ok(Some(self.finish(index, result)?)),
            Phase::Free | Phase::SendDone(_) => Err(Unexpected),
        }
    }

    /// The transport no longer needs the buffer of command `index`.
    pub(crate) fn send_done(&mut self, index: u16) -> Result<Option<Finished<C>>, Unexpected> {
        let slot = self.slots.get_mut(usize::from(index)).ok_or(Unexpected)?;
        match slot.phase {
            Phase::Both => {
                slot.phase = Phase::Response;
                Ok(None)
            }
            Phase::SendDone(result) => Ok(Some(self.finish(index, result)?)),
            Phase::Free | Phase::Response => Err(Unexpected),
        }
    }

    /// When the oldest outstanding command expires.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.slots
            .get(usize::from(self.oldest))
            .map(|slot| slot.deadline)
    }

    /// The queue is torn down and no buffer is in use any more: finishes the oldest outstanding command.
    /// One that was answered keeps its answer; one past its deadline has timed out; the others fail with `error`.
    /// Call it until it gives `None`.
    pub(crate) fn abandon(&mut self, error: IoError, now: Instant) -> Option<Finished<C>> {
        let index = self.oldest;
        let slot = self.slots.get(usize::from(index))?;
        let result = match slot.phase {
            Phase::SendDone(result) => result,
            _ if slot.deadline <= now => Err(IoError::TimedOut),
            _ => Err(error),
        };
        self.finish(index, result).ok()
    }

    fn finish(
        &mut self,
        index: u16,
        result: Result<(), IoError>,
    ) -> Result<Finished<C>, Unexpected> {
        let (tag, context) = self.release(index).ok_or(Unexpected)?;
        Ok(Finished {
            tag,
            result,
            context,
        })
    }

    fn release(&mut self, index: u16) -> Option<(u64, C)> {
        let slot = self.slots.get_mut(usize::from(index))?;
        if slot.phase == Phase::Free {
            return None;
        }
        slot.phase = Phase::Free;
        let (tag, context, older, newer) = (slot.tag, slot.context, slot.older, slot.newer);
        match self.slots.get_mut(usize::from(older)) {
            Some(slot) => slot.newer = newer,
            None => self.oldest = newer,
        }
        match self.slots.get_mut(usize::from(newer)) {
            Some(slot) => slot.older = older,
            None => self.newest = older,
        }
        self.free.push(index);
        Some((tag, context))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    #[derive(Clone, Debug)]
    enum Step {
        Submit {
            holds_buffer: bool,
        },
        /// Of the n-th outstanding command, or of any slot number when none fits.
        Response {
            pick: u16,
            ok: bool,
        },
        SendDone {
            pick: u16,
        },
        /// A response or send completion for an arbitrary slot number, as a broken peer would send.
        Stray {
            slot: u16,
            send: bool,
        },
        Pass {
            ms: u64,
        },
        TearDown,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => any::<bool>().prop_map(|holds_buffer| Step::Submit { holds_buffer }),
            5 => (any::<u16>(), any::<bool>()).prop_map(|(pick, ok)| Step::Response { pick, ok }),
            4 => any::<u16>().prop_map(|pick| Step::SendDone { pick }),
            1 => (0u16..12, any::<bool>()).prop_map(|(slot, send)| Step::Stray { slot, send }),
            1 => (0u64..40).prop_map(|ms| Step::Pass { ms }),
            1 => Just(Step::TearDown),
        ]
    }

    #[derive(Debug)]
    struct Model {
        tag: u64,
        responded: Option<Result<(), IoError>>,
        sent: bool,
        deadline: Instant,
    }

    const TIMEOUT: Duration = Duration::from_millis(100);

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn every_command_finishes_exactly_once(depth in 1u16..9, steps in prop::collection::vec(step(), 0..200)) {
            let mut now = Instant::now();
            let mut slots: Slots<u64> = Slots::new(depth, TIMEOUT, now);
            let mut model: BTreeMap<u16, Model> = BTreeMap::new();
            let mut next_tag = 0u64;
            let mut finished = BTreeSet::new();
            let mut check = |done: Option<Finished<u64>>, expect: Option<(u64, Result<(), IoError>)>| {
                match (done, expect) {
                    (None, None) => {}
                    (Some(done), Some((tag, result))) => {
                        assert_eq!((done.tag, done.result, done.context), (tag, result, tag ^ 0xff));
                        assert!(finished.insert(done.tag), "finished twice");
                    }
                    (done, expect) => panic!("{done:?} instead of {expect:?}"),
                }
            };
            for step in steps {
                match step {
                    Step::Submit { holds_buffer } => {
                        let taken = slots.take(next_tag, now, next_tag ^ 0xff);
                        prop_assert_eq!(taken.is_none(), model.len() == usize::from(depth));
                        if let Some(index) = taken {
                            if holds_buffer {
                                slots.hold_buffer(index);
                            }
                            let fresh = model.insert(index, Model { tag: next_tag, responded: None, sent: !holds_buffer, deadline: now + TIMEOUT });
                            prop_assert!(fresh.is_none(), "command identifier in use twice");
                            next_tag += 1;
                        }
                    }
                    Step::Response { pick, ok } => {
                        let keys: Vec<u16> = model.keys().copied().collect();
                        let Some(&index) = keys.get(usize::from(pick) % keys.len().max(1)) else { continue };
                        let result = if ok { Ok(()) } else { Err(IoError::Invalid(crate::InvalidCommand::Blocks)) };
                        let m = model.get_mut(&index).unwrap();
                        if m.responded.is_some() {
                            prop_assert_eq!(slots.response(index, result), Err(Unexpected));
                        } else if m.sent {
                            check(slots.response(index, result).unwrap(), Some((m.tag, result)));
                            model.remove(&index);
                        } else {
                            m.responded = Some(result);
                            check(slots.response(index, result).unwrap(), None);
                        }
                    }
                    Step::SendDone { pick } => {
                        let keys: Vec<u16> = model.keys().copied().collect();
                        let Some(&index) = keys.get(usize::from(pick) % keys.len().max(1)) else { continue };
                        let m = model.get_mut(&index).unwrap();
                        if m.sent {
                            prop_assert_eq!(slots.send_done(index), Err(Unexpected));
                        } else if let Some(result) = m.responded {
                            check(slots.send_done(index).unwrap(), Some((m.tag, result)));
                            model.remove(&index);
                        } else {
                            m.sent = true;
                            check(slots.send_done(index).unwrap(), None);
                        }
                    }
                    Step::Stray { slot, send } => {
                        if !model.contains_key(&slot) {
                            let got = if send { slots.send_done(slot) } else { slots.response(slot, Ok(())) };
                            prop_assert_eq!(got, Err(Unexpected));
                        }
                    }
                    Step::Pass { ms } => now += Duration::from_millis(ms),
                    Step::TearDown => {
                        let mut last_tag = None;
                        while let Some(done) = slots.abandon(IoError::ConnectionLost, now) {
                            prop_assert!(last_tag < Some(done.tag), "abandoned out of order");
                            last_tag = Some(done.tag);
                            let (&index, m) = model.iter().find(|(_, m)| m.tag == done.tag).unwrap();
                            let expect = m.responded.unwrap_or(if m.deadline <= now { Err(IoError::TimedOut) } else { Err(IoError::ConnectionLost) });
                            check(Some(done), Some((m.tag, expect)));
                            model.remove(&index);
                        }
                        prop_assert!(model.is_empty());
                    }
                }
                prop_assert_eq!(slots.outstanding(), model.len());
                prop_assert_eq!(slots.contexts().count(), model.len());
                prop_assert_eq!(slots.next_deadline(), model.values().map(|m| m.deadline).min());
            }
            while let Some(done) = slots.abandon(IoError::Closed, now) {
                prop_assert!(finished.insert(done.tag));
            }
            prop_assert_eq!(finished.len() as u64, next_tag, "every command finished");
        }
    }
}
