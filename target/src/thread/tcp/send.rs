//! The sending half of a connection: PDUs pile up during a round and leave in one `sendmsg`.

use std::collections::VecDeque;
use std::os::fd::RawFd;

use flexblk_nvme::tcp::{C2hData, Crc32c, Framing, HEAD_MAX, R2t, TERM_MAX};
use flexblk_nvme::{Cid, Cqe};
use flexblk_reactor::{Reactor, Span};

use super::lent::Lent;
use super::socket::{Vector, digest};
use super::table::Operation;

/// Entries of one `sendmsg` (`UIO_MAXIOV` is 1024).
const MAX_ENTRIES: usize = 1000;
/// Bytes after which a `sendmsg` takes no further piece: commands end, and give their buffers back,
/// when the `sendmsg` with their last byte does.
const ENOUGH_BYTES: usize = 1 << 20;

/// Header bytes up to which there is little to send: those of 8 responses.
const LITTLE_BYTES: usize = 8 * 24;

/// A piece of what is to be sent.
#[derive(Clone, Copy, Debug)]
enum Piece {
    /// Bytes of `heads`.
    Head { at: usize, len: usize },
    /// Memory of a command.
    Memory(Span),
}

/// PDUs in order.
#[derive(Debug, Default)]
struct Batch {
    heads: Vec<u8>,
    pieces: Vec<Piece>,
    /// Commands whose memory is free when so many pieces have been sent.
    ends: VecDeque<(usize, u16)>,
    /// PDUs that belong to no slot.
    untracked: u32,
}

impl Batch {
    fn clear(&mut self) {
        self.heads.clear();
        self.pieces.clear();
        self.ends.clear();
        self.untracked = 0;
    }

    /// Adds header bytes that `write` writes; neighbours become one piece.
    #[inline]
    fn head(&mut self, write: impl FnOnce(&mut [u8; HEAD_MAX]) -> usize) {
        let at = self.heads.len();
        self.heads.resize(at + HEAD_MAX, 0);
        let len = match self.heads.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
            Some(out) => write(out),
            None => 0,
        };
        self.heads.truncate(at + len);
        match self.pieces.last_mut() {
            Some(Piece::Head {
                at: start,
                len: old,
            }) if *start + *old == at => *old += len,
            _ => self.pieces.push(Piece::Head { at, len }),
        }
    }

    fn bytes(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(HEAD_MAX) {
            self.head(|out| {
                for (to, from) in out.iter_mut().zip(chunk) {
                    *to = *from;
                }
                chunk.len()
            });
        }
    }
}

/// The sending half.
pub(super) struct Sender {
    pub(super) framing: Framing,
    /// Being filled.
    next: Batch,
    /// Being sent.
    current: Batch,
    /// Pieces of `current` that have been sent, and bytes of the piece after them.
    sent: (usize, usize),
    vector: Box<Vector>,
    /// A `sendmsg` is with the kernel.
    busy: bool,
    /// It is this zero-copy one.
    lending: Option<u16>,
    lent: Lent,
    /// Payload of one `sendmsg` from which on the kernel is not to copy it.
    zerocopy_threshold: usize,
}

impl Sender {
    /// A `sendmsg` with as much payload as `zerocopy_threshold` is not to copy it; `None`: all copy.
    pub(super) fn new(zerocopy_threshold: Option<u32>) -> Self {
        Self {
            framing: Framing::default(),
            next: Batch::default(),
            current: Batch::default(),
            sent: (0, 0),
            vector: Vector::new(),
            busy: false,
            lending: None,
            lent: Lent::default(),
            zerocopy_threshold: zerocopy_threshold.map_or(usize::MAX, |bytes| bytes as usize),
        }
    }

    /// PDUs of no slot that have not been sent.
    #[inline]
    pub(super) fn untracked(&self) -> u32 {
        self.next.untracked + self.current.untracked
    }

    /// A response capsule.
    #[inline]
    pub(super) fn response(&mut self, cqe: &Cqe) {
        let framing = self.framing;
        self.next.head(|out| framing.capsule_resp(cqe, out));
        self.next.untracked += 1;
    }

    /// A command's data and its completion: with the data when `success` says that nothing needs to
    /// be said besides, else in a response capsule behind it. `slot` ends when they have been sent.
    #[inline]
    pub(super) fn data(&mut self, slot: u16, spans: &[Span], cqe: &Cqe, success: bool) {
        let framing = self.framing;
        let data = C2hData {
            cid: cqe.cid(),
            offset: 0,
            len_bytes: spans.iter().map(Span::len).sum(),
            last: true,
            success,
        };
        let batch = &mut self.next;
        batch.head(|out| framing.c2h_data(&data, out));
        batch
            .pieces
            .extend(spans.iter().map(|span| Piece::Memory(*span)));
        if framing.has_data_digest() {
            let mut crc = Crc32c::new();
            digest(&mut crc, spans);
            batch.bytes(&crc.to_bytes());
        }
        // The memory is free with the last piece of data; what follows does not matter.
        batch.ends.push_back((batch.pieces.len(), slot));
        if !success {
            batch.head(|out| framing.capsule_resp(cqe, out));
        }
    }

