//! Responder: requests of the peer, executed once and in order; WRITE data placed on arrival.

use std::collections::VecDeque;

use super::Env;
use super::psn_bits::{PsnBits, WINDOW_BITS};
use super::request::{Request, packets_of, segment_of};
use crate::memory::MemoryFault;
use crate::qp::{NEVER, Qp};
use crate::verbs::{Access, QpState, WcStatus};
use crate::wire::{NakCode, Opcode, Psn, Reth, Syndrome};

/// What a held message costs of the budget beside its bytes.
const HELD_OVERHEAD_BYTES: usize = 96;
/// How far back a request may be and still be answered as a duplicate.
const DUPLICATE_WINDOW: u32 = 2 * WINDOW_BITS;

/// READ data that is still to be sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReadJob {
    pub(crate) psn: Psn,
    pub(crate) addr: u64,
    pub(crate) rkey: u32,
    pub(crate) left: u32,
    /// Payload bytes of each packet but the last; packets have at most 61440.
    pub(crate) segment: u16,
    /// Nothing of it has been sent.
    pub(crate) fresh: bool,
}

const _: () = assert!(size_of::<ReadJob>() == 24);

/// A message that waits for a gap before it to close.
struct Held {
    psn: Psn,
    opcode: Opcode,
    ack_req: bool,
    solicited: bool,
    reth: Reth,
    word: u32,
    payload: Box<[u8]>,
}

/// A message of several packets under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Assembly {
    None,
    Send {
        offset: u32,
    },
    Write {
        addr: u64,
        rkey: u32,
        left: u32,
        total: u32,
    },
}

/// State of a queue pair's receiving side.
pub(crate) struct Responder {
    pub(crate) expected: Psn,
    /// Messages completed (24 bit).
    pub(crate) msn: u32,
    /// Requests received since an acknowledgement last left.
    pub(crate) unacked: u32,
    /// When the delayed acknowledgement is due.
    pub(crate) ack_at: u64,
    pub(crate) ack_now: bool,
    pub(crate) sack_now: bool,
    nak_sent: bool,
    /// A packet of the peer has come.
    pub(crate) heard: bool,
    pub(super) assembly: Assembly,
    /// Received beyond `expected`.
    pub(crate) ahead: PsnBits,
    pub(crate) ahead_count: u32,
    /// Token of a probe to answer after the READ data.
    pub(crate) echo: Option<u32>,
    pub(crate) nak: Option<(Syndrome, Psn)>,
    /// The NAK that ended the connection, for a peer that has missed it.
    fatal: Option<(Syndrome, Psn)>,
    pub(crate) reads: VecDeque<ReadJob>,
    reads_max: usize,
    held: VecDeque<Held>,
}

/// What became of a request that was in order.
pub(super) enum Verdict {
    /// Carried out; it took so many sequence numbers.
    Done(u32),
    /// Not taken; the peer will repeat it.
    Drop,
    /// No receive request.
    NotReady,
    /// Never.
    Refuse(NakCode),
}

impl From<MemoryFault> for Verdict {
    fn from(_: MemoryFault) -> Self {
        Self::Refuse(NakCode::RemoteAccess)
    }
}

impl Responder {
    pub(crate) fn new(max_reads: u8) -> Self {
        // Twice, because repeated READs queue beside the first ones.
        let reads_max = usize::from(max_reads.max(1)) * 2;
        Self {
            expected: Psn::new(0),
            msn: 0,
            unacked: 0,
            ack_at: NEVER,
            ack_now: false,
            sack_now: false,
            nak_sent: false,
            heard: false,
            assembly: Assembly::None,
            ahead: PsnBits::new(),
            ahead_count: 0,
            echo: None,
            nak: None,
            fatal: None,
            reads: VecDeque::new(),
            reads_max,
            held: VecDeque::new(),
        }
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        // READ jobs are allocated when the first READ comes, up to this.
        self.reads_max.next_power_of_two() * size_of::<ReadJob>()
            + self
                .held
                .iter()
                .map(|held| held.payload.len() + HELD_OVERHEAD_BYTES)
                .sum::<usize>()
    }

