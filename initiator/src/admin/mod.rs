//! The admin queue: bringing a controller up, keeping it alive, listening to its events.

pub(crate) mod bring_up;
pub(crate) mod queue_connect;
pub(crate) mod runner;

use std::time::{Duration, Instant};

use flexblk_nvme::aer::{AsyncEvent, AsyncEventResult, Notice};
use flexblk_nvme::command::admin;
use flexblk_nvme::log::LogPageId;
use flexblk_nvme::log::ana::{self, AnaState};
use flexblk_nvme::{Cid, Nsid, Sgl, Status};
use flexblk_reactor::Wait;

use crate::{Error, LostReason};
use runner::{MAX_DATA_BYTES, Payload, Reply, Runner};

const EVENT_CID: u16 = 1;
const KEEP_ALIVE_CID: u16 = 2;

/// Longest ANA log page that is read: 128 groups and 1024 namespaces, and then some.
const ANA_BYTES: u32 = 16 << 10;

/// Commands of an admin queue: ours one at a time, one event request, one keep-alive.
pub(crate) const ADMIN_DEPTH: u16 = 31;

/// An admin queue of an enabled controller.
pub(crate) struct AdminQueue {
    runner: Runner,
    timeout: Duration,
    keep_alive: Option<KeepAlive>,
    events: Vec<AsyncEventResult>,
    wants_events: bool,
}

/// When the controller was heard last, and when it is asked again.
#[derive(Clone, Copy, Debug)]
struct KeepAlive {
    kato: Duration,
    next: Instant,
    asked: Option<Instant>,
    /// Until when the answer has to be here, sooner than the time-out demands.
    hurry: Option<Instant>,
}

impl KeepAlive {
    /// Half the time-out, as the Linux host does: one lost round still leaves time for another.
    fn interval(&self) -> Duration {
        self.kato / 2
    }

    /// When the controller is taken for dead.
    fn limit(&self) -> Option<Instant> {
        let limit = self.asked? + self.kato;
        Some(self.hurry.map_or(limit, |hurry| hurry.min(limit)))
    }

    fn is_over(&self, now: Instant) -> bool {
        self.limit().is_some_and(|limit| now >= limit)
    }

    fn answered(&mut self) {
        (self.asked, self.hurry) = (None, None);
    }
}

impl AdminQueue {
    pub(crate) fn new(runner: Runner, timeout: Duration) -> AdminQueue {
        AdminQueue {
            runner,
            timeout,
            keep_alive: None,
            events: Vec::new(),
            wants_events: false,
        }
    }

    /// Starts to send Keep Alive commands; `kato` is what Connect said.
    pub(crate) fn keep_alive(&mut self, kato: Duration) {
        if !kato.is_zero() {
            let mut keep_alive = KeepAlive {
                kato,
                next: self.runner.now(),
                asked: None,
                hurry: None,
            };
            keep_alive.next += keep_alive.interval();
            self.keep_alive = Some(keep_alive);
        }
    }

    /// Asks the controller for a sign of life now; without one within `limit` it is lost. Nothing with keep-alive off.
    pub(crate) fn probe(&mut self, limit: Duration) -> Result<(), Error> {
        let now = self.runner.clock();
        let Some(keep_alive) = &mut self.keep_alive else {
            return Ok(());
        };
        keep_alive.next = keep_alive.next.min(self.runner.now());
        send_keep_alive(&mut self.runner, keep_alive)?;
        keep_alive.hurry.get_or_insert(now + limit);
        Ok(())
    }

    /// The ANA state of every namespace that is in a group (Base 8.1.1).
    pub(crate) fn ana_states(&mut self) -> Result<Vec<(Nsid, AnaState)>, Error> {
        let page = self.log_page(LogPageId::Ana, Nsid::BROADCAST, 0, ANA_BYTES)?;
        let (_, groups) =
            ana::parse(&page).map_err(|_| Error::Protocol("an ANA log page that is cut off"))?;
        let mut states = Vec::new();
        for group in groups.map_while(Result::ok) {
            states.extend(group.nsids().map(|nsid| (nsid, group.state)));
        }
        Ok(states)
    }

    /// Keeps one Asynchronous Event Request outstanding from now on.
    pub(crate) fn listen(&mut self) -> Result<(), Error> {
        self.wants_events = true;
        self.runner.post(
            EVENT_CID,
            admin::AsyncEventRequest.emit(Cid::new(EVENT_CID), &Sgl::NONE),
        )
    }

    pub(crate) fn runner(&mut self) -> &mut Runner {
        &mut self.runner
    }

    /// Carries out one command; an error status is an error.
    pub(crate) fn execute(
        &mut self,
        name: &'static str,
        payload: Payload<'_>,
        sqe: impl FnOnce(Cid) -> [u8; 64],
    ) -> Result<Reply, Error> {
        let (timeout, keep_alive) = (self.timeout, &mut self.keep_alive);
        let reply = self.runner.execute(name, payload, timeout, sqe, |runner| {
            // Other answers stay in the runner until `service`; staying alive cannot wait.
            if let Some(keep_alive) = keep_alive {
                if runner.take_success(KEEP_ALIVE_CID) {
                    keep_alive.answered();
                }
                // Failing ends the queue, which the next turn tells.
                let _ = send_keep_alive(runner, keep_alive);
                if keep_alive.is_over(runner.now()) {
                    let _ = runner.end(LostReason::KeepAlive);
                }
            }
        })?;
        match reply.status.ok() {
            Ok(()) => Ok(reply),
            Err(status) => Err(Error::Status {
                command: name,
                status,
            }),
        }
    }

