//! What a test that is alone in its process counts of it, and how often it does what must leave nothing behind.

/// Open descriptors.
pub(crate) fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Resident memory in KiB.
pub(crate) fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// How many hosts come and go: `usual`, or what `FLEXBLK_CYCLES` says (`cargo xtask soak` wants more).
pub(crate) fn cycles(usual: usize) -> usize {
    match std::env::var("FLEXBLK_CYCLES") {
        Ok(count) => count.parse().expect("FLEXBLK_CYCLES is a number"),
        Err(_) => usual,
    }
}

/// Runs `cycle` for that many hosts, and again, and compares what the process has before and after.
pub(crate) fn expect_flat(warm_up: usize, count: usize, mut cycle: impl FnMut(usize)) {
    cycle(warm_up);
    let (before, memory) = (descriptors(), resident_kib());
    cycle(count);
    let after = (descriptors(), resident_kib());
    println!(
        "{count} cycles: descriptors {before} -> {}, resident KiB {memory} -> {}",
        after.0, after.1
    );
    assert!(
        after.0 <= before + 8,
        "descriptors: {before} -> {}",
        after.0
    );
    assert!(
        after.1 < memory + 4096,
        "resident KiB: {memory} -> {}",
        after.1
    );
}
