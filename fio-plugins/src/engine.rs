//! One fio job: its connections, its buffers, its I/O.
//!
//! Sending is lazy. fio calls `commit` after every single I/O, and a packet train is worth many I/Os, so commands wait
//! until enough of them are there or fio asks for completions. That never holds an I/O back: fio only sleeps (rate
//! limits, think time, time steps) after it has waited for everything in flight, and waiting sends first; what is left
//! is fio computing (checksums, patterns) for longer than [`MAX_AGE_NS`], and then the next `commit` sends.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_initiator::{
    Command, Controller, IoCompletion, Nsid, Op, QueueCounters, QueuePair, QueuePairOptions,
    SharedMemory, Span,
};
use flexblk_reactor::HugePages;

use crate::abi::log;
use crate::address::{self, Address};
use crate::options::{Options, WriteMode};

/// Send when this many bytes of data wait: a full train.
const BATCH_BYTES: u64 = 60 << 10;
/// Send when the oldest command waits this long.
const MAX_AGE_NS: u64 = 10_000;
/// With several connections there is no common sleep: each is waited on for this long in turn.
const TURN: Duration = Duration::from_micros(200);
/// Errors told per job; the rest is counted.
const MAX_COMPLAINTS: u32 = 5;

/// fio's `enum fio_ddir`, as far as a block device cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
    Trim,
    Flush,
    Other,
}

impl Direction {
    pub(crate) fn from_fio(ddir: u32) -> Direction {
        match ddir {
            0 => Direction::Read,
            1 => Direction::Write,
            2 => Direction::Trim,
            // sync, datasync, sync_file_range: a namespace has one way to be flushed.
            3..=5 => Direction::Flush,
            _ => Direction::Other,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Direction::Read => "read",
            Direction::Write => "write",
            Direction::Trim => "trim",
            Direction::Flush => "flush",
            Direction::Other => "unsupported I/O",
        }
    }
}

/// One I/O as fio queues it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    /// fio's number of the file.
    pub(crate) file: u32,
    pub(crate) direction: Direction,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Address of its data.
    pub(crate) address: usize,
    /// When fio made it; constant when fio does not take the time.
    pub(crate) started_ns: u64,
}

/// The end of an I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Finished {
    pub(crate) slot: u32,
    /// 0 when it went well.
    pub(crate) errno: i32,
}

/// A file of a job: a namespace, or one of equal parts of it.
#[derive(Clone, Debug)]
pub(crate) struct JobFile {
    number: u32,
    address: Address,
    first_byte: u64,
    len_bytes: u64,
    block_size: u32,
}

impl JobFile {
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(crate) fn len_bytes(&self) -> u64 {
        self.len_bytes
    }
}

/// A job that is running.
pub(crate) struct Job {
    // The links come first: a queue pair lets go of the buffers when it is dropped.
    links: Vec<Link>,
    buffers: Option<Buffers>,
    files: Vec<Option<Place>>,
    slots: Vec<Slot>,
    completions: Vec<IoCompletion>,
    hipri: bool,
    batch: u32,
    write_mode: WriteMode,
    fua: bool,
    /// fio may sleep between I/Os, without polling.
    sleeps: bool,
    complaints: u32,
    counters_file: Option<String>,
}

/// A connection to one controller.
struct Link {
    queue: QueuePair,
    /// Keeps the controller alive; the queue pair is dropped first.
    _controller: Controller,
    max_transfer_bytes: u32,
    /// Commands that found the queue full.
    backlog: VecDeque<(Command, u64)>,
    unsent: u32,
    unsent_bytes: u64,
    first_unsent_ns: u64,
}

/// The memory that fio's buffers are in.
struct Buffers {
    memory: Arc<SharedMemory>,
    base: usize,
}

/// Where a file is.
#[derive(Clone, Copy)]
struct Place {
    link: usize,
    nsid: Nsid,
    first_byte: u64,
    block_size: u32,
}

/// An I/O in flight: its commands that are not done, and the first error of them.
#[derive(Clone, Copy, Default)]
struct Slot {
    left: u32,
    errno: i32,
}

impl Job {
    /// Finds out how large a file is. Leaves no connection behind: fio may fork after this.
    pub(crate) fn probe(
        options: &Options,
        name: &str,
        number: u32,
        count: u32,
    ) -> Result<JobFile, String> {
        let address = address::resolve(options, name)?;
        let controller = Controller::connect(&address.connect).map_err(|e| e.to_string())?;
        let namespace = controller
            .namespace(address.nsid)
            .map_err(|e| e.to_string());
        controller.disconnect();
        let namespace = namespace?;
        let block_size = namespace.block_size;
        if block_size == 0 {
            return Err(format!(
                "namespace {} says its blocks have no bytes",
                address.nsid
            ));
        }
        // A named file is a namespace; nrfiles=N without names is N equal parts of one.
        let (first_byte, len_bytes) = if address::is_address(name) || count <= 1 {
            (0, namespace.len_bytes())
        } else {
            part(namespace.len_bytes(), u64::from(block_size), number, count)?
        };
        Ok(JobFile {
            number,
            address,
            first_byte,
            len_bytes,
            block_size,
        })
    }

