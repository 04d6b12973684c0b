//! Moves bytes from one side to another with many commands in flight: the core of copy, read and write.
//!
//! Chunks are read in any order and go on in order (so a stream and a hash see them as they are), then
//! are written in any order. One buffer per chunk in flight, registered with every namespace involved.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use flexblk_initiator::{
    Busy, Command, Controller, IoCompletion, IoError, Namespace, Nqn, Op, QueuePair,
    QueuePairOptions, RegionId, SharedMemory, Span,
};
use indicatif::ProgressBar;
use rustix::fs::{Advice, FallocateFlags, fadvise, fallocate};
use sha2::{Digest, Sha256};

use crate::exit::{OutOfRange, Usage, explain};

/// One end of a transfer.
pub(crate) enum Side {
    /// A namespace on a queue pair of its own.
    Namespace(Box<NamespaceSide>),
    /// A file that can be read and written at any place.
    File {
        /// For messages.
        path: PathBuf,
        /// Open for what is needed.
        file: File,
        /// From here on it reads as zeroes without being written, since there is nothing yet. Nowhere in a device.
        blank_from: u64,
    },
    /// Standard input.
    Input(std::io::Stdin),
    /// Standard output.
    Output(std::io::Stdout),
    /// Nowhere: for hashing.
    Nowhere,
}

/// A namespace as one end.
pub(crate) struct NamespaceSide {
    queue: QueuePair,
    subnqn: Nqn,
    pub(crate) namespace: Namespace,
    completions: Vec<IoCompletion>,
}

impl NamespaceSide {
    pub(crate) fn open(
        controller: &Controller,
        namespace: Namespace,
        depth: u16,
    ) -> Result<NamespaceSide> {
        let options = QueuePairOptions {
            depth: Some(depth),
            ..QueuePairOptions::default()
        };
        let queue = controller.queue_pair(&options)?;
        let completions = Vec::with_capacity(usize::from(queue.depth()));
        Ok(NamespaceSide {
            queue,
            subnqn: controller.subnqn().clone(),
            namespace,
            completions,
        })
    }

    /// Whether both are one namespace, as far as can be told: two targets may have the same default name.
    pub(crate) fn is_same_as(&self, other: &NamespaceSide) -> bool {
        let (ours, theirs) = (&self.namespace, &other.namespace);
        self.subnqn == other.subnqn
            && ours.nsid == theirs.nsid
            && (ours.uuid, ours.nguid, ours.eui64) == (theirs.uuid, theirs.nguid, theirs.eui64)
    }
}

/// How a transfer is to be done.
pub(crate) struct Job {
    pub(crate) from_offset: u64,
    pub(crate) to_offset: u64,
    /// Bytes to move; `None`: until the source ends.
    pub(crate) length: Option<u64>,
    pub(crate) chunk_bytes: u32,
    pub(crate) depth: u16,
    /// Fill the last block of a namespace with zeroes.
    pub(crate) pad: bool,
    /// Leave zeroes out where they are there without being written.
    pub(crate) sparse: bool,
    /// Hash what passes.
    pub(crate) hash: bool,
    pub(crate) progress: ProgressBar,
}

/// What was done.
pub(crate) struct Outcome {
    pub(crate) bytes: u64,
    /// Of them, zeroes that were not sent or written as data.
    pub(crate) left_out_bytes: u64,
    pub(crate) sha256: Option<String>,
    pub(crate) elapsed: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Empty,
    Reading,
    Read,
    Writing,
    Written,
}

/// A chunk in flight: its buffer is `index % depth` of the memory.
#[derive(Clone, Copy)]
struct Chunk {
    phase: Phase,
    /// Offset of the chunk from the start of the transfer.
    at: u64,
    /// Bytes of the transfer in it.
    len: u32,
    /// Bytes in front of them that only align the read.
    head: u32,
}

enum Started {
    /// Bytes read or written.
    Done(u32),
    /// The side's queue has it.
    Pending,
}

/// Largest chunk both sides can take, at most `wish`; an error when it cannot be a multiple of their blocks.
pub(crate) fn chunk_size(wish: u32, sides: [&Side; 2]) -> Result<u32> {
    let mut chunk = wish;
    for side in sides {
        if let Side::Namespace(side) = side {
            chunk = chunk
                .min(side.namespace.max_transfer_bytes)
                .min(side.queue.max_transfer_bytes());
        }
    }
    for side in sides {
        if let Some(block) = side.block_size()
            && (!chunk.is_multiple_of(block) || chunk == 0)
        {
            chunk -= chunk % block;
            if chunk == 0 {
                return Err(Usage(format!(
                    "--bs {wish} is smaller than the namespace's block size of {block} bytes"
                ))
                .into());
            }
        }
    }
    Ok(chunk)
}

