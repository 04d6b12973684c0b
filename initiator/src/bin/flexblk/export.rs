//! `flexblk export`: a namespace for other programs, as long as this one runs.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use flexblk_initiator::export::nbd::{NbdAddress, NbdExport, NbdOptions};
use flexblk_initiator::volume::{Volume, VolumeEvent};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::args::{Address, Connection};
use crate::exit::{TargetLost, Usage};
use crate::paths::Paths;
use crate::{connect, size, ublk, vhost_user};

/// How often the exporter looks whether all is well.
const WATCH_INTERVAL: Duration = Duration::from_millis(100);
/// How long the end may take, in whatever state the target is.
const STOP_WITHIN: Duration = Duration::from_secs(5);

#[derive(Args, Debug)]
pub(crate) struct Export {
    #[command(subcommand)]
    pub(crate) protocol: Protocol,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Protocol {
    /// Serve a namespace to NBD clients: the kernel's (nbd-client), qemu, libnbd.
    ///
    /// Runs in the foreground until SIGINT or SIGTERM. Prints `ready: URI` when clients can connect. A Unix socket is
    /// open to its owner only; whoever reaches a TCP port can use the namespace, for NBD has no passwords: listen on
    /// addresses that you trust. A namespace that has grown has its new size for clients that connect afterwards.
    #[command(after_help = "\
Examples:
  flexblk export nbd nvme+flexins://192.0.2.7/nqn.2026-11.io.example:disk1 --socket /run/disk1.sock
  qemu-img convert -O raw 'nbd+unix:///?socket=/run/disk1.sock' disk1.img
  nbd-client -unix /run/disk1.sock /dev/nbd0 -b 512 -C 2

  flexblk export nbd URI --listen 127.0.0.1:10809 --name disk1 --read-only
  nbdinfo nbd://127.0.0.1:10809/disk1")]
    Nbd(Nbd),
    /// Be a disk of virtual machines: a vhost-user-blk back-end on a Unix socket.
    ///
    /// Runs in the foreground until SIGINT or SIGTERM, serves one virtual machine at a time, and prints a line when one
    /// can connect. When it ends or is killed, the disk's requests wait until it runs again (`reconnect-ms` of QEMU's
    /// chardev).
    #[command(after_help = vhost_user::HELP)]
    VhostUser(vhost_user::VhostUser),
    /// Be a block device of this host, by the kernel's ublk driver.
    ///
    /// Runs in the foreground until SIGINT or SIGTERM, which remove the device, and prints its path when it is there. When
    /// this process is killed, the device stays and its requests wait for `--recover`. Needs CAP_SYS_ADMIN.
    #[command(after_help = ublk::HELP)]
    Ublk(ublk::Ublk),
}

#[derive(Args, Debug)]
pub(crate) struct Nbd {
    #[command(flatten)]
    pub(crate) address: Address,
    /// Serve on this Unix socket.
    #[arg(long, value_name = "PATH", conflicts_with = "listen")]
    pub(crate) socket: Option<PathBuf>,
    /// Serve on this TCP address; port 0 is one that is free.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// Name of the export; clients that ask for none get it, too [default: none].
    #[arg(
        long,
        value_name = "EXPORT",
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) name: String,
    /// Nobody can change the namespace.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Threads, each with a queue pair of its own; clients are spread over them.
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) threads: u16,
    /// Pin the threads to these cores, such as `1,2-3`.
    #[arg(long, value_name = "LIST")]
    pub(crate) cores: Option<String>,
    /// I/O buffers of each thread, at least 32M.
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = size::parse)]
    pub(crate) buffers: u64,
    #[command(flatten)]
    pub(crate) paths: Paths,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

pub(crate) fn export(args: &Export) -> Result<()> {
    match &args.protocol {
        Protocol::Nbd(args) => nbd(args),
        Protocol::VhostUser(args) => vhost_user::serve(args),
        Protocol::Ublk(args) => ublk::serve(args),
    }
}

fn nbd(args: &Nbd) -> Result<()> {
    let address = match (&args.socket, args.listen) {
        (Some(path), _) => NbdAddress::Unix(path.clone()),
        (None, Some(listen)) => NbdAddress::Tcp(listen),
        (None, None) => return Err(Usage("where to? Give --socket or --listen".into()).into()),
    };
    let cores = match &args.cores {
        Some(text) => cores_of(text)?,
        None => Vec::new(),
    };
    // Before the first thread, so that a signal during the start ends us, too.
    let signals = watch_signals().context("signals")?;
    let volume = connect::volume(&args.address, &args.paths, &args.connection, args.threads)?;
    let options = NbdOptions {
        name: args.name.clone(),
        read_only: args.read_only,
        threads: args.threads,
        cores,
        buffer_bytes: args.buffers,
    };
    let export = NbdExport::start(&volume, &address, &options)?;
    println!("ready: {}", export.uri());
    // Whoever started us may not read it.
    let _ = std::io::stdout().flush();
    let ended = watch(&volume, &signals, || export.has_failed());
    if !export.stop(STOP_WITHIN) {
        tracing::warn!("a thread does not end: the process does");
    }
    ended
}

/// Until a signal, or something that ends the export.
fn watch(
    volume: &Volume,
    signals: &mpsc::Receiver<i32>,
    has_failed: impl Fn() -> bool,
) -> Result<()> {
    loop {
        match signals.recv_timeout(WATCH_INTERVAL) {
            Ok(signal) => {
                tracing::info!(signal, "closing");
                return Ok(());
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => anyhow::bail!("the signal thread ended"),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
        while let Some(event) = volume.next_event(Duration::ZERO) {
            match event {
                VolumeEvent::Lost => {
                    return Err(TargetLost("the connection to the target is lost".into()).into());
                }
                VolumeEvent::NamespaceChanged => {
                    if let Ok(namespace) = volume.namespace() {
                        tracing::info!(bytes = namespace.len_bytes(), "the namespace has changed");
                    }
                }
                other => tracing::info!(?other, "the volume"),
            }
        }
        if has_failed() {
            anyhow::bail!("a thread of the export ended; its last words are above");
        }
    }
}

fn cores_of(text: &str) -> Result<Vec<usize>> {
    let list: flexblk_reactor::affinity::CoreList =
        text.parse().map_err(|e| Usage(format!("--cores: {e}")))?;
    Ok(list.cores().to_vec())
}

fn watch_signals() -> std::io::Result<mpsc::Receiver<i32>> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let (sender, receiver) = mpsc::channel();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                if sender.send(signal).is_err() {
                    return;
                }
            }
        })?;
    Ok(receiver)
}
