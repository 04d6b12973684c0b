//! One command at a time on a link: how queues are connected and admin commands are carried out.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_nvme::{Cid, Status};
use flexblk_reactor::{HugePages, SharedMemory, Span, Wait, Waker};

use crate::link::{Data, Link, LinkEvent, MemoryKey, PostRefused};
use crate::view::ControllerView;
use crate::{Error, LostReason};

/// Largest data of one admin command: longer log pages are read in pieces.
pub(crate) const MAX_DATA_BYTES: u32 = 16 << 10;

/// The command identifier of [`Runner::execute`]; others are for [`Runner::post`].
const EXECUTE: u16 = 0;

/// Data of an admin command.
#[derive(Clone, Copy)]
pub(crate) enum Payload<'a> {
    None,
    ToController(&'a [u8]),
    /// So many bytes.
    FromController(u32),
}

/// What a command brought.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: Status,
    /// Dwords 0 and 1.
    pub(crate) result: u64,
    /// What came from the controller.
    pub(crate) data: Vec<u8>,
}

/// The answer to a command of [`Runner::post`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) cid: u16,
    pub(crate) status: Status,
    pub(crate) result: u64,
}

/// A link with a buffer.
pub(crate) struct Runner {
    /// Goes before the memory: a link that is dropped closes itself.
    link: Box<dyn Link>,
    memory: Arc<SharedMemory>,
    key: MemoryKey,
    events: Vec<LinkEvent>,
    executed: Option<Answer>,
    /// Answers to posted commands, for [`next_answer`](Self::next_answer).
    answers: VecDeque<Answer>,
    /// Commands that have not been answered, a bit for each identifier.
    asked: u64,
    lost: Option<LostReason>,
    /// Whoever says there that the controller is lost ends us, also in the middle of a command.
    view: Option<Arc<ControllerView>>,
}

impl Runner {
    pub(crate) fn new(mut link: Box<dyn Link>) -> Result<Runner, Error> {
        let memory =
            SharedMemory::create("flexblk admin", u64::from(MAX_DATA_BYTES), HugePages::No)
                .map_err(|e| Error::Transport(format!("allocating an admin buffer: {e}")))?;
        let key = link.register_memory(&memory)?;
        Ok(Runner {
            link,
            memory,
            key,
            events: Vec::with_capacity(64),
            executed: None,
            answers: VecDeque::new(),
            asked: 0,
            lost: None,
            view: None,
        })
    }

    /// Ends as soon as the view says that the controller is lost.
    pub(crate) fn follow(&mut self, view: Arc<ControllerView>) {
        self.view = Some(view);
    }

    /// The link again, for a queue that was only to be connected.
    pub(crate) fn into_link(mut self) -> Result<Box<dyn Link>, Error> {
        self.link.unregister(self.key)?;
        Ok(self.link)
    }

    pub(crate) fn waker(&self) -> Option<Waker> {
        self.link.waker()
    }

    pub(crate) fn now(&self) -> Instant {
        self.link.now()
    }

    pub(crate) fn clock(&self) -> Instant {
        self.link.clock()
    }

    pub(crate) fn lost(&self) -> Option<LostReason> {
        self.lost
    }

    /// Carries out one command. Whatever its status is: `Ok`. `meanwhile` is called after every turn. A command
    /// that is not answered in time is the end of the connection: its buffer may still be written to.
    pub(crate) fn execute(
        &mut self,
        name: &'static str,
        payload: Payload<'_>,
        timeout: Duration,
        sqe: impl FnOnce(Cid) -> [u8; 64],
        mut meanwhile: impl FnMut(&mut Runner),
    ) -> Result<Reply, Error> {
        let deadline = self.link.clock() + timeout;
        let span = self.span(match payload {
            Payload::None => 0,
            Payload::ToController(bytes) => bytes.len() as u32,
            Payload::FromController(len) => len,
        })?;
        let data = match payload {
            Payload::None => Data::None,
            Payload::ToController(bytes) => {
                span.copy_from_slice(bytes);
                Data::ToController(span, self.key)
            }
            Payload::FromController(_) => {
                span.fill(0);
                Data::FromController(span, self.key)
            }
        };
        let mut sqe = sqe(Cid::new(EXECUTE));
        self.executed = None;
        self.asked |= 1 << EXECUTE;
        loop {
            match self.link.post(EXECUTE, &mut sqe, data) {
                Ok(_) => break,
                Err(PostRefused::Lost(reason)) => return Err(self.end(reason)),
                Err(PostRefused::Full) if self.link.clock() < deadline => self.turn(Wait::Poll)?,
                Err(PostRefused::Full) => return Err(self.time_out(name, timeout)),
            }
        }
        while self.executed.is_none() {
            if self.link.clock() >= deadline {
                return Err(self.time_out(name, timeout));
            }
            // Short enough for whatever `meanwhile` has to keep alive.
            self.turn(Wait::Until(
                deadline.min(self.link.clock() + Duration::from_millis(100)),
            ))?;
            meanwhile(self);
        }
        let answer = self.executed.take().ok_or(Error::Protocol("no answer"))?;
        let mut data = Vec::new();
        if let Payload::FromController(len) = payload
            && answer.status.is_success()
        {
            data.resize(len as usize, 0);
            span.copy_to_slice(&mut data);
        }
        Ok(Reply {
            status: answer.status,
            result: answer.result,
            data,
        })
    }

