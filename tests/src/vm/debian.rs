//! Debian packages by name, downloaded and unpacked with Debian's own clients, installed nowhere.
//!
//! apt works on a state of its own in which nothing is installed, so it fetches a package with everything that it
//! depends on, down to the C library; programs of the tree run by the tree's own loader. That gives the same
//! versions whatever this machine runs. QEMU has to be that of the tree: 7.2, in the release before, computes wrong
//! flags after CMPXCHG16B, and about one loaded guest in eight dies of a double fault.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::process::find_program;

/// The release that everything comes from: kernel 6.12, QEMU 10.0, nvme-cli 2.13, fio 3.39.
const SUITE: &str = "trixie";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Where libraries are; fio finds those of Ceph, and systemd its own, by a path that their own files name.
const LIBRARIES: [&str; 3] = [
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu/ceph",
    "usr/lib/x86_64-linux-gnu/systemd",
];
const LOADER: &str = "usr/lib64/ld-linux-x86-64.so.2";

/// What is fetched; apt adds what these need.
pub const PACKAGES: &[&str] = &[
    "linux-image-amd64",
    "qemu-system-x86",
    "busybox",
    "kmod",
    "nvme-cli",
    "jq",
    "fio",
    "e2fsprogs",
    "util-linux",
    // A guest that boots as a host does.
    "systemd",
    "udev",
    "mount",
    // What later peers need: RDMA over soft-RoCE, NBD, TLS handshakes for NVMe/TCP.
    "iproute2",
    "nbd-client",
    "ktls-utils",
];

/// Unpacked packages.
#[derive(Clone, Debug)]
pub struct Tree {
    root: PathBuf,
}

impl Tree {
    /// The tree in `directory`, if it is complete.
    pub fn open(directory: &Path) -> Result<Tree> {
        let stamp = fs::read_to_string(directory.join("packages")).unwrap_or_default();
        if stamp != wanted() {
            bail!(
                "the packages of the virtual machine are not there: `cargo xtask test --vm` fetches them"
            );
        }
        Ok(Tree {
            root: directory.join("root"),
        })
    }

