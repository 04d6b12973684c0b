//! An I/O queue pair: owned by one thread, polled by it, never blocking unless asked to.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flexblk_nvme::command::nvm;
use flexblk_nvme::{Cid, Lba, Nsid, Sgl, U32, U64};
use flexblk_reactor::{SharedMemory, Span, Wait};

use crate::link::{Data, Link, LinkEvent, MemoryKey, PostRefused, Posted};
use crate::queue::bounce::Bounce;
use crate::queue::regions::Regions;
use crate::queue::slots::{Finished, Slots};
use crate::view::{ControllerView, NamespaceCache, QidLease};
use crate::{
    Busy, Command, DiscardRange, Error, InvalidCommand, IoCompletion, IoError, LostReason, Op,
};
use fused::{Half, Pairs};

/// A registered piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionId(pub(crate) u32);

/// What a queue pair counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Commands taken.
    pub submitted: u64,
    /// Completions handed out.
    pub completed: u64,
    /// Of those, with an error.
    pub failed: u64,
    /// Commands whose buffer was not registered and went through a bounce buffer.
    pub bounced: u64,
    /// Bytes copied to and from bounce buffers.
    pub bounced_bytes: u64,
    /// Successful commands whose completion came as an RDMA immediate.
    pub immediate_completions: u64,
}

impl std::ops::AddAssign for QueueCounters {
    fn add_assign(&mut self, other: QueueCounters) {
        self.submitted += other.submitted;
        self.completed += other.completed;
        self.failed += other.failed;
        self.bounced += other.bounced;
        self.bounced_bytes += other.bounced_bytes;
        self.immediate_completions += other.immediate_completions;
    }
}

/// An I/O queue pair. Made by [`Controller::queue_pair`](crate::Controller::queue_pair) in the thread
/// that uses it (it is not `Send`, while the controller is); dropping it disconnects.
///
/// Queue pairs of one thread share a reactor and, towards the same target with the same options, a FlexiNS endpoint:
/// the second costs about 50 KiB, and whichever is polled or waited on sends and receives for all of them.
///
/// Calling order: `submit` as often as wanted, then `flush_submissions` or `poll`; `poll` or `wait`
/// until every tag came back. Each submitted command completes exactly once, also after a time-out
/// or a lost connection; after `close` or `drop` no buffer is in use any more.
///
/// A time-out or a lost connection is the end of the queue pair: everything outstanding completes with
/// its error, because only a torn-down connection can no longer write into a read's buffer. Make a new
/// one, or, when [`Controller::state`](crate::Controller::state) is lost, too, a new controller.
pub struct QueuePair {
    link: Box<dyn Link>,
    slots: Slots<Context>,
    regions: Regions<MemoryKey>,
    bounce: Bounce,
    bounce_key: MemoryKey,
    namespaces: NamespaceCache,
    view: Arc<ControllerView>,
    events: Vec<LinkEvent>,
    /// Completions of commands that were never sent.
    rejected: VecDeque<IoCompletion>,
    /// The link refused a capsule for good; the next turn tears down.
    refused: Option<LostReason>,
    lost: Option<LostReason>,
    max_transfer_bytes: u32,
    /// Read once between two turns at most: a command's deadline counts from when it was submitted, also after an
    /// idle hour.
    clock: Option<Instant>,
    counters: QueueCounters,
    pairs: Pairs,
    _keep: Keep,
}

/// What lives as long as the queue pair: its identifier and its controller.
pub(crate) struct Keep {
    pub(crate) _qid: Option<QidLease>,
    pub(crate) _controller: Option<crate::Controller>,
}

/// How a queue pair is put together.
pub(crate) struct Parts {
    pub(crate) link: Box<dyn Link>,
    pub(crate) view: Arc<ControllerView>,
    pub(crate) depth: u16,
    pub(crate) io_timeout: Duration,
    pub(crate) max_transfer_bytes: u32,
    pub(crate) bounce_bytes: usize,
    pub(crate) keep: Keep,
}

/// Beside each command: which memory it uses.
#[derive(Clone, Copy, Default)]
struct Context {
    /// The caller's buffer.
    buffer: Option<Span>,
    bounce: Option<u16>,
    /// Data comes from the controller.
    inbound: bool,
    /// It is half of a fused pair.
    half: Option<Half>,
}

