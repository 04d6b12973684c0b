//! Send requests of a queue pair: a ring of descriptors with their lists and inline bytes beside it.

use crate::verbs::{PostError, SendFlags, SendOp, SendWr, Sge, WcOpcode};
use crate::wire::Psn;

/// Longest message (IBA 9.7.2.1).
const MESSAGE_MAX_BYTES: u64 = 1 << 31;

/// What a request does, without its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(u8)]
pub(crate) enum Kind {
    #[default]
    Send,
    SendImm,
    SendInv,
    Write,
    WriteImm,
    Read,
}

impl Kind {
    pub(crate) const fn completion(self) -> WcOpcode {
        match self {
            Self::Send | Self::SendImm | Self::SendInv => WcOpcode::Send,
            Self::Write | Self::WriteImm => WcOpcode::RdmaWrite,
            Self::Read => WcOpcode::RdmaRead,
        }
    }
}

/// A posted request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SendWqe {
    pub(crate) wr_id: u64,
    pub(crate) remote: u64,
    /// Key at the peer: to use, or to invalidate.
    pub(crate) rkey: u32,
    pub(crate) imm: u32,
    /// Payload bytes, inline and gathered.
    pub(crate) len: u32,
    /// Sequence numbers that it takes, known from the first transmission on.
    pub(crate) packets: u32,
    /// Payload bytes of each packet but the last, known as long.
    pub(crate) segment: u32,
    pub(crate) first_psn: Psn,
    pub(crate) inline_len: u16,
    pub(crate) sge_count: u8,
    pub(crate) kind: Kind,
    pub(crate) flags: SendFlags,
}

const _: () = assert!(size_of::<SendWqe>() <= 48);

impl SendWqe {
    /// Whether `psn` is one of this request's; only for requests that have begun.
    pub(crate) const fn covers(&self, psn: Psn) -> bool {
        psn.distance_from(self.first_psn) < self.packets
    }
}

/// The ring: `head..next` sent at least once, `next..tail` waiting; `next` may be under way.
///
/// Places are written for the first time when they are used: a queue pair that only waits costs
/// address space, not memory.
pub(crate) struct SendQueue {
    /// As long as the places used so far, as are the two below; room for all is reserved at the start.
    wqes: Vec<SendWqe>,
    sges: Vec<Sge>,
    inline: Vec<u8>,
    mask: u32,
    max_wr: u32,
    max_sge: u32,
    max_inline: u32,
    head: u32,
    next: u32,
    tail: u32,
}

impl SendQueue {
    pub(crate) fn new(max_wr: u32, max_sge: u32, max_inline: u32) -> Self {
        let mask = max_wr.max(1).next_power_of_two() - 1;
        let places = mask as usize + 1;
        Self {
            wqes: Vec::with_capacity(places),
            sges: Vec::with_capacity(places * max_sge as usize),
            inline: Vec::with_capacity(places * max_inline as usize),
            mask,
            max_wr,
            max_sge,
            max_inline,
            head: 0,
            next: 0,
            tail: 0,
        }
    }

    pub(crate) const fn memory_bytes(&self) -> usize {
        let places = self.mask as usize + 1;
        let sges = self.max_sge as usize * size_of::<Sge>();
        places * (size_of::<SendWqe>() + sges + self.max_inline as usize)
    }

    /// The next place, in the first round. Never reallocates.
    #[cold]
    fn first_use(&mut self) {
        let no_sge = Sge {
            addr: 0,
            len: 0,
            lkey: crate::verbs::Lkey(0),
        };
        self.wqes.push(SendWqe::default());
        self.sges
            .extend(std::iter::repeat_n(no_sge, self.max_sge as usize));
        self.inline
            .extend(std::iter::repeat_n(0, self.max_inline as usize));
    }

    pub(crate) const fn max_wr(&self) -> u32 {
        self.max_wr
    }

    /// Requests that are posted and not complete.
    #[inline]
    pub(crate) const fn len(&self) -> u32 {
        self.tail.wrapping_sub(self.head)
    }

