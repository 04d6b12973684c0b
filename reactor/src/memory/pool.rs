//! Equal buffers out of one region, allocated at start.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::{Error, SharedMemory, Span};

/// In which order freed buffers are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Order {
    /// The last one freed first: the live set stays in the cache.
    #[default]
    LastFreedFirst,
    /// The one freed longest ago first: the classic ring, which walks through all of its memory.
    Fifo,
}

/// A buffer out of a [`Pool`]; goes back by [`Pool::put`]. Dropping it instead loses it.
#[derive(Debug)]
#[must_use = "a buffer that is dropped is lost to its pool"]
pub struct Buffer {
    index: u32,
    span: Span,
}

impl Buffer {
    /// Its number in the pool: 0 up to the pool's count.
    #[must_use]
    pub const fn index(&self) -> u32 {
        self.index
    }

    /// Its memory.
    #[must_use]
    pub const fn span(&self) -> Span {
        self.span
    }
}

/// A fixed number of equal buffers of one thread.
#[derive(Debug)]
pub struct Pool {
    memory: Arc<SharedMemory>,
    free: VecDeque<u32>,
    order: Order,
    buffer_len: u32,
    count: u32,
}

impl Pool {
    /// `count` buffers of `buffer_len` bytes laid out from the start of `memory`.
    ///
    /// # Errors
    /// [`Error::Argument`] when they do not fit.
    pub fn new(
        memory: Arc<SharedMemory>,
        buffer_len: u32,
        count: u32,
        order: Order,
    ) -> Result<Self, Error> {
        if buffer_len == 0 || u64::from(buffer_len) * u64::from(count) > memory.len() {
            return Err(Error::Argument(
                "the pool's buffers do not fit into its memory",
            ));
        }
        let mut free: VecDeque<u32> = (0..count).collect();
        if order == Order::LastFreedFirst {
            free.make_contiguous().reverse();
        }
        Ok(Self {
            memory,
            free,
            order,
            buffer_len,
            count,
        })
    }

    /// A free buffer.
    pub fn take(&mut self) -> Option<Buffer> {
        let index = match self.order {
            Order::LastFreedFirst => self.free.pop_back(),
            Order::Fifo => self.free.pop_front(),
        }?;
        let span = self.span_of(index)?;
        Some(Buffer { index, span })
    }

    /// Returns a buffer of this pool.
    pub fn put(&mut self, buffer: Buffer) {
        debug_assert_eq!(
            self.span_of(buffer.index),
            Some(buffer.span),
            "not of this pool"
        );
        debug_assert!(self.free.len() < self.count as usize, "returned twice");
        self.free.push_back(buffer.index);
    }

    /// Free buffers.
    #[must_use]
    pub fn available(&self) -> u32 {
        self.free.len() as u32
    }

    /// All buffers.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Bytes of each.
    #[must_use]
    pub fn buffer_len(&self) -> u32 {
        self.buffer_len
    }

    /// The region they lie in, for registration.
    #[must_use]
    pub fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    fn span_of(&self, index: u32) -> Option<Span> {
        self.memory.span(
            u64::from(index) * u64::from(self.buffer_len),
            self.buffer_len,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HugePages;

    fn pool(order: Order) -> Pool {
        let memory = SharedMemory::create("pool", 4 * 4096, HugePages::No).unwrap();
        Pool::new(memory, 4096, 4, order).unwrap()
    }

    #[test]
    fn last_freed_first_uses_one_buffer_for_ever() {
        let mut pool = pool(Order::LastFreedFirst);
        let first = pool.take().unwrap();
        assert_eq!(first.index(), 0);
        pool.put(first);
        for _ in 0..10 {
            let buffer = pool.take().unwrap();
            assert_eq!(buffer.index(), 0);
            pool.put(buffer);
        }
    }

    #[test]
    fn fifo_walks_through_all_buffers() {
        let mut pool = pool(Order::Fifo);
        let seen: Vec<u32> = (0..8)
            .map(|_| {
                let buffer = pool.take().unwrap();
                let index = buffer.index();
                pool.put(buffer);
                index
            })
            .collect();
        assert_eq!(seen, [0, 1, 2, 3, 0, 1, 2, 3]);
    }

    #[test]
    fn an_empty_pool_gives_nothing_and_buffers_do_not_overlap() {
        let mut pool = pool(Order::LastFreedFirst);
        let buffers: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!((buffers.len(), pool.available()), (4, 0));
        for pair in buffers.windows(2) {
            let distance = pair[1].span().as_ptr() as usize - pair[0].span().as_ptr() as usize;
            assert_eq!(distance, 4096);
        }
        buffers.into_iter().for_each(|buffer| pool.put(buffer));
        assert_eq!(pool.available(), 4);
        let memory = Arc::clone(pool.memory());
        assert!(Pool::new(memory, 4097, 4, Order::Fifo).is_err());
    }
}
