//! SPDK's programs as hosts of our target, and SPDK's target as a peer. They run when `SPDK_DIR` names a build of SPDK.
//!
//! `spdk_with_itself` runs the same list with SPDK's own target, which shows that a step is right.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flexblk_rpc::RpcClient;
use flexblk_tests::host::Host;
use flexblk_tests::ports::free_tcp_port;
use flexblk_tests::process::eventually;
use flexblk_tests::setup::Setup;
use flexblk_tests::spdk::{RPC_SOCKET, Spdk, free_huge_pages};
use flexblk_tests::target::{SUBNQN, TargetOptions};
use serde_json::json;

const HOSTNQN: &str = "nqn.2026-11.dev.flexblk:spdk";
const LIMIT: Duration = Duration::from_secs(120);

/// What an item of the list works with.
struct Bench<'a> {
    spdk: &'a Spdk,
    port: u16,
    directory: &'a Path,
    /// The target's JSON-RPC socket.
    rpc: PathBuf,
    /// Name of the test, for notes of what was skipped.
    test: &'a str,
}

impl Bench<'_> {
    fn address(&self) -> String {
        format!(
            "trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:{} subnqn:{SUBNQN}",
            self.port
        )
    }

    /// The address with the name of a host; without one `spdk_nvme_perf` sends an empty HOSTNQN.
    fn address_with_host(&self) -> String {
        format!("{} hostnqn:{HOSTNQN}", self.address())
    }

    fn run(&self, name: &str, arguments: &[&str]) -> Result<String> {
        self.spdk.run(name, arguments, self.directory, LIMIT)
    }
}

fn identify(bench: &Bench<'_>) -> Result<()> {
    let text = bench.run("spdk_nvme_identify", &["-r", &bench.address()])?;
    ensure!(text.contains(SUBNQN), "{text}");
    ensure!(text.contains("Namespace ID:1"), "{text}");
    Ok(())
}

fn discover(bench: &Bench<'_>) -> Result<()> {
    let address = format!(
        "trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:{} subnqn:nqn.2014-08.org.nvmexpress.discovery",
        bench.port
    );
    let text = bench.run("spdk_nvme_identify", &["-r", &address])?;
    ensure!(text.contains(SUBNQN), "{text}");
    Ok(())
}

/// Reads and writes of several sizes and depths, with and without digests.
fn perf(bench: &Bench<'_>) -> Result<()> {
    let address = bench.address_with_host();
    for (block, depth, digests) in [
        ("512", "1", &[][..]),
        ("4096", "128", &[]),
        ("4096", "32", &["-H", "-I"]),
        ("131072", "16", &["-H"]),
        ("1048576", "4", &["-I"]),
    ] {
        let mut arguments = vec!["-r", &address, "-q", depth, "-o", block, "-t", "2"];
        arguments.extend(["-w", "randrw", "-M", "50", "-c", "0x2"]);
        arguments.extend(digests);
        let text = bench.run("spdk_nvme_perf", &arguments)?;
        let total = text
            .lines()
            .find_map(|line| {
                line.strip_prefix("Total")?
                    .split(':')
                    .nth(1)?
                    .split_whitespace()
                    .next()?
                    .parse::<f64>()
                    .ok()
            })
            .with_context(|| format!("no total in:\n{text}"))?;
        println!(
            "spdk_nvme_perf: {block} bytes, depth {depth}, {digests:?}: {total} I/O per second"
        );
        ensure!(total > 0.0, "{text}");
    }
    Ok(())
}

/// Writes and verifies through SPDK's own block layer.
fn bdevperf(bench: &Bench<'_>) -> Result<()> {
    for digests in [false, true] {
        let config = json!({ "subsystems": [{ "subsystem": "bdev", "config": [{
            "method": "bdev_nvme_attach_controller",
            "params": {
                "name": "remote", "trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1",
                "trsvcid": bench.port.to_string(), "subnqn": SUBNQN, "hdgst": digests, "ddgst": digests,
            },
        }]}]});
        let path = bench.directory.join("bdevperf.json");
        fs::write(&path, config.to_string())?;
        let path = path.to_str().context("UTF-8")?;
        for block in ["4096", "65536"] {
            let text = bench.run(
                "bdevperf",
                &[
                    "--json", path, "-q", "32", "-o", block, "-w", "verify", "-t", "3", "-m", "0x2",
                ],
            )?;
            ensure!(text.contains("Total"), "{text}");
            ensure!(!text.to_lowercase().contains("miscompare"), "{text}");
        }
    }
    Ok(())
}

