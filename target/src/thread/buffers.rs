//! I/O buffers of a thread: two sizes, a fixed number, allocated at start, registered once with the
//! transport and once with io_uring.

use std::sync::Arc;

use arrayvec::ArrayVec;
use flexblk_blockdev::IoBuffers;
use flexblk_reactor::{Buffer, HugePages, Order, Pool, Reactor, SharedMemory, Span};
use flexins::engine::Engine;
use flexins::verbs::{Access, Mr, Pd, Sge};

use crate::error::StartError;
use crate::queue::request::MAX_TRANSFER_BYTES;

/// Bytes of a small buffer: the usual I/O of databases and file systems, and Identify data.
pub(crate) const SMALL_BYTES: u32 = 16 << 10;
/// Bytes of a large buffer.
pub(crate) const LARGE_BYTES: u32 = 128 << 10;
/// Large buffers of the longest transfer.
pub(crate) const MAX_PIECES: usize = (MAX_TRANSFER_BYTES / LARGE_BYTES) as usize;

/// How many buffers one queue holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Share {
    small: u32,
    large: u32,
}

/// May a holder of `held` buffers take `wanted` more while `free` are left? One holder gets at most
/// half of the buffers, two a third each, and so on: a host that does not read its answers leaves
/// buffers for the others. (Choudhury and Hahne's dynamic threshold, with a factor of 1.) Who holds
/// none may take whatever is there.
fn allows(held: u32, wanted: u32, free: u32) -> bool {
    wanted <= free && (held == 0 || held + wanted <= free)
}

/// Buffers lent to a command; goes back by [`Buffers::put`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HeldId(u32);

/// The buffers.
pub(crate) struct Buffers {
    small: Class,
    large: Class,
    /// Lists of lent buffers. There are never more lists than buffers, so none is ever allocated
    /// after the start.
    held: Vec<Held>,
    free: Vec<u32>,
    /// Times that a command had to wait.
    pub(crate) waits: u64,
    /// Buffers have come back since the waiting commands were looked at.
    pub(crate) returned: bool,
}

struct Class {
    pool: Pool,
    mr: Mr,
    /// Where the class starts in this process.
    base: usize,
    /// Registered with io_uring under this index.
    fixed: Option<u16>,
}

#[derive(Default)]
struct Held {
    buffers: ArrayVec<Buffer, MAX_PIECES>,
    large: bool,
}

/// How many buffers a thread gets out of `bytes`; an error when the longest transfer would not fit.
pub(crate) fn counts(bytes: u64) -> Option<(u32, u32)> {
    let large = (bytes / 2) / u64::from(LARGE_BYTES);
    let small = (bytes / 2) / u64::from(SMALL_BYTES);
    let (small, large) = (u32::try_from(small).ok()?, u32::try_from(large).ok()?);
    (large as usize >= MAX_PIECES).then_some((small, large))
}

/// Fewest bytes that [`counts`] accepts.
pub(crate) const MIN_BYTES: u64 = 2 * MAX_TRANSFER_BYTES as u64;

impl Buffers {
    pub(crate) fn new(
        small: u32,
        large: u32,
        engine: &mut Engine,
        pd: Pd,
        reactor: &mut Reactor,
    ) -> Result<Self, StartError> {
        let small = Class::new("small buffers", SMALL_BYTES, small, engine, pd, reactor)?;
        let large = Class::new("large buffers", LARGE_BYTES, large, engine, pd, reactor)?;
        let lists = small.pool.count() + large.pool.count();
        Ok(Self {
            small,
            large,
            held: (0..lists).map(|_| Held::default()).collect(),
            free: (0..lists).rev().collect(),
            waits: 0,
            returned: false,
        })
    }

