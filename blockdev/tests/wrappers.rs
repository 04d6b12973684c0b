//! What the wrappers fault and delay do to I/O, and null and ram by themselves.

mod support;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use flexblk_blockdev::{
    BdevConfig, BlockDevice, ByteSize, Caps, DelayConfig, DelayDevice, Error, FaultConfig,
    FaultDevice, FaultOn, IoBuffers, IoError, IoOp, MediaError, open,
};
use support::*;

fn device(spec: &str) -> Arc<dyn BlockDevice> {
    open(&spec.parse::<BdevConfig>().expect("a spec")).expect("a device")
}

fn fault_config() -> FaultConfig {
    FaultConfig {
        name: "f".to_owned(),
        base_bdev_name: "ram".to_owned(),
        uuid: None,
        seed: 42,
        read_error_rate: 0.0,
        write_error_rate: 0.0,
        flush_error_rate: 0.0,
        media_errors: Vec::new(),
    }
}

fn delay_config() -> DelayConfig {
    DelayConfig {
        name: "d".to_owned(),
        base_bdev_name: "ram".to_owned(),
        uuid: None,
        seed: 1,
        avg_read_latency: 0,
        p99_read_latency: None,
        avg_write_latency: 0,
        p99_write_latency: None,
        flush_latency: 0,
        depth: 8,
    }
}

#[test]
fn bad_places_fail_and_only_those() {
    let bad = vec![
        MediaError {
            lba: 10,
            blocks: 2,
            on: FaultOn::Read,
        },
        MediaError {
            lba: 20,
            blocks: 1,
            on: FaultOn::Write,
        },
        MediaError {
            lba: 30,
            blocks: 1,
            on: FaultOn::Both,
        },
    ];
    let config = FaultConfig {
        media_errors: bad,
        ..fault_config()
    };
    let fault = FaultDevice::new(&config, device("ram:1M")).unwrap();
    let mut rig = Rig::new(&fault);
    let block = [7; 512];
    for lba in 0..40 {
        let readable = !matches!(lba, 10 | 11 | 30);
        let writable = !matches!(lba, 20 | 30);
        assert_eq!(
            rig.write(lba, &block),
            if writable {
                Ok(())
            } else {
                Err(IoError::MediaWrite)
            },
            "{lba}"
        );
        assert_eq!(rig.read(lba, 1).is_ok(), readable, "{lba}");
        assert_eq!(rig.plain(IoOp::Verify, lba, 1).is_ok(), readable, "{lba}");
        assert_eq!(rig.plain(IoOp::Discard, lba, 1).is_ok(), writable, "{lba}");
    }
    assert_eq!(
        rig.read(8, 4),
        Err(IoError::MediaRead),
        "a range with a bad block in it"
    );
    assert_eq!(rig.read(12, 4).map(|bytes| bytes.len()), Ok(2048));
    assert_eq!(rig.flush(), Ok(()));
    assert!(counter(&fault, "injected_errors") > 0);
}

#[test]
fn a_failed_write_leaves_the_base_alone() {
    let base = device("ram:1M");
    let config = FaultConfig {
        write_error_rate: 1.0,
        ..fault_config()
    };
    let fault = FaultDevice::new(&config, Arc::clone(&base)).unwrap();
    let mut rig = Rig::new(&fault);
    assert_eq!(rig.write(3, &[1; 512]), Err(IoError::MediaWrite));
    assert_eq!(rig.read(3, 1).unwrap(), [0; 512]);
    fault.set_error_rates(0.0, 0.0, 1.0).unwrap();
    assert_eq!(rig.write(3, &[1; 512]), Ok(()));
    assert_eq!(rig.flush(), Err(IoError::MediaWrite));
    assert_eq!(rig.read(3, 1).unwrap(), [1; 512]);
    assert!(
        rig.channel.direct_read(3, 1).is_none(),
        "no way around the wrapper"
    );
}

#[test]
fn error_rates_are_kept_and_repeat_with_the_seed() {
    let pattern = |seed| {
        let config = FaultConfig {
            seed,
            read_error_rate: 0.1,
            ..fault_config()
        };
        let fault = FaultDevice::new(&config, device("ram:1M")).unwrap();
        let mut rig = Rig::new(&fault);
        (0..4000)
            .map(|i| rig.plain(IoOp::Verify, i % 100, 1).is_err())
            .collect::<Vec<_>>()
    };
    let first = pattern(1);
    let failed = first.iter().filter(|failed| **failed).count();
    assert!(
        (300..500).contains(&failed),
        "{failed} of 4000 at a rate of 0.1"
    );
    assert!(first == pattern(1) && first != pattern(2));
    for rate in [-0.1, 1.1, f64::NAN] {
        let config = FaultConfig {
            read_error_rate: rate,
            ..fault_config()
        };
        assert!(matches!(
            FaultDevice::new(&config, device("ram:1M")),
            Err(Error::Config { .. })
        ));
    }
}

