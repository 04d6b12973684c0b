//! Two network namespaces with a cable between them, which a test can cut: from then on nobody hears of the other end,
//! not even that it is gone.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::ports::{free_tcp_port, free_udp_port};
use crate::process::{Process, eventually};
use crate::setup::Setup;
use crate::skip;
use crate::target::SUBNQN;

/// The address of the far end.
pub const FAR: &str = "10.213.7.2";
const NEAR: &str = "10.213.7.1";
/// The test runs itself again in a network namespace with this set to the name of the other one.
const INSIDE: &str = "FLEXBLK_TEST_NAMESPACE";

/// A cable; the test is at its near end.
pub struct Cable {
    far: String,
}

/// Runs `body` at the near end of a cable. `test` is the whole name of the test that calls this and does nothing
/// else: its binary is run again in the namespace, for this test alone. Skipped, and counted so, without the
/// privilege to make namespaces.
pub fn with_cable(test: &str, body: impl FnOnce(&Cable) -> Result<()>) -> Result<()> {
    if let Ok(far) = std::env::var(INSIDE) {
        return body(&Cable { far });
    }
    let pid = std::process::id();
    let (near, far) = (format!("flexblk-h{pid}"), format!("flexblk-t{pid}"));
    if ip(&format!("netns add {near}")).is_err() {
        skip::note(test, "it needs root and ip for network namespaces");
        return Ok(());
    }
    let inside = || -> Result<()> {
        ip(&format!("netns add {far}"))?;
        ip(&format!(
            "-n {near} link add veth0 type veth peer name veth1 netns {far}"
        ))?;
        for (namespace, device, address) in [(&near, "veth0", NEAR), (&far, "veth1", FAR)] {
            ip(&format!(
                "-n {namespace} addr add {address}/24 dev {device}"
            ))?;
            ip(&format!("-n {namespace} link set {device} up"))?;
            ip(&format!("-n {namespace} link set lo up"))?;
        }
        let status = Command::new("ip")
            .args(["netns", "exec", &near])
            .arg(std::env::current_exe()?)
            .args([test, "--exact", "--nocapture"])
            .env(INSIDE, &far)
            .status()?;
        ensure!(status.success(), "in the namespace: {status}");
        Ok(())
    };
    let result = inside();
    ip(&format!("netns del {near}"))?;
    let _ = ip(&format!("netns del {far}"));
    result
}

/// A target at the far end, with FlexiNS and NVMe/TCP.
pub struct FarTarget {
    /// The daemon.
    pub process: Process,
    /// Its UDP port; its FlexiNS service is 4420.
    pub udp_port: u16,
    /// Its NVMe/TCP port.
    pub tcp_port: u16,
    /// Its RPC socket.
    pub rpc_socket: PathBuf,
}

impl Cable {
    /// Frames go to a station that is not there, both ways.
    pub fn cut(&self) -> Result<()> {
        let nowhere = "lladdr 02:00:00:00:00:99";
        ip(&format!(
            "neigh replace {FAR} {nowhere} dev veth0 nud permanent"
        ))?;
        ip(&format!(
            "-n {} neigh replace {NEAR} {nowhere} dev veth1 nud permanent",
            self.far
        ))
    }

    /// They arrive again.
    pub fn mend(&self) -> Result<()> {
        ip(&format!("neigh del {FAR} dev veth0"))?;
        ip(&format!("-n {} neigh del {NEAR} dev veth1", self.far))
    }

    /// Starts a target at the far end; `extra` are lines of its `[target]` table.
    pub fn target(&self, setup: &Setup, device: &str, extra: &str) -> Result<FarTarget> {
        let (udp_port, tcp_port) = (free_udp_port()?, free_tcp_port()?);
        let config = setup.path().join("far.toml");
        let text = format!(
            "[target]\n{extra}\n[tcp]\naddress = \"{FAR}:{tcp_port}\"\n[listener]\naddress = \"{FAR}:4420\"\nudp_port = \
             {udp_port}\n[[subsystem]]\nnqn = \"{SUBNQN}\"\n[[subsystem.namespace]]\nbdev = {device:?}\n"
        );
        fs::write(&config, text)?;
        let rpc_socket = setup.path().join("far.sock");
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.far])
            .arg(&setup.binaries().target)
            .arg("-c")
            .arg(&config)
            .arg("-r")
            .arg(&rpc_socket);
        let process = Process::spawn(&mut command, "far", setup.path())?;
        eventually("it listens", Duration::from_secs(20), || {
            format!("{}{}", process.stdout(), process.stderr()).contains("listening")
        })?;
        Ok(FarTarget {
            process,
            udp_port,
            tcp_port,
            rpc_socket,
        })
    }
}

fn ip(arguments: &str) -> Result<()> {
    let status = Command::new("ip").args(arguments.split(' ')).status()?;
    ensure!(status.success(), "ip {arguments}: {status}");
    Ok(())
}
