//! Trains: up to 64 packets to one destination that leave with one system call.
//!
//! A train is a gather list. With `tx=header-only` only headers and trailers are written, one after
//! the other into a small arena, and the list alternates between the arena and payload where it lies:
//! `[hdr0][payload0][trl0 hdr1][payload1]...[trlN]`, so n packets are 2n+1 entries. With `tx=copy`
//! payload is copied behind its header, and the list is one entry.
//!
//! All packets of a train but the last have the same length, because that is how the kernel cuts it
//! up (`UDP_SEGMENT`). Trains come from a pool that is used last-freed-first, so that the arenas in
//! use stay in the cache.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;

use flexblk_reactor::{Error, HugePages, SharedMemory, Span};

use crate::engine::{PacketShape, TrainSink, TxMode};

/// Segments of a GSO send at most (`UDP_MAX_SEGMENTS`: 64, 128 since Linux 6.9).
pub const MAX_SEGMENTS: u16 = 64;

/// Bytes of a train at most: the payload of the largest IPv4 datagram (65535 - 20 - 8).
pub const MAX_TRAIN_BYTES: u32 = 65_507;

/// Entries of a gather list at most (`UIO_MAXIOV`).
const MAX_ENTRIES: usize = 1024;
/// Entries that one packet may need; a train that has not so many left takes no further packet.
const ENTRIES_PER_PACKET: usize = crate::verbs::MAX_SGE + 3;
const ARENA_BYTES: u32 = 64 << 10;

const _: () = assert!(MAX_TRAIN_BYTES <= ARENA_BYTES);

/// What trains may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainLimits {
    /// Packets of a train: 1 without GSO.
    pub max_segments: u16,
    /// Bytes of a train.
    pub max_bytes: u32,
}

impl Default for TrainLimits {
    fn default() -> Self {
        Self {
            max_segments: MAX_SEGMENTS,
            max_bytes: MAX_TRAIN_BYTES,
        }
    }
}

/// Names a train of a [`TrainQueue`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TrainId(u16);

impl TrainId {
    /// The number, below the pool's size.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The id with that number.
    #[must_use]
    pub const fn from_index(index: u16) -> Self {
        Self(index)
    }
}

/// Packets that leave together.
#[derive(Debug)]
pub struct Train {
    arena: Span,
    arena_used: u32,
    entries: Vec<libc::iovec>,
    to: SocketAddr,
    /// Length of the first packet, and of all but the last.
    segment_len: u32,
    len: u32,
    packets: u16,
    /// The last packet was shorter: nothing can follow it.
    sealed: bool,
}

/// What the trains of a queue have carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrainCounters {
    /// Payload bytes put on gather lists.
    pub payload_bytes_gathered: u64,
    /// Payload bytes copied behind their headers.
    pub payload_bytes_copied: u64,
    /// Header, inline and trailer bytes.
    pub header_bytes: u64,
}

/// A pool of trains, the one under construction, and those ready to leave: where the engine writes.
#[derive(Debug)]
pub struct TrainQueue {
    trains: Vec<Train>,
    free: Vec<u16>,
    ready: VecDeque<u16>,
    current: Option<u16>,
    limits: TrainLimits,
    mode: TxMode,
    counters: TrainCounters,
    /// A packet found no room.
    refused: bool,
    /// Keeps the arenas mapped.
    _memory: Arc<SharedMemory>,
}

impl TrainQueue {
    /// A queue of `count` trains.
    ///
    /// # Errors
    /// When there is no memory for the arenas.
    pub fn new(count: u16, mode: TxMode, limits: TrainLimits) -> Result<Self, Error> {
        let count = count.max(1);
        let bytes = u64::from(count) * u64::from(ARENA_BYTES);
        let memory = SharedMemory::create("flexins-trains", bytes, HugePages::No)?;
        let trains = (0..count)
            .filter_map(|n| memory.span(u64::from(n) * u64::from(ARENA_BYTES), ARENA_BYTES))
            .map(Train::new)
            .collect();
        Ok(Self {
            trains,
            free: (0..count).rev().collect(),
            ready: VecDeque::with_capacity(count.into()),
            current: None,
            limits: TrainLimits {
                max_segments: limits.max_segments.clamp(1, MAX_SEGMENTS),
                max_bytes: limits.max_bytes.min(MAX_TRAIN_BYTES),
            },
            mode,
            counters: TrainCounters::default(),
            refused: false,
            _memory: memory,
        })
    }

