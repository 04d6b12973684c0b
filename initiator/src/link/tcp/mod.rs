//! The NVMe/TCP binding: PDUs over a socket on the thread's reactor.
//!
//! | what | where |
//! |---|---|
//! | commands to PDUs, PDUs to responses; sans-IO | [`queue`], [`receive`] |
//! | what one `sendmsg` carries | [`batch`] |
//! | the socket's operations | [`connection`] |

pub(crate) mod batch;
pub(super) mod connection;
mod order;
mod queue;
mod receive;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_nvme::Qid;
use flexblk_nvme::tcp::Digests;
use flexblk_reactor::{SharedMemory, Span, Wait, Waker};

use self::connection::Connection;
use self::queue::{Kind, Queue};
use super::home::{self, SharedHome};
use super::open::OpenArgs;
use super::{Data, Link, LinkEvent, MemoryKey, PostRefused, Posted};
use crate::{ConnectOptions, Error, LostReason, TransportCounters};

/// How long the end of a connection waits for the kernel to let go of memory; and once more after everything was
/// cancelled.
const LET_GO_WITHIN: Duration = Duration::from_secs(1);
/// Nothing has to be registered with a socket.
const NO_KEY: MemoryKey = MemoryKey {
    local: 0,
    remote: 0,
};

/// A queue over a TCP connection.
pub(crate) struct TcpLink {
    home: SharedHome,
    /// Its connection's number in `home`; `None` once closed.
    index: Option<usize>,
    /// As they were when it was closed.
    counters: TransportCounters,
}

impl TcpLink {
    /// Connects, and agrees on digests and limits; Fabrics Connect comes next.
    pub(crate) fn connect(args: &OpenArgs<'_>) -> Result<TcpLink, Error> {
        let deadline = Instant::now() + args.options.connect_timeout;
        let mut link = Self::begin(args)?;
        loop {
            let turned = link.home.borrow_mut().turn(Wait::Until(deadline));
            turned.map_err(Error::Lost)?;
            if let Some(outcome) = link.outcome(args) {
                return outcome.map(|()| link);
            }
            if Instant::now() >= deadline {
                return Err(args.unreachable());
            }
        }
    }

    /// Starts to connect.
    pub(crate) fn begin(args: &OpenArgs<'_>) -> Result<TcpLink, Error> {
        let options = args.options;
        let wanted = wanted(options);
        let kind = if args.qid == Qid::ADMIN {
            Kind::Admin
        } else {
            Kind::Io
        };
        let queue = Queue::new(args.depth, kind, wanted)
            .map_err(|e| Error::Transport(format!("allocating a receive buffer: {e}")))?;
        let shared = home::of_this_thread(options)?;
        let index = {
            let home = &mut *shared.borrow_mut();
            let index = home.free_connection();
            let mut connection = Connection::new(
                index,
                args.address,
                options.host_traddr,
                options.ack_timeout,
                queue,
            )
            .map_err(|cause| Error::System {
                what: "making a TCP socket",
                cause,
            })?;
            connection.connect(home.reactor());
            home.add_connection(index, connection);
            index
        };
        Ok(TcpLink {
            home: shared,
            index: Some(index),
            counters: TransportCounters::default(),
        })
    }

    /// How the attempt to connect ended, once it has.
    pub(crate) fn outcome(&mut self, args: &OpenArgs<'_>) -> Option<Result<(), Error>> {
        let refused = |reason: String| {
            Some(Err(Error::Refused {
                address: args.address,
                reason,
            }))
        };
        let mut home = self.home.borrow_mut();
        let Some(connection) = self.index.and_then(|index| home.connection(index)) else {
            return Some(Err(Error::Lost(LostReason::Closed)));
        };
        if let Some(error) = connection.take_connect_error() {
            return Some(Err(not_connected(args, &error)));
        }
        if let Some(established) = connection.queue.established() {
            let missing = wanted(args.options) - established.digests;
            return match missing.iter_names().next() {
                None => Some(Ok(())),
                Some(("HEADER", _)) => {
                    refused("it has no header digests: connect without hdr_digest".into())
                }
                Some(_) => refused("it has no data digests: connect without data_digest".into()),
            };
        }
        match connection.lost() {
            None => None,
            Some(LostReason::Protocol) => refused("what answers does not speak NVMe/TCP".into()),
            Some(reason) => refused(format!(
                "{reason} during connection set-up: is it an NVMe/TCP port?"
            )),
        }
    }
}

/// Digests that the options ask for.
fn wanted(options: &ConnectOptions) -> Digests {
    let mut wanted = Digests::empty();
    wanted.set(Digests::HEADER, options.hdr_digest);
    wanted.set(Digests::DATA, options.data_digest);
    wanted
}

