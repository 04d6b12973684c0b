//! A target on somebody else's engine and clock: for simulations.
//!
//! The queues, controllers and devices are those of the daemon; what is missing is the loop of a data
//! thread. Its caller brings an engine (of a [`flexins::port::sim::SimNet`]), time, and calls
//! [`SimTarget::turn`] after every step.

use std::time::Instant;

use flexblk_reactor::{Completion, Reactor, Wait};
use flexins::engine::{Delivery, Engine, EngineConfig};

use crate::config::{Config, Listener};
use crate::control::Control;
use crate::error::StartError;
use crate::target::Target;
use crate::thread::tcp::TcpConfig;
use crate::thread::{BDEV_OWNER, Core, run};

/// A target with one data thread, which is the caller.
pub struct SimTarget {
    core: Core,
    /// Devices work on it; with RAM devices it has nothing to wait for.
    reactor: Reactor,
    completions: Vec<Completion>,
    control: Option<Control>,
    _target: Target,
}

impl SimTarget {
    /// How the engine of such a target is configured.
    #[must_use]
    pub fn engine_config(listener: &Listener) -> EngineConfig {
        let mut engine = EngineConfig::default();
        run::configure_engine(&mut engine, listener);
        engine
    }

    /// Opens the devices and listens. Cores and everything about sockets are ignored.
    ///
    /// # Errors
    /// As [`Target::start`].
    pub fn new(mut config: Config, engine: &mut Engine, now: Instant) -> Result<Self, StartError> {
        config.cores.clear();
        config.tcp = None;
        let (target, buffer_bytes) = Target::without_threads(config)?;
        let mut reactor = Reactor::new(&flexblk_reactor::Config {
            name: "simulated target",
            ..flexblk_reactor::Config::default()
        })?;
        let shared = std::sync::Arc::clone(target.shared());
        let mut core = Core::new(
            0,
            shared,
            buffer_bytes,
            TcpConfig::default(),
            engine,
            &mut reactor,
        )?;
        core.set_now(now);
        Ok(Self {
            core,
            reactor,
            completions: Vec::new(),
            control: target.control(),
            _target: target,
        })
    }

    /// A message for it has arrived. A turn follows.
    pub fn deliver(&mut self, engine: &mut Engine, delivery: &Delivery, packet: &[u8]) {
        self.core.delivery(engine, delivery, packet);
    }

    /// Does all that can be done now.
    ///
    /// # Errors
    /// The reactor of its devices failed.
    pub fn turn(&mut self, engine: &mut Engine, now: Instant) -> Result<(), StartError> {
        self.core.set_now(now);
        loop {
            self.completions.clear();
            self.reactor.turn(Wait::Poll, &mut self.completions)?;
            for completion in &self.completions {
                if completion.token.owner() == BDEV_OWNER {
                    self.core
                        .device_completion(engine, &mut self.reactor, completion);
                }
            }
            self.core.handle_timeout(now);
            self.core.poll(engine, &mut self.reactor);
            let mail = self.control.as_mut().map(Control::step);
            let mail = mail.unwrap_or_default();
            if mail.is_empty() && !self.core.has_work() {
                return Ok(());
            }
            for mail in mail {
                self.core.mail(mail, engine, &mut self.reactor);
            }
        }
    }

    /// When it wants its next turn, packets aside.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Instant> {
        self.core.next_timeout()
    }

    /// Queues that hosts have, and I/O buffers that are free: small and large ones.
    pub fn figures(&mut self) -> (usize, (u32, u32)) {
        let figures = self.core.figures();
        (figures.queues, figures.free_buffers)
    }
}
