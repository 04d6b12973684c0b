//! Modules on the datagram path: seeded faults and packet capture.

pub(crate) mod random;
