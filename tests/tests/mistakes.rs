//! What users get wrong: one line that says what to do, and the documented exit code.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use flexblk_tests::ports::free_udp_port;
use flexblk_tests::process::{Finished, find_program, run};
use flexblk_tests::setup::Setup;
use flexblk_tests::skip;
use flexblk_tests::target::{SUBNQN, TargetOptions};

const LIMIT: Duration = Duration::from_secs(30);

/// It failed with this code, in one line on standard error that has these words.
#[track_caller]
fn assert_told(finished: &Finished, code: i32, words: &[&str]) {
    assert_eq!(finished.code, Some(code), "{finished:?}");
    let lines: Vec<&str> = finished
        .stderr
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    assert_eq!(lines.len(), 1, "one line: {finished:?}");
    for word in words {
        assert!(lines[0].contains(word), "{word:?} is missing: {finished:?}");
    }
}

fn daemon(setup: &Setup, arguments: &[&str]) -> Result<Finished> {
    run(
        Command::new(&setup.binaries().target)
            .current_dir(setup.path())
            .args(arguments),
        LIMIT,
    )
}

fn configured(setup: &Setup, text: &str) -> Result<Finished> {
    fs::write(setup.path().join("target.toml"), text)?;
    daemon(setup, &["-c", "target.toml"])
}

#[test]
fn nobody_at_that_address() -> Result<()> {
    let setup = Setup::new()?;
    let port = free_udp_port()?.to_string();
    let finished = setup.flexblk(&[
        "info",
        "-a",
        "127.0.0.1",
        "-n",
        SUBNQN,
        "--udp-port",
        &port,
        "--connect-timeout",
        "500ms",
    ])?;
    assert_told(&finished, 3, &["127.0.0.1", "is the target running"]);
    let finished = setup.flexblk(&["info", "-a", "no-such-host.invalid", "-n", SUBNQN])?;
    assert_told(&finished, 3, &["no-such-host.invalid"]);
    let finished = setup.flexblk(&["info", "-a", "300.1.2.3", "-n", SUBNQN])?;
    assert_told(&finished, 2, &["300.1.2.3"]);
    Ok(())
}

#[test]
fn subsystems_and_namespaces_that_are_not_there_or_not_for_us() -> Result<()> {
    let setup = Setup::new()?;
    let options = TargetOptions {
        allow_hosts: Some(vec!["nqn.2026-11.org.example:friend".to_owned()]),
        ..TargetOptions::with_devices(&["ram:16M"])
    };
    let target = setup.target_with(options)?;
    let friend = ["-q", "nqn.2026-11.org.example:friend"];
    setup.flexblk_at(&target, "info", &friend)?.success()?;
    let stranger =
        setup.flexblk_at(&target, "info", &["-q", "nqn.2026-11.org.example:stranger"])?;
    assert_told(&stranger, 4, &["nqn.2026-11.org.example:stranger", SUBNQN]);
    let port = target.udp_port().to_string();
    let absent = "nqn.2026-11.org.example:absent";
    let finished = setup.flexblk(&[
        "info",
        "-a",
        "127.0.0.1",
        "-n",
        absent,
        "--udp-port",
        &port,
        friend[0],
        friend[1],
    ])?;
    assert_told(&finished, 4, &[absent, "discover"]);
    let finished = setup.flexblk_at(
        &target,
        "read",
        &["-N", "5", "--length", "512", friend[0], friend[1]],
    )?;
    assert_told(&finished, 5, &["namespace 5", "active namespaces: 1"]);
    let finished = setup.flexblk_at(
        &target,
        "read",
        &["--offset", "16M", "--length", "512", friend[0], friend[1]],
    )?;
    assert_told(&finished, 5, &["beyond"]);
    let finished = setup.flexblk_at(
        &target,
        "info",
        &["--fault", "loss=high", friend[0], friend[1]],
    )?;
    assert_told(&finished, 2, &["loss=high"]);
    Ok(())
}

#[test]
fn images_that_cannot_be_served() -> Result<()> {
    let setup = Setup::new()?;
    let port = free_udp_port()?.to_string();
    let finished = daemon(&setup, &["--file", "missing.img", "--udp-port", &port])?;
    assert_told(&finished, 3, &["missing.img"]);
    setup.file("odd.img", 1000, 1)?;
    let finished = daemon(&setup, &["--file", "odd.img", "--udp-port", &port])?;
    assert_told(&finished, 3, &["odd.img", "512"]);
    fs::create_dir(setup.path().join("folder"))?;
    let finished = daemon(&setup, &["--file", "folder", "--udp-port", &port])?;
    assert_told(&finished, 3, &["folder"]);
    Ok(())
}

