//! Linux as a peer, in a virtual machine. `cargo xtask test --vm` prepares it and runs these.
//!
//! Each list runs twice: the kernel's host with the kernel's own target, which shows that a step is right, and the same
//! host with our target.

use anyhow::{Result, bail};
use flexblk_tests::target::SUBNQN;
use flexblk_tests::vm::image_or_skip;
use flexblk_tests::vm::machine;
use flexblk_tests::vm::network::Network;
use flexblk_tests::vm::scenario::Scenario;

/// Runs a list in a guest that is host and target at once.
fn kernel_with_itself(test: &str, script: &'static str) -> Result<()> {
    let Some(image) = image_or_skip(test) else {
        return Ok(());
    };
    let network = Network::enter()?;
    let directory = tempfile::Builder::new().prefix("flexblk-vm-").tempdir()?;
    let scenario = Scenario::new(test, script)
        .variable("PEER", "nvmet")
        .variable("SUBNQN", SUBNQN)
        .variable(
            "NVME_CORE",
            if script.contains("without multipath") {
                "multipath=N"
            } else {
                ""
            },
        );
    let outcome = machine::run(
        &image,
        &network,
        &scenario,
        directory.path(),
        &mut |words| bail!("nobody is outside to do {words:?}"),
    )?;
    outcome.check(test)
}

/// One list, with the kernel's own target.
macro_rules! kernel_with_itself {
    ($($test:ident: $script:literal;)*) => {$(
        #[test]
        fn $test() -> Result<()> {
            kernel_with_itself(stringify!($test), include_str!(concat!("../vm/", $script)))
        }
    )*};
}

kernel_with_itself! {
    kernel_commands: "host-commands.sh";
    kernel_options: "host-options.sh";
    kernel_loss: "host-loss.sh";
    kernel_events: "host-events.sh";
    kernel_paths: "host-paths.sh";
    kernel_discovery: "host-discovery.sh";
    kernel_reservations: "host-reservations.sh";
}
