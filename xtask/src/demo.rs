//! `cargo xtask demo`: the whole thing once, on real data.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use flexblk_tests::binaries::{self, Binaries};
use flexblk_tests::process::run as run_program;

use crate::apt;
use crate::image::{self, Image};
use crate::load::{Counters, Load, MODES, Mode, Run, cells, value};
use crate::table::Table;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Install what is missing without asking.
    #[arg(long)]
    yes: bool,
    /// Size of the RAM namespace in MiB [default: 1024, less on a small machine].
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(16..))]
    ram: Option<u64>,
    /// Seconds for each random run.
    #[arg(long, default_value_t = 3)]
    seconds: u32,
}

/// Namespaces of the target.
const IMAGE: u32 = 1;
const RAM: u32 = 2;

pub(crate) fn run(arguments: &Arguments) -> Result<bool> {
    let started = Instant::now();
    apt::ensure(&[apt::FIO, apt::MKE2FS, apt::SHA256SUM], arguments.yes)?;
    step("building in release mode");
    let binaries = binaries::build(true)?;
    let directory = binaries::target_directory()?.join("demo");
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    fs::create_dir_all(&directory)?;
    let good = show(arguments, &binaries, &directory);
    fs::remove_dir_all(&directory)?;
    let good = good?;
    println!();
    println!(
        "demo took {:.0} s: {}",
        started.elapsed().as_secs_f64(),
        if good {
            "every byte was right"
        } else {
            "BYTES DIFFERED"
        }
    );
    Ok(good)
}

fn step(text: &str) {
    println!("== {text}");
}

fn show(arguments: &Arguments, binaries: &Binaries, directory: &Path) -> Result<bool> {
    step("making an ext4 image from files of this machine");
    let image = image::create(directory)?;
    let digest = image::sha256(&image.path)?;
    println!(
        "   {} files, {} MiB of data in an image of {} MiB, SHA-256 {digest}",
        image.files,
        image.file_bytes >> 20,
        image.image_bytes >> 20
    );
    let ram_mib = arguments.ram.map_or_else(default_ram_mib, Ok)?;
    let mut good = true;
    let mut rows = Vec::new();
    let mut counted = Vec::new();
    for mode in MODES {
        step(&format!(
            "{mode}: flexblk-target serves the image and {ram_mib} MiB of RAM"
        ));
        let devices = [
            format!("file:{}", image.path.display()),
            format!("ram:{ram_mib}M,block_size=4096"),
        ];
        let devices: Vec<&str> = devices.iter().map(String::as_str).collect();
        let load = Load::start(binaries, directory, mode, &devices, None)?;
        good &= copy_back(&load, &image, &digest)?;
        good &= exercise(&load, ram_mib, arguments.seconds, &mut rows)?;
        let initiator = load.initiator_counters()?;
        counted.push((mode, initiator, load.finish()?));
    }
    println!();
    print_runs(&rows);
    println!();
    print_counters(&counted);
    Ok(good)
}

fn default_ram_mib() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))
        .context("MemAvailable")?;
    let kib: u64 = line
        .split_whitespace()
        .nth(1)
        .context("a number")?
        .parse()?;
    // A quarter of what is free, at most 1 GiB.
    Ok((kib / 1024 / 4).clamp(64, 1024))
}

/// Reads the whole image through the initiator and compares it with what the target was given.
fn copy_back(load: &Load<'_>, image: &Image, digest: &str) -> Result<bool> {
    let copy = load.directory.join("copy.img");
    let started = Instant::now();
    run_program(
        Command::new(&load.binaries.flexblk)
            .arg("copy")
            .arg(load.target.uri(IMAGE))
            .arg(&copy)
            .args(["--quiet", "--udp-port", &load.target.udp_port().to_string()])
            .args(["--tx", load.mode.tx, "--rx", load.mode.rx]),
        Duration::from_secs(600),
    )?
    .success()
    .context("flexblk copy")?;
    let seconds = started.elapsed().as_secs_f64();
    let copied = image::sha256(&copy)?;
    let same = copied == digest && fs::metadata(&copy)?.len() == image.image_bytes;
    if same {
        image::check(&copy)?;
    }
    println!(
        "   image copied back in {seconds:.1} s ({:.2} GB/s to a file), SHA-256 {}",
        image.image_bytes as f64 / seconds / 1e9,
        if same {
            "equal, e2fsck finds it clean".to_owned()
        } else {
            format!("DIFFERS: {copied}")
        }
    );
    fs::remove_file(&copy)?;
    Ok(same)
}

