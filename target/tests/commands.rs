//! Commands beyond read and write on the wire: Abort, fused Compare and Write, Copy, Write
//! Uncorrectable.

mod host;
mod world;

use std::time::{Duration, Instant};

use flexblk_nvme::command::Fuse;
use flexblk_nvme::command::admin::{Abort, Cns, Identify};
use flexblk_nvme::command::nvm::{
    Compare, Copy, CopyRange, IoControl, Read, Tags, Verify, Write, WriteUncorrectable, WriteZeroes,
};
use flexblk_nvme::features::HostBehavior;
use flexblk_nvme::identify::{self, Oncs};
use flexblk_nvme::{Cid, Lba, Nsid, Qid, Sgl, Sqe, StatusCode, U16, U32, U64};
use flexblk_target::config::{Config, Namespace};
use host::{Answer, Host, Queue};
use world::{World, code, nqn, open, pattern, read, write, write_in_capsule};

const BLOCK: u32 = 4096;

/// A RAM device whose reads and writes take that long.
fn slow(read_us: u32, write_us: u32) -> World {
    World::with(&[], |config| {
        let text = format!(
            "[[bdev]]\ntype = \"ram\"\nname = \"base\"\nsize = \"4M\"\nblock_size = 4096\n[[bdev]]\ntype = \"delay\"\nname = \"slow\"\nbase_bdev_name = \"base\"\navg_read_latency = {read_us}\navg_write_latency = {write_us}\n[[subsystem]]\nnqn = \"{}\"\n[[subsystem.namespace]]\nbdev = \"slow\"\n",
            nqn().as_str()
        );
        let parsed = Config::from_toml(&text, std::path::Path::new("test")).unwrap();
        config.bdevs = parsed.bdevs;
        config.subsystems = parsed.subsystems;
    })
}

fn abort(host: &mut Host, admin: Queue, cid: Cid) -> u32 {
    let abort = Abort {
        sqid: Qid::new(1),
        cid,
    };
    let answer = host.command(admin, |cid| abort.emit(cid, &Sgl::NONE));
    assert!(answer.status().is_success(), "{answer:?}");
    answer.result() as u32
}

/// Base 5.1.1: "Immediate Abort Not Performed" (bit 0) is 0 for a command that ended by the Abort,
/// with Command Abort Requested, and 1 for one that goes on: a write that the device has.
#[test]
fn commands_with_the_device_are_aborted_when_that_is_safe() {
    let world = slow(700_000, 700_000);
    let mut host = world.host();
    let (admin, _, io) = open(&mut host);
    let begin = std::time::Instant::now();
    let sgl = host.keyed(0, BLOCK);
    let reading = host.cid();
    host.send(io, &read(0, 1).emit(reading, &sgl), None);
    let sgl = host.keyed(BLOCK, BLOCK);
    let writing = host.cid();
    host.send(io, &write(1, 1).emit(writing, &sgl), None);
    // Both are with the device when another command of the queue has been answered.
    let beyond = host.command(io, |cid| read(1 << 40, 1).emit(cid, &sgl));
    assert_eq!(code(&beyond), StatusCode::LbaOutOfRange);
    std::thread::sleep(Duration::from_millis(50));

    assert_eq!(abort(&mut host, admin, reading), Abort::ABORTED);
    assert_eq!(abort(&mut host, admin, writing), Abort::NOT_ABORTED);
    let answer = host.answer(io, reading);
    assert_eq!(code(&answer), StatusCode::AbortRequested);
    assert!(
        begin.elapsed() < Duration::from_millis(600),
        "the read's answer did not wait for the device"
    );
    assert_eq!(
        abort(&mut host, admin, reading),
        Abort::NOT_ABORTED,
        "it is over"
    );
    assert!(host.answer(io, writing).status().is_success());
    host.hang_up(io);
    host.hang_up(admin);
    world.expect_idle();
}

