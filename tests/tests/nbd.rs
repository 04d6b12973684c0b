//! `flexblk export nbd` with the NBD clients that people use, with clients that lie, and with everything killed once.

use std::fs;
use std::io::{Read, Write};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flexblk_rpc::RpcClient;
use flexblk_tests::nbd::{NbdServer, RawClient};
use flexblk_tests::proc::resident_bytes;
use flexblk_tests::process::{Finished, Process, find_program, run};
use flexblk_tests::setup::Setup;
use flexblk_tests::skip;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);
const READ: u16 = 0;
const CACHE: u16 = 5;
const WRITE_ZEROES: u16 = 6;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;

/// Runs a client in the test's folder; `None`, and noted as skipped, when it is not installed.
fn client(setup: &Setup, test: &str, words: &[&str]) -> Result<Option<Finished>> {
    let (program, arguments) = words.split_first().context("a program")?;
    if find_program(program).is_err() {
        skip::note_part(test, &format!("{program} is not installed"));
        return Ok(None);
    }
    let mut command = Command::new(program);
    command.current_dir(setup.path()).args(arguments);
    run(&mut command, LIMIT).map(Some)
}

fn succeed(setup: &Setup, test: &str, words: &[&str]) -> Result<()> {
    if let Some(finished) = client(setup, test, words)? {
        finished.success().with_context(|| words.join(" "))?;
    }
    Ok(())
}

#[test]
fn nbdinfo_tells_what_the_namespace_is() -> Result<()> {
    const TEST: &str = "nbdinfo_tells_what_the_namespace_is";
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M,block_size=4096"])?;
    for (more, read_only) in [
        (&["--name", "my disk"][..], false),
        (&["--read-only"], true),
    ] {
        let server = NbdServer::on_tcp(&setup, &target, "server", more)?;
        let Some(info) = client(&setup, TEST, &["nbdinfo", "--json", server.uri()])? else {
            return Ok(());
        };
        let json: serde_json::Value = serde_json::from_str(&info.success()?.stdout)?;
        let export = &json["exports"][0];
        assert_eq!(export["export-size"], 16 << 20, "{json:#}");
        assert_eq!(export["block_size_minimum"], 4096);
        assert_eq!(export["block_size_maximum"], 32 << 20);
        assert_eq!(export["is_read_only"], read_only);
        assert_eq!(export["can_trim"], !read_only);
        assert_eq!(export["can_multi_conn"], true);
        assert_eq!(
            export["export-name"],
            if read_only { "" } else { "my disk" }
        );
        succeed(&setup, TEST, &["nbdinfo", "--list", server.uri()])?;
        if !read_only {
            let other = server.uri().replace("my%20disk", "other");
            let refused = client(&setup, TEST, &["nbdinfo", &other])?.context("nbdinfo")?;
            assert_ne!(refused.code, Some(0));
            assert!(
                refused.stderr.contains("No such file"),
                "{}",
                refused.stderr
            );
        }
    }
    Ok(())
}

