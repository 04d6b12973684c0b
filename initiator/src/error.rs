//! Errors of everything but I/O commands, and what they mean to a program.

use std::net::SocketAddr;
use std::time::Duration;

use flexblk_nvme::{Nsid, Status, StatusCode};

use crate::IoError;

/// Why a controller, a queue pair or an admin command did not work. One line each, saying what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The address cannot be used.
    #[error("{0}")]
    Address(String),
    /// An option has a value that cannot be used.
    #[error("option {name}: {reason}")]
    Option {
        /// The option's word.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The name did not resolve.
    #[error("cannot resolve {name}: {cause}")]
    Resolve {
        /// What was looked up.
        name: String,
        /// What the resolver said.
        cause: std::io::Error,
    },
    /// Nothing answered.
    #[error("no answer from {address} within {after:?}: is the target running, and is {protocol} port {port} open?", port = .address.port())]
    Unreachable {
        /// Where the packets went.
        address: SocketAddr,
        /// `UDP` or `TCP`.
        protocol: &'static str,
        /// How long we tried.
        after: Duration,
    },
    /// The target answered, and refused the connection.
    #[error("{address} refused the connection: {reason}")]
    Refused {
        /// Who refused.
        address: SocketAddr,
        /// Its reason.
        reason: String,
    },
    /// The host NQN is not on the subsystem's allow-list.
    #[error(
        "host {hostnqn} is not allowed to use {subnqn}: add it to the subsystem's allowed hosts, or connect with --hostnqn"
    )]
    HostNotAllowed {
        /// Who we said we are.
        hostnqn: String,
        /// What we asked for.
        subnqn: String,
    },
    /// The target has no such subsystem at this address.
    #[error(
        "no subsystem {subnqn} at {address} (or not for host {hostnqn}): `flexblk discover` lists what is there"
    )]
    NoSubsystem {
        /// What we asked for.
        subnqn: String,
        /// Whom we asked.
        address: SocketAddr,
        /// Who we said we are.
        hostnqn: String,
    },
    /// The controller has no such active namespace.
    #[error("namespace {nsid} is not there; active namespaces: {active}")]
    NoNamespace {
        /// What was asked for.
        nsid: Nsid,
        /// What there is.
        active: NamespaceList,
    },
    /// The controller failed a command.
    #[error("{command} failed: {status}")]
    Status {
        /// The command's name.
        command: &'static str,
        /// The controller's verdict.
        status: Status,
    },
    /// A command was not answered in time.
    #[error("{command}: no answer within {after:?}; the target may be dead or overloaded")]
    TimedOut {
        /// The command's name.
        command: &'static str,
        /// The limit.
        after: Duration,
    },
    /// A path of a volume leads elsewhere than its others.
    #[error("{address} leads to another namespace than the volume's other paths: {reason}")]
    OtherNamespace {
        /// The path.
        address: String,
        /// What tells them apart.
        reason: String,
    },
    /// The connection is gone.
    #[error("connection to the controller lost: {0}")]
    Lost(LostReason),
    /// The peer broke the protocol.
    #[error("the target broke the protocol: {0}")]
    Protocol(&'static str),
    /// An I/O command of a blocking call failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The transport could not do it (registration, resources, socket).
    #[error("transport: {0}")]
    Transport(String),
    /// This machine could not do it.
    #[error("{what}: {cause}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        cause: std::io::Error,
    },
}

/// Why a controller or queue pair is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LostReason {
    /// The keep-alive was not answered.
    #[error("keep-alive not answered")]
    KeepAlive,
    /// The transport gave up retransmitting.
    #[error("no acknowledgement from the target")]
    Retries,
    /// The peer ended the connection.
    #[error("the target ended the connection")]
    PeerClosed,
    /// An I/O queue of it was lost, and a volume gave up the whole path.
    #[error("an I/O queue was lost")]
    IoQueue,
    /// A command was not answered in time.
    #[error("a command was not answered in time")]
    CommandTimeout,
    /// The thread that the transport engine runs in has ended.
    #[error("the engine thread has ended")]
    EngineGone,
    /// The controller reported a fatal status (CSTS.CFS).
    #[error("the controller reported a fatal error")]
    Fatal,
    /// The peer sent something that makes no sense.
    #[error("the target broke the protocol")]
    Protocol,
    /// We closed it.
    #[error("closed")]
    Closed,
}

/// Namespace ids for an error message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceList(pub Vec<Nsid>);

impl std::fmt::Display for NamespaceList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (i, nsid) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{nsid}")?;
        }
        Ok(())
    }
}

/// As Linux's block layer translates NVMe statuses (`nvme_error_status`, `blk_errors`).
pub(crate) fn errno_of(error: &IoError) -> i32 {
    match error {
        IoError::Nvme(status) => match status.code() {
            StatusCode::LbaOutOfRange => libc::ENOSPC,
            StatusCode::CapacityExceeded => libc::ENOSPC,
            StatusCode::InvalidOpcode | StatusCode::InvalidField => libc::EOPNOTSUPP,
            StatusCode::InvalidNamespaceOrFormat => libc::ENODEV,
            StatusCode::NamespaceWriteProtected | StatusCode::WriteToReadOnlyRange => libc::EROFS,
            StatusCode::CompareFailure => libc::EILSEQ,
            StatusCode::UnrecoveredReadError | StatusCode::DeallocatedOrUnwritten => libc::ENODATA,
            StatusCode::ReservationConflict => libc::EBADE,
            _ => libc::EIO,
        },
        IoError::Invalid(_) => libc::EINVAL,
        IoError::TimedOut => libc::ETIMEDOUT,
        IoError::ConnectionLost => libc::ENOTCONN,
        IoError::Closed => libc::ECANCELED,
    }
}
