//! The NVMe controller as a state machine (Base 3): properties, Admin commands, asynchronous events,
//! keep-alive. Sans-IO: no socket, thread or clock inside.
//!
//! Calling order: [`Controller::property_get`], [`Controller::property_set`] and
//! [`Controller::handle`] for what the host sends; [`Controller::handle_timeout`] when
//! [`Controller::next_timeout`] has come; the `note_*` methods for what changed outside; after each,
//! [`Controller::poll_event`] until `None` gives Asynchronous Event Requests to complete, and
//! [`Controller::poll_action`] until `None` what is to be done outside.

mod events;
mod features;
mod identify;
mod keep_alive;
mod logs;
mod properties;
mod telemetry;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_nvme::aer::AsyncEvent;
use flexblk_nvme::command::Sqe;
use flexblk_nvme::command::admin::{Abort, Command};
use flexblk_nvme::features::FeatureId;
use flexblk_nvme::log::discovery::TransportType;
use flexblk_nvme::property::{Cc, Csts};
use flexblk_nvme::{Cid, Nsid, Qid, Status, StatusCode};

use crate::association::Association;
use crate::directory::Directory;
use crate::recorder::Recorder;
use crate::reservation::Notice;
use crate::snapshot::{Protection, Snapshot, Subsystem};

pub use events::MAX_REQUESTS as MAX_EVENT_REQUESTS;
pub use logs::discovery_log;

use events::{AsyncEvents, Event};
use features::{Features, ReservationMasks};
use keep_alive::KeepAlive;
use telemetry::Telemetry;

/// Abort commands that may be outstanding: Identify's ACL + 1 (Base 5.1.13.2.1).
pub const MAX_ABORTS: u8 = 4;
/// How long a controller is given to become ready or not: CAP.TO, CRTO.CRWMT, units of 500 ms.
pub const READY_TIMEOUT_500MS: u8 = 60;
/// How long after the last command a controller lives whose Keep Alive Timer is not active: one that is
/// not enabled ("the association between the host and controller shall be preserved for at least 2
/// minutes", Base 3.5.2), and a discovery controller without keep-alive (Base 3.1.3.3.2).
pub const IDLE: Duration = Duration::from_secs(120);

/// What kind of controller it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// I/O controller of a subsystem.
    Io,
    /// Discovery controller.
    Discovery,
}

/// Where a target listens from its start: `traddr` and, as the port, `trsvcid`, by transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// FlexiNS; the port is the RDMA-CM service id.
    pub flexins: SocketAddr,
    /// NVMe/TCP, if it is listened on.
    pub tcp: Option<SocketAddr>,
}

/// What a controller can see of its surroundings while it handles a command.
#[derive(Clone, Copy, Debug)]
pub struct Environment<'a> {
    /// What is exported.
    pub snapshot: &'a Snapshot,
    /// Limits and memory.
    pub directory: &'a Directory,
    /// The address by which the host reaches us, for ports that listen on any.
    pub own_ip: Option<IpAddr>,
    /// Port by which its Admin queue came.
    pub port: u16,
    /// What carries the controller's Admin queue.
    pub transport: TransportType,
    /// When the target was started.
    pub started: Instant,
    /// What an I/O queue of usual size costs.
    pub queue_bytes: u64,
    /// Is there a place for what has to survive a power loss?
    pub can_persist: bool,
    /// Most bytes of data in a command capsule of an I/O queue.
    pub in_capsule_bytes: u32,
    /// What has happened lately, by thread.
    pub recorders: &'a [Recorder],
    /// Now.
    pub now: Instant,
}

/// Answer to a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Complete it so, with that result in dwords 0 and 1.
    Done(Status, u64),
    /// Send these bytes to the host, then complete it with success.
    Data(Vec<u8>),
    /// It is completed later: an Asynchronous Event Request.
    Later,
    /// Try to abort that command of an I/O queue, then call [`Controller::abort_done`].
    Abort(Qid, Cid),
    /// Change that about the namespace, then complete it.
    Order(Nsid, Change),
}

/// A change of a namespace that a host asks for by Set Features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Reservations persist through a power loss, or no longer.
    Persist(bool),
    /// Write protection.
    Protect(Protection),
}

/// What is to be done outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Close the controller's I/O queues; then call [`Controller::note_queues_closed`].
    CloseQueues(Ending),
    /// Make what was written survive a power loss; then call [`Controller::note_flushed`].
    Flush,
    /// Complete this Asynchronous Event Request with Command Abort Requested.
    AbortedEvent(Cid),
    /// Close everything, the Admin queue too: the host is gone.
    Terminate(Reason),
}

/// What the host has asked for that the I/O queues have to be closed for first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// A Controller Level Reset: CC.EN was cleared.
    Reset,
    /// A shutdown: CC.SHN was set.
    Shutdown,
}