impl Side {
    /// Block size, of a namespace.
    pub(crate) fn block_size(&self) -> Option<u32> {
        match self {
            Side::Namespace(side) => Some(side.namespace.block_size),
            _ => None,
        }
    }

    /// Commands that it takes at once; a controller may allow fewer than were asked for.
    fn depth(&self) -> u16 {
        match self {
            Side::Namespace(side) => side.queue.depth(),
            _ => u16::MAX,
        }
    }

    fn outstanding(&self) -> usize {
        match self {
            Side::Namespace(side) => side.queue.outstanding(),
            _ => 0,
        }
    }

    /// Nobody will poll for a while.
    fn pause(&mut self) {
        if let Side::Namespace(side) = self {
            side.queue.pause();
        }
    }

    fn register(&mut self, memory: &Arc<SharedMemory>) -> Result<Option<RegionId>> {
        let Side::Namespace(side) = self else {
            return Ok(None);
        };
        Ok(Some(side.queue.register_memory(memory)?))
    }

    fn unregister(&mut self, region: Option<RegionId>) -> Result<()> {
        if let (Side::Namespace(side), Some(region)) = (self, region) {
            side.queue.unregister(region)?;
        }
        Ok(())
    }

    /// Starts to fill `buffer` from `offset`. A short count means the end of the source.
    fn start_read(&mut self, tag: u64, offset: u64, buffer: Span) -> Result<Started> {
        match self {
            Side::Namespace(side) => {
                let block = u64::from(side.namespace.block_size);
                let blocks = u64::from(buffer.len()) / block;
                let command =
                    Command::read(side.namespace.nsid, offset / block, blocks as u32, buffer);
                submit(&mut side.queue, &command, tag)?;
                Ok(Started::Pending)
            }
            Side::File { path, file, .. } => {
                let read = with_slice(buffer, |data| {
                    let mut done = 0;
                    while let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) {
                        match file.read_at(rest, offset + done as u64) {
                            Ok(0) => break,
                            Ok(n) => done += n,
                            Err(e) if e.kind() == ErrorKind::Interrupted => {}
                            Err(e) => return Err(e),
                        }
                    }
                    Ok(done)
                });
                Ok(Started::Done(
                    read.with_context(|| format!("reading {}", path.display()))? as u32,
                ))
            }
            Side::Input(input) => {
                let mut input = input.lock();
                let read = with_slice(buffer, |data| {
                    let mut done = 0;
                    while let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) {
                        match input.read(rest) {
                            Ok(0) => break,
                            Ok(n) => done += n,
                            Err(e) if e.kind() == ErrorKind::Interrupted => {}
                            Err(e) => return Err(e),
                        }
                    }
                    Ok(done)
                });
                Ok(Started::Done(read.context("reading standard input")? as u32))
            }
            Side::Output(_) | Side::Nowhere => Err(anyhow!("this side cannot be read")),
        }
    }

    /// Whether zeroes get there without being sent as data.
    fn writes_zeroes(&self) -> bool {
        matches!(self, Side::Namespace(side) if side.namespace.write_zeroes)
    }

    /// Starts to write `buffer` at `offset`; `zeroes`: it holds nothing else and may be left out. A short count says
    /// that it was.
    fn start_write(
        &mut self,
        tag: u64,
        offset: u64,
        buffer: Span,
        zeroes: bool,
    ) -> Result<Started> {
        let len = buffer.len();
        match self {
            Side::Namespace(side) => {
                let block = u64::from(side.namespace.block_size);
                let (lba, blocks) = (offset / block, (u64::from(len) / block) as u32);
                let command = if zeroes && side.namespace.write_zeroes {
                    Command::without_data(
                        Op::WriteZeroes { deallocate: true },
                        side.namespace.nsid,
                        lba,
                        blocks,
                    )
                } else {
                    Command::write(side.namespace.nsid, lba, blocks, buffer)
                };
                submit(&mut side.queue, &command, tag)?;
                Ok(Started::Pending)
            }
            Side::File {
                path,
                file,
                blank_from,
            } => {
                if zeroes && leave_hole(file, offset, len, *blank_from) {
                    return Ok(Started::Done(0));
                }
                with_slice(buffer, |data| file.write_all_at(data, offset))
                    .with_context(|| format!("writing {}", path.display()))?;
                Ok(Started::Done(len))
            }
            Side::Output(output) => {
                with_slice(buffer, |data| output.write_all(data))
                    .context("writing standard output")?;
                Ok(Started::Done(len))
            }
            Side::Nowhere => Ok(Started::Done(len)),
            Side::Input(_) => Err(anyhow!("this side cannot be written")),
        }
    }

    /// Appends the tags of completed commands; sleeps until there is one when `wait`.
    fn poll(&mut self, wait: bool, what: &str, done: &mut Vec<u64>) -> Result<()> {
        let Side::Namespace(side) = self else {
            return Ok(());
        };
        if side.queue.outstanding() == 0 {
            return Ok(());
        }
        side.completions.clear();
        if wait {
            side.queue
                .wait(Duration::from_millis(100), 1, &mut side.completions);
        } else {
            side.queue.poll(&mut side.completions);
        }
        for completion in &side.completions {
            completion
                .result
                .map_err(|error| explain(error, side.queue.lost()))
                .with_context(|| format!("{what} namespace {}", side.namespace.nsid))?;
            done.push(completion.tag);
        }
        Ok(())
    }

    /// Makes durable what was written.
    fn finish(&mut self, end: u64) -> Result<()> {
        match self {
            Side::Namespace(side) => {
                submit(&mut side.queue, &Command::flush(side.namespace.nsid), 0)?;
                let mut done = Vec::new();
                while done.is_empty() {
                    side.completions.clear();
                    side.queue
                        .wait(Duration::from_millis(100), 1, &mut side.completions);
                    done.extend(side.completions.iter().map(|c| c.result));
                }
                done.into_iter()
                    .collect::<Result<(), IoError>>()
                    .context("flushing the namespace")
            }
            Side::File { path, file, .. } => {
                finish_file(file, end).with_context(|| format!("writing {}", path.display()))
            }
            Side::Output(output) => output.flush().context("writing standard output"),
            Side::Input(_) | Side::Nowhere => Ok(()),
        }
    }

    /// What is read from now on comes from the medium, as far as the kernel does that: what was written, and made
    /// durable, is still in its cache.
    pub(crate) fn forget_cache(&self) {
        if let Side::File { path, file, .. } = self
            && let Err(error) = fadvise(file, 0, None, Advice::DontNeed)
        {
            tracing::info!(%error, path = %path.display(), "reading back from the cache");
        }
    }
}