    /// Sends one command with data for the controller. The thread's reactor is turned by somebody else:
    /// [`finished`](Self::finished) tells when it is answered.
    pub(crate) fn begin(
        &mut self,
        data: &[u8],
        sqe: impl FnOnce(Cid) -> [u8; 64],
    ) -> Result<(), Error> {
        let span = self.span(data.len() as u32)?;
        span.copy_from_slice(data);
        let mut sqe = sqe(Cid::new(EXECUTE));
        self.executed = None;
        self.asked |= 1 << EXECUTE;
        match self
            .link
            .post(EXECUTE, &mut sqe, Data::ToController(span, self.key))
        {
            Ok(_) => Ok(()),
            Err(PostRefused::Full) => Err(self.end(LostReason::Protocol)),
            Err(PostRefused::Lost(reason)) => Err(self.end(reason)),
        }
    }

    /// The answer to the command of [`begin`](Self::begin), once it is here.
    pub(crate) fn finished(&mut self) -> Result<Option<Reply>, Error> {
        if let Some(reason) = self.lost {
            return Err(Error::Lost(reason));
        }
        let collected = self.link.collect(&mut self.events);
        let taken = self.take_answers();
        collected.and(taken).map_err(|reason| self.end(reason))?;
        Ok(self.executed.take().map(|answer| Reply {
            status: answer.status,
            result: answer.result,
            data: Vec::new(),
        }))
    }

    /// Sends a command without data whose answer comes by [`next_answer`](Self::next_answer). `cid` is not 0.
    pub(crate) fn post(&mut self, cid: u16, mut sqe: [u8; 64]) -> Result<(), Error> {
        debug_assert_ne!(cid, EXECUTE);
        self.asked |= 1 << cid;
        match self.link.post(cid, &mut sqe, Data::None) {
            Ok(_) => Ok(()),
            Err(PostRefused::Full) => Err(self.end(LostReason::Protocol)),
            Err(PostRefused::Lost(reason)) => Err(self.end(reason)),
        }
    }

    pub(crate) fn next_answer(&mut self) -> Option<Answer> {
        self.answers.pop_front()
    }

    pub(crate) fn has_answers(&self) -> bool {
        !self.answers.is_empty()
    }

    /// Takes a posted command's answer out of its turn, if it is here and the command has succeeded.
    pub(crate) fn take_success(&mut self, cid: u16) -> bool {
        let found = |answer: &Answer| answer.cid == cid && answer.status.is_success();
        let at = self.answers.iter().position(found);
        at.and_then(|at| self.answers.remove(at)).is_some()
    }

    pub(crate) fn turn(&mut self, wait: Wait) -> Result<(), Error> {
        if let Some(reason) = self.lost {
            return Err(Error::Lost(reason));
        }
        if let Some(reason) = self.view.as_ref().and_then(|view| view.lost()) {
            return Err(self.end(reason));
        }
        let turned = self.link.turn(wait, &mut self.events);
        let taken = self.take_answers();
        turned.and(taken).map_err(|reason| self.end(reason))
    }

    /// An answer that nobody waits for is the end: a controller may send as many as it likes.
    fn take_answers(&mut self) -> Result<(), LostReason> {
        for event in self.events.drain(..) {
            if let LinkEvent::Response {
                cid,
                status,
                result,
                ..
            } = event
            {
                let bit = 1_u64.checked_shl(cid.into()).unwrap_or(0);
                if self.asked & bit == 0 {
                    return Err(LostReason::Protocol);
                }
                self.asked &= !bit;
                let answer = Answer {
                    cid,
                    status,
                    result,
                };
                if cid == EXECUTE {
                    self.executed = Some(answer);
                } else {
                    self.answers.push_back(answer);
                }
            }
        }
        Ok(())
    }

    /// Ends the connection for a reason of our own.
    pub(crate) fn end(&mut self, reason: LostReason) -> Error {
        if self.lost.is_none() {
            self.lost = Some(reason);
            let now = self.link.clock();
            self.link.close(now);
        }
        Error::Lost(reason)
    }

    /// Ends the connection politely.
    pub(crate) fn close(&mut self, patience: Duration) {
        if self.lost.is_none() {
            self.lost = Some(LostReason::Closed);
            let now = self.link.clock();
            self.link.close(now + patience);
        }
    }

    fn time_out(&mut self, command: &'static str, after: Duration) -> Error {
        self.end(LostReason::CommandTimeout);
        Error::TimedOut { command, after }
    }

    fn span(&self, len: u32) -> Result<Span, Error> {
        self.memory
            .span(0, len)
            .ok_or(Error::Protocol("an admin command with too much data"))
    }
}
