//! State machine of a queue pair (IBA 10.3.1, figure 124): the table of allowed moves.

use crate::verbs::{QpState, VerbsError};

use QpState::{Error, Init, ReadyToReceive, ReadyToSend, Reset, SendQueueDrain, SendQueueError};

/// Every move that is allowed; all others are typed errors. Any state may go to RESET and ERR.
const TABLE: [(QpState, &[QpState]); 7] = [
    (Reset, &[Reset, Init, Error]),
    (Init, &[Reset, Init, ReadyToReceive, Error]),
    (ReadyToReceive, &[Reset, ReadyToSend, Error]),
    (ReadyToSend, &[Reset, ReadyToSend, SendQueueDrain, Error]),
    (SendQueueDrain, &[Reset, ReadyToSend, SendQueueDrain, Error]),
    // Reached by unreliable services only; kept because the verbs name it.
    (SendQueueError, &[Reset, ReadyToSend, Error]),
    (Error, &[Reset, Error]),
];

impl QpState {
    /// Every state.
    pub const ALL: [Self; 7] = [
        Reset,
        Init,
        ReadyToReceive,
        ReadyToSend,
        SendQueueDrain,
        SendQueueError,
        Error,
    ];

    /// The state after a move, if the table has it.
    pub fn to(self, next: Self) -> Result<Self, VerbsError> {
        let allowed = TABLE
            .iter()
            .any(|(from, to)| *from == self && to.contains(&next));
        if allowed {
            Ok(next)
        } else {
            Err(VerbsError::IllegalTransition {
                from: self,
                to: next,
            })
        }
    }

    /// Whether send requests may be posted (they are flushed at once in the error state).
    #[must_use]
    pub const fn can_post_send(self) -> bool {
        matches!(self, ReadyToSend | SendQueueDrain | SendQueueError | Error)
    }

    /// Whether packets of the peer are looked at.
    #[must_use]
    pub const fn can_receive(self) -> bool {
        matches!(
            self,
            ReadyToReceive | ReadyToSend | SendQueueDrain | SendQueueError
        )
    }

    /// Whether packets may be sent: requests begun, acknowledgements, read responses.
    #[must_use]
    pub const fn can_transmit(self) -> bool {
        self.can_receive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_complete_and_snapshot() {
        let mut text = String::new();
        for from in QpState::ALL {
            let to: Vec<_> = QpState::ALL
                .into_iter()
                .filter(|to| from.to(*to).is_ok())
                .collect();
            text.push_str(&format!("{from:?} -> {to:?}\n"));
        }
        assert_eq!(
            text,
            "Reset -> [Reset, Init, Error]\n\
             Init -> [Reset, Init, ReadyToReceive, Error]\n\
             ReadyToReceive -> [Reset, ReadyToSend, Error]\n\
             ReadyToSend -> [Reset, ReadyToSend, SendQueueDrain, Error]\n\
             SendQueueDrain -> [Reset, ReadyToSend, SendQueueDrain, Error]\n\
             SendQueueError -> [Reset, ReadyToSend, Error]\n\
             Error -> [Reset, Error]\n"
        );
    }

    #[test]
    fn illegal_moves_name_both_states() {
        assert_eq!(
            Reset.to(ReadyToSend),
            Err(VerbsError::IllegalTransition {
                from: Reset,
                to: ReadyToSend
            })
        );
    }
}
