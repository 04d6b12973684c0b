//! What must outlive operations in flight when its owner goes first.

use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;

/// Keeps things (buffers, message headers, descriptors) until the reactor it came from has been
/// dropped and the kernel has let go of them. A type whose memory the kernel uses holds one, and
/// hands its insides over when it is dropped; if the reactor is gone already, they go at once.
#[derive(Clone)]
pub struct Keeper(Rc<RefCell<Option<Kept>>>);

/// `None` in a keeper: the reactor is gone.
type Kept = Vec<Box<dyn Any>>;

impl Keeper {
    pub(crate) fn new() -> Self {
        Self(Rc::new(RefCell::new(Some(Kept::new()))))
    }

    /// Keeps `thing` as long as necessary.
    pub fn keep(&self, thing: Box<dyn Any>) {
        if let Some(kept) = self.0.borrow_mut().as_mut() {
            kept.push(thing);
        }
    }

    /// Nothing is in flight any more.
    pub(crate) fn end(&self) {
        let kept = self.0.borrow_mut().take();
        drop(kept);
    }

    /// Something will stay in flight for ever: give its memory to nobody.
    pub(crate) fn leak(&self) {
        std::mem::forget(self.0.borrow_mut().take());
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept = self.0.borrow().as_ref().map_or(0, Vec::len);
        write!(f, "Keeper({kept} things)")
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
}