/// Why there is no connection, and what to look at.
fn not_connected(args: &OpenArgs<'_>, error: &std::io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => Error::Refused {
            address: args.address,
            reason: format!(
                "nothing listens on TCP port {}: check trsvcid, and that the target has a tcp listener",
                args.address.port()
            ),
        },
        Some(libc::ETIMEDOUT) => args.unreachable(),
        _ => Error::Refused {
            address: args.address,
            reason: error.to_string(),
        },
    }
}

impl Link for TcpLink {
    fn now(&self) -> Instant {
        self.home.borrow().now()
    }

    fn waker(&self) -> Option<Waker> {
        Some(self.home.borrow_mut().reactor().waker())
    }

    fn register(&mut self, _memory: Span) -> Result<Option<MemoryKey>, Error> {
        Ok(Some(NO_KEY))
    }

    fn register_memory(&mut self, _memory: &Arc<SharedMemory>) -> Result<MemoryKey, Error> {
        Ok(NO_KEY)
    }

    fn unregister(&mut self, _key: MemoryKey) -> Result<(), Error> {
        Ok(())
    }

    #[inline]
    fn post(
        &mut self,
        cid: u16,
        sqe: &mut [u8; 64],
        data: Data<'_>,
    ) -> Result<Posted, PostRefused> {
        let mut home = self.home.borrow_mut();
        let connection = self
            .index
            .and_then(|index| home.connection(index))
            .ok_or(PostRefused::Lost(LostReason::Closed))?;
        if let Some(reason) = connection.lost() {
            return Err(PostRefused::Lost(reason));
        }
        // A response is held back until the kernel has all of its command, so no buffer outlives it.
        connection.queue.post(cid, sqe, data)?;
        Ok(Posted::Free)
    }

    #[inline]
    fn turn(&mut self, wait: Wait, events: &mut Vec<LinkEvent>) -> Result<(), LostReason> {
        let index = self.index.ok_or(LostReason::Closed)?;
        let mut home = self.home.borrow_mut();
        // What is there already, because another link turned, is not to be slept on.
        let ready = home
            .connection(index)
            .is_none_or(|connection| connection.queue.has_events() || connection.lost().is_some());
        home.turn(if ready { Wait::Poll } else { wait })?;
        drop(home);
        self.collect(events)
    }

    #[inline]
    fn collect(&mut self, events: &mut Vec<LinkEvent>) -> Result<(), LostReason> {
        let index = self.index.ok_or(LostReason::Closed)?;
        let mut home = self.home.borrow_mut();
        let connection = home.connection(index).ok_or(LostReason::Closed)?;
        connection.queue.take_events(events);
        connection.lost().map_or(Ok(()), Err)
    }

    fn set_controller_in_capsule_bytes(&mut self, bytes: u32) {
        if let Some(index) = self.index
            && let Some(connection) = self.home.borrow_mut().connection(index)
        {
            connection.queue.set_in_capsule_bytes(bytes);
        }
    }

    fn pause(&mut self) {
        // The kernel acknowledges by itself; only what was posted is to leave.
        if self.index.is_some() {
            // A failing reactor shows at the next turn.
            let _ = self.home.borrow_mut().turn(Wait::Poll);
        }
    }

    fn close(&mut self, _until: Instant) {
        let Some(index) = self.index.take() else {
            return;
        };
        let mut home = self.home.borrow_mut();
        if let Some(connection) = home.connection(index) {
            self.counters.tcp = connection.queue.counters();
            connection.shut_down();
        }
        // The kernel may still write into buffers of reads and read those of writes.
        let mut give_up = Instant::now() + LET_GO_WITHIN;
        let mut cancelled = false;
        while home.connection(index).is_some_and(|c| c.is_busy()) {
            if Instant::now() >= give_up {
                if cancelled {
                    tracing::warn!("the kernel does not let go of a connection's memory");
                    break;
                }
                cancelled = true;
                home.cancel_connection(index);
                give_up = Instant::now() + LET_GO_WITHIN;
            }
            if home.turn(Wait::Until(give_up)).is_err() {
                break;
            }
        }
        home.remove_connection(index);
    }

    fn counters(&self) -> TransportCounters {
        match self.index {
            Some(index) => TransportCounters {
                tcp: self
                    .home
                    .borrow_mut()
                    .connection(index)
                    .map_or_else(Default::default, |connection| connection.queue.counters()),
                ..TransportCounters::default()
            },
            None => self.counters,
        }
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        let now = self.now();
        self.close(now);
    }
}
