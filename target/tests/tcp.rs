//! The target as a host with NVMe/TCP sees it: set-up, data both ways, what is refused and how, who is
//! thrown out, what is freed.

mod tcp_host;

use std::io::Read as _;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use flexblk_nvme::command::admin::{Cns, Identify, KeepAlive};
use flexblk_nvme::log::LogPageId;
use flexblk_nvme::log::discovery::{Page, TransportType};
use flexblk_nvme::property::Cc;
use flexblk_nvme::status::CodeSpace;
use flexblk_nvme::tcp::{Alignment, Digests, End, FatalStatus, H2cData, IcReq, TermReq};
use flexblk_nvme::{Cid, Cntlid, Nqn, Nsid, Sgl, StatusCode, identify};
use flexblk_target::config::{Config, TcpDigest};
use tcp_host::world::{
    World, nqn, pattern, read, read_back, transport, with, write, write_in_capsule, write_remote,
};
use tcp_host::{Conn, Got, Pair};

/// 4 KiB, 64 KiB and 1 MiB, in the capsule and by R2T, on memory and on a file, with every
/// combination of digests, with and without flow control.
#[test]
fn data_comes_back_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    std::fs::write(&image, vec![0; 8 << 20]).unwrap();
    let file = format!("file:{}", image.display());
    for bdev in ["ram:8M", &file] {
        let world = World::new(bdev);
        for bits in 0..4 {
            let digests = Digests::from_bits_truncate(bits);
            for flow_control in [true, false] {
                let mut pair = Pair::new(world.address, with(digests), &nqn(), 32, flow_control);
                let io = &mut pair.io;
                assert_eq!(io.framing.digests, digests);
                for (seed, len) in [(1, 4096), (2, 65536), (3, 1 << 20), (4, 8192)] {
                    let bytes = pattern(seed ^ bits, len);
                    let lba = u64::from(seed) * 2048;
                    let cqe = write_remote(io, lba, &bytes, 512);
                    assert!(cqe.status().is_success(), "{bdev}: {:?}", cqe.status());
                    assert_eq!(read_back(io, lba, len, 512), bytes, "{bdev} {digests:?}");
                    if len <= 8192 {
                        let bytes = pattern(seed ^ bits ^ 0x80, len);
                        let cqe = write_in_capsule(io, lba, &bytes, 512);
                        assert!(cqe.status().is_success());
                        assert_eq!(read_back(io, lba, len, 512), bytes);
                    }
                }
            }
        }
        world.expect_idle();
        let direct = world.counter("tcp_bytes_direct_rx");
        assert!(
            direct > 1 << 20,
            "payload is received where it belongs: {direct}"
        );
        assert!(world.target.shutdown());
    }
}

/// Every byte of both directions in a write of its own, H2CData in small PDUs, and the largest
/// alignment that a host can ask for.
#[test]
fn any_fragmentation() {
    let world = World::new("ram:1M");
    let request = IcReq {
        hpda: Alignment::from_raw(31).unwrap(),
        digests: Digests::all(),
        maxr2t: 3,
    };
    let mut pair = world.pair(request);
    for fragment in [1, 7] {
        pair.io.fragment = fragment;
        pair.io.h2c_bytes = 700;
        let bytes = pattern(9, 4096);
        assert!(
            write_remote(&mut pair.io, 0, &bytes, 512)
                .status()
                .is_success()
        );
        assert_eq!(read_back(&mut pair.io, 0, 4096, 512), bytes);
        let bytes = pattern(10, 8192);
        assert!(
            write_in_capsule(&mut pair.io, 8, &bytes, 512)
                .status()
                .is_success()
        );
        assert_eq!(read_back(&mut pair.io, 8, 8192, 512), bytes);
    }
    // Without a data digest the large one goes straight into the namespace, in pieces.
    let mut pair = world.pair(IcReq::default());
    pair.io.fragment = 30_000;
    let bytes = pattern(11, 512 << 10);
    assert!(
        write_remote(&mut pair.io, 64, &bytes, 512)
            .status()
            .is_success()
    );
    assert_eq!(read_back(&mut pair.io, 64, 512 << 10, 512), bytes);
}