/// How long a wait sleeps at most before it looks whether the controller is lost.
const LONGEST_SLEEP: Duration = Duration::from_millis(100);
/// How long the end of a working queue pair waits for the target's confirmation.
const GOODBYE: Duration = Duration::from_millis(200);

impl QueuePair {
    pub(crate) fn assemble(mut parts: Parts) -> Result<QueuePair, Error> {
        let bounce = Bounce::new(
            parts.bounce_bytes,
            if parts.bounce_bytes == 0 {
                4096
            } else {
                parts.max_transfer_bytes
            },
        )?;
        let bounce_key = parts.link.register_memory(bounce.memory())?;
        let now = parts.link.now();
        Ok(QueuePair {
            slots: Slots::new(parts.depth, parts.io_timeout, now),
            regions: Regions::new(),
            bounce,
            bounce_key,
            namespaces: NamespaceCache::new(parts.view.clone()),
            view: parts.view,
            events: Vec::with_capacity(4 * usize::from(parts.depth)),
            rejected: VecDeque::with_capacity(usize::from(parts.depth)),
            refused: None,
            lost: None,
            max_transfer_bytes: parts.max_transfer_bytes,
            clock: None,
            counters: QueueCounters::default(),
            pairs: Pairs::default(),
            link: parts.link,
            _keep: parts.keep,
        })
    }

    /// Commands that fit at once.
    pub fn depth(&self) -> u16 {
        self.slots.depth()
    }

    /// Commands submitted and not yet handed out as completed; a fused pair is one.
    pub fn outstanding(&self) -> usize {
        self.slots.outstanding() - self.pairs.whole() + self.rejected.len()
    }

    /// Largest transfer of one command.
    pub fn max_transfer_bytes(&self) -> u32 {
        self.max_transfer_bytes
    }

    /// `None` while it works, else why it does not any more.
    pub fn lost(&self) -> Option<LostReason> {
        self.lost
    }

    /// Registers memory of the application, so that commands on any part of it need no copy. Never on the I/O path.
    ///
    /// The memory stays mapped until [`unregister`](Self::unregister) or the end of the queue pair.
    pub fn register(&mut self, memory: Span) -> Result<RegionId, Error> {
        self.check_room()?;
        let key = self.link.register(memory)?;
        Ok(self
            .regions
            .insert(memory.as_ptr() as usize, memory.len() as usize, key, None))
    }

    /// Registers all of a shared memory, and keeps it mapped meanwhile.
    pub fn register_memory(&mut self, memory: &Arc<SharedMemory>) -> Result<RegionId, Error> {
        self.check_room()?;
        let key = self.link.register_memory(memory)?;
        let len = usize::try_from(memory.len()).unwrap_or(usize::MAX);
        Ok(self.regions.insert(
            memory.as_ptr() as usize,
            len,
            Some(key),
            Some(Arc::clone(memory)),
        ))
    }

    /// Ends a registration; fails while a command uses the region.
    pub fn unregister(&mut self, region: RegionId) -> Result<(), Error> {
        let Some(extent) = self.regions.extent(region) else {
            return Err(Error::Transport("no such memory registration".into()));
        };
        let in_use = self
            .slots
            .contexts()
            .filter(|context| context.bounce.is_none())
            .filter_map(|context| context.buffer)
            .any(|buffer| extent.contains(&(buffer.as_ptr() as usize)));
        if in_use {
            return Err(Error::Transport(
                "a command uses the memory: wait for its completion".into(),
            ));
        }
        if let Some(key) = self.regions.key(region) {
            self.link.unregister(key)?;
        }
        // Only now may the memory go.
        self.regions.remove(region);
        Ok(())
    }

