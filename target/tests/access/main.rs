//! What keeps a host from a namespace, on the wire: reservations, ANA states, masking, write
//! protection.

#[path = "../host/mod.rs"]
mod host;
#[path = "../world/mod.rs"]
mod world;

mod ana;
mod kept;
mod member;
mod reservations;
mod visibility;
mod write_protection;
