//! Timers: a heap of deadlines with cancellation by generation.
//!
//! Arming is a push (constant time on average, since most timers are armed later than those
//! before), disarming marks a slot in constant time; the dead heap entry goes when it comes up, or
//! when more than half of the heap is dead.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

use crate::Token;

/// Names an armed timer. Stale ids (fired or disarmed) are harmless.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TimerId {
    slot: u32,
    generation: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<Entry>>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    armed: usize,
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    armed: bool,
    token: Token,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    at: Instant,
    slot: u32,
    generation: u32,
}

impl Timers {
    /// Dead entries that the heap may hold before it is rebuilt.
    const SLACK: usize = 64;

    pub(crate) fn arm(&mut self, at: Instant, token: Token) -> TimerId {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.slots.push(Slot {
                    generation: 0,
                    armed: false,
                    token,
                });
                (self.slots.len() - 1) as u32
            }
        };
        let entry = &mut self.slots[slot as usize];
        entry.armed = true;
        entry.token = token;
        let generation = entry.generation;
        self.armed += 1;
        self.heap.push(Reverse(Entry {
            at,
            slot,
            generation,
        }));
        TimerId { slot, generation }
    }

    pub(crate) fn disarm(&mut self, id: TimerId) -> bool {
        if !self.is_live(id.slot, id.generation) {
            return false;
        }
        self.release(id.slot);
        if self.heap.len() > 2 * self.armed + Self::SLACK {
            let slots = &self.slots;
            self.heap.retain(|Reverse(entry)| {
                let slot = &slots[entry.slot as usize];
                slot.armed && slot.generation == entry.generation
            });
        }
        true
    }

    /// The earliest deadline.
    pub(crate) fn next(&mut self) -> Option<Instant> {
        loop {
            let Reverse(first) = self.heap.peek()?;
            if self.is_live(first.slot, first.generation) {
                return Some(first.at);
            }
            self.heap.pop();
        }
    }

    /// One timer that is due at `now`, earliest first.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<Token> {
        if self.next()? > now {
            return None;
        }
        let Reverse(entry) = self.heap.pop()?;
        let token = self.slots[entry.slot as usize].token;
        self.release(entry.slot);
        Some(token)
    }

    fn is_live(&self, slot: u32, generation: u32) -> bool {
        self.slots
            .get(slot as usize)
            .is_some_and(|slot| slot.armed && slot.generation == generation)
    }

    fn release(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        entry.armed = false;
        entry.generation = entry.generation.wrapping_add(1);
        self.free.push(slot);
        self.armed -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_disarmed_timer_does_not_fire_and_its_id_is_stale() {
        let mut timers = Timers::default();
        let start = Instant::now();
        let a = timers.arm(start, Token::new(1, 1));
        assert!(timers.disarm(a));
        assert!(!timers.disarm(a));
        let b = timers.arm(start, Token::new(1, 2));
        assert_ne!(a, b);
        assert!(!timers.disarm(a));
        assert_eq!(timers.pop_due(start), Some(Token::new(1, 2)));
        assert_eq!(timers.pop_due(start), None);
        assert!(!timers.disarm(b));
        assert_eq!(timers.next(), None);
    }

    #[test]
    fn arming_and_disarming_for_ever_stays_small() {
        let mut timers = Timers::default();
        let start = Instant::now();
        let keep = timers.arm(start, Token::new(1, 0));
        for n in 0..100_000_u64 {
            let id = timers.arm(start + Duration::from_micros(n), Token::new(1, n));
            assert!(timers.disarm(id));
        }
        assert!(timers.heap.len() <= 2 + Timers::SLACK + 1);
        assert!(timers.slots.len() <= 2);
        assert!(timers.disarm(keep));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Arm(u64),
        Disarm(usize),
        Advance(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..1000_u64).prop_map(Step::Arm),
            (0..64_usize).prop_map(Step::Disarm),
            (0..100_u64).prop_map(Step::Advance),
        ]
    }

    proptest! {
        /// Against a sorted set: same timers, same order, none early, none twice.
        #[test]
        fn behaves_like_a_sorted_set(steps in prop::collection::vec(step(), 1..300)) {
            let start = Instant::now();
            let at = |us: u64| start + Duration::from_micros(us);
            let (mut timers, mut model, mut ids) = (Timers::default(), BTreeSet::new(), Vec::new());
            let mut now = 0_u64;
            for (n, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Arm(delay) => {
                        let id = timers.arm(at(now + delay), Token::new(1, n as u64));
                        ids.push((id, now + delay, n as u64));
                        model.insert((now + delay, n as u64));
                    }
                    Step::Disarm(which) if !ids.is_empty() => {
                        let (id, due, n) = ids[which % ids.len()];
                        prop_assert_eq!(timers.disarm(id), model.remove(&(due, n)));
                    }
                    Step::Disarm(_) => {}
                    Step::Advance(by) => {
                        now += by;
                        let mut fired = Vec::new();
                        while let Some(token) = timers.pop_due(at(now)) {
                            fired.push(token.slot());
                        }
                        let due: Vec<_> = model.iter().filter(|(due, _)| *due <= now).copied().collect();
                        for gone in &due {
                            model.remove(gone);
                        }
                        let mut expected: Vec<_> = due.iter().map(|(_, n)| *n).collect();
                        // equal deadlines have no promised order
                        fired.sort_unstable();
                        expected.sort_unstable();
                        prop_assert_eq!(fired, expected);
                    }
                }
                prop_assert_eq!(timers.next(), model.first().map(|(due, _)| at(*due)));
                prop_assert_eq!(timers.armed, model.len());
            }
        }
    }
}
