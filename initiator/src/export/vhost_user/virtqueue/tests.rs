use std::sync::Arc;

use flexblk_reactor::{HugePages, SharedMemory};
use proptest::prelude::*;

use super::*;
use crate::export::vhost_user::message::MemoryRegion;

const GUEST: u64 = 0x10_0000;
const LEN: u64 = 64 << 10;
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const SIZE: u16 = 8;

/// The driver's side of a ring.
struct Driver {
    file: Arc<SharedMemory>,
    memory: GuestMemory,
    available: u16,
}

impl Driver {
    fn new() -> Driver {
        let file = SharedMemory::create("guest", LEN, HugePages::No).unwrap();
        let mut memory = GuestMemory::default();
        let place = MemoryRegion {
            guest: GUEST,
            len: LEN,
            user: 0,
            offset: 0,
        };
        let fd = file.fd().unwrap().try_clone_to_owned().unwrap();
        memory.add(place, fd).unwrap();
        Driver {
            file,
            memory,
            available: 0,
        }
    }

    fn queue(&self, event_index: bool) -> Virtqueue {
        let address = RingAddress {
            descriptors: DESCRIPTORS,
            used: USED,
            available: AVAILABLE,
        };
        Virtqueue::new(&self.memory, SIZE, &address, event_index, 0).unwrap()
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let span = self.file.span(at, bytes.len() as u32).unwrap();
        span.copy_from_slice(bytes);
    }

    fn read_u16(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.file.span(at, 2).unwrap().copy_to_slice(&mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Writes a descriptor into the table at `table`.
    fn describe(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &bytes);
    }

    fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available % SIZE);
        self.write(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.write(AVAILABLE + 2, &self.available.to_le_bytes());
    }

    fn chain(&self, head: u16) -> Result<(u32, u32), RingError> {
        let mut chain = Chain::default();
        self.queue(true).chain(&self.memory, head, &mut chain)?;
        let bytes = |spans: &[Span]| spans.iter().map(Span::len).sum();
        Ok((bytes(&chain.readable), bytes(&chain.writable)))
    }
}

#[test]
fn chains_are_collected_also_through_a_table() {
    let driver = Driver::new();
    driver.describe(0, 0, GUEST + 0x4000, 16, NEXT, 3);
    driver.describe(0, 3, GUEST + 0x5000, 512, NEXT | WRITE, 1);
    driver.describe(0, 1, GUEST + 0x6000, 1, WRITE, 0);
    assert_eq!(driver.chain(0), Ok((16, 513)));
    driver.describe(0, 2, GUEST + 0x3000, 48, INDIRECT, 0);
    driver.describe(0x3000, 0, GUEST + 0x4000, 16, NEXT, 1);
    driver.describe(0x3000, 1, GUEST + 0x5000, 4096, NEXT, 2);
    driver.describe(0x3000, 2, GUEST + 0x6000, 1, WRITE, 0);
    assert_eq!(driver.chain(2), Ok((4112, 1)));
}

#[test]
fn lies_are_found_out() {
    let driver = Driver::new();
    // In circles.
    driver.describe(0, 0, GUEST, 16, NEXT, 1);
    driver.describe(0, 1, GUEST, 16, NEXT, 0);
    assert_eq!(driver.chain(0), Err(RingError::Endless));
    // Out of the table, of both kinds.
    driver.describe(0, 1, GUEST, 16, NEXT, SIZE);
    assert_eq!(driver.chain(0), Err(RingError::Descriptor(SIZE)));
    driver.describe(0, 2, GUEST + 0x3000, 16, INDIRECT, 0);
    driver.describe(0x3000, 0, GUEST, 16, NEXT, 1);
    assert_eq!(driver.chain(2), Err(RingError::Descriptor(1)));
    // Buffers that are nowhere, or only begin somewhere.
    for (address, len) in [
        (0, 1),
        (GUEST + LEN - 1, 2),
        (u64::MAX, 2),
        (GUEST + LEN, 1),
    ] {
        driver.describe(0, 4, address, len, 0, 0);
        assert!(
            matches!(driver.chain(4), Err(RingError::Address(_))),
            "{address:#x}"
        );
    }
    // A table in a table, with a successor, of half a descriptor, empty, out of memory.
    driver.describe(0x3000, 0, GUEST + 0x3000, 16, INDIRECT, 0);
    assert_eq!(driver.chain(2), Err(RingError::Indirect));
    for (len, flags) in [(16, INDIRECT | NEXT), (24, INDIRECT), (0, INDIRECT)] {
        driver.describe(0, 2, GUEST + 0x3000, len, flags, 0);
        assert_eq!(driver.chain(2), Err(RingError::Indirect));
    }
    driver.describe(0, 2, GUEST + LEN - 16, 32, INDIRECT, 0);
    assert!(matches!(driver.chain(2), Err(RingError::Address(_))));
    // A readable buffer behind a writable one.
    driver.describe(0, 5, GUEST, 16, NEXT | WRITE, 6);
    driver.describe(0, 6, GUEST, 16, 0, 0);
    assert_eq!(driver.chain(5), Err(RingError::Order));
}

