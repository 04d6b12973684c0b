//! The ceiling of NVMe/TCP's throughput: `[header][payload]` pairs through plain sockets, one way.

use std::io::{self, IoSlice, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, anyhow};

use crate::args::{Args, StreamArgs};
use crate::cpu::{Meter, pin, spawn};
use crate::report::Report;
use crate::stream_memory::StreamMemory;
use crate::udp_stream::train_len;

/// Bytes of a receive at most: as many as the second-level cache keeps.
const RECEIVE_BYTES: usize = 256 << 10;

pub(crate) fn run(args: &Args, options: &StreamArgs) -> anyhow::Result<Report> {
    let (server_core, client_core) = args.server_and_client();
    let listener = TcpListener::bind("127.0.0.1:0").context("binding a TCP socket")?;
    let sender = TcpStream::connect(listener.local_addr()?)?;
    let (receiver, _) = listener.accept()?;
    for socket in [&sender, &receiver] {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
    }
    let stop = AtomicBool::new(false);
    let (received, sent) = thread::scope(|scope| {
        let server = spawn(scope, "server", || receive(receiver, server_core, &stop));
        let client = spawn(scope, "client", || {
            let result = send(sender, client_core, options, args.duration());
            stop.store(true, Ordering::Relaxed);
            result
        });
        (server.join(), client.join())
    });
    let (bytes, seconds, server_cpu) = received.map_err(|_| anyhow!("receiver panicked"))??;
    let (sent_bytes, client_cpu) = sent.map_err(|_| anyhow!("sender panicked"))??;
    let block = u64::from(options.header + options.size);
    let blocks = bytes / block;
    let mut report = Report::new("tcp-stream");
    report.number("blocks_per_second", blocks as f64 / seconds, "blocks/s");
    report.number(
        "gigabytes_per_second",
        blocks as f64 * f64::from(options.size) / seconds / 1e9,
        "GB/s",
    );
    report.count("size", options.size.into(), "bytes");
    report.count("train", train_len(options).into(), "blocks");
    report.count("sent", sent_bytes / block, "blocks");
    report.count("received", blocks, "blocks");
    report.number("receiver_cpu", server_cpu, "cores");
    report.number("sender_cpu", client_cpu, "cores");
    Ok(report)
}

fn receive(
    mut socket: TcpStream,
    core: usize,
    stop: &AtomicBool,
) -> anyhow::Result<(u64, f64, f64)> {
    pin(core)?;
    let mut buffer = vec![0; RECEIVE_BYTES];
    let mut bytes = 0;
    let meter = Meter::start();
    while !stop.load(Ordering::Relaxed) {
        match socket.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => bytes += len as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => return Err(error.into()),
        }
    }
    let (wall, cpu) = meter.stop();
    Ok((bytes, wall.as_secs_f64(), cpu))
}

fn send(
    mut socket: TcpStream,
    core: usize,
    options: &StreamArgs,
    time: Duration,
) -> anyhow::Result<(u64, f64)> {
    pin(core)?;
    let (header, size) = (options.header as usize, options.size as usize);
    let train = train_len(options) as usize;
    let memory = StreamMemory::new(options.memory_bytes(train * size))?;
    let headers = vec![1; train * header];
    let mut sent = 0;
    let mut slices = Vec::with_capacity(2 * train);
    let meter = Meter::start();
    for payload in memory.chunks_exact(train * size).cycle() {
        if meter.elapsed() >= time {
            break;
        }
        slices.clear();
        for (header, payload) in headers.chunks(header).zip(payload.chunks(size)) {
            slices.push(IoSlice::new(header));
            slices.push(IoSlice::new(payload));
        }
        // What a full socket does not take is left out: nobody reads what it is, only how much.
        match socket.write_vectored(&slices) {
            Ok(len) => sent += len as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => return Err(error.into()),
        }
    }
    Ok((sent, meter.stop().1))
}
