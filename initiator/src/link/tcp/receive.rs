//! Received bytes go straight to where they belong, as far as that can be foreseen.
//!
//! Controllers mostly answer in the order in which they were asked, so what comes next is known: a header of 24
//! bytes, then the data of the oldest outstanding read, and so on. [`Queue::plan`] makes a scatter list of that for
//! one receive: headers into memory of ours, data into the buffers of the commands. They are lent to us until their
//! commands complete, so no harm is done when something else arrives. Then [`Queue::received`] notices at the first
//! byte that is out of place, saves what else has come, goes on from that copy, and is more careful for a while.
#![allow(unsafe_code)]

use flexblk_nvme::tcp::{Event, Pdu};
use flexblk_reactor::Span;

use super::order::NONE;
use super::queue::{Broken, Queue, Transfer};

/// Memory of ours for one receive: headers, and payload whose place was not foreseen.
pub(super) const RX_BYTES: u32 = 128 << 10;
/// A receive into our memory when more than that would only be copied: until the next header is understood.
const RESYNC_BYTES: u32 = 4 << 10;
/// Data from which on it is worth a receive of its own not to copy it.
const LARGE_BYTES: u32 = 16 << 10;
/// Headers of responses, data and R2Ts all have this length.
const HEADER_LEN: u32 = 24;
/// Commands that one receive looks ahead at most.
const MAX_AHEAD: usize = 96;
/// Receives without looking ahead after something else came than was foreseen: at least, at most.
const HOLD_OFF: (u32, u32) = (8, 1024);

/// One piece of a receive's scatter list.
#[derive(Clone, Copy)]
pub(super) struct Planned {
    pub(super) span: Span,
    /// In the buffer of a command, not in ours.
    placed: bool,
}

/// How well the future was known so far.
pub(super) struct Foresight {
    /// Receives until we look ahead again.
    hold_off: u32,
    /// How long, the next time that we err.
    next_hold_off: u32,
    /// PDUs that the last receive brought.
    last_pdus: usize,
}

impl Default for Foresight {
    fn default() -> Foresight {
        Foresight {
            hold_off: 0,
            next_hold_off: HOLD_OFF.0,
            last_pdus: 0,
        }
    }
}

impl Foresight {
    fn ahead(&self) -> usize {
        if self.hold_off > 0 {
            0
        } else {
            (2 * self.last_pdus + 4).min(MAX_AHEAD)
        }
    }

    fn right(&mut self, pdus: usize) {
        self.last_pdus = pdus;
        match self.hold_off.checked_sub(1) {
            Some(left) => self.hold_off = left,
            // A long time without an error: forget them slowly.
            None => {
                self.next_hold_off = (self.next_hold_off - self.next_hold_off / 16).max(HOLD_OFF.0)
            }
        }
    }

    fn wrong(&mut self) {
        self.hold_off = self.next_hold_off;
        self.next_hold_off = (self.next_hold_off * 2).min(HOLD_OFF.1);
    }
}

/// A scatter list under construction.
struct Plan<'a> {
    pieces: &'a mut Vec<Planned>,
    memory: Span,
    used: u32,
    pages: Pages,
}

/// Which pages a list names, roughly: a page that was added is always found, another one sometimes. It spares a
/// comparison of each buffer with all others, which took a sixth of the processor time of reads at depth 128.
#[derive(Default)]
struct Pages([u64; Pages::WORDS]);

impl Pages {
    const WORDS: usize = 16;
    const SHIFT: u32 = u64::BITS - (u64::BITS * Pages::WORDS as u32).ilog2();

    /// Adds the pages of `start..end` and says whether one of them may have been there already.
    fn add(&mut self, start: usize, end: usize) -> bool {
        let mut found = false;
        for page in start >> 12..=end.saturating_sub(1) >> 12 {
            // Fibonacci hashing: neighbouring pages get bits far apart.
            let bit = (page as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> Pages::SHIFT;
            let mask = 1 << (bit % 64);
            if let Some(word) = self.0.get_mut((bit / 64) as usize) {
                found |= *word & mask != 0;
                *word |= mask;
            }
        }
        found
    }
}

impl Plan<'_> {
    /// The next `len` bytes of our memory.
    fn ours(&mut self, len: u32) {
        let len = len.min(RX_BYTES - self.used);
        let Some(span) = self
            .memory
            .sub(self.used, len)
            .filter(|span| !span.is_empty())
        else {
            return;
        };
        self.used += len;
        match self.pieces.last_mut() {
            Some(last) if !last.placed => {
                // Ours is filled from front to end, so the two are neighbours.
                let start = self.used - len - last.span.len();
                if let Some(both) = self.memory.sub(start, last.span.len() + len) {
                    last.span = both;
                }
            }
            _ => self.pieces.push(Planned {
                span,
                placed: false,
            }),
        }
    }

