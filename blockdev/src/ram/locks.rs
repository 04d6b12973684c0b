//! Keeps a block from being read half-written, for a RAM device that several threads have open.
//!
//! One spin lock per stripe of 4 KiB units, held while at most one unit is copied. NVMe promises that
//! a write of one logical block is atomic (AWUN is 0's based, NVM Command Set specification,
//! atomic operation), and a unit is a whole number of blocks. The lock is taken always, also by the only
//! thread: taking it only when a second thread appears would leave a gap at the change. Measured
//! (disturbed machine, one run): lock and unlock 28 ns, a 4 KiB read or write 290 to 420 ns.

use std::{
    ops::Range,
    sync::atomic::{AtomicBool, Ordering},
};

/// Bytes guarded by one lock.
pub(super) const UNIT_BYTES: u64 = 4096;

/// 256 x 64 bytes: small enough to stay in the first-level cache, and with a lock held for a tenth
/// of the time of an I/O, 16 threads meet on one in fewer than 1 of 100 I/Os.
const STRIPES: usize = 256;

/// Looks at a taken lock before the thread gives its core away: the holder may have lost its own.
const SPINS: u32 = 128;

#[repr(align(64))]
#[derive(Debug, Default)]
struct Stripe(AtomicBool);

#[derive(Debug)]
pub(super) struct Locks(Box<[Stripe; STRIPES]>);

impl Locks {
    pub(super) fn new() -> Self {
        Self(Box::new(std::array::from_fn(|_| Stripe::default())))
    }

    /// Locks one unit.
    pub(super) fn one(&self, unit: u64) -> Guard<'_> {
        let first = (unit % STRIPES as u64) as usize;
        self.lock(first, 1)
    }

    /// Locks a range of units.
    ///
    /// The stripes are taken in the order of their index, and nobody asks for one while holding
    /// others in another order, so nobody waits in a circle.
    pub(super) fn many(&self, units: Range<u64>) -> Guard<'_> {
        let count = units.end.saturating_sub(units.start);
        let first = (units.start % STRIPES as u64) as usize;
        if count as usize + first > STRIPES || count > STRIPES as u64 {
            return self.lock(0, STRIPES); // wraps around: simply all
        }
        self.lock(first, count as usize)
    }

    fn lock(&self, first: usize, count: usize) -> Guard<'_> {
        let stripes = self.0.get(first..first + count).unwrap_or_default();
        for stripe in stripes {
            stripe.lock();
        }
        Guard(stripes)
    }
}

impl Stripe {
    #[inline]
    fn lock(&self) {
        if self.0.swap(true, Ordering::Acquire) {
            self.wait();
        }
    }

    #[cold]
    fn wait(&self) {
        loop {
            for _ in 0..SPINS {
                if !self.0.load(Ordering::Relaxed) && !self.0.swap(true, Ordering::Acquire) {
                    return;
                }
                std::hint::spin_loop();
            }
            std::thread::yield_now();
        }
    }
}

/// Unlocks on drop.
#[derive(Debug)]
pub(super) struct Guard<'a>(&'a [Stripe]);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        for stripe in self.0 {
            stripe.0.store(false, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn one_and_many_exclude_each_other() {
        const ROUNDS: u64 = 32_000;
        let locks = Locks::new();
        let cells: Vec<AtomicU64> = (0..128).map(|_| AtomicU64::new(0)).collect();
        let start = std::sync::Barrier::new(4);
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (locks, cells, start) = (&locks, &cells, &start);
                scope.spawn(move || {
                    start.wait();
                    for round in 0..ROUNDS {
                        let unit = round.wrapping_mul(7).wrapping_add(thread) % 8;
                        let units = if round % 16 == 0 {
                            unit..unit + 100
                        } else {
                            unit..unit + 1
                        };
                        let _guard = match round % 16 {
                            0 => locks.many(units.clone()),
                            _ => locks.one(unit),
                        };
                        for cell in &cells[units.start as usize..units.end as usize] {
                            // not atomic as a whole: loses counts unless the lock excludes
                            let value = cell.load(Ordering::Relaxed);
                            std::hint::spin_loop();
                            cell.store(value + 1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let sum: u64 = cells.iter().map(|cell| cell.load(Ordering::Relaxed)).sum();
        let many = ROUNDS / 16;
        assert_eq!(sum, 4 * (ROUNDS - many + many * 100));
    }
}
