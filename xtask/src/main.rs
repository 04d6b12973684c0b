//! The commands of this repository: `cargo xtask demo`, `test`, `bench`, `deb`, `soak`, `fuzz`.

mod apt;
mod bench;
mod cargo;
mod deb;
mod demo;
mod fuzz;
mod image;
mod load;
mod signals;
mod soak;
mod table;
mod test;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Build, show, test and measure flexblk.
#[derive(Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a real disk image and a RAM namespace, copy and verify them over FlexiNS, measure, print one table.
    Demo(demo::Arguments),
    /// Format, lints, documentation, every test; ends with the line `N passed, N failed, N skipped`.
    Test(test::Arguments),
    /// How fast and how big, beside what raw sockets reach in the same run.
    Bench(bench::Arguments),
    /// Debian packages.
    Deb(deb::Arguments),
    /// The fault and crash tests for as long as you like.
    Soak(soak::Arguments),
    /// Fuzz everything that parses foreign bytes (needs a nightly toolchain and cargo-fuzz).
    Fuzz(fuzz::Arguments),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = signals::install().and_then(|()| match cli.command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Deb(arguments) => deb::run(&arguments),
        Command::Soak(arguments) => soak::run(&arguments),
        Command::Fuzz(arguments) => fuzz::run(&arguments),
    });
    flexblk_tests::process::kill_all();
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
