//! Connections that come and go leave nothing behind. Alone in its process, whose memory and
//! descriptors it counts.

mod resources;
mod tcp_host;

use flexblk_nvme::Cntlid;
use flexblk_nvme::tcp::{Digests, IcReq};
use resources::{cycles, expect_flat};
use tcp_host::Conn;
use tcp_host::world::{World, nqn, with};

/// Thousands of connections that come and go, some with a controller, leave descriptors and memory
/// as they were.
#[test]
fn connections_that_come_and_go() {
    let world = World::new("ram:1M");
    expect_flat(300, cycles(10_000), |count| {
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
    });
    assert!(world.target.shutdown());
}
