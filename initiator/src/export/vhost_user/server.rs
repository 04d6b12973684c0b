//! The socket, the threads, and what happens to the volume meanwhile.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use flexblk_reactor::Waker;

use super::block::Device;
use super::session::{Session, SessionError};
use super::socket::{Socket, SocketError, wait_readable};
use super::worker::{Order, Worker};
use crate::volume::{Volume, VolumeEvent};
use crate::{Error, Namespace};

/// How often the server looks whether it should end and whether the namespace is still the same.
const TICK: Duration = Duration::from_millis(200);

/// How a volume is served.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where front-ends connect. What is left of a socket there is replaced.
    pub socket: PathBuf,
    /// Queues that a guest may use, 1 to 64.
    pub queues: u16,
    /// Threads that they are distributed over, 1 to `queues`.
    pub threads: u16,
}

/// Why serving ends.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Options that cannot be.
    #[error("{0}")]
    Options(&'static str),
    /// The socket.
    #[error("{}: {source}", .path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("starting a thread: {0}")]
    Thread(io::Error),
    /// The volume.
    #[error(transparent)]
    Volume(#[from] Error),
    /// There is no path left, and there will be none.
    #[error("the namespace is lost")]
    Lost,
}

/// Serves `volume` to one front-end after the other until `stop` is set. `ready` is called when front-ends can connect.
pub fn serve(
    volume: &Volume,
    options: &Options,
    stop: &AtomicBool,
    ready: impl FnOnce(),
) -> Result<(), ServeError> {
    if options.queues == 0 || options.queues > 64 {
        return Err(ServeError::Options("a device has 1 to 64 queues"));
    }
    if options.threads == 0 || options.threads > options.queues {
        return Err(ServeError::Options(
            "there are 1 thread to as many as queues",
        ));
    }
    let mut namespace = volume.namespace()?;
    if namespace.block_size < 512 {
        return Err(ServeError::Options(
            "a block device has blocks of at least 512 bytes",
        ));
    }
    let workers = Workers::start(volume, &namespace, options)?;
    let listener = Listener::bind(&options.socket)?;
    ready();
    while !stop.load(Ordering::Relaxed) {
        let failed = |source| listener.failed(source);
        if wait_readable(listener.listener.as_fd(), TICK).map_err(failed)? {
            let (stream, _) = listener.listener.accept().map_err(failed)?;
            let device = Device::new(&namespace, options.queues);
            let session = attend(volume, &workers, device, stream, stop);
            match session {
                Ok(()) => {}
                Err(Ended::Session(error)) => tracing::info!(%error, "the front-end is gone"),
                Err(Ended::Serve(error)) => return Err(error),
            }
        }
        follow(volume, |_| Ok(()))?;
        namespace = volume.namespace()?;
        workers.check()?;
    }
    Ok(())
}

enum Ended {
    Session(SessionError),
    Serve(ServeError),
}

/// One front-end, until it goes or we do.
fn attend(
    volume: &Volume,
    workers: &Workers,
    device: Device,
    stream: UnixStream,
    stop: &AtomicBool,
) -> Result<(), Ended> {
    let gone = |error: SessionError| match error {
        // Its thread is about to end, if it has not yet.
        SessionError::Worker => Ended::Serve(workers.wait()),
        error => Ended::Session(error),
    };
    let socket = Socket::new(stream).map_err(|error| gone(SocketError::Io(error).into()))?;
    tracing::info!("a front-end has connected");
    let mut session = Session::new(socket, workers, device);
    let mut run = || -> Result<(), Ended> {
        while !stop.load(Ordering::Relaxed) {
            let ready = session.socket().ready(TICK);
            if ready.map_err(|error| gone(SocketError::Io(error).into()))? {
                session.step().map_err(gone)?;
            }
            follow(volume, |namespace| {
                session
                    .namespace_changed(namespace)
                    .map_err(|_| ServeError::Lost)
            })
            .map_err(Ended::Serve)?;
            workers.check().map_err(Ended::Serve)?;
        }
        Ok(())
    };
    let ran = run();
    // Whoever comes next finds nothing of this one. What is under way ends, or is done again by whoever comes next.
    session.end().map_err(gone)?;
    ran
}

/// What has happened to the volume.
fn follow(
    volume: &Volume,
    mut changed: impl FnMut(&Namespace) -> Result<(), ServeError>,
) -> Result<(), ServeError> {
    while let Some(event) = volume.next_event(Duration::ZERO) {
        match event {
            VolumeEvent::NamespaceChanged => changed(&volume.namespace()?)?,
            VolumeEvent::Lost => return Err(ServeError::Lost),
            // Requests wait or take another path.
            VolumeEvent::PathUp { .. } | VolumeEvent::PathDown { .. } => {}
        }
    }
    Ok(())
}

/// A socket in the file system, as long as we listen.
struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    fn bind(path: &Path) -> Result<Listener, ServeError> {
        let failed = |source| ServeError::Socket {
            path: path.to_owned(),
            source,
        };
        // A socket that nobody listens on is of somebody who died.
        let is_socket =
            std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
        if is_socket {
            if UnixStream::connect(path).is_ok() {
                return Err(failed(io::ErrorKind::AddrInUse.into()));
            }
            std::fs::remove_file(path).map_err(failed)?;
        }
        Ok(Listener {
            listener: UnixListener::bind(path).map_err(failed)?,
            path: path.to_owned(),
        })
    }

    fn failed(&self, source: io::Error) -> ServeError {
        ServeError::Socket {
            path: self.path.clone(),
            source,
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The threads.
pub(crate) struct Workers {
    workers: Vec<Handle>,
    queues: usize,
}

struct Handle {
    orders: Option<Sender<Order>>,
    waker: Waker,
    thread: Mutex<Option<JoinHandle<Result<(), Error>>>>,
}

impl Workers {
    fn start(
        volume: &Volume,
        namespace: &Namespace,
        options: &Options,
    ) -> Result<Workers, ServeError> {
        let mut workers = Vec::new();
        for index in 0..options.threads {
            let (orders, inbox) = channel();
            let (started, result) = channel();
            let volume = volume.clone();
            let device = Device::new(namespace, options.queues);
            let queues = usize::from(options.queues);
            let thread = std::thread::Builder::new()
                .name(format!("vhost-user {index}"))
                .spawn(move || {
                    let mut worker = match Worker::new(&volume, device, queues, inbox) {
                        Ok(worker) => worker,
                        Err(error) => {
                            let _ = started.send(Err(error));
                            return Ok(());
                        }
                    };
                    let _ = started.send(Ok(worker.waker()));
                    worker.run()
                })
                .map_err(ServeError::Thread)?;
            let waker = result.recv().map_err(|_| ServeError::Lost)??;
            workers.push(Handle {
                orders: Some(orders),
                waker,
                thread: Mutex::new(Some(thread)),
            });
        }
        Ok(Workers {
            workers,
            queues: usize::from(options.queues),
        })
    }

    /// Without threads: whoever has the other ends of `orders` is the workers.
    #[cfg(test)]
    pub(crate) fn played(queues: usize, orders: Vec<Sender<Order>>, waker: &Waker) -> Workers {
        let handle = |orders| Handle {
            orders: Some(orders),
            waker: waker.clone(),
            thread: Mutex::new(None),
        };
        Workers {
            workers: orders.into_iter().map(handle).collect(),
            queues,
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.workers.len()
    }

    pub(crate) fn queues(&self) -> usize {
        self.queues
    }

    /// To the worker of a queue, or to a worker by its own number.
    pub(crate) fn send(&self, queue: usize, order: Order) -> Result<(), SessionError> {
        let worker = self.workers.get(queue % self.workers.len().max(1));
        let worker = worker.ok_or(SessionError::Worker)?;
        let orders = worker.orders.as_ref().ok_or(SessionError::Worker)?;
        orders.send(order).map_err(|_| SessionError::Worker)?;
        worker.waker.wake();
        Ok(())
    }

    /// The error of a thread that ends.
    fn wait(&self) -> ServeError {
        for _ in 0..100 {
            if let Err(error) = self.check() {
                return error;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        ServeError::Lost
    }

    /// An error when a thread has ended.
    fn check(&self) -> Result<(), ServeError> {
        for worker in &self.workers {
            let mut thread = worker.thread();
            if !thread.as_ref().is_none_or(JoinHandle::is_finished) {
                continue;
            }
            return match thread.take().map(JoinHandle::join) {
                Some(Ok(Err(error))) => Err(error.into()),
                _ => Err(ServeError::Lost),
            };
        }
        Ok(())
    }
}

impl Handle {
    fn thread(&self) -> std::sync::MutexGuard<'_, Option<JoinHandle<Result<(), Error>>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            worker.orders = None;
            worker.waker.wake();
        }
        for worker in &self.workers {
            let thread = worker.thread().take();
            if let Some(Ok(Err(error))) = thread.map(JoinHandle::join) {
                tracing::error!(%error, "a worker thread ended");
            }
        }
    }
}
