//! Modules on the datagram path of an endpoint: seeded faults and packet capture.
//!
//! Both see single packets (the UDP payload), after a received train was cut into packets and
//! before a sent one is handed to the kernel. Neither costs anything when it is not configured:
//! an endpoint holds them as `Option`s.

pub mod capture;
pub mod fault;
pub mod random;

pub use capture::{Capture, Direction};
pub use fault::{FaultConfig, FaultInjector};
