//! A thread that serves a volume to the host.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use flexblk_reactor::{Reactor, Waker, affinity};

use crate::link::guest::Guest;
use crate::volume::{Channel, Volume};
use crate::{Error, IoCompletion};

/// How long a turn sleeps at most. Nothing depends on it: whoever wants something wakes the thread.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// How long a server that was told to stop may take to hand out what is under way.
const GRACE: Duration = Duration::from_secs(1);

/// One side of an export: what the host asks for, as a state machine on a worker's reactor. [`Guest`] is its part
/// inside of a turn, where it must not touch the channel; this is its part between two turns.
pub(crate) trait Server: Guest + 'static {
    /// Submits the first operations; `owner` is the owner number for its tokens.
    fn start(&mut self, owner: u8, reactor: &mut Reactor) -> Result<(), Error>;

    /// One of its requests to the volume has ended.
    fn on_io(&mut self, completion: &IoCompletion);

    /// After each turn: submits what the host has asked for, as far as there is room.
    fn submit(&mut self, channel: &mut Channel);

    /// The export ends: takes nothing more from the host. What is under way may still end, for a second.
    fn stop(&mut self, reactor: &mut Reactor);

    /// Nothing is under way any more, after `stop` or because the host has ended the export. Then the thread ends.
    fn is_stopped(&self) -> bool;
}

/// How a worker is made.
#[derive(Clone, Debug)]
pub(crate) struct WorkerConfig {
    /// Of the thread, at most 15 bytes.
    pub(crate) name: String,
    /// The core it is pinned to.
    pub(crate) core: Option<usize>,
    /// Requests to the target at once.
    pub(crate) depth: u16,
}

/// The handle of a running worker. Dropping it stops the thread without waiting for its end.
#[derive(Debug)]
pub(crate) struct Worker {
    name: String,
    stop: Arc<AtomicBool>,
    waker: Waker,
    /// Disconnected when the thread is over.
    alive: mpsc::Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread with a channel on `volume` and the server that `make` makes there. `make`'s second value is
    /// for the caller (the sending end of a mailbox, for example). Returns when the server has started.
    pub(crate) fn spawn<S: Server, T: Send + 'static>(
        config: &WorkerConfig,
        volume: &Volume,
        make: impl FnOnce(&mut Channel) -> Result<(S, T), Error> + Send + 'static,
    ) -> Result<(Worker, T), Error> {
        let stop = Arc::new(AtomicBool::new(false));
        let (ready, started) = mpsc::sync_channel(1);
        let (life, alive) = mpsc::sync_channel::<()>(1);
        let thread = {
            let (config, volume, stop) = (config.clone(), volume.clone(), Arc::clone(&stop));
            std::thread::Builder::new()
                .name(config.name.clone())
                .spawn(move || {
                    let _life = life;
                    match Running::start(&config, &volume, make) {
                        Ok((running, for_caller)) => {
                            // The volume's last holder shall be the channel, which knows when to end.
                            drop(volume);
                            let waker = running.channel.waker();
                            if ready.send(Ok((waker, for_caller))).is_ok() {
                                running.run(&stop);
                            }
                        }
                        Err(error) => {
                            // The caller waits for it; it cannot have gone.
                            let _ = ready.send(Err(error));
                        }
                    }
                })
                .map_err(|cause| Error::System {
                    what: "starting a thread",
                    cause,
                })?
        };
        let (waker, for_caller) = started
            .recv()
            .unwrap_or_else(|_| Err(Error::Transport("the export's thread ended early".into())))?;
        let worker = Worker {
            name: config.name.clone(),
            stop,
            waker,
            alive,
            thread: Some(thread),
        };
        Ok((worker, for_caller))
    }

    /// Whether the thread is over: it was stopped, or its server came to an end.
    pub(crate) fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Tells the thread to end, and does not wait for it.
    pub(crate) fn begin_stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Tells the thread to end, and waits for it, at most `within`. True when it is over. A dead target takes up to
    /// about four seconds: one for what is under way, the rest for the kernel to let go of memory.
    pub(crate) fn stop(mut self, within: Duration) -> bool {
        self.begin_stop();
        let over = matches!(
            self.alive.recv_timeout(within),
            Err(mpsc::RecvTimeoutError::Disconnected)
        );
        if let (true, Some(thread)) = (over, self.thread.take()) {
            // A panic was reported by its hook already.
            let _ = thread.join();
        } else {
            tracing::warn!(name = self.name, ?within, "an export's thread does not end");
        }
        over
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.begin_stop();
    }
}

/// The thread's own view.
struct Running<S: Server> {
    channel: Channel,
    server: Rc<RefCell<S>>,
    owner: u8,
    completions: Vec<IoCompletion>,
}

impl<S: Server> Running<S> {
    fn start<T>(
        config: &WorkerConfig,
        volume: &Volume,
        make: impl FnOnce(&mut Channel) -> Result<(S, T), Error>,
    ) -> Result<(Running<S>, T), Error> {
        if let Some(core) = config.core {
            affinity::pin_current_thread(core).map_err(|e| Error::Option {
                name: "cores".into(),
                reason: e.to_string(),
            })?;
        }
        let mut channel = volume.channel(config.depth)?;
        let (server, for_caller) = make(&mut channel)?;
        let server = Rc::new(RefCell::new(server));
        let owner = channel.add_guest(server.clone())?;
        let mut running = Running {
            completions: Vec::with_capacity(usize::from(config.depth)),
            channel,
            server,
            owner,
        };
        let Running {
            channel, server, ..
        } = &mut running;
        channel.with_reactor(|reactor| server.borrow_mut().start(owner, reactor))?;
        Ok((running, for_caller))
    }

    fn run(mut self, stop: &AtomicBool) {
        // What the server wants before anything has happened.
        self.server.borrow_mut().submit(&mut self.channel);
        while !stop.load(Ordering::Acquire) {
            let until = self.channel.now() + LONGEST_SLEEP;
            self.turn(until);
            if self.server.borrow().is_stopped() {
                return;
            }
        }
        let Running {
            channel, server, ..
        } = &mut self;
        channel.with_reactor(|reactor| server.borrow_mut().stop(reactor));
        let deadline = Instant::now() + GRACE;
        while !self.server.borrow().is_stopped() && Instant::now() < deadline {
            self.turn(deadline);
        }
    }

    #[inline]
    fn turn(&mut self, until: Instant) {
        self.channel.turn(Some(until), &mut self.completions);
        let mut server = self.server.borrow_mut();
        for completion in self.completions.drain(..) {
            server.on_io(&completion);
        }
        server.submit(&mut self.channel);
    }
}

impl<S: Server> Drop for Running<S> {
    /// The kernel may still use what the server owns: it goes with the reactor, and that with the channel.
    fn drop(&mut self) {
        self.channel.remove_guest(self.owner);
        let server = self.server.clone();
        self.channel
            .with_reactor(|reactor| reactor.keeper().keep(Box::new(server)));
    }
}

#[cfg(test)]
mod tests;
