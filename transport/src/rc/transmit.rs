//! What a queue pair sends next: NAKs, acknowledgements, probes, repetitions, READ data, requests.

use arrayvec::ArrayVec;
use flexblk_reactor::Span;

use super::Env;
use super::packet::{Contents, write};
use super::request::{packets_of, segment_of};
use crate::engine::TrainSink;
use crate::memory::MemoryFault;
use crate::qp::{Kind, Qp, SendWqe};
use crate::verbs::{Access, AckRequest, Framing, MAX_SGE, QpState, SendFlags, WcStatus};
use crate::wire::sack::{self, Sack};
use crate::wire::{
    Aeth, Bth, IMM_LEN_BYTES, NakCode, Opcode, Probe, Psn, RETH_LEN_BYTES, Reth, Syndrome,
};

/// Sequence numbers that one READ request asks for at most. A longer READ is several requests, so
/// that it fits the window, and its data does not hold up other answers for long.
const READ_PACKETS_MAX: u32 = 64;

/// How far a queue pair came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Nothing more to send now.
    Idle,
    /// The budget is used up.
    More,
    /// The sink has no room.
    Full,
}

/// One step of it.
enum Step {
    Sent,
    Nothing,
    Full,
}

/// Sends up to `budget` packets of a queue pair.
pub(crate) fn transmit<S: TrainSink>(
    qp: &mut Qp,
    env: &mut Env,
    now: u64,
    sink: &mut S,
    budget: u32,
) -> Progress {
    if !qp.may_transmit() {
        return Progress::Idle;
    }
    let mut left = budget;
    // Sends with `$stage` until it has nothing, or `$floor` packets of the budget are left.
    macro_rules! drain {
        ($stage:ident, $floor:expr) => {
            while left > $floor {
                match $stage(qp, env, now, sink) {
                    Step::Sent => left -= 1,
                    Step::Nothing => break,
                    Step::Full => return Progress::Full,
                }
            }
        };
    }
    // Most of the time there are new requests only.
    if qp.req.probe_pending || qp.req.board.has_lost() {
        drain!(send_probe, 0);
        drain!(send_lost, 0);
    }
    if qp.resp.has_more_than_acknowledgements() {
        drain!(send_selective, 0);
        // READ data leaves half of the budget to our own requests.
        let floor = if qp.sq.has_waiting() { budget / 2 } else { 0 };
        drain!(send_read_data, floor);
        drain!(send_refusal, 0);
    }
    drain!(send_request, 0);
    // Now, if nothing has carried it.
    if qp.resp.ack_now
        && let Step::Full = send_acknowledgement(qp, env, sink)
    {
        return Progress::Full;
    }
    // Whatever else is left waits for an acknowledgement or a timer.
    if qp.may_transmit() && (left == 0 || !qp.resp.reads.is_empty()) {
        Progress::More
    } else {
        Progress::Idle
    }
}

/// Writes a packet; every one between FlexiNS peers carries the acknowledgement too.
#[inline]
fn send<S: TrainSink>(qp: &mut Qp, env: &mut Env, sink: &mut S, contents: &Contents<'_>) -> Step {
    if !write(sink, &qp.path, env, contents, qp.resp.cumulative()) {
        return Step::Full;
    }
    if qp.path.is_flexins() {
        qp.resp.on_acknowledged();
    }
    Step::Sent
}

#[inline]
fn bth(qp: &Qp, opcode: Opcode, psn: Psn) -> Bth {
    Bth {
        opcode,
        solicited: false,
        pad: 0,
        dest_qpn: qp.path.peer_qpn,
        ack_req: false,
        psn,
    }
}

