//! The loop of an engine thread: network, mailbox, pipes, timers; polls while there is work, then
//! sleeps until a packet, a client's doorbell or a timer.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use flexblk_reactor::{Completion, Config, Reactor, Wait, affinity, mailbox};

use super::client::Connected;
use super::control::{
    Call, ClientEvent, Control, EngineCounters, Incoming, NewTenant, Reply, TenantId,
};
use super::tenant::{Tenant, answer};
use super::{RemoteError, ThreadConfig};
use crate::cm::{RejectReason, ServiceId};
use crate::endpoint::{Endpoint, EndpointConfig};
use crate::engine::{ConnEvent, Delivery, Engine};
use crate::port::Packet;
use crate::verbs::Qpn;

const PORT: u8 = 1;
const MAILBOX: usize = 1024;
/// How long the kernel may hold a train while a client waits for its memory.
const SENDING_TIME: Duration = Duration::from_millis(50);

type Started = SyncSender<Result<(mailbox::Sender<Control>, SocketAddr), RemoteError>>;

/// Body of the thread. Reports through `started` how it begins, and ends on [`Control::Stop`].
pub(super) fn run(endpoint: &EndpointConfig, config: &ThreadConfig, started: &Started) {
    let mut thread = match EngineLoop::start(endpoint, config) {
        Ok((thread, control)) => {
            let local_addr = thread.endpoint.local_addr();
            // Fails only when the starter is gone; then nobody can stop us either.
            if started.send(Ok((control, local_addr))).is_err() {
                return;
            }
            thread
        }
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    if let Err(error) = thread.run() {
        tracing::error!(%error, "engine thread ends");
    }
    thread.shut_down();
}

struct EngineLoop {
    reactor: Reactor,
    endpoint: Endpoint,
    mailbox: mailbox::Receiver<Control>,
    tenants: Vec<Option<Tenant>>,
    generation: u32,
    services: BTreeMap<ServiceId, (TenantId, SyncSender<Incoming>)>,
    poll_budget: Duration,
    completions: Vec<Completion>,
    /// Clients that wait until nothing of a region that they took away is with the kernel any more.
    farewells: Vec<Reply<()>>,
    /// When the kernel is asked to give back what it could not send, because somebody waits for it.
    cancel_at: Option<Instant>,
    stopping: bool,
}

impl EngineLoop {
    fn start(
        endpoint: &EndpointConfig,
        config: &ThreadConfig,
    ) -> Result<(Self, mailbox::Sender<Control>), RemoteError> {
        if let Some(core) = config.core
            && let Err(error) = affinity::pin_current_thread(core)
        {
            tracing::warn!(core, %error, "engine thread is not pinned");
        }
        // This loop does its own polling, because the pipes are not the reactor's: when it lets the
        // reactor wait, it is to sleep.
        let reactor_config = Config {
            poll_budget: Duration::ZERO,
            name: config.name,
            ..Config::default()
        };
        let mut reactor = Reactor::new(&reactor_config).map_err(RemoteError::Reactor)?;
        let endpoint =
            Endpoint::bind(&mut reactor, PORT, endpoint.clone()).map_err(RemoteError::Endpoint)?;
        let (control, mailbox) = mailbox::channel(MAILBOX, reactor.waker());
        let tenants = std::iter::repeat_with(|| None)
            .take(config.max_clients)
            .collect();
        let thread = Self {
            reactor,
            endpoint,
            mailbox,
            tenants,
            generation: 0,
            services: BTreeMap::new(),
            poll_budget: config.poll_budget,
            completions: Vec::new(),
            farewells: Vec::new(),
            cancel_at: None,
            stopping: false,
        };
        Ok((thread, control))
    }

    fn run(&mut self) -> Result<(), flexblk_reactor::Error> {
        let mut last_active = Instant::now();
        let mut wait = Wait::Poll;
        while !self.stopping {
            let slept = wait != Wait::Poll;
            self.reactor.turn(wait, &mut self.completions)?;
            if slept {
                self.tenants.iter_mut().flatten().for_each(Tenant::awake);
            }
            let now = self.reactor.now();
            let mut active = self.network();
            active |= self.control(now);
            if self.endpoint.next_timeout().is_some_and(|at| at <= now) {
                self.endpoint.handle_timeout(now, &mut no_delivery);
            }
            active |= self.pipes(now);
            active |= self.send(now);
            if active {
                last_active = now;
            }
            wait = Wait::Poll;
            if now.saturating_duration_since(last_active) >= self.poll_budget {
                wait = self.prepare_sleep(now);
            } else if !active {
                std::hint::spin_loop();
            }
        }
        Ok(())
    }

    /// Sends, unless somebody waits until nothing is being sent. True while somebody does.
    fn send(&mut self, now: Instant) -> bool {
        if self.farewells.is_empty() {
            self.endpoint.flush(&mut self.reactor, now);
            return false;
        }
        if self.endpoint.trains_in_flight() == 0 {
            self.cancel_at = None;
            for reply in self.farewells.drain(..) {
                answer(&reply, Ok(()));
            }
            self.endpoint.flush(&mut self.reactor, now);
            return true;
        }
        let cancel_at = *self.cancel_at.get_or_insert(now + SENDING_TIME);
        if now >= cancel_at {
            self.cancel_at = Some(now + SENDING_TIME);
            self.endpoint.cancel_trains(&mut self.reactor);
        }
        true
    }

    /// How to wait: asleep if nobody has anything more for us.
    fn prepare_sleep(&mut self, now: Instant) -> Wait {
        self.endpoint.prepare_sleep(now);
        self.endpoint.flush(&mut self.reactor, now);
        if !self.tenants.iter_mut().flatten().all(Tenant::prepare_sleep) {
            self.tenants.iter_mut().flatten().for_each(Tenant::awake);
            return Wait::Poll;
        }
        match self.endpoint.next_timeout() {
            Some(at) => Wait::Until(at),
            None => Wait::Adaptive,
        }
    }

    fn network(&mut self) -> bool {
        let mut completions = std::mem::take(&mut self.completions);
        let active = !completions.is_empty();
        for completion in completions.drain(..) {
            if completion.token.owner() == PORT {
                self.endpoint
                    .on_completion(&mut self.reactor, &completion, &mut no_delivery);
            }
        }
        self.completions = completions;
        active
    }

    fn pipes(&mut self, now: Instant) -> bool {
        let mut active = false;
        for slot in 0..self.tenants.len() {
            let engine = self.endpoint.engine();
            let Some(tenant) = self.tenants.get_mut(slot).and_then(Option::as_mut) else {
                continue;
            };
            match tenant.take_requests(engine) {
                Ok(taken) => active |= taken > 0,
                Err(_) => self.drop_tenant(slot, now),
            }
        }
        active |= self.connections(now);
        for slot in 0..self.tenants.len() {
            let engine = self.endpoint.engine();
            let Some(tenant) = self.tenants.get_mut(slot).and_then(Option::as_mut) else {
                continue;
            };
            match tenant.push_completions(engine) {
                Ok(pushed) => active |= pushed > 0,
                Err(_) => self.drop_tenant(slot, now),
            }
        }
        active
    }

    fn connections(&mut self, now: Instant) -> bool {
        let mut active = false;
        while let Some(event) = self.endpoint.engine().poll_cm() {
            active = true;
            match event {
                ConnEvent::ConnectRequest {
                    conn,
                    from,
                    service,
                    private,
                    params,
                } => {
                    let incoming = Incoming {
                        conn,
                        from,
                        service,
                        private,
                        params,
                    };
                    let taken = self
                        .services
                        .get(&service)
                        .is_some_and(|(_, listener)| listener.try_send(incoming).is_ok());
                    if !taken {
                        // Nobody takes it: the listener is full or gone.
                        let reason = RejectReason::NoResources;
                        let _ = self.endpoint.engine().reject(conn, reason, &[], now);
                    }
                }
                ConnEvent::Established {
                    qpn,
                    user,
                    private,
                    params,
                    mtu_bytes,
                    ..
                } => {
                    let result = Ok(Connected {
                        private,
                        params,
                        mtu_bytes,
                    });
                    self.connected(user, qpn, result, ClientEvent::Established { qpn });
                }
                ConnEvent::Rejected {
                    qpn,
                    user,
                    reason,
                    private,
                    ..
                } => {
                    let private = Box::new(private);
                    let result = Err(RemoteError::Rejected { reason, private });
                    self.connected(user, qpn, result, ClientEvent::Failed { qpn });
                }
                ConnEvent::Unreachable { qpn, user, .. } => {
                    let result = Err(RemoteError::Unreachable);
                    self.connected(user, qpn, result, ClientEvent::Failed { qpn });
                }
                ConnEvent::Disconnected { qpn, user, reason } => {
                    self.event(user, ClientEvent::Disconnected { qpn, reason });
                }
                ConnEvent::Broken { qpn, user, status } => {
                    self.event(user, ClientEvent::Broken { qpn, status });
                }
            }
        }
        active
    }

    /// Answers whoever waits in `connect`, or tells an accepting client.
    fn connected(
        &mut self,
        user: u64,
        qpn: Qpn,
        result: Result<Connected, RemoteError>,
        event: ClientEvent,
    ) {
        if let Some(tenant) = self.tenant(TenantId::from_user(user))
            && tenant.connected(qpn, result).is_some()
        {
            tenant.event(event);
        }
    }

    fn event(&mut self, user: u64, event: ClientEvent) {
        if let Some(tenant) = self.tenant(TenantId::from_user(user)) {
            tenant.event(event);
        }
    }

    fn tenant(&mut self, id: TenantId) -> Option<&mut Tenant> {
        let slot = self.tenants.get_mut(id.slot as usize)?;
        slot.as_mut().filter(|tenant| tenant.id() == id)
    }

    fn control(&mut self, now: Instant) -> bool {
        let mut active = false;
        while let Some(control) = self.mailbox.try_recv() {
            active = true;
            match control {
                Control::Attach { tenant, reply } => {
                    let attached = self.attach(tenant);
                    answer(&reply, attached);
                }
                Control::Of { id, call } => self.call(now, id, call),
                Control::Stop => self.stopping = true,
                #[cfg(test)]
                Control::Crash => panic!("crash on demand"),
            }
        }
        active
    }

    fn attach(&mut self, new: NewTenant) -> Result<TenantId, RemoteError> {
        let free = self.tenants.iter().position(Option::is_none);
        let slot = free.ok_or(RemoteError::TooManyClients)?;
        self.generation = self.generation.wrapping_add(1);
        let id = TenantId {
            slot: slot as u32,
            generation: self.generation,
        };
        let tenant = Tenant::attach(self.endpoint.engine(), id, new)?;
        if let Some(place) = self.tenants.get_mut(slot) {
            *place = Some(tenant);
        }
        Ok(id)
    }

    fn drop_tenant(&mut self, slot: usize, now: Instant) {
        let Some(tenant) = self.tenants.get_mut(slot).and_then(Option::take) else {
            return;
        };
        let id = tenant.id();
        let engine = self.endpoint.engine();
        self.services.retain(|&service, (owner, _)| {
            if *owner == id {
                engine.unlisten(service);
            }
            *owner != id
        });
        tenant.destroy(engine, now);
    }

    fn call(&mut self, now: Instant, id: TenantId, call: Call) {
        let engine = self.endpoint.engine();
        let slot = self.tenants.get_mut(id.slot as usize);
        let Some(tenant) = slot
            .and_then(Option::as_mut)
            .filter(|tenant| tenant.id() == id)
        else {
            // The reply is dropped with the call: the caller reads "gone".
            return;
        };
        if tenant.take_all_requests(engine).is_err() {
            return self.drop_tenant(id.slot as usize, now);
        }
        match call {
            Call::Register {
                memory,
                offset_bytes,
                len_bytes,
                access,
                reply,
            } => {
                let mr = tenant.register(engine, memory, offset_bytes, len_bytes, access);
                answer(&reply, mr);
            }
            Call::RegisterSpan {
                memory,
                access,
                reply,
            } => answer(&reply, tenant.register_span(engine, memory, access)),
            Call::Deregister { lkey, reply } => match tenant.deregister(engine, lkey) {
                // What was built before may still be read by the kernel.
                Ok(()) => self.farewells.push(reply),
                Err(error) => answer(&reply, Err(error)),
            },
            Call::Counters { reply } => {
                let counters = EngineCounters {
                    engine: *self.endpoint.counters(),
                    port: self.endpoint.port_counters(),
                    enters: self.reactor.stats().enters,
                };
                answer(&reply, Ok(counters));
            }
            Call::CreateQp { config, reply } => answer(&reply, tenant.create_qp(engine, &config)),
            Call::DestroyQp { qpn, reply } => answer(&reply, tenant.destroy_qp(engine, now, qpn)),
            Call::Listen {
                service,
                incoming,
                reply,
            } => {
                let listening = match engine.listen(service) {
                    Ok(()) => {
                        self.services.insert(service, (id, incoming));
                        Ok(())
                    }
                    Err(_) => Err(RemoteError::ServiceInUse),
                };
                answer(&reply, listening);
            }
            Call::Connect {
                qpn,
                to,
                service,
                private,
                reply,
            } => {
                tenant.connect(engine, now, (qpn, to, service), &private, reply);
            }
            Call::Accept {
                conn,
                qpn,
                private,
                reply,
            } => {
                answer(&reply, tenant.accept(engine, now, conn, qpn, &private));
            }
            Call::Reject {
                conn,
                reason,
                private,
                reply,
            } => {
                let rejected = engine.reject(conn, reason, &private, now);
                answer(&reply, rejected.map_err(RemoteError::from));
            }
            Call::Disconnect { qpn, reply } => {
                answer(&reply, tenant.disconnect(engine, now, qpn));
            }
        }
    }

    /// Ends every connection in good order, as far as one flush can.
    fn shut_down(&mut self) {
        let now = Instant::now();
        for slot in 0..self.tenants.len() {
            self.drop_tenant(slot, now);
        }
        self.endpoint.flush(&mut self.reactor, now);
        // The farewells leave with this turn; their confirmation is not waited for.
        if let Err(error) = self.reactor.turn(Wait::Poll, &mut self.completions) {
            tracing::debug!(%error, "last turn of an engine thread");
        }
    }
}

/// Clients' queue pairs have posted buffers only, so that nothing is ever delivered in place.
fn no_delivery(_: &mut Engine, delivery: Delivery, _: Packet<'_>) {
    tracing::error!(?delivery, "in-place delivery on an engine thread");
}
