//! A controller on the host's side: the handle, and the control thread that keeps it alive.

use std::collections::VecDeque;
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use flexblk_nvme::aer::{AsyncEvent, Notice};
use flexblk_nvme::command::admin::Cns;
use flexblk_nvme::log::LogPageId;
use flexblk_nvme::log::ana::AnaState;
use flexblk_nvme::{Cid, Cntlid, Nqn, Nsid, Qid};
use flexblk_reactor::Waker;

use crate::admin::bring_up::{
    BroughtUp, Facts, bring_up, bring_up_io, connect_io_queue, read_namespaces,
};
use crate::admin::queue_connect::QueueConnect;
use crate::admin::runner::{Payload, Reply};
use crate::link::open::SharedEngine;
use crate::link::opening::Opening;
use crate::queue_pair::opening::{QueuePairOpening, Rest};
use crate::queue_pair::{Keep, Parts};
use crate::view::{ControllerView, QidLease, QidPool};
use crate::{
    ConnectOptions, Error, IdentifyController, LostReason, Namespace, NamespaceList, QueuePair,
    QueuePairOptions,
};

/// A connected controller. Cheap to clone; any thread may use it. The last clone (queue pairs included) disconnects.
#[derive(Clone)]
pub struct Controller {
    shared: Arc<Shared>,
}

/// How a controller is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControllerState {
    /// Ready and kept alive.
    Live,
    /// Gone for good; make a new one.
    Lost(LostReason),
}

/// What a controller tells without being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The list of namespaces, or one's size, changed; [`Controller::namespaces`] is already fresh.
    NamespacesChanged,
    /// The controller says that ANA states changed, or was asked for them; [`Controller::ana_state`] is already fresh.
    AnaChanged,
    /// The controller is lost.
    Lost(LostReason),
}

struct Shared {
    options: ConnectOptions,
    facts: Facts,
    granted_io_queues: u16,
    qids: Arc<QidPool>,
    view: Arc<ControllerView>,
    events: Arc<Events>,
    shared_engine: SharedEngine,
    requests: SyncSender<Request>,
    waker: Option<Waker>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

/// What the control thread is asked for.
enum Request {
    Admin {
        command: AdminCommand,
        reply: SyncSender<Result<Reply, Error>>,
    },
    LogPage {
        lid: LogPageId,
        nsid: Nsid,
        offset: u64,
        len: u32,
        reply: SyncSender<Result<Vec<u8>, Error>>,
    },
    Identify {
        cns: Cns,
        nsid: Nsid,
        reply: SyncSender<Result<Vec<u8>, Error>>,
    },
    Rescan {
        reply: SyncSender<Result<(), Error>>,
    },
    /// The answer is an event.
    ReadAna,
    /// A sign of life within this time, or the controller is lost.
    Probe(Duration),
    Disconnect,
}

/// An admin command that this library has no method for.
pub struct AdminCommand {
    /// For messages.
    pub name: &'static str,
    /// Makes the 64 bytes for a command identifier; the data pointer is filled in.
    pub sqe: Box<dyn FnOnce(Cid) -> [u8; 64] + Send>,
    /// Data for the controller.
    pub data_out: Vec<u8>,
    /// Bytes wanted from the controller (not together with `data_out`), at most 16 KiB.
    pub data_in_bytes: u32,
}

/// Result of an [`AdminCommand`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminReply {
    /// Dwords 0 and 1 of the completion.
    pub result: u64,
    /// What came from the controller.
    pub data: Vec<u8>,
}

/// Requests that wait for the control thread at most.
const REQUESTS: usize = 64;
/// Events that wait for [`Controller::next_event`] at most; then the oldest goes.
const EVENTS: usize = 64;
/// How long the control thread may take to say goodbye, before it is cut short.
const GOODBYE: Duration = Duration::from_secs(1);
/// How long the control thread sleeps at most. Requests wake it; this is for a link that cannot be woken.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// How long until a namespace that could not be read is read again: at first, and at most.
const READ_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Gets every event, in the control thread.
pub(crate) type Listener = Box<dyn Fn(Event) + Send + Sync>;

#[derive(Default)]
struct Events {
    queue: Mutex<VecDeque<Event>>,
    arrived: Condvar,
    listener: Option<Listener>,
}

impl Events {
    fn push(&self, event: Event) {
        if let Some(listener) = &self.listener {
            listener(event);
        }
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() >= EVENTS {
            queue.pop_front();
        }
        queue.push_back(event);
        self.arrived.notify_one();
    }