    /// A request for a command's data.
    pub(super) fn r2t(&mut self, cid: Cid, ttag: u16, len_bytes: u32) {
        let framing = self.framing;
        let r2t = R2t {
            cid,
            ttag,
            offset: 0,
            len_bytes,
        };
        self.next.head(|out| framing.r2t(&r2t, out));
    }

    /// A PDU that is bytes already: ICResp, C2HTermReq.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        debug_assert!(bytes.len() <= TERM_MAX);
        self.next.bytes(bytes);
    }

    /// Is nothing left to be sent?
    pub(super) fn is_empty(&self) -> bool {
        !self.is_with_kernel() && self.next.pieces.is_empty() && self.current.pieces.is_empty()
    }

    /// Does the kernel have a part of it?
    pub(super) fn is_with_kernel(&self) -> bool {
        self.busy || !self.lent.is_empty()
    }

    /// Does the network read memory of ours until the host has acknowledged it?
    pub(super) fn is_lent(&self) -> bool {
        !self.lent.is_empty()
    }

    /// Forgets everything: the connection is gone. Not while the kernel has a part of it.
    pub(super) fn clear(&mut self) {
        debug_assert!(!self.is_with_kernel());
        self.next.clear();
        self.current.clear();
        self.sent = (0, 0);
    }

    /// Is there so little to send that a system call of its own costs less than the ring?
    #[inline]
    pub(super) fn has_little(&self) -> bool {
        self.next.heads.len() <= LITTLE_BYTES && self.current.pieces.is_empty()
    }

    /// Gives the kernel the next part, if it has none: to its ring, or, with `now`, at once. Gives what it took so,
    /// for [`Sender::ended`] and [`Sender::sent`].
    pub(super) fn flush(
        &mut self,
        reactor: &mut Reactor,
        fd: RawFd,
        index: u32,
        now: bool,
    ) -> Option<u32> {
        if self.busy {
            return None;
        }
        if self.current.pieces.is_empty() {
            core::mem::swap(&mut self.current, &mut self.next);
        }
        let (first, skip) = self.sent;
        let pieces = self.current.pieces.get(first..).unwrap_or_default();
        if pieces.is_empty() {
            return None;
        }
        self.vector.clear();
        let (mut skip, mut total, mut payload) = (skip, 0, 0);
        for piece in pieces.iter().take(MAX_ENTRIES) {
            let (base, len) = match *piece {
                Piece::Head { at, len } => match self.current.heads.get_mut(at..at + len) {
                    Some(bytes) => (bytes.as_mut_ptr(), len),
                    None => continue,
                },
                Piece::Memory(span) => {
                    payload += span.len() as usize;
                    (span.as_ptr(), span.len() as usize)
                }
            };
            let skipped = skip.min(len);
            self.vector.push(base.wrapping_add(skipped), len - skipped);
            total += len - skipped;
            skip = 0;
            if total >= ENOUGH_BYTES {
                break;
            }
        }
        self.busy = true;
        // With a digest the data must not change any more: it may, as long as the network reads it.
        if payload >= self.zerocopy_threshold && !self.framing.has_data_digest() {
            let number = self.lent.begin();
            self.lending = Some(number);
            let token = Operation::Send.numbered(index, number);
            self.vector.send_zero_copy(reactor, fd, token);
            return None;
        }
        let sent = if now { self.vector.send_now(fd) } else { None };
        if sent.is_none() {
            self.vector.send(reactor, fd, Operation::Send.token(index));
        }
        sent
    }

    /// The `sendmsg` has ended, well or not. `lends`: what it sent comes back later.
    pub(super) fn ended(&mut self, lends: bool, ended: &mut Vec<u16>) {
        self.busy = false;
        if let Some(number) = self.lending.take()
            && !lends
        {
            self.lent.back(number, ended);
        }
    }

    /// The host has what a zero-copy send sent. `copied`: only because the kernel has copied it, as
    /// it does for all that stays on this machine; then it was for nothing, and is not tried again.
    pub(super) fn came_back(&mut self, number: u16, copied: bool, ended: &mut Vec<u16>) {
        if copied {
            self.copy_always();
        }
        self.lent.back(number, ended);
    }

    /// No more zero-copy sends.
    pub(super) fn copy_always(&mut self) {
        self.zerocopy_threshold = usize::MAX;
    }

    /// Are there zero-copy sends?
    pub(super) fn may_lend(&self) -> bool {
        self.zerocopy_threshold < usize::MAX
    }

    /// The kernel has taken `bytes`; gives the commands whose memory is free now.
    pub(super) fn sent(&mut self, bytes: usize, ended: &mut Vec<u16>) {
        let (mut piece, mut rest) = (self.sent.0, self.sent.1 + bytes);
        while let Some(len) = self.current.pieces.get(piece).map(|piece| match piece {
            Piece::Head { len, .. } => *len,
            Piece::Memory(span) => span.len() as usize,
        }) {
            if rest < len {
                break;
            }
            rest -= len;
            piece += 1;
        }
        self.sent = (piece, rest);
        while let Some((at, slot)) = self.current.ends.front().copied() {
            if at > piece {
                break;
            }
            self.current.ends.pop_front();
            self.lent.end(slot, ended);
        }
        if piece >= self.current.pieces.len() {
            self.lent.keep(&mut self.current.heads);
            self.current.clear();
            self.sent = (0, 0);
        }
    }
}
