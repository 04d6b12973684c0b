//! The NVMe-oF target: subsystems, namespaces, controllers and queues over FlexiNS.

pub mod association;
pub mod budget;
pub mod config;
pub mod controller;
pub mod counters;
pub mod directory;
pub mod queue;
pub mod snapshot;
