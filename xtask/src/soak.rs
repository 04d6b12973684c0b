//! `cargo xtask soak`: I/O, faults and crashes for as long as you like; every byte is verified.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use flexblk_tests::binaries::{self, Binaries};
use flexblk_tests::fio::Fio;
use flexblk_tests::proc::{anonymous_bytes, descriptors};
use flexblk_tests::process::Process;
use flexblk_tests::target::{Target, TargetOptions};

use crate::apt;
use crate::cargo::cargo;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Install what is missing without asking.
    #[arg(long)]
    yes: bool,
    /// Minutes.
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    /// Seed of the first round; printed with each round, so that a failing one can be repeated.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seeds of the transport's simulation, run first (the usual test takes 2,000); 0: none.
    #[arg(long, default_value_t = 20_000)]
    simulation_seeds: u64,
    /// Seeds of the simulation of target and initiator (the usual test takes 300); 0: none.
    #[arg(long, default_value_t = 5_000)]
    nvme_seeds: u64,
    /// Hosts that connect and disconnect over each transport, run first (the usual tests take 10,000 and 400), while
    /// memory and descriptors stay as they are; 0: none.
    #[arg(long, default_value_t = 10_000)]
    cycles: u64,
}

const LIMIT: Duration = Duration::from_secs(600);
const RAM_MIB: u64 = 256;

pub(crate) fn run(arguments: &Arguments) -> Result<bool> {
    apt::ensure(&[apt::FIO], arguments.yes)?;
    println!("== building in release mode");
    let binaries = binaries::build(true)?;
    let directory = binaries::target_directory()?.join("soak");
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    fs::create_dir_all(&directory)?;
    let mut seed = arguments.seed;
    let transport = simulate("flexins", "FLEXINS_SIM_SEEDS", arguments.simulation_seeds)?;
    let nvme = simulate("flexblk-tests", "FLEXBLK_SIM_SEEDS", arguments.nvme_seeds)?;
    let simulations = transport && nvme;
    let cycles = cycles(arguments.cycles)?;
    let deadline = Instant::now() + Duration::from_secs(arguments.minutes * 60);
    while Instant::now() < deadline {
        println!("== round {seed} (repeat it with --seed {seed})");
        let round = directory.join(format!("round-{seed}"));
        fs::create_dir_all(&round)?;
        one_round(&binaries, &round, seed)
            .with_context(|| format!("round {seed}; its files are in {}", round.display()))?;
        fs::remove_dir_all(&round)?;
        seed += 1;
    }
    let mut outcome = format!("{} rounds, every byte verified", seed - arguments.seed);
    if !simulations {
        outcome += "; A SIMULATION FAILED";
    }
    if !cycles {
        outcome += "; HOSTS THAT CAME AND WENT LEFT SOMETHING";
    }
    println!("{outcome}");
    Ok(simulations && cycles)
}

/// Hosts that come and go, more than usual.
fn cycles(count: u64) -> Result<bool> {
    if count == 0 {
        return Ok(true);
    }
    println!("== {count} hosts that come and go over each transport");
    let mut test = cargo(&["test", "--quiet", "--release", "-p", "flexblk-target"]);
    test.args(["--test", "tcp_cycles", "--test", "flexins_cycles"]);
    test.args(["--", "--nocapture"]);
    test.env("FLEXBLK_CYCLES", count.to_string());
    Ok(test.status().context("cannot run cargo test")?.success())
}

/// A package's simulation with more seeds than usual; a failing one prints how to repeat it.
fn simulate(package: &str, variable: &str, seeds: u64) -> Result<bool> {
    if seeds == 0 {
        return Ok(true);
    }
    println!("== simulation of {package}, {seeds} seeds");
    let mut test = cargo(&[
        "test",
        "--quiet",
        "--release",
        "-p",
        package,
        "--test",
        "simulation",
    ]);
    test.env(variable, seeds.to_string());
    Ok(test.status().context("cannot run cargo test")?.success())
}

fn one_round(binaries: &Binaries, directory: &Path, seed: u64) -> Result<()> {
    // Gentle and rough rounds in turn.
    let per_mille = [0, 5, 10, 50][(seed % 4) as usize];
    let fault = (per_mille > 0).then(|| {
        let share = per_mille as f64 / 1000.0;
        format!(
            "loss={share},reorder={share},duplicate={share},corrupt={},delay={share},seed={seed}",
            share / 10.0
        )
    });
    println!(
        "   faults on both sides: {}",
        fault.as_deref().unwrap_or("none")
    );
    let ram = format!("ram:{RAM_MIB}M");
    let image = directory.join("disk.img");
    fs::File::create(&image)?.set_len(RAM_MIB << 20)?;
    let file = format!("file:{}", image.display());
    let options = TargetOptions {
        fault: fault.clone(),
        ..TargetOptions::with_devices(&[&ram, &file])
    };
    let mut target = Target::start(binaries, directory, options)?;
    let with_faults = |fio: Fio| match &fault {
        Some(fault) => fio.option("fault", fault),
        None => fio,
    };
    let verify = |target: &Target, nsid: u32, name: &str, bs: &str, depth: u32| -> Result<()> {
        let fio = Fio::new(binaries, target, nsid, name, directory)
            .option("rw", "randwrite")
            .option("bs", bs)
            .option("iodepth", depth)
            .option("randseed", seed)
            .option("verify", "crc32c")
            .option("do_verify", 1)
            .option("verify_fatal", 1);
        let verified = with_faults(fio).success(LIMIT)?.measured("read").bytes;
        if verified != RAM_MIB << 20 {
            bail!("{verified} of {} bytes verified", RAM_MIB << 20);
        }
        Ok(())
    };
    for (nsid, bs, depth) in [(1, "4k", 128), (1, "64k", 16), (2, "16k", 32), (1, "1M", 4)] {
        verify(&target, nsid, &format!("verify-{nsid}-{bs}"), bs, depth)?;
    }
    let before = (anonymous_bytes(target.id())?, descriptors(target.id())?);
    // Hosts that come and are killed.
    for kill in 0..5 {
        let fio = Fio::new(binaries, &target, 1, &format!("killed-{kill}"), directory)
            .option("rw", "randrw")
            .option("bs", "16k")
            .option("iodepth", 64)
            .option("thread", 1)
            .option("kato_ms", 1000)
            .option("time_based", 1)
            .option("runtime", 600);
        let mut process: Process = with_faults(fio).spawn()?;
        thread::sleep(Duration::from_millis(700 + (seed * 37 + kill * 101) % 600));
        process.kill()?;
    }
    thread::sleep(Duration::from_secs(4));
    let after = (anonymous_bytes(target.id())?, descriptors(target.id())?);
    if after.0 > before.0 + (4 << 20) || after.1 > before.1 {
        bail!("killed hosts left something: memory and descriptors {before:?} -> {after:?}");
    }
    // A target that is killed and comes back.
    target.restart(binaries)?;
    verify(&target, 2, "again", "64k", 16)?;
    let status = target.terminate()?;
    if !status.success() {
        bail!("the target ended with {status}:\n{}", target.output());
    }
    Ok(())
}
