//! The control thread: changes that hosts ask for, of the snapshot (reservations, write protection) and
//! of marks that are kept (Write Uncorrectable). They may have to reach a disk, and are answered only
//! when every data thread goes by them; neither may keep a data thread from its work.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use flexblk_nvme::{Cid, HostId, Nqn, Nsid, Status, StatusCode};

use crate::association::lock;
use crate::media::{Full, MAX_KEPT_RANGES, Media, Ranges};
use crate::ptpl::State;
use crate::reservation::{Action, Notice, Reservations};
use crate::snapshot::{Namespace, Protection, Snapshot};
use crate::thread::mail::{Mail, Place};
use crate::thread::parts::Shared;

/// Orders that may wait; beyond it hosts are told to come back soon.
const WAITING: usize = 1024;
/// How long data threads may take to go by a new snapshot. They do so within a turn.
const ADOPTION_TIME: Duration = Duration::from_secs(5);
/// How often that is looked at. A thread that sleeps is woken in some 50 us.
const LOOK: Duration = Duration::from_micros(20);

/// What a host wants changed.
#[derive(Clone, Debug)]
pub(crate) enum What {
    /// A reservation command.
    Reserve(HostId, Action),
    /// Set Features, Reservation Persistence.
    Persist(bool),
    /// Set Features, Namespace Write Protection Config.
    Protect(Protection),
    /// Blocks of a device that keeps its marks.
    Mark(Mark),
}

/// Blocks that cannot be read from now on, or can be again.
#[derive(Clone, Debug)]
pub(crate) struct Mark {
    pub(crate) media: Arc<Media>,
    pub(crate) lba: u64,
    pub(crate) blocks: u32,
    pub(crate) why: Why,
}

/// What has become of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// Write Uncorrectable.
    Uncorrectable,
    /// New data is on the medium.
    Rewritten,
}

/// An order.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) subsystem: usize,
    /// The subsystem's name: its place may be taken by another one meanwhile.
    pub(crate) subnqn: Nqn,
    pub(crate) nsid: Nsid,
    pub(crate) what: What,
    pub(crate) from: Asker,
}

/// Who wants it, and is told how it ended.
#[derive(Clone, Debug)]
pub(crate) enum Asker {
    /// A host's command.
    Command(From),
    /// Management.
    Management(SyncSender<Status>),
}

/// The command that an order comes from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct From {
    pub(crate) place: Place,
    /// Its slot; `None` when it has none.
    pub(crate) slot: Option<u16>,
    pub(crate) cid: Cid,
}

/// The way to the control thread.
#[derive(Debug)]
pub(crate) struct Desk {
    orders: SyncSender<Option<Order>>,
    inbox: Mutex<Option<Receiver<Option<Order>>>>,
}

impl Default for Desk {
    fn default() -> Self {
        let (orders, inbox) = sync_channel(WAITING);
        Self {
            orders,
            inbox: Mutex::new(Some(inbox)),
        }
    }
}

impl Desk {
    /// Gives an order; false when too many wait.
    pub(crate) fn order(&self, order: Order) -> bool {
        !matches!(
            self.orders.try_send(Some(order)),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_))
        )
    }

    /// Ends the thread after the orders that wait.
    pub(crate) fn close(&self) {
        // Fails when it has ended.
        let _ = self.orders.send(None);
    }
}

/// Who carries orders out. Without data threads (in a simulation) its caller is the only one, and
/// takes the messages.
pub(crate) struct Control {
    shared: Arc<Shared>,
    inbox: Receiver<Option<Order>>,
    path: Option<PathBuf>,
    /// Messages to a thread that has no mailbox.
    unsent: Vec<Mail>,
}

impl Control {
    /// `None` when there is one already.
    pub(crate) fn new(shared: Arc<Shared>, path: Option<PathBuf>) -> Option<Self> {
        let inbox = lock(&shared.desk.inbox).take()?;
        Some(Self {
            shared,
            inbox,
            path,
            unsent: Vec::new(),
        })
    }

