//! The kernel and the initramfs that guests boot, made from a [`Tree`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use super::debian::Tree;
use super::system;

/// Programs of the guest, as paths in the tree.
const PROGRAMS: &[&str] = &[
    "usr/bin/busybox",
    "usr/bin/kmod",
    "usr/sbin/nvme",
    "usr/bin/jq",
    "usr/bin/fio",
    "usr/sbin/mke2fs",
    "usr/sbin/e2fsck",
    "usr/sbin/blkdiscard",
    "usr/bin/rdma",
    "usr/sbin/nbd-client",
    "usr/sbin/tlshd",
];

/// Other names that programs are called by.
const LINKS: &[(&str, &str)] = &[
    ("usr/sbin/modprobe", "../bin/kmod"),
    ("usr/sbin/mkfs.ext4", "mke2fs"),
    ("usr/sbin/fsck.ext4", "e2fsck"),
];

/// Modules of the guest; what they depend on comes along.
const MODULES: &[&str] = &[
    "virtio_net",
    "virtio_blk",
    "nvme-tcp",
    "nvme-rdma",
    "nvmet-tcp",
    "nvmet-rdma",
    "nvme-loop",
    "rdma_rxe",
    "rdma_ucm",
    "brd",
    "loop",
    "nbd",
    "ublk_drv",
    "ext4",
    "configfs",
    // ext4's and the digests' checksum, by name through the crypto API: no dependency tells of them.
    "crc32c-intel",
    "crc32c_generic",
];

/// A kernel, its initramfs and the QEMU that runs them.
#[derive(Clone, Debug)]
pub struct Image {
    tree: Tree,
    kernel: PathBuf,
    initramfs: PathBuf,
    system: PathBuf,
}

impl Image {
    /// The image in `directory`.
    pub fn open(directory: &Path) -> Result<Image> {
        let tree = Tree::open(directory)?;
        let release = tree.kernel_release()?;
        let image = Image {
            kernel: tree.root().join(format!("boot/vmlinuz-{release}")),
            initramfs: directory.join("initramfs.cpio"),
            system: directory.join("system.cpio"),
            tree,
        };
        for file in [&image.kernel, &image.initramfs, &image.system] {
            if !file.is_file() {
                bail!(
                    "{} is missing: `cargo xtask test --vm` makes it",
                    file.display()
                );
            }
        }
        Ok(image)
    }

    /// Fetches packages into `directory` unless they are there, and makes the initramfs.
    pub fn build(directory: &Path) -> Result<Image> {
        fs::create_dir_all(directory)?;
        let directory = directory.canonicalize()?;
        let tree = Tree::fetch(&directory)?;
        let files = Files::collect(&tree)?;
        // Whoever opens the image meanwhile sees a whole file.
        let partial = directory.join("initramfs.partial");
        files.write(&tree, &partial)?;
        fs::rename(&partial, directory.join("initramfs.cpio"))?;
        system::write(&tree, &partial)?;
        fs::rename(&partial, directory.join("system.cpio"))?;
        Image::open(&directory)
    }

    /// The kernel's file.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// The initramfs without a scenario.
    pub fn initramfs(&self) -> &Path {
        &self.initramfs
    }

    /// What a guest with systemd has beside it.
    pub fn system(&self) -> &Path {
        &self.system
    }

    /// The packages that it was made from.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }
}

/// What goes into the initramfs.
struct Files {
    /// Paths in the tree.
    copied: BTreeSet<String>,
    release: String,
}

impl Files {
    fn collect(tree: &Tree) -> Result<Files> {
        let mut copied = BTreeSet::new();
        for program in PROGRAMS {
            copied.insert((*program).to_owned());
            copied.extend(tree.libraries(program)?);
        }
        let release = tree.kernel_release()?;
        let depmod = tree
            .command("usr/bin/kmod", "depmod")
            .arg("-b")
            .arg(tree.root())
            .arg(&release)
            .status()
            .context("cannot run depmod")?;
        if !depmod.success() {
            bail!("depmod ended with {depmod}");
        }
        let folder = format!("usr/lib/modules/{release}");
        let dependencies = fs::read_to_string(tree.root().join(&folder).join("modules.dep"))
            .context("modules.dep")?;
        for module in modules(&dependencies, MODULES)? {
            copied.insert(format!("{folder}/{module}"));
        }
        for index in ["modules.dep", "modules.dep.bin", "modules.alias.bin"] {
            copied.insert(format!("{folder}/{index}"));
        }
        for index in [
            "modules.builtin.bin",
            "modules.softdep",
            "modules.symbols.bin",
        ] {
            copied.insert(format!("{folder}/{index}"));
        }
        Ok(Files { copied, release })
    }

