//! What a data thread's loop looks after in each of its turns, and how often there was something to do.

use std::collections::BTreeMap;

/// One of them.
#[derive(Clone, Copy, Debug)]
pub(super) enum Activity {
    /// Packets of FlexiNS, in and out.
    Flexins = 0,
    /// Connections of NVMe/TCP.
    Tcp = 1,
    /// I/O of block devices.
    BlockDevices = 2,
    /// Messages of other threads.
    Mailbox = 3,
    /// What is due: retransmissions, keep-alive, connections that say nothing.
    Timers = 4,
}

const NAMES: [&str; 5] = ["flexins", "tcp", "block_devices", "mailbox", "timers"];

/// Turns in which each had something to do.
#[derive(Debug, Default)]
pub(super) struct Activities {
    turns: [u64; NAMES.len()],
    /// Those of this turn, a bit each.
    now: u8,
}

impl Activities {
    /// It has something to do in this turn.
    #[inline]
    pub(super) fn note(&mut self, activity: Activity) {
        self.now |= 1 << activity as u8;
    }

    /// The turn is over.
    #[inline]
    pub(super) fn end_turn(&mut self) {
        for (at, turns) in self.turns.iter_mut().enumerate() {
            *turns += u64::from(self.now >> at & 1);
        }
        self.now = 0;
    }

    /// By name.
    pub(super) fn busy_turns(&self) -> BTreeMap<&'static str, u64> {
        NAMES.into_iter().zip(self.turns).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_counts_once_for_each() {
        let mut activities = Activities::default();
        activities.note(Activity::Tcp);
        activities.note(Activity::Tcp);
        activities.note(Activity::Timers);
        activities.end_turn();
        activities.note(Activity::Tcp);
        activities.end_turn();
        activities.end_turn();
        let turns = activities.busy_turns();
        assert_eq!((turns["tcp"], turns["timers"], turns["flexins"]), (2, 1, 0));
    }
}
