//! The target as a library: start, change what is exported, look at numbers, stop.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use flexblk_blockdev::{BdevConfig, BlockDevice};
use flexblk_nvme::{Nqn, Nsid};
use flexblk_reactor::mailbox;
use sha2::{Digest as _, Sha256};

use crate::budget::Budget;
use crate::config::{self, AllowedHosts, Config, MAX_NSID, MAX_SUBSYSTEMS};
use crate::counters::{self, IoCounters};
use crate::directory::Directory;
use crate::error::{NamespaceError, StartError};
use crate::snapshot::{Namespace, Snapshot, Subsystem};
use crate::stats::{self, TargetStats, ThreadStats};
use crate::thread::mail::Mail;
use crate::thread::parts::Shared;
use crate::thread::run::{Start, endpoint_error, run};
use crate::thread::{MIN_BUFFER_BYTES, queue_bytes};

/// Share of the memory budget that goes to I/O buffers, and at most so much for each thread.
const BUFFER_SHARE: u64 = 4;
const MAX_BUFFER_BYTES: u64 = 16 << 20;
/// Queues that a budget must at least have room for: an Admin queue and an I/O queue of usual size.
const MIN_QUEUES: u64 = 2;
const USUAL_ENTRIES: u16 = 128;
/// Model number when none is configured.
const MODEL: &str = "flexblk";
/// How long a report of the threads may take.
const STATS_TIME: Duration = Duration::from_secs(1);
/// How long the threads have to end, beyond their own time to drain.
const STOP_TIME: Duration = Duration::from_secs(5);

/// A running target. Dropping it stops it.
pub struct Target {
    shared: Arc<Shared>,
    config: Arc<Config>,
    threads: Vec<JoinHandle<Result<(), flexblk_reactor::Error>>>,
    next_device: AtomicU64,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target")
            .field("address", &self.shared.address)
            .finish_non_exhaustive()
    }
}

impl Target {
    /// Opens the devices, binds the port, starts the threads. When it returns, hosts can connect.
    pub fn start(config: Config) -> Result<Self, StartError> {
        let threads = config.cores.len().max(1);
        let buffer_bytes = buffer_bytes(&config, threads)?;
        let budget = Budget::new(config.memory_budget_bytes - buffer_bytes * threads as u64);
        let shared = Arc::new(Shared {
            directory: Directory::new(config.limits, budget),
            started: Instant::now(),
            address: config.listener.address,
            threads,
            mail: OnceLock::new(),
        });
        let mut target = Self {
            shared,
            config: Arc::new(config),
            threads: Vec::new(),
            next_device: AtomicU64::new(0),
        };
        target.open_devices()?;
        target.start_threads(buffer_bytes)?;
        Ok(target)
    }

    /// Opens every configured device and makes the first snapshot.
    fn open_devices(&self) -> Result<(), StartError> {
        let config = Arc::clone(&self.config);
        let describe = |bdev: &str, subnqn: &str| {
            let (bdev, subnqn) = (bdev.to_owned(), subnqn.to_owned());
            move |source| StartError::Device {
                bdev,
                subnqn,
                source,
            }
        };
        let named = flexblk_blockdev::open_all(&config.bdevs)
            .map_err(describe("bdev", "the configuration"))?;
        let named: Vec<(u64, Arc<dyn BlockDevice>)> = named
            .into_iter()
            .map(|device| (self.device_id(), device))
            .collect();
        for subsystem in &config.subsystems {
            let nqn = &subsystem.nqn;
            self.add_subsystem(subsystem)?;
            for namespace in &subsystem.namespaces {
                let known = named
                    .iter()
                    .find(|(_, device)| *device.info().name == *namespace.bdev);
                let (id, device) = match known {
                    Some((id, device)) => (*id, Arc::clone(device)),
                    None => {
                        let device = open(&namespace.bdev)
                            .map_err(describe(&namespace.bdev, nqn.as_str()))?;
                        (self.device_id(), device)
                    }
                };
                self.attach(nqn, namespace, id, device)?;
            }
        }
        Ok(())
    }

