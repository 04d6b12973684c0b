//! `flexblk attach`: real file systems on real block devices of this machine, and every way in which they can end.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flexblk_rpc::RpcClient;
use flexblk_tests::attachment::{Attachment, system, unavailable};
use flexblk_tests::ports::free_udp_port;
use flexblk_tests::process::{Process, eventually, find_program, run};
use flexblk_tests::setup::Setup;
use flexblk_tests::skip;
use flexblk_tests::target::{SUBNQN, Target, TargetOptions};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

/// `detach` never takes longer.
const BOUND: Duration = Duration::from_secs(5);
/// What fio has to be through within.
const LOAD_LIMIT: Duration = Duration::from_secs(60);

/// A tree of real files: this repository's sources.
fn tree() -> &'static Path {
    flexblk_tests::binaries::workspace()
}

/// Copies some of the tree.
fn copy_tree(to: &Path) -> Result<()> {
    for folder in ["initiator", "nvme", "transport", "docs"] {
        let from = tree().join(folder).display().to_string();
        system("cp", &["-r", &from, &to.display().to_string()])?;
    }
    Ok(())
}

/// What is there is what was copied.
fn compare_tree(with: &Path) -> Result<()> {
    for folder in ["initiator", "nvme", "transport", "docs"] {
        let (from, to) = (tree().join(folder), with.join(folder));
        let (from, to) = (from.display().to_string(), to.display().to_string());
        system("diff", &["-r", &from, &to])?;
    }
    Ok(())
}

fn signal(process: u32, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(process)?).context("a process id")?;
    Ok(kill_process(pid, signal)?)
}

fn kill(process: u32) -> Result<()> {
    signal(process, Signal::KILL)
}

/// Bytes of a file that is written through a device's cache.
const WRITTEN: usize = 8 << 20;

/// Writes a file of noise through the device's cache, and nobody syncs.
fn write_through_cache(setup: &Setup, attached: &Attachment, seed: u64) -> Result<Vec<u8>> {
    let data = setup.file("noise", WRITTEN, seed)?;
    let from = format!("if={}", setup.path().join("noise").display());
    let to = format!("of={}", attached.device_text());
    system("dd", &[&from, &to, "bs=1M", "conv=notrunc"])?;
    Ok(data)
}

/// The target has it.
fn ensure_on_namespace(setup: &Setup, target: &Target, data: &[u8]) -> Result<()> {
    let length = data.len().to_string();
    let read = ["-N", "1", "--length", &length, "-o", "read"];
    setup.flexblk_at(target, "read", &read)?.success()?;
    let found = fs::read(setup.path().join("read"))?;
    let same = found.iter().zip(data).take_while(|(a, b)| a == b).count();
    ensure!(found == data, "{same} of {length} B are on the namespace");
    Ok(())
}

/// mkfs, mount, copy, unmount, check, mount again, compare.
fn file_system(test: &str, make: &[&str], check: &[&str], size: &str) -> Result<()> {
    if unavailable(test) {
        return Ok(());
    }
    let (Some((make, make_arguments)), Some((check, check_arguments))) =
        (make.split_first(), check.split_first())
    else {
        return Ok(());
    };
    if find_program(make).is_err() || find_program(check).is_err() {
        skip::note(test, &format!("{make} is not installed"));
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&[&format!("ram:{size}")])?;
    let name = Attachment::unique_name(make);
    let mut attached = Attachment::new(setup.binaries(), &target, &name, &[])?;
    let device = attached.device_text();
    let place = setup.path().join("mnt");
    system(make, &[make_arguments, &[&device]].concat())?;
    attached.mount(&place)?;
    copy_tree(&place)?;
    attached.unmount(BOUND)?.success()?;
    system(check, &[check_arguments, &[&device]].concat())?;
    attached.mount(&place)?;
    compare_tree(&place)?;
    let refused = attached.detach(&[])?;
    ensure!(refused.code == Some(1), "{refused:?}");
    ensure!(refused.stderr.contains("mounted on"), "{}", refused.stderr);
    ensure!(refused.stderr.lines().count() == 1, "{}", refused.stderr);
    attached.unmount(BOUND)?.success()?;
    attached.detach(&[])?.success()?;
    attached.check_gone()
}

