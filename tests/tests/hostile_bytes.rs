//! Anybody can send anything to the target's UDP port while hosts do their I/O.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use flexblk_tests::proc::{anonymous_bytes, descriptors};
use flexblk_tests::setup::{Setup, counters_in, next, target_counter};
use flexblk_tests::skip::without_fio;

const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn random_and_mutated_packets_do_not_disturb_anybody() -> Result<()> {
    if without_fio("random_and_mutated_packets_do_not_disturb_anybody") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let mut target = setup.target(&["ram:64M"])?;
    let job = |name: &str| {
        setup
            .fio(&target, 1, name)
            .option("rw", "randwrite")
            .option("bs", "16k")
            .option("iodepth", 16)
            .option("verify", "crc32c")
            .option("do_verify", 1)
            .option("verify_fatal", 1)
    };
    // Real packets as material, of a connection that is over and of one that will be alive.
    job("material")
        .option("capture", setup.path().join("material.pcapng").display())
        .option("size", "4M")
        .success(LIMIT)?;
    let material = packets(setup.path())?;
    assert!(material.len() > 100, "{} packets captured", material.len());
    let before = (anonymous_bytes(target.id())?, descriptors(target.id())?);

    let stop = AtomicBool::new(false);
    let sent = AtomicU64::new(0);
    let port = target.udp_port();
    thread::scope(|scope| -> Result<()> {
        let (material, stop, sent) = (&material, &stop, &sent);
        let senders =
            [1, 2].map(|seed| scope.spawn(move || hostile(port, seed, material, stop, sent)));
        // Several rounds of I/O under fire, each verified.
        let rounds: Result<Vec<_>> = (0..3)
            .map(|round| job(&format!("round-{round}")).success(LIMIT))
            .collect();
        stop.store(true, Ordering::Relaxed);
        for sender in senders {
            match sender.join() {
                Ok(done) => done?,
                Err(_) => bail!("a sender panicked"),
            }
        }
        for result in rounds? {
            assert_eq!(result.measured("read").bytes, 64 << 20);
        }
        Ok(())
    })?;
    assert!(
        sent.load(Ordering::Relaxed) > 10_000,
        "{sent:?} packets sent"
    );

    // Discovery still answers, nothing was kept, everything was counted.
    setup
        .flexblk(&[
            "discover",
            "-a",
            "127.0.0.1",
            "--udp-port",
            &port.to_string(),
        ])?
        .success()?;
    let after = (anonymous_bytes(target.id())?, descriptors(target.id())?);
    assert!(
        after.0 < before.0 + (4 << 20),
        "memory grew from {} to {} bytes",
        before.0,
        after.0
    );
    assert!(
        after.1 <= before.1,
        "descriptors grew from {} to {}",
        before.1,
        after.1
    );
    let status = target.terminate()?;
    assert!(status.success(), "{status}");
    let counters = counters_in(&target.output())?;
    let dropped: u64 = [
        "malformed",
        "unknown_qpn",
        "wrong_peer",
        "crc_failures",
        "wrong_state",
    ]
    .iter()
    .map(|name| target_counter(&counters, name))
    .sum();
    assert!(
        dropped > sent.load(Ordering::Relaxed) / 10,
        "{dropped} of {sent:?} counted as dropped: {counters:#}"
    );
    Ok(())
}

/// Sends foreign bytes until told to stop.
fn hostile(
    port: u16,
    seed: u64,
    material: &[Vec<u8>],
    stop: &AtomicBool,
    sent: &AtomicU64,
) -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut state = seed;
    let mut number = || next(&mut state) as usize;
    while !stop.load(Ordering::Relaxed) {
        let packet = match number() % 4 {
            // Noise of any length, short and empty ones included.
            0 => flexblk_tests::setup::noise(number() % 2000, number() as u64),
            // A real packet, from a stranger.
            1 => material[number() % material.len()].clone(),
            // Cut or extended.
            2 => {
                let mut packet = material[number() % material.len()].clone();
                let len = number() % (packet.len() * 2).clamp(1, 60_000);
                packet.resize(len, number() as u8);
                packet
            }
            // A few bits flipped, mostly in the headers.
            _ => {
                let mut packet = material[number() % material.len()].clone();
                for _ in 0..=number() % 4 {
                    let at = number() % packet.len().min(64);
                    packet[at] ^= 1 << (number() % 8);
                }
                packet
            }
        };
        // The kernel says so when the port is closed: that would be a dead target.
        socket
            .send_to(&packet, (Ipv4Addr::LOCALHOST, port))
            .context("the target's port is gone")?;
        if sent.fetch_add(1, Ordering::Relaxed).is_multiple_of(64) {
            // Leave the socket buffer some room for the good ones.
            thread::sleep(Duration::from_micros(500));
        }
    }
    Ok(())
}

/// UDP payloads in the pcapng files of a folder.
fn packets(directory: &Path) -> Result<Vec<Vec<u8>>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "pcapng")
        {
            let file = fs::read(&path)?;
            let word = |at: usize| -> Option<usize> {
                Some(u32::from_le_bytes(file.get(at..at + 4)?.try_into().ok()?) as usize)
            };
            let mut at = 0;
            while let (Some(kind), Some(len)) = (word(at), word(at + 4)) {
                // Enhanced Packet Block: interface, two words of time, captured and original length, then the packet.
                if kind == 6 {
                    let captured = word(at + 20).context("a length")?;
                    let packet = file.get(at + 28..at + 28 + captured).context("a packet")?;
                    // IPv4 without options, UDP.
                    if let Some(payload) = packet.get(28..).filter(|payload| !payload.is_empty()) {
                        found.push(payload.to_vec());
                    }
                }
                at += len.max(12);
            }
        }
    }
    Ok(found)
}
