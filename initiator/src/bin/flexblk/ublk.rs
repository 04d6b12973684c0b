//! `flexblk export ublk`.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use flexblk_initiator::export::daemon;
use flexblk_initiator::export::ublk::{UblkError, UblkExport, UblkOptions};
use flexblk_initiator::volume::{Volume, VolumeEvent};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::args::{Address, Connection};
use crate::connect;
use crate::paths::Paths;

pub(crate) const HELP: &str = "\
Examples:
  modprobe ublk_drv
  flexblk export ublk nvme+flexins://192.0.2.7/NQN --dev-id 0 --queues 4
  flexblk export ublk nvme+flexins://192.0.2.7/NQN --dev-id 0 --recover";

/// How long we sleep between two looks at signals and events.
const TICK: Duration = Duration::from_millis(100);
/// How long requests under way may take at the end before they fail.
const GRACE: Duration = Duration::from_secs(1);

#[derive(Args, Debug)]
pub(crate) struct Ublk {
    #[command(flatten)]
    address: Address,
    /// Number of the device, N of /dev/ublkbN [default: the kernel chooses].
    #[arg(long, value_name = "N", required_if_eq("recover", "true"))]
    dev_id: Option<u32>,
    /// Take over the device whose server was killed; its queues stay as they were.
    #[arg(long)]
    recover: bool,
    /// Queues, each with a thread and a queue pair of its own.
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// Requests of each queue at once.
    #[arg(long, value_name = "COUNT", default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=1024))]
    queue_size: u16,
    #[command(flatten)]
    paths: Paths,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) fn serve(args: &Ublk) -> Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("signals")?;
    for warning in daemon::guard_against_memory_pressure() {
        tracing::warn!("less safe under memory pressure: {warning}");
    }
    let volume = connect::volume(&args.address, &args.paths, &args.connection, args.queues)?;
    let export = match (args.recover, args.dev_id) {
        (true, Some(number)) => UblkExport::take_over(&volume, number),
        _ => UblkExport::start(
            &volume,
            &UblkOptions {
                number: args.dev_id,
                queues: args.queues,
                depth: args.queue_size,
            },
        ),
    };
    let mut export = export.map_err(unwrapped)?;
    println!("{}", export.path().display());
    let ran = watch(&volume, &mut export, &mut signals);
    if !export.end(GRACE) {
        bail!("the device is not gone: somebody still has it open");
    }
    ran
}

/// Until a signal comes or the device goes.
fn watch(volume: &Volume, export: &mut UblkExport, signals: &mut Signals) -> Result<()> {
    // A device that was taken over has the size of then.
    follow(export, volume.namespace()?.len_bytes());
    let mut lost = false;
    loop {
        if signals.pending().next().is_some() {
            return Ok(());
        }
        if export.has_ended() {
            bail!("somebody removed {}", export.path().display());
        }
        if lost {
            std::thread::sleep(TICK);
            continue;
        }
        match volume.next_event(TICK) {
            Some(VolumeEvent::NamespaceChanged) => {
                follow(export, volume.namespace()?.len_bytes());
            }
            Some(VolumeEvent::Lost) => {
                tracing::error!("the namespace is lost: I/O fails from now on");
                lost = true;
            }
            Some(other) => tracing::info!(?other, "the volume"),
            None => {}
        }
    }
}

/// The device gets the size of the namespace, where the kernel can do that.
fn follow(export: &mut UblkExport, now: u64) {
    let was = export.len_bytes();
    if now == was {
        return;
    }
    match export.resize(now) {
        Ok(()) => tracing::info!(was, now, "the namespace has another size"),
        Err(error) => {
            tracing::error!(%error, was, now, "the device does not follow the size of the namespace");
        }
    }
}

/// The exit code is that of the cause.
pub(crate) fn unwrapped(error: UblkError) -> anyhow::Error {
    match error {
        UblkError::Volume(error) => error.into(),
        error => error.into(),
    }
}
