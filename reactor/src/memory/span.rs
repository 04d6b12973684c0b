//! A loan of memory for one I/O.
#![allow(unsafe_code)]

use std::fmt;
use std::ptr::NonNull;

/// A range of memory lent for an I/O: address and length, freely copied and sent.
///
/// Contract, accepted by whoever constructs one: the range stays mapped, readable and writable until
/// the loan is returned (the completion of the I/O, the deregistration of the region). Kernel, peer
/// and other threads may touch it meanwhile; so its bytes are only ever copied in and out, never
/// interpreted in place, and a race changes bytes but nothing else.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Span {
    ptr: NonNull<u8>,
    len: u32,
}

// SAFETY: a span is an address; the contract above holds for every thread, and all accesses are raw
// byte copies.
unsafe impl Send for Span {}
// SAFETY: as for Send; methods take no reference to the memory.
unsafe impl Sync for Span {}

impl Span {
    /// A span of `len` bytes at `ptr`.
    ///
    /// # Safety
    /// The type's contract: the range is one mapped, readable and writable object until the last
    /// copy of this span, and of every span and operation made from it, has been dropped or is not
    /// used any more; no Rust reference to the range is alive while the span's methods run.
    #[must_use]
    pub const unsafe fn from_raw_parts(ptr: NonNull<u8>, len: u32) -> Self {
        Self { ptr, len }
    }

    /// An empty span that points nowhere.
    #[must_use]
    pub const fn empty() -> Self {
        Self {
            ptr: NonNull::dangling(),
            len: 0,
        }
    }

    /// Bytes.
    #[must_use]
    pub const fn len(&self) -> u32 {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// `len` bytes from `offset`, if they lie inside.
    #[must_use]
    pub fn sub(&self, offset: u32, len: u32) -> Option<Self> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: offset <= self.len, so the address stays inside (or one past) the same object.
        let ptr = unsafe { self.ptr.add(offset as usize) };
        Some(Self { ptr, len })
    }

    /// Copies the front of `bytes` in; returns how many fitted.
    pub fn copy_from_slice(&self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(self.len as usize);
        // SAFETY: n is within both; the contract keeps the range mapped and writable, and no
        // reference to it exists, so `bytes` does not overlap it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.ptr.as_ptr(), n) };
        n
    }

    /// Copies the span's front out into `bytes`; returns how many there were.
    pub fn copy_to_slice(&self, bytes: &mut [u8]) -> usize {
        let n = bytes.len().min(self.len as usize);
        // SAFETY: as in `copy_from_slice`.
        unsafe { std::ptr::copy_nonoverlapping(self.ptr.as_ptr(), bytes.as_mut_ptr(), n) };
        n
    }

    /// Copies as much of `from` as fits; the two may overlap. Returns how many bytes.
    pub fn copy_from_span(&self, from: &Span) -> usize {
        let n = from.len.min(self.len) as usize;
        // SAFETY: n is within both; both contracts keep their ranges mapped; `copy` allows overlap.
        unsafe { std::ptr::copy(from.ptr.as_ptr(), self.ptr.as_ptr(), n) };
        n
    }

    /// Sets every byte.
    pub fn fill(&self, value: u8) {
        // SAFETY: the contract keeps the range mapped and writable.
        unsafe { std::ptr::write_bytes(self.ptr.as_ptr(), value, self.len as usize) };
    }

    /// Asks the processor to load the front of the range (at most `max_len` bytes) into its second
    /// level cache, and does not wait for it. Changes nothing but time.
    #[inline]
    pub fn prefetch(&self, max_len: u32) {
        for line in self.lines(max_len) {
            prefetch_line(line);
        }
    }

    /// As [`Span::prefetch`], for bytes that will be written: the processor takes the lines from
    /// other cores, too.
    #[inline]
    pub fn prefetch_for_write(&self, max_len: u32) {
        for line in self.lines(max_len) {
            prefetch_line_for_write(line);
        }
    }

    #[inline]
    fn lines(&self, max_len: u32) -> impl Iterator<Item = *const u8> {
        const LINE_LEN_BYTES: usize = 64;
        let start = self.ptr.as_ptr().cast_const();
        let offsets = (0..self.len.min(max_len) as usize).step_by(LINE_LEN_BYTES);
        offsets.map(move |offset| start.wrapping_add(offset))
    }

    /// The bytes in place.
    ///
    /// # Safety
    /// Nobody (kernel, peer, thread) writes to the range while the slice lives, and the loan is not
    /// returned before.
    #[must_use]
    pub unsafe fn as_slice<'a>(&self) -> &'a [u8] {
        // SAFETY: mapped by the contract, unwritten by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len as usize) }
    }

    /// The bytes in place, writable.
    ///
    /// # Safety
    /// Nobody else touches the range while the slice lives, and the loan is not returned before.
    #[must_use]
    pub unsafe fn as_mut_slice<'a>(&self) -> &'a mut [u8] {
        // SAFETY: mapped by the contract, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len as usize) }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn prefetch_line(address: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: SSE belongs to x86_64; a prefetch of any address, mapped or not, has no effect that
    // a program could see.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn prefetch_line_for_write(address: *const u8) {
    // SAFETY: PREFETCHW of any address, mapped or not, has no effect that a program could see; a
    // processor without it takes it for a no-op (Intel SDM 2B, PREFETCHW).
    unsafe {
        std::arch::asm!("prefetchw [{0}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
}

#[cfg(target_arch = "aarch64")]
#[inline]
fn prefetch_line(address: *const u8) {
    // SAFETY: PRFM of any address, mapped or not, has no effect that a program could see.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{0}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
}

#[cfg(target_arch = "aarch64")]
#[inline]
fn prefetch_line_for_write(address: *const u8) {
    // SAFETY: as for reading.
    unsafe {
        std::arch::asm!("prfm pstl2keep, [{0}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[inline]
fn prefetch_line(_: *const u8) {}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[inline]
fn prefetch_line_for_write(_: *const u8) {}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Span({:p}+{})", self.ptr, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sub_spans_stay_inside_and_copies_are_clamped() {
        let mut memory = vec![0_u8; 64];
        let ptr = NonNull::new(memory.as_mut_ptr()).unwrap();
        // SAFETY: `memory` outlives the span and is not touched while it is used.
        let span = unsafe { Span::from_raw_parts(ptr, 64) };
        assert!(span.sub(0, 64).is_some() && span.sub(64, 0).is_some());
        assert!(span.sub(1, 64).is_none() && span.sub(u32::MAX, 2).is_none());
        let middle = span.sub(10, 4).unwrap();
        assert_eq!(middle.copy_from_slice(&[1, 2, 3, 4, 5, 6]), 4);
        let mut out = [9_u8; 6];
        assert_eq!(middle.copy_to_slice(&mut out), 4);
        assert_eq!(out, [1, 2, 3, 4, 9, 9]);
        assert_eq!(span.sub(11, 4).unwrap().copy_from_span(&middle), 4);
        middle.sub(0, 1).unwrap().fill(7);
        assert_eq!(&memory[9..16], &[0, 7, 1, 2, 3, 4, 0]);
    }
}
