//! `flexblk connect-all`: what a discovery service offers becomes devices, now and later.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use flexblk_rpc::RpcClient;
use flexblk_tests::attachment::unavailable;
use flexblk_tests::ports::free_tcp_port;
use flexblk_tests::process::{Finished, Process, eventually, run};
use flexblk_tests::setup::Setup;
use flexblk_tests::target::{Target, TargetOptions};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

/// A subsystem of its own, so that other tests' attachments are not in the way.
struct Offered<'a> {
    setup: &'a Setup,
    target: Target,
    hint: String,
}

impl Offered<'_> {
    fn nqn(&self, number: u32) -> String {
        format!("nqn.2026-11.dev.flexblk:{}{number}", self.hint)
    }

    /// Where a device is then found.
    fn link(&self, number: u32, nsid: u32) -> PathBuf {
        Path::new("/dev/flexblk").join(self.name(number, nsid))
    }

    fn name(&self, number: u32, nsid: u32) -> String {
        format!("{}{number}-n{nsid}", self.hint)
    }

    /// A subsystem with so many namespaces.
    fn add(&self, number: u32, namespaces: u32) -> Result<()> {
        let mut rpc = RpcClient::connect(&self.target.rpc_socket())?;
        let nqn = self.nqn(number);
        for nsid in 1..=namespaces {
            let name = format!("disk-{number}-{nsid}");
            let device = json!({ "name": name, "num_blocks": 32768, "block_size": 512 });
            rpc.call("bdev_malloc_create", device)?;
        }
        rpc.call(
            "nvmf_create_subsystem",
            json!({ "nqn": nqn, "allow_any_host": true }),
        )?;
        for nsid in 1..=namespaces {
            let name = format!("disk-{number}-{nsid}");
            let namespace = json!({ "bdev_name": name, "nsid": nsid });
            rpc.call(
                "nvmf_subsystem_add_ns",
                json!({ "nqn": nqn, "namespace": namespace }),
            )?;
        }
        Ok(())
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::new(&self.setup.binaries().flexblk);
        let port = self.target.udp_port().to_string();
        command.args(["connect-all", "-a", "127.0.0.1", "-s", "4420"]);
        command.args(["--udp-port", &port]).args(more);
        command
    }

    fn detach(&self, number: u32, nsid: u32) -> Result<Finished> {
        let name = self.name(number, nsid);
        run(
            Command::new(&self.setup.binaries().flexblk).args(["detach", &name]),
            LIMIT,
        )
    }
}

impl Drop for Offered<'_> {
    fn drop(&mut self) {
        for (number, nsid) in [(1, 1), (1, 2), (2, 1)] {
            let _ = self.detach(number, nsid);
        }
    }
}

fn offered<'a>(setup: &'a Setup, hint: &str) -> Result<Offered<'a>> {
    offered_with(setup, hint, TargetOptions::default())
}

fn offered_with<'a>(setup: &'a Setup, hint: &str, options: TargetOptions) -> Result<Offered<'a>> {
    let target = setup.target_with(TargetOptions {
        no_subsystem: true,
        ..options
    })?;
    Ok(Offered {
        setup,
        target,
        hint: format!("{hint}-{}-", std::process::id()),
    })
}

#[test]
fn everything_offered_is_attached_once() -> Result<()> {
    if unavailable("everything_offered_is_attached_once") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let offered = offered(&setup, "all")?;
    offered.add(1, 2)?;
    let done = run(&mut offered.command(&["--", "--no-partitions"]), LIMIT)?.success()?;
    ensure!(done.stdout.lines().count() == 2, "{}", done.stdout);
    ensure!(offered.link(1, 1).exists() && offered.link(1, 2).exists());
    // Those that are there already stay as they are.
    let again = run(&mut offered.command(&[]), LIMIT)?.success()?;
    ensure!(again.stdout.is_empty(), "{}", again.stdout);
    ensure!(
        again.stderr.matches("attached already").count() == 2,
        "{}",
        again.stderr
    );
    offered.detach(1, 1)?.success()?;
    offered.detach(1, 2)?.success()?;
    ensure!(!offered.link(1, 1).exists());
    Ok(())
}

#[test]
fn a_subsystem_is_attached_over_the_transport_that_it_has() -> Result<()> {
    if unavailable("a_subsystem_is_attached_over_the_transport_that_it_has") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let port = free_tcp_port()?;
    let options = TargetOptions {
        tcp_port: Some(port),
        ..TargetOptions::default()
    };
    let offered = offered_with(&setup, "tcp", options)?;
    offered.add(1, 1)?;
    offered.add(2, 1)?;
    let address = json!({ "trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port.to_string() });
    RpcClient::connect(&offered.target.rpc_socket())?.call(
        "flexblk_subsystem_set_listeners",
        json!({ "nqn": offered.nqn(2), "listen_addresses": [address] }),
    )?;
    // Asked over FlexiNS.
    let done = run(&mut offered.command(&[]), LIMIT)?.success()?;
    ensure!(done.stdout.lines().count() == 2, "{}", done.stdout);
    let list = run(
        Command::new(&setup.binaries().flexblk).args(["list", "-o", "json"]),
        LIMIT,
    )?
    .success()?;
    let list: serde_json::Value = serde_json::from_str(&list.stdout)?;
    let transports = |number| {
        let name = offered.name(number, 1);
        let all = list["Attachments"].as_array().into_iter().flatten();
        let ours = all.filter(|attached| attached["Name"] == name.as_str());
        let paths = ours.flat_map(|attached| attached["Paths"].as_array().into_iter().flatten());
        paths
            .map(|path| path["Transport"].to_string())
            .collect::<Vec<_>>()
    };
    let (both, tcp) = (transports(1), transports(2));
    ensure!(both.len() == 1 && both[0].contains("flexins"), "{list}");
    ensure!(tcp.len() == 1 && tcp[0].contains("tcp"), "{list}");
    offered.detach(1, 1)?.success()?;
    offered.detach(2, 1)?.success()?;
    Ok(())
}

#[test]
fn a_subsystem_that_comes_later_is_attached_too() -> Result<()> {
    if unavailable("a_subsystem_that_comes_later_is_attached_too") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let offered = offered(&setup, "later")?;
    offered.add(1, 1)?;
    let mut command = offered.command(&["--persistent"]);
    let mut process = Process::spawn(&mut command, "connect-all", setup.path())?;
    eventually("what is there is attached", LIMIT, || {
        offered.link(1, 1).exists()
    })?;
    offered.add(2, 1)?;
    // The discovery controller tells of it at once. Whether its namespace was there by then is a matter of luck.
    let took = eventually("what came later is attached", LIMIT, || {
        offered.link(2, 1).exists()
    })?;
    println!("attached {took:?} after it was offered");
    ensure!(process.status()?.is_none(), "{}", process.tail());
    process.kill()?;
    offered.detach(1, 1)?.success()?;
    offered.detach(2, 1)?.success()?;
    Ok(())
}
