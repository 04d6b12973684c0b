//! The process that serves one attachment, from the connection to the target to the last user's farewell.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use flexblk_initiator::Namespace;
use flexblk_initiator::export::{ExportCounters, daemon};
use flexblk_initiator::volume::{PathState, Volume, VolumeEvent};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, set_parent_process_death_signal};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use super::args::Attach;
use super::backend::{self, Backend, Made, Order, RELEASE, Via};
use super::control::{self, Answer, Asked, PathStatus, Question, State, Status};
use super::detach::clean_up;
use super::launch::Ready;
use super::state::{self, Claim, Claimed, Identity, Name, Objects, Record, Turn};
use super::{notify, users};
use crate::connect;
use crate::size::human;

/// How long we sleep between two looks at signals, questions and events.
const TICK: Duration = Duration::from_millis(100);
/// How long a machine that shuts down waits for a path: as long as I/O does with `--policy fail`.
const NO_PATH_AT_SHUTDOWN: Duration = Duration::from_secs(5);
/// How long we wait for the target's farewell; the device is gone by then.
const FAREWELL: Duration = Duration::from_millis(1500);

/// Attaches, says that it is ready, serves until it is told to detach.
pub(super) fn serve(args: &Attach) -> Result<()> {
    // First, so that every thread has it.
    for warning in daemon::guard_against_memory_pressure() {
        tracing::warn!("less safe under memory pressure: {warning}");
    }
    if args.detached {
        end_with_parent()?;
    }
    let queues = args.nr_io_queues;
    let volume = connect::volume(&args.address, &args.paths, &args.connection, queues)?;
    // Until now a signal ends us at once: nothing is there yet. From here on it has to be taken away again.
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("signals")?;
    let namespace = volume.namespace()?;
    let identity = Identity::of(volume.subnqn().unwrap_or_default(), &namespace);
    let name = match &args.name {
        Some(name) => name.clone(),
        None => Name::of(&identity.subnqn, identity.nsid),
    };
    let (claim, left) = claim(&name, &identity, args.via)?;
    let (questions, inbox) = mpsc::channel();
    let order = Order {
        args,
        volume: &volume,
        namespace: &namespace,
        name: &name,
        identity: &identity,
    };
    let mut attachment = match Attachment::build(&order, left) {
        Ok(attachment) => attachment,
        Err(error) => {
            // A device that was to be taken over waits for the next attempt.
            if left.is_none() {
                state::remove_link(&name);
                let _ = claim.remove();
            }
            return Err(error);
        }
    };
    // The namespace may have another size than when the process was killed.
    attachment.resize();
    let announced = attachment
        .register(questions)
        .and_then(|()| match signals.pending().next() {
            Some(signal) => Ok(Some(signal)),
            None => attachment.say_ready(args).map(|()| None),
        });
    if left.is_some() && !matches!(announced, Ok(None)) {
        // It waits for the next attempt, as before. Neither taken down nor dropped, which would answer its users with
        // errors: the end of the process leaves it to the kernel.
        std::mem::forget((attachment, claim));
        return announced.and_then(end_by);
    }
    // Nobody was told of a device that could not be announced: it goes, as it does at the end.
    let (done, interrupted) = match announced {
        Ok(None) => (attachment.run(&volume, &inbox, &mut signals), None),
        Ok(interrupted) => (Ok(()), interrupted),
        Err(error) => (Err(error), None),
    };
    attachment.end();
    let removed = claim
        .remove()
        .with_context(|| format!("{}", name.directory().display()));
    farewell(attachment, volume);
    done.and(removed).and_then(|()| end_by(interrupted))
}

