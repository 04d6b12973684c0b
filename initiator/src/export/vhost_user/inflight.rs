//! Requests in flight, written down in memory that outlives us ("Inflight I/O tracking", split virtqueue).
//!
//! The front-end keeps the memory while we are gone. What we had taken and not given back is in it, so whoever comes after us
//! carries it out (again); the guest never learns.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use flexblk_reactor::{HugePages, SharedMemory};

use super::cells::Cells;
use super::message::Inflight;

/// Bytes before the descriptors of a queue: features, version, desc_num, last_batch_head, used_idx.
const HEADER_BYTES: u32 = 16;
/// Bytes for a descriptor: inflight, padding, next, counter.
const ENTRY_BYTES: u32 = 16;
/// Queues do not share cache lines.
const ALIGN_BYTES: u64 = 64;
const VERSION: u16 = 1;
/// What every queue has room for: QEMU asks by the device's queue size (128), and its guests make queues of up to this.
const LEAST_ENTRIES: u16 = 1024;
/// Largest queue that there is.
const MAX_QUEUE_SIZE: u16 = 32768;

const VERSION_AT: u32 = 8;
const SIZE_AT: u32 = 10;
const LAST_HEAD_AT: u32 = 12;
const USED_AT: u32 = 14;

/// The memory of all queues.
#[derive(Clone, Debug)]
pub(crate) struct InflightMemory {
    memory: Arc<SharedMemory>,
    offset: u64,
    queues: u16,
    /// As the front-end asked for it.
    queue_size: u16,
    /// Bytes of each queue.
    stride: u32,
}

impl InflightMemory {
    /// New memory, all zero: nothing is in flight.
    pub(crate) fn create(wanted: &Inflight) -> Option<InflightMemory> {
        let stride = stride(wanted.queue_size)?.max(stride(LEAST_ENTRIES)?);
        let size = u64::from(stride) * u64::from(wanted.queues);
        let memory = SharedMemory::create("flexblk inflight", size, HugePages::No).ok()?;
        Some(InflightMemory {
            memory,
            offset: 0,
            queues: wanted.queues,
            queue_size: wanted.queue_size,
            stride,
        })
    }

    /// What the front-end has kept. Its queues have equal parts of it.
    pub(crate) fn open(description: &Inflight, fd: OwnedFd) -> Option<InflightMemory> {
        let part = description
            .size
            .checked_div(u64::from(description.queues))?;
        let stride = u32::try_from(part - part % ALIGN_BYTES).ok()?;
        if stride < self::stride(description.queue_size)?
            || !description.offset.is_multiple_of(ALIGN_BYTES)
        {
            return None;
        }
        let end = description.offset.checked_add(description.size)?;
        Some(InflightMemory {
            memory: SharedMemory::map(fd, end).ok()?,
            offset: description.offset,
            queues: description.queues,
            queue_size: description.queue_size,
            stride,
        })
    }

    /// For the front-end.
    pub(crate) fn describe(&self) -> Inflight {
        Inflight {
            size: self.memory.len() - self.offset,
            offset: self.offset,
            queues: self.queues,
            queue_size: self.queue_size,
        }
    }

    /// The descriptor of the memory.
    pub(crate) fn fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.memory.fd()
    }

    /// The part of one queue; `None`: it has none, or not for that many entries.
    pub(crate) fn queue(&self, index: u16, size: u16) -> Option<InflightQueue> {
        if index >= self.queues || HEADER_BYTES + ENTRY_BYTES * u32::from(size) > self.stride {
            return None;
        }
        let offset = self.offset + u64::from(index) * u64::from(self.stride);
        let cells = Cells::new(&self.memory, offset, self.stride, 8)?;
        Some(InflightQueue {
            cells,
            size,
            counter: 0,
        })
    }
}

/// Bytes of a queue with that many entries.
fn stride(queue_size: u16) -> Option<u32> {
    if queue_size == 0 || queue_size > MAX_QUEUE_SIZE {
        return None;
    }
    let bytes = HEADER_BYTES + ENTRY_BYTES * u32::from(queue_size);
    Some(bytes.next_multiple_of(ALIGN_BYTES as u32))
}

/// One queue's requests in flight.
#[derive(Debug)]
pub(crate) struct InflightQueue {
    cells: Cells,
    size: u16,
    /// The next request's.
    counter: u64,
}

