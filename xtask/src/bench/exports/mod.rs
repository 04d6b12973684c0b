//! Exports to the host: the kernel's or fio's way through each, beside what QEMU and nbdkit offer of the same kind.
//!
//! The target is on one core, as the machine that has the image would be; everything of the host that uses it is on the
//! other: the exporter and fio. A peer is measured in two places. `there` serves an image that is not here, as we do:
//! its server is on the first core and speaks NBD over TCP with its exporter, which is on the second. `here` has the
//! image itself, with no network in between, on the first core.

mod guest;
mod servers;

use std::path::Path;

use anyhow::{Context, Result};
use flexblk_tests::binaries::Binaries;
use flexblk_tests::fio::Measured;
use serde_json::{Value, json};

use self::servers::{Place, Servers};
use super::{Arguments, Goal, LIMIT, median, number, perf};
use crate::apt;
use crate::table::{Table, count, micros};

/// Times the IOPS of a peer through the same kind of export.
const GOAL: f64 = 1.5;
const DEPTHS: [u32; 2] = [1, 32];
const SIZES: [&str; 2] = ["4k", "128k"];
const RW: [&str; 2] = ["randread", "randwrite"];
/// How a namespace gets to who uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Into fio's own process: no export at all, for scale.
    Library,
    /// fio's NBD client on a Unix socket.
    Nbd,
    /// A loop device on a file of FUSE, by io_uring.
    FuseLoop,
    /// A block device of a guest by its ublk driver, by io_uring.
    Ublk,
    /// One by its NBD driver.
    KernelNbd,
    /// One by its NVMe/TCP host.
    KernelNvme,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Way::Library => "library",
            Way::Nbd => "NBD",
            Way::FuseLoop => "FUSE + loop",
            Way::Ublk => "ublk",
            Way::KernelNbd => "NBD, kernel",
            Way::KernelNvme => "NVMe/TCP, kernel",
        })
    }
}

/// Whose export it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Server {
    Ours,
    Peer {
        name: &'static str,
        image: Image,
    },
    /// None: the kernel itself is the host of our target.
    Linux,
}

/// Where the image of a peer's export is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Image {
    Here,
    There,
}

impl std::fmt::Display for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Server::Ours => f.write_str("flexblk"),
            Server::Linux => f.write_str("none"),
            Server::Peer { name, image } => write!(
                f,
                "{name}, {}",
                match image {
                    Image::Here => "here",
                    Image::There => "there",
                }
            ),
        }
    }
}

/// What fio is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cell {
    rw: &'static str,
    size: &'static str,
    depth: u32,
}

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} at depth {}", self.rw, self.size, self.depth)
    }
}

fn cells() -> impl Iterator<Item = Cell> {
    RW.iter().flat_map(|rw| {
        SIZES
            .iter()
            .flat_map(move |size| DEPTHS.map(|depth| Cell { rw, size, depth }))
    })
}

struct Row {
    way: Way,
    server: Server,
    cell: Cell,
    measured: Measured,
}

pub(super) struct Report {
    rows: Vec<Row>,
    /// Blocks per second of 128 KiB that a process can move between network and host at most, over TCP and NBD's kind
    /// of socket: as reads go, and as writes.
    relay: [f64; 2],
    /// Of an emulated guest; empty when it was not asked for.
    guest: Vec<Row>,
    skipped: Vec<String>,
}

pub(super) fn measure(
    arguments: &Arguments,
    binaries: &Binaries,
    directory: &Path,
) -> Result<Report> {
    apt::ensure(&servers::NEEDS, arguments.yes)?;
    let (far, near) = arguments.cores;
    let place = Place {
        binaries,
        directory,
        far,
        near,
        mib: arguments.ram.first().copied().unwrap_or(64),
    };
    let mut skipped = Vec::new();
    let servers = Servers::start(&place, &mut skipped)?;
    for export in &servers.exports {
        let what = || format!("filling {} of {}", export.way, export.server);
        export.fill(&place).with_context(what)?;
    }
    let mut runs: Vec<Vec<(usize, Cell, Measured)>> = Vec::new();
    let mut relays: [Vec<f64>; 2] = [Vec::new(), Vec::new()];
    for round in 1..=arguments.rounds {
        arguments.say(&format!(
            "exports, the target and peers' servers on core {far}, the host on core {near}, round {round} of {}",
            arguments.rounds
        ));
        let mut of_round = Vec::new();
        let memory_kib = (place.mib << 10).to_string();
        for (to, relay) in ["host", "network"].into_iter().zip(&mut relays) {
            let report = perf(
                arguments,
                binaries,
                &["relay", "--to", to, "--working-set-kib", &memory_kib],
            )?;
            relay.push(number(&report, "blocks_per_second")?);
        }
        for cell in cells() {
            for (index, export) in servers.exports.iter().enumerate() {
                let measured = export
                    .measure(&place, cell, arguments.seconds)
                    .with_context(|| format!("{} of {}, {cell}", export.way, export.server))?;
                of_round.push((index, cell, measured));
            }
        }
        runs.push(of_round);
    }
    let mut rows = Vec::new();
    for cell in cells() {
        for (index, export) in servers.exports.iter().enumerate() {
            let same = runs.iter().flatten();
            let same = same.filter(|run| (run.0, run.1) == (index, cell));
            rows.push(Row {
                way: export.way,
                server: export.server,
                cell,
                measured: median(same.map(|run| run.2), |run| run.iops)
                    .context("at least one round")?,
            });
        }
    }
    drop(servers);
    let guest = if arguments.vm {
        guest::measure(arguments, &binaries.flexblk, directory)?
    } else {
        Vec::new()
    };
    Ok(Report {
        rows,
        relay: relays.map(|relay| median(relay.into_iter(), |value| *value).unwrap_or_default()),
        guest,
        skipped,
    })
}