    /// Connects to everything that the files of a job are on.
    pub(crate) fn start(
        options: Options,
        files: &[JobFile],
        depth: u32,
        sleeps: bool,
    ) -> Result<Job, String> {
        let queue_size = match options.number("queue_size") {
            0 => depth,
            size => size,
        };
        let queue_size = u16::try_from(queue_size).unwrap_or(u16::MAX);
        let mut connected: Vec<&Address> = Vec::new();
        let mut links = Vec::new();
        let count = files
            .iter()
            .map(|file| file.number as usize + 1)
            .max()
            .unwrap_or(0);
        let mut places = vec![None; count];
        for file in files {
            let link = match connected
                .iter()
                .position(|known| known.same_controller(&file.address))
            {
                Some(link) => link,
                None => {
                    links.push(Link::connect(&file.address, queue_size)?);
                    connected.push(&file.address);
                    links.len() - 1
                }
            };
            if let Some(place) = places.get_mut(file.number as usize) {
                *place = Some(Place {
                    link,
                    nsid: file.address.nsid,
                    first_byte: file.first_byte,
                    block_size: file.block_size,
                });
            }
        }
        Ok(Job {
            links,
            buffers: None,
            files: places,
            slots: vec![Slot::default(); depth as usize],
            completions: Vec::with_capacity(depth as usize),
            hipri: options.flag("hipri"),
            batch: options.number("submit_batch").max(1),
            write_mode: options.write_mode(),
            fua: options.flag("writefua"),
            sleeps,
            complaints: 0,
            counters_file: options.text("counters_file").map(str::to_owned),
        })
    }

    /// Memory for fio's buffers, known to every queue pair, so that no payload is copied. Returns its address.
    pub(crate) fn allocate(&mut self, bytes: usize) -> Result<usize, String> {
        let len = bytes.next_multiple_of(4096);
        let too_large =
            || format!("buffers of {bytes} bytes are more than 4 GiB: lower iodepth or bs");
        let span_len = u32::try_from(len).map_err(|_| too_large())?;
        let memory = SharedMemory::create("flexblk-fio", u64::from(span_len), HugePages::No)
            .map_err(|e| format!("memory for buffers: {e}"))?;
        let base = memory.span(0, span_len).ok_or_else(too_large)?.as_ptr() as usize;
        for link in &mut self.links {
            link.queue
                .register_memory(&memory)
                .map_err(|e| e.to_string())?;
        }
        self.buffers = Some(Buffers { memory, base });
        Ok(base)
    }

    /// Takes an I/O, or says at once with which errno it fails.
    pub(crate) fn queue(&mut self, slot: u32, request: &Request) -> Result<(), i32> {
        let Some(Some(place)) = self.files.get(request.file as usize).copied() else {
            return Err(libc::EBADF);
        };
        let (Some(link), Some(state)) = (
            self.links.get_mut(place.link),
            self.slots.get_mut(slot as usize),
        ) else {
            return Err(libc::EBADF);
        };
        *state = Slot::default();
        let op = match (request.direction, self.write_mode) {
            (Direction::Read, _) => Op::Read,
            (Direction::Write, WriteMode::Write) => Op::Write { fua: self.fua },
            (Direction::Write, WriteMode::Zeroes) => Op::WriteZeroes { deallocate: false },
            (Direction::Write, WriteMode::Verify) => Op::Verify,
            (Direction::Trim, _) => Op::Discard,
            (Direction::Flush, _) => {
                state.left = 1;
                link.submit(
                    Command::flush(place.nsid),
                    u64::from(slot),
                    0,
                    request.started_ns,
                );
                return Ok(());
            }
            (Direction::Other, _) => return Err(libc::EOPNOTSUPP),
        };
        let block = u64::from(place.block_size);
        if !request.offset.is_multiple_of(block)
            || !request.len.is_multiple_of(block)
            || request.len == 0
        {
            complain(&mut self.complaints, || {
                format!(
                    "{} of {} bytes at {}: the namespace has blocks of {block} bytes; set bs and blockalign to multiples of that",
                    request.direction.word(),
                    request.len,
                    request.offset
                )
            });
            return Err(libc::EINVAL);
        }
        let with_data = matches!(op, Op::Read | Op::Write { .. });
        let largest = link.largest(with_data, block);
        let mut done = 0;
        while done < request.len {
            let len = (request.len - done).min(largest);
            let buffer = if with_data {
                let address = request.address + done as usize;
                let Some(span) = self
                    .buffers
                    .as_ref()
                    .and_then(|buffers| buffers.span(address, len))
                else {
                    // Only possible for the first part: the parts of one I/O are in one buffer.
                    return Err(libc::EFAULT);
                };
                Some(span)
            } else {
                None
            };
            let command = Command {
                op,
                nsid: place.nsid,
                lba: (place.first_byte + request.offset + done) / block,
                blocks: (len / block) as u32,
                buffer,
            };
            state.left += 1;
            link.submit(
                command,
                u64::from(slot),
                if with_data { len } else { 0 },
                request.started_ns,
            );
            done += len;
        }
        Ok(())
    }