/// Whoever started us waits for the device. When he goes before it is there, by Ctrl-C or killed, nobody wants it.
fn end_with_parent() -> Result<()> {
    set_parent_process_death_signal(Some(Signal::TERM)).context("PR_SET_PDEATHSIG")?;
    // He may have gone before that: then nobody has the other end of the pipe.
    let stdout = io::stdout();
    let mut pipe = [PollFd::new(&stdout, PollFlags::empty())];
    let now = Timespec::default();
    if poll(&mut pipe, Some(&now)).is_ok()
        && pipe
            .iter()
            .any(|pipe| pipe.revents().contains(PollFlags::ERR))
    {
        bail!("the process that started us has gone");
    }
    Ok(())
}

/// Ends the process by a signal that came before the device was announced, as if nobody had caught it.
fn end_by(signal: Option<i32>) -> Result<()> {
    match signal {
        Some(signal) => emulate_default_handler(signal).context("ending by a signal"),
        None => Ok(()),
    }
}

/// Takes the name. Two devices over one namespace would destroy each other's data: nobody means that. The number is
/// that of a ublk device of a killed process that is to be taken over.
fn claim(name: &Name, identity: &Identity, via: Option<Via>) -> Result<(Claim, Option<u32>)> {
    // From the look at the others until they see what we are attaching.
    let turn = Turn::wait()?;
    for other in state::names() {
        let Some(there) = Record::load(&other) else {
            continue;
        };
        if other == *name || there.identity != *identity {
            continue;
        }
        let device = there.device_text();
        if state::is_served(&other) {
            bail!("{identity} is attached already, as {other} ({device})");
        }
        if there.objects.recoverable().is_some() {
            bail!(
                "{identity} was attached as {other}, and the users of {device} wait since its process was killed: attach it with --as {other}, or `flexblk detach {other}`"
            );
        }
    }
    let claim = match Claim::take(name)? {
        Claimed::Ours(claim) => claim,
        Claimed::Served => {
            let there = Record::load(name).map_or_else(
                || "an attachment that begins".into(),
                |there| format!("{} ({})", there.identity, there.device_text()),
            );
            bail!("the name {name} is in use, for {there}: detach it, or choose another with --as")
        }
    };
    let Some(left) = Record::load(name) else {
        let early = Record::new(identity.clone(), Objects::Nothing, None);
        if let Err(error) = early.save(name) {
            let _ = claim.remove();
            return Err(error);
        }
        return Ok((claim, None));
    };
    if let Some(number) = left.objects.recoverable()
        && left.identity == *identity
        && via != Some(Via::Fuse)
    {
        tracing::info!(%name, number, "taking over from a killed process");
        return Ok((claim, Some(number)));
    }
    let busy = left
        .device
        .as_ref()
        .map(|device| users::of(device, left.pid));
    if let Some(users) = busy.filter(|users| !users.is_empty()) {
        bail!(
            "{name} is left of a killed process, and its device {} is in use ({}): see to that, then `flexblk detach {name}`",
            left.device_text(),
            users.join(", ")
        );
    }
    // Cleaning up may take a while. What is left is still in the record, should we be killed meanwhile.
    let ours = Record {
        identity: identity.clone(),
        ..left.clone()
    };
    ours.save(name)?;
    drop(turn);
    tracing::info!(%name, "cleaning up after a killed process");
    clean_up(name, &left, Instant::now() + 2 * RELEASE);
    Ok((claim, None))
}

/// What the serving process holds.
struct Attachment {
    name: Name,
    record: Record,
    backend: Box<dyn Backend>,
    how: String,
    path: PathBuf,
    namespace: Namespace,
    /// Of the device, which may not have followed the namespace.
    size_bytes: u64,
    /// Why not, for `flexblk list`.
    note: Option<String>,
    state: State,
    /// The machine shuts down.
    shutdown: Option<Shutdown>,
    rate: Rate,
}

/// What there was when the machine began to shut down, and has been since.
struct Shutdown {
    /// When there was a path last.
    path: Instant,
    /// When requests ended last, or none was under way.
    progress: Instant,
    /// Requests that had ended then.
    ended: u64,
}

/// Why serving ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wish {
    GoOn,
    End,
}

