//! Messages of a thread to others that their mailboxes have not taken yet.

use std::collections::VecDeque;

/// Messages by the number of the thread that they are for. Those to one thread stay in their order: a fence must not come
/// after its end.
#[derive(Debug)]
pub(super) struct Outbox<M> {
    waiting: VecDeque<(usize, M)>,
    /// Threads whose mailboxes are full; kept to be filled again.
    full: Vec<usize>,
}

impl<M> Outbox<M> {
    pub(super) fn new() -> Self {
        Self {
            waiting: VecDeque::new(),
            full: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn push(&mut self, thread: usize, message: M) {
        self.waiting.push_back((thread, message));
    }

    /// Gives to `deliver` what it takes; what it gives back waits.
    pub(super) fn send(&mut self, mut deliver: impl FnMut(usize, M) -> Result<(), M>) {
        self.full.clear();
        for _ in 0..self.waiting.len() {
            let Some((thread, message)) = self.waiting.pop_front() else {
                return;
            };
            if self.full.contains(&thread) {
                self.waiting.push_back((thread, message));
            } else if let Err(message) = deliver(thread, message) {
                self.waiting.push_back((thread, message));
                self.full.push(thread);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_to_one_thread_never_overtake_one_another() {
        let mut outbox = Outbox::new();
        let mut arrived: [Vec<u32>; 3] = Default::default();
        let mut sent = [0; 3];
        // Mailboxes of different sizes, emptied now and then, so that each is full at other times.
        let room = [1, 3, 2];
        let mut filled = [0; 3];
        for round in 0..300 {
            if round < 200 {
                for thread in [0, 2, 1, 0, 0] {
                    outbox.push(thread, sent[thread]);
                    sent[thread] += 1;
                }
            }
            // A mailbox is emptied at any moment, also between a refusal and the next message for it.
            let mut calls = 0;
            outbox.send(|thread, message| {
                calls += 1;
                if calls % 4 == 0 {
                    filled[thread] = 0;
                }
                if filled[thread] == room[thread] {
                    return Err(message);
                }
                filled[thread] += 1;
                arrived[thread].push(message);
                Ok(())
            });
            filled[round % 3] = 0;
        }
        while !outbox.is_empty() {
            outbox.send(|thread, message| {
                arrived[thread].push(message);
                Ok(())
            });
        }
        for (arrived, sent) in arrived.iter().zip(sent) {
            assert!(arrived.iter().copied().eq(0..sent), "{arrived:?}");
        }
    }

    #[test]
    fn a_full_mailbox_holds_up_nobody_else() {
        let mut outbox = Outbox::new();
        for (thread, message) in [(0, 'a'), (0, 'b'), (1, 'c'), (0, 'd'), (1, 'e')] {
            outbox.push(thread, message);
        }
        let mut arrived = Vec::new();
        outbox.send(|thread, message| {
            if thread == 0 {
                return Err(message);
            }
            arrived.push(message);
            Ok(())
        });
        assert_eq!(arrived, ['c', 'e']);
        assert!(!outbox.is_empty());
        outbox.send(|_, message| {
            arrived.push(message);
            Ok(())
        });
        assert_eq!(arrived, ['c', 'e', 'a', 'b', 'd']);
        assert!(outbox.is_empty());
    }
}
