//! `flexblk` against a real target: every verb, and that what comes back is what went in.

use std::fs;

use anyhow::{Context, Result};
use flexblk_tests::setup::Setup;
use flexblk_tests::target::SUBNQN;
use serde_json::Value;

#[test]
fn discover_lists_the_subsystem() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let port = target.udp_port().to_string();
    let found = setup
        .flexblk(&["discover", "-a", "127.0.0.1", "--udp-port", &port, "--json"])?
        .success()?;
    let json: Value = serde_json::from_str(&found.stdout)?;
    let records = json
        .get("records")
        .and_then(Value::as_array)
        .context("records")?;
    let ours = records
        .iter()
        .find(|record| record["subnqn"] == SUBNQN)
        .context("our subsystem is listed")?;
    assert_eq!(ours["trtype"], "flexins");
    assert_eq!(ours["traddr"], "127.0.0.1");
    assert_eq!(ours["trsvcid"], "4420");
    let text = setup
        .flexblk(&["discover", "-a", "127.0.0.1", "--udp-port", &port])?
        .success()?;
    assert!(text.stdout.contains(SUBNQN), "{}", text.stdout);
    Ok(())
}

#[test]
fn info_tells_sizes_and_blocks() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M,block_size=4096", "null:1T"])?;
    let info = setup.flexblk_at(&target, "info", &["--json"])?.success()?;
    let json: Value = serde_json::from_str(&info.stdout)?;
    let namespaces = json
        .get("namespaces")
        .and_then(Value::as_array)
        .context("namespaces")?;
    assert_eq!(namespaces.len(), 2, "{json:#}");
    assert_eq!(namespaces[0]["nsid"], 1);
    assert_eq!(namespaces[0]["block_size"], 4096);
    assert_eq!(namespaces[0]["block_count"], 4096);
    assert_eq!(namespaces[1]["block_size"], 512);
    setup.flexblk_at(&target, "info", &[])?.success()?;
    Ok(())
}

#[test]
fn a_range_that_was_written_is_read_back() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let data = setup.file("in.bin", 300 << 10, 1)?;
    setup
        .flexblk_at(&target, "write", &["--offset", "1M", "-i", "in.bin"])?
        .success()?;
    setup
        .flexblk_at(
            &target,
            "read",
            &["--offset", "1M", "--length", "300k", "-o", "out.bin"],
        )?
        .success()?;
    assert!(
        fs::read(setup.path().join("out.bin"))? == data,
        "300 KiB differ"
    );
    // By blocks, a part in the middle.
    setup
        .flexblk_at(
            &target,
            "read",
            &["--lba", "2050", "--blocks", "3", "-o", "part.bin"],
        )?
        .success()?;
    assert!(fs::read(setup.path().join("part.bin"))? == data[1024..1024 + 3 * 512]);
    // Beside it nothing was touched.
    setup
        .flexblk_at(
            &target,
            "read",
            &["--offset", "0", "--length", "1M", "-o", "before.bin"],
        )?
        .success()?;
    assert!(
        fs::read(setup.path().join("before.bin"))?
            .iter()
            .all(|byte| *byte == 0)
    );
    Ok(())
}

#[test]
fn copy_moves_whole_devices_and_verifies() -> Result<()> {
    let setup = Setup::new()?;
    let data = setup.file("disk.img", 24 << 20, 2)?;
    let image = format!("file:{}", setup.path().join("disk.img").display());
    let target = setup.target(&[&image, "ram:24M"])?;
    let port = target.udp_port().to_string();
    let (image, ram) = (target.uri(1), target.uri(2));
    // Device to file, device to device, file to device.
    setup
        .flexblk(&["copy", &image, "copy.img", "--udp-port", &port, "--quiet"])?
        .success()?;
    assert!(
        fs::read(setup.path().join("copy.img"))? == data,
        "copied image differs"
    );
    setup
        .flexblk(&[
            "copy",
            &image,
            &ram,
            "--udp-port",
            &port,
            "--quiet",
            "--verify",
        ])?
        .success()?;
    setup
        .flexblk(&["copy", &ram, "back.img", "--udp-port", &port, "--quiet"])?
        .success()?;
    assert!(
        fs::read(setup.path().join("back.img"))? == data,
        "copy of the copy differs"
    );
    setup.file("small.img", 1 << 20, 3)?;
    let done = setup
        .flexblk(&[
            "copy",
            "small.img",
            &ram,
            "--udp-port",
            &port,
            "--verify",
            "--quiet",
        ])?
        .success()?;
    assert!(done.stderr.contains("SHA-256"), "{}", done.stderr);
    Ok(())
}

#[test]
fn writes_through_a_file_namespace_are_in_the_file() -> Result<()> {
    let setup = Setup::new()?;
    setup.file("disk.img", 8 << 20, 4)?;
    let image = format!("file:{}", setup.path().join("disk.img").display());
    let mut target = setup.target(&[&image])?;
    let data = setup.file("in.bin", 64 << 10, 5)?;
    setup
        .flexblk_at(&target, "write", &["--offset", "4M", "-i", "in.bin"])?
        .success()?;
    let status = target.terminate()?;
    assert!(
        status.success(),
        "clean end at SIGTERM: {status}\n{}",
        target.output()
    );
    let file = fs::read(setup.path().join("disk.img"))?;
    assert!(file[4 << 20..(4 << 20) + (64 << 10)] == data);
    Ok(())
}

#[test]
fn bench_measures_and_prints_json() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let done = setup
        .flexblk_at(
            &target,
            "bench",
            &["--iodepth", "1,16", "--time", "500ms", "--json"],
        )?
        .success()?;
    let json: Value = serde_json::from_str(&done.stdout)?;
    let text = json.to_string();
    assert!(text.contains("iops"), "{text}");
    Ok(())
}

#[test]
fn every_transport_mode_carries_data() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let data = setup.file("in.bin", 1 << 20, 6)?;
    for (number, mode) in [
        &["--tx", "header-only", "--rx", "in-cache"][..],
        &["--tx", "copy", "--rx", "ring"],
        &["--digest", "none"],
        &["--engine", "thread"],
        &["--mtu", "1024"],
        &["--mtu", "32768"],
    ]
    .iter()
    .enumerate()
    {
        let offset = format!("{number}M");
        let with = |more: &[&'static str]| -> Vec<String> {
            more.iter()
                .chain(mode.iter())
                .map(|word| (*word).to_owned())
                .collect()
        };
        let mut write = with(&["-i", "in.bin", "--offset"]);
        write.insert(3, offset.clone());
        let write: Vec<&str> = write.iter().map(String::as_str).collect();
        setup
            .flexblk_at(&target, "write", &write)?
            .success()
            .with_context(|| format!("{mode:?}"))?;
        let mut read = with(&["-o", "out.bin", "--length", "1M", "--offset"]);
        read.insert(5, offset);
        let read: Vec<&str> = read.iter().map(String::as_str).collect();
        setup
            .flexblk_at(&target, "read", &read)?
            .success()
            .with_context(|| format!("{mode:?}"))?;
        assert!(fs::read(setup.path().join("out.bin"))? == data, "{mode:?}");
    }
    Ok(())
}