impl Attachment {
    fn build(order: &Order<'_>, left: Option<u32>) -> Result<Attachment> {
        let Made {
            backend,
            how,
            size_bytes,
        } = match left {
            Some(number) => backend::take_over(order, number)?,
            None => backend::make(order)?,
        };
        let (name, namespace) = (order.name, order.namespace);
        let path = backend.path().to_owned();
        let device = Some(path.clone());
        let record = Record::new(order.identity.clone(), backend.objects(), device);
        Ok(Attachment {
            name: name.clone(),
            record,
            backend,
            how,
            path,
            namespace: namespace.clone(),
            size_bytes,
            note: None,
            state: State::Live,
            shutdown: None,
            rate: Rate::default(),
        })
    }

    /// Where others find it.
    fn register(&self, questions: mpsc::Sender<Asked>) -> Result<()> {
        let name = &self.name;
        self.record.save(name)?;
        state::make_link(name, &self.path).with_context(|| format!("{}", name.link().display()))?;
        control::listen(name, move |asked| questions.send(asked).is_ok())
    }

    fn say_ready(&self, args: &Attach) -> Result<()> {
        let ready = Ready {
            device: self.path.display().to_string(),
            name: self.name.to_string(),
            how: format!(
                "{}: {} in blocks of {} B, {}",
                self.name.link().display(),
                human(self.size_bytes),
                self.namespace.block_size,
                self.how
            ),
        };
        if args.detached {
            // All that can fail comes before the word: who has heard it goes.
            let word = format!("{}\n", serde_json::to_string(&ready)?);
            let log = self.name.log();
            let file = File::options()
                .create(true)
                .append(true)
                .open(&log)
                .with_context(|| format!("{}", log.display()))?;
            let parent = rustix::io::dup(io::stdout()).context("standard output")?;
            set_parent_process_death_signal(None).context("PR_SET_PDEATHSIG")?;
            daemon::redirect_output(&file)?;
            say(&mut File::from(parent), &word)?;
            // Leaves the terminal: its end, and Ctrl-C in it, is nothing to us. It fails when it has none.
            let _ = rustix::process::setsid();
            let _ = std::env::set_current_dir("/");
        } else {
            say(
                &mut io::stdout(),
                &format!("{}\n{}\n", ready.device, ready.how),
            )?;
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
            if let Some(why) = self.keeps_shutdown_waiting(volume) {
                tracing::error!(name = %self.name, "{why}, and the machine shuts down: I/O fails from now on");
                self.backend.abort();
                wish = Wish::End;
            }
            if wish == Wish::End {
                return Ok(());
            }
            if self.backend.has_ended() {
                if self.state == State::Detaching {
                    return Ok(());
                }
                bail!(
                    "somebody removed {}, or aborted its FUSE connection",
                    self.path.display()
                );
            }
            self.rate.tick(&self.backend.counters());
        }
    }

    /// What is used goes when its last user has gone, or with the next SIGTERM. So does what nobody seems to use: a
    /// program that is just closing the device waits until all that it wrote is on the namespace.
    fn on_signal(&mut self) -> Wish {
        notify::notify("STOPPING=1");
        if self.state != State::Live {
            return Wish::End;
        }
        let users = users::of(&self.path, self.record.pid);
        if !users.is_empty() {
            tracing::error!(name = %self.name, users = users.join(", "), "in use: waiting for its users; another signal ends it now");
        }
        self.detach_lazily();
        Wish::GoOn
    }

    fn answer(&mut self, question: Question, volume: &Volume) -> (Answer, Wish) {
        match question {
            Question::Status => (Answer::Status(self.status(volume)), Wish::GoOn),
            Question::Detach { abort } => {
                if abort {
                    self.backend.abort();
                }
                (Answer::Detaching, Wish::End)
            }
            Question::DetachLazily => {
                self.detach_lazily();
                (Answer::Detaching, Wish::GoOn)
            }
            Question::Shutdown => {
                let now = Instant::now();
                self.shutdown.get_or_insert(Shutdown {
                    path: now,
                    progress: now,
                    ended: self.backend.counters().ended(),
                });
                (Answer::Noted, Wish::GoOn)
            }
        }
    }

