//! What queue pairs and the control thread know in common about a controller.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use flexblk_nvme::Nsid;
use flexblk_nvme::log::ana::AnaState;

use crate::{LostReason, Namespace};

/// Written by the control thread, read by everybody. The I/O path reads two atomics.
#[derive(Default)]
pub(crate) struct ControllerView {
    lost: OnceLock<LostReason>,
    epoch: AtomicU64,
    namespaces: Mutex<Arc<[Namespace]>>,
    /// Namespaces that are in an ANA group, with its state.
    ana: Mutex<Arc<[(Nsid, AnaState)]>>,
}

impl ControllerView {
    /// Why the controller is lost, if it is.
    pub(crate) fn lost(&self) -> Option<LostReason> {
        self.lost.get().copied()
    }

    /// The first reason stays.
    pub(crate) fn set_lost(&self, reason: LostReason) {
        let _ = self.lost.set(reason);
    }

    /// Changes with the namespaces.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    pub(crate) fn namespaces(&self) -> Arc<[Namespace]> {
        self.namespaces
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The state of the namespace's ANA group; optimized when it is in none.
    pub(crate) fn ana_state(&self, nsid: Nsid) -> AnaState {
        self.ana
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .find(|(member, _)| *member == nsid)
            .map_or(AnaState::Optimized, |(_, state)| *state)
    }

    pub(crate) fn set_ana_states(&self, fresh: Vec<(Nsid, AnaState)>) {
        *self.ana.lock().unwrap_or_else(PoisonError::into_inner) = fresh.into();
    }

    /// Replaces the namespaces; false when they are the same.
    pub(crate) fn set_namespaces(&self, fresh: Vec<Namespace>) -> bool {
        let mut namespaces = self
            .namespaces
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if namespaces.iter().eq(fresh.iter()) {
            return false;
        }
        *namespaces = fresh.into();
        self.epoch.fetch_add(1, Ordering::Release);
        true
    }
}

/// A queue pair's own copy of the namespaces: no lock while nothing changes.
pub(crate) struct NamespaceCache {
    view: Arc<ControllerView>,
    epoch: u64,
    namespaces: Arc<[Namespace]>,
    last: usize,
}

impl NamespaceCache {
    pub(crate) fn new(view: Arc<ControllerView>) -> NamespaceCache {
        // The epoch first: if it changes in between, the first look-up reads again.
        let epoch = view.epoch();
        let namespaces = view.namespaces();
        NamespaceCache {
            view,
            epoch,
            namespaces,
            last: 0,
        }
    }

    pub(crate) fn find(&mut self, nsid: Nsid) -> Option<&Namespace> {
        let epoch = self.view.epoch();
        if epoch != self.epoch {
            self.epoch = epoch;
            self.namespaces = self.view.namespaces();
        }
        if self
            .namespaces
            .get(self.last)
            .is_none_or(|ns| ns.nsid != nsid)
        {
            self.last = self.namespaces.iter().position(|ns| ns.nsid == nsid)?;
        }
        self.namespaces.get(self.last)
    }
}

/// Queue identifiers that are free. Reused as late as possible: the target may learn later than we do that a
/// queue is gone.
pub(crate) struct QidPool {
    free: Mutex<VecDeque<u16>>,
}

impl QidPool {
    /// Queues 1 to `count`.
    pub(crate) fn new(count: u16) -> Arc<QidPool> {
        Arc::new(QidPool {
            free: Mutex::new((1..=count).collect()),
        })
    }

    pub(crate) fn take(self: &Arc<Self>) -> Option<QidLease> {
        let qid = self
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()?;
        Some(QidLease {
            pool: self.clone(),
            qid,
        })
    }
}

/// A queue identifier in use.
pub(crate) struct QidLease {
    pool: Arc<QidPool>,
    qid: u16,
}

impl QidLease {
    pub(crate) fn qid(&self) -> u16 {
        self.qid
    }
}

impl Drop for QidLease {
    fn drop(&mut self) {
        self.pool
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(self.qid);
    }
}