#[test]
fn ext4_on_an_attached_namespace() -> Result<()> {
    file_system(
        "ext4_on_an_attached_namespace",
        &["mkfs.ext4", "-qF"],
        &["fsck.ext4", "-fn"],
        "64M",
    )
}

#[test]
fn xfs_on_an_attached_namespace() -> Result<()> {
    file_system(
        "xfs_on_an_attached_namespace",
        &["mkfs.xfs", "-q"],
        &["xfs_repair", "-n"],
        "320M",
    )
}

#[test]
fn fio_finds_what_it_wrote() -> Result<()> {
    const TEST: &str = "fio_finds_what_it_wrote";
    if unavailable(TEST) || skip::without_fio(TEST) {
        return Ok(());
    }
    let setup = Setup::new()?;
    for (device, threads) in [("ram:64M", "1"), ("ram:64M,block_size=4096", "2")] {
        let target = setup.target(&[device])?;
        let name = Attachment::unique_name("fio");
        let attached = Attachment::new(
            setup.binaries(),
            &target,
            &name,
            &["--nr-io-queues", threads],
        )?;
        let file = format!("--filename={}", attached.device_text());
        let job = [
            "--name=verify",
            &file,
            "--ioengine=io_uring",
            "--direct=1",
            "--rw=randrw",
            "--bsrange=4k-1m",
            "--iodepth=32",
            "--size=64m",
            "--verify=crc32c",
            "--verify_state_save=0",
        ];
        system("fio", &job)?;
        system(
            "fio",
            &[&job[..], &["--rw=randtrim", "--verify=0"]].concat(),
        )?;
        let mut zeroes = [0xFF; 4096];
        rustix::io::read(fs::File::open(attached.device())?, &mut zeroes)?;
        ensure!(zeroes == [0; 4096], "what was discarded reads as zeroes");
        let listed = attached.listed()?;
        ensure!(listed["Errors"] == 0, "{listed}");
        ensure!(listed["BytesWritten"].as_u64() > Some(1 << 20), "{listed}");
        attached.detach(&[])?.success()?;
        attached.check_gone()?;
    }
    Ok(())
}

#[test]
fn twenty_times_leave_nothing_behind() -> Result<()> {
    if unavailable("twenty_times_leave_nothing_behind") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let descriptors =
        || -> Result<usize> { Ok(fs::read_dir(format!("/proc/{}/fd", target.id()))?.count()) };
    let name = Attachment::unique_name("twenty");
    let mut before = 0;
    for cycle in 0..20 {
        let attached = Attachment::new(setup.binaries(), &target, &name, &[])?;
        let device = attached.device_text();
        let of = format!("of={device}");
        system(
            "dd",
            &["if=/dev/zero", &of, "bs=64k", "count=16", "conv=fsync"],
        )?;
        // By name, by device, by link.
        let link = format!("/dev/flexblk/{name}");
        let what = [&name, &device, &link][cycle % 3];
        setup.flexblk(&["detach", what])?.success()?;
        attached.check_gone()?;
        if cycle == 0 {
            before = descriptors()?;
        }
    }
    eventually("the target has no more open than before", BOUND, || {
        descriptors().is_ok_and(|now| now <= before)
    })?;
    Ok(())
}