fn send_probe<S: TrainSink>(qp: &mut Qp, env: &mut Env, now: u64, sink: &mut S) -> Step {
    if !qp.req.probe_pending {
        return Step::Nothing;
    }
    let token = qp.req.board.probe();
    let contents = Contents {
        bth: bth(qp, Opcode::Probe, qp.req.board.next()),
        headers: &Probe { token }.emit(),
        inline: &[],
        spans: &[],
    };
    let step = send(qp, env, sink, &contents);
    if let Step::Sent = step {
        qp.req.probe_pending = false;
        qp.req.on_repeated(env, now);
        env.counters.probes_tx += 1;
    }
    step
}

/// Repeats the first packet that was lost.
fn send_lost<S: TrainSink>(qp: &mut Qp, env: &mut Env, now: u64, sink: &mut S) -> Step {
    if !qp.req.board.has_lost() || !qp.req.may_send() {
        return Step::Nothing;
    }
    let Some((psn, run)) = qp.req.board.first_lost(READ_PACKETS_MAX) else {
        return Step::Nothing;
    };
    let Some(index) = qp.sq.find(psn) else {
        return Step::Nothing;
    };
    let Some(wqe) = qp.sq.get(index).copied() else {
        return Step::Nothing;
    };
    let place = psn.distance_from(wqe.first_psn);
    // Data of another READ needs a request of its own.
    let run = read_run(&wqe, qp.path.framing, place, run.min(wqe.packets - place));
    let step = send_part(qp, env, sink, index, &wqe, psn, place, run, true);
    if let Step::Sent = step {
        qp.req.board.resend(psn, run);
        qp.req.on_repeated(env, now);
        env.counters.retransmissions += 1;
    }
    step
}

/// Sends new packets: the next part of the request under way, or the first of the next one.
#[inline]
fn send_request<S: TrainSink>(qp: &mut Qp, env: &mut Env, now: u64, sink: &mut S) -> Step {
    if !qp.sq.has_waiting()
        || !qp.req.may_send()
        || !matches!(qp.state, QpState::ReadyToSend | QpState::SendQueueDrain)
    {
        return Step::Nothing;
    }
    let room = qp.path.window.saturating_sub(qp.req.board.outstanding());
    if room == 0 {
        return Step::Nothing;
    }
    let mtu = qp.path.mtu;
    let index = qp.sq.next();
    let next_psn = qp.req.board.next();
    let Some(wqe) = qp.sq.get_mut(index) else {
        return Step::Nothing;
    };
    if wqe.packets == 0 {
        // Its first packet.
        if qp.state == QpState::SendQueueDrain {
            return Step::Nothing;
        }
        if wqe.flags.contains(SendFlags::FENCE) && qp.req.board.reads() > 0 {
            return Step::Nothing;
        }
        wqe.first_psn = next_psn;
        wqe.packets = packets_of(wqe.len, mtu);
        wqe.segment = segment_of(wqe.len, mtu, qp.path.framing);
    }
    let wqe = *wqe;
    let place = next_psn.distance_from(wqe.first_psn);
    let left = wqe.packets - place;
    let is_read = wqe.kind == Kind::Read;
    let run = if is_read {
        if qp.req.board.reads() >= u32::from(qp.req.max_reads) {
            return Step::Nothing;
        }
        let run = left.min(READ_PACKETS_MAX).min(room);
        read_run(&wqe, qp.path.framing, place, run)
    } else {
        1
    };
    // The last packet before the window is full asks for an acknowledgement; so does the last one for
    // now, if somebody waits for its completion and no answer of the peer will carry it.
    let outstanding = qp.req.board.outstanding() + run;
    let ack_req = room == run
        || (qp.init.ack_request == AckRequest::Last
            && run == left
            && !is_read
            && wqe.flags.contains(SendFlags::SIGNALED)
            && qp.sq.is_last(index)
            && outstanding < env.limits.ack_coalesce);
    let step = send_part(qp, env, sink, index, &wqe, next_psn, place, run, ack_req);
    if let Step::Sent = step {
        if is_read {
            qp.req.board.send_read(run);
        } else {
            qp.req.board.send();
        }
        qp.req.on_sent(env, now, next_psn, is_read);
        if run == left {
            qp.sq.advance_next();
        }
    }
    step
}

