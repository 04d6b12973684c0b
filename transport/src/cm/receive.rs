//! Received messages of the connection manager.

use std::net::SocketAddr;
use std::time::Instant;

use super::connection::{Conn, State, application_private, reply_address};
use super::interface::{CmEvent, ConnId, DisconnectReason, Negotiated, Peer};
use super::mad::{
    About, Mad, Message, PrivateData, REJ_PRIVATE_LEN_BYTES, Rej, RejectReason, Rep, Req,
    path_mtu_bytes,
};
use super::manager::{CmManager, EVENT_QUEUE};
use super::params::Params;

impl CmManager {
    pub(super) fn on_req(&mut self, now: Instant, from: SocketAddr, transaction: u64, req: &Req) {
        let offer = Params::parse(req.user_private());
        let reply_to = reply_address(from, offer);
        let peer_key = (reply_to, req.local_id);
        if let Some(&old_id) = self.by_peer.get(&peer_key)
            && let Some(old) = self.conns.get(&old_id)
        {
            if old.transaction == transaction
                && old.peer.qpn == req.qpn
                && old.peer.starting_psn == req.starting_psn
            {
                self.counters.duplicates += 1;
                let repeat = match old.state {
                    State::RepSent | State::TimeWait => old.repeat.as_deref().copied(),
                    _ => None,
                };
                if let Some(mad) = repeat {
                    self.send(reply_to, mad);
                }
                return;
            }
            if self.end_stale(old_id) {
                return self.refuse(reply_to, transaction, req, RejectReason::StaleConnection);
            }
        }
        if let Some(&old_id) = self.by_qpn.get(&(reply_to, req.qpn))
            && self.end_stale(old_id)
        {
            return self.refuse(reply_to, transaction, req, RejectReason::StaleConnection);
        }
        if !self.listeners.contains(&req.service) {
            self.counters.refused_service += 1;
            return self.refuse(reply_to, transaction, req, RejectReason::InvalidServiceId);
        }
        if self.half_open >= self.config.max_half_open
            || self.active() >= self.config.max_connections
            || self.events.len() >= EVENT_QUEUE
        {
            self.counters.refused_half_open += 1;
            return self.refuse(reply_to, transaction, req, RejectReason::NoResources);
        }
        let negotiated = Negotiated {
            params: None,
            path_mtu_bytes: path_mtu_bytes(req.path_mtu),
            // What the peer answers limits what we ask, and the other way round.
            initiator_depth: req.responder_resources,
            responder_resources: req.initiator_depth,
            retry_count: req.retry_count,
            rnr_retry_count: req.rnr_retry_count,
        };
        let peer = Peer {
            address: reply_to,
            qpn: req.qpn,
            starting_psn: req.starting_psn,
            negotiated,
        };
        let conn_id = self.new_id();
        let conn = Conn {
            state: State::ReqReceived,
            transaction,
            peer_id: Some(req.local_id),
            offer,
            local_qpn: 0,
            peer,
            repeat: None,
            deadline: None,
            attempts: 0,
        };
        self.conns.insert(conn_id, conn);
        self.half_open += 1;
        self.by_peer.insert(peer_key, conn_id);
        self.by_qpn.insert((reply_to, req.qpn), conn_id);
        self.arm(conn_id, now + self.config.accept_timeout);
        self.events.push_back(CmEvent::ConnectRequest {
            conn: conn_id,
            from: reply_to,
            service: req.service,
            private: application_private(req.user_private(), offer.is_some()),
            params: offer,
        });
    }

    pub(super) fn on_rep(&mut self, from: SocketAddr, transaction: u64, rep: &Rep) {
        let conn_id = ConnId(rep.remote_id);
        let answer = Params::parse(&rep.private);
        let Some(conn) = self.conns.get_mut(&conn_id) else {
            let reply_to = reply_address(from, answer);
            let message = Message::Rej(Rej {
                local_id: rep.remote_id,
                remote_id: rep.local_id,
                about: About::Rep,
                reason: RejectReason::InvalidCommId,
                private: [0; REJ_PRIVATE_LEN_BYTES],
            });
            self.counters.ignored += 1;
            return self.send(
                reply_to,
                Mad {
                    transaction,
                    message,
                }
                .emit(),
            );
        };
        if !conn.comes_from(from, answer.is_some()) {
            self.counters.ignored += 1;
            return;
        }
        match conn.state {
            State::ReqSent => {}
            State::Established if conn.peer_id == Some(rep.local_id) => {
                // Our ReadyToUse was lost.
                let rtu = conn.rtu_mad(conn_id);
                let to = conn.peer.address;
                self.counters.duplicates += 1;
                return self.send(to, rtu);
            }
            _ => {
                self.counters.ignored += 1;
                return;
            }
        }
        let params = match (conn.offer, answer) {
            (Some(ours), Some(theirs)) if ours.negotiate(theirs) == theirs => Ok(Some(theirs)),
            (Some(_), Some(_)) => Err(RejectReason::Unsupported),
            _ => Ok(None),
        };
        let address = conn.peer.address;
        let stale = self.by_qpn.get(&(address, rep.qpn)).copied();
        let stale = stale.filter(|&old_id| old_id != conn_id);
        let verdict = match stale {
            Some(old_id) if self.end_stale(old_id) => Err(RejectReason::StaleConnection),
            _ => params,
        };
        let Some(conn) = self.conns.get_mut(&conn_id) else {
            return;
        };
        conn.peer_id = Some(rep.local_id);
        match verdict {
            Ok(params) => {
                conn.peer.qpn = rep.qpn;
                conn.peer.starting_psn = rep.starting_psn;
                let negotiated = &mut conn.peer.negotiated;
                negotiated.params = params;
                negotiated.initiator_depth =
                    negotiated.initiator_depth.min(rep.responder_resources);
                negotiated.responder_resources =
                    negotiated.responder_resources.min(rep.initiator_depth);
                negotiated.rnr_retry_count = rep.rnr_retry_count;
                conn.repeat = None;
                let peer = conn.peer;
                let rtu = conn.rtu_mad(conn_id);
                self.set_state(conn_id, State::Established);
                self.disarm(conn_id);
                self.by_peer.insert((address, rep.local_id), conn_id);
                self.by_qpn.insert((address, rep.qpn), conn_id);
                let private = application_private(&rep.private, params.is_some());
                self.events.push_back(CmEvent::Established {
                    conn: conn_id,
                    peer,
                    private,
                });
                self.send(address, rtu);
            }
            Err(reason) => {
                let area = [0; REJ_PRIVATE_LEN_BYTES];
                let mad = conn.reject_mad(conn_id, About::Rep, reason, area);
                self.send(address, mad);
                self.remove(conn_id);
                let private = PrivateData::default();
                self.events.push_back(CmEvent::Rejected {
                    conn: conn_id,
                    reason,
                    private,
                });
            }
        }
    }