    /// Buffers for `len` bytes, all or none, for a queue that holds `share`.
    pub(crate) fn take(&mut self, len: u32, share: &mut Share) -> Option<HeldId> {
        if len <= SMALL_BYTES
            && allows(share.small, 1, self.small.pool.available())
            && let Some(buffer) = self.small.pool.take()
        {
            share.small += 1;
            return self.hold(ArrayVec::from_iter([buffer]), false);
        }
        let pieces = len.div_ceil(LARGE_BYTES).max(1);
        if pieces as usize > MAX_PIECES || !allows(share.large, pieces, self.large.pool.available())
        {
            return None;
        }
        let buffers = (0..pieces).filter_map(|_| self.large.pool.take()).collect();
        share.large += pieces;
        self.hold(buffers, true)
    }

    fn hold(&mut self, buffers: ArrayVec<Buffer, MAX_PIECES>, large: bool) -> Option<HeldId> {
        let id = self.free.pop()?;
        if let Some(held) = self.held.get_mut(id as usize) {
            *held = Held { buffers, large };
        }
        Some(HeldId(id))
    }

    /// Takes lent buffers back.
    pub(crate) fn put(&mut self, id: HeldId, share: &mut Share) {
        let Some(held) = self.held.get_mut(id.0 as usize) else {
            return;
        };
        debug_assert!(!held.buffers.is_empty(), "returned twice");
        let (pool, count) = match held.large {
            true => (&mut self.large.pool, &mut share.large),
            false => (&mut self.small.pool, &mut share.small),
        };
        for buffer in held.buffers.drain(..) {
            pool.put(buffer);
            *count = count.saturating_sub(1);
        }
        self.free.push(id.0);
        self.returned = true;
    }

    /// The first `len` bytes, piece by piece.
    fn pieces(&self, id: HeldId, len: u32) -> impl Iterator<Item = (&Class, Span)> {
        let held = self.held.get(id.0 as usize);
        let class = if held.is_some_and(|held| held.large) {
            &self.large
        } else {
            &self.small
        };
        let mut rest = len;
        held.into_iter()
            .flat_map(|held| held.buffers.iter())
            .map_while(move |buffer| {
                let piece = rest.min(buffer.span().len());
                rest -= piece;
                buffer
                    .span()
                    .sub(0, piece)
                    .filter(|span| !span.is_empty())
                    .map(|span| (class, span))
            })
    }

    /// As a gather or scatter list for the transport.
    pub(crate) fn sges(&self, id: HeldId, len: u32) -> ArrayVec<Sge, MAX_PIECES> {
        let entries = self.pieces(id, len);
        entries
            .map(|(class, span)| class.mr.sge(class.offset_of(span), span.len()))
            .collect()
    }

    /// `len` bytes from `offset` on as the memory of a device's I/O.
    pub(crate) fn io(&self, id: HeldId, offset: u32, len: u32) -> IoBuffers {
        let mut fixed = None;
        let mut io = IoBuffers::default();
        let mut skip = offset;
        for (class, span) in self.pieces(id, offset.saturating_add(len)) {
            let skipped = skip.min(span.len());
            skip -= skipped;
            let rest = span.sub(skipped, span.len() - skipped);
            let Some(span) = rest.filter(|span| !span.is_empty()) else {
                continue;
            };
            fixed = class.fixed;
            io.spans.push(span);
        }
        io.fixed = fixed.filter(|_| io.spans.len() == 1);
        io
    }

    /// `len` bytes from `offset` on, piece by piece.
    pub(crate) fn spans(&self, id: HeldId, offset: u32, len: u32) -> ArrayVec<Span, MAX_PIECES> {
        let mut skip = offset;
        let pieces = self.pieces(id, offset.saturating_add(len));
        pieces
            .filter_map(|(_, span)| {
                let skipped = skip.min(span.len());
                skip -= skipped;
                span.sub(skipped, span.len() - skipped)
                    .filter(|span| !span.is_empty())
            })
            .collect()
    }

    /// Copies `bytes` into lent buffers.
    pub(crate) fn copy_in(&self, id: HeldId, bytes: &[u8]) {
        let mut rest = bytes;
        for (_, span) in self.pieces(id, u32::try_from(bytes.len()).unwrap_or(u32::MAX)) {
            let copied = span.copy_from_slice(rest);
            rest = rest.get(copied..).unwrap_or_default();
        }
    }

