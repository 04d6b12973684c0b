//! A volume for NBD clients (the kernel's, qemu, libnbd), over a Unix socket or TCP.
//!
//! ```text
//! acceptor thread --fd--> the worker with the fewest clients
//! worker: receive -> protocol -> Requests -> volume -> replies -> one sendmsg of what is ready
//! ```
//!
//! | part | where |
//! |---|---|
//! | the protocol, without I/O | [`protocol`] |
//! | one client's socket: what is received where, what is sent from where | `connection.rs` |
//! | a worker's clients, and what they share: buffers, requests | `server.rs`, `shared.rs` |
//! | the socket that clients connect to | `listen.rs` |
//!
//! What clients can take is bounded: I/O buffers by [`NbdOptions::buffer_bytes`] for a worker, of which one client has
//! half at most; 256 requests and about 100 KiB for a client; 256 clients for a worker. Who has not negotiated within a
//! minute is closed. While others wait for buffers, a client that holds some and neither reads its replies nor sends
//! the payload that it has announced is closed after 10 seconds.

mod connection;
mod listen;
pub mod protocol;
mod server;
mod shared;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use super::{Geometry, Worker, WorkerConfig};
use crate::volume::Volume;
use crate::{Error, Namespace};

pub use listen::NbdAddress;
use listen::{Acceptor, Door};
use protocol::Export;
use server::NbdServer;

/// Requests of one worker to the target at once.
const DEPTH: u16 = 128;
/// The smallest pool that serves any request.
const MIN_BUFFER_BYTES: u64 = protocol::MAX_PAYLOAD_BYTES as u64;

/// How a volume is offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdOptions {
    /// Name of the export; clients that name none get it, too.
    pub name: String,
    /// Offer it without the requests that change anything.
    pub read_only: bool,
    /// Worker threads, each with a queue pair; a client belongs to one.
    pub threads: u16,
    /// The cores they are pinned to, in turn; empty: not pinned.
    pub cores: Vec<usize>,
    /// I/O buffers of one worker, at least 32 MiB. Memory is taken as far as it is used.
    pub buffer_bytes: u64,
}

impl Default for NbdOptions {
    fn default() -> Self {
        NbdOptions {
            name: String::new(),
            read_only: false,
            threads: 1,
            cores: Vec::new(),
            buffer_bytes: 64 << 20,
        }
    }
}

/// A volume that NBD clients can use. Dropping it ends it, without waiting.
#[derive(Debug)]
pub struct NbdExport {
    acceptor: Acceptor,
    workers: Vec<Worker>,
}

impl NbdExport {
    /// Starts to serve. The namespace's size and attributes are looked up for each client that connects: one that has
    /// grown is larger for the next client.
    ///
    /// # Errors
    /// An address in use, a name that is too long, a block size that NBD has no words for, or what opening a channel
    /// on the volume says.
    pub fn start(
        volume: &Volume,
        address: &NbdAddress,
        options: &NbdOptions,
    ) -> Result<NbdExport, Error> {
        if options.name.len() > 4096 {
            return Err(Error::Option {
                name: "name".into(),
                reason: "an NBD export name has at most 4096 bytes".into(),
            });
        }
        let geometry = geometry_of(&volume.namespace()?)?;
        let door = Door::open(address)?;
        let mut workers = Vec::new();
        let mut doors = Vec::new();
        for index in 0..options.threads.max(1) {
            let cores = options.cores.len().max(1);
            let config = WorkerConfig {
                name: format!("nbd{index}"),
                core: options.cores.get(usize::from(index) % cores).copied(),
                depth: DEPTH,
            };
            let clients = Arc::new(AtomicUsize::new(0));
            let buffer_bytes = options.buffer_bytes.max(MIN_BUFFER_BYTES);
            let count = Arc::clone(&clients);
            let (worker, mail) = Worker::spawn(&config, volume, move |channel| {
                NbdServer::new(channel, &geometry, buffer_bytes, count)
            })?;
            workers.push(worker);
            doors.push((mail, clients));
        }
        let describe = {
            let (volume, options) = (volume.clone(), options.clone());
            move || describe(&volume, &options)
        };
        let acceptor = Acceptor::start(door, doors, &options.name, describe)?;
        Ok(NbdExport { acceptor, workers })
    }

    /// Where clients find it, as a URI of the NBD URI specification.
    pub fn uri(&self) -> &str {
        self.acceptor.uri()
    }

    /// Whether a thread of it has ended by itself.
    pub fn has_failed(&self) -> bool {
        self.workers.iter().any(Worker::has_ended)
    }

    /// Clients are answered what is under way (for a second), then the connections end. False when a thread is not
    /// over after `within`.
    pub fn stop(self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        drop(self.acceptor);
        self.workers.iter().for_each(Worker::begin_stop);
        let mut all_over = true;
        for worker in self.workers {
            all_over &= worker.stop(deadline.saturating_duration_since(Instant::now()));
        }
        all_over
    }
}

fn geometry_of(namespace: &Namespace) -> Result<Geometry, Error> {
    Geometry::of(namespace)
        .filter(|geometry| geometry.block_bytes <= protocol::MAX_PAYLOAD_BYTES)
        .ok_or_else(|| Error::Option {
            name: "namespace".into(),
            reason: format!(
                "NBD cannot offer a block size of {} bytes",
                namespace.block_size
            ),
        })
}

/// The export as the next client sees it.
fn describe(volume: &Volume, options: &NbdOptions) -> Result<Export, Error> {
    let namespace = volume.namespace()?;
    let geometry = geometry_of(&namespace)?;
    let read_only = options.read_only || namespace.read_only;
    let preferred = namespace.optimal_io_bytes;
    Ok(Export {
        name: options.name.clone(),
        description: format!("NVMe namespace {}", namespace.nsid),
        len_bytes: geometry.len_bytes,
        block_bytes: geometry.block_bytes,
        // proto: a power of two and at least the minimum; 4096 when nothing is known.
        preferred_bytes: if preferred.is_power_of_two() && preferred <= protocol::MAX_PAYLOAD_BYTES
        {
            preferred.max(4096).max(geometry.block_bytes)
        } else {
            geometry.block_bytes.max(4096)
        },
        read_only,
        trim: !read_only && namespace.discard,
        write_zeroes: !read_only && namespace.write_zeroes,
        cache: namespace.verify,
    })
}
