//! The process that serves one attachment, from the connection to the target to the last user's farewell.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use flexblk_initiator::Namespace;
use flexblk_initiator::export::daemon;
use flexblk_initiator::export::fuse::{ExportCounters, FuseExport, FuseOptions, abort_connection};
use flexblk_initiator::export::loop_device::{self, LoopDevice, LoopOptions};
use flexblk_initiator::volume::{Volume, VolumeEvent};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::args::Attach;
use super::control::{self, Answer, Asked, PathStatus, Question, State, Status};
use super::detach::clean_up;
use super::launch::Ready;
use super::state::{self, Claim, Claimed, Name, Record};
use super::{notify, users};
use crate::connect;
use crate::size::human;

/// How long we sleep between two looks at signals, questions and events.
const TICK: Duration = Duration::from_millis(100);
/// How long the loop device may take to let go before everything under way is aborted, and then once more.
const RELEASE: Duration = Duration::from_secs(1);
/// How long we wait for the target's farewell; the device is gone by then.
const FAREWELL: Duration = Duration::from_millis(1500);
/// How this machine makes a block device.
const BACKEND: &str = "fuse+loop";

/// Attaches, says that it is ready, serves until it is told to detach.
pub(super) fn serve(args: &Attach) -> Result<()> {
    // First, so that every thread has it.
    for warning in daemon::guard_against_memory_pressure() {
        tracing::warn!("less safe under memory pressure: {warning}");
    }
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("signals")?;
    let queues = args.nr_io_queues;
    let volume = connect::volume(&args.address, &args.paths, &args.connection, queues)?;
    let namespace = volume.namespace()?;
    let subnqn = volume.subnqn().unwrap_or_default();
    let nsid = namespace.nsid.get();
    let name = match &args.name {
        Some(name) => name.clone(),
        None => Name::of(subnqn, nsid),
    };
    let record = Record::new(BACKEND, subnqn, nsid, wwid(&namespace));
    let claim = claim(&name, &record)?;
    let (questions, inbox) = mpsc::channel();
    let built = Attachment::build(args, &volume, &namespace, &name, record).and_then(|built| {
        control::listen(&name, move |asked| questions.send(asked).is_ok())?;
        Ok(built)
    });
    let mut attachment = match built {
        Ok(attachment) => attachment,
        Err(error) => {
            // Device and mount went with what was built.
            state::remove_link(&name);
            let _ = claim.remove();
            return Err(error);
        }
    };
    attachment.say_ready(args)?;
    let done = attachment.run(&volume, &inbox, &mut signals);
    attachment.end();
    claim
        .remove()
        .with_context(|| format!("{}", name.directory().display()))?;
    farewell(attachment, volume);
    done
}

/// The namespace's own name, as the kernel's NVMe host would show it.
pub(super) fn wwid(namespace: &Namespace) -> Option<String> {
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
    let given = |bytes: &[u8]| bytes.iter().any(|byte| *byte != 0);
    match namespace.uuid {
        Some(uuid) => Some(format!("uuid.{uuid}")),
        None if given(&namespace.nguid) => Some(format!("eui.{}", hex(&namespace.nguid))),
        None if given(&namespace.eui64) => Some(format!("eui.{}", hex(&namespace.eui64))),
        None => None,
    }
}

