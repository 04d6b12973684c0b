//! Engine threads and clients over real sockets on the loopback interface.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_reactor::{HugePages, SharedMemory};

use super::*;
use crate::cm::ServiceId;
use crate::engine::EngineConfig;
use crate::verbs::{
    Access, Mr, PostError, Qpn, RecvWr, SendFlags, SendOp, SendWr, WcOpcode, WcStatus,
    WorkCompletion,
};

const DEADLINE: Duration = Duration::from_secs(20);
const SERVICE: ServiceId = ServiceId::from_port(4420);

fn engine_thread(name: &'static str) -> EngineThread {
    let engine = EngineConfig {
        // A dead peer is noticed within the test.
        max_rto: Duration::from_millis(50),
        ..EngineConfig::default()
    };
    let endpoint = EndpointConfig {
        engine,
        ..EndpointConfig::new(SocketAddr::from(([127, 0, 0, 1], 0)))
    };
    let config = ThreadConfig {
        name,
        ..ThreadConfig::default()
    };
    spawn(endpoint, config).unwrap()
}

/// A client with registered memory.
struct Party {
    client: Client,
    memory: Arc<SharedMemory>,
    mr: Mr,
    qpn: Qpn,
}

const MEMORY_BYTES: u64 = 1 << 20;

impl Party {
    fn new(thread: &EngineThread, entries: u32, config: &QueuePairConfig) -> Self {
        Self::of(thread.client(entries).unwrap(), config)
    }

    fn of(mut client: Client, config: &QueuePairConfig) -> Self {
        let memory = SharedMemory::create("remote-test", MEMORY_BYTES, HugePages::No).unwrap();
        let access = Access::all();
        let mr = client.register(&memory, 0, MEMORY_BYTES, access).unwrap();
        let qpn = client.create_qp(config).unwrap();
        Self {
            client,
            memory,
            mr,
            qpn,
        }
    }

    fn fill(&self, offset: u64, bytes: &[u8]) {
        let span = self.memory.span(offset, bytes.len() as u32).unwrap();
        span.copy_from_slice(bytes);
    }

    fn bytes(&self, offset: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.memory
            .span(offset, len)
            .unwrap()
            .copy_to_slice(&mut bytes);
        bytes
    }

    fn send(&mut self, wr_id: u64, op: SendOp, inline: &[u8], range: (u64, u32)) {
        self.try_send(wr_id, op, inline, range).unwrap();
        self.client.flush();
    }

    fn try_send(
        &mut self,
        wr_id: u64,
        op: SendOp,
        inline: &[u8],
        (offset, len): (u64, u32),
    ) -> Result<(), PostFailure> {
        let sge = [self.mr.sge(offset, len)];
        let sges = if len == 0 { &[][..] } else { &sge };
        let flags = SendFlags::SIGNALED;
        self.client.post_send(
            self.qpn,
            &SendWr {
                wr_id,
                op,
                inline,
                sges,
                flags,
            },
        )
    }

    fn recv(&mut self, wr_id: u64, offset: u64, len: u32) {
        let sges = [self.mr.sge(offset, len)];
        self.client
            .post_recv(self.qpn, &RecvWr { wr_id, sges: &sges })
            .unwrap();
        self.client.flush();
    }

    /// Waits for so many completions, asleep in between.
    fn completions(&mut self, count: usize) -> Vec<WorkCompletion> {
        let started = Instant::now();
        let mut out = Vec::new();
        while out.len() < count {
            if self.client.poll_cq(&mut out) == 0 {
                self.client.wait(Duration::from_millis(100));
            }
            assert!(
                started.elapsed() < DEADLINE,
                "{count} completions wanted: {out:?}"
            );
        }
        assert_eq!(out.len(), count, "{out:?}");
        out
    }

    fn completion(&mut self) -> WorkCompletion {
        self.completions(1)[0]
    }

    fn event(&mut self) -> ClientEvent {
        let started = Instant::now();
        loop {
            if let Some(event) = self.client.poll_event() {
                return event;
            }
            assert!(started.elapsed() < DEADLINE);
            self.client.wait(Duration::from_millis(100));
        }
    }
}

/// Connects a to b, each driven by a thread of its own while it blocks.
fn connect(a: &mut Party, b: &mut Party, b_addr: SocketAddr) {
    let listener = b.client.listen(SERVICE).unwrap();
    let passive = &mut *b;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let incoming = listener.incoming(DEADLINE).unwrap().unwrap();
            assert!(incoming.private.starts_with(b"hello"));
            assert_eq!(incoming.service, SERVICE);
            passive
                .client
                .accept(&incoming, passive.qpn, b"welcome")
                .unwrap();
        });
        let connected = a
            .client
            .connect(a.qpn, b_addr, SERVICE, b"hello", DEADLINE)
            .unwrap();
        assert!(connected.private.starts_with(b"welcome"));
        assert!(connected.params.is_some() && connected.mtu_bytes >= 1024);
    });
    assert_eq!(b.event(), ClientEvent::Established { qpn: b.qpn });
}

