//! The host's side of one NVMe/TCP queue: commands to PDUs, PDUs to responses. Sans-IO.
//!
//! [`Queue::post`] and R2Ts fill a [`Batch`]; when the socket is free the batch leaves by [`Queue::take_batch`] and
//! comes back by [`Queue::batch_sent`]. Before each receive [`Queue::plan`](super::receive) says where the bytes
//! shall go, and [`Queue::received`](super::receive) how many came.
#![allow(unsafe_code)]

use std::collections::VecDeque;

use flexblk_nvme::tcp::{
    ADMIN_IN_CAPSULE_BYTES, Alignment, Cursor, Digests, End, Error, Established, Framing, HEAD_MAX,
    IcReq, IcResp, R2t, Stream, TERM_MAX, TermReq,
};
use flexblk_nvme::tcp::{C2hData, H2cData};
use flexblk_nvme::{Cid, Cqe, Sgl, Sqe, Status, StatusCode};
use flexblk_reactor::{HugePages, SharedMemory, Span};
use std::sync::Arc;

use super::batch::Batch;
use super::order::{Linked, Links, Order};
use super::receive::{Foresight, Planned, RX_BYTES};
use crate::link::{Data, LinkEvent, MAX_SMALL_BYTES, PostRefused};
use crate::{LostReason, TcpCounters};

/// Why the connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// The peer broke the protocol; it is told.
    Wire(Error),
    /// The peer says that we broke it.
    Terminated(TermReq),
}

impl From<Error> for Broken {
    fn from(error: Error) -> Broken {
        Broken::Wire(error)
    }
}

impl Broken {
    pub(super) fn reason(self) -> LostReason {
        match self {
            Broken::Wire(_) => LostReason::Protocol,
            Broken::Terminated(_) => LostReason::PeerClosed,
        }
    }
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Broken::Wire(error) => error.fmt(f),
            Broken::Terminated(term) => term.fmt(f),
        }
    }
}

/// What a command still waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Phase {
    #[default]
    Free,
    Outstanding,
}

/// Where a command's data is and how it travels.
#[derive(Clone, Copy, Default)]
pub(super) enum Transfer {
    /// None, or all of it in the capsule.
    #[default]
    None,
    /// By H2CData, as R2Ts ask for it.
    Out(Span),
    /// By C2HData.
    In(Span),
}

#[derive(Clone, Copy)]
pub(super) struct Command {
    pub(super) phase: Phase,
    pub(super) transfer: Transfer,
    /// How much of the data was announced (by C2HData) or asked for (by R2T).
    pub(super) cursor: Cursor,
    /// A data digest of it did not match.
    damaged: bool,
    /// An R2T of it is being answered.
    answering: bool,
    /// The batch that carries the last of it that was given to one.
    batch: u64,
    links: Links,
}

impl Linked for Command {
    fn links(&mut self) -> &mut Links {
        &mut self.links
    }
}

impl Command {
    const FREE: Command = Command {
        phase: Phase::Free,
        transfer: Transfer::None,
        cursor: NOTHING,
        damaged: false,
        answering: false,
        batch: 0,
        links: Links::NONE,
    };

    pub(super) fn newer(&self) -> u16 {
        self.links.newer()
    }
}

/// What a command can need of the memory for what is ours: a capsule's header as far padded as a controller may ask
/// for, small data, and a digest of that.
const OWN_BYTES_MAX: usize = HEAD_MAX + MAX_SMALL_BYTES + size_of::<u32>();

/// A transfer of no bytes.
const NOTHING: Cursor = match Cursor::new(0, 0) {
    Some(cursor) => cursor,
    None => unreachable!(),
};

/// A data PDU whose payload is coming in.
#[derive(Clone, Copy)]
pub(super) struct Incoming {
    pub(super) cid: u16,
    /// Where all of its payload goes.
    pub(super) place: Span,
    /// Bytes of it that are there.
    pub(super) done: u32,
    /// The command has succeeded with it.
    pub(super) success: bool,
}

/// An R2T that is being answered.
#[derive(Clone, Copy)]
struct Answer {
    cid: u16,
    ttag: u16,
    offset: u32,
    left: u32,
}

/// What the queue is for, as far as it makes a difference here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A controller may answer an admin command with less data than the buffer has room for.
    Admin,
    /// A read that succeeds has brought all of its data.
    Io,
}