    fn next(&self, timeout: Duration) -> Option<Event> {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut queue, _) = self
            .arrived
            .wait_timeout_while(queue, timeout, |queue| queue.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        queue.pop_front()
    }
}

impl Controller {
    /// Connects, enables the controller and reads its identity and namespaces. Every step has a deadline.
    pub fn connect(options: &ConnectOptions) -> Result<Controller, Error> {
        Self::connect_for(options, None)
    }

    /// The same for somebody who wants to hear of events at once.
    pub(crate) fn connect_for(
        options: &ConnectOptions,
        listener: Option<Listener>,
    ) -> Result<Controller, Error> {
        let subnqn = options
            .target
            .subnqn
            .clone()
            .ok_or_else(|| Error::Address("no subsystem NQN: give subnqn".into()))?;
        let (requests, inbox) = mpsc::sync_channel(REQUESTS);
        let (up_tx, up_rx) = mpsc::sync_channel(1);
        let view = Arc::new(ControllerView::default());
        let events = Arc::new(Events {
            listener,
            ..Events::default()
        });
        let (thread_options, thread_view, thread_events) =
            (options.clone(), view.clone(), events.clone());
        let thread = std::thread::Builder::new()
            .name("flexblk-admin".into())
            .spawn(move || {
                control_thread(
                    &thread_options,
                    &subnqn,
                    &thread_view,
                    &thread_events,
                    &up_tx,
                    &inbox,
                )
            })
            .map_err(|cause| Error::System {
                what: "starting the control thread",
                cause,
            })?;
        // Every step in that thread has a deadline; when it fails it sends the error.
        let brought_up = up_rx
            .recv()
            .unwrap_or(Err(Error::Protocol("the control thread died")));
        let (facts, granted_io_queues, waker) = match brought_up {
            Ok(up) => up,
            Err(error) => {
                let _ = thread.join();
                return Err(error);
            }
        };
        Ok(Controller {
            shared: Arc::new(Shared {
                options: options.clone(),
                facts,
                granted_io_queues,
                qids: QidPool::new(granted_io_queues),
                view,
                events,
                shared_engine: SharedEngine::default(),
                requests,
                waker,
                thread: Mutex::new(Some(thread)),
            }),
        })
    }

    /// The options it was connected with.
    pub fn options(&self) -> &ConnectOptions {
        &self.shared.options
    }

    /// Subsystem NQN.
    pub fn subnqn(&self) -> &Nqn {
        &self.shared.facts.subnqn
    }

    /// Controller identifier.
    pub fn cntlid(&self) -> Cntlid {
        self.shared.facts.cntlid
    }

    /// Where it is.
    pub fn address(&self) -> std::net::SocketAddr {
        self.shared.facts.address
    }

    /// Its identity as read at connect time.
    pub fn identify(&self) -> &IdentifyController {
        &self.shared.facts.identify
    }

    /// How it is now.
    pub fn state(&self) -> ControllerState {
        self.shared
            .view
            .lost()
            .map_or(ControllerState::Live, ControllerState::Lost)
    }

    /// Active namespaces, ascending.
    pub fn namespaces(&self) -> Vec<Namespace> {
        self.shared.view.namespaces().to_vec()
    }

    /// One of them.
    pub fn namespace(&self, nsid: Nsid) -> Result<Namespace, Error> {
        let namespaces = self.shared.view.namespaces();
        namespaces
            .iter()
            .find(|ns| ns.nsid == nsid)
            .cloned()
            .ok_or_else(|| Error::NoNamespace {
                nsid,
                active: NamespaceList(namespaces.iter().map(|ns| ns.nsid).collect()),
            })
    }

    /// Asymmetric access to a namespace through this controller; optimized where the subsystem reports none.
    pub fn ana_state(&self, nsid: Nsid) -> AnaState {
        self.shared.view.ana_state(nsid)
    }

    /// I/O queue pairs that the controller granted.
    pub fn granted_io_queues(&self) -> u16 {
        self.shared.granted_io_queues
    }

    /// Largest queue depth that the controller allows.
    pub fn max_queue_depth(&self) -> u16 {
        let facts = &self.shared.facts;
        let by_entries = facts.max_queue_entries.saturating_sub(1);
        let by_commands = match facts.identify.maxcmd.get() {
            0 => u32::MAX,
            commands => u32::from(commands),
        };
        by_entries
            .min(by_commands)
            .clamp(1, u32::from(u16::MAX) - 1) as u16
    }