/// Why a controller ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No command within the Keep Alive Timeout.
    KeepAlive,
    /// No command for [`IDLE`], without a Keep Alive Timer that would be active.
    Idle,
    /// Keep Alive is off, and the host's transport has been silent for too long.
    Silence,
    /// The subsystem, or the host's right to it, is gone.
    NotAllowed,
}

/// A controller.
#[derive(Debug)]
pub struct Controller {
    association: Arc<Association>,
    kind: Kind,
    cc: Cc,
    csts: Csts,
    /// What waits for the I/O queues to close.
    ending: Option<Ending>,
    events: AsyncEvents,
    changed: ChangedNamespaces,
    reservations: ReservationLog,
    features: Features,
    keep_alive: KeepAlive,
    telemetry: Telemetry,
    aborts: u8,
    actions: VecDeque<Action>,
}

/// Namespaces that changed since the host read the log page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct ChangedNamespaces {
    nsids: BTreeSet<u32>,
    overflow: bool,
}

/// What the Reservation Notification log page says, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct ReservationLog {
    log: VecDeque<(u64, Nsid, Notice)>,
    count: u64,
    masks: ReservationMasks,
}

/// Entries of the Reservation Notification log (Base 5.1.12.1.32): what its "available" field can
/// count, and the one that is read.
const MAX_RESERVATION_NOTICES: usize = 256;

/// Entries of the Changed Attached Namespace List (Base 5.1.12.1.5).
const MAX_CHANGED: usize = 1024;

impl Controller {
    /// A controller whose Admin queue has just connected, with Connect's Keep Alive Timeout.
    #[must_use]
    pub fn new(association: Arc<Association>, kato_ms: u32, now: Instant) -> Self {
        let kind = if association.subsystem.is_some() {
            Kind::Io
        } else {
            Kind::Discovery
        };
        Self {
            keep_alive: KeepAlive::new(kind, kato_ms, now),
            association,
            kind,
            cc: Cc::new(),
            csts: Csts::new(),
            ending: None,
            events: AsyncEvents::default(),
            changed: ChangedNamespaces::default(),
            reservations: ReservationLog::default(),
            features: Features::default(),
            telemetry: Telemetry::default(),
            aborts: 0,
            actions: VecDeque::new(),
        }
    }