    pub(super) fn on_rej(&mut self, from: SocketAddr, rej: &Rej) {
        let conn_id = ConnId(rej.remote_id);
        let Some(conn) = self
            .conns
            .get(&conn_id)
            .filter(|conn| conn.comes_from(from, false))
        else {
            self.counters.ignored += 1;
            return;
        };
        let from_peer = conn.peer_id == Some(rej.local_id);
        match conn.state {
            State::ReqSent => {
                self.remove(conn_id);
                self.events.push_back(CmEvent::Rejected {
                    conn: conn_id,
                    reason: rej.reason,
                    private: PrivateData::from_prefix(&rej.private),
                });
            }
            // "Invalid communication id" comes from a peer that has forgotten us: it names our id
            // only, or both.
            State::RepSent if from_peer || rej.about == About::Rep => {
                self.remove(conn_id);
                self.events.push_back(CmEvent::Rejected {
                    conn: conn_id,
                    reason: rej.reason,
                    private: PrivateData::from_prefix(&rej.private),
                });
            }
            // The accepting end has given up waiting for our ReadyToUse.
            State::Established if from_peer && rej.reason == RejectReason::Timeout => {
                self.remove(conn_id);
                let reason = DisconnectReason::Peer;
                self.events.push_back(CmEvent::Disconnected {
                    conn: conn_id,
                    reason,
                });
            }
            _ => self.counters.ignored += 1,
        }
    }

    pub(super) fn on_rtu(&mut self, from: SocketAddr, local_id: u32, remote_id: u32) {
        let conn_id = ConnId(remote_id);
        match self.conns.get(&conn_id) {
            Some(conn) if conn.is_peer(from, local_id) => match conn.state {
                State::RepSent => self.establish_passive(conn_id),
                State::Established => self.counters.duplicates += 1,
                _ => self.counters.ignored += 1,
            },
            _ => self.counters.ignored += 1,
        }
    }

    pub(super) fn on_dreq(
        &mut self,
        now: Instant,
        from: SocketAddr,
        transaction: u64,
        local_id: u32,
        remote_id: u32,
        remote_qpn: u32,
    ) {
        let conn_id = ConnId(remote_id);
        let Some(conn) = self.conns.get(&conn_id) else {
            // A connection that we have forgotten: confirm, so that the peer forgets it too.
            self.counters.ignored += 1;
            let message = Message::Drep {
                local_id: remote_id,
                remote_id: local_id,
            };
            return self.send(
                from,
                Mad {
                    transaction,
                    message,
                }
                .emit(),
            );
        };
        if !conn.is_peer(from, local_id) || conn.local_qpn != remote_qpn {
            self.counters.ignored += 1;
            return;
        }
        let reason = match conn.state {
            State::RepSent | State::Established => Some(DisconnectReason::Peer),
            State::DreqSent => Some(DisconnectReason::Local),
            State::TimeWait => None,
            State::ReqSent | State::ReqReceived => {
                self.counters.ignored += 1;
                return;
            }
        };
        let message = Message::Drep {
            local_id: conn_id.0,
            remote_id: local_id,
        };
        let to = conn.peer.address;
        self.send(
            to,
            Mad {
                transaction,
                message,
            }
            .emit(),
        );
        match reason {
            Some(reason) => self.end(now, conn_id, reason),
            None => self.counters.duplicates += 1,
        }
    }

    pub(super) fn on_drep(
        &mut self,
        now: Instant,
        from: SocketAddr,
        local_id: u32,
        remote_id: u32,
    ) {
        let conn_id = ConnId(remote_id);
        match self.conns.get(&conn_id) {
            Some(conn) if conn.is_peer(from, local_id) && conn.state == State::DreqSent => {
                self.end(now, conn_id, DisconnectReason::Local);
            }
            _ => self.counters.ignored += 1,
        }
    }
}