    /// The thread's body.
    pub(crate) fn run(mut self) {
        while let Ok(Some(order)) = self.inbox.recv() {
            if !self.handle_with_those_behind(order) {
                return;
            }
        }
    }

    /// Carries out what has been ordered, and gives the messages for the only thread.
    pub(crate) fn step(&mut self) -> Vec<Mail> {
        while let Ok(Some(order)) = self.inbox.try_recv() {
            if !self.handle_with_those_behind(order) {
                break;
            }
        }
        core::mem::take(&mut self.unsent)
    }

    /// Handles what waits by now; false when there is nothing after it. Marks that follow one another are
    /// saved together: a host that writes over a marked region has one order for each of its writes.
    fn handle_with_those_behind(&mut self, first: Order) -> bool {
        let mut orders = vec![first];
        let mut ends = false;
        while !ends && orders.len() < WAITING {
            match self.inbox.try_recv() {
                Ok(Some(order)) => orders.push(order),
                Ok(None) => ends = true,
                Err(_) => break,
            }
        }
        let is_mark = |order: &Order| matches!(order.what, What::Mark(_));
        for run in orders.chunk_by(|one, next| is_mark(one) && is_mark(next)) {
            match run {
                [order] if !is_mark(order) => self.handle(order),
                marks => self.handle_marks(marks),
            }
        }
        !ends
    }

    fn handle_marks(&mut self, orders: &[Order]) {
        let mut state = State::clone(&self.kept());
        let mut media: Vec<(Arc<Media>, Ranges)> = Vec::new();
        let changed: Vec<Result<(), Status>> = orders
            .iter()
            .map(|order| match &order.what {
                What::Mark(mark) => change_marks(mark, &mut media, &mut state),
                _ => Ok(()),
            })
            .collect();
        let saved = self.put_away(state);
        if saved.is_ok() {
            for (media, ranges) in media {
                media.replace(ranges);
            }
        }
        for (order, result) in orders.iter().zip(changed) {
            let status = result.and(saved).err().unwrap_or(Status::SUCCESS);
            self.answer(order, status, &Arc::default());
        }
    }

    fn handle(&mut self, order: &Order) {
        let (status, abort) = match self.carry_out(order) {
            Ok(abort) => (Status::SUCCESS, abort),
            Err(status) => (status, Arc::default()),
        };
        self.answer(order, status, &abort);
    }

    fn answer(&mut self, order: &Order, status: Status, abort: &Arc<[HostId]>) {
        let from = match &order.from {
            Asker::Command(from) => *from,
            Asker::Management(reply) => {
                // Whoever asked may have stopped waiting.
                let _ = reply.try_send(status);
                return;
            }
        };
        let (subsystem, nsid) = (order.subsystem, order.nsid);
        self.mail(from.place.thread, || Mail::Ordered {
            from,
            subsystem,
            nsid,
            status,
            abort: Arc::clone(abort),
        });
    }

    /// Does what is asked for; gives the hosts whose commands are to be aborted.
    fn carry_out(&mut self, order: &Order) -> Result<Arc<[HostId]>, Status> {
        let gone = || StatusCode::InvalidNamespaceOrFormat.dnr();
        let shared = Arc::clone(&self.shared);
        let changing = lock(&shared.changing);
        let mut next = Snapshot::clone(&self.shared.directory.snapshot());
        let subsystem = next.subsystem(order.subsystem);
        let subsystem = subsystem.filter(|subsystem| subsystem.nqn == order.subnqn);
        let subsystem = subsystem.ok_or_else(gone)?;
        let namespace = subsystem.namespace(order.nsid).ok_or_else(gone)?;
        let mut changed = Namespace::clone(namespace);
        let mut notices = Vec::new();
        let mut abort = Vec::new();
        match &order.what {
            What::Reserve(host, action) => {
                let can_persist = self.path.is_some();
                let outcome = namespace.reservations.apply(*host, action, can_persist)?;
                changed.reservations = Arc::new(outcome.next);
                (notices, abort) = (outcome.notices, outcome.abort);
            }
            What::Persist(persist) => {
                if *persist && self.path.is_none() {
                    return Err(StatusCode::InvalidField.dnr());
                }
                let mut reservations = Reservations::clone(&namespace.reservations);
                reservations.persist = *persist;
                changed.reservations = Arc::new(reservations);
            }
            What::Protect(protection) => {
                changed.protection = namespace.protection.to(*protection, self.path.is_some())?;
            }
            // No part of a snapshot.
            What::Mark(_) => {}
        }
        if changed.reservations == namespace.reservations
            && changed.protection == namespace.protection
        {
            return Ok(abort.into());
        }
        next.set_namespace(order.subsystem, changed);
        self.save(&next)?;
        let snapshot = self.shared.directory.replace(next);
        let epoch = snapshot.epoch;
        for thread in 0..self.shared.threads {
            self.mail(thread, || Mail::Snapshot(Arc::clone(&snapshot)));
        }
        drop(changing);
        self.wait_for(epoch)?;
        if !notices.is_empty() {
            let notices: Arc<[(HostId, Notice)]> = notices.into();
            for thread in 0..self.shared.threads {
                self.mail(thread, || Mail::Reservations {
                    subsystem: order.subsystem,
                    nsid: order.nsid,
                    notices: Arc::clone(&notices),
                });
            }
        }
        Ok(abort.into())
    }

