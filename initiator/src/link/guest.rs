//! Others on a thread's reactor: what serves a volume to the host (a socket, `/dev/fuse`, a ublk ring) runs on the
//! same ring as the queue pairs behind it, so that one system call moves both sides.

use std::cell::RefCell;
use std::rc::Rc;

use flexblk_reactor::{Completion, Reactor};

/// Who submits own operations to the thread's reactor.
///
/// Its tokens carry the owner number it was given. Memory that the kernel uses for its operations stays in place until
/// they completed: a guest that leaves with operations under way gives it to [`Reactor::keeper`].
pub(crate) trait Guest {
    /// Before the thread enters the kernel: the chance to submit what has piled up, all in one system call.
    fn flush(&mut self, reactor: &mut Reactor);

    /// An operation or a timer of its own ended.
    fn on_completion(&mut self, reactor: &mut Reactor, completion: &Completion);
}

/// A guest, in common with the thread that works for it.
pub(crate) type SharedGuest = Rc<RefCell<dyn Guest>>;

/// Owner numbers of guests: `FIRST..FIRST + MAX`.
const FIRST: u8 = 128;
const MAX: usize = 64;

/// The guests of one reactor by their numbers.
#[derive(Default)]
pub(crate) struct Guests(Vec<Option<SharedGuest>>);

impl Guests {
    /// The owner number for the guest's tokens; `None` when all are taken.
    pub(crate) fn add(&mut self, guest: SharedGuest) -> Option<u8> {
        let index = match self.0.iter().position(Option::is_none) {
            Some(free) => free,
            None if self.0.len() < MAX => {
                self.0.push(None);
                self.0.len() - 1
            }
            None => return None,
        };
        *self.0.get_mut(index)? = Some(guest);
        Some(FIRST + index as u8)
    }

    /// It gets no more completions.
    pub(crate) fn remove(&mut self, owner: u8) {
        if let Some(place) = index(owner).and_then(|index| self.0.get_mut(index)) {
            *place = None;
        }
    }

    #[inline]
    pub(crate) fn flush(&self, reactor: &mut Reactor) {
        for guest in self.0.iter().flatten() {
            guest.borrow_mut().flush(reactor);
        }
    }

    /// Whether the completion was a guest's.
    #[inline]
    pub(crate) fn on_completion(&self, reactor: &mut Reactor, completion: &Completion) -> bool {
        let Some(index) = index(completion.token.owner()) else {
            return false;
        };
        if let Some(Some(guest)) = self.0.get(index) {
            guest.borrow_mut().on_completion(reactor, completion);
        }
        true
    }
}

fn index(owner: u8) -> Option<usize> {
    let index = usize::from(owner.checked_sub(FIRST)?);
    (index < MAX).then_some(index)
}
