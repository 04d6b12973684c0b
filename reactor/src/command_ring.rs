//! Long commands to drivers, one after the other, on a ring of their own.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::Error;

/// A small ring for commands of 80 bytes (`IORING_SETUP_SQE128`), which the entries of a [`Reactor`](crate::Reactor) have
/// no room for. Whoever runs one waits for it: never on a data path.
pub struct CommandRing(IoUring<squeue::Entry128, cqueue::Entry>);

impl CommandRing {
    /// Makes the ring.
    ///
    /// # Errors
    /// [`Error::Setup`] without io_uring or before Linux 5.19.
    pub fn new() -> Result<Self, Error> {
        IoUring::builder().build(4).map(Self).map_err(Error::Setup)
    }

    /// Runs a command and waits for its end; what the driver returns.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// Whatever memory the command names is as large, and as writable, as the driver takes it to be.
    pub unsafe fn run(
        &mut self,
        fd: BorrowedFd<'_>,
        cmd_op: u32,
        cmd: [u8; 80],
    ) -> io::Result<i32> {
        let entry = opcode::UringCmd80::new(types::Fd(fd.as_raw_fd()), cmd_op)
            .cmd(cmd)
            .build();
        // SAFETY: the caller's promise; we return only after the command has ended.
        unsafe { self.0.submission().push(&entry) }
            .map_err(|_| io::Error::from(io::ErrorKind::ResourceBusy))?;
        loop {
            match self.0.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if let Some(completion) = self.0.completion().next() {
                let result = completion.result();
                return if result < 0 {
                    Err(io::Error::from_raw_os_error(result.wrapping_neg()))
                } else {
                    Ok(result)
                };
            }
        }
    }
}

impl fmt::Debug for CommandRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CommandRing")
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_driver_without_commands_says_so() {
        let mut ring = CommandRing::new().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        for _ in 0..10 {
            // SAFETY: no memory is named.
            let result = unsafe { ring.run(null.as_fd(), u32::MAX, [0; 80]) };
            // /dev/null takes every command and does nothing, on kernels from 6.1 on.
            assert!(matches!(
                result.map_err(|error| error.raw_os_error()),
                Ok(0) | Err(Some(libc::EOPNOTSUPP))
            ));
        }
    }
}
