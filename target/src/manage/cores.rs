//! What the kernel says about processors: where their time goes, and their NUMA nodes.

use std::collections::BTreeMap;
use std::fs;

/// Time of a processor, whoever ran on it, in clock ticks of the kernel (a hundredth of a second), by
/// proc_stat(5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CoreTimes {
    /// In programs.
    pub(crate) user: u64,
    /// In the kernel for them.
    pub(crate) system: u64,
    /// In interrupts, hard and soft.
    pub(crate) irq: u64,
}

impl CoreTimes {
    /// What has passed since.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            user: self.user.saturating_sub(before.user),
            system: self.system.saturating_sub(before.system),
            irq: self.irq.saturating_sub(before.irq),
        }
    }
}

/// Those of every processor, since the system's start; nothing where the kernel does not say.
pub(crate) fn times() -> BTreeMap<usize, CoreTimes> {
    parse(&fs::read_to_string("/proc/stat").unwrap_or_default())
}

fn parse(stat: &str) -> BTreeMap<usize, CoreTimes> {
    let line = |line: &str| {
        let mut words = line.strip_prefix("cpu")?.split(' ');
        let core = words.next()?.parse().ok()?;
        let numbers: Vec<u64> = words.map_while(|word| word.parse().ok()).collect();
        let [user, _nice, system, _idle, _iowait, irq, softirq, ..] = *numbers.as_slice() else {
            return None;
        };
        let irq = irq + softirq;
        Some((core, CoreTimes { user, system, irq }))
    };
    stat.lines().filter_map(line).collect()
}

/// The NUMA node of a processor; `None` without NUMA.
pub(crate) fn numa_node(core: usize) -> Option<u32> {
    let entries = fs::read_dir(format!("/sys/devices/system/cpu/cpu{core}")).ok()?;
    entries.flatten().find_map(|entry| {
        let name = entry.file_name();
        name.to_str()?.strip_prefix("node")?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_each_core() {
        let stat = "cpu  9 9 9 9 9 9 9 9 9 9\n\
                    cpu0 10 1 20 300 2 3 4 0 0 0\n\
                    cpu3 5 0 6 0 0 0 1\n\
                    cpu4 5 0 6\n\
                    intr 17 0\n";
        let [first, second] =
            [(10, 20, 7), (5, 6, 1)].map(|(user, system, irq)| CoreTimes { user, system, irq });
        assert_eq!(parse(stat), BTreeMap::from([(0, first), (3, second)]));
        let passed = first.since(second);
        assert_eq!((passed.user, passed.system, passed.irq), (5, 14, 6));
        assert!(!times().is_empty());
    }
}
