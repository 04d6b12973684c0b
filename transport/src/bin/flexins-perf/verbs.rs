//! The verbs between two endpoints: operations per second and latency at a depth.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use flexblk_reactor::{Completion, Config, HugePages, Reactor, SharedMemory, Wait};
use flexins::cm::ServiceId;
use flexins::counters::Counters;
use flexins::endpoint::{Endpoint, EndpointConfig, Handler};
use flexins::engine::{ConnEvent, Engine, EngineConfig};
use flexins::port::PortCounters;
use flexins::verbs::{
    Access, AckRequest, Cq, Mr, Pd, QpInit, Qpn, Rkey, SendFlags, SendOp, SendWr, WorkCompletion,
};
use hdrhistogram::Histogram;

use crate::args::{Args, Mode, VerbsArgs};
use crate::cpu::{Meter, pin, spawn};
use crate::engine_thread;
use crate::report::Report;
use crate::tally::{Connection, Tally, wr_id};

const PORT: u8 = 1;
pub(crate) const SERVICE_PORT: u16 = 4420;
pub(crate) const CONNECT_TIME: Duration = Duration::from_secs(5);
/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Write,
    Read,
    Send,
}

impl Operation {
    /// The request for a place of the peer's memory.
    pub(crate) const fn at(self, remote: u64, rkey: Rkey) -> SendOp {
        match self {
            Self::Write => SendOp::Write { remote, rkey },
            Self::Read => SendOp::Read { remote, rkey },
            Self::Send => SendOp::Send,
        }
    }
}

pub(crate) fn run(
    args: &Args,
    options: &VerbsArgs,
    operation: Operation,
) -> anyhow::Result<Report> {
    ensure!(
        operation != Operation::Send || options.size <= options.mtu,
        "messages are received in place, so --size must not exceed --mtu ({})",
        options.mtu
    );
    let (server_core, client_core) = args.server_and_client();
    let stop = AtomicBool::new(false);
    let (address_tx, address_rx) = mpsc::channel();
    let (served, measured) = thread::scope(|scope| {
        let stop = &stop;
        let server = spawn(scope, "server", move || {
            let result = serve(server_core, options, operation, address_tx, stop);
            stop.store(true, Ordering::Relaxed);
            result
        });
        let client = spawn(scope, "client", move || {
            let result = address_rx
                .recv()
                .context("the server did not start")
                .and_then(|to| match options.mode {
                    Mode::Inline => measure(client_core, args, options, operation, to, stop),
                    Mode::Thread => {
                        engine_thread::measure(client_core, args, options, operation, to, stop)
                    }
                });
            stop.store(true, Ordering::Relaxed);
            result
        });
        (server.join(), client.join())
    });
    let server = served
        .map_err(|_| anyhow!("server panicked"))?
        .context("server")?;
    let client = measured
        .map_err(|_| anyhow!("client panicked"))?
        .context("client")?;
    if operation == Operation::Write {
        verify(&server.memory, options, client.operations_in_all)?;
    } else if operation == Operation::Read {
        verify(&client.side.memory, options, client.operations_in_all)?;
    }
    Ok(report(options, operation, &server, &client))
}

