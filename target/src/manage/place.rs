//! Where control threads run: off the data threads' cores when there are others, ahead of them when
//! not.
//!
//! One system call here has no safe wrapper, so this module may say `unsafe`.
#![allow(unsafe_code)]

use flexblk_reactor::affinity;
use rustix::thread::{CpuSet, sched_setaffinity};

/// Priority of control threads: they run for microseconds, and a data thread that polls must not
/// keep them waiting. Raising it needs CAP_SYS_NICE.
const NICE: i32 = -10;
/// Time slice that control threads ask for. Since Linux 6.12 a thread with a shorter slice than the
/// running one's (3 ms) is let in at once; earlier kernels ignore it.
const SLICE_NS: u64 = 100_000;

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
    // Without the privilege the shorter slice alone.
    if let Err(error) = set_scheduling(NICE).or_else(|_| set_scheduling(0)) {
        tracing::debug!(%error, "a control thread is scheduled like any other");
    }
}

/// `struct sched_attr` of sched_setattr(2), first published size.
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}

const _: () = assert!(size_of::<SchedAttr>() == 48);

fn set_scheduling(nice: i32) -> std::io::Result<()> {
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: libc::SCHED_OTHER as u32,
        flags: 0,
        nice,
        priority: 0,
        runtime_ns: SLICE_NS,
        deadline_ns: 0,
        period_ns: 0,
    };
    let (this_thread, no_flags) = (0, 0);
    // SAFETY: the kernel reads `size` bytes of `attr`, which lives until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_setattr,
            this_thread,
            &raw const attr,
            no_flags,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
