//! Debian's fio with our engine against a real target.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use flexblk_tests::fio::Fio;
use flexblk_tests::process::{find_program, run};
use flexblk_tests::setup::Setup;
use flexblk_tests::skip::without_fio;
use flexblk_tests::target::{SUBNQN, TargetOptions};

const LIMIT: Duration = Duration::from_secs(120);

/// A sequential write of the whole file, then reads that check the CRC32C of every block.
fn verify(fio: Fio) -> Fio {
    fio.option("rw", "write")
        .option("verify", "crc32c")
        .option("do_verify", 1)
        .option("verify_fatal", 1)
}

#[test]
fn the_whole_namespace_is_written_and_verified() -> Result<()> {
    if without_fio("the_whole_namespace_is_written_and_verified") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:64M"])?;
    let fio = verify(setup.fio(&target, 1, "sequential"))
        .option("bs", "64k")
        .option("iodepth", 16);
    let result = fio.success(LIMIT)?;
    assert_eq!(
        result.measured("write").bytes,
        64 << 20,
        "size comes from the namespace"
    );
    assert_eq!(result.measured("read").bytes, 64 << 20);
    let random = verify(setup.fio(&target, 1, "random"))
        .option("rw", "randwrite")
        .option("bs", "4k")
        .option("iodepth", 128);
    assert_eq!(random.success(LIMIT)?.measured("read").bytes, 64 << 20);
    Ok(())
}

#[test]
fn verify_notices_data_that_is_not_there() -> Result<()> {
    if without_fio("verify_notices_data_that_is_not_there") {
        return Ok(());
    }
    // A null device forgets what was written: a verify that passes here would pass everywhere.
    let setup = Setup::new()?;
    let target = setup.target(&["null:16M"])?;
    let (finished, _) = verify(setup.fio(&target, 1, "forgetful"))
        .option("bs", "4k")
        .run(LIMIT)?;
    assert_ne!(finished.code, Some(0));
    Ok(())
}

#[test]
fn verify_passes_while_both_sides_lose_reorder_and_corrupt_packets() -> Result<()> {
    if without_fio("verify_passes_while_both_sides_lose_reorder_and_corrupt_packets") {
        return Ok(());
    }
    const FAULT: &str = "loss=1%,reorder=1%,corrupt=0.1%,seed=7";
    let setup = Setup::new()?;
    let options = TargetOptions {
        fault: Some(FAULT.to_owned()),
        ..TargetOptions::with_devices(&["ram:64M"])
    };
    let mut target = setup.target_with(options)?;
    let counters = setup.path().join("counters");
    for (name, rw, bs, depth) in [
        ("large", "write", "128k", 8),
        ("small", "randwrite", "4k", 64),
    ] {
        let fio = verify(setup.fio(&target, 1, name))
            .option("rw", rw)
            .option("bs", bs)
            .option("iodepth", depth)
            .option("fault", FAULT)
            .option("counters_file", counters.display());
        assert_eq!(fio.success(LIMIT)?.measured("read").bytes, 64 << 20);
    }
    // The faults did happen.
    let initiator = fs::read_to_string(&counters)?;
    let sum = |name: &str| -> Result<u64> {
        let mut sum = 0;
        for line in initiator.lines() {
            let json: serde_json::Value = serde_json::from_str(line)?;
            sum += json[name]
                .as_u64()
                .with_context(|| format!("{name} in {line}"))?;
        }
        Ok(sum)
    };
    assert!(sum("retransmissions")? > 50, "{initiator}");
    assert!(sum("crc_failures")? > 5, "{initiator}");
    assert!(target.is_running());
    Ok(())
}

#[test]
fn jobs_are_threads_or_processes() -> Result<()> {
    if without_fio("jobs_are_threads_or_processes") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:64M"])?;
    for (name, thread) in [("processes", 0), ("threads", 1)] {
        let fio = verify(setup.fio(&target, 1, name))
            .option("thread", thread)
            .option("numjobs", 4)
            .option("size", "25%")
            .option("offset_increment", "25%")
            .option("bs", "16k")
            .option("iodepth", 8);
        let result = fio.success(LIMIT)?;
        assert_eq!(result.jobs().len(), 4);
        assert_eq!(result.measured("read").bytes, 64 << 20, "{name}");
    }
    Ok(())
}

#[test]
fn files_of_a_job_are_parts_of_the_namespace_or_several_namespaces() -> Result<()> {
    if without_fio("files_of_a_job_are_parts_of_the_namespace_or_several_namespaces") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M", "ram:32M,block_size=4096"])?;
    let parts = verify(setup.fio(&target, 1, "parts"))
        .option("nrfiles", 4)
        .option("bs", "4k")
        .option("iodepth", 16);
    assert_eq!(parts.success(LIMIT)?.measured("read").bytes, 16 << 20);
    let namespaces = verify(setup.fio(&target, 1, "namespaces"))
        .option("filename", "nsid=1:nsid=2")
        .option("bs", "4k")
        .option("iodepth", 16);
    assert_eq!(namespaces.success(LIMIT)?.measured("read").bytes, 48 << 20);
    Ok(())
}

