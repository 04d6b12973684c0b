//! The target as a host sees it on the wire: connections, statuses, events, what is freed.

mod host;
mod world;

use std::time::{Duration, Instant};

use flexblk_nvme::command::admin::{
    Abort, AsyncEventRequest, Cns, GetLogPage, Identify, KeepAlive, SetFeatures,
};
use flexblk_nvme::command::fabrics::{Connect, ConnectReply};
use flexblk_nvme::command::nvm::{
    Compare, DatasetManagement, DsmAttributes, DsmRange, Flush, IoControl, Read, Verify,
    WriteZeroes,
};
use flexblk_nvme::features::AsyncEventConfig;
use flexblk_nvme::identify;
use flexblk_nvme::log::{ChangedNamespaces, ErrorEntry, LogPageId, Smart};
use flexblk_nvme::property::Cc;
use flexblk_nvme::rdma::{RejectStatus, RequestPrivate};
use flexblk_nvme::{Cntlid, Nqn, Nsid, Qid, Sgl, StatusCode, U32, U64};
use flexblk_target::config::{Config, Namespace};
use host::{Answer, Host, Offer, connect};
use world::{World, code, fabrics_code, nqn, open, pattern, read, write, write_in_capsule};

/// Every kind of transfer on memory and on a file: in the capsule, fetched, one and many buffers.
#[test]
fn what_is_written_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    std::fs::write(&image, vec![0; 4 << 20]).unwrap();
    let file = format!("file:{},block_size=4096", image.display());
    for (bdev, threads) in [
        ("ram:4M,block_size=4096", 1),
        ("ram:4M,block_size=4096", 2),
        (file.as_str(), 1),
    ] {
        let world = World::with(&[bdev], |config| config.cores = vec![0; threads]);
        let mut host = world.host();
        let (admin, _, io) = open(&mut host);
        let small = pattern(1, 8192);
        assert!(
            write_in_capsule(&mut host, io, &write(3, 2), &small)
                .status()
                .is_success()
        );
        let large = pattern(2, 1 << 20);
        host.put(1 << 20, &large);
        let sgl = host.keyed(1 << 20, 1 << 20);
        let mut forced = write(100, 256);
        forced.control = IoControl::new().with_fua(true);
        assert!(
            host.command(io, |cid| forced.emit(cid, &sgl))
                .status()
                .is_success()
        );

        let sgl = host.keyed(0, 8192);
        let answer = host.command(io, |cid| read(3, 2).emit(cid, &sgl));
        assert!(matches!(answer, Answer::Immediate(_)), "{bdev}: {answer:?}");
        assert!(host.get(0, 8192) == small, "{bdev}");
        let sgl = host.keyed(2 << 20, 1 << 20);
        assert!(
            host.command(io, |cid| read(100, 256).emit(cid, &sgl))
                .status()
                .is_success()
        );
        assert!(host.get(2 << 20, 1 << 20) == large, "{bdev}");
        let flush = Flush { nsid: Nsid::new(1) };
        assert!(
            host.command(io, |cid| flush.emit(cid, &Sgl::NONE))
                .status()
                .is_success()
        );
        host.hang_up(io);
        host.hang_up(admin);
        world.expect_idle();
    }
    assert!(std::fs::read(&image).unwrap()[3 * 4096..5 * 4096] == pattern(1, 8192));
}

