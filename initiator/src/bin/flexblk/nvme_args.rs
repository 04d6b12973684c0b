//! Arguments of the verbs that nvme-cli has too, under its names. Counts that are 0's based there are
//! 0's based here.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::args::{Address, Connection};

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// Lines for people.
    #[default]
    Normal,
    /// JSON, with nvme-cli's keys.
    Json,
}

#[derive(Args, Debug)]
pub(crate) struct Inspect {
    #[command(flatten)]
    pub(crate) address: Address,
    /// How to print.
    #[arg(short = 'o', long, value_enum, default_value = "normal")]
    pub(crate) output_format: OutputFormat,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Args, Debug)]
pub(crate) struct List {
    #[command(flatten)]
    pub(crate) address: Address,
    /// How to print.
    #[arg(short = 'o', long, value_enum, default_value = "normal")]
    pub(crate) output_format: OutputFormat,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Args, Debug)]
pub(crate) struct ErrorLog {
    #[command(flatten)]
    pub(crate) inspect: Inspect,
    /// Entries to read at most.
    #[arg(short = 'e', long, value_name = "COUNT", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) log_entries: u16,
}

#[derive(Args, Debug)]
pub(crate) struct TelemetryLog {
    #[command(flatten)]
    pub(crate) inspect: Inspect,
    /// Write the log page here as it is, and print nothing.
    #[arg(short = 'O', long, value_name = "FILE")]
    pub(crate) output_file: Option<PathBuf>,
    /// Host-initiated: 1 has the controller capture its state anew, 0 reads what was captured before.
    #[arg(long, value_name = "0|1", default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=1))]
    pub(crate) host_generate: u8,
    /// Controller-initiated: what the controller has captured of its own accord.
    #[arg(short = 'c', long)]
    pub(crate) controller_init: bool,
    /// Read up to the end of this data area.
    #[arg(short = 'd', long, value_name = "AREA", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=4))]
    pub(crate) data_area: u8,
}

impl TelemetryLog {
    /// Is the controller to capture its state?
    pub(crate) fn creates(&self) -> bool {
        self.host_generate == 1 && !self.controller_init
    }
}

#[derive(Args, Debug)]
pub(crate) struct ResvRegister {
    #[command(flatten)]
    pub(crate) address: Address,
    /// Current reservation key.
    #[arg(long, value_name = "KEY", default_value = "0", value_parser = key)]
    pub(crate) crkey: u64,
    /// New reservation key.
    #[arg(long, value_name = "KEY", default_value = "0", value_parser = key)]
    pub(crate) nrkey: u64,
    /// Action: 0 register, 1 unregister, 2 replace.
    #[arg(long, value_name = "ACTION", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=7))]
    pub(crate) rrega: u8,
    /// Persist through power loss: 0 no change, 2 no longer, 3 from now on.
    #[arg(long, value_name = "CHANGE", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=3))]
    pub(crate) cptpl: u8,
    /// Ignore the existing key.
    #[arg(long)]
    pub(crate) iekey: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Args, Debug)]
pub(crate) struct ResvAcquire {
    #[command(flatten)]
    pub(crate) address: Address,
    /// Current reservation key.
    #[arg(long, value_name = "KEY", default_value = "0", value_parser = key)]
    pub(crate) crkey: u64,
    /// Key to preempt.
    #[arg(long, value_name = "KEY", default_value = "0", value_parser = key)]
    pub(crate) prkey: u64,
    /// Type: 1 write exclusive, 2 exclusive access, 3 and 4 the same for registrants only, 5 and 6 for all registrants.
    #[arg(long, value_name = "TYPE", default_value_t = 0)]
    pub(crate) rtype: u8,
    /// Action: 0 acquire, 1 preempt, 2 preempt and abort.
    #[arg(long, value_name = "ACTION", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=7))]
    pub(crate) racqa: u8,
    /// Ignore the existing key.
    #[arg(long)]
    pub(crate) iekey: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Args, Debug)]
pub(crate) struct ResvRelease {
    #[command(flatten)]
    pub(crate) address: Address,
    /// Current reservation key.
    #[arg(long, value_name = "KEY", default_value = "0", value_parser = key)]
    pub(crate) crkey: u64,
    /// Type of the reservation, as for resv-acquire.
    #[arg(long, value_name = "TYPE", default_value_t = 0)]
    pub(crate) rtype: u8,
    /// Action: 0 release, 1 clear.
    #[arg(long, value_name = "ACTION", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=7))]
    pub(crate) rrela: u8,
    /// Ignore the existing key.
    #[arg(long)]
    pub(crate) iekey: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// A range of blocks of a namespace.
#[derive(Args, Debug)]
pub(crate) struct Blocks {
    #[command(flatten)]
    pub(crate) address: Address,
    /// First logical block.
    #[arg(long, value_name = "LBA", default_value_t = 0)]
    pub(crate) start_block: u64,
    /// Number of logical blocks, 0's based.
    #[arg(short = 'c', long, value_name = "COUNT", default_value_t = 0)]
    pub(crate) block_count: u16,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Args, Debug)]
pub(crate) struct Compare {
    #[command(flatten)]
    pub(crate) blocks: Blocks,
    /// What the blocks should hold; `-` is standard input.
    #[arg(short = 'd', long, value_name = "FILE", default_value = "-")]
    pub(crate) data: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct WriteZeroes {
    #[command(flatten)]
    pub(crate) blocks: Blocks,
    /// The blocks may be deallocated instead.
    #[arg(short = 'd', long)]
    pub(crate) deac: bool,
    /// Complete only when the zeroes are on stable media.
    #[arg(short = 'f', long)]
    pub(crate) force_unit_access: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Dsm {
    #[command(flatten)]
    pub(crate) address: Address,
    /// First logical block of each range.
    #[arg(long, value_name = "LIST", value_delimiter = ',', required = true)]
    pub(crate) slbs: Vec<u64>,
    /// Number of logical blocks of each range.
    #[arg(
        short = 'b',
        long,
        value_name = "LIST",
        value_delimiter = ',',
        required = true
    )]
    pub(crate) blocks: Vec<u32>,
    /// Deallocate the ranges.
    #[arg(short = 'd', long)]
    pub(crate) ad: bool,
    /// They will be written as a whole.
    #[arg(long)]
    pub(crate) idw: bool,
    /// They will be read as a whole.
    #[arg(long)]
    pub(crate) idr: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Args, Debug)]
pub(crate) struct NvmeCopy {
    #[command(flatten)]
    pub(crate) address: Address,
    /// First logical block of the destination.
    #[arg(short = 'd', long, value_name = "LBA", default_value_t = 0)]
    pub(crate) sdlba: u64,
    /// First logical block of each source range.
    #[arg(long, value_name = "LIST", value_delimiter = ',', required = true)]
    pub(crate) slbs: Vec<u64>,
    /// Number of logical blocks of each source range, 0's based.
    #[arg(
        short = 'b',
        long,
        value_name = "LIST",
        value_delimiter = ',',
        required = true
    )]
    pub(crate) blocks: Vec<u16>,
    /// Complete only when the copy is on stable media.
    #[arg(long)]
    pub(crate) force_unit_access: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// A key in decimal, or in hexadecimal after `0x`.
fn key(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| "a reservation key is a number of 64 bits, such as 10 or 0xabc".into())
}
