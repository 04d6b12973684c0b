//! NVMe base, NVM command set and Fabrics structures, without I/O.
//!
//! Everything here is bytes in, meaning out, and back: no socket, clock, thread or `unsafe`.
//! Structures of the specification are byte-exact views ([`zerocopy`]) whose size and field
//! offsets are asserted when the crate is compiled; commands are small owned values with `parse`
//! and `emit`. A command capsule is read without allocation:
//!
//! ```
//! use flexblk_nvme::command::{Command, QueueKind, Sqe, nvm};
//! use flexblk_nvme::{Cid, Lba, Nsid, sgl::Sgl};
//!
//! let read = nvm::Read { nsid: Nsid::new(1), slba: Lba::new(8), blocks: 8, ..Default::default() };
//! let capsule = read.emit(Cid::new(7), &Sgl::Keyed { address: 0x1000, length: 4096, key: 9, invalidate: false });
//!
//! let sqe = Sqe::cast(&capsule);
//! assert_eq!(sqe.cid(), Cid::new(7));
//! assert_eq!(Command::parse(QueueKind::Io, sqe), Ok(Command::Nvm(nvm::Command::Read(read))));
//! ```
//!
//! References, cited beside each field or structure: *Base* is the NVM Express Base Specification
//! revision 2.1 (which holds Fabrics), *NVM* the NVM Command Set Specification revision 1.1,
//! *RDMA* the RDMA Transport Specification revision 1.1, *TCP*
//! the TCP Transport Specification revision 1.0. All multi-byte fields are little endian.

#[macro_use]
mod wire;

pub mod aer;
pub mod command;
pub mod completion;
pub mod features;
pub mod flexins;
pub mod identify;
pub mod ids;
pub mod log;
pub mod nqn;
pub mod property;
pub mod rdma;
pub mod sgl;
pub mod status;
pub mod tcp;
pub mod text;
pub mod transport_id;

pub use command::{Command, QueueKind, Sqe};
pub use completion::Cqe;
pub use ids::{Cid, Cntlid, HostId, Lba, Nsid, Qid};
pub use nqn::Nqn;
pub use sgl::Sgl;
pub use status::{Status, StatusCode};
pub use transport_id::TransportId;
/// Little-endian, alignment-free integers of which the structures are made.
pub use zerocopy::little_endian::{U16, U32, U64, U128};
