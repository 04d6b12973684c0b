//! The one connection whose socket a spinning thread asks itself.
//!
//! The ring carries out many operations in one system call, and tells of a thousand connections when something comes.
//! For one host with little under way that is the longer way: its thread sends the response and asks for the next
//! command by system calls of its own, as long as it spins and no other connection is busy. Otherwise, before the thread
//! sleeps, and when nothing comes for a while, the ring has the connection as it has all others.

use flexblk_reactor::{LOOKS_IN_VAIN, Polled};

use super::table::{ConnKey, Expect, State, Tcp};

/// Who is asked, and what came of it.
#[derive(Default)]
pub(super) struct Asked {
    who: Option<ConnKey>,
    /// Looks in vain at its socket.
    looks: u32,
    /// Bytes that were sent without the ring.
    sent: Option<(ConnKey, u32)>,
    /// What was received so, or why nothing.
    heard: Option<(ConnKey, Result<u32, i32>)>,
}

impl Asked {
    /// Is there something to be taken?
    pub(super) fn has_news(&self) -> bool {
        self.sent.is_some() || self.heard.is_some()
    }
}

impl Tcp {
    /// Which of the connections to be flushed is to have system calls of its own. One that had them before and shall
    /// not any more is among those to be flushed afterwards.
    #[inline]
    pub(super) fn choose_asked(&mut self, spins: bool) -> Option<u32> {
        let one = match self.dirty.as_slice() {
            [index] if spins => Some(*index),
            _ => None,
        };
        let one = one.filter(|index| self.has_little(*index));
        if let Some(old) = self.asked.who
            && (!spins || self.asked.looks >= LOOKS_IN_VAIN || !self.dirty.is_empty())
            && one != Some(old.index)
        {
            self.asked.who = None;
            if self.get(old).is_some() {
                self.mark(old.index);
            }
        }
        one
    }

    fn has_little(&mut self, index: u32) -> bool {
        self.at(index).is_some_and(|connection| {
            connection.state == State::Open
                && connection.queue.is_some()
                && connection.sender.has_little()
                && connection
                    .receiver
                    .as_ref()
                    .is_some_and(|receiver| !matches!(receiver.expect, Expect::Data { .. }))
        })
    }

    /// So many bytes were sent to the connection that was chosen.
    pub(super) fn note_sent(&mut self, index: u32, bytes: u32) {
        self.asked.sent = Some((self.key(index), bytes));
    }

    /// Takes what was sent, if its connection is still there.
    pub(super) fn take_sent(&mut self) -> Option<(u32, u32)> {
        let (key, bytes) = self.asked.sent.take()?;
        self.get(key).map(|_| (key.index, bytes))
    }

    /// Takes what was received, if its connection is still there.
    pub(super) fn take_heard(&mut self) -> Option<(u32, Result<u32, i32>)> {
        let (key, result) = self.asked.heard.take()?;
        self.get(key).map(|_| (key.index, result))
    }

    /// The connection is asked from now on.
    pub(super) fn ask(&mut self, index: u32) {
        self.asked.who = Some(self.key(index));
        self.asked.looks = 0;
    }

    /// Asks its socket.
    #[inline]
    pub(crate) fn look(&mut self) -> Polled {
        let Some(key) = self.asked.who else {
            return Polled::Nothing;
        };
        let (Some((_, Some(connection))), Some(buffers)) =
            (self.connections.get(key.index as usize), &mut self.buffers)
        else {
            self.asked.who = None;
            return Polled::Nothing;
        };
        if !connection.is(key) || connection.state != State::Open {
            self.asked.who = None;
            return Polled::Nothing;
        }
        match buffers.receive_now(&connection.fd) {
            Err(libc::EAGAIN | libc::EINTR) => {
                self.asked.looks += 1;
                if self.asked.looks >= LOOKS_IN_VAIN {
                    Polled::Enough
                } else {
                    Polled::Nothing
                }
            }
            result => {
                self.asked.who = None;
                self.asked.heard = Some((key, result));
                self.counters.looks_found += 1;
                Polled::Ready
            }
        }
    }
}
