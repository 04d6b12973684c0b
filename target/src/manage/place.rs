//! Where control threads run: off the data threads' cores when there are others, ahead of them when
//! not.

use flexblk_reactor::affinity;
use rustix::thread::{CpuSet, sched_setaffinity};

/// Priority of control threads: they run for microseconds, and a data thread that polls must not
/// keep them waiting.
const NICE: i32 = -10;

/// Places the calling thread. What cannot be had (one core only, no privilege) is done without.
pub(crate) fn control_thread(busy_cores: &[usize]) {
    let allowed = affinity::allowed_cores().unwrap_or_default();
    let free = allowed.iter().filter(|core| !busy_cores.contains(core));
    let mut set = CpuSet::new();
    let mut any = false;
    for core in free.filter(|core| **core < CpuSet::MAX_CPU) {
        set.set(*core);
        any = true;
    }
    if any && let Err(error) = sched_setaffinity(None, &set) {
        tracing::debug!(%error, "a control thread stays on the cores that it has");
    }
    // On Linux a thread's own number is a process to setpriority; raising it needs CAP_SYS_NICE.
    let thread = rustix::thread::gettid();
    if let Err(error) = rustix::process::setpriority_process(Some(thread), NICE) {
        tracing::debug!(%error, "a control thread keeps its priority");
    }
}