    /// Largest transfer of one command.
    pub fn max_transfer_bytes(&self) -> u32 {
        self.shared.facts.max_transfer_bytes
    }

    /// A new I/O queue pair for the calling thread.
    pub fn queue_pair(&self, options: &QueuePairOptions) -> Result<QueuePair, Error> {
        let shared = &self.shared;
        let (qid, depth) = self.lease(options)?;
        let link = connect_io_queue(
            &shared.options,
            &shared.facts,
            Qid::new(qid.qid()),
            depth,
            &shared.shared_engine,
        )?;
        let mut queue = QueuePair::assemble(Parts {
            link,
            view: shared.view.clone(),
            depth,
            io_timeout: shared.options.io_timeout,
            max_transfer_bytes: shared.facts.max_transfer_bytes,
            bounce_bytes: options.bounce_bytes.unwrap_or(1 << 20),
            keep: Keep {
                _qid: Some(qid),
                _controller: Some(self.clone()),
            },
        })?;
        for memory in &options.memory {
            queue.register(*memory)?;
        }
        // The answer to Connect; who knows when the first command comes.
        queue.pause();
        Ok(queue)
    }

    /// The same without waiting: [`QueuePairOpening::poll`] between two turns of the thread's reactor, until it is there.
    pub(crate) fn begin_queue_pair(
        &self,
        options: &QueuePairOptions,
    ) -> Result<QueuePairOpening, Error> {
        let shared = &self.shared;
        let (lease, depth) = self.lease(options)?;
        let qid = Qid::new(lease.qid());
        let connect = QueueConnect::begin(
            &shared.options,
            &shared.facts,
            qid,
            depth,
            Opening::begin,
            Instant::now(),
        )?;
        let rest = Rest {
            view: shared.view.clone(),
            depth,
            io_timeout: shared.options.io_timeout,
            max_transfer_bytes: shared.facts.max_transfer_bytes,
            bounce_bytes: options.bounce_bytes.unwrap_or(1 << 20),
            keep: Keep {
                _qid: Some(lease),
                _controller: Some(self.clone()),
            },
        };
        Ok(QueuePairOpening::new(connect, rest))
    }

    fn lease(&self, options: &QueuePairOptions) -> Result<(QidLease, u16), Error> {
        let shared = &self.shared;
        if let Some(reason) = shared.view.lost() {
            return Err(Error::Lost(reason));
        }
        let Some(qid) = shared.qids.take() else {
            return Err(Error::Option {
                name: "nr_io_queues".into(),
                reason: format!(
                    "all {} I/O queues of this controller are in use: ask for more of them",
                    shared.granted_io_queues
                ),
            });
        };
        let depth = options
            .depth
            .unwrap_or(shared.options.queue_size)
            .clamp(1, self.max_queue_depth());
        Ok((qid, depth))
    }

    /// The controller is lost because somebody found out: it ends, with all its queue pairs.
    pub(crate) fn fail(&self, reason: LostReason) {
        self.shared.view.set_lost(reason);
        self.shared.wake();
    }

    /// Asks for a sign of life; without one within `limit` the controller is lost.
    pub(crate) fn probe(&self, limit: Duration) {
        self.shared.ask_for(Request::Probe(limit));
    }

    /// Asks for the ANA states; an [`Event::AnaChanged`] follows.
    pub(crate) fn read_ana(&self) {
        self.shared.ask_for(Request::ReadAna);
    }

    /// How long a controller at most takes for a Keep Alive Timeout: it may round up to its granularity (Base 3.9.1;
    /// 5.1.13.2.1, KAS).
    pub(crate) fn longest_kato(&self) -> Duration {
        rounded_up(self.options().kato, self.shared.facts.identify.kas.get())
    }

    /// Command Quiesce Time (Base 5.1.13.2.1, CQT); zero: not reported.
    pub(crate) fn quiesce_time(&self) -> Duration {
        Duration::from_millis(self.shared.facts.identify.cqt.get().into())
    }

    /// Waits for the next event.
    pub fn next_event(&self, timeout: Duration) -> Option<Event> {
        self.shared.events.next(timeout)
    }

    /// Reads the list of namespaces again now.
    pub fn rescan(&self) -> Result<(), Error> {
        self.ask(|reply| Request::Rescan { reply })
    }

    /// Get Log Page: `len` bytes from `offset`, of any length.
    pub fn log_page(
        &self,
        lid: LogPageId,
        nsid: Nsid,
        offset: u64,
        len: u32,
    ) -> Result<Vec<u8>, Error> {
        self.ask(|reply| Request::LogPage {
            lid,
            nsid,
            offset,
            len,
            reply,
        })
    }