#[test]
fn what_a_killed_process_leaves_is_removed() -> Result<()> {
    if unavailable("what_a_killed_process_leaves_is_removed") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:64M"])?;
    let name = Attachment::unique_name("killed");
    let attached = Attachment::new(setup.binaries(), &target, &name, &[])?;
    kill(attached.process())?;
    eventually("it is known as killed", BOUND, || {
        attached
            .listed()
            .is_ok_and(|entry| entry["State"] == "killed")
    })?;
    let detached = attached.detach(&[])?.success()?;
    ensure!(detached.took < BOUND, "{:?}", detached.took);
    attached.check_gone()?;

    // The next one takes the place of a killed one by itself.
    let killed = Attachment::new(setup.binaries(), &target, &name, &[])?;
    kill(killed.process())?;
    eventually("it is known as killed", BOUND, || {
        killed
            .listed()
            .is_ok_and(|entry| entry["State"] == "killed")
    })?;
    let next = Attachment::new(setup.binaries(), &target, &name, &[])?;
    ensure!(next.listed()?["State"] == "live");
    next.detach(&[])?.success()?;
    next.check_gone()
}

#[test]
fn a_process_killed_under_a_mounted_file_system() -> Result<()> {
    if unavailable("a_process_killed_under_a_mounted_file_system") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:64M"])?;
    let name = Attachment::unique_name("mounted");
    let mut attached = Attachment::new(setup.binaries(), &target, &name, &[])?;
    system("mkfs.ext4", &["-qF", &attached.device_text()])?;
    let place = setup.path().join("mnt");
    attached.mount(&place)?;
    fs::write(place.join("file"), vec![7; 1 << 20])?;
    kill(attached.process())?;
    // Errors, but no hanging.
    let sync = run(
        Command::new(find_program("sync")?).arg("-f").arg(&place),
        BOUND,
    )?;
    ensure!(sync.code != Some(0), "{sync:?}");
    let refused = attached.detach(&[])?;
    ensure!(refused.stderr.contains("mounted on"), "{}", refused.stderr);
    let forced = attached.detach(&["--force"])?.success()?;
    ensure!(forced.took < BOUND, "{:?}", forced.took);
    ensure!(forced.stderr.contains("mounted on"), "{}", forced.stderr);
    attached.unmount(BOUND)?;
    attached.check_gone()
}

#[test]
fn a_target_that_is_dead_for_ever_wedges_nothing() -> Result<()> {
    if unavailable("a_target_that_is_dead_for_ever_wedges_nothing") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let mut target = setup.target(&["ram:64M"])?;
    let name = Attachment::unique_name("dead");
    let time = ["--policy", "fail", "--fast_io_fail_tmo", "2"];
    let mut attached = Attachment::new(setup.binaries(), &target, &name, &time)?;
    system("mkfs.ext4", &["-qF", &attached.device_text()])?;
    let place = setup.path().join("mnt");
    attached.mount(&place)?;
    fs::write(place.join("file"), vec![7; 4 << 20])?;
    target.kill()?;
    let started = Instant::now();
    let sync = run(
        Command::new(find_program("sync")?).arg("-f").arg(&place),
        Duration::from_secs(10),
    )?;
    ensure!(sync.code != Some(0), "{sync:?}");
    println!("I/O failed after {:?}", started.elapsed());
    let unmounted = attached.unmount(BOUND)?;
    println!("unmounted after {:?}", unmounted.took);
    let detached = attached.detach(&[])?.success()?;
    println!("detached after {:?}", detached.took);
    ensure!(detached.took < BOUND, "{:?}", detached.took);
    attached.check_gone()
}

#[test]
fn detach_waits_for_no_io() -> Result<()> {
    const TEST: &str = "detach_waits_for_no_io";
    if unavailable(TEST) {
        return Ok(());
    }
    let setup = Setup::new()?;
    let mut target = setup.target(&["ram:64M"])?;
    let name = Attachment::unique_name("outstanding");
    // I/O waits for a path, for ten minutes.
    let attached = Attachment::new(setup.binaries(), &target, &name, &["--policy", "queue"])?;
    target.kill()?;
    let mut reader = attached.read_block("dd", setup.path())?;
    std::thread::sleep(Duration::from_millis(300));
    let refused = attached.detach(&[])?;
    ensure!(refused.stderr.contains("open in dd"), "{}", refused.stderr);
    let forced = attached.detach(&["--force"])?.success()?;
    println!("detached after {:?}", forced.took);
    ensure!(forced.took < BOUND, "{:?}", forced.took);
    ensure!(!reader.wait(BOUND)?.success(), "the read failed");
    attached.check_gone()
}