    #[inline]
    pub(crate) const fn is_full(&self) -> bool {
        self.len() >= self.max_wr
    }

    #[inline]
    pub(crate) const fn head(&self) -> u32 {
        self.head
    }

    #[inline]
    pub(crate) const fn next(&self) -> u32 {
        self.next
    }

    #[inline]
    pub(crate) const fn has_waiting(&self) -> bool {
        self.next != self.tail
    }

    /// Whether no request waits behind the one at `index`.
    #[inline]
    pub(crate) const fn is_last(&self, index: u32) -> bool {
        index.wrapping_add(1) == self.tail
    }

    /// The limits that can be checked when a request is posted.
    pub(crate) fn check(&self, wr: &SendWr<'_>) -> Result<u32, PostError> {
        if self.is_full() {
            return Err(PostError::QueueFull);
        }
        if wr.sges.len() > self.max_sge as usize {
            return Err(PostError::TooManySges);
        }
        let is_read = matches!(wr.op, SendOp::Read { .. });
        if wr.inline.len() > self.max_inline as usize || (is_read && !wr.inline.is_empty()) {
            return Err(PostError::InlineTooLong);
        }
        let gathered: u64 = wr.sges.iter().map(|sge| u64::from(sge.len)).sum();
        let len = gathered + wr.inline.len() as u64;
        if len > MESSAGE_MAX_BYTES {
            return Err(PostError::TooLong);
        }
        Ok(len as u32)
    }

    /// Takes a request that [`SendQueue::check`] has passed, of that length.
    #[inline]
    pub(crate) fn push(&mut self, wr: &SendWr<'_>, len: u32) {
        let index = (self.tail & self.mask) as usize;
        let (kind, remote, rkey, imm) = match wr.op {
            SendOp::Send => (Kind::Send, 0, 0, 0),
            SendOp::SendImm(imm) => (Kind::SendImm, 0, 0, imm),
            SendOp::SendInv(rkey) => (Kind::SendInv, 0, rkey.0, 0),
            SendOp::Write { remote, rkey } => (Kind::Write, remote, rkey.0, 0),
            SendOp::WriteImm { remote, rkey, imm } => (Kind::WriteImm, remote, rkey.0, imm),
            SendOp::Read { remote, rkey } => (Kind::Read, remote, rkey.0, 0),
        };
        if index == self.wqes.len() {
            self.first_use();
        }
        let Some(wqe) = self.wqes.get_mut(index) else {
            return;
        };
        *wqe = SendWqe {
            wr_id: wr.wr_id,
            remote,
            rkey,
            imm,
            len,
            packets: 0,
            segment: 0,
            first_psn: Psn::new(0),
            inline_len: wr.inline.len() as u16,
            sge_count: wr.sges.len() as u8,
            kind,
            flags: wr.flags,
        };
        let sges = self.sges.iter_mut().skip(index * self.max_sge as usize);
        for (place, sge) in sges.zip(wr.sges) {
            *place = *sge;
        }
        let start = index * self.max_inline as usize;
        if let Some(place) = self.inline.get_mut(start..start + wr.inline.len()) {
            place.copy_from_slice(wr.inline);
        }
        self.tail = self.tail.wrapping_add(1);
    }

    #[inline]
    pub(crate) fn get(&self, index: u32) -> Option<&SendWqe> {
        self.wqes.get((index & self.mask) as usize)
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, index: u32) -> Option<&mut SendWqe> {
        self.wqes.get_mut((index & self.mask) as usize)
    }

    #[inline]
    pub(crate) fn sges(&self, index: u32, wqe: &SendWqe) -> &[Sge] {
        let start = (index & self.mask) as usize * self.max_sge as usize;
        self.sges
            .get(start..start + usize::from(wqe.sge_count))
            .unwrap_or(&[])
    }

