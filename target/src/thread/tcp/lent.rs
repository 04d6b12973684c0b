//! What the network still reads after its `sendmsg` has ended: the memory of zero-copy sends.
//!
//! A zero-copy send ends twice: when the kernel has queued it, and when the host has acknowledged it
//! (io_uring_prep_send_zc(3)). In between go other sends, whose commands may have had parts in it.

use std::collections::VecDeque;

/// Zero-copy sends whose memory is not back, in their order.
#[derive(Debug, Default)]
pub(super) struct Lent {
    sends: VecDeque<Send>,
    next: u16,
}

#[derive(Debug)]
struct Send {
    number: u16,
    is_back: bool,
    /// Header bytes of batches that have been sent to the end since.
    heads: Vec<Vec<u8>>,
    /// Commands that have been sent since, with all of their data.
    ends: Vec<u16>,
}

impl Lent {
    /// Memory goes to the kernel with a send; its number comes back with the notification.
    pub(super) fn begin(&mut self) -> u16 {
        let number = self.next;
        self.next = number.wrapping_add(1);
        self.sends.push_back(Send {
            number,
            is_back: false,
            heads: Vec::new(),
            ends: Vec::new(),
        });
        number
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sends.is_empty()
    }

    /// A command has been sent. It ends now, or with everything that is lent.
    pub(super) fn end(&mut self, slot: u16, ended: &mut Vec<u16>) {
        match self.sends.back_mut() {
            Some(send) => send.ends.push(slot),
            None => ended.push(slot),
        }
    }

    /// Header bytes have been sent, and are emptied now or kept.
    pub(super) fn keep(&mut self, heads: &mut Vec<u8>) {
        match self.sends.back_mut() {
            Some(send) => send.heads.push(std::mem::take(heads)),
            None => heads.clear(),
        }
    }

    /// The memory of a send is back; gives the commands whose memory is free now.
    pub(super) fn back(&mut self, number: u16, ended: &mut Vec<u16>) {
        if let Some(send) = self
            .sends
            .iter_mut()
            .find(|send| send.number == number && !send.is_back)
        {
            send.is_back = true;
        }
        while let Some(send) = self.sends.pop_front_if(|send| send.is_back) {
            ended.extend(send.ends);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn back(lent: &mut Lent, number: u16) -> Vec<u16> {
        let mut ended = Vec::new();
        lent.back(number, &mut ended);
        ended
    }

    fn end(lent: &mut Lent, slot: u16) -> Vec<u16> {
        let mut ended = Vec::new();
        lent.end(slot, &mut ended);
        ended
    }

    #[test]
    fn a_command_ends_at_once_when_nothing_is_lent() {
        let mut lent = Lent::default();
        assert_eq!(end(&mut lent, 7), [7]);
        let mut heads = vec![1, 2, 3];
        lent.keep(&mut heads);
        assert!(heads.is_empty() && heads.capacity() > 0, "used again");
        assert!(lent.is_empty());
    }

    #[test]
    fn commands_end_when_all_that_was_lent_before_is_back() {
        let mut lent = Lent::default();
        let first = lent.begin();
        assert_eq!(end(&mut lent, 1), [0; 0]);
        let second = lent.begin();
        assert_eq!(end(&mut lent, 2), [0; 0]);
        // Sent with a copy, but a part of it may have gone with the second.
        assert_eq!(end(&mut lent, 3), [0; 0]);
        assert_eq!(back(&mut lent, second), [0; 0]);
        assert_eq!(back(&mut lent, first), [1, 2, 3]);
        assert!(lent.is_empty());
    }

    #[test]
    fn header_bytes_stay_as_long_as_somebody_may_read_them() {
        let mut lent = Lent::default();
        let number = lent.begin();
        for byte in 0..3 {
            let mut heads = vec![byte; 8];
            lent.keep(&mut heads);
            assert_eq!(heads.capacity(), 0, "kept");
        }
        assert_eq!(back(&mut lent, number), [0; 0]);
        assert!(lent.is_empty());
    }

    #[test]
    fn numbers_come_round() {
        let mut lent = Lent::default();
        for slot in 0..200_000_u32 {
            let number = lent.begin();
            assert_eq!(end(&mut lent, slot as u16), [0; 0]);
            assert_eq!(back(&mut lent, number), [slot as u16]);
        }
    }
}
