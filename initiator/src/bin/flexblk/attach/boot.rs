//! Attachments at boot, all of the file, by hand or by systemd; and when the machine shuts down.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::args::{Generator, Shutdown};
use super::control::{self, Answer, Question};
use super::state;
use super::{config, launch};
use crate::exit::Reported;

/// Attaches everything in the file that is not attached yet. What fails does not keep the rest back.
pub(super) fn attach_all(path: &Path) -> Result<()> {
    let mut failed = None;
    for entry in config::load(path)? {
        if state::is_served(&entry.name) {
            continue;
        }
        let arguments = [
            "attach".as_ref(),
            "--config".as_ref(),
            path.as_os_str(),
            "--entry".as_ref(),
            entry.name.as_str().as_ref(),
        ];
        let launched = launch::launch(arguments.map(ToOwned::to_owned));
        if let Err(error) = launched.and_then(|(_, ready)| ready.tell()) {
            match error.downcast_ref() {
                Some(Reported(code)) => failed = Some(*code),
                None => return Err(error),
            }
        }
    }
    match failed {
        Some(code) => Err(Reported(code).into()),
        None => Ok(()),
    }
}

/// systemd.generator(7): every entry of the file is wanted by remote-fs.target, as network file systems are.
pub(crate) fn generate(args: &Generator) -> Result<()> {
    let wants = args.normal.join("remote-fs.target.wants");
    for entry in config::load(&args.config)? {
        let link = wants.join(format!("flexblk@{}.service", entry.name));
        let made = fs::create_dir_all(&wants)
            .and_then(|()| symlink("/usr/lib/systemd/system/flexblk@.service", &link));
        match made {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.with_context(|| format!("{}", link.display()))?,
        }
    }
    Ok(())
}

/// Tells attachments that the machine shuts down, each for itself: what is left of a killed one answers nothing.
pub(crate) fn shutdown(args: &Shutdown) -> Result<()> {
    let names = match args.names.as_slice() {
        [] => state::names(),
        names => names.to_vec(),
    };
    for name in names {
        match control::ask(&name, Question::Shutdown, Duration::from_secs(1)) {
            Ok(Answer::Failed(reason)) => tracing::warn!(%name, reason, "shutdown"),
            Ok(_) => {}
            Err(error) => tracing::warn!(%name, %error, "shutdown: it does not answer"),
        }
    }
    Ok(())
}