#[test]
fn what_was_written_without_a_sync_is_there_after_the_end() -> Result<()> {
    if unavailable("what_was_written_without_a_sync_is_there_after_the_end") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:64M"])?;
    let name = Attachment::unique_name("unsynced");
    for (seed, options) in [(1, &[][..]), (2, &["--no-partitions"])] {
        let attached = Attachment::new(setup.binaries(), &target, &name, options)?;
        let data = write_through_cache(&setup, &attached, seed)?;
        let detached = attached.detach(&[])?.success()?;
        ensure!(detached.stderr.is_empty(), "{}", detached.stderr);
        attached.check_gone()?;
        ensure_on_namespace(&setup, &target, &data)?;
    }
    let attached = Attachment::new(setup.binaries(), &target, &name, &[])?;
    let data = write_through_cache(&setup, &attached, 3)?;
    attached.detach(&["--lazy"])?.success()?;
    attached.check_gone()?;
    ensure_on_namespace(&setup, &target, &data)?;

    let attached = Attachment::new(setup.binaries(), &target, &name, &[])?;
    let data = write_through_cache(&setup, &attached, 4)?;
    signal(attached.process(), Signal::TERM)?;
    attached.check_gone()?;
    ensure_on_namespace(&setup, &target, &data)
}

#[test]
fn a_process_killed_after_a_write_without_a_sync_ends() -> Result<()> {
    if unavailable("a_process_killed_after_a_write_without_a_sync_ends") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:64M"])?;
    let name = Attachment::unique_name("unsynced-killed");
    let attached = Attachment::new(setup.binaries(), &target, &name, &[])?;
    let data = write_through_cache(&setup, &attached, 1)?;
    kill(attached.process())?;
    let process = format!("/proc/{}", attached.process());
    eventually("it has ended", BOUND, || !Path::new(&process).exists())?;
    ensure_on_namespace(&setup, &target, &data)?;
    let next = Attachment::new(setup.binaries(), &target, &name, &[])?;
    let data = write_through_cache(&setup, &next, 2)?;
    next.detach(&[])?.success()?;
    next.check_gone()?;
    ensure_on_namespace(&setup, &target, &data)
}

