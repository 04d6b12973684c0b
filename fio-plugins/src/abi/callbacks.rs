//! What fio calls while a job runs: each call becomes one on the safe [`Job`].

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::process;
use std::ptr;
use std::time::Duration;

use super::{EXPORT, Export, STATE_WORD, log, option_offset, read, write};
use crate::engine::{Direction, Finished, Job, JobFile, Request};
use crate::layout::fixed;
use crate::options::{Kind, Options, SPECS, Value};

// `enum fio_q_status`.
const QUEUE_COMPLETED: c_int = 0;
const QUEUE_QUEUED: c_int = 1;
const QUEUE_BUSY: c_int = 2;

/// What we keep about one job, found through the last word of its option block.
struct State {
    /// The job's `thread_data`: a copied option block (fio copies them for `numjobs`) is thereby noticed.
    owner: usize,
    files: Vec<JobFile>,
    running: Option<Running>,
}

/// A job between `init` and `cleanup`.
struct Running {
    job: Job,
    /// `io_u` by slot.
    units: Vec<*mut u8>,
    free: Vec<u32>,
    /// Queued, and to be told when they leave, where that is ours to do.
    unsent: Vec<*mut u8>,
    finished: Vec<Finished>,
    /// How many of `finished` fio has.
    taken: usize,
    /// What `event` answers.
    events: Vec<*mut u8>,
}

fn exported() -> Option<&'static Export> {
    EXPORT.get()?.as_ref().ok()
}

/// The option block of a job; `None` with a message when this is not the `thread_data` we know.
///
/// # Safety
/// `td` is fio's `thread_data`.
unsafe fn option_block(export: &Export, td: *mut u8) -> Option<*mut u8> {
    // SAFETY: both lie within the first 4 KiB of `thread_data`, which is larger in every release.
    let (magic, block) = unsafe {
        (
            read::<u32>(td, fixed::OPT_MAGIC),
            read::<*mut u8>(td, export.layout.engine_options),
        )
    };
    if magic != fixed::OPT_MAGIC_VALUE || block.is_null() {
        log(&export
            .layout
            .changed("its thread data is laid out otherwise")
            .to_string());
        return None;
    }
    Some(block)
}

/// The state of a job, made when it is not there yet.
///
/// # Safety
/// `td` is fio's `thread_data`, and no other reference to its state is alive.
unsafe fn state<'a>(export: &Export, td: *mut u8) -> Option<&'a mut State> {
    // SAFETY: passed on; the block has `OPTION_BLOCK_BYTES` bytes, allocated by fio from `option_struct_size`.
    unsafe {
        let block = option_block(export, td)?;
        let mut state = read::<*mut State>(block, STATE_WORD * 8);
        if state.is_null() || (*state).owner != td as usize {
            state = Box::into_raw(Box::new(State {
                owner: td as usize,
                files: Vec::new(),
                running: None,
            }));
            write(block, STATE_WORD * 8, state);
        }
        Some(&mut *state)
    }
}

/// The running job of a `thread_data` that passed `init`: no checks, for the I/O path.
///
/// # Safety
/// `td` passed [`init`] and not yet [`cleanup`]; no other reference to its state is alive.
unsafe fn running<'a>(export: &Export, td: *mut u8) -> Option<&'a mut Running> {
    // SAFETY: `init` proved the offset and stored the state.
    unsafe {
        let block = read::<*mut u8>(td, export.layout.engine_options);
        let state = read::<*mut State>(block, STATE_WORD * 8);
        state.as_mut()?.running.as_mut()
    }
}

