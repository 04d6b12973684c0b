//! A host in a simulated network: for simulations.
//!
//! Admin queue, queue pairs and the NVMe/RDMA binding are those of the library; what is missing is the
//! control thread. A simulation brings a [`World`], and calls [`SimHost::service`] now and then, which
//! keeps the controller alive.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_nvme::{Nqn, Qid};
use flexins::engine::EngineConfig;
use flexins::port::sim::{NodeId, SimNet};

use crate::admin::ADMIN_DEPTH;
use crate::admin::bring_up::{BroughtUp, bring_up_io, bring_up_over, connect_over};
use crate::link::Link;
use crate::link::open::{OpenArgs, SharedEngine, agree};
use crate::link::rdma::RdmaLink;
use crate::link::sim::SimVerbs;
use crate::queue_pair::{Keep, Parts};
use crate::view::ControllerView;
use crate::{Cntlid, ConnectOptions, EngineMode, Error, Namespace, QueuePair};

/// The network and everybody else on it.
pub trait World {
    /// The network.
    fn net(&mut self) -> &mut SimNet;

    /// Adds a node with an address of its own: each queue pair of a host has one.
    fn add_node(&mut self, engine: EngineConfig) -> NodeId;

    /// Goes on to the next event, but not beyond `limit`; targets have their turn. False when `limit` was
    /// reached first.
    fn step(&mut self, limit: Instant) -> bool;
}

/// A controller as its host sees it.
pub struct SimHost {
    world: Rc<RefCell<dyn World>>,
    options: ConnectOptions,
    up: BroughtUp,
    view: Arc<ControllerView>,
}

impl SimHost {
    /// Connects to the subsystem `subnqn` at `address` and enables the controller.
    ///
    /// # Errors
    /// As [`crate::Controller::connect`].
    pub fn connect(
        world: &Rc<RefCell<dyn World>>,
        options: &ConnectOptions,
        address: SocketAddr,
        subnqn: &Nqn,
    ) -> Result<Self, Error> {
        let args = OpenArgs {
            options,
            address,
            qid: Qid::ADMIN,
            depth: ADMIN_DEPTH,
            cntlid: Cntlid::DYNAMIC,
            engine: EngineMode::Inline,
            shared_engine: &SharedEngine::default(),
        };
        let mut up = bring_up_over(open(world, &args)?, options, address, subnqn)?;
        let (_, namespaces) = bring_up_io(options, &mut up)?;
        let view = Arc::new(ControllerView::default());
        view.set_namespaces(namespaces);
        Ok(Self {
            world: Rc::clone(world),
            options: options.clone(),
            up,
            view,
        })
    }

    /// Active namespaces as they were when it connected.
    #[must_use]
    pub fn namespaces(&self) -> Vec<Namespace> {
        self.view.namespaces().to_vec()
    }

    /// A new I/O queue pair.
    ///
    /// # Errors
    /// As [`crate::Controller::queue_pair`].
    pub fn queue_pair(&mut self, qid: u16, depth: u16) -> Result<QueuePair, Error> {
        let (options, facts) = (&self.options, &self.up.facts);
        let args = OpenArgs {
            options,
            address: facts.address,
            qid: Qid::new(qid),
            depth,
            cntlid: facts.cntlid,
            engine: EngineMode::Inline,
            shared_engine: &SharedEngine::default(),
        };
        let link = open(&self.world, &args)?;
        let link = connect_over(link, options, facts, args.qid, depth)?;
        QueuePair::assemble(Parts {
            link,
            view: Arc::clone(&self.view),
            depth,
            io_timeout: options.io_timeout,
            max_transfer_bytes: facts.max_transfer_bytes,
            bounce_bytes: 1 << 20,
            keep: Keep {
                _qid: None,
                _controller: None,
            },
        })
    }

    /// What the control thread does: keep-alive, events. A lost controller ends its queue pairs.
    ///
    /// # Errors
    /// The controller is lost.
    pub fn service(&mut self) -> Result<(), Error> {
        let now = self.up.queue.runner().clock();
        let served = self.up.queue.service(now);
        if let Err(Error::Lost(reason)) = &served {
            self.view.set_lost(*reason);
        }
        served
    }

    /// Disconnects the Admin queue, which ends the controller.
    pub fn disconnect(mut self) {
        self.up.queue.runner().close(Duration::from_secs(1));
    }
}

fn open(world: &Rc<RefCell<dyn World>>, args: &OpenArgs<'_>) -> Result<Box<dyn Link>, Error> {
    let (verbs, outcome) = SimVerbs::connect(world, args)?;
    let agreed = agree(args, outcome)?;
    Ok(Box::new(RdmaLink::new(verbs, args.depth, agreed)))
}
