//! Compare and Write, fused (Base 3.4.2, NVM 3.2.1.1): two commands next to one another in the queue, one completion
//! for the caller.

use flexblk_nvme::command::{Fuse, Sqe, nvm};
use flexblk_nvme::{Cid, Lba, Nsid, Sgl};
use flexblk_reactor::Span;

use super::{Context, QueuePair, error_after};
use crate::link::{Data, MemoryKey, PostRefused, Posted};
use crate::{Busy, InvalidCommand, IoError};

/// Half of the pair of that number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    Compare(u16),
    Write(u16),
}

/// The halves of a pair that have ended, and the bounce buffer of both.
#[derive(Clone, Copy, Debug, Default)]
struct Pair {
    bounce: Option<u16>,
    compare: Option<Result<(), IoError>>,
    write: Option<Result<(), IoError>>,
}

/// A second half whose first is posted, and for which the link had no room.
#[derive(Clone, Copy)]
struct Second {
    cid: u16,
    sqe: [u8; 64],
    span: Span,
    key: MemoryKey,
}

/// The pairs under way.
#[derive(Default)]
pub(super) struct Pairs {
    pairs: Vec<Pair>,
    free: Vec<u16>,
    /// Pairs of which no half has ended.
    whole: usize,
    second: Option<Second>,
}

impl Pairs {
    /// Pairs of which no half has ended.
    pub(super) fn whole(&self) -> usize {
        self.whole
    }

    /// Is a pair half posted? Nothing may come between its halves.
    pub(super) fn is_one_cut(&self) -> bool {
        self.second.is_some()
    }

    /// The queue is at its end.
    pub(super) fn forget_second_half(&mut self) {
        self.second = None;
    }

    fn begin(&mut self, bounce: Option<u16>) -> u16 {
        self.whole += 1;
        let pair = Pair {
            bounce,
            ..Pair::default()
        };
        match self.free.pop() {
            Some(number) => {
                if let Some(place) = self.pairs.get_mut(usize::from(number)) {
                    *place = pair;
                }
                number
            }
            None => {
                self.pairs.push(pair);
                // A pair takes two slots, of which there are fewer than 65535.
                (self.pairs.len() - 1) as u16
            }
        }
    }

    /// It was not posted at all.
    fn cancel(&mut self, number: u16) {
        self.whole -= 1;
        self.free.push(number);
    }

    /// Half of a pair has ended: the pair, when it was the second one.
    fn half_done(&mut self, half: Half, result: Result<(), IoError>) -> Option<Ended> {
        let (Half::Compare(number) | Half::Write(number)) = half;
        let pair = self.pairs.get_mut(usize::from(number))?;
        if pair.compare.is_none() && pair.write.is_none() {
            self.whole -= 1;
        }
        match half {
            Half::Compare(_) => pair.compare = Some(result),
            Half::Write(_) => pair.write = Some(result),
        }
        let (compare, write) = (pair.compare?, pair.write?);
        self.free.push(number);
        Some(Ended {
            // The write is done only if the compare has succeeded, and aborted when that has not: the compare says
            // why.
            result: write.or_else(|error| compare.and(Err(error))),
            bounce: pair.bounce,
        })
    }
}

/// A pair that is over.
struct Ended {
    result: Result<(), IoError>,
    bounce: Option<u16>,
}

impl QueuePair {
    /// Writes `new` to the blocks if they hold `expected`, as one atomic operation towards every other command of
    /// every host. One completion; when the blocks hold something else, its error is the status Compare Failure, and
    /// nothing was written. After [`IoError::TimedOut`] or [`IoError::ConnectionLost`] it may have been.
    ///
    /// Both buffers are lent as with [`submit`](Self::submit), and are as long as the blocks that are meant. The
    /// namespace has to offer it ([`Namespace::compare_and_write`](crate::Namespace::compare_and_write)); controllers
    /// refuse more blocks than they can do at once (Identify Controller, ACWU). Takes two of [`depth`](Self::depth).
    pub fn submit_compare_and_write(
        &mut self,
        nsid: Nsid,
        lba: u64,
        expected: Span,
        new: Span,
        tag: u64,
    ) -> Result<(), Busy> {
        if let Some(reason) = self.lost {
            return self.reject(tag, error_after(reason));
        }
        let blocks = match self.check_pair(nsid, expected, new) {
            Ok(blocks) => blocks,
            Err(invalid) => return self.reject(tag, IoError::Invalid(invalid)),
        };
        if !self.may_post() || self.slots.room() < 2 {
            return Err(Busy);
        }
        let slba = Lba::new(lba);
        let compare = nvm::Compare {
            nsid,
            slba,
            blocks,
            ..Default::default()
        };
        let write = nvm::Write {
            nsid,
            slba,
            blocks,
            ..Default::default()
        };
        let (memory, bounce) = self.pair_memory([expected, new])?;
        let number = self.pairs.begin(bounce);
        let context = |buffer, half| Context {
            buffer: Some(buffer),
            half: Some(half),
            ..Context::default()
        };
        let first = context(expected, Half::Compare(number));
        let second = context(new, Half::Write(number));
        let [(expected, first_key), (new, second_key)] = memory;
        let now = self.submission_time();
        let slots = (
            self.slots.take(tag, now, first),
            self.slots.take(tag, now, second),
        );
        let (Some(first_cid), Some(second_cid)) = slots else {
            return Err(Busy); // cannot be: there is room for two
        };
        let half = |bytes: [u8; 64], fuse| {
            let mut sqe = *Sqe::cast(&bytes);
            sqe.set_fuse(fuse);
            sqe.to_bytes()
        };
        let sqe = compare.emit(Cid::new(first_cid), &Sgl::NONE);
        let mut sqe = half(sqe, Fuse::First);
        let data = Data::ToController(expected, first_key);
        match self.link.post(first_cid, &mut sqe, data) {
            Ok(posted) => self.note_posted(first_cid, posted),
            Err(refused) => {
                self.slots.untake(first_cid);
                self.slots.untake(second_cid);
                self.put_back(bounce);
                self.pairs.cancel(number);
                if let PostRefused::Lost(reason) = refused {
                    self.refused = Some(reason);
                }
                return Err(Busy);
            }
        }
        self.counters.submitted += 1;
        let sqe = write.emit(Cid::new(second_cid), &Sgl::NONE);
        self.pairs.second = Some(Second {
            cid: second_cid,
            sqe: half(sqe, Fuse::Second),
            span: new,
            key: second_key,
        });
        self.send_second_half();
        Ok(())
    }

