//! What the queues of a thread share: buffers, devices, namespaces, and work that waits.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use flexblk_nvme::log::ana::AnaState;
use flexblk_nvme::{Cid, Cqe, Nqn, Nsid, Qid};
use flexblk_reactor::{Reactor, mailbox};
use flexins::engine::Engine;
use flexins::verbs::Pd;

use super::buffers::Buffers;
use super::devices::Devices;
use super::fused::{Claim, Pair};
use super::mail::{AbortFrom, Mail};
use super::queue::QueueKey;
use super::tcp::Tcp;
use super::{BDEV_OWNER, NO_DEVICE};
use crate::association::Association;
use crate::config::AllowedHosts;
use crate::control::Desk;
use crate::controller::{Addresses, Reason};
use crate::counters::IoCounters;
use crate::directory::Directory;
use crate::metrics::Metrics;
use crate::ptpl::State;
use crate::queue::request::View;
use crate::recorder::Recorder;
use crate::snapshot::{Namespace, Snapshot, Subsystem};

/// What all threads of a target share.
pub(crate) struct Shared {
    pub(crate) directory: Directory,
    pub(crate) started: Instant,
    /// What hosts do.
    pub(crate) metrics: Metrics,
    /// Where we listen from the start: `traddr` and, as the port, `trsvcid`.
    pub(crate) addresses: Addresses,
    /// Data threads.
    pub(crate) threads: usize,
    /// What has happened lately, by thread.
    pub(crate) recorders: Box<[Recorder]>,
    /// Held by management for as long as it makes a change, and that may be long: opening an image on a server that
    /// hangs. The number that the next device gets.
    pub(crate) managing: Mutex<u64>,
    /// Held while the snapshot in force is replaced by one made out of it: by management, and by the control thread.
    pub(crate) changing: Mutex<()>,
    /// What the file for what has to survive holds.
    pub(crate) kept: Mutex<Arc<State>>,
    /// The snapshot that each thread goes by.
    pub(crate) epochs: Box<[AtomicU64]>,
    /// Orders to the control thread.
    pub(crate) desk: Desk,
    /// Is there a file for what has to survive a power loss?
    pub(crate) can_persist: bool,
    /// Blocks that fused operations have to themselves.
    pub(crate) claims: Mutex<Vec<Claim>>,
    /// Their mailboxes; set when all have started.
    pub(crate) mail: OnceLock<Box<[mailbox::Sender<Mail>]>>,
}

