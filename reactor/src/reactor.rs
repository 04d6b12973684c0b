//! The loop's body: submit, collect, fire timers, spin, sleep.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, squeue};

use crate::features::FIXED_BUFFER_SLOTS;
use crate::timer::Timers;
use crate::{
    BufferRing, Completion, CompletionFlags, Error, Features, Keeper, Op, REACTOR_OWNER, Span,
    Stats, TimerId, Token, Waker,
};

/// How a reactor is made.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Size of the submission queue; the completion queue has four times as many. A power of two
    /// from 256 is sensible.
    pub entries: u32,
    /// How long an idle thread spins before it sleeps.
    pub poll_budget: Duration,
    /// For logs.
    pub name: &'static str,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            entries: 1024,
            poll_budget: Duration::from_micros(100),
            name: "reactor",
        }
    }
}

/// What a turn does when nothing is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Return at once.
    Poll,
    /// Spin for the polling budget, then sleep until something happens.
    Adaptive,
    /// As `Adaptive`, but return at this time at the latest.
    Until(Instant),
}

/// What a look at something beside the ring found: see [`Reactor::turn_polling`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Polled {
    /// Nothing: look again.
    Nothing,
    /// Nothing, and to look again is not worth it: the turn ends, and the caller waits another way.
    Enough,
    /// Something has happened: the turn ends.
    Ready,
}

/// One thread's io_uring with timers and a wake-up. See the crate's documentation for the loop.
///
/// Dropping it cancels what is still in flight and waits up to a second for the kernel to let go of
/// the memory.
#[derive(Debug)]
pub struct Reactor {
    ring: RingDebug,
    features: Features,
    timers: Timers,
    waker: Waker,
    /// Where the kernel puts the eventfd's value.
    wake_value: Box<u64>,
    /// The read of the eventfd is in flight.
    wake_armed: bool,
    /// Entries that found the submission queue full.
    deferred: VecDeque<squeue::Entry>,
    /// Completions reaped while making room for a submission.
    early: Vec<Completion>,
    /// Operations whose final completion is to come.
    in_flight: u64,
    fixed_buffers_used: u32,
    now: Instant,
    last_activity: Instant,
    will_sleep: bool,
    /// Something was submitted since the last turn whose end is worth spinning for.
    asked: bool,
    config: Config,
    stats: Stats,
    keeper: Keeper,
    not_send: PhantomData<*mut ()>,
}

struct RingDebug(IoUring);

impl std::fmt::Debug for RingDebug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IoUring")
    }
}

const WAKE_TOKEN: Token = Token::internal(0);
const CANCEL_TOKEN: Token = Token::internal(1);

/// Looks at a socket in vain, some 50 us, after which whoever asks it by system calls of its own ([`Polled`]) had
/// better let the ring tell.
pub const LOOKS_IN_VAIN: u32 = 256;

/// Looks at shared memory between two looks at the clock, while spinning.
const SPINS_PER_CLOCK: u32 = 16;

impl Reactor {
    /// Makes the ring of the calling thread with the best features of the kernel.
    ///
    /// # Errors
    /// [`Error::Setup`] when there is no io_uring, [`Error::EventFd`].
    pub fn new(config: &Config) -> Result<Self, Error> {
        Self::with_features(config, &Features::ALL)
    }

    /// As [`Reactor::new`], using no optional feature outside `wanted`: for comparisons, and for
    /// testing the ways of older kernels on a new one.
    ///
    /// # Errors
    /// As [`Reactor::new`].
    pub fn with_features(config: &Config, wanted: &Features) -> Result<Self, Error> {
        let (ring, features) =
            Features::build(config.entries.clamp(8, 32768), wanted).map_err(Error::Setup)?;
        tracing::debug!(name = config.name, ?features, "reactor made");
        let now = Instant::now();
        Ok(Self {
            ring: RingDebug(ring),
            features,
            timers: Timers::default(),
            waker: Waker::new()?,
            wake_value: Box::new(0),
            wake_armed: false,
            deferred: VecDeque::new(),
            early: Vec::new(),
            in_flight: 0,
            fixed_buffers_used: 0,
            now,
            last_activity: now,
            will_sleep: false,
            asked: false,
            config: *config,
            stats: Stats::default(),
            keeper: Keeper::new(),
            not_send: PhantomData,
        })
    }

    /// What the kernel can do.
    #[must_use]
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// Changes how long the idle thread spins ([`Config::poll_budget`]) from the next turn on.
    #[inline]
    pub fn set_poll_budget(&mut self, budget: Duration) {
        self.config.poll_budget = budget;
    }

