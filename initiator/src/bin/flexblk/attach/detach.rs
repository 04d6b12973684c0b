//! `flexblk detach`: bounded in time, whatever state the attachment is in.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use flexblk_initiator::export::fuse::{abort_connection, unmount};
use flexblk_initiator::export::loop_device;
use flexblk_initiator::export::ublk::UblkExport;

use super::args::Detach;
use super::control::{self, Answer, Question};
use super::state::{self, Claim, Claimed, Name, Objects, Record};
use super::write_back::{self, Written};
use super::{config, users};
use crate::exit::Usage;

/// How long the serving process has for all of it before it is killed.
const ORDERLY: Duration = Duration::from_secs(3);
/// How long the kernel has to let go after that.
const AFTER_KILL: Duration = Duration::from_millis(1500);
/// How much of that a killed process has to end.
const DEATH: Duration = Duration::from_millis(500);
const PAUSE: Duration = Duration::from_millis(10);

/// Detaches one device, and forgets it when that is wanted.
pub(crate) fn detach(args: &Detach) -> Result<()> {
    if args.write_back {
        return write_back::write_back_here(Path::new(&args.what));
    }
    if !args.persist {
        return detach_now(args);
    }
    let found = state::find(&args.what);
    let name = match &found {
        Ok(name) => name.clone(),
        Err(_) => Name::parse(&args.what).map_err(Usage)?,
    };
    let forgotten = config::forget(&args.config, &name)?;
    match found {
        // It was not attached, and is not at the next boot.
        Err(_) if forgotten => Ok(()),
        _ => detach_now(args),
    }
}

fn detach_now(args: &Detach) -> Result<()> {
    let name = match state::find(&args.what) {
        // As it should be after an orderly end.
        Err(_) if args.stop_post => return Ok(()),
        found => found?,
    };
    let started = Instant::now();
    let record = Record::load(&name);
    if args.stop_post && is_next_start_s(record.as_ref()) {
        return Ok(());
    }
    let used = record.as_ref().and_then(|record| {
        let device = record.device.as_ref()?;
        let users = users::of(device, record.pid);
        (!users.is_empty())
            .then(|| format!("{name} ({}) is {}", device.display(), users.join(", ")))
    });
    if let Some(used) = used.as_ref().filter(|_| !args.force && !args.lazy) {
        bail!(
            "{used}: unmount or close it, or detach with --lazy (when it is not used any more) or --force (I/O fails from now on)"
        );
    }
    if let (false, false, Some(record)) = (args.force, args.lazy, &record) {
        save_what_was_written(&name, record)?;
    }
    let question = if args.lazy {
        Question::DetachLazily
    } else {
        Question::Detach { abort: args.force }
    };
    let answer = control::ask(&name, question, Duration::from_secs(1));
    match answer {
        Ok(Answer::Failed(reason)) => tracing::warn!(%reason, "the serving process refused"),
        Ok(_) if args.lazy => return Ok(()),
        Ok(_) => {
            while started.elapsed() < ORDERLY {
                if !name.directory().exists() {
                    still_used(&name, record.as_ref(), used);
                    return Ok(());
                }
                std::thread::sleep(PAUSE);
            }
            tracing::warn!("the serving process does not end in time");
        }
        Err(error) => tracing::info!(%error, "the serving process does not answer"),
    }
    if let (true, Some(used)) = (args.lazy, &used)
        && record
            .as_ref()
            .and_then(|record| record.objects.recoverable())
            .is_some()
    {
        bail!(
            "{used}, and waits since the serving process was killed: attach {name} again, which takes it over, or detach with --force"
        );
    }
    // It hangs, or it is dead: what it waits for is aborted, and what it leaves behind is removed.
    let Some(record) = record else {
        return remove(&name, started);
    };
    // That of a dead process has ended with it, and its number may be another file system's now.
    if let Objects::FuseLoop {
        fuse_connection: Some(connection),
        ..
    } = record.objects
        && record.lives()
        && let Err(error) = abort_connection(connection)
    {
        tracing::warn!(%error, "aborting the FUSE connection");
    }
    record.kill();
    let deadline = Instant::now() + AFTER_KILL;
    // As long as it lives, it may bind a loop device. And whoever attaches under this name meanwhile keeps what is his.
    let claimed = lock_until(&name, Instant::now() + DEATH)?;
    if let Some(Claimed::Served) = claimed
        && Record::load(&name).is_some_and(|now| !now.is_of_same_process(&record))
    {
        bail!("{name} has been attached again meanwhile: detach it once more");
    }
    clean_up(&name, &record, deadline);
    match claimed {
        Some(Claimed::Ours(claim)) => claim
            .remove()
            .with_context(|| format!("{}", name.directory().display()))?,
        Some(Claimed::Served) | None => remove(&name, started)?,
    }
    still_used(&name, Some(&record), used);
    Ok(())
}