#[test]
fn other_commands() {
    for bdev in ["ram:4M,block_size=4096", "ram:4M,block_size=512"] {
        let world = World::new(&[bdev]);
        let mut host = world.host();
        let (admin, _, io) = open(&mut host);
        let bytes = pattern(5, 8192);
        let blocks = |len: u32| {
            if bdev.ends_with("512") {
                len / 512
            } else {
                len / 4096
            }
        };
        assert!(
            write_in_capsule(&mut host, io, &write(0, blocks(8192)), &bytes)
                .status()
                .is_success()
        );

        let compare = Compare {
            nsid: Nsid::new(1),
            blocks: blocks(8192),
            ..Default::default()
        };
        let cid = host.cid();
        host.send(
            io,
            &compare.emit(
                cid,
                &Sgl::InCapsule {
                    offset: 0,
                    length: 8192,
                },
            ),
            Some((0, 8192)),
        );
        assert!(host.answer(io, cid).status().is_success());
        host.put(100, b"other");
        let sgl = host.keyed(0, 8192);
        let answer = host.command(io, |cid| compare.emit(cid, &sgl));
        assert_eq!(code(&answer), StatusCode::CompareFailure);
        assert!(answer.status().more() && answer.status().dnr());

        let verify = Verify {
            nsid: Nsid::new(1),
            blocks: blocks(8192),
            ..Default::default()
        };
        assert!(
            host.command(io, |cid| verify.emit(cid, &Sgl::NONE))
                .status()
                .is_success()
        );

        let zeroes = WriteZeroes {
            nsid: Nsid::new(1),
            blocks: blocks(4096),
            ..Default::default()
        };
        assert!(
            host.command(io, |cid| zeroes.emit(cid, &Sgl::NONE))
                .status()
                .is_success()
        );
        let sgl = host.keyed(0, 8192);
        host.command(io, |cid| read(0, blocks(8192)).emit(cid, &sgl));
        assert!(
            host.get(0, 4096).iter().all(|byte| *byte == 0)
                && host.get(4096, 4096) == bytes[4096..]
        );

        // Two ranges, the second of which gives back what is left; and one beyond the end, for
        // which nothing is done at all.
        let range = |lba: u64, nlb: u32| {
            let mut range = DsmRange::zeroed();
            (range.slba, range.nlb) = (U64::new(lba), U32::new(nlb));
            *<&[u8; 16]>::try_from(range.bytes()).unwrap()
        };
        let dsm = DatasetManagement {
            nsid: Nsid::new(1),
            ranges: 2,
            attributes: DsmAttributes::new().with_deallocate(true),
        };
        let second = blocks(4096).into();
        host.put(0, &[range(0, 1), range(u64::MAX, 1)].concat());
        let sgl = host.keyed(0, 32);
        let answer = host.command(io, |cid| dsm.emit(cid, &sgl));
        assert_eq!(code(&answer), StatusCode::LbaOutOfRange);
        host.put(0, &[range(0, 0), range(second, blocks(4096))].concat());
        assert!(
            host.command(io, |cid| dsm.emit(cid, &sgl))
                .status()
                .is_success()
        );
        let sgl = host.keyed(0, 8192);
        host.command(io, |cid| read(0, blocks(8192)).emit(cid, &sgl));
        assert!(host.get(0, 8192).iter().all(|byte| *byte == 0));

        // SMART has counted, the error log has what failed.
        let page = host.log(admin, &GetLogPage::new(LogPageId::Smart, 0, 512));
        let smart = Smart::view(&page).unwrap();
        assert_eq!((smart.host_writes.get(), smart.error_entries.get()), (1, 2));
        let page = host.log(admin, &GetLogPage::new(LogPageId::Error, 0, 128));
        let entry = ErrorEntry::view(&page[64..]).unwrap();
        assert!(entry.status().is(StatusCode::CompareFailure));
        assert_eq!((entry.sqid.get(), entry.opcode), (1, 5));
    }
}