/// Whether zeroes are at `offset` without being written: there is nothing yet, or a hole could be made.
fn leave_hole(file: &File, offset: u64, len: u32, blank_from: u64) -> bool {
    if offset >= blank_from {
        return true;
    }
    // Of devices, only those of some kinds can do it, each with an alignment of its own.
    file.metadata().is_ok_and(|meta| meta.is_file())
        && fallocate(
            file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            u64::from(len),
        )
        .is_ok()
}

/// A file has its full length, and what was written to it is durable. Of a device, too: the kernel has only noted it
/// so far, and tells of errors only here.
fn finish_file(file: &File, end: u64) -> io::Result<()> {
    let meta = file.metadata()?;
    if meta.is_file() && meta.len() < end {
        file.set_len(end)?; // the last chunk was a hole
    }
    if meta.is_file() || meta.file_type().is_block_device() {
        file.sync_data()?;
    }
    Ok(())
}

/// The queue has a slot for every chunk, so it can only be busy when it is broken.
fn submit(queue: &mut QueuePair, command: &Command, tag: u64) -> Result<()> {
    let mut spins = 0u32;
    while let Err(Busy) = queue.submit(command, tag) {
        // A send may still wait for its acknowledgement after its command completed.
        let mut none = Vec::new();
        queue.poll(&mut none);
        spins += 1;
        if !none.is_empty() || spins > 1_000_000 {
            return Err(anyhow!("the queue pair takes no commands"));
        }
    }
    Ok(())
}

