//! Requester: acknowledgements, READ data, NAKs and timers of the send queue.

use super::Env;
use super::request::Request;
use super::rtt::Rtt;
use super::scoreboard::Scoreboard;
use crate::memory::MemoryFault;
use crate::qp::{Kind, NEVER, Qp};
use crate::verbs::{Access, QpState, ReadyToSend, WcStatus};
use crate::wire::sack::Sack;
use crate::wire::{Aeth, NakCode, Psn, Syndrome};

/// `rnr_retry` that never ends (IBA 9.7.5.2.8).
const RNR_RETRY_FOREVER: u8 = 7;

/// How much longer than a silent peer one that answers, but never takes what it is sent, is borne.
const STALL_FACTOR: u64 = 4;

/// State of a queue pair's sending side.
pub(crate) struct Requester {
    pub(crate) board: Scoreboard,
    /// Last cumulative acknowledgement: most packets repeat it.
    last_ack: Psn,
    /// When to retransmit or to give up; [`NEVER`] with nothing outstanding.
    pub(crate) rto_at: u64,
    /// End of a wait for a receiver that was not ready.
    pub(crate) rnr_at: u64,
    rtt: Rtt,
    /// The packet whose round trip is measured, and when it left.
    timed: Option<(Psn, u64)>,
    pub(crate) first_psn: Psn,
    rnr_psn: Psn,
    pub(crate) max_reads: u16,
    retry_count: u8,
    rnr_retry: u8,
    /// Timeouts in a row without an answer; each doubles the next timeout.
    attempts: u8,
    /// When the first timeout since the last progress came.
    stalled_at: u64,
    rnr_attempts: u8,
    pub(crate) probe_pending: bool,
}

impl Requester {
    pub(crate) fn new(first_psn: Psn, window: u32) -> Self {
        let mut requester = Self {
            board: Scoreboard::new(window),
            last_ack: first_psn,
            rto_at: NEVER,
            rnr_at: NEVER,
            rtt: Rtt::default(),
            timed: None,
            first_psn,
            rnr_psn: first_psn,
            max_reads: 1,
            retry_count: 0,
            rnr_retry: 0,
            attempts: 0,
            stalled_at: NEVER,
            rnr_attempts: 0,
            probe_pending: false,
        };
        requester.reset(first_psn);
        requester
    }

    pub(crate) const fn memory_bytes(&self) -> usize {
        self.board.memory_bytes()
    }

    pub(crate) fn reset(&mut self, first_psn: Psn) {
        self.first_psn = first_psn;
        self.board.reset(first_psn);
        self.last_ack = first_psn.previous();
        self.rtt = Rtt::default();
        self.attempts = 0;
        self.rnr_attempts = 0;
        self.stop();
    }

    pub(crate) fn start(&mut self, args: &ReadyToSend) {
        self.reset(args.first_psn);
        self.max_reads = args.max_reads.max(1);
        self.retry_count = args.retry_count;
        self.rnr_retry = args.rnr_retry;
    }

    /// No more timers and probes.
    pub(crate) const fn stop(&mut self) {
        self.rto_at = NEVER;
        self.rnr_at = NEVER;
        self.timed = None;
        self.stalled_at = NEVER;
        self.probe_pending = false;
    }

    pub(crate) fn deadline(&self) -> u64 {
        self.rto_at.min(self.rnr_at)
    }

    /// A packet leaves for the first time.
    #[inline]
    pub(crate) fn on_sent(&mut self, env: &Env, now: u64, psn: Psn, is_read: bool) {
        if self.rto_at == NEVER {
            self.rto_at = now + self.timeout(env);
        }
        if self.timed.is_none() && !is_read {
            self.timed = Some((psn, now));
        }
    }

    /// A packet or a probe leaves again: what comes back cannot be timed.
    pub(crate) fn on_repeated(&mut self, env: &Env, now: u64) {
        self.timed = None;
        self.rto_at = now + self.timeout(env);
    }

    fn timeout(&self, env: &Env) -> u64 {
        self.rtt
            .timeout_ns(self.attempts, env.limits.min_rto_ns, env.limits.max_rto_ns)
    }

    /// Whether anything can leave now, besides what the responder has.
    #[inline]
    pub(crate) const fn may_send(&self) -> bool {
        self.rnr_at == NEVER
    }
}

impl Qp {
    /// Takes a cumulative acknowledgement, piggy-backed or not.
    #[inline]
    pub(crate) fn on_cumulative(&mut self, env: &mut Env, now: u64, psn: Psn) {
        if psn == self.req.last_ack {
            return;
        }
        if self.req.board.acknowledge(psn) {
            self.req.last_ack = psn;
            self.on_progress(env, now);
        }
    }

