//! Queues: what a command capsule asks for, and the commands that are under way.

pub mod data;
pub mod request;

/// Entries of an Admin submission queue: what the discovery log offers (ASQSZ). Base 5.1.12.3.1
/// asks for at least 32.
pub const ADMIN_ENTRIES: u16 = 128;
