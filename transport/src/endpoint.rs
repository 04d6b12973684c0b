//! An engine and a UDP port on the reactor of one thread.
//!
//! The owner's loop: turn the reactor; give [`Endpoint::on_completion`] what carries the endpoint's
//! owner number; [`Endpoint::handle_timeout`] when [`Endpoint::next_timeout`] has passed; post work;
//! [`Endpoint::flush`] before the next turn. When the reactor announces sleep
//! ([`Reactor::will_sleep`]), [`Endpoint::prepare_sleep`] before that flush.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Instant;

use flexblk_reactor::{Completion, Polled, Reactor};

use crate::counters::Counters;
use crate::engine::{Delivery, Engine, EngineConfig};
use crate::middleware::fault::FaultCounters;
use crate::middleware::{Capture, Direction, FaultConfig, FaultInjector};
pub use crate::port::udp::RxMode;
use crate::port::udp::{UdpConfig, UdpError, UdpPort};
use crate::port::{Packet, Port, PortCounters};

/// What surrounds the payload of the largest packet: IPv4 (20) and UDP (8) headers, BTH, RETH,
/// ImmDt and trailer (40), and 8 to spare. IPv6 takes 20 more.
const OVERHEAD_BYTES: u32 = 28 + 48;
/// Negotiated MTUs are multiples of it.
const MTU_STEP_BYTES: u32 = 64;
/// Smallest MTU that both framings have.
const MTU_MIN_BYTES: u32 = 1024;

/// How an endpoint is made.
#[derive(Clone, Debug)]
pub struct EndpointConfig {
    /// Limits and choices of the engine; `engine.tx` also rules the port.
    pub engine: EngineConfig,
    /// Address to bind; port 0 for any.
    pub bind: SocketAddr,
    /// The one peer that this endpoint will talk to, if known: packets are not made larger than the
    /// path there carries.
    pub peer: Option<SocketAddr>,
    /// Share the address with other endpoints; the kernel's hash keeps a peer at one of them.
    pub reuse_port: bool,
    /// Where received packets lie.
    pub rx: RxMode,
    /// Buffers of [`RxMode::InCache`], each for a train.
    pub in_cache_buffers: u16,
    /// Faults done to received packets.
    pub fault: Option<FaultConfig>,
    /// File for a packet capture.
    pub capture: Option<PathBuf>,
    /// Let the kernel segment trains.
    pub gso: bool,
    /// Send without the kernel's copy, where kernel and device can; no gain on loopback.
    pub zero_copy: bool,
    /// Trains that can be under way.
    pub trains: u16,
    /// Socket buffers in bytes, each way.
    pub socket_buffer_bytes: u32,
    /// Group number of the receive buffers, unique in the reactor.
    pub buffer_group: u16,
    /// Seed of keys and sequence numbers; random when absent. Only tests give one.
    pub seed: Option<u64>,
}

impl EndpointConfig {
    /// The usual, bound to `bind`.
    #[must_use]
    pub fn new(bind: SocketAddr) -> Self {
        let udp = UdpConfig::new(bind);
        Self {
            engine: EngineConfig::default(),
            bind,
            peer: None,
            reuse_port: udp.reuse_port,
            rx: udp.rx,
            in_cache_buffers: udp.in_cache_buffers,
            fault: None,
            capture: None,
            gso: udp.gso,
            zero_copy: udp.zero_copy,
            trains: udp.trains,
            socket_buffer_bytes: udp.socket_buffer_bytes,
            buffer_group: udp.buffer_group,
            seed: None,
        }
    }
}

impl Default for EndpointConfig {
    /// Any IPv4 address, any port.
    fn default() -> Self {
        Self::new(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)))
    }
}