/// A program that is closing the device waits in the kernel for what it wrote: /proc does not show that it has it open.
#[test]
fn detach_refuses_while_what_was_written_is_not_there() -> Result<()> {
    if unavailable("detach_refuses_while_what_was_written_is_not_there") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let (target, mut rpc) = setup.target_with_errors()?;
    let name = Attachment::unique_name("slow");
    let attached = Attachment::new(setup.binaries(), &target, &name, &["--policy", "queue"])?;
    let data = setup.file("noise", 1 << 20, 1)?;
    let from = format!("if={}", setup.path().join("noise").display());
    let to = format!("of={}", attached.device_text());
    let mut write = |name: &str| -> Result<Process> {
        rpc.call(
            "bdev_error_inject_error",
            json!({ "name": "EE_m", "io_type": "write", "error_type": "pending", "num": 1000 }),
        )?;
        let mut command = Command::new(find_program("dd")?);
        command.args([&from, &to, "bs=1M", "conv=notrunc"]);
        let dd = Process::spawn(&mut command, name, setup.path())?;
        let files = format!("/proc/{}/fd", dd.id());
        let wrote = format!("wchar: {}\n", data.len());
        eventually("it closes the device", BOUND, || {
            let open = fs::read_dir(&files).into_iter().flatten().flatten();
            let mut open = open.filter_map(|file| fs::read_link(file.path()).ok());
            fs::read_to_string(format!("/proc/{}/io", dd.id())).is_ok_and(|io| io.contains(&wrote))
                && !open.any(|file| file == attached.device())
        })?;
        Ok(dd)
    };
    let mut dd = write("first")?;
    let refused = attached.detach(&[])?;
    println!("refused after {:?}", refused.took);
    ensure!(refused.code == Some(1), "{refused:?}");
    ensure!(
        refused.stderr.contains("is not on its namespace"),
        "{}",
        refused.stderr
    );
    ensure!(refused.took < BOUND, "{:?}", refused.took);
    ensure!(attached.listed()?["State"] == "live");
    let mut rpc = RpcClient::connect(&target.rpc_socket())?;
    rpc.call(
        "bdev_error_inject_error",
        json!({ "name": "EE_m", "io_type": "clear", "error_type": "failure" }),
    )?;
    rpc.call("bdev_error_resume_pending", json!({ "name": "EE_m" }))?;
    ensure!(dd.wait(BOUND)?.success(), "{}", dd.tail());
    eventually("what it waited for is there", BOUND, || {
        attached
            .detach(&[])
            .is_ok_and(|detached| detached.code == Some(0))
    })?;
    attached.check_gone()?;
    ensure_on_namespace(&setup, &target, &data)?;

    let attached = Attachment::new(setup.binaries(), &target, &name, &["--policy", "queue"])?;
    let mut dd = write("second")?;
    let forced = attached.detach(&["--force"])?.success()?;
    println!("detached after {:?}", forced.took);
    ensure!(forced.took < BOUND, "{:?}", forced.took);
    dd.wait(BOUND)?;
    attached.check_gone()
}

/// The kernel binds a loop device, looks for partitions, and only then tells its number. What a process leaves that was
/// killed meanwhile is made here of what one leaves that knew it: not every kernel knows partitions.
#[test]
fn a_process_killed_before_it_knew_its_loop_device() -> Result<()> {
    if unavailable("a_process_killed_before_it_knew_its_loop_device") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let name = Attachment::unique_name("binding");
    let killed = || -> Result<Attachment> {
        let attached = Attachment::new(setup.binaries(), &target, &name, &[])?;
        kill(attached.process())?;
        let killed = || attached.listed().is_ok_and(|now| now["State"] == "killed");
        eventually("it is known as killed", BOUND, killed)?;
        let file = Path::new("/run/flexblk")
            .join(&name)
            .join("attachment.json");
        let mut record: serde_json::Value = serde_json::from_str(&fs::read_to_string(&file)?)?;
        record["loop_number"] = serde_json::Value::Null;
        record["device"] = serde_json::Value::Null;
        fs::write(&file, record.to_string())?;
        Ok(attached)
    };
    // A device that was unmounted under is bound to "/".
    let is_free = |attached: &Attachment| -> Result<()> {
        let device = attached.device().file_name().context("a name")?;
        let bound = Path::new("/sys/block").join(device).join("loop");
        let released = eventually("the loop device is free", BOUND, || !bound.exists());
        if released.is_err() {
            system("losetup", &["-d", &attached.device_text()])?;
        }
        released.map(drop)
    };
    let attached = killed()?;
    let detached = attached.detach(&[])?.success()?;
    ensure!(detached.took < BOUND, "{:?}", detached.took);
    is_free(&attached)?;
    attached.check_gone()?;

    let attached = killed()?;
    let next = Attachment::new(setup.binaries(), &target, &name, &[])?;
    if next.device() != attached.device() {
        is_free(&attached)?;
    }
    next.detach(&[])?.success()?;
    is_free(&next)?;
    next.check_gone()
}