/// Errors of commands leave the queue open.
#[test]
fn wrong_commands_are_answered() {
    let world = World::new(&["ram:1M,block_size=4096"]);
    let mut host = world.host();
    let (admin, _, io) = open(&mut host);
    let page = host.keyed(0, 4096);
    for (entry, wanted) in [
        (
            read(256, 1).emit(host.cid(), &page),
            StatusCode::LbaOutOfRange,
        ),
        (
            read(0, 2).emit(host.cid(), &page),
            StatusCode::DataSglLengthInvalid,
        ),
        (
            read(0, 1).emit(
                host.cid(),
                &Sgl::InCapsule {
                    offset: 0,
                    length: 4096,
                },
            ),
            StatusCode::SglDescriptorTypeInvalid,
        ),
        (
            write(0, 1).emit(
                host.cid(),
                &Sgl::InCapsule {
                    offset: 0,
                    length: 4096,
                },
            ),
            StatusCode::SglOffsetInvalid,
        ),
        (
            Read {
                nsid: Nsid::new(2),
                ..read(0, 1)
            }
            .emit(host.cid(), &page),
            StatusCode::InvalidNamespaceOrFormat,
        ),
        (
            KeepAlive.emit(host.cid(), &Sgl::NONE),
            StatusCode::InvalidOpcode,
        ),
        (
            connect(1).emit(host.cid(), &page),
            StatusCode::CommandSequenceError,
        ),
    ] {
        let cid = flexblk_nvme::Sqe::cast(&entry).cid();
        host.send(io, &entry, None);
        assert_eq!(code(&host.answer(io, cid)), wanted);
    }
    assert!(
        host.command(io, |cid| read(0, 1).emit(cid, &page))
            .status()
            .is_success()
    );
    let again = host.command(admin, |cid| connect(0).emit(cid, &page));
    assert_eq!(fabrics_code(&again), StatusCode::CommandSequenceError);
    // A key that opens nothing breaks the connection that used it, and no other.
    let wrong = Sgl::Keyed {
        address: 0,
        length: 4096,
        key: 0x1234_5678,
        invalidate: false,
    };
    let cid = host.cid();
    host.send(io, &read(0, 1).emit(cid, &wrong), None);
    host.wait_closed(io);
    host.identify(admin, &Identify::new(Cns::Controller, Nsid::NONE));
}

/// Connect's own errors, with the field that is wrong; nothing stays behind.
#[test]
fn connects_are_judged() {
    let world = World::new(&["ram:1M"]);
    let mut host = world.host();
    let (queue, params) = host.connect_queue(Offer::admin()).unwrap();
    assert_eq!(params.in_capsule_bytes, 8192);
    let early = host.command(queue, |cid| KeepAlive.emit(cid, &Sgl::NONE));
    assert_eq!(code(&early), StatusCode::CommandSequenceError);
    let other = Nqn::opaque("nqn.2026-11.test:other").unwrap();
    let answer = host.nvme_connect(queue, &connect(0), Cntlid::DYNAMIC, &other, true);
    assert_eq!(fabrics_code(&answer), StatusCode::ConnectInvalidParameters);
    assert_eq!(
        ConnectReply::from_bits(answer.result() as u32).invalid_field(),
        "SUBNQN"
    );
    let answer = host.nvme_connect(queue, &connect(3), Cntlid::DYNAMIC, &nqn(), true);
    assert_eq!(
        ConnectReply::from_bits(answer.result() as u32).invalid_field(),
        "QID"
    );
    let short = Connect {
        sqsize: 0,
        ..connect(0)
    };
    let answer = host.nvme_connect(queue, &short, Cntlid::DYNAMIC, &nqn(), true);
    assert_eq!(
        ConnectReply::from_bits(answer.result() as u32).invalid_field(),
        "SQSIZE"
    );
    // The data may also be fetched, which is what the Linux host asks for.
    let answer = host.nvme_connect(queue, &connect(0), Cntlid::DYNAMIC, &nqn(), false);
    assert!(answer.status().is_success(), "{answer:?}");
    host.hang_up(queue);
    world.expect_idle();
}

