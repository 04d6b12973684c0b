//! The only module that touches fio: its structures by proven offsets, its callbacks, its symbols.
//!
//! fio calls in through a table of functions; every call is turned into one on the safe [`Job`]. What is trusted here:
//! fio passes its own live `thread_data`, `io_u` and `fio_file` pointers, and calls of one job come from one
//! thread at a time. What is not trusted is their layout: see [`layout`].
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::process;
use std::ptr::{self, NonNull};
use std::sync::OnceLock;
use std::time::Duration;

use crate::engine::{Direction, Finished, Job, JobFile, Request};
use crate::layout::{self, Layout, Refusal, fixed};
use crate::options::{Kind, Options, SPECS, Value};

const NAME: &CStr = c"flexblk";

// `enum fio_q_status`.
const QUEUE_COMPLETED: c_int = 0;
const QUEUE_QUEUED: c_int = 1;
const QUEUE_BUSY: c_int = 2;

// `enum fio_ioengine_flags` that are the same in every release.
const FLAG_RAWIO: i32 = 1 << 1;
const FLAG_DISKLESSIO: i32 = 1 << 2;
const FLAG_NOEXTEND: i32 = 1 << 3;
const FLAG_NODISKUTIL: i32 = 1 << 4;

// `enum fio_opt_type`.
const OPTION_STR: u32 = 1;
const OPTION_STR_STORE: u32 = 6;
const OPTION_INT: u32 = 8;
const OPTION_BOOL: u32 = 10;
const OPTION_STR_SET: u32 = 12;
/// `FIO_OPT_C_ENGINE`.
const CATEGORY_ENGINE: u64 = 1 << 6;

/// The engine's option block: word 0 is fio's, then one word per option, then the job's state.
const STATE_WORD: usize = 1 + SPECS.len();
const OPTION_BLOCK_BYTES: usize = (STATE_WORD + 1) * 8;

/// What fio was given, made once.
struct Export {
    operations: usize,
    layout: &'static Layout,
    /// What fio's own option table says about fields of `thread_data`.
    fields: Fields,
}

/// Fields of `thread_data` found through fio's own option table.
#[derive(Debug, Default)]
struct Fields {
    /// The largest `off1` of all options.
    max_off1: u32,
    /// Offset of `nr_files`.
    nr_files: Option<usize>,
    /// Options that make fio sleep between I/Os when they are not zero.
    sleeping: Vec<Field>,
}

/// Where an option's value is, and how wide it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Field {
    offset: usize,
    bytes: usize,
}

/// Options of fio that make it sleep between I/Os.
const SLEEPING: [&CStr; 5] = [c"rate", c"rate_iops", c"thinktime", c"flow", c"read_iolog"];

static EXPORT: OnceLock<Result<Export, Refusal>> = OnceLock::new();

/// Called by fio, several times, to learn the engine. Leaves `*operations` alone when this fio is refused.
///
/// # Safety
/// `operations` is writable.
#[unsafe(no_mangle)]
unsafe extern "C" fn get_ioengine(operations: *mut *mut c_void) {
    let mut first = false;
    let export = EXPORT.get_or_init(|| {
        first = true;
        export()
    });
    match export {
        // SAFETY: fio passes the address of a local pointer.
        Ok(export) => unsafe { *operations = export.operations as *mut c_void },
        Err(refusal) if first => log(&refusal.to_string()),
        Err(_) => {}
    }
}

/// Finds out which fio this is and builds the table for it.
fn export() -> Result<Export, Refusal> {
    let version = symbol(c"fio_version_string").ok_or(Refusal::NotFio("fio_version_string"))?;
    let options = symbol(c"fio_options").ok_or(Refusal::NotFio("fio_options"))?;
    // SAFETY: `fio_version_string` is a `const char []` with its zero in every release.
    let version = unsafe { CStr::from_ptr(version.as_ptr().cast::<c_char>()) };
    let layout = layout::select(&version.to_string_lossy())?;
    // SAFETY: the version is one whose option table has this shape.
    let fields = unsafe { scan_options(options) };
    layout.prove_options(fields.max_off1)?;
    Ok(Export {
        operations: build_operations(layout).as_ptr() as usize,
        layout,
        fields,
    })
}