/// How many of `run` packets of a request from number `place` on one READ request can ask for. A
/// FlexiNS responder cuts evenly what it is asked for: the whole, or whole segments.
fn read_run(wqe: &SendWqe, framing: Framing, place: u32, run: u32) -> u32 {
    let ragged = framing == Framing::Flexins && !wqe.len.is_multiple_of(wqe.segment.max(1));
    if ragged && place > 0 && run > 1 && place + run == wqe.packets {
        run - 1
    } else {
        run
    }
}

/// Writes packet number `place` of a request (for a READ: asks for `run` packets from there on).
#[expect(clippy::too_many_arguments, reason = "one packet's coordinates")]
#[inline]
fn send_part<S: TrainSink>(
    qp: &mut Qp,
    env: &mut Env,
    sink: &mut S,
    index: u32,
    wqe: &SendWqe,
    psn: Psn,
    place: u32,
    run: u32,
    ack_req: bool,
) -> Step {
    let flexins = qp.path.is_flexins();
    let offset = place * wqe.segment;
    let ends = place + run == wqe.packets;
    let chunk = (wqe.len - offset.min(wqe.len)).min(wqe.segment.saturating_mul(run));
    let (opcode, with_reth) = match wqe.kind {
        Kind::Read => (Opcode::ReadRequest, true),
        Kind::Write | Kind::WriteImm => {
            let has_imm = ends && wqe.kind == Kind::WriteImm;
            if flexins || wqe.packets == 1 {
                (
                    if has_imm {
                        Opcode::WriteOnlyImm
                    } else {
                        Opcode::WriteOnly
                    },
                    true,
                )
            } else if place == 0 {
                (Opcode::WriteFirst, true)
            } else {
                let last = if has_imm {
                    Opcode::WriteLastImm
                } else {
                    Opcode::WriteLast
                };
                (if ends { last } else { Opcode::WriteMiddle }, false)
            }
        }
        kind => (send_opcode(kind, place == 0, ends), false),
    };

    let mut headers = [0; RETH_LEN_BYTES + IMM_LEN_BYTES];
    let mut headers_len = 0;
    if with_reth {
        let reth = Reth {
            // Self-contained: the packet's own address. A FIRST is at offset 0 anyway.
            addr: wqe.remote.wrapping_add(u64::from(offset)),
            rkey: wqe.rkey,
            len: if wqe.kind == Kind::Read {
                chunk
            } else {
                wqe.len
            },
        };
        headers[..RETH_LEN_BYTES].copy_from_slice(&reth.emit());
        headers_len = RETH_LEN_BYTES;
    }
    if opcode.has_imm() || opcode.has_ieth() {
        let word = if opcode.has_imm() { wqe.imm } else { wqe.rkey };
        headers[headers_len..headers_len + IMM_LEN_BYTES].copy_from_slice(&word.to_be_bytes());
        headers_len += IMM_LEN_BYTES;
    }

    let mut spans = ArrayVec::<Span, MAX_SGE>::new();
    let mut inline: &[u8] = &[];
    if wqe.kind != Kind::Read {
        let inline_all = qp.sq.inline(index, wqe);
        let inline_len = inline_all.len() as u32;
        let from = offset.min(inline_len);
        let to = (offset + chunk).min(inline_len);
        inline = inline_all.get(from as usize..to as usize).unwrap_or(&[]);
        let gather = chunk - inline.len() as u32;
        let skip = offset - from;
        if resolve(qp, env, index, wqe, skip, gather, &mut spans).is_err() {
            return fail_local(qp, env, index);
        }
    }
    let mut bth = bth(qp, opcode, psn);
    bth.ack_req = ack_req || (!flexins && ends);
    bth.solicited = ends && wqe.flags.contains(SendFlags::SOLICITED);
    let contents = Contents {
        bth,
        headers: &headers[..headers_len],
        inline,
        spans: &spans,
    };
    if !write(sink, &qp.path, env, &contents, qp.resp.cumulative()) {
        return Step::Full;
    }
    if flexins {
        qp.resp.on_acknowledged();
    }
    Step::Sent
}

