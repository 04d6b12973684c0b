//! Connections that come and go leave nothing behind. Alone in its process, whose memory and
//! descriptors it counts.

mod tcp_host;

use flexblk_nvme::Cntlid;
use flexblk_nvme::tcp::{Digests, IcReq};
use tcp_host::Conn;
use tcp_host::world::{World, nqn, with};

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Thousands of connections that come and go, some with a controller, leave descriptors and memory
/// as they were.
#[test]
fn connections_that_come_and_go() {
    let world = World::new("ram:1M");
    let cycle = |count: usize| {
        for n in 0..count {
            let mut conn = Conn::raw(world.address);
            match n % 3 {
                0 => {}
                1 => conn.set_up(IcReq::default()),
                _ => {
                    conn.set_up(with(Digests::all()));
                    let cqe = conn.connect(0, 32, Cntlid::DYNAMIC, &nqn(), true);
                    assert!(cqe.status().is_success());
                }
            }
        }
        world.expect_idle();
    };
    cycle(300);
    let (before, memory) = (descriptors(), resident_kib());
    cycle(3000);
    let after = resident_kib();
    assert!(
        descriptors() <= before + 8,
        "descriptors: {before} -> {}",
        descriptors()
    );
    assert!(after < memory + 4096, "resident KiB: {memory} -> {after}");
    assert!(world.target.shutdown());
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
