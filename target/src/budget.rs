//! The memory budget: one number that buffer pools and queues are paid from, so that what a host is
//! promised is what there is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A fixed number of bytes that threads reserve from. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Budget {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    total_bytes: u64,
    used_bytes: AtomicU64,
}

/// Bytes taken from a [`Budget`]; dropping it gives them back.
#[derive(Debug)]
pub struct Reservation {
    inner: Arc<Inner>,
    bytes: u64,
}

impl Budget {
    /// A budget of that many bytes.
    #[must_use]
    pub fn new(total_bytes: u64) -> Self {
        Self {
            inner: Arc::new(Inner {
                total_bytes,
                used_bytes: AtomicU64::new(0),
            }),
        }
    }

    /// Takes `bytes`; `None` when fewer are left.
    #[must_use]
    pub fn reserve(&self, bytes: u64) -> Option<Reservation> {
        let total = self.inner.total_bytes;
        self.inner
            .used_bytes
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(bytes).filter(|sum| *sum <= total)
            })
            .ok()?;
        Some(Reservation {
            inner: Arc::clone(&self.inner),
            bytes,
        })
    }

    /// Takes as many pieces of `piece_bytes` as there are, at most `wanted`. A sixteenth of the budget
    /// is left, so that after a host that took all it could get another can still connect.
    #[must_use]
    pub fn reserve_up_to(&self, wanted: u32, piece_bytes: u64) -> (u32, Option<Reservation>) {
        let spare = self.inner.total_bytes / 16;
        let mut most = wanted;
        loop {
            let fits = self.free_bytes().saturating_sub(spare) / piece_bytes.max(1);
            let count = u32::try_from(fits).unwrap_or(u32::MAX).min(most);
            if count == 0 {
                return (0, None);
            }
            if let Some(reservation) = self.reserve(u64::from(count) * piece_bytes) {
                return (count, Some(reservation));
            }
            // Another thread was faster: ask again for what is left now.
            most = count - 1;
        }
    }

    /// Bytes that the budget has in all.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.inner.total_bytes
    }

    /// Bytes not reserved at the moment.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.inner
            .total_bytes
            .saturating_sub(self.inner.used_bytes.load(Ordering::Relaxed))
    }
}

impl Reservation {
    /// How many bytes it holds.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Moves `bytes` of it into a reservation of their own; `None` when it holds fewer.
    #[must_use]
    pub fn split(&mut self, bytes: u64) -> Option<Reservation> {
        self.bytes = self.bytes.checked_sub(bytes)?;
        Some(Reservation {
            inner: Arc::clone(&self.inner),
            bytes,
        })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.inner
            .used_bytes
            .fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reserved_comes_back() {
        let budget = Budget::new(100);
        let mut a = budget.reserve(60).unwrap();
        assert!(budget.reserve(41).is_none());
        let b = a.split(20).unwrap();
        assert!(a.split(41).is_none());
        drop(a);
        assert_eq!(budget.free_bytes(), 80);
        drop(b);
        assert_eq!(budget.free_bytes(), 100);
        assert!(budget.reserve(u64::MAX).is_none());
    }

    #[test]
    fn as_many_pieces_as_there_are() {
        let budget = Budget::new(100);
        let (count, held) = budget.reserve_up_to(8, 30);
        assert_eq!((count, budget.free_bytes()), (3, 10));
        assert_eq!(budget.reserve_up_to(8, 30).0, 0);
        drop(held);
        assert_eq!(budget.reserve_up_to(2, 30).0, 2);
    }
}