#[test]
fn latencies_are_added_per_class() {
    let config = DelayConfig {
        avg_read_latency: 20_000,
        flush_latency: 5_000,
        ..delay_config()
    };
    let delay = DelayDevice::new(&config, device("ram:1M")).unwrap();
    let mut rig = Rig::new(&delay);
    let timed = |rig: &mut Rig, op| {
        let start = Instant::now();
        assert_eq!(rig.plain(op, 0, 1), Ok(()));
        start.elapsed()
    };
    let verify = timed(&mut rig, IoOp::Verify);
    assert!(verify >= Duration::from_millis(20), "{verify:?}");
    assert!(timed(&mut rig, IoOp::Flush) >= Duration::from_millis(5));
    let fast = (0..20)
        .map(|_| timed(&mut rig, IoOp::Discard))
        .min()
        .unwrap();
    assert!(fast < Duration::from_millis(5), "{fast:?}");
    // eight at once take as long as one
    let start = Instant::now();
    let tags: Vec<_> = (0..8)
        .map(|lba| rig.start(IoOp::Verify, lba, 1, IoBuffers::none()))
        .collect();
    let refused = rig.start(IoOp::Verify, 9, 1, IoBuffers::none());
    assert_eq!(rig.wait(refused), Err(IoError::Busy), "depth is 8");
    for tag in tags {
        assert_eq!(rig.wait(tag), Ok(()));
    }
    assert!(start.elapsed() < Duration::from_millis(8 * 20));
    // errors are delayed as well, and unchanged
    let start = Instant::now();
    assert_eq!(rig.read(1 << 40, 1), Err(IoError::OutOfRange));
    assert!(start.elapsed() >= Duration::from_millis(20));
    assert_eq!(rig.channel.in_flight(), 0);
}

/// What is with the device keeps its latency; a channel that is open has the new one for what follows.
#[test]
fn latencies_change_under_io() {
    let config = |us| DelayConfig {
        avg_read_latency: us,
        ..delay_config()
    };
    let delay = DelayDevice::new(&config(40_000), device("ram:1M")).unwrap();
    let mut rig = Rig::new(&delay);
    let began = Instant::now();
    let before = rig.start(IoOp::Verify, 0, 1, IoBuffers::none());
    delay.reconfigure(&BdevConfig::Delay(config(0))).unwrap();
    assert_eq!(rig.plain(IoOp::Verify, 0, 1), Ok(()));
    assert!(rig.channel.in_flight() == 1, "the first is still there");
    assert_eq!(rig.wait(before), Ok(()));
    assert!(began.elapsed() >= Duration::from_millis(40));
    let far = BdevConfig::Delay(config(u64::MAX));
    let refused = delay.reconfigure(&far).unwrap_err().to_string();
    assert!(refused.contains("at most"), "{refused}");
    let ram = "ram:1M".parse::<BdevConfig>().unwrap();
    for (device, config) in [
        (&delay as &dyn BlockDevice, &ram),
        (&*device("ram:1M"), &ram),
    ] {
        let refused = device.reconfigure(config).unwrap_err().to_string();
        assert!(
            refused.contains("nothing of it can be changed"),
            "{refused}"
        );
    }
}

#[test]
fn one_in_a_hundred_is_slow() {
    let config = DelayConfig {
        p99_read_latency: Some(30_000),
        ..delay_config()
    };
    let delay = DelayDevice::new(&config, device("ram:1M")).unwrap();
    let mut rig = Rig::new(&delay);
    let slow = (0..1000)
        .filter(|_| {
            let start = Instant::now();
            assert_eq!(rig.plain(IoOp::Verify, 0, 1), Ok(()));
            start.elapsed() >= Duration::from_millis(30)
        })
        .count();
    assert!((2..30).contains(&slow), "{slow} of 1000");
}

