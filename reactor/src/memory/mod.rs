//! Memory for I/O: shared regions, spans lent out of them, pools of equal buffers.

mod pool;
mod shared;
mod span;

pub use pool::{Buffer, Order, Pool};
pub use shared::{HugePages, SharedMemory};
pub use span::Span;
