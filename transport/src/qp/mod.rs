//! Queue pairs: state machine, send queue, receive queue.

mod state;
