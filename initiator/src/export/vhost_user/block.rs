//! The virtio block device (Virtual I/O Device 1.2, 5.2): its features, configuration space and requests. No I/O.

use flexblk_reactor::Span;

use super::virtqueue::{Chain, MAX_CHAIN};
use crate::{Namespace, Op};

/// Virtio's sectors, whatever the block size (5.2.4).
const SECTOR_BYTES: u64 = 512;
/// Bytes of the configuration space up to the fields that secure erase and zones have.
pub(crate) const CONFIG_BYTES: usize = 60;
/// Where the driver may write: whether the cache is a write-back cache.
pub(crate) const CONFIG_WRITEBACK: usize = 32;
/// Segments of one request: what a chain has without header and status.
const SEG_MAX: u32 = 254;
/// Longest discard or write of zeroes in sectors: 2 GiB, which no driver minds.
const MAX_RANGE_SECTORS: u32 = 1 << 22;
/// Bytes of the answer to GET_ID.
const ID_BYTES: usize = 20;

/// VIRTIO_BLK_F_* (5.2.3) and reserved feature bits (6).
pub(crate) mod feature {
    pub(crate) const SEG_MAX: u64 = 1 << 2;
    pub(crate) const RO: u64 = 1 << 5;
    pub(crate) const BLK_SIZE: u64 = 1 << 6;
    pub(crate) const FLUSH: u64 = 1 << 9;
    pub(crate) const TOPOLOGY: u64 = 1 << 10;
    pub(crate) const CONFIG_WCE: u64 = 1 << 11;
    pub(crate) const MQ: u64 = 1 << 12;
    pub(crate) const DISCARD: u64 = 1 << 13;
    pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
    pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    pub(crate) const VERSION_1: u64 = 1 << 32;
}

/// How a request ended (5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Commands on the volume: operation, first block, blocks. Data, if any, is all of [`Chain::readable`] for writes and of
    /// [`Chain::writable`] for reads.
    Volume(Op, u64, u64),
    /// [`Device::id`] into [`Chain::writable`].
    GetId,
    /// It ends like this.
    Answer(Status),
}

/// The device as drivers see it.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    block_size: u32,
    namespace: Namespace,
    queues: u16,
    /// The driver sends no flushes: a write has to be durable when it completes.
    no_flushes: bool,
}

impl Device {
    pub(crate) fn new(namespace: &Namespace, queues: u16) -> Device {
        Device {
            block_size: namespace.block_size,
            namespace: namespace.clone(),
            queues,
            no_flushes: false,
        }
    }

    /// The namespace is not what it was.
    pub(crate) fn set_namespace(&mut self, namespace: &Namespace) {
        self.namespace = namespace.clone();
    }

    /// What we offer. A driver cannot switch the cache off (CONFIG_WCE): a monitor does not tell the next back-end of that.
    pub(crate) fn features(&self) -> u64 {
        use feature::*;
        let has = |condition: bool, features: u64| if condition { features } else { 0 };
        let namespace = &self.namespace;
        let writable = !namespace.read_only;
        VERSION_1
            | INDIRECT_DESC
            | EVENT_IDX
            | SEG_MAX
            | BLK_SIZE
            | TOPOLOGY
            | MQ
            | has(namespace.read_only, RO)
            | has(namespace.volatile_write_cache, FLUSH)
            | has(namespace.discard && writable, DISCARD)
            | has(namespace.write_zeroes && writable, WRITE_ZEROES)
    }

    /// What a driver may have taken: earlier versions offered CONFIG_WCE, and a running guest keeps what it took.
    pub(crate) fn known_features(&self) -> u64 {
        self.features() | feature::CONFIG_WCE
    }

    /// What the driver takes of them. Without FLUSH it expects writes to be durable when they complete (5.2.6.2). With
    /// CONFIG_WCE it may expect that, too: it may have said so to a back-end before us.
    pub(crate) fn set_features(&mut self, taken: u64) {
        self.no_flushes = taken & feature::FLUSH == 0 || taken & feature::CONFIG_WCE != 0;
    }

    /// The driver's choice of the cache (5.2.5).
    pub(crate) fn set_writeback(&mut self, writeback: bool) {
        self.no_flushes = !writeback;
    }

    /// Completed writes are durable.
    fn write_through(&self) -> bool {
        self.namespace.volatile_write_cache && self.no_flushes
    }

    /// Whether `op` is to be followed by a flush before the driver is told of its end: zeroes have no FUA with us.
    pub(crate) fn then_flush(&self, op: Op) -> bool {
        self.write_through() && matches!(op, Op::WriteZeroes { .. })
    }