/// As many aborted reads as the queue is deep, again and again, while the device still has them:
/// slots and buffers come back, the queue stays open.
#[test]
fn aborted_reads_cost_nothing_in_the_end() {
    let world = slow(100_000, 1000);
    let mut host = world.host();
    let (admin, _, io) = open(&mut host);
    for _ in 0..4 {
        let sgl = host.keyed(0, BLOCK);
        let cids: Vec<Cid> = (0..63)
            .map(|_| {
                let cid = host.cid();
                host.send(io, &read(0, 1).emit(cid, &sgl), None);
                cid
            })
            .collect();
        for cid in &cids {
            abort(&mut host, admin, *cid);
        }
        for cid in &cids {
            let code = code(&host.answer(io, *cid));
            assert!(
                matches!(code, StatusCode::AbortRequested | StatusCode::Success),
                "{code:?}"
            );
        }
    }
    host.hang_up(io);
    host.hang_up(admin);
    world.expect_idle();
}

fn compare(lba: u64, blocks: u32) -> Compare {
    Compare {
        nsid: Nsid::new(1),
        slba: Lba::new(lba),
        blocks,
        ..Default::default()
    }
}

fn fused(mut entry: [u8; 64], fuse: Fuse) -> [u8; 64] {
    let mut sqe = *Sqe::cast(&entry);
    sqe.set_fuse(fuse);
    entry = sqe.to_bytes();
    entry
}

/// Compare and Write of that block: expected content at 0 of the host's memory, new at `BLOCK`.
fn compare_and_write(host: &mut Host, io: Queue, lba: u64, keyed: bool) -> (Answer, Answer) {
    let (first, second) = (host.cid(), host.cid());
    let capsule = Sgl::InCapsule {
        offset: 0,
        length: BLOCK,
    };
    if keyed {
        let (expected, new) = (host.keyed(0, BLOCK), host.keyed(BLOCK, BLOCK));
        host.send(
            io,
            &fused(compare(lba, 1).emit(first, &expected), Fuse::First),
            None,
        );
        host.send(
            io,
            &fused(write(lba, 1).emit(second, &new), Fuse::Second),
            None,
        );
    } else {
        host.send(
            io,
            &fused(compare(lba, 1).emit(first, &capsule), Fuse::First),
            Some((0, BLOCK)),
        );
        host.send(
            io,
            &fused(write(lba, 1).emit(second, &capsule), Fuse::Second),
            Some((BLOCK, BLOCK)),
        );
    }
    (host.answer(io, first), host.answer(io, second))
}

/// Base 3.4.2, NVM 3.2.1.1: the write is done if the compare succeeds, else it is aborted with
/// Command Aborted due to Failed Fused Command.
#[test]
fn compare_and_write_is_one_command() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    std::fs::write(&image, vec![0; 4 << 20]).unwrap();
    let file = format!("file:{},block_size=4096", image.display());
    for (bdev, threads, keyed) in [
        ("ram:4M,block_size=4096", 1, false),
        ("ram:4M,block_size=4096", 2, true),
        (file.as_str(), 1, true),
    ] {
        let world = World::with(&[bdev], |config| config.cores = vec![0; threads]);
        let mut host = world.host();
        let (admin, _, io) = open(&mut host);
        let id = host.identify(admin, &Identify::new(Cns::Controller, Nsid::NONE));
        assert_eq!(identify::Controller::view(&id).unwrap().fuses.get(), 1);
        let (zeroes, new) = (vec![0; BLOCK as usize], pattern(9, BLOCK as usize));
        host.put(0, &zeroes);
        host.put(BLOCK, &new);
        let (first, second) = compare_and_write(&mut host, io, 5, keyed);
        assert!(
            first.status().is_success() && second.status().is_success(),
            "{first:?} {second:?}"
        );
        let (first, second) = compare_and_write(&mut host, io, 5, keyed);
        assert_eq!(code(&first), StatusCode::CompareFailure, "{bdev}");
        assert_eq!(code(&second), StatusCode::AbortedFailedFused, "{bdev}");
        let sgl = host.keyed(2 * BLOCK, BLOCK);
        assert!(
            host.command(io, |cid| read(5, 1).emit(cid, &sgl))
                .status()
                .is_success()
        );
        assert!(host.get(2 * BLOCK, BLOCK) == new);
        host.hang_up(io);
        host.hang_up(admin);
        world.expect_idle();
    }
}

