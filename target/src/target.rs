//! The target as a library: start, change what is exported, look at numbers, stop.

use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use flexblk_blockdev::BdevConfig;
use flexblk_nvme::log::ana::AnaState;
use flexblk_nvme::{Nqn, Nsid, Status, StatusCode};
use flexblk_reactor::mailbox;

use crate::association::{Association, lock};
use crate::bdevs::Bdev;
use crate::budget::Budget;
use crate::captures::{CaptureError, CaptureReport, CaptureRequest, Captures};
use crate::config::{self, AllowedHosts, Config, ListenAddress, Transport};
use crate::control::{Asker, Control, Desk, Order, What};
use crate::controller::Addresses;
use crate::counters;
use crate::directory::Directory;
use crate::draft::{self, Draft};
use crate::error::{NamespaceError, StartError};
use crate::histogram::HistogramConfig;
use crate::media::KeptMedia;
use crate::metrics::{Metrics, Series};
use crate::port::{self, Port};
use crate::ptpl::State;
use crate::recorder::{self, Recorder};
use crate::snapshot::{Protection, Snapshot};
use crate::stats::{self, QueueReport, TargetStats, ThreadStats};
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
/// How long a report of the threads may take.
const STATS_TIME: Duration = Duration::from_secs(1);
/// How long the control thread may take for an order of management.
const ORDER_TIME: Duration = Duration::from_secs(10);
/// How long the threads have to end, beyond their own time to drain.
const STOP_TIME: Duration = Duration::from_secs(5);

/// A running target. Dropping it stops it.
pub struct Target {
    shared: Arc<Shared>,
    config: Arc<Config>,
    captures: Captures,
    threads: Mutex<Vec<JoinHandle<Result<(), flexblk_reactor::Error>>>>,
    bdevs: Mutex<Vec<Bdev>>,
    kept_media: Option<Arc<KeptMedia>>,
    control: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target")
            .field("addresses", &self.shared.addresses)
            .finish_non_exhaustive()
    }
}

impl Target {
    /// Opens the devices, binds the port, starts the threads. When it returns, hosts can connect.
    pub fn start(config: Config) -> Result<Self, StartError> {
        let (target, buffer_bytes) = Self::without_threads(config)?;
        target.start_threads(buffer_bytes)?;
        target.start_control()?;
        Ok(target)
    }

