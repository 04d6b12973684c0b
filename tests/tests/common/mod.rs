//! What the simulations of both ends share: a target on the first node of a simulated network.

use std::net::SocketAddr;
use std::time::Instant;

use flexblk_target::config::{Config, Namespace, Subsystem, parse_nqn};
use flexblk_target::sim::SimTarget;
use flexins::engine::{Delivery, Engine};
use flexins::port::sim::{NodeId, SimFaults, SimNet};

/// The network. Hosts are further nodes of it.
pub(crate) struct TargetNet {
    pub(crate) net: SimNet,
    pub(crate) target: SimTarget,
    node: NodeId,
}

/// A target with one RAM namespace.
pub(crate) fn config(subnqn: &str, block_bytes: usize, blocks: u64) -> Config {
    let mut subsystem = Subsystem::new(parse_nqn(subnqn).expect("a name"));
    let size = blocks * block_bytes as u64;
    let ram = format!("ram:{size},block_size={block_bytes}");
    subsystem.namespaces.push(Namespace::new(ram));
    let mut config = Config::default();
    config.subsystems.push(subsystem);
    config
}

/// Of a node; the target's is 0.
pub(crate) fn address(node: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, (node >> 8) as u8, node as u8], 4791))
}

impl TargetNet {
    pub(crate) fn new(seed: u64, config: Config) -> TargetNet {
        let mut net = SimNet::new(seed, SimFaults::NONE);
        let node = net.add(address(0), SimTarget::engine_config(&config.listener));
        let now = net.now();
        let target = SimTarget::new(config, net.engine(node), now).expect("a target");
        TargetNet { net, target, node }
    }

    /// Until something happens, `limit` at the latest; false when nothing did.
    pub(crate) fn step(&mut self, limit: Instant) -> bool {
        let TargetNet { net, target, node } = self;
        let wake = target.next_timeout().map_or(limit, |at| at.min(limit));
        let wake = wake.max(net.now());
        let moved =
            net.step(wake, &mut |of,
                                 engine: &mut Engine,
                                 delivery: Delivery,
                                 packet: &[u8]| {
                assert_eq!(of, *node, "hosts get theirs in completions");
                target.deliver(engine, &delivery, packet);
            });
        let now = net.now();
        target.turn(net.engine(*node), now).expect("a reactor");
        moved || wake < limit
    }
}
