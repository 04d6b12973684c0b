//! Hosts that come and go over FlexiNS leave nothing behind. Alone in its process, whose memory and
//! descriptors it counts.

mod host;
mod resources;
mod world;

use resources::{cycles, expect_flat};
use world::{World, nqn};

/// Controllers of a host before another host comes: what that one itself keeps stays small.
const OF_ONE_HOST: usize = 20;

/// Hundreds of controllers with an I/O queue that come and go leave descriptors and memory as they
/// were.
#[test]
fn hosts_that_come_and_go() {
    let world = World::with(&["ram:1M"], |config| config.cores = vec![0, 0]);
    expect_flat(100, cycles(400), |count| {
        let mut host = world.host();
        for n in 0..count {
            if n % OF_ONE_HOST == 0 {
                host = world.host();
            }
            let (admin, cntlid) = host.controller(&nqn());
            let io = host.io_queue(1, 32, cntlid, &nqn());
            // Some say goodbye, some only to the Admin queue, which ends the controller.
            if n % 2 == 0 {
                host.hang_up(io);
            }
            host.hang_up(admin);
            if n % 2 == 1 {
                host.wait_closed(io);
            }
        }
        drop(host);
        world.expect_idle();
    });
    assert!(world.target.shutdown());
}