/// Takes the name. Two devices over one namespace would destroy each other's data: nobody means that.
fn claim(name: &Name, record: &Record) -> Result<Claim> {
    for other in state::names() {
        let Some(there) = Record::load(&other) else {
            continue;
        };
        if other == *name || !there.is_same_namespace(record) {
            continue;
        }
        if let Ok(Some(Claimed::Served)) = Claim::lock(&other) {
            bail!(
                "namespace {} of {} is attached already, as {other} ({})",
                record.nsid,
                record.subnqn,
                device_of(&there)
            );
        }
    }
    match Claim::take(name)? {
        Claimed::Ours(claim) => {
            if let Some(left) = Record::load(name) {
                let busy = left
                    .device
                    .as_ref()
                    .map(|device| users::of(device, left.pid));
                if let Some(users) = busy.filter(|users| !users.is_empty()) {
                    bail!(
                        "{name} is left of a killed process, and its device {} is in use ({}): see to that, then `flexblk detach {name}`",
                        device_of(&left),
                        users.join(", ")
                    );
                }
                tracing::info!(%name, "cleaning up after a killed process");
                clean_up(name, &left, Instant::now() + 2 * RELEASE);
            }
            Ok(claim)
        }
        Claimed::Served => {
            let there = Record::load(name);
            bail!(
                "the name {name} is in use, for {}: detach it, or choose another with --as",
                there.map_or_else(
                    || "an attachment that begins".into(),
                    |there| {
                        format!(
                            "namespace {} of {} ({})",
                            there.nsid,
                            there.subnqn,
                            device_of(&there)
                        )
                    }
                )
            )
        }
    }
}

fn device_of(record: &Record) -> String {
    match &record.device {
        Some(device) => device.display().to_string(),
        None => "no device yet".into(),
    }
}

/// What the serving process holds.
struct Attachment {
    name: Name,
    record: Record,
    export: FuseExport,
    /// `None` when it was let go.
    device: Option<LoopDevice>,
    path: PathBuf,
    namespace: Namespace,
    state: State,
    rate: Rate,
}

/// Why serving ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wish {
    GoOn,
    End,
}

impl Attachment {
    fn build(
        args: &Attach,
        volume: &Volume,
        namespace: &Namespace,
        name: &Name,
        mut record: Record,
    ) -> Result<Attachment> {
        record.save(name)?;
        let disk = name.disk();
        File::create(&disk).with_context(|| format!("{}", disk.display()))?;
        let export = FuseExport::start(
            volume,
            &FuseOptions {
                mount_point: disk.clone(),
                threads: args.nr_io_queues,
                depth: args.queue_size,
            },
        )?;
        record.fuse_connection = Some(export.connection());
        record.save(name)?;
        let mut properties = format!("FLEXBLK_NAME={name}\n");
        if let Some(wwid) = &record.wwid {
            properties += &format!("FLEXBLK_WWID={wwid}\n");
        }
        fs::write(disk.with_extension("udev"), properties)?;
        let device = LoopDevice::attach(
            &disk,
            &LoopOptions {
                block_size: namespace.block_size,
                read_only: namespace.read_only,
                partitions: !args.no_partitions,
            },
        )?;
        let path = device.path();
        record.loop_number = Some(device.number());
        record.device = Some(path.clone());
        let saved = record.save(name).and_then(|()| {
            state::make_link(name, &path).with_context(|| format!("{}", name.link().display()))
        });
        saved?;
        Ok(Attachment {
            name: name.clone(),
            record,
            export,
            device: Some(device),
            path,
            namespace: namespace.clone(),
            state: State::Live,
            rate: Rate::default(),
        })
    }

    fn say_ready(&self, args: &Attach) -> Result<()> {
        let ready = Ready {
            device: self.path.display().to_string(),
            name: self.name.to_string(),
            how: format!(
                "{}: {} in blocks of {} B, loop device over FUSE, because {}",
                self.name.link().display(),
                human(self.namespace.len_bytes()),
                self.namespace.block_size,
                why_not_ublk()
            ),
        };
        if args.detached {
            println!("{}", serde_json::to_string(&ready)?);
            let log = self.name.log();
            let file = File::options()
                .create(true)
                .append(true)
                .open(&log)
                .with_context(|| format!("{}", log.display()))?;
            daemon::redirect_output(&file)?;
            // Leaves the terminal: its end, and Ctrl-C in it, is nothing to us. It fails when it has none.
            let _ = rustix::process::setsid();
            let _ = std::env::set_current_dir("/");
        } else {
            println!("{}\n{}", ready.device, ready.how);
        }
        notify::notify(&format!("READY=1\nSTATUS={}", ready.device));
        Ok(())
    }

