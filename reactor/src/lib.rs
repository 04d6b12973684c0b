//! One thread, one io_uring: completions, timers, mailboxes, registered memory.
//!
//! A [`Reactor`] belongs to one thread for life. Its owner queues operations with
//! [`Reactor::submit`], then calls [`Reactor::turn`], which enters the kernel once to submit
//! everything queued and to collect everything finished, and again only to wait, and appends the [`Completion`]s to a list:
//!
//! ```no_run
//! use flexblk_reactor::{Config, Reactor, Token, Wait};
//! # fn main() -> Result<(), flexblk_reactor::Error> {
//! let mut reactor = Reactor::new(&Config::default())?;
//! let tick = Token::new(1, 7);
//! reactor.arm(reactor.now() + std::time::Duration::from_millis(5), tick);
//! let mut completions = Vec::new();
//! loop {
//!     reactor.turn(Wait::Adaptive, &mut completions)?;
//!     for completion in completions.drain(..) {
//!         if completion.token == tick {
//!             return Ok(());
//!         }
//!     }
//!     // drain mailboxes here: a wake-up ends the turn without a completion
//! }
//! # }
//! ```
//!
//! While there is work the thread spins on shared memory (the completion queue's tail and one flag
//! of the submission ring), and on what [`Reactor::turn_polling`] was given besides; when nothing has happened for [`Config::poll_budget`] it sleeps in
//! `io_uring_enter` until a completion, a [`Waker`] or the next timer.
//!
//! No type of the `io-uring` crate appears in this API.

pub mod affinity;
mod buffer_ring;
mod command_ring;
mod completion;
mod error;
mod features;
mod keeper;
pub mod mailbox;
pub mod memory;
mod op;
mod reactor;
mod received;
mod stats;
mod timer;
mod waker;

pub use buffer_ring::BufferRing;
pub use command_ring::CommandRing;
pub use completion::{Completion, CompletionFlags, REACTOR_OWNER, Token};
pub use error::Error;
pub use features::Features;
pub use keeper::Keeper;
pub use memory::{Buffer, HugePages, Order, Pool, SharedMemory, Span};
pub use op::Op;
pub use reactor::{Config, LOOKS_IN_VAIN, Polled, Reactor, Wait};
pub use received::ReceivedMessage;
pub use stats::Stats;
pub use timer::TimerId;
pub use waker::Waker;
