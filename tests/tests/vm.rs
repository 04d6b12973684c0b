//! Linux as a peer, in a virtual machine. `cargo xtask test --vm` prepares it and runs these.
//!
//! Each list runs twice: the kernel's host with the kernel's own target, which shows that a step is right, and the same
//! host with our target.

use anyhow::{Result, bail};
use flexblk_tests::binaries::Binaries;
use flexblk_tests::host::Host;
use flexblk_tests::target::SUBNQN;
use flexblk_tests::vm::image_or_skip;
use flexblk_tests::vm::machine;
use flexblk_tests::vm::network::{GUEST, Network};
use flexblk_tests::vm::outside::Outside;
use flexblk_tests::vm::scenario::Scenario;
use flexblk_tests::vm::vhost_user::{QUEUES, VhostUser};

/// Runs a list in a guest that is host and target at once.
fn kernel_with_itself(test: &str, script: &'static str) -> Result<()> {
    let Some(image) = image_or_skip(test) else {
        return Ok(());
    };
    let network = Network::enter()?;
    let directory = tempfile::Builder::new().prefix("flexblk-vm-").tempdir()?;
    let scenario = scenario(test, "nvmet", script);
    let outcome = machine::run(
        &image,
        &network,
        &scenario,
        directory.path(),
        &mut |words| bail!("nobody is outside to do {words:?}"),
    )?;
    outcome.check(test)
}

/// Runs a list in a guest against our target, which runs outside.
fn linux_host(test: &str, script: &'static str) -> Result<()> {
    let Some(image) = image_or_skip(test) else {
        return Ok(());
    };
    let network = Network::enter()?;
    let directory = tempfile::Builder::new().prefix("flexblk-vm-").tempdir()?;
    let mut outside = Outside::new(&network, directory.path())?;
    let scenario = scenario(test, "outside", script);
    let outcome = machine::run(
        &image,
        &network,
        &scenario,
        directory.path(),
        &mut |words| outside.answer(words),
    )?;
    outcome.check(test)?;
    outside.check()
}

fn scenario(test: &str, peer: &str, script: &'static str) -> Scenario {
    let multipath = !script.contains("without multipath");
    Scenario::new(test, script)
        .variable("PEER", peer)
        .variable("SUBNQN", SUBNQN)
        .variable("NVME_CORE", if multipath { "" } else { "multipath=N" })
}

/// Lists that run with each peer.
macro_rules! lists {
    ($run:ident: $($test:ident: $script:literal;)*) => {$(
        #[test]
        fn $test() -> Result<()> {
            $run(stringify!($test), include_str!(concat!("../vm/", $script)))
        }
    )*};
}

lists! { kernel_with_itself:
    kernel_commands: "host-commands.sh";
    kernel_options: "host-options.sh";
    kernel_loss: "host-loss.sh";
    kernel_events: "host-events.sh";
    kernel_paths: "host-paths.sh";
    kernel_ana: "host-ana.sh";
    kernel_discovery: "host-discovery.sh";
    kernel_reservations: "host-reservations.sh";
}

lists! { linux_host:
    linux_host_commands: "host-commands.sh";
    linux_host_options: "host-options.sh";
    linux_host_loss: "host-loss.sh";
    linux_host_events: "host-events.sh";
    linux_host_paths: "host-paths.sh";
    linux_host_ana: "host-ana.sh";
    linux_host_discovery: "host-discovery.sh";
    linux_host_reservations: "host-reservations.sh";
}

/// Our initiator to the kernel's target.
#[test]
fn linux_target() -> Result<()> {
    let Some(image) = image_or_skip("linux_target") else {
        return Ok(());
    };
    let network = Network::enter()?;
    let directory = tempfile::Builder::new().prefix("flexblk-vm-").tempdir()?;
    let mut initiator = Host::new(GUEST, 4420, &[64 << 20, 32 << 20])?;
    let script = include_str!("../vm/target-serve.sh");
    let scenario = scenario("linux_target", "nvmet", script);
    let outcome = machine::run(
        &image,
        &network,
        &scenario,
        directory.path(),
        &mut |words| initiator.answer(words),
    )?;
    outcome.check("linux_target")
}

/// A guest whose disk is `flexblk export vhost-user`, then another one with the same disk.
#[test]
fn vhost_user_disk() -> Result<()> {
    let Some(image) = image_or_skip("vhost_user_disk") else {
        return Ok(());
    };
    let network = Network::enter()?;
    let directory = tempfile::Builder::new().prefix("flexblk-vm-").tempdir()?;
    let mut server = VhostUser::start(directory.path())?;
    for (name, script) in [
        ("vhost_user_disk", include_str!("../vm/vhost-user.sh")),
        ("vhost_user_next", include_str!("../vm/vhost-user-next.sh")),
    ] {
        let scenario = Scenario::new(name, script)
            .vhost_user_disk(&server.socket(), QUEUES)
            .variable("QUEUES", QUEUES);
        let outcome = machine::run(
            &image,
            &network,
            &scenario,
            directory.path(),
            &mut |words| server.answer(words),
        );
        server.check()?;
        outcome?.check(name)?;
    }
    Ok(())
}

/// `flexblk export ublk` in a guest, with a target outside.
#[test]
fn ublk_device() -> Result<()> {
    let Some(image) = image_or_skip("ublk_device") else {
        return Ok(());
    };
    let network = Network::enter()?;
    let directory = tempfile::Builder::new().prefix("flexblk-vm-").tempdir()?;
    let mut outside = Outside::new(&network, directory.path())?;
    let scenario = scenario("ublk_device", "outside", include_str!("../vm/ublk.sh"))
        .flexblk(&Binaries::get()?.flexblk, image.tree());
    let outcome = machine::run(
        &image,
        &network,
        &scenario,
        directory.path(),
        &mut |words| outside.answer(words),
    )?;
    outcome.check("ublk_device")?;
    outside.check()
}
