//! Files and block devices: what is refused and how it is said, direct I/O, zeroing.

mod support;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use flexblk_blockdev::{
    BdevConfig, BlockDevice, Caps, DirectMode, Error, FileConfig, FileDevice, IoBuffers, IoError,
    IoOp, open,
};
use support::*;

fn message(config: FileConfig) -> String {
    match open(&BdevConfig::File(config)) {
        Ok(_) => "opened".to_owned(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_cannot_be_served_is_refused_in_one_line() {
    let image = Image::new(1000);
    let name = image.path.display().to_string();
    assert_eq!(
        message(image.config()),
        format!("{name}: size 1000 is not a multiple of the block size 512")
    );
    File::options()
        .write(true)
        .open(&image.path)
        .unwrap()
        .set_len(512 * 9)
        .unwrap();
    let four = FileConfig {
        block_size: Some(4096),
        ..image.config()
    };
    assert_eq!(
        message(four),
        format!("{name}: size 4608 is not a multiple of the block size 4096")
    );
    let odd = FileConfig {
        block_size: Some(520),
        ..image.config()
    };
    assert_eq!(
        message(odd),
        format!("{name}: block size 520 is not supported (512 or 4096)")
    );
    let missing = FileConfig {
        filename: "/nonexistent/x.img".into(),
        ..image.config()
    };
    assert_eq!(
        message(missing),
        "/nonexistent/x.img: no such file or device (create an image with `truncate -s 1G /nonexistent/x.img`)"
    );
    let dir = FileConfig {
        filename: "/tmp".into(),
        ..image.config()
    };
    assert_eq!(
        message(dir),
        "/tmp: neither a regular file nor a block device"
    );
    let tty = FileConfig {
        filename: "/dev/null".into(),
        ..image.config()
    };
    assert_eq!(
        message(tty),
        "/dev/null: neither a regular file nor a block device"
    );
    File::options()
        .write(true)
        .open(&image.path)
        .unwrap()
        .set_len(0)
        .unwrap();
    assert_eq!(message(image.config()), format!("{name}: size is 0"));
}

#[test]
fn one_image_has_one_writer_or_many_readers() {
    let image = Image::new(1 << 20);
    let first = FileDevice::new(&image.config()).unwrap();
    let start = Instant::now();
    let text = message(image.config());
    assert!(
        text.ends_with("in use by another process (a running target, a mount, a loop device?)"),
        "{text}"
    );
    assert!(start.elapsed() < Duration::from_secs(5));
    let reader = FileConfig {
        readonly: true,
        ..image.config()
    };
    assert!(
        message(reader.clone()).contains("in use"),
        "a reader beside a writer"
    );
    drop(first);
    let one = FileDevice::new(&reader).unwrap();
    let two = FileDevice::new(&reader).unwrap();
    assert!(
        message(image.config()).contains("in use"),
        "a writer beside readers"
    );
    drop((one, two));
    assert_eq!(message(image.config()), "opened");
}

#[test]
fn who_shares_opens_beside_whoever_shares_too() {
    let image = Image::new(1 << 20);
    let sharing = FileConfig {
        share_rw: true,
        ..image.config()
    };
    let first = FileDevice::new(&sharing).unwrap();
    assert_eq!(message(sharing.clone()), "opened");
    assert!(message(image.config()).contains("in use"));
    drop(first);
    let alone = FileDevice::new(&image.config()).unwrap();
    assert!(message(sharing).contains("in use"));
    drop(alone);
}

#[test]
fn a_lock_that_is_given_up_soon_is_waited_for() {
    let image = Image::new(1 << 20);
    let first = FileDevice::new(&image.config()).unwrap();
    let holder = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        drop(first);
    });
    assert_eq!(message(image.config()), "opened");
    holder.join().unwrap();
}

#[test]
fn read_only_means_read_only() {
    let image = Image::new(1 << 20);
    fs::write(&image.path, vec![9; 1 << 20]).unwrap();
    let device = FileDevice::new(&FileConfig {
        readonly: true,
        ..image.config()
    })
    .unwrap();
    assert!(device.info().caps.contains(Caps::READ_ONLY) && !device.info().volatile_write_cache);
    let mut rig = Rig::new(&device);
    assert_eq!(rig.read(2047, 1).unwrap(), [9; 512]);
    assert_eq!(rig.write(0, &[1; 512]), Err(IoError::ReadOnly));
    assert_eq!(rig.plain(IoOp::Discard, 0, 1), Err(IoError::ReadOnly));
    assert_eq!(
        rig.plain(
            IoOp::WriteZeroes {
                unmap: true,
                fua: false
            },
            0,
            1
        ),
        Err(IoError::ReadOnly)
    );
    assert_eq!(rig.flush(), Ok(()));
    assert!(matches!(
        device.resize(2 << 20),
        Err(Error::NoResize { .. })
    ));
}

#[test]
fn lengths_follow_the_file() {
    let image = Image::new(1 << 20);
    let device = FileDevice::new(&image.config()).unwrap();
    let mut rig = Rig::new(&device);
    assert_eq!(rig.read(2048, 1), Err(IoError::OutOfRange));
    let outside = File::options().write(true).open(&image.path).unwrap();
    outside.set_len(2 << 20).unwrap();
    assert_eq!(device.info().block_count, 2048, "nothing changes by itself");
    assert_eq!(device.rescan().unwrap().block_count, 4096);
    assert_eq!(rig.write(4095, &[1; 512]), Ok(()));
    outside.set_len((2 << 20) + 1).unwrap();
    assert!(matches!(device.rescan(), Err(Error::NotMultiple { .. })));
    assert_eq!(device.info().block_count, 4096);
    assert_eq!(device.resize(1 << 20).unwrap().block_count, 2048);
    assert_eq!(fs::metadata(&image.path).unwrap().len(), 1 << 20);
    // cut behind our back: an error, neither a hang nor invented data
    outside.set_len(512 << 10).unwrap();
    assert_eq!(rig.read(2047, 1), Err(IoError::MediaRead));
    assert_eq!(rig.read(1020, 8), Err(IoError::MediaRead));
    assert_eq!(rig.compare(2047, &[0; 512]), Err(IoError::MediaRead));
    assert!(rig.read(0, 8).is_ok());
}

#[test]
fn direct_io_bounces_what_is_not_aligned() {
    if !direct_works() {
        return;
    }
    let image = Image::new(4 << 20);
    let device = FileDevice::new(&FileConfig {
        direct: DirectMode::On,
        ..image.config()
    })
    .unwrap();
    assert_eq!(&*device.info().kind, "file (direct)");
    let mut rig = Rig::new(&device);
    let bytes: Vec<u8> = (0..512 * 1024_u32)
        .map(|i| (i / 512) as u8 ^ i as u8)
        .collect();
    rig.write(100, &bytes).unwrap();
    assert_eq!(
        counter(&device, "bounced_ios"),
        0,
        "aligned memory is used in place"
    );
    let odd = rig.span(3, 1, bytes.len() as u32);
    rig.run(IoOp::Read, 100, 1024, IoBuffers::one(odd)).unwrap();
    assert!(bytes_of(&odd) == bytes);
    assert_eq!(counter(&device, "bounced_ios"), 1);
    rig.run(IoOp::Write { fua: true }, 3000, 1024, IoBuffers::one(odd))
        .unwrap();
    let mut held = vec![0; bytes.len()];
    File::open(&image.path)
        .unwrap()
        .read_exact_at(&mut held, 3000 * 512)
        .unwrap();
    assert!(held == bytes);
    // more of them at once than there are bounce buffers
    let tags: Vec<_> = (0..200_u64)
        .map(|i| {
            let span = rig.span(4 + i % 8, 1 + (i / 8) as u32 * 4096, 4096);
            rig.start(IoOp::Read, 100 + i * 4, 8, IoBuffers::one(span))
        })
        .collect();
    for tag in tags {
        assert_eq!(rig.wait(tag), Ok(()));
    }
    assert!(counter(&device, "bounce_waits") > 0);
    let span = rig.span(4 + 199 % 8, 1 + (199 / 8) * 4096, 4096);
    assert!(bytes_of(&span) == bytes[199 * 4 * 512..][..4096]);
}

#[test]
fn registered_memory_is_used_as_such() {
    for direct in [DirectMode::Off, DirectMode::Auto] {
        let image = Image::new(1 << 20);
        let device = FileDevice::new(&FileConfig {
            direct,
            ..image.config()
        })
        .unwrap();
        let mut rig = Rig::new(&device);
        let span = rig.span(5, 0, AREA);
        let Ok(index) = rig.reactor.register_buffers(&[span]) else {
            eprintln!("skipped: registered buffers are not possible here");
            return;
        };
        let part = rig.span(5, 8192, 4096);
        part.fill(0x77);
        rig.run(
            IoOp::Write { fua: false },
            8,
            8,
            IoBuffers::fixed(part, index),
        )
        .unwrap();
        part.fill(0);
        rig.run(IoOp::Read, 8, 8, IoBuffers::fixed(part, index))
            .unwrap();
        assert_eq!(bytes_of(&part), [0x77; 4096]);
        // proof that the index is used: memory outside of the registered range is refused
        let outside = rig.span(6, 0, 4096);
        assert_eq!(
            rig.run(IoOp::Read, 8, 8, IoBuffers::fixed(outside, index)),
            Err(IoError::Io(libc::EFAULT))
        );
    }
}

#[test]
fn more_than_the_depth_is_refused_and_the_rest_unharmed() {
    let image = Image::new(1 << 20);
    let device = FileDevice::new(&FileConfig {
        depth: 4,
        ..image.config()
    })
    .unwrap();
    let mut rig = Rig::new(&device);
    assert_eq!(rig.channel.depth(), 4);
    let tags: Vec<_> = (0..4)
        .map(|lba| rig.start(IoOp::Verify, lba, 1, IoBuffers::none()))
        .collect();
    assert_eq!(rig.plain(IoOp::Verify, 0, 1), Err(IoError::Busy));
    for tag in tags {
        assert_eq!(rig.wait(tag), Ok(()));
    }
    assert_eq!(rig.channel.in_flight(), 0);
    assert_eq!(rig.plain(IoOp::Verify, 0, 1), Ok(()));
}

#[test]
fn discard_and_write_zeroes_give_space_back() {
    let image = Image::new(8 << 20);
    let device = FileDevice::new(&image.config()).unwrap();
    if !device.info().caps.contains(Caps::DISCARD) {
        eprintln!("skipped: the file system cannot punch holes");
        return;
    }
    let used = || std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&image.path).unwrap()) * 512;
    let mut rig = Rig::new(&device);
    for mib in 0..8 {
        rig.write(mib * 2048, &[1; 1 << 20]).unwrap();
    }
    rig.flush().unwrap();
    let full = used();
    assert!(full >= 8 << 20);
    rig.plain(IoOp::Discard, 0, 8192).unwrap();
    rig.plain(
        IoOp::WriteZeroes {
            unmap: true,
            fua: true,
        },
        8192,
        4096,
    )
    .unwrap();
    assert!(used() <= full - (6 << 20), "{} of {full}", used());
    let before = used();
    rig.plain(
        IoOp::WriteZeroes {
            unmap: false,
            fua: false,
        },
        12288,
        4096,
    )
    .unwrap();
    assert!(used() >= before, "without unmap the space is kept");
    for lba in [0, 8191, 8192, 16383] {
        assert_eq!(rig.read(lba, 1).unwrap(), [0; 512]);
    }
    assert_eq!(fs::metadata(&image.path).unwrap().len(), 8 << 20);
    assert_eq!(counter(&device, "zeroes_written_bytes"), 0);
}

