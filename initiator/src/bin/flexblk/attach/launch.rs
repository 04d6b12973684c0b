//! The process that the user started: starts the one that serves, waits until the device is there, and goes.

use std::ffi::OsString;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

use super::state::Name;
use crate::exit::Reported;

/// The line by which the serving process says that the device is there.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Ready {
    /// What the user is told first, and scripts use.
    pub(super) device: String,
    /// How it is made, and why so.
    pub(super) how: String,
    pub(super) name: String,
}

impl Ready {
    /// Tells the user. When that fails the device is there all the same.
    pub(super) fn tell(&self) -> Result<()> {
        writeln!(io::stdout(), "{}", self.device)
            .and_then(|()| writeln!(io::stderr(), "{}", self.how))
            // Not as an I/O error: a closed pipe is no success here.
            .map_err(|error| {
                let Ready { device, name, .. } = self;
                anyhow!("{device} is attached as {name}, but this could not be said: {error}")
            })
    }
}

/// Runs this program with that command line, detached, until the device is there.
pub(super) fn launch(arguments: impl IntoIterator<Item = OsString>) -> Result<(Name, Ready)> {
    let program = std::env::current_exe().context("who am I?")?;
    let mut child = Command::new(program)
        .args(arguments)
        .arg("--detached")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting the serving process")?;
    let stdout = child.stdout.take().context("its output was asked for")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    if line.is_empty() {
        // It has said why on standard error, which is ours.
        let status = child.wait()?;
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        return Err(match code {
            Some(code) if code != 0 => Reported(code).into(),
            _ => anyhow!("the serving process ended with {status}"),
        });
    }
    let ready: Ready = serde_json::from_str(&line).context("what the serving process said")?;
    let name = Name::parse(&ready.name).map_err(anyhow::Error::msg)?;
    Ok((name, ready))
}