/// Reads fio's own option table.
///
/// # Safety
/// `table` is `fio_options` of a release in the table: entries of `OPTION_SIZE` bytes up to one without a name.
unsafe fn scan_options(table: NonNull<c_void>) -> Fields {
    let mut fields = Fields::default();
    let mut entry = table.as_ptr().cast::<u8>();
    // fio has about 400 options: a table without an end is no option table.
    for _ in 0..4096 {
        // SAFETY: within the table, by the caller's promise; `name` is the first word, type and offsets are 32-bit
        // ones, names are constant strings.
        let (name, kind, offsets) = unsafe {
            let name = read::<*const c_char>(entry, 0);
            if name.is_null() {
                break;
            }
            let kind = read::<u32>(entry, fixed::OPTION_TYPE);
            (
                CStr::from_ptr(name),
                kind,
                read::<[u32; 3]>(entry, fixed::OPTION_OFF1),
            )
        };
        fields.max_off1 = fields.max_off1.max(offsets[0]);
        let place = |offset: u32| fixed::OPTIONS + offset as usize;
        if name == c"nrfiles" {
            fields.nr_files = Some(place(offsets[0]));
        }
        if SLEEPING.contains(&name) {
            // Numbers have one field for each of read, write and trim, or only the first.
            let bytes = if matches!(kind, OPTION_INT | OPTION_BOOL) {
                4
            } else {
                8
            };
            let known = offsets.into_iter().filter(|offset| *offset != 0);
            fields.sleeping.extend(known.map(|offset| Field {
                offset: place(offset),
                bytes,
            }));
        }
        // SAFETY: not the last entry, so the next one exists.
        entry = unsafe { entry.add(fixed::OPTION_SIZE) };
    }
    fields
}

/// A block of zeroed, never freed memory that fio may write to.
fn leak(bytes: usize) -> NonNull<u8> {
    let words: &'static mut [u64] = Box::leak(vec![0_u64; bytes.div_ceil(8)].into_boxed_slice());
    NonNull::from(words).cast()
}

fn build_operations(layout: &Layout) -> NonNull<u8> {
    let ops = &layout.ops;
    let table = leak(ops.size);
    let flags = FLAG_RAWIO | FLAG_DISKLESSIO | FLAG_NOEXTEND | FLAG_NODISKUTIL | layout.no_offload;
    let slots: [(usize, usize); 13] = [
        (48, init as *const () as usize),
        (72, queue as *const () as usize),
        (80, commit as *const () as usize),
        (88, getevents as *const () as usize),
        (96, event as *const () as usize),
        (ops.cleanup, cleanup as *const () as usize),
        (ops.open_file, open_file as *const () as usize),
        (ops.close_file, close_file as *const () as usize),
        (ops.invalidate, invalidate as *const () as usize),
        (ops.get_file_size, get_file_size as *const () as usize),
        (ops.iomem_alloc, iomem_alloc as *const () as usize),
        (ops.iomem_free, iomem_free as *const () as usize),
        (ops.io_u_init, io_u_init as *const () as usize),
    ];
    // SAFETY: every offset of the row lies within `ops.size` bytes (tested), and the block is ours.
    unsafe {
        write(table.as_ptr(), 16, NAME.as_ptr());
        write(table.as_ptr(), 24, layout.ioops);
        write(table.as_ptr(), 28, flags);
        for (offset, function) in slots {
            write(table.as_ptr(), offset, function);
        }
        write(
            table.as_ptr(),
            ops.option_struct_size,
            OPTION_BLOCK_BYTES as i32,
        );
        write(table.as_ptr(), ops.options, build_options().as_ptr());
    }
    table
}

/// fio's option table for [`SPECS`], closed by an empty entry.
fn build_options() -> NonNull<u8> {
    let table = leak((SPECS.len() + 1) * fixed::OPTION_SIZE);
    for (index, spec) in SPECS.iter().enumerate() {
        let (kind, default): (u32, Option<&str>) = match &spec.kind {
            Kind::Text => (OPTION_STR_STORE, None),
            Kind::Number { default } => (OPTION_INT, Some(default)),
            Kind::Choice { default, .. } => (OPTION_STR, Some(default)),
            Kind::Flag => (OPTION_STR_SET, None),
        };
        // SAFETY: entry `index` and all offsets lie within the block; strings are leaked; at most 32 words (tested).
        unsafe {
            let entry = table.as_ptr().add(index * fixed::OPTION_SIZE);
            let name = leak_str(spec.name);
            write(entry, 0, name);
            write(entry, 8, name);
            write(entry, fixed::OPTION_TYPE, kind);
            write(entry, fixed::OPTION_OFF1, option_offset(index) as u32);
            write(entry, 112, leak_str(spec.help));
            if let Some(default) = default {
                write(entry, 120, leak_str(default));
            }
            if let Kind::Choice { words, .. } = &spec.kind {
                for (value, (word, help)) in words.iter().enumerate() {
                    let posval = entry.add(128 + value * 40);
                    write(posval, 0, leak_str(word));
                    write(posval, 8, value as u64);
                    write(posval, 16, leak_str(help));
                }
            }
            write(entry, 1464, CATEGORY_ENGINE);
        }
    }
    table
}

fn option_offset(index: usize) -> usize {
    (1 + index) * 8
}

fn leak_str(text: &str) -> *const c_char {
    CString::new(text).unwrap_or_default().into_raw()
}

/// A symbol of the program that loaded us.
fn symbol(name: &CStr) -> Option<NonNull<c_void>> {
    // SAFETY: a plain look-up by a terminated name.
    NonNull::new(unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) })
}