/// A host that takes nothing, with more commands behind what it may have than are looked at in a round, leaves
/// buffers to the others, and they get them.
#[test]
fn a_host_that_takes_nothing_keeps_nobody_from_buffers() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    std::fs::write(&image, vec![0; 4 << 20]).unwrap();
    let world = World::new(&[&format!("file:{},block_size=4096", image.display())]);
    let mut stuck = world.host();
    let (admin, cntlid) = stuck.controller(&nqn());
    assert_eq!(stuck.queues(admin, 1), 1);
    let io = stuck.io_queue(1, 128, cntlid, &nqn());
    let sgl = stuck.keyed(0, 1 << 20);
    for _ in 0..120 {
        let cid = stuck.cid();
        stuck.send(io, &read(0, 256).emit(cid, &sgl), None);
    }
    let sent = Instant::now();
    while world.target.stats().threads[0].buffer_waits < 100 {
        assert!(sent.elapsed() < Duration::from_secs(10), "not sent");
        stuck.turn();
    }
    // From now on it neither takes data nor acknowledges any.
    let mut other = world.host();
    let (_, _, io) = open(&mut other);
    let sgl = other.keyed(0, BLOCK);
    for _ in 0..10 {
        let answer = other.command(io, |cid| read(0, 1).emit(cid, &sgl));
        assert!(answer.status().is_success(), "{answer:?}");
    }
}

/// A namespace that a Copy is going to write to goes while its source is read, and another one comes: it
/// is not written to, though its device has the place of the other one.
#[test]
fn a_copy_does_not_write_to_what_came_later() {
    let world = slow(500_000, 0);
    let added = || {
        let new = Namespace::new("ram:1M,block_size=4096");
        let nsid = world.target.add_namespace(&nqn(), &new).unwrap();
        assert_eq!(nsid, Nsid::new(2));
    };
    added();
    let mut host = world.host();
    let (admin, _, io) = open(&mut host);
    allow_copies_between_namespaces(&mut host, admin);
    let data = pattern(1, BLOCK as usize);
    assert!(
        write_in_capsule(&mut host, io, &write(0, 1), &data)
            .status()
            .is_success()
    );
    let (copying, entry) = copy_entry(&mut host, Nsid::new(2), 0, 2, &[source(1, 0, 1)]);
    host.send(io, &entry, None);
    // Until the source is being read.
    assert!(
        host.try_answer(io, copying, Duration::from_millis(100))
            .is_none()
    );
    world.target.remove_namespace(&nqn(), Nsid::new(2)).unwrap();
    added();
    let status = host.answer(io, copying).status();
    assert!(!status.is_success(), "{status:?}");
    let sgl = host.keyed(0, BLOCK);
    let read = Read {
        nsid: Nsid::new(2),
        ..read(0, 1)
    };
    assert!(
        host.command(io, |cid| read.emit(cid, &sgl))
            .status()
            .is_success()
    );
    assert_eq!(host.get(0, BLOCK), vec![0; BLOCK as usize]);
}

