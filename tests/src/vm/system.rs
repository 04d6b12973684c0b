//! A guest whose first process is Debian's systemd, with its udev and its networkd: it starts and ends as a host does.
//!
//! Its root is the initramfs, new at each start. Units without a use here are masked, for the sake of time.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::debian::Tree;
use super::image::{add_folders, add_parents};
use super::network::{GUEST, GUEST_2};

/// What the kernel starts, as a link from its root.
pub(super) const INIT: &str = "usr/lib/systemd/systemd";

/// For the kernel's command line: who reads the console sees what is started and stopped, and the journal.
pub(super) const ARGUMENTS: &str =
    "systemd.show_status=true systemd.journald.forward_to_console=true";

/// Programs, as paths in the tree, beside those of other guests.
const PROGRAMS: &[&str] = &[
    "usr/bin/systemctl",
    "usr/bin/journalctl",
    "usr/bin/systemd-sysusers",
    "usr/bin/systemd-tmpfiles",
    "usr/bin/udevadm",
    "usr/bin/mount",
    "usr/bin/umount",
    "usr/sbin/fsck",
    "usr/lib/systemd/systemd",
    "usr/lib/systemd/systemd-executor",
    "usr/lib/systemd/systemd-journald",
    "usr/lib/systemd/systemd-networkd",
];

/// What goes along as a whole.
const FOLDERS: &[&str] = &[
    "usr/lib/systemd",
    "usr/lib/udev/rules.d",
    "usr/lib/sysusers.d",
    "usr/lib/tmpfiles.d",
    "usr/lib/modprobe.d",
    "etc/systemd",
    "etc/udev",
];

/// Units that nobody needs here, or that lack what they need.
const MASKED: &[&str] = &[
    "getty.target",
    "getty-static.service",
    "serial-getty@ttyS0.service",
    // Needs D-Bus.
    "systemd-logind.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-random-seed.service",
    "systemd-networkd-persistent-storage.service",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
    "ldconfig.service",
];

/// Units by what wants them: what Debian's packages enable when they are installed.
const WANTED: &[(&str, &str)] = &[
    ("multi-user.target", "remote-fs.target"),
    ("multi-user.target", "systemd-networkd.service"),
    (
        "network-online.target",
        "systemd-networkd-wait-online.service",
    ),
];

/// The scenario as a service.
const SERVICE: &str = "[Unit]
Description=The scenario
[Service]
ExecStart=/usr/bin/busybox sh /vm/service.sh
TimeoutStopSec=2
";
const SERVICE_SCRIPT: &str = include_str!("../../vm/service.sh");

/// Writes the archive that the kernel unpacks after the image's own.
pub(super) fn write(tree: &Tree, path: &Path) -> Result<()> {
    let mut copied = BTreeSet::new();
    for program in PROGRAMS {
        copied.insert((*program).to_owned());
        copied.extend(tree.libraries(program)?);
    }
    for folder in FOLDERS {
        copied.extend(files(tree.root(), folder)?);
    }
    let file = File::create(path).with_context(|| format!("{}", path.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));
    let mut folders = BTreeSet::new();
    for path in &copied {
        add_parents(&mut archive, &mut folders, path)?;
        let source = tree.root().join(path);
        // Libraries are found by links, whose targets are known by other names.
        if path.contains(".so") {
            archive.file(path, &fs::read(&source)?)?;
        } else {
            archive.copy(path, &source)?;
        }
    }
    for folder in [
        "bin",
        "etc/systemd/system",
        "root",
        "var/log",
        "var/tmp",
        "vm",
    ] {
        add_folders(&mut archive, &mut folders, folder)?;
    }
    archive.symlink("bin/sh", "/usr/bin/busybox")?;
    archive.symlink("var/run", "/run")?;
    let units = "etc/systemd/system";
    for unit in MASKED {
        archive.symlink(&format!("{units}/{unit}"), "/dev/null")?;
    }
    for (target, unit) in WANTED {
        let folder = format!("{units}/{target}.wants");
        add_folders(&mut archive, &mut folders, &folder)?;
        let unit_file = format!("/usr/lib/systemd/system/{unit}");
        archive.symlink(&format!("{folder}/{unit}"), &unit_file)?;
    }
    let multi_user = "/usr/lib/systemd/system/multi-user.target";
    archive.symlink(&format!("{units}/default.target"), multi_user)?;
    add_folders(
        &mut archive,
        &mut folders,
        &format!("{units}/multi-user.target.wants"),
    )?;
    let wanted = format!("{units}/multi-user.target.wants/scenario.service");
    archive.symlink(&wanted, "../scenario.service")?;
    let network = format!(
        "[Match]\nType=ether\n[Network]\nAddress={GUEST}/24\nAddress={GUEST_2}/24\n\
         LinkLocalAddressing=no\nIPv6AcceptRA=no\n"
    );
    add_folders(&mut archive, &mut folders, "etc/systemd/network")?;
    for (path, content) in [
        ("etc/machine-id", "5c1c5e6e26f14c0a9d440f3ad17b3c01\n"),
        ("etc/hostname", "guest\n"),
        (
            "etc/os-release",
            "ID=debian\nPRETTY_NAME=\"Debian in a virtual machine\"\n",
        ),
        ("etc/systemd/network/10-path.network", network.as_str()),
        ("etc/systemd/system/scenario.service", SERVICE),
        ("vm/service.sh", SERVICE_SCRIPT),
    ] {
        archive.plain(path, content.as_bytes())?;
    }
    archive.finish()?;
    Ok(())
}

/// Files and symbolic links below a folder of `root`, as paths in it.
pub(super) fn files(root: &Path, folder: &str) -> Result<Vec<String>> {
    let place = root.join(folder);
    let mut found = Vec::new();
    for entry in fs::read_dir(&place).with_context(|| format!("{}", place.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        let path = format!("{folder}/{}", name.to_str().context("UTF-8")?);
        if entry.file_type()?.is_dir() {
            found.extend(files(root, &path)?);
        } else {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
