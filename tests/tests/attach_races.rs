//! `flexblk attach` with somebody else in its way: who asked goes before the device is there, or another one attaches
//! the same namespace.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flexblk_tests::attachment::{Attachment, unavailable};
use flexblk_tests::process::{Process, eventually};
use flexblk_tests::setup::Setup;
use flexblk_tests::target::Target;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// Nothing here takes longer.
const BOUND: Duration = Duration::from_secs(5);
/// Long enough for a process to begin to connect, and for nothing else.
const WHILE_CONNECTING: Duration = Duration::from_millis(500);

/// `flexblk attach` of namespace 1.
fn attach(setup: &Setup, target: &Target, name: &str) -> Command {
    let mut command = Command::new(&setup.binaries().flexblk);
    command.arg("attach").args(target.address());
    command.args(["-N", "1", "--as", name]);
    command
}

fn folder(name: &str) -> PathBuf {
    Path::new("/run/flexblk").join(name)
}

/// Processes that attach as `name`; those that have ended, and were not waited for, have no command line.
fn processes(name: &str) -> Vec<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let named = entries.filter(|entry| {
        fs::read(entry.path().join("cmdline")).is_ok_and(|line| {
            line.split(|byte| *byte == 0)
                .any(|word| word == name.as_bytes())
        })
    });
    let ids = named.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter_map(Pid::from_raw).collect()
}

/// Mounts and loop devices that belong to `name`.
fn objects(name: &str) -> Result<Vec<String>> {
    let place = format!("/run/flexblk/{name}/");
    let mounts = fs::read_to_string("/proc/mounts")?;
    let mounts = mounts.lines().filter(|line| line.contains(&place));
    let mut objects: Vec<String> = mounts.map(str::to_owned).collect();
    for entry in fs::read_dir("/sys/block")?.flatten() {
        let backing = entry.path().join("loop/backing_file");
        if fs::read_to_string(&backing).is_ok_and(|file| file.starts_with(&place)) {
            objects.push(backing.display().to_string());
        }
    }
    Ok(objects)
}

/// No process, no device and no folder.
fn check_nothing_is_left(name: &str) -> Result<()> {
    let gone = || {
        processes(name).is_empty()
            && objects(name).is_ok_and(|objects| objects.is_empty())
            && !folder(name).exists()
            && !Path::new("/dev/flexblk").join(name).exists()
    };
    eventually("nothing is left", BOUND, gone)
        .map(drop)
        .with_context(|| {
            let (folder, objects) = (folder(name).exists(), objects(name));
            format!("{:?}, {objects:?}, folder: {folder}", processes(name))
        })
}

/// Removes what a failed test leaves.
struct Cleaner<'a>(&'a Setup, String);

impl Drop for Cleaner<'_> {
    fn drop(&mut self) {
        for process in processes(&self.1) {
            let _ = kill_process(process, Signal::KILL);
        }
        if folder(&self.1).exists() {
            drop(self.0.flexblk(&["detach", &self.1, "--force"]));
        }
    }
}

#[test]
fn who_interrupts_attach_wants_no_device() -> Result<()> {
    if unavailable("who_interrupts_attach_wants_no_device") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let mut target = setup.target(&["ram:16M"])?;
    // Ctrl-C reaches both processes; whoever kills the one that he started, only that one.
    for both in [true, false] {
        let name = Attachment::unique_name(if both { "ctrl-c" } else { "orphan" });
        let _cleaner = Cleaner(&setup, name.clone());
        target.signal(Signal::STOP)?;
        let mut command = attach(&setup, &target, &name);
        let mut started = Process::spawn(command.process_group(0), &name, setup.path())?;
        eventually("two processes", BOUND, || processes(&name).len() == 2)?;
        thread::sleep(WHILE_CONNECTING);
        let id = Pid::from_raw(i32::try_from(started.id())?).context("a process id")?;
        if both {
            kill_process_group(id, Signal::INT)?;
        } else {
            kill_process(id, Signal::KILL)?;
        }
        started.wait(BOUND)?;
        let ended = eventually("both have ended", Duration::from_secs(2), || {
            processes(&name).is_empty()
        });
        target.signal(Signal::CONT)?;
        ended?;
        check_nothing_is_left(&name)?;
    }
    Ok(())
}