    /// Downloads and unpacks the packages into `directory`, unless that was done before.
    pub fn fetch(directory: &Path) -> Result<Tree> {
        if let Ok(tree) = Tree::open(directory) {
            return Ok(tree);
        }
        for program in ["apt-get", "dpkg-deb"] {
            find_program(program).context("fetching packages needs Debian's clients")?;
        }
        if !Path::new(KEYRING).is_file() {
            bail!("{KEYRING} is missing: apt-get install debian-archive-keyring");
        }
        fs::create_dir_all(directory)?;
        let _ = fs::remove_file(directory.join("packages"));
        let apt = Apt::new(&directory.join("apt"))?;
        apt.get(&["update"])?;
        let mut install = vec!["install", "--yes", "--download-only"];
        install.extend(PACKAGES);
        apt.get(&install)?;
        let root = directory.join("root");
        let _ = fs::remove_dir_all(&root);
        // Debian's packages expect these links to be there.
        for (name, target) in [
            ("bin", "usr/bin"),
            ("sbin", "usr/sbin"),
            ("lib", "usr/lib"),
            ("lib64", "usr/lib64"),
        ] {
            fs::create_dir_all(root.join(target))?;
            std::os::unix::fs::symlink(target, root.join(name))?;
        }
        for package in apt.archives()? {
            success(
                Command::new("dpkg-deb")
                    .arg("--extract")
                    .arg(&package)
                    .arg(&root),
            )?;
        }
        let _ = fs::remove_dir_all(directory.join("apt"));
        fs::write(directory.join("packages"), wanted())?;
        Ok(Tree { root })
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A program of the tree, by its path in it such as `usr/bin/fio`; the name it runs under can differ from its file's.
    pub fn command(&self, path: &str, name: &str) -> Command {
        let mut command = Command::new(self.root.join(LOADER));
        command
            .arg("--library-path")
            .arg(self.library_path())
            .args(["--argv0", name])
            .arg(self.root.join(path));
        command
    }

    /// The shared libraries that a program of the tree needs, as paths in the tree, the loader included.
    pub fn libraries(&self, path: &str) -> Result<Vec<String>> {
        let output = Command::new(self.root.join(LOADER))
            .arg("--library-path")
            .arg(self.library_path())
            .arg("--list")
            .arg(self.root.join(path))
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot run {}", self.root.join(LOADER).display()))?;
        if !output.status.success() {
            bail!(
                "libraries of {path}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        let mut found = vec![LOADER.to_owned()];
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let Some((name, place)) = line.split_once(" => ") else {
                continue;
            };
            if place.starts_with("not found") {
                bail!("{path} needs {}, which is not in the tree", name.trim());
            }
            let place = Path::new(place.split(" (").next().unwrap_or_default());
            if let Ok(inside) = place.strip_prefix(&self.root)
                && inside != Path::new(LOADER)
            {
                found.push(inside.to_str().context("UTF-8")?.to_owned());
            }
        }
        Ok(found)
    }

    fn library_path(&self) -> String {
        let places = LIBRARIES.map(|place| self.root.join(place).display().to_string());
        places.join(":")
    }

    /// The kernel's release, such as `6.12.1-amd64`.
    pub fn kernel_release(&self) -> Result<String> {
        let modules = self.root.join("usr/lib/modules");
        let entry = fs::read_dir(&modules)
            .with_context(|| format!("{}", modules.display()))?
            .next()
            .context("no kernel in the tree")??;
        Ok(entry.file_name().to_string_lossy().into_owned())
    }
}

/// What a complete tree's stamp says.
fn wanted() -> String {
    format!("{SUITE}: {}\n", PACKAGES.join(" "))
}

/// apt with a state of its own.
struct Apt {
    directory: PathBuf,
}

impl Apt {
    fn new(directory: &Path) -> Result<Apt> {
        for folder in [
            "lists/partial",
            "cache/archives/partial",
            "etc/preferences.d",
            "etc/trusted.gpg.d",
        ] {
            fs::create_dir_all(directory.join(folder))?;
        }
        let mirror = mirror()?;
        fs::write(
            directory.join("sources.list"),
            format!("deb [arch=amd64 signed-by={KEYRING}] {mirror} {SUITE} main\n"),
        )?;
        fs::write(directory.join("status"), "")?;
        let path = directory.to_str().context("UTF-8")?;
        fs::write(
            directory.join("conf"),
            format!(
                "Dir::State \"{path}\";\n\
                 Dir::State::status \"{path}/status\";\n\
                 Dir::State::lists \"{path}/lists\";\n\
                 Dir::Cache \"{path}/cache\";\n\
                 Dir::Etc \"{path}/etc\";\n\
                 Dir::Etc::sourcelist \"{path}/sources.list\";\n\
                 Dir::Etc::sourceparts \"/dev/null\";\n\
                 Dir::Etc::parts \"/dev/null\";\n\
                 APT::Architecture \"amd64\";\n\
                 APT::Architectures {{ \"amd64\"; }};\n\
                 APT::Install-Recommends \"false\";\n\
                 APT::Sandbox::User \"\";\n\
                 Acquire::Languages \"none\";\n\
                 Debug::NoLocking \"true\";\n"
            ),
        )?;
        Ok(Apt {
            directory: directory.to_owned(),
        })
    }

    fn get(&self, arguments: &[&str]) -> Result<()> {
        success(
            Command::new("apt-get")
                .env("APT_CONFIG", self.directory.join("conf"))
                .env("DEBIAN_FRONTEND", "noninteractive")
                .arg("--quiet=2")
                .args(arguments),
        )
    }

    fn archives(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(self.directory.join("cache/archives"))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                found.push(path);
            }
        }
        Ok(found)
    }
}

/// The mirror of Debian's main archive that this machine is set up with. Its path tells it from the archive of security
/// updates; apt knows labels only after an update.
fn mirror() -> Result<String> {
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI)"])
        .stdin(Stdio::null())
        .output()
        .context("cannot run apt-get")?;
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .find(|line| line.trim_end_matches('/').ends_with("/debian"))
        .map(str::to_owned)
        .context("apt is not set up with Debian's main archive")
}

fn success(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        bail!(
            "{name} ended with {}:\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}
