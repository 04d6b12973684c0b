//! Any command of the NVM command set, blocking: for tools that need what [`crate::Op`] has not.

use std::time::Duration;

use flexblk_nvme::Sgl;
use flexblk_nvme::command::nvm;

use crate::queue_pair::Transfer;
use crate::{BlockHandle, Busy, Error, InvalidCommand, IoError};

/// Which way a command's data goes.
#[derive(Debug)]
pub enum Data<'a> {
    /// There is none.
    None,
    /// To the controller.
    Out(&'a [u8]),
    /// From the controller.
    In(&'a mut [u8]),
}

impl BlockHandle {
    /// Carries out a command as it is given, without looking at it, and waits for it. Its data may be
    /// as long as one command of this handle carries (128 KiB, or less if the controller says so).
    pub fn passthrough(&mut self, command: &nvm::Command, data: Data<'_>) -> Result<(), Error> {
        let len = match &data {
            Data::None => 0,
            Data::Out(bytes) => bytes.len(),
            Data::In(bytes) => bytes.len(),
        };
        let too_long = || Error::Io(IoError::Invalid(InvalidCommand::Buffer));
        let len = u32::try_from(len).map_err(|_| too_long())?;
        let span = self.chunk().sub(0, len).ok_or_else(too_long)?;
        if let Data::Out(bytes) = &data {
            span.copy_from_slice(bytes);
        }
        let queue = self.queue_pair();
        loop {
            let transfer = match data {
                Data::None => Transfer::None,
                Data::Out(_) => Transfer::ToController(Some(span)),
                Data::In(_) => Transfer::FromController(Some(span)),
            };
            match queue.start(transfer, 0, |cid| command.emit(cid, &Sgl::NONE)) {
                Ok(()) => break,
                Err(Busy) => {
                    queue.wait(Duration::from_millis(1), 1, &mut Vec::new());
                }
            }
        }
        self.wait_for_one()?;
        if let Data::In(bytes) = data {
            span.copy_to_slice(bytes);
        }
        Ok(())
    }
}
