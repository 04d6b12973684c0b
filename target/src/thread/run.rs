//! The loop of a data thread: reactor, endpoint, queues.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use flexblk_reactor::{Completion, Polled, Reactor, Wait, affinity, mailbox};
use flexins::endpoint::{Endpoint, EndpointConfig, EndpointError, RxMode};
use flexins::engine::{EngineConfig, TxMode};
use flexins::port::udp::UdpError;
use flexins::verbs;

use super::activities::{Activities, Activity};
use super::mail::{self, Mail};
use super::parts::Shared;
use super::tcp::{TCP_OWNER, TcpConfig};
use super::{BDEV_OWNER, Core, PORT_OWNER};
use crate::captures::file_of_thread;
use crate::config::{Config, Digest, Listener, Rx, Tx};
use crate::error::StartError;
use crate::stats::{self, ThreadStats};

/// How long closing may take: DREQs and their answers, I/O that a device still has.
const DRAIN_TIME: Duration = Duration::from_secs(2);
/// How long the transport goes on without an answer. A host acknowledges our last responses when its
/// application comes back to the queue, which may be minutes; whether the host is alive is asked on its
/// Admin queue (Keep Alive, or `liveness`), and an I/O queue goes with its controller. This is for a
/// connection whose controller is gone or never came.
const SILENCE: Duration = Duration::from_secs(3600);
/// Memory of `rx=ring`.
const RING_BYTES: usize = 64 << 20;
/// Reports asked for that a turn answers at most.
const MAIL_PER_TURN: usize = 64;

/// What a thread is started with.
pub(crate) struct Start {
    pub(crate) id: usize,
    pub(crate) core: Option<usize>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) config: Arc<Config>,
    pub(crate) buffer_bytes: u64,
    pub(crate) reuse_port: bool,
    /// Where the mailbox, or the reason why there is none, goes.
    pub(crate) ready: mpsc::SyncSender<Result<mailbox::Sender<Mail>, StartError>>,
}

/// The thread's body. Ends after [`Mail::Shutdown`], or when the reactor is unusable.
pub(crate) fn run(start: Start) -> Result<(), flexblk_reactor::Error> {
    let ready = start.ready.clone();
    match Thread::new(start) {
        Ok((mut thread, sender)) => {
            // The starting thread is gone only when another thread has failed: then it ends us too.
            let _ = ready.send(Ok(sender));
            let result = thread.run();
            if let Err(error) = &result {
                tracing::error!(%error, thread = thread.id, "a data thread ends");
            }
            thread.close();
            result
        }
        Err(error) => {
            let _ = ready.send(Err(error));
            Ok(())
        }
    }
}

struct Thread {
    id: usize,
    reactor: Reactor,
    endpoint: Option<Endpoint>,
    core: Core,
    mail: mailbox::Receiver<Mail>,
    drain_until: Option<Instant>,
    poll_budget: Duration,
    activities: Activities,
    /// Messages wait that the last turn had no time for.
    mail_left: bool,
}

impl Thread {
    fn new(start: Start) -> Result<(Self, mailbox::Sender<Mail>), StartError> {
        if let Some(core) = start.core {
            affinity::pin_current_thread(core)?;
        }
        let poll_budget = start.config.poll_budget;
        let mut reactor = Reactor::new(&flexblk_reactor::Config {
            poll_budget,
            name: "target",
            ..flexblk_reactor::Config::default()
        })?;
        let (sender, receiver) = mailbox::channel(mail::CAPACITY, reactor.waker());
        let endpoint_config = endpoint_config(&start);
        let bind = endpoint_config.bind;
        let mut endpoint = Endpoint::bind(&mut reactor, PORT_OWNER, endpoint_config)
            .map_err(|source| endpoint_error(bind, source))?;
        let tcp = TcpConfig::new(&start.config);
        let core = Core::new(
            start.id,
            start.shared,
            start.buffer_bytes,
            tcp,
            endpoint.engine(),
            &mut reactor,
        )?;
        let thread = Self {
            id: start.id,
            reactor,
            endpoint: Some(endpoint),
            core,
            mail: receiver,
            drain_until: None,
            poll_budget,
            activities: Activities::default(),
            mail_left: false,
        };
        Ok((thread, sender))
    }