/// The same bytes come back through every client, over both kinds of socket, with one thread and with several.
#[test]
fn a_file_survives_the_way_through_every_client() -> Result<()> {
    const TEST: &str = "a_file_survives_the_way_through_every_client";
    let setup = Setup::new()?;
    let target = setup.target(&["ram:64M", "ram:64M,block_size=4096"])?;
    let data = setup.file("in.img", 64 << 20, 3)?;
    for (name, nsid, tcp, threads) in [("one", "1", false, "1"), ("two", "2", true, "2")] {
        let more = ["--threads", threads, "--nsid", nsid];
        let mut server = if tcp {
            NbdServer::on_tcp(&setup, &target, name, &more)?
        } else {
            NbdServer::start(&setup, &target, name, &more)?
        };
        let uri = server.uri().to_owned();
        succeed(
            &setup,
            TEST,
            &[
                "nbdcopy",
                "--connections=4",
                "--requests=64",
                "in.img",
                &uri,
            ],
        )?;
        if client(
            &setup,
            TEST,
            &["nbdcopy", "--request-size=4194304", &uri, "out.img"],
        )?
        .is_some()
        {
            assert!(
                fs::read(setup.path().join("out.img"))? == data,
                "{name}: the data differ"
            );
        }
        succeed(
            &setup,
            TEST,
            &[
                "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-W", "in.img", &uri,
            ],
        )?;
        succeed(
            &setup,
            TEST,
            &[
                "qemu-img", "compare", "-f", "raw", "-F", "raw", "in.img", &uri,
            ],
        )?;
        let read = setup.flexblk_at(
            &target,
            "read",
            &["--nsid", nsid, "--length", "64M", "-o", "back.img"],
        )?;
        read.success()?;
        if find_program("nbdcopy").is_ok() || find_program("qemu-img").is_ok() {
            assert!(
                fs::read(setup.path().join("back.img"))? == data,
                "{name}: the namespace differs"
            );
        }
        let status = server.terminate(Duration::from_secs(5))?;
        assert!(status.success(), "{status}: {}", server.tail());
        assert!(!server.socket().exists() || tcp, "the socket is gone");
    }
    Ok(())
}

#[test]
fn every_request_of_qemu() -> Result<()> {
    const TEST: &str = "every_request_of_qemu";
    let setup = Setup::new()?;
    let target = setup.target(&["ram:128M"])?;
    let server = NbdServer::start(&setup, &target, "server", &[])?;
    let mut words = vec!["qemu-io", "-f", "raw"];
    for step in [
        "write -P 0x11 0 32M",
        "read -P 0x11 0 32M",
        "write -f -P 0x22 512 512",
        "read -P 0x22 512 512",
        "read -P 0x11 1024 4096",
        "write -z 1M 1M",
        "read -P 0 1M 1M",
        "write -z -u 2M 96M",
        "read -P 0 90M 8M",
        "discard 4M 64M",
        "read -P 0x11 0 512",
        "aio_write -P 0x33 110M 1M",
        "aio_write -P 0x44 111M 1M",
        "aio_flush",
        "flush",
        "read -P 0x33 110M 1M",
        "read -P 0x44 111M 1M",
        "length",
    ] {
        words.extend(["-c", step]);
    }
    words.push(server.uri());
    let Some(finished) = client(&setup, TEST, &words)? else {
        return Ok(());
    };
    let finished = finished.success()?;
    for word in ["failed", "error", "verification"] {
        assert!(
            !finished.stdout.to_lowercase().contains(word),
            "{}",
            finished.stdout
        );
    }
    Ok(())
}