/// What must not be fused, and halves that stay alone.
#[test]
fn wrong_pairs() {
    let world = World::new(&["ram:1M,block_size=4096"]);
    let mut host = world.host();
    let (admin, _, io) = open(&mut host);
    let sgl = host.keyed(0, BLOCK);
    let send = |host: &mut Host, entry: [u8; 64], fuse| {
        let cid = Sqe::cast(&entry).cid();
        host.send(io, &fused(entry, fuse), None);
        cid
    };
    // A second half alone.
    let alone = send(
        &mut host,
        write(0, 1).emit(Cid::new(100), &sgl),
        Fuse::Second,
    );
    assert_eq!(
        code(&host.answer(io, alone)),
        StatusCode::AbortedMissingFused
    );
    // A first half followed by an ordinary command, which is done.
    let first = send(
        &mut host,
        compare(0, 1).emit(Cid::new(101), &sgl),
        Fuse::First,
    );
    let read = send(
        &mut host,
        read(0, 1).emit(Cid::new(102), &sgl),
        Fuse::Normal,
    );
    assert_eq!(
        code(&host.answer(io, first)),
        StatusCode::AbortedMissingFused
    );
    assert!(host.answer(io, read).status().is_success());
    // Ranges that differ.
    let first = send(
        &mut host,
        compare(0, 1).emit(Cid::new(103), &sgl),
        Fuse::First,
    );
    let second = send(
        &mut host,
        write(1, 1).emit(Cid::new(104), &sgl),
        Fuse::Second,
    );
    assert_eq!(
        code(&host.answer(io, first)),
        StatusCode::AbortedFailedFused
    );
    assert_eq!(code(&host.answer(io, second)), StatusCode::InvalidField);
    // Write first, compare second.
    let first = send(
        &mut host,
        write(0, 1).emit(Cid::new(105), &sgl),
        Fuse::First,
    );
    let second = send(
        &mut host,
        compare(0, 1).emit(Cid::new(106), &sgl),
        Fuse::Second,
    );
    assert_eq!(code(&host.answer(io, first)), StatusCode::InvalidField);
    assert_eq!(
        code(&host.answer(io, second)),
        StatusCode::AbortedFailedFused
    );
    // Beyond the end: nothing is done.
    let first = send(
        &mut host,
        compare(1 << 40, 1).emit(Cid::new(107), &sgl),
        Fuse::First,
    );
    let second = send(
        &mut host,
        write(1 << 40, 1).emit(Cid::new(108), &sgl),
        Fuse::Second,
    );
    assert_eq!(code(&host.answer(io, first)), StatusCode::LbaOutOfRange);
    assert_eq!(
        code(&host.answer(io, second)),
        StatusCode::AbortedFailedFused
    );
    // A queue that closes between the halves.
    send(
        &mut host,
        compare(0, 1).emit(Cid::new(109), &sgl),
        Fuse::First,
    );
    host.hang_up(io);
    host.hang_up(admin);
    world.expect_idle();
}

/// Atomic towards other commands on the same block, on all threads: two hosts count in one block by
/// Compare and Write, while a third writes a neighbour; no count is lost. On memory and on a file.
#[test]
fn nobody_gets_between_the_halves() {
    const COUNT: u32 = 60;
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let file = format!("file:{},block_size=4096", image.display());
    for bdev in ["ram:1M,block_size=4096", file.as_str()] {
        let world = World::with(&[bdev], |config| config.cores = vec![0, 1]);
        let counted = |world: &World| {
            let mut host = world.host();
            let (_, _, io) = open(&mut host);
            let mut done = 0;
            let mut known = 0u32;
            while done < COUNT {
                let mut block = vec![0; BLOCK as usize];
                block[..4].copy_from_slice(&known.to_le_bytes());
                host.put(0, &block);
                block[..4].copy_from_slice(&(known + 1).to_le_bytes());
                host.put(BLOCK, &block);
                let (first, second) = compare_and_write(&mut host, io, 7, true);
                assert_eq!(
                    first.status().is_success(),
                    second.status().is_success(),
                    "{first:?} {second:?}"
                );
                if second.status().is_success() {
                    done += 1;
                    known += 1;
                } else {
                    assert_eq!(code(&first), StatusCode::CompareFailure);
                    let sgl = host.keyed(0, BLOCK);
                    assert!(
                        host.command(io, |cid| read(7, 1).emit(cid, &sgl))
                            .status()
                            .is_success()
                    );
                    known = u32::from_le_bytes(host.get(0, 4).try_into().unwrap());
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| counted(&world));
            }
        });
        let mut host = world.host();
        let (_, _, io) = open(&mut host);
        let sgl = host.keyed(0, BLOCK);
        assert!(
            host.command(io, |cid| read(7, 1).emit(cid, &sgl))
                .status()
                .is_success()
        );
        assert_eq!(host.get(0, 4), (3 * COUNT).to_le_bytes(), "{bdev}");
    }
}

