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
use flexblk_reactor::Wait;
use flexins::engine::EngineConfig;
use flexins::port::sim::{NodeId, SimNet};

use crate::admin::ADMIN_DEPTH;
use crate::admin::bring_up::{BroughtUp, bring_up_io, bring_up_over, connect_over};
use crate::admin::queue_connect::QueueConnect;
use crate::link::Link;
use crate::link::open::{OpenArgs, SharedEngine, agree};
use crate::link::opening::Opening;
use crate::link::rdma::RdmaLink;
use crate::link::sim::SimVerbs;
use crate::queue_pair::opening::{QueuePairOpening, Rest};
use crate::queue_pair::{Keep, Parts};
use crate::view::ControllerView;
use crate::volume::lanes::{ANSWER_WITHIN, Current, Lanes, Source};
use crate::volume::multipath::Access;
use crate::volume::{MultipathOptions, Request, WriteFence};
use crate::{
    Busy, Cntlid, ConnectOptions, EngineMode, Error, IoCompletion, LostReason, Namespace,
    QueuePair, SharedMemory,
};

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

    /// Starts to connect an I/O queue pair.
    fn begin_queue_pair(&self, qid: u16, depth: u16) -> Result<QueuePairOpening, Error> {
        let (options, facts) = (&self.options, &self.up.facts);
        let now = self.world.borrow_mut().net().now();
        let connect = QueueConnect::begin(
            options,
            facts,
            Qid::new(qid),
            depth,
            |args| Opening::begin_in(&self.world, args),
            now,
        )?;
        let rest = Rest {
            view: Arc::clone(&self.view),
            depth,
            io_timeout: options.io_timeout,
            max_transfer_bytes: facts.max_transfer_bytes,
            bounce_bytes: 1 << 20,
            keep: Keep {
                _qid: None,
                _controller: None,
            },
        };
        Ok(QueuePairOpening::new(connect, rest))
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

/// A volume's channel in a simulated network. What its keeper does is the simulation's: it brings hosts.
pub struct SimChannel {
    world: Rc<RefCell<dyn World>>,
    hosts: Rc<RefCell<Hosts>>,
    lanes: Lanes,
}

/// The controllers of the paths.
struct Hosts {
    epoch: u64,
    paths: Vec<Option<(u64, SimHost)>>,
    cqt: Duration,
}

struct SimSource(Rc<RefCell<Hosts>>);

impl SimChannel {
    /// A channel for `depth` requests on `paths` paths, none of which is there yet.
    ///
    /// # Errors
    /// No memory.
    pub fn new(
        world: &Rc<RefCell<dyn World>>,
        paths: usize,
        depth: u16,
        block_size: u32,
        options: &MultipathOptions,
    ) -> Result<Self, Error> {
        let hosts = Rc::new(RefCell::new(Hosts {
            epoch: 1,
            paths: (0..paths).map(|_| None).collect(),
            cqt: options.cqt,
        }));
        let fence = match options.write_fence {
            WriteFence::Strict => Some(Arc::default()),
            WriteFence::Off => None,
        };
        let source = Box::new(SimSource(Rc::clone(&hosts)));
        let now = world.borrow_mut().net().now();
        let lanes = Lanes::new(source, paths, depth, block_size, options, fence, now)?;
        Ok(Self {
            world: Rc::clone(world),
            hosts,
            lanes,
        })
    }

    /// A path has a controller (again).
    pub fn set_host(&mut self, path: usize, host: SimHost) {
        let mut hosts = self.hosts.borrow_mut();
        hosts.epoch += 1;
        let number = hosts.epoch;
        if let Some(place) = hosts.paths.get_mut(path) {
            *place = Some((number, host));
        }
    }

    /// Whether a path has a controller.
    #[must_use]
    pub fn has_host(&self, path: usize) -> bool {
        matches!(self.hosts.borrow().paths.get(path), Some(Some(_)))
    }

    /// As [`Channel::register_memory`](crate::volume::Channel::register_memory).
    ///
    /// # Errors
    /// The engine has no room for it.
    pub fn register_memory(&mut self, memory: &Arc<SharedMemory>) -> Result<(), Error> {
        self.lanes.register_memory(memory)
    }

    /// As [`Channel::submit`](crate::volume::Channel::submit).
    ///
    /// # Errors
    /// As many requests as fit are under way.
    pub fn submit(&mut self, request: &Request, tag: u64) -> Result<(), Busy> {
        let world = &self.world;
        self.lanes
            .submit(request, tag, || world.borrow_mut().net().now())
    }

    /// Requests that wait.
    #[must_use]
    pub fn held(&self) -> usize {
        self.lanes.multipath().held()
    }

    /// Once around, until `limit` at the latest; keeps the controllers alive, and drops those that are lost.
    pub fn turn(&mut self, limit: Instant, out: &mut Vec<IoCompletion>) {
        let now = self.world.borrow_mut().net().now();
        let until = match self.lanes.before_turn(Some(limit), true, now, out) {
            Wait::Until(until) => until,
            _ => now,
        };
        self.world.borrow_mut().step(until);
        let now = self.world.borrow_mut().net().now();
        self.lanes.after_turn(now, out);
        let hosts = &mut *self.hosts.borrow_mut();
        for path in &mut hosts.paths {
            if let Some((_, host)) = path
                && host.service().is_err()
            {
                *path = None;
                hosts.epoch += 1;
            }
        }
    }
}

impl Source for SimSource {
    fn epoch(&self) -> u64 {
        self.0.borrow().epoch
    }

    fn current(&self, path: usize) -> Option<Current> {
        let hosts = self.0.borrow();
        let (number, host) = hosts.paths.get(path)?.as_ref()?;
        Some(Current {
            number: *number,
            nsid: host.view.namespaces().first()?.nsid,
            access: Access::Optimized,
            silent: 2 * host.options.kato,
            quiesce: hosts.cqt,
        })
    }

    fn begin(&self, path: usize, depth: u16) -> Result<QueuePairOpening, Error> {
        match self.0.borrow().paths.get(path) {
            Some(Some((_, host))) => host.begin_queue_pair(1, depth),
            _ => Err(Error::Lost(LostReason::PeerClosed)),
        }
    }

    fn failed(&self, path: usize, number: u64, _reason: LostReason) {
        let hosts = &mut *self.0.borrow_mut();
        if let Some(place) = hosts.paths.get_mut(path)
            && place.as_ref().is_some_and(|(ours, _)| *ours == number)
        {
            *place = None;
            hosts.epoch += 1;
        }
    }

    fn trouble(&self, _path: usize, _error: &Error) {}

    fn probe(&self, path: usize) {
        if let Some(Some((_, host))) = self.0.borrow_mut().paths.get_mut(path) {
            // A failure shows at its next service.
            let _ = host.up.queue.probe(ANSWER_WITHIN);
        }
    }

    fn read_ana(&self, _path: usize) {}

    fn is_gone(&self) -> bool {
        false
    }
}

fn open(world: &Rc<RefCell<dyn World>>, args: &OpenArgs<'_>) -> Result<Box<dyn Link>, Error> {
    let (verbs, outcome) = SimVerbs::connect(world, args)?;
    let agreed = agree(args, outcome)?;
    Ok(Box::new(RdmaLink::new(verbs, args.depth, agreed)))
}