    /// Identify: 4096 bytes.
    pub(crate) fn identify(&mut self, cns: admin::Cns, nsid: Nsid) -> Result<Vec<u8>, Error> {
        let command = admin::Identify::new(cns, nsid);
        let payload = Payload::FromController(admin::Identify::DATA_LEN as u32);
        Ok(self
            .execute("Identify", payload, |cid| command.emit(cid, &Sgl::NONE))?
            .data)
    }

    /// Get Log Page: `len` bytes from `offset`, in several commands when it is long.
    pub(crate) fn log_page(
        &mut self,
        lid: LogPageId,
        nsid: Nsid,
        offset: u64,
        len: u32,
    ) -> Result<Vec<u8>, Error> {
        let mut page = Vec::with_capacity(len as usize);
        while (page.len() as u32) < len {
            let at = page.len() as u32;
            let part = (len - at).min(MAX_DATA_BYTES).next_multiple_of(4);
            let mut command = admin::GetLogPage::new(lid, offset + u64::from(at), part);
            command.nsid = nsid;
            let reply = self.execute("Get Log Page", Payload::FromController(part), |cid| {
                command.emit(cid, &Sgl::NONE)
            })?;
            page.extend_from_slice(
                reply
                    .data
                    .get(..(len - at).min(part) as usize)
                    .unwrap_or_default(),
            );
        }
        Ok(page)
    }

    /// Lets the queue work until something happened or `until`: keep-alive, events. The error is the end.
    pub(crate) fn service(&mut self, until: Instant) -> Result<(), Error> {
        let mut until = until;
        if let Some(keep_alive) = &self.keep_alive {
            until = until.min(keep_alive.limit().unwrap_or(keep_alive.next));
        }
        // Some may have come while a command was carried out.
        let wait = match self.runner.has_answers() {
            true => Wait::Poll,
            false => Wait::Until(until),
        };
        self.runner.turn(wait)?;
        while let Some(answer) = self.runner.next_answer() {
            match answer.cid {
                KEEP_ALIVE_CID => self.on_keep_alive(answer.status)?,
                EVENT_CID => self.on_event(answer.status, answer.result)?,
                _ => return Err(self.runner.end(LostReason::Protocol)),
            }
        }
        if let Some(keep_alive) = &mut self.keep_alive {
            send_keep_alive(&mut self.runner, keep_alive)?;
            if keep_alive.is_over(self.runner.now()) {
                return Err(self.runner.end(LostReason::KeepAlive));
            }
        }
        Ok(())
    }

    /// The oldest event.
    pub(crate) fn next_event(&mut self) -> Option<AsyncEventResult> {
        if self.events.is_empty() {
            None
        } else {
            Some(self.events.remove(0))
        }
    }

    fn on_keep_alive(&mut self, status: Status) -> Result<(), Error> {
        if !status.is_success() {
            return Err(self.runner.end(LostReason::KeepAlive));
        }
        if let Some(keep_alive) = &mut self.keep_alive {
            keep_alive.answered();
        }
        Ok(())
    }

    fn on_event(&mut self, status: Status, result: u64) -> Result<(), Error> {
        if !status.is_success() {
            // Too many requests, or the controller goes down: it will tell in other ways.
            self.wants_events = false;
            return Ok(());
        }
        let event = AsyncEventResult::from_dword(result as u32);
        tracing::info!(?event, "asynchronous event");
        // Bounded: what matters is idempotent.
        if self.events.len() < 64 {
            self.events.push(event);
        }
        self.listen()
    }

    /// Reading the log page of an event lets the controller send the next of its kind.
    pub(crate) fn acknowledge(&mut self, result: AsyncEventResult) -> Result<(), Error> {
        let len = match result.event {
            AsyncEvent::Notice(Notice::NamespaceAttributeChanged) => 4096,
            AsyncEvent::Error(_) => 64,
            AsyncEvent::Health(_) => 512,
            // Others have no log page that we know the length of.
            _ => return Ok(()),
        };
        tracing::debug!(?result, "reading the event's log page");
        match self.log_page(result.log_page, Nsid::BROADCAST, 0, len) {
            Ok(_) | Err(Error::Status { .. }) => Ok(()),
            Err(other) => Err(other),
        }
    }
}

fn send_keep_alive(runner: &mut Runner, keep_alive: &mut KeepAlive) -> Result<(), Error> {
    let now = runner.now();
    if keep_alive.asked.is_none() && now >= keep_alive.next {
        runner.post(
            KEEP_ALIVE_CID,
            admin::KeepAlive.emit(Cid::new(KEEP_ALIVE_CID), &Sgl::NONE),
        )?;
        keep_alive.asked = Some(now);
        keep_alive.next = now + keep_alive.interval();
    }
    Ok(())
}
