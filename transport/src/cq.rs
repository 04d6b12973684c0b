//! Completion queues that cannot overflow: a place is reserved when a request is posted.

use std::collections::VecDeque;

use crate::verbs::{Cq, NotifyOn, VerbsError, WcStatus, WorkCompletion};

/// Completions of one queue at most.
pub const CAPACITY_MAX: u32 = 1 << 20;

/// A ring of completions. `reserved` places belong to requests that are posted and not complete.
///
/// It starts over at its first place whenever it is empty, and places are written for the first time
/// when they are used: only as much of it becomes resident as completions ever waited at once.
pub(crate) struct CompletionQueue {
    /// As long as the places used so far; room for all is reserved at the start.
    ring: Vec<WorkCompletion>,
    mask: u32,
    capacity: u32,
    head: u32,
    len: u32,
    reserved: u32,
    /// Waited for: the next completion of this kind raises an event, once.
    armed: Option<NotifyOn>,
    /// Queue pairs that complete here.
    pub(crate) users: u32,
}

impl CompletionQueue {
    fn new(capacity: u32) -> Self {
        let places = capacity.next_power_of_two();
        Self {
            ring: Vec::with_capacity(places as usize),
            mask: places - 1,
            capacity,
            head: 0,
            len: 0,
            reserved: 0,
            armed: None,
            users: 0,
        }
    }

    /// Reserves places; false when there are not so many.
    #[inline]
    pub(crate) fn reserve(&mut self, count: u32) -> bool {
        let free = self.capacity - self.len - self.reserved;
        let granted = count <= free;
        if granted {
            self.reserved += count;
        }
        granted
    }

    /// Gives reserved places back without a completion.
    #[inline]
    pub(crate) fn release(&mut self, count: u32) {
        debug_assert!(self.reserved >= count);
        self.reserved = self.reserved.saturating_sub(count);
    }

    /// Turns a reserved place into a completion.
    #[inline(always)]
    pub(crate) fn push(&mut self, completion: WorkCompletion) {
        debug_assert!(self.reserved > 0, "every completion has a reserved place");
        self.reserved = self.reserved.saturating_sub(1);
        let at = (self.head.wrapping_add(self.len) & self.mask) as usize;
        match self.ring.get_mut(at) {
            Some(place) => *place = completion,
            // Places are used one after the other, so this is the next one; it never reallocates.
            None => self.ring.push(completion),
        }
        self.len += 1;
    }

    #[inline]
    pub(crate) fn pop(&mut self) -> Option<WorkCompletion> {
        if self.len == 0 {
            return None;
        }
        let completion = self.ring.get(self.head as usize).copied();
        self.len -= 1;
        self.head = match self.len {
            0 => 0,
            _ => (self.head + 1) & self.mask,
        };
        completion
    }

    pub(crate) const fn len(&self) -> u32 {
        self.len
    }

    /// Forgets the completions of a queue pair that is reset or destroyed.
    pub(crate) fn forget(&mut self, qpn: u32) {
        for _ in 0..self.len {
            if let Some(completion) = self.pop()
                && completion.qpn != qpn
            {
                self.reserved += 1;
                self.push(completion);
            }
        }
    }
}

/// All completion queues of an engine.
pub(crate) struct CqTable {
    queues: Vec<Option<CompletionQueue>>,
    limit: usize,
    /// Events raised and not taken: at most one of each queue.
    events: VecDeque<Cq>,
}

impl CqTable {
    pub(crate) const fn new(limit: usize) -> Self {
        Self {
            queues: Vec::new(),
            limit,
            events: VecDeque::new(),
        }
    }

    pub(crate) fn create(&mut self, capacity: u32) -> Result<Cq, VerbsError> {
        if capacity == 0 || capacity > CAPACITY_MAX {
            return Err(VerbsError::Parameter("completion queue capacity"));
        }
        let queue = CompletionQueue::new(capacity);
        if let Some(index) = self.queues.iter().position(Option::is_none) {
            if let Some(place) = self.queues.get_mut(index) {
                *place = Some(queue);
            }
            return Ok(Cq(index as u32));
        }
        if self.queues.len() >= self.limit {
            return Err(VerbsError::TableFull("completion queue"));
        }
        self.queues.push(Some(queue));
        Ok(Cq((self.queues.len() - 1) as u32))
    }

    pub(crate) fn destroy(&mut self, cq: Cq) -> Result<(), VerbsError> {
        let place = self
            .queues
            .get_mut(cq.0 as usize)
            .ok_or(VerbsError::Unknown("completion queue"))?;
        match place {
            Some(queue) if queue.users > 0 => Err(VerbsError::InUse("completion queue")),
            Some(_) => {
                *place = None;
                self.events.retain(|raised| *raised != cq);
                Ok(())
            }
            None => Err(VerbsError::Unknown("completion queue")),
        }
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, cq: Cq) -> Option<&mut CompletionQueue> {
        self.queues.get_mut(cq.0 as usize)?.as_mut()
    }