    /// The configuration space (5.2.4).
    pub(crate) fn config(&self) -> [u8; CONFIG_BYTES] {
        let namespace = &self.namespace;
        let mut config = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(field) = config.get_mut(at..at + bytes.len()) {
                field.copy_from_slice(bytes);
            }
        };
        let sectors = namespace.len_bytes() / SECTOR_BYTES;
        let optimal_blocks = namespace.optimal_io_bytes / namespace.block_size.max(1);
        let per_block = namespace.block_size / SECTOR_BYTES as u32;
        put(0, &sectors.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &namespace.block_size.to_le_bytes());
        put(26, &1_u16.to_le_bytes());
        put(28, &optimal_blocks.to_le_bytes());
        put(CONFIG_WRITEBACK, &[u8::from(!self.write_through())]);
        put(34, &self.queues.to_le_bytes());
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &1_u32.to_le_bytes());
        put(44, &per_block.to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &1_u32.to_le_bytes());
        put(56, &[1]);
        config
    }

    /// What GET_ID tells: as much of the namespace's identity as fits.
    pub(crate) fn id(&self) -> [u8; ID_BYTES] {
        let namespace = &self.namespace;
        let text = match namespace.uuid {
            Some(uuid) => uuid.simple().to_string(),
            None if namespace.nguid != [0; 16] => hex(&namespace.nguid),
            None => hex(&namespace.eui64),
        };
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        id
    }

    /// Takes header and status off a chain: what is left are the data. `None`: there is no place for a status, so there is
    /// no way to answer.
    pub(crate) fn parse(&self, chain: &mut Chain) -> Option<(Work, Span)> {
        let status = take_last_byte(&mut chain.writable)?;
        let mut header = [0; 16];
        if !take_front(&mut chain.readable, &mut header) {
            return Some((Work::Answer(Status::IoError), status));
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        let sector = u64::from_le_bytes(sector);
        let work = match kind {
            0 | 1 => self.transfer(kind == 1, sector, chain),
            4 => Work::Volume(Op::Flush, 0, 0),
            8 => Work::GetId,
            11 | 13 => self.range(kind == 11, chain),
            _ => Work::Answer(Status::Unsupported),
        };
        Some((work, status))
    }

    /// IN and OUT.
    fn transfer(&self, out: bool, sector: u64, chain: &Chain) -> Work {
        let (data, other) = if out {
            (&chain.readable, &chain.writable)
        } else {
            (&chain.writable, &chain.readable)
        };
        let bytes: u64 = data.iter().map(|span| u64::from(span.len())).sum();
        let op = if out {
            Op::Write {
                fua: self.write_through(),
            }
        } else {
            Op::Read
        };
        let denied = out && self.namespace.read_only;
        if denied || bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) || !other.is_empty() {
            return Work::Answer(Status::IoError);
        }
        self.blocks(sector, bytes / SECTOR_BYTES)
            .map_or(Work::Answer(Status::IoError), |(lba, blocks)| {
                Work::Volume(op, lba, blocks)
            })
    }

    /// DISCARD and WRITE_ZEROES: one segment, as the configuration space says.
    fn range(&self, discard: bool, chain: &mut Chain) -> Work {
        let mut segment = [0; 16];
        let taken = take_front(&mut chain.readable, &mut segment);
        let supported = if discard {
            self.namespace.discard
        } else {
            self.namespace.write_zeroes
        };
        if !supported || self.namespace.read_only {
            return Work::Answer(Status::Unsupported);
        }
        if !taken || !chain.readable.is_empty() || !chain.writable.is_empty() {
            return Work::Answer(Status::IoError);
        }
        let [s @ .., n0, n1, n2, n3, f0, f1, f2, f3] = segment;
        let sector = u64::from_le_bytes(s);
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        // Bit 0 is "unmap", which a discard must not have (5.2.6.2).
        if flags & !1 != 0 || discard && flags != 0 {
            return Work::Answer(Status::Unsupported);
        }
        if sectors == 0 || sectors > MAX_RANGE_SECTORS {
            return Work::Answer(Status::IoError);
        }
        let op = if discard {
            Op::Discard
        } else {
            Op::WriteZeroes {
                deallocate: flags & 1 != 0,
            }
        };
        self.blocks(sector, u64::from(sectors))
            .map_or(Work::Answer(Status::IoError), |(lba, blocks)| {
                Work::Volume(op, lba, blocks)
            })
    }

    /// Sectors as blocks, when they are whole blocks of the namespace.
    fn blocks(&self, sector: u64, sectors: u64) -> Option<(u64, u64)> {
        let per_block = (u64::from(self.block_size) / SECTOR_BYTES).max(1);
        let end = sector.checked_add(sectors)?;
        let whole = sector.is_multiple_of(per_block) && sectors.is_multiple_of(per_block);
        let inside = end <= self.namespace.len_bytes() / SECTOR_BYTES;
        (whole && inside).then(|| (sector / per_block, sectors / per_block))
    }
}

/// Longest list of data segments; the rest of a chain is header and status.
const _: () = assert!(SEG_MAX + 2 <= MAX_CHAIN);

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Takes the last byte off, the status.
fn take_last_byte(spans: &mut Vec<Span>) -> Option<Span> {
    while spans.last().is_some_and(Span::is_empty) {
        spans.pop();
    }
    let last = spans.last_mut()?;
    let status = last.sub(last.len().checked_sub(1)?, 1)?;
    match last.sub(0, last.len() - 1) {
        Some(rest) if !rest.is_empty() => *last = rest,
        _ => drop(spans.pop()),
    }
    Some(status)
}

/// Copies bytes off the front, however they are distributed; false when there are too few.
fn take_front(spans: &mut Vec<Span>, bytes: &mut [u8]) -> bool {
    let mut taken = 0;
    while let Some(rest) = bytes.get_mut(taken..)
        && !rest.is_empty()
    {
        let Some(first) = spans.first_mut() else {
            return false;
        };
        let copied = first.copy_to_slice(rest) as u32;
        taken += copied as usize;
        match first.sub(copied, first.len() - copied) {
            Some(left) if !left.is_empty() => *first = left,
            _ => drop(spans.remove(0)),
        }
    }
    true
}

#[cfg(test)]
mod tests;