    pub(crate) fn start(&mut self, expected: Psn) {
        self.expected = expected;
    }

    /// Forgets what is queued, but not how the connection ended.
    pub(crate) fn stop(&mut self, env: &mut Env) {
        for held in self.held.drain(..) {
            env.held_bytes -= held.payload.len() + HELD_OVERHEAD_BYTES;
        }
        self.ahead.reset();
        self.ahead_count = 0;
        self.ack_at = NEVER;
        self.unacked = 0;
        self.ack_now = false;
        self.sack_now = false;
        self.echo = None;
        self.assembly = Assembly::None;
        if self.fatal.is_none() {
            self.reads.clear();
            self.nak = None;
        }
    }

    pub(crate) fn reset(&mut self, env: &mut Env) {
        self.fatal = None;
        self.stop(env);
        self.nak_sent = false;
        self.heard = false;
        self.msn = 0;
    }

    /// The last sequence number received in order.
    #[inline]
    pub(crate) const fn cumulative(&self) -> Psn {
        self.expected.previous()
    }

    /// An acknowledgement has left, piggy-backed or not.
    #[inline]
    pub(crate) const fn on_acknowledged(&mut self) {
        self.unacked = 0;
        self.ack_at = NEVER;
        self.ack_now = false;
    }

    /// The delayed acknowledgement is due.
    #[inline]
    pub(crate) const fn acknowledge_now(&mut self) {
        self.ack_now = true;
        self.ack_at = NEVER;
    }

    /// Whether the responder has packets to send.
    #[inline]
    pub(crate) fn has_responses(&self) -> bool {
        self.ack_now || self.has_more_than_acknowledgements()
    }

    /// The same, but for what any packet carries.
    #[inline]
    pub(crate) fn has_more_than_acknowledgements(&self) -> bool {
        self.sack_now || self.nak.is_some() || self.echo.is_some() || !self.reads.is_empty()
    }

    /// The next packets that are expected are not ahead of it any more.
    fn forget_ahead(&mut self, packets: u32) {
        self.ahead_count -= self.ahead.count_range(self.expected, packets);
        self.ahead.clear_range(self.expected, packets);
    }

    /// Drops held parts of a READ that was carried out as a whole meanwhile.
    #[cold]
    fn drop_passed(&mut self, env: &mut Env) {
        let expected = self.expected;
        while let Some(held) = self.held.pop_front_if(|held| held.psn.is_before(expected)) {
            env.held_bytes -= held.payload.len() + HELD_OVERHEAD_BYTES;
        }
    }

    pub(super) fn queue_read(&mut self, job: ReadJob) -> bool {
        if self.reads.len() >= self.reads_max {
            return false;
        }
        if self.reads.capacity() == 0 {
            self.reads.reserve_exact(self.reads_max);
        }
        self.reads.push_back(job);
        true
    }
}

impl Qp {
    /// Takes a request packet.
    pub(crate) fn on_request(&mut self, env: &mut Env, now: u64, request: &Request<'_>) {
        if request.psn == self.resp.expected {
            return self.on_expected(env, now, request);
        }
        let ahead = request.psn.distance_from(self.resp.expected);
        if ahead < WINDOW_BITS {
            return self.on_ahead(env, request, ahead);
        }
        let behind = self.resp.expected.distance_from(request.psn);
        if behind <= DUPLICATE_WINDOW {
            return self.on_duplicate(env, now, request, behind);
        }
        env.counters.stale_psn += 1;
    }

    /// In the error state: repeats the NAK that ended it.
    pub(crate) fn on_request_after_failure(&mut self) {
        self.resp.nak = self.resp.fatal;
    }

    fn on_expected(&mut self, env: &mut Env, now: u64, request: &Request<'_>) {
        let verdict = self.execute(env, request);
        if self.conclude(env, now, request, verdict) && self.resp.ahead_count > 0 {
            self.on_gap_closed(env, now);
        }
    }

