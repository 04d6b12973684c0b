//! `flexblk` against a real target: every verb, and that what comes back is what went in.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use flexblk_tests::attachment::system;
use flexblk_tests::process::is_root;
use flexblk_tests::setup::{Setup, noise};
use flexblk_tests::skip;
use flexblk_tests::target::{SUBNQN, TargetOptions};
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

/// 8 MiB, of which every other MiB is zeroes, as a namespace.
fn half_empty(setup: &Setup) -> Result<(Vec<u8>, String)> {
    let mut data = noise(8 << 20, 21);
    for (number, part) in data.chunks_mut(1 << 20).enumerate() {
        if number % 2 == 1 {
            part.fill(0);
        }
    }
    let image = setup.path().join("half-empty.img");
    fs::write(&image, &data)?;
    Ok((data, format!("file:{}", image.display())))
}

/// A loop device, released when it is dropped.
struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path) -> Result<Loop> {
        let made = system(
            "losetup",
            &["--find", "--show", &file.display().to_string()],
        )?;
        Ok(Loop(made.stdout.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        drop(system("losetup", &["-d", &self.0.display().to_string()]));
    }
}

#[test]
fn a_sparse_copy_leaves_no_old_data_in_a_file() -> Result<()> {
    let setup = Setup::new()?;
    let (data, image) = half_empty(&setup)?;
    let target = setup.target(&[&image])?;
    let port = target.udp_port().to_string();
    let uri = target.uri(1);
    let copy = |to: &str, arguments: &[&str]| {
        let all = ["copy", &uri, to, "--udp-port", &port, "--quiet", "--sparse"];
        setup.flexblk(&[&all, arguments].concat())
    };
    // The old data end in the middle of what is copied.
    let mut expected = setup.file("old.img", 6 << 20, 22)?;
    let done = copy("old.img", &["--seek", "1M", "--verify"])?.success()?;
    ensure!(done.stderr.contains("4.00 MiB of them"), "{}", done.stderr);
    expected.truncate(1 << 20);
    expected.extend_from_slice(&data);
    ensure!(fs::read(setup.path().join("old.img"))? == expected);

    copy("new.img", &["--verify"])?.success()?;
    ensure!(fs::read(setup.path().join("new.img"))? == data);
    // To a pipe they are written.
    let piped = setup.path().join("piped.img");
    let command = format!(
        "{} copy {uri} - --udp-port {port} --quiet --sparse > {}",
        setup.binaries().flexblk.display(),
        piped.display()
    );
    let done = system("sh", &["-c", &command])?;
    ensure!(done.stderr.contains(" 0 B of them"), "{}", done.stderr);
    ensure!(fs::read(piped)? == data);
    Ok(())
}

#[test]
fn a_copy_to_a_block_device_is_whole_and_durable() -> Result<()> {
    const TEST: &str = "a_copy_to_a_block_device_is_whole_and_durable";
    if !is_root() || !Path::new("/dev/loop-control").exists() {
        skip::note(TEST, "needs root and loop devices");
        return Ok(());
    }
    let setup = Setup::new()?;
    let (data, image) = half_empty(&setup)?;
    let target = setup.target(&[&image, "ram:16M"])?;
    let port = target.udp_port().to_string();
    let old = setup.file("old.img", 9 << 20, 23)?;
    let old_img = setup.path().join("old.img");
    let device = Loop::over(&old_img)?;
    let to = device.0.display().to_string();
    let copy = |nsid: u32, arguments: &[&str]| {
        let uri = target.uri(nsid);
        let all = [
            "copy",
            &uri,
            &to,
            "--udp-port",
            &port,
            "--quiet",
            "--sparse",
        ];
        setup.flexblk(&[&all, arguments].concat())
    };
    // As long as somebody has it open, closing it writes nothing back.
    let held = File::open(&device.0)?;
    let too_long = copy(2, &[])?;
    ensure!(too_long.code == Some(5), "{too_long:?}");
    ensure!(too_long.stderr.contains("do not fit"), "{too_long:?}");
    ensure!(fs::read(&old_img)? == old, "nothing was to be touched");
    copy(1, &["--seek", "1M", "--verify"])?.success()?;
    let found = fs::read(&old_img)?;
    ensure!(found.get(..1 << 20) == old.get(..1 << 20));
    ensure!(
        found.get(1 << 20..) == Some(&data),
        "the device is not what was copied"
    );
    drop(held);
    Ok(())
}

#[test]
fn a_copy_that_cannot_be_touches_nothing() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let port = target.udp_port().to_string();
    let uri = target.uri(1);
    let old = setup.file("old.img", 64 << 10, 24)?;
    let wrong = |from: &str, to: &str, arguments: &[&str], code: i32, says: &str| -> Result<()> {
        let all = ["copy", from, to, "--udp-port", &port, "--quiet"];
        let finished = setup.flexblk(&[&all, arguments].concat())?;
        ensure!(finished.code == Some(code), "{finished:?}");
        ensure!(finished.stderr.contains(says), "{}", finished.stderr);
        Ok(())
    };
    wrong(&uri, "old.img", &["--length", "1G"], 5, "beyond its end")?;
    let huge = u64::MAX.to_string();
    wrong(&uri, "old.img", &["--seek", &huge], 5, "do not fit")?;
    wrong(&uri, "-", &["--seek", "1M"], 2, "--seek does not work")?;
    let read = ["--offset", "15M", "--length", "2M", "-o", "old.img"];
    let read = setup.flexblk_at(&target, "read", &read)?;
    ensure!(read.code == Some(5), "{read:?}");
    ensure!(fs::read(setup.path().join("old.img"))? == old);
    // Forwards into itself it would read what it has written.
    let forwards = ["--seek", "64k", "--length", "1M"];
    wrong(&uri, &uri, &forwards, 2, "are one namespace")?;
    Ok(())
}

