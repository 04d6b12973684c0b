//! Arguments of `attach` and `detach`.

use std::path::PathBuf;

use clap::Args;

use crate::args::{Address, Connection};
use crate::paths::Paths;

#[derive(Args, Debug)]
pub(crate) struct Attach {
    #[command(flatten)]
    pub(crate) address: Address,
    /// Name of the attachment, and of the link /dev/flexblk/NAME [default: from the subsystem's NQN and the
    /// namespace id].
    #[arg(long = "as", value_name = "NAME", value_parser = super::state::Name::parse)]
    pub(crate) name: Option<super::state::Name>,
    #[command(flatten)]
    pub(crate) paths: Paths,
    /// Stay in the foreground, for a service manager: says that it is ready as sd_notify(3) does.
    #[arg(long)]
    pub(crate) foreground: bool,
    /// Make the device in this way only [default: ublk if this machine has it, else FUSE and a loop device].
    #[arg(long, value_enum, value_name = "WAY")]
    pub(crate) via: Option<super::backend::Via>,
    /// Threads that serve the device, each with an I/O queue of its own.
    #[arg(short = 'i', long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) nr_io_queues: u16,
    /// Requests in flight per I/O queue.
    #[arg(short = 'Q', long, value_name = "COUNT", default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) queue_size: u16,
    /// Do not look for partitions on the device.
    #[arg(long)]
    pub(crate) no_partitions: bool,
    /// Also at every boot: adds this command line to the configuration file, when the device is there.
    #[arg(long, conflicts_with_all = ["foreground", "all", "entry"])]
    pub(crate) persist: bool,
    /// Attach everything in the configuration file that is not attached yet.
    #[arg(long, conflicts_with_all = ["target", "traddr", "foreground", "entry", "name"])]
    pub(crate) all: bool,
    /// Attach one entry of the configuration file.
    #[arg(long, value_name = "NAME", value_parser = super::state::Name::parse, conflicts_with_all = ["target", "traddr", "name"])]
    pub(crate) entry: Option<super::state::Name>,
    /// The configuration file.
    #[arg(long, value_name = "FILE", default_value = super::config::DEFAULT)]
    pub(crate) config: PathBuf,
    /// We were started by `flexblk attach`, which waits for a line on our standard output.
    #[arg(long, hide = true)]
    pub(crate) detached: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Args, Debug)]
pub(crate) struct Detach {
    /// Name of the attachment, or its device.
    #[arg(value_name = "NAME|DEVICE")]
    pub(crate) what: String,
    /// Also when it is in use: I/O fails from now on.
    #[arg(long, conflicts_with = "lazy")]
    pub(crate) force: bool,
    /// Also from the configuration file: it does not come back at boot.
    #[arg(long)]
    pub(crate) persist: bool,
    /// The configuration file.
    #[arg(long, value_name = "FILE", default_value = super::config::DEFAULT)]
    pub(crate) config: PathBuf,
    /// We are ExecStopPost of a service: what its crash left and its next start takes over stays.
    #[arg(long, hide = true)]
    pub(crate) stop_post: bool,
    /// We were started by `flexblk detach`: only write what is in the cache of that device.
    #[arg(long, hide = true)]
    pub(crate) write_back: bool,
    /// When it is in use: as soon as its last user has gone. Nobody new finds it meanwhile.
    #[arg(long)]
    pub(crate) lazy: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Shutdown {
    /// Names of attachments [default: all].
    #[arg(value_parser = super::state::Name::parse)]
    pub(crate) names: Vec<super::state::Name>,
}

#[derive(Args, Debug)]
pub(crate) struct Generator {
    /// Where units of normal priority go; systemd gives two more folders.
    pub(crate) normal: PathBuf,
    #[arg(hide = true, num_args = 0..)]
    pub(crate) others: Vec<PathBuf>,
    /// The configuration file.
    #[arg(long, value_name = "FILE", default_value = super::config::DEFAULT)]
    pub(crate) config: PathBuf,
}
