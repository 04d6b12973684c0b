//! Opening a queue's connection without waiting: the thread that needs it goes on with its other work meanwhile.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use flexblk_nvme::transport_id::TrType;
use flexblk_nvme::{Cntlid, Qid};

use super::Link;
use super::inline::InlineVerbs;
use super::open::{OpenArgs, Outcome, SharedEngine, agree};
use super::rdma::RdmaLink;
use super::sim::SimVerbs;
use super::tcp::TcpLink;
use super::verbs::Verbs;
use crate::sim::World;
use crate::{ConnectOptions, EngineMode, Error};

/// A connection on its way. It moves when the thread's reactor is turned; [`poll`](Self::poll) tells when it is there.
/// Dropping it gives up.
pub(crate) struct Opening {
    options: ConnectOptions,
    address: SocketAddr,
    qid: Qid,
    depth: u16,
    cntlid: Cntlid,
    deadline: Instant,
    connecting: Connecting,
}

enum Connecting {
    Flexins(InlineVerbs),
    Tcp(TcpLink),
    Simulated(SimVerbs),
    Over,
}

impl Opening {
    /// Starts; the engine is in this thread.
    pub(crate) fn begin(args: &OpenArgs<'_>) -> Result<Opening, Error> {
        let connecting = match args.options.target.trtype {
            TrType::Tcp => Connecting::Tcp(TcpLink::begin(args)?),
            _ => Connecting::Flexins(InlineVerbs::begin(args)?),
        };
        Ok(Self::new(args, connecting, Instant::now()))
    }

    /// The same in a simulated network.
    pub(crate) fn begin_in(
        world: &Rc<RefCell<dyn World>>,
        args: &OpenArgs<'_>,
    ) -> Result<Opening, Error> {
        let verbs = SimVerbs::begin(world, args)?;
        let now = verbs.clock();
        Ok(Self::new(args, Connecting::Simulated(verbs), now))
    }

    fn new(args: &OpenArgs<'_>, connecting: Connecting, now: Instant) -> Opening {
        Opening {
            options: args.options.clone(),
            address: args.address,
            qid: args.qid,
            depth: args.depth,
            cntlid: args.cntlid,
            deadline: now + args.options.connect_timeout,
            connecting,
        }
    }

    /// The link, or why there is none; `None`: not yet. After the end there is nothing more to ask.
    pub(crate) fn poll(&mut self, now: Instant) -> Option<Result<Box<dyn Link>, Error>> {
        let engine = SharedEngine::default();
        let args = OpenArgs {
            options: &self.options,
            address: self.address,
            qid: self.qid,
            depth: self.depth,
            cntlid: self.cntlid,
            engine: EngineMode::Inline,
            shared_engine: &engine,
        };
        let ended = match &mut self.connecting {
            Connecting::Flexins(verbs) => verbs.outcome().map(|outcome| agree(&args, outcome)),
            Connecting::Simulated(verbs) => verbs.outcome().map(|outcome| agree(&args, outcome)),
            Connecting::Tcp(link) => match link.outcome(&args) {
                None => None,
                Some(Err(error)) => Some(Err(error)),
                Some(Ok(())) => {
                    return match std::mem::replace(&mut self.connecting, Connecting::Over) {
                        Connecting::Tcp(link) => Some(Ok(Box::new(link))),
                        _ => None,
                    };
                }
            },
            Connecting::Over => return None,
        };
        let ended = match ended {
            None if now >= self.deadline => agree(&args, Outcome::Unreachable),
            None => return None,
            Some(ended) => ended,
        };
        let depth = self.depth;
        let link: Option<Box<dyn Link>> = match (
            ended,
            std::mem::replace(&mut self.connecting, Connecting::Over),
        ) {
            (Err(error), _) => return Some(Err(error)),
            (Ok(agreed), Connecting::Flexins(verbs)) => {
                Some(Box::new(RdmaLink::new(verbs, depth, agreed)))
            }
            (Ok(agreed), Connecting::Simulated(verbs)) => {
                Some(Box::new(RdmaLink::new(verbs, depth, agreed)))
            }
            (Ok(_), Connecting::Tcp(_) | Connecting::Over) => None,
        };
        link.map(Ok)
    }
}