#[test]
fn more_than_the_queue_holds_is_never_available() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(false);
    assert_eq!(queue.pop(), Ok(None));
    driver.offer(7);
    assert_eq!(queue.pop(), Ok(Some(7)));
    driver.offer(SIZE);
    assert_eq!(queue.pop(), Err(RingError::Descriptor(SIZE)));
    driver.write(AVAILABLE + 2, &(1 + SIZE + 1).to_le_bytes());
    let ahead = SIZE + 1;
    assert_eq!(queue.pop(), Err(RingError::Index { ahead, size: SIZE }));
}

#[test]
fn a_ring_lies_in_memory_and_is_aligned() {
    let driver = Driver::new();
    for (descriptors, used, available) in [
        (8, USED, AVAILABLE),
        (0, USED + 2, AVAILABLE),
        (0, USED, AVAILABLE + 1),
        (LEN, USED, AVAILABLE),
        (0, LEN - 8, AVAILABLE),
        (0, USED, u64::MAX - 1),
    ] {
        let address = RingAddress {
            descriptors,
            used,
            available,
        };
        assert!(Virtqueue::new(&driver.memory, SIZE, &address, true, 0).is_none());
    }
}

#[test]
fn notifications_come_when_they_are_wanted() {
    let mut driver = Driver::new();
    let mut queue = driver.queue(false);
    queue.suppress();
    assert_eq!(driver.read_u16(USED), NO_NOTIFY);
    assert!(!queue.enable());
    assert_eq!(driver.read_u16(USED), 0);
    driver.offer(0);
    assert!(queue.enable(), "something is there already");
    queue.push_used(0, 1);
    assert!(queue.must_signal() && !queue.must_signal());
    driver.write(AVAILABLE, &NO_INTERRUPT.to_le_bytes());
    queue.push_used(0, 1);
    assert!(!queue.must_signal());
    // With event indices: when the index is passed, and only then.
    let mut queue = driver.queue(true);
    let used_event = AVAILABLE + 4 + 2 * u64::from(SIZE);
    driver.write(used_event, &4_u16.to_le_bytes());
    let signals: Vec<bool> = (0..5)
        .map(|_| {
            queue.push_used(0, 1);
            queue.must_signal()
        })
        .collect();
    // Two were used before: the index that the driver waits for is the third from here.
    assert_eq!(signals, [false, false, true, false, false]);
    queue.enable();
    let avail_event = USED + 4 + 8 * u64::from(SIZE);
    assert_eq!(driver.read_u16(avail_event), queue.next_available());
}

proptest! {
    /// A driver that says anything: nothing outside of its memory is named, and every chain ends.
    #[test]
    fn any_memory_is_taken_for_a_ring(bytes in proptest::collection::vec(any::<u8>(), 0..4096), heads in 0u16..16) {
        let mut bytes = bytes;
        if let Some(index) = bytes.get_mut(0x102..0x104) {
            index.copy_from_slice(&heads.to_le_bytes());
        }
        check(&bytes);
    }

    /// Mostly sensible descriptors, so that chains are long and go through tables.
    #[test]
    fn chains_of_half_truths(
        entries in proptest::collection::vec((0u64..0x5000, 0u32..5000, 0u16..8, 0u16..17), 16..80),
        heads in proptest::collection::vec(0u16..17, 1..16),
    ) {
        let mut bytes = vec![0; 16384];
        for (index, (address, len, flags, next)) in entries.iter().enumerate() {
            // The ring's own table first, then one for indirect chains at 0x1200.
            let at = if index < 16 { 16 * index } else { 0x200 + 16 * index };
            let len = if flags & INDIRECT != 0 { 16 * (len % 20) } else { *len };
            let address = if flags & INDIRECT != 0 { 0x1000 + 0x200 + 256 } else { 0x800 + address };
            let entry = u128::from(address) | u128::from(len) << 64 | u128::from(*flags) << 96 | u128::from(*next) << 112;
            bytes[at..at + 16].copy_from_slice(&entry.to_le_bytes());
        }
        for (slot, head) in heads.iter().enumerate() {
            bytes[0x104 + 2 * slot..][..2].copy_from_slice(&head.to_le_bytes());
        }
        bytes[0x102..0x104].copy_from_slice(&(heads.len() as u16).to_le_bytes());
        check(&bytes);
    }
}
