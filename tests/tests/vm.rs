//! Linux as a peer, in a virtual machine. `cargo xtask test --vm` prepares it and runs these.
//!
//! Each list runs twice: the kernel's host with the kernel's own target, which shows that a step is right, and the same
//! host with our target.

use std::path::Path;

use anyhow::{Context, Result, bail};
use flexblk_tests::binaries::Binaries;
use flexblk_tests::host::Host;
use flexblk_tests::target::SUBNQN;
use flexblk_tests::vm::PACKAGES_VARIABLE;
use flexblk_tests::vm::boot::{Boot, Start};
use flexblk_tests::vm::image::Image;
use flexblk_tests::vm::image_or_skip;
use flexblk_tests::vm::machine::{self, Answer, Outcome};
use flexblk_tests::vm::network::{GUEST, Network};
use flexblk_tests::vm::outside::Outside;
use flexblk_tests::vm::scenario::Scenario;
use flexblk_tests::vm::vhost_user::{QUEUES, VhostUser};
use tempfile::TempDir;

/// What guests run on.
struct Machines {
    image: Image,
    network: Network,
    directory: TempDir,
}

impl Machines {
    /// `None` after noting that `test` is skipped and why.
    fn or_skip(test: &str) -> Result<Option<Machines>> {
        let Some(image) = image_or_skip(test) else {
            return Ok(None);
        };
        Ok(Some(Machines {
            image,
            network: Network::enter()?,
            directory: tempfile::Builder::new().prefix("flexblk-vm-").tempdir()?,
        }))
    }

    fn outside(&self) -> Result<Outside<'_>> {
        Outside::new(&self.network, self.directory.path())
    }

    /// Runs a guest to its end; `answer` does what it asks for.
    fn run(&self, scenario: &Scenario, answer: &mut Answer<'_>) -> Result<Outcome> {
        let directory = self.directory.path();
        machine::run(&self.image, &self.network, scenario, directory, answer)
    }
}

/// Runs a list in a guest that is host and target at once.
fn kernel_with_itself(test: &str, script: &'static str) -> Result<()> {
    let Some(machines) = Machines::or_skip(test)? else {
        return Ok(());
    };
    let outcome = machines.run(&scenario(test, "nvmet", script), &mut |words| {
        bail!("nobody is outside to do {words:?}")
    })?;
    outcome.check(test)
}

/// Runs a list in a guest against our target, which runs outside.
fn linux_host(test: &str, script: &'static str) -> Result<()> {
    let Some(machines) = Machines::or_skip(test)? else {
        return Ok(());
    };
    let mut outside = machines.outside()?;
    let scenario = scenario(test, "outside", script);
    let outcome = machines.run(&scenario, &mut |words| outside.answer(words))?;
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

/// A script about a block device of ours, behind what such scripts share.
macro_rules! disk_list {
    ($script:literal) => {
        concat!(
            include_str!("../vm/disk.sh"),
            include_str!(concat!("../vm/", $script))
        )
    };
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
    let test = "linux_target";
    let Some(machines) = Machines::or_skip(test)? else {
        return Ok(());
    };
    let mut initiator = Host::new(GUEST, 4420, &[64 << 20, 32 << 20])?;
    let scenario = scenario(test, "nvmet", include_str!("../vm/target-serve.sh"));
    let outcome = machines.run(&scenario, &mut |words| initiator.answer(words))?;
    outcome.check(test)
}

/// A guest whose disk is `flexblk export vhost-user`, then another one with the same disk.
#[test]
fn vhost_user_disk() -> Result<()> {
    let Some(machines) = Machines::or_skip("vhost_user_disk")? else {
        return Ok(());
    };
    let mut server = VhostUser::start(machines.directory.path())?;
    for (name, script) in [
        ("vhost_user_disk", disk_list!("vhost-user.sh")),
        ("vhost_user_next", include_str!("../vm/vhost-user-next.sh")),
    ] {
        let scenario = Scenario::new(name, script)
            .vhost_user_disk(&server.socket(), QUEUES)
            .variable("QUEUES", QUEUES);
        let outcome = machines.run(&scenario, &mut |words| server.answer(words));
        server.check()?;
        outcome?.check(name)?;
    }
    Ok(())
}

/// A script that runs `flexblk` in a guest, with a target outside.
fn flexblk_inside(test: &str, script: &'static str) -> Result<()> {
    let Some(machines) = Machines::or_skip(test)? else {
        return Ok(());
    };
    let mut outside = machines.outside()?;
    let scenario =
        scenario(test, "outside", script).flexblk(&Binaries::get()?.flexblk, machines.image.tree());
    let outcome = machines.run(&scenario, &mut |words| outside.answer(words))?;
    outcome.check(test)?;
    outside.check()
}

#[test]
fn ublk_device() -> Result<()> {
    flexblk_inside("ublk_device", disk_list!("ublk.sh"))
}

#[test]
fn attached_by_ublk() -> Result<()> {
    flexblk_inside("attached_by_ublk", disk_list!("attach.sh"))
}

/// A host whose first process is systemd: it attaches and mounts at boot, and shuts down whatever has become of the
/// target.
#[test]
fn boots_with_systemd() -> Result<()> {
    let test = "boots_with_systemd";
    let Some(machines) = Machines::or_skip(test)? else {
        return Ok(());
    };
    let packages = std::env::var_os(PACKAGES_VARIABLE).context(PACKAGES_VARIABLE)?;
    let directory = machines.directory.path();
    let mut boot = Boot::start(&machines.image, &machines.network, directory)?;
    for start in [Start::First, Start::TargetDies, Start::TargetSilent] {
        let name = format!("{test}-{}", start.name());
        let scenario = boot.scenario(&name, start, Path::new(&packages))?;
        let outcome = machines.run(&scenario, &mut |words| boot.answer(words))?;
        outcome.check(&name)?;
        boot.ended(start)?;
    }
    boot.check()
}

#[test]
fn nbd_client() -> Result<()> {
    flexblk_inside("nbd_client", disk_list!("nbd.sh"))
}