    /// The machine shuts down, and there has been no path, or no answer to any request, for too long. What waits for I/O
    /// then gets errors, for nothing else ends an unmount.
    fn keeps_shutdown_waiting(&mut self, volume: &Volume) -> Option<&'static str> {
        let shutdown = self.shutdown.as_mut()?;
        let now = Instant::now();
        if has_path(volume) {
            shutdown.path = now;
        }
        let counters = self.backend.counters();
        if counters.under_way == 0 || counters.ended() != shutdown.ended {
            shutdown.progress = now;
            shutdown.ended = counters.ended();
        }
        if now - shutdown.path >= NO_PATH_AT_SHUTDOWN {
            Some("no path to the namespace")
        } else if now - shutdown.progress >= volume.io_timeout() {
            Some("the target does not answer")
        } else {
            None
        }
    }

    fn status(&self, volume: &Volume) -> Status {
        let counters = self.backend.counters();
        let paths: Vec<PathStatus> = volume.paths().iter().map(PathStatus::of).collect();
        let live = has_path(volume);
        Status {
            state: match self.state {
                State::Live if !live => State::NoPath,
                state => state,
            },
            paths,
            size_bytes: self.size_bytes,
            block_size: self.namespace.block_size,
            iops: self.rate.iops,
            latency_us: self.rate.latency_us,
            reads: counters.reads,
            writes: counters.writes,
            bytes_read: counters.bytes_read,
            bytes_written: counters.bytes_written,
            errors: counters.errors,
            note: self.note.clone(),
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
        self.namespace = namespace;
        self.resize();
    }

    /// The device gets the size of the namespace. One that cannot is served all the same: without a server, its users
    /// would lose all of it.
    fn resize(&mut self) {
        let (was, now) = (self.size_bytes, self.namespace.len_bytes());
        self.note = None;
        if now == was {
            return;
        }
        match self.backend.resize(now) {
            Ok(()) => {
                self.size_bytes = now;
                if now < was {
                    tracing::error!(name = %self.name, was, now, "the namespace has shrunk: what was behind its end is gone");
                } else {
                    tracing::info!(name = %self.name, was, now, "the namespace has grown");
                }
            }
            Err(error) => {
                tracing::error!(name = %self.name, %error, was, now, "the device does not follow the size of the namespace");
                self.note = Some(format!(
                    "the namespace has {} now, and the device still {}: {error}",
                    human(now),
                    human(was)
                ));
            }
        }
    }

    /// Nobody new finds the device. What has it open keeps it.
    fn detach_lazily(&mut self) {
        self.state = State::Detaching;
        state::remove_link(&self.name);
        self.backend.let_go();
    }

    /// The device goes, in bounded time.
    fn end(&mut self) {
        state::remove_link(&self.name);
        self.backend.end();
    }
}

/// Not as an I/O error: a closed pipe is no success here, as it is for what only prints.
fn say(to: &mut impl io::Write, word: &str) -> Result<()> {
    to.write_all(word.as_bytes())
        .and_then(|()| to.flush())
        .map_err(|error| anyhow!("saying that the device is there: {error}"))
}

fn has_path(volume: &Volume) -> bool {
    let paths = volume.paths();
    paths.iter().any(|path| path.state == PathState::Live)
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
        let done = now.ended() - before.ended();
        self.iops = (done as f64 / passed.as_secs_f64()).round() as u64;
        let spent = now.latency.saturating_sub(before.latency);
        self.latency_us = (done > 0).then(|| spent.as_secs_f64() * 1e6 / done as f64);
        self.since = Some((Instant::now(), *now));
    }
}

#[cfg(test)]
mod tests;