    fn start_threads(&mut self, buffer_bytes: u64) -> Result<(), StartError> {
        let threads = self.shared.threads;
        let udp = SocketAddr::new(self.shared.address.ip(), self.config.listener.udp_port);
        let reuse_port = threads > 1;
        if reuse_port {
            // With SO_REUSEPORT the kernel lets a second target take part of the packets: find out
            // with a socket that has it not.
            let probe = UdpSocket::bind(udp).map_err(|source| {
                let bind = flexins::port::udp::UdpError::Bind {
                    address: udp,
                    source,
                };
                endpoint_error(udp, flexins::endpoint::EndpointError::Port(bind))
            })?;
            drop(probe);
        }
        let mut senders: Vec<mailbox::Sender<Mail>> = Vec::new();
        for id in 0..threads {
            let (ready, started) = mpsc::sync_channel(1);
            let start = Start {
                id,
                core: self.config.cores.get(id).copied(),
                shared: Arc::clone(&self.shared),
                config: Arc::clone(&self.config),
                buffer_bytes,
                reuse_port,
                ready,
            };
            let builder = std::thread::Builder::new().name(format!("data-{id}"));
            let handle = builder
                .spawn(move || run(start))
                .map_err(StartError::Thread)?;
            self.threads.push(handle);
            match started.recv() {
                Ok(Ok(sender)) => senders.push(sender),
                Ok(Err(error)) => {
                    stop(&senders);
                    return Err(error);
                }
                Err(_) => {
                    stop(&senders);
                    return Err(StartError::ThreadEnded);
                }
            }
        }
        // Set once, here.
        let _ = self.shared.mail.set(senders.into_boxed_slice());
        Ok(())
    }

    /// Where hosts connect to: `nvme+flexins://address:service/subnqn`, one for each subsystem.
    #[must_use]
    pub fn uris(&self) -> Vec<String> {
        let port = self.config.listener.udp_port;
        let query = if port == config::DEFAULT_UDP_PORT {
            String::new()
        } else {
            format!("?udp_port={port}")
        };
        let snapshot = self.shared.directory.snapshot();
        let subsystems = snapshot.subsystems.iter().flatten();
        let address = self.shared.address;
        subsystems
            .map(|subsystem| format!("nvme+flexins://{address}/{}{query}", subsystem.nqn.as_str()))
            .collect()
    }