    /// Takes one command; `tag` comes back in its completion. Nothing is sent before
    /// [`flush_submissions`](Self::flush_submissions), [`poll`](Self::poll) or [`wait`](Self::wait).
    ///
    /// A command that can never work (wrong length, unknown namespace, connection lost) is taken, too, and
    /// completes with its error at the next poll.
    pub fn submit(&mut self, command: &Command, tag: u64) -> Result<(), Busy> {
        if let Some(reason) = self.lost {
            return self.reject(tag, error_after(reason));
        }
        if let Err(invalid) = self.check(command) {
            return self.reject(tag, IoError::Invalid(invalid));
        }
        let &Command {
            op,
            nsid,
            lba,
            blocks,
            buffer,
        } = command;
        match op {
            Op::Read => self.start(Transfer::FromController(buffer), tag, |cid| {
                nvm::Read {
                    nsid,
                    slba: Lba::new(lba),
                    blocks,
                    ..Default::default()
                }
                .emit(cid, &Sgl::NONE)
            }),
            Op::Write { fua } => {
                let control = nvm::IoControl::new().with_fua(fua);
                self.start(Transfer::ToController(buffer), tag, |cid| {
                    nvm::Write {
                        nsid,
                        slba: Lba::new(lba),
                        blocks,
                        control,
                        ..Default::default()
                    }
                    .emit(cid, &Sgl::NONE)
                })
            }
            Op::Compare => self.start(Transfer::ToController(buffer), tag, |cid| {
                nvm::Compare {
                    nsid,
                    slba: Lba::new(lba),
                    blocks,
                    ..Default::default()
                }
                .emit(cid, &Sgl::NONE)
            }),
            Op::Flush => self.start(Transfer::None, tag, |cid| {
                nvm::Flush { nsid }.emit(cid, &Sgl::NONE)
            }),
            Op::WriteZeroes { deallocate } => {
                let control = nvm::IoControl::new().with_deac(deallocate);
                self.start(Transfer::None, tag, |cid| {
                    nvm::WriteZeroes {
                        nsid,
                        slba: Lba::new(lba),
                        blocks,
                        control,
                        ..Default::default()
                    }
                    .emit(cid, &Sgl::NONE)
                })
            }
            Op::Verify => self.start(Transfer::None, tag, |cid| {
                nvm::Verify {
                    nsid,
                    slba: Lba::new(lba),
                    blocks,
                    ..Default::default()
                }
                .emit(cid, &Sgl::NONE)
            }),
            Op::Discard => self.submit_discard(nsid, &[DiscardRange { lba, blocks }], tag),
        }
    }

    /// A discard of 1 to 256 ranges in one command. `ranges` is copied.
    pub fn submit_discard(
        &mut self,
        nsid: Nsid,
        ranges: &[DiscardRange],
        tag: u64,
    ) -> Result<(), Busy> {
        if let Some(reason) = self.lost {
            return self.reject(tag, error_after(reason));
        }
        let invalid = match self.namespaces.find(nsid) {
            None => Some(InvalidCommand::Namespace),
            Some(namespace) if !namespace.discard => Some(InvalidCommand::Unsupported),
            Some(_) if ranges.is_empty() || ranges.len() > 256 => Some(InvalidCommand::Ranges),
            Some(_) => None,
        };
        if let Some(invalid) = invalid {
            return self.reject(tag, IoError::Invalid(invalid));
        }
        let attributes = nvm::DsmAttributes::new().with_deallocate(true);
        let sqe = |cid: Cid| {
            nvm::DatasetManagement {
                nsid,
                ranges: ranges.len() as u16,
                attributes,
            }
            .emit(cid, &Sgl::NONE)
        };
        if let &[range] = ranges {
            return self.start(Transfer::Small(range_bytes(range)), tag, sqe);
        }
        if !self.may_post() {
            return Err(Busy);
        }
        let Some((bounce, span)) = self.bounce.take(16 * ranges.len() as u32) else {
            return Err(Busy);
        };
        for (index, range) in ranges.iter().enumerate() {
            if let Some(room) = span.sub(16 * index as u32, 16) {
                room.copy_from_slice(&range_bytes(*range));
            }
        }
        self.start(Transfer::Bounced(bounce, span), tag, sqe)
    }

    /// Hands everything submitted to the kernel. Completions that arrive meanwhile wait for `poll`.
    pub fn flush_submissions(&mut self) {
        self.clock = None;
        self.send_second_half();
        if self.lost.is_none() && self.refused.is_none() {
            // Events stay in the list; the next poll deals with them, and with the loss.
            if let Err(reason) = self.link.turn(Wait::Poll, &mut self.events) {
                self.refused = Some(reason);
            }
        }
    }

    /// Sends, receives, appends the completions to `out`; never sleeps. Returns how many were appended.
    pub fn poll(&mut self, out: &mut Vec<IoCompletion>) -> usize {
        let before = out.len();
        self.turn(Wait::Poll, out);
        out.len() - before
    }

