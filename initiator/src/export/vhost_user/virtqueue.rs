//! A split virtqueue, seen from the device (Virtual I/O Device 1.2, 2.7).

use flexblk_reactor::Span;

use super::cells::{Cells, full_fence};
use super::memory::GuestMemory;
use super::message::RingAddress;

/// Bytes of a descriptor (2.7.5).
const DESCRIPTOR_BYTES: u32 = 16;
/// The buffer goes on in the descriptor that `next` names.
const NEXT: u16 = 1;
/// The device writes the buffer.
const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
const INDIRECT: u16 = 4;
/// In the available ring: the driver does not want to be notified (2.7.6).
const NO_INTERRUPT: u16 = 1;
/// In the used ring: we do not (2.7.8).
const NO_NOTIFY: u16 = 1;
/// Descriptors of one chain at most: 1022 of data, a header and a status.
pub(crate) const MAX_CHAIN: u32 = 1024;

/// What the driver did that it must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RingError {
    /// More entries are available than there are.
    #[error("the available index is {ahead} entries ahead on a queue of {size}")]
    Index {
        /// How far.
        ahead: u16,
        /// Of the queue.
        size: u16,
    },
    /// No such descriptor.
    #[error("descriptor {0} lies outside of its table")]
    Descriptor(u16),
    /// A chain goes in circles, or is longer than allowed.
    #[error("a chain of descriptors has no end")]
    Endless,
    /// A buffer is in nobody's memory.
    #[error("a buffer at guest address {0:#x} is not in the guest's memory")]
    Address(u64),
    /// An indirect table inside another, empty, not of whole descriptors, or with a successor.
    #[error("an indirect descriptor is malformed")]
    Indirect,
    /// A buffer to read after one to write.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// A request is made available again before it was given back.
    #[error("the chain at {0} is available twice")]
    Twice(u16),
    /// A request without a byte that the device may write.
    #[error("a request has no place for its status")]
    NoStatus,
    /// More bytes than one chain may have.
    #[error("a chain has more bytes than 2^32 - 1")]
    TooLong,
}

/// The buffers of one chain. Kept and filled again and again.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    /// From the driver.
    pub(crate) readable: Vec<Span>,
    /// To the driver.
    pub(crate) writable: Vec<Span>,
}

/// A ring in the guest's memory with our place in it.
#[derive(Debug)]
pub(crate) struct Virtqueue {
    size: u16,
    descriptors: Cells,
    available: Cells,
    used: Cells,
    next_available: u16,
    next_used: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    event_index: bool,
    /// Used entries that the driver may not know of yet start here.
    signalled: u16,
}

impl Virtqueue {
    /// `None`: not where the front-end says.
    pub(crate) fn new(
        memory: &GuestMemory,
        size: u16,
        address: &RingAddress,
        event_index: bool,
        next_available: u16,
    ) -> Option<Virtqueue> {
        let entries = u32::from(size);
        let used = memory.user(address.used, 6 + 8 * entries, 4)?;
        let next_used = used.acquire(2);
        Some(Virtqueue {
            size,
            descriptors: memory.user(address.descriptors, DESCRIPTOR_BYTES * entries, 16)?,
            available: memory.user(address.available, 6 + 2 * entries, 2)?,
            used,
            next_available,
            next_used,
            event_index,
            signalled: next_used,
        })
    }

    /// The index of the next available entry that we take.
    pub(crate) fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Where the used index is.
    pub(crate) fn next_used(&self) -> u16 {
        self.next_used
    }

    pub(crate) fn set_next_available(&mut self, next: u16) {
        self.next_available = next;
    }

    /// Takes the head of the next chain.
    #[inline]
    pub(crate) fn pop(&mut self) -> Result<Option<u16>, RingError> {
        let ahead = self.available.acquire(2).wrapping_sub(self.next_available);
        if ahead == 0 {
            return Ok(None);
        }
        if ahead > self.size {
            return Err(RingError::Index {
                ahead,
                size: self.size,
            });
        }
        let slot = u32::from(self.next_available & (self.size - 1));
        let head = u16::from_le_bytes(self.available.read(4 + 2 * slot));
        if head >= self.size {
            return Err(RingError::Descriptor(head));
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(head))
    }

    /// Whether there is something to take.
    #[inline]
    pub(crate) fn has_more(&self) -> bool {
        self.available.acquire(2) != self.next_available
    }