    /// Until it is to end.
    fn run(
        &mut self,
        volume: &Volume,
        inbox: &mpsc::Receiver<Asked>,
        signals: &mut Signals,
    ) -> Result<()> {
        loop {
            match volume.next_event(TICK) {
                Some(VolumeEvent::NamespaceChanged) => self.follow(volume),
                Some(VolumeEvent::Lost) => {
                    tracing::error!(name = %self.name, "the namespace is lost: I/O fails from now on");
                    self.state = State::Lost;
                    // There will be no other event.
                    std::thread::sleep(TICK);
                }
                Some(VolumeEvent::PathUp { path }) => {
                    tracing::info!(name = %self.name, path, "a path is up");
                }
                Some(VolumeEvent::PathDown { path }) => {
                    tracing::warn!(name = %self.name, path, "a path is down");
                }
                _ => {}
            }
            let mut wish = Wish::GoOn;
            for _ in signals.pending() {
                wish = self.on_signal();
            }
            while let Ok(asked) = inbox.try_recv() {
                let (answer, wanted) = self.answer(asked.question, volume);
                // Who asked may have gone.
                let _ = asked.answer.send(answer);
                if wanted == Wish::End {
                    wish = wanted;
                }
            }
            if wish == Wish::End {
                return Ok(());
            }
            if self.export.has_ended() {
                if self.state == State::Detaching {
                    return Ok(());
                }
                bail!("somebody aborted the FUSE connection of {}", self.name);
            }
            self.rate.tick(&self.export.counters());
        }
    }

    /// SIGTERM ends what nobody uses. What is used goes when its last user has gone, or with the next SIGTERM.
    fn on_signal(&mut self) -> Wish {
        notify::notify("STOPPING=1");
        let users = users::of(&self.path, self.record.pid);
        if users.is_empty() || self.state != State::Live {
            return Wish::End;
        }
        tracing::error!(name = %self.name, users = users.join(", "), "in use: waiting for its users; another signal ends it now");
        self.detach_lazily();
        Wish::GoOn
    }

    fn answer(&mut self, question: Question, volume: &Volume) -> (Answer, Wish) {
        match question {
            Question::Status => (Answer::Status(self.status(volume)), Wish::GoOn),
            Question::Detach { abort } => {
                if abort {
                    self.abort();
                }
                (Answer::Detaching, Wish::End)
            }
            Question::DetachLazily => {
                self.detach_lazily();
                (Answer::Detaching, Wish::GoOn)
            }
        }
    }

    fn status(&self, volume: &Volume) -> Status {
        let counters = self.export.counters();
        let paths: Vec<PathStatus> = volume.paths().iter().map(PathStatus::of).collect();
        let live = paths.iter().any(|path| path.state == "live");
        Status {
            state: match self.state {
                State::Live if !live => State::NoPath,
                state => state,
            },
            paths,
            size_bytes: self.namespace.len_bytes(),
            block_size: self.namespace.block_size,
            iops: self.rate.iops,
            latency_us: self.rate.latency_us,
            reads: counters.reads,
            writes: counters.writes,
            bytes_read: counters.bytes_read,
            bytes_written: counters.bytes_written,
            errors: counters.errors,
        }
    }