    /// Goes on with what had arrived behind a gap, and tells at once.
    fn on_gap_closed(&mut self, env: &mut Env, now: u64) {
        self.resp.acknowledge_now();
        while self.resp.ahead_count > 0 && self.resp.ahead.get(self.resp.expected) {
            let psn = self.resp.expected;
            if self.resp.held.front().is_none_or(|held| held.psn != psn) {
                // WRITE data that is in its place already.
                self.finish(env, now, 1, false);
                continue;
            }
            let Some(held) = self.resp.held.pop_front() else {
                break;
            };
            env.held_bytes -= held.payload.len() + HELD_OVERHEAD_BYTES;
            let again = Request {
                opcode: held.opcode,
                psn,
                ack_req: held.ack_req,
                solicited: held.solicited,
                reth: held.reth,
                word: held.word,
                payload: &held.payload,
                payload_at: None,
            };
            // Not ahead any more; if it is not carried out it has to come again.
            self.resp.forget_ahead(self.packets_of_request(&again));
            let verdict = self.execute(env, &again);
            if !self.conclude(env, now, &again, verdict) {
                break;
            }
        }
        if self.resp.ahead_count > 0 && self.state.can_receive() {
            self.resp.sack_now = true;
        }
    }

    /// Acts on the outcome of a request in order. False when it was not carried out.
    fn conclude(
        &mut self,
        env: &mut Env,
        now: u64,
        request: &Request<'_>,
        verdict: Verdict,
    ) -> bool {
        match verdict {
            Verdict::Done(packets) => {
                self.resp.nak_sent = false;
                self.finish(env, now, packets, request.ack_req);
                return true;
            }
            Verdict::Drop => {}
            Verdict::NotReady => {
                // What follows it is out of sequence, but that is no news to the requester.
                self.resp.nak_sent = true;
                self.resp.nak = Some((Syndrome::RnrNak(env.limits.rnr_code), request.psn));
            }
            Verdict::Refuse(code) => self.refuse(env, code, request.psn),
        }
        false
    }

    /// Ends the connection with a NAK.
    pub(crate) fn refuse(&mut self, env: &mut Env, code: NakCode, psn: Psn) {
        self.resp.fatal = Some((Syndrome::Nak(code), psn));
        self.resp.nak = self.resp.fatal;
        let status = match code {
            NakCode::RemoteAccess => WcStatus::RemAccessErr,
            NakCode::RemoteOperational => WcStatus::RemOpErr,
            NakCode::InvalidRequest | NakCode::PsnSequence => WcStatus::RemInvReqErr,
        };
        self.break_down(env, status);
    }

    /// Moves on by `packets`, and decides when that is acknowledged.
    #[inline]
    fn finish(&mut self, env: &mut Env, now: u64, packets: u32, ack_req: bool) {
        let resp = &mut self.resp;
        if resp.ahead_count > 0 {
            resp.forget_ahead(packets);
        }
        resp.expected = resp.expected.add(packets);
        if !resp.held.is_empty() {
            resp.drop_passed(env);
        }
        resp.unacked += 1;
        if ack_req || resp.unacked >= env.limits.ack_coalesce {
            resp.acknowledge_now();
        } else if resp.ack_at == NEVER && !resp.ack_now {
            resp.ack_at = now + env.limits.ack_delay_ns;
        }
    }

    fn packets_of_request(&self, request: &Request<'_>) -> u32 {
        if request.opcode == Opcode::ReadRequest {
            packets_of(request.reth.len, self.path.mtu)
        } else {
            1
        }
    }

