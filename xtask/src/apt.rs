//! Debian packages that a command needs, installed by name, asking first.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::process::Command;

use anyhow::{Context, Result, bail};
use flexblk_tests::process::find_program;

/// A program and the package that has it.
pub(crate) struct Need {
    pub(crate) program: &'static str,
    pub(crate) package: &'static str,
}

pub(crate) const FIO: Need = Need {
    program: "fio",
    package: "fio",
};
pub(crate) const MKE2FS: Need = Need {
    program: "mke2fs",
    package: "e2fsprogs",
};
pub(crate) const TASKSET: Need = Need {
    program: "taskset",
    package: "util-linux",
};
pub(crate) const SHA256SUM: Need = Need {
    program: "sha256sum",
    package: "coreutils",
};

/// Clients of NBD, and a second file system to put on an attached namespace.
pub(crate) const OF_EXPORTS: [Need; 3] = [
    Need {
        program: "nbdcopy",
        package: "libnbd-bin",
    },
    Need {
        program: "qemu-img",
        package: "qemu-utils",
    },
    Need {
        program: "mkfs.xfs",
        package: "xfsprogs",
    },
];

pub(crate) const IP: Need = Need {
    program: "ip",
    package: "iproute2",
};
pub(crate) const DPKG_DEB: Need = Need {
    program: "dpkg-deb",
    package: "dpkg",
};

/// Makes sure that all programs are there. Asks before it installs anything, unless `yes` or `CI` is set.
pub(crate) fn ensure(needs: &[Need], yes: bool) -> Result<()> {
    let missing: Vec<&Need> = needs
        .iter()
        .filter(|need| find_program(need.program).is_err())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    packages.dedup();
    let list = packages.join(" ");
    if find_program("apt-get").is_err() {
        bail!("install the packages of your distribution that correspond to Debian's: {list}");
    }
    if !may(yes, &format!("Install with apt-get: {list}"))? {
        bail!("needed packages: {list}");
    }
    apt_get(&["update", "-q"])?;
    let mut arguments = vec!["install", "-q", "-y", "--no-install-recommends"];
    arguments.extend(&packages);
    apt_get(&arguments)?;
    for need in missing {
        find_program(need.program)
            .with_context(|| format!("package {} was installed", need.package))?;
    }
    Ok(())
}

/// Asks whether to do what `question` says, unless `yes` or `CI` is set.
pub(crate) fn may(yes: bool, question: &str) -> Result<bool> {
    if yes || std::env::var_os("CI").is_some() {
        return Ok(true);
    }
    if !io::stdin().is_terminal() {
        bail!("{question}? (--yes says yes)");
    }
    print!("{question}? [y/N] ");
    io::stdout().flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let root = Command::new("id")
        .arg("-u")
        .output()
        .is_ok_and(|output| output.stdout == b"0\n");
    let mut command = if root {
        Command::new("apt-get")
    } else {
        let mut command = Command::new("sudo");
        command.arg("apt-get");
        command
    };
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(arguments);
    let status = command.status().context("cannot run apt-get")?;
    if !status.success() {
        bail!("apt-get {} failed", arguments.join(" "));
    }
    Ok(())
}
