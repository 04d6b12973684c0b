//! Small helpers on lent memory.

use flexblk_reactor::Span;

const STEP_BYTES: u32 = 512;

/// Whether two spans of equal length hold the same bytes.
///
/// Bytes are copied out before they are looked at, as a lent span may change under a reference.
pub(crate) fn same_bytes(a: &Span, b: &Span) -> bool {
    let (mut left, mut right) = ([0; STEP_BYTES as usize], [0; STEP_BYTES as usize]);
    let mut at = 0;
    while at < a.len() {
        let len = STEP_BYTES.min(a.len() - at);
        let (Some(a), Some(b)) = (a.sub(at, len), b.sub(at, len)) else {
            return false;
        };
        let (n, m) = (a.copy_to_slice(&mut left), b.copy_to_slice(&mut right));
        if left.get(..n) != right.get(..m) {
            return false;
        }
        at += len;
    }
    a.len() == b.len()
}
