//! `flexblk`: discover, inspect, attach, read, write, copy and measure remote namespaces.

mod args;
mod attach;
mod bench;
mod blocks;
mod connect;
mod copy;
mod counters;
mod discover;
mod exit;
mod export;
mod identify;
mod info;
mod inspect;
mod nvme_args;
mod paths;
mod pipeline;
mod registers;
mod reserve;
mod size;
mod telemetry;
mod top;
mod ublk;
mod version;
mod vhost_user;

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory, Parser};
use tracing_subscriber::EnvFilter;

use args::{Action, Cli};

fn main() -> ExitCode {
    // A reader that goes away (`flexblk read | head`) ends us with an error, not a panic: Rust ignores SIGPIPE,
    // and writes then fail with EPIPE.
    let cli = Cli::parse();
    log_to_stderr(cli.verbose);
    match run(&cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) if error.is::<exit::Reported>() => exit::code_of(&error),
        Err(error) => {
            // Whoever reads it may have gone, too: no reason to panic.
            let _ = writeln!(std::io::stderr(), "flexblk: {error:#}");
            exit::code_of(&error)
        }
    }
}

fn run(command: &Action) -> anyhow::Result<()> {
    match command {
        Action::Discover(args) => discover::discover(args),
        Action::Attach(args) => attach::attach(args),
        Action::ConnectAll(args) => attach::connect_all(args),
        Action::Detach(args) => attach::detach(args),
        Action::SystemdGenerator(args) => attach::generate(args),
        Action::SystemdShutdown(args) => attach::shutdown(args),
        Action::Info(args) => info::info(args),
        Action::Read(args) => copy::read(args),
        Action::Write(args) => copy::write(args),
        Action::Copy(args) => copy::copy(args),
        Action::Bench(args) => bench::bench(args),
        Action::Export(args) => export::export(args),
        Action::List(args) if args.address.is_empty() => attach::list(args.output_format),
        Action::List(args) => inspect::list(args),
        Action::IdCtrl(args) => identify::id_ctrl(args),
        Action::IdNs(args) => identify::id_ns(args),
        Action::SmartLog(args) => inspect::smart_log(args),
        Action::ErrorLog(args) => inspect::error_log(args),
        Action::TelemetryLog(args) => telemetry::telemetry_log(args),
        Action::AnaLog(args) => inspect::ana_log(args),
        Action::ResvRegister(args) => reserve::register(args),
        Action::ResvAcquire(args) => reserve::acquire(args),
        Action::ResvRelease(args) => reserve::release(args),
        Action::ResvReport(args) => reserve::report(args),
        Action::ShowRegs(args) => registers::show(args),
        Action::Flush(args) => blocks::flush(args),
        Action::Compare(args) => blocks::compare(args),
        Action::WriteZeroes(args) => blocks::write_zeroes(args),
        Action::Dsm(args) => blocks::dsm(args),
        Action::Verify(args) => blocks::verify(args),
        Action::WriteUncor(args) => blocks::write_uncor(args),
        Action::NvmeCopy(args) => blocks::nvme_copy(args),
        Action::Top(args) => top::top(args),
        Action::Completions { shell } => {
            clap_complete::generate(
                *shell,
                &mut Cli::command(),
                "flexblk",
                &mut std::io::stdout(),
            );
            Ok(())
        }
        Action::Manuals { directory } => clap_mangen::generate_to(Cli::command(), directory)
            .with_context(|| directory.display().to_string()),
        Action::Version => version::version(),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)
}

fn log_to_stderr(verbose: u8) {
    let default = match verbose {
        0 => "error",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = std::env::var("FLEXBLK_LOG")
        .ok()
        .and_then(|text| EnvFilter::try_new(text).ok())
        .unwrap_or_else(|| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
}