    /// What threads share about it.
    #[must_use]
    pub fn association(&self) -> &Arc<Association> {
        &self.association
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Bytes of data that the host sends with an Admin command, to be fetched before
    /// [`Controller::handle`].
    #[must_use]
    pub fn data_from_host(sqe: &Sqe) -> u32 {
        match Command::parse(sqe) {
            Ok(Command::SetFeatures(set)) if set.fid == FeatureId::HostBehavior => 512,
            _ => 0,
        }
    }

    /// Handles an Admin command. `data` is what [`Controller::data_from_host`] asked for.
    pub fn handle(&mut self, sqe: &Sqe, data: &[u8], environment: &Environment<'_>) -> Reply {
        self.keep_alive.command();
        match self.dispatch(sqe, data, environment) {
            Ok(reply) => reply,
            Err(status) => Reply::Done(status, 0),
        }
    }

    fn dispatch(
        &mut self,
        sqe: &Sqe,
        data: &[u8],
        environment: &Environment<'_>,
    ) -> Result<Reply, Status> {
        sqe.check_flags()?;
        // Base 3.5.1: before the controller is ready only Fabrics commands are processed. 3.6.1: after a
        // shutdown a reset is required before commands are.
        if !self.csts.rdy() || !self.cc.en() || self.csts.shst() != properties::SHST_NORMAL {
            return Err(StatusCode::CommandSequenceError.dnr());
        }
        let command = Command::parse(sqe)?;
        match command {
            Command::Identify(identify) => self.identify(&identify, environment).map(Reply::Data),
            Command::GetLogPage(get) => self.log_page(&get, environment).map(Reply::Data),
            Command::SetFeatures(set) if features::is_of_namespace(set.fid) => {
                self.set_namespace_feature(&set, environment)
            }
            Command::SetFeatures(set) => self
                .set_feature(&set, data, environment)
                .map(|result| done(result.into())),
            Command::GetFeatures(get) => self.get_feature(&get, environment),
            // Base 5.1.14, 3.9.2: what it has to do was done above.
            Command::KeepAlive(_) => Ok(done(0)),
            Command::AsyncEventRequest(_) => {
                self.events.request(sqe.cid())?;
                Ok(Reply::Later)
            }
            Command::Abort(abort) => self.abort(&abort),
        }
    }

    /// Abort (Base 5.1.1): an Asynchronous Event Request is aborted here, a command of an I/O queue
    /// by the thread of that queue. Discovery controllers do not have it (Base 3.1.3.3).
    fn abort(&mut self, abort: &Abort) -> Result<Reply, Status> {
        if self.kind == Kind::Discovery {
            return Err(StatusCode::InvalidOpcode.dnr());
        }
        if abort.sqid.is_admin() {
            if self.events.abort(abort.cid) {
                self.actions.push_back(Action::AbortedEvent(abort.cid));
                return Ok(done(Abort::ABORTED.into()));
            }
            return Ok(done(Abort::NOT_ABORTED.into()));
        }
        if self.association.thread_of(abort.sqid).is_none() {
            return Ok(done(Abort::NOT_ABORTED.into()));
        }
        if self.aborts >= MAX_ABORTS {
            return Err(StatusCode::AbortLimitExceeded.dnr());
        }
        self.aborts += 1;
        Ok(Reply::Abort(abort.sqid, abort.cid))
    }

    /// The thread of the I/O queue has answered a [`Reply::Abort`].
    pub fn abort_done(&mut self) {
        self.aborts = self.aborts.saturating_sub(1);
    }

    /// Namespaces of the subsystem were added, removed or changed.
    pub fn note_namespaces_changed(&mut self, nsids: &[Nsid]) {
        if self.kind != Kind::Io || nsids.is_empty() {
            return;
        }
        for nsid in nsids {
            if self.changed.nsids.len() < MAX_CHANGED {
                self.changed.nsids.insert(nsid.get());
            } else if !self.changed.nsids.contains(&nsid.get()) {
                self.changed.overflow = true;
            }
        }
        self.events.raise(Event::NamespaceChanged);
    }

    /// The state of an ANA group of the subsystem changed.
    pub fn note_ana_changed(&mut self) {
        if self.kind == Kind::Io {
            self.events.raise(Event::AnaChanged);
        }
    }

    /// Something happened to the host's registration or reservation of a namespace. A full log loses
    /// its oldest entry, which its page count then shows.
    pub fn note_reservation(&mut self, nsid: Nsid, notice: Notice) {
        if self.reservations.masks.is_masked(nsid, notice) {
            return;
        }
        self.reservations.count += 1;
        if self.reservations.log.len() == MAX_RESERVATION_NOTICES {
            self.reservations.log.pop_front();
        }
        let entry = (self.reservations.count, nsid, notice);
        self.reservations.log.push_back(entry);
        self.events.raise(Event::ReservationLog);
    }

    /// The host has lost a connection without having asked for it, which the controller-initiated
    /// telemetry log tells.
    pub fn note_loss(&mut self) {
        if self.kind == Kind::Io {
            self.events.raise(Event::TelemetryChanged);
        }
    }

    /// The discovery log changed.
    pub fn note_discovery_changed(&mut self) {
        if self.kind == Kind::Discovery {
            self.events.raise(Event::DiscoveryChanged);
        }
    }

    /// The subsystem, or the host's right to it, is gone.
    pub fn note_not_allowed(&mut self) {
        self.terminate(Reason::NotAllowed);
    }

    fn terminate(&mut self, reason: Reason) {
        self.csts.set_cfs(true);
        self.association.set_ready(false);
        self.actions.push_back(Action::Terminate(reason));
    }

    /// When [`Controller::handle_timeout`] is due.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Instant> {
        self.keep_alive.deadline()
    }

    /// An interval is over: without a command in it the host is gone (Base 3.9).
    pub fn handle_timeout(&mut self, now: Instant) {
        let traffic = self.association.traffic();
        if let Some(reason) = self.keep_alive.expired(now, traffic) {
            self.terminate(reason);
        }
    }

    /// An Asynchronous Event Request to complete now, with dword 0.
    pub fn poll_event(&mut self) -> Option<(Cid, u32)> {
        let (cid, event) = self.events.poll()?;
        let event = match event {
            Event::NamespaceChanged => AsyncEvent::NAMESPACE_CHANGED,
            Event::DiscoveryChanged => AsyncEvent::DISCOVERY_CHANGED,
            Event::TelemetryChanged => AsyncEvent::TELEMETRY_CHANGED,
            Event::AnaChanged => AsyncEvent::ANA_CHANGED,
            Event::ReservationLog => AsyncEvent::RESERVATION_LOG,
        };
        Some((cid, event.result().to_dword()))
    }

    /// What is to be done outside.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Its subsystem as it is now; an error when it is gone.
    fn subsystem<'a>(&self, environment: &Environment<'a>) -> Result<&'a Arc<Subsystem>, Status> {
        let slot = self
            .association
            .subsystem
            .ok_or_else(|| StatusCode::InvalidField.dnr())?;
        environment
            .snapshot
            .subsystem(slot)
            .ok_or_else(|| StatusCode::InternalError.dnr())
    }
}

fn done(result: u64) -> Reply {
    Reply::Done(Status::SUCCESS, result)
}
