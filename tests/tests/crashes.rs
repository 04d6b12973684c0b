//! kill -9 of either side in the middle of I/O, and what the other side does then.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use flexblk_initiator::{BlockHandle, ConnectOptions, Controller, Host, Nsid};
use flexblk_tests::proc::{anonymous_bytes, descriptors, threads};
use flexblk_tests::process::eventually;
use flexblk_tests::setup::Setup;
use flexblk_tests::skip::without_fio;
use flexblk_tests::target::{SUBNQN, Target};

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_killed_initiator_leaves_nothing_behind_in_the_target() -> Result<()> {
    if without_fio("a_killed_initiator_leaves_nothing_behind_in_the_target") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let mut target = setup.target(&["ram:64M"])?;
    let job = |name: &str| {
        setup
            .fio(&target, 1, name)
            .option("rw", "randrw")
            .option("bs", "16k")
            .option("iodepth", 32)
            .option("numjobs", 2)
            .option("kato_ms", 1000)
            .option("time_based", 1)
            .option("runtime", 60)
    };
    let usage = || -> Result<(u64, usize, usize)> {
        Ok((
            anonymous_bytes(target.id())?,
            descriptors(target.id())?,
            threads(target.id())?,
        ))
    };
    let mut before = None;
    for round in 0..4 {
        let name = format!("killed-{round}");
        let mut fio = job(&name).spawn()?;
        thread::sleep(Duration::from_millis(1500));
        assert!(fio.status()?.is_none(), "fio ended early:\n{}", fio.tail());
        kill_tree(&mut fio)?;
        // The keep-alive time-out is 1 s: the target notices, and gives everything back.
        thread::sleep(Duration::from_millis(3000));
        let after = usage()?;
        match before {
            // The first round fills pools that stay.
            None => before = Some(after),
            Some(before) => {
                let (memory, fds, threads) = before;
                assert!(
                    after.0 < memory + (2 << 20),
                    "round {round}: memory {memory} -> {}",
                    after.0
                );
                assert_eq!(
                    (after.1, after.2),
                    (fds, threads),
                    "round {round}: descriptors, threads"
                );
            }
        }
    }
    // And it serves.
    let verify = setup
        .fio(&target, 1, "after")
        .option("rw", "write")
        .option("verify", "crc32c")
        .option("bs", "64k");
    assert_eq!(verify.success(LIMIT)?.measured("read").bytes, 64 << 20);
    assert!(target.is_running());
    Ok(())
}

/// fio's jobs are processes of their own: kill -9 them all, the jobs first.
fn kill_tree(fio: &mut flexblk_tests::process::Process) -> Result<()> {
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", fio.id()))?;
    for child in children.split_whitespace() {
        let pid = rustix::process::Pid::from_raw(child.parse()?).context("a process id")?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    }
    fio.kill()?;
    Ok(())
}

#[test]
fn a_killed_target_is_an_error_within_the_time_out_and_serves_again_when_restarted() -> Result<()> {
    if without_fio(
        "a_killed_target_is_an_error_within_the_time_out_and_serves_again_when_restarted",
    ) {
        return Ok(());
    }
    let setup = Setup::new()?;
    let mut target = setup.target(&["ram:64M"])?;
    for round in 0..2 {
        let job = |name: String| {
            setup
                .fio(&target, 1, &name)
                .option("rw", "randrw")
                .option("bs", "4k")
                .option("iodepth", 32)
                .option("thread", round)
                .option("io_timeout_ms", 3000)
                .option("kato_ms", 2000)
                .option("time_based", 1)
                .option("runtime", 60)
        };
        let mut fio = job(format!("orphaned-{round}")).spawn()?;
        thread::sleep(Duration::from_millis(1000));
        assert!(fio.status()?.is_none(), "fio ended early:\n{}", fio.tail());
        target.kill()?;
        let killed = Instant::now();
        let status = fio.wait(Duration::from_secs(15))?;
        assert!(!status.success(), "fio has to fail when its target is gone");
        assert!(
            killed.elapsed() < Duration::from_secs(8),
            "fio took {:?} to notice",
            killed.elapsed()
        );
        assert!(
            fio.stderr().contains("flexblk:"),
            "our message:\n{}",
            fio.tail()
        );
        // Nobody there: connecting is an error soon, too.
        let gone = setup.flexblk_at(&target, "info", &["--connect-timeout", "1s"])?;
        assert_eq!(gone.code, Some(3), "{gone:?}");
        assert!(gone.took < Duration::from_secs(5), "{gone:?}");
        target.restart(setup.binaries())?;
        let verify = setup
            .fio(&target, 1, &format!("again-{round}"))
            .option("rw", "write")
            .option("verify", "crc32c")
            .option("bs", "64k");
        assert_eq!(verify.success(LIMIT)?.measured("read").bytes, 64 << 20);
    }
    Ok(())
}