    #[inline]
    pub(crate) fn get(&self, cq: Cq) -> Option<&CompletionQueue> {
        self.queues.get(cq.0 as usize)?.as_ref()
    }

    /// Completes a request that had reserved a place.
    #[inline]
    pub(crate) fn push(&mut self, cq: Cq, completion: WorkCompletion) {
        self.push_received(cq, completion, false);
    }

    /// The same for a message that came, and whether its sender marked it as solicited.
    ///
    /// Always inlined, so that a completion is written where it stays: one that is made elsewhere first, field by
    /// field, is copied by loads wider than those stores, which wait until the payload before it is in the cache.
    #[inline(always)]
    pub(crate) fn push_received(&mut self, cq: Cq, completion: WorkCompletion, solicited: bool) {
        if let Some(queue) = self.get_mut(cq) {
            let urgent = solicited || completion.status != WcStatus::Success;
            queue.push(completion);
            if let Some(armed) = queue.armed
                && (urgent || armed == NotifyOn::Next)
            {
                queue.armed = None;
                if !self.events.contains(&cq) {
                    self.events.push_back(cq);
                }
            }
        }
    }

    /// Arms a queue for completions to come.
    pub(crate) fn arm(&mut self, cq: Cq, on: NotifyOn) -> Result<(), VerbsError> {
        let unknown = VerbsError::Unknown("completion queue");
        let queue = self.get_mut(cq).ok_or(unknown)?;
        // Armed for everything stays so (IBA 11.4.2.2).
        if queue.armed != Some(NotifyOn::Next) {
            queue.armed = Some(on);
        }
        Ok(())
    }

    /// The next queue whose event was raised.
    pub(crate) fn event(&mut self) -> Option<Cq> {
        self.events.pop_front()
    }

    /// Gives places back without completions.
    #[inline]
    pub(crate) fn release(&mut self, cq: Cq, count: u32) {
        if let Some(queue) = self.get_mut(cq) {
            queue.release(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservations_and_completions_never_exceed_the_capacity() {
        let mut queue = CompletionQueue::new(5);
        assert!(queue.reserve(3));
        assert!(!queue.reserve(3));
        assert!(queue.reserve(2));
        for wr_id in 0..5 {
            queue.push(WorkCompletion {
                wr_id,
                ..Default::default()
            });
        }
        assert!(!queue.reserve(1), "unpolled completions take places too");
        for wr_id in 0..5 {
            assert_eq!(queue.pop().unwrap().wr_id, wr_id);
        }
        assert_eq!(queue.pop(), None);
        assert!(queue.reserve(5));
        queue.release(5);
        assert!(queue.reserve(5));
    }

    #[test]
    fn only_the_places_that_were_needed_at_once_are_used() {
        let mut queue = CompletionQueue::new(1000);
        for round in 0..1000 {
            assert!(queue.reserve(3));
            for n in 0..3 {
                let wr_id = 3 * round + n;
                queue.push(WorkCompletion {
                    wr_id,
                    ..Default::default()
                });
            }
            for n in 0..3 {
                assert_eq!(queue.pop().unwrap().wr_id, 3 * round + n);
            }
        }
        assert_eq!(queue.ring.len(), 3);
        // Around the end, with something always left in it.
        let mut queue = CompletionQueue::new(4);
        let mut popped = 0;
        for wr_id in 0..100 {
            assert!(queue.reserve(1));
            queue.push(WorkCompletion {
                wr_id,
                ..Default::default()
            });
            if wr_id % 4 != 0 || queue.len() == 4 {
                assert_eq!(queue.pop().unwrap().wr_id, popped);
                popped += 1;
            }
        }
        assert_eq!(queue.ring.len(), 4);
    }

    #[test]
    fn forgetting_a_queue_pair_keeps_the_others_in_order() {
        let mut queue = CompletionQueue::new(6);
        assert!(queue.reserve(6));
        for wr_id in 0..6 {
            queue.push(WorkCompletion {
                wr_id,
                qpn: wr_id as u32 % 2,
                ..Default::default()
            });
        }
        queue.forget(1);
        let left: Vec<_> = std::iter::from_fn(|| queue.pop())
            .map(|wc| wc.wr_id)
            .collect();
        assert_eq!(left, [0, 2, 4]);
        assert!(queue.reserve(6));
    }

    #[test]
    fn table_is_bounded_and_reuses_places() {
        let mut table = CqTable::new(1);
        let cq = table.create(1).unwrap();
        assert_eq!(
            table.create(1),
            Err(VerbsError::TableFull("completion queue"))
        );
        table.destroy(cq).unwrap();
        assert_eq!(
            table.destroy(cq),
            Err(VerbsError::Unknown("completion queue"))
        );
        assert_eq!(table.create(1), Ok(cq));
        assert!(table.create(0).is_err());
    }
}
