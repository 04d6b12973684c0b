//! I/O buffers of one worker: powers of two out of one shared memory with a fixed budget.

use std::sync::Arc;

use flexblk_reactor::{HugePages, SharedMemory, Span};

use crate::Error;

/// The smallest buffer, one page.
const PAGE_BYTES: u32 = 4096;
/// No page, no order.
const NONE: u32 = u32::MAX;
const NOT_FREE: u8 = u8::MAX;

/// A piece of [`Buffers`]; goes back by [`Buffers::put`]. Dropping it instead loses it.
#[derive(Debug)]
#[must_use = "a buffer that is dropped is lost to its pool"]
pub(crate) struct Buffer {
    page: u32,
    order: u8,
    span: Span,
}

impl Buffer {
    /// Its memory: exactly as long as was asked for.
    pub(crate) fn span(&self) -> Span {
        self.span
    }
}

/// A buddy allocator: a request of 4 KiB costs 4 KiB of the budget, one of a MiB is one piece all the same. Freed
/// neighbours join, and the piece freed last is used first, so the live set stays in the cache.
#[derive(Debug)]
pub(crate) struct Buffers {
    memory: Arc<SharedMemory>,
    /// By page: the order of the free piece that starts there, else [`NOT_FREE`].
    free_order: Vec<u8>,
    /// By page: its neighbours in the list of free pieces of its order.
    links: Vec<(u32, u32)>,
    /// By order: the first free piece.
    heads: Vec<u32>,
    free_pages: u32,
}

impl Buffers {
    /// At most `budget_bytes` (at least one buffer) in pieces of up to `largest_bytes`, rounded down to a power of two.
    pub(crate) fn new(name: &str, budget_bytes: u64, largest_bytes: u32) -> Result<Buffers, Error> {
        let top_order = (largest_bytes / PAGE_BYTES).max(1).ilog2();
        let top_pages = 1_u32 << top_order;
        let top_bytes = u64::from(top_pages) * u64::from(PAGE_BYTES);
        let pieces = (budget_bytes / top_bytes).clamp(1, u64::from((u32::MAX - 1) / top_pages));
        let pages = pieces as u32 * top_pages;
        let memory = SharedMemory::create(
            name,
            u64::from(pages) * u64::from(PAGE_BYTES),
            HugePages::No,
        )
        .map_err(|e| Error::Transport(format!("allocating I/O buffers: {e}")))?;
        let mut buffers = Buffers {
            memory,
            free_order: vec![NOT_FREE; pages as usize],
            links: vec![(NONE, NONE); pages as usize],
            heads: vec![NONE; top_order as usize + 1],
            free_pages: pages,
        };
        for piece in (0..pieces as u32).rev() {
            buffers.push(piece * top_pages, top_order as u8);
        }
        Ok(buffers)
    }

    /// All of it, to be registered with the channel.
    pub(crate) fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    /// The longest buffer there is.
    pub(crate) fn largest_bytes(&self) -> u32 {
        PAGE_BYTES << self.top_order()
    }

    /// All bytes of the pool.
    pub(crate) fn budget_bytes(&self) -> u64 {
        self.memory.len()
    }

    /// Bytes that are free, though perhaps not in one piece.
    #[cfg(test)]
    pub(crate) fn free_bytes(&self) -> u64 {
        u64::from(self.free_pages) * u64::from(PAGE_BYTES)
    }

    /// A buffer of `len_bytes`, 1 up to [`largest_bytes`](Self::largest_bytes).
    pub(crate) fn take(&mut self, len_bytes: u32) -> Option<Buffer> {
        if len_bytes == 0 || len_bytes > self.largest_bytes() {
            return None;
        }
        let order = len_bytes.div_ceil(PAGE_BYTES).next_power_of_two().ilog2() as u8;
        let found = (order..=self.top_order()).find(|at| self.head(*at) != NONE)?;
        let page = self.head(found);
        let offset = u64::from(page) * u64::from(PAGE_BYTES);
        let span = self.memory.span(offset, len_bytes)?;
        self.unlink(page, found);
        for half in (order..found).rev() {
            self.push(page + (1 << half), half);
        }
        self.free_pages -= 1 << order;
        Some(Buffer { page, order, span })
    }

    /// Buffers for `len_bytes` together, appended to `out`: all of them or none.
    pub(crate) fn take_all(&mut self, len_bytes: u64, out: &mut Vec<Buffer>) -> bool {
        let before = out.len();
        let mut left = len_bytes;
        while left > 0 {
            let len = left.min(u64::from(self.largest_bytes())) as u32;
            let Some(buffer) = self.take(len) else {
                for buffer in out.drain(before..) {
                    self.put(buffer);
                }
                return false;
            };
            out.push(buffer);
            left -= u64::from(len);
        }
        true
    }