#[allow(unsafe_code)]
fn with_slice<R>(span: Span, work: impl FnOnce(&mut [u8]) -> R) -> R {
    // SAFETY: the span is a chunk of the pipeline's own memory and no command is outstanding on it: this is
    // called only between a chunk's read and its write.
    work(unsafe { span.as_mut_slice() })
}

fn is_zero(span: Span) -> bool {
    with_slice(span, |data| {
        let (head, words, tail) = align(data);
        words.iter().all(|w| *w == 0) && head.iter().chain(tail).all(|b| *b == 0)
    })
}

fn align(data: &[u8]) -> (&[u8], &[u128], &[u8]) {
    // Whole blocks of aligned memory: normally all of it is words.
    #[allow(unsafe_code)]
    // SAFETY: every bit pattern is a u128.
    unsafe {
        data.align_to::<u128>()
    }
}

/// Moves the bytes.
pub(crate) fn run(from: &mut Side, to: &mut Side, job: &Job) -> Result<Outcome> {
    let started = Instant::now();
    let depth = job.depth.min(from.depth()).min(to.depth());
    let depth = usize::from(depth.max(1));
    let chunk_bytes = job.chunk_bytes;
    let memory = SharedMemory::create(
        "flexblk copy",
        depth as u64 * u64::from(chunk_bytes),
        flexblk_reactor::HugePages::Try,
    )
    .context("allocating buffers: try a smaller --bs or --iodepth")?;
    let whole = whole_span(&memory)?;
    let regions = (from.register(&memory)?, to.register(&memory)?);
    let buffer = |index: u64| -> Result<Span> {
        whole
            .sub(
                ((index % depth as u64) * u64::from(chunk_bytes)) as u32,
                chunk_bytes,
            )
            .ok_or_else(|| anyhow!("buffer outside of its memory"))
    };

    let align = u64::from(from.block_size().unwrap_or(1));
    let to_block = to.block_size();
    let mut chunks = vec![
        Chunk {
            phase: Phase::Empty,
            at: 0,
            len: 0,
            head: 0
        };
        depth
    ];
    // Chunk numbers: [written_to, next_read) are in flight, those below `next_write` have begun to be written.
    let (mut oldest, mut next_write, mut next_read) = (0u64, 0u64, 0u64);
    let mut at = 0u64;
    let mut ended = job.length == Some(0);
    let mut outcome = Outcome {
        bytes: 0,
        left_out_bytes: 0,
        sha256: None,
        elapsed: Duration::ZERO,
    };
    let mut hasher = Sha256::new();
    let (mut reads, mut writes) = (Vec::with_capacity(depth), Vec::with_capacity(depth));

    while !ended || oldest < next_read {
        let mut progress = false;
        // Start reads.
        while !ended && next_read - oldest < depth as u64 {
            let source = job.from_offset + at;
            let head = (source % align) as u32;
            let left = job.length.map_or(u64::MAX, |length| length - at);
            let len = left.min(u64::from(chunk_bytes - head)) as u32;
            // A namespace is read in whole blocks; what is too much is cut off.
            let read_len = u64::from(head + len).next_multiple_of(align) as u32;
            let span = buffer(next_read)?
                .sub(0, read_len)
                .ok_or_else(|| anyhow!("chunk too long"))?;
            let slot = slot(&mut chunks, next_read)?;
            *slot = Chunk {
                phase: Phase::Reading,
                at,
                len,
                head,
            };
            if matches!(from, Side::Input(_)) && to.outstanding() == 0 {
                to.pause(); // standard input may keep us waiting
            }
            match from.start_read(next_read, source - u64::from(head), span)? {
                Started::Pending => {}
                Started::Done(got) => {
                    slot.phase = Phase::Read;
                    if got < len {
                        slot.len = got;
                        ended = true;
                        if job.length.is_some() {
                            return Err(anyhow!(
                                "the source ends after {} bytes, {left} more were expected",
                                at + u64::from(got)
                            ));
                        }
                    }
                }
            }
            at += u64::from(slot.len);
            next_read += 1;
            progress = true;
            ended |= job.length == Some(at);
            if matches!(from, Side::File { .. } | Side::Input(_)) {
                break; // synchronous: give the writes their turn
            }
        }
        // What was read goes on, in order.
        while next_write < next_read {
            let index = next_write;
            let chunk = slot(&mut chunks, index)?;
            if chunk.phase != Phase::Read {
                break;
            }
            let data = buffer(index)?
                .sub(chunk.head, chunk.len)
                .ok_or_else(|| anyhow!("chunk too long"))?;
            let zeroes = job.sparse && is_zero(data);
            if job.hash {
                with_slice(data, |bytes| hasher.update(bytes));
            }
            let mut write = data;
            if let Some(block) = to_block
                && !chunk.len.is_multiple_of(block)
            {
                if !job.pad {
                    return Err(Usage(format!(
                        "the data ends inside a block: {} bytes is not a multiple of the namespace's {block}-byte blocks; \
                         --pad fills the last block with zeroes",
                        chunk.at + u64::from(chunk.len)
                    ))
                    .into());
                }
                let padded = chunk.len.next_multiple_of(block);
                write = buffer(index)?
                    .sub(chunk.head, padded)
                    .ok_or_else(|| anyhow!("chunk too long"))?;
                with_slice(write, |bytes| {
                    bytes
                        .iter_mut()
                        .skip(chunk.len as usize)
                        .for_each(|b| *b = 0)
                });
            }
            outcome.bytes += u64::from(chunk.len);
            let target = offset_in(job, chunk.at)?;
            chunk.phase = Phase::Writing;
            if chunk.len == 0 {
                chunk.phase = Phase::Written;
            } else {
                let left_out = match to.start_write(index, target, write, zeroes)? {
                    Started::Done(written) => {
                        chunk.phase = Phase::Written;
                        written == 0
                    }
                    Started::Pending => zeroes && to.writes_zeroes(),
                };
                if left_out {
                    outcome.left_out_bytes += u64::from(chunk.len);
                }
            }
            next_write += 1;
            progress = true;
        }
        // Completions. Sleep only when nothing else can be done, and on one queue only: each side has a
        // reactor of its own, so with two of them both are polled.
        let (reading, writing) = (from.outstanding() > 0, to.outstanding() > 0);
        from.poll(!progress && !writing, "reading", &mut reads)?;
        for index in reads.drain(..) {
            slot(&mut chunks, index)?.phase = Phase::Read;
        }
        to.poll(!progress && !reading, "writing", &mut writes)?;
        for index in writes.drain(..) {
            slot(&mut chunks, index)?.phase = Phase::Written;
        }
        while oldest < next_write {
            let chunk = slot(&mut chunks, oldest)?;
            if chunk.phase != Phase::Written {
                break;
            }
            chunk.phase = Phase::Empty;
            job.progress.inc(u64::from(chunk.len));
            oldest += 1;
        }
    }
    to.finish(offset_in(job, outcome.bytes)?)?;
    from.unregister(regions.0)?;
    to.unregister(regions.1)?;
    outcome.elapsed = started.elapsed();
    outcome.sha256 = job.hash.then(|| {
        hasher
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    });
    Ok(outcome)
}

