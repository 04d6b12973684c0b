//! Errors that are put into an error device while it runs: which, for how many I/Os, from what depth on.
//!
//! Whoever injects writes atomics that every channel reads; an I/O of a type with nothing injected pays
//! one load.

use std::{
    num::NonZeroU8,
    sync::atomic::{AtomicU64, Ordering},
};

use crate::IoOp;

/// The I/Os that an injection is for, by SPDK's types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InjectOn {
    /// Reads, compares and verifies.
    Read,
    /// Writes and write zeroes.
    Write,
    /// Discards.
    Unmap,
    /// Flushes.
    Flush,
}

impl InjectOn {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Unmap, Self::Flush];

    const fn of(op: IoOp) -> Self {
        match op {
            IoOp::Read | IoOp::Compare | IoOp::Verify => Self::Read,
            IoOp::Write { .. } | IoOp::WriteZeroes { .. } => Self::Write,
            IoOp::Discard => Self::Unmap,
            IoOp::Flush => Self::Flush,
        }
    }
}

/// What happens to an I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InjectedError {
    /// It fails with EIO, and the base never sees it.
    Failure,
    /// It fails with this NVMe status, and the base never sees it.
    Nvme {
        /// Status code type (Base 4.2.3, SCT).
        sct: u8,
        /// Status code.
        sc: u8,
    },
    /// It does not end until [`Injector::resume`], or until the device is gone.
    Pending,
    /// One byte of a read's or a write's data is another on its way; no error says so. I/Os without
    /// data, and compares, are left alone.
    CorruptData {
        /// Which byte, from the start of the I/O; beyond its end nothing is changed.
        offset: u64,
        /// What it is changed by (XOR).
        value: NonZeroU8,
    },
    /// It is tried again after a moment, as an I/O for which memory is short.
    NoMemory,
}

/// An error for some I/Os.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    /// What happens to them.
    pub error: InjectedError,
    /// How many there are, over all channels; 0 is none.
    pub count: u32,
    /// Only I/Os that find at least so many of their channel with the base.
    pub queue_depth: u64,
}

/// The injections of an error device: at most one for each of [`InjectOn`]. It is used from one thread,
/// channels look on.
#[derive(Debug, Default)]
pub struct Injector {
    rules: [Rule; InjectOn::ALL.len()],
    resumes: AtomicU64,
}

#[derive(Debug, Default)]
struct Rule {
    /// [`Armed`], so that an I/O takes a count and what it is a count of in one step.
    armed: AtomicU64,
    queue_depth: AtomicU64,
    corrupt_offset: AtomicU64,
}

impl Injector {
    /// Puts an error in the place of what is injected into such I/Os.
    pub fn inject(&self, on: InjectOn, injection: &Injection) {
        let Some(rule) = self.rules.get(on as usize) else {
            return;
        };
        rule.armed.store(0, Ordering::Relaxed);
        rule.queue_depth
            .store(injection.queue_depth, Ordering::Relaxed);
        if let InjectedError::CorruptData { offset, .. } = injection.error {
            rule.corrupt_offset.store(offset, Ordering::Relaxed);
        }
        let armed = Armed::pack(injection.error, injection.count);
        rule.armed.store(armed.0, Ordering::Release);
    }

    /// Nothing is injected any more. What is [pending](InjectedError::Pending) stays so.
    pub fn clear(&self) {
        for rule in &self.rules {
            rule.armed.store(0, Ordering::Relaxed);
        }
    }

    /// Lets pending I/Os go on, and makes no more of them.
    pub fn resume(&self) {
        for rule in &self.rules {
            let armed = Armed(rule.armed.load(Ordering::Relaxed));
            if armed.error(0) == Some(InjectedError::Pending) {
                rule.armed.store(0, Ordering::Relaxed);
            }
        }
        self.resumes.fetch_add(1, Ordering::Release);
    }

    /// How often there was a [`Injector::resume`]. Whoever looks before it draws misses none.
    pub(crate) fn resumes(&self) -> u64 {
        self.resumes.load(Ordering::Acquire)
    }