/// A device that nobody has open has nothing in its cache, but one that is just being closed has.
fn save_what_was_written(name: &Name, record: &Record) -> Result<()> {
    let (
        Objects::FuseLoop {
            loop_number: Some(number),
            ..
        },
        Some(device),
    ) = (record.objects, &record.device)
    else {
        return Ok(());
    };
    if !is_ours(number, name) {
        return Ok(());
    }
    match write_back::write_back(device)? {
        Written::All => Ok(()),
        Written::Failed => {
            eprintln!(
                "{name} ({}): writes to its namespace have failed, so not all that was written to the device is there",
                device.display()
            );
            Ok(())
        }
        Written::NotInTime => bail!(
            "{name} ({}): what was written to the device is not on its namespace after {:?}: detach it later, or with --lazy (as soon as it is there) or --force (it is lost)",
            device.display(),
            write_back::LIMIT
        ),
    }
}

/// systemd.exec(5), SERVICE_RESULT: the service crashed, so it is started again and takes its ublk device over. Its users
/// wait meanwhile. When that start fails, the result is another one, and the device goes.
fn is_next_start_s(record: Option<&Record>) -> bool {
    let crashed = std::env::var("SERVICE_RESULT")
        .is_ok_and(|result| ["signal", "core-dump", "oom-kill"].contains(&result.as_str()));
    crashed && record.is_some_and(|record| record.objects.recoverable().is_some())
}

/// Kernel objects that a killed process left behind.
pub(super) fn clean_up(name: &Name, record: &Record, deadline: Instant) {
    state::remove_link(name);
    match record.objects {
        Objects::Nothing => {}
        Objects::FuseLoop { .. } => {
            let disk = name.disk();
            // Not by the record: it does not have the number yet while the kernel binds the device.
            for number in loop_device::bound_below(&name.directory()) {
                if let Err(error) = loop_device::release_by_number(number) {
                    tracing::error!(%error, "releasing the loop device");
                }
                loop_device::wait_released(number, &disk, deadline);
            }
            // EINVAL: it is not mounted.
            let _ = unmount(&disk);
        }
        Objects::Ublk { number } => {
            let within = deadline.saturating_duration_since(Instant::now());
            if let Err(error) = UblkExport::remove(number, record.pid, within) {
                tracing::error!(%error, "removing the ublk device");
            }
            let _ = fs::remove_file(state::ublk_properties(number));
        }
    }
}

/// The number may have been given to another file since.
fn is_ours(number: u32, name: &Name) -> bool {
    loop_device::backing_file(number).is_some_and(|file| file.starts_with(name.directory()))
}

fn remove(name: &Name, started: Instant) -> Result<()> {
    match lock_until(name, started + ORDERLY + AFTER_KILL)? {
        None => Ok(()),
        Some(Claimed::Ours(claim)) => claim
            .remove()
            .with_context(|| format!("{}", name.directory().display())),
        Some(Claimed::Served) => bail!(
            "the process that serves {name} was killed, and does not end: the kernel holds it"
        ),
    }
}

/// The folder, when the process that had it has ended by `deadline`.
fn lock_until(name: &Name, deadline: Instant) -> Result<Option<Claimed>> {
    loop {
        let claimed =
            Claim::lock(name).with_context(|| format!("{}", name.directory().display()))?;
        if !matches!(claimed, Some(Claimed::Served)) || Instant::now() >= deadline {
            return Ok(claimed);
        }
        std::thread::sleep(PAUSE);
    }
}

/// What remains when a device was in use: said, and no error. `used` is who used it, in words.
fn still_used(name: &Name, record: Option<&Record>, used: Option<String>) {
    let Some(record) = record else { return };
    match record.objects {
        Objects::FuseLoop {
            loop_number: Some(number),
            ..
        } => {
            // Unmounted, the file's path is that of a root.
            let bound = is_ours(number, name)
                || loop_device::backing_file(number).is_some_and(|file| file == Path::new("/"));
            if let (true, Some(device)) = (bound, &record.device) {
                eprintln!(
                    "{}: every access fails from now on; it goes when its last user has gone ({})",
                    device.display(),
                    users::of(device, record.pid).join(", ")
                );
            }
        }
        Objects::Ublk { .. } => {
            if let Some(used) = used {
                eprintln!("{used}: the device has gone, and every access fails");
            }
        }
        Objects::FuseLoop { .. } | Objects::Nothing => {}
    }
}