fn transfer(a: &mut Party, b: &mut Party) {
    // A short message arrives inside the completion, and in the buffer.
    b.recv(1, 0, 4096);
    a.send(2, SendOp::SendImm(7), b"short", (0, 0));
    let done = a.completion();
    assert_eq!(
        (done.wr_id, done.status, done.opcode),
        (2, WcStatus::Success, WcOpcode::Send)
    );
    let got = b.completion();
    assert_eq!(
        (got.wr_id, got.status, got.imm()),
        (1, WcStatus::Success, Some(7))
    );
    assert_eq!(got.inline_bytes(), b"short");
    assert_eq!(b.bytes(0, 5), b"short");

    // A long one in the buffer only: inline capsule and gathered payload, several packets.
    let payload: Vec<u8> = (0..40_000_u32).map(|n| ((n * 7) >> 3) as u8).collect();
    a.fill(1000, &payload);
    b.recv(3, 8192, 65_536);
    let capsule = [0xC5; 64];
    a.send(4, SendOp::Send, &capsule, (1000, 40_000));
    assert_eq!(a.completion().status, WcStatus::Success);
    let got = b.completion();
    assert_eq!((got.wr_id, got.byte_len, got.inline_len), (3, 40_064, 0));
    assert_eq!(b.bytes(8192, 64), capsule);
    assert_eq!(b.bytes(8192 + 64, 40_000), payload);

    // WRITE, and READ it back to elsewhere.
    let remote = b.mr.addr + 500_000;
    let rkey = b.mr.rkey;
    a.send(5, SendOp::Write { remote, rkey }, &[], (1000, 40_000));
    a.send(6, SendOp::Read { remote, rkey }, &[], (600_000, 40_000));
    let done = a.completions(2);
    assert_eq!((done[0].wr_id, done[0].opcode), (5, WcOpcode::RdmaWrite));
    assert_eq!((done[1].wr_id, done[1].opcode), (6, WcOpcode::RdmaRead));
    assert!(
        done.iter().all(|done| done.status == WcStatus::Success),
        "{done:?}"
    );
    assert_eq!(b.bytes(500_000, 40_000), payload);
    assert_eq!(a.bytes(600_000, 40_000), payload);

    // WRITE_WITH_IMM uses up a receive request and touches no buffer of it.
    b.recv(8, 0, 64);
    let write = SendOp::WriteImm {
        remote: b.mr.addr + 900_000,
        rkey,
        imm: 0xABCD,
    };
    a.send(7, write, &[], (1000, 4096));
    assert_eq!(a.completion().status, WcStatus::Success);
    let got = b.completion();
    assert_eq!(
        (got.wr_id, got.opcode, got.imm()),
        (8, WcOpcode::RecvRdmaWithImm, Some(0xABCD))
    );
    assert_eq!(b.bytes(900_000, 4096), payload[..4096]);
}

#[test]
fn two_engine_threads() {
    let (left, right) = (engine_thread("left"), engine_thread("right"));
    let config = QueuePairConfig::default();
    let mut a = Party::new(&left, 256, &config);
    let mut b = Party::new(&right, 256, &config);
    connect(&mut a, &mut b, right.local_addr());
    transfer(&mut a, &mut b);
    a.client.disconnect(a.qpn).unwrap();
    assert!(matches!(a.event(), ClientEvent::Disconnected { .. }));
    assert!(matches!(b.event(), ClientEvent::Disconnected { .. }));
}

#[test]
fn two_clients_of_one_engine_thread() {
    let thread = engine_thread("both");
    let config = QueuePairConfig::default();
    let mut a = Party::new(&thread, 64, &config);
    let mut b = Party::new(&thread, 64, &config);
    connect(&mut a, &mut b, thread.local_addr());
    transfer(&mut a, &mut b);
}