fn report(options: &VerbsArgs, operation: Operation, server: &Side, client: &Measured) -> Report {
    let title = match operation {
        Operation::Write => "write",
        Operation::Read => "read",
        Operation::Send => "send",
    };
    let mut report = Report::new(title);
    let rate = client.operations as f64 / client.seconds;
    report.number("ops_per_second", rate, "ops/s");
    report.number(
        "gigabytes_per_second",
        rate * f64::from(options.size) / 1e9,
        "GB/s",
    );
    report.latency(&client.latency);
    report.count("size", options.size.into(), "bytes");
    report.count("depth", options.depth.into(), "");
    report.count("connections", options.connections.into(), "");
    report.number("client_cpu", client.side.cpu, "cores");
    report.number("server_cpu", server.cpu, "cores");
    let (data, answers) = match operation {
        Operation::Read => (server, &client.side),
        Operation::Write | Operation::Send => (&client.side, server),
    };
    let all = client.operations_in_all.max(1) as f64;
    let per_train = |port: &PortCounters| port.segments_tx as f64 / port.trains_tx.max(1) as f64;
    report.number("data_segments_per_train", per_train(&data.port), "");
    report.number("answer_segments_per_train", per_train(&answers.port), "");
    report.number(
        "data_packets_per_op",
        data.port.segments_tx as f64 / all,
        "",
    );
    report.number(
        "answer_packets_per_op",
        answers.port.segments_tx as f64 / all,
        "",
    );
    report.number("client_enters_per_op", client.side.enters as f64 / all, "");
    report.number("server_enters_per_op", server.enters as f64 / all, "");
    let copied = data.port.payload_bytes_copied as f64;
    report.number(
        "tx_copies_per_payload_byte",
        copied / (all * f64::from(options.size)),
        "",
    );
    let both = |count: fn(&Counters) -> u64| count(&server.engine) + count(&client.side.engine);
    report.count(
        "retransmissions",
        both(|counters| counters.retransmissions),
        "packets",
    );
    report.count(
        "duplicates",
        both(|counters| counters.duplicates),
        "packets",
    );
    report.count(
        "crc_failures",
        both(|counters| counters.crc_failures),
        "packets",
    );
    report.count("timeouts", both(|counters| counters.timeouts), "");
    report.count("acks", both(|counters| counters.acks_tx), "packets");
    report.count("sacks", both(|counters| counters.sacks_tx), "packets");
    let dropped = server.port.rx_dropped_by_kernel + client.side.port.rx_dropped_by_kernel;
    report.count("dropped_by_kernel", dropped, "datagrams");
    let restarts = server.port.rx_restarts + client.side.port.rx_restarts;
    report.count("receive_restarts", restarts, "");
    report
}

/// One thread after the test.
pub(crate) struct Side {
    pub(crate) engine: Counters,
    pub(crate) port: PortCounters,
    pub(crate) enters: u64,
    pub(crate) cpu: f64,
    pub(crate) memory: Arc<SharedMemory>,
}

pub(crate) struct Measured {
    pub(crate) side: Side,
    pub(crate) operations: u64,
    pub(crate) operations_in_all: u64,
    pub(crate) seconds: f64,
    pub(crate) latency: Histogram<u64>,
}

/// A thread's reactor, endpoint and memory.
struct Node {
    reactor: Reactor,
    endpoint: Endpoint,
    completions: Vec<Completion>,
    memory: Arc<SharedMemory>,
    mr: Mr,
    pd: Pd,
    cq: Cq,
}

impl Node {
    fn new(core: usize, options: &VerbsArgs, fill: bool) -> anyhow::Result<Self> {
        pin(core)?;
        let poll_budget = Duration::from_micros(options.poll_budget_us.into());
        let mut reactor = Reactor::new(&Config {
            poll_budget,
            ..Config::default()
        })?;
        let config = endpoint_config(options);
        let mut endpoint = Endpoint::bind(&mut reactor, PORT, config)?;
        let memory = working_set(options, fill)?;
        let engine = endpoint.engine();
        let pd = engine.alloc_pd();
        let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ;
        let mr = engine.register_memory(pd, &memory, 0, memory.len(), access)?;
        let wrs = (options.depth + receive_credits(options)) * options.connections;
        let cq = engine.create_cq(wrs)?;
        Ok(Self {
            reactor,
            endpoint,
            completions: Vec::with_capacity(256),
            memory,
            mr,
            pd,
            cq,
        })
    }

    fn qp(&self, options: &VerbsArgs) -> QpInit {
        QpInit {
            pd: self.pd,
            send_cq: self.cq,
            recv_cq: self.cq,
            max_send_wr: options.depth,
            max_recv_wr: receive_credits(options),
            max_sge: 1,
            max_inline: 0,
            inline_recv: false,
            ack_request: AckRequest::Last,
            user: 0,
        }
    }

    /// Once around the loop: sends, receives, timers.
    fn turn(&mut self, handler: &mut Handler<'_>) -> anyhow::Result<()> {
        let now = self.reactor.now();
        if self.reactor.will_sleep() {
            self.endpoint.prepare_sleep(now);
        }
        self.endpoint.flush(&mut self.reactor, now);
        // The other thread's stop flag is looked at every millisecond at least.
        let latest = now + Duration::from_millis(1);
        let wait = self
            .endpoint
            .next_timeout()
            .map_or(latest, |at| at.min(latest));
        self.reactor
            .turn(Wait::Until(wait), &mut self.completions)?;
        for completion in self.completions.drain(..) {
            self.endpoint
                .on_completion(&mut self.reactor, &completion, handler);
        }
        let now = self.reactor.now();
        if self.endpoint.next_timeout().is_some_and(|at| at <= now) {
            self.endpoint.handle_timeout(now, handler);
        }
        Ok(())
    }

