//! What a volume's keeper, its channels and its callers know in common.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use flexblk_nvme::log::ana::AnaState;
use flexblk_reactor::Waker;

use super::fence::Fence;
use super::multipath::Access;
use super::report::{PathReport, PathState};
use super::{MultipathOptions, VolumeEvent, identity};
use crate::{ConnectOptions, Controller, Error, Namespace, Nsid};

/// Events that wait to be fetched at most; then the oldest goes.
const EVENTS: usize = 256;

/// Written by the keeper; read by channels when `epoch` has changed, never for an I/O.
pub(super) struct Shared {
    pub(super) multipath: MultipathOptions,
    pub(super) poll_budget: Duration,
    pub(super) paths: Box<[Path]>,
    /// Changes with everything that channels have to know.
    epoch: AtomicU64,
    /// All paths are given up.
    gone: AtomicBool,
    pub(super) fence: Option<Arc<Fence>>,
    namespace: Mutex<Option<Namespace>>,
    events: Mutex<VecDeque<VolumeEvent>>,
    arrived: Condvar,
    wakers: Mutex<Vec<(u64, Waker)>>,
    counters: Mutex<Vec<Arc<ChannelCounters>>>,
    ids: AtomicU64,
}

/// One path.
pub(super) struct Path {
    pub(super) connect: ConnectOptions,
    facts: Mutex<Facts>,
}

struct Facts {
    state: PathState,
    up: Option<Up>,
    /// As it was when the path was up last.
    namespace: Option<Namespace>,
    last_error: Option<String>,
    connects: u64,
    /// Of channels that are gone.
    ios: u64,
}

/// A path's controller.
#[derive(Clone)]
pub(super) struct Up {
    /// Each connection has another.
    pub(super) number: u64,
    pub(super) controller: Controller,
    pub(super) nsid: Nsid,
    /// The namespace is there.
    pub(super) present: bool,
}

/// What one channel counted by path. Written by its thread only.
#[derive(Default)]
pub(super) struct ChannelCounters(Box<[PathCounters]>);

#[derive(Default)]
pub(super) struct PathCounters {
    ios: AtomicU64,
    latency_ns: AtomicU64,
}

impl PathCounters {
    pub(super) fn set(&self, ios: u64, latency: Duration) {
        self.ios.store(ios, Ordering::Relaxed);
        self.latency_ns
            .store(latency.as_nanos() as u64, Ordering::Relaxed);
    }
}

impl ChannelCounters {
    pub(super) fn path(&self, path: usize) -> Option<&PathCounters> {
        self.0.get(path)
    }
}

impl Up {
    /// How good the access is this way.
    pub(super) fn access(&self) -> Access {
        match self.controller.ana_state(self.nsid) {
            _ if !self.present => Access::None,
            AnaState::Optimized => Access::Optimized,
            AnaState::NonOptimized => Access::NonOptimized,
            _ => Access::None,
        }
    }
}

impl Shared {
    pub(super) fn new(
        multipath: MultipathOptions,
        poll_budget: Duration,
        paths: Vec<ConnectOptions>,
        fence: Option<Arc<Fence>>,
    ) -> Shared {
        let path = |connect| Path {
            connect,
            facts: Mutex::new(Facts {
                state: PathState::Connecting,
                up: None,
                namespace: None,
                last_error: None,
                connects: 0,
                ios: 0,
            }),
        };
        Shared {
            multipath,
            poll_budget,
            paths: paths.into_iter().map(path).collect(),
            epoch: AtomicU64::new(0),
            gone: AtomicBool::new(false),
            fence,
            namespace: Mutex::new(None),
            events: Mutex::default(),
            arrived: Condvar::new(),
            wakers: Mutex::default(),
            counters: Mutex::default(),
            ids: AtomicU64::new(1),
        }
    }

