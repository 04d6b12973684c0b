//! What the transport below a queue counted, engine and port together.

use flexins::counters::Counters;
use flexins::port::PortCounters;

/// Counters of a queue's transport engine and port. Queue pairs of one thread (mode `thread`: of one engine thread)
/// share them, and each reports the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransportCounters {
    /// The engine's.
    pub engine: Counters,
    /// The port's.
    pub port: PortCounters,
}

impl TransportCounters {
    /// Names and values: the engine's, then those of the port that the engine does not have.
    pub fn entries(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let port = &self.port;
        self.engine.entries().chain([
            ("trains_tx", port.trains_tx),
            ("segments_tx", port.segments_tx),
            ("trains_rx", port.trains_rx),
            ("segments_rx", port.segments_rx),
            ("gather_entries", port.gather_entries),
            ("send_errors", port.send_errors),
            ("gso_fallbacks", port.gso_fallbacks),
            ("rx_restarts", port.rx_restarts),
            ("rx_dropped_by_kernel", port.rx_dropped_by_kernel),
        ])
    }
}