    /// What happens to an I/O that finds `in_flight` others of its channel with the base.
    #[inline]
    pub(crate) fn draw(&self, op: IoOp, in_flight: usize) -> Option<InjectedError> {
        let rule = self.rules.get(InjectOn::of(op) as usize)?;
        let mut armed = Armed(rule.armed.load(Ordering::Acquire));
        loop {
            if armed.count() == 0 || (in_flight as u64) < rule.queue_depth.load(Ordering::Relaxed) {
                return None;
            }
            let error = armed.error(rule.corrupt_offset.load(Ordering::Relaxed))?;
            let moves_data = matches!(op, IoOp::Read | IoOp::Write { .. });
            if matches!(error, InjectedError::CorruptData { .. }) && !moves_data {
                return None;
            }
            let one_less = armed.0 - 1;
            let (success, failure) = (Ordering::Acquire, Ordering::Acquire);
            match rule
                .armed
                .compare_exchange_weak(armed.0, one_less, success, failure)
            {
                Ok(_) => return Some(error),
                Err(now) => armed = Armed(now),
            }
        }
    }
}

/// A count (32 bits), which error (8), and two bytes of it.
#[derive(Clone, Copy)]
struct Armed(u64);

const FAILURE: u8 = 1;
const NVME: u8 = 2;
const PENDING: u8 = 3;
const CORRUPT_DATA: u8 = 4;
const NO_MEMORY: u8 = 5;

impl Armed {
    fn pack(error: InjectedError, count: u32) -> Self {
        let (kind, first, second) = match error {
            InjectedError::Failure => (FAILURE, 0, 0),
            InjectedError::Nvme { sct, sc } => (NVME, sct, sc),
            InjectedError::Pending => (PENDING, 0, 0),
            InjectedError::CorruptData { value, .. } => (CORRUPT_DATA, value.get(), 0),
            InjectedError::NoMemory => (NO_MEMORY, 0, 0),
        };
        let [a, b, c, d] = count.to_le_bytes();
        Self(u64::from_le_bytes([a, b, c, d, kind, first, second, 0]))
    }

    const fn count(self) -> u32 {
        self.0 as u32
    }

    /// `None`: there never was an injection.
    fn error(self, corrupt_offset: u64) -> Option<InjectedError> {
        let [_, _, _, _, kind, first, second, _] = self.0.to_le_bytes();
        Some(match kind {
            FAILURE => InjectedError::Failure,
            NVME => InjectedError::Nvme {
                sct: first,
                sc: second,
            },
            PENDING => InjectedError::Pending,
            CORRUPT_DATA => InjectedError::CorruptData {
                offset: corrupt_offset,
                value: NonZeroU8::new(first)?,
            },
            NO_MEMORY => InjectedError::NoMemory,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NVME_ERROR: InjectedError = InjectedError::Nvme { sct: 2, sc: 0x81 };

    fn injection(error: InjectedError, count: u32) -> Injection {
        Injection {
            error,
            count,
            queue_depth: 0,
        }
    }

    #[test]
    fn counts_are_shared_and_exact() {
        let injector = Injector::default();
        injector.inject(InjectOn::Write, &injection(NVME_ERROR, 1000));
        let drawn: usize = std::thread::scope(|scope| {
            let draw = || {
                let draws = (0..500).filter(|_| {
                    let drawn = injector.draw(IoOp::Write { fua: false }, 0);
                    assert!(drawn.is_none() || drawn == Some(NVME_ERROR));
                    drawn.is_some()
                });
                draws.count()
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(draw)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .sum()
        });
        assert_eq!(drawn, 1000);
    }

    #[test]
    fn types_are_apart_and_the_last_word_counts() {
        let injector = Injector::default();
        let value = NonZeroU8::MIN;
        let corrupt = InjectedError::CorruptData { offset: 700, value };
        injector.inject(InjectOn::Read, &injection(corrupt, u32::MAX));
        assert_eq!(injector.draw(IoOp::Discard, 9), None);
        assert_eq!(injector.draw(IoOp::Verify, 9), None, "it has no data");
        assert_eq!(injector.draw(IoOp::Read, 0), Some(corrupt));
        let deep = Injection {
            queue_depth: 3,
            ..injection(InjectedError::Pending, 2)
        };
        injector.inject(InjectOn::Read, &deep);
        assert_eq!(injector.draw(IoOp::Read, 2), None);
        assert_eq!(injector.draw(IoOp::Verify, 3), Some(InjectedError::Pending));
        injector.inject(InjectOn::Flush, &injection(InjectedError::Failure, 5));
        injector.resume();
        assert_eq!(injector.draw(IoOp::Read, 3), None, "no more of them");
        assert_eq!(injector.draw(IoOp::Flush, 0), Some(InjectedError::Failure));
        injector.clear();
        assert_eq!(injector.draw(IoOp::Flush, 0), None);
    }
}