/// Many commands in one write to the socket; answers of reads carry SUCCESS when flow control is off,
/// and no response capsule then (TCP 3.3.2.1).
#[test]
fn a_full_queue_at_once() {
    let world = World::new("ram:1M,block_size=4096");
    for flow_control in [true, false] {
        let mut pair = Pair::new(world.address, IcReq::default(), &nqn(), 64, flow_control);
        let io = &mut pair.io;
        let mut wire = Vec::new();
        for n in 0..63u16 {
            let sgl = Sgl::InCapsule {
                offset: 0,
                length: 4096,
            };
            let sqe = write(n.into(), 1).emit(Cid::new(n), &sgl);
            wire.extend(io.capsule(&sqe, &pattern(n as u8, 4096)));
        }
        io.write(&wire);
        for n in 0..63 {
            let (cqe, _) = io.finish(Cid::new(n), &[]);
            assert!(cqe.status().is_success());
        }
        let mut wire = Vec::new();
        for n in 0..63u16 {
            let sqe = read(n.into(), 1).emit(Cid::new(n), &transport(4096));
            wire.extend(io.capsule(&sqe, &[]));
        }
        io.write(&wire);
        for n in 0..63u16 {
            match io.next_of(Cid::new(n)) {
                Got::Data { bytes, success, .. } => {
                    assert_eq!(bytes, pattern(n as u8, 4096));
                    assert_eq!(success, !flow_control);
                }
                other => panic!("{other:?}"),
            }
            if flow_control {
                assert!(matches!(io.next_of(Cid::new(n)), Got::Response(_)));
            }
        }
        let cid = io.cid();
        let (cqe, _) = io.run(&read(1 << 40, 1).emit(cid, &transport(4096)), &[]);
        let error = cqe.status().code_in(CodeSpace::Nvm);
        assert_eq!(error, StatusCode::LbaOutOfRange);
    }
    world.expect_idle();
}

/// Identify says what the transport can do; a keep-alive, an event request that stays, and the
/// discovery log, which has every subsystem over both transports.
#[test]
fn admin_commands_and_discovery() {
    let world = World::new("ram:1M");
    let mut pair = world.pair(with(Digests::HEADER));
    let admin = &mut pair.admin;
    admin.request_event();
    let cid = admin.cid();
    let identify = Identify::new(Cns::Controller, Nsid::NONE);
    let (cqe, bytes) = admin.run(&identify.emit(cid, &transport(4096)), &[]);
    assert!(cqe.status().is_success());
    let id = identify::Controller::view(&bytes).unwrap();
    assert_eq!(id.in_capsule_bytes(), 8192);
    // SGLs: supported, offsets into the capsule, transport data blocks; no keyed ones.
    assert_eq!(id.sgls.get(), 1 | 1 << 20 | 1 << 21);
    let cid = admin.cid();
    let (cqe, _) = admin.run(&KeepAlive.emit(cid, &Sgl::NONE_TRANSPORT), &[]);
    assert!(cqe.status().is_success());

    let mut discovery = Conn::open(world.address, IcReq::default());
    let cqe = discovery.connect(0, 32, Cntlid::DYNAMIC, &Nqn::discovery(), true);
    assert!(cqe.status().is_success());
    discovery.set_cc(Cc::ENABLE);
    let bytes = discovery.log(LogPageId::Discovery, 5 * 1024);
    let page = Page::parse(&bytes).unwrap();
    let mut seen: Vec<(TransportType, String, String)> = page
        .entries()
        .map(|entry| {
            let record = entry.record().unwrap();
            (
                record.trtype,
                record.subnqn.as_str().to_owned(),
                record.trsvcid,
            )
        })
        .collect();
    seen.sort_by_key(|(trtype, subnqn, _)| (trtype.raw(), subnqn.clone()));
    let port = world.address.port().to_string();
    let own = Nqn::discovery().as_str().to_owned();
    let sub = nqn().as_str().to_owned();
    assert_eq!(
        seen,
        [
            (TransportType::Tcp, own.clone(), port.clone()),
            (TransportType::Tcp, sub.clone(), port),
            (TransportType::Flexins, own, "4420".to_owned()),
            (TransportType::Flexins, sub, "4420".to_owned()),
        ]
    );
    drop((pair, discovery));
    world.expect_idle();
}

