//! FlexiNS: a software transport with RDMA verbs.

pub mod cm;
pub mod counters;
pub mod cq;
pub mod digest;
pub mod endpoint;
pub mod engine;
pub mod memory;
pub mod middleware;
pub mod pipe;
pub mod port;
pub mod qp;
pub mod rc;
pub mod remote;
pub mod train;
pub mod verbs;
pub mod wire;
