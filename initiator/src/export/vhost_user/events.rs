//! The eventfds of the rings, on the worker's reactor: kicks come as completions, calls leave with the next turn.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use flexblk_reactor::{Completion, Op, Reactor, Token};

use crate::link::guest::Guest;

/// What an eventfd is added by: 1. Read by the kernel only.
static ONE: u64 = 1;

/// An operation of the kernel on a descriptor, which stays open meanwhile.
#[derive(Debug)]
struct Flight {
    _fd: Rc<OwnedFd>,
    /// The ring whose kicks are awaited; `None`: a call.
    ring: Option<usize>,
}

/// A ring's descriptors.
#[derive(Debug, Default)]
struct Ring {
    kick: Option<Rc<OwnedFd>>,
    call: Option<Rc<OwnedFd>>,
    /// The slot of its poll.
    polling: Option<usize>,
    kicked: bool,
    call_wanted: bool,
}

/// All eventfds of one worker.
#[derive(Debug)]
pub(crate) struct Events {
    owner: u8,
    rings: Vec<Ring>,
    flights: Vec<Option<Flight>>,
}

impl Events {
    /// For so many rings.
    pub(crate) fn new(rings: usize) -> Rc<RefCell<Events>> {
        Rc::new(RefCell::new(Events {
            owner: 0,
            rings: (0..rings).map(|_| Ring::default()).collect(),
            flights: Vec::with_capacity(4 * rings),
        }))
    }

    /// The owner number of the tokens, before anything else.
    pub(crate) fn set_owner(&mut self, owner: u8) {
        self.owner = owner;
    }

    /// The ring's descriptors from now on. A new ring counts as kicked, and its driver is called: something may have come
    /// before, and whoever served it before may have died between giving something back and saying so.
    pub(crate) fn start(&mut self, ring: usize, kick: Option<OwnedFd>, call: Option<OwnedFd>) {
        if let Some(ring) = self.rings.get_mut(ring) {
            ring.kick = kick.map(Rc::new);
            ring.call = call.map(Rc::new);
            ring.kicked = true;
            ring.call_wanted = ring.call.is_some();
        }
    }

    /// The driver's side moved.
    pub(crate) fn set_call(&mut self, ring: usize, call: Option<OwnedFd>) {
        if let Some(ring) = self.rings.get_mut(ring) {
            ring.call = call.map(Rc::new);
            // It may have missed one on the way.
            ring.call_wanted = ring.call.is_some();
        }
    }

    /// No more kicks and calls.
    pub(crate) fn stop(&mut self, reactor: &mut Reactor, ring: usize) {
        let Some(ring) = self.rings.get_mut(ring) else {
            return;
        };
        ring.kick = None;
        ring.call = None;
        ring.kicked = false;
        if let Some(slot) = ring.polling.take() {
            if let Some(Some(flight)) = self.flights.get_mut(slot) {
                flight.ring = None;
            }
            let op = Op::Cancel {
                token: Token::new(self.owner, slot as u64),
            };
            // SAFETY: a cancellation names no memory.
            unsafe { reactor.submit(op, Token::new(self.owner, NO_FLIGHT)) };
        }
    }

    /// Whether the ring was kicked since it was asked last.
    pub(crate) fn take_kick(&mut self, ring: usize) -> bool {
        self.rings
            .get_mut(ring)
            .is_some_and(|ring| std::mem::take(&mut ring.kicked))
    }

    /// The driver is to be notified.
    pub(crate) fn call(&mut self, ring: usize) {
        if let Some(ring) = self.rings.get_mut(ring) {
            ring.call_wanted = true;
        }
    }

    fn board(&mut self, flight: Flight) -> usize {
        match self.flights.iter().position(Option::is_none) {
            Some(free) => {
                if let Some(slot) = self.flights.get_mut(free) {
                    *slot = Some(flight);
                }
                free
            }
            None => {
                self.flights.push(Some(flight));
                self.flights.len() - 1
            }
        }
    }
}

/// The slot of a token that belongs to no flight.
const NO_FLIGHT: u64 = u32::MAX as u64;

impl Guest for Events {
    fn flush(&mut self, reactor: &mut Reactor) {
        for index in 0..self.rings.len() {
            let Some(ring) = self.rings.get_mut(index) else {
                continue;
            };
            let poll = ring.kick.clone().filter(|_| ring.polling.is_none());
            let call = if std::mem::take(&mut ring.call_wanted) {
                ring.call.clone()
            } else {
                None
            };
            if let Some(fd) = poll {
                // A read would answer EAGAIN at once, since front-ends make these descriptors non-blocking. A poll that
                // stays tells of every write to an eventfd, read or unread.
                let op = Op::PollAdd {
                    fd: fd.as_raw_fd(),
                    mask: libc::POLLIN as u32,
                    multi: true,
                };
                let ring = Some(index);
                let slot = self.board(Flight { _fd: fd, ring });
                if let Some(ring) = self.rings.get_mut(index) {
                    ring.polling = Some(slot);
                }
                // SAFETY: a poll names no memory; the descriptor stays open in `flights` until the final completion.
                unsafe { reactor.submit(op, Token::new(self.owner, slot as u64)) };
            }
            if let Some(fd) = call {
                let op = Op::Write {
                    fd: fd.as_raw_fd(),
                    ptr: (&raw const ONE).cast(),
                    len: 8,
                    offset: u64::MAX,
                    fixed: None,
                    dsync: false,
                };
                let slot = self.board(Flight {
                    _fd: fd,
                    ring: None,
                });
                // SAFETY: a static of 8 bytes that nobody writes; the descriptor as above.
                unsafe { reactor.submit(op, Token::new(self.owner, slot as u64)) };
            }
        }
    }

    fn on_completion(&mut self, _: &mut Reactor, completion: &Completion) {
        let slot = usize::try_from(completion.token.slot()).unwrap_or(usize::MAX);
        let Some(place) = self.flights.get_mut(slot) else {
            return;
        };
        let ring = place.as_ref().and_then(|flight| flight.ring);
        let ended = !completion.flags.more();
        if ended {
            *place = None;
        }
        let Some(ring) = ring.and_then(|ring| self.rings.get_mut(ring)) else {
            return;
        };
        ring.kicked = true;
        if ended {
            ring.polling = None;
            if completion.result < 0 {
                // Not a descriptor that can be polled: there are no kicks from it.
                ring.kick = None;
            }
        }
    }
}
