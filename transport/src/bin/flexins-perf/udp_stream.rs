//! The ceiling of throughput: GSO trains of `[header][payload]` pairs through plain sockets, one way.

use std::io::{self, IoSlice};
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::anyhow;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};

use crate::args::{Args, StreamArgs};
use crate::cpu::{Meter, pin, spawn};
use crate::report::Report;
use crate::socket;
use crate::stream_memory::StreamMemory;

pub(crate) fn run(args: &Args, options: &StreamArgs) -> anyhow::Result<Report> {
    let (server_core, client_core) = args.server_and_client();
    let receiver = socket::bind()?;
    let sender = socket::bind()?;
    let segment = options.header + options.size;
    socket::connect(&sender, receiver.local_addr()?, segment)?;
    let stop = AtomicBool::new(false);
    let (received, sent) = thread::scope(|scope| {
        let server = spawn(scope, "server", || receive(&receiver, server_core, &stop));
        let client = spawn(scope, "client", || {
            let result = send(&sender, client_core, options, args.duration());
            stop.store(true, Ordering::Relaxed);
            result
        });
        (server.join(), client.join())
    });
    let (bytes, seconds, server_cpu) = received.map_err(|_| anyhow!("receiver panicked"))??;
    let (sent_blocks, client_cpu) = sent.map_err(|_| anyhow!("sender panicked"))??;
    let blocks = bytes / u64::from(segment);
    let mut report = Report::new("udp-stream");
    report.number("blocks_per_second", blocks as f64 / seconds, "blocks/s");
    report.number(
        "gigabytes_per_second",
        blocks as f64 * f64::from(options.size) / seconds / 1e9,
        "GB/s",
    );
    report.count("size", options.size.into(), "bytes");
    report.count("train", train_len(options).into(), "blocks");
    report.count("sent", sent_blocks, "blocks");
    report.count("received", blocks, "blocks");
    report.number("receiver_cpu", server_cpu, "cores");
    report.number("sender_cpu", client_cpu, "cores");
    Ok(report)
}

/// Blocks of a train: as asked, or as many as a datagram holds.
pub(crate) fn train_len(options: &StreamArgs) -> u32 {
    options
        .train
        .min(flexins::train::MAX_TRAIN_BYTES / (options.header + options.size))
        .max(1)
}

fn receive(socket: &UdpSocket, core: usize, stop: &AtomicBool) -> anyhow::Result<(u64, f64, f64)> {
    pin(core)?;
    let mut buffer = vec![0; 64 << 10];
    let mut bytes = 0;
    let meter = Meter::start();
    while !stop.load(Ordering::Relaxed) {
        match socket.recv(&mut buffer) {
            Ok(len) => bytes += len as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(error) => return Err(error.into()),
        }
    }
    let (wall, cpu) = meter.stop();
    Ok((bytes, wall.as_secs_f64(), cpu))
}

fn send(
    socket: &UdpSocket,
    core: usize,
    options: &StreamArgs,
    time: Duration,
) -> anyhow::Result<(u64, f64)> {
    pin(core)?;
    let (header, size) = (options.header as usize, options.size as usize);
    let train = train_len(options) as usize;
    let memory = StreamMemory::new(options.memory_bytes(train * size))?;
    let trains: Vec<&[u8]> = memory.chunks_exact(train * size).collect();
    let headers = vec![1; train * header];
    let mut sent = 0;
    let mut slices = Vec::with_capacity(2 * train);
    let meter = Meter::start();
    for payload in trains.iter().cycle() {
        if meter.elapsed() >= time {
            break;
        }
        slices.clear();
        for (header, payload) in headers.chunks(header).zip(payload.chunks(size)) {
            slices.push(IoSlice::new(header));
            slices.push(IoSlice::new(payload));
        }
        match sendmsg(
            socket,
            &slices,
            &mut SendAncillaryBuffer::default(),
            SendFlags::empty(),
        ) {
            Ok(_) => sent += train as u64,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::NOBUFS) => std::hint::spin_loop(),
            Err(error) => return Err(error.into()),
        }
    }
    Ok((sent, meter.stop().1))
}
