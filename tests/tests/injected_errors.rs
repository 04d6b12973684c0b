//! Errors that SPDK's client puts into an error device of a target that serves, as its hosts see them.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use flexblk_rpc::RpcClient;
use flexblk_tests::process::{Process, eventually};
use flexblk_tests::setup::Setup;
use flexblk_tests::spdk_rpc::{Client, SpdkRpc};
use flexblk_tests::target::{SUBNQN, Target, TargetOptions};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(20);
const READ: [&str; 6] = ["--length", "64k", "--offset", "0", "-o", "out.bin"];

fn target(setup: &Setup, rpc: &SpdkRpc) -> Result<(Target, Client)> {
    let options = TargetOptions {
        no_subsystem: true,
        ..TargetOptions::default()
    };
    let target = setup.target_with(options)?;
    let rpc = rpc.at(&target);
    rpc.ok(&["bdev_malloc_create", "-b", "m", "16", "512"])?;
    assert_eq!(rpc.ok(&["bdev_error_create", "m"])?, "true");
    rpc.ok(&["nvmf_create_subsystem", SUBNQN, "-a"])?;
    rpc.ok(&["nvmf_subsystem_add_ns", SUBNQN, "EE_m"])?;
    Ok((target, rpc))
}

/// A read that has not ended, on a connection of its own.
fn pending_read(setup: &Setup, target: &Target, name: &str) -> Result<Process> {
    let mut command = Command::new(&setup.binaries().flexblk);
    command.arg("read").args(target.address()).args(READ);
    let mut read = Process::spawn(command.current_dir(setup.path()), name, setup.path())?;
    let mut rpc = RpcClient::connect(&target.rpc_socket())?;
    eventually("an I/O queue", LIMIT, || {
        let stats = rpc.call("nvmf_get_stats", json!({}));
        stats.is_ok_and(|stats| {
            let groups = stats["poll_groups"].as_array().into_iter().flatten();
            groups
                .into_iter()
                .any(|group| group["current_io_qpairs"] != 0)
        })
    })?;
    // Its first command is a read.
    std::thread::sleep(Duration::from_millis(300));
    assert!(read.status()?.is_none(), "{}", read.stderr());
    Ok(read)
}

#[test]
fn spdks_client_injects_errors() -> Result<()> {
    let Some(spdk_rpc) = SpdkRpc::or_skip("spdks_client_injects_errors") else {
        return Ok(());
    };
    let setup = Setup::new()?;
    let (target, rpc) = target(&setup, &spdk_rpc)?;
    let data = setup.file("in.bin", 64 << 10, 1)?;
    let inject =
        |arguments: &[&str]| rpc.ok(&[&["bdev_error_inject_error", "EE_m"], arguments].concat());
    let write = ["-i", "in.bin", "--offset", "0"];
    let read = || -> Result<Vec<u8>> {
        setup.flexblk_at(&target, "read", &READ)?.success()?;
        Ok(fs::read(setup.path().join("out.bin"))?)
    };
    inject(&["write", "failure", "-n", "1"])?;
    let failed = setup.flexblk_at(&target, "write", &write)?;
    assert!(
        failed.stderr.contains("Internal Error"),
        "{}",
        failed.stderr
    );
    setup.flexblk_at(&target, "write", &write)?.success()?;

    let unrecovered = ["--nvme-sct", "2", "--nvme-sc", "129"];
    inject(&[&["read", "nvme_failure", "-n", "1"], &unrecovered[..]].concat())?;
    let failed = setup.flexblk_at(&target, "read", &READ)?;
    assert!(
        failed.stderr.contains("Unrecovered Read Error"),
        "{}",
        failed.stderr
    );

    inject(&["read", "corrupt_data", "-n", "1", "-o", "5", "-v", "255"])?;
    let mut wrong = data.clone();
    *wrong.get_mut(5).context("a byte")? ^= 255;
    assert!(read()? == wrong, "one byte of one read is another");
    inject(&["all", "nomem", "-n", "2"])?;
    assert!(read()? == data, "tried again");
    inject(&["all", "failure", "-n", "1000"])?;
    inject(&["clear", "failure"])?;
    assert!(read()? == data, "nothing is left");
    Ok(())
}

/// What is pending goes on when it is resumed, and ends when its device is deleted; a target that is
/// told to end does not wait for it.
#[test]
fn pending_reads_end() -> Result<()> {
    let Some(spdk_rpc) = SpdkRpc::or_skip("pending_reads_end") else {
        return Ok(());
    };
    let setup = Setup::new()?;
    let (mut target, rpc) = target(&setup, &spdk_rpc)?;
    let pend = [
        "bdev_error_inject_error",
        "EE_m",
        "read",
        "pending",
        "-n",
        "1",
    ];
    rpc.ok(&pend)?;
    let mut read = pending_read(&setup, &target, "resumed")?;
    rpc.ok(&["bdev_error_resume_pending", "EE_m"])?;
    assert!(read.wait(LIMIT)?.success(), "{}", read.stderr());

    rpc.ok(&pend)?;
    let mut read = pending_read(&setup, &target, "deleted")?;
    rpc.ok(&["bdev_error_delete", "EE_m"])?;
    read.wait(LIMIT)?;
    let listed = rpc.json(&["bdev_get_bdevs"])?;
    assert_eq!(listed.as_array().map(Vec::len), Some(1), "{listed}");

    rpc.ok(&["bdev_error_create", "m"])?;
    rpc.ok(&["nvmf_subsystem_add_ns", SUBNQN, "EE_m"])?;
    rpc.ok(&pend)?;
    let _read = pending_read(&setup, &target, "abandoned")?;
    assert!(target.terminate()?.success(), "{}", target.output());
    Ok(())
}