struct Row {
    mode: Mode,
    what: String,
    depth: u32,
    direction: &'static str,
    run: Run,
}

/// The RAM namespace: written and verified as a whole, then 4 KiB at random.
fn exercise(load: &Load<'_>, ram_mib: u64, seconds: u32, rows: &mut Vec<Row>) -> Result<bool> {
    let bytes = ram_mib << 20;
    step(&format!(
        "{}: fio writes all of the RAM namespace and verifies it",
        load.mode
    ));
    let fio = load
        .job("fill", RAM)
        .option("rw", "write")
        .option("bs", "128k")
        .option("iodepth", 16)
        .option("verify", "crc32c")
        .option("do_verify", 1)
        .option("verify_fatal", 1)
        .option("end_fsync", 1);
    let run = match load.run(&fio, Duration::from_secs(900)) {
        Ok(run) => run,
        Err(error) => {
            println!("   VERIFY FAILED: {error:#}");
            return Ok(false);
        }
    };
    let (written, verified) = (
        run.result.measured("write").bytes,
        run.result.measured("read").bytes,
    );
    if written != bytes || verified != bytes {
        bail!("fio wrote {written} and verified {verified} bytes of {bytes}");
    }
    println!("   {ram_mib} MiB written, all CRC32C right");
    for (direction, what) in [("write", "write 128k"), ("read", "verify 128k")] {
        rows.push(Row {
            mode: load.mode,
            what: what.to_owned(),
            depth: 16,
            direction,
            run: run.clone(),
        });
    }
    step(&format!("{}: 4 KiB random reads and writes", load.mode));
    for direction in ["read", "write"] {
        for depth in [1, 32, 128] {
            let fio = load
                .job(&format!("rand{direction}-{depth}"), RAM)
                .option("rw", format!("rand{direction}"))
                .option("bs", "4k")
                .option("iodepth", depth)
                .option("norandommap", 1)
                .option("time_based", 1)
                .option("runtime", seconds);
            let run = load.run(&fio, Duration::from_secs(u64::from(seconds) + 60))?;
            rows.push(Row {
                mode: load.mode,
                what: format!("rand{direction} 4k"),
                depth,
                direction,
                run,
            });
        }
    }
    Ok(true)
}

fn print_runs(rows: &[Row]) {
    let mut table = Table::new(&[
        "over FlexiNS on loopback",
        "",
        "qd",
        "IOPS",
        "GB/s",
        "p50 us",
        "p99 us",
        "p99.9 us",
        "fio CPU %",
        "target CPU %",
    ]);
    for row in rows {
        let [iops, rate, p50, p99, p999] = cells(&row.run.result.measured(row.direction));
        table.row(&[
            row.mode.to_string(),
            row.what.clone(),
            row.depth.to_string(),
            iops,
            rate,
            p50,
            p99,
            p999,
            format!("{:.0}", row.run.fio_cpu),
            format!("{:.0}", row.run.target_cpu),
        ]);
    }
    table.print();
}

/// Transport counters of both modes beside each other.
fn print_counters(counted: &[(Mode, Counters, Counters)]) {
    let mut header = vec!["transport counter".to_owned()];
    let mut columns = Vec::new();
    for (mode, initiator, target) in counted {
        for (side, counters) in [("initiator", initiator), ("target", target)] {
            header.push(format!("{side} {}/{}", mode.tx, mode.rx));
            columns.push(counters);
        }
    }
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let mut table = Table::new(&header);
    for (name, shown) in [
        ("header_bytes_written", "header bytes written"),
        ("payload_bytes_gathered", "payload bytes gathered"),
        ("payload_bytes_copied", "payload bytes copied"),
        ("packets_tx", "packets sent"),
        ("packets_rx", "packets received"),
        ("trains_tx", "trains sent"),
        ("retransmissions", "retransmissions"),
        ("duplicates", "duplicates received"),
        ("crc_failures", "CRC failures"),
        ("acks_tx", "acknowledgements of their own"),
        ("immediate_completions", "reads completed by immediate"),
    ] {
        let mut cells = vec![shown.to_owned()];
        cells.extend(
            columns
                .iter()
                .map(|counters| value(counters, name).to_string()),
        );
        table.row(&cells);
        if name == "trains_tx" {
            let mut cells = vec!["packets per train".to_owned()];
            cells.extend(columns.iter().map(|counters| {
                let (packets, trains) =
                    (value(counters, "segments_tx"), value(counters, "trains_tx"));
                format!("{:.2}", packets as f64 / trains.max(1) as f64)
            }));
            table.row(&cells);
        }
    }
    table.print();
}
