//! The real programs over NVMe/TCP: `flexblk` and fio against `flexblk-target`.

use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flexblk_tests::process::eventually;
use flexblk_tests::setup::Setup;
use flexblk_tests::skip::without_fio;
use flexblk_tests::target::{Target, TargetOptions};

/// A target with an NVMe/TCP listener on a free port, and the URI that it prints.
fn target_and_uri(setup: &Setup) -> Result<(Target, String)> {
    target_with(setup, "")
}

/// One with more lines in its `[tcp]` table.
fn target_with(setup: &Setup, more: &str) -> Result<(Target, String)> {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let target = setup.target_with(TargetOptions {
        extra: format!("[tcp]\naddress = \"{free}\"\n{more}\n"),
        ..TargetOptions::with_devices(&["ram:64M"])
    })?;
    let uri = || {
        target
            .output()
            .split_whitespace()
            .find(|word| word.starts_with("nvme+tcp://"))
            .map(str::to_owned)
    };
    eventually("it says where it is", Duration::from_secs(10), || {
        uri().is_some()
    })?;
    let uri = uri().context("a URI")?;
    Ok((target, uri))
}

fn port_of(uri: &str) -> Result<&str> {
    let (_, rest) = uri.split_once("127.0.0.1:").context("a port")?;
    rest.split('/').next().context("a path")
}

#[test]
fn the_command_line_finds_copies_and_verifies() -> Result<()> {
    let setup = Setup::new()?;
    let (_target, uri) = target_and_uri(&setup)?;
    let port = port_of(&uri)?;
    let found = setup
        .flexblk(&["discover", "-t", "tcp", "-a", "127.0.0.1", "-s", port])?
        .success()?;
    ensure!(
        found.stdout.contains("tcp") && found.stdout.contains(port),
        "{}",
        found.stdout
    );
    setup.file("image", 5 << 20, 7)?;
    for digests in [&[][..], &["-g", "-G"]] {
        let mut arguments = vec!["copy", "image", &uri, "--verify", "--quiet"];
        arguments.extend(digests);
        setup.flexblk(&arguments)?.success()?;
    }
    setup
        .flexblk(&["copy", &uri, "back", "--length", "5M", "--quiet"])?
        .success()?;
    let read = |name: &str| std::fs::read(setup.path().join(name));
    ensure!(read("image")? == read("back")?, "the copies differ");
    Ok(())
}

#[test]
fn fio_writes_and_verifies() -> Result<()> {
    if without_fio("fio_writes_and_verifies") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let (target, uri) = target_and_uri(&setup)?;
    for (name, block, digest) in [
        ("plain", "4k", None),
        ("large", "256k", None),
        ("data", "16k", Some("data_digest")),
        ("header", "4k", Some("hdr_digest")),
    ] {
        let mut fio = setup
            .fio(&target, 1, name)
            .option("trtype", "tcp")
            .option("trsvcid", port_of(&uri)?)
            .option("rw", "randwrite")
            .option("bs", block)
            .option("iodepth", 64)
            .option("verify", "crc32c")
            .option("do_verify", 1)
            .option("verify_fatal", 1);
        if let Some(digest) = digest {
            fio = fio.flag(digest);
        }
        let result = fio.success(Duration::from_secs(120))?;
        assert_eq!(result.measured("read").bytes, 64 << 20, "{name}");
    }
    Ok(())
}

#[test]
fn zero_copy_sends_end_where_the_kernel_copies_after_all() -> Result<()> {
    let setup = Setup::new()?;
    let (mut target, uri) = target_with(&setup, "zerocopy_threshold = 4096")?;
    setup.file("image", 8 << 20, 11)?;
    setup
        .flexblk(&["copy", "image", &uri, "--verify", "--quiet"])?
        .success()?;
    setup
        .flexblk(&["copy", &uri, "back", "--length", "8M", "--quiet"])?
        .success()?;
    let read = |name: &str| std::fs::read(setup.path().join(name));
    ensure!(read("image")? == read("back")?, "the copies differ");
    ensure!(target.terminate()?.success(), "{}", target.output());
    let output = target.output();
    let last = output.lines().rfind(|line| line.starts_with('{'));
    let last: serde_json::Value = serde_json::from_str(last.context("statistics at the end")?)?;
    let counter = |name: &str| last["counters"][name].as_u64().context(name.to_owned());
    let (sends, copied) = (
        counter("tcp_zerocopy_sends")?,
        counter("tcp_zerocopy_copied")?,
    );
    // What stays on this machine is always copied; each connection finds out once, with what it has under way then.
    ensure!(copied > 0 && copied == sends, "{copied} of {sends}");
    ensure!(sends < counter("tcp_sends")? / 2, "{sends} zero-copy sends");
    Ok(())
}