    /// A buffer of this pool comes back.
    pub(crate) fn put(&mut self, buffer: Buffer) {
        let Buffer {
            mut page,
            mut order,
            ..
        } = buffer;
        self.free_pages += 1 << order;
        while order < self.top_order() {
            let buddy = page ^ (1 << order);
            if self.free_order.get(buddy as usize) != Some(&order) {
                break;
            }
            self.unlink(buddy, order);
            page &= !(1 << order);
            order += 1;
        }
        self.push(page, order);
    }

    fn top_order(&self) -> u8 {
        (self.heads.len() - 1) as u8
    }

    fn head(&self, order: u8) -> u32 {
        self.heads.get(usize::from(order)).copied().unwrap_or(NONE)
    }

    fn push(&mut self, page: u32, order: u8) {
        let next = self.head(order);
        if let Some(link) = self.links.get_mut(page as usize) {
            *link = (NONE, next);
        }
        if let Some((previous, _)) = self.links.get_mut(next as usize) {
            *previous = page;
        }
        if let Some(head) = self.heads.get_mut(usize::from(order)) {
            *head = page;
        }
        if let Some(free) = self.free_order.get_mut(page as usize) {
            debug_assert_eq!(*free, NOT_FREE, "returned twice");
            *free = order;
        }
    }

    fn unlink(&mut self, page: u32, order: u8) {
        let (previous, next) = self
            .links
            .get(page as usize)
            .copied()
            .unwrap_or((NONE, NONE));
        if let Some((_, after)) = self.links.get_mut(previous as usize) {
            *after = next;
        } else if let Some(head) = self.heads.get_mut(usize::from(order)) {
            *head = next;
        }
        if let Some((before, _)) = self.links.get_mut(next as usize) {
            *before = previous;
        }
        if let Some(free) = self.free_order.get_mut(page as usize) {
            *free = NOT_FREE;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn freed_neighbours_join_and_the_last_freed_is_used_first() {
        let mut buffers = Buffers::new("test", 1 << 20, 256 << 10).unwrap();
        assert_eq!(
            (buffers.largest_bytes(), buffers.budget_bytes()),
            (256 << 10, 1 << 20)
        );
        let small: Vec<_> = std::iter::from_fn(|| buffers.take(4096)).collect();
        assert_eq!((small.len(), buffers.free_bytes()), (256, 0));
        small.into_iter().for_each(|buffer| buffers.put(buffer));
        let mut large = Vec::new();
        assert!(buffers.take_all(1 << 20, &mut large));
        assert_eq!(large.len(), 4);
        large.into_iter().for_each(|buffer| buffers.put(buffer));
        let first = buffers.take(512).unwrap();
        assert_eq!(first.span().len(), 512);
        let address = first.span().as_ptr();
        buffers.put(first);
        let again = buffers.take(4000).unwrap();
        assert_eq!(again.span().as_ptr(), address);
        buffers.put(again);
    }

    #[test]
    fn what_cannot_be_had_whole_is_not_taken_in_part() {
        let mut buffers = Buffers::new("test", 0, 100_000).unwrap();
        assert_eq!(buffers.budget_bytes(), 65536, "one buffer, a power of two");
        let mut out = Vec::new();
        assert!(!buffers.take_all(65537, &mut out));
        assert!(out.is_empty());
        assert_eq!(buffers.free_bytes(), 65536);
        assert!(buffers.take(0).is_none() && buffers.take(65537).is_none());
        assert!(buffers.take_all(0, &mut out));
    }

    proptest! {
        /// Whatever is taken and given back: no two buffers overlap, none leaves the memory, and at the end all of it
        /// is there in its largest pieces.
        #[test]
        fn buffers_never_overlap(steps in proptest::collection::vec((any::<bool>(), 1_u32..70_000, any::<prop::sample::Index>()), 1..200)) {
            let mut buffers = Buffers::new("test", 512 << 10, 64 << 10).unwrap();
            let start = buffers.memory().as_ptr() as usize;
            let mut live: Vec<Buffer> = Vec::new();
            for (give, len, which) in steps {
                if give && !live.is_empty() {
                    let index = which.index(live.len());
                    buffers.put(live.swap_remove(index));
                } else if let Some(buffer) = buffers.take(len) {
                    prop_assert_eq!(buffer.span().len(), len);
                    let at = buffer.span().as_ptr() as usize;
                    prop_assert!(at >= start && at + len as usize <= start + (512 << 10));
                    for other in &live {
                        let from = other.span().as_ptr() as usize;
                        let to = from + other.span().len() as usize;
                        prop_assert!(at >= to || at + len as usize <= from);
                    }
                    live.push(buffer);
                } else {
                    prop_assert!(len > 64 << 10 || buffers.free_bytes() < 512 << 10);
                }
            }
            live.drain(..).for_each(|buffer| buffers.put(buffer));
            prop_assert_eq!(buffers.free_bytes(), 512 << 10);
            prop_assert!(buffers.take_all(512 << 10, &mut live));
        }
    }
}
