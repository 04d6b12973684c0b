//! Registered memory of a queue, found by address.

use std::sync::Arc;

use flexblk_reactor::{SharedMemory, Span};

use crate::RegionId;

/// Regions are few (an application registers its pools): a scan beats a tree.
pub(crate) const MAX_REGIONS: usize = 64;

struct Region<K> {
    id: RegionId,
    start: usize,
    len: usize,
    /// `None`: known, but out of the transport's reach.
    key: Option<K>,
    /// Shared memory that stays mapped with us.
    _memory: Option<Arc<SharedMemory>>,
}

/// The regions of one queue, each with the transport's key for it.
pub(crate) struct Regions<K> {
    regions: Vec<Region<K>>,
    next_id: u32,
    /// Where the last look-up ended: almost always right again.
    last: usize,
}

impl<K: Copy> Regions<K> {
    pub(crate) fn new() -> Regions<K> {
        Regions {
            regions: Vec::with_capacity(MAX_REGIONS),
            next_id: 0,
            last: 0,
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.regions.len() >= MAX_REGIONS
    }

    pub(crate) fn insert(
        &mut self,
        start: usize,
        len: usize,
        key: Option<K>,
        memory: Option<Arc<SharedMemory>>,
    ) -> RegionId {
        let id = RegionId(self.next_id);
        self.next_id = self.next_id.wrapping_add(1);
        self.regions.push(Region {
            id,
            start,
            len,
            key,
            _memory: memory,
        });
        id
    }

    /// The extent of a region.
    pub(crate) fn extent(&self, id: RegionId) -> Option<std::ops::Range<usize>> {
        let region = self.regions.iter().find(|r| r.id == id)?;
        Some(region.start..region.start.saturating_add(region.len))
    }

    pub(crate) fn key(&self, id: RegionId) -> Option<K> {
        self.regions.iter().find(|r| r.id == id)?.key
    }

    /// Forgets a region; shared memory may be unmapped by this.
    pub(crate) fn remove(&mut self, id: RegionId) {
        self.regions.retain(|r| r.id != id);
        self.last = 0;
    }

    /// The key of the region that holds all of `span`.
    pub(crate) fn find(&mut self, span: Span) -> Option<K> {
        let (start, len) = (span.as_ptr() as usize, span.len() as usize);
        let holds = |r: &Region<K>| {
            start
                .checked_sub(r.start)
                .is_some_and(|offset| len <= r.len && offset <= r.len - len)
        };
        if let Some(region) = self.regions.get(self.last)
            && holds(region)
        {
            return region.key;
        }
        let at = self.regions.iter().position(holds)?;
        self.last = at;
        self.regions.get(at)?.key
    }
}

#[cfg(test)]
mod tests {
    #![allow(unsafe_code)]
    use super::*;
    use std::ptr::NonNull;

    fn span(memory: &mut [u8]) -> Span {
        // SAFETY: the vectors of the test outlive their spans, and nothing accesses them.
        unsafe { Span::from_raw_parts(NonNull::from(&mut *memory).cast(), memory.len() as u32) }
    }

    fn insert(regions: &mut Regions<char>, span: Span, key: Option<char>) -> RegionId {
        regions.insert(span.as_ptr() as usize, span.len() as usize, key, None)
    }

    #[test]
    fn a_span_is_found_only_when_all_of_it_is_registered() {
        let (mut a, mut b, mut c) = (vec![0u8; 4096], vec![0u8; 8192], vec![0u8; 16]);
        let (a, b, c) = (span(&mut a), span(&mut b), span(&mut c));
        let mut regions = Regions::new();
        let id_a = insert(&mut regions, a, Some('a'));
        insert(&mut regions, b.sub(1024, 4096).unwrap(), Some('b'));
        assert_eq!(regions.find(a), Some('a'));
        assert_eq!(regions.find(a.sub(4095, 1).unwrap()), Some('a'));
        assert_eq!(regions.find(b), None);
        assert_eq!(regions.find(b.sub(1024, 4096).unwrap()), Some('b'));
        assert_eq!(regions.find(b.sub(1023, 4).unwrap()), None);
        assert_eq!(regions.find(b.sub(5119, 2).unwrap()), None);
        assert_eq!(regions.find(c), None);
        assert_eq!(regions.key(id_a), Some('a'));
        regions.remove(id_a);
        assert_eq!(regions.find(a), None);
        assert_eq!((regions.key(id_a), regions.extent(id_a)), (None, None));
        insert(&mut regions, c, None);
        assert_eq!(regions.find(c), None);
        assert_eq!(regions.find(b.sub(1024, 1).unwrap()), Some('b'));
    }
}
