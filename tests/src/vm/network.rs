//! A network namespace with a tap device: what the guest and the programs under test have in common.
//!
//! QEMU's user-mode network would do without root, but it ends TCP connections itself: acknowledgements are its own, a
//! reset is not the target's, and the addresses in a discovery log lead nowhere.
#![allow(unsafe_code)] // One call of unshare(2).

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::thread::UnshareFlags;

use crate::process::{find_program, run};

/// Name of the tap device.
pub const TAP: &str = "tap0";
/// This machine on the first path.
pub const OUTSIDE: &str = "10.77.0.1";
/// This machine on the second path.
pub const OUTSIDE_2: &str = "10.77.1.1";
/// The guest on the first path.
pub const GUEST: &str = "10.77.0.2";
/// The guest on the second path.
pub const GUEST_2: &str = "10.77.1.2";

/// The namespace of the thread that made it. Processes that this thread starts live there too; it ends with them.
#[derive(Debug)]
pub struct Network(());

impl Network {
    /// Whether this machine lets us make one.
    pub fn supported() -> Result<()> {
        if !rustix::process::geteuid().is_root() {
            bail!("a network namespace with a tap device needs root");
        }
        if !std::path::Path::new("/dev/net/tun").exists() {
            bail!("/dev/net/tun is not there");
        }
        find_program("ip").context("apt-get install iproute2")?;
        Ok(())
    }

    /// Moves the calling thread to a new namespace and makes the tap device in it.
    pub fn enter() -> Result<Network> {
        Network::supported()?;
        // SAFETY: NEWNET changes which network this thread sees. It unshares no file descriptors and no memory, which
        // is what the function's contract is about.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
            .context("a network namespace")?;
        let network = Network(());
        network.ip("link set lo up")?;
        network.ip(&format!("tuntap add dev {TAP} mode tap"))?;
        network.ip(&format!("addr add {OUTSIDE}/24 dev {TAP}"))?;
        network.ip(&format!("addr add {OUTSIDE_2}/24 dev {TAP}"))?;
        network.ip(&format!("link set {TAP} up"))?;
        Ok(network)
    }

    /// Runs `ip` with these words.
    pub fn ip(&self, words: &str) -> Result<()> {
        run(
            Command::new(find_program("ip")?).args(words.split_whitespace()),
            Duration::from_secs(10),
        )?
        .success()
        .with_context(|| format!("ip {words}"))?;
        Ok(())
    }
}
