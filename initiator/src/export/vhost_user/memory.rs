//! The guest's memory, as the front-end describes it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use flexblk_reactor::{SharedMemory, Span};

use super::cells::Cells;
use super::message::MemoryRegion;

/// Pieces that we hold at most (GET_MAX_MEM_SLOTS). A channel registers 64 at most, bounce buffers included.
pub(crate) const MAX_SLOTS: usize = 32;

/// Why memory is not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// Empty, or its end is no address.
    #[error("a region of {len:#x} bytes at guest address {guest:#x} cannot be")]
    Range {
        /// Where the guest sees it.
        guest: u64,
        /// Bytes.
        len: u64,
    },
    /// The guest would see two at one address.
    #[error("regions overlap at guest address {0:#x}")]
    Overlap(u64),
    /// More than [`MAX_SLOTS`].
    #[error("more than {MAX_SLOTS} regions")]
    TooMany,
    /// No such region.
    #[error("there is no region at guest address {0:#x}")]
    Unknown(u64),
    /// The kernel, or the file is too short.
    #[error(transparent)]
    Map(#[from] flexblk_reactor::Error),
}

#[derive(Clone, Debug)]
struct Region {
    place: MemoryRegion,
    /// From the start of the file on, because only that is sure to be at the start of a page.
    memory: Arc<SharedMemory>,
}

/// All of it. Changing it makes a new one: whoever uses the old one keeps it mapped.
#[derive(Clone, Debug, Default)]
pub(crate) struct GuestMemory {
    regions: Vec<Region>,
}

impl GuestMemory {
    /// One more region.
    pub(crate) fn add(&mut self, place: MemoryRegion, fd: OwnedFd) -> Result<(), MemoryError> {
        let MemoryRegion {
            guest,
            len,
            user,
            offset,
        } = place;
        let ends = [guest, user, offset].map(|start| start.checked_add(len));
        let [Some(guest_end), Some(_), Some(file_end)] = ends else {
            return Err(MemoryError::Range { guest, len });
        };
        if len == 0 {
            return Err(MemoryError::Range { guest, len });
        }
        if self.regions.len() >= MAX_SLOTS {
            return Err(MemoryError::TooMany);
        }
        // Ends do not overflow, since they did not when the regions came.
        let overlaps = |region: &Region| {
            guest < region.place.guest + region.place.len && region.place.guest < guest_end
        };
        if self.regions.iter().any(overlaps) {
            return Err(MemoryError::Overlap(guest));
        }
        let memory = SharedMemory::map(fd, file_end)?;
        self.regions.push(Region { place, memory });
        Ok(())
    }

    /// The region goes.
    pub(crate) fn remove(&mut self, place: &MemoryRegion) -> Result<(), MemoryError> {
        let same = |region: &Region| {
            region.place.guest == place.guest
                && region.place.len == place.len
                && region.place.user == place.user
        };
        let before = self.regions.len();
        self.regions.retain(|region| !same(region));
        if self.regions.len() == before {
            return Err(MemoryError::Unknown(place.guest));
        }
        Ok(())
    }

    /// Everything, for registration.
    pub(crate) fn mappings(&self) -> impl Iterator<Item = &Arc<SharedMemory>> {
        self.regions.iter().map(|region| &region.memory)
    }

    /// Appends the memory at a guest address, in as many pieces as there are regions; false when a byte of it is
    /// nowhere. What follows the last piece in the same region becomes one with it.
    pub(crate) fn spans(&self, guest: u64, len: u32, out: &mut Vec<Span>) -> bool {
        let (mut at, mut left) = (guest, len);
        while left > 0 {
            let Some((region, inside)) = self.region_of(at) else {
                return false;
            };
            let room = u32::try_from(region.place.len - inside).unwrap_or(u32::MAX);
            let piece = left.min(room);
            let start = region.place.offset + inside;
            let Some(span) = region.memory.span(start, piece) else {
                return false;
            };
            match out.last_mut() {
                Some(last) => match joined(region, last, &span) {
                    Some(both) => *last = both,
                    None => out.push(span),
                },
                None => out.push(span),
            }
            left -= piece;
            match at.checked_add(u64::from(piece)) {
                Some(next) => at = next,
                None => return left == 0,
            }
        }
        true
    }

    /// `len` bytes at an address of the front-end, in one region, aligned.
    pub(crate) fn user(&self, user: u64, len: u32, align: usize) -> Option<Cells> {
        self.regions.iter().find_map(|region| {
            let inside = user.checked_sub(region.place.user)?;
            if inside.checked_add(u64::from(len))? > region.place.len {
                return None;
            }
            Cells::new(&region.memory, region.place.offset + inside, len, align)
        })
    }