    /// Identify: the 4096 bytes of a structure.
    pub fn identify_structure(&self, cns: Cns, nsid: Nsid) -> Result<Vec<u8>, Error> {
        self.ask(|reply| Request::Identify { cns, nsid, reply })
    }

    /// Any other admin command.
    pub fn admin(&self, command: AdminCommand) -> Result<AdminReply, Error> {
        let reply = self.ask(|reply| Request::Admin { command, reply })?;
        Ok(AdminReply {
            result: reply.result,
            data: reply.data,
        })
    }

    /// Disconnects now, instead of with the last clone. Queue pairs end with it.
    pub fn disconnect(&self) {
        self.shared.disconnect();
    }

    fn ask<T>(
        &self,
        request: impl FnOnce(SyncSender<Result<T, Error>>) -> Request,
    ) -> Result<T, Error> {
        let lost = || Error::Lost(self.shared.view.lost().unwrap_or(LostReason::Closed));
        let (tx, rx) = mpsc::sync_channel(1);
        // The control thread answers everything within its own deadlines, or ends and drops the sender.
        self.shared.send(request(tx)).map_err(|_| lost())?;
        rx.recv().map_err(|_| lost())?
    }
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller")
            .field("subnqn", &self.shared.facts.subnqn)
            .field("address", &self.shared.facts.address)
            .field("cntlid", &self.shared.facts.cntlid)
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn send(&self, request: Request) -> Result<(), mpsc::SendError<Request>> {
        self.requests.send(request)?;
        self.wake();
        Ok(())
    }

    /// The same for what can be left out when the control thread is that far behind.
    fn ask_for(&self, request: Request) {
        let _ = self.requests.try_send(request);
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = &self.waker {
            waker.wake();
        }
    }

