//! The two ways in which a namespace becomes a block device of this host: ublk, and a loop device over FUSE.

mod fuse_loop;
mod ublk;

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use flexblk_initiator::Namespace;
use flexblk_initiator::export::ExportCounters;
use flexblk_initiator::export::ublk::{UblkError, probe};
use flexblk_initiator::volume::Volume;

use super::args::Attach;
use super::state::{Identity, Name, Objects, Record};
use crate::exit::Usage;

/// How long the kernel may take to let go before everything under way is aborted, and then once more.
pub(super) const RELEASE: Duration = Duration::from_secs(1);

/// A way to make a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Via {
    /// The kernel's ublk driver (Linux 6.0).
    Ublk,
    /// A loop device over a FUSE file (Linux 5.8).
    Fuse,
}

/// A block device that is served.
pub(super) trait Backend: Send {
    /// The device.
    fn path(&self) -> &Path;

    /// What belongs to it.
    fn objects(&self) -> Objects;

    /// What was done so far.
    fn counters(&self) -> ExportCounters;

    /// The namespace has another size now: the device follows.
    fn resize(&mut self, len_bytes: u64) -> Result<()>;

    /// Everything under way, and everything to come, ends with an error.
    fn abort(&mut self);

    /// It is to go when its last user has gone.
    fn let_go(&mut self);

    /// The device has gone; after [`let_go`](Self::let_go), also: nobody uses it any more.
    fn has_ended(&mut self) -> bool;

    /// The device goes, in bounded time.
    fn end(&mut self);
}

/// A device that was made.
pub(super) struct Made {
    pub(super) backend: Box<dyn Backend>,
    /// Which way, and why, for the user.
    pub(super) how: String,
    /// Of the device: when it was taken over, not necessarily of the namespace.
    pub(super) size_bytes: u64,
}

/// The device that is wanted.
pub(super) struct Order<'a> {
    pub(super) args: &'a Attach,
    pub(super) volume: &'a Volume,
    pub(super) namespace: &'a Namespace,
    pub(super) name: &'a Name,
    pub(super) identity: &'a Identity,
}

impl Order<'_> {
    /// Writes down what is there from now on, so that others can remove it when this process is killed.
    fn keep(&self, objects: Objects) -> Result<()> {
        Record::new(self.identity.clone(), objects, None).save(self.name)
    }

    /// What the udev rule reads.
    fn write_properties(&self, path: &Path) -> Result<()> {
        let mut properties = format!("FLEXBLK_NAME={}\n", self.name);
        if let Some(wwid) = &self.identity.wwid {
            properties += &format!("FLEXBLK_WWID={wwid}\n");
        }
        fs::write(path, properties).with_context(|| format!("{}", path.display()))
    }
}

/// Makes the device, by ublk when that is possible and nothing else is asked for.
pub(super) fn make(order: &Order<'_>) -> Result<Made> {
    let args = order.args;
    let why_not_ublk = match (args.via, why_not_ublk(args)) {
        (Some(Via::Fuse), _) => "--via says so".into(),
        (Some(Via::Ublk), Some(WhyNot::Ublk(error))) => return Err(error.into()),
        (Some(Via::Ublk), Some(WhyNot::Partitions)) => {
            return Err(Usage(format!("--via ublk: {}", WhyNot::Partitions)).into());
        }
        (None, Some(reason)) => reason.to_string(),
        (via, None) => match ublk::make(order) {
            Ok(backend) => {
                let why = match via {
                    Some(_) => "because --via says so",
                    None => "which is faster than a loop device over FUSE",
                };
                let size_bytes = order.namespace.len_bytes();
                return Ok(made(backend, format!("ublk, {why}"), size_bytes));
            }
            Err(error) if via.is_none() && is_of_ublk(&error) => {
                tracing::warn!(error = format!("{error:#}"), "ublk does not work here");
                format!("{error:#}")
            }
            Err(error) => return Err(error),
        },
    };
    let backend = fuse_loop::make(order)?;
    let how = format!("loop device over FUSE, because {why_not_ublk}");
    Ok(made(backend, how, order.namespace.len_bytes()))
}

/// Goes on serving the device of a killed process, which waits for that.
pub(super) fn take_over(order: &Order<'_>, number: u32) -> Result<Made> {
    let (backend, size_bytes) = ublk::take_over(order, number)?;
    let how = "ublk, taken over from a killed process".into();
    Ok(made(backend, how, size_bytes))
}

fn made(backend: impl Backend + 'static, how: String, size_bytes: u64) -> Made {
    Made {
        backend: Box::new(backend),
        how,
        size_bytes,
    }
}

/// Why the device is not made by ublk.
#[derive(Debug, thiserror::Error)]
enum WhyNot {
    #[error("{0}")]
    Ublk(UblkError),
    #[error("--no-partitions is given, and a ublk device always looks for them")]
    Partitions,
}

fn why_not_ublk(args: &Attach) -> Option<WhyNot> {
    match probe() {
        Err(error) => Some(WhyNot::Ublk(error)),
        Ok(()) if args.no_partitions => Some(WhyNot::Partitions),
        Ok(()) => None,
    }
}

/// Whether it is the driver's error, or about the driver: not the target's, and not a file's.
fn is_of_ublk(error: &anyhow::Error) -> bool {
    error.downcast_ref::<UblkError>().is_some()
}
