//! What a process needs that serves a block device of its own host.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;

/// `PR_SET_IO_FLUSHER` (Linux 5.6).
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Makes the calling process, and threads that it starts from now on, one that memory pressure cannot deadlock: the
/// kernel writes dirty pages to our block device in order to free memory, and waits for us.
///
/// - `PR_SET_IO_FLUSHER`: our own allocations do not wait for that write-back.
/// - `mlockall`: what we have touched is never swapped out, perhaps to our own device. Memory becomes resident when it
///   is touched, not before.
/// - `oom_score_adj`: who is killed to free memory is not the one whom everybody waits for.
///
/// Returns what could not be done, and why; the device works all the same, less safely.
pub fn guard_against_memory_pressure() -> Vec<String> {
    let mut failed = Vec::new();
    let mut note = |what: &str, error: io::Error| failed.push(format!("{what}: {error}"));
    // SAFETY: no pointer is passed.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        note(
            "PR_SET_IO_FLUSHER (needs CAP_SYS_RESOURCE)",
            io::Error::last_os_error(),
        );
    }
    // SAFETY: changes no memory, only whether it is swapped out.
    if unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) } != 0 {
        note(
            "mlockall (needs CAP_IPC_LOCK or a higher limit)",
            io::Error::last_os_error(),
        );
    }
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        note("oom_score_adj (needs CAP_SYS_RESOURCE)", error);
    }
    failed
}

/// From now on, standard output and standard error go to `file`: whoever started us may go, with terminal and pipes.
pub fn redirect_output(file: &File) -> io::Result<()> {
    for stream in [1, 2] {
        // SAFETY: replaces a standard stream as a whole; nobody holds it as an owned descriptor.
        if unsafe { libc::dup2(file.as_raw_fd(), stream) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