    /// Whether sending is worth it; see the module's text.
    pub(crate) fn is_due(&self) -> bool {
        self.links.iter().any(|link| link.is_due(self.batch))
    }

    /// Sends where it is worth it.
    pub(crate) fn send_due(&mut self) {
        for link in &mut self.links {
            if link.is_due(self.batch) {
                link.send();
            }
        }
    }

    /// When something leaves, everything does that was queued until then.
    pub(crate) fn sends_all_at_once(&self) -> bool {
        self.links.len() == 1
    }

    /// Appends at least `min` finished I/Os (fewer when the time-out ends first), sending everything that waits.
    pub(crate) fn wait(&mut self, min: usize, timeout: Option<Duration>, out: &mut Vec<Finished>) {
        let before = out.len();
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let missing = min.saturating_sub(out.len() - before);
            let left = match deadline {
                Some(deadline) => deadline.saturating_duration_since(Instant::now()),
                None => Duration::MAX,
            };
            self.turn(missing, left, out);
            if out.len() - before >= min || left.is_zero() || self.idle() {
                return;
            }
        }
    }

    /// One look at every connection.
    fn turn(&mut self, missing: usize, left: Duration, out: &mut Vec<Finished>) {
        let alone = self.links.len() == 1;
        for link in &mut self.links {
            link.clear_unsent();
            link.drain_backlog();
            let sleep = if self.hipri || missing == 0 {
                Duration::ZERO
            } else if alone {
                left
            } else {
                left.min(TURN)
            };
            if sleep.is_zero() {
                link.queue.poll(&mut self.completions);
            } else {
                // I/Os may be made of several commands: one completion, then look again.
                link.queue
                    .wait(sleep.min(Duration::from_secs(60)), 1, &mut self.completions);
            }
            for completion in self.completions.drain(..) {
                let Some(state) = usize::try_from(completion.tag)
                    .ok()
                    .and_then(|tag| self.slots.get_mut(tag))
                else {
                    continue;
                };
                if let Err(error) = completion.result {
                    complain(&mut self.complaints, || error.to_string());
                    if state.errno == 0 {
                        state.errno = error.errno();
                    }
                }
                state.left = state.left.saturating_sub(1);
                if state.left == 0 {
                    out.push(Finished {
                        slot: completion.tag as u32,
                        errno: state.errno,
                    });
                }
            }
            link.drain_backlog();
            if self.sleeps && link.is_idle() {
                // fio quiesces before it sleeps, and the target must not wait for an acknowledgement meanwhile.
                link.queue.pause();
            }
        }
    }

    /// Nothing that could still complete.
    fn idle(&self) -> bool {
        self.links.iter().all(Link::is_idle)
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let Some(path) = &self.counters_file else {
            return;
        };
        let mut text = String::new();
        for link in &self.links {
            let commands = link.queue.counters();
            let _ = writeln!(
                text,
                "{}",
                counters_json(&commands, link.queue.transport_counters().entries())
            );
        }
        // One write per job, so that lines of parallel jobs do not mix.
        let written = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .and_then(|mut file| file.write_all(text.as_bytes()));
        if let Err(error) = written {
            log(&format!("counters_file={path}: {error}"));
        }
    }
}