/// Wrong data never gets into the namespace: the command fails with Transient Transport Error, may be
/// retried, and the connection goes on (TCP 3.5, Digest Error handling).
#[test]
fn data_digest_errors_fail_the_command() {
    for bdev in ["ram:4M", "null:4M"] {
        let world = World::new(bdev);
        let mut pair = world.pair(with(Digests::DATA));
        let before = read_back(&mut pair.io, 0, 1 << 20, 512);
        pair.io.spoil_data_digest = true;
        let transient = |cqe: flexblk_nvme::Cqe| {
            assert_eq!(
                cqe.status().code_in(CodeSpace::Nvm),
                StatusCode::TransientTransportError
            );
            assert!(!cqe.status().dnr(), "may be retried");
        };
        transient(write_in_capsule(&mut pair.io, 0, &pattern(1, 4096), 512));
        transient(write_remote(&mut pair.io, 0, &pattern(2, 4096), 512));
        transient(write_remote(&mut pair.io, 0, &pattern(3, 1 << 20), 512));
        pair.io.spoil_data_digest = false;
        assert_eq!(read_back(&mut pair.io, 0, 1 << 20, 512), before);
        let cqe = write_remote(&mut pair.io, 0, &pattern(4, 1 << 20), 512);
        assert!(cqe.status().is_success());
        assert!(world.counter("tcp_data_digest_errors") >= 3);
        drop(pair);
        world.expect_idle();
    }
}

/// Digests are used when the host asks and the target allows; what the target requires and the host
/// does not ask for is an unsupported parameter at DGST.
#[test]
fn digests_are_negotiated() {
    let world = World::with("ram:1M", |config| {
        let tcp = config.tcp.as_mut().unwrap();
        tcp.header_digest = TcpDigest::Require;
        tcp.data_digest = TcpDigest::Off;
    });
    let conn = Conn::open(world.address, with(Digests::all()));
    assert_eq!(conn.framing.digests, Digests::HEADER);
    let mut conn = Conn::raw(world.address);
    conn.write(&IcReq::default().emit());
    let term = Got::Term(TermReq {
        from: End::Controller,
        fes: FatalStatus::UnsupportedParameter,
        fei: 11,
    });
    assert_eq!(conn.next(), term);
    assert_eq!(conn.next(), Got::End);
}

/// Sends bytes on a fresh connection, and gives what the target says to it before it closes.
fn terminated(mut conn: Conn, bytes: &[u8]) -> (FatalStatus, u32) {
    conn.write(bytes);
    loop {
        match conn.next() {
            Got::Term(term) => {
                assert_eq!(conn.next(), Got::End);
                return (term.fes, term.fei);
            }
            Got::End => panic!("closed without a C2HTermReq"),
            _ => {}
        }
    }
}

