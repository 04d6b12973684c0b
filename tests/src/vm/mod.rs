//! A virtual machine with Debian's kernel and tools: real peers on a machine that loads no kernel modules.
//!
//! [`debian::Tree`] holds unpacked Debian packages below cargo's build directory, QEMU among them, so nothing is
//! installed on the machine. [`image::Image`] is a kernel and an initramfs made from the tree. [`network::Network`] is
//! a network namespace with a tap device: real TCP between the guest and the programs under test. [`machine::run`] boots
//! a guest, hands it a [`scenario::Scenario`] and collects what it reports, step by step. Its first process is a script,
//! or ([`system`]) Debian's systemd.
//!
//! The guest runs under TCG, QEMU's emulation: right for behaviour, useless for speed.

pub mod boot;
mod cpio;
pub mod debian;
pub mod image;
pub mod machine;
pub mod network;
pub mod outside;
pub mod report;
pub mod scenario;
pub mod system;
pub mod vhost_user;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use image::Image;

/// Names the folder that `cargo xtask test --vm` has prepared; VM tests are skipped when it is not set.
pub const DIRECTORY_VARIABLE: &str = "FLEXBLK_VM_DIR";

/// Names the folder with the files of our Debian packages, for guests that have them installed.
pub const PACKAGES_VARIABLE: &str = "FLEXBLK_VM_PACKAGES";

/// Why VM tests are skipped among the others.
pub const NO_IMAGE: &str = "virtual machines run in `cargo xtask test --vm`";

/// The image to test with, or `None` after noting that `test` is skipped and why.
pub fn image_or_skip(test: &str) -> Option<Image> {
    let image = directory().and_then(|directory| {
        let image = Image::open(&directory)?;
        network::Network::supported()?;
        Ok(image)
    });
    match image {
        Ok(image) => Some(image),
        Err(error) => {
            crate::skip::note(test, &format!("{error:#}"));
            None
        }
    }
}

fn directory() -> Result<PathBuf> {
    let Some(directory) = std::env::var_os(DIRECTORY_VARIABLE) else {
        bail!(NO_IMAGE);
    };
    PathBuf::from(directory)
        .canonicalize()
        .context(DIRECTORY_VARIABLE)
}
