//! What must outlive operations in flight when its owner goes first.

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;

/// Keeps things (buffers, message headers, descriptors) until the reactor it came from has been
/// dropped and the kernel has let go of them. A type whose memory the kernel uses holds one, and
/// hands its insides over when it is dropped; if the reactor is gone already, they go at once, unless the kernel never let go.
#[derive(Clone)]
pub struct Keeper(Rc<RefCell<State>>);

enum State {
    /// The reactor is there.
    Keeping(Vec<Box<dyn Any>>),
    /// It is gone, and the kernel has let go of everything.
    Ended,
    /// It is gone, and the kernel may use what it had for ever.
    Leaked,
}

impl Keeper {
    pub(crate) fn new() -> Self {
        Self(Rc::new(RefCell::new(State::Keeping(Vec::new()))))
    }

    /// Keeps `thing` as long as necessary.
    pub fn keep(&self, thing: Box<dyn Any>) {
        match &mut *self.0.borrow_mut() {
            State::Keeping(kept) => kept.push(thing),
            State::Ended => {}
            State::Leaked => std::mem::forget(thing),
        }
    }

    /// Nothing is in flight any more.
    pub(crate) fn end(&self) {
        // What is dropped may have a keeper, too.
        let kept = self.0.replace(State::Ended);
        drop(kept);
    }

    /// Something will stay in flight for ever: give its memory to nobody, nor that of what is still to come.
    pub(crate) fn leak(&self) {
        std::mem::forget(self.0.replace(State::Leaked));
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0.borrow() {
            State::Keeping(kept) => write!(f, "Keeper({} things)", kept.len()),
            State::Ended => f.write_str("Keeper(ended)"),
            State::Leaked => f.write_str("Keeper(leaked)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_live_until_the_end_and_not_longer() {
        let thing = Rc::new(());
        let keeper = Keeper::new();
        keeper.keep(Box::new(Rc::clone(&thing)));
        assert_eq!(Rc::strong_count(&thing), 2);
        keeper.end();
        assert_eq!(Rc::strong_count(&thing), 1);
        keeper.keep(Box::new(Rc::clone(&thing)));
        assert_eq!(Rc::strong_count(&thing), 1);
    }

    #[test]
    fn what_the_kernel_does_not_let_go_of_is_given_to_nobody() {
        let thing = Rc::new(());
        let keeper = Keeper::new();
        keeper.keep(Box::new(Rc::clone(&thing)));
        keeper.leak();
        assert_eq!(Rc::strong_count(&thing), 2);
        // Its owner goes after the reactor.
        keeper.keep(Box::new(Rc::clone(&thing)));
        assert_eq!(Rc::strong_count(&thing), 3);
    }
}