#[test]
fn back_pressure_refuses_and_loses_nothing() {
    let (left, right) = (engine_thread("left"), engine_thread("right"));
    let config = QueuePairConfig {
        max_send_wr: 40,
        max_recv_wr: 64,
        ..Default::default()
    };
    let mut a = Party::new(&left, 32, &config);
    let mut b = Party::new(&right, 256, &config);
    connect(&mut a, &mut b, right.local_addr());
    let total = 5000_u64;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for wr_id in 0..64 {
                b.recv(wr_id, wr_id * 64, 64);
            }
            let mut next = 0_u64;
            let mut out = Vec::new();
            let started = Instant::now();
            while next < total {
                out.clear();
                if b.client.poll_cq(&mut out) == 0 {
                    b.client.wait(Duration::from_millis(100));
                }
                for got in &out {
                    assert_eq!(got.status, WcStatus::Success);
                    assert_eq!(got.wr_id, next % 64);
                    assert_eq!(got.inline_bytes(), next.to_le_bytes());
                    next += 1;
                    b.recv(got.wr_id, got.wr_id * 64, 64);
                }
                assert!(started.elapsed() < DEADLINE, "{next} of {total}");
            }
        });
        let (mut posted, mut done, mut refused) = (0_u64, 0_u64, 0_u64);
        let mut out = Vec::new();
        let started = Instant::now();
        while done < total {
            while posted < total {
                match a.try_send(posted, SendOp::Send, &posted.to_le_bytes(), (0, 0)) {
                    Ok(()) => posted += 1,
                    Err(
                        PostFailure::PipeFull
                        | PostFailure::Verbs(PostError::CompletionQueueFull | PostError::QueueFull),
                    ) => {
                        refused += 1;
                        break;
                    }
                    Err(other) => panic!("{other}"),
                }
            }
            out.clear();
            if a.client.poll_cq(&mut out) == 0 {
                a.client.wait(Duration::from_millis(100));
            }
            for completion in &out {
                assert_eq!(
                    (completion.wr_id, completion.status),
                    (done, WcStatus::Success)
                );
                done += 1;
            }
            assert!(started.elapsed() < DEADLINE, "{done} of {total}");
        }
        assert!(refused > 0);
    });
}

#[test]
fn unsignalled_requests_give_their_places_back() {
    let thread = engine_thread("unsignalled");
    let config = QueuePairConfig::default();
    let mut a = Party::new(&thread, 16, &config);
    let mut b = Party::new(&thread, 16, &config);
    connect(&mut a, &mut b, thread.local_addr());
    let rkey = b.mr.rkey;
    for round in 0..50_u64 {
        for index in 0..8_u64 {
            let sges = [a.mr.sge(0, 64)];
            let op = SendOp::Write {
                remote: b.mr.addr,
                rkey,
            };
            let flags = match index {
                7 => SendFlags::SIGNALED,
                _ => SendFlags::empty(),
            };
            let wr = SendWr {
                wr_id: round * 8 + index,
                op,
                inline: &[],
                sges: &sges,
                flags,
            };
            a.client.post_send(a.qpn, &wr).unwrap();
        }
        assert_eq!(a.completion().wr_id, round * 8 + 7);
    }
}

#[test]
fn requests_that_the_engine_refuses_complete_with_an_error() {
    let thread = engine_thread("refusal");
    let mut a = Party::new(&thread, 16, &QueuePairConfig::default());
    // Not connected: the queue pair takes no send request.
    a.send(1, SendOp::Send, b"early", (0, 0));
    let failed = a.completion();
    assert_eq!((failed.wr_id, failed.opcode), (1, WcOpcode::Send));
    assert_ne!(failed.status, WcStatus::Success);
    let other = Qpn::new(a.qpn.get() ^ 1);
    let wr = RecvWr {
        wr_id: 1,
        sges: &[],
    };
    assert_eq!(
        a.client.post_recv(other, &wr),
        Err(PostError::UnknownQp.into())
    );
    assert!(matches!(
        a.client.destroy_qp(other),
        Err(RemoteError::Verbs(crate::verbs::VerbsError::Unknown(_)))
    ));
}

#[test]
fn nobody_listens() {
    let (left, right) = (engine_thread("left"), engine_thread("right"));
    let mut a = Party::new(&left, 16, &QueuePairConfig::default());
    let refused = a
        .client
        .connect(a.qpn, right.local_addr(), SERVICE, &[], DEADLINE);
    assert!(
        matches!(
            refused,
            Err(RemoteError::Rejected {
                reason: RejectReason::InvalidServiceId,
                ..
            })
        ),
        "{refused:?}"
    );
}