fn source(nsid: u32, lba: u64, blocks: u16) -> [u8; 32] {
    let mut range = CopyRange::zeroed();
    range.snsid = U32::new(nsid);
    range.slba = U64::new(lba);
    range.nlb = U16::new(blocks - 1);
    *<&[u8; 32]>::try_from(range.bytes()).unwrap()
}

fn copy(host: &mut Host, io: Queue, to: u64, format: u8, sources: &[[u8; 32]]) -> Answer {
    let (cid, entry) = copy_entry(host, Nsid::new(1), to, format, sources);
    host.send(io, &entry, None);
    host.answer(io, cid)
}

fn copy_entry(
    host: &mut Host,
    nsid: Nsid,
    to: u64,
    format: u8,
    sources: &[[u8; 32]],
) -> (Cid, [u8; 64]) {
    let bytes = sources.concat();
    host.put(3 << 20, &bytes);
    let copy = Copy {
        nsid,
        sdlba: Lba::new(to),
        ranges: sources.len() as u16,
        format,
        prinfo_read: 0,
        control: IoControl::new().with_fua(true),
        dspec: 0,
        tags: Tags::default(),
    };
    let (cid, sgl) = (host.cid(), host.keyed(3 << 20, bytes.len() as u32));
    (cid, copy.emit(cid, &sgl))
}

fn allow_copies_between_namespaces(host: &mut Host, admin: Queue) {
    let mut behavior = HostBehavior::zeroed();
    behavior.cdfe = U16::new(1 << 2);
    host.put(0, behavior.bytes());
    let sgl = host.keyed(0, 512);
    let set = flexblk_nvme::command::admin::SetFeatures {
        fid: flexblk_nvme::features::FeatureId::HostBehavior,
        nsid: Nsid::NONE,
        save: false,
        cdw11: 0,
        cdw12: 0,
        cdw13: 0,
        cdw15: 0,
        uuid_index: 0,
    };
    let answer = host.command(admin, |cid| set.emit(cid, &sgl));
    assert!(answer.status().is_success(), "{answer:?}");
}

