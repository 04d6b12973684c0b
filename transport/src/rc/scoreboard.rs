//! What the requester has outstanding: finished, lost or under way, per sequence number.
//!
//! Loss is found by transmission order, as QUIC does (RFC 9002, 6.1.1): every transmission gets the
//! next order number, retransmissions too, and a packet is lost when one sent at least
//! [`REORDER`] transmissions later has arrived. READ responses travel on their own path, so they
//! are compared among themselves.

use super::psn_bits::{PsnBits, WINDOW_BITS};
use crate::wire::Psn;
use crate::wire::sack::Sack;

/// Transmissions by which a packet may be overtaken before it counts as lost.
pub(crate) const REORDER: u32 = 3;

/// Outstanding packets of a requester: `una <= PSN < next`.
pub(crate) struct Scoreboard {
    una: Psn,
    next: Psn,
    /// One beyond the last cumulative acknowledgement: `una` stays behind it, because a selective
    /// one can be taken back (a message that was held may find no receive request).
    acked: Psn,
    /// Not to be sent again: acknowledged, selectively or not, or for a READ its data has arrived.
    done: PsnBits,
    /// To be sent again.
    lost: PsnBits,
    /// Sequence numbers of READ responses.
    read: PsnBits,
    /// Last sequence number of each READ request.
    read_end: PsnBits,
    done_ahead: u32,
    lost_count: u32,
    reads: u32,
    /// Transmission order by PSN; a power of two long.
    order: Box<[u32]>,
    next_order: u32,
    /// Highest order of READ data that has arrived, while READs are outstanding.
    read_order: u32,
}

/// Whether order `a` comes before `b`, across the wrap.
const fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

impl Scoreboard {
    pub(crate) fn new(window: u32) -> Self {
        let places = window.clamp(1, WINDOW_BITS).next_power_of_two() as usize;
        Self {
            una: Psn::new(0),
            next: Psn::new(0),
            acked: Psn::new(0),
            done: PsnBits::new(),
            lost: PsnBits::new(),
            read: PsnBits::new(),
            read_end: PsnBits::new(),
            done_ahead: 0,
            lost_count: 0,
            reads: 0,
            order: vec![0; places].into_boxed_slice(),
            next_order: 0,
            read_order: 0,
        }
    }

    /// Starts over at `first`.
    pub(crate) fn reset(&mut self, first: Psn) {
        self.una = first;
        self.next = first;
        self.acked = first;
        for bits in [
            &mut self.done,
            &mut self.lost,
            &mut self.read,
            &mut self.read_end,
        ] {
            bits.reset();
        }
        self.done_ahead = 0;
        self.lost_count = 0;
        self.reads = 0;
        self.next_order = 0;
        self.read_order = 0;
    }

    /// Most packets that may be outstanding.
    pub(crate) const fn capacity(&self) -> u32 {
        self.order.len() as u32
    }

    pub(crate) const fn memory_bytes(&self) -> usize {
        self.order.len() * 4
    }

    #[inline]
    pub(crate) const fn una(&self) -> Psn {
        self.una
    }

    #[inline]
    pub(crate) const fn next(&self) -> Psn {
        self.next
    }

    #[inline]
    pub(crate) const fn outstanding(&self) -> u32 {
        self.next.distance_from(self.una)
    }

    /// READ requests that have not got all their data.
    #[inline]
    pub(crate) const fn reads(&self) -> u32 {
        self.reads
    }

    #[inline]
    pub(crate) const fn has_lost(&self) -> bool {
        self.lost_count > 0
    }

    #[inline]
    pub(crate) fn contains(&self, psn: Psn) -> bool {
        psn.distance_from(self.una) < self.outstanding()
    }

    #[inline]
    pub(crate) fn is_done(&self, psn: Psn) -> bool {
        self.done_ahead > 0 && self.done.get(psn)
    }

    pub(crate) fn is_read(&self, psn: Psn) -> bool {
        self.reads > 0 && self.read.get(psn)
    }

    /// A new packet leaves; its PSN.
    #[inline]
    pub(crate) fn send(&mut self) -> Psn {
        let psn = self.next;
        self.stamp(psn, 1);
        self.next = psn.next();
        psn
    }

    /// A new READ request for `count` packets leaves; its first PSN.
    pub(crate) fn send_read(&mut self, count: u32) -> Psn {
        let psn = self.next;
        if self.reads == 0 {
            self.read_order = self.next_order;
        }
        self.stamp(psn, count);
        self.read.set_range(psn, count);
        self.next = psn.add(count);
        self.read_end.set(self.next.previous());
        self.reads += 1;
        psn
    }

