//! The command line: nvme-cli's words for addresses, dd's and fio's for the rest.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{attach, export, nvme_args, size, top};

/// Remote block devices over FlexiNS and NVMe/TCP.
#[derive(Parser, Debug)]
#[command(name = "flexblk", version, max_term_width = 100, after_help = crate::exit::HELP, disable_help_subcommand = true)]
pub(crate) struct Cli {
    /// Print what happens inside (repeat for more); FLEXBLK_LOG takes a filter such as `flexins=trace`.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    #[command(subcommand)]
    pub(crate) command: Action,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Action {
    /// List the subsystems that a discovery service offers to this host.
    #[command(after_help = "\
Examples:
  flexblk discover -a 192.0.2.7
  flexblk discover -t tcp -a 192.0.2.7 -s 4420
  flexblk discover nvme+flexins://storage.example:8009 --json")]
    Discover(Discover),
    /// Make a local block device of a remote namespace.
    #[command(after_help = "\
Prints the device; /dev/flexblk/NAME leads to it. docs/mount.md is the guide.

Examples:
  flexblk attach nvme+flexins://192.0.2.7/nqn.2026-11.io.example:disk1 --as data
  flexblk attach -t tcp -a 192.0.2.7 -n nqn.2026-11.io.example:disk1 -N 2")]
    Attach(Box<attach::Attach>),
    /// Attach every namespace that a discovery service offers.
    #[command(after_help = "\
Prints the devices. Several addresses of a subsystem become paths of its devices.

Examples:
  flexblk connect-all -a 192.0.2.7
  flexblk connect-all -t tcp -a 192.0.2.7 --persistent -- --policy fail")]
    ConnectAll(attach::ConnectAll),
    /// Take a local block device away again, within five seconds in any case.
    #[command(after_help = "\
Examples:
  flexblk detach data
  flexblk detach /dev/loop0 --force")]
    Detach(attach::Detach),
    /// Show the controller and the namespaces of a subsystem.
    #[command(after_help = "\
Examples:
  flexblk info nvme+flexins://192.0.2.7/nqn.2026-11.io.example:disk1
  flexblk info -a 192.0.2.7 -n nqn.2026-11.io.example:disk1 --json")]
    Info(Info),
    /// Read a range of a namespace to a file or standard output.
    #[command(after_help = "\
Examples:
  flexblk read URI --offset 1M --length 4k | xxd | head
  flexblk read URI --lba 0 --blocks 8 -o boot.bin")]
    Read(Read),
    /// Write a file or standard input to a range of a namespace.
    #[command(after_help = "\
Examples:
  flexblk write URI --offset 1M -i data.bin
  echo hello | flexblk write URI --lba 0 --pad")]
    Write(Write),
    /// Copy namespace to file, file to namespace, or namespace to namespace.
    #[command(after_help = "\
Examples:
  flexblk copy URI disk.img --verify
  flexblk copy disk.img URI --sparse
  flexblk copy 'trtype=flexins traddr=192.0.2.7 subnqn=NQN nsid=2' nvme+flexins://192.0.2.8/NQN")]
    Copy(Copy),
    /// Measure IOPS, throughput and latency.
    #[command(after_help = "\
Examples:
  flexblk bench URI --rw randread --bs 4k --iodepth 1,32,128 --time 5
  flexblk bench URI --rw write --bs 128k --overwrite --qpairs 2 --json")]
    Bench(Bench),
    /// Offer a namespace to other programs of this host, or of others.
    Export(Box<export::Export>),
    /// List what is attached to this host, or, with an address, what a discovery service offers to it.
    List(nvme_args::List),
    /// Identify Controller, every field.
    IdCtrl(nvme_args::Inspect),
    /// Identify Namespace, every field.
    IdNs(nvme_args::Inspect),
    /// SMART / Health Information log.
    SmartLog(nvme_args::Inspect),
    /// Error Information log.
    ErrorLog(nvme_args::ErrorLog),
    /// Telemetry log: what a target of ours has recorded about this host.
    #[command(after_help = "\
Examples:
  flexblk telemetry-log URI
  flexblk telemetry-log URI --controller-init -o json
  flexblk telemetry-log URI --output-file telemetry.bin --data-area 3")]
    TelemetryLog(nvme_args::TelemetryLog),
    /// Asymmetric Namespace Access log.
    AnaLog(nvme_args::Inspect),
    /// Register, replace or remove this host's reservation key.
    ResvRegister(nvme_args::ResvRegister),
    /// Acquire or preempt a reservation.
    ResvAcquire(nvme_args::ResvAcquire),
    /// Release or clear a reservation.
    ResvRelease(nvme_args::ResvRelease),
    /// Show registrants and the reservation.
    ResvReport(nvme_args::Inspect),
    /// Controller properties.
    ShowRegs(nvme_args::Inspect),
    /// Make every completed write of the namespace durable.
    Flush(nvme_args::Inspect),
    /// Let the controller compare blocks with data.
    #[command(after_help = "\
Example:
  flexblk compare URI --start-block 8 -c 7 --data blocks.bin")]
    Compare(nvme_args::Compare),
    /// Write zeroes without transferring them.
    WriteZeroes(nvme_args::WriteZeroes),
    /// Dataset Management: deallocate ranges, or say how they will be used.
    #[command(after_help = "\
Example, two ranges of 256 blocks:
  flexblk dsm URI --slbs 0,4096 --blocks 256,256 --ad")]
    Dsm(nvme_args::Dsm),
    /// Let the controller read and check blocks without transferring them.
    Verify(nvme_args::Blocks),
    /// Make blocks unreadable until they are written.
    WriteUncor(nvme_args::Blocks),
    /// Copy blocks within the controller (`nvme copy`).
    NvmeCopy(nvme_args::NvmeCopy),
    /// Show what hosts do on a target of this machine, as it happens.
    #[command(after_help = "\
Examples:
  flexblk top
  flexblk top --once --json | jq '.io[0]'
  flexblk top --rpc-socket /run/flexblk-target/rpc.sock --interval 500ms --sort latency")]
    Top(top::Top),
    /// systemd.generator(7) for the configuration file of `attach`.
    #[command(hide = true)]
    SystemdGenerator(attach::Generator),
    /// The machine shuts down: attachments without a path give up soon.
    #[command(hide = true)]
    SystemdShutdown(attach::Shutdown),
    /// Print shell completions.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Write the manual pages to a folder.
    #[command(hide = true)]
    Manuals {
        /// The folder; it exists.
        directory: PathBuf,
    },
    /// Print the version and what this machine can do.
    Version,
}

/// Where the subsystem is.
#[derive(Args, Debug, Default)]
pub(crate) struct Address {
    /// `nvme+flexins://HOST[:PORT]/SUBNQN[?nsid=N]` or `nvme+tcp://...`, or words: `traddr=192.0.2.7 subnqn=... nsid=1`.
    #[arg(value_name = "TARGET")]
    pub(crate) target: Option<String>,
    /// Transport type: `flexins` or `tcp` [default: flexins].
    #[arg(short = 't', long, value_name = "TYPE", help_heading = "Address")]
    pub(crate) trtype: Option<String>,
    /// Address or host name of the target.
    #[arg(short = 'a', long, value_name = "ADDRESS", help_heading = "Address")]
    pub(crate) traddr: Option<String>,
    /// Service id, of `tcp` the port [default: 4420, discovery 8009].
    #[arg(short = 's', long, value_name = "ID", help_heading = "Address")]
    pub(crate) trsvcid: Option<String>,
    /// NQN of the subsystem.
    #[arg(
        short = 'n',
        long = "nqn",
        visible_alias = "subnqn",
        value_name = "NQN",
        help_heading = "Address"
    )]
    pub(crate) subnqn: Option<String>,
    /// Namespace id [default: 1].
    #[arg(short = 'N', long, value_name = "ID", help_heading = "Address")]
    pub(crate) nsid: Option<u32>,
}

