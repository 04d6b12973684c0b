//! Management over the RPC socket: every method, bad input, clients that misbehave.

mod configurations;
mod error_devices;
mod methods;
mod metrics;
mod requests;
mod round_trip;
mod world;