/// Malformed PDUs of every kind, and right ones at the wrong time.
#[test]
fn broken_protocol_is_answered_with_a_term_req() {
    let world = World::new("ram:4M");
    let raw = || Conn::raw(world.address);
    let open = |digests| Conn::open(world.address, with(digests));
    let none = Digests::empty();
    use FatalStatus::{
        DataTransferOutOfRange, HeaderDigestError, InvalidPduHeaderField, LimitExceeded,
        PduSequenceError, UnsupportedParameter,
    };
    let invalid = |offset| (InvalidPduHeaderField, offset);

    // Set-up: a version, an alignment, lengths that are wrong; not first, and twice.
    let icreq = |at: usize, value: u8| {
        let mut bytes = IcReq::default().emit();
        bytes[at] = value;
        terminated(raw(), &bytes)
    };
    assert_eq!(icreq(8, 1), (UnsupportedParameter, 8));
    assert_eq!(icreq(10, 32), invalid(10));
    assert_eq!(icreq(2, 24), invalid(2));
    assert_eq!(icreq(4, 24), invalid(4));
    let keep_alive = KeepAlive.emit(Cid::new(1), &Sgl::NONE_TRANSPORT);
    let early = raw().capsule(&keep_alive, &[]);
    assert_eq!(terminated(raw(), &early), (PduSequenceError, 0));
    let twice = IcReq::default().emit();
    assert_eq!(terminated(open(none), &twice), (PduSequenceError, 0));

    // PDUs of the other direction, and reserved ones.
    for kind in [1, 3, 5, 7, 8, 9, 10, 255] {
        let bytes = [kind, 0, 24, 0, 24, 0, 0, 0];
        assert_eq!(terminated(open(none), &bytes), invalid(0), "{kind}");
    }

    // Command capsules.
    let capsule = |digests, at: usize, value: u8| {
        let conn = open(digests);
        let mut bytes = conn.capsule(&keep_alive, &[0; 512]);
        bytes[at] = value;
        terminated(conn, &bytes)
    };
    assert_eq!(capsule(none, 1, 1), invalid(1));
    assert_eq!(capsule(Digests::all(), 1, 0), invalid(1));
    assert_eq!(capsule(none, 2, 64), invalid(2));
    assert_eq!(capsule(none, 3, 8), invalid(3));
    assert_eq!(capsule(none, 6, 1), invalid(4));
    let conn = open(Digests::HEADER);
    let mut bytes = conn.capsule(&keep_alive, &[]);
    bytes[20] ^= 4;
    let digest = u32::from_le_bytes(bytes[72..76].try_into().unwrap());
    assert_eq!(terminated(conn, &bytes), (HeaderDigestError, digest));

    // Data that nobody asked for, and data that is not what was asked for.
    let data = |change: &dyn Fn(&mut H2cData), len: usize| {
        let mut pair = world.pair(IcReq::default());
        let cid = pair.io.cid();
        let sqe = write(0, 16).emit(cid, &transport(8192));
        pair.io.send(&sqe, &[]);
        let Got::R2t(r2t) = pair.io.next_of(cid) else {
            panic!("an R2T")
        };
        assert_eq!((r2t.offset, r2t.len_bytes), (0, 8192));
        let mut header = H2cData {
            cid,
            ttag: r2t.ttag,
            offset: 0,
            len_bytes: len as u32,
            last: false,
        };
        change(&mut header);
        let bytes = pair.io.h2c(&header, &vec![1; len]);
        terminated(pair.io, &bytes)
    };
    assert_eq!(data(&|h| h.ttag ^= 0x4000, 4096), invalid(10));
    assert_eq!(data(&|h| h.cid = Cid::new(0x7777), 4096), invalid(8));
    assert_eq!(data(&|h| h.offset = 4, 4096), (PduSequenceError, 0));
    assert_eq!(data(&|h| h.last = true, 4096), (PduSequenceError, 0));
    assert_eq!(
        data(&|h| h.offset = 8192, 4096),
        (DataTransferOutOfRange, 0)
    );
    assert_eq!(
        data(&|h| h.offset = u32::MAX - 3, 4096),
        (DataTransferOutOfRange, 0)
    );
    let too_long = (1 << 20) + 4;
    assert_eq!(data(&|_| {}, too_long), (LimitExceeded, 0));
    let conn = open(none);
    let unasked = H2cData {
        cid: Cid::new(1),
        ttag: 0,
        offset: 0,
        len_bytes: 4,
        last: true,
    };
    let bytes = conn.h2c(&unasked, &[0; 4]);
    assert_eq!(terminated(conn, &bytes), (PduSequenceError, 0));

    // A TermReq of the host ends the connection without an answer; so does a malformed one.
    for plen in [24, 23, 153] {
        let mut conn = open(none);
        let mut term = [0; 24];
        (term[0], term[2], term[4], term[8]) = (2, 24, plen, 1);
        conn.write(&term);
        assert_eq!(conn.next(), Got::End, "PLEN {plen}");
    }
    world.expect_idle();
}

