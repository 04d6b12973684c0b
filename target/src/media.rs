//! Blocks that a host has declared unreadable with Write Uncorrectable (NVM 3.3.7), until they are
//! written again.
//!
//! No backend of ours can store such a mark, so it lives as long as the target (`docs/operate.md` says
//! so): a file beside the device would have to be on disk with each write over a marked block before
//! that is answered, or a power loss would hide newer data behind an old mark. All threads and all
//! namespaces of a device share it; what an I/O pays while there are none is one load.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::association::lock;

/// Ranges that a device can have marked: bounds the memory that hosts can take.
pub const MAX_RANGES: usize = 4096;

/// The unreadable blocks of a device.
#[derive(Debug, Default)]
pub struct Media {
    any: AtomicBool,
    ranges: Mutex<Ranges>,
}

/// There are too many ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a device can have {MAX_RANGES} ranges of uncorrectable blocks")]
pub struct Full;

impl Media {
    /// Is any block marked?
    #[inline]
    #[must_use]
    pub fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Marks blocks as unreadable.
    pub fn mark(&self, lba: u64, blocks: u32) -> Result<(), Full> {
        let mut ranges = lock(&self.ranges);
        if ranges.by_start.len() >= MAX_RANGES {
            return Err(Full);
        }
        ranges.insert(lba, lba.saturating_add(blocks.into()));
        self.any
            .store(!ranges.by_start.is_empty(), Ordering::Release);
        Ok(())
    }

    /// Blocks were written: they can be read again.
    pub fn rewritten(&self, lba: u64, blocks: u32) {
        let mut ranges = lock(&self.ranges);
        ranges.remove(lba, lba.saturating_add(blocks.into()));
        self.any
            .store(!ranges.by_start.is_empty(), Ordering::Release);
    }

    /// Is one of the blocks marked?
    #[must_use]
    pub fn is_marked(&self, lba: u64, blocks: u32) -> bool {
        lock(&self.ranges).overlaps(lba, lba.saturating_add(blocks.into()))
    }
}

/// Disjoint ranges: start and end (exclusive).
#[derive(Debug, Default)]
struct Ranges {
    by_start: BTreeMap<u64, u64>,
}

impl Ranges {
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
                    media.rewritten(lba, blocks);
                }
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
            media.mark(range * 2, 1).unwrap();
        }
        assert_eq!(media.mark(u64::MAX, 1), Err(Full));
        media.rewritten(0, u32::MAX);
        assert!(media.mark(u64::MAX, 1).is_ok() && !media.is_marked(0, 100));
    }
}
