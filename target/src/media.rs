//! Blocks that a host has declared unreadable with Write Uncorrectable (NVM 3.3.7), until they are
//! written again.
//!
//! All threads and all namespaces of a device share the marks; what an I/O pays while there are none is
//! one load. No backend of ours can store them. Where the target has a file for what has to survive
//! ([`crate::ptpl`]), those of devices whose data outlives it are kept there: the control thread alone
//! changes them, saves them first, and then they are in force and the host has its answer. A write over
//! marked blocks is forced to the medium before its marks go, so that a power loss shows the mark or the
//! new data, never the data of before. All other marks live as long as their device is open.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use uuid::Uuid;

use crate::association::lock;

/// Ranges that a device can have marked: bounds the memory that hosts can take.
pub const MAX_RANGES: usize = 4096;
/// Ranges that all devices together have in the file, when nothing new is marked any more.
pub(crate) const MAX_KEPT_RANGES: usize = 65_536;

/// The unreadable blocks of a device.
#[derive(Debug, Default)]
pub struct Media {
    any: AtomicBool,
    ranges: Mutex<Ranges>,
    /// The device whose marks are kept.
    kept: Option<Uuid>,
}

/// There are too many ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a device can have {MAX_RANGES} ranges of uncorrectable blocks")]
pub struct Full;

impl Media {
    fn kept(uuid: Uuid, ranges: Ranges) -> Self {
        let media = Self {
            kept: Some(uuid),
            ..Self::default()
        };
        media.replace(ranges);
        media
    }

    /// The device whose marks are kept, and changed by the control thread alone; `None` when marks go
    /// with the target.
    pub(crate) fn keeper(&self) -> Option<Uuid> {
        self.kept
    }

    /// Is any block marked?
    #[inline]
    #[must_use]
    pub fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Marks blocks as unreadable.
    pub fn mark(&self, lba: u64, blocks: u32) -> Result<(), Full> {
        self.change(|ranges| ranges.mark(lba, blocks))
    }

    /// Blocks were written: they can be read again.
    pub fn rewritten(&self, lba: u64, blocks: u32) -> Result<(), Full> {
        self.change(|ranges| ranges.rewritten(lba, blocks))
    }

    fn change(&self, change: impl FnOnce(&mut Ranges) -> Result<(), Full>) -> Result<(), Full> {
        let mut ranges = lock(&self.ranges);
        change(&mut ranges)?;
        self.any
            .store(!ranges.by_start.is_empty(), Ordering::Release);
        Ok(())
    }

    /// Is one of the blocks marked?
    #[must_use]
    pub fn is_marked(&self, lba: u64, blocks: u32) -> bool {
        lock(&self.ranges).overlaps(lba, lba.saturating_add(blocks.into()))
    }

    /// All of them.
    pub(crate) fn ranges(&self) -> Ranges {
        lock(&self.ranges).clone()
    }

    /// Puts others in their place.
    pub(crate) fn replace(&self, with: Ranges) {
        let mut ranges = lock(&self.ranges);
        self.any.store(!with.by_start.is_empty(), Ordering::Release);
        *ranges = with;
    }
}

/// The marks that are kept, by their device, whether it is open or not.
#[derive(Debug, Default)]
pub(crate) struct KeptMedia(Mutex<BTreeMap<Uuid, Arc<Media>>>);

impl KeptMedia {
    /// As they were saved.
    pub(crate) fn restored(saved: impl Iterator<Item = (Uuid, Ranges)>) -> Self {
        let media = saved.map(|(uuid, ranges)| (uuid, Arc::new(Media::kept(uuid, ranges))));
        Self(Mutex::new(media.collect()))
    }

    /// The marks of a device.
    pub(crate) fn of(&self, uuid: Uuid) -> Arc<Media> {
        let mut all = lock(&self.0);
        all.retain(|_, media| media.any() || Arc::strong_count(media) > 1);
        let media = all.entry(uuid);
        let media = media.or_insert_with(|| Arc::new(Media::kept(uuid, Ranges::default())));
        Arc::clone(media)
    }
}

