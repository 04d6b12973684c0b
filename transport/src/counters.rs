//! Event counters of an engine: the one place where its events are declared.

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Events of an engine since it was made; plain numbers, because one thread owns them.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// Names and values, in the order of declaration.
            pub fn entries(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)*].into_iter()
            }

            /// Adds another engine's counts, to sum over threads.
            pub fn add(&mut self, other: &Self) {
                $(self.$name += other.$name;)*
            }
        }
    };
}

counters! {
    /// Packets built, retransmissions and acknowledgements included.
    packets_tx,
    /// Packets handed to the engine.
    packets_rx,
    /// Header and trailer bytes written, inline prefixes included.
    header_bytes_written,
    /// Payload bytes put on gather lists.
    payload_bytes_gathered,
    /// Payload bytes that the transport copied to send them (`tx=copy`).
    payload_bytes_copied,
    /// Payload bytes moved from packets to their place.
    rx_payload_bytes_placed,
    /// Packets with payload or a request that were sent again.
    retransmissions,
    /// Requests and responses received again.
    duplicates,
    /// Packets dropped for a wrong checksum.
    crc_failures,
    /// Packets that are no packet: too short, unknown opcode, lengths that do not fit.
    malformed,
    /// Packets for a queue pair that does not exist.
    unknown_qpn,
    /// Packets from another address than the connection's.
    wrong_peer,
    /// Packets for a queue pair whose state takes none.
    wrong_state,
    /// Packets with a sequence number outside every window.
    stale_psn,
    /// Packets dropped because deliveries of the one before were not taken.
    undrained,
    /// Explicit acknowledgements sent.
    acks_tx,
    /// Explicit acknowledgements received.
    acks_rx,
    /// Selective acknowledgements sent.
    sacks_tx,
    /// Selective acknowledgements received.
    sacks_rx,
    /// Negative acknowledgements sent.
    naks_tx,
    /// Negative acknowledgements received.
    naks_rx,
    /// Receiver-not-ready NAKs sent.
    rnr_naks_tx,
    /// Receiver-not-ready NAKs received.
    rnr_naks_rx,
    /// Probes sent by the retransmission timer.
    probes_tx,
    /// Retransmission timer expiries.
    timeouts,
    /// Packets that arrived ahead of a gap.
    out_of_order,
    /// Messages copied into the hold store because they arrived ahead of a gap.
    held,
    /// Messages dropped because the hold store was full.
    hold_overflows,
    /// READ requests dropped because the responder's queue was full.
    read_overflows,
    /// Messages handed out where they lie in the packet.
    deliveries,
    /// Send requests completed, signalled or not.
    sends_completed,
    /// Queue pairs that went to the error state by themselves.
    qp_errors,
    /// Datagrams to queue pair 1.
    mads_rx,
    /// Datagrams from queue pair 1.
    mads_tx,
}