/// tmpfs knows neither zero range nor (reliably) direct I/O: zeroes are written, and counted.
#[test]
fn zeroes_are_written_where_the_kernel_cannot_zero() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("skipped: no /dev/shm");
        return;
    };
    let path = dir.path().join("disk.img");
    fs::write(&path, vec![7; 1 << 20]).unwrap();
    let device = FileDevice::new(&file_config(&path)).unwrap();
    let mut rig = Rig::new(&device);
    rig.plain(
        IoOp::WriteZeroes {
            unmap: false,
            fua: true,
        },
        1,
        1000,
    )
    .unwrap();
    rig.plain(
        IoOp::WriteZeroes {
            unmap: false,
            fua: false,
        },
        1500,
        1,
    )
    .unwrap();
    let held = fs::read(&path).unwrap();
    for (lba, block) in held.chunks(512).enumerate() {
        let zero = (1..1001).contains(&lba) || lba == 1500;
        assert!(
            block.iter().all(|byte| *byte == if zero { 0 } else { 7 }),
            "block {lba}"
        );
    }
    assert_eq!(counter(&device, "zeroes_written_bytes"), 1001 * 512);
}

#[test]
fn a_full_file_system_is_no_space() {
    let Some(room) = SmallFileSystem::new() else {
        return;
    };
    let path = room.path().join("disk.img");
    File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let device = FileDevice::new(&file_config(&path)).unwrap();
    let mut rig = Rig::new(&device);
    let results: Vec<_> = (0..4)
        .map(|i| rig.write(i * 1024, &[1; 512 << 10]))
        .collect();
    assert_eq!(results[0], Ok(()));
    assert_eq!(results[3], Err(IoError::NoSpace));
    assert_eq!(rig.plain(IoOp::Discard, 0, 2048), Ok(()));
    assert_eq!(rig.write(3 * 1024, &[1; 512 << 10]), Ok(()));
}