/// What a peer says when it refuses arrives whole: NVMe's reason is in the private data.
#[test]
fn a_refusal_brings_its_private_data() {
    let (left, right) = (engine_thread("left"), engine_thread("right"));
    let mut a = Party::new(&left, 16, &QueuePairConfig::default());
    let mut b = Party::new(&right, 16, &QueuePairConfig::default());
    let listener = b.client.listen(SERVICE).unwrap();
    let to = right.local_addr();
    let refused = std::thread::scope(|scope| {
        let connecting = scope.spawn(|| a.client.connect(a.qpn, to, SERVICE, &[], DEADLINE));
        let incoming = listener.incoming(DEADLINE).unwrap().unwrap();
        b.client
            .reject(&incoming, RejectReason::Consumer, b"too many queues")
            .unwrap();
        connecting.join().unwrap()
    });
    let Err(RemoteError::Rejected { reason, private }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(reason, RejectReason::Consumer);
    assert!(private.as_slice().starts_with(b"too many queues"));
    assert!(a.client.counters().unwrap().engine.mads_tx > 0);
}

#[test]
fn a_crashed_engine_thread_ends_everything_and_hangs_nothing() {
    let (left, right) = (engine_thread("left"), engine_thread("right"));
    let config = QueuePairConfig::default();
    let mut a = Party::new(&left, 64, &config);
    let mut b = Party::new(&right, 64, &config);
    connect(&mut a, &mut b, right.local_addr());
    for wr_id in 0..10 {
        a.recv(wr_id, wr_id * 64, 64);
    }
    left.crash();
    // Asleep or not, the client learns it.
    let flushed = a.completions(10);
    for (wr_id, completion) in flushed.iter().enumerate() {
        assert_eq!(completion.wr_id, wr_id as u64);
        assert_eq!(completion.status, WcStatus::WrFlushErr);
        assert_eq!(completion.opcode, WcOpcode::Recv);
    }
    assert!(a.client.is_gone());
    assert_eq!(
        a.try_send(1, SendOp::Send, b"late", (0, 0)),
        Err(PostFailure::EngineGone)
    );
    assert!(matches!(
        a.client.disconnect(a.qpn),
        Err(RemoteError::EngineGone)
    ));
    assert!(matches!(left.client(16), Err(RemoteError::EngineGone)));
    std::thread::sleep(Duration::from_millis(100));
    assert!(!left.is_alive());

    // The peer gets an error within its retries.
    b.send(1, SendOp::Send, b"anybody there?", (0, 0));
    let failed = b.completion();
    assert_eq!(failed.wr_id, 1);
    assert_ne!(failed.status, WcStatus::Success);
}

#[test]
fn a_dropped_client_gives_everything_back() {
    let endpoint = EndpointConfig {
        bind: SocketAddr::from(([127, 0, 0, 1], 0)),
        engine: EngineConfig {
            max_qps: 2,
            max_cqs: 2,
            max_mrs: 2,
            ..EngineConfig::default()
        },
        ..EndpointConfig::default()
    };
    let config = ThreadConfig {
        max_clients: 2,
        ..ThreadConfig::default()
    };
    let thread = spawn(endpoint, config).unwrap();
    for _ in 0..20 {
        let [mut a, mut b] = [(), ()].map(|()| {
            // The engine thread notices a dropped client a little later.
            let started = Instant::now();
            loop {
                match thread.client(16) {
                    Ok(client) => break Party::of(client, &QueuePairConfig::default()),
                    Err(RemoteError::TooManyClients) if started.elapsed() < DEADLINE => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        });
        assert!(matches!(
            thread.client(16),
            Err(RemoteError::TooManyClients)
        ));
        connect(&mut a, &mut b, thread.local_addr());
        a.recv(1, 0, 64);
        b.send(2, SendOp::Send, b"x", (0, 0));
        assert_eq!(a.completion().inline_bytes(), b"x");
    }
}

/// CPU time of the threads of this process with that name.
fn cpu_time_of(name: &str) -> Duration {
    let mut ticks = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        let read = |file: &str| std::fs::read_to_string(path.join(file)).unwrap_or_default();
        if read("comm").trim() == name {
            let schedstat = read("schedstat");
            ticks += schedstat.split(' ').next().unwrap().parse::<u64>().unwrap();
        }
    }
    Duration::from_nanos(ticks)
}

#[test]
fn an_idle_engine_thread_sleeps() {
    let thread = engine_thread("idle-engine");
    let config = QueuePairConfig::default();
    let mut a = Party::new(&thread, 64, &config);
    let mut b = Party::new(&thread, 64, &config);
    connect(&mut a, &mut b, thread.local_addr());
    transfer(&mut a, &mut b);
    std::thread::sleep(Duration::from_millis(200));
    let before = cpu_time_of("idle-engine");
    let started = Instant::now();
    std::thread::sleep(Duration::from_secs(2));
    let used = cpu_time_of("idle-engine") - before;
    let share = used.as_secs_f64() / started.elapsed().as_secs_f64();
    assert!(
        share < 0.01,
        "an idle engine thread uses {:.2} % of a core",
        share * 100.0
    );
    assert!(before > Duration::ZERO);
    eprintln!("idle engine thread: {:.3} % of a core", share * 100.0);
    // And wakes up.
    transfer(&mut a, &mut b);
}
