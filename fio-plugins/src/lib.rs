//! fio external ioengine on the initiator library.
