//! Writes that may still be carried out by a path that is lost, and must not overtake newer ones.
//!
//! When a connection is lost with writes outstanding, nobody knows whether the target has them: it may carry one out
//! later. Each is issued again on another path at once, which does no harm: the same bytes to the same blocks. Harm
//! comes only from a *newer* write to these blocks that the old copy overwrites. So a lost write leaves its range here,
//! and what would change these blocks waits until the old copy can no longer be carried out. Reads and all other
//! writes go on.
//!
//! One fence is common to all channels of a volume: the newer write may come by another thread. While nothing is fenced,
//! a write costs one load of an atomic.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Ranges at most. Beyond, all become one that covers the namespace: late, but never wrong.
const MAX_RANGES: usize = 4096;

/// The fence of a volume.
#[derive(Debug, Default)]
pub(crate) struct Fence {
    /// How many ranges there are.
    count: AtomicUsize,
    owners: AtomicU64,
    ranges: Mutex<Vec<Fenced>>,
}

/// Who a lost write is: its new copies do not wait for its old ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner(u64);

impl Owner {
    /// Nobody: a request that was never lost.
    pub(crate) const NONE: Owner = Owner(0);
}

#[derive(Clone, Copy, Debug)]
struct Fenced {
    first: u64,
    /// The block behind the last.
    end: u64,
    owner: Owner,
    until: Instant,
}

impl Fence {
    /// A name for a request that was lost.
    pub(crate) fn owner(&self) -> Owner {
        Owner(self.owners.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Whether anything may be fenced. What the caller knows to have happened is seen.
    #[inline]
    pub(crate) fn is_active(&self) -> bool {
        self.count.load(Ordering::Acquire) != 0
    }

    /// A lost request may change `blocks` blocks from `first` until then.
    pub(crate) fn add(&self, first: u64, blocks: u32, owner: Owner, until: Instant) {
        let mut ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        if ranges.len() >= MAX_RANGES {
            let until = ranges
                .iter()
                .fold(until, |latest, range| latest.max(range.until));
            tracing::warn!("too many lost writes at once: all writes wait for them");
            ranges.clear();
            ranges.push(Fenced {
                first: 0,
                end: u64::MAX,
                owner: Owner::NONE,
                until,
            });
        } else {
            ranges.push(Fenced {
                first,
                end: first.saturating_add(blocks.into()),
                owner,
                until,
            });
        }
        self.count.store(ranges.len(), Ordering::Release);
    }

    /// Until when a request of `owner` that changes these blocks has to wait; `None`: not at all.
    pub(crate) fn holds(
        &self,
        first: u64,
        blocks: u32,
        owner: Owner,
        now: Instant,
    ) -> Option<Instant> {
        let end = first.saturating_add(blocks.into());
        let mut ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        ranges.retain(|range| range.until > now);
        self.count.store(ranges.len(), Ordering::Release);
        ranges
            .iter()
            .filter(|range| range.first < end && first < range.end)
            .filter(|range| owner == Owner::NONE || range.owner != owner)
            .map(|range| range.until)
            .max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn only_others_that_overlap_wait_and_only_so_long() {
        let (fence, now) = (Fence::default(), Instant::now());
        assert!(!fence.is_active());
        let (lost, until) = (fence.owner(), now + Duration::from_secs(1));
        fence.add(10, 5, lost, until);
        assert!(fence.is_active());
        for (first, blocks, waits) in [(0, 10, false), (0, 11, true), (14, 1, true), (15, 9, false)]
        {
            let held = fence.holds(first, blocks, Owner::NONE, now);
            assert_eq!(held, waits.then_some(until), "{first}+{blocks}");
        }
        assert_eq!(fence.holds(10, 5, lost, now), None, "its own copy");
        assert_eq!(fence.holds(10, 5, fence.owner(), now), Some(until));
        assert_eq!(fence.holds(10, 5, Owner::NONE, until), None);
        assert!(!fence.is_active());
    }

    #[test]
    fn too_many_fence_everything() {
        let (fence, now) = (Fence::default(), Instant::now());
        let until = now + Duration::from_secs(1);
        for lba in 0..=MAX_RANGES as u64 {
            fence.add(lba, 1, fence.owner(), until);
        }
        assert_eq!(fence.holds(1 << 40, 1, Owner::NONE, now), Some(until));
    }
}