    /// The time as of the end of the last turn.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.now
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Operations whose final completion has not been handed out, without the reactor's own.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// Whether the polling budget is used up: unless something is submitted or happens, the next
    /// waiting turn sleeps without spinning. A turn that ends only to say so gives no completion;
    /// it is the moment to send what was held back (delayed acknowledgements).
    #[must_use]
    pub fn will_sleep(&self) -> bool {
        self.will_sleep
    }

    /// A handle that wakes this reactor from any thread.
    #[must_use]
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Where to leave what operations in flight still use, when its owner is dropped.
    #[must_use]
    pub fn keeper(&self) -> Keeper {
        self.keeper.clone()
    }

    /// Submits what is queued without collecting anything: before a descriptor named in queued
    /// operations is closed. False: the kernel takes no more just now.
    ///
    /// # Errors
    /// [`Error::Enter`] when the ring is unusable.
    pub fn submit_queued(&mut self) -> Result<bool, Error> {
        self.flush_deferred();
        while !self.ring.0.submission().is_empty() {
            let before = self.ring.0.submission().len() + self.deferred.len();
            let mut early = std::mem::take(&mut self.early);
            let entered = self.enter(0, None);
            self.reap(&mut early);
            self.early = early;
            entered?;
            self.flush_deferred();
            if self.ring.0.submission().len() + self.deferred.len() >= before {
                break;
            }
        }
        Ok(self.deferred.is_empty() && self.ring.0.submission().is_empty())
    }

    /// Something was asked for without an operation, by a system call of the caller's own: the answer is worth
    /// spinning for as that of [`Reactor::submit`] is.
    #[inline]
    pub fn note_asked(&mut self) {
        self.will_sleep = false;
        self.asked = true;
    }

    /// Queues an operation; it goes to the kernel with the next turn (earlier only to make room).
    ///
    /// # Safety
    /// Every pointer in `op`, and every pointer found through it, stays valid and in place until the
    /// final completion of `token` (one without [`CompletionFlags::more`]) has been handed out; what
    /// the kernel writes is not read, and what it reads not written, before. File descriptors stay
    /// open as long. This holds on past the reactor's drop, which waits for it.
    pub unsafe fn submit(&mut self, op: Op, token: Token) {
        self.note_asked();
        // SAFETY: the caller's promise.
        unsafe { self.submit_passive(op, token) };
    }

    /// As [`Reactor::submit`], for what waits until somebody else does something, as a receive does: it
    /// is no reason to spin, nor to take back the announcement of sleep.
    ///
    /// # Safety
    /// As [`Reactor::submit`].
    pub unsafe fn submit_passive(&mut self, op: Op, token: Token) {
        self.in_flight += 1;
        self.push(op.entry(token));
    }

    /// Submits what is queued, collects what is finished, fires timers; when there is nothing at
    /// all, waits as `wait` says. Appends to `out` and returns how many completions were added; 0
    /// after a wake-up, a time-out, or to announce sleep ([`Reactor::will_sleep`]).
    ///
    /// # Errors
    /// [`Error::Enter`] when the ring is unusable.
    pub fn turn(&mut self, wait: Wait, out: &mut Vec<Completion>) -> Result<usize, Error> {
        self.turn_polling(wait, out, &mut || Polled::Nothing)
    }

    /// As [`turn`](Self::turn), with something else to look at: `poll` is called once, and again and
    /// again while the thread spins; not before it sleeps. For what a system call of its own finds
    /// sooner than the ring would tell.
    ///
    /// # Errors
    /// As [`turn`](Self::turn).
    pub fn turn_polling(
        &mut self,
        wait: Wait,
        out: &mut Vec<Completion>,
        poll: &mut impl FnMut() -> Polled,
    ) -> Result<usize, Error> {
        self.stats.turns += 1;
        let before = out.len();
        out.append(&mut self.early);
        let asked = std::mem::take(&mut self.asked);
        self.enter_if_useful()?;
        self.reap(out);
        let polled = poll();
        let mut now = Instant::now();
        self.fire_timers(now, out);
        let woken = self.take_wake();
        self.stats.busy += now.saturating_duration_since(self.now);
        if out.len() > before || woken || polled == Polled::Ready {
            self.last_activity = now;
            self.will_sleep = false;
        } else if wait != Wait::Poll && polled == Polled::Nothing {
            if asked {
                self.last_activity = now; // what was just asked for is worth spinning for
            }
            let idle_since = now;
            let slept_before = self.stats.slept;
            self.wait(wait, &mut now, before, out, poll)?;
            let waited = now.saturating_duration_since(idle_since);
            self.stats.spun += waited.saturating_sub(self.stats.slept - slept_before);
        }
        self.now = now;
        Ok(out.len() - before)
    }

