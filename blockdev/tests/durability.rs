//! Flush and FUA: what is on the disk, what survives kill -9, and who hears of lost data.

mod support;

use std::{
    fs::File,
    io::{BufRead, BufReader, Write as _},
    os::{fd::AsRawFd, unix::fs::FileExt},
    process::{Command, Stdio},
};

use flexblk_blockdev::{
    BlockDevice, Caps, DirectMode, FileConfig, FileDevice, IoBuffers, IoError, IoOp,
};
use support::*;

/// `cachestat(2)`, Linux 6.5: dirty pages and pages under write-back of the whole file.
#[allow(unsafe_code)]
fn not_yet_on_disk(file: &File) -> Option<u64> {
    const SYS_CACHESTAT: libc::c_long = 451;
    let range = [0_u64; 2];
    let mut stat = [0_u64; 5]; // nr_cache, nr_dirty, nr_writeback, nr_evicted, nr_recently_evicted
    // SAFETY: two and five u64 as the kernel's struct cachestat_range and struct cachestat.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            range.as_ptr(),
            stat.as_mut_ptr(),
            0,
        )
    };
    (result == 0).then(|| stat[1] + stat[2])
}

#[test]
fn flush_and_fua_reach_the_disk() {
    let image = Image::new(1 << 20);
    let second = File::open(&image.path).unwrap();
    if not_yet_on_disk(&second).is_none() {
        eprintln!("skipped: no cachestat(2)");
        return;
    }
    let device = FileDevice::new(&FileConfig {
        direct: DirectMode::Off,
        ..image.config()
    })
    .unwrap();
    assert!(
        device.info().volatile_write_cache && device.info().caps.contains(Caps::FUA | Caps::FLUSH)
    );
    let mut rig = Rig::new(&device);
    rig.write(0, &[1; 64 << 10]).unwrap();
    assert!(
        not_yet_on_disk(&second) > Some(0),
        "a plain write stays in the cache"
    );
    rig.flush().unwrap();
    assert_eq!(not_yet_on_disk(&second), Some(0), "after a flush");
    let mut held = [0; 64 << 10];
    second.read_exact_at(&mut held, 0).unwrap();
    assert!(held == [1; 64 << 10], "through another descriptor");
    rig.write_with(8, &[2; 4096], true).unwrap();
    assert_eq!(not_yet_on_disk(&second), Some(0), "after a forced write");
    // forced write zeroes that has to write zeroes: pages half covered
    rig.write(0, &[3; 8192]).unwrap();
    rig.plain(
        IoOp::WriteZeroes {
            unmap: false,
            fua: true,
        },
        1,
        3,
    )
    .unwrap();
    assert_eq!(
        not_yet_on_disk(&second),
        Some(0),
        "after forced write zeroes"
    );
    assert_eq!(rig.read(0, 1).unwrap(), [3; 512]);
    assert_eq!(rig.read(1, 3).unwrap(), [0; 3 * 512]);
}

#[test]
fn flushes_share_system_calls_but_never_one_that_began_before() {
    let image = Image::new(1 << 20);
    let device = FileDevice::new(&image.config()).unwrap();
    let mut rig = Rig::new(&device);
    rig.write(0, &[1; 4096]).unwrap();
    let before = rig.reactor.stats().sqes;
    let tags: Vec<_> = (0..100)
        .map(|_| rig.start(IoOp::Flush, 0, 0, IoBuffers::none()))
        .collect();
    for tag in tags {
        assert_eq!(rig.wait(tag), Ok(()));
    }
    // the first one alone, the other 99 together behind it; a few more are the reactor's own
    let entries = rig.reactor.stats().sqes - before;
    assert!(
        (2..10).contains(&entries),
        "{entries} entries for 100 flushes"
    );
    assert_eq!(counter(&device, "flushes_coalesced"), 98);
}

/// Write-back fails: a block device over an image for which there is no room.
#[test]
fn lost_data_is_reported_to_every_channel_once() {
    let Some(room) = SmallFileSystem::new() else {
        return;
    };
    let path = room.path().join("disk.img");
    File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let Some(loop_device) = Loop::over(&path, &["--sector-size", "4096"]) else {
        return;
    };
    let config = FileConfig {
        direct: DirectMode::Off,
        ..file_config(&loop_device.path)
    };
    let device = FileDevice::new(&config).unwrap();
    let (mut one, mut two) = (Rig::new(&device), Rig::new(&device));
    assert_eq!((one.flush(), two.flush()), (Ok(()), Ok(())));
    for mib in 0..4 {
        assert_eq!(
            one.write(mib * 256, &[1; 1 << 20]),
            Ok(()),
            "into the page cache"
        );
    }
    assert_eq!(
        two.flush(),
        Err(IoError::MediaWrite),
        "the kernel tells the first who asks"
    );
    assert_eq!(
        one.flush(),
        Err(IoError::MediaWrite),
        "we tell the writer too"
    );
    assert_eq!((one.flush(), two.flush()), (Ok(()), Ok(())));
    assert_eq!(counter(&device, "sync_failures"), 1);
}

const CHILD: &str = "FLEXBLK_TEST_CHILD";

/// Writes numbered blocks; says a number once everything up to it has been flushed.
fn write_until_killed(path: &std::path::Path) -> ! {
    let device = FileDevice::new(&file_config(path)).expect("the image is free");
    let blocks = device.info().block_count;
    let mut rig = Rig::new(&device);
    let mut out = std::io::stdout();
    for number in 1_u64.. {
        let block = number.to_le_bytes().repeat(64);
        rig.write_with(number % blocks, &block, number % 5 == 0)
            .expect("a write");
        if number % 3 == 0 {
            rig.flush().expect("a flush");
            writeln!(out, "flushed {number}").expect("the parent listens");
        }
    }
    unreachable!("numbers do not end")
}

#[test]
fn what_was_flushed_is_there_after_kill_9() {
    if let Some(path) = std::env::var_os(CHILD) {
        write_until_killed(path.as_ref());
    }
    let image = Image::new(64 << 10);
    let blocks = 128;
    for round in 0..6_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "what_was_flushed_is_there_after_kill_9",
                "--nocapture",
            ])
            .env(CHILD, &image.path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let mut flushed = 0;
        for line in lines.lines() {
            let Ok(line) = line else { break };
            if let Some(number) = line.split("flushed ").nth(1) {
                flushed = number.parse().unwrap();
                if flushed >= 20 + round * 70 {
                    child.kill().unwrap(); // SIGKILL; lines that are in the pipe are still read
                }
            }
        }
        child.wait().unwrap();
        assert!(
            flushed >= 20 + round * 70,
            "round {round}: the child ended by itself after {flushed}"
        );
        // a restarted target opens the image at once, though the kernel may still be cleaning up
        let device = FileDevice::new(&image.config()).unwrap();
        let mut rig = Rig::new(&device);
        for number in flushed.saturating_sub(blocks - 1).max(1)..=flushed {
            let held = rig.read(number % blocks, 1).unwrap();
            let found = u64::from_le_bytes(held[..8].try_into().unwrap());
            assert!(
                found >= number && found % blocks == number % blocks,
                "block {number}: {found}"
            );
            assert!(
                held.chunks(8).all(|word| word == &held[..8]),
                "a torn block"
            );
        }
    }
}
