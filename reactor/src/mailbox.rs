//! Bounded mailboxes into a reactor's thread: many senders, one receiver, no lock, no lost wake-up.

use std::sync::mpsc;

use crate::Waker;

/// A mailbox for at most `capacity` waiting messages (at least 1). The receiver lives on the thread
/// of `waker`'s reactor and is drained after every turn.
#[must_use]
pub fn channel<T: Send>(capacity: usize, waker: Waker) -> (Sender<T>, Receiver<T>) {
    // The standard library's bounded channel is a lock-free array queue (crossbeam's) as long as
    // nobody blocks on it, and nobody does here. Capacity 0 would be a rendezvous that blocks.
    let (tx, rx) = mpsc::sync_channel(capacity.max(1));
    (Sender { tx, waker }, Receiver { rx })
}

/// The sending end; clone one for each thread.
#[derive(Debug)]
pub struct Sender<T> {
    tx: mpsc::SyncSender<T>,
    waker: Waker,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self {
            tx: self.tx.clone(),
            waker: self.waker.clone(),
        }
    }
}

impl<T> Sender<T> {
    /// Puts a message into the mailbox and wakes its reactor.
    ///
    /// # Errors
    /// The message comes back when the mailbox is full or its receiver is gone.
    pub fn try_send(&self, message: T) -> Result<(), TrySendError<T>> {
        self.tx.try_send(message).map_err(|error| match error {
            mpsc::TrySendError::Full(message) => TrySendError::Full(message),
            mpsc::TrySendError::Disconnected(message) => TrySendError::Closed(message),
        })?;
        self.waker.wake();
        Ok(())
    }

    /// The waker of the receiving reactor.
    #[must_use]
    pub fn waker(&self) -> &Waker {
        &self.waker
    }
}

/// The receiving end.
#[derive(Debug)]
pub struct Receiver<T> {
    rx: mpsc::Receiver<T>,
}

impl<T> Receiver<T> {
    /// The oldest message, if any.
    pub fn try_recv(&self) -> Option<T> {
        self.rx.try_recv().ok()
    }

    /// Whether every sender is gone and the mailbox is empty; takes nothing when it is not.
    pub fn try_recv_or_closed(&self) -> Result<Option<T>, Closed> {
        match self.rx.try_recv() {
            Ok(message) => Ok(Some(message)),
            Err(mpsc::TryRecvError::Empty) => Ok(None),
            Err(mpsc::TryRecvError::Disconnected) => Err(Closed),
        }
    }
}

/// Every sender of a mailbox is gone and it is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("every sender of this mailbox is gone")]
pub struct Closed;

/// Why a message was not accepted; it is inside.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrySendError<T> {
    /// The mailbox holds as many messages as it may.
    #[error("the mailbox is full")]
    Full(T),
    /// The receiver is gone.
    #[error("the receiver of this mailbox is gone")]
    Closed(T),
}
