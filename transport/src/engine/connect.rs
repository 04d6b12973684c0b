//! Connections: the connection manager's events turned into moves of queue pairs.

use std::net::SocketAddr;
use std::time::Instant;

use super::{ConnEvent, ConnectError, Engine, find};
use crate::cm::{
    AcceptArgs, CmEvent, ConnId, ConnectArgs, Features, Negotiated, Params, Peer, RejectReason,
    ServiceId,
};
use crate::qp::Qp;
use crate::rc::Env;
use crate::verbs::{
    Access, Digest, Framing, QpState, Qpn, ReadyToReceive, ReadyToSend, VerbsError,
};
use crate::wire::Psn;

/// Events that may wait for [`Engine::poll_cm`].
const EVENTS_MAX: usize = 4096;
/// What FlexiNS framing cannot do without.
const REQUIRED: Features = Features::SACK.union(Features::FACK);
/// MTU proposed to a standard peer (payload bytes).
const STANDARD_MTU_BYTES: u32 = 4096;

/// The parameters with which both ends use FlexiNS framing.
fn usable(params: Option<Params>) -> Option<Params> {
    params.filter(|params| params.features.contains(REQUIRED))
}

impl Engine {
    /// The address that the port is bound to: goes into connect requests, for RDMA-CM peers.
    pub fn set_local_address(&mut self, local: SocketAddr) {
        self.local = local;
    }

    /// Takes connect requests for a service.
    pub fn listen(&mut self, service: ServiceId) -> Result<(), ConnectError> {
        Ok(self.cm.listen(service)?)
    }

    /// No longer takes connect requests for a service. False when nobody listened.
    pub fn unlisten(&mut self, service: ServiceId) -> bool {
        self.cm.unlisten(service)
    }

    /// Starts to connect a queue pair that is in RESET; `private` is at most 40 bytes. Ends with
    /// [`ConnEvent::Established`], [`ConnEvent::Rejected`] or [`ConnEvent::Unreachable`].
    pub fn connect(
        &mut self,
        qpn: Qpn,
        to: SocketAddr,
        service: ServiceId,
        private: &[u8],
        now: Instant,
    ) -> Result<ConnId, ConnectError> {
        let params = self.offer();
        let first_psn = self.unconnected(qpn)?.req.first_psn;
        let conn = self.cm.connect(
            now,
            &ConnectArgs {
                qpn: qpn.get(),
                starting_psn: first_psn.get(),
                local: self.local,
                to,
                service,
                private,
                params,
                path_mtu_bytes: STANDARD_MTU_BYTES.min(self.config.mtu),
                read_depth: self.config.max_reads,
                retry_count: self.config.retry_count,
                rnr_retry_count: self.config.rnr_retry,
            },
        )?;
        self.bind(qpn, conn);
        Ok(conn)
    }

