//! The NVMe-oF target: subsystems, namespaces, controllers and queues over FlexiNS.
//!
//! [`Target::start`] opens the block devices, binds the port and starts the data threads; hosts can
//! connect when it returns. What is exported can be changed while I/O goes on.
//!
//! ```no_run
//! use flexblk_target::config::{Config, Namespace, Subsystem, parse_nqn};
//! use flexblk_target::Target;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let nqn = parse_nqn("nqn.2026-11.dev.flexblk:example")?;
//! let mut subsystem = Subsystem::new(nqn.clone());
//! subsystem.namespaces.push(Namespace::new("ram:1G"));
//! let target = Target::start(Config { subsystems: vec![subsystem], ..Config::default() })?;
//! let nsid = target.add_namespace(&nqn, &Namespace::new("file:disk.img"))?;
//! target.remove_namespace(&nqn, nsid)?;
//! target.shutdown();
//! # Ok(())
//! # }
//! ```
//!
//! Rooms: [`controller`] is the NVMe controller as a state machine, [`queue`] reads I/O commands,
//! [`directory`] judges Connect; `thread` drives them over FlexiNS queue pairs and block devices.

pub mod association;
pub mod bdevs;
pub mod budget;
pub mod captures;
pub mod config;
mod control;
pub mod controller;
pub mod counters;
pub mod directory;
mod draft;
pub mod error;
pub mod histogram;
pub mod iostat;
pub mod manage;
pub mod media;
pub mod metrics;
pub mod port;
pub mod ptpl;
pub mod queue;
pub mod recorder;
pub mod reservation;
pub mod sim;
pub mod snapshot;
pub mod stats;
mod target;
mod thread;

pub use error::{NamespaceError, StartError};
pub use target::Target;