    /// As the kernel's NVMe host does: the capacity changes at once, in both directions, whoever uses the device.
    fn follow(&mut self, volume: &Volume) {
        let namespace = match volume.namespace() {
            Ok(namespace) => namespace,
            Err(error) => {
                tracing::error!(name = %self.name, %error, "the namespace has gone");
                return;
            }
        };
        if namespace.block_size != self.namespace.block_size {
            tracing::error!(name = %self.name, now = namespace.block_size, "the namespace has another block size: detach and attach it again");
            return;
        }
        if namespace.block_count == self.namespace.block_count {
            return;
        }
        let (was, now) = (self.namespace.len_bytes(), namespace.len_bytes());
        self.namespace = namespace;
        self.export.resize(now);
        // Lets the kernel ask for the file's size; only then does the loop device find it.
        let followed = fs::metadata(self.export.path())
            .map_err(anyhow::Error::from)
            .and_then(|_| match &self.device {
                Some(device) => Ok(device.follow_size()?),
                None => Ok(()),
            });
        match followed {
            Ok(()) if now < was => {
                tracing::error!(name = %self.name, was, now, "the namespace has shrunk: what was behind its end is gone");
            }
            Ok(()) => tracing::info!(name = %self.name, was, now, "the namespace has grown"),
            Err(error) => tracing::error!(name = %self.name, %error, "following the new size"),
        }
    }

    /// Everything under way, and everything to come, ends with an error.
    fn abort(&self) {
        if let Err(error) = abort_connection(self.export.connection()) {
            tracing::error!(%error, "aborting the FUSE connection");
        }
    }

    /// Nobody new finds the device. What has it open keeps it.
    fn detach_lazily(&mut self) {
        self.state = State::Detaching;
        state::remove_link(&self.name);
        self.release();
        if let Err(error) = self.export.unmount() {
            tracing::warn!(%error, "unmounting");
        }
    }

    /// Lets the loop device go. In a thread of its own, because closing a block device waits for its I/O.
    fn release(&mut self) {
        if let Some(device) = self.device.take() {
            let release = move || {
                if let Err(error) = device.release() {
                    tracing::error!(%error, "releasing the loop device");
                }
            };
            if let Err(error) = std::thread::Builder::new().spawn(release) {
                tracing::error!(%error, "starting a thread");
            }
        }
    }

    /// The device goes, in bounded time.
    fn end(&mut self) {
        state::remove_link(&self.name);
        self.release();
        let disk = self.name.disk();
        if let Some(number) = self.record.loop_number
            && !loop_device::wait_released(number, &disk, Instant::now() + RELEASE)
        {
            self.abort();
            // When it is in use it stays bound, and every access fails, until the last user has gone.
            loop_device::wait_released(number, &disk, Instant::now() + RELEASE);
        }
        let _ = self.export.unmount();
    }
}

/// Says goodbye to the target, which shall not wait for our keep-alive.
fn farewell(attachment: Attachment, volume: Volume) {
    let (done, over) = mpsc::channel::<()>();
    let said = std::thread::Builder::new().spawn(move || {
        drop(attachment);
        drop(volume);
        drop(done);
    });
    if said.is_ok() {
        let _ = over.recv_timeout(FAREWELL);
    }
}

fn why_not_ublk() -> &'static str {
    if std::path::Path::new("/dev/ublk-control").exists() {
        "attach does not use ublk yet (`flexblk export ublk` does)"
    } else {
        "this kernel has no ublk (/dev/ublk-control)"
    }
}

/// What was done in the last second.
#[derive(Default)]
struct Rate {
    since: Option<(Instant, ExportCounters)>,
    iops: u64,
    latency_us: Option<f64>,
}

impl Rate {
    fn tick(&mut self, now: &ExportCounters) {
        let Some((at, before)) = self.since else {
            self.since = Some((Instant::now(), *now));
            return;
        };
        let passed = at.elapsed();
        if passed < Duration::from_secs(1) {
            return;
        }
        let all = |c: &ExportCounters| c.reads + c.writes + c.others;
        let done = all(now) - all(&before);
        self.iops = (done as f64 / passed.as_secs_f64()).round() as u64;
        let spent = now.latency.saturating_sub(before.latency);
        self.latency_us = (done > 0).then(|| spent.as_secs_f64() * 1e6 / done as f64);
        self.since = Some((Instant::now(), *now));
    }
}
