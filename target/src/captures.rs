//! Packet captures of FlexiNS that are switched on and off while the target runs: one pcapng file for each data
//! thread, written by it.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use flexblk_reactor::mailbox;
use flexins::middleware::Capture;

use crate::association::lock;
use crate::target::send;
use crate::thread::mail::Mail;

/// How long the threads may take to begin or to end.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// What is captured.
#[derive(Clone, Debug)]
pub struct CaptureRequest {
    /// File of the first thread; those of the others have the thread's number behind the name.
    pub file: PathBuf,
    /// Each file ends before it is longer.
    pub limit_bytes: u64,
    /// Packets to and from this address only, and this UDP port of it: a host's queue has one of its own, unless
    /// another queue of the same thread of that host shares it.
    pub peer: Option<(IpAddr, Option<u16>)>,
}

/// What a capture has recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CaptureReport {
    /// The files.
    pub files: Vec<PathBuf>,
    /// Packets in them.
    pub recorded: u64,
    /// Packets that came when a file was full or could not be written.
    pub not_recorded: u64,
}

/// Why a capture does not begin or end.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// One at a time.
    #[error("a capture into {} is running: stop it first", .0.display())]
    Running(PathBuf),
    /// Nothing to stop.
    #[error("no capture is running")]
    NotRunning,
    /// The file.
    #[error("cannot create the capture file {}: {source}", path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// To a data thread: capture from now on, or no more. It answers with what the capture that ends has recorded.
#[derive(Debug)]
pub(crate) struct CaptureOrder {
    capture: Mutex<Option<Capture>>,
    reply: SyncSender<(u64, u64)>,
}

impl CaptureOrder {
    /// Carries it out; `switch` gives the thread's endpoint the new capture and returns the old one.
    pub(crate) fn carry_out(&self, switch: impl FnOnce(Option<Capture>) -> Option<Capture>) {
        let ended = switch(lock(&self.capture).take());
        let counts = ended.map_or((0, 0), |mut capture| {
            if let Err(error) = capture.flush() {
                tracing::warn!(%error, "the end of a packet capture is lost");
            }
            (capture.recorded(), capture.not_recorded())
        });
        // Whoever asked may have stopped waiting.
        let _ = self.reply.try_send(counts);
    }
}

/// The capture of a target.
#[derive(Debug, Default)]
pub(crate) struct Captures {
    /// Files of the one that is running.
    files: Mutex<Option<Vec<PathBuf>>>,
}

impl Captures {
    /// With the capture that the configuration begins.
    pub(crate) fn new(file: Option<&Path>, threads: usize) -> Captures {
        Captures {
            files: Mutex::new(file.map(|file| files(file, threads))),
        }
    }

    pub(crate) fn start(
        &self,
        request: &CaptureRequest,
        threads: &[mailbox::Sender<Mail>],
    ) -> Result<Vec<PathBuf>, CaptureError> {
        let mut running = lock(&self.files);
        if let Some(file) = running.as_ref().and_then(|files| files.first()) {
            return Err(CaptureError::Running(file.clone()));
        }
        let files = files(&request.file, threads.len());
        let mut captures = Vec::new();
        for path in &files {
            let capture = Capture::create(path).map_err(|source| CaptureError::File {
                path: path.clone(),
                source,
            })?;
            let capture = capture.with_limit(request.limit_bytes);
            captures.push(Some(match request.peer {
                Some((ip, port)) => capture.with_peer(ip, port),
                None => capture,
            }));
        }
        order(threads, captures);
        *running = Some(files.clone());
        Ok(files)
    }

    pub(crate) fn stop(
        &self,
        threads: &[mailbox::Sender<Mail>],
    ) -> Result<CaptureReport, CaptureError> {
        let files = lock(&self.files).take().ok_or(CaptureError::NotRunning)?;
        let counts = order(threads, threads.iter().map(|_| None).collect());
        Ok(CaptureReport {
            files,
            recorded: counts.iter().map(|counts| counts.0).sum(),
            not_recorded: counts.iter().map(|counts| counts.1).sum(),
        })
    }
}

/// Gives each thread its order, and waits for the answers.
fn order(threads: &[mailbox::Sender<Mail>], captures: Vec<Option<Capture>>) -> Vec<(u64, u64)> {
    let (reply, answers) = mpsc::sync_channel(threads.len().max(1));
    for (thread, capture) in threads.iter().zip(captures) {
        let order = Arc::new(CaptureOrder {
            capture: Mutex::new(capture),
            reply: reply.clone(),
        });
        send(thread, || Mail::Capture(Arc::clone(&order)));
    }
    drop(reply);
    let deadline = Instant::now() + ANSWER_TIME;
    let left = || deadline.saturating_duration_since(Instant::now());
    std::iter::from_fn(|| answers.recv_timeout(left()).ok()).collect()
}

fn files(file: &Path, threads: usize) -> Vec<PathBuf> {
    (0..threads).map(|id| file_of_thread(file, id)).collect()
}

/// The first thread gets the name, the others a number behind it.
pub(crate) fn file_of_thread(file: &Path, id: usize) -> PathBuf {
    if id == 0 {
        return file.to_owned();
    }
    let mut name = file.to_owned().into_os_string();
    name.push(format!(".{id}"));
    name.into()
}