#[test]
fn wrappers_stack_over_a_file() {
    let image = Image::new(1 << 20);
    let file = open(&BdevConfig::File(image.config())).unwrap();
    let inner = DelayConfig {
        avg_write_latency: 100,
        ..delay_config()
    };
    let inner = Arc::new(DelayDevice::new(&inner, file).unwrap());
    let bad = vec![MediaError {
        lba: 5,
        blocks: 1,
        on: FaultOn::Write,
    }];
    let fault = FaultConfig {
        media_errors: bad,
        ..fault_config()
    };
    let fault = Arc::new(FaultDevice::new(&fault, inner).unwrap());
    let outer = DelayConfig {
        name: "outer".to_owned(),
        avg_read_latency: 100,
        ..delay_config()
    };
    let outer = DelayDevice::new(&outer, fault).unwrap();
    assert!(
        outer
            .info()
            .kind
            .starts_with("delay over fault over delay over file")
    );
    let mut rig = Rig::new(&outer);
    for lba in 0..10_u64 {
        let result = rig.write(lba, &[lba as u8 + 1; 512]);
        assert_eq!(result.is_ok(), lba != 5);
    }
    let bytes = rig.read(0, 10).unwrap();
    let lbas: Vec<u8> = bytes.chunks(512).map(|block| block[0]).collect();
    assert_eq!(lbas, [1, 2, 3, 4, 5, 0, 7, 8, 9, 10]);
}

#[test]
fn null_swallows_writes() {
    let null = device("null:1G,block_size=4096");
    let mut rig = Rig::new(&*null);
    assert_eq!(rig.write(1, &[1; 4096]), Ok(()));
    assert_eq!(rig.read(1, 1).unwrap(), [0; 4096]);
    assert_eq!(rig.compare(1, &[0; 4096]), Err(IoError::Unsupported));
    assert_eq!(rig.read(1 << 18, 1), Err(IoError::OutOfRange));
    assert_eq!(null.resize(2 << 30).unwrap().block_count, 2 << 18);
    assert!(rig.read(1 << 18, 1).is_ok());
}

#[test]
fn ram_checks_ranges_and_lengths() {
    let ram = device("ram:1M");
    let mut rig = Rig::new(&*ram);
    assert_eq!(rig.read(2048, 1), Err(IoError::OutOfRange));
    assert_eq!(rig.read(2047, 2), Err(IoError::OutOfRange));
    assert_eq!(rig.read(u64::MAX, 1), Err(IoError::OutOfRange));
    assert_eq!(rig.read(2048, 0).unwrap(), []);
    let short = IoBuffers::one(rig.span(0, 0, 511));
    assert_eq!(
        rig.run(IoOp::Read, 0, 1, short.clone()),
        Err(IoError::Invalid)
    );
    assert_eq!(
        rig.run(IoOp::Write { fua: true }, 0, 1, short),
        Err(IoError::Invalid)
    );
    assert_eq!(
        rig.run(IoOp::Compare, 0, 1, IoBuffers::none()),
        Err(IoError::Invalid)
    );
    assert_eq!(rig.write(2047, &[9; 512]), Ok(()));
    assert_eq!(rig.compare(2047, &[9; 512]), Ok(()));
    assert_eq!(rig.compare(2047, &[8; 512]), Err(IoError::CompareMismatch));
}

#[test]
fn ram_resizes_in_place_and_forgets_what_was_cut_off() {
    let ram = device("ram:1M,max_size=4M");
    let mut rig = Rig::new(&*ram);
    rig.write(2047, &[5; 512]).unwrap();
    rig.write(0, &[6; 512]).unwrap();
    assert_eq!(ram.resize(512 << 10).unwrap().block_count, 1024);
    assert_eq!(rig.read(2047, 1), Err(IoError::OutOfRange));
    assert!(rig.channel.direct_read(2047, 1).is_none());
    assert_eq!(ram.resize(4 << 20).unwrap().size_bytes(), 4 << 20);
    assert_eq!(
        rig.read(2047, 1).unwrap(),
        [0; 512],
        "zeroes after it grew again"
    );
    assert_eq!(rig.read(0, 1).unwrap(), [6; 512]);
    let message = ram.resize(5 << 20).unwrap_err().to_string();
    assert_eq!(
        message,
        "ram: cannot grow to 5242880 bytes: max_size is 4194304"
    );
    assert!(matches!(ram.resize(1000), Err(Error::NotMultiple { .. })));
    assert!(
        ram.info()
            .caps
            .contains(Caps::RESIZE | Caps::DISCARD_ZEROES)
    );
}