impl InflightQueue {
    /// Puts the record in order after whatever happened to who wrote it; `used` is the ring's used index. Returns the
    /// heads in flight in the order in which they were taken.
    pub(crate) fn recover(&mut self, used: u16) -> Vec<u16> {
        let fresh = self.read_u16(VERSION_AT) != VERSION || self.read_u16(SIZE_AT) != self.size;
        if fresh {
            for head in 0..self.size {
                self.cells.write(entry(head), &[0; ENTRY_BYTES as usize]);
            }
            self.cells.write(SIZE_AT, &self.size.to_ne_bytes());
            self.cells.write(VERSION_AT, &VERSION.to_ne_bytes());
        } else if self.read_u16(USED_AT) != used {
            // It died after it had told the driver, before it wrote down that it had.
            let last = self.read_u16(LAST_HEAD_AT);
            if last < self.size {
                self.cells.write(entry(last), &[0]);
            }
        }
        self.cells.write(USED_AT, &used.to_ne_bytes());
        let mut heads: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.cells.read::<1>(entry(*head)) == [1])
            .map(|head| (u64::from_ne_bytes(self.cells.read(entry(head) + 8)), head))
            .collect();
        heads.sort_unstable();
        self.counter = heads
            .last()
            .map_or(0, |(counter, _)| counter.wrapping_add(1));
        heads.into_iter().map(|(_, head)| head).collect()
    }

    /// A request is taken.
    #[inline]
    pub(crate) fn taken(&mut self, head: u16) {
        self.cells
            .write(entry(head) + 8, &self.counter.to_ne_bytes());
        in_order();
        self.cells.write(entry(head), &[1]);
        in_order();
        self.counter = self.counter.wrapping_add(1);
    }

    /// It is about to be given back.
    #[inline]
    pub(crate) fn before_used(&self, head: u16) {
        self.cells.write(LAST_HEAD_AT, &head.to_ne_bytes());
        in_order();
    }

    /// It was given back; `used` is the used index now.
    #[inline]
    pub(crate) fn after_used(&self, head: u16, used: u16) {
        in_order();
        self.cells.write(entry(head), &[0]);
        in_order();
        self.cells.release(USED_AT, used);
    }

    fn read_u16(&self, at: u32) -> u16 {
        u16::from_ne_bytes(self.cells.read(at))
    }
}

/// A process that is killed has done everything up to an instruction and nothing after it: so it is only the compiler that
/// must not change the order of what is written.
#[inline]
fn in_order() {
    compiler_fence(Ordering::SeqCst);
}

fn entry(head: u16) -> u32 {
    HEADER_BYTES + ENTRY_BYTES * u32::from(head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn description(queues: u16, queue_size: u16) -> Inflight {
        Inflight {
            size: 0,
            offset: 0,
            queues,
            queue_size,
        }
    }

    #[test]
    fn memory_of_the_wrong_size_is_refused() {
        assert!(InflightMemory::create(&description(0, 128)).is_none());
        assert!(InflightMemory::create(&description(1, 0)).is_none());
        assert!(InflightMemory::create(&description(1, 32769)).is_none());
        let memory = InflightMemory::create(&description(2, 128)).unwrap();
        let told = memory.describe();
        let fd = || memory.fd().unwrap().try_clone_to_owned().unwrap();
        assert!(InflightMemory::open(&told, fd()).is_some());
        for wrong in [
            Inflight {
                size: 2 * 2112 - 1,
                ..told
            },
            Inflight {
                size: told.size + 4096,
                ..told
            },
            Inflight { offset: 8, ..told },
            Inflight {
                offset: 1 << 40,
                ..told
            },
            Inflight {
                size: u64::MAX,
                ..told
            },
            Inflight {
                queue_size: 2048,
                ..told
            },
            Inflight { queues: 0, ..told },
        ] {
            assert!(InflightMemory::open(&wrong, fd()).is_none(), "{wrong:?}");
        }
        assert!(memory.queue(2, 128).is_none() && memory.queue(1, 2048).is_none());
        // More than was asked for, because guests make larger queues.
        assert!(memory.queue(1, 1024).is_some());
        // As another back-end makes it, it is just large enough.
        let least = Inflight {
            size: 2 * 2112,
            ..told
        };
        let least = InflightMemory::open(&least, fd()).unwrap();
        assert!(least.queue(1, 128).is_some() && least.queue(1, 256).is_none());
    }

    proptest! {
        /// Whatever was done before the end, those in flight are known, in their order; the one that was given back
        /// when the end came is not among them.
        #[test]
        fn what_was_in_flight_is_known_afterwards(
            steps in proptest::collection::vec((any::<bool>(), 0u16..8), 0..60),
            dies_while_giving_back in any::<bool>(),
        ) {
            let memory = InflightMemory::create(&description(1, 8)).unwrap();
            let mut queue = memory.queue(0, 8).unwrap();
            prop_assert_eq!(queue.recover(100), Vec::<u16>::new());
            let mut used = 100_u16;
            let mut model: Vec<u16> = Vec::new();
            for (take, head) in steps {
                let at = model.iter().position(|it| *it == head);
                match (take, at) {
                    (true, None) => { queue.taken(head); model.push(head); }
                    (false, Some(at)) => {
                        queue.before_used(head);
                        used = used.wrapping_add(1);
                        queue.after_used(head, used);
                        model.remove(at);
                    }
                    _ => {}
                }
            }
            if dies_while_giving_back && !model.is_empty() {
                queue.before_used(model.remove(0));
                used = used.wrapping_add(1);
            }
            let mut again = memory.queue(0, 8).unwrap();
            prop_assert_eq!(again.recover(used), model.clone());
            prop_assert_eq!(memory.queue(0, 8).unwrap().recover(used), model);
        }
    }
}