#[test]
fn a_copy_within_a_namespace_moves_it() -> Result<()> {
    let setup = Setup::new()?;
    let data = setup.file("disk.img", 8 << 20, 25)?;
    let image = format!("file:{}", setup.path().join("disk.img").display());
    // With queues shorter than the copy would like.
    let extra = "max_queue_entries = 32".into();
    let target = setup.target_with(TargetOptions {
        extra,
        ..TargetOptions::with_devices(&[&image])
    })?;
    let port = target.udp_port().to_string();
    let uri = target.uri(1);
    let copy = ["copy", &uri, &uri, "--udp-port", &port, "--quiet"];
    let arguments = ["--iodepth", "512", "--bs", "4k", "--skip", "64k"];
    let back = ["--seek", "0", "--verify"];
    setup
        .flexblk(&[&copy[..], &arguments, &back].concat())?
        .success()?;
    let mut expected = data[64 << 10..].to_vec();
    expected.extend_from_slice(&data[(8 << 20) - (64 << 10)..]);
    ensure!(fs::read(setup.path().join("disk.img"))? == expected);
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

/// nvme-cli's verbs: what they print is what the target is and has counted.
#[test]
fn administrators_see_what_is() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M,block_size=4096", "ram:8M,block_size=4096"])?;
    let json = |verb: &str, more: &[&str]| -> Result<Value> {
        let arguments: Vec<&str> = more.iter().copied().chain(["-o", "json"]).collect();
        let done = setup.flexblk_at(&target, verb, &arguments)?.success()?;
        setup.flexblk_at(&target, verb, more)?.success()?;
        Ok(serde_json::from_str(&done.stdout)?)
    };
    let id = json("id-ctrl", &[])?;
    assert_eq!(id["subnqn"], SUBNQN);
    assert_eq!(
        (&id["nn"], &id["fuses"], &id["ocfs"]),
        (&1024.into(), &1.into(), &5.into())
    );
    // Everything that nvme-cli has.
    for key in [
        "rtd3r", "fguid", "wctemp", "sanicap", "domainid", "maxdna", "icsvscc",
    ] {
        assert!(id.get(key).is_some(), "{key} in {id:#}");
    }
    let states = id["psds"].as_array().context("power states")?;
    assert_eq!(
        Some(states.len() as u64),
        id["npss"].as_u64().map(|npss| npss + 1)
    );
    let text = setup.flexblk_at(&target, "id-ctrl", &[])?.success()?.stdout;
    let version = id["ver"].as_u64().context("ver")?;
    assert!(
        text.contains(&format!("\nver       : {version:#x}\n")),
        "{text}"
    );
    let id = json("id-ns", &[])?;
    assert_eq!(id["nulbaf"], 0);
    assert_eq!(
        (&id["nsze"], &id["lbafs"][0]["ds"]),
        (&4096.into(), &12.into())
    );
    let ana = json("ana-log", &[])?;
    assert_eq!(ana["ANA DESC LIST "][0]["state"], "optimized");
    assert_eq!(ana["ANA DESC LIST "][0]["nnsids"], 2);

    setup.file("in.bin", 8 << 10, 1)?;
    setup
        .flexblk_at(&target, "write", &["--lba", "0", "-i", "in.bin"])?
        .success()?;
    let smart = json("smart-log", &[])?;
    assert_eq!(
        (&smart["host_write_commands"], &smart["media_errors"]),
        (&1.into(), &0.into())
    );
    // Two ranges in the other order; then the source cannot be read any more.
    setup
        .flexblk_at(
            &target,
            "nvme-copy",
            &["--sdlba", "100", "--slbs", "1,0", "--blocks", "0,0"],
        )?
        .success()?;
    setup
        .flexblk_at(&target, "write-uncor", &["--start-block", "0", "-c", "1"])?
        .success()?;
    setup
        .flexblk_at(
            &target,
            "read",
            &["--lba", "100", "--blocks", "2", "-o", "out.bin"],
        )?
        .success()?;
    let (written, copied) = (
        fs::read(setup.path().join("in.bin"))?,
        fs::read(setup.path().join("out.bin"))?,
    );
    assert!(copied[..4096] == written[4096..] && copied[4096..] == written[..4096]);
    let failed = setup.flexblk_at(
        &target,
        "read",
        &["--lba", "0", "--blocks", "1", "-o", "out.bin"],
    )?;
    assert!(
        failed.stderr.contains("Unrecovered Read Error"),
        "{}",
        failed.stderr
    );
    assert_eq!(json("smart-log", &[])?["media_errors"], 1);

    let errors = setup
        .flexblk_at(&target, "error-log", &["-e", "4", "-o", "json"])?
        .success()?;
    let errors: Value = serde_json::from_str(&errors.stdout)?;
    assert_eq!(
        errors["errors"].as_array().map(Vec::len),
        Some(0),
        "a new controller's own log"
    );
    Ok(())
}