#[test]
fn an_image_that_we_may_not_open() -> Result<()> {
    let setup = Setup::new()?;
    setup.file("secret.img", 1 << 20, 1)?;
    fs::set_permissions(setup.path(), fs::Permissions::from_mode(0o755))?;
    fs::set_permissions(
        setup.path().join("secret.img"),
        fs::Permissions::from_mode(0o000),
    )?;
    let port = free_udp_port()?.to_string();
    let target = &setup.binaries().target;
    let mut command = if rustix::process::geteuid().is_root() {
        // Root may open everything: be nobody.
        let Ok(setpriv) = find_program("setpriv") else {
            skip::note(
                "an_image_that_we_may_not_open",
                "setpriv (util-linux) is not installed and we are root",
            );
            return Ok(());
        };
        let mut command = Command::new(setpriv);
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
            .arg(target);
        command
    } else {
        Command::new(target)
    };
    command
        .current_dir(setup.path())
        .args(["--file", "secret.img", "--udp-port", &port]);
    let finished = run(&mut command, LIMIT)?;
    if finished.stderr.contains("setpriv") {
        skip::note(
            "an_image_that_we_may_not_open",
            "the programs are in a folder that nobody else may enter",
        );
        return Ok(());
    }
    assert_told(&finished, 3, &["secret.img", "ermission"]);
    Ok(())
}

#[test]
fn a_port_that_is_taken() -> Result<()> {
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let port = target.udp_port().to_string();
    let finished = daemon(&setup, &["--ram", "16M", "--udp-port", &port])?;
    assert_told(&finished, 3, &[&port, "in use"]);
    Ok(())
}

#[test]
fn configuration_mistakes_name_file_line_and_key() -> Result<()> {
    let setup = Setup::new()?;
    for (text, words) in [
        (
            "[target]\nmemory_budget = \"lots\"\n",
            ["target.toml:2", "memory_budget"],
        ),
        ("[listener]\nudp_port = 0\n", ["target.toml:2", "udp_port"]),
        (
            "[listener]\nudp_prot = 4791\n",
            ["target.toml:2", "udp_prot"],
        ),
        (
            "[[subsystem]]\nnqn = \"not an nqn\"\n",
            ["target.toml:2", "nqn"],
        ),
        (
            "[[subsystem]]\nnqn = \"nqn.2026-11.org.example:a\"\n[[subsystem.namespace]]\nbdev = \"tape:0\"\n",
            ["target.toml:4", "bdev"],
        ),
        (
            "[[bdev]]\ntype = \"ram\"\nname = \"fast\"\nsizes = \"1G\"\n",
            ["target.toml:4", "`sizes`"],
        ),
        (
            "[[bdev]]\nname = \"fast\"\ntype = \"tape\"\n",
            ["target.toml:3", "`tape`"],
        ),
        ("[target\n", ["target.toml:1", "target"]),
    ] {
        let finished = configured(&setup, text)?;
        assert_told(&finished, 2, &words);
    }
    let finished = daemon(&setup, &["-c", "absent.toml"])?;
    assert_told(&finished, 2, &["absent.toml"]);
    let finished = daemon(&setup, &["--ram", "plenty"])?;
    assert_eq!(finished.code, Some(2), "{finished:?}");
    assert!(finished.stderr.contains("plenty"), "{finished:?}");
    Ok(())
}

#[test]
fn more_memory_than_there_is() -> Result<()> {
    let setup = Setup::new()?;
    let port = free_udp_port()?;
    // A budget in which not one queue fits.
    let text = format!(
        "[target]\nmemory_budget = \"1k\"\n[listener]\nudp_port = {port}\n[[subsystem]]\nnqn = \"{SUBNQN}\"\n[[subsystem.namespace]]\nbdev = \"ram:1M\"\n"
    );
    let finished = configured(&setup, &text)?;
    assert_told(&finished, 3, &["memory budget of 1 KiB", "at least"]);
    // A namespace larger than any machine.
    let finished = daemon(
        &setup,
        &["--ram", "8000000T", "--udp-port", &port.to_string()],
    )?;
    assert_ne!(finished.code, Some(0), "{finished:?}");
    assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
    Ok(())
}