    /// Lost packets `psn..psn+count` leave again.
    pub(crate) fn resend(&mut self, psn: Psn, count: u32) {
        self.stamp(psn, count);
        self.lost_count -= self.lost.count_range(psn, count);
        self.lost.clear_range(psn, count);
    }

    /// Order number of a probe that leaves now.
    pub(crate) fn probe(&mut self) -> u32 {
        let order = self.next_order;
        self.next_order = order.wrapping_add(1);
        order
    }

    #[inline]
    fn stamp(&mut self, psn: Psn, count: u32) {
        let mask = self.order.len() - 1;
        for i in 0..count {
            if let Some(order) = self.order.get_mut(psn.add(i).get() as usize & mask) {
                *order = self.next_order.wrapping_add(i);
            }
        }
        self.next_order = self.next_order.wrapping_add(count);
    }

    #[inline]
    fn order_of(&self, psn: Psn) -> u32 {
        let mask = self.order.len() - 1;
        self.order
            .get(psn.get() as usize & mask)
            .copied()
            .unwrap_or_default()
    }

    /// Everything up to and with `psn` has been received (data of READs aside). True when that is
    /// news. A PSN that is not outstanding changes nothing.
    #[inline]
    pub(crate) fn acknowledge(&mut self, psn: Psn) -> bool {
        let count = psn.distance_from(self.una).wrapping_add(1);
        if count > self.outstanding() {
            return false;
        }
        if self.done_ahead == 0 && self.reads == 0 && self.lost_count == 0 {
            // The common case: nothing is marked, so there is nothing to clear.
            self.una = psn.next();
            self.acked = self.una;
            return true;
        }
        self.acknowledge_marked(count)
    }

    fn acknowledge_marked(&mut self, count: u32) -> bool {
        let news = count > self.acked.distance_from(self.una);
        if news {
            self.acked = self.una.add(count);
            self.done_ahead += self.done.set_range_except(self.una, count, &self.read);
            self.settle();
        }
        news
    }

    /// The data of a READ response has arrived. True when that is news.
    pub(crate) fn read_arrived(&mut self, psn: Psn) -> bool {
        if !self.contains(psn) || !self.read.get(psn) || !self.done.set(psn) {
            return false;
        }
        self.done_ahead += 1;
        let order = self.order_of(psn);
        if before(self.read_order, order) {
            self.read_order = order;
        }
        // A READ is carried out after everything before it.
        if !self.acknowledge_marked(psn.distance_from(self.una) + 1) {
            self.settle();
        }
        true
    }

    /// After bits of `done` were set: forgets lost marks of what is done, moves `una`.
    fn settle(&mut self) {
        if self.lost_count > 0 {
            self.lost.clear_where(&self.done);
            self.lost_count = self.lost.count_range(self.una, self.outstanding());
        }
        let run = self
            .done
            .ones_from(self.una, self.acked.distance_from(self.una));
        if run == 0 {
            return;
        }
        self.done.clear_range(self.una, run);
        self.done_ahead -= run;
        if self.reads > 0 {
            self.reads -= self.read_end.count_range(self.una, run);
            self.read.clear_range(self.una, run);
            self.read_end.clear_range(self.una, run);
        }
        self.una = self.una.add(run);
    }

    /// Takes a selective acknowledgement: marks what arrived, finds what was lost. True on progress.
    pub(crate) fn selective(&mut self, sack: &Sack) -> bool {
        let mut progress = self.acknowledge(sack.cumulative);
        let bits = sack.words as u32 * 64;
        let first = sack.cumulative.add(2);
        // Transmission order of what the peer has.
        let mut seen: Option<u32> = None;
        let mut note = |order: u32| {
            if seen.is_none_or(|seen| before(seen, order)) {
                seen = Some(order);
            }
        };
        for i in 0..bits {
            let received = sack
                .bitmap
                .get(i as usize / 64)
                .is_some_and(|w| w >> (i % 64) & 1 == 1);
            let psn = first.add(i);
            if !received || !self.contains(psn) {
                continue;
            }
            note(self.order_of(psn));
            if !self.read.get(psn) && self.done.set(psn) {
                self.done_ahead += 1;
                progress = true;
            }
        }
        self.settle();
        let received = |psn: Psn| {
            let i = psn.distance_from(first);
            i < bits
                && sack
                    .bitmap
                    .get(i as usize / 64)
                    .is_some_and(|w| w >> (i % 64) & 1 == 1)
        };
        // A probe's answer leaves after everything before the probe: what it lacks is lost.
        let probe = sack.echo.filter(|&token| before(token, self.next_order));
        let cumulative_next = sack.cumulative.next();
        for i in 0..self.outstanding() {
            let psn = self.una.add(i);
            if self.lost.get(psn) {
                continue;
            }
            let order = self.order_of(psn);
            let at_peer = psn.is_before(cumulative_next) || received(psn);
            let by_probe = probe.is_some_and(|token| before(order, token));
            if self.done.get(psn) {
                let dropped =
                    by_probe && !at_peer && !self.is_acknowledged(psn) && !self.read.get(psn);
                if !dropped {
                    continue;
                }
                self.done.clear(psn);
                self.done_ahead -= 1;
            }
            let by_order =
                !at_peer && seen.is_some_and(|seen| !before(seen, order.wrapping_add(REORDER)));
            // What is at the peer and not done is a READ whose response is missing.
            if by_probe || by_order {
                self.lost.set(psn);
                self.lost_count += 1;
            }
        }
        progress
    }