/// Reservations through the command line: the host stays registered although each command is a
/// connection of its own.
#[test]
fn reservations_from_the_command_line() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let run = |verb: &str, more: &[&str]| setup.flexblk_at(&target, verb, more);
    run("resv-register", &["--nrkey", "0xabc"])?.success()?;
    run("resv-acquire", &["--crkey", "0xabc", "--rtype", "2"])?.success()?;
    let report = run("resv-report", &["-o", "json"])?.success()?;
    let report: Value = serde_json::from_str(&report.stdout)?;
    assert_eq!(
        (&report["rtype"], &report["regctl"]),
        (&2.into(), &1.into())
    );
    assert_eq!(report["regctlext"][0]["rkey"], 0xabc);
    assert_eq!(report["regctlext"][0]["rcsts"], 1);
    let other = [
        "-q",
        "nqn.2026-11.test:other",
        "-I",
        "11111111-2222-3333-4444-555555555555",
    ];
    let read: Vec<&str> = ["--lba", "0", "--blocks", "1"]
        .into_iter()
        .chain(other)
        .collect();
    let refused = run("read", &read)?;
    assert!(
        refused.stderr.contains("Reservation Conflict"),
        "{}",
        refused.stderr
    );
    run("resv-release", &["--crkey", "0xabc", "--rtype", "2"])?.success()?;
    run("read", &read)?.success()?;
    run("resv-register", &["--crkey", "0xabc", "--rrega", "1"])?.success()?;
    Ok(())
}