    /// After packets were finished: timers, round trip, completions.
    fn on_progress(&mut self, env: &mut Env, now: u64) {
        let req = &mut self.req;
        let una = req.board.una();
        req.attempts = 0;
        req.stalled_at = NEVER;
        req.rnr_attempts = 0;
        if let Some((psn, sent_at)) = req.timed
            && psn.is_before(una)
        {
            req.rtt.sample(now.saturating_sub(sent_at));
            req.timed = None;
        }
        req.rto_at = if req.board.outstanding() == 0 {
            NEVER
        } else {
            now + req.timeout(env)
        };
        self.complete_finished(env);
    }

    /// Completes requests from the head as far as they are finished.
    fn complete_finished(&mut self, env: &mut Env) {
        let una = self.req.board.una();
        while self.sq.head() != self.sq.next() {
            let Some(wqe) = self.sq.get(self.sq.head()) else {
                break;
            };
            // `una` never lies before the oldest request.
            if una.distance_from(wqe.first_psn) < wqe.packets {
                break;
            }
            self.complete_head(env, WcStatus::Success);
        }
    }

    /// Takes an explicit acknowledgement.
    pub(crate) fn on_aeth(&mut self, env: &mut Env, now: u64, psn: Psn, aeth: Aeth) {
        env.counters.acks_rx += 1;
        match aeth.syndrome {
            Syndrome::Ack => {
                self.on_cumulative(env, now, psn);
                if !self.path.is_flexins() && self.req.board.reads() > 0 {
                    // A standard responder answers in order, so READ data before it is missing.
                    self.req.board.lose_reads_to(psn);
                }
            }
            // Also late ones: what was acknowledged since is not refused any more.
            _ if !self.req.board.may_be_refused(psn) => env.counters.stale_psn += 1,
            Syndrome::RnrNak(code) => self.on_rnr(env, now, psn, code),
            Syndrome::Nak(code) => {
                env.counters.naks_rx += 1;
                self.on_cumulative(env, now, psn.previous());
                let status = match code {
                    NakCode::PsnSequence => {
                        self.req.board.lose_from(psn);
                        return;
                    }
                    NakCode::InvalidRequest => WcStatus::RemInvReqErr,
                    NakCode::RemoteAccess => WcStatus::RemAccessErr,
                    NakCode::RemoteOperational => WcStatus::RemOpErr,
                };
                self.fail_at(env, psn, status);
            }
        }
    }

    fn on_rnr(&mut self, env: &mut Env, now: u64, psn: Psn, code: u8) {
        env.counters.rnr_naks_rx += 1;
        let attempts = self.req.rnr_attempts;
        self.on_cumulative(env, now, psn.previous());
        let req = &mut self.req;
        // The peer is alive.
        req.attempts = 0;
        req.stalled_at = NEVER;
        if req.rnr_at != NEVER {
            return;
        }
        // Progress before this packet is none of this packet.
        if req.rnr_psn == psn {
            req.rnr_attempts = attempts;
        }
        req.rnr_psn = psn;
        if req.rnr_retry != RNR_RETRY_FOREVER {
            if req.rnr_attempts >= req.rnr_retry {
                return self.fail_at(env, psn, WcStatus::RnrRetryExcErr);
            }
            req.rnr_attempts += 1;
        }
        req.rnr_at = now + super::rnr::delay_ns(code);
        req.rto_at = NEVER;
        req.timed = None;
    }

    /// Takes a selective acknowledgement.
    pub(crate) fn on_sack(&mut self, env: &mut Env, now: u64, sack: &Sack) {
        env.counters.sacks_rx += 1;
        if self.req.board.selective(sack) {
            self.on_progress(env, now);
        } else if sack.echo.is_some() {
            // The peer is there: what is repeated now shall not wait long.
            self.req.attempts = 0;
        }
    }