    /// What is exported now.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.directory.snapshot()
    }

    /// Adds a subsystem without namespaces. Discovery controllers are told.
    pub fn add_subsystem(&self, subsystem: &config::Subsystem) -> Result<(), NamespaceError> {
        let threads = self.shared.threads;
        self.update(|snapshot| {
            let nqn = &subsystem.nqn;
            if snapshot.find(nqn).is_some() {
                return Err(NamespaceError::SubsystemExists(nqn.as_str().to_owned()));
            }
            let mut next = snapshot.clone();
            next.generation += 1;
            let slot = next.subsystems.iter().position(Option::is_none);
            let slot = slot.unwrap_or(next.subsystems.len());
            if slot >= MAX_SUBSYSTEMS {
                return Err(NamespaceError::TooManySubsystems);
            }
            let new = Arc::new(Subsystem {
                slot,
                nqn: nqn.clone(),
                serial: subsystem
                    .serial
                    .clone()
                    .unwrap_or_else(|| serial_of(nqn))
                    .into(),
                model: subsystem.model.as_deref().unwrap_or(MODEL).into(),
                hosts: subsystem.hosts.clone(),
                namespaces: Vec::new(),
                counters: (0..threads).map(|_| IoCounters::default()).collect(),
            });
            match next.subsystems.get_mut(slot) {
                Some(place) => *place = Some(new),
                None => next.subsystems.push(Some(new)),
            }
            Ok(next)
        })
    }

    /// Removes a subsystem. Its controllers are closed, discovery controllers are told.
    pub fn remove_subsystem(&self, nqn: &Nqn) -> Result<(), NamespaceError> {
        self.update(|snapshot| {
            let slot = find(snapshot, nqn)?.slot;
            let mut next = snapshot.clone();
            next.generation += 1;
            if let Some(place) = next.subsystems.get_mut(slot) {
                *place = None;
            }
            Ok(next)
        })
    }

    /// Changes who may connect. Controllers of hosts that no longer may are closed, discovery
    /// controllers are told.
    pub fn set_allowed_hosts(&self, nqn: &Nqn, hosts: AllowedHosts) -> Result<(), NamespaceError> {
        self.update(|snapshot| {
            let changed = Subsystem {
                hosts,
                ..Subsystem::clone(find(snapshot, nqn)?)
            };
            let mut next = replace(snapshot, changed);
            next.generation += 1;
            Ok(next)
        })
    }

    /// Opens a block device and adds a namespace on it. Hosts are told; no I/O is paused.
    pub fn add_namespace(
        &self,
        nqn: &Nqn,
        namespace: &config::Namespace,
    ) -> Result<Nsid, NamespaceError> {
        let snapshot = self.shared.directory.snapshot();
        let in_use = snapshot
            .subsystems
            .iter()
            .flatten()
            .flat_map(|subsystem| subsystem.active());
        let shared = in_use
            .into_iter()
            .find(|other| *other.info.name == *namespace.bdev);
        let (id, device) = match shared {
            Some(other) => (other.device_id, Arc::clone(&other.device)),
            None => (self.device_id(), open(&namespace.bdev)?),
        };
        self.attach(nqn, namespace, id, device)
    }

    fn attach(
        &self,
        nqn: &Nqn,
        namespace: &config::Namespace,
        device_id: u64,
        device: Arc<dyn BlockDevice>,
    ) -> Result<Nsid, NamespaceError> {
        let mut given = Nsid::NONE;
        self.update(|snapshot| {
            let subsystem = find(snapshot, nqn)?;
            let nsid = match namespace.nsid {
                Some(nsid) => nsid,
                None => free_nsid(subsystem)?,
            };
            if !(1..=MAX_NSID).contains(&nsid.get()) {
                return Err(NamespaceError::Range);
            }
            if subsystem.namespace(nsid).is_some() {
                let subnqn = nqn.as_str().to_owned();
                return Err(NamespaceError::Exists {
                    subnqn,
                    nsid: nsid.get(),
                });
            }
            given = nsid;
            let info = device.info();
            let uuid = namespace.uuid.unwrap_or(info.uuid);
            let new = Namespace {
                nsid,
                device_id,
                device: Arc::clone(&device),
                info,
                uuid,
            };
            let mut changed = Subsystem::clone(subsystem);
            set(&mut changed, nsid, Some(Arc::new(new)));
            Ok(replace(snapshot, changed))
        })?;
        Ok(given)
    }

    /// Removes a namespace. Hosts are told; I/O to it that has begun ends normally, its device is
    /// closed afterwards.
    pub fn remove_namespace(&self, nqn: &Nqn, nsid: Nsid) -> Result<(), NamespaceError> {
        self.update(|snapshot| {
            let subsystem = find(snapshot, nqn)?;
            active(subsystem, nsid)?;
            let mut changed = Subsystem::clone(subsystem);
            set(&mut changed, nsid, None);
            Ok(replace(snapshot, changed))
        })
    }

    /// Makes a namespace's device `new_bytes` long. Hosts are told; no I/O is paused. Every namespace
    /// on the device follows.
    pub fn resize_namespace(
        &self,
        nqn: &Nqn,
        nsid: Nsid,
        new_bytes: u64,
    ) -> Result<(), NamespaceError> {
        let snapshot = self.shared.directory.snapshot();
        let namespace = active(find(&snapshot, nqn)?, nsid)?;
        namespace.device.resize(new_bytes)?;
        self.refresh(namespace.device_id)
    }

    /// Looks again at how long the file or device behind a namespace is.
    pub fn rescan_namespace(&self, nqn: &Nqn, nsid: Nsid) -> Result<(), NamespaceError> {
        let snapshot = self.shared.directory.snapshot();
        let namespace = active(find(&snapshot, nqn)?, nsid)?;
        namespace.device.rescan()?;
        self.refresh(namespace.device_id)
    }

    /// Takes the device's size over into every namespace on it.
    fn refresh(&self, device_id: u64) -> Result<(), NamespaceError> {
        self.update(|snapshot| {
            let mut next = snapshot.clone();
            for place in next.subsystems.iter_mut().flatten() {
                let stale: Vec<Namespace> = place
                    .active()
                    .filter(|namespace| namespace.device_id == device_id)
                    .map(|namespace| Namespace {
                        info: namespace.device.info(),
                        ..Namespace::clone(namespace)
                    })
                    .collect();
                if !stale.is_empty() {
                    let mut changed = Subsystem::clone(place);
                    for namespace in stale {
                        set(&mut changed, namespace.nsid, Some(Arc::new(namespace)));
                    }
                    *place = Arc::new(changed);
                }
            }
            Ok(next)
        })
    }

    /// Puts a new snapshot in force and sends it to the threads, which swap to it between two I/Os.
    fn update(
        &self,
        change: impl FnOnce(&Snapshot) -> Result<Snapshot, NamespaceError>,
    ) -> Result<(), NamespaceError> {
        let snapshot = self.shared.directory.update(change)?;
        let Some(mailboxes) = self.shared.mail.get() else {
            return Ok(());
        };
        for mailbox in mailboxes {
            send(mailbox, || Mail::Snapshot(Arc::clone(&snapshot)));
        }
        Ok(())
    }

    fn device_id(&self) -> u64 {
        self.next_device.fetch_add(1, Ordering::Relaxed)
    }

    /// Counters of everything. A thread that does not answer within a second is left out.
    #[must_use]
    pub fn stats(&self) -> TargetStats {
        let mut threads: Vec<ThreadStats> = Vec::new();
        let mailboxes = self
            .shared
            .mail
            .get()
            .map_or(&[][..], |mailboxes| mailboxes);
        let (reply, reports) = mpsc::sync_channel(mailboxes.len().max(1));
        for mailbox in mailboxes {
            send(mailbox, || Mail::Stats(reply.clone()));
        }
        drop(reply);
        let deadline = Instant::now() + STATS_TIME;
        while let Ok(report) =
            reports.recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            threads.push(report);
        }
        threads.sort_by_key(|report| report.thread);
        let snapshot = self.shared.directory.snapshot();
        let subsystems = snapshot.subsystems.iter().flatten();
        let mut stats = TargetStats {
            uptime_s: self.shared.started.elapsed().as_secs_f64(),
            cpu_us: stats::micros(stats::cpu_time(true)),
            controllers: self.shared.directory.controller_count(),
            budget_free_bytes: self.shared.directory.budget().free_bytes(),
            subsystems: subsystems
                .map(|subsystem| {
                    (
                        subsystem.nqn.as_str().to_owned(),
                        counters::total(&subsystem.counters),
                    )
                })
                .collect(),
            threads,
            ..TargetStats::default()
        };
        stats.sum_transport();
        stats
    }

    /// Has a data thread ended by itself? Then the target is of no use any more.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Closes every connection and ends the threads, within a few seconds whatever hosts do. False
    /// when a thread had failed or did not end.
    pub fn shutdown(mut self) -> bool {
        self.stop_threads()
    }

    fn stop_threads(&mut self) -> bool {
        if let Some(mailboxes) = self.shared.mail.get() {
            stop(mailboxes);
        }
        let deadline = Instant::now() + STOP_TIME;
        let mut clean = true;
        for thread in self.threads.drain(..) {
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            clean &= thread.is_finished() && matches!(thread.join(), Ok(Ok(())));
        }
        clean
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.stop_threads();
    }
}

