//! Exit codes: what a script can tell apart.

use std::process::ExitCode;

use flexblk_initiator::{Error, IoError, LostReason};
use flexblk_rpc::RpcError;

/// Shown by `flexblk --help`.
pub(crate) const HELP: &str = "\
Exit codes:
  0  done
  1  something on this machine failed (a file, memory, a permission)
  2  wrong usage
  3  the target cannot be reached, refused the connection, or was lost
  4  no such subsystem, or this host is not allowed to use it
  5  no such namespace, or the range is outside of it
  6  the target reported an I/O error
  7  the data differ (copy --verify, compare)";

/// The data that was read back is not what was written.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Differs(pub(crate) String);

/// The arguments make no sense together, or with the namespace.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// The range is not inside the namespace.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct OutOfRange(pub(crate) String);

/// Another process has said what is wrong; its exit code is ours.
#[derive(Debug, thiserror::Error)]
#[error("exit code {0}")]
pub(crate) struct Reported(pub(crate) u8);

/// The target was there, and is not any more.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct TargetLost(pub(crate) String);

/// The code for an error that ends the program.
pub(crate) fn code_of(error: &anyhow::Error) -> ExitCode {
    ExitCode::from(number_of(error))
}

/// The same as a number.
pub(crate) fn number_of(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if let Some(Reported(code)) = cause.downcast_ref() {
            return *code;
        }
        if cause.is::<Usage>() {
            return 2;
        }
        if cause.is::<Differs>() {
            return 7;
        }
        if cause.is::<OutOfRange>() {
            return 5;
        }
        if cause.is::<TargetLost>() {
            return 3;
        }
        if let Some(error) = cause.downcast_ref::<Error>() {
            return match error {
                Error::Address(_) | Error::Option { .. } => 2,
                Error::Resolve { .. }
                | Error::Unreachable { .. }
                | Error::Refused { .. }
                | Error::TimedOut { .. }
                | Error::Lost(_)
                | Error::Protocol(_) => 3,
                Error::HostNotAllowed { .. } | Error::NoSubsystem { .. } => 4,
                Error::NoNamespace { .. } => 5,
                Error::Io(error) => of_io(error),
                Error::Status { .. } => 6,
                _ => 1,
            };
        }
        if let Some(error) = cause.downcast_ref::<IoError>() {
            return of_io(error);
        }
        if let Some(error) = cause.downcast_ref::<RpcError>() {
            return match error {
                RpcError::Refused { .. } => 1,
                _ => 3,
            };
        }
    }
    1
}

fn of_io(error: &IoError) -> u8 {
    match error {
        IoError::TimedOut | IoError::ConnectionLost | IoError::Closed => 3,
        _ => 6,
    }
}

/// An I/O error with the reason why its connection ended, when it did.
pub(crate) fn explain(error: IoError, lost: Option<LostReason>) -> anyhow::Error {
    match (error, lost) {
        (IoError::ConnectionLost | IoError::TimedOut, Some(reason)) => Error::Lost(reason).into(),
        (error, _) => error.into(),
    }
}