#[test]
fn fio_finds_every_byte_where_it_was_written() -> Result<()> {
    const TEST: &str = "fio_finds_every_byte_where_it_was_written";
    let engines = find_program("fio").ok().and_then(|fio| {
        let list = run(Command::new(fio).arg("--enghelp"), LIMIT).ok()?;
        Some(list.stdout)
    });
    if !engines.is_some_and(|list| list.lines().any(|line| line.trim() == "nbd")) {
        skip::note(TEST, "fio with its nbd engine is not installed");
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:64M"])?;
    let server = NbdServer::start(&setup, &target, "server", &["--threads", "2"])?;
    for bs in ["4k-4k", "512-64k", "1M-1M"] {
        let words = [
            "fio",
            "--name=verify",
            "--ioengine=nbd",
            &format!("--uri={}", server.uri()),
            "--rw=randwrite",
            &format!("--bsrange={bs}"),
            "--iodepth=32",
            "--size=32M",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--numjobs=2",
            "--offset_increment=32M",
            "--blockalign=512",
        ];
        succeed(&setup, TEST, &words)?;
    }
    Ok(())
}

/// A client that does not follow the protocol is closed or told, and the next one is served as if nothing had been.
#[test]
fn clients_that_lie() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:64M"])?;
    let mut server = NbdServer::start(&setup, &target, "server", &["--buffers", "32M"])?;
    let socket = server.socket().to_owned();
    // Not NBD.
    let mut client = RawClient::connect(&socket)?;
    client.0.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
    assert!(client.is_closed());
    // An option that is said to be 4 GiB long.
    let mut client = RawClient::connect(&socket)?;
    client
        .0
        .write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff")?;
    assert!(client.is_closed());
    // A request that is none, a payload of 4 GiB.
    let mut client = RawClient::open(&socket)?;
    client.0.write_all(&[0x55; 64])?;
    assert!(client.is_closed());
    let mut client = RawClient::open(&socket)?;
    client.request(WRITE, 1, 0, u32::MAX)?;
    assert!(client.is_closed());
    // Requests that are refused one by one, on a connection that goes on.
    let mut client = RawClient::open(&socket)?;
    for (cookie, (kind, offset, len, payload, error)) in [
        (READ, 0, 33 << 20, 0, 22),
        (READ, 64 << 20, 512, 0, 22),
        (READ, u64::MAX, 512, 0, 22),
        (READ, 1, 512, 0, 22),
        (WRITE, 64 << 20, 512, 512, 28),
        (WRITE, 0, 100, 100, 22),
        (FLUSH, 0, 0, 0, 0),
        (77, 0, 512, 0, 22),
    ]
    .into_iter()
    .enumerate()
    {
        client.request(kind, cookie as u64, offset, len)?;
        client.0.write_all(&vec![1; payload])?;
        assert_eq!(
            client.reply()?,
            (error, cookie as u64),
            "{kind} {offset} {len}"
        );
    }
    client.request(DISC, 0, 0, 0)?;
    assert!(client.is_closed());
    // In the middle of a payload: gone.
    for part in [0, 100, 70_000] {
        let mut client = RawClient::open(&socket)?;
        client.request(WRITE, 1, 0, 1 << 20)?;
        client.0.write_all(&vec![9; part])?;
    }
    // Hundreds that connect and say nothing.
    let idle: Vec<RawClient> = (0..300)
        .filter_map(|_| RawClient::connect(&socket).ok())
        .collect();
    let mut client = retry(|| RawClient::open(&socket))?;
    client.request(READ, 5, 0, 4096)?;
    assert_eq!(client.reply()?, (0, 5));
    drop(idle);
    assert!(
        server.terminate(Duration::from_secs(5))?.success(),
        "{}",
        server.tail()
    );
    Ok(())
}

fn retry<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        match attempt() {
            Err(error) if started.elapsed() > Duration::from_secs(20) => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
            done => return done,
        }
    }
}

/// Clients that ask and never read, or announce and never send, hold all of the memory there is. Others get it after
/// some seconds, and it never grows.
#[test]
fn slow_clients_cost_no_memory_and_keep_nobody_away() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:64M"])?;
    let mut server = NbdServer::start(&setup, &target, "server", &["--buffers", "32M"])?;
    let socket = server.socket().to_owned();
    let before = resident_bytes(server.id())?;
    let mut slow = Vec::new();
    for n in 0..4 {
        let mut client = RawClient::open(&socket)?;
        if n % 2 == 0 {
            for cookie in 0..200 {
                client.request(READ, cookie, 0, 1 << 20)?;
            }
        } else {
            client.request(WRITE, 1, 0, 16 << 20)?;
            client.0.write_all(&[1; 5000])?;
        }
        slow.push(client);
    }
    let mut client = RawClient::open(&socket)?;
    let started = Instant::now();
    client.request(READ, 8, 0, 32 << 20)?;
    assert_eq!(client.reply()?, (0, 8));
    let mut data = vec![1; 32 << 20];
    client.0.read_exact(&mut data)?;
    assert!(
        data.iter().all(|byte| *byte == 0),
        "nobody has written a whole request"
    );
    println!("served after {:?}", started.elapsed());
    let after = resident_bytes(server.id())?;
    ensure!(after < before + (48 << 20), "{before} -> {after} bytes");
    assert!(
        server.terminate(Duration::from_secs(5))?.success(),
        "{}",
        server.tail()
    );
    Ok(())
}