    fn disconnect(&self) {
        self.ask_for(Request::Disconnect);
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(thread) = thread else { return };
        // It may wait for the answer of a target that is dead.
        let give_up = Instant::now() + GOODBYE;
        while !thread.is_finished() && Instant::now() < give_up {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.view.set_lost(LostReason::Closed);
        self.wake();
        let _ = thread.join();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.disconnect();
    }
}

type Up = Result<(Facts, u16, Option<Waker>), Error>;

fn control_thread(
    options: &ConnectOptions,
    subnqn: &Nqn,
    view: &Arc<ControllerView>,
    events: &Events,
    up_tx: &SyncSender<Up>,
    inbox: &mpsc::Receiver<Request>,
) {
    let brought_up = bring_up(options, subnqn).and_then(|mut up| {
        let (granted, namespaces) = bring_up_io(options, &mut up)?;
        if up.facts.reports_ana() {
            view.set_ana_states(up.queue.ana_states()?);
        }
        Ok((up, granted, namespaces))
    });
    let mut up = match brought_up {
        Ok((mut up, granted, namespaces)) => {
            view.set_namespaces(namespaces);
            up.queue.runner().follow(Arc::clone(view));
            let waker = up.queue.runner().waker();
            let _ = up_tx.send(Ok((up.facts.clone(), granted, waker)));
            up
        }
        Err(error) => {
            let _ = up_tx.send(Err(error));
            return;
        }
    };
    let served = serve(&mut up, view, events, inbox);
    if view.lost() == Some(LostReason::Closed) {
        // Our own end was in a hurry.
    } else if let Err(error) = served {
        let reason = up.queue.runner().lost().unwrap_or(LostReason::Protocol);
        tracing::warn!(subnqn = %up.facts.subnqn, %error, "controller lost");
        view.set_lost(reason);
        events.push(Event::Lost(reason));
    } else {
        view.set_lost(LostReason::Closed);
    }
}

/// Until somebody asks to disconnect, or the connection ends.
fn serve(
    up: &mut BroughtUp,
    view: &ControllerView,
    events: &Events,
    inbox: &mpsc::Receiver<Request>,
) -> Result<(), Error> {
    let mut pause = READ_AGAIN.0;
    let mut read_at = Instant::now();
    loop {
        up.queue.service(Instant::now() + LONGEST_SLEEP)?;
        // No event comes when it can be read.
        if !up.unread {
            (pause, read_at) = (READ_AGAIN.0, Instant::now());
        } else if read_at.elapsed() >= pause {
            notice_namespaces(up, view, events)?;
            pause = (2 * pause).min(READ_AGAIN.1);
            read_at = Instant::now();
        }
        while let Some(event) = up.queue.next_event() {
            up.queue.acknowledge(event)?;
            match event.event {
                AsyncEvent::Notice(Notice::NamespaceAttributeChanged) => {
                    notice_namespaces(up, view, events)?;
                }
                // Reading the page also lets the controller send the next event of its kind.
                AsyncEvent::Notice(Notice::AnaChange) => read_ana(up, view, events)?,
                _ => {}
            }
        }
        loop {
            match inbox.try_recv() {
                Ok(Request::Disconnect) => {
                    up.queue.runner().close(Duration::from_millis(200));
                    return Ok(());
                }
                Ok(request) => answer(up, view, events, request)?,
                Err(mpsc::TryRecvError::Empty) => break,
                // Nobody is left who could ask.
                Err(mpsc::TryRecvError::Disconnected) => {
                    up.queue.runner().close(Duration::from_millis(200));
                    return Ok(());
                }
            }
        }
    }
}

/// Without being asked: a controller that cannot answer now is asked again later.
fn notice_namespaces(
    up: &mut BroughtUp,
    view: &ControllerView,
    events: &Events,
) -> Result<(), Error> {
    match rescan(up, view, events) {
        Err(Error::Status { status, .. }) => {
            tracing::warn!(%status, "the namespaces cannot be read");
            Ok(())
        }
        read => read,
    }
}

fn rescan(up: &mut BroughtUp, view: &ControllerView, events: &Events) -> Result<(), Error> {
    let namespaces = read_namespaces(up, &view.namespaces())?;
    if view.set_namespaces(namespaces) {
        events.push(Event::NamespacesChanged);
    }
    Ok(())
}

fn read_ana(up: &mut BroughtUp, view: &ControllerView, events: &Events) -> Result<(), Error> {
    if up.facts.reports_ana() {
        match up.queue.ana_states() {
            Ok(states) => view.set_ana_states(states),
            Err(Error::Status { status, .. }) => tracing::info!(%status, "no ANA log page"),
            Err(other) => return Err(other),
        }
    }
    events.push(Event::AnaChanged);
    Ok(())
}

/// Answers one request. An error is the end of the connection only when the queue says so.
fn answer(
    up: &mut BroughtUp,
    view: &ControllerView,
    events: &Events,
    request: Request,
) -> Result<(), Error> {
    match request {
        Request::Disconnect => {}
        Request::Rescan { reply } => {
            let _ = reply.send(rescan(up, view, events));
        }
        Request::ReadAna => read_ana(up, view, events)?,
        Request::Probe(limit) => up.queue.probe(limit)?,
        Request::Identify { cns, nsid, reply } => {
            let _ = reply.send(up.queue.identify(cns, nsid));
        }
        Request::LogPage {
            lid,
            nsid,
            offset,
            len,
            reply,
        } => {
            let _ = reply.send(up.queue.log_page(lid, nsid, offset, len));
        }
        Request::Admin { command, reply } => {
            let payload = match (command.data_out.as_slice(), command.data_in_bytes) {
                ([], 0) => Payload::None,
                ([], bytes) => Payload::FromController(bytes),
                (data, _) => Payload::ToController(data),
            };
            let _ = reply.send(up.queue.execute(command.name, payload, command.sqe));
        }
    }
    match up.queue.runner().lost() {
        Some(reason) => Err(Error::Lost(reason)),
        None => Ok(()),
    }
}

/// A Keep Alive Timeout as a controller with that granularity (KAS, in units of 100 ms; 0: unknown) may take it.
fn rounded_up(kato: Duration, kas: u16) -> Duration {
    let unit_ms = 100 * u64::from(kas.max(1));
    let kato_ms = u64::try_from(kato.as_millis()).unwrap_or(u64::MAX / 2);
    Duration::from_millis(kato_ms.next_multiple_of(unit_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keep_alive_timeout_may_be_rounded_up_by_its_granularity() {
        let rounded = |kato_ms, kas| rounded_up(Duration::from_millis(kato_ms), kas).as_millis();
        assert_eq!(rounded(1500, 10), 2000);
        assert_eq!(rounded(2000, 10), 2000);
        assert_eq!(rounded(1500, 1), 1500);
        assert_eq!(rounded(1501, 0), 1600);
        assert_eq!(rounded(1, u16::MAX), 6_553_500);
        assert_eq!(rounded(0, 10), 0, "off");
        assert!(rounded_up(Duration::MAX, u16::MAX) > Duration::from_secs(1 << 40));
    }
}