/// Where the byte `at` of the transfer goes.
fn offset_in(job: &Job, at: u64) -> Result<u64> {
    job.to_offset
        .checked_add(at)
        .ok_or_else(|| OutOfRange("the destination ends at 2^64 bytes".into()).into())
}

fn slot(chunks: &mut [Chunk], index: u64) -> Result<&mut Chunk> {
    let depth = chunks.len().max(1) as u64;
    chunks
        .get_mut((index % depth) as usize)
        .ok_or_else(|| anyhow!("no such chunk"))
}

fn whole_span(memory: &Arc<SharedMemory>) -> Result<Span> {
    let len = u32::try_from(memory.len())
        .map_err(|_| Usage("--bs times --iodepth must stay below 4 GiB".into()))?;
    memory.span(0, len).ok_or_else(|| anyhow!("no memory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_left_out_only_where_there_is_nothing() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 12 << 10], 0).unwrap();
        assert!(leave_hole(&file, 12 << 10, 4 << 10, 12 << 10));
        // A hole in what was there, or a refusal, after which it is written.
        if leave_hole(&file, 4 << 10, 4 << 10, 12 << 10) {
            let mut data = [1; 4 << 10];
            file.read_exact_at(&mut data, 4 << 10).unwrap();
            assert!(data.iter().all(|byte| *byte == 0));
        }
        finish_file(&file, 16 << 10).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 16 << 10);
        let device = File::options().write(true).open("/dev/null").unwrap();
        assert!(!leave_hole(&device, 0, 4 << 10, u64::MAX));
        finish_file(&device, 16 << 10).unwrap();
    }
}