#[test]
fn a_file_name_can_be_a_transport_id_or_a_uri() -> Result<()> {
    if without_fio("a_file_name_can_be_a_transport_id_or_a_uri") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let nqn = SUBNQN.replace(':', "\\:");
    let port = target.udp_port();
    for (name, file) in [
        (
            "words",
            format!(
                "trtype=flexins traddr=127.0.0.1 trsvcid=4420 subnqn={nqn} ns=1 udp_port={port}"
            ),
        ),
        (
            "uri",
            format!("nvme+flexins\\://127.0.0.1\\:4420/{nqn}?nsid=1&udp_port={port}"),
        ),
    ] {
        // A job that says nothing else about where the target is.
        let fio = find_program("fio")?;
        let mut command = Command::new(fio);
        command
            .current_dir(setup.path())
            .arg(format!("--name={name}"));
        command.arg(format!(
            "--ioengine=external:{}",
            setup.binaries().fio_engine.display()
        ));
        command
            .args(["--rw=read", "--bs=64k", "--iodepth=4"])
            .arg(format!("--filename={file}"));
        run(&mut command, LIMIT)?
            .success()
            .with_context(|| file.clone())?;
    }
    Ok(())
}

#[test]
fn two_targets_share_an_address_by_udp_port() -> Result<()> {
    if without_fio("two_targets_share_an_address_by_udp_port") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let first = setup.target(&["ram:16M"])?;
    let second = setup.target(&["ram:16M"])?;
    let file = format!(
        "udp_port={} nsid=1:udp_port={} nsid=1",
        first.udp_port(),
        second.udp_port()
    );
    let fio = verify(setup.fio(&first, 1, "both"))
        .option("filename", file)
        .option("bs", "16k")
        .option("iodepth", 8);
    assert_eq!(fio.success(LIMIT)?.measured("read").bytes, 32 << 20);
    // Each has its own data.
    for (target, seed) in [(&first, 1), (&second, 2)] {
        setup.file("in.bin", 4096, seed)?;
        setup
            .flexblk_at(target, "write", &["--offset", "0", "-i", "in.bin"])?
            .success()?;
    }
    for (target, seed) in [(&first, 1), (&second, 2)] {
        setup
            .flexblk_at(target, "read", &["--length", "4096", "-o", "out.bin"])?
            .success()?;
        assert!(fs::read(setup.path().join("out.bin"))? == flexblk_tests::setup::noise(4096, seed));
    }
    Ok(())
}

#[test]
fn trim_flush_zeroes_and_large_blocks_work() -> Result<()> {
    if without_fio("trim_flush_zeroes_and_large_blocks_work") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:64M"])?;
    // Blocks far above what one command may carry.
    let large = verify(setup.fio(&target, 1, "large"))
        .option("bs", "8M")
        .option("iodepth", 2)
        .option("end_fsync", 1);
    assert_eq!(large.success(LIMIT)?.measured("read").bytes, 64 << 20);
    let flushing = setup
        .fio(&target, 1, "flushing")
        .option("rw", "randwrite")
        .option("bs", "4k")
        .option("iodepth", 8)
        .option("fsync", 16)
        .option("size", "8M");
    let result = flushing.success(LIMIT)?;
    let syncs = result
        .jobs()
        .first()
        .and_then(|job| job.pointer("/sync/total_ios")?.as_u64())
        .unwrap_or(0);
    assert!(syncs >= 2048 / 16, "{syncs} flushes");
    let trim = setup
        .fio(&target, 1, "trim")
        .option("rw", "trim")
        .option("bs", "64k")
        .option("iodepth", 8);
    assert_eq!(trim.success(LIMIT)?.measured("trim").bytes, 64 << 20);
    setup
        .flexblk_at(&target, "read", &["--length", "8M", "-o", "trimmed.bin"])?
        .success()?;
    assert!(
        fs::read(setup.path().join("trimmed.bin"))?
            .iter()
            .all(|byte| *byte == 0),
        "trimmed RAM reads as zeroes"
    );
    // Trims and writes in turn, and a flush between.
    setup
        .fio(&target, 1, "fill")
        .option("rw", "write")
        .option("bs", "1M")
        .success(LIMIT)?;
    let zeroes = setup
        .fio(&target, 1, "zeroes")
        .option("rw", "write")
        .option("bs", "256k")
        .option("iodepth", 4)
        .option("write_mode", "zeroes")
        .option("size", "16M");
    zeroes.success(LIMIT)?;
    setup
        .flexblk_at(&target, "read", &["--length", "17M", "-o", "zeroed.bin"])?
        .success()?;
    let zeroed = fs::read(setup.path().join("zeroed.bin"))?;
    assert!(
        zeroed[..16 << 20].iter().all(|byte| *byte == 0),
        "write_mode=zeroes"
    );
    assert!(
        zeroed[16 << 20..].iter().any(|byte| *byte != 0),
        "and nothing beyond"
    );
    Ok(())
}