/// Base 3.3: a queue's first command is Connect; anything else is Command Sequence Error, and the
/// connection can still be used. A second Connect too.
#[test]
fn capsules_in_the_wrong_state() {
    let world = World::new("ram:1M");
    let mut conn = Conn::open(world.address, IcReq::default());
    let code = |cqe: flexblk_nvme::Cqe| cqe.status().code_in(CodeSpace::Fabrics);
    let cid = conn.cid();
    let (cqe, _) = conn.run(&read(0, 1).emit(cid, &transport(512)), &[]);
    assert_eq!(code(cqe), StatusCode::CommandSequenceError);
    let mut conn = Conn::open(world.address, IcReq::default());
    let cqe = conn.connect(0, 32, Cntlid::DYNAMIC, &nqn(), true);
    assert!(cqe.status().is_success());
    let again = conn.connect(0, 32, Cntlid::DYNAMIC, &nqn(), true);
    assert_eq!(code(again), StatusCode::CommandSequenceError);
    // A queue of a controller that there is not, one too large, and a keyed descriptor.
    let mut io = Conn::open(world.address, IcReq::default());
    let cqe = io.connect(1, 32, Cntlid::new(4711), &nqn(), true);
    assert_eq!(code(cqe), StatusCode::ConnectInvalidParameters);
    let mut large = Conn::open(world.address, IcReq::default());
    let cqe = large.connect(0, 2000, Cntlid::DYNAMIC, &nqn(), true);
    assert_eq!(code(cqe), StatusCode::ConnectInvalidParameters);
    let mut pair = world.pair(IcReq::default());
    let cid = pair.io.cid();
    let keyed = Sgl::Keyed {
        address: 0,
        length: 512,
        key: 1,
        invalidate: false,
    };
    let (cqe, _) = pair.io.run(&read(0, 1).emit(cid, &keyed), &[]);
    assert_eq!(
        cqe.status().code_in(CodeSpace::Nvm),
        StatusCode::SglDescriptorTypeInvalid
    );
}

/// More commands than the queue has entries: they wait, the connection stays, all are answered.
#[test]
fn a_queue_that_is_overfilled_is_slowed_down() {
    let world = World::new("ram:1M,block_size=4096");
    let mut pair = Pair::new(world.address, IcReq::default(), &nqn(), 8, false);
    let io = &mut pair.io;
    let count = 4000u16;
    let mut writer = io.socket.try_clone().unwrap();
    let mut wire = Vec::new();
    for n in 0..count {
        let sqe = read(u64::from(n % 256), 1).emit(Cid::new(n), &transport(4096));
        wire.extend(io.capsule(&sqe, &[]));
    }
    let sender = std::thread::spawn(move || std::io::Write::write_all(&mut writer, &wire).unwrap());
    // Long enough that the target has run into the end of what it may send.
    std::thread::sleep(Duration::from_millis(300));
    for n in 0..count {
        let (cqe, bytes) = io.finish(Cid::new(n), &[]);
        assert!(cqe.status().is_success());
        assert_eq!(bytes.len(), 4096);
    }
    sender.join().unwrap();
    assert!(world.counter("tcp_paused") > 0);
    drop(pair);
    world.expect_idle();
}

/// Hosts that go at every moment leave nothing behind.
#[test]
fn hosts_that_vanish() {
    let text = "[[bdev]]\ntype = \"ram\"\nname = \"base\"\nsize = \"4M\"\n[[bdev]]\ntype = \"delay\"\nname = \"slow\"\nbase_bdev_name = \"base\"\navg_read_latency = 2000\navg_write_latency = 2000\n";
    let devices = Config::from_toml(text, std::path::Path::new("t.toml")).unwrap();
    let world = World::with("slow", |config| config.bdevs = devices.bdevs);
    for round in 0..30u32 {
        let mut pair = world.pair(with(Digests::from_bits_truncate(round as u8)));
        let cid = pair.io.cid();
        let sqe = write(0, 2048).emit(cid, &transport(1 << 20));
        pair.io.send(&sqe, &[]);
        if round % 3 > 0
            && let Got::R2t(r2t) = pair.io.next_of(cid)
        {
            // In the middle of the data.
            let header = H2cData {
                cid,
                ttag: r2t.ttag,
                offset: 0,
                len_bytes: 1 << 20,
                last: true,
            };
            let bytes = pair.io.h2c(&header, &vec![1; 1 << 20]);
            pair.io.write(&bytes[..(bytes.len() / 30) * round as usize]);
        }
        for n in 0..8 {
            let cid = pair.io.cid();
            let sqe = read(n * 256, 256).emit(cid, &transport(128 << 10));
            if round % 3 == 0 {
                pair.io.send(&sqe, &[]);
            }
        }
        if round % 2 == 0 {
            // Reset rather than closed: there is data that nobody has read.
            drop(pair.io);
            drop(pair.admin);
        } else {
            drop(pair.admin);
            drop(pair.io);
        }
    }
    world.expect_idle();
}