    /// After READ data arrived with a gap before it: finds responses that were overtaken.
    pub(crate) fn find_lost_responses(&mut self, arrived: Psn) {
        let count = arrived.distance_from(self.una);
        if count >= self.outstanding() {
            return;
        }
        for i in 0..count {
            let psn = self.una.add(i);
            if !self.read.get(psn) || self.done.get(psn) || self.lost.get(psn) {
                continue;
            }
            if !before(self.read_order, self.order_of(psn).wrapping_add(REORDER)) {
                self.lost.set(psn);
                self.lost_count += 1;
            }
        }
    }

    /// READ responses up to `psn` that are missing are lost: a standard responder answers in order.
    pub(crate) fn lose_reads_to(&mut self, psn: Psn) {
        let count = psn
            .distance_from(self.una)
            .wrapping_add(1)
            .min(self.outstanding());
        for i in 0..count {
            let psn = self.una.add(i);
            if self.read.get(psn) && !self.done.get(psn) && self.lost.set(psn) {
                self.lost_count += 1;
            }
        }
    }

    /// Everything from `psn` on goes again (go-back-N).
    pub(crate) fn lose_from(&mut self, psn: Psn) {
        let skip = psn.distance_from(self.una);
        let outstanding = self.outstanding();
        if skip >= outstanding {
            return;
        }
        self.lost_count += self
            .lost
            .set_range_except(psn, outstanding - skip, &self.done);
    }

    /// Whether a cumulative acknowledgement has covered `psn`, which is outstanding.
    fn is_acknowledged(&self, psn: Psn) -> bool {
        psn.is_before(self.acked)
    }

    /// Whether a NAK for `psn` makes sense: a READ can still fail after it was acknowledged.
    pub(crate) fn may_be_refused(&self, psn: Psn) -> bool {
        self.contains(psn) && (!self.is_acknowledged(psn) || self.read.get(psn))
    }

    /// One packet goes again although the peer may have said that it has it (RNR).
    pub(crate) fn lose(&mut self, psn: Psn) {
        if !self.contains(psn) || self.is_acknowledged(psn) {
            return;
        }
        if self.done.get(psn) && !self.read.get(psn) {
            self.done.clear(psn);
            self.done_ahead -= 1;
        }
        if !self.done.get(psn) && self.lost.set(psn) {
            self.lost_count += 1;
        }
    }

