//! Child processes that do not outlive us.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// Ids of children that were started and not yet reaped; an id in here cannot belong to anybody else.
static RUNNING: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

fn running() -> MutexGuard<'static, Vec<Pid>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kills every child that is still running. For the end of the program.
pub fn kill_all() {
    for pid in running().iter() {
        let _ = kill_process(*pid, Signal::KILL);
    }
}

/// A running program. Dropping it kills it.
pub struct Process {
    child: Child,
    pid: Pid,
    name: String,
    stdout: PathBuf,
    stderr: PathBuf,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`; its output goes to `NAME.stdout` and `NAME.stderr` in `directory`.
    pub fn spawn(command: &mut Command, name: &str, directory: &Path) -> Result<Process> {
        let stdout = directory.join(format!("{name}.stdout"));
        let stderr = directory.join(format!("{name}.stderr"));
        let create =
            |path: &Path| File::create(path).with_context(|| format!("{}", path.display()));
        command
            .stdin(Stdio::null())
            .stdout(create(&stdout)?)
            .stderr(create(&stderr)?);
        // The lock is held so that `kill_all` misses no child that was just made.
        let mut running = running();
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let pid = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .context("a process id is positive")?;
        running.push(pid);
        drop(running);
        Ok(Process {
            child,
            pid,
            name: name.to_owned(),
            stdout,
            stderr,
            status: None,
        })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to standard output so far.
    pub fn stdout(&self) -> String {
        text(&self.stdout)
    }

    /// What it wrote to standard error so far.
    pub fn stderr(&self) -> String {
        text(&self.stderr)
    }

    /// Its exit status, when it is over.
    pub fn status(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            // Reaping frees the id: nobody may send a signal to it at that moment.
            let mut running = running();
            if let Some(status) = self.child.try_wait()? {
                running.retain(|pid| *pid != self.pid);
                self.status = Some(status);
            }
        }
        Ok(self.status)
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        let mut pause = Duration::from_millis(1);
        loop {
            if let Some(status) = self.status()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!(
                    "{} did not end within {limit:?}; it said:\n{}",
                    self.name,
                    self.tail()
                );
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    /// Sends a signal.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.status()?.is_none() {
            kill_process(self.pid, signal)?;
        }
        Ok(())
    }

    /// kill -9, and waits for the end.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::KILL)?;
        self.wait(Duration::from_secs(10))
    }

    /// The end of its output, for messages.
    pub fn tail(&self) -> String {
        let text = format!("{}{}", self.stdout(), self.stderr());
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(20);
        lines.get(from..).unwrap_or_default().join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

fn text(path: &Path) -> String {
    fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

/// How a program ended that was run to its end.
#[derive(Debug)]
pub struct Finished {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
}

impl Finished {
    /// An error with its output unless it ended with 0.
    pub fn success(self) -> Result<Finished> {
        if self.code == Some(0) {
            return Ok(self);
        }
        bail!(
            "exit {:?} after {:?}\n{}{}",
            self.code,
            self.took,
            self.stdout,
            self.stderr
        )
    }
}

/// Runs a program to its end.
pub fn run(command: &mut Command, limit: Duration) -> Result<Finished> {
    let directory = tempfile::tempdir()?;
    let started = Instant::now();
    let mut process = Process::spawn(command, "run", directory.path())?;
    let status = process.wait(limit)?;
    Ok(Finished {
        code: status.code(),
        stdout: process.stdout(),
        stderr: process.stderr(),
        took: started.elapsed(),
    })
}

/// Waits until `condition` holds.
pub fn eventually(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> bool,
) -> Result<Duration> {
    let started = Instant::now();
    while !condition() {
        if started.elapsed() >= limit {
            bail!("not within {limit:?}: {what}");
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(started.elapsed())
}

/// Whether we may do what root may.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A program in `PATH`.
pub fn find_program(name: &str) -> io::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Daemons and file system tools live in directories that not every user has in PATH.
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(system)
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("{name} is not in PATH")))
}
