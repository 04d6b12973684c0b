//! What a guest does: scripts, and what they are told.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::debian::Tree;
use super::image::add_parents;
use super::system;

/// Starts the guest.
const INIT: &str = include_str!("../../vm/init.sh");
/// Runs the script.
const RUN: &str = include_str!("../../vm/run.sh");
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
    /// Paths in the guest, and what is in the files.
    texts: Vec<(String, String)>,
    pub(super) first: First,
}

/// The first process of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum First {
    /// A script that runs the scenario and ends the machine.
    Script,
    /// Debian's systemd, of which the scenario is a service that ends the machine as a user does.
    Systemd,
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
            texts: Vec::new(),
            first: First::Script,
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
        self.files
            .push(("usr/bin/flexblk".to_owned(), program.to_owned()));
        self.our_library(tree)
    }

    fn our_library(mut self, tree: &Tree) -> Scenario {
        const LIBRARY: &str = "usr/lib/x86_64-linux-gnu/libgcc_s.so.1";
        self.files
            .push((LIBRARY.to_owned(), tree.root().join(LIBRARY)));
        self
    }

    /// A file in the guest with this content.
    #[must_use]
    pub fn text(mut self, path: &str, content: &str) -> Scenario {
        self.texts.push((path.to_owned(), content.to_owned()));
        self
    }

    /// What our packages install: the files below a folder, but for documentation.
    pub fn installed(mut self, root: &Path, tree: &Tree) -> Result<Scenario> {
        for path in system::files(root, "usr")? {
            if !path.starts_with("usr/share/") {
                let source = root.join(&path);
                self.files.push((path, source));
            }
        }
        Ok(self.our_library(tree))
    }

    /// Boots systemd, which has the scenario as a service; its script has to shut the machine down.
    #[must_use]
    pub fn systemd(mut self) -> Scenario {
        self.first = First::Systemd;
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
        match self.first {
            First::Script => archive.file("init", INIT.as_bytes())?,
            First::Systemd => archive.symlink("init", system::INIT)?,
        }
        archive.directory("vm")?;
        for (name, content) in [
            ("vm/run.sh", RUN),
            ("vm/library.sh", LIBRARY),
            ("vm/nvmet.sh", NVMET),
            ("vm/outside.sh", OUTSIDE),
            ("vm/scenario.sh", self.script),
            ("vm/environment.sh", &environment),
        ] {
            archive.file(name, content.as_bytes())?;
        }
        let mut folders = BTreeSet::new();
        for (path, content) in &self.texts {
            add_parents(&mut archive, &mut folders, path)?;
            archive.plain(path, content.as_bytes())?;
        }
        for (path, source) in &self.files {
            add_parents(&mut archive, &mut folders, path)?;
            archive
                .copy(path, source)
                .with_context(|| format!("{}", source.display()))?;
        }
        Ok(archive.finish()?)
    }
}
