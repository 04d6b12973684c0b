//! The ceiling of an export that is a process of its own: it does nothing but move bytes between a TCP connection to
//! the other end and a Unix socket to who uses the export, and shares a core with the latter.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use rustix::net::sockopt::set_socket_send_buffer_size;

use crate::args::{Args, RelayArgs, To};
use crate::cpu::{Meter, pin, spawn};
use crate::report::Report;
use crate::stream_memory::StreamMemory;

/// As the NBD export has it: the usual 208 KiB hold less than two blocks.
const SOCKET_BUFFER_BYTES: usize = 1 << 20;

pub(crate) fn run(args: &Args, options: &RelayArgs) -> anyhow::Result<Report> {
    let (far_core, near_core) = args.server_and_client();
    let listener = TcpListener::bind("127.0.0.1:0").context("binding a TCP socket")?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    let (export, user) = UnixStream::pair().context("making Unix sockets")?;
    for socket in [&export, &user] {
        set_socket_send_buffer_size(socket, SOCKET_BUFFER_BYTES)?;
    }
    let (size, time) = (options.size as usize, args.duration());
    let far_blocks = (((options.working_set_kib as usize) << 10) / size).max(1);
    let far = (
        far,
        End {
            core: far_core,
            blocks: far_blocks,
        },
    );
    let user = (
        user,
        End {
            core: near_core,
            blocks: options.depth as usize,
        },
    );
    let (fed, relay_cpu, arrived) = match options.to {
        To::Host => streams(far, (near, export, near_core), user, size, time),
        To::Network => streams(user, (export, near, near_core), far, size, time),
    }?;
    let block = u64::from(options.size);
    let (bytes, seconds) = arrived;
    let blocks = bytes / block;
    let mut report = Report::new("relay");
    report.number("blocks_per_second", blocks as f64 / seconds, "blocks/s");
    report.number("gigabytes_per_second", bytes as f64 / seconds / 1e9, "GB/s");
    report.count("size", block, "bytes");
    report.count("sent", fed / block, "blocks");
    report.count("received", blocks, "blocks");
    report.number("relay_cpu", relay_cpu, "cores");
    Ok(report)
}

/// Who sends or receives.
#[derive(Clone, Copy, Debug)]
struct End {
    core: usize,
    /// Of memory that it takes in turn.
    blocks: usize,
}

/// From the first to the last, each on its core: bytes sent, what the one in the middle used of its core, bytes that
/// arrived and in how many seconds. Each ends when the one before it has closed its socket.
fn streams(
    (source, source_end): (impl Write + Send, End),
    (from, to, relay_core): (impl Read + Send, impl Write + Send, usize),
    (sink, sink_end): (impl Read + Send, End),
    size: usize,
    time: Duration,
) -> anyhow::Result<(u64, f64, (u64, f64))> {
    thread::scope(|scope| {
        let source = spawn(scope, "source", || feed(source, source_end, size, time));
        let relay = spawn(scope, "relay", || relay(from, to, relay_core, size));
        let sink = spawn(scope, "sink", || drain(sink, sink_end, size));
        let fed = source.join().map_err(|_| anyhow!("source panicked"))?;
        let relayed = relay.join().map_err(|_| anyhow!("relay panicked"))?;
        let arrived = sink.join().map_err(|_| anyhow!("sink panicked"))?;
        Ok((fed?, relayed?, arrived?))
    })
}

fn feed(mut socket: impl Write, end: End, size: usize, time: Duration) -> anyhow::Result<u64> {
    pin(end.core)?;
    let memory = StreamMemory::new(end.blocks * size)?;
    let mut sent = 0;
    let meter = Meter::start();
    for block in memory.chunks_exact(size).cycle() {
        if meter.elapsed() >= time {
            break;
        }
        socket.write_all(block)?;
        sent += block.len() as u64;
    }
    Ok(sent)
}

fn relay(mut from: impl Read, mut to: impl Write, core: usize, size: usize) -> anyhow::Result<f64> {
    pin(core)?;
    let mut block = vec![0; size];
    let meter = Meter::start();
    loop {
        let len = fill(&mut from, &mut block)?;
        to.write_all(block.get(..len).unwrap_or_default())?;
        if len < block.len() {
            return Ok(meter.stop().1);
        }
    }
}

fn drain(mut socket: impl Read, end: End, size: usize) -> anyhow::Result<(u64, f64)> {
    pin(end.core)?;
    let mut memory = vec![0; end.blocks * size];
    let mut bytes = 0;
    let meter = Meter::start();
    loop {
        for block in memory.chunks_exact_mut(size) {
            let len = fill(&mut socket, block)?;
            bytes += len as u64;
            if len < size {
                return Ok((bytes, meter.stop().0.as_secs_f64()));
            }
        }
    }
}

/// A whole block, or what there is before the end.
fn fill(from: &mut impl Read, block: &mut [u8]) -> anyhow::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = block.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match from.read(rest)? {
            0 => break,
            len => filled += len,
        }
    }
    Ok(filled)
}