/// A block is seen as it was before a write or after it, also while the write's data is coming, and when its
/// host goes in the middle (NVM Command Set, AWUN).
#[test]
fn blocks_are_never_half_written() {
    const BLOCK: usize = 4096;
    let world = World::new("ram:1M,block_size=4096");
    let mut reader = world.pair(IcReq::default());
    {
        let mut pair = world.pair(IcReq::default());
        let cid = pair.io.cid();
        pair.io
            .send(&write(0, 4).emit(cid, &transport(4 * BLOCK)), &[]);
        let Got::R2t(r2t) = pair.io.next_of(cid) else {
            panic!("an R2T")
        };
        let header = H2cData {
            cid,
            ttag: r2t.ttag,
            offset: 0,
            len_bytes: 4 * BLOCK as u32,
            last: true,
        };
        let bytes = pair.io.h2c(&header, &vec![1; 4 * BLOCK]);
        // All of the first block, a half of the second.
        pair.io.write(&bytes[..bytes.len() - 5 * BLOCK / 2]);
        std::thread::sleep(Duration::from_millis(100));
        let seen = read_back(&mut reader.io, 0, 4 * BLOCK, BLOCK);
        assert!(
            seen.chunks(BLOCK)
                .all(|block| block.iter().all(|byte| *byte == block[0]))
        );
    }
    std::thread::sleep(Duration::from_millis(100));
    let left = read_back(&mut reader.io, 0, 4 * BLOCK, BLOCK);
    assert!(
        left.chunks(BLOCK)
            .all(|block| block.iter().all(|byte| *byte == block[0]))
    );
}

/// A host that does not read its answers holds up nobody, and goes with its controller.
#[test]
fn a_host_that_does_not_read() {
    // Without the kernel's copy its data is ours until the connection is reset.
    for threshold in [None, Some(4096)] {
        let world = World::with("ram:4M", |config| {
            let tcp = config.tcp.as_mut().unwrap();
            tcp.zerocopy_threshold = threshold;
        });
        a_deaf_host(&world);
    }
}

fn a_deaf_host(world: &World) {
    let mut deaf = Pair::new(world.address, IcReq::default(), &nqn(), 128, true);
    let mut wire = Vec::new();
    for n in 0..127u16 {
        let sqe = read(0, 2048).emit(Cid::new(n), &transport(1 << 20));
        wire.extend(deaf.io.capsule(&sqe, &[]));
    }
    deaf.io.write(&wire);
    let mut other = world.pair(IcReq::default());
    let begin = Instant::now();
    for n in 0..100 {
        let bytes = pattern(n, 4096);
        assert!(
            write_remote(&mut other.io, 0, &bytes, 512)
                .status()
                .is_success()
        );
        assert_eq!(read_back(&mut other.io, 0, 4096, 512), bytes);
    }
    assert!(begin.elapsed() < Duration::from_secs(5));
    drop((deaf.admin, other));
    // Its I/O queue goes with the controller, although it never reads.
    world.expect("tcp_connections", 0);
    drop(deaf.io);
    world.expect_idle();
}

/// Port scanners: connect and nothing, a byte now and then, half an ICReq, ICReq and then nothing.
/// The oldest go when there are too many, all go after ten seconds, and a host gets in meanwhile.
#[test]
fn strangers_are_bounded_and_thrown_out() {
    let world = World::new("ram:1M");
    let mut scanners = Vec::new();
    for n in 0..800 {
        let mut socket = TcpStream::connect(world.address).unwrap();
        let icreq = IcReq::default().emit();
        let part = match n % 4 {
            0 => &icreq[..0],
            1 => &icreq[..1],
            2 => &icreq[..64],
            _ => &icreq[..],
        };
        std::io::Write::write_all(&mut socket, part).ok();
        scanners.push(socket);
    }
    let begin = Instant::now();
    world.expect("tcp_accepted", 800);
    // The evicted ones are gone when the kernel has let go of them.
    while world.counter("tcp_connections") > 256 {
        assert!(begin.elapsed() < Duration::from_secs(5));
    }
    let mut pair = world.pair(IcReq::default());
    let bytes = pattern(1, 4096);
    assert!(
        write_remote(&mut pair.io, 0, &bytes, 512)
            .status()
            .is_success()
    );
    // One byte per second does not extend the time.
    let slow = scanners.last_mut().unwrap();
    slow.set_nonblocking(true).unwrap();
    let mut buffer = [0; 256];
    loop {
        let _ = std::io::Write::write(slow, &[4]);
        std::thread::sleep(Duration::from_millis(500));
        match slow.read(&mut buffer) {
            Ok(0) | Err(_) if world.counter("tcp_connections") == 2 => break,
            _ => {}
        }
        assert!(begin.elapsed() < Duration::from_secs(14), "not thrown out");
    }
    assert_eq!(
        world.counter("tcp_connections"),
        2,
        "the host is still there"
    );
    assert_eq!(read_back(&mut pair.io, 0, 4096, 512), bytes);
}

