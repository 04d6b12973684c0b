//! The life of a controller as a host with NVMe/TCP sees it: number of queues, reset, shutdown, Keep
//! Alive, who it belongs to, and what its logs say of failures.

mod tcp_host;

use std::time::{Duration, Instant};

use flexblk_nvme::command::admin::{Cns, GetFeatures, Identify};
use flexblk_nvme::command::nvm::{Flush, Verify};
use flexblk_nvme::features::{
    AsyncEventConfig, FeatureId, HostIdFormat, KeepAlive as KeepAliveFeature, NumberOfQueues,
};
use flexblk_nvme::log::{ErrorEntry, LogPageId, Smart};
use flexblk_nvme::property::Cc;
use flexblk_nvme::status::CodeSpace;
use flexblk_nvme::tcp::IcReq;
use flexblk_nvme::{Cid, Cntlid, Cqe, HostId, Lba, Nsid, Sgl, StatusCode};
use flexblk_target::config::{Config, Namespace};
use flexblk_target::recorder::Kind;
use tcp_host::world::{World, nqn, pattern, read, read_back, transport, write, write_in_capsule};
use tcp_host::{Conn, Got, Pair};

const BLOCK: usize = 4096;

/// A world whose block devices are these tables, and whose namespace is on the device `top`.
fn with_bdevs(tables: &str) -> World {
    World::with("ram:1M", |config| {
        let parsed = Config::from_toml(tables, std::path::Path::new("test")).unwrap();
        config.bdevs = parsed.bdevs;
        config.subsystems[0].namespaces = vec![Namespace::new("top")];
    })
}

/// A RAM device whose reads take that long.
fn slow(read_us: u32) -> World {
    with_bdevs(&format!(
        "[[bdev]]\ntype = \"ram\"\nname = \"base\"\nsize = \"1M\"\nblock_size = 4096\n[[bdev]]\ntype = \"delay\"\nname = \"top\"\nbase_bdev_name = \"base\"\navg_read_latency = {read_us}\navg_write_latency = 0\n"
    ))
}

fn code(cqe: &Cqe) -> StatusCode {
    cqe.status().code_in(CodeSpace::Nvm)
}

