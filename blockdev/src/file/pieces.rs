//! The caller's memory from some byte on: as a vector for the kernel, and copied to and from bounce
//! buffers.

use flexblk_reactor::Span;

use crate::{MAX_SPANS, spans::same_bytes};

/// What `preadv` and `pwritev` take.
pub(super) type Vector = [libc::iovec; MAX_SPANS];

pub(super) const EMPTY_VECTOR: Vector = [libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
}; MAX_SPANS];

/// Calls `each` with pieces of `spans` from byte `skip` on, and where they lie in the `len` bytes.
fn pieces(spans: &[Span], skip: u64, len: u32, mut each: impl FnMut(Span, u32) -> bool) {
    let mut skip = skip;
    let mut at = 0;
    for span in spans {
        if at == len {
            return;
        }
        if skip >= u64::from(span.len()) {
            skip -= u64::from(span.len());
            continue;
        }
        let start = skip as u32; // < span.len()
        skip = 0;
        let n = (span.len() - start).min(len - at);
        let Some(piece) = span.sub(start, n) else {
            return;
        };
        if !each(piece, at) {
            return;
        }
        at += n;
    }
}

/// Writes the pieces behind `skip` to `vector`; returns their number.
pub(super) fn fill_vector(vector: &mut Vector, spans: &[Span], skip: u64) -> u32 {
    let mut n = 0;
    pieces(spans, skip, u32::MAX, |piece, _| {
        let Some(entry) = vector.get_mut(n) else {
            return false;
        };
        *entry = libc::iovec {
            iov_base: piece.as_ptr().cast(),
            iov_len: piece.len() as usize,
        };
        n += 1;
        true
    });
    n as u32
}

/// From the caller's memory, behind `skip`, to a bounce buffer.
pub(super) fn copy_out(spans: &[Span], skip: u64, bounce: &Span, len: u32) {
    pieces(spans, skip, len, |piece, at| {
        bounce
            .sub(at, piece.len())
            .is_some_and(|to| to.copy_from_span(&piece) == piece.len() as usize)
    });
}

/// From a bounce buffer to the caller's memory behind `skip`.
pub(super) fn copy_in(spans: &[Span], skip: u64, bounce: &Span, len: u32) {
    pieces(spans, skip, len, |piece, at| {
        bounce
            .sub(at, piece.len())
            .is_some_and(|from| piece.copy_from_span(&from) == piece.len() as usize)
    });
}

/// Whether a bounce buffer holds the bytes of the caller's memory behind `skip`.
pub(super) fn equal(spans: &[Span], skip: u64, bounce: &Span, len: u32) -> bool {
    let mut equal = true;
    pieces(spans, skip, len, |piece, at| {
        equal = bounce
            .sub(at, piece.len())
            .is_some_and(|held| same_bytes(&held, &piece));
        equal
    });
    equal
}
