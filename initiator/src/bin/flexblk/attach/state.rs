//! /run/flexblk/NAME: what is known of an attachment while it lives, and what is left of it when it was killed.
//!
//! | file | |
//! |---|---|
//! | `lock` | locked (flock) by the serving process as long as it lives, however it ends |
//! | `attachment.json` | who serves, and which kernel objects go with it |
//! | `disk` | the volume as a file, below a loop device |
//! | `disk.udev` | properties for the udev rule; of a ublk device, `/run/flexblk/.ublkbN.udev` |
//! | `control` | the serving process answers here |
//! | `log` | what it has to say |

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use flexblk_initiator::Namespace;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

/// Where the attachments are.
const RUN: &str = "/run/flexblk";
/// Where their stable names are.
const DEV: &str = "/dev/flexblk";
const RECORD: &str = "attachment.json";
/// How long we wait for others that are about to attach something. Each takes milliseconds.
const TURN: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);
/// Looks at a lock before it counts as one of a process that serves: who only asks has it for a moment.
const LOOKS: u32 = 20;

/// Name of an attachment: safe as a file name and in a unit's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name(String);

impl Name {
    pub(crate) fn parse(text: &str) -> Result<Name, String> {
        let fits = (1..=64).contains(&text.len())
            && !text.starts_with(['.', '-'])
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        if fits {
            Ok(Name(text.to_owned()))
        } else {
            Err(format!(
                "'{text}' is no name: up to 64 letters, digits, '.', '_' and '-', not beginning with '.' or '-'"
            ))
        }
    }

    /// For a namespace that nobody named: the end of its subsystem's NQN, and its id.
    pub(crate) fn of(subnqn: &str, nsid: u32) -> Name {
        let end = subnqn.rsplit(':').next().unwrap_or(subnqn);
        let end: String = end
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .take(48)
            .collect();
        let name = format!("{end}-n{nsid}");
        Name(name.trim_start_matches('-').to_owned())
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Its folder.
    pub(crate) fn directory(&self) -> PathBuf {
        Path::new(RUN).join(&self.0)
    }

    /// Its stable device name.
    pub(crate) fn link(&self) -> PathBuf {
        Path::new(DEV).join(&self.0)
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.directory().join("disk")
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.directory().join("control")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.directory().join("log")
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which namespace it is. The subsystem's name is not enough: it may be the default one of two targets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) subnqn: String,
    pub(crate) nsid: u32,
    /// The namespace's own name, in the form of the kernel's `wwid` attribute.
    pub(crate) wwid: Option<String>,
}

impl Identity {
    pub(crate) fn of(subnqn: &str, namespace: &Namespace) -> Identity {
        Identity {
            subnqn: subnqn.to_owned(),
            nsid: namespace.nsid.get(),
            wwid: wwid(namespace),
        }
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "namespace {} of {}", self.nsid, self.subnqn)
    }
}

/// The namespace's own name, as the kernel's NVMe host would show it.
fn wwid(namespace: &Namespace) -> Option<String> {
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
    let given = |bytes: &[u8]| bytes.iter().any(|byte| *byte != 0);
    match namespace.uuid {
        Some(uuid) => Some(format!("uuid.{uuid}")),
        None if given(&namespace.nguid) => Some(format!("eui.{}", hex(&namespace.nguid))),
        None if given(&namespace.eui64) => Some(format!("eui.{}", hex(&namespace.eui64))),
        None => None,
    }
}

/// How the device is made, and which kernel objects belong to it so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "backend")]
pub(crate) enum Objects {
    /// None yet: the namespace is being attached.
    #[serde(rename = "none")]
    Nothing,
    #[serde(rename = "fuse+loop")]
    FuseLoop {
        /// Number of the FUSE connection.
        fuse_connection: Option<u32>,
        /// Number of the loop device.
        loop_number: Option<u32>,
    },
    #[serde(rename = "ublk")]
    Ublk {
        /// Number of the device.
        number: u32,
    },
}

impl Objects {
    /// What users call it.
    pub(crate) fn backend(self) -> &'static str {
        match self {
            Objects::Nothing => "-",
            Objects::FuseLoop { .. } => "fuse+loop",
            Objects::Ublk { .. } => "ublk",
        }
    }

    /// A device whose requests wait for the next server when its own has died.
    pub(crate) fn recoverable(self) -> Option<u32> {
        match self {
            Objects::Ublk { number } => Path::new(&format!("/sys/block/ublkb{number}"))
                .exists()
                .then_some(number),
            _ => None,
        }
    }
}

/// Who serves, and which kernel objects go with it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) pid: i32,
    /// In clock ticks since boot, so that nobody else is taken for it who got its process id later.
    pub(crate) start_time: u64,
    #[serde(flatten)]
    pub(crate) objects: Objects,
    /// The block device, when there is one.
    pub(crate) device: Option<PathBuf>,
    #[serde(flatten)]
    pub(crate) identity: Identity,
}

