//! The client of a verbs test in mode `thread`: its engine has a thread of its own, and requests and
//! completions go through pipes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use flexins::cm::ServiceId;
use flexins::remote::{Client, PostFailure, QueuePairConfig, ThreadConfig, spawn};
use flexins::verbs::{Access, SendFlags, SendWr, WorkCompletion};

use crate::args::{Args, VerbsArgs};
use crate::cpu::pin;
use crate::tally::{Connection, Tally, wr_id};
use crate::verbs::{
    CONNECT_TIME, Measured, Operation, SERVICE_PORT, Side, blocks, endpoint_config, private_to_key,
    working_set,
};

/// How long the client sleeps for completions at a time.
const SLEEP: Duration = Duration::from_millis(1);

/// As the inline one; the CPU time is that of the posting thread alone.
pub(crate) fn measure(
    core: usize,
    args: &Args,
    options: &VerbsArgs,
    operation: Operation,
    to: SocketAddr,
    stop: &AtomicBool,
) -> anyhow::Result<Measured> {
    pin(core)?;
    let config = ThreadConfig {
        core: Some(args.engine_core()),
        ..ThreadConfig::default()
    };
    let engine = spawn(endpoint_config(options), config)?;
    let mut client = engine.client(options.depth * options.connections)?;
    let memory = working_set(options, operation != Operation::Read)?;
    let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ;
    let mr = client.register(&memory, 0, memory.len(), access)?;
    let mut connections = Vec::new();
    let mut remote = None;
    for _ in 0..options.connections {
        let (connection, private) = connect(&mut client, options, to)?;
        remote = private_to_key(&private);
        connections.push(connection);
    }
    let (address, rkey) = remote.context("no key in the answer")?;

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
                let sges = [mr.sge(offset, options.size)];
                let wr = SendWr {
                    wr_id: wr_id(index, slot),
                    op: operation.at(address.wrapping_add(offset), rkey),
                    inline: &[],
                    sges: &sges,
                    flags: SendFlags::SIGNALED,
                };
                match client.post_send(connection.qpn, &wr) {
                    Ok(()) => {}
                    Err(PostFailure::PipeFull) => {
                        connection.free.push(slot);
                        break;
                    }
                    Err(error) => return Err(error.into()),
                }
                next_block += 1;
                connection.note_posted(slot, now);
            }
        }
        if client.poll_cq(&mut done) == 0 {
            // With both threads on one core, spinning would keep the engine from working.
            client.wait(SLEEP);
            client.poll_cq(&mut done);
        }
        tally.take(&mut done, &mut connections)?;
        ensure!(!stop.load(Ordering::Relaxed), "the server gave up");
    }
    tally.finish(|cpu| {
        let counted = client.counters()?;
        Ok(Side {
            engine: counted.engine,
            port: counted.port,
            enters: counted.enters,
            cpu,
            memory: Arc::clone(&memory),
        })
    })
}

fn connect(
    client: &mut Client,
    options: &VerbsArgs,
    to: SocketAddr,
) -> anyhow::Result<(Connection, Vec<u8>)> {
    let qpn = client.create_qp(&QueuePairConfig {
        max_send_wr: options.depth,
        max_recv_wr: 1,
        max_sge: 1,
        max_inline: 0,
        ..QueuePairConfig::default()
    })?;
    let service = ServiceId::from_port(SERVICE_PORT);
    let connected = client.connect(qpn, to, service, &[], CONNECT_TIME)?;
    let connection = Connection::new(qpn, options);
    Ok((connection, connected.private.as_slice().to_vec()))
}
