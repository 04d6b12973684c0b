//! A queue pair on its way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Keep, Parts, QueuePair};
use crate::Error;
use crate::admin::queue_connect::QueueConnect;
use crate::view::ControllerView;

/// A queue pair that is being connected while its thread does other things: [`poll`](Self::poll) between two turns of
/// the thread's reactor. Dropping it gives up.
pub(crate) struct QueuePairOpening {
    connect: QueueConnect,
    rest: Option<Rest>,
}

/// What the queue pair is made of besides its link.
pub(crate) struct Rest {
    pub(crate) view: Arc<ControllerView>,
    pub(crate) depth: u16,
    pub(crate) io_timeout: Duration,
    pub(crate) max_transfer_bytes: u32,
    pub(crate) bounce_bytes: usize,
    pub(crate) keep: Keep,
}

impl QueuePairOpening {
    pub(crate) fn new(connect: QueueConnect, rest: Rest) -> QueuePairOpening {
        QueuePairOpening {
            connect,
            rest: Some(rest),
        }
    }

    /// The queue pair, or why there is none; `None`: not yet.
    pub(crate) fn poll(&mut self, now: Instant) -> Option<Result<QueuePair, Error>> {
        if let Some(reason) = self.rest.as_ref().and_then(|rest| rest.view.lost()) {
            return Some(Err(Error::Lost(reason)));
        }
        let link = match self.connect.poll(now)? {
            Ok(link) => link,
            Err(error) => return Some(Err(error)),
        };
        let rest = self.rest.take()?;
        Some(QueuePair::assemble(Parts {
            link,
            view: rest.view,
            depth: rest.depth,
            io_timeout: rest.io_timeout,
            max_transfer_bytes: rest.max_transfer_bytes,
            bounce_bytes: rest.bounce_bytes,
            keep: rest.keep,
        }))
    }
}