/// Why there is no endpoint.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The port.
    #[error(transparent)]
    Port(#[from] UdpError),
    /// The capture file.
    #[error("cannot create the capture file {}: {source}", path.display())]
    Capture {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The path to the peer carries no packet of the smallest MTU.
    #[error("the path to {peer} carries packets of {mtu_bytes} bytes only; 1100 are needed")]
    PathTooNarrow {
        /// The peer.
        peer: SocketAddr,
        /// Its path's MTU.
        mtu_bytes: u32,
    },
    /// There is no way to the peer.
    #[error("no route to {peer}: {source}")]
    NoRoute {
        /// The peer.
        peer: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel gave no random numbers.
    #[error("no random seed: {0}")]
    Random(getrandom::Error),
}

/// Takes messages that arrived in place: the engine (to post answers), the message, and the packet
/// that it may lie in.
pub type Handler<'a> = dyn FnMut(&mut Engine, Delivery, Packet<'_>) + 'a;

/// An engine with a UDP port.
pub struct Endpoint {
    engine: Engine,
    port: UdpPort,
    path: Path,
}

/// The modules between port and engine.
struct Path {
    local: SocketAddr,
    fault: Option<FaultInjector>,
    capture: Option<Capture>,
}

impl Path {
    /// A packet on its way from the port to the engine.
    #[inline]
    fn packet(
        &mut self,
        engine: &mut Engine,
        now: Instant,
        from: SocketAddr,
        packet: Packet<'_>,
        handler: &mut Handler<'_>,
    ) {
        let Self {
            local,
            fault,
            capture,
        } = self;
        let mut take = |from: SocketAddr, packet: Packet<'_>| {
            take_packet(engine, capture, *local, now, from, packet, handler);
        };
        match fault {
            None => take(from, packet),
            Some(fault) => fault.apply(now, from, packet.bytes, &mut |from, bytes| {
                take(from, Packet::alone(bytes));
            }),
        }
    }
}

impl Endpoint {
    /// Binds a port and makes an engine; `owner` marks the endpoint's tokens on this reactor.
    ///
    /// # Errors
    /// [`EndpointError`].
    pub fn bind(
        reactor: &mut Reactor,
        owner: u8,
        mut config: EndpointConfig,
    ) -> Result<Self, EndpointError> {
        if let Some(peer) = config.peer {
            config.engine.mtu = config.engine.mtu.min(path_mtu(peer)?);
        }
        let capture = match config.capture {
            None => None,
            Some(path) => match Capture::create(&path) {
                Ok(capture) => Some(capture),
                Err(source) => return Err(EndpointError::Capture { path, source }),
            },
        };
        let seed = match config.seed {
            Some(seed) => seed,
            None => getrandom::u64().map_err(EndpointError::Random)?,
        };
        let udp = UdpConfig {
            bind: config.bind,
            reuse_port: config.reuse_port,
            tx: config.engine.tx,
            rx: config.rx,
            gso: config.gso,
            zero_copy: config.zero_copy,
            trains: config.trains,
            in_cache_buffers: config.in_cache_buffers,
            socket_buffer_bytes: config.socket_buffer_bytes,
            buffer_group: config.buffer_group,
        };
        let port = UdpPort::bind(reactor, owner, &udp)?;
        let local = port.local_addr();
        let mut engine = Engine::new(config.engine, seed);
        engine.set_local_address(local);
        let fault = config.fault.map(FaultInjector::new);
        Ok(Self {
            engine,
            port,
            path: Path {
                local,
                fault,
                capture,
            },
        })
    }

    /// The engine: all verbs.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// Captures packets from now on, or no more; gives the capture that ends.
    pub fn set_capture(&mut self, capture: Option<Capture>) -> Option<Capture> {
        std::mem::replace(&mut self.path.capture, capture)
    }

