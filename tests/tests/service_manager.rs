//! `flexblk attach` under a service manager: how it starts at boot, and ends when the machine shuts down.
//!
//! `tests/vm.rs` has the same with systemd itself.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use flexblk_tests::attachment::{Attachment, unavailable};
use flexblk_tests::process::Process;
use flexblk_tests::setup::Setup;
use rustix::process::Signal;
use serde_json::json;

/// Nothing here takes longer.
const BOUND: Duration = Duration::from_secs(5);

#[test]
fn a_service_manager_is_told_and_ends_it() -> Result<()> {
    if unavailable("a_service_manager_is_told_and_ends_it") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let socket = setup.path().join("notify");
    let listener = std::os::unix::net::UnixDatagram::bind(&socket)?;
    listener.set_read_timeout(Some(BOUND))?;
    let name = Attachment::unique_name("foreground");
    let mut command = Command::new(&setup.binaries().flexblk);
    command.arg("attach").args(target.address());
    command.args(["-N", "1", "--foreground", "--as", &name]);
    command.env("NOTIFY_SOCKET", &socket);
    let mut process = Process::spawn(&mut command, "attach", setup.path())?;
    let mut message = [0; 256];
    let len = listener.recv(&mut message)?;
    let message = String::from_utf8_lossy(&message[..len]).into_owned();
    ensure!(
        message.starts_with("READY=1\nSTATUS=/dev/loop"),
        "{message}"
    );
    process.signal(Signal::TERM)?;
    ensure!(process.wait(BOUND)?.success(), "{}", process.tail());
    ensure!(!Path::new("/run/flexblk").join(&name).exists());
    Ok(())
}

#[test]
fn what_persists_is_attached_at_boot() -> Result<()> {
    if unavailable("what_persists_is_attached_at_boot") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let name = Attachment::unique_name("boot");
    let file = setup.path().join("attach.toml");
    let file = file.display().to_string();
    let persist = ["--persist", "--config", &file, "--policy", "fail"];
    let first = Attachment::new(setup.binaries(), &target, &name, &persist)?;
    let text = fs::read_to_string(&file)?;
    ensure!(text.contains(&format!("name = \"{name}\"\n")), "{text}");
    ensure!(text.contains("policy = \"fail\"\n"), "{text}");
    ensure!(!text.contains("persist"), "{text}");
    first.detach(&[])?.success()?;
    first.check_gone()?;

    // Boot: what systemd's generator makes of it, and the file's entries by hand.
    let units = setup.path().join("units");
    let folder = units.display().to_string();
    let generator = [
        "systemd-generator",
        &folder,
        &folder,
        &folder,
        "--config",
        &file,
    ];
    setup.flexblk(&generator)?.success()?;
    let unit = format!("remote-fs.target.wants/flexblk@{name}.service");
    ensure!(fs::read_link(units.join(unit))?.ends_with("flexblk@.service"));
    for _ in 0..2 {
        // The second time there is nothing to do.
        setup
            .flexblk(&["attach", "--all", "--config", &file])?
            .success()?;
    }
    let again = Attachment::found(setup.binaries(), &name)?;
    again.detach(&["--persist", "--config", &file])?.success()?;
    again.check_gone()?;
    ensure!(!fs::read_to_string(&file)?.contains(&name));

    // An unattached device is forgotten, too; a mistake names its place.
    fs::write(&file, "[[attach]]\nname = \"a\"\ncolour = 1\n")?;
    let wrong = setup.flexblk(&["attach", "--all", "--config", &file])?;
    ensure!(wrong.code == Some(2), "{wrong:?}");
    ensure!(
        wrong.stderr.contains("attach.toml:3: colour: "),
        "{}",
        wrong.stderr
    );
    Ok(())
}

#[test]
fn without_a_path_it_gives_up_when_the_machine_shuts_down() -> Result<()> {
    const TEST: &str = "without_a_path_it_gives_up_when_the_machine_shuts_down";
    if unavailable(TEST) {
        return Ok(());
    }
    let setup = Setup::new()?;
    let mut target = setup.target(&["ram:64M"])?;
    let name = Attachment::unique_name("shutdown");
    let attached = Attachment::new(setup.binaries(), &target, &name, &["--policy", "queue"])?;
    let read = |name| attached.read_block(name, setup.path());
    setup.flexblk(&["systemd-shutdown", &name])?.success()?;
    // With a path it goes on for as long as it is used, beyond the time that it waits for one.
    std::thread::sleep(BOUND + Duration::from_secs(1));
    ensure!(read("before")?.wait(BOUND)?.success(), "the path is live");
    target.kill()?;
    let mut reader = read("after")?;
    let status = reader.wait(3 * BOUND)?;
    ensure!(!status.success(), "a read without a path");
    attached.check_gone()
}

/// Its controller answers, so there is always a path; its device does not.
#[test]
fn without_an_answer_it_gives_up_when_the_machine_shuts_down() -> Result<()> {
    const TEST: &str = "without_an_answer_it_gives_up_when_the_machine_shuts_down";
    if unavailable(TEST) {
        return Ok(());
    }
    let setup = Setup::new()?;
    let (target, mut rpc) = setup.target_with_errors()?;
    let name = Attachment::unique_name("silent");
    let options = ["--policy", "queue", "--io-timeout", "3s"];
    let attached = Attachment::new(setup.binaries(), &target, &name, &options)?;
    let read = |name| attached.read_block(name, setup.path());
    setup.flexblk(&["systemd-shutdown", &name])?.success()?;
    // Nobody waits for an answer.
    std::thread::sleep(Duration::from_secs(4));
    ensure!(read("before")?.wait(BOUND)?.success(), "the device answers");
    rpc.call(
        "bdev_error_inject_error",
        json!({ "name": "EE_m", "io_type": "all", "error_type": "pending", "num": 1000 }),
    )?;
    // By itself a request tries five times as long.
    let status = read("after")?.wait(2 * BOUND)?;
    ensure!(!status.success(), "a read without an answer");
    attached.check_gone()
}