/// The address from which this machine talks to `peer`.
pub(super) fn address_towards(peer: SocketAddr) -> Option<IpAddr> {
    let any: SocketAddr = match peer.ip() {
        IpAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
        IpAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // Connecting a UDP socket sends nothing; it asks the routing table.
    let local = UdpSocket::bind(any).and_then(|socket| {
        socket.connect(peer)?;
        socket.local_addr()
    });
    local.ok().map(|local| local.ip())
}

/// Work that concerns more than one queue.
pub(crate) enum Task {
    /// Close every I/O queue of a controller, on all threads.
    CloseQueues(Arc<Association>),
    /// Ask whether the host of an Admin queue is still there.
    Ask(QueueKey),
    /// Close an Admin queue: its controller ends.
    Terminate(QueueKey, Reason),
    /// Begin the flush of a shutdown.
    Flush(QueueKey),
    /// Try to abort a command of an I/O queue of a controller.
    Abort {
        association: Arc<Association>,
        sqid: Qid,
        cid: Cid,
        from: AbortFrom,
    },
}

/// A subsystem as this thread sees it.
pub(crate) struct LocalSubsystem {
    current: Arc<Subsystem>,
    views: Vec<Option<View>>,
    /// Commands under way, and since when there are any.
    under_way: u32,
    since: Instant,
}

impl LocalSubsystem {
    /// The namespace of that identifier.
    #[inline]
    pub(crate) fn view(&self, nsid: Nsid) -> Option<&View> {
        let index = nsid.get().checked_sub(1)?;
        self.views.get(index as usize)?.as_ref()
    }

    /// The subsystem itself.
    pub(crate) fn current(&self) -> &Arc<Subsystem> {
        &self.current
    }

    #[inline]
    pub(crate) fn begin(&mut self, now: Instant) {
        if self.under_way == 0 {
            self.since = now;
        }
        self.under_way += 1;
    }

    #[inline]
    pub(crate) fn end(&mut self, now: Instant, thread: usize) {
        self.under_way = self.under_way.saturating_sub(1);
        if self.under_way == 0
            && let Some(counters) = self.current.counters.get(thread)
        {
            counters.busy(now.saturating_duration_since(self.since));
        }
    }

    /// The devices of its namespaces.
    pub(crate) fn devices(&self) -> impl Iterator<Item = u32> {
        self.views.iter().flatten().map(|view| view.device)
    }
}

/// What the queues of a thread share.
pub(crate) struct Parts {
    pub(crate) id: usize,
    pub(crate) shared: Arc<Shared>,
    pub(crate) now: Instant,
    /// The same in microseconds since the target's start, for what commands take; it wraps around.
    pub(crate) now_us: u32,
    pub(crate) pd: Pd,
    pub(crate) buffers: Buffers,
    pub(crate) devices: Devices,
    /// NVMe/TCP connections.
    pub(crate) tcp: Tcp,
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) subsystems: Vec<Option<LocalSubsystem>>,
    /// Commands for their devices.
    pub(crate) device_work: VecDeque<(QueueKey, u16)>,
    /// Commands that a fused operation keeps from their blocks.
    pub(crate) fenced: VecDeque<(QueueKey, u16)>,
    /// Fused operations under way, and how many there have been.
    pub(crate) pairs: Vec<Pair>,
    pub(crate) next_pair: u64,
    /// Commands that wait for buffers.
    pub(crate) waiters: VecDeque<(QueueKey, u16)>,
    /// Commands that found their send queue full.
    pub(crate) blocked: VecDeque<(QueueKey, u16)>,
    /// Completions of Asynchronous Event Requests to be sent.
    pub(crate) late: VecDeque<(QueueKey, Cqe)>,
    /// Queues to close, or closing ones to look at again.
    pub(crate) to_close: VecDeque<QueueKey>,
    /// Work that concerns more than one queue.
    pub(crate) tasks: VecDeque<Task>,
    /// Admin queues and I/O queues that were ever connected.
    pub(crate) connects: (u64, u64),
}

impl Parts {
    /// This thread's counters of a subsystem.
    #[inline]
    pub(crate) fn counters(&self, subsystem: usize) -> Option<&IoCounters> {
        self.subsystems
            .get(subsystem)?
            .as_ref()?
            .current
            .counters
            .get(self.id)
    }

    /// Takes over a new snapshot; gives the namespaces that have changed, by subsystem.
    pub(crate) fn apply(
        &mut self,
        snapshot: Arc<Snapshot>,
        engine: &mut Engine,
        reactor: &mut Reactor,
    ) -> Vec<(usize, Vec<Changed>)> {
        let mut changes = Vec::new();
        for slot in 0..snapshot.subsystems.len().max(self.subsystems.len()) {
            let old = self.subsystems.get_mut(slot).and_then(Option::take);
            let new = snapshot.subsystem(slot);
            let (local, changed) = self.reconcile(old, new, engine, reactor);
            match self.subsystems.get_mut(slot) {
                Some(place) => *place = local,
                None => self.subsystems.push(local),
            }
            if !changed.is_empty() {
                changes.push((slot, changed));
            }
        }
        self.snapshot = snapshot;
        changes
    }