/// One line to the user, through fio's own log where it can be found.
pub(crate) fn log(text: &str) {
    type LogErr = unsafe extern "C" fn(*const c_char, ...) -> isize;
    let line = format!("flexblk: {text}\n");
    if let (Some(address), Ok(line)) = (symbol(c"log_err"), CString::new(line.as_str())) {
        // SAFETY: fio's `log_err` is printf-like in every release; the text is an argument, not a format.
        unsafe {
            let log_err = std::mem::transmute::<*mut c_void, LogErr>(address.as_ptr());
            log_err(c"%s".as_ptr(), line.as_ptr());
        }
    } else {
        eprint!("{line}");
    }
}

/// Reads a field.
///
/// # Safety
/// `base + offset` is inside a live structure of fio and holds a `T`.
unsafe fn read<T: Copy>(base: *const u8, offset: usize) -> T {
    // SAFETY: by the caller's promise; unaligned reads cost nothing here and ask nothing of fio.
    unsafe { base.add(offset).cast::<T>().read_unaligned() }
}

/// Writes a field.
///
/// # Safety
/// As [`read`], and nobody else uses the field now.
unsafe fn write<T>(base: *mut u8, offset: usize, value: T) {
    // SAFETY: by the caller's promise.
    unsafe { base.add(offset).cast::<T>().write_unaligned(value) }
}

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
unsafe extern "C" fn get_file_size(td: *mut u8, file: *mut u8) -> c_int {
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
unsafe extern "C" fn init(td: *mut u8) -> c_int {
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
unsafe extern "C" fn io_u_init(_td: *mut u8, io_u: *mut u8) -> c_int {
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
unsafe extern "C" fn iomem_alloc(td: *mut u8, bytes: usize) -> c_int {
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
unsafe extern "C" fn iomem_free(_td: *mut u8) {}

unsafe extern "C" fn open_file(_td: *mut u8, _file: *mut u8) -> c_int {
    0
}

unsafe extern "C" fn close_file(_td: *mut u8, _file: *mut u8) -> c_int {
    0
}

unsafe extern "C" fn invalidate(_td: *mut u8, _file: *mut u8) -> c_int {
    0
}

/// Takes one I/O.
unsafe extern "C" fn queue(td: *mut u8, io_u: *mut u8) -> c_int {
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
                QUEUE_QUEUED
            }
            Err(errno) => {
                running.free.push(slot);
                write(io_u, at.error, errno);
                QUEUE_COMPLETED
            }
        }
    }
}

/// fio has nothing more to queue for now (or its batch is full, which by default is after each I/O).
unsafe extern "C" fn commit(td: *mut u8) -> c_int {
    // SAFETY: fio's own pointer, of a job that passed `init`.
    if let Some(running) = exported().and_then(|export| unsafe { running(export, td) }) {
        running.job.commit();
    }
    0
}

/// Waits for at least `min` I/Os and hands out up to `max`.
unsafe extern "C" fn getevents(
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
unsafe extern "C" fn event(td: *mut u8, number: c_int) -> *mut u8 {
    // SAFETY: fio's own pointer, of a job that passed `init`.
    let running = exported().and_then(|export| unsafe { running(export, td) });
    running
        .and_then(|running| running.events.get(usize::try_from(number).ok()?).copied())
        .unwrap_or(ptr::null_mut())
}

/// The job ends: disconnect, and let its memory go.
unsafe extern "C" fn cleanup(td: *mut u8) {
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
    use crate::layout::RELEASES;

    #[test]
    fn a_program_that_is_not_fio_is_refused() {
        let mut operations = ptr::null_mut();
        // SAFETY: a writable pointer.
        unsafe { get_ioengine(&raw mut operations) };
        assert!(operations.is_null());
        assert_eq!(
            EXPORT.get().and_then(|e| e.as_ref().err()),
            Some(&Refusal::NotFio("fio_version_string"))
        );
    }

    #[test]
    fn the_table_of_every_release_is_filled_within_its_size() {
        for row in &RELEASES {
            let table = build_operations(row);
            // SAFETY: the block has `row.ops.size` bytes.
            unsafe {
                assert_eq!(read::<i32>(table.as_ptr(), 24), row.ioops);
                assert_eq!(CStr::from_ptr(read(table.as_ptr(), 16)), NAME);
                assert_eq!(
                    read::<i32>(table.as_ptr(), row.ops.option_struct_size) as usize,
                    OPTION_BLOCK_BYTES
                );
                assert_eq!(
                    read::<usize>(table.as_ptr(), row.ops.cleanup),
                    cleanup as *const () as usize
                );
                assert_eq!(
                    read::<usize>(table.as_ptr(), row.ops.io_u_init),
                    io_u_init as *const () as usize
                );
            }
            assert!(row.ops.options + 8 <= row.ops.size);
            assert!(row.ops.io_u_init + 8 <= row.ops.option_struct_size);
        }
    }

    #[test]
    fn the_option_table_reads_back() {
        let table = build_options();
        // SAFETY: the table is closed by an empty entry and lives forever.
        let fields = unsafe { scan_options(table.cast()) };
        assert_eq!(fields.max_off1 as usize, option_offset(SPECS.len() - 1));
        assert_eq!(fields.nr_files, None);
        assert!((fields.max_off1 as usize) < STATE_WORD * 8);
    }

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