    /// Saves what has to survive, before anybody sees it.
    fn save(&mut self, next: &Snapshot) -> Result<(), Status> {
        self.put_away(State::of(next, &self.kept()))
    }

    /// What the file holds.
    fn kept(&self) -> Arc<State> {
        Arc::clone(&lock(&self.shared.kept))
    }

    fn put_away(&mut self, state: State) -> Result<(), Status> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        if state == *self.kept() {
            return Ok(());
        }
        if let Err(error) = state.save(path) {
            tracing::error!(%error, "a change that has to survive a power loss is refused");
            return Err(StatusCode::InternalError.into());
        }
        *lock(&self.shared.kept) = Arc::new(state);
        Ok(())
    }

    /// Until every data thread goes by that snapshot: then no command that it forbids begins.
    fn wait_for(&self, epoch: u64) -> Result<(), Status> {
        if self.shared.mail.get().is_none() {
            return Ok(());
        }
        let deadline = Instant::now() + ADOPTION_TIME;
        for adopted in &self.shared.epochs {
            while adopted.load(Ordering::Acquire) < epoch {
                if Instant::now() >= deadline {
                    tracing::error!(epoch, "a data thread does not take a new snapshot over");
                    return Err(StatusCode::InternalError.into());
                }
                std::thread::sleep(LOOK);
            }
        }
        Ok(())
    }

    fn mail(&mut self, thread: usize, message: impl Fn() -> Mail) {
        match self.shared.mail.get() {
            Some(mailboxes) => {
                if let Some(mailbox) = mailboxes.get(thread) {
                    crate::target::send(mailbox, message);
                }
            }
            None => self.unsent.push(message()),
        }
    }
}

/// Makes a change of marks on `media`, which has those that change in this round, and on the state.
fn change_marks(
    mark: &Mark,
    media: &mut Vec<(Arc<Media>, Ranges)>,
    state: &mut State,
) -> Result<(), Status> {
    let Some(uuid) = mark.media.keeper() else {
        return Err(StatusCode::InternalError.into());
    };
    let known = media
        .iter()
        .position(|(known, _)| Arc::ptr_eq(known, &mark.media));
    let at = known.unwrap_or_else(|| {
        media.push((Arc::clone(&mark.media), mark.media.ranges()));
        media.len() - 1
    });
    let Some((_, ranges)) = media.get_mut(at) else {
        return Err(StatusCode::InternalError.into());
    };
    let changed = match mark.why {
        Why::Uncorrectable if state.mark_count() >= MAX_KEPT_RANGES => Err(Full),
        Why::Uncorrectable => ranges.mark(mark.lba, mark.blocks),
        Why::Rewritten => ranges.rewritten(mark.lba, mark.blocks),
    };
    changed.map_err(|Full| Status::from(StatusCode::WriteFault))?;
    state.set_marks(uuid, ranges);
    Ok(())
}