#[test]
fn list_shows_subsystems_with_namespaces() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M,block_size=4096"])?;
    let port = target.udp_port().to_string();
    let arguments = ["list", "-a", "127.0.0.1", "--udp-port", &port];
    let text = setup.flexblk(&arguments)?.success()?;
    assert!(text.stdout.contains(SUBNQN), "{}", text.stdout);
    let json: Vec<&str> = arguments.into_iter().chain(["-o", "json"]).collect();
    let found: Value = serde_json::from_str(&setup.flexblk(&json)?.success()?.stdout)?;
    let namespace = &found["Subsystems"][0]["Namespaces"][0];
    assert_eq!(
        (&namespace["NSID"], &namespace["PhysicalSize"]),
        (&1.into(), &(16 << 20).into())
    );
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

/// The commands that nvme-cli has for blocks, each with an effect that another can see.
#[test]
fn block_commands_do_what_they_say() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let data = setup.file("in.bin", 8 << 10, 5)?;
    setup
        .flexblk_at(&target, "write", &["--lba", "8", "-i", "in.bin"])?
        .success()?;
    let at_8 = ["--start-block", "8", "--block-count", "15"];
    let compare = |file: &str| {
        let mut arguments = at_8.to_vec();
        arguments.extend(["--data", file]);
        setup.flexblk_at(&target, "compare", &arguments)
    };
    compare("in.bin")?.success()?;
    let mut other = data.clone();
    other[5000] ^= 1;
    fs::write(setup.path().join("other.bin"), &other)?;
    let differs = compare("other.bin")?;
    assert_eq!(differs.code, Some(7), "{}", differs.stderr);
    assert!(
        differs.stderr.contains("blocks 8 to 23"),
        "{}",
        differs.stderr
    );
    setup.flexblk_at(&target, "flush", &[])?.success()?;
    setup.flexblk_at(&target, "verify", &at_8)?.success()?;
    // Two of the sixteen blocks are deallocated, and read as zeroes then; the others keep their data.
    let ranges = ["--slbs", "8,23", "--blocks", "1,1", "--ad"];
    setup.flexblk_at(&target, "dsm", &ranges)?.success()?;
    other.copy_from_slice(&data);
    other[..512].fill(0);
    other[8192 - 512..].fill(0);
    fs::write(setup.path().join("other.bin"), &other)?;
    compare("other.bin")?.success()?;
    setup
        .flexblk_at(&target, "write-zeroes", &at_8)?
        .success()?;
    compare("/dev/zero")?.success()?;
    let beyond = ["--start-block", "32768"];
    let refused = setup.flexblk_at(&target, "verify", &beyond)?;
    assert_eq!(refused.code, Some(6), "{}", refused.stderr);
    assert_eq!(
        refused.stderr.matches("LBA Out of Range").count(),
        1,
        "{}",
        refused.stderr
    );
    Ok(())
}

#[test]
fn show_regs_shows_a_ready_controller() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let shown = setup
        .flexblk_at(&target, "show-regs", &["-o", "json"])?
        .success()?;
    let json: Value = serde_json::from_str(&shown.stdout)?;
    assert_eq!(json["csts"], 1, "{json}");
    assert_eq!(json["cc"].as_u64().map(|cc| cc & 1), Some(1), "{json}");
    Ok(())
}
