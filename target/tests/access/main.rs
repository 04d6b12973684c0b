//! What keeps a host from a namespace or its blocks, on the wire: reservations, ANA states, masking,
//! write protection, Write Uncorrectable over restarts.

#[path = "../host/mod.rs"]
mod host;
#[path = "../world/mod.rs"]
mod world;

mod ana;
mod kept;
mod member;
mod reservations;
mod uncorrectable;
mod visibility;
mod write_protection;
