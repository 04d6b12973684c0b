//! A remote namespace as one block device, however it is reached.
//!
//! A [`Volume`] is the namespace with the paths to it; any thread may hold it. A [`Channel`] is one thread's way to do
//! I/O on it. What serves the volume to the host (`export`) does so through channels, in the thread that polls them.
//!
//! | what | where |
//! |---|---|
//! | which path a request takes, and what becomes of it when the path fails; sans-IO | `multipath` |
//! | no write is overtaken by an older one of a lost path | `fence` |
//! | connecting, reconnecting, ANA: one thread for a volume | `keeper`, `reconnect` |
//! | the queue pairs of a thread | `lanes`, `channel` |
//! | how long that thread spins on a core that others want | `crowd` |

mod channel;
mod crowd;
pub(crate) mod fence;
mod identity;
mod keeper;
pub(crate) mod lanes;
pub(crate) mod multipath;
mod options;
mod reconnect;
mod report;
mod shared;

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use flexblk_nvme::{Nqn, Nsid};
use flexblk_reactor::Span;

use self::fence::Fence;
use self::keeper::{Keeper, Mail};
use self::shared::Shared;
use crate::{Command, ConnectOptions, EngineMode, Error, LostReason, Namespace, Op};

pub use channel::Channel;
pub use options::{IoPolicy, MultipathOptions, NoPath, WriteFence};
pub use report::{PathReport, PathState};

/// Paths of a volume at most.
pub const MAX_PATHS: usize = 16;
/// How long what was sent on one of several paths may stay unacknowledged, unless its options say otherwise: with
/// [`multipath::SILENCE`], a dead path is found within a second.
const ACK_TIMEOUT: Duration = Duration::from_millis(500);
/// How long opening a volume waits for the other paths when one is up.
const OTHERS_WITHIN: Duration = Duration::from_secs(1);
/// How long closing a volume waits for its keeper. Beyond, that goes on alone: it only says goodbye.
const CLOSE_WITHIN: Duration = Duration::from_secs(3);

/// One way to the namespace.
#[derive(Clone, Debug)]
pub struct PathOptions {
    /// The controller to connect to.
    pub connect: ConnectOptions,
    /// The namespace there; `None`: the only one.
    pub nsid: Option<Nsid>,
}

/// How a volume is opened.
#[derive(Clone, Debug)]
pub struct VolumeOptions {
    /// At least one, at most [`MAX_PATHS`]. Transports may be mixed.
    pub paths: Vec<PathOptions>,
    /// How long a thread with a channel spins after the last activity before it sleeps.
    pub poll_budget: Duration,
}

/// What a volume tells without being asked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum VolumeEvent {
    /// The namespace is not what it was: its size, for example. [`Volume::namespace`] is already fresh.
    NamespaceChanged,
    /// There is no path left, and there will be none.
    Lost,
    /// A path is connected.
    PathUp {
        /// Its place in [`VolumeOptions::paths`].
        path: usize,
    },
    /// A path is not connected any more; it is tried again.
    PathDown {
        /// Its place in [`VolumeOptions::paths`].
        path: usize,
    },
}

/// One I/O on a volume, in its logical blocks. As to `buffer`, see [`Command`].
#[derive(Clone, Copy)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// First logical block. Ignored by [`Op::Flush`].
    pub lba: u64,
    /// Number of logical blocks. Ignored by [`Op::Flush`].
    pub blocks: u32,
    /// The data: exactly `blocks` times the block size for reads, writes and compares, else `None`.
    pub buffer: Option<Span>,
}

impl Request {
    fn on(&self, nsid: Nsid) -> Command {
        Command {
            op: self.op,
            nsid,
            lba: self.lba,
            blocks: self.blocks,
            buffer: self.buffer,
        }
    }

    /// Whether carrying it out late would matter to who reads the blocks.
    fn changes_blocks(&self) -> bool {
        match self.op {
            Op::Write { .. } | Op::WriteZeroes { .. } | Op::Discard => true,
            Op::Read | Op::Flush | Op::Compare | Op::Verify => false,
        }
    }
}