#[test]
fn lazily_means_when_the_last_user_has_gone() -> Result<()> {
    if unavailable("lazily_means_when_the_last_user_has_gone") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:64M"])?;
    let name = Attachment::unique_name("lazy");
    let mut attached = Attachment::new(setup.binaries(), &target, &name, &[])?;
    system("mkfs.ext4", &["-qF", &attached.device_text()])?;
    let place = setup.path().join("mnt");
    attached.mount(&place)?;
    attached.detach(&["--lazy"])?.success()?;
    ensure!(attached.listed()?["State"] == "detaching");
    // It works as before for whoever has it.
    copy_tree(&place)?;
    compare_tree(&place)?;
    attached.unmount(BOUND)?.success()?;
    attached.check_gone()
}

#[test]
fn the_device_follows_the_size_of_the_namespace() -> Result<()> {
    if unavailable("the_device_follows_the_size_of_the_namespace") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let image = setup.path().join("disk.img");
    fs::write(&image, vec![0; 16 << 20])?;
    let target = setup.target(&[&format!("file:{},name=disk", image.display())])?;
    let name = Attachment::unique_name("resize");
    let attached = Attachment::new(setup.binaries(), &target, &name, &[])?;
    let size = || -> Result<u64> {
        let device = attached.device().file_name().context("a name")?;
        let sectors = fs::read_to_string(Path::new("/sys/block").join(device).join("size"))?;
        Ok(sectors.trim().parse::<u64>()? * 512)
    };
    ensure!(size()? == 16 << 20);
    for bytes in [48 << 20, 24 << 20] {
        fs::File::options()
            .write(true)
            .open(&image)?
            .set_len(bytes)?;
        let mut rpc = RpcClient::connect(&target.rpc_socket())?;
        rpc.call("bdev_uring_rescan", json!({ "name": "disk" }))?;
        eventually("the device has the new size", BOUND, || {
            size().is_ok_and(|now| now == bytes)
        })?;
        ensure!(attached.listed()?["PhysicalSize"] == bytes);
    }
    attached.detach(&[])?.success()?;
    attached.check_gone()
}

/// Two targets export one file. One is killed while fio writes and reads back what it wrote, and comes back.
#[test]
fn a_path_that_dies_and_comes_back_is_only_a_pause() -> Result<()> {
    const TEST: &str = "a_path_that_dies_and_comes_back_is_only_a_pause";
    if unavailable(TEST) || skip::without_fio(TEST) {
        return Ok(());
    }
    let setup = Setup::new()?;
    let image = setup.path().join("disk.img");
    fs::File::create(&image)?.set_len(64 << 20)?;
    let device = format!("file:{},share_rw=true", image.display());
    let port = free_udp_port()?;
    let other = setup.target_with(TargetOptions {
        tcp_port: Some(port),
        ..TargetOptions::with_devices(&[&device])
    })?;
    let mut target = setup.target(&[&device])?;
    let name = Attachment::unique_name("paths");
    let tcp = format!("nvme+tcp://127.0.0.1:{port}/{SUBNQN}?nsid=1");
    let flexins = format!("{}&udp_port={}", other.uri(1), other.udp_port());
    let quick = ["--reconnect-delay", "0.25", "-k", "1"];
    let attached = Attachment::new(
        setup.binaries(),
        &target,
        &name,
        &[&["--path", &tcp, "--path", &flexins], &quick[..]].concat(),
    )?;
    // Of the first path.
    let state = || -> Result<(String, u64)> {
        let path = &attached.listed()?["Paths"][0];
        let state = path["State"].as_str().context("a state")?.to_owned();
        Ok((state, path["IOs"].as_u64().context("a number")?))
    };
    let is = |wanted: &str| state().is_ok_and(|(state, _)| state == wanted);

    let mut command = Command::new(find_program("fio")?);
    command.arg(format!("--filename={}", attached.device_text()));
    command.args(["--name=load", "--ioengine=io_uring", "--direct=1"]);
    command.args(["--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=64m"]);
    command.args([
        "--verify=crc32c",
        "--verify_backlog=256",
        "--verify_fatal=1",
    ]);
    command.args(["--time_based", "--runtime=6", "--verify_state_save=0"]);
    command.arg("--output-format=json");
    let mut load = Process::spawn(&mut command, "fio", setup.path())?;
    eventually("the first path is used", BOUND, || {
        state().is_ok_and(|(_, ios)| ios > 100)
    })?;
    target.kill()?;
    let noticed = eventually("the path is known as lost", BOUND, || is("connecting"))?;
    for path in [1, 2] {
        let listed = attached.listed()?;
        ensure!(listed["Paths"][path]["State"] == "live", "{listed}");
    }
    target.restart(setup.binaries())?;
    let back = eventually("the path is back", BOUND, || is("live"))?;
    let (_, before) = state()?;
    eventually("the path is used again", BOUND, || {
        state().is_ok_and(|(_, ios)| ios > before)
    })?;
    ensure!(load.wait(LOAD_LIMIT)?.success(), "{}", load.tail());
    let text = load.stdout();
    let result: serde_json::Value =
        serde_json::from_str(text.get(text.find('{').unwrap_or(0)..).unwrap_or_default())?;
    let job = &result["jobs"][0];
    ensure!(job["error"] == 0, "{job}");
    let longest = |direction: &str| job[direction]["lat_ns"]["max"].as_u64().unwrap_or(0);
    println!(
        "lost after {noticed:.0?}, back after {back:.0?}; stall (longest latency): {:.0?} of a read, {:.0?} of a write",
        Duration::from_nanos(longest("read")),
        Duration::from_nanos(longest("write")),
    );
    ensure!(attached.listed()?["Errors"] == 0, "{}", attached.listed()?);
    attached.detach(&[])?.success()?;
    drop(other);
    attached.check_gone()
}