    /// A part of a command's buffer; false when it overlaps with another one of the list, which would lose bytes.
    fn theirs(&mut self, span: Span) -> bool {
        let start = span.as_ptr() as usize;
        let end = start + span.len() as usize;
        let overlaps = |piece: &Planned| {
            let other = piece.span.as_ptr() as usize;
            piece.placed && start < other + piece.span.len() as usize && other < end
        };
        if self.pages.add(start, end) && self.pieces.iter().any(overlaps) {
            return false;
        }
        self.pieces.push(Planned { span, placed: true });
        true
    }
}

impl Queue {
    /// Where the next receive shall put what comes: into [`Queue::planned`].
    pub(super) fn plan(&mut self) {
        let mut pieces = std::mem::take(&mut self.planned);
        pieces.clear();
        let mut plan = Plan {
            pieces: &mut pieces,
            memory: self.memory.span(0, RX_BYTES).unwrap_or_else(Span::empty),
            used: 0,
            pages: Pages::default(),
        };
        let next = self.foresee(&mut plan);
        // What is beyond all that was foreseen.
        let rest = match next.and_then(|cid| self.commands.get(usize::from(cid))) {
            None => RX_BYTES,
            Some(_) if self.foresight.hold_off == 0 => HEADER_LEN + self.header_digest_len(),
            Some(command) => match command.transfer {
                Transfer::In(span) if span.len() >= LARGE_BYTES => RESYNC_BYTES,
                _ => RX_BYTES,
            },
        };
        plan.ours(rest);
        self.planned = pieces;
    }

    /// Plans what can be foreseen; the first command that is not.
    fn foresee(&self, plan: &mut Plan<'_>) -> Option<u16> {
        let header = HEADER_LEN + self.header_digest_len();
        let mut cid = self.order.oldest();
        let mut over = NONE;
        let mut ahead = self.foresight.ahead();
        if let Some(incoming) = &self.incoming {
            // This is no guess: a PDU's payload is where we are.
            let left = incoming.place.len() - incoming.done;
            match incoming.place.sub(incoming.done, left) {
                Some(place) if left > 0 && self.stream.payload_left() == left => {
                    plan.theirs(place);
                    plan.ours(self.data_digest_len());
                }
                // In its digest.
                _ => ahead = 0,
            }
            if incoming.success {
                over = incoming.cid;
            }
        } else if !self.stream.is_between_pdus() {
            // In a header.
            ahead = 0;
        }
        while cid != NONE {
            let command = self.commands.get(usize::from(cid))?;
            if cid == over {
                cid = command.newer();
                continue;
            }
            if ahead == 0 || plan.used + 2 * header + RESYNC_BYTES > RX_BYTES {
                return Some(cid);
            }
            ahead -= 1;
            // Where headers, or what has a header only, begins and ends is known in any case.
            if let Transfer::In(span) = command.transfer
                && let done = command.cursor.accepted()
                && let Some(rest) = span
                    .sub(done, span.len() - done)
                    .filter(|rest| !rest.is_empty())
            {
                plan.ours(header);
                if !plan.theirs(rest) {
                    return Some(cid);
                }
                plan.ours(self.data_digest_len());
                if !self.counters.success_flags_seen() {
                    plan.ours(header);
                }
            } else {
                plan.ours(header);
            }
            cid = command.newer();
        }
        None
    }

    /// `len` bytes have come, in the places that were planned. `scratch` is memory for when they were the wrong ones.
    pub(super) fn received(&mut self, len: usize, scratch: &mut Vec<u8>) -> Result<(), Broken> {
        let planned = std::mem::take(&mut self.planned);
        let result = self.take_pieces(&planned, len, scratch);
        self.planned = planned;
        result
    }

    fn take_pieces(
        &mut self,
        planned: &[Planned],
        len: usize,
        scratch: &mut Vec<u8>,
    ) -> Result<(), Broken> {
        self.counters.receives += 1;
        self.counters.bytes_rx += len as u64;
        let pdus_before = self.counters.pdus_rx;
        let mut left = len;
        let mut foreseen = true;
        for (index, piece) in planned.iter().enumerate() {
            let filled = left.min(piece.span.len() as usize);
            let Some(span) = piece.span.sub(0, filled as u32).filter(|_| filled > 0) else {
                break;
            };
            let later = || Later {
                pieces: planned.get(index + 1..).unwrap_or_default(),
                len: left - filled,
            };
            if !piece.placed {
                // SAFETY: ours alone; the kernel writes to it only during a receive.
                let input = unsafe { span.as_slice() };
                let later = later();
                if self.feed(input, &later, scratch)? {
                    foreseen = false;
                    break;
                }
            } else if self.is_here(span) {
                if let Some(incoming) = &mut self.incoming {
                    incoming.done += span.len();
                }
                self.counters.payload_bytes_placed += u64::from(span.len());
                // SAFETY: lent to us by the command, which is outstanding; looked at for a digest only.
                self.stream
                    .placed(span.len(), || [unsafe { span.as_slice() }]);
                // The end of the PDU, if that is it without a digest.
                self.feed(&[], &Later::NONE, scratch)?;
            } else {
                scratch.clear();
                Later {
                    pieces: planned.get(index..).unwrap_or_default(),
                    len: left,
                }
                .save(scratch);
                self.feed_saved(scratch)?;
                foreseen = false;
                break;
            }
            left -= filled;
        }
        if foreseen {
            self.foresight
                .right((self.counters.pdus_rx - pdus_before) as usize);
        } else {
            self.counters.wrong_guesses += 1;
            self.foresight.wrong();
        }
        Ok(())
    }