pub(super) struct Queue {
    pub(super) stream: Stream,
    framing: Framing,
    kind: Kind,
    request: IcReq,
    maxh2cdata: u32,
    in_capsule_bytes: u32,
    /// By command identifier.
    pub(super) commands: Box<[Command]>,
    /// Outstanding commands in the order in which they were sent.
    pub(super) order: Order,
    filling: Batch,
    /// Taken and back: the next to be filled when `filling` is taken.
    spare: Option<Batch>,
    /// Batches that were sent to the end.
    sent_batches: u64,
    answers: VecDeque<Answer>,
    pub(super) incoming: Option<Incoming>,
    /// For [`Queue::take_events`].
    events: Vec<LinkEvent>,
    /// Responses to commands of which something has not been sent yet: their buffers are still in use.
    early: Vec<(u64, LinkEvent)>,
    established: Option<IcResp>,
    pub(super) memory: Arc<SharedMemory>,
    pub(super) planned: Vec<Planned>,
    pub(super) foresight: Foresight,
    pub(super) counters: TcpCounters,
}

impl Queue {
    /// A queue for `depth` commands with identifiers below `depth`, before connection set-up: the ICReq is in the
    /// first batch.
    pub(super) fn new(
        depth: u16,
        kind: Kind,
        digests: Digests,
    ) -> Result<Queue, flexblk_reactor::Error> {
        let request = IcReq {
            // Linux's target takes nothing else.
            hpda: Alignment::DWORD,
            digests,
            // One R2T at a time of each command, as Linux's host asks for.
            maxr2t: 0,
        };
        let mut filling = Batch::new(depth, 1);
        filling.put(&request.emit());
        let room = 2 * usize::from(depth);
        Ok(Queue {
            stream: Stream::new(End::Host),
            framing: Framing::default(),
            kind,
            request,
            maxh2cdata: 0,
            in_capsule_bytes: ADMIN_IN_CAPSULE_BYTES,
            commands: vec![Command::FREE; usize::from(depth)].into_boxed_slice(),
            order: Order::EMPTY,
            filling,
            spare: Some(Batch::new(depth, 0)),
            sent_batches: 0,
            answers: VecDeque::with_capacity(usize::from(depth)),
            incoming: None,
            events: Vec::with_capacity(room),
            early: Vec::new(),
            established: None,
            memory: SharedMemory::create("flexblk tcp", u64::from(RX_BYTES), HugePages::No)?,
            planned: Vec::with_capacity(64),
            foresight: Foresight::default(),
            counters: TcpCounters::default(),
        })
    }

    /// What the controller answered to connection set-up; `None` until it did.
    pub(super) fn established(&self) -> Option<&IcResp> {
        self.established.as_ref()
    }

    pub(super) fn set_in_capsule_bytes(&mut self, bytes: u32) {
        self.in_capsule_bytes = bytes;
    }

    pub(super) fn counters(&self) -> TcpCounters {
        self.counters
    }

    /// Commands that were posted and have not been answered.
    pub(super) fn outstanding_commands(&self) -> u16 {
        self.order.len()
    }

    /// Moves the events out.
    pub(super) fn take_events(&mut self, out: &mut Vec<LinkEvent>) {
        out.append(&mut self.events);
    }

    pub(super) fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// Bytes of header digests.
    pub(super) fn header_digest_len(&self) -> u32 {
        self.framing.digests.header_len() as u32
    }

    /// Bytes of data digests.
    pub(super) fn data_digest_len(&self) -> u32 {
        self.framing.digests.data_len() as u32
    }

    // ---- sending -------------------------------------------------------------------------------

