//! CPU time and pinning of the two threads of a test.

use std::thread::{Builder, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::Context as _;

/// Pins the calling thread and says which core on failure.
pub(crate) fn pin(core: usize) -> anyhow::Result<()> {
    flexblk_reactor::affinity::pin_current_thread(core).context("see --cores")
}

/// A thread with a name, which profilers show.
pub(crate) fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    run: impl FnOnce() -> anyhow::Result<T> + Send + 'scope,
) -> ScopedJoinHandle<'scope, anyhow::Result<T>> {
    let spawned = Builder::new()
        .name(name.to_owned())
        .spawn_scoped(scope, run);
    // As `Scope::spawn`: without threads there is no test.
    spawned.unwrap_or_else(|error| panic!("cannot start a thread: {error}"))
}

/// CPU time of the calling thread since it was started, against the clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meter {
    wall: Instant,
    cpu: Duration,
}

impl Meter {
    pub(crate) fn start() -> Self {
        Self {
            wall: Instant::now(),
            cpu: thread_cpu_time(),
        }
    }

    /// Time since the start.
    pub(crate) fn elapsed(&self) -> Duration {
        self.wall.elapsed()
    }

    /// Elapsed time, and the share of a core that this thread has used.
    pub(crate) fn stop(&self) -> (Duration, f64) {
        let wall = self.wall.elapsed();
        let cpu = thread_cpu_time().saturating_sub(self.cpu);
        (wall, cpu.as_secs_f64() / wall.as_secs_f64())
    }
}

fn thread_cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}