    /// A number that nobody else has.
    pub(super) fn id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    #[inline]
    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Something changed: channels look, also those that sleep.
    pub(super) fn announce(&self) {
        self.epoch.fetch_add(1, Ordering::Release);
        for (_, waker) in lock(&self.wakers).iter() {
            waker.wake();
        }
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    pub(super) fn set_gone(&self) {
        self.gone.store(true, Ordering::Release);
    }

    pub(super) fn add_waker(&self, waker: Waker) -> u64 {
        let id = self.id();
        lock(&self.wakers).push((id, waker));
        id
    }

    pub(super) fn remove_waker(&self, id: u64) {
        lock(&self.wakers).retain(|(other, _)| *other != id);
    }

    // ---- paths ---------------------------------------------------------------------------------

    /// A path's controller, while it has one.
    pub(super) fn up(&self, path: usize) -> Option<Up> {
        lock(&self.paths.get(path)?.facts).up.clone()
    }

    /// It is connected.
    pub(super) fn set_up(&self, path: usize, up: Up, namespace: Namespace) {
        self.change(path, |facts| {
            facts.state = state_of(&up);
            facts.up = Some(up);
            facts.namespace = Some(namespace.clone());
            facts.connects += 1;
        });
        self.refresh(&namespace);
    }

    /// It is not, for that reason. What it had is the caller's.
    pub(super) fn set_down(
        &self,
        path: usize,
        state: PathState,
        error: Option<String>,
    ) -> Option<Up> {
        let mut up = None;
        self.change(path, |facts| {
            facts.state = state;
            if error.is_some() {
                facts.last_error = error;
            }
            up = facts.up.take();
        });
        up
    }

    /// What the controller says about the namespace changed, or its ANA state did.
    pub(super) fn set_namespace(&self, path: usize, namespace: Option<Namespace>) {
        self.change(path, |facts| {
            if let Some(up) = &mut facts.up {
                up.present = namespace.is_some();
                facts.state = state_of(up);
            }
            if let Some(namespace) = &namespace {
                facts.namespace = Some(namespace.clone());
            }
        });
        if let Some(namespace) = namespace {
            self.refresh(&namespace);
        }
    }

    pub(super) fn note_error(&self, path: usize, error: &str) {
        self.change(path, |facts| facts.last_error = Some(error.to_owned()));
    }

    fn change(&self, path: usize, change: impl FnOnce(&mut Facts)) {
        if let Some(path) = self.paths.get(path) {
            change(&mut lock(&path.facts));
        }
    }

    /// Puts the volume's namespace together anew; an event tells when it is another than before.
    fn refresh(&self, fresh: &Namespace) {
        let known: Vec<Namespace> = self
            .paths
            .iter()
            .filter_map(|path| {
                let facts = lock(&path.facts);
                facts.namespace.clone().filter(|_| facts.up.is_some())
            })
            .collect();
        let common = identity::common(fresh, known.iter());
        let before = lock(&self.namespace).replace(common.clone());
        let same = |before: &Namespace| {
            *before
                == Namespace {
                    nsid: before.nsid,
                    ..common.clone()
                }
        };
        if before.is_some_and(|before| !same(&before)) {
            self.push(VolumeEvent::NamespaceChanged);
        }
    }

    pub(super) fn namespace(&self) -> Option<Namespace> {
        lock(&self.namespace).clone()
    }

    // ---- events --------------------------------------------------------------------------------

    pub(super) fn push(&self, event: VolumeEvent) {
        let mut events = lock(&self.events);
        if events.len() >= EVENTS {
            events.pop_front();
        }
        events.push_back(event);
        self.arrived.notify_one();
    }

    pub(super) fn next_event(&self, timeout: Duration) -> Option<VolumeEvent> {
        let (mut events, _) = self
            .arrived
            .wait_timeout_while(lock(&self.events), timeout, |events| events.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        events.pop_front()
    }

    // ---- counters ------------------------------------------------------------------------------

    pub(super) fn add_counters(&self) -> Arc<ChannelCounters> {
        let paths = self.paths.iter().map(|_| PathCounters::default());
        let counters = Arc::new(ChannelCounters(paths.collect()));
        lock(&self.counters).push(Arc::clone(&counters));
        counters
    }

    pub(super) fn remove_counters(&self, counters: &Arc<ChannelCounters>) {
        lock(&self.counters).retain(|other| !Arc::ptr_eq(other, counters));
        for (path, counted) in self.paths.iter().zip(counters.0.iter()) {
            lock(&path.facts).ios += counted.ios.load(Ordering::Relaxed);
        }
    }

    pub(super) fn report(&self) -> Vec<PathReport> {
        let channels = lock(&self.counters).clone();
        let report = |(number, path): (usize, &Path)| {
            let facts = lock(&path.facts);
            let counted = channels.iter().filter_map(|channel| channel.path(number));
            let (mut ios, mut latencies_ns) = (facts.ios, Vec::new());
            for counters in counted {
                ios += counters.ios.load(Ordering::Relaxed);
                latencies_ns.push(counters.latency_ns.load(Ordering::Relaxed));
            }
            latencies_ns.retain(|latency_ns| *latency_ns > 0);
            let mean_ns = latencies_ns.iter().sum::<u64>() / (latencies_ns.len() as u64).max(1);
            PathReport {
                address: path.connect.target.to_string(),
                transport: path.connect.target.trtype,
                state: facts.state,
                ana: facts.up.as_ref().map(|up| up.controller.ana_state(up.nsid)),
                ios,
                latency: (mean_ns > 0).then(|| Duration::from_nanos(mean_ns)),
                connects: facts.connects,
                last_error: facts.last_error.clone(),
            }
        };
        self.paths.iter().enumerate().map(report).collect()
    }
}

fn state_of(up: &Up) -> PathState {
    match up.access() {
        Access::None => PathState::Inaccessible,
        Access::Optimized | Access::NonOptimized => PathState::Live,
    }
}

/// The namespace of a path's controller that the options name, or the only one.
pub(super) fn namespace_of(
    controller: &Controller,
    nsid: Option<Nsid>,
) -> Result<Namespace, Error> {
    if let Some(nsid) = nsid {
        return controller.namespace(nsid);
    }
    let namespaces = controller.namespaces();
    match namespaces.as_slice() {
        [namespace] => Ok(namespace.clone()),
        [] => Err(Error::Address(format!(
            "subsystem {} has no namespace for this host",
            controller.subnqn()
        ))),
        several => Err(Error::Address(format!(
            "subsystem {} has {} namespaces: say which one (--namespace-id, or ?nsid= in the URI)",
            controller.subnqn(),
            several.len()
        ))),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("multipath", &self.multipath)
            .field("paths", &self.report())
            .finish_non_exhaustive()
    }
}
