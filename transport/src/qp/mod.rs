//! Queue pairs: state machine, send queue, receive queue, and what a connection needs to run them.

mod recv_queue;
mod send_queue;
mod state;

pub(crate) use recv_queue::{Receive, RecvQueue};
pub(crate) use send_queue::{Kind, SendQueue, SendWqe};

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::cm::ConnId;
use crate::rc::{Env, Requester, Responder};
use crate::verbs::{
    Access, Digest, Framing, QpAttributes, QpInit, QpState, Qpn, ReadyToReceive, ReadyToSend,
    VerbsError, WcOpcode, WcStatus, WorkCompletion,
};
use crate::wire::{Psn, trailer};

/// A time that never comes, in nanoseconds of the engine's clock.
pub(crate) const NEVER: u64 = u64::MAX;

/// How packets of a connection are addressed and framed.
pub(crate) struct Path {
    pub(crate) peer: SocketAddr,
    pub(crate) peer_qpn: Qpn,
    pub(crate) mtu: u32,
    pub(crate) window: u32,
    pub(crate) trailer_len: u8,
    pub(crate) framing: Framing,
    pub(crate) digest: Digest,
}

impl Path {
    const fn none() -> Self {
        Self {
            peer: SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
            peer_qpn: Qpn::new(0),
            mtu: 1024,
            window: 1,
            trailer_len: trailer::STANDARD_LEN_BYTES as u8,
            framing: Framing::Standard,
            digest: Digest::Crc32c,
        }
    }

    #[inline]
    pub(crate) const fn is_flexins(&self) -> bool {
        matches!(self.framing, Framing::Flexins)
    }

    /// Whether a packet from there can be the peer's. Standard senders vary their source port.
    #[inline]
    pub(crate) fn is_peer(&self, from: SocketAddr) -> bool {
        if self.is_flexins() {
            self.peer == from
        } else {
            self.peer.ip() == from.ip()
        }
    }
}

/// A queue pair of a reliable connection.
pub(crate) struct Qp {
    pub(crate) qpn: Qpn,
    pub(crate) state: QpState,
    pub(crate) access: Access,
    /// In the engine's ring of queue pairs with something to send.
    pub(crate) active: bool,
    /// In the engine's list of delayed acknowledgements.
    pub(crate) in_ack_list: bool,
    pub(crate) path: Path,
    pub(crate) sq: SendQueue,
    pub(crate) req: Requester,
    pub(crate) resp: Responder,
    pub(crate) rq: RecvQueue,
    pub(crate) init: QpInit,
    pub(crate) conn: Option<ConnId>,
    pub(crate) broken: bool,
}

impl Qp {
    pub(crate) fn new(qpn: Qpn, init: QpInit, first_psn: Psn, window: u32, max_reads: u8) -> Self {
        Self {
            qpn,
            state: QpState::Reset,
            access: Access::empty(),
            active: false,
            in_ack_list: false,
            path: Path::none(),
            sq: SendQueue::new(init.max_send_wr, init.max_sge, init.max_inline),
            req: Requester::new(first_psn, window),
            resp: Responder::new(max_reads),
            rq: RecvQueue::new(init.max_recv_wr, init.max_sge),
            init,
            conn: None,
            broken: false,
        }
    }

