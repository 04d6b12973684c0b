//! The library against a real target in this process: every operation, every way a controller changes or ends.
#![allow(unsafe_code)]

/// Tests of what both transports have to do.
macro_rules! over_both_transports {
    ($($name:ident)*) => {
        mod flexins {
            $(#[test]
            fn $name() {
                super::$name(crate::setup::Transport::Flexins);
            })*
        }
        mod tcp {
            $(#[test]
            fn $name() {
                super::$name(crate::setup::Transport::Tcp);
            })*
        }
    };
}

mod connections;
mod operations;
mod random_io;
mod setup;