impl Record {
    /// Of this process.
    pub(crate) fn new(identity: Identity, objects: Objects, device: Option<PathBuf>) -> Record {
        let pid = std::process::id().cast_signed();
        Record {
            pid,
            start_time: start_time(pid).unwrap_or(0),
            objects,
            device,
            identity,
        }
    }

    /// The device, for messages.
    pub(crate) fn device_text(&self) -> String {
        match &self.device {
            Some(device) => device.display().to_string(),
            None => "no device yet".into(),
        }
    }

    pub(crate) fn load(name: &Name) -> Option<Record> {
        let text = fs::read_to_string(name.directory().join(RECORD)).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// Replaces what was there, as a whole.
    pub(crate) fn save(&self, name: &Name) -> Result<()> {
        let (path, fresh) = (
            name.directory().join(RECORD),
            name.directory().join("attachment.new"),
        );
        fs::write(&fresh, serde_json::to_vec(self)?)
            .and_then(|()| fs::rename(&fresh, &path))
            .with_context(|| format!("{}", path.display()))
    }

    /// Whether its process is still there.
    pub(crate) fn lives(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    /// Whether both tell of one process.
    pub(crate) fn is_of_same_process(&self, other: &Record) -> bool {
        (self.pid, self.start_time) == (other.pid, other.start_time)
    }

    /// kill -9, if it is still that process.
    pub(crate) fn kill(&self) {
        if self.lives()
            && let Some(pid) = Pid::from_raw(self.pid)
        {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}

/// Field 22 of /proc/PID/stat.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name, in parentheses, may contain anything.
    stat.rsplit_once(')')?.1.split(' ').nth(20)?.parse().ok()
}

/// The right to look which namespaces are attached, and to attach another one: one process after the other. Held while
/// nothing is waited for, so that nobody waits long.
#[derive(Debug)]
pub(crate) struct Turn {
    _lock: File,
}

impl Turn {
    pub(crate) fn wait() -> Result<Turn> {
        Turn::wait_at(Path::new(RUN), TURN)
    }

    /// The common folder itself is locked, which leaves no file behind.
    fn wait_at(folder: &Path, within: Duration) -> Result<Turn> {
        let failed = || format!("{} (run it as root)", folder.display());
        let deadline = Instant::now() + within;
        loop {
            fs::create_dir_all(folder).with_context(failed)?;
            if let Some(turn) = Turn::now(folder).with_context(failed)? {
                return Ok(turn);
            }
            if Instant::now() >= deadline {
                bail!(
                    "others have been attaching for {within:?}, and one namespace must not be attached twice: try again"
                );
            }
            thread::sleep(PAUSE);
        }
    }

    /// `None`: it is another one's, or the folder has gone.
    fn now(folder: &Path) -> io::Result<Option<Turn>> {
        let lock = match File::open(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            locked => locked?,
        }
        Ok(is_at(&lock, folder).then_some(Turn { _lock: lock }))
    }
}

/// Whether that file is still the one at that place.
fn is_at(file: &File, path: &Path) -> bool {
    let there = fs::metadata(path).and_then(|there| Ok((there, file.metadata()?)));
    there.is_ok_and(|(there, ours)| (there.dev(), there.ino()) == (ours.dev(), ours.ino()))
}

/// A folder that is ours: nobody else has it while this lives. Dropping it leaves the folder as it is.
#[derive(Debug)]
pub(crate) struct Claim {
    name: Name,
    _lock: File,
}

/// How a folder is found.
#[derive(Debug)]
pub(crate) enum Claimed {
    Ours(Claim),
    /// A process serves it.
    Served,
}

impl Claim {
    /// Makes the folder if need be and locks it.
    pub(crate) fn take(name: &Name) -> Result<Claimed> {
        let directory = name.directory();
        let failed = || format!("{} (run it as root)", directory.display());
        let mut found = None;
        for look in 0..LOOKS {
            if look > 0 {
                thread::sleep(PAUSE);
            }
            found = Claim::make(name).with_context(failed)?;
            if let Some(Claimed::Ours(_)) = found {
                break;
            }
        }
        found.with_context(|| format!("{}: others make and remove it", directory.display()))
    }

    fn make(name: &Name) -> io::Result<Option<Claimed>> {
        let directory = name.directory();
        fs::create_dir_all(&directory)?;
        match fs::set_permissions(&directory, Permissions::from_mode(0o700)) {
            // Whoever had it has removed it since.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            done => done.and_then(|()| Claim::lock(name)),
        }
    }

    /// Locks the folder of an attachment that there is, or was; `None` when there is none.
    pub(crate) fn lock(name: &Name) -> io::Result<Option<Claimed>> {
        let path = name.directory().join("lock");
        for _ in 0..16 {
            let lock = match File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
            {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                opened => opened?,
            };
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(Some(Claimed::Served)),
                locked => locked?,
            }
            // Whoever had it may have removed it before we got the lock.
            if is_at(&lock, &path) {
                let name = name.clone();
                return Ok(Some(Claimed::Ours(Claim { name, _lock: lock })));
            }
        }
        Ok(None)
    }

    /// Removes the folder. Only files that we made.
    pub(crate) fn remove(self) -> io::Result<()> {
        let directory = self.name.directory();
        for file in [
            RECORD,
            "attachment.new",
            "disk",
            "disk.udev",
            "control",
            "log",
            "lock",
        ] {
            match fs::remove_file(directory.join(file)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        match fs::remove_dir(&directory) {
            // Since the lock is gone somebody else may have taken the name, and with it the folder.
            Err(error)
                if error.kind() == io::ErrorKind::DirectoryNotEmpty
                    && directory.join("lock").exists() => {}
            removed => removed?,
        }
        // The last one takes the common folder with it, unless somebody is about to attach something.
        if let Ok(Some(_turn)) = Turn::now(Path::new(RUN)) {
            let _ = fs::remove_dir(RUN);
        }
        Ok(())
    }
}

/// Where the udev rule finds the properties of a ublk device: by its number, since the device tells nothing else.
pub(crate) fn ublk_properties(number: u32) -> PathBuf {
    Path::new(RUN).join(format!(".ublkb{number}.udev"))
}

/// Whether a process serves it. Those who ask do not disturb one another.
pub(crate) fn is_served(name: &Name) -> bool {
    File::open(name.directory().join("lock")).is_ok_and(|lock| {
        flock(&lock, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK)
    })
}

/// Names of all attachments, and of what is left of killed ones.
pub(crate) fn names() -> Vec<Name> {
    let entries = fs::read_dir(RUN).into_iter().flatten().flatten();
    let mut names: Vec<Name> = entries
        .filter_map(|entry| Name::parse(entry.file_name().to_str()?).ok())
        .collect();
    names.sort_by(|a, b| a.0.cmp(&b.0));
    names
}

/// The attachment that is meant: by its name, or by a path to its device.
pub(crate) fn find(what: &str) -> Result<Name> {
    if let Ok(name) = Name::parse(what)
        && name.directory().exists()
    {
        return Ok(name);
    }
    if what.contains('/') {
        let path = fs::canonicalize(what).unwrap_or_else(|_| PathBuf::from(what));
        for name in names() {
            let device = Record::load(&name).and_then(|record| record.device);
            if device.as_ref() == Some(&path)
                || name.link() == Path::new(what)
                || name.disk() == path
            {
                return Ok(name);
            }
        }
    }
    bail!("nothing is attached as {what}: `flexblk list` shows what is")
}

/// /dev/flexblk/NAME leads to `device`.
pub(crate) fn make_link(name: &Name, device: &Path) -> io::Result<()> {
    fs::create_dir_all(DEV)?;
    let link = name.link();
    match fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let relative = Path::new("..").join(device.file_name().unwrap_or_default());
    std::os::unix::fs::symlink(relative, link)
}

/// It leads nowhere any more.
pub(crate) fn remove_link(name: &Name) {
    let _ = fs::remove_file(name.link());
    let _ = fs::remove_dir(DEV);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_file_names() {
        for good in ["a", "data-1", "x.y_z", &"n".repeat(64)] {
            assert!(Name::parse(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            ".x",
            "-x",
            "a/b",
            "a b",
            "ä",
            &"n".repeat(65),
        ] {
            assert!(Name::parse(bad).is_err(), "{bad}");
        }
        let name = Name::of("nqn.2026-11.dev.flexblk:my/target", 3);
        assert_eq!(name.as_str(), "my-target-n3");
        let name = Name::of(&format!("nqn.2026-11.x:{}", "-é".repeat(90)), u32::MAX);
        assert!(Name::parse(name.as_str()).is_ok());
    }

    #[test]
    fn turns_are_taken_one_after_the_other() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let moment = Duration::from_millis(30);
        let first = Turn::wait_at(&run, moment).unwrap();
        assert!(Turn::wait_at(&run, moment).is_err());
        drop(first);
        let second = Turn::wait_at(&run, moment).unwrap();
        // Without a folder there is nothing to have a turn with; the next one makes it again.
        fs::remove_dir(&run).unwrap();
        assert!(Turn::now(&run).unwrap().is_none());
        drop(Turn::wait_at(&run, moment).unwrap());
        assert!(!is_at(&second._lock, &run));
    }

    #[test]
    fn a_process_is_known_by_its_start_time() {
        let identity = Identity {
            subnqn: "nqn".into(),
            nsid: 1,
            wwid: None,
        };
        let record = Record::new(identity, Objects::Ublk { number: 0 }, None);
        assert!(record.start_time > 0);
        assert_eq!(start_time(record.pid), Some(record.start_time));
        assert_eq!(start_time(-1), None);
    }
}