    /// A target whose data threads are still to come, and the bytes of I/O buffers that each gets.
    pub(crate) fn without_threads(config: Config) -> Result<(Self, u64), StartError> {
        let threads = config.cores.len().max(1);
        let buffer_bytes = buffer_bytes(&config, threads)?;
        let state = match &config.ptpl_file {
            Some(path) => {
                State::check_place(path)?;
                State::load(path)?
            }
            None => State::default(),
        };
        let kept_media = config
            .ptpl_file
            .is_some()
            .then(|| Arc::new(KeptMedia::restored(state.marks())));
        let budget = Budget::new(config.memory_budget_bytes - buffer_bytes * threads as u64);
        let ports = start_ports(&config, threads)?;
        let addresses = Addresses {
            flexins: config.listener.address,
            tcp: ports
                .iter()
                .find(|port| port.id == port::TCP_PORT)
                .map(|port| port.listen.address),
        };
        let shared = Arc::new(Shared {
            directory: Directory::new(config.limits, budget),
            started: Instant::now(),
            metrics: Metrics::default(),
            addresses,
            threads,
            recorders: (0..threads).map(|_| Recorder::default()).collect(),
            managing: Mutex::default(),
            changing: Mutex::default(),
            kept: Mutex::new(Arc::new(state)),
            epochs: (0..threads).map(|_| AtomicU64::new(0)).collect(),
            desk: Desk::default(),
            can_persist: config.ptpl_file.is_some(),
            claims: Mutex::default(),
            mail: OnceLock::new(),
        });
        let target = Self {
            shared,
            captures: Captures::new(config.listener.capture.as_deref(), threads),
            config: Arc::new(config),
            threads: Mutex::default(),
            bdevs: Mutex::default(),
            kept_media,
            control: Mutex::default(),
        };
        target.open_devices(ports)?;
        Ok((target, buffer_bytes))
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Opens every configured device and makes the first snapshot.
    fn open_devices(&self, ports: Vec<Arc<Port>>) -> Result<(), StartError> {
        let config = Arc::clone(&self.config);
        self.change(|draft| {
            draft.snapshot.ports = ports;
            draft.set_discovery(config.discovery.clone())?;
            for bdev in &config.bdevs {
                draft
                    .create_bdev(bdev.clone(), false)
                    .map_err(|error| not_opened(error, bdev.name(), "the configuration"))?;
            }
            for subsystem in &config.subsystems {
                draft.add_subsystem(subsystem)?;
                for namespace in &subsystem.namespaces {
                    draft
                        .add_namespace(&subsystem.nqn, namespace)
                        .map_err(|error| {
                            not_opened(error, &namespace.bdev, subsystem.nqn.as_str())
                        })?;
                }
            }
            Ok(())
        })
    }

    /// Starts the thread for changes that hosts ask for.
    fn start_control(&self) -> Result<(), StartError> {
        let Some(control) = self.control() else {
            return Ok(());
        };
        let builder = std::thread::Builder::new().name("control".into());
        let handle = builder
            .spawn(move || control.run())
            .map_err(StartError::Thread)?;
        *lock(&self.control) = Some(handle);
        Ok(())
    }

    /// Who carries out what hosts want changed; only the first call gives it.
    pub(crate) fn control(&self) -> Option<Control> {
        Control::new(Arc::clone(&self.shared), self.config.ptpl_file.clone())
    }

    fn start_threads(&self, buffer_bytes: u64) -> Result<(), StartError> {
        let threads = self.shared.threads;
        let udp = SocketAddr::new(
            self.shared.addresses.flexins.ip(),
            self.config.listener.udp_port,
        );
        let reuse_port = threads > 1;
        // With SO_REUSEPORT the kernel lets a second target take part of the packets: find out with a
        // socket that has it not. And wait for a predecessor.
        let probe = port::once_free(|| UdpSocket::bind(udp)).map_err(|source| {
            let bind = flexins::port::udp::UdpError::Bind {
                address: udp,
                source,
            };
            endpoint_error(udp, flexins::endpoint::EndpointError::Port(bind))
        })?;
        drop(probe);
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
            lock(&self.threads).push(handle);
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

    /// Where NVMe/TCP is listened on.
    #[must_use]
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.shared.addresses.tcp
    }

    /// Where hosts connect to: for each subsystem `nvme+flexins://address:service/subnqn`, and with
    /// NVMe/TCP `nvme+tcp://address:port/subnqn`.
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
        let uri = |nqn: &Nqn, listen: &ListenAddress| {
            let (address, nqn) = (listen.address, nqn.as_str());
            match listen.trtype {
                Transport::Flexins => format!("nvme+flexins://{address}/{nqn}{query}"),
                Transport::Tcp => format!("nvme+tcp://{address}/{nqn}"),
            }
        };
        subsystems
            .flat_map(|subsystem| {
                let ports = snapshot.ports.iter();
                ports
                    .filter(|port| subsystem.is_reached_at(port))
                    .map(|port| uri(&subsystem.nqn, &port.listen))
            })
            .collect()
    }

