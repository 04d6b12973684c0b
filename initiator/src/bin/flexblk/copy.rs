//! `flexblk copy`, `read` and `write`: open both ends, check that they fit, move the bytes.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};

use crate::args;
use crate::connect;
use crate::exit::{Differs, OutOfRange, Usage};
use crate::pipeline::{self, Job, NamespaceSide, Outcome, Side};
use crate::size::human;

/// `flexblk copy`.
pub(crate) fn copy(args: &args::Copy) -> Result<()> {
    let (from_is_target, to_is_target) =
        (connect::is_target(&args.from), connect::is_target(&args.to));
    if !from_is_target && !to_is_target {
        return Err(Usage(
            "neither FROM nor TO is a target: one of them must be nvme+flexins://... or words with traddr=... (cp copies files)".into(),
        )
        .into());
    }
    let mut from = if from_is_target {
        target_side(&args.from, &args.connection, args.iodepth)?
    } else {
        open_source(Path::new(&args.from))?
    };
    let mut to = if to_is_target {
        target_side(&args.to, &args.connection, args.iodepth)?
    } else {
        open_sink(Path::new(&args.to), args.verify)?
    };
    let length = fit(
        &from,
        &to,
        Fit {
            skip: args.skip,
            seek: args.seek,
            length: args.length,
            pad: args.pad,
        },
    )?;
    if args.seek == 0 {
        truncate(&mut to)?;
    }
    let progress = progress_bar(length, args.quiet);
    let job = Job {
        from_offset: args.skip,
        to_offset: args.seek,
        length,
        chunk_bytes: pipeline::chunk_size(args.bs, [&from, &to])?,
        depth: args.iodepth,
        pad: args.pad,
        sparse: args.sparse,
        hash: args.verify,
        progress,
    };
    let outcome = pipeline::run(&mut from, &mut to, &job)?;
    job.progress.finish_and_clear();
    report("copied", &outcome, args.sparse);
    if args.verify {
        verify(&mut to, &job, &outcome, args.quiet)?;
    }
    Ok(())
}

/// `flexblk read`.
pub(crate) fn read(args: &args::Read) -> Result<()> {
    let (controller, namespace) = connect::open(&args.address, &args.connection)?;
    let (offset, length) = bytes_of(&args.range, namespace.block_size, namespace.len_bytes())?;
    let mut from = Side::Namespace(Box::new(NamespaceSide::open(
        &controller,
        namespace,
        DEPTH,
    )?));
    let mut to = open_sink(&args.output, false)?;
    if let Side::Output(output) = &to
        && output.is_terminal()
    {
        return Err(Usage(
            "refusing to write binary data to a terminal: use -o FILE or a pipe".into(),
        )
        .into());
    }
    let length = fit(
        &from,
        &to,
        Fit {
            skip: offset,
            seek: 0,
            length,
            pad: false,
        },
    )?;
    truncate(&mut to)?;
    let job = Job {
        from_offset: offset,
        to_offset: 0,
        length,
        chunk_bytes: pipeline::chunk_size(CHUNK_BYTES, [&from, &to])?,
        depth: DEPTH,
        pad: false,
        sparse: false,
        hash: false,
        progress: ProgressBar::hidden(),
    };
    pipeline::run(&mut from, &mut to, &job)?;
    Ok(())
}

/// `flexblk write`.
pub(crate) fn write(args: &args::Write) -> Result<()> {
    let mut from = open_source(&args.input)?;
    let (controller, namespace) = connect::open(&args.address, &args.connection)?;
    let (offset, length) = bytes_of(&args.range, namespace.block_size, namespace.len_bytes())?;
    let mut to = Side::Namespace(Box::new(NamespaceSide::open(
        &controller,
        namespace,
        DEPTH,
    )?));
    let length = fit(
        &from,
        &to,
        Fit {
            skip: 0,
            seek: offset,
            length,
            pad: args.pad,
        },
    )?;
    let job = Job {
        from_offset: 0,
        to_offset: offset,
        length,
        chunk_bytes: pipeline::chunk_size(CHUNK_BYTES, [&from, &to])?,
        depth: DEPTH,
        pad: args.pad,
        sparse: false,
        hash: false,
        progress: ProgressBar::hidden(),
    };
    let outcome = pipeline::run(&mut from, &mut to, &job)?;
    report("wrote", &outcome, false);
    Ok(())
}

/// Commands in flight and bytes per command of `read` and `write`.
const DEPTH: u16 = 32;
const CHUNK_BYTES: u32 = 128 << 10;

fn target_side(text: &str, connection: &args::Connection, depth: u16) -> Result<Side> {
    let address = args::Address {
        target: Some(text.to_owned()),
        ..args::Address::default()
    };
    let (controller, namespace) = connect::open(&address, connection)?;
    Ok(Side::Namespace(Box::new(NamespaceSide::open(
        &controller,
        namespace,
        depth,
    )?)))
}

