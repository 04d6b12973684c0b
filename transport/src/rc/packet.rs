//! Writing a packet into a sink: header slot once, payload gathered, checksum over all of it.

use flexblk_reactor::Span;

use super::Env;
use crate::digest::Crc32c;
use crate::engine::{PacketShape, TrainSink, TxMode};
use crate::qp::Path;
use crate::verbs::Digest;
use crate::wire::trailer::{Fack, SLOT_MAX_BYTES};
use crate::wire::{BTH_LEN_BYTES, Bth, Psn};

/// Length of the checksum at the end of every packet.
pub(crate) const CRC_LEN_BYTES: usize = 4;

/// What a packet carries.
pub(crate) struct Contents<'a> {
    pub(crate) bth: Bth,
    /// Extended headers.
    pub(crate) headers: &'a [u8],
    /// Payload that is copied into the header slot.
    pub(crate) inline: &'a [u8],
    /// Payload that is gathered.
    pub(crate) spans: &'a [Span],
}

/// Writes a packet; false when the sink had no room and nothing was written.
#[inline]
pub(crate) fn write<S: TrainSink>(
    sink: &mut S,
    path: &Path,
    env: &mut Env,
    contents: &Contents<'_>,
    fack: Psn,
) -> bool {
    let Contents {
        mut bth,
        headers,
        inline,
        spans,
    } = *contents;
    let gathered: u32 = spans.iter().map(Span::len).sum();
    // Payload is padded to a multiple of four (IBA 9.2.3).
    let pad = ((gathered + inline.len() as u32).wrapping_neg() & 3) as u8;
    bth.pad = pad;
    let head_len = BTH_LEN_BYTES + headers.len() + inline.len();
    let trailer_len = pad + path.trailer_len;
    let shape = PacketShape {
        to: path.peer,
        head: head_len as u16,
        payload: gathered,
        trailer: trailer_len,
    };
    let Some(slot) = sink.open(&shape) else {
        return false;
    };
    debug_assert_eq!(slot.len(), head_len);
    let (bth_slot, rest) = slot.split_at_mut(BTH_LEN_BYTES);
    let (headers_slot, inline_slot) = rest.split_at_mut(headers.len());
    bth_slot.copy_from_slice(&bth.emit());
    headers_slot.copy_from_slice(headers);
    inline_slot.copy_from_slice(inline);

    let mut trailer = [0; SLOT_MAX_BYTES];
    let crc_at = usize::from(trailer_len) - CRC_LEN_BYTES;
    if path.is_flexins() {
        let fack = Fack {
            cumulative: Some(fack),
        }
        .emit();
        trailer[usize::from(pad)..crc_at].copy_from_slice(&fack);
    }
    if path.digest == Digest::Crc32c {
        let mut crc = Crc32c::new();
        crc.update(slot);
        for span in spans {
            crc.update_span(span);
        }
        crc.update(&trailer[..crc_at]);
        trailer[crc_at..usize::from(trailer_len)].copy_from_slice(&crc.finish().to_le_bytes());
    }
    for span in spans {
        sink.gather(*span);
    }
    sink.close(&trailer[..usize::from(trailer_len)]);

    let counters = &mut env.counters;
    counters.packets_tx += 1;
    counters.header_bytes_written += head_len as u64 + u64::from(trailer_len);
    match env.limits.tx {
        TxMode::HeaderOnly => counters.payload_bytes_gathered += u64::from(gathered),
        TxMode::Copy => counters.payload_bytes_copied += u64::from(gathered),
    }
    true
}

/// Whether the checksum at the end of a packet is right.
#[inline]
pub(crate) fn checksum_ok(packet: &[u8]) -> bool {
    let Some((body, crc)) = packet.split_last_chunk::<CRC_LEN_BYTES>() else {
        return false;
    };
    crate::digest::crc32c(body) == u32::from_le_bytes(*crc)
}