/// Puts a message into a mailbox. A full one is emptied by its thread within a turn: wait for that.
fn send(mailbox: &mailbox::Sender<Mail>, message: impl Fn() -> Mail) {
    for _ in 0..1000 {
        match mailbox.try_send(message()) {
            Err(mailbox::TrySendError::Full(_)) => std::thread::sleep(Duration::from_millis(1)),
            // A thread that has ended needs no message.
            _ => return,
        }
    }
    tracing::error!("a data thread does not read its mail");
}

fn stop(mailboxes: &[mailbox::Sender<Mail>]) {
    for mailbox in mailboxes {
        send(mailbox, || Mail::Shutdown);
    }
}

/// The memory for I/O buffers of each thread; an error when the budget is too small for the longest
/// transfer and a queue or two.
fn buffer_bytes(config: &Config, threads: usize) -> Result<u64, StartError> {
    let budget = config.memory_budget_bytes;
    let share = (budget / BUFFER_SHARE / threads as u64).clamp(MIN_BUFFER_BYTES, MAX_BUFFER_BYTES);
    let queues = MIN_QUEUES * queue_bytes(USUAL_ENTRIES.min(config.limits.queue_entries));
    let needed = share * threads as u64 + queues;
    if budget < needed {
        return Err(StartError::MemoryBudget {
            budget_bytes: budget,
            needed_bytes: needed.next_multiple_of(1 << 20),
            threads,
        });
    }
    Ok(share)
}