#[test]
fn a_client_killed_in_the_middle_leaves_no_trace() -> Result<()> {
    const TEST: &str = "a_client_killed_in_the_middle_leaves_no_trace";
    if find_program("nbdcopy").is_err() {
        skip::note(
            TEST,
            "nbdcopy is not installed (apt-get install libnbd-bin)",
        );
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:256M"])?;
    let data = setup.file("in.img", 256 << 20, 9)?;
    let mut server = NbdServer::start(&setup, &target, "server", &[])?;
    for delay_ms in [5, 30, 80, 150] {
        let mut command = Command::new("nbdcopy");
        command
            .current_dir(setup.path())
            .args(["in.img", server.uri()]);
        let mut copy = Process::spawn(&mut command, "nbdcopy", setup.path())?;
        std::thread::sleep(Duration::from_millis(delay_ms));
        copy.kill()?;
    }
    let descriptors = fs::read_dir(format!("/proc/{}/fd", server.id()))?.count();
    succeed(&setup, TEST, &["nbdcopy", "in.img", server.uri()])?;
    setup
        .flexblk_at(&target, "read", &["--length", "256M", "-o", "back.img"])?
        .success()?;
    assert!(
        fs::read(setup.path().join("back.img"))? == data,
        "the data differ"
    );
    ensure!(descriptors < 64, "{descriptors} descriptors");
    assert!(
        server.terminate(Duration::from_secs(5))?.success(),
        "{}",
        server.tail()
    );
    Ok(())
}

/// A server that was killed leaves its socket behind; the next one takes its place. One that runs is not disturbed.
/// A queue pair for each thread is asked for, however few processors this machine has.
#[test]
fn more_threads_than_processors() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let threads = std::thread::available_parallelism()?.get() + 2;
    let more = ["--threads", &threads.to_string()];
    let mut server = NbdServer::start(&setup, &target, "server", &more)?;
    let status = server.terminate(Duration::from_secs(5))?;
    ensure!(status.success(), "{status}: {}", server.tail());
    Ok(())
}

#[test]
fn the_socket_of_a_dead_server_is_taken_over() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let mut first = NbdServer::start(&setup, &target, "server", &[])?;
    let mut client = RawClient::open(first.socket())?;
    let path = first.socket().to_string_lossy().into_owned();
    let second = setup.flexblk_at(&target, "export", &[])?;
    assert_eq!(second.code, Some(2), "{}", second.stderr);
    let mut words = vec!["export".to_owned(), "nbd".into(), "--socket".into(), path];
    words.extend(target.address());
    let second = setup.flexblk(&words)?;
    assert_eq!(second.code, Some(2), "{}", second.stderr);
    assert!(second.stderr.contains("in use"), "{}", second.stderr);
    client.request(READ, 1, 0, 512)?;
    assert_eq!(client.reply()?, (0, 1));
    first.kill()?;
    assert!(first.socket().exists());
    let mut next = NbdServer::start(&setup, &target, "server", &[])?;
    let mut client = RawClient::open(next.socket())?;
    client.request(READ, 2, 0, 512)?;
    assert_eq!(client.reply()?, (0, 2));
    // With a client that stays connected, too.
    assert!(
        next.terminate(Duration::from_secs(5))?.success(),
        "{}",
        next.tail()
    );
    assert!(!next.socket().exists());
    Ok(())
}

/// A dead target never keeps the exporter from ending.
#[test]
fn the_export_ends_in_time_when_the_target_is_dead() -> Result<()> {
    let setup = Setup::new()?;
    let mut target = setup.target(&["ram:16M"])?;
    let mut server = NbdServer::start(&setup, &target, "server", &[])?;
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(RawClient::open(server.socket())?);
    }
    target.kill()?;
    for (cookie, client) in clients.iter_mut().enumerate() {
        client.request(READ, cookie as u64, 0, 4096)?;
        client.request(WRITE, 10, 0, 4096)?;
        client.0.write_all(&[7; 2000])?;
    }
    std::thread::sleep(Duration::from_millis(300));
    let status = server.terminate(Duration::from_secs(6))?;
    ensure!(
        matches!(status.code(), Some(0 | 3)),
        "{status}: {}",
        server.tail()
    );
    assert!(!server.socket().exists());
    Ok(())
}

