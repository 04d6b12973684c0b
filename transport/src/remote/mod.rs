//! Mode `thread`: an engine on a thread of its own, and clients on the application's threads.
//!
//! [`spawn`] starts the engine thread; [`EngineThread::client`] makes a [`Client`] for each
//! application thread. Work requests and completions travel through two [pipes](crate::pipe); the
//! rest (registering memory, connecting) through the thread's mailbox, and blocks with a deadline.
//! When the engine thread ends, whatever the reason, every request that a client has outstanding
//! completes with [`WcStatus::WrFlushErr`](crate::verbs::WcStatus::WrFlushErr) and every call fails
//! with [`RemoteError::EngineGone`]: nothing hangs.

mod client;
mod codec;
mod control;
mod engine_thread;
mod tenant;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use flexblk_reactor::mailbox;

pub use client::{Client, Connected, Listener, PostFailure};
pub use codec::INLINE_MAX_BYTES;
pub use control::{ClientEvent, EngineCounters, Incoming, QueuePairConfig};

use crate::cm::{PrivateData, RejectReason};
use crate::endpoint::{EndpointConfig, EndpointError};
use crate::engine::ConnectError;
use crate::verbs::VerbsError;
use control::Control;

/// How an engine thread runs.
#[derive(Clone, Copy, Debug)]
pub struct ThreadConfig {
    /// Name of the thread (15 bytes are shown).
    pub name: &'static str,
    /// Core that the thread is pinned to.
    pub core: Option<usize>,
    /// How long it polls after the last activity before it sleeps.
    pub poll_budget: Duration,
    /// Clients at a time.
    pub max_clients: usize,
    /// How long control calls wait for the engine thread (connecting has a deadline of its own).
    pub control_timeout: Duration,
}

impl Default for ThreadConfig {
    fn default() -> Self {
        Self {
            name: "flexins-engine",
            core: None,
            poll_budget: Duration::from_micros(100),
            max_clients: 64,
            control_timeout: Duration::from_secs(10),
        }
    }
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The thread could not be started.
    #[error("cannot start the engine thread")]
    Spawn(#[source] std::io::Error),
    /// Its reactor could not be made.
    #[error("cannot start the engine thread's reactor")]
    Reactor(#[source] flexblk_reactor::Error),
    /// Its endpoint could not be made.
    #[error("cannot start the engine thread's endpoint")]
    Endpoint(#[source] EndpointError),
    /// The engine thread has ended.
    #[error("the engine thread is gone")]
    EngineGone,
    /// The engine thread did not answer in time.
    #[error("the engine thread did not answer within {0:?}")]
    Timeout(Duration),
    /// The engine thread's mailbox is full.
    #[error("the engine thread is busy: its mailbox is full")]
    Busy,
    /// [`ThreadConfig::max_clients`] exist.
    #[error("too many clients on one engine thread")]
    TooManyClients,
    /// The shared memory of the pipes could not be made.
    #[error("cannot make the pipes of a client")]
    Pipe(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The engine refused.
    #[error(transparent)]
    Verbs(#[from] VerbsError),
    /// The engine refused to connect.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The peer refused the connection.
    #[error("the peer refused the connection: {reason:?}")]
    Rejected {
        /// Why, in the connection manager's words.
        reason: RejectReason,
        /// What else the peer said.
        private: Box<PrivateData>,
    },
    /// The peer did not answer.
    #[error("the peer does not answer")]
    Unreachable,
    /// Somebody listens to the service already.
    #[error("the service is already listened to")]
    ServiceInUse,
}

/// An engine thread. Dropping it stops the thread and waits for it, at most
/// [`ThreadConfig::control_timeout`].
#[derive(Debug)]
pub struct EngineThread {
    control: mailbox::Sender<Control>,
    config: ThreadConfig,
    local_addr: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

/// Starts a thread with its own reactor and endpoint.
pub fn spawn(endpoint: EndpointConfig, config: ThreadConfig) -> Result<EngineThread, RemoteError> {
    let (started_tx, started_rx) = mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(config.name.to_owned())
        .spawn(move || engine_thread::run(&endpoint, &config, &started_tx))
        .map_err(RemoteError::Spawn)?;
    let (control, local_addr) = started_rx.recv().map_err(|_| RemoteError::EngineGone)??;
    Ok(EngineThread {
        control,
        config,
        local_addr,
        thread: Some(thread),
    })
}

impl EngineThread {
    /// A client whose work-request and completion pipes have `entries` entries each (rounded up to
    /// a power of two): so many requests it can have outstanding.
    pub fn client(&self, entries: u32) -> Result<Client, RemoteError> {
        Client::new(self.control.clone(), self.config.control_timeout, entries)
    }

    /// Address of its UDP port.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Whether the thread runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
    }

    #[cfg(test)]
    fn crash(&self) {
        let _ = self.control.try_send(Control::Crash);
    }
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        let give_up = Instant::now() + self.config.control_timeout;
        let mut told = false;
        while self.is_alive() && Instant::now() < give_up {
            // A full mailbox empties as long as the thread does its work.
            told = told || self.control.try_send(Control::Stop).is_ok();
            std::thread::sleep(Duration::from_micros(200));
        }
        if self.is_alive() {
            tracing::error!(
                name = self.config.name,
                "engine thread does not stop: left alone"
            );
        } else if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported by its hook, and to clients as "gone".
            let _ = thread.join();
        }
    }
}