/// A thread that spins serves its only busy host without the ring; two hosts in turn, with short and long pauses and
/// with data that has to be fetched, get what is theirs all the same, and a thread that does not spin looks for none.
#[test]
fn who_is_asked_and_who_is_told() {
    for budget in [Duration::from_millis(10), Duration::ZERO] {
        let world = World::with("ram:4M", |config| config.poll_budget = budget);
        let mut first = world.pair(IcReq::default());
        let mut second = world.pair(IcReq::default());
        let step = |pair: &mut Pair, at: u64, n: u32| {
            let bytes = pattern(n as u8, if n.is_multiple_of(16) { 64 << 10 } else { 4096 });
            let written = match bytes.len() {
                4096 => write_in_capsule(&mut pair.io, at, &bytes, 512),
                _ => write_remote(&mut pair.io, at, &bytes, 512),
            };
            assert!(written.status().is_success());
            assert_eq!(read_back(&mut pair.io, at, bytes.len(), 512), bytes);
        };
        for n in 0..300 {
            step(&mut first, 0, n);
        }
        let looks = world.counter("tcp_looks_found");
        if budget.is_zero() {
            assert_eq!(looks, 0);
        } else {
            assert!(looks > 20, "{looks} of 600 commands");
        }
        for n in 0..300 {
            step(&mut first, 0, n);
            if n.is_multiple_of(3) {
                step(&mut second, 1024, n);
            }
            if n.is_multiple_of(100) {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        drop((first, second));
        world.expect_idle();
    }
}

/// Several data threads listen on one port; queues of a controller may be on any of them.
#[test]
fn several_threads() {
    let cores = flexblk_reactor::affinity::allowed_cores().unwrap();
    let world = World::with("ram:4M", |config| {
        config.cores = vec![cores[0], cores[cores.len() - 1]];
    });
    let mut pairs: Vec<Pair> = (0..8).map(|_| world.pair(IcReq::default())).collect();
    for (n, pair) in pairs.iter_mut().enumerate() {
        let bytes = pattern(n as u8, 128 << 10);
        let lba = n as u64 * 512;
        assert!(
            write_remote(&mut pair.io, lba, &bytes, 512)
                .status()
                .is_success()
        );
        assert_eq!(read_back(&mut pair.io, lba, 128 << 10, 512), bytes);
    }
    let stats = world.target.stats();
    assert!(
        stats
            .threads
            .iter()
            .all(|thread| thread.tcp["tcp_accepted"] > 0)
    );
    drop(pairs);
    world.expect_idle();
    assert!(world.target.shutdown());
}

/// A target that ends tells its hosts by closing, at once, whatever they do.
#[test]
fn shutting_down_with_hosts() {
    let world = World::new("ram:4M");
    let mut pair = world.pair(IcReq::default());
    let _scanner = TcpStream::connect(world.address).unwrap();
    let cid = pair.io.cid();
    pair.io
        .send(&write(0, 2048).emit(cid, &transport(1 << 20)), &[]);
    assert!(matches!(pair.io.next_of(cid), Got::R2t(_)));
    let begin = Instant::now();
    assert!(world.target.shutdown());
    assert!(begin.elapsed() < Duration::from_secs(2));
    assert_eq!(pair.io.next(), Got::End);
    assert_eq!(pair.admin.next(), Got::End);
}
