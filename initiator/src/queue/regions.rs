//! Registered memory of a queue, found by address.

use flexblk_reactor::Span;

use crate::RegionId;

/// Regions are few (an application registers its pools): a scan beats a tree.
pub(crate) const MAX_REGIONS: usize = 64;

struct Region<K> {
    id: RegionId,
    start: usize,
    len: usize,
    key: K,
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

    pub(crate) fn insert(&mut self, memory: Span, key: K) -> RegionId {
        let id = RegionId(self.next_id);
        self.next_id = self.next_id.wrapping_add(1);
        self.regions.push(Region {
            id,
            start: memory.as_ptr() as usize,
            len: memory.len() as usize,
            key,
        });
        id
    }

    /// The extent of a region.
    pub(crate) fn extent(&self, id: RegionId) -> Option<std::ops::Range<usize>> {
        self.regions
            .iter()
            .find(|r| r.id == id)
            .map(|r| r.start..r.start.saturating_add(r.len))
    }

    pub(crate) fn remove(&mut self, id: RegionId) -> Option<K> {
        let at = self.regions.iter().position(|r| r.id == id)?;
        self.last = 0;
        Some(self.regions.swap_remove(at).key)
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
            return Some(region.key);
        }
        let at = self.regions.iter().position(holds)?;
        self.last = at;
        self.regions.get(at).map(|r| r.key)
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

    #[test]
    fn a_span_is_found_only_when_all_of_it_is_registered() {
        let (mut a, mut b, mut c) = (vec![0u8; 4096], vec![0u8; 8192], vec![0u8; 16]);
        let (a, b, c) = (span(&mut a), span(&mut b), span(&mut c));
        let mut regions = Regions::new();
        let id_a = regions.insert(a, 'a');
        regions.insert(b.sub(1024, 4096).unwrap(), 'b');
        assert_eq!(regions.find(a), Some('a'));
        assert_eq!(regions.find(a.sub(4095, 1).unwrap()), Some('a'));
        assert_eq!(regions.find(b), None);
        assert_eq!(regions.find(b.sub(1024, 4096).unwrap()), Some('b'));
        assert_eq!(regions.find(b.sub(1023, 4).unwrap()), None);
        assert_eq!(regions.find(b.sub(5119, 2).unwrap()), None);
        assert_eq!(regions.find(c), None);
        assert_eq!(regions.remove(id_a), Some('a'));
        assert_eq!(regions.find(a), None);
        assert_eq!(regions.remove(id_a), None);
        assert_eq!(regions.find(b.sub(1024, 1).unwrap()), Some('b'));
    }
}