/// NVMe/RDMA private data is judged before a queue pair is made (RDMA 3.2).
#[test]
fn connection_requests_are_judged() {
    let world = World::new(&["ram:1M"]);
    let mut host = world.host();
    let good = RequestPrivate::new(Qid::ADMIN, 32, Cntlid::DYNAMIC);
    let dial = |host: &mut Host, private: &[u8]| {
        host.dial(Offer::admin(), private).map(|_| ()).unwrap_err()
    };
    assert_eq!(
        dial(&mut host, &good.bytes()[..4]),
        RejectStatus::InvalidHrqsize,
        "padded with zeros"
    );
    let mut wrong = good;
    wrong.recfmt = flexblk_nvme::U16::new(1);
    assert_eq!(
        dial(&mut host, wrong.bytes()),
        RejectStatus::InvalidRecordFormat
    );
    let huge = RequestPrivate::new(Qid::new(1), 2000, Cntlid::DYNAMIC);
    assert_eq!(dial(&mut host, huge.bytes()), RejectStatus::InvalidHsqsize);
    let beyond = RequestPrivate::new(Qid::new(65), 32, Cntlid::DYNAMIC);
    assert_eq!(dial(&mut host, beyond.bytes()), RejectStatus::InvalidQid);
    world.expect_idle();
}

/// Changes of namespaces reach the host as events, and I/O follows them; threads that have the
/// I/O queue and the Admin queue need not be the same.
#[test]
fn namespaces_change_under_the_host() {
    let world = World::with(&["ram:1M,block_size=4096,max_size=4M"], |config| {
        config.cores = vec![0, 0]
    });
    let mut host = world.host();
    let (admin, _, io) = open(&mut host);
    let config = AsyncEventConfig::new().with_namespace_attribute(true);
    let set = SetFeatures::new(config.into());
    assert!(
        host.command(admin, |cid| set.emit(cid, &Sgl::NONE))
            .status()
            .is_success()
    );
    let expect_change = |host: &mut Host, change: &dyn Fn(), wanted: &[u32]| {
        let cid = host.cid();
        host.send(admin, &AsyncEventRequest.emit(cid, &Sgl::NONE), None);
        assert_eq!(host.try_answer(admin, cid, Duration::from_millis(50)), None);
        change();
        assert_eq!(host.answer(admin, cid).result(), 0x0004_0002);
        let page = host.log(
            admin,
            &GetLogPage::new(LogPageId::ChangedNamespaces, 0, 4096),
        );
        let changed: Vec<u32> = ChangedNamespaces::view(&page)
            .unwrap()
            .iter()
            .map(Nsid::get)
            .collect();
        assert_eq!(changed, wanted);
    };
    let target = &world.target;
    let add = || {
        target
            .add_namespace(&nqn(), &Namespace::new("ram:2M,block_size=4096"))
            .unwrap();
    };
    expect_change(&mut host, &add, &[2]);
    let page = host.keyed(0, 4096);
    let second = Read {
        nsid: Nsid::new(2),
        ..read(511, 1)
    };
    assert!(
        host.command(io, |cid| second.emit(cid, &page))
            .status()
            .is_success()
    );

    assert_eq!(
        code(&host.command(io, |cid| read(256, 1).emit(cid, &page))),
        StatusCode::LbaOutOfRange
    );
    expect_change(
        &mut host,
        &|| {
            target
                .resize_namespace(&nqn(), Nsid::new(1), 2 << 20)
                .unwrap()
        },
        &[1],
    );
    assert!(
        host.command(io, |cid| read(256, 1).emit(cid, &page))
            .status()
            .is_success()
    );
    let bytes = host.identify(admin, &Identify::new(Cns::Namespace, Nsid::new(1)));
    assert_eq!(identify::Namespace::view(&bytes).unwrap().nsze.get(), 512);

    expect_change(
        &mut host,
        &|| target.remove_namespace(&nqn(), Nsid::new(2)).unwrap(),
        &[2],
    );
    let gone = host.command(io, |cid| second.emit(cid, &page));
    assert_eq!(code(&gone), StatusCode::InvalidNamespaceOrFormat);
    host.hang_up(io);
    host.hang_up(admin);
    world.expect_idle();
}