fn counters_json(
    commands: &QueueCounters,
    transport: impl Iterator<Item = (&'static str, u64)>,
) -> String {
    let mut text = format!(
        "{{\"submitted\":{},\"completed\":{},\"failed\":{},\"bounced\":{},\"bounced_bytes\":{},\"immediate_completions\":{}",
        commands.submitted,
        commands.completed,
        commands.failed,
        commands.bounced,
        commands.bounced_bytes,
        commands.immediate_completions
    );
    for (name, value) in transport {
        let _ = write!(text, ",\"{name}\":{value}");
    }
    text.push('}');
    text
}

/// Tells the user, a few times per job.
fn complain(complaints: &mut u32, text: impl FnOnce() -> String) {
    *complaints = complaints.saturating_add(1);
    if *complaints < MAX_COMPLAINTS {
        log(&text());
    } else if *complaints == MAX_COMPLAINTS {
        log(&format!(
            "{}; further errors of this job are not shown",
            text()
        ));
    }
}

/// Part `number` of `count` equal parts of a namespace, in whole blocks.
fn part(len_bytes: u64, block_size: u64, number: u32, count: u32) -> Result<(u64, u64), String> {
    let blocks = len_bytes / block_size / u64::from(count);
    if blocks == 0 {
        return Err(format!(
            "a namespace of {len_bytes} bytes cannot be parted into nrfiles={count}"
        ));
    }
    let len = blocks * block_size;
    Ok((len * u64::from(number), len))
}

impl Buffers {
    fn span(&self, address: usize, len: u64) -> Option<Span> {
        let offset = address.checked_sub(self.base)?;
        self.memory
            .span(u64::try_from(offset).ok()?, u32::try_from(len).ok()?)
    }
}

impl Link {
    fn connect(address: &Address, queue_size: u16) -> Result<Link, String> {
        let controller = Controller::connect(&address.connect).map_err(|e| e.to_string())?;
        let options = QueuePairOptions {
            depth: Some(queue_size),
            ..QueuePairOptions::default()
        };
        let mut queue = controller.queue_pair(&options).map_err(|e| e.to_string())?;
        // Other jobs may take a while to get ready, and fio starts them together.
        queue.pause();
        if queue.depth() < queue_size {
            log(&format!(
                "the target grants {} commands in flight, fewer than iodepth (or queue_size) {queue_size}: the rest waits here",
                queue.depth()
            ));
        }
        Ok(Link {
            max_transfer_bytes: queue.max_transfer_bytes(),
            queue,
            _controller: controller,
            backlog: VecDeque::new(),
            unsent: 0,
            unsent_bytes: 0,
            first_unsent_ns: 0,
        })
    }

    /// The most that one command may cover, in bytes.
    fn largest(&self, with_data: bool, block: u64) -> u64 {
        // NLB is a 16-bit, zero-based field; a discard range has 32 bits.
        let blocks = 1_u64 << 16;
        let bytes = if with_data {
            u64::from(self.max_transfer_bytes)
        } else {
            blocks * block
        };
        ((bytes / block).clamp(1, blocks)) * block
    }

    fn submit(&mut self, command: Command, tag: u64, data_bytes: u64, started_ns: u64) {
        if self.unsent == 0 {
            self.first_unsent_ns = started_ns;
        }
        self.unsent += 1;
        self.unsent_bytes += data_bytes;
        if started_ns.saturating_sub(self.first_unsent_ns) >= MAX_AGE_NS {
            // Counts as a full batch: the next commit sends.
            self.unsent_bytes = BATCH_BYTES;
        }
        if !self.backlog.is_empty() || self.queue.submit(&command, tag).is_err() {
            self.backlog.push_back((command, tag));
        }
    }

    /// Nothing of this connection could still complete.
    fn is_idle(&self) -> bool {
        self.queue.outstanding() == 0 && self.backlog.is_empty()
    }

    fn is_due(&self, batch: u32) -> bool {
        self.unsent >= batch || self.unsent_bytes >= BATCH_BYTES
    }

    fn send(&mut self) {
        self.clear_unsent();
        self.queue.flush_submissions();
    }

    fn clear_unsent(&mut self) {
        self.unsent = 0;
        self.unsent_bytes = 0;
    }

    fn drain_backlog(&mut self) {
        while let Some((command, tag)) = self.backlog.front() {
            if self.queue.submit(command, *tag).is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_equal_whole_blocks_and_do_not_overlap() {
        let mut end = 0;
        for number in 0..3 {
            let (first, len) = part(1_000_000, 4096, number, 3).expect("fits");
            assert_eq!(first, end);
            assert_eq!(len % 4096, 0);
            end = first + len;
        }
        assert!(end <= 1_000_000);
        assert!(part(8192, 4096, 0, 3).is_err());
    }

    #[test]
    fn directions_are_fios() {
        use Direction::{Flush, Other, Read, Trim, Write};
        for (ddir, direction) in [Read, Write, Trim, Flush, Flush, Flush, Other, Other]
            .into_iter()
            .enumerate()
        {
            assert_eq!(Direction::from_fio(ddir as u32), direction);
        }
    }
}
