//! Management while the target runs: JSON-RPC 2.0 on a Unix socket, with the names, parameters and
//! results of SPDK's methods where they mean the same, so that its `rpc.py` drives this target too.
//!
//! It has threads of its own, off the data threads' cores if there are others. What it changes goes
//! through [`Target`], which puts a new snapshot in force. A request waits on data threads for
//! their counters, queue pairs and captures only, and until a change of write protection is in force, with a limit each.

mod apply;
mod cores;
mod framing;
mod http;
mod jsonrpc;
mod log;
mod methods;
mod openmetrics;
mod params;
mod place;
mod rpc;
mod save;
mod server;
mod socket;
mod state_file;

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use flexblk_rpc::DEFAULT_SOCKET as DEFAULT_RPC_SOCKET;
pub use log::{LogControl, LogLevel};
pub use socket::SocketError;
pub use state_file::StateError;

use crate::target::Target;
use methods::Context;
use rpc::Rpc;
use server::{Limits, Server};
use socket::RpcSocket;

/// RPC clients at a time; one more takes the place of the one that was idle for longest.
const MAX_CLIENTS: usize = 1024;
/// Longest request.
const MAX_REQUEST_BYTES: usize = 4 << 20;
/// Bytes of all requests that have not arrived whole.
const MAX_PENDING_BYTES: usize = 64 << 20;
/// How long a request may take until its client is told that it takes longer.
const RUN_TIME: Duration = Duration::from_secs(30);
/// How long a client may take for the rest of a request, or for reading an answer.
const TRANSFER_TIME: Duration = Duration::from_secs(30);

/// Clients of the metrics at a time, and how long each may take.
const MAX_SCRAPERS: usize = 64;
const SCRAPE_TIME: Duration = Duration::from_secs(10);

/// What management needs of the program around it.
#[derive(Default)]
pub struct Options {
    /// Path of the RPC socket.
    pub rpc_socket: Option<PathBuf>,
    /// Changes what is logged.
    pub log: Option<Arc<LogControl>>,
    /// Keeps what runs in this file, and restores it from there when it exists: start the target
    /// without anything then.
    pub state_file: Option<PathBuf>,
    /// Where metrics are scraped from, over HTTP.
    pub metrics: Option<SocketAddr>,
    /// Sends the program a signal, for `spdk_kill_instance`.
    pub signal: Option<Box<dyn Fn(i32) + Send + Sync>>,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("rpc_socket", &self.rpc_socket)
            .finish_non_exhaustive()
    }
}

/// Why management does not start.
#[derive(Debug, thiserror::Error)]
pub enum ManagementError {
    /// The RPC socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The state file.
    #[error(transparent)]
    State(#[from] StateError),
    /// The address for metrics.
    #[error("metrics cannot be served at {address}: {source}; give another address with --metrics")]
    Metrics {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// A thread, or what it needs.
    #[error("the management server cannot be started: {0}")]
    Server(#[source] std::io::Error),
}

/// The running servers. Dropping it stops them and removes the socket.
pub struct Management {
    rpc: Option<(Server, RpcSocket)>,
    metrics: Option<(Server, SocketAddr)>,
}

impl std::fmt::Debug for Management {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Management")
            .field("rpc_socket", &self.rpc_socket())
            .finish_non_exhaustive()
    }
}

impl Management {
    /// Starts what `options` ask for.
    pub fn start(target: &Arc<Target>, options: Options) -> Result<Self, ManagementError> {
        let cores = target.config().cores.clone();
        let context = Context {
            target: Arc::clone(target),
            log: options.log,
            signal: options.signal,
            state_file: options.state_file,
            core_times: cores::times(),
        };
        if let Some(path) = &context.state_file
            && path.exists()
        {
            state_file::restore(&context, path)?;
            tracing::info!(path = %path.display(), "what ran before is restored");
        }
        let mut rpc = None;
        if let Some(path) = &options.rpc_socket {
            let (socket, listener) = RpcSocket::bind(path)?;
            let limits = Limits {
                clients: MAX_CLIENTS,
                request_bytes: MAX_REQUEST_BYTES,
                pending_bytes: MAX_PENDING_BYTES,
                run_time: RUN_TIME,
                transfer_time: TRANSFER_TIME,
                idle_time: None,
            };
            let protocol = Arc::new(Rpc::new(context, limits.request_bytes));
            let server = Server::start("rpc", listener, protocol, limits, &cores)
                .map_err(ManagementError::Server)?;
            rpc = Some((server, socket));
        }
        let metrics = match options.metrics {
            Some(address) => Some(serve_metrics(target, address, &cores)?),
            None => None,
        };
        Ok(Self { rpc, metrics })
    }

    /// Where metrics are served.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics.as_ref().map(|(_, address)| *address)
    }

    /// Path of the RPC socket.
    #[must_use]
    pub fn rpc_socket(&self) -> Option<&Path> {
        self.rpc.as_ref().map(|(_, socket)| socket.path())
    }
}

fn serve_metrics(
    target: &Arc<Target>,
    address: SocketAddr,
    cores: &[usize],
) -> Result<(Server, SocketAddr), ManagementError> {
    let failed = |source| ManagementError::Metrics { address, source };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    let limits = Limits {
        clients: MAX_SCRAPERS,
        request_bytes: http::MAX_HEAD_BYTES,
        pending_bytes: MAX_SCRAPERS * http::MAX_HEAD_BYTES * 2,
        run_time: SCRAPE_TIME,
        transfer_time: SCRAPE_TIME,
        idle_time: Some(SCRAPE_TIME),
    };
    let protocol = Arc::new(http::Http {
        target: Arc::clone(target),
    });
    let server = Server::start("metrics", listener.into(), protocol, limits, cores);
    Ok((server.map_err(failed)?, bound))
}

impl Drop for Management {
    fn drop(&mut self) {
        if let Some((mut server, socket)) = self.rpc.take() {
            // Nobody finds it any more while the last requests end.
            drop(socket);
            server.stop();
        }
    }
}