    fn run(&mut self) -> Result<(), flexblk_reactor::Error> {
        let mut completions: Vec<Completion> = Vec::with_capacity(256);
        loop {
            let wait = self.wait();
            completions.clear();
            let (core, endpoint) = (&mut self.core, &mut self.endpoint);
            self.reactor.turn_polling(wait, &mut completions, &mut || {
                let network = endpoint.as_mut().map_or(Polled::Nothing, Endpoint::look);
                network.max(core.look_tcp())
            })?;
            let now = self.reactor.now();
            let Self {
                reactor,
                endpoint,
                core,
                activities,
                ..
            } = self;
            let Some(endpoint) = endpoint else {
                return Ok(());
            };
            core.set_now(now);
            for completion in &completions {
                match completion.token.owner() {
                    PORT_OWNER => {
                        activities.note(Activity::Flexins);
                        endpoint.on_completion(
                            reactor,
                            completion,
                            &mut |engine, delivery, packet| {
                                core.look_ahead(engine, packet.behind);
                                core.delivery(engine, &delivery, packet.bytes);
                            },
                        );
                    }
                    BDEV_OWNER => {
                        activities.note(Activity::BlockDevices);
                        core.device_completion(endpoint.engine(), reactor, completion);
                    }
                    TCP_OWNER => {
                        activities.note(Activity::Tcp);
                        core.tcp_completion(endpoint.engine(), reactor, completion);
                    }
                    owner => tracing::warn!(owner, "a completion that belongs to nobody"),
                }
            }
            endpoint.take_looked(now, &mut |engine, delivery, packet| {
                activities.note(Activity::Flexins);
                core.look_ahead(engine, packet.behind);
                core.delivery(engine, &delivery, packet.bytes);
            });
            if core.has_tcp_news() {
                activities.note(Activity::Tcp);
                core.tcp_news(endpoint.engine());
            }
            self.read_mail(now);
            let Self {
                reactor,
                endpoint,
                core,
                activities,
                ..
            } = self;
            let Some(endpoint) = endpoint else {
                return Ok(());
            };
            if core.next_timeout().is_some_and(|at| at <= now) {
                activities.note(Activity::Timers);
            }
            if endpoint.next_timeout().is_some_and(|at| at <= now) {
                activities.note(Activity::Timers);
                endpoint.handle_timeout(now, &mut |engine, delivery, packet| {
                    core.delivery(engine, &delivery, packet.bytes);
                });
            }
            core.handle_timeout(now);
            core.poll(endpoint.engine(), reactor);
            let sleeps = reactor.will_sleep();
            if sleeps {
                endpoint.prepare_sleep(now);
            }
            let spins = !sleeps && !self.poll_budget.is_zero();
            endpoint.flush(reactor, now);
            endpoint.prepare_turn(reactor, spins);
            core.flush_tcp(reactor, spins);
            activities.end_turn();
            if let Some(until) = self.drain_until
                && (self.core.is_drained() || now >= until)
            {
                return Ok(());
            }
        }
    }

    fn wait(&self) -> Wait {
        let core = &self.core;
        if self.mail_left || core.has_work() || core.has_unsent_mail() || core.has_tcp_news() {
            return Wait::Poll;
        }
        let endpoint = self.endpoint.as_ref().and_then(Endpoint::next_timeout);
        let timers = [endpoint, self.core.next_timeout(), self.drain_until];
        match timers.into_iter().flatten().min() {
            Some(at) => Wait::Until(at),
            None => Wait::Adaptive,
        }
    }

    fn read_mail(&mut self, now: Instant) {
        self.mail_left = false;
        for _ in 0..MAIL_PER_TURN {
            let Some(mail) = self.mail.try_recv() else {
                return;
            };
            self.activities.note(Activity::Mailbox);
            match mail {
                Mail::Stats(reply) => {
                    // Whoever asked may have stopped waiting.
                    let _ = reply.try_send(self.stats());
                }
                Mail::Capture(order) => {
                    let Some(endpoint) = &mut self.endpoint else {
                        return;
                    };
                    order.carry_out(|capture| endpoint.set_capture(capture));
                }
                Mail::Shutdown => {
                    let Some(endpoint) = &mut self.endpoint else {
                        return;
                    };
                    self.core.drain(endpoint.engine());
                    self.drain_until = now.checked_add(DRAIN_TIME);
                }
                mail => {
                    let Some(endpoint) = &mut self.endpoint else {
                        return;
                    };
                    self.core.mail(mail, endpoint.engine(), &mut self.reactor);
                }
            }
        }
        self.mail_left = true;
    }