/// NVM 3.3.2: ranges of any order and number go one after the other to the destination, also when
/// they overlap it, also from another namespace once the host has enabled format 2h.
#[test]
fn ranges_are_copied() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    std::fs::write(&image, vec![0; 8 << 20]).unwrap();
    let file = format!("file:{},block_size=4096", image.display());
    for (bdev, threads) in [("ram:8M,block_size=4096", 2), (file.as_str(), 1)] {
        let world = World::with(
            &[bdev, "ram:1M,block_size=4096", "ram:1M,block_size=512"],
            |config| config.cores = vec![0; threads],
        );
        let mut host = world.host();
        let (admin, _, io) = open(&mut host);
        let id = host.identify(admin, &Identify::new(Cns::Controller, Nsid::NONE));
        let id = identify::Controller::view(&id).unwrap();
        let oncs = Oncs::from_bits_retain(id.oncs.get());
        assert!(oncs.contains(Oncs::COPY | Oncs::WRITE_UNCORRECTABLE));
        assert_eq!(id.cdfs.get(), 0b101);
        let id = host.identify(admin, &Identify::new(Cns::Namespace, Nsid::new(1)));
        let id = identify::Namespace::view(&id).unwrap();
        assert_eq!((id.mssrl.get(), id.mcl.get(), id.msrc), (256, 256, 127));

        let data = pattern(3, 10 * BLOCK as usize);
        host.put(0, &data);
        let sgl = host.keyed(0, 10 * BLOCK);
        assert!(
            host.command(io, |cid| write(0, 10).emit(cid, &sgl))
                .status()
                .is_success()
        );
        let block = |at: usize| &data[at * BLOCK as usize..(at + 1) * BLOCK as usize];
        let expect = |host: &mut Host, at: u64, wanted: &[u8]| {
            let sgl = host.keyed(1 << 20, wanted.len() as u32);
            let blocks = wanted.len() as u32 / BLOCK;
            assert!(
                host.command(io, |cid| read(at, blocks).emit(cid, &sgl))
                    .status()
                    .is_success()
            );
            assert!(
                host.get(1 << 20, wanted.len() as u32) == wanted,
                "{bdev} {at}"
            );
        };
        let sources = [source(0, 9, 1), source(0, 0, 2), source(0, 5, 1)];
        assert!(copy(&mut host, io, 100, 0, &sources).status().is_success());
        expect(
            &mut host,
            100,
            &[block(9), block(0), block(1), block(5)].concat(),
        );
        // Onto itself, one block further.
        assert!(
            copy(&mut host, io, 1, 0, &[source(0, 0, 9)])
                .status()
                .is_success()
        );
        expect(&mut host, 1, &data[..9 * BLOCK as usize]);
        // As much as there can be.
        let most: Vec<_> = (0..128).map(|at| source(0, at * 2, 2)).collect();
        assert!(copy(&mut host, io, 600, 0, &most).status().is_success());

        // Another namespace: not without the host's behaviour enabled.
        let from = Write {
            nsid: Nsid::new(2),
            ..write(3, 1)
        };
        let other = pattern(77, BLOCK as usize);
        assert!(
            write_in_capsule(&mut host, io, &from, &other)
                .status()
                .is_success()
        );
        assert_eq!(
            code(&copy(&mut host, io, 0, 2, &[source(2, 3, 1)])),
            StatusCode::InvalidField
        );
        allow_copies_between_namespaces(&mut host, admin);
        assert!(
            copy(&mut host, io, 50, 2, &[source(2, 3, 1), source(1, 100, 1)])
                .status()
                .is_success()
        );
        expect(&mut host, 50, &[&other, block(9)].concat());

        for (sources, wanted) in [
            (
                vec![source(3, 0, 1)],
                StatusCode::IncompatibleNamespaceOrFormat,
            ),
            (vec![source(4, 0, 1)], StatusCode::InvalidNamespaceOrFormat),
            (
                vec![source(1, 0, 257)],
                StatusCode::CommandSizeLimitExceeded,
            ),
            (
                vec![source(1, 0, 200); 2],
                StatusCode::CommandSizeLimitExceeded,
            ),
            (
                vec![source(1, 0, 1); 129],
                StatusCode::CommandSizeLimitExceeded,
            ),
            (
                vec![source(1, 0, 1), source(1, 1 << 40, 1)],
                StatusCode::LbaOutOfRange,
            ),
        ] {
            let answer = copy(&mut host, io, 50, 2, &sources);
            assert_eq!(code(&answer), wanted, "{bdev}");
        }
        expect(&mut host, 50, &other);
        let answer = copy(&mut host, io, 2047, 0, &[source(1, 0, 2)]);
        assert_eq!(code(&answer), StatusCode::LbaOutOfRange);
        assert_eq!(
            code(&copy(&mut host, io, 0, 1, &[source(1, 0, 1)])),
            StatusCode::InvalidField
        );
        host.hang_up(io);
        host.hang_up(admin);
        world.expect_idle();
    }
}