fn open_source(path: &Path) -> Result<Side> {
    if path == Path::new("-") {
        return Ok(Side::Input(std::io::stdin()));
    }
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    if file.metadata()?.is_dir() {
        return Err(Usage(format!("{} is a directory", path.display())).into());
    }
    Ok(Side::File {
        path: path.to_owned(),
        file,
        blank_from: u64::MAX,
    })
}

/// Opens a destination, and leaves in it what is there: nothing has been checked yet.
fn open_sink(path: &Path, read_back: bool) -> Result<Side> {
    if path == Path::new("-") {
        if read_back {
            return Err(
                Usage("--verify cannot read standard output back: copy to a file".into()).into(),
            );
        }
        return Ok(Side::Output(std::io::stdout()));
    }
    let is_device = std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device());
    let mut options = OpenOptions::new();
    options.write(true).read(read_back);
    if !is_device {
        options.create(true).truncate(false);
    }
    let file = options
        .open(path)
        .with_context(|| format!("cannot open {} for writing", path.display()))?;
    let meta = file.metadata()?;
    Ok(Side::File {
        path: PathBuf::from(path),
        file,
        blank_from: if meta.is_file() { meta.len() } else { u64::MAX },
    })
}

/// A file is to hold what is copied and nothing else.
fn truncate(to: &mut Side) -> Result<()> {
    if let Side::File {
        path,
        file,
        blank_from,
    } = to
        && file.metadata()?.is_file()
    {
        file.set_len(0)
            .with_context(|| format!("cannot truncate {}", path.display()))?;
        *blank_from = 0;
    }
    Ok(())
}

/// Bytes of a range given in bytes or blocks.
fn bytes_of(range: &args::Range, block_size: u32, capacity: u64) -> Result<(u64, Option<u64>)> {
    let block = u64::from(block_size);
    let to_bytes = |blocks: u64| {
        blocks
            .checked_mul(block)
            .filter(|bytes| *bytes <= capacity)
            .ok_or_else(|| {
                OutOfRange(format!(
                    "the namespace has only {} blocks of {block} bytes",
                    capacity / block
                ))
            })
    };
    let offset = match (range.offset, range.lba) {
        (Some(bytes), _) => bytes,
        (None, Some(lba)) => to_bytes(lba)?,
        (None, None) => 0,
    };
    let length = match (range.length, range.blocks) {
        (Some(bytes), _) => Some(bytes),
        (None, Some(blocks)) => Some(to_bytes(blocks)?),
        (None, None) => None,
    };
    Ok((offset, length))
}

struct Fit {
    skip: u64,
    seek: u64,
    length: Option<u64>,
    pad: bool,
}

/// Checks offsets and lengths against both ends before anything is touched; gives the number of bytes to move
/// when that is known beforehand.
fn fit(from: &Side, to: &Side, fit: Fit) -> Result<Option<u64>> {
    let source = source_len(from)?;
    if let Side::Input(_) = from
        && fit.skip > 0
    {
        return Err(Usage("--skip does not work on standard input".into()).into());
    }
    if let Some(source) = source
        && fit
            .skip
            .checked_add(fit.length.unwrap_or(0))
            .is_none_or(|end| end > source)
    {
        return Err(OutOfRange(format!(
            "the source has {source} bytes; {} bytes from offset {} are beyond its end",
            fit.length.unwrap_or(0),
            fit.skip
        ))
        .into());
    }
    let length = fit.length.or(source.map(|source| source - fit.skip));
    let Side::Namespace(target) = to else {
        check_place(to, fit.seek, length)?;
        return Ok(length);
    };
    let namespace = &target.namespace;
    let (block, capacity) = (u64::from(namespace.block_size), namespace.len_bytes());
    if namespace.read_only {
        return Err(Usage(format!("namespace {} is write-protected", namespace.nsid)).into());
    }
    if !fit.seek.is_multiple_of(block) {
        return Err(Usage(format!(
            "offset {} in the namespace is not a multiple of its {block}-byte blocks",
            fit.seek
        ))
        .into());
    }
    if let Side::Namespace(source) = from
        && !fit
            .skip
            .is_multiple_of(u64::from(source.namespace.block_size))
    {
        return Err(Usage(format!(
            "--skip {} is not a multiple of the source's {}-byte blocks",
            fit.skip, source.namespace.block_size
        ))
        .into());
    }
    if let (Side::Namespace(source), Some(length)) = (from, length)
        && source.is_same_as(target)
        && overruns_itself(fit.skip, fit.seek, length)
    {
        return Err(Usage(format!(
            "FROM and TO are one namespace, and {length} bytes from offset {} reach into those at {}, which would be \
             overwritten before they are read: copy to a file first",
            fit.skip, fit.seek
        ))
        .into());
    }
    if fit.seek > capacity || length.is_some_and(|length| length > capacity - fit.seek) {
        return Err(OutOfRange(format!(
            "{} do not fit: the namespace has {} ({capacity} bytes), {} of it from offset {}",
            length.map_or("the data".into(), human),
            human(capacity),
            human(capacity.saturating_sub(fit.seek)),
            fit.seek
        ))
        .into());
    }
    if let Some(length) = length
        && !length.is_multiple_of(block)
        && !fit.pad
    {
        return Err(Usage(format!(
            "{length} bytes are not a multiple of the namespace's {block}-byte blocks: \
             --pad fills the last block with zeroes, --length {} leaves the rest out",
            length - length % block
        ))
        .into());
    }
    Ok(length)
}