    fn stats(&mut self) -> ThreadStats {
        let figures = self.core.figures();
        let Some(endpoint) = &mut self.endpoint else {
            return ThreadStats::default();
        };
        let port = endpoint.port_counters();
        let reactor = self.reactor.stats();
        ThreadStats {
            thread: self.id,
            cpu_us: stats::micros(stats::cpu_time(false)),
            core: rustix::thread::sched_getcpu(),
            tid: rustix::thread::gettid().as_raw_nonzero().get(),
            queues: figures.queues,
            unconnected_queues: figures.unconnected_queues,
            connects: figures.connects,
            pending_bdev_io: figures.pending_bdev_io,
            controllers: figures.controllers,
            devices: figures.devices,
            memory_regions: endpoint.engine().memory_regions(),
            free_buffers: figures.free_buffers,
            buffer_waits: figures.buffer_waits,
            engine: endpoint.counters().entries().collect(),
            port: BTreeMap::from([
                ("trains_tx", port.trains_tx),
                ("segments_tx", port.segments_tx),
                ("bytes_tx", port.bytes_tx),
                ("gather_entries", port.gather_entries),
                ("port_header_bytes", port.header_bytes),
                ("port_payload_bytes_gathered", port.payload_bytes_gathered),
                ("port_payload_bytes_copied", port.payload_bytes_copied),
                ("trains_rx", port.trains_rx),
                ("segments_rx", port.segments_rx),
                ("bytes_rx", port.bytes_rx),
                ("send_errors", port.send_errors),
                ("gso_fallbacks", port.gso_fallbacks),
                ("looks_found", port.looks_found),
                ("rx_restarts", port.rx_restarts),
                ("rx_errors", port.rx_errors),
                ("rx_truncated", port.rx_truncated),
                ("rx_dropped_by_kernel", port.rx_dropped_by_kernel),
            ]),
            tcp: figures.tcp,
            busy_turns: self.activities.busy_turns(),
            reactor: BTreeMap::from([
                ("turns", reactor.turns),
                ("enters", reactor.enters),
                ("sleeps", reactor.sleeps),
                ("wakes", reactor.wakes),
                ("sqes", reactor.sqes),
                ("cqes", reactor.cqes),
                ("busy_us", stats::micros(reactor.busy)),
                ("spun_us", stats::micros(reactor.spun)),
                ("slept_us", stats::micros(reactor.slept)),
            ]),
        }
    }

    /// Sends what the last flush has built, then frees the port at once; what the kernel still holds
    /// goes with the reactor.
    fn close(&mut self) {
        if let Some(mut endpoint) = self.endpoint.take() {
            // A reactor that is unusable has said so already.
            let _ = self.reactor.turn(Wait::Poll, &mut Vec::new());
            endpoint.close(&mut self.reactor);
        }
    }
}

fn endpoint_config(start: &Start) -> EndpointConfig {
    let listener = &start.config.listener;
    let mut config = EndpointConfig::new(SocketAddr::new(listener.address.ip(), listener.udp_port));
    config.reuse_port = start.reuse_port;
    config.rx = match listener.rx {
        Rx::InCache => RxMode::InCache,
        Rx::Ring => RxMode::Ring { bytes: RING_BYTES },
    };
    config.fault = listener.fault;
    config.capture = listener
        .capture
        .as_ref()
        .map(|file| file_of_thread(file, start.id));
    configure_engine(&mut config.engine, listener);
    config
}

/// What the configuration says about engines.
pub(crate) fn configure_engine(engine: &mut EngineConfig, listener: &Listener) {
    engine.retry_time = SILENCE;
    engine.tx = match listener.tx {
        Tx::HeaderOnly => TxMode::HeaderOnly,
        Tx::Copy => TxMode::Copy,
    };
    engine.digest = match listener.digest {
        Digest::Crc32c => verbs::Digest::Crc32c,
        Digest::None => verbs::Digest::None,
    };
    if let Some(mtu) = listener.mtu {
        engine.mtu = mtu;
    }
}

/// Names what a user can do something about.
pub(crate) fn endpoint_error(address: SocketAddr, source: EndpointError) -> StartError {
    let errno = match &source {
        EndpointError::Port(UdpError::Bind { source, .. }) => source.raw_os_error(),
        _ => None,
    };
    match errno {
        Some(libc::EADDRINUSE) => StartError::PortInUse(address),
        Some(libc::EADDRNOTAVAIL) => StartError::NoSuchAddress(address),
        _ => StartError::Endpoint { address, source },
    }
}