#[test]
fn a_rate_limited_job_is_not_held_back_by_batching() -> Result<()> {
    if without_fio("a_rate_limited_job_is_not_held_back_by_batching") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    // 200 I/Os a second at depth 32: fio sleeps 5 ms between them. An I/O that waited for the next one would take 5 ms.
    let slow = setup
        .fio(&target, 1, "slow")
        .option("rw", "randread")
        .option("bs", "4k")
        .option("iodepth", 32)
        .option("rate_iops", 200)
        .option("time_based", 1)
        .option("runtime", 3);
    let measured = slow.success(LIMIT)?.measured("read");
    assert!((150.0..250.0).contains(&measured.iops), "{measured:?}");
    assert!(measured.p50_us < 2500.0, "{measured:?}");
    let thinking = setup
        .fio(&target, 1, "thinking")
        .option("rw", "randwrite")
        .option("bs", "4k")
        .option("iodepth", 4)
        .option("thinktime", 10_000)
        .option("thinktime_blocks", 1)
        .option("time_based", 1)
        .option("runtime", 2);
    let measured = thinking.success(LIMIT)?.measured("write");
    assert!(
        measured.ios > 20 && measured.p50_us < 5000.0,
        "{measured:?}"
    );
    // Sleeps longer than a target waits for an acknowledgement.
    let sleepy = setup
        .fio(&target, 1, "sleepy")
        .option("rw", "randrw")
        .option("bs", "4k")
        .option("thinktime", 5_000_000)
        .option("thinktime_blocks", 4)
        .option("number_ios", 10);
    let result = sleepy.success(LIMIT)?;
    assert_eq!(
        result.measured("read").ios + result.measured("write").ios,
        10
    );
    Ok(())
}

#[test]
fn options_reach_the_transport() -> Result<()> {
    if without_fio("options_reach_the_transport") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let counters = setup.path().join("counters");
    let count = |name: &str, job: Fio| -> Result<u64> {
        let _ = fs::remove_file(&counters);
        verify(job)
            .option("bs", "4k")
            .option("iodepth", 32)
            .option("counters_file", counters.display())
            .success(LIMIT)?;
        let json: serde_json::Value = serde_json::from_str(fs::read_to_string(&counters)?.trim())?;
        json[name]
            .as_u64()
            .with_context(|| format!("{name} in {json}"))
    };
    let job = |name: &str| setup.fio(&target, 1, name);
    // Payload is gathered, never copied, unless a copy is asked for.
    assert_eq!(
        count(
            "payload_bytes_copied",
            job("gather").option("tx", "header-only")
        )?,
        0
    );
    assert!(
        count(
            "payload_bytes_copied",
            job("copy").option("tx", "copy").option("rx", "ring")
        )? >= 16 << 20
    );
    assert_eq!(
        count("bounced", job("registered"))?,
        0,
        "fio's buffers are registered memory"
    );
    assert_eq!(
        count("bounced", job("thread").option("engine", "thread"))?,
        0
    );
    count(
        "packets_tx",
        job("polling").flag("hipri").option("digest", "none"),
    )?;
    count("packets_tx", job("narrow").option("queue_size", 4))?;
    count("packets_tx", job("durable").flag("writefua"))?;
    Ok(())
}

#[test]
fn errors_are_told_and_fail_the_job() -> Result<()> {
    if without_fio("errors_are_told_and_fail_the_job") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M,block_size=4096"])?;
    let read = |name: &str| {
        setup
            .fio(&target, 1, name)
            .option("rw", "read")
            .option("bs", "4k")
    };
    for (told, job) in [
        ("namespace 9", read("nsid").option("nsid", 9)),
        (
            "nqn.2026-11.org.example:nothing",
            read("nqn").option("subnqn", "nqn.2026-11.org.example:nothing"),
        ),
        ("blocks of 4096 bytes", read("unaligned").option("bs", 512)),
        ("loss=2", read("fault").option("fault", "loss=2")),
        (
            "host_traddr",
            read("local").option("host_traddr", "nowhere"),
        ),
        ("header-only", read("mode").option("tx", "telepathy")),
    ] {
        let (finished, _) = job.run(LIMIT)?;
        assert_eq!(finished.code, Some(1), "{told}: {finished:?}");
        let text = format!("{}{}", finished.stdout, finished.stderr);
        assert!(text.contains(told), "{told:?} is not in:\n{text}");
    }
    Ok(())
}

