//! truenas_pynvmeof_client, an initiator in pure Python, and its own integration suite with our target. It
//! runs when `PYNVMEOF_DIR` names a checkout of it and Python has pytest.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use flexblk_tests::ports::free_tcp_port;
use flexblk_tests::process::run;
use flexblk_tests::setup::Setup;
use flexblk_tests::skip;
use flexblk_tests::target::{SUBNQN, TargetOptions};

const TEST: &str = "its_own_integration_suite";
/// The client fails at a transport type that it does not know, and the discovery log tells of FlexiNS, too.
/// Linux and SPDK pass such entries over.
const UNKNOWN_TRANSPORT: &str = "tests/integration/test_basic_operations.py::TestDiscoveryOperations::test_get_discovery_entries";
const LIMIT: Duration = Duration::from_secs(300);

fn checkout() -> Option<PathBuf> {
    let Some(directory) = std::env::var_os("PYNVMEOF_DIR").map(PathBuf::from) else {
        skip::note(
            TEST,
            "PYNVMEOF_DIR names no checkout of truenas_pynvmeof_client",
        );
        return None;
    };
    if !directory.join("tests/integration").is_dir() {
        skip::note(
            TEST,
            &format!("{} has no tests/integration", directory.display()),
        );
        return None;
    }
    let pytest = Command::new("python3")
        .args(["-m", "pytest", "--version"])
        .output();
    if !pytest.is_ok_and(|output| output.status.success()) {
        skip::note(TEST, "python3 has no pytest");
        return None;
    }
    Some(directory)
}

#[test]
fn its_own_integration_suite() -> Result<()> {
    let Some(directory) = checkout() else {
        return Ok(());
    };
    let setup = Setup::new()?;
    let port = free_tcp_port()?;
    let target = setup.target_with(TargetOptions {
        extra: format!("[tcp]\naddress = \"127.0.0.1:{port}\"\n"),
        ..TargetOptions::with_devices(&["ram:64M"])
    })?;
    let mut suite = Command::new("python3");
    suite
        .args([
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/integration",
        ])
        .args(["--deselect", UNKNOWN_TRANSPORT])
        .current_dir(&directory)
        .env("PYTHONPATH", directory.join("src"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("NVMEOF_TARGET_HOST", "127.0.0.1")
        .env("NVMEOF_TARGET_PORT", port.to_string())
        .env("NVMEOF_TARGET_NQN", SUBNQN);
    let finished = run(&mut suite, LIMIT)?;
    println!("{}", finished.stdout);
    skip::note_part(
        TEST,
        "its discovery test, which knows no transport but NVMe's own",
    );
    ensure!(finished.code == Some(0), "{}", finished.stdout);
    ensure!(finished.stdout.contains(" passed"), "{}", finished.stdout);
    drop(target);
    Ok(())
}
