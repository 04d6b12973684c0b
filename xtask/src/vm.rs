//! Linux in a virtual machine, as a peer.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use flexblk_tests::binaries;
use flexblk_tests::vm::debian::{PACKAGES, Tree};
use flexblk_tests::vm::image::Image;

use crate::apt;

/// Fetches and makes what guests need, unless it is there; returns its folder.
pub(crate) fn prepare(yes: bool) -> Result<PathBuf> {
    let directory = binaries::target_directory()?.join("vm");
    apt::ensure(&[apt::IP, apt::DPKG_DEB], yes)?;
    if Tree::open(&directory).is_err() && !apt::may(yes, &question(&directory))? {
        bail!("the packages of the virtual machine are not there");
    }
    Image::build(&directory)?;
    Ok(directory)
}

fn question(directory: &Path) -> String {
    format!(
        "Download with apt (about 200 MB) and unpack below {}, installing nothing: {}",
        directory.display(),
        PACKAGES.join(" ")
    )
}