#[test]
fn ram_gives_memory_back_and_long_zeroing_takes_turns() {
    let ram = device("ram:64M");
    let memory = Arc::clone(ram.memory().expect("memory"));
    let used = || resident(memory.as_ptr() as usize);
    let mut rig = Rig::new(&*ram);
    let block = vec![3; 1 << 20];
    for mib in 0..64 {
        rig.write(mib * 2048, &block).unwrap();
    }
    assert!(used() >= ByteSize(64 << 20), "{} in use", used());
    let tag = rig.start(IoOp::Discard, 1, 131_072 - 1, IoBuffers::none());
    assert_eq!(
        rig.channel.in_flight(),
        1,
        "64 MiB are not zeroed in one go"
    );
    assert_eq!(rig.wait(tag), Ok(()));
    // the kernel gives back whole folios, which may be larger than pages
    assert!(used() <= ByteSize(2 << 20), "{} still in use", used());
    assert_eq!(rig.read(0, 1).unwrap(), [3; 512]);
    assert!(rig.read(1, 1000).unwrap().iter().all(|byte| *byte == 0));
    assert!(
        rig.read(131_072 - 1000, 1000)
            .unwrap()
            .iter()
            .all(|byte| *byte == 0)
    );
}

#[test]
fn ram_with_huge_pages_has_its_memory_at_once_or_says_that_there_is_not_so_much() {
    for mode in ["transparent", "try"] {
        let ram = device(&format!("ram:8M,hugepages={mode}"));
        let memory = ram.memory().expect("memory");
        // Reserved huge pages do not count as resident.
        assert!(memory.is_huge() || resident(memory.as_ptr() as usize) >= ByteSize(8 << 20));
    }
    let too_much: BdevConfig = "ram:1T,hugepages=transparent".parse().unwrap();
    let error = open(&too_much).err().expect("refused").to_string();
    assert!(error.contains("more than the"), "{error}");
}

/// What is present of the mapping that an address lies in (proc(5), `/proc/pid/smaps`).
fn resident(address: usize) -> ByteSize {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let holds = |line: &&str| {
        let range = line
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'));
        let bound = |text| usize::from_str_radix(text, 16).ok();
        range.and_then(|(start, end)| Some((bound(start)?..bound(end)?).contains(&address)))
            == Some(true)
    };
    let mut lines = smaps.lines().skip_while(|line| !holds(line));
    let kib = lines
        .find_map(|line| line.strip_prefix("Rss:")?.trim().strip_suffix(" kB"))
        .unwrap();
    ByteSize(kib.parse::<u64>().unwrap() << 10)
}

#[test]
fn ram_memory_is_the_device() {
    let ram = device("ram:1M,block_size=4096");
    let mut rig = Rig::new(&*ram);
    rig.write(17, &[0x5a; 4096]).unwrap();
    let span = rig.channel.direct_read(17, 1).expect("the only channel");
    assert_eq!(bytes_of(&span), [0x5a; 4096]);
    let direct = ram.memory().unwrap().span(17 * 4096, 4096).unwrap();
    assert_eq!(direct, span);
    assert!(rig.channel.direct_read(256, 1).is_none());
    let other = Rig::new(&*ram);
    assert!(
        rig.channel.direct_read(17, 1).is_none(),
        "another thread may be writing"
    );
    drop(other);
    assert!(rig.channel.direct_read(17, 1).is_some());
}

/// NVMe: a read beside a write of one block sees the old or the new one (AWUN >= 1 block).
#[test]
fn ram_blocks_are_never_seen_half_written() {
    let ram = device("ram:1M,block_size=4096");
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (torn, reads) = std::thread::scope(|scope| {
        let (ram, stop) = (&*ram, &stop);
        let writers: Vec<_> = [1_u8, 2]
            .into_iter()
            .map(|value| {
                scope.spawn(move || {
                    let mut rig = Rig::new(ram);
                    let mut round = value;
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        round = round.wrapping_add(2);
                        if round.is_multiple_of(31) {
                            rig.plain(IoOp::Discard, 0, 4).unwrap();
                        }
                        rig.write(0, &[round; 4 * 4096]).unwrap();
                    }
                })
            })
            .collect();
        let mut rig = Rig::new(ram);
        let end = Instant::now() + Duration::from_millis(600);
        let (mut torn, mut reads) = (0, 0);
        while Instant::now() < end {
            for block in rig.read(0, 4).unwrap().chunks(4096) {
                torn += usize::from(block.iter().any(|byte| *byte != block[0]));
            }
            reads += 1;
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        writers
            .into_iter()
            .for_each(|writer| writer.join().unwrap());
        (torn, reads)
    });
    assert_eq!(torn, 0, "of {reads} reads of 4 blocks");
}