fn abort(bench: &Bench<'_>) -> Result<()> {
    let text = bench.run(
        "abort",
        &[
            "-r",
            &bench.address(),
            "-q",
            "64",
            "-t",
            "2",
            "-a",
            "4",
            "-c",
            "0x1",
            "-w",
            "rw",
            "-M",
            "50",
            "-o",
            "4096",
        ],
    )?;
    // "abort submitted N, failed to submit M", "success A, unsuccessful B, failed C".
    ensure!(text.contains("abort submitted"), "{text}");
    ensure!(text.contains("failed 0"), "{text}");
    Ok(())
}

fn fuzz(bench: &Bench<'_>) -> Result<()> {
    for seed in ["1", "123456", "987654321"] {
        let arguments = [
            "-m",
            "0x2",
            "-t",
            "30",
            "-S",
            seed,
            "-F",
            &bench.address(),
            "-N",
            "-a",
        ];
        let text = bench.run("nvme_fuzz", &arguments)?;
        ensure!(
            text.contains("Shutting down the fuzz application"),
            "{text}"
        );
    }
    // It still serves.
    identify(bench)
}

fn connect_stress(bench: &Bench<'_>) -> Result<()> {
    bench.run(
        "connect_stress",
        &["-c", "0x2", "-t", "5", "-r", &bench.address()],
    )?;
    Ok(())
}

fn fused_ordering(bench: &Bench<'_>) -> Result<()> {
    let text = bench.run("fused_ordering", &["-r", &bench.address()])?;
    ensure!(text.contains("fused_ordering(1023)"), "{text}");
    Ok(())
}

/// A program that has no option to work without huge pages.
fn with_huge_pages(bench: &Bench<'_>, name: &str) -> Result<Option<String>> {
    if free_huge_pages() < 128 {
        let reason = "it works with huge pages only: `sysctl vm.nr_hugepages=512`";
        flexblk_tests::skip::note_part(&format!("{}, {name}", bench.test), reason);
        return Ok(None);
    }
    let arguments = ["-r", &bench.address()];
    bench
        .spdk
        .run_with_huge_pages(name, &arguments, bench.directory, LIMIT)
        .map(Some)
}

fn reserve(bench: &Bench<'_>) -> Result<()> {
    if let Some(text) = with_huge_pages(bench, "reserve")? {
        ensure!(text.contains("Reservation"), "{text}");
        ensure!(!text.contains("FAILED"), "{text}");
    }
    Ok(())
}

fn simple_copy(bench: &Bench<'_>) -> Result<()> {
    if let Some(text) = with_huge_pages(bench, "simple_copy")? {
        ensure!(text.contains("LBAs matching Written Data: "), "{text}");
    }
    Ok(())
}

/// A namespace is added while the host waits for the event that tells of it.
fn aer(bench: &Bench<'_>) -> Result<()> {
    let ready = bench.directory.join("aer-is-ready");
    let ready_path = ready.to_str().context("UTF-8")?;
    let address = bench.address();
    let arguments = ["-r", &address, "-n", "2", "-t", ready_path];
    let mut host = bench.spdk.spawn("aer", &arguments, bench.directory)?;
    eventually("aer waits for events", LIMIT, || ready.exists())?;
    let mut rpc = RpcClient::connect(&bench.rpc)?;
    let device = json!({ "name": "second", "num_blocks": 2048, "block_size": 512 });
    rpc.call("bdev_malloc_create", device)?;
    let namespace = json!({ "bdev_name": "second", "nsid": 2 });
    rpc.call(
        "nvmf_subsystem_add_ns",
        json!({ "nqn": SUBNQN, "namespace": namespace }),
    )?;
    let status = host.wait(LIMIT)?;
    let text = host.tail();
    rpc.call(
        "nvmf_subsystem_remove_ns",
        json!({ "nqn": SUBNQN, "nsid": 2 }),
    )?;
    rpc.call("bdev_malloc_delete", json!({ "name": "second" }))?;
    ensure!(status.success(), "{status}: {text}");
    Ok(())
}

/// The list, each item by its name.
type Item = (&'static str, fn(&Bench<'_>) -> Result<()>);
const LIST: &[Item] = &[
    ("identify", identify),
    ("discover", discover),
    // Before anything is written: it writes zeroes and compares with them, and nothing says which comes first.
    ("fused_ordering", fused_ordering),
    ("perf", perf),
    ("bdevperf", bdevperf),
    ("abort", abort),
    ("connect_stress", connect_stress),
    ("simple_copy", simple_copy),
    ("reserve", reserve),
    ("aer", aer),
    ("fuzz", fuzz),
];