impl Address {
    /// Whether nothing of it was given.
    pub(crate) fn is_empty(&self) -> bool {
        self.target.is_none() && self.traddr.is_none()
    }
}

/// Who we are and how we connect.
#[derive(Args, Debug)]
pub(crate) struct Connection {
    /// Host NQN [default: /etc/nvme/hostnqn, else derived from the machine id].
    #[arg(short = 'q', long, value_name = "NQN", help_heading = "Connection")]
    pub(crate) hostnqn: Option<String>,
    /// Host identifier [default: /etc/nvme/hostid, else from the host NQN or the machine id].
    #[arg(short = 'I', long, value_name = "UUID", help_heading = "Connection")]
    pub(crate) hostid: Option<String>,
    /// Local address to connect from.
    #[arg(short = 'w', long, value_name = "ADDRESS", help_heading = "Connection")]
    pub(crate) host_traddr: Option<IpAddr>,
    /// UDP port of the target's FlexiNS responder [default: 4791].
    #[arg(long, value_name = "PORT", help_heading = "Connection")]
    pub(crate) udp_port: Option<u16>,
    /// Keep-alive time-out; 0 turns it off [default: 5s].
    #[arg(short = 'k', long = "keep-alive-tmo", value_name = "TIME", value_parser = size::parse_duration, help_heading = "Connection")]
    pub(crate) kato: Option<Duration>,
    /// Limit for one I/O command [default: 30s].
    #[arg(long, value_name = "TIME", value_parser = size::parse_duration, help_heading = "Connection")]
    pub(crate) io_timeout: Option<Duration>,
    /// Limit for reaching the target [default: 5s].
    #[arg(long, value_name = "TIME", value_parser = size::parse_duration, help_heading = "Connection")]
    pub(crate) connect_timeout: Option<Duration>,
    /// With `tcp`: a digest over the header of every PDU.
    #[arg(short = 'g', long, help_heading = "Connection")]
    pub(crate) hdr_digest: bool,
    /// With `tcp`: a digest over the data of every PDU.
    #[arg(short = 'G', long, help_heading = "Connection")]
    pub(crate) data_digest: bool,
    /// Where the transport engine runs: `inline`, `thread` or `thread:CORE` [default: inline].
    #[arg(long, value_name = "WHERE", help_heading = "Connection")]
    pub(crate) engine: Option<String>,
    /// `header-only` or `copy` [default: header-only].
    #[arg(long, value_name = "MODE", help_heading = "Connection")]
    pub(crate) tx: Option<String>,
    /// `in-cache` or `ring` [default: in-cache].
    #[arg(long, value_name = "MODE", help_heading = "Connection")]
    pub(crate) rx: Option<String>,
    /// Packet checksum: `crc32c` or `none` [default: crc32c].
    #[arg(long, value_name = "KIND", help_heading = "Connection")]
    pub(crate) digest: Option<String>,
    /// Largest payload per packet.
    #[arg(long, value_name = "BYTES", value_parser = size::parse_io, help_heading = "Connection")]
    pub(crate) mtu: Option<u32>,
    /// Poll for so many microseconds after the last activity, then sleep [default: 100].
    #[arg(long, value_name = "US", value_parser = clap::value_parser!(u64).range(..=10_000_000), help_heading = "Connection")]
    poll_budget_us: Option<u64>,
    /// Its former name.
    #[arg(long, hide = true, value_parser = size::parse_duration, conflicts_with = "poll_budget_us")]
    poll_budget: Option<Duration>,
    /// Deliberate faults on our own packets, for tests: `loss=0.01,reorder=0.01,corrupt=0.001`.
    #[arg(long, value_name = "SPEC", help_heading = "Connection")]
    pub(crate) fault: Option<String>,
    /// Write every packet to this pcapng file (one file per queue).
    #[arg(long, value_name = "FILE", help_heading = "Connection")]
    pub(crate) capture: Option<PathBuf>,
}