    /// As `poll`, until at least `min` completions were appended or `timeout` is over. Spins for the
    /// poll budget, then sleeps. `min` is capped by what is outstanding.
    pub fn wait(&mut self, timeout: Duration, min: usize, out: &mut Vec<IoCompletion>) -> usize {
        let before = out.len();
        let min = min.min(self.outstanding());
        self.turn(Wait::Poll, out);
        if out.len() - before >= min {
            return out.len() - before;
        }
        let mut now = self.link.now();
        let deadline = now.checked_add(timeout);
        while out.len() - before < min && deadline.is_none_or(|deadline| now < deadline) {
            let mut until = now + LONGEST_SLEEP;
            for limit in [deadline, self.slots.next_deadline()].into_iter().flatten() {
                until = until.min(limit);
            }
            self.turn(Wait::Until(until), out);
            now = if self.lost.is_some() {
                self.link.clock()
            } else {
                self.link.now()
            };
        }
        out.len() - before
    }

    /// The thread may not come back for a while (a second and more): acknowledges what was received. An engine in this
    /// thread acknowledges only while it is polled, and a target that misses an acknowledgement for long takes us
    /// for dead. Costs a packet; waiting in [`wait`](Self::wait) does it by itself.
    pub fn pause(&mut self) {
        self.clock = None;
        if self.lost.is_none() {
            self.link.pause();
        }
    }

    /// Disconnects. Everything outstanding completes into `out`. Afterwards every command completes with
    /// [`IoError::Closed`].
    pub fn close(&mut self, out: &mut Vec<IoCompletion>) {
        // What is already answered is not lost.
        self.turn(Wait::Poll, out);
        if self.lost.is_none() {
            let until = self.link.clock() + GOODBYE;
            self.tear_down(LostReason::Closed, until, out);
        }
        self.hand_out_rejected(out);
    }

    /// What this queue pair counted.
    pub fn counters(&self) -> QueueCounters {
        self.counters
    }

    /// What the transport engine below counted, for this and the other queue pairs of the thread that share it.
    pub fn transport_counters(&self) -> crate::TransportCounters {
        self.link.counters()
    }

    fn check_room(&self) -> Result<(), Error> {
        if let Some(reason) = self.lost {
            return Err(Error::Lost(reason));
        }
        if self.regions.is_full() {
            return Err(Error::Transport(
                "too many memory registrations on one queue pair: register larger pieces".into(),
            ));
        }
        Ok(())
    }

    // ---- details -------------------------------------------------------------------------------

    fn check(&mut self, command: &Command) -> Result<(), InvalidCommand> {
        let Some(namespace) = self.namespaces.find(command.nsid) else {
            return Err(InvalidCommand::Namespace);
        };
        let carries_data = match command.op {
            Op::Flush => {
                return if command.buffer.is_some() {
                    Err(InvalidCommand::Buffer)
                } else {
                    Ok(())
                };
            }
            Op::Read | Op::Write { .. } => true,
            Op::Compare if namespace.compare => true,
            Op::WriteZeroes { .. } if namespace.write_zeroes => false,
            Op::Verify if namespace.verify => false,
            // Checked by submit_discard; a discard's length is a dword.
            Op::Discard => {
                return if command.buffer.is_some() {
                    Err(InvalidCommand::Buffer)
                } else if command.blocks > namespace.max_blocks.discard {
                    Err(InvalidCommand::Blocks)
                } else {
                    Ok(())
                };
            }
            Op::Compare | Op::WriteZeroes { .. } | Op::Verify => {
                return Err(InvalidCommand::Unsupported);
            }
        };
        if command.blocks == 0 || command.blocks > namespace.max_blocks.for_op(command.op) {
            return Err(InvalidCommand::Blocks);
        }
        if carries_data {
            let bytes = u64::from(command.blocks) * u64::from(namespace.block_size);
            if bytes > u64::from(self.max_transfer_bytes) {
                return Err(InvalidCommand::Blocks);
            }
            if command
                .buffer
                .is_none_or(|buffer| u64::from(buffer.len()) != bytes)
            {
                return Err(InvalidCommand::Buffer);
            }
        } else if command.buffer.is_some() {
            return Err(InvalidCommand::Buffer);
        }
        Ok(())
    }

    fn reject(&mut self, tag: u64, error: IoError) -> Result<(), Busy> {
        if self.rejected.len() >= usize::from(self.slots.depth()) {
            return Err(Busy);
        }
        self.counters.submitted += 1;
        self.rejected.push_back(IoCompletion {
            tag,
            result: Err(error),
        });
        Ok(())
    }