    /// Takes a command; its capsule leaves with the next batch. The data pointer is filled in.
    #[inline]
    pub(super) fn post(
        &mut self,
        cid: u16,
        sqe: &mut [u8; 64],
        data: Data<'_>,
    ) -> Result<(), PostRefused> {
        const LOST: PostRefused = PostRefused::Lost(LostReason::Protocol);
        let command = self.commands.get_mut(usize::from(cid)).ok_or(LOST)?;
        if command.phase != Phase::Free {
            return Err(LOST);
        }
        if !self.filling.has_room(OWN_BYTES_MAX) {
            return Err(PostRefused::Full);
        }
        let in_capsule = |length| Sgl::InCapsule { offset: 0, length };
        let (sgl, capsule_len, transfer) = match data {
            Data::None => (Sgl::NONE_TRANSPORT, 0, Transfer::None),
            Data::Small(bytes) => {
                let len = bytes.len() as u32;
                (in_capsule(len), len, Transfer::None)
            }
            Data::ToController(span, _) if span.len() <= self.in_capsule_bytes => {
                (in_capsule(span.len()), span.len(), Transfer::None)
            }
            Data::ToController(span, _) => {
                let length = span.len();
                (Sgl::Transport { length }, 0, Transfer::Out(span))
            }
            Data::FromController(span, _) => {
                let length = span.len();
                (Sgl::Transport { length }, 0, Transfer::In(span))
            }
        };
        if let Some(pointer) = sqe.get_mut(24..40) {
            pointer.copy_from_slice(&sgl.emit());
        }
        let mut head = [0; HEAD_MAX];
        let len = self
            .framing
            .capsule_cmd(Sqe::cast(sqe), capsule_len, &mut head);
        self.filling.put(head.get(..len).unwrap_or_default());
        match data {
            Data::Small(bytes) => {
                self.filling.put(bytes);
                if self.framing.has_data_digest() {
                    let mut digest = flexblk_nvme::tcp::Crc32c::new();
                    digest.update(bytes);
                    self.filling.put(&digest.to_bytes());
                }
            }
            Data::ToController(span, _) if capsule_len > 0 => {
                self.filling.gather(span);
                if self.framing.has_data_digest() {
                    self.filling.put_digest_of(span);
                }
            }
            _ => {}
        }
        let expected = match transfer {
            Transfer::None => 0,
            Transfer::In(span) | Transfer::Out(span) => span.len(),
        };
        *command = Command {
            phase: Phase::Outstanding,
            transfer,
            cursor: Cursor::new(0, expected).unwrap_or(NOTHING),
            batch: self.filling.number(),
            ..Command::FREE
        };
        self.order.push(&mut self.commands, cid);
        Ok(())
    }

    /// The batch to send now, if there is anything in it. It comes back by [`batch_sent`](Self::batch_sent).
    pub(super) fn take_batch(&mut self) -> Option<Batch> {
        if self.filling.is_empty() {
            return None;
        }
        let mut next = self.spare.take()?;
        next.restart(self.filling.number() + 1);
        let batch = std::mem::replace(&mut self.filling, next);
        self.answer_r2ts();
        Some(batch)
    }

    /// Everything in the batch was handed to the kernel, which has no more use for it.
    pub(super) fn batch_sent(&mut self, batch: Batch) {
        self.sent_batches = batch.number();
        self.spare = Some(batch);
        if !self.early.is_empty() {
            let sent = self.sent_batches;
            let events = &mut self.events;
            self.early.retain(|(batch, event)| {
                let waits = *batch > sent;
                if !waits {
                    events.push(*event);
                }
                waits
            });
        }
    }

    /// Puts as much of the answers to R2Ts into the batch as fits.
    fn answer_r2ts(&mut self) {
        while let Some(answer) = self.answers.front_mut() {
            if !self.filling.has_room(HEAD_MAX) {
                return;
            }
            let len = answer.left.min(self.maxh2cdata);
            let pdu = H2cData {
                cid: Cid::new(answer.cid),
                ttag: answer.ttag,
                offset: answer.offset,
                len_bytes: len,
                last: len == answer.left,
            };
            let command = self.commands.get_mut(usize::from(answer.cid));
            let piece = command.as_ref().and_then(|command| match command.transfer {
                Transfer::Out(span) => span.sub(answer.offset, len),
                _ => None,
            });
            if let (Some(command), Some(piece)) = (command, piece) {
                let mut head = [0; HEAD_MAX];
                let head_len = self.framing.h2c_data(&pdu, &mut head);
                self.filling.put(head.get(..head_len).unwrap_or_default());
                self.filling.gather(piece);
                if self.framing.has_data_digest() {
                    self.filling.put_digest_of(piece);
                }
                command.batch = self.filling.number();
                command.answering = !pdu.last;
            }
            answer.offset += len;
            answer.left -= len;
            if answer.left == 0 {
                self.answers.pop_front();
            }
        }
    }

    /// What to tell the controller about an error of its own; 0 bytes when nothing.
    pub(super) fn term_req(&self, broken: Broken, out: &mut [u8; TERM_MAX]) -> usize {
        match broken {
            Broken::Wire(error) => self.stream.term_req(error, out),
            Broken::Terminated(_) => 0,
        }
    }