/// Copies the parsed options out of a job's block.
///
/// # Safety
/// `block` is the job's option block.
unsafe fn options(block: *const u8) -> Options {
    let values = SPECS.iter().enumerate().map(|(index, spec)| {
        let offset = option_offset(index);
        match spec.kind {
            Kind::Text => {
                // SAFETY: fio stored null or a terminated string of its own there.
                let text = unsafe {
                    let text = read::<*const c_char>(block, offset);
                    (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
                };
                Value::Text(text)
            }
            // SAFETY: fio stores an `unsigned int` for these types.
            _ => Value::Number(unsafe { read::<u32>(block, offset) }),
        }
    });
    Options::new(values.collect())
}

/// fio asks for the size of each file of a job, in its main process, before it makes the job's process or thread.
pub(super) unsafe extern "C" fn get_file_size(td: *mut u8, file: *mut u8) -> c_int {
    let Some(export) = exported() else { return 1 };
    // SAFETY: fio's own pointers; offsets proven (version, option table) or proven here (magic).
    unsafe {
        let Some(block) = option_block(export, td) else {
            return 1;
        };
        let Some(state) = state(export, td) else {
            return 1;
        };
        let name = read::<*const c_char>(file, fixed::FILE_NAME);
        let name = if name.is_null() {
            String::new()
        } else {
            CStr::from_ptr(name).to_string_lossy().into_owned()
        };
        let number = read::<i32>(file, fixed::FILENO);
        let count = export
            .fields
            .nr_files
            .map_or(1, |offset| read::<u32>(td, offset))
            .max(1);
        let Ok(number) = u32::try_from(number) else {
            return 1;
        };
        match Job::probe(&options(block), &name, number, count) {
            Ok(found) => {
                write(file, fixed::FILETYPE, fixed::FILETYPE_BLOCK);
                write(file, fixed::REAL_FILE_SIZE, found.len_bytes());
                state.files.retain(|known| known.number() != number);
                state.files.push(found);
                0
            }
            Err(message) => {
                log(&message);
                1
            }
        }
    }
}

/// The job's own thread or process starts: connect.
pub(super) unsafe extern "C" fn init(td: *mut u8) -> c_int {
    let Some(export) = exported() else { return 1 };
    // SAFETY: fio's own pointer; the magic is checked before anything else is read.
    unsafe {
        let Some(block) = option_block(export, td) else {
            return 1;
        };
        let Some(state) = state(export, td) else {
            return 1;
        };
        let depth = read::<u32>(td, fixed::IODEPTH).clamp(1, 1 << 16);
        let sleeps = export
            .fields
            .sleeping
            .iter()
            .any(|field| match field.bytes {
                4 => read::<u32>(td, field.offset) != 0,
                _ => read::<u64>(td, field.offset) != 0,
            });
        match Job::start(options(block), &state.files, depth, sleeps) {
            Ok(job) => {
                state.running = Some(Running {
                    job,
                    units: vec![ptr::null_mut(); depth as usize],
                    free: (0..depth).rev().collect(),
                    unsent: Vec::with_capacity(depth as usize),
                    finished: Vec::with_capacity(depth as usize),
                    taken: 0,
                    events: Vec::with_capacity(depth as usize),
                });
                0
            }
            Err(message) => {
                log(&message);
                1
            }
        }
    }
}

/// A fresh `io_u`: the moment in which its layout can be proven.
pub(super) unsafe extern "C" fn io_u_init(_td: *mut u8, io_u: *mut u8) -> c_int {
    let Some(export) = exported() else { return 1 };
    let list = export.layout.io_u.verify_list;
    // SAFETY: an `io_u` has more than 300 bytes in every release.
    let (flags, next, prev) = unsafe {
        (
            read::<u32>(io_u, fixed::FLAGS),
            read::<usize>(io_u, list),
            read::<usize>(io_u, list + 8),
        )
    };
    let own = io_u as usize + list;
    if flags == fixed::FLAG_FREE && next == own && prev == own {
        return 0;
    }
    // fio prints a failure of this call and goes on to exit 0, as if all were well.
    log(&export
        .layout
        .changed("its I/O units are laid out otherwise")
        .to_string());
    process::exit(1);
}

/// fio wants memory for its buffers: hand out memory that the transport knows.
pub(super) unsafe extern "C" fn iomem_alloc(td: *mut u8, bytes: usize) -> c_int {
    let Some(export) = exported() else { return 1 };
    let field = export.layout.orig_buffer;
    // SAFETY: `thread_data` is larger than `field + 16` in this release; what stands there proves the offset below.
    unsafe {
        let (buffer, size) = (read::<usize>(td, field), read::<usize>(td, field + 8));
        if buffer != 0 || !buffer_size_fits(size, bytes) {
            log(&export.layout.changed("its buffer is elsewhere").to_string());
            return 1;
        }
        let Some(running) = running(export, td) else {
            return 1;
        };
        match running.job.allocate(bytes) {
            Ok(address) => {
                write(td, field, address);
                0
            }
            Err(message) => {
                log(&message);
                1
            }
        }
    }
}

/// Whether `size` (`orig_buffer_size`) can be what fio asks `bytes` for: the same, or with room to align
/// (`page_mask`, more when `iomem_align` is above a page).
fn buffer_size_fits(size: usize, bytes: usize) -> bool {
    match bytes.checked_sub(size) {
        Some(0) => size != 0,
        Some(room) => size != 0 && room >= 4095 && (room + 1).is_power_of_two(),
        None => false,
    }
}

/// The buffers go with the job, in `cleanup`, after the last I/O.
pub(super) unsafe extern "C" fn iomem_free(_td: *mut u8) {}

pub(super) unsafe extern "C" fn open_file(_td: *mut u8, _file: *mut u8) -> c_int {
    0
}

pub(super) unsafe extern "C" fn close_file(_td: *mut u8, _file: *mut u8) -> c_int {
    0
}

pub(super) unsafe extern "C" fn invalidate(_td: *mut u8, _file: *mut u8) -> c_int {
    0
}

/// Takes one I/O.
pub(super) unsafe extern "C" fn queue(td: *mut u8, io_u: *mut u8) -> c_int {
    let Some(export) = exported() else {
        return QUEUE_BUSY;
    };
    let at = &export.layout.io_u;
    // SAFETY: fio's own pointers, all offsets proven by `init` and `io_u_init`.
    unsafe {
        let Some(running) = running(export, td) else {
            return QUEUE_BUSY;
        };
        let file = read::<*const u8>(io_u, fixed::FILE);
        let request = Request {
            file: read::<u32>(file, fixed::FILENO),
            direction: Direction::from_fio(read::<u32>(io_u, fixed::DDIR)),
            offset: read::<u64>(io_u, at.offset),
            len: read::<u64>(io_u, at.xfer_buflen),
            address: read::<usize>(io_u, at.xfer_buf),
            started_ns: {
                let seconds = read::<u64>(io_u, fixed::START_TIME);
                let nanoseconds = read::<u64>(io_u, fixed::START_TIME + 8);
                seconds
                    .wrapping_mul(1_000_000_000)
                    .wrapping_add(nanoseconds)
            },
        };
        let Some(slot) = running.free.pop() else {
            return QUEUE_BUSY;
        };
        match running.job.queue(slot, &request) {
            Ok(()) => {
                if let Some(unit) = running.units.get_mut(slot as usize) {
                    *unit = io_u;
                }
                match export.issue_times {
                    Some(_) if running.job.sends_all_at_once() => running.unsent.push(io_u),
                    Some(times) => times.stamp(td, [io_u]),
                    None => {}
                }
                QUEUE_QUEUED
            }
            Err(errno) => {
                running.free.push(slot);
                write(io_u, at.error, errno);
                if let Some(times) = export.issue_times {
                    times.stamp(td, [io_u]);
                }
                QUEUE_COMPLETED
            }
        }
    }
}

/// fio has nothing more to queue for now (or its batch is full, which by default is after each I/O).
pub(super) unsafe extern "C" fn commit(td: *mut u8) -> c_int {
    let Some(export) = exported() else { return 0 };
    // SAFETY: fio's own pointer, of a job that passed `init`; unsent units are queued ones.
    unsafe {
        if let Some(running) = running(export, td)
            && running.job.is_due()
        {
            if let Some(times) = export.issue_times {
                times.stamp(td, running.unsent.drain(..));
            }
            running.job.send_due();
        }
    }
    0
}

/// Waits for at least `min` I/Os and hands out up to `max`.
pub(super) unsafe extern "C" fn getevents(
    td: *mut u8,
    min: c_uint,
    max: c_uint,
    timeout: *const libc::timespec,
) -> c_int {
    let Some(export) = exported() else {
        return -libc::EINVAL;
    };
    // SAFETY: fio's own pointers; the time-out is null or a `struct timespec`.
    unsafe {
        let Some(running) = running(export, td) else {
            return -libc::EINVAL;
        };
        let timeout = timeout.as_ref().map(|time| {
            Duration::new(
                time.tv_sec.try_into().unwrap_or(0),
                time.tv_nsec.try_into().unwrap_or(0),
            )
        });
        if running.taken == running.finished.len() {
            running.finished.clear();
            running.taken = 0;
        }
        let ready = running.finished.len() - running.taken;
        let wanted = (min as usize).saturating_sub(ready);
        if ready < max as usize {
            // What has not left yet does now.
            if let Some(times) = export.issue_times {
                times.stamp(td, running.unsent.drain(..));
            }
            running.job.wait(wanted, timeout, &mut running.finished);
        }
        running.events.clear();
        let fresh = running.finished.get(running.taken..).unwrap_or_default();
        for finished in fresh.iter().take(max as usize) {
            let Some(&unit) = running.units.get(finished.slot as usize) else {
                continue;
            };
            running.free.push(finished.slot);
            if finished.errno != 0 {
                write(unit, export.layout.io_u.error, finished.errno);
            }
            running.events.push(unit);
        }
        running.taken += running.events.len();
        running.events.len() as c_int
    }
}

/// The `number`th I/O of the last `getevents`.
pub(super) unsafe extern "C" fn event(td: *mut u8, number: c_int) -> *mut u8 {
    // SAFETY: fio's own pointer, of a job that passed `init`.
    let running = exported().and_then(|export| unsafe { running(export, td) });
    running
        .and_then(|running| running.events.get(usize::try_from(number).ok()?).copied())
        .unwrap_or(ptr::null_mut())
}

/// The job ends: disconnect, and let its memory go.
pub(super) unsafe extern "C" fn cleanup(td: *mut u8) {
    let Some(export) = exported() else { return };
    // SAFETY: fio's own pointer; the state is taken out of the block before it is freed, so that it is freed once.
    unsafe {
        let block = read::<*mut u8>(td, export.layout.engine_options);
        if block.is_null() {
            return;
        }
        let state = read::<*mut State>(block, STATE_WORD * 8);
        if !state.is_null() && (*state).owner == td as usize {
            write(block, STATE_WORD * 8, ptr::null_mut::<State>());
            drop(Box::from_raw(state));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_the_buffer_is_only_accepted_with_its_size() {
        for (size, bytes, fits) in [
            (131_072, 131_072, true),
            (131_072, 131_072 + 4095, true),
            (4096, 4096 + 65_535, true),
            (0, 0, false),
            (0, 4095, false),
            (131_072, 131_071, false),
            (131_072, 131_073, false),
            (4096, 4096 + 8192, false),
        ] {
            assert_eq!(buffer_size_fits(size, bytes), fits, "{size} of {bytes}");
        }
    }
}
