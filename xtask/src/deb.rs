//! `cargo xtask deb`: Debian packages, `flexblk` for hosts and `flexblk-target` for targets.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use flexblk_tests::binaries::{self, Binaries, workspace};
use flexblk_tests::process::find_program;

use crate::apt;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Install what is missing without asking.
    #[arg(long)]
    yes: bool,
    /// Folder for the packages [default: deb in Cargo's build directory].
    #[arg(short, long, value_name = "FOLDER")]
    output: Option<PathBuf>,
}

const VERSION: &str = env!("CARGO_PKG_VERSION");
const MAINTAINER: &str = "The flexblk authors <flexblk@flexblk.dev>";

/// A package, and what goes into it.
struct Package {
    name: &'static str,
    summary: &'static str,
    /// Lines of the long description.
    description: &'static [&'static str],
    /// Beside the C library.
    recommends: &'static str,
}

const HOST: Package = Package {
    name: "flexblk",
    summary: "remote block devices over FlexiNS and NVMe/TCP",
    description: &[
        "The command flexblk discovers, inspects, copies, measures and mounts",
        "namespaces of NVMe-oF targets. An engine for fio does I/O on them.",
    ],
    recommends: "fio",
};

const TARGET: Package = Package {
    name: "flexblk-target",
    summary: "NVMe-oF target over FlexiNS and NVMe/TCP",
    description: &[
        "The daemon flexblk-target exports memory, files and block devices as",
        "NVMe-oF namespaces, in user space, without kernel modules.",
    ],
    recommends: "flexblk",
};

pub(crate) fn run(arguments: &Arguments) -> Result<bool> {
    apt::ensure(&[apt::DPKG_DEB], arguments.yes)?;
    println!("== building in release mode");
    let binaries = binaries::build(true)?;
    let output = match &arguments.output {
        Some(output) => output.clone(),
        None => binaries::target_directory()?.join("deb"),
    };
    for package in build(&binaries, &output)? {
        println!("{}", package.display());
    }
    Ok(true)
}

/// What `cargo xtask test` looks at: the packages hold what they should, and it works.
pub(crate) fn check(binaries: &Binaries, directory: &Path) -> Result<()> {
    let (packages, root) = unpacked(binaries, directory)?;
    if flexblk_tests::process::is_root() {
        install(&packages, &directory.join("installed"))?;
    }
    for file in [
        "usr/bin/flexblk",
        "usr/bin/flexblk-target",
        "usr/lib/flexblk/libflexblk_fio.so",
        "usr/lib/systemd/system/flexblk-target.service",
        "usr/lib/systemd/system/flexblk@.service",
        "usr/lib/systemd/system/flexblk-shutdown.service",
        "usr/lib/systemd/system/multi-user.target.wants/flexblk-shutdown.service",
        "usr/lib/systemd/system-generators/flexblk-generator",
        "usr/lib/udev/rules.d/65-flexblk.rules",
        "usr/share/doc/flexblk/docs/mount.md",
        "usr/share/doc/flexblk/examples/attach.toml",
        "usr/share/man/man1/flexblk.1",
        "usr/share/man/man1/flexblk-attach.1",
        "usr/share/man/man1/flexblk-discover.1",
        "usr/share/man/man1/flexblk-target.1",
        "usr/share/bash-completion/completions/flexblk",
        "usr/share/doc/flexblk-target/examples/target.toml",
        "usr/share/doc/flexblk/copyright",
    ] {
        ensure!(root.join(file).is_file(), "{file} is in no package");
    }
    for program in ["flexblk", "flexblk-target"] {
        let told = succeed(Command::new(root.join("usr/bin").join(program)).arg("--version"))?;
        ensure!(told.contains(VERSION), "{program} --version says {told}");
    }
    if find_program("systemd-analyze").is_ok() {
        let units = root.join("usr/lib/systemd/system");
        let mut verify = Command::new("systemd-analyze");
        // The units themselves; those of the system that they name are not in this tree.
        verify.args(["verify", "--man=no", "--recursive-errors=no", "--root"]);
        verify.arg(&root);
        for entry in fs::read_dir(units)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                verify.arg(entry.file_name());
            }
        }
        succeed(&mut verify)?;
    }
    Ok(())
}