    /// Fires `token` at `at`, or at the first turn after.
    pub fn arm(&mut self, at: Instant, token: Token) -> TimerId {
        self.timers.arm(at, token)
    }

    /// Takes a timer back; false when it has fired already.
    pub fn disarm(&mut self, id: TimerId) -> bool {
        self.timers.disarm(id)
    }

    /// The earliest armed timer.
    pub fn next_timer(&mut self) -> Option<Instant> {
        self.timers.next()
    }

    /// Registers a ring of `entries` (a power of two) provided buffers under `group`.
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::Argument`], [`Error::Register`] (`EEXIST`: group in use).
    pub fn register_buffer_ring(&mut self, group: u16, entries: u16) -> Result<BufferRing, Error> {
        if !self.features.buffer_rings {
            return Err(Error::Unsupported("provided-buffer rings (Linux 5.19)"));
        }
        let ring = BufferRing::map(group, entries)?;
        // SAFETY: the ring's memory is mapped, and the kernel pins its pages while registered.
        unsafe {
            self.ring
                .0
                .submitter()
                .register_buf_ring_with_flags(ring.address(), entries, group, 0)
        }
        .map_err(|source| Error::Register {
            what: "a buffer ring",
            source,
        })?;
        Ok(ring)
    }

    /// Ends the registration; the buffers in the ring are the caller's again, once operations that
    /// name the group have completed.
    pub fn unregister_buffer_ring(&mut self, ring: BufferRing) {
        // ENOENT or EINVAL would mean that it is not registered: nothing to undo.
        let _ = self.ring.0.submitter().unregister_buf_ring(ring.group());
    }

    /// Registers spans for `fixed` reads and writes; returns the index of the first, the others
    /// follow. Each span is at most 1 GiB, the table has 1024 slots, and the pages count against
    /// `RLIMIT_MEMLOCK` (the usual reason of failure: use plain operations then).
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::Argument`] when the table is full, [`Error::Register`].
    pub fn register_buffers(&mut self, spans: &[Span]) -> Result<u16, Error> {
        if !self.features.fixed_buffers {
            return Err(Error::Unsupported("sparse buffer tables (Linux 5.19)"));
        }
        let first = self.fixed_buffers_used;
        let count = u32::try_from(spans.len()).unwrap_or(u32::MAX);
        if first.saturating_add(count) > FIXED_BUFFER_SLOTS {
            return Err(Error::Argument("the table of registered buffers is full"));
        }
        let vectors: Vec<libc::iovec> = spans
            .iter()
            .map(|span| libc::iovec {
                iov_base: span.as_ptr().cast(),
                iov_len: span.len() as usize,
            })
            .collect();
        // SAFETY: the spans are mapped by their contract; the kernel pins the pages, so they cannot
        // be reused under it even when the loan ends first.
        unsafe {
            self.ring
                .0
                .submitter()
                .register_buffers_update(first, &vectors, None)
        }
        .map_err(|source| Error::Register {
            what: "fixed buffers",
            source,
        })?;
        self.fixed_buffers_used += count;
        Ok(first as u16)
    }

    // ---- details -------------------------------------------------------------------------------

    fn push(&mut self, entry: squeue::Entry) {
        if self.deferred.is_empty() {
            if self.try_push(&entry) {
                return;
            }
            // Full: let the kernel take them. It may refuse until completions are reaped (EBUSY) or
            // memory is free (EAGAIN); then the entry waits for the next turn.
            let mut early = std::mem::take(&mut self.early);
            let entered = self.enter(0, None);
            self.reap(&mut early);
            self.early = early;
            if entered.is_ok() && self.try_push(&entry) {
                return;
            }
        }
        self.stats.deferred += 1;
        self.deferred.push_back(entry);
    }

    fn try_push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the promise of `submit`'s caller (or, for our own entries, `wake_value` is boxed
        // and outlives the ring).
        unsafe { self.ring.0.submission().push(entry) }.is_ok()
    }

    fn flush_deferred(&mut self) {
        while let Some(entry) = self.deferred.pop_front() {
            if !self.try_push(&entry) {
                self.deferred.push_front(entry);
                return;
            }
        }
    }

    /// Enters without waiting if something is queued or the kernel says that it has work to run.
    /// All it takes to know are two words of shared memory.
    fn enter_if_useful(&mut self) -> Result<(), Error> {
        if !self.deferred.is_empty() {
            self.flush_deferred();
        }
        let queue = ManuallyDrop::new(self.ring.0.submission()); // see `has_news`
        if queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() {
            return Ok(());
        }
        self.enter(0, None)?;
        while !self.deferred.is_empty() {
            let waiting = self.deferred.len();
            self.flush_deferred();
            if self.deferred.len() == waiting {
                break;
            }
            self.enter(0, None)?;
        }
        Ok(())
    }

    /// Whether shared memory says that something has happened. Reads only: the views of the queues
    /// write their positions back when they are dropped, into the cache line that holds the flags
    /// which the kernel sets from another core.
    #[inline]
    fn has_news(&mut self) -> bool {
        if !ManuallyDrop::new(self.ring.0.completion()).is_empty() {
            return true;
        }
        if self.waker.state().is_notified() {
            return true;
        }
        let queue = ManuallyDrop::new(self.ring.0.submission());
        queue.taskrun() || queue.cq_overflow()
    }

    fn wait(
        &mut self,
        wait: Wait,
        now: &mut Instant,
        before: usize,
        out: &mut Vec<Completion>,
        poll: &mut impl FnMut() -> Polled,
    ) -> Result<(), Error> {
        let mut deadline = self.timers.next();
        let mut last = None;
        if let Wait::Until(at) = wait {
            last = Some(at);
            deadline = Some(deadline.map_or(at, |timer| timer.min(at)));
        }
        let sleep_at = self.last_activity + self.config.poll_budget;
        let mut woken = false;
        let mut polled = Polled::Nothing;
        loop {
            if self.has_news() {
                self.enter_if_useful()?;
                self.reap(out);
                woken |= self.take_wake();
            }
            *now = Instant::now();
            self.fire_timers(*now, out);
            if out.len() > before || woken || polled == Polled::Ready {
                self.last_activity = *now;
                self.will_sleep = false;
                return Ok(());
            }
            if polled == Polled::Enough {
                return Ok(());
            }
            if last.is_some_and(|at| *now >= at) {
                return Ok(());
            }
            if *now < sleep_at {
                for _ in 0..SPINS_PER_CLOCK {
                    if self.has_news() {
                        break;
                    }
                    polled = poll();
                    if polled != Polled::Nothing {
                        break;
                    }
                    std::hint::spin_loop();
                }
            } else if self.will_sleep {
                woken = self.sleep(deadline, *now)?;
            } else {
                self.will_sleep = true;
                return Ok(());
            }
        }
    }

    /// Declares sleep and enters the kernel until a completion, a wake-up or `deadline`; true when
    /// a waker had something to say.
    fn sleep(&mut self, deadline: Option<Instant>, now: Instant) -> Result<bool, Error> {
        if !self.wake_armed {
            self.wake_armed = true;
            let op = Op::Read {
                fd: self.waker.raw_fd(),
                ptr: (&raw mut *self.wake_value).cast(),
                len: size_of::<u64>() as u32,
                offset: u64::MAX,
                fixed: None,
            };
            self.push(op.entry(WAKE_TOKEN));
        }
        // From here on a waker writes the eventfd. The read above goes to the kernel with the same
        // system call that sleeps, and an eventfd keeps its count, so the order does not matter.
        if !self.waker.state().try_sleep() {
            self.stats.wakes += 1;
            return Ok(true);
        }
        let timeout = deadline.map(|at| at.saturating_duration_since(now));
        let entered = self.enter(1, timeout);
        let woken = self.waker.state().take();
        self.stats.wakes += u64::from(woken);
        self.stats.sleeps += 1;
        self.stats.slept += now.elapsed();
        entered?;
        Ok(woken)
    }

    fn take_wake(&mut self) -> bool {
        let woken = self.waker.state().is_notified() && self.waker.state().take();
        self.stats.wakes += u64::from(woken);
        woken
    }

    /// One `io_uring_enter`: submits everything queued, runs deferred work, and sleeps for `want`
    /// completions at most `timeout`.
    fn enter(&mut self, want: u32, timeout: Option<Duration>) -> Result<(), Error> {
        let to_submit = self.ring.0.submission().len() as u32;
        // GETEVENTS also without waiting: under DEFER_TASKRUN only that runs the deferred work, so
        // the call that sends is the call that receives.
        let flags = EnterFlags::GETEVENTS;
        self.stats.enters += 1;
        let result = if want == 0 || timeout.is_none() {
            // SAFETY: no argument; queued entries are covered by `submit`'s promise.
            unsafe {
                self.ring
                    .0
                    .submitter()
                    .enter::<libc::sigset_t>(to_submit, want, flags.bits(), None)
            }
        } else {
            let timeout = timeout.unwrap_or_default();
            if self.features.ext_arg {
                let timespec = Timespec::from(timeout);
                let args = SubmitArgs::new().timespec(&timespec);
                // SAFETY: EXT_ARG goes with the argument structure, which lives across the call.
                unsafe {
                    self.ring.0.submitter().enter(
                        to_submit,
                        want,
                        (flags | EnterFlags::EXT_ARG).bits(),
                        Some(&args),
                    )
                }
            } else {
                self.enter_and_poll(to_submit, timeout)
            }
        };
        match result {
            Ok(submitted) => {
                self.stats.sqes += submitted as u64;
                Ok(())
            }
            Err(error) => match error.raw_os_error() {
                // A signal, the end of the time-out, no memory just now.
                Some(libc::EINTR | libc::ETIME | libc::EAGAIN) => Ok(()),
                // The completion queue overflowed: reap first.
                Some(libc::EBUSY) => {
                    self.stats.overflows += 1;
                    Ok(())
                }
                _ => Err(Error::Enter(error)),
            },
        }
    }

    /// Before Linux 5.11 the wait takes no time-out: submit, then `ppoll` the ring's descriptor.
    fn enter_and_poll(&self, to_submit: u32, timeout: Duration) -> std::io::Result<usize> {
        let flags = EnterFlags::GETEVENTS;
        // SAFETY: no argument; queued entries are covered by `submit`'s promise.
        let submitted = unsafe {
            self.ring
                .0
                .submitter()
                .enter::<libc::sigset_t>(to_submit, 0, flags.bits(), None)
        }?;
        let mut poll = libc::pollfd {
            fd: self.ring.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let timespec = libc::timespec {
            tv_sec: timeout.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        // SAFETY: one pollfd and one timespec, both alive across the call; no signal mask.
        let polled =
            unsafe { libc::ppoll(&raw mut poll, 1, &raw const timespec, std::ptr::null()) };
        if polled < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: as above; makes the completions visible.
        unsafe {
            self.ring
                .0
                .submitter()
                .enter::<libc::sigset_t>(0, 0, flags.bits(), None)
        }?;
        Ok(submitted)
    }

    fn reap(&mut self, out: &mut Vec<Completion>) {
        if ManuallyDrop::new(self.ring.0.completion()).is_empty() {
            return;
        }
        for entry in self.ring.0.completion() {
            self.stats.cqes += 1;
            let token = Token::from_user_data(entry.user_data());
            if token.owner() == REACTOR_OWNER {
                if token == WAKE_TOKEN {
                    self.wake_armed = false;
                    self.stats.eventfd_wakes += u64::from(entry.result() > 0);
                }
                continue;
            }
            let flags = CompletionFlags::from_cqe(entry.flags());
            if !flags.more() {
                self.in_flight -= 1;
            }
            out.push(Completion {
                token,
                result: entry.result(),
                flags,
            });
        }
    }

    fn fire_timers(&mut self, now: Instant, out: &mut Vec<Completion>) {
        while let Some(token) = self.timers.pop_due(now) {
            self.stats.timers += 1;
            out.push(Completion {
                token,
                result: 0,
                flags: CompletionFlags::of_timer(),
            });
        }
    }
}

impl Drop for Reactor {
    /// Closing a ring only starts the end of its operations; memory they name must not be reused
    /// before. So cancel everything and wait, but not for ever.
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(1);
        self.wait_for_end(deadline);
        if self.in_flight > 0 {
            tracing::warn!(
                name = self.config.name,
                in_flight = self.in_flight,
                "operations outlive their reactor"
            );
            self.keeper.leak();
        } else {
            self.keeper.end();
        }
    }
}

impl Reactor {
    fn wait_for_end(&mut self, deadline: Instant) {
        // What never reached the kernel ends here.
        for entry in std::mem::take(&mut self.deferred) {
            let token = Token::from_user_data(entry.get_user_data());
            if token == WAKE_TOKEN {
                self.wake_armed = false;
            } else if token.owner() != REACTOR_OWNER {
                self.in_flight -= 1;
            }
        }
        let mut out = Vec::new();
        while self.in_flight > 0 || self.wake_armed {
            let cancel = io_uring::opcode::AsyncCancel2::new(io_uring::types::CancelBuilder::any())
                .build()
                .user_data(CANCEL_TOKEN.user_data());
            self.push(cancel);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero()
                || self
                    .enter(1, Some(left.min(Duration::from_millis(20))))
                    .is_err()
            {
                return;
            }
            self.reap(&mut out);
            out.clear();
        }
    }
}
