//! Receiving without the ring.
//!
//! The multishot receive of [`super::receive`] costs no system call per packet when much comes, and tells a thread
//! that sleeps. When one request or two are under way, what io_uring does around each `recvmsg` takes longer than a
//! `recvmsg` of our own that a spinning thread repeats until there is something. So the port changes to that after a
//! while of small trains, and back when more comes, nothing comes, or the thread is about to sleep.
#![allow(unsafe_code)]

use std::os::fd::RawFd;

use flexblk_reactor::{LOOKS_IN_VAIN, Polled, Span};

use super::receive::{CONTROL_ROOM, NAME_ROOM};

/// Packets of a train up to which it is a small one.
pub(super) const SMALL_TRAIN: usize = 16;
/// Small trains in a row after which the socket is asked: at first, and at most after that has turned out wrong again
/// and again.
const SMALL_TRAINS: (u32, u32) = (32, 8192);
/// Looks that found something, since the ring was left, which show that it was right to leave it.
const RIGHT: u32 = 1024;
/// Looks in a row that found something at once, after which much comes, in however small trains.
const AT_ONCE: u32 = 4;

/// How packets come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// By the ring.
    Told,
    /// The ring's receive is being cancelled.
    Leaving,
    /// By [`Asked::look`].
    Asked,
}

/// What the owner has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing.
    None,
    /// Cancel the ring's receive.
    Cancel,
    /// Start it again.
    Arm,
}

/// Whether the socket is asked, and what it answered.
#[derive(Debug)]
pub(super) struct Asked {
    state: State,
    /// Small trains since the last larger one.
    small: u32,
    /// So many of them, and the socket is asked.
    enough: u32,
    /// Looks that found something since the ring was left.
    found: u32,
    /// Looks since something was sent or came.
    looks: u32,
    /// Looks in a row that found something at once.
    at_once: u32,
    /// What a look has found and nobody has taken.
    heard: Option<Heard>,
    /// Room for the largest datagram or coalesced train, for looks only.
    buffer: Span,
}

/// A received datagram's lengths and what belongs to it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heard {
    pub(super) name: [u8; NAME_ROOM],
    pub(super) name_len: usize,
    pub(super) control: Control,
    pub(super) control_len: usize,
    pub(super) len: u32,
    pub(super) flags: i32,
}

/// Control messages, aligned as the kernel writes them.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
pub(super) struct Control(pub(super) [u8; CONTROL_ROOM]);

impl Asked {
    /// Told by the ring, at first. The memory of `buffer` outlives it.
    pub(super) fn new(buffer: Span) -> Self {
        Self {
            state: State::Told,
            small: 0,
            enough: SMALL_TRAINS.0,
            found: 0,
            looks: 0,
            at_once: 0,
            heard: None,
            buffer,
        }
    }

    pub(super) fn is_asked(&self) -> bool {
        self.state == State::Asked
    }

    /// A train was received.
    #[inline]
    pub(super) fn note(&mut self, packets: usize) {
        self.small = if packets <= SMALL_TRAIN {
            self.small.saturating_add(1)
        } else {
            0
        };
    }

    /// Something was sent: an answer may come soon.
    #[inline]
    pub(super) fn expect(&mut self) {
        self.looks = 0;
    }

    /// How the next turn is to receive; `spins`: the thread looks for news before it sleeps.
    #[inline]
    pub(super) fn choose(&mut self, spins: bool) -> Change {
        match self.state {
            State::Told if spins && self.small >= self.enough => {
                self.state = State::Leaving;
                Change::Cancel
            }
            State::Asked if self.small == 0 || self.at_once >= AT_ONCE => {
                if self.found < RIGHT {
                    self.enough = (self.enough * 2).min(SMALL_TRAINS.1);
                }
                self.back()
            }
            State::Asked if !spins || self.looks >= LOOKS_IN_VAIN => self.back(),
            State::Told | State::Leaving | State::Asked => Change::None,
        }
    }

    fn back(&mut self) -> Change {
        self.state = State::Told;
        (self.small, self.at_once) = (0, 0);
        Change::Arm
    }

    /// The ring's receive has ended; true when that was wanted.
    pub(super) fn left(&mut self) -> bool {
        let wanted = self.state == State::Leaving;
        if wanted {
            self.state = State::Asked;
            (self.looks, self.found) = (0, 0);
        }
        wanted
    }

    /// Asks the socket.
    #[inline]
    pub(super) fn look(&mut self, fd: RawFd) -> Polled {
        if self.state != State::Asked || self.heard.is_some() {
            return Polled::Nothing;
        }
        let mut heard = Heard {
            name: [0; NAME_ROOM],
            name_len: 0,
            control: Control([0; CONTROL_ROOM]),
            control_len: 0,
            len: 0,
            flags: 0,
        };
        let mut entry = libc::iovec {
            iov_base: self.buffer.as_ptr().cast(),
            iov_len: self.buffer.len() as usize,
        };
        // SAFETY: all zeroes is a valid msghdr.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_name = heard.name.as_mut_ptr().cast();
        header.msg_namelen = NAME_ROOM as u32;
        header.msg_control = heard.control.0.as_mut_ptr().cast();
        header.msg_controllen = CONTROL_ROOM as _;
        header.msg_iov = &raw mut entry;
        header.msg_iovlen = 1;
        // SAFETY: everything that the header names lives across the call and is ours alone.
        let len = unsafe { libc::recvmsg(fd, &raw mut header, libc::MSG_DONTWAIT) };
        match u32::try_from(len) {
            Ok(len) => {
                heard.len = len;
                heard.name_len = (header.msg_namelen as usize).min(NAME_ROOM);
                heard.control_len = (header.msg_controllen as usize).min(CONTROL_ROOM);
                heard.flags = header.msg_flags;
                self.heard = Some(heard);
                self.at_once = if self.looks == 0 { self.at_once + 1 } else { 0 };
                self.looks = 0;
                self.found = self.found.saturating_add(1);
                if self.found == RIGHT {
                    self.enough = SMALL_TRAINS.0;
                }
                Polled::Ready
            }
            Err(_) => {
                self.looks += 1;
                // An error other than "nothing there" is the ring's to report, which comes soon enough.
                match self.looks {
                    LOOKS_IN_VAIN.. => Polled::Enough,
                    _ => Polled::Nothing,
                }
            }
        }
    }

    /// What a look has found, and the bytes of the datagram.
    pub(super) fn take(&mut self) -> Option<(Heard, Span)> {
        let heard = self.heard.take()?;
        Some((heard, self.buffer.sub(0, heard.len)?))
    }
}