/// Builds both packages in a folder, and unpacks them in one in it, which is the second thing returned.
pub(crate) fn unpacked(binaries: &Binaries, directory: &Path) -> Result<(Vec<PathBuf>, PathBuf)> {
    let _ = fs::remove_dir_all(directory);
    let root = directory.join("root");
    fs::create_dir_all(&root)?;
    let packages = build(binaries, directory)?;
    for package in &packages {
        let mut unpack = Command::new("dpkg-deb");
        succeed(unpack.arg("--extract").arg(package).arg(&root))?;
    }
    Ok((packages, root))
}

/// Installs and removes them in a folder that has a package database of its own.
fn install(packages: &[PathBuf], root: &Path) -> Result<()> {
    let database = root.join("var/lib/dpkg");
    for folder in ["info", "updates", "triggers"] {
        fs::create_dir_all(database.join(folder))?;
    }
    for file in ["status", "available"] {
        fs::write(database.join(file), "")?;
    }
    let dpkg = || {
        let mut dpkg = Command::new("dpkg");
        dpkg.arg(format!("--instdir={}", root.display()));
        dpkg.arg(format!("--admindir={}", database.display()));
        // In the folder there is no shell for the scripts, and no C library.
        dpkg.args(["--force-script-chrootless", "--force-depends"]);
        dpkg.arg("--log=/dev/null");
        dpkg
    };
    succeed(dpkg().arg("-i").args(packages))?;
    ensure!(
        root.join("usr/bin/flexblk").is_file(),
        "flexblk is not installed"
    );
    succeed(dpkg().args(["-P", "flexblk", "flexblk-target"]))?;
    ensure!(
        !root.join("usr/bin/flexblk").exists(),
        "flexblk is still there"
    );
    Ok(())
}

/// Builds both packages in a folder.
fn build(binaries: &Binaries, output: &Path) -> Result<Vec<PathBuf>> {
    let architecture = succeed(Command::new("dpkg").arg("--print-architecture"))?;
    let architecture = architecture.trim();
    fs::create_dir_all(output)?;
    let mut packages = Vec::new();
    for package in [&HOST, &TARGET] {
        let tree = Tree::new(output.join(package.name))?;
        match package.name {
            "flexblk" => host_files(&tree, binaries)?,
            _ => target_files(&tree, binaries)?,
        }
        tree.documentation(package.name)?;
        tree.control(package, architecture)?;
        let file = output.join(format!("{}_{VERSION}_{architecture}.deb", package.name));
        let mut build = Command::new("dpkg-deb");
        build.args(["--root-owner-group", "--build"]);
        succeed(build.arg(&tree.root).arg(&file))?;
        fs::remove_dir_all(&tree.root)?;
        packages.push(file);
    }
    Ok(packages)
}

fn host_files(tree: &Tree, binaries: &Binaries) -> Result<()> {
    tree.program(&binaries.flexblk)?;
    tree.program(&binaries.flexins_perf)?;
    tree.copy(
        &binaries.fio_engine,
        "usr/lib/flexblk/libflexblk_fio.so",
        0o644,
    )?;
    tree.manuals(&binaries.flexblk)?;
    for (shell, path) in [
        ("bash", "usr/share/bash-completion/completions/flexblk"),
        ("zsh", "usr/share/zsh/vendor-completions/_flexblk"),
        ("fish", "usr/share/fish/vendor_completions.d/flexblk.fish"),
    ] {
        let script = succeed(Command::new(&binaries.flexblk).args(["completions", shell]))?;
        tree.write(path, &script)?;
    }
    tree.folder("fio-plugins/examples", "usr/share/doc/flexblk/examples")?;
    attach_files(tree)
}

/// What attaches namespaces at boot.
fn attach_files(tree: &Tree) -> Result<()> {
    for (from, to, mode) in [
        (
            "systemd/flexblk@.service",
            "usr/lib/systemd/system/flexblk@.service",
            0o644,
        ),
        (
            "systemd/flexblk-shutdown.service",
            "usr/lib/systemd/system/flexblk-shutdown.service",
            0o644,
        ),
        (
            "systemd/flexblk-generator",
            "usr/lib/systemd/system-generators/flexblk-generator",
            0o755,
        ),
        (
            "udev/65-flexblk.rules",
            "usr/lib/udev/rules.d/65-flexblk.rules",
            0o644,
        ),
        (
            "attach.toml",
            "usr/share/doc/flexblk/examples/attach.toml",
            0o644,
        ),
        ("debian/postinst", "DEBIAN/postinst", 0o755),
        ("debian/postrm", "DEBIAN/postrm", 0o755),
    ] {
        tree.copy(&workspace().join("packaging").join(from), to, mode)?;
    }
    // Always there, for attachments by hand as well.
    tree.symlink(
        "usr/lib/systemd/system/multi-user.target.wants/flexblk-shutdown.service",
        "../flexblk-shutdown.service",
    )
}