    /// Bytes of memory that this queue pair takes, completions aside.
    pub(crate) fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + self.sq.memory_bytes()
            + self.rq.memory_bytes()
            + self.req.memory_bytes()
            + self.resp.memory_bytes()
    }

    pub(crate) fn attributes(&self) -> QpAttributes {
        let connected = self.path.peer_qpn.get() != 0;
        QpAttributes {
            state: self.state,
            framing: self.path.framing,
            peer: connected.then_some(self.path.peer),
            peer_qpn: self.path.peer_qpn,
            mtu_bytes: self.path.mtu,
            digest: self.path.digest,
            first_psn: self.req.first_psn,
            send_wrs: self.sq.len(),
            recv_wrs: self.rq.len(),
            max_send_wr: self.sq.max_wr(),
            drained: self.state == QpState::SendQueueDrain && self.req.board.outstanding() == 0,
            user: self.init.user,
        }
    }

    pub(crate) fn ready_to_receive(&mut self, args: &ReadyToReceive) -> Result<(), VerbsError> {
        let flexins = args.framing == Framing::Flexins;
        let mtu_ok = if flexins {
            (1024..=61_440).contains(&args.mtu_bytes) && args.mtu_bytes.is_multiple_of(64)
        } else {
            matches!(args.mtu_bytes, 256 | 512 | 1024 | 2048 | 4096)
        };
        if !mtu_ok {
            return Err(VerbsError::Parameter("mtu_bytes"));
        }
        if args.window == 0 {
            return Err(VerbsError::Parameter("window"));
        }
        self.path = Path {
            peer: args.peer,
            peer_qpn: args.peer_qpn,
            mtu: args.mtu_bytes,
            window: args.window.min(self.req.board.capacity()),
            trailer_len: if flexins {
                trailer::FLEXINS_LEN_BYTES
            } else {
                trailer::STANDARD_LEN_BYTES
            } as u8,
            framing: args.framing,
            digest: args.digest,
        };
        self.resp.start(args.expected_psn);
        Ok(())
    }

    pub(crate) fn ready_to_send(&mut self, args: &ReadyToSend) {
        self.req.start(args);
    }

    /// Forgets everything that is posted, without completions, and goes back to RESET.
    pub(crate) fn reset(&mut self, env: &mut Env) {
        env.cqs.release(self.init.send_cq, self.sq.len());
        env.cqs.release(self.init.recv_cq, self.reserved_recv());
        for cq in [self.init.send_cq, self.init.recv_cq] {
            if let Some(queue) = env.cqs.get_mut(cq) {
                queue.forget(self.qpn.get());
            }
        }
        self.sq.reset();
        self.rq.reset();
        let first_psn = self.req.first_psn;
        self.req.reset(first_psn);
        self.resp.reset(env);
        self.path = Path::none();
        self.broken = false;
        self.state = QpState::Reset;
    }

    /// Places of the receive completion queue that this queue pair has reserved.
    pub(crate) const fn reserved_recv(&self) -> u32 {
        if self.rq.is_in_place() && !self.init.inline_recv {
            0
        } else {
            self.rq.len()
        }
    }

    /// A completion of this queue pair.
    #[inline]
    pub(crate) fn completion(
        &self,
        wr_id: u64,
        opcode: WcOpcode,
        status: WcStatus,
    ) -> WorkCompletion {
        WorkCompletion {
            wr_id,
            user: self.init.user,
            qpn: self.qpn.get(),
            opcode,
            status,
            ..WorkCompletion::default()
        }
    }

    /// Completes the send request at the head.
    #[inline]
    pub(crate) fn complete_head(&mut self, env: &mut Env, status: WcStatus) {
        let Some(wqe) = self.sq.get(self.sq.head()) else {
            return;
        };
        let silent =
            status == WcStatus::Success && !wqe.flags.contains(crate::verbs::SendFlags::SIGNALED);
        if silent {
            env.cqs.release(self.init.send_cq, 1);
        } else {
            let mut completion = self.completion(wqe.wr_id, wqe.kind.completion(), status);
            if wqe.kind == Kind::Read {
                completion.byte_len = wqe.len;
            }
            env.cqs.push(self.init.send_cq, completion);
        }
        env.counters.sends_completed += 1;
        self.sq.pop();
    }

    /// To the error state; everything that is posted completes with `WR_FLUSH_ERR`.
    pub(crate) fn flush(&mut self, env: &mut Env) {
        self.state = QpState::Error;
        while self.sq.len() > 0 {
            self.complete_head(env, WcStatus::WrFlushErr);
        }
        while let Some((wr_id, _)) = self.rq.front() {
            let completion = self.completion(wr_id, WcOpcode::Recv, WcStatus::WrFlushErr);
            env.cqs.push(self.init.recv_cq, completion);
            self.rq.pop();
        }
        let reserved = self.reserved_recv();
        self.rq.take_credits();
        env.cqs.release(self.init.recv_cq, reserved);
        self.req.stop();
        self.resp.stop(env);
    }

    /// The queue pair fails by itself: flush, and tell the owner once.
    pub(crate) fn break_down(&mut self, env: &mut Env, status: WcStatus) {
        self.flush(env);
        if !self.broken {
            self.broken = true;
            env.counters.qp_errors += 1;
            env.broken.push_back((self.qpn, self.init.user, status));
        }
    }
}