    /// What is exported now.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.directory.snapshot()
    }

    /// The block devices that are open.
    #[must_use]
    pub fn bdevs(&self) -> Vec<Bdev> {
        lock(&self.bdevs).clone()
    }

    /// Adds a subsystem without namespaces. Discovery controllers are told.
    pub fn add_subsystem(&self, subsystem: &config::Subsystem) -> Result<(), NamespaceError> {
        self.change(|draft| draft.add_subsystem(subsystem))
    }

    /// Removes a subsystem. Its controllers are closed, discovery controllers are told.
    pub fn remove_subsystem(&self, nqn: &Nqn) -> Result<(), NamespaceError> {
        self.change(|draft| draft.remove_subsystem(nqn))
    }

    /// Changes who may connect. Controllers of hosts that no longer may are closed, discovery
    /// controllers are told.
    pub fn set_allowed_hosts(&self, nqn: &Nqn, hosts: AllowedHosts) -> Result<(), NamespaceError> {
        self.change(|draft| draft.set_allowed_hosts(nqn, hosts))
    }

    /// Adds a namespace on a block device: an open one by its name, or one that is opened for it by
    /// its short form. Hosts are told; no I/O is paused.
    pub fn add_namespace(
        &self,
        nqn: &Nqn,
        namespace: &config::Namespace,
    ) -> Result<Nsid, NamespaceError> {
        self.change(|draft| draft.add_namespace(nqn, namespace))
    }

    /// Changes name, addresses and referrals of the discovery service. Discovery controllers are told.
    pub fn set_discovery(&self, discovery: config::Discovery) -> Result<(), NamespaceError> {
        self.change(|draft| draft.set_discovery(discovery))
    }

    /// Changes where a subsystem is reached: at these addresses only, or, with `None`, at those that
    /// the target listens on from the start. Addresses are opened and closed as needed, controllers of
    /// hosts that came by one that is no longer there are closed, discovery controllers are told.
    pub fn set_listeners(
        &self,
        nqn: &Nqn,
        listeners: Option<&[ListenAddress]>,
    ) -> Result<(), NamespaceError> {
        self.change(|draft| draft.set_listeners(nqn, listeners))
    }

    /// Changes which hosts see a namespace, of those that may connect. Hosts that see a difference are
    /// told.
    pub fn set_namespace_hosts(
        &self,
        nqn: &Nqn,
        nsid: Nsid,
        hosts: AllowedHosts,
    ) -> Result<(), NamespaceError> {
        self.change(|draft| draft.set_namespace_hosts(nqn, nsid, hosts))
    }

    /// Changes the state of an ANA group (1 to [`config::MAX_ANA_GROUPS`]) or of all groups, through
    /// the port of that identifier or through all. Hosts are told; I/O of other groups does not notice.
    pub fn set_ana_state(
        &self,
        nqn: &Nqn,
        group: Option<u32>,
        port: Option<u16>,
        state: AnaState,
    ) -> Result<(), NamespaceError> {
        self.change(|draft| draft.set_ana_state(nqn, group, port, state))
    }

    /// Moves a namespace to another ANA group. Hosts are told.
    pub fn set_ana_group(&self, nqn: &Nqn, nsid: Nsid, group: u32) -> Result<(), NamespaceError> {
        self.change(|draft| draft.set_ana_group(nqn, nsid, group))
    }

    /// Changes a namespace's write protection, as a host can do with Set Features: it is saved before
    /// it is in force, and in force on every data thread when this returns. Hosts are told.
    pub fn set_write_protection(
        &self,
        nqn: &Nqn,
        nsid: Nsid,
        protection: Protection,
    ) -> Result<(), NamespaceError> {
        let snapshot = self.shared.directory.snapshot();
        let subsystem = draft::find(&snapshot, nqn)?;
        if draft::active(subsystem, nsid)?.protection == protection {
            return Ok(());
        }
        let (reply, answer) = mpsc::sync_channel(1);
        let ordered = self.shared.desk.order(Order {
            subsystem: subsystem.slot,
            subnqn: nqn.clone(),
            nsid,
            what: What::Protect(protection),
            from: Asker::Management(reply),
        });
        let status = match ordered {
            true => answer.recv_timeout(ORDER_TIME).ok(),
            false => None,
        };
        match status.unwrap_or(StatusCode::CommandInterrupted.into()) {
            Status::SUCCESS => Ok(()),
            status => Err(NamespaceError::WriteProtect {
                subnqn: nqn.as_str().to_owned(),
                nsid: nsid.get(),
                status,
            }),
        }
    }

    /// Removes a namespace. Hosts are told; I/O to it that has begun ends normally. A device that was
    /// opened for it is closed afterwards.
    pub fn remove_namespace(&self, nqn: &Nqn, nsid: Nsid) -> Result<(), NamespaceError> {
        self.change(|draft| draft.remove_namespace(nqn, nsid))
    }

    /// Opens a block device for namespaces to come.
    pub fn create_bdev(&self, config: BdevConfig) -> Result<(), NamespaceError> {
        self.change(|draft| draft.create_bdev(config, false).map(|_| ()))
    }

    /// Closes a block device and removes the namespaces on it; hosts are told, I/O that has begun ends
    /// normally.
    pub fn delete_bdev(&self, name: &str) -> Result<(), NamespaceError> {
        self.change(|draft| draft.delete_bdev(name))
    }

    /// Makes a block device `new_bytes` long. Hosts are told; no I/O is paused. Every namespace on it
    /// follows.
    pub fn resize_bdev(&self, name: &str, new_bytes: u64) -> Result<(), NamespaceError> {
        let bdev = self.bdev(name)?;
        bdev.device.resize(new_bytes)?;
        self.refresh(bdev.id)
    }

    /// Changes of a block device what can change under I/O, such as a delay device's latencies; see
    /// [`flexblk_blockdev::BlockDevice::reconfigure`].
    pub fn reconfigure_bdev(&self, config: BdevConfig) -> Result<(), NamespaceError> {
        self.change(|draft| draft.reconfigure_bdev(config))
    }

    /// Counts a block device's latencies so, or no more (`None`). A histogram of the same kind that is
    /// counted already goes on.
    pub fn set_histogram(
        &self,
        name: &str,
        config: Option<HistogramConfig>,
    ) -> Result<(), NamespaceError> {
        self.change(|draft| draft.set_histogram(name, config))
    }

    /// Looks again at how long the file or device behind a block device is.
    pub fn rescan_bdev(&self, name: &str) -> Result<(), NamespaceError> {
        let bdev = self.bdev(name)?;
        bdev.device.rescan()?;
        self.refresh(bdev.id)
    }

    /// Makes a namespace's device `new_bytes` long: [`Target::resize_bdev`] by namespace.
    pub fn resize_namespace(
        &self,
        nqn: &Nqn,
        nsid: Nsid,
        new_bytes: u64,
    ) -> Result<(), NamespaceError> {
        let snapshot = self.shared.directory.snapshot();
        let namespace = draft::active(draft::find(&snapshot, nqn)?, nsid)?;
        namespace.device.resize(new_bytes)?;
        self.refresh(namespace.device_id)
    }

    /// Looks again at how long a namespace's device is: [`Target::rescan_bdev`] by namespace.
    pub fn rescan_namespace(&self, nqn: &Nqn, nsid: Nsid) -> Result<(), NamespaceError> {
        let snapshot = self.shared.directory.snapshot();
        let namespace = draft::active(draft::find(&snapshot, nqn)?, nsid)?;
        namespace.device.rescan()?;
        self.refresh(namespace.device_id)
    }

    fn bdev(&self, name: &str) -> Result<Bdev, NamespaceError> {
        let found = lock(&self.bdevs)
            .iter()
            .find(|bdev| bdev.name() == name)
            .cloned();
        found.ok_or_else(|| NamespaceError::NoBdev(name.to_owned()))
    }

    fn refresh(&self, device_id: u64) -> Result<(), NamespaceError> {
        self.change(|draft| {
            draft.refresh(device_id);
            Ok(())
        })
    }

    /// Is there a file for what has to survive a power loss, and does it say what hosts and management have set?
    pub(crate) fn has_kept(&self) -> bool {
        self.shared.can_persist && lock(&self.shared.kept).was_saved()
    }

    /// Looks at what is exported, as a change would find it.
    pub(crate) fn look<R>(&self, look: impl FnOnce(&Draft) -> R) -> R {
        let next_device = lock(&self.shared.managing);
        look(&self.draft(*next_device))
    }

    fn draft(&self, next_device: u64) -> Draft {
        Draft {
            snapshot: Snapshot::clone(&self.shared.directory.snapshot()),
            bdevs: lock(&self.bdevs).clone(),
            threads: self.shared.threads,
            flexins: self.config.listener.address.ip(),
            next_device,
            state: Arc::clone(&lock(&self.shared.kept)),
            kept_media: self.kept_media.clone(),
        }
    }

    /// Makes a change on a copy of what is exported, puts the copy in force when all of it has
    /// succeeded, and sends it to the threads, which swap to it between two I/Os. One change at a
    /// time; what hosts change meanwhile (reservations, write protection) is not held up, and kept.
    pub(crate) fn change<R, E>(
        &self,
        change: impl FnOnce(&mut Draft) -> Result<R, E>,
    ) -> Result<R, E> {
        let mut next_device = lock(&self.shared.managing);
        let mut draft = self.draft(*next_device);
        let base = draft.snapshot.clone();
        let result = change(&mut draft)?;
        *next_device = draft.next_device;
        draft.close_ports();
        let changing = lock(&self.shared.changing);
        let current = self.shared.directory.snapshot();
        draft.snapshot.follow_hosts(&base, &current);
        let kept = Arc::clone(&lock(&self.shared.kept));
        if !Arc::ptr_eq(&kept, &draft.state) {
            draft.snapshot.follow_kept(&base, &kept);
        }
        let snapshot = self.shared.directory.replace(draft.snapshot);
        let closed = core::mem::replace(&mut *lock(&self.bdevs), draft.bdevs);
        for mailbox in self.shared.mail.get().into_iter().flatten() {
            send(mailbox, || Mail::Snapshot(Arc::clone(&snapshot)));
        }
        drop(changing);
        drop(closed);
        self.shared
            .metrics
            .retain(|series| is_there(&snapshot, series));
        Ok(result)
    }

    /// Counters of everything. A thread that does not answer within a second is left out.
    #[must_use]
    pub fn stats(&self) -> TargetStats {
        let mut threads: Vec<ThreadStats> = self.ask(Mail::Stats);
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

    /// The queue pairs that belong to a controller. A thread that does not answer within a second is
    /// left out.
    #[must_use]
    pub fn queues(&self) -> Vec<QueueReport> {
        let mut queues: Vec<QueueReport> = self.ask(Mail::Queues).into_iter().flatten().collect();
        queues.sort_by_key(|queue| (queue.cntlid, queue.qid));
        queues
    }

    /// Asks every thread something; gives the answers that come in time.
    fn ask<T>(&self, question: impl Fn(mpsc::SyncSender<T>) -> Mail) -> Vec<T> {
        let mailboxes = self.mailboxes();
        let (reply, reports) = mpsc::sync_channel(mailboxes.len().max(1));
        for mailbox in mailboxes {
            send(mailbox, || question(reply.clone()));
        }
        drop(reply);
        let deadline = Instant::now() + STATS_TIME;
        let left = || deadline.saturating_duration_since(Instant::now());
        std::iter::from_fn(|| reports.recv_timeout(left()).ok()).collect()
    }

    /// Writes the packets of FlexiNS to files from now on; says to which.
    ///
    /// # Errors
    /// [`CaptureError`]: one is running, or a file cannot be made.
    pub fn start_capture(&self, request: &CaptureRequest) -> Result<Vec<PathBuf>, CaptureError> {
        self.captures.start(request, self.mailboxes())
    }

    /// Ends the capture of [`Target::start_capture`] or of the configuration.
    ///
    /// # Errors
    /// [`CaptureError::NotRunning`].
    pub fn stop_capture(&self) -> Result<CaptureReport, CaptureError> {
        self.captures.stop(self.mailboxes())
    }

    fn mailboxes(&self) -> &[mailbox::Sender<Mail>] {
        self.shared.mail.get().map_or(&[][..], |all| all)
    }

    /// What hosts do.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// What has happened lately on which thread, oldest first.
    #[must_use]
    pub fn flight_recorder(&self) -> Vec<(usize, recorder::Event)> {
        recorder::collect(&self.shared.recorders, |_| true)
    }

    /// Logs, or no longer logs, every command of a host. Kept for when it connects.
    pub fn trace_host(&self, host: &Nqn, on: bool) -> Result<(), String> {
        self.shared.directory.trace_host(host, on)
    }

    /// How long it has been running.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        self.shared.started.elapsed()
    }

    /// What the target was started with.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The controllers there are.
    #[must_use]
    pub fn controllers(&self) -> Vec<Arc<Association>> {
        self.shared.directory.controllers()
    }

    /// Has a data thread ended by itself? Then the target is of no use any more.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        lock(&self.threads).iter().any(JoinHandle::is_finished)
    }

    /// Closes every connection and ends the threads, within a few seconds whatever hosts do. False
    /// when a thread had failed or did not end.
    pub fn shutdown(self) -> bool {
        self.stop()
    }

    /// [`Target::shutdown`] for a target that others hold too: to them it then has no threads.
    pub fn stop(&self) -> bool {
        let control = lock(&self.control).take();
        if let Some(control) = control {
            // It waits for data threads: it goes before them.
            self.shared.desk.close();
            let _ = control.join();
        }
        if let Some(mailboxes) = self.shared.mail.get() {
            stop(mailboxes);
        }
        let deadline = Instant::now() + STOP_TIME;
        let mut clean = true;
        let threads = core::mem::take(&mut *lock(&self.threads));
        for thread in threads {
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
        self.stop();
    }
}