    /// Closes the train under construction, so that it can leave.
    pub fn finish(&mut self) {
        if let Some(current) = self.current.take() {
            self.ready.push_back(current);
        }
    }

    /// The next train that is ready to leave. It stays as it is until [`TrainQueue::release`].
    pub fn next_ready(&mut self) -> Option<TrainId> {
        self.ready.pop_front().map(TrainId)
    }

    /// A train.
    #[must_use]
    pub fn get(&self, id: TrainId) -> Option<&Train> {
        self.trains.get(id.index())
    }

    /// The train has left: its arena is used again, next of all.
    pub fn release(&mut self, id: TrainId) {
        debug_assert!(!self.free.contains(&id.0), "released twice");
        if let Some(train) = self.trains.get_mut(id.index()) {
            train.clear();
            self.free.push(id.0);
        }
    }

    /// Whether no train is left to begin.
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        self.free.is_empty()
    }

    /// Whether a packet found no room since the last call.
    pub fn take_refused(&mut self) -> bool {
        std::mem::take(&mut self.refused)
    }

    /// Trains that are neither free nor ready nor under construction.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.trains.len() - self.free.len() - self.ready.len() - usize::from(self.current.is_some())
    }

    /// One packet per train from now on: the kernel or the device cannot segment.
    pub fn disable_segmentation(&mut self) {
        self.limits.max_segments = 1;
    }

    /// Bytes carried so far.
    #[must_use]
    pub fn counters(&self) -> &TrainCounters {
        &self.counters
    }

    /// Makes the current train one that takes such a packet.
    fn train_for(&mut self, shape: &PacketShape) -> Option<()> {
        if let Some(current) = self.current {
            let fits = self
                .trains
                .get(usize::from(current))
                .is_some_and(|train| train.accepts(shape, &self.limits));
            if !fits {
                self.finish();
            }
        }
        if self.current.is_none() {
            self.current = Some(self.free.pop()?);
        }
        Some(())
    }

    fn current(&mut self) -> Option<&mut Train> {
        self.trains.get_mut(usize::from(self.current?))
    }
}

impl TrainSink for TrainQueue {
    #[inline]
    fn open(&mut self, shape: &PacketShape) -> Option<&mut [u8]> {
        if shape.len() > self.limits.max_bytes || self.train_for(shape).is_none() {
            self.refused = true;
            return None;
        }
        self.counters.header_bytes += u64::from(shape.head) + u64::from(shape.trailer);
        let train = self.current()?;
        train.begin(shape);
        train.slot(u32::from(shape.head))
    }

    #[inline]
    fn gather(&mut self, span: Span) {
        let len = u64::from(span.len());
        match self.mode {
            TxMode::HeaderOnly => self.counters.payload_bytes_gathered += len,
            TxMode::Copy => self.counters.payload_bytes_copied += len,
        }
        let mode = self.mode;
        if let Some(train) = self.current() {
            train.gather(span, mode);
        }
    }

    #[inline]
    fn close(&mut self, trailer: &[u8]) {
        if let Some(slot) = self
            .current()
            .and_then(|train| train.slot(trailer.len() as u32))
        {
            slot.copy_from_slice(trailer);
        }
    }
}

impl Train {
    fn new(arena: Span) -> Self {
        Self {
            arena,
            arena_used: 0,
            entries: Vec::with_capacity(MAX_ENTRIES),
            to: SocketAddr::from(([0, 0, 0, 0], 0)),
            segment_len: 0,
            len: 0,
            packets: 0,
            sealed: false,
        }
    }