/// A target that is restarted costs its clients time, and nothing else.
#[test]
fn requests_wait_for_a_target_that_comes_back() -> Result<()> {
    let setup = Setup::new()?;
    let image = setup.path().join("disk.img");
    fs::write(&image, vec![0; 16 << 20])?;
    let mut target = setup.target(&[&format!("file:{}", image.display())])?;
    let mut server = NbdServer::start(&setup, &target, "server", &[])?;
    let mut client = RawClient::open(server.socket())?;
    client.request(WRITE, 1, 4096, 4096)?;
    client.0.write_all(&[0x77; 4096])?;
    assert_eq!(client.reply()?, (0, 1));
    target.kill()?;
    client.request(WRITE, 2, 8192, 4096)?;
    client.0.write_all(&[0x78; 4096])?;
    client.request(READ, 3, 4096, 4096)?;
    // The kernel takes a moment to close what the ring of a killed process held.
    retry(|| target.restart(setup.binaries()))?;
    let mut seen = Vec::new();
    for _ in 0..2 {
        let (error, cookie) = client.reply()?;
        assert_eq!(error, 0, "request {cookie}");
        if cookie == 3 {
            let mut data = [0; 4096];
            client.0.read_exact(&mut data)?;
            assert_eq!(data, [0x77; 4096]);
        }
        seen.push(cookie);
    }
    seen.sort_unstable();
    assert_eq!(seen, [2, 3]);
    assert!(
        server.terminate(Duration::from_secs(5))?.success(),
        "{}",
        server.tail()
    );
    Ok(())
}

/// What carries no data may be longer than one command of the controller (Identify: WZSL, VSL).
#[test]
fn zeroes_and_caching_of_the_whole_namespace() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:64M"])?;
    setup.file("in.img", 64 << 20, 5)?;
    setup
        .flexblk_at(&target, "write", &["-i", "in.img"])?
        .success()?;
    let server = NbdServer::start(&setup, &target, "server", &[])?;
    let mut client = RawClient::open(server.socket())?;
    for (kind, cookie) in [(CACHE, 1), (WRITE_ZEROES, 2)] {
        client.request(kind, cookie, 0, 64 << 20)?;
        assert_eq!(client.reply()?, (0, cookie), "{}", server.tail());
    }
    setup
        .flexblk_at(&target, "read", &["--length", "64M", "-o", "back.img"])?
        .success()?;
    let back = fs::read(setup.path().join("back.img"))?;
    assert!(back.iter().all(|byte| *byte == 0), "it is not zeroed");
    Ok(())
}

/// What has grown is larger for the next client; who is connected keeps what was agreed.
#[test]
fn a_namespace_that_grows() -> Result<()> {
    let setup = Setup::new()?;
    let image = setup.path().join("disk.img");
    fs::write(&image, vec![0; 16 << 20])?;
    let target = setup.target(&[&format!("file:{}", image.display())])?;
    let server = NbdServer::start(&setup, &target, "server", &[])?;
    let mut before = RawClient::open(server.socket())?;
    fs::OpenOptions::new()
        .write(true)
        .open(&image)?
        .set_len(32 << 20)?;
    let mut rpc = RpcClient::connect(&target.rpc_socket())?;
    let devices = rpc.call("bdev_get_bdevs", json!({}))?;
    rpc.call("bdev_aio_rescan", json!({ "name": devices[0]["name"] }))?;
    retry(|| {
        let mut after = RawClient::open(server.socket())?;
        after.request(READ, 1, 31 << 20, 4096)?;
        ensure!(after.reply()? == (0, 1), "not yet");
        Ok(())
    })?;
    before.request(READ, 2, 31 << 20, 4096)?;
    assert_eq!(before.reply()?, (22, 2));
    Ok(())
}
