//! A command's data between its place here and the host's memory: one request for each piece.

use flexins::engine::Engine;
use flexins::verbs::{PostError, Qpn, Rkey, SendFlags, SendOp, SendWr, Sge};

use crate::queue::data::Remote;

/// Id of send requests whose completion nobody waits for.
pub(super) const UNTRACKED: u64 = u64::MAX;

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// RDMA READ.
    FromHost,
    /// RDMA WRITE.
    ToHost,
}

/// What the request for the last piece is besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Last {
    /// Nothing: something follows that is waited for.
    Untracked,
    /// Its completion tells that all have ended.
    Tracked(u16),
    /// The same, and its immediate value is the command's completion.
    Completes(u16, u32),
}

/// A transfer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transfer {
    pub(super) remote: Remote,
    pub(super) last: Last,
    pub(super) kind: Kind,
}

impl Transfer {
    /// Posts the requests for pieces from number `posted` on, and counts them there: after an error
    /// it can be called again.
    #[inline]
    pub(super) fn post(
        &self,
        engine: &mut Engine,
        qpn: Qpn,
        pieces: &[Sge],
        posted: &mut u8,
    ) -> Result<(), PostError> {
        if pieces.is_empty() {
            // Nothing would ever complete: a bug of ours, which the caller logs.
            return Err(PostError::TooManySges);
        }
        let before = usize::from(*posted);
        let done: u64 = pieces
            .iter()
            .take(before)
            .map(|piece| u64::from(piece.len))
            .sum();
        let mut address = self.remote.address.wrapping_add(done);
        let rkey = Rkey(self.remote.key);
        for (number, piece) in pieces.iter().enumerate().skip(before) {
            let last = match number + 1 == pieces.len() {
                true => self.last,
                false => Last::Untracked,
            };
            let op = match (self.kind, last) {
                (Kind::FromHost, _) => SendOp::Read {
                    remote: address,
                    rkey,
                },
                (Kind::ToHost, Last::Completes(_, imm)) => SendOp::WriteImm {
                    remote: address,
                    rkey,
                    imm,
                },
                (Kind::ToHost, _) => SendOp::Write {
                    remote: address,
                    rkey,
                },
            };
            let (wr_id, flags) = match last {
                Last::Untracked => (UNTRACKED, SendFlags::empty()),
                Last::Tracked(slot) | Last::Completes(slot, _) => {
                    (slot.into(), SendFlags::SIGNALED)
                }
            };
            let sges = core::slice::from_ref(piece);
            engine.post_send(
                qpn,
                &SendWr {
                    wr_id,
                    op,
                    inline: &[],
                    sges,
                    flags,
                },
            )?;
            *posted += 1;
            address = address.wrapping_add(piece.len.into());
        }
        Ok(())
    }
}