    fn write(&self, tree: &Tree, path: &Path) -> Result<()> {
        let file = File::create(path).with_context(|| format!("{}", path.display()))?;
        let mut archive = Archive::new(BufWriter::new(file));
        let mut folders = BTreeSet::new();
        for folder in ["dev", "proc", "sys", "run", "tmp", "mnt", "etc/nvme", "bin"] {
            add_folders(&mut archive, &mut folders, folder)?;
        }
        // Before it starts init the kernel opens this as its standard input and output.
        archive.device("dev/console", 5, 1)?;
        archive.symlink("lib", "usr/lib")?;
        archive.symlink("lib64", "usr/lib64")?;
        archive.symlink("sbin", "usr/sbin")?;
        archive.symlink("etc/mtab", "/proc/self/mounts")?;
        for path in &self.copied {
            add_parents(&mut archive, &mut folders, path)?;
            let content =
                fs::read(tree.root().join(path)).with_context(|| format!("{path} in the tree"))?;
            archive.file(path, &content)?;
        }
        for (name, target) in LINKS {
            archive.symlink(name, target)?;
        }
        archive.file("etc/kernel-release", self.release.as_bytes())?;
        archive.finish()?;
        Ok(())
    }
}

/// Adds the folders that a path is in, unless they are `known`.
pub(super) fn add_parents<W: Write>(
    archive: &mut Archive<W>,
    known: &mut BTreeSet<String>,
    path: &str,
) -> Result<()> {
    match path.rsplit_once('/') {
        Some((folder, _)) => add_folders(archive, known, folder),
        None => Ok(()),
    }
}

/// Adds a folder and those above it, unless they are `known`.
pub(super) fn add_folders<W: Write>(
    archive: &mut Archive<W>,
    known: &mut BTreeSet<String>,
    path: &str,
) -> Result<()> {
    let ends = path.match_indices('/').map(|(at, _)| at);
    for end in ends.chain([path.len()]) {
        let folder = path.get(..end).unwrap_or_default();
        if known.insert(folder.to_owned()) {
            archive.directory(folder)?;
        }
    }
    Ok(())
}

/// The files of `names` and of all that they depend on, by `modules.dep`.
fn modules(dependencies: &str, names: &[&str]) -> Result<BTreeSet<String>> {
    let mut files: BTreeMap<String, (&str, Vec<&str>)> = BTreeMap::new();
    for line in dependencies.lines() {
        let (file, needs) = line.split_once(':').context("a line of modules.dep")?;
        let name = file.rsplit('/').next().unwrap_or(file);
        let name = name.split('.').next().unwrap_or(name).replace('-', "_");
        files.insert(name, (file, needs.split_whitespace().collect()));
    }
    let mut found = BTreeSet::new();
    for name in names {
        let Some((file, needs)) = files.get(&name.replace('-', "_")) else {
            bail!("the kernel has no module {name}");
        };
        found.insert((*file).to_owned());
        // modules.dep lists indirect dependencies as well.
        found.extend(needs.iter().map(|need| (*need).to_owned()));
    }
    Ok(found)
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn modules_bring_what_they_need() -> Result<()> {
        let text = "kernel/a/nvme-tcp.ko.xz: kernel/a/core.ko.xz kernel/b/keyring.ko.xz\n\
                    kernel/a/core.ko.xz:\nkernel/b/keyring.ko.xz:\nkernel/c/other.ko.xz:\n";
        let found = modules(text, &["nvme_tcp"])?;
        let found: Vec<&str> = found.iter().map(String::as_str).collect();
        assert_eq!(
            found,
            [
                "kernel/a/core.ko.xz",
                "kernel/a/nvme-tcp.ko.xz",
                "kernel/b/keyring.ko.xz"
            ]
        );
        assert!(modules(text, &["absent"]).is_err());
        Ok(())
    }
}
