//! Cost of the engine alone: two engines in one thread, packets handed over in memory.
//!
//! `cargo bench -p flexins --bench engine`. Only figures of one run compare.

use std::hint::black_box;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use flexblk_reactor::{HugePages, SharedMemory, Span};
use flexins::digest::{Crc32c, crc32c};
use flexins::engine::{Engine, EngineConfig, PacketShape, TrainSink};
use flexins::verbs::{
    Access, AckRequest, Cq, Digest, Framing, Modify, Mr, QpInit, Qpn, ReadyToReceive, ReadyToSend,
    SendFlags, SendOp, SendWr,
};
use flexins::wire::Psn;

const BLOCK: u32 = 4096;
const DEPTH: u64 = 32;
const SLOTS: usize = 64;

/// Packets one behind the other in one buffer: the copy stands for the kernel's.
struct Wire {
    bytes: Vec<u8>,
    packets: Vec<(usize, usize)>,
    end: usize,
}

impl Wire {
    fn new() -> Self {
        Self {
            bytes: vec![0; SLOTS * 16_384],
            packets: Vec::with_capacity(SLOTS),
            end: 0,
        }
    }

    fn clear(&mut self) {
        self.packets.clear();
        self.end = 0;
    }
}

impl TrainSink for Wire {
    fn open(&mut self, shape: &PacketShape) -> Option<&mut [u8]> {
        if self.packets.len() == SLOTS {
            return None;
        }
        let (start, head) = (self.end, usize::from(shape.head));
        self.packets.push((start, start + shape.len() as usize));
        self.end = start + head;
        self.bytes.get_mut(start..start + head)
    }

    fn gather(&mut self, span: Span) {
        let end = self.end + span.len() as usize;
        span.copy_to_slice(&mut self.bytes[self.end..end]);
        self.end = end;
    }

    fn close(&mut self, trailer: &[u8]) {
        let end = self.end + trailer.len();
        self.bytes[self.end..end].copy_from_slice(trailer);
        self.end = end;
    }
}

struct Side {
    engine: Engine,
    cq: Cq,
    qpn: Qpn,
    mr: Mr,
    address: SocketAddr,
    _memory: std::sync::Arc<SharedMemory>,
}

fn side(port: u16, digest: Digest) -> Side {
    let mut engine = Engine::new(
        EngineConfig {
            digest,
            ..EngineConfig::default()
        },
        1,
    );
    let pd = engine.alloc_pd();
    let memory = SharedMemory::create("bench", 1 << 20, HugePages::No).expect("memory");
    let access = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE;
    let mr = engine
        .register_memory(pd, &memory, 0, 1 << 20, access)
        .expect("region");
    let cq = engine.create_cq(1024).expect("queue");
    let qpn = engine
        .create_qp(&QpInit {
            pd,
            send_cq: cq,
            recv_cq: cq,
            max_send_wr: 128,
            max_recv_wr: 128,
            max_sge: 4,
            max_inline: 64,
            inline_recv: true,
            ack_request: AckRequest::Never,
            user: 0,
        })
        .expect("queue pair");
    Side {
        engine,
        cq,
        qpn,
        mr,
        address: SocketAddr::from(([127, 0, 0, 1], port)),
        _memory: memory,
    }
}

fn pair(digest: Digest) -> [Side; 2] {
    let mut sides = [side(1, digest), side(2, digest)];
    let (now, psn) = (Instant::now(), Psn::new(5));
    for me in 0..2 {
        let (peer, peer_qpn) = (sides[1 - me].address, sides[1 - me].qpn);
        let Side { engine, qpn, .. } = &mut sides[me];
        for step in [
            Modify::ToInit(Access::REMOTE_READ | Access::REMOTE_WRITE),
            Modify::ToReadyToReceive(ReadyToReceive {
                peer,
                peer_qpn,
                expected_psn: psn,
                mtu_bytes: 8320,
                framing: Framing::Flexins,
                digest,
                window: 1024,
            }),
            Modify::ToReadyToSend(ReadyToSend {
                first_psn: psn,
                max_reads: 16,
                retry_count: 7,
                rnr_retry: 7,
            }),
        ] {
            engine.modify_qp(*qpn, step, now).expect("connected");
        }
        engine.post_recv_in_place(*qpn, 128).expect("credits");
    }
    sides
}

