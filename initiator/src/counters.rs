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
    /// Those of an NVMe/TCP connection, which has neither of the two.
    pub tcp: TcpCounters,
}

/// Counters of one NVMe/TCP connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpCounters {
    /// `sendmsg` calls.
    pub sends: u64,
    /// Bytes sent.
    pub bytes_tx: u64,
    /// Receives that brought something.
    pub receives: u64,
    /// Of those, how many asked the socket without the ring.
    pub looks_found: u64,
    /// Bytes received.
    pub bytes_rx: u64,
    /// PDUs received.
    pub pdus_rx: u64,
    /// Of those, data that also said that the command has succeeded.
    pub success_flags: u64,
    /// Payload bytes that the kernel put where they belong.
    pub payload_bytes_placed: u64,
    /// Payload bytes that came to a buffer of ours and were copied.
    pub payload_bytes_copied: u64,
    /// Receives in which something else came than was foreseen.
    pub wrong_guesses: u64,
}

impl TcpCounters {
    /// Whether the controller uses the SUCCESS flag.
    pub(crate) fn success_flags_seen(&self) -> bool {
        self.success_flags > 0
    }

    fn entries(&self) -> [(&'static str, u64); 10] {
        [
            ("tcp_sends", self.sends),
            ("tcp_bytes_tx", self.bytes_tx),
            ("tcp_receives", self.receives),
            ("tcp_looks_found", self.looks_found),
            ("tcp_bytes_rx", self.bytes_rx),
            ("tcp_pdus_rx", self.pdus_rx),
            ("tcp_success_flags", self.success_flags),
            ("tcp_payload_bytes_placed", self.payload_bytes_placed),
            ("tcp_payload_bytes_copied", self.payload_bytes_copied),
            ("tcp_wrong_guesses", self.wrong_guesses),
        ]
    }
}

impl TransportCounters {
    /// Names and values: the engine's, then those of the port that the engine does not have; of a TCP connection its own.
    pub fn entries(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let port = &self.port;
        let is_tcp = self.tcp != TcpCounters::default();
        let flexins = self.engine.entries().chain([
            ("trains_tx", port.trains_tx),
            ("segments_tx", port.segments_tx),
            ("trains_rx", port.trains_rx),
            ("segments_rx", port.segments_rx),
            ("gather_entries", port.gather_entries),
            ("send_errors", port.send_errors),
            ("gso_fallbacks", port.gso_fallbacks),
            ("looks_found", port.looks_found),
            ("rx_restarts", port.rx_restarts),
            ("rx_dropped_by_kernel", port.rx_dropped_by_kernel),
        ]);
        flexins
            .filter(move |_| !is_tcp)
            .chain(self.tcp.entries().into_iter().filter(move |_| is_tcp))
    }
}
