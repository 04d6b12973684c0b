//! `flexblk export vhost-user`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use clap::Args;
use flexblk_initiator::export::vhost_user::{self, ServeError};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::args::{Address, Connection};
use crate::connect;
use crate::exit::{TargetLost, Usage};
use crate::paths::Paths;

pub(crate) const HELP: &str = "\
Examples:
  flexblk export vhost-user nvme+flexins://192.0.2.7/NQN --socket /run/disk1.sock --queues 4 --threads 2
  qemu-system-x86_64 -m 4G -object memory-backend-memfd,id=mem,size=4G,share=on \\
    -machine q35,memory-backend=mem -chardev socket,id=disk1,path=/run/disk1.sock,reconnect-ms=500 \\
    -device vhost-user-blk-pci,chardev=disk1,num-queues=4 ...";

#[derive(Args, Debug)]
pub(crate) struct VhostUser {
    #[command(flatten)]
    address: Address,
    /// Where the virtual machine monitor connects.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Queues that a guest may use.
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// Threads that serve them.
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: u16,
    #[command(flatten)]
    paths: Paths,
    #[command(flatten)]
    connection: Connection,
}

pub(crate) fn serve(args: &VhostUser) -> Result<()> {
    // Before the first thread, so that a signal during the start ends us cleanly, too.
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, stop.clone()).context("signals")?;
    }
    let volume = connect::volume(&args.address, &args.paths, &args.connection, args.threads)?;
    let options = vhost_user::Options {
        socket: args.socket.clone(),
        queues: args.queues,
        threads: args.threads,
    };
    let namespace = volume.namespace()?;
    let ready = || {
        println!(
            "{}: {} bytes in blocks of {}, {} queues",
            args.socket.display(),
            namespace.len_bytes(),
            namespace.block_size,
            args.queues
        );
    };
    match vhost_user::serve(&volume, &options, &stop, ready) {
        Err(ServeError::Volume(error)) => Err(error.into()),
        Err(error @ ServeError::Lost) => Err(TargetLost(error.to_string()).into()),
        Err(ServeError::Options(reason)) => Err(Usage(reason.into()).into()),
        other => Ok(other?),
    }
}
