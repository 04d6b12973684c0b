//! Memory of an idle I/O queue pair, in the target and in the initiator.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use flexblk_tests::binaries::Binaries;
use flexblk_tests::ports::free_tcp_port;
use flexblk_tests::proc::resident_bytes;
use flexblk_tests::process::{Process, eventually};
use flexblk_tests::target::{Target, TargetOptions};
use serde_json::{Value, json};

use super::Goal;

/// Memory of an idle queue pair.
const GOAL_BYTES: u64 = 64 << 10;
/// Queue pairs that are opened.
const QUEUES: u64 = 32;

/// Bytes of one.
#[derive(Clone, Copy)]
pub(super) struct Idle {
    trtype: &'static str,
    target: u64,
    initiator: u64,
}

/// Opens them over that transport.
pub(super) fn measure(binaries: &Binaries, directory: &Path, trtype: &'static str) -> Result<Idle> {
    let tcp_port = match trtype {
        "tcp" => Some(free_tcp_port()?),
        _ => None,
    };
    let options = TargetOptions {
        tcp_port,
        ..TargetOptions::with_devices(&["ram:64M"])
    };
    let target = Target::start(binaries, directory, options)?;
    let port = tcp_port.unwrap_or(target.udp_port()).to_string();
    let hold = |count: u64, name: &str| -> Result<(Process, u64, u64)> {
        let mut command = Command::new(&binaries.idle_queue_pairs);
        command.args([trtype, &port, &count.to_string()]);
        let mut process = Process::spawn(&mut command, name, directory)?;
        let ready = format!("ready {count}");
        eventually("idle queue pairs are open", Duration::from_secs(30), || {
            process.stdout().contains("ready") || !matches!(process.status(), Ok(None))
        })?;
        if !process.stdout().contains(&ready) {
            bail!(
                "{count} idle queue pairs were not granted: {}",
                process.tail()
            );
        }
        thread::sleep(Duration::from_millis(300));
        let (ours, theirs) = (resident_bytes(process.id())?, resident_bytes(target.id())?);
        Ok((process, ours, theirs))
    };
    // One queue pair first: it brings a controller, threads and pools with it, which the others share.
    let (one, one_initiator, one_target) = hold(1, "idle-one")?;
    let (many, many_initiator, many_target) = hold(QUEUES + 1, "idle-many")?;
    drop((one, many));
    Ok(Idle {
        trtype,
        // The second program brings its own controller: not subtracted, so this is rather too much.
        target: many_target.saturating_sub(one_target) / (QUEUES + 1),
        initiator: many_initiator.saturating_sub(one_initiator) / QUEUES,
    })
}

impl Idle {
    /// One for each side.
    pub(super) fn goals(&self) -> impl Iterator<Item = Goal> {
        let trtype = self.trtype;
        let sides = [("target", self.target), ("initiator", self.initiator)];
        sides.into_iter().map(move |(side, bytes)| Goal {
            what: format!("memory of an idle queue pair in the {side}, {trtype}"),
            measured: format!("{:.1} KiB", bytes as f64 / 1024.0),
            goal: format!("< {} KiB", GOAL_BYTES >> 10),
            met: bytes < GOAL_BYTES,
        })
    }

    pub(super) fn as_json(&self) -> Value {
        json!({ "target": self.target, "initiator": self.initiator })
    }
}