const fn send_opcode(kind: Kind, starts: bool, ends: bool) -> Opcode {
    match (starts, ends, kind) {
        (true, true, Kind::SendImm) => Opcode::SendOnlyImm,
        (true, true, Kind::SendInv) => Opcode::SendOnlyInv,
        (true, true, _) => Opcode::SendOnly,
        (true, false, _) => Opcode::SendFirst,
        (false, false, _) => Opcode::SendMiddle,
        (false, true, Kind::SendImm) => Opcode::SendLastImm,
        (false, true, Kind::SendInv) => Opcode::SendLastInv,
        (false, true, _) => Opcode::SendLast,
    }
}

/// Looks up `count` gathered bytes from `skip` on.
#[inline]
fn resolve(
    qp: &Qp,
    env: &Env,
    index: u32,
    wqe: &SendWqe,
    mut skip: u32,
    mut count: u32,
    spans: &mut ArrayVec<Span, MAX_SGE>,
) -> Result<(), MemoryFault> {
    for sge in qp.sq.sges(index, wqe) {
        if count == 0 {
            break;
        }
        if skip >= sge.len {
            skip -= sge.len;
            continue;
        }
        let len = count.min(sge.len - skip);
        let addr = sge.addr.wrapping_add(u64::from(skip));
        let span = env
            .mrs
            .local(qp.init.pd, sge.lkey, addr, len, Access::empty())?;
        spans.try_push(span).map_err(|_| MemoryFault::Bounds)?;
        skip = 0;
        count -= len;
    }
    if count == 0 {
        Ok(())
    } else {
        Err(MemoryFault::Bounds)
    }
}

/// A request cannot be sent for a fault of ours. It fails once all before it have ended.
fn fail_local(qp: &mut Qp, env: &mut Env, index: u32) -> Step {
    if index == qp.sq.head() {
        qp.fail(env, index, WcStatus::LocProtErr);
    }
    Step::Nothing
}

/// Sends a selective acknowledgement: because of a gap, or as the answer to a probe.
fn send_selective<S: TrainSink>(qp: &mut Qp, env: &mut Env, _: u64, sink: &mut S) -> Step {
    // The answer to a probe says that all READ data has left.
    let echo = if qp.resp.reads.is_empty() {
        qp.resp.echo
    } else {
        None
    };
    if !qp.resp.sack_now && echo.is_none() {
        return Step::Nothing;
    }
    let cumulative = qp.resp.cumulative();
    let first = cumulative.add(2);
    let bits = if qp.resp.ahead_count == 0 {
        0
    } else {
        qp.resp
            .ahead
            .last_set(first, super::psn_bits::WINDOW_BITS - 1)
            .map_or(0, |last| last + 1)
    };
    let words = bits.div_ceil(64) as usize;
    let mut bitmap = [0; sack::WORDS_MAX];
    for (i, word) in bitmap.iter_mut().take(words).enumerate() {
        *word = qp.resp.ahead.word_from(first.add(i as u32 * 64));
    }
    let message = Sack {
        cumulative,
        echo,
        words,
        bitmap,
    };
    let mut body = [0; sack::LEN_MAX_BYTES];
    let Some(body) = body.get_mut(..message.body_len()) else {
        return Step::Nothing;
    };
    if !message.emit(body) {
        return Step::Nothing;
    }
    let contents = Contents {
        bth: bth(qp, Opcode::Sack, cumulative),
        headers: body,
        inline: &[],
        spans: &[],
    };
    let step = send(qp, env, sink, &contents);
    if let Step::Sent = step {
        qp.resp.sack_now = false;
        if echo.is_some() {
            qp.resp.echo = None;
        }
        env.counters.sacks_tx += 1;
    }
    step
}