    /// Where it goes.
    #[must_use]
    pub fn destination(&self) -> SocketAddr {
        self.to
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Packets.
    #[must_use]
    pub fn packets(&self) -> u16 {
        self.packets
    }

    /// Length of every packet but the last.
    #[must_use]
    pub fn segment_len(&self) -> u32 {
        self.segment_len
    }

    /// The gather list. The kernel may read what it names until the train is released.
    #[must_use]
    pub fn entries(&self) -> &[libc::iovec] {
        &self.entries
    }

    /// Gives `each` the packets as lists of pieces, for a capture. At most 64 pieces of a packet are
    /// shown; there are never more than [`MAX_SGE`](crate::verbs::MAX_SGE) and a few.
    pub fn for_each_packet(&self, mut each: impl FnMut(&[&[u8]])) {
        let mut pieces: arrayvec::ArrayVec<&[u8], 64> = arrayvec::ArrayVec::new();
        let mut room = self.segment_len as usize;
        for entry in &self.entries {
            // SAFETY: entries name the arena and payload that is lent until the train is released;
            // a race with the payload's owner would show in the capture as changed bytes.
            let mut rest =
                unsafe { std::slice::from_raw_parts(entry.iov_base.cast::<u8>(), entry.iov_len) };
            while !rest.is_empty() {
                let (piece, tail) = rest.split_at(rest.len().min(room));
                let _ = pieces.try_push(piece);
                room -= piece.len();
                rest = tail;
                if room == 0 {
                    each(&pieces);
                    pieces.clear();
                    room = self.segment_len as usize;
                }
            }
        }
        if !pieces.is_empty() {
            each(&pieces);
        }
    }

    fn accepts(&self, shape: &PacketShape, limits: &TrainLimits) -> bool {
        !self.sealed
            && shape.len() <= self.segment_len
            && self.packets < limits.max_segments
            && self.len + shape.len() <= limits.max_bytes
            && self.entries.len() + ENTRIES_PER_PACKET <= MAX_ENTRIES
            && shape.to == self.to
    }

    fn begin(&mut self, shape: &PacketShape) {
        if self.packets == 0 {
            self.to = shape.to;
            self.segment_len = shape.len();
        }
        self.sealed = shape.len() < self.segment_len;
        self.packets += 1;
        self.len += shape.len();
    }

    /// The next `len` bytes of the arena, appended to the gather list.
    #[inline]
    fn slot(&mut self, len: u32) -> Option<&mut [u8]> {
        let span = self.arena.sub(self.arena_used, len)?;
        self.arena_used += len;
        self.append(span);
        // SAFETY: the arena is this train's alone, each byte of it is lent once between two clears,
        // and the kernel reads it only after the train was finished.
        Some(unsafe { span.as_mut_slice() })
    }

    fn gather(&mut self, span: Span, mode: TxMode) {
        // A list that is full beyond all SGEs would be a packet longer than its shape: the arena has
        // room for every byte of a train, so copying is always possible.
        if mode == TxMode::HeaderOnly && self.entries.len() < MAX_ENTRIES {
            self.append(span);
        } else if let Some(to) = self.arena.sub(self.arena_used, span.len()) {
            to.copy_from_span(&span);
            self.arena_used += span.len();
            self.append(to);
        }
    }

    /// Appends to the list, or to its last entry when that ends where this begins.
    #[inline]
    fn append(&mut self, span: Span) {
        if span.is_empty() {
            return;
        }
        if let Some(last) = self.entries.last_mut() {
            let end = last.iov_base.wrapping_byte_add(last.iov_len);
            if end.cast() == span.as_ptr() {
                last.iov_len += span.len() as usize;
                return;
            }
        }
        self.entries.push(libc::iovec {
            iov_base: span.as_ptr().cast(),
            iov_len: span.len() as usize,
        });
    }

    fn clear(&mut self) {
        self.arena_used = 0;
        self.entries.clear();
        self.len = 0;
        self.packets = 0;
        self.sealed = false;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn to(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    fn payload(len: usize) -> Arc<SharedMemory> {
        let memory = SharedMemory::create("payload", len as u64, HugePages::No).unwrap();
        let bytes: Vec<u8> = (0..len).map(|n| (n * 7 + n / 251) as u8).collect();
        memory.span(0, len as u32).unwrap().copy_from_slice(&bytes);
        memory
    }

    /// Puts one packet whose header and trailer bytes are `mark`; false when there is no room.
    fn put(queue: &mut TrainQueue, to: SocketAddr, mark: u8, head: u16, spans: &[Span]) -> bool {
        let shape = PacketShape {
            to,
            head,
            payload: spans.iter().map(Span::len).sum(),
            trailer: 8,
        };
        let Some(slot) = queue.open(&shape) else {
            return false;
        };
        assert_eq!(slot.len(), usize::from(head));
        slot.fill(mark);
        spans.iter().for_each(|span| queue.gather(*span));
        queue.close(&[mark; 8]);
        true
    }

    fn packets(train: &Train) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        train.for_each_packet(|pieces| all.push(pieces.concat()));
        all
    }

    #[test]
    fn header_only_alternates_between_arena_and_payload() {
        let memory = payload(3 * 4096);
        let mut queue = TrainQueue::new(4, TxMode::HeaderOnly, TrainLimits::default()).unwrap();
        // not in order, so that payloads are no neighbours
        for n in [2_u8, 1, 0] {
            let span = memory.span(u64::from(n) * 4096, 4096).unwrap();
            assert!(put(&mut queue, to(1), n, 28, &[span]));
        }
        assert!(queue.next_ready().is_none());
        queue.finish();
        let id = queue.next_ready().unwrap();
        let train = queue.get(id).unwrap();
        let lens: Vec<usize> = train.entries().iter().map(|entry| entry.iov_len).collect();
        assert_eq!(lens, [28, 4096, 36, 4096, 36, 4096, 8]);
        assert_eq!(
            train.entries()[1].iov_base.cast(),
            memory.span(8192, 1).unwrap().as_ptr()
        );
        assert_eq!(
            (train.packets(), train.segment_len(), train.len()),
            (3, 4132, 3 * 4132)
        );
        let counters = *queue.counters();
        assert_eq!(
            (
                counters.payload_bytes_gathered,
                counters.payload_bytes_copied
            ),
            (3 * 4096, 0)
        );
        assert_eq!(counters.header_bytes, 3 * 36);
    }

    #[test]
    fn copy_mode_is_one_entry() {
        let memory = payload(8192);
        let mut queue = TrainQueue::new(4, TxMode::Copy, TrainLimits::default()).unwrap();
        let spans = [
            memory.span(0, 100).unwrap(),
            memory.span(5000, 1000).unwrap(),
        ];
        assert!(put(&mut queue, to(1), 1, 28, &spans) && put(&mut queue, to(1), 2, 28, &spans));
        queue.finish();
        let train = queue
            .get(queue.ready.front().copied().map(TrainId).unwrap())
            .unwrap();
        assert_eq!(train.entries().len(), 1);
        assert_eq!(train.entries()[0].iov_len, 2 * (28 + 1100 + 8));
        assert_eq!(queue.counters().payload_bytes_copied, 2200);
        assert_eq!(queue.counters().payload_bytes_gathered, 0);
    }

    #[test]
    fn another_destination_size_or_a_short_packet_ends_a_train() {
        let memory = payload(4096);
        let span = |len| memory.span(0, len).unwrap();
        let mut queue = TrainQueue::new(8, TxMode::HeaderOnly, TrainLimits::default()).unwrap();
        let mut sizes = Vec::new();
        for (port, len) in [
            (1, 100),
            (1, 100),
            (1, 50),
            (1, 50),
            (2, 50),
            (2, 60),
            (2, 60),
        ] {
            assert!(put(&mut queue, to(port), 0, 20, &[span(len)]));
        }
        queue.finish();
        while let Some(id) = queue.next_ready() {
            let train = queue.get(id).unwrap();
            sizes.push((
                train.destination().port(),
                train.packets(),
                train.segment_len(),
            ));
        }
        assert_eq!(sizes, [(1, 3, 128), (1, 1, 78), (2, 1, 78), (2, 2, 88)]);
        assert_eq!(queue.in_flight(), 4);
    }

    #[test]
    fn limits_hold_and_the_last_freed_is_the_next_used() {
        let memory = payload(4096);
        let span = memory.span(0, 4096).unwrap();
        let mut queue = TrainQueue::new(2, TxMode::HeaderOnly, TrainLimits::default()).unwrap();
        let mut taken = 0;
        while put(&mut queue, to(1), 0, 32, &[span]) {
            taken += 1;
        }
        assert_eq!(taken, 2 * (MAX_TRAIN_BYTES / 4136));
        queue.finish();
        assert!(queue.is_exhausted());
        let (a, b) = (queue.next_ready().unwrap(), queue.next_ready().unwrap());
        queue.release(b);
        queue.release(a);
        assert!(put(&mut queue, to(1), 0, 32, &[span]));
        queue.finish();
        assert_eq!(queue.next_ready(), Some(a));
        queue.release(a);
        let tiny = PacketShape {
            to: to(1),
            head: 12,
            payload: 0,
            trailer: 4,
        };
        let mut count = 0;
        while queue.ready.is_empty() {
            queue.open(&tiny).unwrap().fill(1);
            queue.close(&[0; 4]);
            count += 1;
        }
        assert_eq!(count, u32::from(MAX_SEGMENTS) + 1);
        let huge = PacketShape {
            to: to(1),
            head: 12,
            payload: 65_500,
            trailer: 4,
        };
        assert!(queue.open(&huge).is_none());
    }

    #[test]
    fn without_segmentation_every_packet_is_a_train() {
        let mut queue = TrainQueue::new(4, TxMode::HeaderOnly, TrainLimits::default()).unwrap();
        queue.disable_segmentation();
        for n in 0..4 {
            assert!(put(&mut queue, to(1), n, 12, &[]));
        }
        assert!(!put(&mut queue, to(1), 4, 12, &[]));
        queue.finish();
        assert_eq!(std::iter::from_fn(|| queue.next_ready()).count(), 4);
    }

    proptest! {
        /// Whatever is put in comes out: same packets in the same order, header-only or copied.
        #[test]
        fn trains_carry_exactly_the_packets(
            shapes in prop::collection::vec((12_u16..80, prop::collection::vec((0_u32..5000, 0_u32..3000), 0..5), 1_u16..3), 1..100),
            copy: bool,
        ) {
            let memory = payload(8192);
            let mode = if copy { TxMode::Copy } else { TxMode::HeaderOnly };
            let mut queue = TrainQueue::new(128, mode, TrainLimits::default()).unwrap();
            let mut expected = Vec::new();
            for (n, (head, pieces, port)) in shapes.iter().enumerate() {
                let spans: Vec<Span> = pieces.iter().map(|&(at, len)| memory.span(u64::from(at), len).unwrap()).collect();
                prop_assert!(put(&mut queue, to(*port), n as u8, *head, &spans));
                let mut bytes = vec![n as u8; usize::from(*head)];
                for span in &spans {
                    let mut piece = vec![0; span.len() as usize];
                    span.copy_to_slice(&mut piece);
                    bytes.extend_from_slice(&piece);
                }
                bytes.extend_from_slice(&[n as u8; 8]);
                expected.push((to(*port), bytes));
            }
            queue.finish();
            let mut got = Vec::new();
            while let Some(id) = queue.next_ready() {
                let train = queue.get(id).unwrap();
                let all = packets(train);
                prop_assert_eq!(all.len(), usize::from(train.packets()));
                prop_assert_eq!(all.iter().map(Vec::len).sum::<usize>(), train.len() as usize);
                got.extend(all.into_iter().map(|bytes| (train.destination(), bytes)));
                queue.release(id);
            }
            prop_assert_eq!(got, expected);
        }
    }
}