/// A remote namespace with the paths to it. Cheap to clone; the last clone (channels included) disconnects.
#[derive(Clone, Debug)]
pub struct Volume {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    mail: Sender<Mail>,
    keeper: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Volume {
    /// Connects, with the default [`MultipathOptions`].
    pub fn open(options: &VolumeOptions) -> Result<Volume, Error> {
        Volume::open_with(options, &MultipathOptions::default())
    }

    /// Connects. At least one path has to work; those that do not are tried again and again.
    ///
    /// # Errors
    /// No path works, or one leads to another namespace.
    pub fn open_with(
        options: &VolumeOptions,
        multipath: &MultipathOptions,
    ) -> Result<Volume, Error> {
        let paths = checked_paths(options, multipath)?;
        let nsids = options.paths.iter().map(|path| path.nsid).collect();
        let fence = match multipath.write_fence {
            WriteFence::Strict => Some(Arc::new(Fence::default())),
            WriteFence::Off => None,
        };
        let count = paths.len();
        let shared = Arc::new(Shared::new(*multipath, options.poll_budget, paths, fence));
        let (outbox, inbox) = mpsc::channel();
        let (first_tx, first) = mpsc::channel();
        let keeper = Keeper::new(
            Arc::clone(&shared),
            nsids,
            (outbox.clone(), inbox),
            first_tx,
        );
        let keeper = std::thread::Builder::new()
            .name("flexblk-paths".into())
            .spawn(move || keeper.run())
            .map_err(|cause| Error::System {
                what: "starting a thread",
                cause,
            })?;
        // Closes it when no path works.
        let volume = Volume {
            inner: Arc::new(Inner {
                shared,
                mail: outbox,
                keeper: Mutex::new(Some(keeper)),
            }),
        };
        wait_for_paths(&first, count)?;
        Ok(volume)
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.inner.shared
    }

    /// The namespace as it is now, with what every path can do; as it was last, while there is no path.
    pub fn namespace(&self) -> Result<Namespace, Error> {
        self.shared()
            .namespace()
            .ok_or(Error::Lost(LostReason::Closed))
    }

    /// The name of the first path's subsystem.
    pub fn subnqn(&self) -> Option<&str> {
        let first = self.shared().paths.first()?;
        first.connect.target.subnqn.as_ref().map(Nqn::as_str)
    }

    /// How long a thread with a channel spins before it sleeps.
    pub(crate) fn poll_budget(&self) -> Duration {
        self.shared().poll_budget
    }

    /// How long a request may take, on the path that allows it the longest.
    pub fn io_timeout(&self) -> Duration {
        let limits = self
            .shared()
            .paths
            .iter()
            .map(|path| path.connect.io_timeout);
        limits.max().unwrap_or_default()
    }

    /// A way to do I/O for the calling thread, with up to `depth` requests under way.
    pub fn channel(&self, depth: u16) -> Result<Channel, Error> {
        Channel::open(self, depth)
    }

    /// Every path as it is now, in the order of [`VolumeOptions::paths`].
    pub fn paths(&self) -> Vec<PathReport> {
        self.shared().report()
    }

    /// Waits for the next event.
    pub fn next_event(&self, timeout: Duration) -> Option<VolumeEvent> {
        self.shared().next_event(timeout)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let _ = self.mail.send(Mail::Close);
        let keeper = self
            .keeper
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(keeper) = keeper else { return };
        let give_up = Instant::now() + CLOSE_WITHIN;
        while !keeper.is_finished() {
            if Instant::now() >= give_up {
                tracing::warn!("the paths of a volume take long to close");
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = keeper.join();
    }
}

/// How each path is connected; refuses what a volume cannot do.
fn checked_paths(
    options: &VolumeOptions,
    multipath: &MultipathOptions,
) -> Result<Vec<ConnectOptions>, Error> {
    let count = options.paths.len();
    if count == 0 || count > MAX_PATHS {
        return Err(Error::Address(format!(
            "{count} addresses given: a volume has 1 to {MAX_PATHS} paths"
        )));
    }
    let refused = |name: &str, reason: &str| {
        Err(Error::Option {
            name: name.into(),
            reason: reason.into(),
        })
    };
    let mut paths = Vec::with_capacity(count);
    for path in &options.paths {
        let mut connect = path.connect.clone();
        connect.poll_budget = options.poll_budget;
        if connect.engine != EngineMode::Inline {
            return refused(
                "engine",
                "a volume's threads have their engine themselves: inline",
            );
        }
        if connect.capture.is_some() {
            return refused(
                "capture",
                "a volume's queue pairs share an endpoint, which cannot be captured",
            );
        }
        if connect.kato.is_zero() && multipath.write_fence == WriteFence::Strict {
            return refused(
                "kato_ms",
                "without keep-alive nobody knows when a lost target has stopped: set one, or write_fence=off",
            );
        }
        if count > 1 {
            connect.ack_timeout.get_or_insert(ACK_TIMEOUT);
        }
        paths.push(connect);
    }
    Ok(paths)
}

/// Until one path is up and the others had their time. A path to another namespace is a mistake of the user's.
fn wait_for_paths(first: &mpsc::Receiver<keeper::First>, count: usize) -> Result<(), Error> {
    let (mut up, mut error) = (false, None);
    let mut others_until = None;
    for _ in 0..count {
        let told = match others_until {
            // Each attempt ends, by its own time-outs.
            None => first.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(until) => first.recv_timeout(Instant::duration_since(&until, Instant::now())),
        };
        match told {
            Ok(Ok(())) => {
                up = true;
                others_until.get_or_insert(Instant::now() + OTHERS_WITHIN);
            }
            Ok(Err(other @ Error::OtherNamespace { .. })) => return Err(other),
            Ok(Err(failed)) => error = error.or(Some(failed)),
            Err(_) => break,
        }
    }
    match error {
        _ if up => Ok(()),
        Some(error) => Err(error),
        None => Err(Error::Lost(LostReason::Closed)),
    }
}
