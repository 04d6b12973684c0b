//! Transport counters of one run.

use flexblk_initiator::TransportCounters;

/// What was counted between two readings.
pub(crate) fn difference(
    before: &TransportCounters,
    after: &TransportCounters,
) -> Vec<(&'static str, u64)> {
    before
        .entries()
        .zip(after.entries())
        .map(|((_, before), (name, after))| (name, after.saturating_sub(before)))
        .collect()
}
