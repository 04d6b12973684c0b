//! What threads share about a controller: who its host is, which queues it has, what went wrong.
//!
//! The controller itself lives on the thread of its Admin queue; its I/O queues may live on others.
//! Nothing here is locked for an I/O: the locks are taken at connect, tear-down, failure, and when a
//! log page is read.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flexblk_nvme::{Cid, Cntlid, HostId, Lba, Nqn, Nsid, Qid, Status};

use crate::budget::Reservation;
use crate::recorder::host_tag;

/// Entries of the Error Information log: Identify's ELPE + 1 (Base 5.1.13.2.1).
pub const ERROR_LOG_ENTRIES: usize = 64;

/// A controller, as all threads see it.
#[derive(Debug)]
pub struct Association {
    /// Its identifier.
    pub cntlid: Cntlid,
    /// Slot of its subsystem in the snapshot; `None` is the discovery service.
    pub subsystem: Option<usize>,
    /// Name of its subsystem.
    pub subnqn: Nqn,
    /// Name of its host.
    pub hostnqn: Nqn,
    /// Identifier of its host.
    pub hostid: HostId,
    /// Tells its host apart in the flight recorder.
    pub host_tag: u64,
    /// Port by which it was connected.
    pub port: u16,
    /// Thread of its Admin queue.
    pub thread: usize,
    ready: AtomicBool,
    traced: AtomicBool,
    write_through: AtomicBool,
    copies_between_namespaces: AtomicBool,
    queues: Mutex<Queues>,
    errors: Mutex<ErrorLog>,
}

/// An I/O queue, as its controller sees it.
#[derive(Debug)]
pub struct QueueShared {
    /// Thread it lives on.
    pub thread: usize,
    /// Commands received; written by its thread only. Keep-alive looks whether it moves.
    pub commands: AtomicU64,
}

impl QueueShared {
    /// Counts a command. A plain load and store: there is one writer.
    #[inline]
    pub fn count(&self) {
        self.commands.store(
            self.commands.load(Ordering::Relaxed).wrapping_add(1),
            Ordering::Relaxed,
        );
    }
}

#[derive(Debug, Default)]
struct Queues {
    by_id: BTreeMap<u16, Arc<QueueShared>>,
    granted: Option<Granted>,
}

#[derive(Debug)]
struct Granted {
    count: u16,
    /// Memory for the queues that were granted and not connected yet.
    memory: Option<Reservation>,
}

/// Why an I/O queue cannot be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueRefusal {
    /// The controller is not enabled and ready.
    NotReady,
    /// The queue exists.
    Exists,
    /// The identifier is above the number of queues granted.
    BeyondGrant,
}

impl Association {
    /// A controller without queues, not ready.
    #[must_use]
    pub fn new(
        cntlid: Cntlid,
        subsystem: (Option<usize>, Nqn),
        host: (Nqn, HostId),
        (port, thread): (u16, usize),
    ) -> Self {
        let (subsystem, subnqn) = subsystem;
        let (hostnqn, hostid) = host;
        Self {
            host_tag: host_tag(&hostnqn, hostid),
            cntlid,
            subsystem,
            subnqn,
            hostnqn,
            hostid,
            port,
            thread,
            ready: AtomicBool::new(false),
            traced: AtomicBool::new(false),
            write_through: AtomicBool::new(false),
            copies_between_namespaces: AtomicBool::new(false),
            queues: Mutex::default(),
            errors: Mutex::default(),
        }
    }

    /// Is the controller enabled and ready for I/O queues?
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Changes that. Under the lock of the queues, so that no queue is added afterwards.
    pub fn set_ready(&self, ready: bool) {
        let _queues = lock(&self.queues);
        self.ready.store(ready, Ordering::Release);
    }

    /// Is each of its commands to be logged?
    #[inline]
    #[must_use]
    pub fn is_traced(&self) -> bool {
        self.traced.load(Ordering::Relaxed)
    }

    /// Changes that.
    pub fn set_traced(&self, on: bool) {
        self.traced.store(on, Ordering::Relaxed);
    }