    // ---- receiving -----------------------------------------------------------------------------

    /// The answer to connection set-up.
    pub(super) fn on_ic_resp(&mut self, response: IcResp) -> Result<(), Broken> {
        response.check(&self.request)?;
        self.framing = Framing {
            digests: response.digests,
            alignment: response.cpda,
        };
        self.maxh2cdata = response.maxh2cdata;
        self.stream.establish(Established {
            digests: response.digests,
            alignment: self.request.hpda,
            ..Established::default()
        });
        self.established = Some(response);
        Ok(())
    }

    /// An outstanding command.
    fn outstanding(&mut self, cid: Cid) -> Result<&mut Command, Broken> {
        self.commands
            .get_mut(usize::from(cid.get()))
            .filter(|command| command.phase == Phase::Outstanding)
            .ok_or(Broken::Wire(Error::InvalidField { offset: CID_AT }))
    }

    #[inline]
    pub(super) fn on_c2h_data(&mut self, data: &C2hData) -> Result<(), Broken> {
        let command = self.outstanding(data.cid)?;
        let Transfer::In(span) = command.transfer else {
            return Err(Error::OutOfRange.into());
        };
        command
            .cursor
            .accept(data.offset, data.len_bytes, data.last)?;
        let place = span
            .sub(data.offset, data.len_bytes)
            .ok_or(Error::OutOfRange)?;
        self.incoming = Some(Incoming {
            cid: data.cid.get(),
            place,
            done: 0,
            success: data.success,
        });
        Ok(())
    }

    #[inline]
    pub(super) fn on_data_end(&mut self, intact: bool) -> Result<(), Broken> {
        let Some(incoming) = self.incoming.take() else {
            return Ok(());
        };
        let cid = Cid::new(incoming.cid);
        self.outstanding(cid)?.damaged |= !intact;
        if incoming.success {
            self.finish(cid, Status::SUCCESS, 0)?;
        }
        Ok(())
    }

    #[inline]
    pub(super) fn on_response(&mut self, cqe: &Cqe) -> Result<(), Broken> {
        self.finish(cqe.cid(), cqe.status(), cqe.result())
    }

    pub(super) fn on_r2t(&mut self, r2t: &R2t) -> Result<(), Broken> {
        let command = self.outstanding(r2t.cid)?;
        if !matches!(command.transfer, Transfer::Out(_)) {
            return Err(Error::OutOfRange.into());
        }
        if command.answering {
            return Err(Error::LimitExceeded.into());
        }
        if r2t.len_bytes == 0 {
            return Err(Error::InvalidField { offset: R2TL_AT }.into());
        }
        command.cursor.accept(r2t.offset, r2t.len_bytes, false)?;
        command.answering = true;
        self.answers.push_back(Answer {
            cid: r2t.cid.get(),
            ttag: r2t.ttag,
            offset: r2t.offset,
            left: r2t.len_bytes,
        });
        self.answer_r2ts();
        Ok(())
    }

    /// A command is over.
    #[inline]
    fn finish(&mut self, cid: Cid, status: Status, result: u64) -> Result<(), Broken> {
        let kind = self.kind;
        let command = self.outstanding(cid)?;
        let mut status = status;
        if status.is_success() {
            let complete = match command.transfer {
                Transfer::In(_) => kind == Kind::Admin || command.cursor.is_complete(),
                _ => true,
            };
            if !complete {
                return Err(Error::Sequence.into());
            }
            if command.damaged {
                // TCP 3.5: a data digest error fails the command, and only it.
                status = StatusCode::TransientTransportError.into();
            }
        }
        let (batch, answering) = (command.batch, command.answering);
        command.phase = Phase::Free;
        self.order.remove(&mut self.commands, cid.get());
        if answering {
            // The controller has given up on data that it had asked for.
            self.answers.retain(|answer| answer.cid != cid.get());
        }
        let event = LinkEvent::Response {
            cid: cid.get(),
            status,
            result,
            immediate: false,
        };
        if batch > self.sent_batches {
            self.early.push((batch, event));
        } else {
            self.events.push(event);
        }
        Ok(())
    }
}

/// CCCID, in bytes from the start of the header (TCP 3.6.2.9).
const CID_AT: u8 = 8;
/// R2TL (TCP 3.6.2.10).
const R2TL_AT: u8 = 16;