    /// Address that peers answer to.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.path.local
    }

    /// Takes a completion with the endpoint's owner number: runs the engine for every packet that
    /// has arrived and hands out messages.
    pub fn on_completion(
        &mut self,
        reactor: &mut Reactor,
        completion: &Completion,
        handler: &mut Handler<'_>,
    ) {
        let now = reactor.now();
        let Self { engine, port, path } = self;
        port.on_completion(reactor, completion, &mut |from, packet| {
            path.packet(engine, now, from, packet, handler);
        });
    }

    /// Before a turn: how it receives. `spins`: the thread looks for news before it sleeps. An owner that
    /// calls this calls [`Endpoint::look`] during the turn and [`Endpoint::take_looked`] after it:
    /// little traffic is quicker without the ring.
    #[inline]
    pub fn prepare_turn(&mut self, reactor: &mut Reactor, spins: bool) {
        self.port.prepare_turn(reactor, spins);
    }

    /// Asks the socket, if that is how the endpoint receives just now.
    #[inline]
    pub fn look(&mut self) -> Polled {
        self.port.look()
    }

    /// As [`Endpoint::on_completion`], for what a look has found.
    #[inline]
    pub fn take_looked(&mut self, now: Instant, handler: &mut Handler<'_>) {
        let Self { engine, port, path } = self;
        port.take_looked(&mut |from, packet| path.packet(engine, now, from, packet, handler));
    }

    /// Builds trains of everything that the engine wants to send; they leave with the reactor's
    /// next turn, or at once. What finds no train waits for the next flush, after trains have come back.
    pub fn flush(&mut self, reactor: &mut Reactor, now: Instant) {
        let Path { local, capture, .. } = &mut self.path;
        loop {
            let more = self.engine.poll_transmit(now, self.port.sink());
            match capture {
                None => self.port.flush(reactor, None),
                Some(capture) => self.port.flush(
                    reactor,
                    Some(&mut |train| {
                        train.for_each_packet(|pieces| {
                            let to = train.destination();
                            capture.record(now, Direction::Sent, *local, to, pieces);
                        });
                    }),
                ),
            }
            if !more || self.port.is_exhausted() || self.port.sink().take_refused() {
                return;
            }
        }
    }

    /// When [`Endpoint::handle_timeout`] wants to be called.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Instant> {
        let held = self
            .path
            .fault
            .as_ref()
            .and_then(FaultInjector::next_timeout);
        match (self.engine.next_timeout(), held) {
            (Some(engine), Some(held)) => Some(engine.min(held)),
            (engine, held) => engine.or(held),
        }
    }

    /// Runs the engine's timers, and releases packets that the fault injector held back.
    pub fn handle_timeout(&mut self, now: Instant, handler: &mut Handler<'_>) {
        self.engine.handle_timeout(now);
        let Self {
            engine,
            path:
                Path {
                    local,
                    fault,
                    capture,
                },
            ..
        } = self;
        if let Some(fault) = fault {
            fault.poll(now, &mut |from, bytes| {
                let packet = Packet::alone(bytes);
                take_packet(engine, capture, *local, now, from, packet, handler);
            });
        }
    }

    /// Before the thread sleeps: acknowledgements that were held back go out with the next flush,
    /// and the capture file is brought up to date.
    pub fn prepare_sleep(&mut self, _now: Instant) {
        self.engine.flush_acks();
        if let Some(capture) = &mut self.path.capture {
            // A failing file shows when the next packet is recorded.
            let _ = capture.flush();
        }
    }

    /// Counters of the engine.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        self.engine.counters()
    }

    /// Counters of the port.
    #[must_use]
    pub fn port_counters(&self) -> PortCounters {
        self.port.counters()
    }

    /// What was done to received packets on purpose.
    #[must_use]
    pub fn fault_counters(&self) -> Option<FaultCounters> {
        self.path.fault.as_ref().map(|fault| *fault.counters())
    }

    /// Trains that the kernel has not finished with: it may still read the payload that they name.
    #[must_use]
    pub fn trains_in_flight(&self) -> usize {
        self.port.trains_in_flight()
    }

    /// Takes back what the kernel could not send yet; completions follow. The engine's recovery sends
    /// again what is still wanted.
    pub fn cancel_trains(&mut self, reactor: &mut Reactor) {
        self.port.cancel_trains(reactor);
    }

    /// Bytes of datagrams that may wait in the socket, as granted by the kernel.
    #[must_use]
    pub fn receive_buffer_bytes(&self) -> u32 {
        self.port.receive_buffer_bytes()
    }

    /// Frees the address at once, and the rest as soon as the endpoint [has ended](Endpoint::has_ended); otherwise all of
    /// it is free when the reactor has been dropped.
    pub fn close(&mut self, reactor: &mut Reactor) {
        self.port.close(reactor);
    }

    /// Whether it is closed, and no completion with its owner number comes any more: that number and its group of buffers
    /// are free when it is dropped.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.port.has_ended()
    }
}

#[inline]
fn take_packet(
    engine: &mut Engine,
    capture: &mut Option<Capture>,
    local: SocketAddr,
    now: Instant,
    from: SocketAddr,
    packet: Packet<'_>,
    handler: &mut Handler<'_>,
) {
    if let Some(capture) = capture {
        capture.record(now, Direction::Received, from, local, &[packet.bytes]);
    }
    engine.handle_packet(now, from, packet.bytes);
    while let Some(delivery) = engine.poll_delivery() {
        handler(engine, delivery, packet);
    }
}

/// Payload bytes of the largest packet that the path to `peer` carries.
fn path_mtu(peer: SocketAddr) -> Result<u32, EndpointError> {
    let mtu_bytes =
        UdpPort::path_mtu_bytes(peer).map_err(|source| EndpointError::NoRoute { peer, source })?;
    let overhead = OVERHEAD_BYTES + if peer.is_ipv6() { 20 } else { 0 };
    let payload = mtu_bytes.saturating_sub(overhead) / MTU_STEP_BYTES * MTU_STEP_BYTES;
    if payload < MTU_MIN_BYTES {
        return Err(EndpointError::PathTooNarrow { peer, mtu_bytes });
    }
    Ok(payload)
}