    /// Has the host turned the volatile write cache off, so that every write is forced?
    #[inline]
    #[must_use]
    pub fn write_through(&self) -> bool {
        self.write_through.load(Ordering::Relaxed)
    }

    /// Changes that.
    pub fn set_write_through(&self, on: bool) {
        self.write_through.store(on, Ordering::Relaxed);
    }

    /// Has the host enabled Copy's descriptor format 2h (Host Behavior Support)?
    #[must_use]
    pub fn copies_between_namespaces(&self) -> bool {
        self.copies_between_namespaces.load(Ordering::Relaxed)
    }

    /// Changes that.
    pub fn set_copies_between_namespaces(&self, on: bool) {
        self.copies_between_namespaces.store(on, Ordering::Relaxed);
    }

    /// The number of I/O queues is settled, with memory for them.
    pub fn grant(&self, count: u16, memory: Option<Reservation>) {
        lock(&self.queues).granted = Some(Granted { count, memory });
    }

    /// How many I/O queues were granted, if the host has asked.
    #[must_use]
    pub fn granted(&self) -> Option<u16> {
        lock(&self.queues)
            .granted
            .as_ref()
            .map(|granted| granted.count)
    }

    /// Memory for a queue, out of what was granted; `None` when that has less.
    #[must_use]
    pub fn take_granted(&self, bytes: u64) -> Option<Reservation> {
        lock(&self.queues)
            .granted
            .as_mut()?
            .memory
            .as_mut()?
            .split(bytes)
    }

    /// Adds an I/O queue of a thread. `default_grant` is the limit for hosts that never asked.
    pub fn add_queue(
        &self,
        qid: Qid,
        thread: usize,
        default_grant: u16,
    ) -> Result<Arc<QueueShared>, QueueRefusal> {
        let mut queues = lock(&self.queues);
        if !self.is_ready() {
            return Err(QueueRefusal::NotReady);
        }
        if queues.by_id.contains_key(&qid.get()) {
            return Err(QueueRefusal::Exists);
        }
        if qid.get()
            > queues
                .granted
                .as_ref()
                .map_or(default_grant, |granted| granted.count)
        {
            return Err(QueueRefusal::BeyondGrant);
        }
        let shared = Arc::new(QueueShared {
            thread,
            commands: AtomicU64::new(0),
        });
        queues.by_id.insert(qid.get(), Arc::clone(&shared));
        Ok(shared)
    }

    /// An I/O queue is gone. True when it was the last one.
    pub fn remove_queue(&self, qid: Qid) -> bool {
        let mut queues = lock(&self.queues);
        queues.by_id.remove(&qid.get());
        queues.by_id.is_empty()
    }

    /// Are there I/O queues?
    #[must_use]
    pub fn has_queues(&self) -> bool {
        !lock(&self.queues).by_id.is_empty()
    }

    /// How many I/O queues there are.
    #[must_use]
    pub fn queue_count(&self) -> usize {
        lock(&self.queues).by_id.len()
    }

    /// The thread of an I/O queue.
    #[must_use]
    pub fn thread_of(&self, qid: Qid) -> Option<usize> {
        lock(&self.queues)
            .by_id
            .get(&qid.get())
            .map(|queue| queue.thread)
    }

    /// The threads that have I/O queues, each once.
    #[must_use]
    pub fn threads(&self) -> Vec<usize> {
        let mut threads: Vec<usize> = lock(&self.queues)
            .by_id
            .values()
            .map(|queue| queue.thread)
            .collect();
        threads.sort_unstable();
        threads.dedup();
        threads
    }

    /// A number that changes when any I/O queue has received a command.
    #[must_use]
    pub fn traffic(&self) -> u64 {
        let queues = lock(&self.queues);
        let counts = queues
            .by_id
            .values()
            .map(|queue| queue.commands.load(Ordering::Relaxed));
        counts.fold(queues.by_id.len() as u64, u64::wrapping_add)
    }

    /// Forgets the number of queues and its memory: the controller was reset.
    pub fn forget_grant(&self) {
        lock(&self.queues).granted = None;
    }