    fn side(&self, cpu: f64) -> Side {
        Side {
            engine: *self.endpoint.counters(),
            port: self.endpoint.port_counters(),
            enters: self.reactor.stats().enters,
            cpu,
            memory: Arc::clone(&self.memory),
        }
    }
}

pub(crate) fn endpoint_config(options: &VerbsArgs) -> EndpointConfig {
    let engine = EngineConfig {
        tx: options.tx.into(),
        digest: options.digest.into(),
        mtu: options.mtu / 64 * 64,
        ..EngineConfig::default()
    };
    EndpointConfig {
        engine,
        rx: options.rx.mode(options.ring_mib),
        in_cache_buffers: options.rx_buffers,
        gso: !options.no_gso,
        trains: options.trains,
        socket_buffer_bytes: options.socket_buffer_kib.saturating_mul(1024),
        fault: options.fault,
        ..EndpointConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)))
    }
}

/// The memory of a side, with the pattern in every block if it is where the data comes from.
pub(crate) fn working_set(options: &VerbsArgs, fill: bool) -> anyhow::Result<Arc<SharedMemory>> {
    let bytes = blocks(options) * u64::from(options.size);
    let memory = SharedMemory::create("flexins-perf", bytes, HugePages::Try)?;
    memory.populate()?;
    if fill {
        for block in 0..blocks(options) {
            pattern(&memory, options, block)?;
        }
    }
    Ok(memory)
}

/// Credits of a queue pair: enough for everything that can be outstanding, with some slack because
/// a message counts as outstanding until its acknowledgement has come.
pub(crate) fn receive_credits(options: &VerbsArgs) -> u32 {
    (2 * options.depth).max(64)
}

/// Blocks of the working set.
pub(crate) fn blocks(options: &VerbsArgs) -> u64 {
    ((u64::from(options.working_set_kib) << 10) / u64::from(options.size)).max(1)
}

fn serve(
    core: usize,
    options: &VerbsArgs,
    operation: Operation,
    address: mpsc::Sender<SocketAddr>,
    stop: &AtomicBool,
) -> anyhow::Result<Side> {
    let mut node = Node::new(core, options, operation == Operation::Read)?;
    node.endpoint
        .engine()
        .listen(ServiceId::from_port(SERVICE_PORT))?;
    let _ = address.send(node.endpoint.local_addr());
    let credits = receive_credits(options);
    let mut meter = None;
    while !stop.load(Ordering::Relaxed) {
        let mut refused = None;
        node.turn(&mut |engine, delivery, packet| {
            std::hint::black_box(delivery.payload.bytes(packet.bytes).first());
            if let Err(error) = engine.post_recv_in_place(delivery.qpn, 1) {
                refused = Some(error);
            }
        })?;
        if let Some(error) = refused {
            return Err(error.into());
        }
        while let Some(event) = node.endpoint.engine().poll_cm() {
            match event {
                ConnEvent::ConnectRequest { conn, .. } => {
                    let init = node.qp(options);
                    let private = key_to_private(&node.mr);
                    let now = Instant::now();
                    let engine = node.endpoint.engine();
                    let qpn = engine.create_qp(&init)?;
                    engine.post_recv_in_place(qpn, credits)?;
                    engine.accept(conn, qpn, &private, now)?;
                    meter.get_or_insert_with(Meter::start);
                }
                ConnEvent::Broken { status, .. } => bail!("connection broke: {status}"),
                _ => {}
            }
        }
    }
    Ok(node.side(meter.map_or(0.0, |meter| meter.stop().1)))
}

fn measure(
    core: usize,
    args: &Args,
    options: &VerbsArgs,
    operation: Operation,
    to: SocketAddr,
    stop: &AtomicBool,
) -> anyhow::Result<Measured> {
    let mut node = Node::new(core, options, operation != Operation::Read)?;
    let (mut connections, remote) = connect(&mut node, options, to, stop)?;
    let mut done: Vec<WorkCompletion> = Vec::with_capacity(1024);
    let mut next_block = 0_u64;
    let mut tally = Tally::start(args)?;
    loop {
        let now = Instant::now();
        if tally.is_over(now) {
            break;
        }
        for (index, connection) in connections.iter_mut().enumerate() {
            while let Some(slot) = connection.free.pop() {
                let offset = next_block % blocks(options) * u64::from(options.size);
                next_block += 1;
                connection.note_posted(slot, now);
                post(
                    node.endpoint.engine(),
                    connection.qpn,
                    &node.mr,
                    operation,
                    options,
                    wr_id(index, slot),
                    offset,
                    &remote,
                )?;
            }
        }
        node.turn(&mut |_, _, _| {})?;
        node.endpoint.engine().poll_cq(node.cq, &mut done);
        tally.take(&mut done, &mut connections)?;
        ensure!(!stop.load(Ordering::Relaxed), "the server gave up");
    }
    tally.finish(|cpu| Ok(node.side(cpu)))
}