    fn reconcile(
        &mut self,
        old: Option<LocalSubsystem>,
        new: Option<&Arc<Subsystem>>,
        engine: &mut Engine,
        reactor: &mut Reactor,
    ) -> (Option<LocalSubsystem>, Vec<Changed>) {
        let now = self.now;
        if matches!((&old, new), (Some(old), Some(new)) if Arc::ptr_eq(&old.current, new)) {
            return (old, Vec::new());
        }
        let (old_namespaces, old_views, under_way, since) = match old {
            Some(old) => {
                // Another one may have its place: then its commands are nobody's.
                let stays = new.is_some_and(|new| new.nqn == old.current.nqn);
                let (under_way, since) = if stays {
                    (old.under_way, old.since)
                } else {
                    (0, now)
                };
                (old.current.namespaces.clone(), old.views, under_way, since)
            }
            None => (Vec::new(), Vec::new(), 0, now),
        };
        let new_namespaces = new.map_or(&[][..], |new| &new.namespaces);
        let mut views = Vec::with_capacity(new_namespaces.len());
        let mut changed = Vec::new();
        for index in 0..old_namespaces.len().max(new_namespaces.len()) {
            let before = old_namespaces.get(index).and_then(Option::as_ref);
            let after = new_namespaces.get(index).and_then(Option::as_ref);
            let old_view = old_views.get(index).copied().flatten();
            let view = match (before, after, old_view) {
                (Some(before), Some(after), Some(view)) if Arc::ptr_eq(before, after) => {
                    new.map(|new| view_of(new, after, view.device))
                }
                (Some(before), Some(after), Some(view)) if before.device_id == after.device_id => {
                    changed.push(Changed {
                        before: Some(Arc::clone(before)),
                        after: Some(Arc::clone(after)),
                    });
                    self.devices.set_histogram(view.device, after);
                    new.map(|new| view_of(new, after, view.device))
                }
                (before, after, old_view) => {
                    if before.is_some() || after.is_some() {
                        changed.push(Changed {
                            before: before.map(Arc::clone),
                            after: after.map(Arc::clone),
                        });
                    }
                    let opened = new
                        .zip(after)
                        .map(|(new, after)| view_of(new, after, self.open(after, engine, reactor)));
                    if let Some(view) = old_view {
                        self.devices.close(view.device, engine, now);
                    }
                    opened
                }
            };
            views.push(view);
        }
        let local = new.map(|new| LocalSubsystem {
            current: Arc::clone(new),
            views,
            under_way,
            since,
        });
        (local, changed)
    }

    /// The device of a namespace. When it cannot be opened on this thread, the namespace is there
    /// and its commands say Namespace Not Ready.
    fn open(&mut self, namespace: &Namespace, engine: &mut Engine, reactor: &mut Reactor) -> u32 {
        match self
            .devices
            .open(namespace, BDEV_OWNER, engine, self.pd, reactor)
        {
            Ok(device) => device,
            Err(error) => {
                let name = &namespace.info.name;
                tracing::error!(%error, nsid = %namespace.nsid, %name, thread = self.id, "a namespace cannot be used on this thread");
                NO_DEVICE
            }
        }
    }
}

/// A namespace that was added, removed or changed.
#[derive(Debug)]
pub(crate) struct Changed {
    before: Option<Arc<Namespace>>,
    after: Option<Arc<Namespace>>,
}

impl Changed {
    /// Its identifier, if a host of that name sees a difference.
    pub(crate) fn seen_by(&self, host: &Nqn) -> Option<Nsid> {
        let seen = |namespace: &Option<Arc<Namespace>>| {
            let namespace = namespace.as_ref()?;
            namespace.hosts.allows(host).then(|| Arc::clone(namespace))
        };
        match (seen(&self.before), seen(&self.after)) {
            (Some(before), Some(after)) => (!before.looks_like(&after)).then_some(after.nsid),
            (before, after) => before.or(after).map(|namespace| namespace.nsid),
        }
    }
}

fn view_of(subsystem: &Subsystem, namespace: &Namespace, device: u32) -> View {
    let plain = |state| matches!(state, AnaState::Optimized | AnaState::NonOptimized);
    let group = subsystem.ana_group(namespace.anagrpid);
    let accessible = group.is_none_or(|group| {
        plain(group.state) && group.ports.iter().all(|(_, state)| plain(*state))
    });
    let open = namespace.hosts == AllowedHosts::Any && namespace.reservations.holder().is_none();
    View {
        gated: !(accessible && open),
        block_count: namespace.info.block_count,
        device,
        block_shift: namespace.block_shift(),
        read_only: namespace.read_only(),
        discard: namespace
            .info
            .caps
            .contains(flexblk_blockdev::Caps::DISCARD),
    }
}
