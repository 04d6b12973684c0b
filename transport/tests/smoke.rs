//! Every operation once, on a quiet network, in both framings.

mod common;

use std::time::Duration;

use common::{connect, pair, pattern, run, signaled};
use flexins::engine::EngineConfig;
use flexins::verbs::{RecvWr, SendFlags, SendOp, SendWr, WcOpcode, WcStatus};

#[test]
fn every_operation_in_both_framings() {
    for flexins in [true, false] {
        for len in [0u32, 1, 63, 4096, 4097, 30_000] {
            every_operation(flexins, len);
        }
    }
}

fn every_operation(flexins: bool, len: u32) {
    let (mut net, a, b) = pair(&EngineConfig {
        flexins,
        mtu: 4096,
        ..EngineConfig::default()
    });
    let (qa, qb) = connect(&mut net, &a, &b, &a.init(), &b.init());
    let bytes = pattern(7, len as usize);
    a.write(1000, &bytes);
    let half = len / 2;
    let parts = [
        a.mr.sge(1000, half),
        a.mr.sge(1000 + u64::from(half), len - half),
    ];
    for wr_id in 0..4 {
        let room = [
            b.mr.sge(wr_id * 40_000, 10),
            b.mr.sge(wr_id * 40_000 + 10, 39_000),
        ];
        net.engine(b.node)
            .post_recv(qb, &RecvWr { wr_id, sges: &room })
            .unwrap();
    }
    let (remote, rkey) = (b.addr(500_000), b.mr.rkey);
    let spare = net
        .engine(b.node)
        .register_memory(b.pd, &b.memory, 0, 64, common::full_access())
        .unwrap();
    let ops = [
        SendOp::Send,
        SendOp::SendImm(11),
        SendOp::SendInv(spare.rkey),
        SendOp::Write { remote, rkey },
        SendOp::WriteImm {
            remote: remote + 50_000,
            rkey,
            imm: 13,
        },
    ];
    for (wr_id, op) in ops.into_iter().enumerate() {
        net.engine(a.node)
            .post_send(qa, &signaled(wr_id as u64, op, &parts))
            .unwrap();
    }
    let back = [a.mr.sge(600_000, len)];
    let read = SendWr {
        flags: SendFlags::SIGNALED | SendFlags::FENCE,
        ..signaled(5, SendOp::Read { remote, rkey }, &back)
    };
    net.engine(a.node).post_send(qa, &read).unwrap();
    let mut done = Vec::new();
    assert!(run(&mut net, Duration::from_secs(1), |net| {
        done.extend(a.sends(net));
        done.len() == 6
    }));
    assert!(done.iter().all(|wc| wc.status == WcStatus::Success));
    assert!(done.iter().map(|wc| wc.wr_id).eq(0..6));
    assert_eq!(done[5].opcode, WcOpcode::RdmaRead);
    let got = b.recvs(&mut net);
    assert_eq!(got.len(), 4);
    for (wr_id, wc) in got.iter().enumerate() {
        assert_eq!(
            (wc.wr_id, wc.status, wc.byte_len),
            (wr_id as u64, WcStatus::Success, len)
        );
        if wc.opcode == WcOpcode::Recv {
            assert_eq!(b.read(wr_id as u64 * 40_000, len as usize), bytes);
        }
    }
    assert_eq!(got[1].imm(), Some(11));
    assert_eq!(got[2].invalidated(), Some(spare.rkey));
    assert_eq!(
        (got[3].opcode, got[3].imm()),
        (WcOpcode::RecvRdmaWithImm, Some(13))
    );
    assert_eq!(b.read(500_000, len as usize), bytes);
    assert_eq!(b.read(550_000, len as usize), bytes);
    assert_eq!(a.read(600_000, len as usize), bytes);
    for side in [&a, &b] {
        assert_eq!(
            net.engine(side.node).counters().retransmissions,
            0,
            "nothing was lost"
        );
        assert_eq!(net.engine(side.node).counters().timeouts, 0);
    }
}