#[test]
fn block_devices_are_held_exclusively_and_know_their_block_size() {
    let Some(device) = Loop::new(1 << 20, &["--sector-size", "4096"]) else {
        return;
    };
    let config = file_config(&device.path);
    let small = message(FileConfig {
        block_size: Some(512),
        ..config.clone()
    });
    assert!(
        small.ends_with("block size 512 is smaller than the device's own 4096; use that"),
        "{small}"
    );
    let opened = FileDevice::new(&config).unwrap();
    let info = opened.info();
    assert_eq!((info.block_size, info.block_count), (4096, 256));
    assert!(
        info.caps.contains(Caps::DISCARD | Caps::WRITE_ZEROES) && !info.caps.contains(Caps::RESIZE)
    );
    assert!(message(config.clone()).contains("in use"));
    let mut rig = Rig::new(&opened);
    rig.write_with(255, &[4; 4096], true).unwrap();
    rig.plain(IoOp::Discard, 255, 1).unwrap();
    assert_eq!(rig.read(255, 1).unwrap(), [0; 4096]);
    assert!(matches!(
        opened.resize(2 << 20),
        Err(Error::NoResize { .. })
    ));
    drop((rig, opened));
    let Some(protected) = Loop::new(1 << 20, &["--read-only"]) else {
        return;
    };
    let config = file_config(&protected.path);
    let text = message(config.clone());
    assert!(
        text.ends_with("permission denied for reading and writing (readonly = true asks for less)"),
        "{text}"
    );
    assert_eq!(
        message(FileConfig {
            readonly: true,
            ..config
        }),
        "opened"
    );
}

#[test]
fn a_channel_dropped_in_the_middle_does_no_harm() {
    let image = Image::new(8 << 20);
    let device = FileDevice::new(&image.config()).unwrap();
    let mut rig = Rig::new(&device);
    for i in 0..8 {
        let span = rig.span(i, 1, 64 << 10);
        rig.start(IoOp::Read, i * 128, 128, IoBuffers::one(span));
    }
    assert_eq!(rig.channel.in_flight(), 8);
    drop(rig);
    drop(device);
    // the reactor kept the file for as long as the kernel needed it, and not longer
    assert_eq!(message(image.config()), "opened");
}