    /// Whether payload that is due belongs where it has come to.
    fn is_here(&self, span: Span) -> bool {
        self.incoming.as_ref().is_some_and(|incoming| {
            let due = incoming
                .place
                .sub(incoming.done, span.len())
                .map(|due| due.as_ptr());
            due == Some(span.as_ptr()) && self.stream.payload_left() >= span.len()
        })
    }

    fn feed_saved(&mut self, scratch: &mut Vec<u8>) -> Result<(), Broken> {
        let saved = std::mem::take(scratch);
        let fed = self.feed(&saved, &Later::NONE, scratch);
        *scratch = saved;
        fed.map(drop)
    }

    /// Takes bytes that lie in memory of ours. Payload among them is copied to its place: when that could be in a
    /// piece that comes `later`, these are saved and taken, too, and the answer is true.
    fn feed(
        &mut self,
        input: &[u8],
        later: &Later<'_>,
        scratch: &mut Vec<u8>,
    ) -> Result<bool, Broken> {
        let mut input = input;
        let mut saved = false;
        while let Some(event) = self.stream.next(&mut input)? {
            match event {
                Event::Pdu(pdu) => {
                    self.counters.pdus_rx += 1;
                    self.on_pdu(pdu)?;
                }
                Event::Data(bytes) => {
                    if !saved && later.holds_placed() {
                        scratch.clear();
                        later.save(scratch);
                        saved = true;
                    }
                    if let Some(incoming) = &mut self.incoming {
                        let len = bytes.len() as u32;
                        if let Some(place) = incoming.place.sub(incoming.done, len) {
                            place.copy_from_slice(bytes);
                        }
                        incoming.done += len;
                        self.counters.payload_bytes_copied += u64::from(len);
                    }
                }
                Event::DataEnd { intact } => self.on_data_end(intact)?,
            }
        }
        if saved {
            self.feed_saved(scratch)?;
        }
        Ok(saved)
    }

    fn on_pdu(&mut self, pdu: Pdu) -> Result<(), Broken> {
        match pdu {
            Pdu::C2hData(data) => {
                self.counters.success_flags += u64::from(data.success);
                self.on_c2h_data(&data)
            }
            Pdu::CapsuleResp(cqe) => self.on_response(&cqe),
            Pdu::R2t(r2t) => self.on_r2t(&r2t),
            Pdu::IcResp(response) => self.on_ic_resp(response),
            Pdu::TermReq(term) => Err(Broken::Terminated(term)),
            // Of the host's direction: the stream lets none through.
            Pdu::IcReq(_) | Pdu::CapsuleCmd(_) | Pdu::H2cData(_) => {
                Err(flexblk_nvme::tcp::Error::Sequence.into())
            }
        }
    }
}

/// What has come behind a piece.
struct Later<'a> {
    pieces: &'a [Planned],
    /// Bytes.
    len: usize,
}

impl Later<'_> {
    const NONE: Later<'static> = Later {
        pieces: &[],
        len: 0,
    };

    fn holds_placed(&self) -> bool {
        self.len > 0 && self.pieces.first().is_some_and(|piece| piece.placed)
    }

    fn save(&self, scratch: &mut Vec<u8>) {
        let mut left = self.len;
        for piece in self.pieces {
            let filled = left.min(piece.span.len() as usize);
            let Some(span) = piece.span.sub(0, filled as u32).filter(|_| filled > 0) else {
                return;
            };
            let at = scratch.len();
            scratch.resize(at + filled, 0);
            if let Some(room) = scratch.get_mut(at..) {
                span.copy_to_slice(room);
            }
            left -= filled;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_share_a_byte_are_always_suspected() {
        let mut pages = Pages::default();
        for (start, end) in [(0x7000_1000, 0x7000_2000), (0x7123_0ff0, 0x7125_0010)] {
            assert!(!pages.add(start, end));
            for byte in (start..end).step_by(1000).chain([end - 1]) {
                assert!(pages.add(byte, byte + 1));
            }
        }
    }

    #[test]
    fn buffers_apart_are_hardly_suspected() {
        let mut pages = Pages::default();
        let buffers = (0..MAX_AHEAD).map(|buffer| 0x7f12_3456_7000 + (buffer << 12));
        let suspected = buffers.filter(|at| pages.add(*at, at + 4096)).count();
        assert!(suspected <= MAX_AHEAD / 10, "{suspected}");
    }
}