#[test]
fn a_device_that_nobody_is_told_of_goes() -> Result<()> {
    if unavailable("a_device_that_nobody_is_told_of_goes") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let mut target = setup.target(&["ram:16M"])?;
    // Nobody reads any more what it says.
    for mode in ["--detached", "--foreground"] {
        let name = Attachment::unique_name("unheard");
        let _cleaner = Cleaner(&setup, name.clone());
        target.signal(Signal::STOP)?;
        let mut command = attach(&setup, &target, &name);
        command.arg(mode).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        thread::sleep(WHILE_CONNECTING);
        drop(child.stdout.take());
        target.signal(Signal::CONT)?;
        eventually("it ends", BOUND, || !matches!(child.try_wait(), Ok(None)))
            .inspect_err(|_| drop(child.kill()))?;
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.code() == Some(1),
            "{:?} {said}",
            output.status
        );
        ensure!(!said.contains("panicked"), "{said}");
        check_nothing_is_left(&name)?;
    }

    // Its log cannot be opened.
    let name = Attachment::unique_name("no-log");
    let _cleaner = Cleaner(&setup, name.clone());
    let log = folder(&name).join("log");
    fs::create_dir_all(&log)?;
    let mut child = attach(&setup, &target, &name);
    let mut child = Process::spawn(&mut child, &name, setup.path())?;
    let status = child.wait(BOUND)?;
    ensure!(status.code() == Some(1), "{status} {}", child.tail());
    ensure!(child.stderr().contains("log"), "{}", child.stderr());
    let left = objects(&name)?;
    fs::remove_dir(&log)?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

#[test]
fn of_two_at_once_one_attaches() -> Result<()> {
    if unavailable("of_two_at_once_one_attaches") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let mut target = setup.target(&["ram:16M"])?;
    for round in 0..5 {
        let names = ["a", "b", "c"].map(|hint| Attachment::unique_name(&format!("{hint}{round}")));
        let _cleaners = names.clone().map(|name| Cleaner(&setup, name));
        // All connect at the same moment.
        target.signal(Signal::STOP)?;
        let mut started = Vec::new();
        for name in &names {
            let mut command = attach(&setup, &target, name);
            started.push(Process::spawn(&mut command, name, setup.path())?);
        }
        thread::sleep(WHILE_CONNECTING);
        target.signal(Signal::CONT)?;
        let mut attached = Vec::new();
        for (process, name) in started.iter_mut().zip(&names) {
            if process.wait(2 * BOUND)?.success() {
                attached.push(name);
            } else {
                let said = process.stderr();
                ensure!(said.contains("attached already"), "{name}: {said}");
            }
        }
        ensure!(attached.len() == 1, "round {round}: {attached:?}");
        for name in attached {
            setup.flexblk(&["detach", name])?.success()?;
        }
        for name in &names {
            check_nothing_is_left(name)?;
        }
    }
    Ok(())
}

#[test]
fn who_looks_at_a_lock_disturbs_nobody() -> Result<()> {
    if unavailable("who_looks_at_a_lock_disturbs_nobody") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let name = Attachment::unique_name("looked-at");
    let attached = Attachment::new(setup.binaries(), &target, &name, &[])?;
    let process = Pid::from_raw(i32::try_from(attached.process())?).context("a process id")?;
    kill_process(process, Signal::KILL)?;
    eventually("it is known as killed", BOUND, || {
        attached
            .listed()
            .is_ok_and(|entry| entry["State"] == "killed")
    })?;
    // As another `flexblk list` does it.
    let lock = File::open(folder(&name).join("lock"))?;
    flock(&lock, FlockOperation::LockShared)?;
    ensure!(
        attached.listed()?["State"] == "killed",
        "{}",
        attached.listed()?
    );
    drop(lock);
    attached.detach(&[])?.success()?;
    attached.check_gone()
}

#[test]
fn detach_of_a_dead_process_aborts_nobody_else_s_connection() -> Result<()> {
    if unavailable("detach_of_a_dead_process_aborts_nobody_else_s_connection") {
        return Ok(());
    }
    let setup = Setup::new()?;
    let target = setup.target(&["ram:16M"])?;
    let name = Attachment::unique_name("lives");
    let lives = Attachment::new(setup.binaries(), &target, &name, &["--via", "fuse"])?;
    // What a process left that was killed long ago; its connection's number has been given to another one since.
    let record = fs::read(folder(&name).join("attachment.json"))?;
    let mut record: serde_json::Value = serde_json::from_slice(&record)?;
    record["start_time"] = 1.into();
    record["loop_number"] = serde_json::Value::Null;
    let dead = Attachment::unique_name("dead");
    let _cleaner = Cleaner(&setup, dead.clone());
    fs::create_dir_all(folder(&dead))?;
    fs::write(
        folder(&dead).join("attachment.json"),
        serde_json::to_vec(&record)?,
    )?;
    setup.flexblk(&["detach", &dead])?.success()?;
    ensure!(!folder(&dead).exists());
    let mut read = lives.read_block("dd", setup.path())?;
    ensure!(read.wait(BOUND)?.success(), "{}", read.tail());
    lives.detach(&[])?.success()?;
    lives.check_gone()
}