impl Connection {
    /// How long to poll, if it was said.
    pub(crate) fn poll_budget(&self) -> Option<Duration> {
        let micros = self.poll_budget_us.map(Duration::from_micros);
        micros.or(self.poll_budget)
    }
}

#[derive(Args, Debug)]
pub(crate) struct Discover {
    #[command(flatten)]
    pub(crate) address: Address,
    #[command(flatten)]
    pub(crate) connection: Connection,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Info {
    #[command(flatten)]
    pub(crate) address: Address,
    #[command(flatten)]
    pub(crate) connection: Connection,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A range in bytes or in blocks.
#[derive(Args, Debug)]
pub(crate) struct Range {
    /// First byte [default: 0].
    #[arg(long, value_name = "BYTES", value_parser = size::parse, conflicts_with = "lba")]
    pub(crate) offset: Option<u64>,
    /// Number of bytes [default: to the end].
    #[arg(long, value_name = "BYTES", value_parser = size::parse, conflicts_with = "blocks")]
    pub(crate) length: Option<u64>,
    /// First logical block.
    #[arg(long, value_name = "LBA")]
    pub(crate) lba: Option<u64>,
    /// Number of logical blocks.
    #[arg(long, value_name = "COUNT")]
    pub(crate) blocks: Option<u64>,
}

#[derive(Args, Debug)]
pub(crate) struct Read {
    #[command(flatten)]
    pub(crate) address: Address,
    #[command(flatten)]
    pub(crate) range: Range,
    /// Where the data goes; `-` is standard output.
    #[arg(short = 'o', long, value_name = "FILE", default_value = "-")]
    pub(crate) output: PathBuf,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Args, Debug)]
pub(crate) struct Write {
    #[command(flatten)]
    pub(crate) address: Address,
    #[command(flatten)]
    pub(crate) range: Range,
    /// Where the data comes from; `-` is standard input.
    #[arg(short = 'i', long, value_name = "FILE", default_value = "-")]
    pub(crate) input: PathBuf,
    /// Fill the last block with zeroes when the data ends inside it.
    #[arg(long)]
    pub(crate) pad: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Args, Debug)]
