//! What one `sendmsg` carries: many PDUs, their payload gathered from where it lies.
#![allow(unsafe_code)]

use flexblk_nvme::tcp::Crc32c;
use flexblk_reactor::Span;

/// `IOV_MAX`: entries of one gather list at most.
const MAX_ENTRIES: usize = 1024;
/// Headers, small data and digests of one command at most: a capsule of 76 bytes, 16 bytes, 4 bytes.
const BYTES_PER_COMMAND: usize = 96;
/// Entries that one PDU takes at most: header, payload, digest.
const ENTRIES_PER_PDU: usize = 3;

/// PDUs in the order in which they leave.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Headers and digests, behind one another. Never grows beyond what it was made with, so that entries that name
    /// it stay good.
    own: Vec<u8>,
    entries: Vec<libc::iovec>,
    /// Of `entries`, those that are sent to the end.
    done: usize,
    len: usize,
    number: u64,
}

impl Batch {
    /// Room for the capsules of `depth` commands.
    pub(crate) fn new(depth: u16, number: u64) -> Batch {
        let pdus = usize::from(depth) + 16;
        Batch {
            own: Vec::with_capacity(pdus * BYTES_PER_COMMAND),
            entries: Vec::with_capacity((pdus * ENTRIES_PER_PDU).min(MAX_ENTRIES)),
            done: 0,
            len: 0,
            number,
        }
    }

    /// Which batch it is, counted from the first.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether one more PDU with so many bytes of its own (header, small data, digest) fits.
    pub(crate) fn has_room(&self, own_bytes: usize) -> bool {
        self.has_room_for(own_bytes, ENTRIES_PER_PDU)
    }

    /// Whether something fits with so many bytes of its own and so many entries.
    pub(crate) fn has_room_for(&self, own_bytes: usize, entries: usize) -> bool {
        self.own.capacity() - self.own.len() >= own_bytes
            && self.entries.capacity() - self.entries.len() >= entries
    }

    /// Appends bytes of ours: a header, small data, a digest.
    pub(crate) fn put(&mut self, bytes: &[u8]) {
        debug_assert!(self.own.capacity() - self.own.len() >= bytes.len());
        let at = self.own.len();
        self.own.extend_from_slice(bytes);
        let put = self.own.as_mut_ptr().wrapping_add(at);
        self.append(put, bytes.len());
    }

    /// Appends payload where it lies. It stays so until the batch is sent.
    pub(crate) fn gather(&mut self, span: Span) {
        self.append(span.as_ptr(), span.len() as usize);
    }

    /// Appends the digest of payload.
    pub(crate) fn put_digest_of(&mut self, span: Span) {
        let mut digest = Crc32c::new();
        // SAFETY: the caller of the queue has lent it, and changes nothing meanwhile.
        digest.update(unsafe { span.as_slice() });
        self.put(&digest.to_bytes());
    }

    fn append(&mut self, ptr: *mut u8, len: usize) {
        if len == 0 {
            return;
        }
        self.len += len;
        if let Some(last) = self.entries.last_mut() {
            let end = last.iov_base.wrapping_byte_add(last.iov_len);
            if end.cast() == ptr {
                last.iov_len += len;
                return;
            }
        }
        self.entries.push(libc::iovec {
            iov_base: ptr.cast(),
            iov_len: len,
        });
    }

    /// What is still to be sent.
    pub(crate) fn entries(&self) -> &[libc::iovec] {
        self.entries.get(self.done..).unwrap_or_default()
    }

    /// The kernel has taken `len` bytes. True when nothing is left.
    pub(crate) fn sent(&mut self, len: usize) -> bool {
        let mut len = len.min(self.len);
        self.len -= len;
        while let Some(entry) = self.entries.get_mut(self.done) {
            let part = len.min(entry.iov_len);
            len -= part;
            entry.iov_len -= part;
            entry.iov_base = entry.iov_base.wrapping_byte_add(part);
            if entry.iov_len > 0 {
                break;
            }
            self.done += 1;
        }
        self.len == 0
    }

    /// Everything was sent: it serves again, under the next number.
    pub(crate) fn restart(&mut self, number: u64) {
        self.own.clear();
        self.entries.clear();
        (self.done, self.len, self.number) = (0, 0, number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(batch: &Batch) -> Vec<u8> {
        let mut bytes = Vec::new();
        for entry in batch.entries() {
            // SAFETY: the entries name the batch and vectors that live as long as the test.
            bytes.extend(unsafe {
                std::slice::from_raw_parts(entry.iov_base.cast::<u8>(), entry.iov_len)
            });
        }
        bytes
    }

    #[test]
    fn neighbours_are_one_entry_and_a_short_send_goes_on_where_it_ended() {
        let mut payload = [7u8; 100];
        let ptr = std::ptr::NonNull::new(payload.as_mut_ptr()).unwrap();
        // SAFETY: lives to the end of the test.
        let span = unsafe { Span::from_raw_parts(ptr, 100) };
        let mut batch = Batch::new(4, 0);
        for n in 0..3 {
            assert!(batch.has_room(72));
            batch.put(&[n; 72]);
        }
        assert_eq!(batch.entries().len(), 1);
        batch.gather(span);
        batch.put_digest_of(span);
        assert_eq!(batch.entries().len(), 3);
        let all = bytes_of(&batch);
        assert_eq!(all.len(), 3 * 72 + 104);
        let mut sent = 0;
        for part in [1, 71, 200, 43] {
            assert!(!batch.sent(part));
            sent += part;
            assert_eq!(bytes_of(&batch), &all[sent..]);
        }
        assert!(batch.sent(all.len() - sent));
        batch.restart(2);
        assert!(batch.is_empty() && batch.entries().is_empty());
        assert_eq!(batch.number(), 2);
    }
}