    fn hand_out_rejected(&mut self, out: &mut Vec<IoCompletion>) {
        self.counters.completed += self.rejected.len() as u64;
        self.counters.failed += self.rejected.len() as u64;
        out.extend(self.rejected.drain(..));
    }

    #[inline]
    pub(crate) fn start(
        &mut self,
        transfer: Transfer,
        tag: u64,
        sqe: impl FnOnce(Cid) -> [u8; 64],
    ) -> Result<(), Busy> {
        if !self.may_post() {
            return Err(Busy); // when it is refused, the next poll tears down; then it is taken and fails
        }
        let small;
        let (context, data) = match transfer {
            Transfer::None => (Context::default(), Data::None),
            Transfer::Small(bytes) => {
                small = bytes;
                (Context::default(), Data::Small(&small))
            }
            Transfer::Bounced(bounce, span) => (
                Context {
                    bounce: Some(bounce),
                    ..Context::default()
                },
                Data::ToController(span, self.bounce_key),
            ),
            Transfer::ToController(buffer) | Transfer::FromController(buffer) => {
                let inbound = matches!(transfer, Transfer::FromController(_));
                let Some(buffer) = buffer else {
                    return self.reject(tag, IoError::Invalid(InvalidCommand::Buffer));
                };
                let (bounce, span, key) = match self.regions.find(buffer) {
                    Some(key) => (None, buffer, key),
                    None if buffer.len() > self.bounce.buffer_bytes() => {
                        return self.reject(tag, IoError::Invalid(InvalidCommand::Buffer));
                    }
                    None => {
                        let Some((index, span)) = self.bounce.take(buffer.len()) else {
                            return Err(Busy);
                        };
                        if !inbound {
                            span.copy_from_span(&buffer);
                            self.counters.bounced_bytes += u64::from(buffer.len());
                        }
                        self.counters.bounced += 1;
                        (Some(index), span, self.bounce_key)
                    }
                };
                let data = if inbound {
                    Data::FromController(span, key)
                } else {
                    Data::ToController(span, key)
                };
                (
                    Context {
                        buffer: Some(buffer),
                        bounce,
                        inbound,
                        half: None,
                    },
                    data,
                )
            }
        };
        let now = self.submission_time();
        let Some(cid) = self.slots.take(tag, now, context) else {
            self.put_back(context.bounce);
            return Err(Busy);
        };
        let mut sqe = sqe(Cid::new(cid));
        match self.link.post(cid, &mut sqe, data) {
            Ok(posted) => {
                if posted == Posted::HoldsBuffer {
                    self.slots.hold_buffer(cid);
                }
                self.counters.submitted += 1;
                Ok(())
            }
            Err(refused) => {
                self.slots.untake(cid);
                self.put_back(context.bounce);
                if let PostRefused::Lost(reason) = refused {
                    self.refused = Some(reason);
                }
                Err(Busy)
            }
        }
    }

    /// When commands submitted now were submitted.
    #[inline]
    fn submission_time(&mut self) -> Instant {
        match self.clock {
            Some(now) => now,
            None => *self.clock.insert(self.link.clock()),
        }
    }

    /// May a command be posted now?
    #[inline]
    fn may_post(&mut self) -> bool {
        self.send_second_half();
        self.refused.is_none() && !self.pairs.is_one_cut()
    }

    /// When the next command runs into its time-out.
    pub(crate) fn next_deadline(&mut self) -> Option<Instant> {
        self.slots.next_deadline()
    }

    fn put_back(&mut self, bounce: Option<u16>) {
        if let Some(bounce) = bounce {
            self.bounce.put(bounce);
        }
    }

    /// Once around: sends, receives, appends completions to `out`.
    pub(crate) fn turn(&mut self, wait: Wait, out: &mut Vec<IoCompletion>) {
        self.clock = None;
        let wait = if self.rejected.is_empty() {
            wait
        } else {
            Wait::Poll
        };
        self.hand_out_rejected(out);
        if self.lost.is_some() {
            return;
        }
        self.send_second_half();
        let turned = match self.refused.take() {
            Some(reason) => Err(reason),
            None => self.link.turn(wait, &mut self.events),
        };
        self.take_events(turned, out);
    }

    /// The same for what is here already: the caller lets the thread's reactor work.
    #[inline]
    pub(crate) fn collect(&mut self, out: &mut Vec<IoCompletion>) {
        self.clock = None;
        self.hand_out_rejected(out);
        if self.lost.is_some() {
            return;
        }
        self.send_second_half();
        let mut collected = self.link.collect(&mut self.events);
        if let Some(reason) = self.refused.take() {
            // The link knows better why than who was refused.
            collected = collected.and(Err(reason));
        }
        self.take_events(collected, out);
    }

