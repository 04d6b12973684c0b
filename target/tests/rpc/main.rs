//! Management over the RPC socket: every method, bad input, clients that misbehave.

#[path = "../host/mod.rs"]
mod host;

mod configurations;
mod error_devices;
mod methods;
mod metrics;
mod requests;
mod round_trip;
mod world;
