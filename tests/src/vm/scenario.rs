//! What a guest does: scripts, and what they are told.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::debian::Tree;

/// Starts the guest.
const INIT: &str = include_str!("../../vm/init.sh");
/// `step`, `ask` and what else scripts share.
const LIBRARY: &str = include_str!("../../vm/library.sh");
/// The kernel's own target, with the operations that tests want of a target.
const NVMET: &str = include_str!("../../vm/nvmet.sh");
/// The same operations on a target outside.
const OUTSIDE: &str = include_str!("../../vm/outside.sh");

/// A script of the guest with its environment.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub(super) name: String,
    script: &'static str,
    environment: Vec<(String, String)>,
    pub(super) limit: Duration,
    /// Sockets of vhost-user-blk back-ends, each with its number of queues.
    pub(super) disks: Vec<(PathBuf, u16)>,
    /// Paths in the guest, and the files that they are copies of.
    files: Vec<(String, PathBuf)>,
}

impl Scenario {
    /// Runs `script`, which has the functions of `library.sh`.
    pub fn new(name: &str, script: &'static str) -> Scenario {
        Scenario {
            name: name.to_owned(),
            script,
            environment: Vec::new(),
            limit: Duration::from_secs(300),
            disks: Vec::new(),
            files: Vec::new(),
        }
    }

    /// Sets a variable of the script.
    #[must_use]
    pub fn variable(mut self, name: &str, value: impl std::fmt::Display) -> Scenario {
        self.environment.push((name.to_owned(), value.to_string()));
        self
    }

    /// A disk whose back-end listens there.
    #[must_use]
    pub fn vhost_user_disk(mut self, socket: &Path, queues: u16) -> Scenario {
        self.disks.push((socket.to_owned(), queues));
        self
    }

    /// The program `flexblk` in the guest, with the library that nothing else there needs.
    #[must_use]
    pub fn flexblk(mut self, program: &Path, tree: &Tree) -> Scenario {
        const LIBRARY: &str = "usr/lib/x86_64-linux-gnu/libgcc_s.so.1";
        self.files
            .push(("usr/bin/flexblk".to_owned(), program.to_owned()));
        self.files
            .push((LIBRARY.to_owned(), tree.root().join(LIBRARY)));
        self
    }

    /// How long it may take, the start of the machine included; five minutes unless this is called.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Scenario {
        self.limit = limit;
        self
    }

    /// The archive that the kernel unpacks after the image's own.
    pub(super) fn archive(&self) -> Result<Vec<u8>> {
        let mut environment = String::new();
        for (name, value) in &self.environment {
            let quoted = value.replace('\'', r"'\''");
            environment += &format!("export {name}='{quoted}'\n");
        }
        let mut archive = Archive::new(Vec::new());
        archive.file("init", INIT.as_bytes())?;
        archive.directory("vm")?;
        for (name, content) in [
            ("vm/library.sh", LIBRARY),
            ("vm/nvmet.sh", NVMET),
            ("vm/outside.sh", OUTSIDE),
            ("vm/scenario.sh", self.script),
            ("vm/environment.sh", &environment),
        ] {
            archive.file(name, content.as_bytes())?;
        }
        for (path, source) in &self.files {
            let content = fs::read(source).with_context(|| format!("{}", source.display()))?;
            archive.file(path, &content)?;
        }
        Ok(archive.finish()?)
    }
}
