//! The parts of a queue that do no I/O: slots, regions, bounce buffers.

pub(crate) mod bounce;
pub(crate) mod regions;
pub(crate) mod slots;
