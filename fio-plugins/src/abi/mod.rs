//! The only module that touches fio: its structures by proven offsets, its callbacks, its symbols.
//!
//! fio calls in through a table of functions; every call is turned into one on the safe [`Job`](crate::engine::Job). What is trusted here:
//! fio passes its own live `thread_data`, `io_u` and `fio_file` pointers, and calls of one job come from one
//! thread at a time. What is not trusted is their layout: see [`layout`].
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::NonNull;
use std::sync::OnceLock;

use self::issue::IssueTimes;
use crate::layout::{self, Layout, Refusal, fixed};
use crate::options::{Kind, SPECS};

mod callbacks;
mod issue;

const NAME: &CStr = c"flexblk";

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
    issue_times: Option<IssueTimes>,
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
    let issue_times = IssueTimes::find(layout);
    Ok(Export {
        operations: build_operations(layout, issue_times.is_some()).as_ptr() as usize,
        layout,
        fields,
        issue_times,
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

fn build_operations(layout: &Layout, sets_issue_time: bool) -> NonNull<u8> {
    let ops = &layout.ops;
    let table = leak(ops.size);
    let mut flags =
        FLAG_RAWIO | FLAG_DISKLESSIO | FLAG_NOEXTEND | FLAG_NODISKUTIL | layout.flags.no_offload;
    if sets_issue_time {
        flags |= layout.flags.sets_issue_time;
    }
    let slots: [(usize, usize); 13] = [
        (48, callbacks::init as *const () as usize),
        (72, callbacks::queue as *const () as usize),
        (80, callbacks::commit as *const () as usize),
        (88, callbacks::getevents as *const () as usize),
        (96, callbacks::event as *const () as usize),
        (ops.cleanup, callbacks::cleanup as *const () as usize),
        (ops.open_file, callbacks::open_file as *const () as usize),
        (ops.close_file, callbacks::close_file as *const () as usize),
        (ops.invalidate, callbacks::invalidate as *const () as usize),
        (
            ops.get_file_size,
            callbacks::get_file_size as *const () as usize,
        ),
        (
            ops.iomem_alloc,
            callbacks::iomem_alloc as *const () as usize,
        ),
        (ops.iomem_free, callbacks::iomem_free as *const () as usize),
        (ops.io_u_init, callbacks::io_u_init as *const () as usize),
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

#[cfg(test)]
mod tests {
    use std::ptr;

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
            let table = build_operations(row, true);
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
                    callbacks::cleanup as *const () as usize
                );
                assert_eq!(
                    read::<usize>(table.as_ptr(), row.ops.io_u_init),
                    callbacks::io_u_init as *const () as usize
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
}