/// NVM 3.3.7: reads, compares, verifies and copies of an uncorrectable block fail with Unrecovered
/// Read Error until it is written, through whichever queue, thread and subsystem.
#[test]
fn uncorrectable_blocks_cannot_be_read_until_they_are_written() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let file = format!("file:{},block_size=4096", image.display());
    // Marks of the file are kept, those of the memory are not.
    for (bdev, threads) in [("ram:1M,block_size=4096", 1), (&file, 1), (&file, 2)] {
        let world = World::with(&[bdev], |config| {
            config.cores = vec![0; threads];
            config.ptpl_file = Some(directory.path().join("ptpl.json"));
        });
        let mut host = world.host();
        let (_, cntlid, io) = open(&mut host);
        let other = host.io_queue(2, 32, cntlid, &nqn());
        let bad = WriteUncorrectable {
            nsid: Nsid::new(1),
            slba: Lba::new(10),
            blocks: 4,
            ..Default::default()
        };
        assert!(
            host.command(io, |cid| bad.emit(cid, &Sgl::NONE))
                .status()
                .is_success()
        );
        let readable = |host: &mut Host, lba: u64, blocks: u32| {
            let sgl = host.keyed(0, blocks * BLOCK);
            let answers = [
                host.command(io, |cid| read(lba, blocks).emit(cid, &sgl)),
                host.command(other, |cid| read(lba, blocks).emit(cid, &sgl)),
                host.command(io, |cid| {
                    Verify {
                        nsid: Nsid::new(1),
                        slba: Lba::new(lba),
                        blocks,
                        ..Default::default()
                    }
                    .emit(cid, &Sgl::NONE)
                }),
                host.command(io, |cid| compare(lba, blocks).emit(cid, &sgl)),
                copy(host, io, 200, 0, &[source(1, lba, blocks as u16)]),
            ];
            let codes: Vec<_> = answers.iter().map(code).collect();
            let fine = codes.iter().all(|code| *code == StatusCode::Success);
            let failed = codes
                .iter()
                .all(|code| *code == StatusCode::UnrecoveredReadError);
            assert!(fine || failed, "{codes:?}");
            fine
        };
        assert!(readable(&mut host, 8, 2) && readable(&mut host, 14, 1));
        assert!(
            !readable(&mut host, 13, 2)
                && !readable(&mut host, 9, 2)
                && !readable(&mut host, 10, 4)
        );
        // Written one by one: in the capsule, fetched, zeroed, copied onto.
        assert!(
            write_in_capsule(&mut host, io, &write(10, 1), &pattern(1, 4096))
                .status()
                .is_success()
        );
        assert!(readable(&mut host, 10, 1) && !readable(&mut host, 11, 1));
        let sgl = host.keyed(0, BLOCK);
        assert!(
            host.command(other, |cid| write(11, 1).emit(cid, &sgl))
                .status()
                .is_success()
        );
        let zeroes = WriteZeroes {
            nsid: Nsid::new(1),
            slba: Lba::new(12),
            ..Default::default()
        };
        assert!(
            host.command(io, |cid| zeroes.emit(cid, &Sgl::NONE))
                .status()
                .is_success()
        );
        assert!(readable(&mut host, 10, 3) && !readable(&mut host, 13, 1));
        assert!(
            copy(&mut host, io, 13, 0, &[source(1, 0, 1)])
                .status()
                .is_success()
        );
        assert!(readable(&mut host, 8, 8));
        let beyond = WriteUncorrectable {
            slba: Lba::new(1 << 40),
            ..bad
        };
        let answer = host.command(io, |cid| beyond.emit(cid, &Sgl::NONE));
        assert_eq!(code(&answer), StatusCode::LbaOutOfRange);
    }
}

/// The mark belongs to the device: a second namespace on it sees it too.
#[test]
fn uncorrectable_blocks_are_the_devices() {
    let world = World::with(&[], |config| {
        let text = format!(
            "[[bdev]]\ntype = \"ram\"\nname = \"base\"\nsize = \"1M\"\nblock_size = 4096\n[[subsystem]]\nnqn = \"{}\"\n[[subsystem.namespace]]\nbdev = \"base\"\n",
            nqn().as_str()
        );
        let parsed = Config::from_toml(&text, std::path::Path::new("test")).unwrap();
        config.bdevs = parsed.bdevs;
        config.subsystems = parsed.subsystems;
    });
    world
        .target
        .add_namespace(&nqn(), &Namespace::new("base"))
        .unwrap();
    let mut host = world.host();
    let (_, _, io) = open(&mut host);
    let bad = WriteUncorrectable {
        nsid: Nsid::new(2),
        slba: Lba::new(1),
        ..Default::default()
    };
    assert!(
        host.command(io, |cid| bad.emit(cid, &Sgl::NONE))
            .status()
            .is_success()
    );
    let sgl = host.keyed(0, BLOCK);
    let answer = host.command(io, |cid| Read { ..read(1, 1) }.emit(cid, &sgl));
    assert_eq!(code(&answer), StatusCode::UnrecoveredReadError);
}