fn connect(
    node: &mut Node,
    options: &VerbsArgs,
    to: SocketAddr,
    stop: &AtomicBool,
) -> anyhow::Result<(Vec<Connection>, (u64, Rkey))> {
    let deadline = Instant::now() + CONNECT_TIME;
    let mut connections = Vec::new();
    for _ in 0..options.connections {
        let init = node.qp(options);
        let engine = node.endpoint.engine();
        let qpn = engine.create_qp(&init)?;
        engine.connect(
            qpn,
            to,
            ServiceId::from_port(SERVICE_PORT),
            &[],
            Instant::now(),
        )?;
        connections.push(Connection::new(qpn, options));
    }
    let (mut established, mut remote) = (0, None);
    while established < options.connections {
        ensure!(
            Instant::now() < deadline && !stop.load(Ordering::Relaxed),
            "cannot connect to {to}"
        );
        node.turn(&mut |_, _, _| {})?;
        while let Some(event) = node.endpoint.engine().poll_cm() {
            match event {
                ConnEvent::Established { private, .. } => {
                    established += 1;
                    remote =
                        Some(private_to_key(private.as_slice()).context("no key in the answer")?);
                }
                other => bail!("cannot connect: {other:?}"),
            }
        }
    }
    Ok((connections, remote.context("no connection")?))
}

#[expect(clippy::too_many_arguments, reason = "the loop's variables")]
fn post(
    engine: &mut Engine,
    qpn: Qpn,
    mr: &Mr,
    operation: Operation,
    options: &VerbsArgs,
    wr_id: u64,
    offset: u64,
    &(address, rkey): &(u64, Rkey),
) -> anyhow::Result<()> {
    let op = operation.at(address.wrapping_add(offset), rkey);
    let sges = [mr.sge(offset, options.size)];
    let wr = SendWr {
        wr_id,
        op,
        inline: &[],
        sges: &sges,
        flags: SendFlags::SIGNALED,
    };
    Ok(engine.post_send(qpn, &wr)?)
}

fn key_to_private(mr: &Mr) -> [u8; 12] {
    let mut private = [0; 12];
    private[..8].copy_from_slice(&mr.addr.to_be_bytes());
    private[8..].copy_from_slice(&mr.rkey.0.to_be_bytes());
    private
}

pub(crate) fn private_to_key(private: &[u8]) -> Option<(u64, Rkey)> {
    let address = u64::from_be_bytes(*private.first_chunk()?);
    let rkey = u32::from_be_bytes(*private.get(8..)?.first_chunk()?);
    Some((address, Rkey(rkey)))
}

fn expected(options: &VerbsArgs, block: u64) -> Vec<u8> {
    let mut state = block.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..options.size)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

fn pattern(memory: &SharedMemory, options: &VerbsArgs, block: u64) -> anyhow::Result<()> {
    let span = memory
        .span(block * u64::from(options.size), options.size)
        .context("working set")?;
    span.copy_from_slice(&expected(options, block));
    Ok(())
}

/// Compares every block that was certainly transferred.
fn verify(memory: &SharedMemory, options: &VerbsArgs, operations: u64) -> anyhow::Result<()> {
    // Operations complete in order of posting on each connection, and blocks are given out in turn:
    // with several connections the last few may still be on their way.
    let certain = operations.saturating_sub(u64::from(options.connections * options.depth));
    let mut bytes = vec![0; options.size as usize];
    for block in 0..blocks(options).min(certain) {
        let span = memory
            .span(block * u64::from(options.size), options.size)
            .context("working set")?;
        span.copy_to_slice(&mut bytes);
        ensure!(
            bytes == expected(options, block),
            "block {block} arrived with wrong bytes"
        );
    }
    Ok(())
}