fn target_files(tree: &Tree, binaries: &Binaries) -> Result<()> {
    tree.program(&binaries.target)?;
    tree.manuals(&binaries.target)?;
    tree.copy(
        &workspace().join("packaging/systemd/flexblk-target.service"),
        "usr/lib/systemd/system/flexblk-target.service",
        0o644,
    )?;
    tree.folder("target/examples", "usr/share/doc/flexblk-target/examples")
}

/// What becomes the file system of a package.
struct Tree {
    root: PathBuf,
}

impl Tree {
    fn new(root: PathBuf) -> Result<Tree> {
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        fs::create_dir_all(&root)?;
        Ok(Tree { root })
    }

    /// A place in it, in a folder that exists.
    fn place(&self, path: &str) -> Result<PathBuf> {
        let path = self.root.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        Ok(path)
    }

    fn copy(&self, from: &Path, to: &str, mode: u32) -> Result<()> {
        let to = self.place(to)?;
        fs::copy(from, &to).with_context(|| from.display().to_string())?;
        fs::set_permissions(&to, fs::Permissions::from_mode(mode))?;
        Ok(())
    }

    fn symlink(&self, at: &str, target: &str) -> Result<()> {
        Ok(std::os::unix::fs::symlink(target, self.place(at)?)?)
    }

    fn write(&self, to: &str, text: &str) -> Result<()> {
        let to = self.place(to)?;
        fs::write(&to, text)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o644))?;
        Ok(())
    }

    fn program(&self, from: &Path) -> Result<()> {
        let name = from.file_name().and_then(|name| name.to_str());
        let name = name.context("a program has a name")?;
        self.copy(from, &format!("usr/bin/{name}"), 0o755)
    }

    /// The manual pages that the program writes itself.
    fn manuals(&self, program: &Path) -> Result<()> {
        let folder = self.root.join("usr/share/man/man1");
        fs::create_dir_all(&folder)?;
        succeed(Command::new(program).arg("manuals").arg(&folder))?;
        for page in fs::read_dir(&folder)? {
            fs::set_permissions(page?.path(), fs::Permissions::from_mode(0o644))?;
        }
        Ok(())
    }

    /// Every file of a folder of the workspace.
    fn folder(&self, from: &str, to: &str) -> Result<()> {
        for file in fs::read_dir(workspace().join(from))? {
            let file = file?;
            if file.file_type()?.is_file()
                && let Some(name) = file.file_name().to_str()
            {
                self.copy(&file.path(), &format!("{to}/{name}"), 0o644)?;
            }
        }
        Ok(())
    }

    fn documentation(&self, package: &str) -> Result<()> {
        let doc = format!("usr/share/doc/{package}");
        let licenses = ["LICENSE-APACHE", "LICENSE-MIT"].map(|name| workspace().join(name));
        let mut copyright = String::from("License: Apache-2.0 or MIT, at your choice\n");
        for license in licenses {
            copyright += "\n----\n\n";
            copyright += &fs::read_to_string(license)?;
        }
        self.write(&format!("{doc}/copyright"), &copyright)?;
        // Where they find one another.
        for file in [
            "README.md",
            "ARCHITECTURE.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
        ] {
            self.copy(&workspace().join(file), &format!("{doc}/{file}"), 0o644)?;
        }
        self.folder("docs", &format!("{doc}/docs"))
    }

    fn control(&self, package: &Package, architecture: &str) -> Result<()> {
        let libc = succeed(Command::new("getconf").arg("GNU_LIBC_VERSION"))?;
        let libc = libc.split_whitespace().nth(1).context("a version")?;
        let mut text = format!(
            "Package: {}\nVersion: {VERSION}\nArchitecture: {architecture}\nMaintainer: {MAINTAINER}\n\
             Section: admin\nPriority: optional\nDepends: libc6 (>= {libc}), libgcc-s1\nRecommends: {}\n\
             Description: {}\n",
            package.name, package.recommends, package.summary
        );
        for line in package.description {
            text += &format!(" {line}\n");
        }
        self.write("DEBIAN/control", &text)
    }
}

/// Runs a command and returns its output, or fails with what it said.
fn succeed(command: &mut Command) -> Result<String> {
    let name = command.get_program().display().to_string();
    let output = command
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        bail!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