    /// A packet after a gap.
    fn on_ahead(&mut self, env: &mut Env, request: &Request<'_>, ahead: u32) {
        env.counters.out_of_order += 1;
        if !self.path.is_flexins() {
            // Go-back-N: one NAK per gap (IBA 9.7.5.2.4).
            if !self.resp.nak_sent {
                self.resp.nak_sent = true;
                self.resp.nak = Some((Syndrome::Nak(NakCode::PsnSequence), self.resp.expected));
            }
            return;
        }
        self.resp.sack_now = true;
        if self.resp.ahead.get(request.psn) {
            env.counters.duplicates += 1;
            return;
        }
        let packets = self.packets_of_request(request);
        if packets > WINDOW_BITS - ahead || request.payload.len() > self.path.mtu as usize {
            return;
        }
        let taken = match request.opcode {
            // What fails here is not taken, comes again in order and is refused then.
            Opcode::WriteOnly => self.place(env, request).is_ok(),
            Opcode::WriteOnlyImm => {
                self.place(env, request).is_ok() && self.hold(env, request, &[])
            }
            Opcode::ReadRequest => self.hold(env, request, &[]),
            opcode if opcode.is_send() => self.hold(env, request, request.payload),
            _ => false,
        };
        if taken {
            self.resp.ahead_count += packets - self.resp.ahead.count_range(request.psn, packets);
            self.resp.ahead.set_range(request.psn, packets);
        }
    }

    /// Keeps a message until the gap before it closes.
    fn hold(&mut self, env: &mut Env, request: &Request<'_>, payload: &[u8]) -> bool {
        let cost = payload.len() + HELD_OVERHEAD_BYTES;
        if env.held_bytes + cost > env.limits.hold_budget_bytes {
            env.counters.hold_overflows += 1;
            return false;
        }
        env.held_bytes += cost;
        env.counters.held += 1;
        let expected = self.resp.expected;
        let distance = request.psn.distance_from(expected);
        let at = self
            .resp
            .held
            .partition_point(|held| held.psn.distance_from(expected) < distance);
        self.resp.held.insert(
            at,
            Held {
                psn: request.psn,
                opcode: request.opcode,
                ack_req: request.ack_req,
                solicited: request.solicited,
                reth: request.reth,
                word: request.word,
                payload: payload.into(),
            },
        );
        true
    }

    /// A request that was carried out before: READs are answered again, the rest acknowledged.
    fn on_duplicate(&mut self, env: &mut Env, now: u64, request: &Request<'_>, behind: u32) {
        env.counters.duplicates += 1;
        if request.opcode != Opcode::ReadRequest {
            if self.path.is_flexins() && self.resp.ahead_count > 0 {
                self.resp.sack_now = true;
            } else {
                self.resp.acknowledge_now();
            }
            return;
        }
        let Reth { addr, rkey, len } = request.reth;
        let readable = self.access.contains(Access::REMOTE_READ)
            && (len == 0
                || env
                    .mrs
                    .remote(self.init.pd, rkey, addr, len, Access::REMOTE_READ)
                    .is_ok());
        let packets = packets_of(len, self.path.mtu);
        // A FlexiNS requester that has lost all of a READ may first ask for a part, and later for
        // more: then the end of the request is new.
        let fresh = packets.saturating_sub(behind);
        if !readable || (fresh > 0 && !self.path.is_flexins()) || packets > WINDOW_BITS {
            return;
        }
        let job = ReadJob {
            psn: request.psn,
            addr,
            rkey,
            left: len,
            segment: segment_of(len, self.path.mtu, self.path.framing) as u16,
            fresh: true,
        };
        if !self.resp.queue_read(job) {
            env.counters.read_overflows += 1;
        } else if fresh > 0 {
            self.finish(env, now, fresh, request.ack_req);
            if self.resp.ahead_count > 0 {
                self.on_gap_closed(env, now);
            }
        }
    }

    /// Takes a probe: the answer leaves after the READ data that is queued now.
    pub(crate) fn on_probe(&mut self, env: &mut Env, next_psn: Psn, token: u32) {
        let ahead = next_psn.distance_from(self.resp.expected);
        let behind = self.resp.expected.distance_from(next_psn);
        if ahead > WINDOW_BITS && behind > DUPLICATE_WINDOW {
            env.counters.stale_psn += 1;
            return;
        }
        self.resp.echo = Some(token);
    }

    /// Whether packets of the error state may still leave: the NAK that explains it.
    pub(crate) const fn may_transmit(&self) -> bool {
        self.state.can_transmit()
            || (matches!(self.state, QpState::Error) && self.resp.nak.is_some())
    }
}
