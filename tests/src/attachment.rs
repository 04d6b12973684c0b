//! A namespace attached to this machine by `flexblk attach`, and what must not be left of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::binaries::Binaries;
use crate::process::{Finished, Process, eventually, find_program, is_root, run};
use crate::target::Target;

/// Longer than anything here may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Whether this machine can attach through FUSE and a loop device; notes the skip when it cannot.
pub fn unavailable(test: &str) -> bool {
    let reason = if !is_root() {
        "needs root"
    } else if !Path::new("/dev/fuse").exists() {
        "there is no /dev/fuse"
    } else if !Path::new("/dev/loop-control").exists() {
        "there is no /dev/loop-control"
    } else {
        return false;
    };
    crate::skip::note(test, reason);
    true
}

/// Runs a system program to its end; its output is in the error.
pub fn system(program: &str, arguments: &[&str]) -> Result<Finished> {
    let path = find_program(program)?;
    run(Command::new(path).args(arguments), LIMIT)?
        .success()
        .with_context(|| format!("{program} {}", arguments.join(" ")))
}

/// An attachment. Dropping it unmounts and detaches it by force.
pub struct Attachment {
    binaries: &'static Binaries,
    name: String,
    device: PathBuf,
    mounts: Vec<PathBuf>,
    process: u32,
}

impl Attachment {
    /// A name that no other test, nor another run, uses.
    pub fn unique_name(hint: &str) -> String {
        format!("test-{}-{hint}", std::process::id())
    }

    /// Attaches namespace 1.
    pub fn new(
        binaries: &'static Binaries,
        target: &Target,
        name: &str,
        arguments: &[&str],
    ) -> Result<Attachment> {
        let mut command = Command::new(&binaries.flexblk);
        command.arg("attach").args(target.address());
        command.args(["-N", "1", "--as", name]).args(arguments);
        let finished = run(&mut command, LIMIT)?.success().context("attach")?;
        let device = finished.stdout.trim().to_owned();
        if !device.starts_with("/dev/") {
            bail!("attach printed {device:?}");
        }
        let attachment = Attachment::found(binaries, name)?;
        if attachment.device != Path::new(&device) {
            bail!("attach printed {device}, list {:?}", attachment.device);
        }
        Ok(attachment)
    }

    /// One that somebody else has attached.
    pub fn found(binaries: &'static Binaries, name: &str) -> Result<Attachment> {
        let mut attachment = Attachment {
            binaries,
            name: name.to_owned(),
            device: PathBuf::new(),
            mounts: Vec::new(),
            process: 0,
        };
        let listed = attachment.listed()?;
        attachment.device = listed["DevicePath"].as_str().unwrap_or_default().into();
        let process = listed["Process"].as_u64();
        attachment.process = u32::try_from(process.context("a process serves it")?)?;
        Ok(attachment)
    }

    /// The block device.
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// The same as text.
    pub fn device_text(&self) -> String {
        self.device.display().to_string()
    }

    /// `dd` reads the first block past all caches; its output goes to files of that name in `directory`.
    pub fn read_block(&self, name: &str, directory: &Path) -> Result<Process> {
        let mut command = Command::new(find_program("dd")?);
        let from = format!("if={}", self.device_text());
        command.args([&from, "of=/dev/null", "bs=4k", "count=1", "iflag=direct"]);
        Process::spawn(&mut command, name, directory)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process that serves it.
    pub fn process(&self) -> u32 {
        self.process
    }

    /// Mounts its file system.
    pub fn mount(&mut self, place: &Path) -> Result<()> {
        fs::create_dir_all(place)?;
        let (device, text) = (self.device_text(), place.display().to_string());
        system("mount", &[&device, &text])?;
        self.mounts.push(place.to_owned());
        Ok(())
    }

    /// Unmounts what was mounted last; how long it took, and whether it went well.
    pub fn unmount(&mut self, limit: Duration) -> Result<Finished> {
        let place = self.mounts.pop().context("something is mounted")?;
        run(Command::new(find_program("umount")?).arg(place), limit)
    }

    /// Its line of `flexblk list -o json`.
    pub fn listed(&self) -> Result<Value> {
        let mut command = Command::new(&self.binaries.flexblk);
        let list = run(command.args(["list", "-o", "json"]), LIMIT)?.success()?;
        let list: Value = serde_json::from_str(&list.stdout)?;
        let entries = list["Attachments"].as_array().cloned().unwrap_or_default();
        entries
            .into_iter()
            .find(|entry| entry["Name"] == self.name.as_str())
            .with_context(|| format!("{} is listed", self.name))
    }

    /// `flexblk detach`, with how it went.
    pub fn detach(&self, arguments: &[&str]) -> Result<Finished> {
        let mut command = Command::new(&self.binaries.flexblk);
        run(command.arg("detach").arg(&self.name).args(arguments), LIMIT)
    }

    /// An error that names whatever is left of it.
    pub fn check_gone(&self) -> Result<()> {
        let left = || {
            let mut left = Vec::new();
            for path in [
                format!("/run/flexblk/{}", self.name),
                format!("/dev/flexblk/{}", self.name),
                format!("/proc/{}", self.process),
            ] {
                if Path::new(&path).symlink_metadata().is_ok() {
                    left.push(path);
                }
            }
            let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
            let place = format!("/run/flexblk/{}/", self.name);
            left.extend(
                mounts
                    .lines()
                    .filter(|line| line.contains(&place))
                    .map(str::to_owned),
            );
            let device = self.device.file_name().unwrap_or_default();
            let backing = Path::new("/sys/block")
                .join(device)
                .join("loop/backing_file");
            if fs::read_to_string(&backing).is_ok_and(|file| file.starts_with(&place)) {
                left.push(backing.display().to_string());
            }
            left
        };
        let gone = eventually("nothing is left", Duration::from_secs(3), || {
            left().is_empty()
        });
        gone.map(drop)
            .with_context(|| format!("left: {:?}", left()))
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        for place in self.mounts.drain(..).rev() {
            let unmount = Command::new("umount").arg("-l").arg(place).status();
            drop(unmount);
        }
        if Path::new("/run/flexblk").join(&self.name).exists() {
            drop(self.detach(&["--force"]));
        }
    }
}