    /// Posts the second half of a pair, if one waits for room and there is some.
    #[inline]
    pub(super) fn send_second_half(&mut self) {
        if self.pairs.second.is_some() {
            self.try_second_half();
        }
    }

    #[cold]
    fn try_second_half(&mut self) {
        let Some(mut second) = self.pairs.second.take() else {
            return;
        };
        let data = Data::ToController(second.span, second.key);
        match self.link.post(second.cid, &mut second.sqe, data) {
            Ok(posted) => self.note_posted(second.cid, posted),
            Err(PostRefused::Full) => self.pairs.second = Some(second),
            Err(PostRefused::Lost(reason)) => self.refused = Some(reason),
        }
    }

    fn note_posted(&mut self, cid: u16, posted: Posted) {
        if posted == Posted::HoldsBuffer {
            self.slots.hold_buffer(cid);
        }
    }

    /// Memory that the transport can reach for both buffers; what is not registered goes into one bounce buffer.
    fn pair_memory(&mut self, buffers: [Span; 2]) -> Result<(PairMemory, Option<u16>), Busy> {
        let keys = buffers.map(|buffer| self.regions.find(buffer));
        let foreign_bytes = foreign_bytes(&buffers, &keys);
        let bounce = match foreign_bytes {
            0 => None,
            bytes => Some(self.bounce.take(bytes).ok_or(Busy)?),
        };
        let mut memory = buffers.map(|buffer| (buffer, self.bounce_key));
        let mut at = 0;
        for ((span, key), known) in memory.iter_mut().zip(keys) {
            if let Some(known) = known {
                *key = known;
            } else if let Some(part) = bounce.and_then(|(_, room)| room.sub(at, span.len())) {
                part.copy_from_span(span);
                at += span.len();
                *span = part;
                self.counters.bounced += 1;
            }
        }
        self.counters.bounced_bytes += u64::from(at);
        Ok((memory, bounce.map(|(index, _)| index)))
    }

    /// Half of a pair has ended: the pair's result, when it was the second one.
    pub(super) fn pair_result(
        &mut self,
        half: Half,
        result: Result<(), IoError>,
    ) -> Option<Result<(), IoError>> {
        let ended = self.pairs.half_done(half, result)?;
        self.put_back(ended.bounce);
        Some(ended.result)
    }

    /// How many blocks the pair has, if it can be.
    fn check_pair(&mut self, nsid: Nsid, expected: Span, new: Span) -> Result<u32, InvalidCommand> {
        let max = self.max_transfer_bytes;
        let namespace = self
            .namespaces
            .find(nsid)
            .ok_or(InvalidCommand::Namespace)?;
        if !namespace.compare_and_write || self.slots.depth() < 2 {
            return Err(InvalidCommand::Unsupported);
        }
        let bytes = expected.len();
        if new.len() != bytes || !bytes.is_multiple_of(namespace.block_size) {
            return Err(InvalidCommand::Buffer);
        }
        let blocks = bytes / namespace.block_size;
        if blocks == 0 || blocks > nvm::MAX_BLOCKS || bytes > max {
            return Err(InvalidCommand::Blocks);
        }
        let buffers = [expected, new];
        let keys = buffers.map(|buffer| self.regions.find(buffer));
        if foreign_bytes(&buffers, &keys) > self.bounce.buffer_bytes() {
            return Err(InvalidCommand::Buffer);
        }
        Ok(blocks)
    }
}

/// Both buffers as the transport reaches them.
type PairMemory = [(Span, MemoryKey); 2];

/// Bytes of the buffers that are not registered.
fn foreign_bytes(buffers: &[Span; 2], keys: &[Option<MemoryKey>; 2]) -> u32 {
    let all = buffers.iter().zip(keys);
    let foreign = all.filter(|(_, key)| key.is_none());
    foreign
        .map(|(buffer, _)| buffer.len())
        .fold(0, u32::saturating_add)
}