fn open(bdev: &str) -> Result<Arc<dyn BlockDevice>, flexblk_blockdev::Error> {
    let config: BdevConfig = bdev.parse()?;
    flexblk_blockdev::open(&config)
}

fn find<'a>(snapshot: &'a Snapshot, nqn: &Nqn) -> Result<&'a Arc<Subsystem>, NamespaceError> {
    snapshot
        .find(nqn)
        .ok_or_else(|| NamespaceError::NoSubsystem(nqn.as_str().to_owned()))
}

fn active(subsystem: &Subsystem, nsid: Nsid) -> Result<&Arc<Namespace>, NamespaceError> {
    let gone = || NamespaceError::NoNamespace {
        subnqn: subsystem.nqn.as_str().to_owned(),
        nsid: nsid.get(),
    };
    subsystem.namespace(nsid).ok_or_else(gone)
}

fn free_nsid(subsystem: &Subsystem) -> Result<Nsid, NamespaceError> {
    let free = (1..=MAX_NSID)
        .map(Nsid::new)
        .find(|nsid| subsystem.namespace(*nsid).is_none());
    free.ok_or(NamespaceError::Range)
}

/// A namespace, or none, under an identifier that was checked.
fn set(subsystem: &mut Subsystem, nsid: Nsid, namespace: Option<Arc<Namespace>>) {
    let Some(index) = nsid.get().checked_sub(1).map(|index| index as usize) else {
        return;
    };
    if subsystem.namespaces.len() <= index {
        subsystem.namespaces.resize(index + 1, None);
    }
    if let Some(place) = subsystem.namespaces.get_mut(index) {
        *place = namespace;
    }
}

/// The snapshot with that subsystem in its slot.
fn replace(snapshot: &Snapshot, subsystem: Subsystem) -> Snapshot {
    let mut next = snapshot.clone();
    if let Some(place) = next.subsystems.get_mut(subsystem.slot) {
        *place = Some(Arc::new(subsystem));
    }
    next
}

/// A serial number that a subsystem keeps over restarts: 20 hexadecimal digits of its name's hash.
fn serial_of(nqn: &Nqn) -> String {
    let hash = Sha256::digest(nqn.as_str().as_bytes());
    hash.iter()
        .take(10)
        .map(|byte| format!("{byte:02X}"))
        .collect()
}