    /// The first lost packet, and how many lost responses of one READ request follow each other there.
    pub(crate) fn first_lost(&self, limit: u32) -> Option<(Psn, u32)> {
        if self.lost_count == 0 {
            return None;
        }
        let outstanding = self.outstanding();
        let skip = self.lost.first_set(self.una, outstanding)?;
        let psn = self.una.add(skip);
        if !self.read.get(psn) {
            return Some((psn, 1));
        }
        // Never across two requests: the responder may have only the first.
        let limit = limit.min(outstanding - skip);
        let request = self
            .read_end
            .first_set(psn, limit)
            .map_or(limit, |end| end + 1);
        Some((psn, self.lost.ones_from(psn, request)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::sack::WORDS_MAX;

    fn sack(cumulative: Psn, received: &[u32], echo: Option<u32>) -> Sack {
        let mut bitmap = [0; WORDS_MAX];
        for &i in received {
            bitmap[i as usize / 64] |= 1 << (i % 64);
        }
        Sack {
            cumulative,
            echo,
            words: WORDS_MAX,
            bitmap,
        }
    }

    #[test]
    fn three_later_packets_make_a_hole_a_loss_and_once_only() {
        let mut board = Scoreboard::new(64);
        let first = Psn::new(0x00FF_FFFE);
        board.reset(first);
        for _ in 0..6 {
            board.send();
        }
        let cumulative = first.previous();
        // PSN first is missing; bit i is first + 1 + i.
        assert!(board.selective(&sack(cumulative, &[0, 1], None)));
        assert!(!board.has_lost());
        assert!(board.selective(&sack(cumulative, &[0, 1, 2], None)));
        assert_eq!(board.first_lost(9), Some((first, 1)));
        board.resend(first, 1);
        assert!(board.selective(&sack(cumulative, &[0, 1, 2, 3, 4], None)));
        assert!(
            !board.has_lost(),
            "sent again, and nothing later has arrived"
        );
        for _ in 0..3 {
            board.send();
        }
        board.selective(&sack(cumulative, &[0, 1, 2, 3, 4, 5, 6, 7], None));
        assert!(board.has_lost(), "the repetition was overtaken too");
        board.resend(first, 1);
        assert!(board.acknowledge(first));
        assert_eq!(
            board.una(),
            first.add(1),
            "only a cumulative acknowledgement is final"
        );
        let token = board.probe();
        board.selective(&sack(first, &[1, 2, 3, 4, 5, 6], Some(token)));
        assert_eq!(
            board.first_lost(9),
            Some((first.add(1), 1)),
            "the peer dropped it"
        );
        board.resend(first.add(1), 1);
        assert!(board.acknowledge(first.add(8)));
        assert_eq!(board.outstanding(), 0);
        assert_eq!(board.una(), first.add(9));
    }

    #[test]
    fn probe_finds_the_tail_and_missing_read_data() {
        let mut board = Scoreboard::new(64);
        board.reset(Psn::new(10));
        let write = board.send();
        let read = board.send_read(4);
        let tail = board.send();
        assert!(board.read_arrived(read));
        let token = board.probe();
        // The peer has the write and the READ request; the tail is missing.
        board.selective(&sack(read.add(3), &[], Some(token)));
        assert_eq!(board.una(), read.add(1), "{write:?} is done");
        assert_eq!(board.first_lost(64), Some((read.add(1), 3)));
        board.resend(read.add(1), 3);
        assert_eq!(board.first_lost(64), Some((tail, 1)));
        board.resend(tail, 1);
        for i in 1..4 {
            assert!(board.read_arrived(read.add(i)));
            assert!(!board.read_arrived(read.add(i)));
        }
        assert_eq!(board.reads(), 0);
        assert!(board.acknowledge(tail));
        assert_eq!(board.outstanding(), 0);
    }

    #[test]
    fn acknowledgements_of_what_is_not_outstanding_change_nothing() {
        let mut board = Scoreboard::new(16);
        board.reset(Psn::new(5));
        assert!(!board.acknowledge(Psn::new(5)));
        board.send();
        assert!(!board.acknowledge(Psn::new(6)));
        assert!(!board.acknowledge(Psn::new(4)));
        assert!(board.acknowledge(Psn::new(5)));
    }

    #[test]
    fn a_late_rnr_takes_nothing_back_that_was_acknowledged() {
        let mut board = Scoreboard::new(16);
        board.reset(Psn::new(5));
        let read = board.send_read(1);
        let send = board.send();
        assert!(board.acknowledge(send));
        assert_eq!(board.una(), read, "the READ has no data yet");
        board.lose(send);
        assert!(!board.has_lost());
        assert!(board.read_arrived(read));
        assert_eq!(board.outstanding(), 0);
    }

    proptest! {
        /// Counters and `una` agree with the bits whatever happens.
        #[test]
        fn invariants(start in 0u32..0x0100_0000, steps in prop::collection::vec((0u8..8, 0u32..64, any::<u64>()), 1..200)) {
            let mut board = Scoreboard::new(64);
            board.reset(Psn::new(start));
            for (kind, at, bits) in steps {
                let psn = board.una.add(at);
                match kind {
                    0 | 1 if board.outstanding() < 64 => { board.send(); }
                    2 if board.outstanding() + 8 <= 64 => { board.send_read(at % 8 + 1); }
                    3 => { board.acknowledge(psn); }
                    4 => { board.read_arrived(psn); board.find_lost_responses(psn); }
                    5 => {
                        let mut bitmap = [0; WORDS_MAX];
                        bitmap[0] = bits;
                        let echo = (bits & 1 == 1).then(|| board.probe());
                        board.selective(&Sack { cumulative: psn.sub(8), echo, words: 1, bitmap });
                    }
                    6 => board.lose_from(psn),
                    _ => if let Some((psn, count)) = board.first_lost(64) { board.resend(psn, count) },
                }
                let outstanding = board.outstanding();
                prop_assert!(outstanding <= 64);
                prop_assert_eq!(board.done.count(), board.done_ahead);
                prop_assert_eq!(board.lost.count(), board.lost_count);
                prop_assert_eq!(board.read_end.count(), board.reads);
                prop_assert_eq!(board.lost.count_range(board.una, outstanding), board.lost_count);
                prop_assert!(outstanding == 0 || board.una == board.acked || !board.done.get(board.una));
                prop_assert!(board.acked.distance_from(board.una) <= outstanding);
            }
        }
    }
}
