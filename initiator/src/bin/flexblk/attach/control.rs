//! The socket of a serving process: one question and one answer per connection, each a line of JSON.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result};
use flexblk_initiator::volume::PathReport;
use serde::{Deserialize, Serialize};

use super::state::Name;

/// Longest line of either side.
const LONGEST: u64 = 64 << 10;
/// How long a client that says nothing is waited for.
const PATIENCE: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Question {
    Status,
    /// Detach now. Nobody uses the device, or whoever does is to get errors (`abort`).
    Detach {
        abort: bool,
    },
    /// Detach when the last user has gone.
    DetachLazily,
    /// The machine shuts down: whoever unmounts the device shall not wait long for a path.
    Shutdown,
}

/// How an attachment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum State {
    Live,
    /// No path to the namespace now; they are tried.
    NoPath,
    /// No path to the namespace, and there will be none: I/O fails.
    Lost,
    /// Waits for its last user to go.
    Detaching,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Status {
    pub(super) state: State,
    pub(super) size_bytes: u64,
    pub(super) block_size: u32,
    /// Over the last second.
    pub(super) iops: u64,
    /// Mean of the last second's I/O in microseconds; `None` when there was none.
    pub(super) latency_us: Option<f64>,
    pub(super) reads: u64,
    pub(super) writes: u64,
    pub(super) bytes_read: u64,
    pub(super) bytes_written: u64,
    pub(super) errors: u64,
    /// What is not as it should be, for the user.
    pub(super) note: Option<String>,
    pub(super) paths: Vec<PathStatus>,
}

/// How one path is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct PathStatus {
    pub(super) address: String,
    pub(super) transport: String,
    pub(super) state: String,
    pub(super) ios: u64,
    pub(super) latency_us: Option<f64>,
    pub(super) last_error: Option<String>,
}

impl PathStatus {
    pub(super) fn of(report: &PathReport) -> PathStatus {
        PathStatus {
            address: report.address.clone(),
            transport: report.transport.as_str().to_owned(),
            state: report.state.to_string(),
            ios: report.ios,
            latency_us: report.latency.map(|latency| latency.as_secs_f64() * 1e6),
            last_error: report.last_error.clone(),
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Answer {
    Status(Status),
    /// It will be respected.
    Noted,
    /// It is being done, and this process ends.
    Detaching,
    Failed(String),
}

/// A question with the way to answer it.
pub(super) struct Asked {
    pub(super) question: Question,
    pub(super) answer: mpsc::SyncSender<Answer>,
}

/// Listens, in a thread of its own; questions go to `ask`. It ends with the process.
pub(super) fn listen(name: &Name, ask: impl Fn(Asked) -> bool + Send + 'static) -> Result<()> {
    let path = name.control();
    // The folder is ours: nobody listens on what a killed process left there.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).with_context(|| format!("{}", path.display()))?;
    std::thread::Builder::new()
        .name("flexblk-control".into())
        .spawn(move || {
            for stream in listener.incoming() {
                match stream {
                    // A client that goes away, or talks nonsense, is its own problem.
                    Ok(stream) => drop(answer(&stream, &ask)),
                    Err(error) => {
                        tracing::warn!(%error, "the control socket");
                        std::thread::sleep(PATIENCE);
                    }
                }
            }
        })?;
    Ok(())
}

fn answer(mut stream: &UnixStream, ask: &impl Fn(Asked) -> bool) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(stream.take(LONGEST)).read_line(&mut line)?;
    let (sender, receiver) = mpsc::sync_channel(1);
    let answer = match serde_json::from_str(&line) {
        Ok(question) => {
            let asked = Asked {
                question,
                answer: sender,
            };
            let gone = || Answer::Failed("the process is ending".into());
            if ask(asked) {
                receiver.recv().unwrap_or_else(|_| gone())
            } else {
                gone()
            }
        }
        Err(error) => Answer::Failed(error.to_string()),
    };
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Asks the process that serves `name`.
pub(super) fn ask(name: &Name, question: Question, within: Duration) -> Result<Answer> {
    let mut stream = UnixStream::connect(name.control())?;
    stream.set_read_timeout(Some(within))?;
    stream.set_write_timeout(Some(within))?;
    let mut line = serde_json::to_vec(&question)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut line = String::new();
    BufReader::new(stream.take(LONGEST)).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}