#[test]
fn mistakes_are_one_line_and_leave_nothing() -> Result<()> {
    if unavailable("mistakes_are_one_line_and_leave_nothing") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M", "ram:16M"])?;
    let name = Attachment::unique_name("first");
    let attached = Attachment::new(setup.binaries(), &target, &name, &[])?;
    let other = Attachment::unique_name("other");
    let wrong = |nsid: &str, name: &str, code: i32, says: &str| -> Result<()> {
        let arguments = ["-N", nsid, "--as", name];
        let finished = setup.flexblk_at(&target, "attach", &arguments)?;
        ensure!(finished.code == Some(code), "{finished:?}");
        ensure!(finished.stderr.contains(says), "{}", finished.stderr);
        ensure!(finished.stderr.lines().count() == 1, "{}", finished.stderr);
        ensure!(finished.stdout.is_empty(), "{}", finished.stdout);
        Ok(())
    };
    wrong("1", &other, 1, "attached already")?;
    wrong("2", &name, 1, "is in use")?;
    wrong("9", &other, 5, "namespace 9 is not there")?;
    ensure!(!Path::new("/run/flexblk").join(&other).exists());
    let mounts = fs::read_to_string("/proc/mounts")?;
    ensure!(!mounts.contains(&other), "{mounts}");
    let unknown = setup.flexblk(&["detach", &other])?;
    ensure!(
        unknown.stderr.contains("nothing is attached as"),
        "{unknown:?}"
    );

    // Without the capability to mount.
    if let Ok(setpriv) = find_program("setpriv") {
        let mut command = Command::new(setpriv);
        command.args(["--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]);
        command.arg(&setup.binaries().flexblk).arg("attach");
        command
            .args(target.address())
            .args(["-N", "2", "--as", &other]);
        let finished = run(&mut command, BOUND)?;
        ensure!(finished.code == Some(1), "{finished:?}");
        ensure!(
            finished.stderr.contains("CAP_SYS_ADMIN"),
            "{}",
            finished.stderr
        );
        ensure!(!Path::new("/run/flexblk").join(&other).exists());
    } else {
        skip::note_part(
            "mistakes_are_one_line_and_leave_nothing",
            "setpriv is not installed",
        );
    }
    attached.detach(&[])?.success()?;
    attached.check_gone()
}
