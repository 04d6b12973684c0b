//! Receive side of a queue pair: posted buffers in a ring, or credits for messages handed out in place.

use crate::verbs::{PostError, RecvWr, Sge};

/// How messages are received; the first post decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Undecided,
    Posted,
    InPlace,
}

/// Receive requests of a queue pair.
pub(crate) struct RecvQueue {
    mode: Mode,
    /// (wr_id, entries); made with the first posted request, so credits cost no memory.
    wqes: Box<[(u64, u32)]>,
    sges: Box<[Sge]>,
    max_wr: u32,
    max_sge: u32,
    head: u32,
    tail: u32,
    credits: u32,
}

/// What a message finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Receive {
    /// Nothing: the peer has to wait.
    NotReady,
    /// A credit.
    InPlace,
    /// A posted buffer: the one at the head.
    Posted,
}

impl RecvQueue {
    pub(crate) fn new(max_wr: u32, max_sge: u32) -> Self {
        Self {
            mode: Mode::Undecided,
            wqes: Box::default(),
            sges: Box::default(),
            max_wr,
            max_sge,
            head: 0,
            tail: 0,
            credits: 0,
        }
    }

    pub(crate) const fn memory_bytes(&self) -> usize {
        size_of_val(&*self.wqes) + size_of_val(&*self.sges)
    }

    /// Requests or credits that are posted.
    pub(crate) const fn len(&self) -> u32 {
        self.tail.wrapping_sub(self.head) + self.credits
    }

    #[inline]
    pub(crate) const fn ready(&self) -> Receive {
        match self.mode {
            Mode::InPlace if self.credits > 0 => Receive::InPlace,
            Mode::Posted if self.head != self.tail => Receive::Posted,
            _ => Receive::NotReady,
        }
    }

    pub(crate) const fn is_in_place(&self) -> bool {
        matches!(self.mode, Mode::InPlace)
    }

    pub(crate) fn check_post(&self, wr: &RecvWr<'_>) -> Result<(), PostError> {
        if self.mode == Mode::InPlace {
            return Err(PostError::MixedReceive);
        }
        if self.len() >= self.max_wr {
            return Err(PostError::QueueFull);
        }
        if wr.sges.len() > self.max_sge as usize {
            return Err(PostError::TooManySges);
        }
        Ok(())
    }

    pub(crate) fn post(&mut self, wr: &RecvWr<'_>) {
        if self.wqes.is_empty() {
            let places = self.max_wr.max(1).next_power_of_two() as usize;
            let no_sge = Sge {
                addr: 0,
                len: 0,
                lkey: crate::verbs::Lkey(0),
            };
            self.wqes = vec![(0, 0); places].into_boxed_slice();
            self.sges = vec![no_sge; places * self.max_sge as usize].into_boxed_slice();
        }
        self.mode = Mode::Posted;
        let index = self.tail as usize & (self.wqes.len() - 1);
        if let Some(place) = self.wqes.get_mut(index) {
            *place = (wr.wr_id, wr.sges.len() as u32);
        }
        let sges = self.sges.iter_mut().skip(index * self.max_sge as usize);
        for (place, sge) in sges.zip(wr.sges) {
            *place = *sge;
        }
        self.tail = self.tail.wrapping_add(1);
    }

    pub(crate) fn check_credits(&self, count: u32) -> Result<(), PostError> {
        if self.mode == Mode::Posted {
            return Err(PostError::MixedReceive);
        }
        if count > self.max_wr.saturating_sub(self.len()) {
            return Err(PostError::QueueFull);
        }
        Ok(())
    }

    pub(crate) const fn add_credits(&mut self, count: u32) {
        self.mode = Mode::InPlace;
        self.credits += count;
    }

    #[inline]
    pub(crate) const fn take_credit(&mut self) {
        self.credits = self.credits.saturating_sub(1);
    }

    /// Takes every credit; how many there were.
    pub(crate) const fn take_credits(&mut self) -> u32 {
        let credits = self.credits;
        self.credits = 0;
        credits
    }

    /// The posted request at the head: its id and list.
    pub(crate) fn front(&self) -> Option<(u64, &[Sge])> {
        if self.head == self.tail {
            return None;
        }
        let index = self.head as usize & (self.wqes.len() - 1);
        let &(wr_id, count) = self.wqes.get(index)?;
        let start = index * self.max_sge as usize;
        Some((wr_id, self.sges.get(start..start + count as usize)?))
    }

    pub(crate) const fn pop(&mut self) {
        self.head = self.head.wrapping_add(1);
    }

    /// Forgets everything and lets the next post decide again.
    pub(crate) const fn reset(&mut self) {
        self.head = self.tail;
        self.credits = 0;
        self.mode = Mode::Undecided;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn posted_buffers_and_credits_do_not_mix() {
        let wr = RecvWr {
            wr_id: 1,
            sges: &[],
        };
        let mut queue = RecvQueue::new(2, 1);
        assert_eq!(queue.ready(), Receive::NotReady);
        queue.check_credits(2).unwrap();
        queue.add_credits(2);
        assert_eq!(queue.check_credits(1), Err(PostError::QueueFull));
        assert_eq!(queue.check_post(&wr), Err(PostError::MixedReceive));
        assert_eq!(queue.memory_bytes(), 0);
        queue.reset();
        for _ in 0..2 {
            queue.check_post(&wr).unwrap();
            queue.post(&wr);
        }
        assert_eq!(queue.check_post(&wr), Err(PostError::QueueFull));
        assert_eq!(queue.check_credits(1), Err(PostError::MixedReceive));
        assert_eq!(queue.front(), Some((1, &[][..])));
    }
}