/// Disjoint ranges that do not touch: start and end (exclusive).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges {
    by_start: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Ranges (first block, number of blocks) as [`Ranges::list`] gave them; `None` for others.
    pub(crate) fn restore(list: &[(u64, u64)]) -> Option<Self> {
        let mut ranges = Self::default();
        let mut free_from = 0;
        for (start, blocks) in list {
            let end = start.checked_add(*blocks)?;
            if *blocks == 0 || *start < free_from || ranges.by_start.len() >= MAX_RANGES {
                return None;
            }
            free_from = end.checked_add(1)?;
            ranges.by_start.insert(*start, end);
        }
        Some(ranges)
    }

    /// First block and number of blocks of each, in ascending order.
    pub(crate) fn list(&self) -> Vec<(u64, u64)> {
        let ranges = self.by_start.iter();
        ranges.map(|(start, end)| (*start, end - start)).collect()
    }

    pub(crate) fn mark(&mut self, lba: u64, blocks: u32) -> Result<(), Full> {
        if self.by_start.len() >= MAX_RANGES {
            return Err(Full);
        }
        self.insert(lba, lba.saturating_add(blocks.into()));
        Ok(())
    }

    /// Refused when that would make one range too many of a long one.
    pub(crate) fn rewritten(&mut self, lba: u64, blocks: u32) -> Result<(), Full> {
        let end = lba.saturating_add(blocks.into());
        let around = self.by_start.range(..lba).next_back();
        if self.by_start.len() >= MAX_RANGES && around.is_some_and(|(_, to)| *to > end) {
            return Err(Full);
        }
        self.remove(lba, end);
        Ok(())
    }

    fn overlaps(&self, start: u64, end: u64) -> bool {
        let last = self.by_start.range(..end).next_back();
        last.is_some_and(|(_, last_end)| *last_end > start)
    }

    /// Cuts `start..end` out.
    fn remove(&mut self, start: u64, end: u64) {
        while let Some((&from, &to)) = self.by_start.range(..end).next_back() {
            if to <= start || start >= end {
                return;
            }
            self.by_start.remove(&from);
            if to > end {
                self.by_start.insert(end, to);
            }
            if from < start {
                self.by_start.insert(from, start);
                return;
            }
        }
    }

    fn insert(&mut self, start: u64, end: u64) {
        self.remove(start, end);
        let (mut start, mut end) = (start, end);
        // Neighbours become one range.
        if let Some((&from, &to)) = self.by_start.range(..start).next_back()
            && to == start
        {
            self.by_start.remove(&from);
            start = from;
        }
        if let Some(to) = self.by_start.remove(&end) {
            end = to;
        }
        if start < end {
            self.by_start.insert(start, end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a model with a mark for each block.
        #[test]
        fn as_one_mark_for_each_block(steps in proptest::collection::vec((any::<bool>(), 0u64..64, 0u32..20), 0..60)) {
            let media = Media::default();
            let mut model = [false; 100];
            for (mark, lba, blocks) in steps {
                let range = lba as usize..lba as usize + blocks as usize;
                model[range].fill(mark);
                if mark {
                    media.mark(lba, blocks).unwrap();
                } else {
                    media.rewritten(lba, blocks).unwrap();
                }
                let kept = Ranges::restore(&media.ranges().list());
                prop_assert_eq!(kept, Some(media.ranges()));
                prop_assert_eq!(media.any(), model.contains(&true));
                for (at, marked) in model.iter().enumerate() {
                    prop_assert_eq!(media.is_marked(at as u64, 1), *marked, "block {}", at);
                }
                prop_assert_eq!(media.is_marked(0, 100), model.contains(&true));
                let pieces = model.windows(2).filter(|pair| !pair[0] && pair[1]).count() + usize::from(model[0]);
                prop_assert_eq!(lock(&media.ranges).by_start.len(), pieces);
            }
        }
    }

    #[test]
    fn ranges_are_bounded() {
        let media = Media::default();
        for range in 0..MAX_RANGES as u64 {
            media.mark(range * 4, 3).unwrap();
        }
        assert_eq!(media.mark(u64::MAX, 1), Err(Full));
        assert_eq!(media.rewritten(1, 1), Err(Full), "one would become two");
        assert!(media.is_marked(1, 1));
        for (lba, blocks) in [(4, 1), (10, 1), (12, 3), (0, u32::MAX)] {
            media.rewritten(lba, blocks).unwrap();
        }
        assert!(media.mark(u64::MAX, 1).is_ok() && !media.is_marked(0, 100));
    }
    #[test]
    fn what_cannot_have_been_saved() {
        for list in [
            &[(5, 0)][..],
            &[(5, 2), (4, 1)],
            &[(5, 2), (7, 1)],
            &[(u64::MAX, 2)],
        ] {
            assert_eq!(Ranges::restore(list), None, "{list:?}");
        }
        let many: Vec<(u64, u64)> = (0..=MAX_RANGES as u64).map(|n| (n * 2, 1)).collect();
        assert_eq!(Ranges::restore(&many), None);
        assert!(Ranges::restore(&many[1..]).is_some());
    }

    /// A device that is closed and opened again has its marks; one without any is forgotten.
    #[test]
    fn marks_outlive_their_device() {
        let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let saved = Ranges::restore(&[(8, 4)]).unwrap();
        let kept = KeptMedia::restored([(one, saved)].into_iter());
        assert!(kept.of(one).is_marked(11, 1) && !kept.of(other).any());
        let open = kept.of(other);
        open.mark(1, 1).unwrap();
        drop(open);
        assert!(kept.of(other).is_marked(1, 1));
        kept.of(one).replace(Ranges::default());
        kept.of(other);
        assert_eq!(lock(&kept.0).len(), 1);
    }
}