/// Whether bytes would be overwritten before they are read. Towards the start it is well: reads stay ahead of writes.
fn overruns_itself(skip: u64, seek: u64, length: u64) -> bool {
    seek > skip && seek - skip < length
}

/// What is checked of a destination that is no namespace.
fn check_place(to: &Side, seek: u64, length: Option<u64>) -> Result<()> {
    let (room, what) = match to {
        Side::Output(_) if seek > 0 => {
            return Err(Usage("--seek does not work on standard output".into()).into());
        }
        Side::File { file, path, .. } if file.metadata()?.file_type().is_block_device() => {
            (len_of_device(file, path)?, "device")
        }
        // Offsets of files have a sign.
        Side::File { .. } => (i64::MAX.unsigned_abs(), "file"),
        _ => return Ok(()),
    };
    if seek
        .checked_add(length.unwrap_or(0))
        .is_none_or(|end| end > room)
    {
        return Err(OutOfRange(format!(
            "{} do not fit: the {what} has room for {room} bytes, {} of them from offset {seek}",
            length.map_or("the data".into(), human),
            room.saturating_sub(seek)
        ))
        .into());
    }
    Ok(())
}

fn len_of_device(mut file: &File, path: &Path) -> Result<u64> {
    file.seek(SeekFrom::End(0))
        .with_context(|| format!("{}", path.display()))
}

/// Length of a source, `None` when it only shows at its end.
fn source_len(from: &Side) -> Result<Option<u64>> {
    Ok(match from {
        Side::Namespace(side) => Some(side.namespace.len_bytes()),
        Side::File { path, file, .. } => {
            let meta = file
                .metadata()
                .with_context(|| format!("{}", path.display()))?;
            if meta.is_file() {
                Some(meta.len())
            } else if meta.file_type().is_block_device() {
                Some(len_of_device(file, path)?)
            } else {
                return Err(Usage(format!(
                    "{} is neither a file nor a block device; pipe it in and use -",
                    path.display()
                ))
                .into());
            }
        }
        Side::Input(_) | Side::Output(_) | Side::Nowhere => None,
    })
}

/// Reads back what was written and compares hashes.
fn verify(to: &mut Side, copied: &Job, outcome: &Outcome, quiet: bool) -> Result<()> {
    let progress = progress_bar(Some(outcome.bytes), quiet);
    progress.set_message("verifying");
    let job = Job {
        from_offset: copied.to_offset,
        to_offset: 0,
        length: Some(outcome.bytes),
        pad: false,
        sparse: false,
        hash: true,
        progress,
        ..*copied
    };
    to.forget_cache();
    let read_back = pipeline::run(to, &mut Side::Nowhere, &job)?;
    job.progress.finish_and_clear();
    let (written, read) = (
        outcome.sha256.as_deref().unwrap_or(""),
        read_back.sha256.as_deref().unwrap_or(""),
    );
    if written != read || read.is_empty() {
        return Err(Differs(format!(
            "the destination differs from what was copied: SHA-256 {read} instead of {written}"
        ))
        .into());
    }
    eprintln!("verified {} bytes, SHA-256 {read}", read_back.bytes);
    Ok(())
}

fn progress_bar(length: Option<u64>, quiet: bool) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match length {
        Some(length) => (
            ProgressBar::new(length),
            "{msg:>9} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
        ),
        None => (
            ProgressBar::no_length(),
            "{msg:>9} {spinner} {binary_bytes} {binary_bytes_per_sec}",
        ),
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message("copying");
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn report(verb: &str, outcome: &Outcome, sparse: bool) {
    let seconds = outcome.elapsed.as_secs_f64().max(1e-9);
    let zeroes = if sparse {
        format!(
            ", {} of them zeroes left out",
            human(outcome.left_out_bytes)
        )
    } else {
        String::new()
    };
    eprintln!(
        "{verb} {} bytes ({}) in {seconds:.2} s, {}/s{zeroes}",
        outcome.bytes,
        human(outcome.bytes),
        human((outcome.bytes as f64 / seconds) as u64)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_must_not_overtake_itself() {
        assert!(overruns_itself(0, 4096, 8192));
        assert!(!overruns_itself(0, 8192, 8192));
        assert!(!overruns_itself(4096, 0, 8192));
        assert!(!overruns_itself(4096, 4096, 8192));
    }
}