fn send_read(io: &mut Conn) {
    let cid = io.cid();
    io.send(&read(0, 1).emit(cid, &transport(BLOCK)), &[]);
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(15);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn identify(admin: &mut Conn) -> StatusCode {
    let cid = admin.cid();
    let identify = Identify::new(Cns::Controller, Nsid::NONE);
    code(&admin.run(&identify.emit(cid, &transport(4096)), &[]).0)
}

/// Base 5.1.25.1.5: as many queues as asked for; FFFFh is Invalid Field; after an I/O queue was created,
/// Command Sequence Error; the value is the same until a reset.
#[test]
fn number_of_queues() {
    let world = World::new("ram:1M");
    let mut admin = Conn::open(world.address, IcReq::default());
    let cqe = admin.connect(0, 32, Cntlid::DYNAMIC, &nqn(), true);
    let cntlid = Cntlid::new(cqe.dword0() as u16);
    admin.set_cc(Cc::ENABLE);
    let cqe = admin.set_features(NumberOfQueues::from_bits(u32::MAX));
    assert_eq!(code(&cqe), StatusCode::InvalidField);
    let number = |admin: &mut Conn, asked| {
        let cqe = admin.set_features(NumberOfQueues::of(asked));
        assert!(cqe.status().is_success(), "{:?}", cqe.status());
        NumberOfQueues::from_bits(cqe.dword0()).pairs()
    };
    assert_eq!(number(&mut admin, 2), 2);
    assert_eq!(number(&mut admin, 3), 2);
    let mut io = Conn::open(world.address, IcReq::default());
    let beyond = io.connect(3, 32, cntlid, &nqn(), true);
    let wanted = StatusCode::ConnectInvalidParameters;
    assert_eq!(beyond.status().code_in(CodeSpace::Fabrics), wanted);
    drop(io);
    let mut io = Conn::open(world.address, IcReq::default());
    assert!(
        io.connect(2, 32, cntlid, &nqn(), true)
            .status()
            .is_success()
    );
    let cqe = admin.set_features(NumberOfQueues::of(2));
    assert_eq!(code(&cqe), StatusCode::CommandSequenceError);
    admin.set_cc(Cc::new());
    until("CSTS.RDY stays 1", || !admin.csts().rdy());
    admin.set_cc(Cc::ENABLE);
    assert_eq!(number(&mut admin, 3), 3);
    drop((admin, io));
    world.expect_idle();
}

/// Controller Level Reset (Base 3.7.2): the I/O queues go with their commands, Asynchronous Event Requests
/// are forgotten, CSTS.RDY is 1 until that is over; then the controller can be enabled again.
#[test]
fn a_reset_ends_what_was_under_way() {
    let world = slow(300_000);
    let mut pair = world.pair(IcReq::default());
    let notices = AsyncEventConfig::new().with_namespace_attribute(true);
    pair.admin.set_features(notices);
    let forgotten = pair.admin.request_event();
    for _ in 0..3 {
        send_read(&mut pair.io);
    }
    // All three are with the device when this is answered.
    let cid = pair.io.cid();
    let flush = Flush { nsid: Nsid::new(1) }.emit(cid, &Sgl::NONE_TRANSPORT);
    assert!(pair.io.run(&flush, &[]).0.status().is_success());
    pair.admin.set_cc(Cc::new());
    assert!(pair.admin.csts().rdy(), "the device has its commands still");
    assert_eq!(identify(&mut pair.admin), StatusCode::CommandSequenceError);
    until("CSTS.RDY stays 1", || !pair.admin.csts().rdy());
    assert_eq!(pair.io.next(), Got::End, "no command of before is answered");

    pair.admin.set_cc(Cc::ENABLE);
    assert!(pair.admin.csts().rdy());
    pair.admin.set_features(notices);
    let event = pair.admin.request_event();
    let mut io = Conn::open(world.address, IcReq::default());
    let cqe = io.connect(1, 32, pair.cntlid, &nqn(), true);
    assert!(cqe.status().is_success(), "{:?}", cqe.status());
    assert_eq!(read_back(&mut io, 0, BLOCK, BLOCK), vec![0; BLOCK]);
    let another = Namespace::new("ram:1M");
    world.target.add_namespace(&nqn(), &another).unwrap();
    match pair.admin.next_of(event) {
        Got::Response(cqe) => assert_eq!(cqe.dword0(), 0x0004_0002),
        other => panic!("{other:?}"),
    }
    assert!(!pair.admin.is_answered(forgotten));
    drop((pair, io));
    world.expect_idle();
}

/// CC.SHN, normal and abrupt (Base 3.6.1): I/O ends, CSTS.SHST becomes 10b, and commands are refused until
/// the controller is reset; the data is there.
#[test]
fn a_shutdown_ends_io_and_refuses_commands() {
    let world = slow(100_000);
    for shn in [1, 2] {
        let mut pair = world.pair(IcReq::default());
        let bytes = pattern(shn, BLOCK);
        let cqe = write_in_capsule(&mut pair.io, 5, &bytes, BLOCK);
        assert!(cqe.status().is_success());
        send_read(&mut pair.io);
        pair.admin.set_cc(Cc::ENABLE.with_shn(shn));
        until("CSTS.SHST is not complete", || {
            pair.admin.csts().shst() == 2
        });
        match pair.io.next() {
            // The read was answered before it came to the shutdown.
            Got::Data { .. } => {}
            end => assert_eq!(end, Got::End),
        }
        assert_eq!(identify(&mut pair.admin), StatusCode::CommandSequenceError);
        let mut io = Conn::open(world.address, IcReq::default());
        let refused = io.connect(1, 32, pair.cntlid, &nqn(), true);
        assert_eq!(code(&refused), StatusCode::CommandSequenceError);
        pair.admin.set_cc(Cc::new());
        until("CSTS.RDY stays 1", || !pair.admin.csts().rdy());
        pair.admin.set_cc(Cc::ENABLE);
        assert_eq!(pair.admin.csts().shst(), 0);
        let mut io = Conn::open(world.address, IcReq::default());
        let cqe = io.connect(1, 32, pair.cntlid, &nqn(), true);
        assert!(cqe.status().is_success(), "{:?}", cqe.status());
        assert_eq!(read_back(&mut io, 5, BLOCK, BLOCK), bytes);
    }
    world.expect_idle();
}

/// Base 3.9.3.2 (TBKAS): commands of any queue keep the controller without a Keep Alive command; without
/// any for up to two timeouts the host is gone: its connections are closed, all that it had is freed, and
/// the flight recorder says why. With a timeout of 0 silence is no reason.
#[test]
fn traffic_keeps_a_controller_and_silence_ends_it() {
    let world = World::new("ram:1M");
    let pair = |kato_ms| {
        let mut admin = Conn::open(world.address, IcReq::default());
        admin.kato_ms = kato_ms;
        Pair::on(admin, world.address, IcReq::default(), &nqn(), 32, true)
    };
    let mut silent = pair(0);
    let mut busy = pair(300);
    let off = busy.admin.set_features(KeepAliveFeature::new());
    assert_eq!(code(&off), StatusCode::KeepAliveTimeoutInvalid);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(1000) {
        read_back(&mut busy.io, 0, 512, 512);
        std::thread::sleep(Duration::from_millis(20));
    }
    let begin = Instant::now();
    assert_eq!(busy.io.next(), Got::End);
    assert_eq!(busy.admin.next(), Got::End);
    let took = begin.elapsed();
    assert!(took >= Duration::from_millis(250), "{took:?}");
    until("not recorded", || {
        let events = world.target.flight_recorder();
        let mut expired = events.iter().map(|(_, event)| event);
        expired
            .any(|event| event.kind == Kind::KeepAliveExpired && event.cntlid == busy.cntlid.get())
    });
    assert_eq!(identify(&mut silent.admin), StatusCode::Success);
    read_back(&mut silent.io, 0, 512, 512);
    drop((silent, busy));
    world.expect_idle();
}

/// With dynamic controllers each Connect of an Admin queue makes one (Base 3.1.2.1), also to a host that
/// has one already: so Linux and SPDK have it. HOSTNQN is who may connect; HOSTID is kept as it came, a
/// second one under the same name is another host to reservations and to Get Features (5.1.25.1.27). An I/O
/// queue goes by the controller's name, and is refused under another one.
#[test]
fn the_same_host_again() {
    let world = World::new("ram:1M");
    let pair = |hostid| {
        let mut admin = Conn::open(world.address, IcReq::default());
        admin.hostid = HostId::from_bytes([hostid; 16]);
        Pair::on(admin, world.address, IcReq::default(), &nqn(), 32, true)
    };
    let mut pairs = [pair(1), pair(1), pair(2)];
    let mut cntlids = pairs.each_ref().map(|pair| pair.cntlid.get());
    cntlids.sort_unstable();
    assert!(cntlids.is_sorted_by(|a, b| a < b), "{cntlids:?}");
    for (number, pair) in pairs.iter_mut().enumerate() {
        let bytes = pattern(number as u8, 512);
        assert!(
            write_in_capsule(&mut pair.io, 0, &bytes, 512)
                .status()
                .is_success()
        );
        let get = GetFeatures {
            cdw11: HostIdFormat::new().with_extended(true).into_bits(),
            ..GetFeatures::new(FeatureId::HostId)
        };
        let cid = pair.admin.cid();
        let (cqe, own) = pair.admin.run(&get.emit(cid, &transport(16)), &[]);
        assert!(cqe.status().is_success(), "{:?}", cqe.status());
        assert_eq!(own, pair.admin.hostid.to_bytes());
    }
    let last = pattern(2, 512);
    assert_eq!(read_back(&mut pairs[0].io, 0, 512, 512), last);
    let mut stray = Conn::open(world.address, IcReq::default());
    stray.hostnqn = flexblk_nvme::Nqn::opaque("nqn.2026-11.test:somebody-else").unwrap();
    let refused = stray.connect(2, 32, pairs[0].cntlid, &nqn(), true);
    let wanted = StatusCode::ConnectInvalidParameters;
    assert_eq!(refused.status().code_in(CodeSpace::Fabrics), wanted);
    // One that ends takes nothing of the others with it.
    let [first, mut second, third] = pairs;
    drop((first, third, stray));
    until("not closed", || world.target.stats().controllers == 1);
    read_back(&mut second.io, 0, 512, 512);
    drop(second);
    world.expect_idle();
}

/// What the device fails is in the Error Information log with queue, command, status, block and namespace
/// (Base 5.1.12.1.2), newest first, and in SMART's counters (5.1.12.1.3), which have every command.
#[test]
fn failures_of_the_device_are_told_truly() {
    let world = with_bdevs(
        "[[bdev]]\ntype = \"ram\"\nname = \"base\"\nsize = \"1M\"\nblock_size = 4096\n[[bdev]]\ntype = \"error\"\nname = \"top\"\nbase_bdev_name = \"base\"\nmedia_errors = [{ lba = 7 }, { lba = 9, on = \"write\" }]\n",
    );
    let mut pair = world.pair(IcReq::default());
    let bytes = pattern(1, 2 * BLOCK);
    for lba in [0, 2, 4] {
        assert!(
            write_in_capsule(&mut pair.io, lba, &bytes, BLOCK)
                .status()
                .is_success()
        );
    }
    read_back(&mut pair.io, 0, BLOCK, BLOCK);
    let io = &mut pair.io;
    let bad_read = io.cid();
    let (read_cqe, _) = io.run(&read(7, 1).emit(bad_read, &transport(BLOCK)), &[]);
    assert_eq!(code(&read_cqe), StatusCode::UnrecoveredReadError);
    let bad_write = io.cid();
    let (write_cqe, _) = io.run(&write(9, 1).emit(bad_write, &transport(BLOCK)), &bytes);
    assert_eq!(code(&write_cqe), StatusCode::WriteFault);
    let bad_verify = io.cid();
    let verify = Verify {
        nsid: Nsid::new(1),
        slba: Lba::new(7),
        blocks: 1,
        ..Default::default()
    };
    let (verify_cqe, _) = io.run(&verify.emit(bad_verify, &Sgl::NONE_TRANSPORT), &[]);
    assert_eq!(code(&verify_cqe), StatusCode::UnrecoveredReadError);

    let page = pair.admin.log(LogPageId::Error, 64 * 4);
    let entries: Vec<_> = page
        .chunks(ErrorEntry::SIZE)
        .map(|entry| ErrorEntry::view(entry).unwrap())
        .collect();
    let expect = |entry: &ErrorEntry, count, cid: Cid, opcode, cqe: &Cqe, lba| {
        assert_eq!((entry.count.get(), entry.sqid.get()), (count, 1));
        assert_eq!((entry.cid.get(), entry.opcode), (cid.get(), opcode));
        assert_eq!(
            entry.status(),
            cqe.status(),
            "with More, as the host got it"
        );
        assert_eq!((entry.lba.get(), entry.nsid.get()), (lba, 1));
        let (tcp, no_parameter, current) = (3, 0xFFFF, 1);
        assert_eq!(
            (entry.trtype, entry.location.get(), entry.version),
            (tcp, no_parameter, current)
        );
    };
    expect(entries[0], 3, bad_verify, 0x0C, &verify_cqe, 7);
    expect(entries[1], 2, bad_write, 0x01, &write_cqe, 9);
    expect(entries[2], 1, bad_read, 0x02, &read_cqe, 7);
    assert_eq!(*entries[3], ErrorEntry::zeroed());

    let page = pair.admin.log(LogPageId::Smart, 512);
    let smart = Smart::view(&page).unwrap();
    let numbers = [
        (smart.host_reads.get(), 2),
        (smart.host_writes.get(), 4),
        // 512 bytes, thousands, rounded up: 8 units and 48.
        (smart.data_units_read.get(), 1),
        (smart.data_units_written.get(), 1),
        (smart.media_errors.get(), 3),
        (smart.error_entries.get(), 3),
        (smart.power_cycles.get(), 1),
        (smart.power_on_hours.get(), 0),
        (smart.unsafe_shutdowns.get(), 0),
    ];
    for (index, (value, wanted)) in numbers.into_iter().enumerate() {
        assert_eq!(value, wanted, "number {index}");
    }
    drop(pair);
    world.expect_idle();
}
