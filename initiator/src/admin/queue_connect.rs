//! Connecting an I/O queue without waiting: a path that comes back must not hold up I/O on the others.

use std::time::Instant;

use flexblk_nvme::{Qid, Sgl};

use super::bring_up::{Facts, Who, io_connect, io_link};
use super::runner::Runner;
use crate::link::Link;
use crate::link::open::{OpenArgs, SharedEngine};
use crate::link::opening::Opening;
use crate::{ConnectOptions, EngineMode, Error};

/// Fabrics Connect of an I/O queue, without waiting: it moves when the thread's reactor is turned.
pub(crate) struct QueueConnect {
    options: ConnectOptions,
    facts: Facts,
    qid: Qid,
    depth: u16,
    deadline: Instant,
    stage: ConnectStage,
}

enum ConnectStage {
    Opening(Box<Opening>),
    Connecting(Runner),
    Over,
}

impl QueueConnect {
    /// `begin` opens the queue's connection.
    pub(crate) fn begin(
        options: &ConnectOptions,
        facts: &Facts,
        qid: Qid,
        depth: u16,
        begin: impl FnOnce(&OpenArgs<'_>) -> Result<Opening, Error>,
        now: Instant,
    ) -> Result<QueueConnect, Error> {
        let opening = begin(&OpenArgs {
            options,
            address: facts.address,
            qid,
            depth,
            cntlid: facts.cntlid,
            engine: EngineMode::Inline,
            shared_engine: &SharedEngine::default(),
        })?;
        Ok(QueueConnect {
            options: options.clone(),
            facts: facts.clone(),
            qid,
            depth,
            // Both steps have the same limit.
            deadline: now + 2 * options.connect_timeout,
            stage: ConnectStage::Opening(Box::new(opening)),
        })
    }

    /// The connected queue's link, or why there is none; `None`: not yet.
    pub(crate) fn poll(&mut self, now: Instant) -> Option<Result<Box<dyn Link>, Error>> {
        let ended = self.advance(now);
        match ended {
            Ok(Some(link)) => Some(Ok(link)),
            Ok(None) if now < self.deadline => None,
            Ok(None) => {
                self.stage = ConnectStage::Over;
                Some(Err(Error::TimedOut {
                    command: "Connect",
                    after: self.options.connect_timeout,
                }))
            }
            Err(error) => {
                self.stage = ConnectStage::Over;
                Some(Err(error))
            }
        }
    }

    fn advance(&mut self, now: Instant) -> Result<Option<Box<dyn Link>>, Error> {
        let who = Who {
            options: &self.options,
            address: self.facts.address,
            subnqn: &self.facts.subnqn,
            host: &self.facts.host,
        };
        if let ConnectStage::Opening(opening) = &mut self.stage {
            let Some(link) = opening.poll(now) else {
                return Ok(None);
            };
            let mut runner = Runner::new(link?)?;
            let connect = io_connect(self.qid, self.depth);
            runner.begin(who.connect_data(self.facts.cntlid).bytes(), |cid| {
                connect.emit(cid, &Sgl::NONE)
            })?;
            self.stage = ConnectStage::Connecting(runner);
            return Ok(None);
        }
        let ConnectStage::Connecting(runner) = &mut self.stage else {
            return Ok(None);
        };
        let Some(reply) = runner.finished()? else {
            return Ok(None);
        };
        who.judge(&reply)?;
        match std::mem::replace(&mut self.stage, ConnectStage::Over) {
            ConnectStage::Connecting(runner) => io_link(runner, &self.facts).map(Some),
            ConnectStage::Opening(_) | ConnectStage::Over => Ok(None),
        }
    }
}
