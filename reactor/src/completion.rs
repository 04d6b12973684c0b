//! Names of operations and what the kernel says when one ends.

use std::fmt;

/// The owner number that the reactor keeps for itself.
pub const REACTOR_OWNER: u8 = 0xff;

/// Names an operation or a timer: who asked (8 bits), and which of theirs it is (56 bits).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(u64);

impl Token {
    const SLOT_BITS: u32 = 56;
    const SLOT_MASK: u64 = (1 << Self::SLOT_BITS) - 1;

    /// A token of `owner`; only the low 56 bits of `slot` are kept. [`REACTOR_OWNER`] is reserved.
    #[must_use]
    pub const fn new(owner: u8, slot: u64) -> Self {
        debug_assert!(owner != REACTOR_OWNER && slot & !Self::SLOT_MASK == 0);
        Self((owner as u64) << Self::SLOT_BITS | slot & Self::SLOT_MASK)
    }

    pub(crate) const fn internal(slot: u64) -> Self {
        Self((REACTOR_OWNER as u64) << Self::SLOT_BITS | slot)
    }

    pub(crate) const fn from_user_data(raw: u64) -> Self {
        Self(raw)
    }

    pub(crate) const fn user_data(self) -> u64 {
        self.0
    }

    /// Who asked.
    #[must_use]
    pub const fn owner(self) -> u8 {
        (self.0 >> Self::SLOT_BITS) as u8
    }

    /// Which of the owner's operations it is.
    #[must_use]
    pub const fn slot(self) -> u64 {
        self.0 & Self::SLOT_MASK
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({}:{:#x})", self.owner(), self.slot())
    }
}

/// An operation ended, gave one of several results, or a timer fired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The token given to `submit` or `arm`.
    pub token: Token,
    /// A negative errno, or what the system call of that name returns (usually bytes).
    pub result: i32,
    /// What else the kernel said.
    pub flags: CompletionFlags,
}

impl Completion {
    /// The result as bytes, or the positive errno.
    pub fn bytes(&self) -> Result<u32, i32> {
        u32::try_from(self.result).map_err(|_| self.result.wrapping_neg())
    }

    /// The notification of a zero-copy send that the kernel has copied after all, as it does with all that stays on
    /// this machine (`IORING_NOTIF_USAGE_ZC_COPIED`).
    pub fn was_copied(&self) -> bool {
        self.flags.notification() && self.result == i32::MIN
    }
}

/// Flags of a [`Completion`].
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct CompletionFlags(u32);

// io_uring UAPI, struct io_uring_cqe.flags
const CQE_F_BUFFER: u32 = 1 << 0;
const CQE_F_MORE: u32 = 1 << 1;
const CQE_F_SOCK_NONEMPTY: u32 = 1 << 2;
const CQE_F_NOTIF: u32 = 1 << 3;
const CQE_BUFFER_SHIFT: u32 = 16;
/// Not the kernel's: bit 15 is unused by it and lies below the buffer id.
const TIMER: u32 = 1 << 15;

impl CompletionFlags {
    pub(crate) const fn from_cqe(raw: u32) -> Self {
        Self(raw)
    }

    pub(crate) const fn of_timer() -> Self {
        Self(TIMER)
    }

    /// Further completions with this token will follow; memory named in the operation is still lent.
    #[must_use]
    pub const fn more(self) -> bool {
        self.0 & CQE_F_MORE != 0
    }

    /// The provided buffer that was filled.
    #[must_use]
    pub const fn buffer_id(self) -> Option<u16> {
        if self.0 & CQE_F_BUFFER != 0 {
            Some((self.0 >> CQE_BUFFER_SHIFT) as u16)
        } else {
            None
        }
    }

    /// After a receive: the socket had more to give.
    #[must_use]
    pub const fn socket_nonempty(self) -> bool {
        self.0 & CQE_F_SOCK_NONEMPTY != 0
    }

    /// The second completion of a zero-copy send: its memory is free again.
    #[must_use]
    pub const fn notification(self) -> bool {
        self.0 & CQE_F_NOTIF != 0
    }

    /// A timer fired; no operation was involved.
    #[must_use]
    pub const fn timer(self) -> bool {
        self.0 & TIMER != 0
    }
}

impl fmt::Debug for CompletionFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompletionFlags")
            .field("more", &self.more())
            .field("buffer_id", &self.buffer_id())
            .field("notification", &self.notification())
            .field("timer", &self.timer())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_keeps_owner_and_slot() {
        let token = Token::new(0xfe, (1 << 56) - 1);
        assert_eq!((token.owner(), token.slot()), (0xfe, (1 << 56) - 1));
        assert_eq!(Token::new(3, 0).slot(), 0);
        assert_eq!(Token::internal(4).owner(), REACTOR_OWNER);
    }

    #[test]
    fn flags_read_the_kernel_layout() {
        let flags = CompletionFlags::from_cqe(7 << 16 | CQE_F_BUFFER | CQE_F_MORE);
        assert_eq!(flags.buffer_id(), Some(7));
        assert!(flags.more() && !flags.notification() && !flags.timer());
        assert_eq!(CompletionFlags::of_timer().buffer_id(), None);
    }

    #[test]
    fn result_splits_into_bytes_and_errno() {
        let mut completion = Completion {
            token: Token::new(0, 0),
            result: -libc::EIO,
            flags: CompletionFlags::default(),
        };
        assert_eq!(completion.bytes(), Err(libc::EIO));
        completion.result = 12;
        assert_eq!(completion.bytes(), Ok(12));
    }
}
