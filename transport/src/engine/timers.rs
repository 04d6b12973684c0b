//! Deadlines of queue pairs: a binary heap in which each queue pair has at most one place.

/// Not in the heap.
const NOWHERE: u32 = u32::MAX;

/// Heap of (time, slot). A queue pair's real deadline may be later than its place here says: most
/// deadlines are moved on long before they come, so the heap is corrected only when one comes.
pub(crate) struct Timers {
    heap: Vec<(u64, u32)>,
    /// Place in the heap by slot.
    places: Vec<u32>,
}

impl Timers {
    pub(crate) const fn new() -> Self {
        Self {
            heap: Vec::new(),
            places: Vec::new(),
        }
    }

    /// Makes room for a slot.
    pub(crate) fn add_slot(&mut self, slot: u32) {
        if self.places.len() <= slot as usize {
            self.places.resize(slot as usize + 1, NOWHERE);
            self.heap.reserve(self.places.len() - self.heap.len());
        }
    }

    /// Sees to it that `slot` comes up at `at` or before.
    #[inline]
    pub(crate) fn ensure(&mut self, slot: u32, at: u64) {
        let Some(&place) = self.places.get(slot as usize) else {
            return;
        };
        if place == NOWHERE {
            self.heap.push((at, slot));
            self.sift_up(self.heap.len() - 1);
        } else if let Some(entry) = self.heap.get_mut(place as usize)
            && at < entry.0
        {
            entry.0 = at;
            self.sift_up(place as usize);
        }
    }

    /// The earliest time.
    pub(crate) fn peek(&self) -> Option<u64> {
        self.heap.first().map(|entry| entry.0)
    }

    /// Takes out a slot whose time has come.
    pub(crate) fn pop_due(&mut self, now: u64) -> Option<u32> {
        let slot = self.heap.first().filter(|entry| entry.0 <= now)?.1;
        self.remove(slot);
        Some(slot)
    }

    /// Takes a slot out.
    pub(crate) fn remove(&mut self, slot: u32) {
        let Some(place) = self.places.get_mut(slot as usize) else {
            return;
        };
        let at = std::mem::replace(place, NOWHERE) as usize;
        if at >= self.heap.len() {
            return;
        }
        self.heap.swap_remove(at);
        if at < self.heap.len() {
            self.note(at);
            self.sift_down(at);
            self.sift_up(at);
        }
    }

    fn note(&mut self, at: usize) {
        if let Some(&(_, slot)) = self.heap.get(at)
            && let Some(place) = self.places.get_mut(slot as usize)
        {
            *place = at as u32;
        }
    }

    fn key(&self, at: usize) -> Option<(u64, u32)> {
        self.heap.get(at).copied()
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.heap.swap(a, b);
        self.note(a);
        self.note(b);
    }

    fn sift_up(&mut self, mut at: usize) {
        self.note(at);
        while at > 0 {
            let parent = (at - 1) / 2;
            if self.key(parent) <= self.key(at) {
                break;
            }
            self.swap(parent, at);
            at = parent;
        }
    }

    fn sift_down(&mut self, mut at: usize) {
        loop {
            let left = 2 * at + 1;
            if left >= self.heap.len() {
                break;
            }
            let right = left + 1;
            let smaller = if right < self.heap.len() && self.key(right) < self.key(left) {
                right
            } else {
                left
            };
            if self.key(at) <= self.key(smaller) {
                break;
            }
            self.swap(at, smaller);
            at = smaller;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn equals_a_map(steps in prop::collection::vec((0u8..4, 0u32..20, 0u64..50), 0..300)) {
            let mut timers = Timers::new();
            let mut model: BTreeMap<u32, u64> = BTreeMap::new();
            for (kind, slot, at) in steps {
                match kind {
                    0 | 1 => {
                        timers.add_slot(slot);
                        timers.ensure(slot, at);
                        let entry = model.entry(slot).or_insert(at);
                        *entry = (*entry).min(at);
                    }
                    2 => {
                        timers.remove(slot);
                        model.remove(&slot);
                    }
                    _ => {
                        let due = model.iter().map(|(slot, at)| (*at, *slot)).min().filter(|due| due.0 <= at);
                        prop_assert_eq!(timers.pop_due(at), due.map(|due| due.1));
                        if let Some((_, slot)) = due { model.remove(&slot); }
                    }
                }
                prop_assert_eq!(timers.peek(), model.values().min().copied());
            }
        }
    }
}