/// Puts a message into a mailbox. A full one is emptied by its thread within a turn: wait for that.
pub(crate) fn send(mailbox: &mailbox::Sender<Mail>, message: impl Fn() -> Mail) {
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

/// The ports that the target has from the start.
fn start_ports(config: &Config, threads: usize) -> Result<Vec<Arc<Port>>, StartError> {
    let flexins = Port::flexins(port::FLEXINS_PORT, config.listener.address, true);
    let mut ports = vec![Arc::new(flexins)];
    if let Some(tcp) = config.tcp {
        let failed = |source: std::io::Error| match source.raw_os_error() {
            Some(libc::EADDRINUSE) => StartError::TcpPortInUse(tcp.address),
            Some(libc::EADDRNOTAVAIL) => StartError::NoSuchAddress(tcp.address),
            _ => StartError::Tcp {
                address: tcp.address,
                source,
            },
        };
        let (address, sockets) =
            port::once_free(|| port::tcp_sockets(tcp.address, threads)).map_err(failed)?;
        let tcp = Port::tcp(port::TCP_PORT, address, true, sockets);
        ports.push(Arc::new(tcp));
    }
    Ok(ports)
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

/// A device that a configuration names and that cannot be opened.
fn not_opened(error: NamespaceError, bdev: &str, subnqn: &str) -> StartError {
    match error {
        NamespaceError::Device(source) => StartError::Device {
            bdev: bdev.to_owned(),
            subnqn: subnqn.to_owned(),
            source,
        },
        error => StartError::Namespace(error),
    }
}

/// Does the namespace still exist, on that device?
fn is_there(snapshot: &Snapshot, series: &Series) -> bool {
    let mut subsystems = snapshot.subsystems.iter().flatten();
    let subsystem = subsystems.find(|subsystem| subsystem.nqn.as_str() == series.subsystem);
    let namespace = subsystem.and_then(|subsystem| subsystem.namespace(Nsid::new(series.nsid)));
    namespace.is_some_and(|namespace| namespace.device_id == series.device_id)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::config;

    /// As opening an image on a server that hangs does.
    #[test]
    fn a_change_that_takes_long_does_not_hold_up_what_hosts_change() {
        let nqn = Nqn::new("nqn.2026-11.test:slow").unwrap();
        let mut subsystem = config::Subsystem::new(nqn.clone());
        subsystem.namespaces.push(config::Namespace::new("ram:1M"));
        let mut config = Config {
            subsystems: vec![subsystem],
            ..Config::default()
        };
        config.listener.address.set_port(0);
        config.listener.udp_port = flexblk_tests::ports::free_udp_port().unwrap();
        let target = Target::start(config).unwrap();
        let nsid = Nsid::new(1);
        let protection = || {
            let snapshot = target.snapshot();
            snapshot
                .find(&nqn)
                .unwrap()
                .namespace(nsid)
                .unwrap()
                .protection
        };
        let ([begun, ended], target) = ([(); 2].map(|()| Barrier::new(2)), &target);
        std::thread::scope(|scope| {
            let slow = scope.spawn(|| {
                target.change(|draft| {
                    begun.wait();
                    ended.wait();
                    draft.create_bdev("null:1M,name=late".parse().unwrap(), false)?;
                    Ok::<_, NamespaceError>(())
                })
            });
            begun.wait();
            let done = target.set_write_protection(&nqn, nsid, Protection::Protect);
            let meanwhile = protection();
            ended.wait();
            slow.join().unwrap().unwrap();
            done.unwrap();
            assert_eq!(meanwhile, Protection::Protect);
        });
        assert_eq!(
            protection(),
            Protection::Protect,
            "taken back by the change"
        );
        assert!(target.bdev("late").is_ok());
    }
}
