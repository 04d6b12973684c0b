//! `cargo xtask fuzz`: each fuzz target for a while.

use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::Args;
use flexblk_tests::binaries::workspace;
use flexblk_tests::process::find_program;

use crate::cargo::cargo;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Only this fuzz target.
    target: Option<String>,
    /// Seconds for each.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

pub(crate) fn run(arguments: &Arguments) -> Result<bool> {
    find_program("cargo-fuzz")
        .context("install it with `cargo install cargo-fuzz`; it needs a nightly toolchain")?;
    let folders: Vec<_> = ["fuzz", "nvme/fuzz", "transport/fuzz"]
        .iter()
        .map(|folder| workspace().join(folder))
        .filter(|folder| folder.join("Cargo.toml").is_file())
        .collect();
    if folders.is_empty() {
        bail!("there are no fuzz targets in this checkout");
    }
    let mut good = true;
    for folder in folders {
        for target in targets(&folder)? {
            if arguments
                .target
                .as_ref()
                .is_some_and(|only| *only != target)
            {
                continue;
            }
            println!("== {target}, {} s", arguments.seconds);
            let mut command = cargo(&["+nightly", "fuzz", "run", &target]);
            // Cargo's own path would bypass rustup, which understands `+nightly`.
            let status = std::process::Command::new("cargo")
                .args(command.get_args())
                .args(["--", &format!("-max_total_time={}", arguments.seconds)])
                .current_dir(folder.parent().unwrap_or(&folder))
                .status()
                .with_context(|| format!("{:?}", command.current_dir(&folder)))?;
            good &= status.success();
        }
    }
    Ok(good)
}

fn targets(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder.join("fuzz_targets"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs")
            && let Some(name) = path.file_stem()
        {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}
