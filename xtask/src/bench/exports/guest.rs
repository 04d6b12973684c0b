//! Block devices of a guest, for what this machine's kernel may not have: ublk and NBD's client, beside peers' NBD and the
//! kernel's own NVMe/TCP host.
//!
//! The guest is emulated, which costs a kernel, a processor's copies and a program each something else than on real
//! processors. So there are no goals here.

use std::fs::File;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use flexblk_tests::fio::{FioResult, RESULT_OPTIONS};
use flexblk_tests::process::{Process, eventually, find_program};
use flexblk_tests::target::SUBNQN;
use flexblk_tests::vm::image::Image;
use flexblk_tests::vm::machine;
use flexblk_tests::vm::network::{Network, OUTSIDE};
use flexblk_tests::vm::outside::Outside;
use flexblk_tests::vm::scenario::Scenario;

use super::servers::{NBDKIT, NBDKIT_THERE, QEMU_NBD, QEMU_THERE};
use super::{Cell, RW, Row, SIZES, Server, Way};
use crate::bench::Arguments;
use crate::vm;

/// Of peers' images: as large as the namespace that guests get.
const MIB: u64 = 64;
const NBDKIT_PORT: u16 = 10809;
const QEMU_PORT: u16 = 10810;
/// How long a server may take until it listens.
const START: Duration = Duration::from_secs(20);
/// For the whole guest: 5 devices, 8 cells each.
const LIMIT: Duration = Duration::from_secs(1200);

pub(super) fn measure(arguments: &Arguments, flexblk: &Path, directory: &Path) -> Result<Vec<Row>> {
    let image = Image::open(&vm::prepare(arguments.yes)?)?;
    arguments.say("block devices of an emulated guest");
    let scenario = Scenario::new("guest", include_str!("guest.sh"))
        .variable("PEER", "outside")
        .variable("SUBNQN", SUBNQN)
        .variable("RUNTIME", arguments.seconds)
        .variable("FIO_OPTIONS", RESULT_OPTIONS.join(" "))
        .flexblk(flexblk, image.tree())
        .limit(LIMIT);
    // The network is that of a thread.
    let guest = || -> Result<Vec<Row>> {
        let network = Network::enter()?;
        let mut servers = Servers {
            target: Outside::new(&network, directory)?,
            directory,
            processes: Vec::new(),
            rows: Vec::new(),
        };
        let mut answer = |words: &[String]| servers.answer(words);
        machine::run(&image, &network, &scenario, directory, &mut answer)?.check("guest")?;
        Ok(servers.rows)
    };
    std::thread::scope(|scope| scope.spawn(guest).join())
        .unwrap_or_else(|_| bail!("the guest's thread panicked"))
}

/// What is outside of the guest.
struct Servers<'a> {
    target: Outside<'a>,
    directory: &'a Path,
    processes: Vec<Process>,
    rows: Vec<Row>,
}

impl Servers<'_> {
    fn answer(&mut self, words: &[String]) -> Result<String> {
        let text: Vec<&str> = words.iter().map(String::as_str).collect();
        match text.as_slice() {
            ["measured", way, server, rw, size, depth, result] => {
                let row = row(way, server, (rw, size, depth), result);
                self.rows.push(row.with_context(|| text.join(" "))?);
                Ok(String::new())
            }
            ["serve", "nbdkit"] => {
                let (port, size) = (NBDKIT_PORT.to_string(), format!("{MIB}M"));
                let words = ["-i", OUTSIDE, "-p", &port, "memory", &size];
                let words = [&NBDKIT[..], &words, &["allocator=malloc"]].concat();
                self.serve(&words, NBDKIT_PORT)
            }
            ["serve", "qemu-nbd"] => {
                let image = self.directory.join("guest.img");
                File::create(&image)?.set_len(MIB << 20)?;
                let (port, image) = (QEMU_PORT.to_string(), image.display().to_string());
                let words = [&QEMU_NBD[..], &["-b", OUTSIDE, "-p", &port, &image]].concat();
                self.serve(&words, QEMU_PORT)
            }
            _ => self.target.answer(words),
        }
    }

    /// Starts a server, and returns where it listens.
    fn serve(&mut self, words: &[&str], port: u16) -> Result<String> {
        let (name, rest) = words.split_first().context("a program")?;
        let mut command = Command::new(find_program(name)?);
        let process = Process::spawn(command.args(rest), name, self.directory)?;
        self.processes.push(process);
        eventually(name, START, || TcpStream::connect((OUTSIDE, port)).is_ok())?;
        Ok(port.to_string())
    }
}

fn row(
    way: &str,
    server: &str,
    (rw, size, depth): (&str, &str, &str),
    result: &str,
) -> Result<Row> {
    let one_of = |all: &[&'static str], text: &str| {
        let found = all.iter().find(|known| **known == text);
        found.copied().with_context(|| text.to_owned())
    };
    let result = FioResult::parse(result)?;
    if result.error() != 0 {
        bail!("fio's error {}", result.error());
    }
    Ok(Row {
        way: match way {
            "ublk" => Way::Ublk,
            "nbd" => Way::KernelNbd,
            "nvme-tcp" => Way::KernelNvme,
            _ => bail!("way {way}"),
        },
        server: match server {
            "flexblk" => Server::Ours,
            "nbdkit" => NBDKIT_THERE,
            "qemu-nbd" => QEMU_THERE,
            "linux" => Server::Linux,
            _ => bail!("server {server}"),
        },
        cell: Cell {
            rw: one_of(&RW, rw)?,
            size: one_of(&SIZES, size)?,
            depth: depth.parse()?,
        },
        measured: result.measured(rw.trim_start_matches("rand")),
    })
}