    /// Takes the data of a READ response.
    pub(crate) fn on_read_response(&mut self, env: &mut Env, now: u64, response: &Request<'_>) {
        let psn = response.psn;
        if !self.req.board.contains(psn) || !self.req.board.is_read(psn) {
            env.counters.stale_psn += 1;
            return;
        }
        if self.req.board.is_done(psn) {
            env.counters.duplicates += 1;
            return;
        }
        let Some(index) = self.sq.find(psn) else {
            return;
        };
        let Some(wqe) = self.sq.get(index) else {
            return;
        };
        let segment = u64::from(wqe.segment);
        let offset = u64::from(psn.distance_from(wqe.first_psn)) * segment;
        let expected = u64::from(wqe.len).saturating_sub(offset).min(segment);
        if response.payload.len() as u64 != expected || wqe.kind != Kind::Read {
            return self.fail_at(env, psn, WcStatus::BadRespErr);
        }
        let placed = env.scatter(
            self.init.pd,
            self.sq.sges(index, wqe),
            offset as u32,
            response.payload,
        );
        if placed.is_err() {
            return self.fail_at(env, psn, WcStatus::LocProtErr);
        }
        let in_order = psn == self.req.board.una();
        if self.req.board.read_arrived(psn) {
            self.on_progress(env, now);
            if !in_order {
                self.req.board.find_lost_responses(psn);
            }
        }
    }

    /// What is due at `now`: retransmission and RNR timers.
    pub(crate) fn on_timer(&mut self, env: &mut Env, now: u64) {
        if self.req.rnr_at <= now {
            self.req.rnr_at = NEVER;
            let psn = self.req.rnr_psn;
            if self.path.is_flexins() {
                self.req.board.lose(psn);
            } else {
                self.req.board.lose_from(psn);
            }
            self.req.rto_at = now + self.req.timeout(env);
        }
        if self.req.rto_at <= now {
            self.req.rto_at = NEVER;
            if self.req.board.outstanding() == 0 {
                return;
            }
            env.counters.timeouts += 1;
            self.req.stalled_at = self.req.stalled_at.min(now);
            let stalled = now - self.req.stalled_at;
            let unanswered = self.req.attempts >= self.req.retry_count;
            let limit = env.limits.retry_time_ns;
            if stalled >= limit && (unanswered || stalled / STALL_FACTOR >= limit) {
                let una = self.req.board.una();
                return self.fail_at(env, una, WcStatus::RetryExcErr);
            }
            self.req.attempts = self.req.attempts.saturating_add(1);
            self.req.timed = None;
            if self.path.is_flexins() {
                // Asks what is missing; nothing is repeated on suspicion.
                self.req.probe_pending = true;
            } else {
                self.req.board.lose_from(self.req.board.una());
            }
            self.req.rto_at = now + self.req.timeout(env);
        }
    }

    /// The request that owns `psn` fails; those before and after it are flushed.
    pub(crate) fn fail_at(&mut self, env: &mut Env, psn: Psn, status: WcStatus) {
        let index = self.sq.find(psn).unwrap_or(self.sq.head());
        self.fail(env, index, status);
    }

    /// The same by place in the send queue.
    pub(crate) fn fail(&mut self, env: &mut Env, index: u32, status: WcStatus) {
        while self.sq.len() > 0 && self.sq.head() != index {
            self.complete_head(env, WcStatus::WrFlushErr);
        }
        if self.sq.len() > 0 {
            self.complete_head(env, status);
        }
        self.break_down(env, status);
    }

    /// Whether the requester has packets to send.
    #[inline]
    pub(crate) fn has_requests(&self) -> bool {
        if self.req.probe_pending {
            return true;
        }
        if !self.req.may_send()
            || !matches!(self.state, QpState::ReadyToSend | QpState::SendQueueDrain)
        {
            return false;
        }
        self.req.board.has_lost()
            || (self.sq.has_waiting() && self.req.board.outstanding() < self.path.window)
    }
}

impl Env {
    /// Copies `bytes` to `offset` of a scatter list.
    pub(crate) fn scatter(
        &mut self,
        pd: crate::verbs::Pd,
        sges: &[crate::verbs::Sge],
        offset: u32,
        bytes: &[u8],
    ) -> Result<(), MemoryFault> {
        let mut skip = offset;
        let mut left = bytes;
        for sge in sges {
            if left.is_empty() {
                break;
            }
            if skip >= sge.len {
                skip -= sge.len;
                continue;
            }
            let count = left.len().min((sge.len - skip) as usize);
            let (now, later) = left.split_at(count);
            let addr = sge.addr.wrapping_add(u64::from(skip));
            let span = self
                .mrs
                .local(pd, sge.lkey, addr, count as u32, Access::LOCAL_WRITE)?;
            span.copy_from_slice(now);
            self.counters.rx_payload_bytes_placed += count as u64;
            left = later;
            skip = 0;
        }
        if left.is_empty() {
            Ok(())
        } else {
            Err(MemoryFault::Bounds)
        }
    }
}