/// One of ours beside one of a peer's.
struct Ratio {
    way: Way,
    peer: Server,
    cell: Cell,
    iops: f64,
}

/// What ours did in the same cell by the same way.
fn ours<'a>(rows: &'a [Row], row: &Row) -> Option<&'a Measured> {
    let mut rows = rows.iter();
    rows.find(|other| (other.way, other.server, other.cell) == (row.way, Server::Ours, row.cell))
        .map(|row| &row.measured)
}

impl Report {
    fn ratios(&self) -> impl Iterator<Item = Ratio> {
        self.rows.iter().filter_map(|row| {
            let ours = ours(&self.rows, row)?;
            (row.server != Server::Ours).then(|| Ratio {
                way: row.way,
                peer: row.server,
                cell: row.cell,
                iops: ours.iops / row.measured.iops,
            })
        })
    }

    pub(super) fn goals(&self) -> Vec<Goal> {
        let mut goals: Vec<Goal> = Vec::new();
        let mut peers: Vec<(Way, Server)> = Vec::new();
        for ratio in self.ratios() {
            if !peers.contains(&(ratio.way, ratio.peer)) {
                peers.push((ratio.way, ratio.peer));
            }
        }
        for (way, peer) in peers {
            let ratios: Vec<Ratio> = self
                .ratios()
                .filter(|ratio| (ratio.way, ratio.peer) == (way, peer))
                .collect();
            let met = ratios.iter().filter(|ratio| ratio.iops >= GOAL).count();
            if let Some(least) = ratios.iter().min_by(|a, b| a.iops.total_cmp(&b.iops)) {
                goals.push(Goal {
                    what: format!(
                        "{way} beside {peer}: IOPS, {met} of {} cells, least {}",
                        ratios.len(),
                        least.cell
                    ),
                    measured: format!("{:.2}", least.iops),
                    goal: format!(">= {GOAL}"),
                    met: least.iops >= GOAL,
                });
            }
        }
        goals
    }

    pub(super) fn print(&self) {
        print(&self.rows);
        let [to_host, to_network] = self.relay.map(count);
        println!(
            "a relay between TCP and a Unix socket without any protocol: {to_host} blocks/s of 128 KiB as reads go, {to_network} as writes"
        );
        if !self.guest.is_empty() {
            println!("\nBlock devices of an emulated guest, to be compared with one another only:");
            print(&self.guest);
        }
        for skipped in &self.skipped {
            println!("SKIPPED {skipped}");
        }
    }

    pub(super) fn as_json(&self) -> Value {
        let [to_host, to_network] = self.relay;
        json!({
            "runs": as_json(&self.rows),
            "relay_blocks_per_second": { "to_host": to_host, "to_network": to_network },
            "guest_runs": as_json(&self.guest),
            "skipped": self.skipped,
        })
    }
}

fn print(rows: &[Row]) {
    println!();
    let header = [
        "export",
        "server",
        "rw",
        "bs",
        "qd",
        "IOPS",
        "p50 us",
        "p99 us",
        "ours / it",
    ];
    let mut table = Table::new(&header);
    for row in rows {
        let ratio = match ours(rows, row) {
            Some(ours) if row.server != Server::Ours => {
                format!("{:.2}", ours.iops / row.measured.iops)
            }
            _ => String::new(),
        };
        table.row(&[
            row.way.to_string(),
            row.server.to_string(),
            row.cell.rw.to_owned(),
            row.cell.size.to_owned(),
            row.cell.depth.to_string(),
            count(row.measured.iops),
            micros(row.measured.p50_us),
            micros(row.measured.p99_us),
            ratio,
        ]);
    }
    table.print();
}

fn as_json(rows: &[Row]) -> Vec<Value> {
    let row = |row: &Row| {
        json!({
            "export": row.way.to_string(),
            "server": row.server.to_string(),
            "rw": row.cell.rw,
            "bs": row.cell.size,
            "iodepth": row.cell.depth,
            "iops": row.measured.iops,
            "p50_us": row.measured.p50_us,
            "p99_us": row.measured.p99_us,
        })
    };
    rows.iter().map(row).collect()
}