/// A reset closes the I/O queues before CSTS.RDY is 0; the Admin queue stays and the controller can
/// be enabled again (Base 3.7.2).
#[test]
fn reset_and_shutdown() {
    let world = World::with(&["ram:1M"], |config| config.cores = vec![0, 0]);
    let mut host = world.host();
    let (admin, cntlid, io) = open(&mut host);
    let second = host.io_queue(2, 32, cntlid, &nqn());
    host.set_cc(admin, Cc::new());
    let deadline = Instant::now() + Duration::from_secs(5);
    while host.csts(admin).rdy() {
        assert!(Instant::now() < deadline, "CSTS.RDY stays 1");
    }
    host.wait_closed(io);
    host.wait_closed(second);
    host.set_cc(admin, Cc::ENABLE);
    assert!(host.csts(admin).rdy());
    let again = host.io_queue(1, 32, cntlid, &nqn());
    host.set_cc(admin, Cc::ENABLE.with_shn(1));
    let deadline = Instant::now() + Duration::from_secs(5);
    while host.csts(admin).shst() != 2 {
        assert!(Instant::now() < deadline, "CSTS.SHST is not complete");
    }
    host.hang_up(again);
    host.hang_up(admin);
    world.expect_idle();
}

/// A host that falls silent is closed after its Keep Alive Timeout, with everything it had.
#[test]
fn silent_hosts_are_closed() {
    let world = World::new(&["ram:1M"]);
    let mut host = world.host();
    let (admin, cntlid) = host.controller_with(&nqn(), 300);
    let io = host.io_queue(1, 32, cntlid, &nqn());
    let page = host.keyed(0, 512);
    // Traffic of the I/O queue alone keeps it (TBKAS).
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1000) {
        assert!(
            host.command(io, |cid| read(0, 1).emit(cid, &page))
                .status()
                .is_success()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    host.wait_closed(admin);
    host.wait_closed(io);
    drop(host);
    world.expect_idle();
}

/// Keep Alive is off: a host that is there keeps its controller without sending anything, one whose
/// process is gone loses it, responses that nobody acknowledged or not.
#[test]
fn dead_hosts_without_keep_alive_are_found() {
    let world = World::with(&["ram:1M"], |config| {
        config.limits.longest_silence = Duration::from_millis(1000);
    });
    let mut host = world.host();
    let (admin, cntlid) = host.controller_with(&nqn(), 0);
    let io = host.io_queue(1, 32, cntlid, &nqn());
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(2500) {
        host.turn();
        assert_eq!(
            world.target.stats().threads[0].queues,
            2,
            "its transport answers"
        );
    }
    let page = host.keyed(0, 512);
    assert!(
        host.command(io, |cid| read(0, 1).emit(cid, &page))
            .status()
            .is_success()
    );
    assert_eq!(world.target.stats().threads[0].controllers, 1);
    // It dies without a word, with a response under way.
    let cid = host.cid();
    host.send(admin, &AsyncEventRequest.emit(cid, &Sgl::NONE), None);
    let cid = host.cid();
    host.send(io, &read(0, 1).emit(cid, &page), None);
    host.turn();
    drop(host);
    let start = Instant::now();
    world.expect_idle();
    assert!(
        start.elapsed() < Duration::from_secs(4),
        "{:?}",
        start.elapsed()
    );
}

/// With few buffers commands wait and are all answered; one that waits can be aborted. The device
/// is slow, so that they pile up.
#[test]
fn commands_wait_for_buffers() {
    let world = World::with(&[], |config| {
        config.memory_budget_bytes = 4 << 20;
        let text = "[[bdev]]\ntype = \"ram\"\nname = \"base\"\nsize = \"4M\"\nblock_size = 4096\n[[bdev]]\ntype = \"delay\"\nname = \"slow\"\nbase_bdev_name = \"base\"\navg_read_latency = 100000\navg_write_latency = 1000\n[[subsystem]]\nnqn = \"nqn.2026-11.test:wire\"\n[[subsystem.namespace]]\nbdev = \"slow\"\n";
        let parsed = Config::from_toml(text, std::path::Path::new("test")).unwrap();
        config.bdevs = parsed.bdevs;
        config.subsystems = parsed.subsystems;
    });
    let mut host = world.host();
    let (admin, _, io) = open(&mut host);
    let free = world.target.stats().threads[0].free_buffers;
    let commands: Vec<_> = (0..32u32)
        .map(|number| {
            let cid = host.cid();
            let sgl = host.keyed(number * 65_536, 65_536);
            host.send(io, &read(u64::from(number), 16).emit(cid, &sgl), None);
            cid
        })
        .collect();
    let last = *commands.last().unwrap();
    let abort = Abort {
        sqid: Qid::new(1),
        cid: last,
    };
    let aborted = host.command(admin, |cid| abort.emit(cid, &Sgl::NONE));
    assert_eq!(aborted.result(), 0, "it waited");
    for cid in &commands {
        let answer = host.answer(io, *cid);
        let wanted = if *cid == last {
            StatusCode::AbortRequested
        } else {
            StatusCode::Success
        };
        assert_eq!(code(&answer), wanted, "{cid}");
    }
    // In-capsule data waits too, and arrives unharmed.
    let blocks: Vec<_> = (0..48u64)
        .map(|number| {
            let bytes = pattern(number as u8, 4096);
            let at = number as u32 * 4096;
            host.put(at, &bytes);
            let cid = host.cid();
            let sgl = Sgl::InCapsule {
                offset: 0,
                length: 4096,
            };
            host.send(io, &write(number, 1).emit(cid, &sgl), Some((at, 4096)));
            cid
        })
        .collect();
    for cid in blocks {
        assert!(host.answer(io, cid).status().is_success());
    }
    for number in [0u64, 17, 47] {
        let sgl = host.keyed(0, 4096);
        assert!(
            host.command(io, |cid| read(number, 1).emit(cid, &sgl))
                .status()
                .is_success()
        );
        assert!(host.get(0, 4096) == pattern(number as u8, 4096));
    }
    // The last answer's buffer comes back with its acknowledgement.
    let deadline = Instant::now() + Duration::from_secs(5);
    while world.target.stats().threads[0].free_buffers != free {
        assert!(Instant::now() < deadline, "buffers are lost");
        host.turn();
    }
    assert!(
        world.target.stats().threads[0].buffer_waits > 0,
        "nothing waited"
    );
}

/// Without immediates, with SQ flow control, and with keys to be invalidated, answers are capsules;
/// SQHD counts.
#[test]
fn plain_nvme_over_rdma() {
    let world = World::new(&["ram:1M,block_size=4096"]);
    let mut host = world.host();
    let (admin, cntlid) = host.controller(&nqn());
    let (io, _) = host
        .connect_queue(Offer {
            qid: 1,
            entries: 8,
            cntlid,
            immediate: false,
        })
        .unwrap();
    let mut connect = Connect {
        sqsize: 7,
        ..connect(1)
    };
    connect.cattr.set_disable_sq_flow_control(false);
    let answer = host.nvme_connect(io, &connect, cntlid, &nqn(), true);
    assert!(answer.status().is_success());
    let bytes = pattern(3, 4096);
    assert!(
        write_in_capsule(&mut host, io, &write(0, 1), &bytes)
            .status()
            .is_success()
    );
    let sgl = host.keyed(65_536, 4096);
    let mut heads = Vec::new();
    for _ in 0..8 {
        match host.command(io, |cid| read(0, 1).emit(cid, &sgl)) {
            Answer::Capsule(cqe) => heads.push(cqe.sqhd.get()),
            Answer::Immediate(_) => panic!("not negotiated"),
        }
    }
    assert_eq!(heads, [3, 4, 5, 6, 7, 0, 1, 2]);
    assert!(host.get(65_536, 4096) == bytes);
    host.hang_up(admin);
    host.wait_closed(io);
    world.expect_idle();
}

/// Messages that are no command close the queue they came on, and only that.
#[test]
fn no_capsule() {
    let world = World::new(&["ram:1M"]);
    let mut host = world.host();
    let (admin, cntlid, io) = open(&mut host);
    host.send(io, &[0; 63], None);
    host.wait_closed(io);
    host.io_queue(2, 32, cntlid, &nqn());
    host.identify(admin, &Identify::new(Cns::Controller, Nsid::NONE));
}

/// The number of queues is what the memory budget carries; a queue beyond it is refused at Connect.
#[test]
fn queues_come_from_the_budget() {
    let world = World::with(&["ram:1M"], |config| config.memory_budget_bytes = 3 << 20);
    let mut host = world.host();
    let (admin, cntlid) = host.controller(&nqn());
    let granted = host.queues(admin, 64);
    assert!((4..=16).contains(&granted), "{granted}");
    let mut other = world.host();
    let (second, _) = other.controller(&nqn());
    assert_eq!(
        other.queues(second, 8),
        1,
        "nothing is left but the promise of one"
    );
    for qid in 1..=granted as u16 {
        host.io_queue(qid, 128, cntlid, &nqn());
    }
    let beyond = Offer {
        qid: granted as u16 + 1,
        entries: 128,
        cntlid,
        immediate: true,
    };
    // There may be memory for one more, and then Connect knows the number.
    match host.connect_queue(beyond) {
        Err(status) => assert_eq!(status, RejectStatus::NoResources),
        Ok((queue, _)) => {
            let connect = connect(beyond.qid);
            let answer = host.nvme_connect(queue, &connect, cntlid, &nqn(), true);
            assert_eq!(fabrics_code(&answer), StatusCode::ConnectInvalidParameters);
        }
    }
}

/// A host that speaks standard RoCEv2 framing gets the same service. Such hosts are answered at
/// RoCE's own port, so this one needs an address of its own.
#[test]
fn standard_framing() {
    let world = World::new(&["ram:4M,block_size=4096"]);
    let mut host = Host::with(world.port, |config| {
        config.bind = "127.0.0.77:4791".parse().unwrap();
        config.engine.flexins = false;
    });
    let (admin, _, io) = open(&mut host);
    let small = pattern(1, 1 << 12);
    host.put(1 << 20, &small);
    let sgl = host.keyed(1 << 20, 1 << 12);
    assert!(
        host.command(io, |cid| write(0, 1).emit(cid, &sgl))
            .status()
            .is_success()
    );
    let large = pattern(2, 1 << 18);
    host.put(1 << 20, &large);
    let sgl = host.keyed(1 << 20, 1 << 18);
    assert!(
        host.command(io, |cid| write(1, 64).emit(cid, &sgl))
            .status()
            .is_success()
    );
    let sgl = host.keyed(0, 65 << 12);
    assert!(
        host.command(io, |cid| read(0, 65).emit(cid, &sgl))
            .status()
            .is_success()
    );
    assert!(host.get(0, 1 << 12) == small && host.get(1 << 12, 1 << 18) == large);
    host.hang_up(io);
    host.hang_up(admin);
    world.expect_idle();
}

/// A target that is stopped tells its hosts, idle ones too, and is gone in no time.
#[test]
fn hosts_are_told_of_a_stop() {
    let world = World::new(&["ram:1M"]);
    let mut host = world.host();
    let (admin, _, io) = open(&mut host);
    let start = Instant::now();
    assert!(world.target.shutdown());
    assert!(start.elapsed() < Duration::from_secs(2));
    host.wait_closed(admin);
    host.wait_closed(io);
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "they had to find out by time-out"
    );
}

/// Queues that nobody connects to a controller make room for who comes later, before their time is up.
#[test]
fn queues_without_a_controller_make_room() {
    let world = World::with(&["ram:1M"], |config| {
        config.memory_budget_bytes = 32 << 20;
        config.cores = vec![0, 0];
    });
    let mut strangers = world.host();
    let large = Offer {
        entries: 1024,
        ..Offer::admin()
    };
    let mut made = 0;
    while strangers.connect_queue(large).is_ok() {
        made += 1;
        assert!(made < 1000, "the budget has no end");
    }
    assert!(made > 1);
    // One of them is served by the thread that has no stranger, as good as certainly.
    for _ in 0..8 {
        let mut host = world.host();
        let begin = Instant::now();
        while host.connect_queue(Offer::admin()).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(5), "no room");
        }
    }
}