/// A request by SEND and an answer: a block read (WRITE_IMM back) or written (short SEND back).
fn exchange(digest: Digest, read: bool, rounds: u64) -> Duration {
    let [mut host, mut target] = pair(digest);
    let mut wires = [Wire::new(), Wire::new()];
    let list = [host.mr.sge(0, BLOCK)];
    let block = [target.mr.sge(65_536, BLOCK)];
    let (remote, rkey) = (host.mr.addr, host.mr.rkey);
    let request = |host: &mut Side| {
        let sges: &[_] = if read { &[] } else { &list };
        let flags = SendFlags::empty();
        let wr = SendWr {
            wr_id: 0,
            op: SendOp::Send,
            inline: &[7; 64],
            sges,
            flags,
        };
        host.engine.post_send(host.qpn, &wr).expect("posted");
    };
    let started = Instant::now();
    let mut now = started;
    for _ in 0..DEPTH {
        request(&mut host);
    }
    let mut done = 0;
    let mut completions = Vec::with_capacity(1024);
    let mut copied = [0; BLOCK as usize];
    while done < rounds {
        now += Duration::from_micros(1);
        let [to_target, to_host] = &mut wires;
        to_target.clear();
        host.engine.poll_transmit(now, to_target);
        for &(start, end) in &to_target.packets {
            let packet = &to_target.bytes[start..end];
            target.engine.handle_packet(now, host.address, packet);
            while let Some(delivery) = target.engine.poll_delivery() {
                let bytes = delivery.payload.bytes(packet);
                let (op, inline, sges): (_, &[u8], &[_]) = if read {
                    (
                        SendOp::WriteImm {
                            remote,
                            rkey,
                            imm: 5,
                        },
                        &[],
                        &block,
                    )
                } else {
                    copied.copy_from_slice(&bytes[64..]);
                    (SendOp::Send, &[3; 16], &[])
                };
                let flags = SendFlags::empty();
                let wr = SendWr {
                    wr_id: 0,
                    op,
                    inline,
                    sges,
                    flags,
                };
                target.engine.post_send(target.qpn, &wr).expect("posted");
                target
                    .engine
                    .post_recv_in_place(target.qpn, 1)
                    .expect("credit");
            }
        }
        black_box(&copied);
        to_host.clear();
        target.engine.poll_transmit(now, to_host);
        for &(start, end) in &to_host.packets {
            host.engine
                .handle_packet(now, target.address, &to_host.bytes[start..end]);
        }
        host.engine.poll_cq(host.cq, &mut completions);
        for _ in completions.drain(..) {
            done += 1;
            host.engine.post_recv_in_place(host.qpn, 1).expect("credit");
            request(&mut host);
        }
    }
    started.elapsed()
}

fn time(name: &str, count: u64, mut run: impl FnMut(u64)) {
    run(count / 10);
    let best = (0..5)
        .map(|_| {
            let started = Instant::now();
            run(count);
            started.elapsed()
        })
        .min()
        .unwrap_or_default();
    println!(
        "{name:<44} {:>8.1} ns",
        best.as_nanos() as f64 / count as f64
    );
}

fn digests() {
    let bytes = vec![0x5A; 4096];
    for len in [32usize, 64, 512, 4096] {
        let piece = &bytes[..len];
        time(&format!("crc-fast {len} B"), 200_000, |n| {
            for _ in 0..n {
                black_box(crc_fast::crc32_iscsi(black_box(piece)));
            }
        });
        time(&format!("crc32c {len} B"), 200_000, |n| {
            for _ in 0..n {
                black_box(::crc32c::crc32c(black_box(piece)));
            }
        });
        time(&format!("flexins::digest {len} B"), 200_000, |n| {
            for _ in 0..n {
                black_box(crc32c(black_box(piece)));
            }
        });
    }
    time("flexins::digest packet: 32 + 4096 + 4 B", 200_000, |n| {
        for _ in 0..n {
            let mut crc = Crc32c::new();
            crc.update(black_box(&bytes[..32]));
            crc.update(black_box(&bytes));
            crc.update(black_box(&bytes[..4]));
            black_box(crc.finish());
        }
    });
}

fn main() {
    // For instruction counts: valgrind --tool=callgrind ... engine once
    if std::env::args().nth(1).is_some_and(|word| word == "once") {
        black_box(exchange(Digest::None, true, 10_000));
        return;
    }
    let only = std::env::args()
        .nth(1)
        .filter(|word| !word.starts_with('-'));
    if only.as_deref().is_none_or(|word| word == "digest") {
        digests();
    }
    if only.as_deref().is_none_or(|word| word == "exchange") {
        for digest in [Digest::None, Digest::Crc32c] {
            for read in [true, false] {
                let kind = if read { "read" } else { "write" };
                time(
                    &format!("4 KiB {kind}, both sides, {digest:?}"),
                    300_000,
                    |n| {
                        black_box(exchange(digest, read, n));
                    },
                );
            }
        }
        let started = Instant::now();
        let (from, mut to) = (vec![1u8; 4096], vec![0u8; 4096]);
        for _ in 0..1_000_000 {
            black_box(&mut to).copy_from_slice(black_box(&from));
        }
        println!(
            "{:<44} {:>8.1} ns",
            "one 4 KiB copy in the cache",
            started.elapsed().as_nanos() as f64 / 1e6
        );
    }
}