    /// Notes a failed command.
    pub fn log_error(&self, entry: ErrorEntry) {
        lock(&self.errors).push(entry);
    }

    /// The error log, newest first, and how many there ever were.
    #[must_use]
    pub fn errors(&self) -> (u64, Vec<(u64, ErrorEntry)>) {
        let log = lock(&self.errors);
        let numbers = (0..log.count).rev();
        (
            log.count,
            numbers
                .map(|number| number + 1)
                .zip(log.newest.iter().copied())
                .collect(),
        )
    }
}

/// A failed command (Base 5.1.12.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorEntry {
    /// Queue.
    pub sqid: Qid,
    /// Command.
    pub cid: Cid,
    /// Its opcode.
    pub opcode: u8,
    /// How it was completed.
    pub status: Status,
    /// First block it named, or 0.
    pub lba: Lba,
    /// Namespace.
    pub nsid: Nsid,
}

#[derive(Debug, Default)]
struct ErrorLog {
    /// Newest first.
    newest: VecDeque<ErrorEntry>,
    count: u64,
}

impl ErrorLog {
    fn push(&mut self, entry: ErrorEntry) {
        if self.newest.len() == ERROR_LOG_ENTRIES {
            self.newest.pop_back();
        }
        self.newest.push_front(entry);
        self.count += 1;
    }
}

/// A lock whose data cannot be left half-changed: a thread that panicked does not poison it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;
    use flexblk_nvme::StatusCode;

    fn association() -> Association {
        let host = (Nqn::opaque("host").unwrap(), HostId::default());
        Association::new(
            Cntlid::new(1),
            (Some(0), Nqn::opaque("sub").unwrap()),
            host,
            (1, 0),
        )
    }

    #[test]
    fn queues_come_and_go_within_the_grant() {
        let controller = association();
        let add = |qid| {
            controller
                .add_queue(Qid::new(qid), 1, 4)
                .map(|queue| queue.thread)
        };
        assert_eq!(add(1).unwrap_err(), QueueRefusal::NotReady);
        controller.set_ready(true);
        assert_eq!(add(1), Ok(1));
        assert!(controller.take_granted(100).is_none());
        assert_eq!(add(1).unwrap_err(), QueueRefusal::Exists);
        assert_eq!(add(5).unwrap_err(), QueueRefusal::BeyondGrant);
        assert!(!controller.remove_queue(Qid::new(9)));
        assert!(controller.remove_queue(Qid::new(1)));

        let budget = Budget::new(1000);
        controller.grant(2, budget.reserve(200));
        let (first, second) = (controller.take_granted(100), controller.take_granted(100));
        assert!(first.is_some() && second.is_some() && controller.take_granted(1).is_none());
        assert!(add(1).is_ok() && add(2).is_ok());
        assert_eq!(add(3).unwrap_err(), QueueRefusal::BeyondGrant);
        drop((first, second));
        assert_eq!(budget.free_bytes(), 1000);
        assert_eq!(controller.threads(), [1]);
    }

    #[test]
    fn traffic_moves_with_every_command() {
        let controller = association();
        controller.set_ready(true);
        let queue = controller.add_queue(Qid::new(1), 0, 1).unwrap();
        let before = controller.traffic();
        queue.count();
        assert_ne!(controller.traffic(), before);
    }

    #[test]
    fn the_error_log_keeps_the_newest() {
        let controller = association();
        for cid in 0..100 {
            controller.log_error(ErrorEntry {
                sqid: Qid::new(1),
                cid: Cid::new(cid),
                opcode: 2,
                status: StatusCode::LbaOutOfRange.dnr(),
                lba: Lba::new(5),
                nsid: Nsid::new(1),
            });
        }
        let (count, entries) = controller.errors();
        assert_eq!((count, entries.len()), (100, ERROR_LOG_ENTRIES));
        assert_eq!(entries[0].0, 100);
        assert_eq!(entries[0].1.cid, Cid::new(99));
        assert_eq!(entries[63].0, 37);
    }
}
