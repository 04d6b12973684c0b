//! The programs under test, built by the workspace itself.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// The daemon.
    pub target: PathBuf,
    /// The command line of the initiator.
    pub flexblk: PathBuf,
    /// The fio engine.
    pub fio_engine: PathBuf,
    /// Raw transport and socket measurements.
    pub flexins_perf: PathBuf,
    /// Holds idle queue pairs open.
    pub idle_queue_pairs: PathBuf,
}

impl Binaries {
    /// The programs in a build directory such as `out/release`.
    pub fn in_directory(directory: &Path) -> Binaries {
        Binaries {
            target: directory.join("flexblk-target"),
            flexblk: directory.join("flexblk"),
            fio_engine: directory.join("libflexblk_fio.so"),
            flexins_perf: directory.join("flexins-perf"),
            idle_queue_pairs: directory.join("examples/idle_queue_pairs"),
        }
    }

    /// The programs that match these sources: those in `FLEXBLK_BIN_DIR` when whoever runs the tests has just built
    /// them, else built now.
    pub fn get() -> Result<&'static Binaries> {
        static BINARIES: OnceLock<Result<Binaries, String>> = OnceLock::new();
        let binaries = BINARIES.get_or_init(|| match std::env::var_os("FLEXBLK_BIN_DIR") {
            Some(directory) => Ok(Binaries::in_directory(Path::new(&directory))),
            None => build(false).map_err(|error| format!("{error:#}")),
        });
        match binaries {
            Ok(binaries) => Ok(binaries),
            Err(error) => bail!("{error}"),
        }
    }
}

/// Folder of the workspace.
pub fn workspace() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

/// Builds the programs, in release mode or as tests are built.
pub fn build(release: bool) -> Result<Binaries> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(workspace()).args(["build", "--quiet"]);
    command.args([
        "-p",
        "flexblk-target",
        "-p",
        "flexblk-initiator",
        "-p",
        "flexblk-fio",
        "-p",
        "flexins",
        "--lib",
        "--bins",
    ]);
    if release {
        command.arg("--release");
    }
    let status = command
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("cargo build failed");
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(workspace()).args([
        "build",
        "--quiet",
        "-p",
        "flexblk-tests",
        "--examples",
    ]);
    if release {
        command.arg("--release");
    }
    if !command
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo")?
        .success()
    {
        bail!("cargo build failed");
    }
    let directory = target_directory()?.join(if release { "release" } else { "debug" });
    Ok(Binaries::in_directory(&directory))
}

/// Cargo's build directory of this workspace.
pub fn target_directory() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(workspace())
        .args(["metadata", "--no-deps", "--format-version=1", "--offline"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo metadata")?;
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("cargo metadata gives JSON")?;
    let directory = metadata
        .get("target_directory")
        .and_then(|value| value.as_str())
        .context("it has a target_directory")?;
    Ok(PathBuf::from(directory))
}