pub(crate) struct Copy {
    /// A target (URI or words with `traddr=`), a file, or `-` for standard input.
    #[arg(value_name = "FROM")]
    pub(crate) from: String,
    /// A target, a file, or `-` for standard output.
    #[arg(value_name = "TO")]
    pub(crate) to: String,
    /// Bytes per command.
    #[arg(long, value_name = "BYTES", default_value = "128k", value_parser = size::parse_io)]
    pub(crate) bs: u32,
    /// Commands in flight.
    #[arg(long, value_name = "COUNT", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) iodepth: u16,
    /// Bytes to skip in the source.
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = size::parse)]
    pub(crate) skip: u64,
    /// Bytes to skip in the destination.
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = size::parse)]
    pub(crate) seek: u64,
    /// Number of bytes [default: the whole source].
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    pub(crate) length: Option<u64>,
    /// Read everything back from the destination and compare its SHA-256.
    #[arg(long)]
    pub(crate) verify: bool,
    /// Do not write blocks of zeroes: leave holes in a file, use Write Zeroes on a namespace.
    #[arg(long)]
    pub(crate) sparse: bool,
    /// Fill the last block with zeroes when the source is not a multiple of the block size.
    #[arg(long)]
    pub(crate) pad: bool,
    /// No progress bar.
    #[arg(long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// What `bench` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Rw {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Random reads.
    Randread,
    /// Random writes.
    Randwrite,
    /// Random reads and writes, half and half (`--rwmixread`).
    Randrw,
}

#[derive(Args, Debug)]
pub(crate) struct Bench {
    #[command(flatten)]
    pub(crate) address: Address,
    /// What to do.
    #[arg(long, value_enum, default_value = "randread")]
    pub(crate) rw: Rw,
    /// Bytes per command.
    #[arg(long, value_name = "BYTES", default_value = "4k", value_parser = size::parse_io)]
    pub(crate) bs: u32,
    /// Commands in flight per queue pair; each value is one run.
    #[arg(long, value_name = "LIST", default_value = "1,32,128", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub(crate) iodepth: Vec<u16>,
    /// How long each run takes.
    #[arg(long, value_name = "TIME", default_value = "5", value_parser = size::parse_duration)]
    pub(crate) time: Duration,
    /// Queue pairs, each with a thread of its own.
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) qpairs: u16,
    /// Percentage of reads of `--rw randrw`.
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) rwmixread: u8,
    /// Only use this many bytes from the start of the namespace.
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    pub(crate) range: Option<u64>,
    /// Pin the threads to these cores, such as `1,2-3`.
    #[arg(long, value_name = "LIST")]
    pub(crate) cores: Option<String>,
    /// Allow runs that write: the namespace's data is lost.
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Parser, Debug)]
    struct Words {
        #[command(flatten)]
        connection: Connection,
    }

    #[test]
    fn the_polling_budget_has_two_names() {
        let budget = |words: &[&str]| {
            let words = std::iter::once(&"flexblk").chain(words);
            Words::try_parse_from(words).map(|words| words.connection.poll_budget())
        };
        let expected = Some(Duration::from_micros(250));
        assert_eq!(budget(&["--poll-budget-us", "250"]).unwrap(), expected);
        assert_eq!(budget(&["--poll-budget", "250us"]).unwrap(), expected);
        assert_eq!(budget(&[]).unwrap(), None);
        assert!(budget(&["--poll-budget", "1ms", "--poll-budget-us", "1"]).is_err());
    }
}
