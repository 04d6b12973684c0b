//! Block devices on a reactor: null, ram, file and block device, and the wrappers fault and delay.
//!
//! A [`BlockDevice`] is shared by all threads; each reactor thread [opens](BlockDevice::open) a
//! [`Channel`] of its own and does its I/O there, without locks between threads and without
//! allocation:
//!
//! ```
//! use flexblk_blockdev::{BdevConfig, Io, IoBuffers, IoOp, Submitted, Tokens, open};
//! use flexblk_reactor::{Config, HugePages, Reactor, SharedMemory, Wait};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = open(&"ram:1M".parse::<BdevConfig>()?)?;
//! let mut reactor = Reactor::new(&Config::default())?;
//! let mut channel = device.open(&mut reactor, Tokens::new(1, 0))?;
//!
//! let memory = SharedMemory::create("buffers", 4096, HugePages::No)?;
//! let span = memory.span(0, 4096).ok_or("no such range")?;
//! let read = Io { tag: 7, op: IoOp::Read, lba: 0, blocks: 8, data: IoBuffers::one(span) };
//! if let Submitted::Pending = channel.submit(&mut reactor, read) {
//!     let (mut completions, mut done) = (Vec::new(), Vec::new());
//!     while done.is_empty() {
//!         reactor.turn(Wait::Adaptive, &mut completions)?;
//!         for completion in completions.drain(..) {
//!             channel.complete(&mut reactor, &completion, &mut done);
//!         }
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Devices are described by [`BdevConfig`] (TOML, JSON, or a short form such as `ram:1G` and
//! `file:disk.img`) and made by [`open`] or [`open_all`].

mod check;
mod config;
mod delay;
mod device;
mod error;
mod fault;
mod file;
mod identity;
mod inject;
mod io;
mod null;
mod ram;
mod random;
mod size;
mod spans;
mod tokens;

pub use config::{
    BdevConfig, DelayConfig, FaultConfig, FaultOn, FileConfig, HugePagesMode, MediaError,
    NullConfig, RamConfig, open, open_all, open_over,
};
pub use delay::DelayDevice;
pub use device::{BlockDevice, Caps, Channel, Info};
pub use error::Error;
pub use fault::FaultDevice;
pub use file::{DirectMode, FileDevice};
pub use inject::{InjectOn, InjectedError, Injection, Injector};
pub use io::{Io, IoBuffers, IoDone, IoError, IoOp, MAX_SPANS, Submitted};
pub use null::NullDevice;
pub use ram::RamDevice;
pub use size::ByteSize;
pub use tokens::Tokens;
