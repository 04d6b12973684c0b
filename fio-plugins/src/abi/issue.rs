//! When an I/O was issued. fio asks its clock after each I/O that it queues, unless the engine says that it does so
//! itself (`FIO_ASYNCIO_SETS_ISSUE_TIME`): then once for all I/Os that leave together, as fio's io_uring engine does.

use std::ffi::c_void;

use super::{symbol, write};
use crate::layout::{Layout, fixed};

type GetTime = unsafe extern "C" fn(*mut libc::timespec, *mut c_void);
type Queued = unsafe extern "C" fn(*mut u8, *mut u8);

/// fio's own functions for it.
#[derive(Clone, Copy)]
pub(super) struct IssueTimes {
    now: GetTime,
    /// Counts the submission latency.
    queued: Queued,
}

impl IssueTimes {
    /// `None`: this fio does it by itself.
    pub(super) fn find(layout: &Layout) -> Option<Self> {
        if layout.flags.sets_issue_time == 0 {
            return None;
        }
        let (now, queued) = (symbol(c"fio_gettime")?, symbol(c"io_u_queued")?);
        // SAFETY: fio's functions of these names have these arguments in every release of the table that has the flag.
        unsafe {
            Some(Self {
                now: std::mem::transmute::<*mut c_void, GetTime>(now.as_ptr()),
                queued: std::mem::transmute::<*mut c_void, Queued>(queued.as_ptr()),
            })
        }
    }

    /// These I/Os leave now.
    ///
    /// # Safety
    /// `td` is fio's `thread_data`, the units are its own, queued and not handed back.
    pub(super) unsafe fn stamp(self, td: *mut u8, units: impl IntoIterator<Item = *mut u8>) {
        let mut units = units.into_iter().peekable();
        if units.peek().is_none() {
            return;
        }
        let mut now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: a place for the time; the other argument is not used. Units by the caller's promise.
        unsafe {
            (self.now)(&raw mut now, std::ptr::null_mut());
            for unit in units {
                write(unit, fixed::ISSUE_TIME, now);
                (self.queued)(td, unit);
            }
        }
    }
}
