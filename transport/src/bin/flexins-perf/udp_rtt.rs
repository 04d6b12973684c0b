//! The ceiling of latency: round trips through plain sockets, both sides polling.

use std::io;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::anyhow;
use hdrhistogram::Histogram;

use crate::args::{Args, RttArgs};
use crate::cpu::{pin, spawn};
use crate::report::Report;
use crate::socket;

/// Round trips before measuring.
const WARM_UP: u32 = 1000;

pub(crate) fn run(args: &Args, options: &RttArgs) -> anyhow::Result<Report> {
    let (server_core, client_core) = args.server_and_client();
    let (client, server) = (socket::bind()?, socket::bind()?);
    client.connect(server.local_addr()?)?;
    server.connect(client.local_addr()?)?;
    let reply_size = options.reply_size.unwrap_or(options.size) as usize;
    let stop = AtomicBool::new(false);
    let (echoed, measured) = thread::scope(|scope| {
        let echo = spawn(scope, "server", || {
            echo(&server, server_core, reply_size, &stop)
        });
        let measure = spawn(scope, "client", || {
            let result = measure(&client, client_core, args, options.size as usize, &stop);
            stop.store(true, Ordering::Relaxed);
            result
        });
        (echo.join(), measure.join())
    });
    echoed.map_err(|_| anyhow!("server panicked"))??;
    let histogram = measured.map_err(|_| anyhow!("client panicked"))??;
    let mut report = Report::new("udp-rtt");
    report.latency(&histogram);
    report.number("mean_us", histogram.mean() / 1000.0, "us");
    report.number("min_us", histogram.min() as f64 / 1000.0, "us");
    report.count("size", options.size.into(), "bytes");
    report.count("reply_size", reply_size as u64, "bytes");
    report.count("round_trips", histogram.len(), "");
    Ok(report)
}

/// Polls for a datagram; `None` when told to stop.
fn receive(
    socket: &UdpSocket,
    buffer: &mut [u8],
    stop: &AtomicBool,
) -> anyhow::Result<Option<usize>> {
    loop {
        match socket.recv(buffer) {
            Ok(len) => return Ok(Some(len)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if stop.load(Ordering::Relaxed) {
                    return Ok(None);
                }
                std::hint::spin_loop();
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn echo(
    socket: &UdpSocket,
    core: usize,
    reply_size: usize,
    stop: &AtomicBool,
) -> anyhow::Result<()> {
    pin(core)?;
    let mut buffer = vec![0; 64 << 10];
    let reply = vec![2; reply_size];
    while receive(socket, &mut buffer, stop)?.is_some() {
        socket.send(&reply)?;
    }
    Ok(())
}

fn measure(
    socket: &UdpSocket,
    core: usize,
    args: &Args,
    size: usize,
    stop: &AtomicBool,
) -> anyhow::Result<Histogram<u64>> {
    pin(core)?;
    let mut histogram = Histogram::new_with_max(60_000_000_000, 3)?;
    let mut buffer = vec![0; 64 << 10];
    let request = vec![1; size];
    let mut warm_up = WARM_UP;
    let mut started = Instant::now();
    let mut before = started;
    while warm_up > 0 || started.elapsed() < args.duration() {
        socket.send(&request)?;
        if receive(socket, &mut buffer, stop)?.is_none() {
            break;
        }
        let now = Instant::now();
        if warm_up > 0 {
            warm_up -= 1;
            started = now;
        } else {
            histogram.saturating_record((now - before).as_nanos() as u64);
        }
        before = now;
    }
    Ok(histogram)
}