/// Runs every item and reports all that failed.
fn run_list(bench: &Bench<'_>) -> Result<()> {
    let mut failed = String::new();
    for (name, item) in LIST {
        let result = item(bench);
        println!("{name}: {}", if result.is_ok() { "ok" } else { "FAILED" });
        if let Err(error) = result {
            failed += &format!("{name}: {error:#}\n");
        }
    }
    ensure!(failed.is_empty(), "{failed}");
    Ok(())
}

#[test]
fn spdk_with_itself() -> Result<()> {
    let Some(spdk) = Spdk::or_skip("spdk_with_itself") else {
        return Ok(());
    };
    let directory = tempfile::tempdir()?;
    let port = free_tcp_port()?;
    let _target = spdk.target(SUBNQN, port, directory.path())?;
    run_list(&Bench {
        spdk: &spdk,
        port,
        directory: directory.path(),
        rpc: directory.path().join(RPC_SOCKET),
        test: "spdk_with_itself",
    })
}

#[test]
fn spdk_with_our_target() -> Result<()> {
    let Some(spdk) = Spdk::or_skip("spdk_with_our_target") else {
        return Ok(());
    };
    let setup = Setup::new()?;
    let port = free_tcp_port()?;
    let mut target = setup.target_with(TargetOptions {
        tcp_port: Some(port),
        ..TargetOptions::with_devices(&["ram:64M"])
    })?;
    run_list(&Bench {
        spdk: &spdk,
        port,
        directory: setup.path(),
        rpc: target.rpc_socket(),
        test: "spdk_with_our_target",
    })?;
    ensure!(target.is_running(), "{}", target.output());
    Ok(())
}

/// SPDK's host connects again by itself when its target was killed and came back.
fn reconnect(
    spdk: &Spdk,
    port: u16,
    directory: &Path,
    mut again: impl FnMut() -> Result<()>,
) -> Result<()> {
    let address = format!("trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:{port} subnqn:{SUBNQN}");
    let arguments = [
        "-r", &address, "-q", "32", "-o", "4096", "-w", "randrw", "-M", "50", "-t", "10", "-c",
        "0x2",
    ];
    let mut host = spdk.spawn("reconnect", &arguments, directory)?;
    std::thread::sleep(Duration::from_secs(3));
    again()?;
    let status = host.wait(LIMIT)?;
    ensure!(status.success(), "{status}: {}", host.tail());
    Ok(())
}

#[test]
fn spdk_reconnects_to_itself() -> Result<()> {
    let Some(spdk) = Spdk::or_skip("spdk_reconnects_to_itself") else {
        return Ok(());
    };
    let directory = tempfile::tempdir()?;
    let port = free_tcp_port()?;
    let mut target = Some(spdk.target(SUBNQN, port, directory.path())?);
    reconnect(&spdk, port, directory.path(), || {
        target.take().context("it runs")?.kill()?;
        std::thread::sleep(Duration::from_secs(2));
        target = Some(spdk.target(SUBNQN, port, directory.path())?);
        Ok(())
    })
}

#[test]
fn spdk_reconnects_to_our_target() -> Result<()> {
    let Some(spdk) = Spdk::or_skip("spdk_reconnects_to_our_target") else {
        return Ok(());
    };
    let setup = Setup::new()?;
    let port = free_tcp_port()?;
    let mut target = setup.target_with(TargetOptions {
        extra: format!("[tcp]\naddress = \"127.0.0.1:{port}\"\n"),
        ..TargetOptions::with_devices(&["ram:64M"])
    })?;
    reconnect(&spdk, port, setup.path(), || {
        target.kill()?;
        std::thread::sleep(Duration::from_secs(2));
        target.restart(setup.binaries())
    })
}

#[test]
fn our_initiator_with_spdk_target() -> Result<()> {
    let Some(spdk) = Spdk::or_skip("our_initiator_with_spdk_target") else {
        return Ok(());
    };
    let directory = tempfile::tempdir()?;
    let port = free_tcp_port()?;
    let mut target = Some(spdk.target(SUBNQN, port, directory.path())?);
    let mut host = Host::new("127.0.0.1", port, &[64 << 20])?;
    let mut failed = String::new();
    for step in [
        "discover",
        "identify",
        "copy",
        "copy-digests",
        "fio",
        "fio-digests",
        "compare",
        "flush",
        "write-zeroes",
        "dsm",
        "discard",
        "reservations",
        "outage-start",
    ] {
        if let Err(error) = host.answer(&[step.to_owned()]) {
            failed += &format!("{step}: {error:#}\n");
        }
    }
    target.take().context("it runs")?.kill()?;
    std::thread::sleep(Duration::from_secs(3));
    let _target = spdk.target(SUBNQN, port, directory.path())?;
    host.answer(&["outage-end".to_owned()])?;
    ensure!(failed.is_empty(), "{failed}");
    Ok(())
}
