//! NVMe/TCP on a data thread: connections beside FlexiNS queue pairs, under the same commands,
//! buffers and devices.
//!
//! ```text
//! accept -> Connection --ICReq--> established --Connect--> Queue (Fabric::Tcp)
//!              |  recv: buffers that the kernel takes when there is something (a few for all
//!              |        connections), or straight to where the payload of an H2CData PDU belongs
//!              |        (the only busy one by a thread that spins: without the ring, `asked`)
//!              |  send: everything that a round has produced in one sendmsg, gathered from header
//!              |        bytes, I/O buffers and namespaces in memory
//! ```
//!
//! Each data thread listens on a socket of its own (SO_REUSEPORT), and a connection stays with the
//! thread that accepted it. One receive and one send of a connection are with the kernel at a time;
//! what they use stays until both have ended, and then the connection is freed.
//!
//! | who is it | how long | what happens then |
//! |---|---|---|
//! | has not sent a Connect that succeeded | 10 s from accept | closed |
//! | one more than [`MAX_STRANGERS`] without a queue | | the oldest of them is closed |
//! | has broken the protocol | 2 s after C2HTermReq | closed |
//! | has used up its queue's slots (a quarter and 8 more than entries) | | is not read until one has ended |

mod asked;
mod lent;
mod receive;
mod send;
mod socket;
mod table;

use std::time::Duration;

pub(crate) use socket::listen;
pub(crate) use table::{ConnKey, Tcp, TcpConfig};

/// Owner number of NVMe/TCP in the reactor's tokens.
pub(crate) const TCP_OWNER: u8 = 3;
/// Connections of a thread that have no queue yet: bounds what somebody who only connects can take.
pub(crate) const MAX_STRANGERS: usize = 256;
/// How long a connection stays open after C2HTermReq, for the host to read it.
const LINGER: Duration = Duration::from_secs(2);
/// How long accepting pauses when there are no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// MAXH2CDATA: the longest transfer, so that its data can come in one PDU.
const MAX_H2C_DATA_BYTES: u32 = crate::queue::request::MAX_TRANSFER_BYTES;
/// In-capsule data of a command (Identify's IOCCSZ less the entry).
const IN_CAPSULE_BYTES: u32 = 8192;