    /// Accepts a request with a queue pair that is in RESET. Sends may be posted at once.
    /// [`ConnEvent::Established`] follows when the peer has confirmed, [`ConnEvent::Disconnected`]
    /// when it does not.
    pub fn accept(
        &mut self,
        conn: ConnId,
        qpn: Qpn,
        private: &[u8],
        now: Instant,
    ) -> Result<(), ConnectError> {
        let params = self.offer();
        let first_psn = self.unconnected(qpn)?.req.first_psn;
        let peer = self.cm.accept(
            now,
            conn,
            &AcceptArgs {
                qpn: qpn.get(),
                starting_psn: first_psn.get(),
                private,
                params,
                read_depth: self.config.max_reads,
            },
        )?;
        self.bind(qpn, conn);
        if let Some(qp) = find(&mut self.qps, self.slot_mask, qpn)
            && let Err(error) = bring_up(qp, &peer)
        {
            qp.conn = None;
            self.conns.remove(&conn);
            self.cm.disconnect(now, conn)?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Refuses a request.
    pub fn reject(
        &mut self,
        conn: ConnId,
        reason: RejectReason,
        private: &[u8],
        now: Instant,
    ) -> Result<(), ConnectError> {
        Ok(self.cm.reject(now, conn, reason, private)?)
    }

    /// Ends the connection of a queue pair: it is flushed at once and the peer is told.
    /// [`ConnEvent::Disconnected`] follows, unless the connection was not yet established.
    pub fn disconnect(&mut self, qpn: Qpn, now: Instant) -> Result<(), ConnectError> {
        let qp =
            find(&mut self.qps, self.slot_mask, qpn).ok_or(VerbsError::Unknown("queue pair"))?;
        let conn = qp.conn.ok_or(VerbsError::Unknown("connection"))?;
        qp.broken = true;
        qp.flush(&mut self.env);
        self.cm.disconnect(now, conn)?;
        self.pump_cm();
        Ok(())
    }

    /// What happened to connections; until `None`.
    pub fn poll_cm(&mut self) -> Option<ConnEvent> {
        if let Some(event) = self.conn_events.pop_front() {
            if self.conn_events.len() + 1 == EVENTS_MAX {
                self.pump_cm();
            }
            return Some(event);
        }
        let (qpn, user, status) = self.env.broken.pop_front()?;
        Some(ConnEvent::Broken { qpn, user, status })
    }

    /// The connection manager's own counters.
    #[must_use]
    pub fn cm_counters(&self) -> &crate::cm::CmCounters {
        self.cm.counters()
    }

    fn offer(&self) -> Option<Params> {
        let mut features = REQUIRED;
        if self.config.digest == Digest::Crc32c {
            features |= Features::CRC32C;
        }
        let mtu = self.config.mtu.min(u32::from(u16::MAX)) as u16;
        let window = self.config.window.min(u32::from(u16::MAX)) as u16;
        let offer = Params {
            mtu_bytes: mtu,
            window,
            features,
        }
        .clamped();
        self.config.flexins.then_some(offer)
    }

    fn unconnected(&self, qpn: Qpn) -> Result<&Qp, ConnectError> {
        let qp = self.qp(qpn).ok_or(VerbsError::Unknown("queue pair"))?;
        if qp.conn.is_some() {
            return Err(ConnectError::Busy);
        }
        if qp.state != QpState::Reset {
            let to = QpState::Init;
            return Err(VerbsError::IllegalTransition { from: qp.state, to }.into());
        }
        Ok(qp)
    }

    fn bind(&mut self, qpn: Qpn, conn: ConnId) {
        if let Some(qp) = find(&mut self.qps, self.slot_mask, qpn) {
            qp.conn = Some(conn);
            self.conns.insert(conn, qpn);
        }
    }

    /// Takes the connection manager's events, before its datagrams leave.
    pub(super) fn pump_cm(&mut self) {
        // Beyond this they wait in the manager, which refuses requests when it has too many.
        while self.conn_events.len() < EVENTS_MAX
            && let Some(event) = self.cm.poll_event()
        {
            match event {
                CmEvent::ConnectRequest {
                    conn,
                    from,
                    service,
                    private,
                    params,
                } => {
                    let agreed = match (self.offer(), params) {
                        (Some(ours), Some(theirs)) => usable(Some(ours.negotiate(theirs))),
                        _ => None,
                    };
                    let params = agreed;
                    let request = ConnEvent::ConnectRequest {
                        conn,
                        from,
                        service,
                        private,
                        params,
                    };
                    self.conn_events.push_back(request);
                }
                CmEvent::Established {
                    conn,
                    peer,
                    private,
                } => {
                    let Some(qp) = owner(&mut self.qps, &self.conns, self.slot_mask, conn) else {
                        continue;
                    };
                    // The accepting end was brought up when it accepted.
                    if qp.state == QpState::Reset && bring_up(qp, &peer).is_err() {
                        qp.break_down(&mut self.env, crate::verbs::WcStatus::LocQpOpErr);
                        continue;
                    }
                    let (qpn, user, mtu_bytes) = (qp.qpn, qp.init.user, qp.path.mtu);
                    let params = usable(peer.negotiated.params);
                    self.conn_events.push_back(ConnEvent::Established {
                        conn,
                        qpn,
                        user,
                        private,
                        params,
                        mtu_bytes,
                    });
                    self.settle(qpn);
                }
                CmEvent::Rejected {
                    conn,
                    reason,
                    private,
                } => {
                    if let Some((qpn, user)) = self.release(conn) {
                        let event = ConnEvent::Rejected {
                            conn,
                            qpn,
                            user,
                            reason,
                            private,
                        };
                        self.conn_events.push_back(event);
                    }
                }
                CmEvent::Unreachable { conn } => {
                    if let Some((qpn, user)) = self.release(conn) {
                        self.conn_events
                            .push_back(ConnEvent::Unreachable { conn, qpn, user });
                    }
                }
                CmEvent::Disconnected { conn, reason } => {
                    if let Some((qpn, user)) = self.release(conn) {
                        self.conn_events
                            .push_back(ConnEvent::Disconnected { qpn, user, reason });
                    }
                }
            }
        }
    }

    /// The connection is gone; a queue pair that was up is flushed.
    fn release(&mut self, conn: ConnId) -> Option<(Qpn, u64)> {
        let qp = owner(&mut self.qps, &self.conns, self.slot_mask, conn)?;
        self.conns.remove(&conn);
        qp.conn = None;
        if qp.state != QpState::Reset {
            // The event that follows says why; no other is needed.
            qp.broken = true;
            flush(qp, &mut self.env);
        }
        Some((qp.qpn, qp.init.user))
    }
}

fn flush(qp: &mut Qp, env: &mut Env) {
    if qp.state != QpState::Error {
        qp.flush(env);
    }
}

fn owner<'a>(
    qps: &'a mut [Option<Box<Qp>>],
    conns: &std::collections::BTreeMap<ConnId, Qpn>,
    slot_mask: u32,
    conn: ConnId,
) -> Option<&'a mut Qp> {
    find(qps, slot_mask, *conns.get(&conn)?)
}

/// From RESET to ready to send, as agreed with the peer.
fn bring_up(qp: &mut Qp, peer: &Peer) -> Result<(), VerbsError> {
    let Negotiated {
        params,
        path_mtu_bytes,
        initiator_depth,
        retry_count,
        rnr_retry_count,
        ..
    } = peer.negotiated;
    let flexins = usable(params);
    qp.state = qp.state.to(QpState::Init)?;
    qp.access = Access::REMOTE_READ | Access::REMOTE_WRITE | Access::LOCAL_WRITE;
    qp.ready_to_receive(&ReadyToReceive {
        peer: peer.address,
        peer_qpn: Qpn::new(peer.qpn),
        expected_psn: Psn::new(peer.starting_psn),
        mtu_bytes: flexins.map_or(path_mtu_bytes, |params| u32::from(params.mtu_bytes)),
        framing: if flexins.is_some() {
            Framing::Flexins
        } else {
            Framing::Standard
        },
        digest: match flexins {
            Some(params) if !params.features.contains(Features::CRC32C) => Digest::None,
            _ => Digest::Crc32c,
        },
        window: flexins.map_or(u32::MAX, |params| u32::from(params.window)),
    })?;
    qp.state = qp.state.to(QpState::ReadyToReceive)?;
    qp.ready_to_send(&ReadyToSend {
        first_psn: qp.req.first_psn,
        max_reads: u16::from(initiator_depth),
        retry_count,
        rnr_retry: rnr_retry_count,
    });
    qp.state = qp.state.to(QpState::ReadyToSend)?;
    Ok(())
}