    /// Copies what lies at `offset` of lent buffers out; the range must be within one buffer.
    pub(crate) fn copy_out(&self, id: HeldId, offset: u32, bytes: &mut [u8]) {
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let Some(end) = offset.checked_add(len) else {
            return;
        };
        if let Some(part) = self
            .pieces(id, end)
            .next()
            .and_then(|(_, span)| span.sub(offset, len))
        {
            part.copy_to_slice(bytes);
        }
    }

    /// Free buffers of each size.
    pub(crate) fn available(&self) -> (u32, u32) {
        (self.small.pool.available(), self.large.pool.available())
    }
}

impl Class {
    fn new(
        name: &'static str,
        len: u32,
        count: u32,
        engine: &mut Engine,
        pd: Pd,
        reactor: &mut Reactor,
    ) -> Result<Self, StartError> {
        let bytes = u64::from(len) * u64::from(count);
        let memory = SharedMemory::create(name, bytes, HugePages::Try)?;
        let mr = engine.register_memory(pd, &memory, 0, bytes, Access::LOCAL_WRITE)?;
        let fixed = Self::fix(&memory, reactor);
        let base = memory.as_ptr() as usize;
        let pool = Pool::new(Arc::clone(&memory), len, count, Order::LastFreedFirst)?;
        Ok(Self {
            pool,
            mr,
            base,
            fixed,
        })
    }

    /// One registered buffer for the whole class. Without it, or when the kernel refuses to pin as
    /// much (RLIMIT_MEMLOCK), I/O works, only a little slower.
    fn fix(memory: &Arc<SharedMemory>, reactor: &mut Reactor) -> Option<u16> {
        let span = memory.span(0, u32::try_from(memory.len()).ok()?)?;
        match reactor.register_buffers(&[span]) {
            Ok(first) => Some(first),
            Err(error) => {
                tracing::debug!(%error, "I/O buffers are not registered with io_uring");
                None
            }
        }
    }

    fn offset_of(&self, span: Span) -> u64 {
        (span.as_ptr() as usize).wrapping_sub(self.base) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_leaves_half_for_others() {
        let total = 64;
        let mut held = 0;
        while allows(held, 1, total - held) {
            held += 1;
        }
        assert_eq!(held, 32);
        let mut second = 0;
        while allows(second, 1, total - held - second) {
            second += 1;
        }
        assert_eq!(second, 16);
        assert!(
            allows(0, 8, 8),
            "the longest transfer passes when there is just enough"
        );
        assert!(!allows(0, 9, 8));
    }

    #[test]
    fn ranges_of_held_buffers() {
        let mut engine = Engine::new(flexins::engine::EngineConfig::default(), 1);
        let pd = engine.alloc_pd();
        let mut reactor = Reactor::new(&flexblk_reactor::Config::default()).unwrap();
        let mut buffers = Buffers::new(4, 8, &mut engine, pd, &mut reactor).unwrap();
        let id = buffers
            .take(2 * LARGE_BYTES + 4, &mut Share::default())
            .unwrap();
        let lens = |offset, len| -> Vec<u32> {
            let spans = buffers.spans(id, offset, len);
            spans.iter().map(Span::len).collect()
        };
        assert_eq!(lens(0, 2 * LARGE_BYTES + 4), [LARGE_BYTES, LARGE_BYTES, 4]);
        assert_eq!(lens(LARGE_BYTES - 4, 8), [4, 4]);
        assert_eq!(lens(LARGE_BYTES, LARGE_BYTES), [LARGE_BYTES]);
        let whole = buffers.spans(id, 0, 2 * LARGE_BYTES);
        let inner = buffers.spans(id, LARGE_BYTES + 12, 4);
        assert_eq!(inner[0].as_ptr(), whole[1].as_ptr().wrapping_add(12));
    }

    #[test]
    fn the_smallest_share_carries_the_longest_transfer() {
        assert!(counts(MIN_BYTES - 1).is_none());
        assert_eq!(counts(MIN_BYTES), Some((64, MAX_PIECES as u32)));
    }
}
