//! Whose turn it is among the rings of a thread, so that a busy one leaves room for the others. No I/O.

/// Requests that a ring gives in one turn: few, so that the rings behind it do not wait for long, and enough that going
/// around costs nothing.
pub(crate) const TURN: u16 = 16;
/// Full turns of one round. Drivers fill rings while we look; completions have to get a turn, too.
const FULL_TURNS: usize = 8;

/// Which ring is next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turns {
    rings: usize,
    next: usize,
}

impl Turns {
    pub(crate) fn new(rings: usize) -> Turns {
        Turns { rings, next: 0 }
    }

    /// Lets rings `take` one after the other until none has more, beginning where the last round ended. `take` says how
    /// many requests there were, up to [`TURN`]; `None`: there is no room for any, so it stays that ring's turn. Whether
    /// anything was taken.
    pub(crate) fn round(&mut self, mut take: impl FnMut(usize) -> Option<u16>) -> bool {
        let (mut active, mut full, mut exhausted) = (false, 0, 0);
        while exhausted < self.rings && full < FULL_TURNS {
            let Some(taken) = take(self.next) else {
                break;
            };
            self.next = (self.next + 1) % self.rings;
            active |= taken > 0;
            if taken < TURN {
                exhausted += 1;
            } else {
                (full, exhausted) = (full + 1, 0);
            }
        }
        active
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rings with so many requests, and room for so many.
    struct Rings {
        left: Vec<u16>,
        room: u16,
        taken: Vec<(usize, u16)>,
    }

    impl Rings {
        fn new(left: &[u16]) -> Rings {
            Rings {
                left: left.to_vec(),
                room: 0,
                taken: Vec::new(),
            }
        }

        fn round(&mut self, turns: &mut Turns, room: u16) -> Vec<(usize, u16)> {
            self.room = room;
            turns.round(|ring| {
                if self.room == 0 {
                    return None;
                }
                let taken = self.left[ring].min(self.room).min(TURN);
                self.left[ring] -= taken;
                self.room -= taken;
                if taken > 0 {
                    self.taken.push((ring, taken));
                }
                Some(taken)
            });
            std::mem::take(&mut self.taken)
        }
    }

    #[test]
    fn a_busy_ring_leaves_room_for_the_others() {
        let mut turns = Turns::new(3);
        let mut rings = Rings::new(&[1000, 3, 20]);
        let first = rings.round(&mut turns, 64);
        assert_eq!(first, [(0, 16), (1, 3), (2, 16), (0, 16), (2, 4), (0, 9)]);
    }

    #[test]
    fn who_found_no_room_is_the_first_of_the_next_round() {
        let mut turns = Turns::new(3);
        let mut rings = Rings::new(&[1000, 1000, 1]);
        let mut served = Vec::new();
        // One request ends at a time.
        for _ in 0..6 {
            served.extend(rings.round(&mut turns, 1));
        }
        let rings: Vec<usize> = served.iter().map(|(ring, _)| *ring).collect();
        assert_eq!(rings, [0, 1, 2, 0, 1, 0]);
    }

    #[test]
    fn a_lone_ring_may_fill_all_the_room_and_a_round_ends() {
        let mut turns = Turns::new(2);
        let mut rings = Rings::new(&[0, 100]);
        let all: u16 = rings.round(&mut turns, 128).iter().map(|(_, n)| n).sum();
        assert_eq!(all, 100);
        assert!(!turns.round(|_| Some(0)));
        // Requests that need no room, as fast as they are taken.
        let mut calls = 0;
        assert!(turns.round(|_| {
            calls += 1;
            Some(TURN)
        }));
        assert_eq!(calls, FULL_TURNS);
        assert!(!Turns::new(0).round(|_| None));
    }
}