/// Sends one packet of READ data.
fn send_read_data<S: TrainSink>(qp: &mut Qp, env: &mut Env, _: u64, sink: &mut S) -> Step {
    let Some(job) = qp.resp.reads.front().copied() else {
        return Step::Nothing;
    };
    let chunk = job.left.min(u32::from(job.segment));
    let last = chunk == job.left;
    let opcode = if qp.path.is_flexins() {
        Opcode::ReadResponseOnly
    } else {
        match (job.fresh, last) {
            (true, true) => Opcode::ReadResponseOnly,
            (true, false) => Opcode::ReadResponseFirst,
            (false, false) => Opcode::ReadResponseMiddle,
            (false, true) => Opcode::ReadResponseLast,
        }
    };
    let mut spans = ArrayVec::<Span, 1>::new();
    if chunk > 0 {
        match env
            .mrs
            .remote(qp.init.pd, job.rkey, job.addr, chunk, Access::REMOTE_READ)
        {
            Ok(span) => spans.push(span),
            Err(_) => {
                qp.resp.reads.clear();
                qp.refuse(env, NakCode::RemoteAccess, job.psn);
                return Step::Nothing;
            }
        }
    }
    let aeth = Aeth {
        syndrome: Syndrome::Ack,
        msn: qp.resp.msn,
    }
    .emit();
    let headers: &[u8] = if opcode.has_aeth() { &aeth } else { &[] };
    let contents = Contents {
        bth: bth(qp, opcode, job.psn),
        headers,
        inline: &[],
        spans: &spans,
    };
    let step = send(qp, env, sink, &contents);
    if let Step::Sent = step {
        if last {
            qp.resp.reads.pop_front();
        } else if let Some(job) = qp.resp.reads.front_mut() {
            job.psn = job.psn.next();
            job.addr = job.addr.wrapping_add(u64::from(chunk));
            job.left -= chunk;
            job.fresh = false;
        }
    }
    step
}

/// Sends a NAK, after the READ data that was asked for before.
fn send_refusal<S: TrainSink>(qp: &mut Qp, env: &mut Env, _: u64, sink: &mut S) -> Step {
    let Some((syndrome, psn)) = qp.resp.nak else {
        return Step::Nothing;
    };
    if !qp.resp.reads.is_empty() {
        return Step::Nothing;
    }
    let aeth = Aeth {
        syndrome,
        msn: qp.resp.msn,
    }
    .emit();
    let contents = Contents {
        bth: bth(qp, Opcode::Acknowledge, psn),
        headers: &aeth,
        inline: &[],
        spans: &[],
    };
    let step = send(qp, env, sink, &contents);
    if let Step::Sent = step {
        qp.resp.nak = None;
        match syndrome {
            Syndrome::RnrNak(_) => env.counters.rnr_naks_tx += 1,
            _ => env.counters.naks_tx += 1,
        }
    }
    step
}

/// Sends an acknowledgement of its own if one is due and nothing carried it.
fn send_acknowledgement<S: TrainSink>(qp: &mut Qp, env: &mut Env, sink: &mut S) -> Step {
    if !qp.resp.ack_now {
        return Step::Nothing;
    }
    let mut psn = qp.resp.cumulative();
    if !qp.path.is_flexins()
        && let Some(job) = qp.resp.reads.front()
        && job.psn.is_before(psn)
    {
        // To a standard requester a later acknowledgement would mean that READ data was lost.
        psn = job.psn.previous();
    }
    let aeth = Aeth {
        syndrome: Syndrome::Ack,
        msn: qp.resp.msn,
    }
    .emit();
    let contents = Contents {
        bth: bth(qp, Opcode::Acknowledge, psn),
        headers: &aeth,
        inline: &[],
        spans: &[],
    };
    let step = send(qp, env, sink, &contents);
    if let Step::Sent = step {
        qp.resp.on_acknowledged();
        env.counters.acks_tx += 1;
    }
    step
}
