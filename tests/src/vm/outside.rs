//! Our target outside of a guest, and what a guest asks to be done to it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::network::{Network, OUTSIDE, TAP};
use crate::binaries::Binaries;
use crate::target::{Target, TargetOptions};

/// Size of namespace 2, a file.
const FILE_MIB: u64 = 32;

/// A target that guests reach over NVMe/TCP: namespace 1 in RAM, namespace 2 a file.
pub struct Outside<'a> {
    network: &'a Network,
    binaries: &'static Binaries,
    directory: PathBuf,
    target: Option<Target>,
}

impl<'a> Outside<'a> {
    /// Starts nothing yet: guests ask for it.
    pub fn new(network: &'a Network, directory: &Path) -> Result<Outside<'a>> {
        File::create(directory.join("namespace-2.img"))?.set_len(FILE_MIB << 20)?;
        Ok(Outside {
            network,
            binaries: Binaries::get()?,
            directory: directory.to_owned(),
            target: None,
        })
    }

    /// Does what a guest asks for.
    pub fn answer(&mut self, words: &[String]) -> Result<String> {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match words.as_slice() {
            ["start" | "again"] => {
                let device = format!("file:{}", self.directory.join("namespace-2.img").display());
                let options = TargetOptions {
                    extra: format!("[tcp]\naddress = \"{OUTSIDE}:4420\"\n"),
                    udp_port: Some(4791),
                    ..TargetOptions::with_devices(&["ram:64M", &device])
                };
                self.target = Some(Target::start(self.binaries, &self.directory, options)?);
            }
            // As a crash does: nothing is said to hosts.
            ["stop"] => self.running()?.kill()?,
            ["path-down", path] => self.network.ip(&format!("addr del {} dev {TAP}", address(path)?))?,
            ["path-up", path] => self.network.ip(&format!("addr add {} dev {TAP}", address(path)?))?,
            _ => bail!("unknown request"),
        }
        Ok(String::new())
    }

    fn running(&mut self) -> Result<&mut Target> {
        self.target.as_mut().context("no target was started")
    }

    /// What the target printed, for messages; and whether it still runs as it should.
    pub fn check(&mut self) -> Result<()> {
        let Some(target) = &mut self.target else {
            return Ok(());
        };
        let output = target.output();
        if output.contains("panicked") || !target.is_running() {
            bail!("the target has died:\n{output}");
        }
        let _ = fs::write(self.directory.join("target.log"), output);
        Ok(())
    }
}

fn address(path: &str) -> Result<String> {
    match path {
        "1" => Ok(format!("{OUTSIDE}/24")),
        _ => bail!("no path {path}"),
    }
}
