//! Listening: from the snapshot's ports to FlexiNS services and NVMe/TCP sockets.

use flexblk_reactor::Reactor;
use flexins::cm::ServiceId;
use flexins::engine::Engine;

use super::Core;
use crate::config::Transport;
use crate::error::StartError;
use crate::port::FLEXINS_PORT;
use crate::snapshot::Snapshot;

/// Port of the discovery service (IANA `nvme-disc`), served beside the configured one.
const DISCOVERY_SERVICE: u16 = 8009;

impl Core {
    /// Listens at the snapshot's ports and no others.
    pub(super) fn listen(
        &mut self,
        snapshot: &Snapshot,
        engine: &mut Engine,
        reactor: &mut Reactor,
    ) -> Result<(), StartError> {
        if self.draining {
            return Ok(());
        }
        let wanted = services(snapshot);
        self.services.retain(|(service, _)| {
            let stays = wanted.iter().any(|(other, _)| other == service);
            if !stays {
                engine.unlisten(*service);
            }
            stays
        });
        for (service, port) in wanted {
            match self.services.iter_mut().find(|(own, _)| *own == service) {
                Some((_, own)) => *own = port,
                None => {
                    engine.listen(service)?;
                    self.services.push((service, port));
                }
            }
        }
        let thread = self.parts.id;
        self.parts.tcp.listen(&snapshot.ports, thread, reactor)
    }

    /// The port of a FlexiNS service.
    pub(super) fn port_of(&self, service: ServiceId) -> u16 {
        let own = self.services.iter().find(|(own, _)| *own == service);
        own.map_or(FLEXINS_PORT, |(_, port)| *port)
    }
}

/// FlexiNS services, with their ports.
fn services(snapshot: &Snapshot) -> Vec<(ServiceId, u16)> {
    let ports = snapshot.ports.iter();
    let mut services: Vec<(ServiceId, u16)> = ports
        .filter(|port| port.listen.trtype == Transport::Flexins)
        .map(|port| (ServiceId::from_port(port.listen.address.port()), port.id))
        .collect();
    let discovery = ServiceId::from_port(DISCOVERY_SERVICE);
    if services.iter().all(|(service, _)| *service != discovery) {
        services.push((discovery, FLEXINS_PORT));
    }
    services
}
