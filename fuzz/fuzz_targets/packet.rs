//! Packets at a connected engine: whatever comes, nothing panics, nothing outside the registered
//! region changes, and held memory stays within its budget.

#![no_main]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use flexblk_reactor::{HugePages, SharedMemory, Span};
use flexins::cm::ServiceId;
use flexins::digest::crc32c;
use flexins::engine::{ConnEvent, Engine, EngineConfig, PacketShape, TrainSink};
use flexins::verbs::{Access, AckRequest, QpInit, Qpn, RecvWr};
use flexins::wire::{Bth, Reth};
use libfuzzer_sys::fuzz_target;

const SERVICE: ServiceId = ServiceId::from_port(4420);
const GUARD: u64 = 4096;
const REGION: u64 = 8192;
const HOLD_BUDGET: usize = 16 << 10;

/// Packets as an engine writes them.
#[derive(Default)]
struct Sink {
    packets: Vec<(SocketAddr, Vec<u8>)>,
}

impl TrainSink for Sink {
    fn open(&mut self, shape: &PacketShape) -> Option<&mut [u8]> {
        self.packets
            .push((shape.to, vec![0; usize::from(shape.head)]));
        self.packets
            .last_mut()
            .map(|(_, packet)| packet.as_mut_slice())
    }

    fn gather(&mut self, span: Span) {
        if let Some((_, packet)) = self.packets.last_mut() {
            let at = packet.len();
            packet.resize(at + span.len() as usize, 0);
            span.copy_to_slice(&mut packet[at..]);
        }
    }

    fn close(&mut self, trailer: &[u8]) {
        if let Some((_, packet)) = self.packets.last_mut() {
            packet.extend_from_slice(trailer);
        }
    }
}

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn queue_pair(engine: &mut Engine, init: QpInit) -> Qpn {
    engine.create_qp(&init).expect("the table is empty")
}

/// Everything that `from` sends goes to `to`.
fn carry(now: Instant, from: &mut Engine, from_port: u16, to: &mut Engine) {
    let mut sink = Sink::default();
    while from.poll_transmit(now, &mut sink) {}
    for (_, packet) in sink.packets {
        to.handle_packet(now, address(from_port), &packet);
        while to.poll_delivery().is_some() {}
    }
}

fuzz_target!(|input: &[u8]| {
    let _ = Bth::parse(input);
    let mut now = Instant::now();
    let flexins = input.first().is_some_and(|byte| byte & 1 != 0);
    let config = EngineConfig {
        hold_budget_bytes: HOLD_BUDGET,
        window: 256,
        flexins,
        ..EngineConfig::default()
    };
    // A standard RoCE peer is answered at 4791, so both use it then.
    let (client_port, target_port) = if flexins { (1, 2) } else { (4791, 4791) };
    let mut target = Engine::new(config.clone(), 1);
    let mut client = Engine::new(config, 2);
    let memory = SharedMemory::create("fuzz", GUARD + REGION + GUARD, HugePages::No)
        .expect("a few pages of memory");
    let pd = target.alloc_pd();
    let mr = target
        .register_memory(pd, &memory, GUARD, REGION, Access::all())
        .expect("the table is empty");
    let mut init = QpInit {
        pd,
        send_cq: target.create_cq(64).expect("the table is empty"),
        recv_cq: target.create_cq(64).expect("the table is empty"),
        max_send_wr: 16,
        max_recv_wr: 32,
        max_sge: 2,
        max_inline: 64,
        inline_recv: false,
        ack_request: AckRequest::Last,
        user: 0,
    };
    let target_qpn = queue_pair(&mut target, init);
    for wr_id in 0..8 {
        let sges = [mr.sge(wr_id * 1024, 1024)];
        target
            .post_recv(target_qpn, &RecvWr { wr_id, sges: &sges })
            .expect("the queue is empty");
    }
    init.pd = client.alloc_pd();
    init.send_cq = client.create_cq(64).expect("the table is empty");
    init.recv_cq = init.send_cq;
    let client_qpn = queue_pair(&mut client, init);
    target.listen(SERVICE).expect("nobody listens");
    client
        .connect(client_qpn, address(target_port), SERVICE, &[], now)
        .expect("a fresh queue pair connects");
    carry(now, &mut client, client_port, &mut target);
    while let Some(event) = target.poll_cm() {
        if let ConnEvent::ConnectRequest { conn, .. } = event {
            target
                .accept(conn, target_qpn, &[], now)
                .expect("a fresh queue pair accepts");
        }
    }
    carry(now, &mut target, target_port, &mut client);
    carry(now, &mut client, client_port, &mut target);
    let first_psn = client.query_qp(client_qpn).expect("it exists").first_psn;

    // Each step: what is repaired, the sequence number's distance, a length, and a packet.
    let mut rest = input.get(1..).unwrap_or_default();
    let mut psn = first_psn;
    while let Some((&[repair, distance, len0, len1], tail)) = rest.split_first_chunk::<4>() {
        let len = usize::from(u16::from_le_bytes([len0, len1])).min(tail.len());
        let (packet, tail) = tail.split_at(len);
        rest = tail;
        let mut packet = packet.to_vec();
        if repair & 1 != 0
            && let Some(mut bth) = Bth::parse(&packet)
        {
            bth.dest_qpn = target_qpn;
            bth.psn = psn.add(u32::from(distance % 8));
            packet[..12].copy_from_slice(&bth.emit());
            if distance % 8 == 0 {
                psn = psn.add(1);
            }
        }
        if repair & 2 != 0
            && let Some(reth) = Reth::parse(&packet, 12)
        {
            let addr = mr.addr + reth.addr % (REGION + 64);
            let rkey = mr.rkey.0;
            packet[12..28].copy_from_slice(&Reth { addr, rkey, ..reth }.emit());
        }
        if repair & 4 != 0
            && let Some((body, trailer)) = packet.split_last_chunk_mut::<4>()
        {
            *trailer = crc32c(body).to_le_bytes();
        }
        let from = if repair & 8 != 0 { 9 } else { client_port };
        target.handle_packet(now, address(from), &packet);
        while let Some(delivery) = target.poll_delivery() {
            let _ = delivery.payload.bytes(&packet).len();
        }
        assert!(target.held_bytes() <= HOLD_BUDGET);
        now += Duration::from_micros(u64::from(distance) * 16);
        target.handle_timeout(now);
        let mut sink = Sink::default();
        while target.poll_transmit(now, &mut sink) {}
        while target.poll_cm().is_some() {}
        let mut completions = Vec::new();
        target.poll_cq(init.send_cq, &mut completions);
    }
    for guard in [0, GUARD + REGION] {
        let mut bytes = [0; GUARD as usize];
        let span = memory.span(guard, GUARD as u32).expect("inside the memory");
        span.copy_to_slice(&mut bytes);
        assert_eq!(
            bytes, [0; GUARD as usize],
            "bytes outside the region changed"
        );
    }
});