#[test]
fn a_file_namespace_holds_every_flushed_write_after_kill_9() -> Result<()> {
    const BLOCK: usize = 4096;
    const BLOCKS: u64 = 2048;
    let setup = Setup::new()?;
    setup.file("disk.img", BLOCK * BLOCKS as usize, 0)?;
    let image = format!(
        "file:{},block_size=4096",
        setup.path().join("disk.img").display()
    );
    let mut target = setup.target(&[&image])?;
    let mut generation = 0;
    for round in 0..3 {
        // What a flush that completed has promised, by block: the generation it holds at least.
        let promised: Vec<AtomicU64> = (0..BLOCKS).map(|_| AtomicU64::new(0)).collect();
        let flushes = AtomicU64::new(0);
        thread::scope(|scope| -> Result<()> {
            let options = connect_options(&target)?;
            let writer = scope
                .spawn(|| write_and_flush(options, &promised, &flushes, &mut generation, round));
            eventually("flushes that completed", Duration::from_secs(20), || {
                flushes.load(Ordering::SeqCst) >= 40
            })?;
            target.kill()?;
            match writer.join() {
                Ok(Ok(())) => bail!("the writer has to fail when its target is killed"),
                Ok(Err(_)) => Ok(()),
                Err(_) => bail!("the writer panicked"),
            }
        })?;
        target.restart(setup.binaries())?;
        let controller = Controller::connect(&connect_options(&target)?)?;
        let mut disk = BlockHandle::open(&controller, Nsid::new(1))?;
        let mut checked = 0;
        for (block, promise) in promised.iter().enumerate() {
            let promise = promise.load(Ordering::SeqCst);
            if promise == 0 {
                continue;
            }
            let mut data = vec![0; BLOCK];
            disk.read_at((block * BLOCK) as u64, &mut data)?;
            let held = u64::from_le_bytes(data[..8].try_into()?);
            // A later write to the block may have made it, too; an older one must not be what is there.
            assert!(
                held >= promise,
                "round {round}, block {block}: generation {held} instead of {promise}"
            );
            assert!(
                data == content(block as u64, held, BLOCK),
                "round {round}, block {block}: torn"
            );
            checked += 1;
        }
        assert!(checked > 100, "{checked} blocks were flushed");
    }
    Ok(())
}

fn connect_options(target: &Target) -> Result<ConnectOptions> {
    let host = Host::load()?;
    let words = format!(
        "trtype=flexins traddr=127.0.0.1 subnqn={SUBNQN} udp_port={} io_timeout_ms=2000 kato_ms=1000",
        target.udp_port()
    );
    Ok(ConnectOptions::parse(&words, host)?)
}

/// A block that says which block and generation it is.
fn content(block: u64, generation: u64, len: usize) -> Vec<u8> {
    let mut data = generation.to_le_bytes().to_vec();
    data.extend_from_slice(&flexblk_tests::setup::noise(
        len - 8,
        generation ^ (block << 32),
    ));
    data
}

/// Writes blocks and flushes, and records what each completed flush covers, until the target is gone.
fn write_and_flush(
    options: ConnectOptions,
    promised: &[AtomicU64],
    flushes: &AtomicU64,
    generation: &mut u64,
    round: u64,
) -> Result<()> {
    let controller = Controller::connect(&options)?;
    let mut disk = BlockHandle::open(&controller, Nsid::new(1))?;
    let mut state = round + 1;
    loop {
        let mut written = Vec::new();
        for _ in 0..16 {
            let block = flexblk_tests::setup::next(&mut state) % promised.len() as u64;
            *generation += 1;
            disk.write_at(block * 4096, &content(block, *generation, 4096))?;
            written.push((block, *generation));
        }
        disk.flush()?;
        for (block, generation) in written {
            promised[block as usize].store(generation, Ordering::SeqCst);
        }
        flushes.fetch_add(1, Ordering::SeqCst);
    }
}

/// Marks of Write Uncorrectable are on disk when the command ends, and gone from there when a write
/// over them does.
#[test]
fn uncorrectable_blocks_outlive_a_killed_target() -> Result<()> {
    let setup = Setup::new()?;
    let image = setup.path().join("disk.img");
    std::fs::write(&image, vec![0; 1 << 20])?;
    let device = format!("file:{},block_size=4096", image.display());
    let mut target = setup.target(&[&device])?;
    let data = setup.file("in.bin", 4096, 1)?;
    let read = |target: &Target, lba: &str| {
        let blocks = ["--lba", lba, "--blocks", "1", "-o", "out.bin"];
        setup.flexblk_at(target, "read", &blocks)
    };
    let unreadable = |target: &Target, lba: &str| -> Result<()> {
        let failed = read(target, lba)?;
        let told = failed.stderr.contains("Unrecovered Read Error");
        assert!(told, "block {lba}: {}", failed.stderr);
        Ok(())
    };
    let marks = ["--start-block", "5", "-c", "2"];
    setup
        .flexblk_at(&target, "write-uncor", &marks)?
        .success()?;
    target.restart(setup.binaries())?;
    unreadable(&target, "5")?;
    read(&target, "4")?.success()?;
    let write = ["--lba", "6", "-i", "in.bin"];
    setup.flexblk_at(&target, "write", &write)?.success()?;
    target.restart(setup.binaries())?;
    read(&target, "6")?.success()?;
    assert!(std::fs::read(setup.path().join("out.bin"))? == data);
    unreadable(&target, "5")?;
    unreadable(&target, "7")
}