    #[inline]
    pub(crate) fn inline(&self, index: u32, wqe: &SendWqe) -> &[u8] {
        let start = (index & self.mask) as usize * self.max_inline as usize;
        self.inline
            .get(start..start + usize::from(wqe.inline_len))
            .unwrap_or(&[])
    }

    /// The request at `next` has left completely.
    #[inline]
    pub(crate) fn advance_next(&mut self) {
        self.next = self.next.wrapping_add(1);
    }

    /// The request at the head is complete.
    #[inline]
    pub(crate) fn pop(&mut self) {
        self.head = self.head.wrapping_add(1);
        if self.next.wrapping_sub(self.head) > self.mask + 1 {
            // Flushed before it was sent.
            self.next = self.head;
        }
    }

    /// The request that has begun and owns `psn`.
    pub(crate) fn find(&self, psn: Psn) -> Option<u32> {
        if self
            .get(self.head)
            .is_some_and(|wqe| self.head != self.tail && wqe.covers(psn))
        {
            return Some(self.head);
        }
        let begun = self.next.wrapping_sub(self.head)
            + u32::from(self.has_waiting() && self.get(self.next).is_some_and(|w| w.packets > 0));
        let base = self.get(self.head)?.first_psn;
        let wanted = psn.distance_from(base);
        // Last request that starts at or before `psn`.
        let (mut low, mut high) = (0, begun);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            let start = self
                .get(self.head.wrapping_add(middle))?
                .first_psn
                .distance_from(base);
            if start <= wanted {
                low = middle
            } else {
                high = middle
            }
        }
        let index = self.head.wrapping_add(low);
        (begun > 0 && self.get(index)?.covers(psn)).then_some(index)
    }

    /// Forgets everything.
    pub(crate) fn reset(&mut self) {
        self.head = self.tail;
        self.next = self.tail;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn post(queue: &mut SendQueue, len: usize) -> Result<(), PostError> {
        let inline = vec![7; len];
        let wr = SendWr {
            wr_id: 1,
            op: SendOp::Send,
            inline: &inline,
            sges: &[],
            flags: SendFlags::empty(),
        };
        let len = queue.check(&wr)?;
        queue.push(&wr, len);
        Ok(())
    }

    #[test]
    fn limits() {
        let mut queue = SendQueue::new(3, 1, 8);
        assert_eq!(post(&mut queue, 9), Err(PostError::InlineTooLong));
        for _ in 0..3 {
            post(&mut queue, 8).unwrap();
        }
        assert_eq!(post(&mut queue, 0), Err(PostError::QueueFull));
        let sge = Sge {
            addr: 0,
            len: u32::MAX,
            lkey: crate::verbs::Lkey(0),
        };
        let queue = SendQueue::new(3, 1, 8);
        let mut wr = SendWr {
            wr_id: 1,
            op: SendOp::Send,
            inline: &[],
            sges: &[sge],
            flags: SendFlags::empty(),
        };
        assert_eq!(queue.check(&wr), Err(PostError::TooLong));
        let two = [sge; 2];
        wr.sges = &two;
        assert_eq!(queue.check(&wr), Err(PostError::TooManySges));
    }

    #[test]
    fn finds_the_owner_of_a_sequence_number() {
        let mut queue = SendQueue::new(8, 1, 8);
        let mut psn = Psn::new(0x00FF_FFFA);
        let mut owners = Vec::new();
        for round in 0..20u32 {
            while !queue.is_full() {
                post(&mut queue, 1).unwrap();
                let index = queue.next();
                let packets = round % 3 + 1;
                let wqe = queue.get_mut(index).unwrap();
                wqe.packets = packets;
                wqe.first_psn = psn;
                for i in 0..packets {
                    owners.push((psn.add(i), index));
                }
                psn = psn.add(packets);
                queue.advance_next();
            }
            for (psn, index) in &owners {
                assert_eq!(queue.find(*psn), Some(*index));
            }
            assert_eq!(queue.find(psn), None);
            for _ in 0..3 {
                let head = queue.head();
                owners.retain(|(_, index)| *index != head);
                queue.pop();
            }
        }
    }
}