    /// The time, even if the reactor has not worked since.
    pub(crate) fn clock(&self) -> Instant {
        self.link.clock()
    }

    /// It ends with the next [`collect`](Self::collect).
    pub(crate) fn end(&mut self, reason: LostReason) {
        self.refused.get_or_insert(reason);
    }

    /// Whether completions wait that no event of the thread's reactor announces.
    pub(crate) fn has_rejected(&self) -> bool {
        !self.rejected.is_empty() || self.refused.is_some()
    }

    #[inline]
    fn take_events(&mut self, turned: Result<(), LostReason>, out: &mut Vec<IoCompletion>) {
        let mut events = std::mem::take(&mut self.events);
        let mut broken = None;
        for event in events.drain(..) {
            let finished = match event {
                LinkEvent::Response {
                    cid,
                    status,
                    immediate,
                    ..
                } => {
                    self.counters.immediate_completions += u64::from(immediate);
                    self.slots.response(cid, status.ok().map_err(IoError::Nvme))
                }
                LinkEvent::SendDone { cid } => self.slots.send_done(cid),
            };
            match finished {
                Ok(Some(finished)) => self.finish(finished, out),
                Ok(None) => {}
                Err(_) => broken = Some(LostReason::Protocol),
            }
        }
        self.events = events;
        let now = self.link.now();
        let lost = turned
            .err()
            .or(broken)
            .or_else(|| {
                self.slots
                    .next_deadline()
                    .filter(|at| *at <= now)
                    .map(|_| LostReason::CommandTimeout)
            })
            .or_else(|| self.view.lost());
        if let Some(reason) = lost {
            self.tear_down(reason, now, out);
        }
    }

    #[inline]
    fn finish(&mut self, finished: Finished<Context>, out: &mut Vec<IoCompletion>) {
        let context = finished.context;
        if let Some(index) = context.bounce {
            if let (true, Ok(()), Some(buffer)) = (context.inbound, finished.result, context.buffer)
                && let Some(span) = self.bounce.span(index, buffer.len())
            {
                buffer.copy_from_span(&span);
                self.counters.bounced_bytes += u64::from(buffer.len());
            }
            self.bounce.put(index);
        }
        let result = match context.half {
            None => finished.result,
            Some(half) => match self.pair_result(half, finished.result) {
                Some(result) => result,
                None => return,
            },
        };
        self.counters.completed += 1;
        self.counters.failed += u64::from(result.is_err());
        out.push(IoCompletion {
            tag: finished.tag,
            result,
        });
    }

    #[cold]
    fn tear_down(&mut self, reason: LostReason, until: Instant, out: &mut Vec<IoCompletion>) {
        tracing::debug!(%reason, outstanding = self.slots.outstanding(), "queue pair ends");
        self.lost = Some(reason);
        self.pairs.forget_second_half();
        self.link.close(until);
        // From here on nothing touches the buffers.
        let now = self.link.clock().max(self.link.now());
        while let Some(finished) = self.slots.abandon(error_after(reason), now) {
            self.finish(finished, out);
        }
        self.events.clear();
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        self.close(&mut Vec::new());
    }
}

impl std::fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueuePair")
            .field("depth", &self.depth())
            .field("outstanding", &self.outstanding())
            .field("lost", &self.lost)
            .finish_non_exhaustive()
    }
}

/// Where a command's data is.
#[derive(Clone, Copy)]
pub(crate) enum Transfer {
    None,
    Small([u8; 16]),
    ToController(Option<Span>),
    FromController(Option<Span>),
    /// Already in this bounce buffer.
    Bounced(u16, Span),
}

fn range_bytes(range: DiscardRange) -> [u8; 16] {
    let range = nvm::DsmRange {
        cattr: U32::ZERO,
        nlb: U32::new(range.blocks),
        slba: U64::new(range.lba),
    };
    range.bytes().try_into().unwrap_or_default()
}

fn error_after(reason: LostReason) -> IoError {
    match reason {
        LostReason::Closed => IoError::Closed,
        _ => IoError::ConnectionLost,
    }
}

mod fused;
pub(crate) mod opening;
#[cfg(test)]
mod tests;