    /// The same at an address of the guest.
    pub(crate) fn guest(&self, guest: u64, len: u32) -> Option<Cells> {
        let (region, inside) = self.region_of(guest)?;
        if inside.checked_add(u64::from(len))? > region.place.len {
            return None;
        }
        Cells::new(&region.memory, region.place.offset + inside, len, 1)
    }

    /// The region with that guest address, and how far into it the address is.
    fn region_of(&self, guest: u64) -> Option<(&Region, u64)> {
        self.regions.iter().find_map(|region| {
            let inside = guest.checked_sub(region.place.guest)?;
            (inside < region.place.len).then_some((region, inside))
        })
    }
}

/// Both as one, if `span` lies right behind `last` and both are of this region.
fn joined(region: &Region, last: &Span, span: &Span) -> Option<Span> {
    let start = region.memory.as_ptr() as usize;
    let offset = (last.as_ptr() as usize).checked_sub(start)? as u64;
    if offset >= region.memory.len()
        || last.as_ptr().wrapping_add(last.len() as usize) != span.as_ptr()
    {
        return None;
    }
    region
        .memory
        .span(offset, last.len().checked_add(span.len())?)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use flexblk_reactor::HugePages;
    use std::os::fd::OwnedFd;

    pub(crate) fn file(bytes: u64) -> OwnedFd {
        let memory = SharedMemory::create("guest", bytes, HugePages::No).unwrap();
        memory.fd().unwrap().try_clone_to_owned().unwrap()
    }

    pub(crate) fn region(guest: u64, len: u64, user: u64, offset: u64) -> MemoryRegion {
        MemoryRegion {
            guest,
            len,
            user,
            offset,
        }
    }

    #[test]
    fn regions_that_cannot_be_are_refused() {
        let mut memory = GuestMemory::default();
        memory
            .add(region(0x1000, 0x2000, 0, 0), file(0x2000))
            .unwrap();
        for (place, bytes) in [
            (region(0x2fff, 1, 0, 0), 0x1000),
            (region(0, 0x1001, 0, 0), 0x2000),
            (region(0x8000, 0, 0, 0), 0x1000),
            (region(u64::MAX, 2, 0, 0), 0x1000),
            (region(0x8000, 0x1000, u64::MAX, 0), 0x1000),
            (region(0x8000, 0x1000, 0, u64::MAX), 0x1000),
            // Longer than its file.
            (region(0x8000, 0x1001, 0, 0), 0x1000),
            (region(0x8000, 0x1000, 0, 0x1000), 0x1000),
        ] {
            assert!(memory.add(place, file(bytes)).is_err(), "{place:?}");
        }
        assert!(memory.remove(&region(0x1000, 0x1000, 0, 0)).is_err());
        memory.remove(&region(0x1000, 0x2000, 0, 0)).unwrap();
        assert_eq!(memory.mappings().count(), 0);
        for slot in 0..MAX_SLOTS as u64 {
            memory
                .add(region(slot << 12, 0x1000, 0, 0), file(0x1000))
                .unwrap();
        }
        let one_more = memory.add(region(1 << 40, 0x1000, 0, 0), file(0x1000));
        assert!(matches!(one_more, Err(MemoryError::TooMany)));
    }

    #[test]
    fn addresses_lead_to_bytes_and_neighbours_become_one() {
        let mut memory = GuestMemory::default();
        memory
            .add(region(0x10_0000, 0x2000, 0x7000_0000, 0x1000), file(0x3000))
            .unwrap();
        memory
            .add(region(0x10_2000, 0x1000, 0x8000_0000, 0), file(0x1000))
            .unwrap();
        let cells = memory.user(0x7000_0010, 4, 4).unwrap();
        cells.write(0, b"ring");
        assert_eq!(&memory.guest(0x10_0010, 4).unwrap().read::<4>(0), b"ring");
        assert!(memory.user(0x7000_1ffd, 4, 1).is_none());
        assert!(memory.user(0x7000_0001, 4, 4).is_none());
        let mut spans = Vec::new();
        assert!(memory.spans(0x10_0000, 0x800, &mut spans));
        assert!(memory.spans(0x10_0800, 0x800, &mut spans));
        assert_eq!((spans.len(), spans[0].len()), (1, 0x1000));
        // Over the border of two regions, which are neighbours only for the guest.
        assert!(memory.spans(0x10_1000, 0x2000, &mut spans));
        assert_eq!(
            spans.iter().map(Span::len).collect::<Vec<_>>(),
            [0x2000, 0x1000]
        );
        assert!(!memory.spans(0x10_2800, 0x1000, &mut spans));
        assert!(!memory.spans(u64::MAX, 1, &mut spans));
    }
}