    /// Collects the buffers of a chain.
    pub(crate) fn chain(
        &self,
        memory: &GuestMemory,
        head: u16,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        chain.readable.clear();
        chain.writable.clear();
        let mut table = None;
        let mut entries = u32::from(self.size);
        let mut at = head;
        let mut bytes = 0_u32;
        for _ in 0..MAX_CHAIN {
            if u32::from(at) >= entries {
                return Err(RingError::Descriptor(at));
            }
            let descriptor: [u8; DESCRIPTOR_BYTES as usize] = table
                .as_ref()
                .unwrap_or(&self.descriptors)
                .read(DESCRIPTOR_BYTES * u32::from(at));
            let Descriptor {
                address,
                len,
                flags,
                next,
            } = Descriptor::parse(descriptor);
            if flags & INDIRECT != 0 {
                if table.is_some()
                    || flags & NEXT != 0
                    || len == 0
                    || !len.is_multiple_of(DESCRIPTOR_BYTES)
                {
                    return Err(RingError::Indirect);
                }
                entries = len / DESCRIPTOR_BYTES;
                table = Some(
                    memory
                        .guest(address, len)
                        .ok_or(RingError::Address(address))?,
                );
                at = 0;
                continue;
            }
            bytes = bytes.checked_add(len).ok_or(RingError::TooLong)?;
            let out = if flags & WRITE != 0 {
                &mut chain.writable
            } else if chain.writable.is_empty() {
                &mut chain.readable
            } else {
                return Err(RingError::Order);
            };
            if !memory.spans(address, len, out) {
                return Err(RingError::Address(address));
            }
            if flags & NEXT == 0 {
                return Ok(());
            }
            at = next;
        }
        Err(RingError::Endless)
    }

    /// Gives a chain back; `written` bytes of it are ours.
    #[inline]
    pub(crate) fn push_used(&mut self, head: u16, written: u32) {
        let slot = u32::from(self.next_used & (self.size - 1));
        self.used
            .write(4 + 8 * slot, &u32::from(head).to_le_bytes());
        self.used.write(8 + 8 * slot, &written.to_le_bytes());
        self.next_used = self.next_used.wrapping_add(1);
        self.used.release(2, self.next_used);
    }

    /// Whether the driver wants to hear of what was given back since it was asked last.
    #[inline]
    pub(crate) fn must_signal(&mut self) -> bool {
        let (new, old) = (self.next_used, self.signalled);
        if new == old {
            return false;
        }
        self.signalled = new;
        full_fence();
        if self.event_index {
            let event = self.available.acquire(4 + 2 * u32::from(self.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.available.acquire(0) & NO_INTERRUPT == 0
        }
    }

    /// We look by ourselves: notifications would only cost time. A hint; the driver may notify all the same.
    #[inline]
    pub(crate) fn suppress(&self) {
        // With event indices the driver notifies when it passes our index, which stays behind.
        if !self.event_index {
            self.used.release(0, NO_NOTIFY);
        }
    }

    /// We want to be notified of what comes next. True: it has come already.
    pub(crate) fn enable(&self) -> bool {
        if self.event_index {
            let event = 4 + 8 * u32::from(self.size);
            self.used.release(event, self.next_available);
        } else {
            self.used.release(0, 0);
        }
        full_fence();
        self.has_more()
    }
}

/// One descriptor (2.7.5).
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn parse(bytes: [u8; DESCRIPTOR_BYTES as usize]) -> Descriptor {
        // Four numbers in 16 bytes.
        let whole = u128::from_le_bytes(bytes);
        Descriptor {
            address: whole as u64,
            len: (whole >> 64) as u32,
            flags: (whole >> 96) as u16,
            next: (whole >> 112) as u16,
        }
    }
}

/// A guest's memory with a ring of 16 at its front, for fuzzing: every chain that is available is collected and, if
/// it is one, parsed as a request; no byte outside of the memory is ever named.
pub(crate) fn check(bytes: &[u8]) {
    use super::block::Device;
    use super::message::MemoryRegion;
    use flexblk_reactor::{HugePages, SharedMemory};

    const LEN: u64 = 16384;
    let Ok(file) = SharedMemory::create("fuzz", LEN, HugePages::No) else {
        return;
    };
    if let Some(all) = file.span(0, LEN as u32) {
        all.copy_from_slice(bytes);
    }
    let mut memory = GuestMemory::default();
    // Two regions, neighbours for the guest only.
    for (guest, len, offset) in [(0x1000, 8192, 0), (0x3000, 8192, 8192)] {
        let Some(Ok(fd)) = file.fd().map(|fd| fd.try_clone_to_owned()) else {
            return;
        };
        let place = MemoryRegion {
            guest,
            len,
            user: guest,
            offset,
        };
        if memory.add(place, fd).is_err() {
            return;
        }
    }
    let address = RingAddress {
        descriptors: 0x1000,
        available: 0x1100,
        used: 0x1180,
    };
    let Some(mut queue) = Virtqueue::new(&memory, 16, &address, true, 0) else {
        return;
    };
    let device = Device::new(&crate::Namespace::example(), 1);
    let mut chain = Chain::default();
    for _ in 0..32 {
        let Ok(Some(head)) = queue.pop() else {
            return;
        };
        if queue.chain(&memory, head, &mut chain).is_err() {
            continue;
        }
        let inside = |span: &Span| {
            memory.mappings().any(|mapping| {
                let start = mapping.as_ptr() as usize;
                let at = span.as_ptr() as usize;
                at >= start && at + span.len() as usize <= start + mapping.len() as usize
            })
        };
        assert!(chain.readable.iter().chain(&chain.writable).all(inside));
        if let Some((_, status)) = device.parse(&mut chain) {
            assert!(inside(&status));
            status.copy_from_slice(&[0]);
        }
        queue.push_used(head, 1);
        queue.must_signal();
    }
}

#[cfg(test)]
mod tests;