#[test]
fn a_fio_of_unknown_layout_is_refused_in_one_line() -> Result<()> {
    if without_fio("a_fio_of_unknown_layout_is_refused_in_one_line") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let fio = fs::read(find_program("fio")?)?;
    let version = run(Command::new(find_program("fio")?).arg("--version"), LIMIT)?
        .success()?
        .stdout;
    let version = version.trim();
    // The same fio under other names: one that does not exist, and one that exists with another layout.
    let other = if version == "fio-3.36" {
        "fio-3.42"
    } else {
        "fio-3.36"
    };
    for (name, told) in [
        (
            "fio-3.99",
            "fio-3.99 is not supported; use one of fio 3.28 to 3.42",
        ),
        (other, "is not as released"),
    ] {
        let changed = replace(
            &fio,
            format!("{version}\0").as_bytes(),
            format!("{name}\0").as_bytes(),
        )
        .with_context(|| format!("{version} is not in the program once"))?;
        let path = setup.path().join(name);
        fs::write(&path, changed)?;
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let mut command = Command::new(&path);
        command.args(["--name=refused", "--rw=read", "--size=4k"]);
        command.arg(format!(
            "--ioengine=external:{}",
            setup.binaries().fio_engine.display()
        ));
        let finished = run(command.current_dir(setup.path()), LIMIT)?;
        assert_eq!(finished.code, Some(1), "{finished:?}");
        let text = format!("{}{}", finished.stdout, finished.stderr);
        assert_eq!(
            text.lines()
                .filter(|line| line.starts_with("flexblk: ") && line.contains(told))
                .count(),
            1,
            "{text}"
        );
    }
    Ok(())
}

/// `text` with the only `from` in it replaced by `to`, which is as long.
fn replace(text: &[u8], from: &[u8], to: &[u8]) -> Option<Vec<u8>> {
    let mut found = text
        .windows(from.len())
        .enumerate()
        .filter(|(_, window)| *window == from)
        .map(|(at, _)| at);
    let at = found.next()?;
    if found.next().is_some() || from.len() != to.len() {
        return None;
    }
    let mut changed = text.to_vec();
    changed.get_mut(at..at + to.len())?.copy_from_slice(to);
    Some(changed)
}

#[test]
fn option_names_are_none_of_fios_own() -> Result<()> {
    if without_fio("option_names_are_none_of_fios_own") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let engine = setup.binaries().fio_engine.display();
    let ours = run(
        Command::new(find_program("fio")?).arg(format!("--enghelp={engine}")),
        LIMIT,
    )?
    .success()?
    .stdout;
    let names = |text: &str| -> Vec<String> {
        text.lines()
            .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
            .filter(|n| !n.is_empty())
            .collect()
    };
    let ours = names(&ours);
    assert!(
        ours.len() > 20 && ours.iter().any(|name| name == "traddr"),
        "{ours:?}"
    );
    let fios = names(
        &run(Command::new(find_program("fio")?).arg("--cmdhelp"), LIMIT)?
            .success()?
            .stdout,
    );
    assert!(fios.len() > 100, "{}", fios.len());
    for name in &ours {
        assert!(!fios.contains(name), "{name} is an option of fio itself");
    }
    Ok(())
}

#[test]
fn the_sample_job_files_run() -> Result<()> {
    if without_fio("the_sample_job_files_run") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let first = setup.target(&["ram:64M"])?;
    let second = setup.target(&["ram:64M"])?;
    let examples = flexblk_tests::binaries::workspace().join("fio-plugins/examples");
    let mut ran = 0;
    for entry in fs::read_dir(examples)? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?
            .replace("udp_port=4791", &format!("udp_port={}", first.udp_port()))
            .replace("udp_port=4792", &format!("udp_port={}", second.udp_port()))
            .replace(
                "traddr=127.0.0.1\n",
                &format!("traddr=127.0.0.1\nudp_port={}\n", first.udp_port()),
            )
            .replace("runtime=10", "runtime=1");
        let job = setup.path().join("job.fio");
        fs::write(&job, text)?;
        let mut command = Command::new(find_program("fio")?);
        command
            .current_dir(setup.path())
            .env("FLEXBLK_FIO", &setup.binaries().fio_engine)
            .arg(&job);
        run(&mut command, LIMIT)?
            .success()
            .with_context(|| format!("{}", path.display()))?;
        ran += 1;
    }
    assert!(ran >= 6, "{ran} job files");
    Ok(())
}
