//! The UDP port without the engine: trains one way, as fast as the sender can.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use flexblk_reactor::{Config, HugePages, Reactor, SharedMemory, Wait};
use flexins::engine::{PacketShape, TrainSink};
use flexins::port::udp::{UdpConfig, UdpPort};
use flexins::port::{Port, PortCounters};

use crate::args::{Args, StreamArgs};
use crate::cpu::{Meter, pin, spawn};
use crate::report::Report;
use crate::udp_stream::train_len;

const OWNER: u8 = 1;
const TRAILER: u32 = 8;

pub(crate) fn run(args: &Args, options: &StreamArgs) -> anyhow::Result<Report> {
    let (server_core, client_core) = args.server_and_client();
    let stop = AtomicBool::new(false);
    let (address_tx, address_rx) = mpsc::channel();
    let (received, sent) = thread::scope(|scope| {
        let stop = &stop;
        let server = spawn(scope, "server", move || {
            receive(options, server_core, address_tx, stop)
        });
        let client = spawn(scope, "client", move || {
            let result = address_rx
                .recv()
                .context("the receiver did not start")
                .and_then(|to| send(options, client_core, to, args.duration()));
            stop.store(true, Ordering::Relaxed);
            result
        });
        (server.join(), client.join())
    });
    let server = received.map_err(|_| anyhow!("receiver panicked"))??;
    let client = sent.map_err(|_| anyhow!("sender panicked"))??;
    let (rx, tx) = (server.port, client.port);
    let blocks = rx.segments_rx as f64 / server.seconds;
    let mut report = Report::new("port-stream");
    report.number("blocks_per_second", blocks, "blocks/s");
    report.number(
        "gigabytes_per_second",
        blocks * f64::from(options.size) / 1e9,
        "GB/s",
    );
    report.count("size", options.size.into(), "bytes");
    report.count("train", train_len(options).into(), "blocks");
    report.count("sent", tx.segments_tx, "blocks");
    report.count("received", rx.segments_rx, "blocks");
    report.number(
        "segments_per_train_rx",
        rx.segments_rx as f64 / rx.trains_rx.max(1) as f64,
        "",
    );
    report.count("dropped_by_kernel", rx.rx_dropped_by_kernel, "datagrams");
    report.count("receive_restarts", rx.rx_restarts, "");
    report.count("payload_bytes_copied", tx.payload_bytes_copied, "bytes");
    report.number("receiver_cpu", server.cpu, "cores");
    report.number("sender_cpu", client.cpu, "cores");
    report.number(
        "receiver_trains_per_enter",
        rx.trains_rx as f64 / server.enters.max(1) as f64,
        "",
    );
    report.number(
        "sender_trains_per_enter",
        tx.trains_tx as f64 / client.enters.max(1) as f64,
        "",
    );
    Ok(report)
}

struct Side {
    port: PortCounters,
    enters: u64,
    seconds: f64,
    cpu: f64,
}

fn config(options: &StreamArgs) -> UdpConfig {
    UdpConfig {
        tx: options.tx.into(),
        rx: options.rx.mode(options.ring_mib),
        in_cache_buffers: options.rx_buffers,
        trains: options.trains,
        ..UdpConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)))
    }
}

fn receive(
    options: &StreamArgs,
    core: usize,
    address: mpsc::Sender<SocketAddr>,
    stop: &AtomicBool,
) -> anyhow::Result<Side> {
    pin(core)?;
    let mut reactor = Reactor::new(&Config::default())?;
    let mut port = UdpPort::bind(&mut reactor, OWNER, &config(options))?;
    let _ = address.send(port.local_addr());
    let mut completions = Vec::with_capacity(256);
    let mut bytes = 0;
    let meter = Meter::start();
    while !stop.load(Ordering::Relaxed) {
        reactor.turn(Wait::Poll, &mut completions)?;
        for completion in completions.drain(..) {
            port.on_completion(&mut reactor, &completion, &mut |_, packet| {
                bytes += packet.bytes.len()
            });
        }
    }
    std::hint::black_box(bytes);
    let (wall, cpu) = meter.stop();
    let enters = reactor.stats().enters;
    Ok(Side {
        port: port.counters(),
        enters,
        seconds: wall.as_secs_f64(),
        cpu,
    })
}

fn send(options: &StreamArgs, core: usize, to: SocketAddr, time: Duration) -> anyhow::Result<Side> {
    pin(core)?;
    let mut reactor = Reactor::new(&Config::default())?;
    let mut port = UdpPort::bind(&mut reactor, OWNER, &config(options))?;
    let train = train_len(options);
    let bytes = (options.working_set_kib << 10).max(train * options.size);
    let memory = SharedMemory::create("payload", bytes.into(), HugePages::Try)?;
    memory.populate()?;
    let blocks = bytes / options.size;
    let shape = PacketShape {
        to,
        head: u16::try_from(options.header - TRAILER)?,
        payload: options.size,
        trailer: TRAILER as u8,
    };
    let mut completions = Vec::with_capacity(256);
    let mut next = 0;
    let meter = Meter::start();
    while meter.elapsed() < time {
        'fill: while !port.is_exhausted() {
            for _ in 0..train {
                let Some(slot) = port.sink().open(&shape) else {
                    break 'fill;
                };
                slot.fill(1);
                // Every second block, so that neighbours do not merge into one entry.
                let block = memory.span(u64::from(next) * u64::from(options.size), options.size);
                next = (next + 2) % blocks.max(1);
                if let Some(block) = block {
                    port.sink().gather(block);
                }
                port.sink().close(&[1; TRAILER as usize]);
            }
            port.sink().finish();
        }
        port.flush(&mut reactor, None);
        reactor.turn(Wait::Poll, &mut completions)?;
        for completion in completions.drain(..) {
            port.on_completion(&mut reactor, &completion, &mut |_, _| {});
        }
    }
    let (wall, cpu) = meter.stop();
    let enters = reactor.stats().enters;
    Ok(Side {
        port: port.counters(),
        enters,
        seconds: wall.as_secs_f64(),
        cpu,
    })
}
