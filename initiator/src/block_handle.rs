//! Blocking byte-granular access to a namespace: for tools, not for the fast path.

use std::time::Duration;

use flexblk_nvme::Nsid;
use flexblk_reactor::{HugePages, SharedMemory, Span};

use crate::{
    Busy, Command, Controller, Error, InvalidCommand, IoCompletion, IoError, Namespace, Op,
    QueuePair, QueuePairOptions,
};

/// A namespace as a blocking block device, on a queue pair of its own.
pub struct BlockHandle {
    queue: QueuePair,
    namespace: Namespace,
    chunk: Span,
    completions: Vec<IoCompletion>,
}

/// Largest transfer of one command.
const CHUNK_BYTES: u32 = 128 << 10;

impl BlockHandle {
    /// Opens a namespace for the calling thread.
    pub fn open(controller: &Controller, nsid: Nsid) -> Result<BlockHandle, Error> {
        let namespace = controller.namespace(nsid)?;
        let block = namespace.block_size;
        let chunk_bytes = CHUNK_BYTES.min(namespace.max_transfer_bytes).max(block) / block * block;
        let memory = SharedMemory::create(
            "flexblk block handle",
            u64::from(chunk_bytes),
            HugePages::No,
        )
        .map_err(|e| Error::Transport(format!("allocating a buffer: {e}")))?;
        let chunk = memory
            .span(0, chunk_bytes)
            .ok_or_else(|| Error::Transport("buffer".into()))?;
        let options = QueuePairOptions {
            depth: Some(1),
            memory: Vec::new(),
            bounce_bytes: Some(0),
        };
        let mut queue = controller.queue_pair(&options)?;
        queue.register_memory(&memory)?;
        Ok(BlockHandle {
            queue,
            namespace,
            chunk,
            completions: Vec::with_capacity(1),
        })
    }

    /// The namespace as it was when it was opened.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The queue pair below.
    pub fn queue_pair(&mut self) -> &mut QueuePair {
        &mut self.queue
    }

    /// Reads `data.len()` bytes at any byte offset.
    pub fn read_at(&mut self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.check(offset, data.len())?;
        let mut done = 0;
        while let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let piece = self.piece(offset + done as u64, rest.len())?;
            self.run(&Command::read(
                self.namespace.nsid,
                piece.lba,
                piece.blocks,
                piece.span,
            ))?;
            let inside = piece.inside()?;
            done += inside.copy_to_slice(rest);
        }
        Ok(())
    }

    /// Writes at any byte offset; blocks written in part are read first (not atomic towards other writers).
    pub fn write_at(&mut self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.check(offset, data.len())?;
        let mut done = 0;
        while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
            let piece = self.piece(offset + done as u64, rest.len())?;
            if piece.len != piece.span.len() {
                self.run(&Command::read(
                    self.namespace.nsid,
                    piece.lba,
                    piece.blocks,
                    piece.span,
                ))?;
            }
            let copied = piece.inside()?.copy_from_slice(rest);
            self.run(&Command::write(
                self.namespace.nsid,
                piece.lba,
                piece.blocks,
                piece.span,
            ))?;
            done += copied;
        }
        Ok(())
    }

    /// Makes completed writes durable.
    pub fn flush(&mut self) -> Result<(), Error> {
        self.run(&Command::flush(self.namespace.nsid))
    }

    /// Tells the controller that a range of blocks is no longer needed.
    pub fn discard(&mut self, lba: u64, blocks: u32) -> Result<(), Error> {
        self.run(&Command::without_data(
            Op::Discard,
            self.namespace.nsid,
            lba,
            blocks,
        ))
    }

    /// Carries out any command and waits for it.
    pub fn run(&mut self, command: &Command) -> Result<(), Error> {
        loop {
            match self.queue.submit(command, 0) {
                Ok(()) => break,
                Err(Busy) => {
                    self.queue
                        .wait(Duration::from_millis(1), 1, &mut self.completions);
                    self.completions.clear();
                }
            }
        }
        self.wait_for_one()
    }

    /// The memory that commands of this handle use.
    pub(crate) fn chunk(&self) -> Span {
        self.chunk
    }

    /// Waits for the only command under way.
    pub(crate) fn wait_for_one(&mut self) -> Result<(), Error> {
        self.completions.clear();
        while self.completions.is_empty() {
            self.queue
                .wait(Duration::from_secs(1), 1, &mut self.completions);
        }
        self.queue.pause();
        match self.completions.first() {
            Some(completion) => Ok(completion.result?),
            None => Err(Error::Io(IoError::Closed)),
        }
    }

    fn check(&self, offset: u64, len: usize) -> Result<(), Error> {
        let inside = offset
            .checked_add(len as u64)
            .is_some_and(|end| end <= self.namespace.len_bytes());
        if inside {
            Ok(())
        } else {
            Err(Error::Io(IoError::Invalid(InvalidCommand::OutOfRange)))
        }
    }

    /// The blocks that hold the front of `len` bytes at `offset`, as many as fit into the buffer.
    fn piece(&self, offset: u64, len: usize) -> Result<Piece, Error> {
        let block = self.namespace.block_size;
        let head = (offset % u64::from(block)) as u32;
        let room = self.chunk.len() - head;
        let len = u32::try_from(len).unwrap_or(u32::MAX).min(room);
        let blocks = (head + len).div_ceil(block);
        let span = self
            .chunk
            .sub(0, blocks * block)
            .ok_or(Error::Io(IoError::Invalid(InvalidCommand::Buffer)))?;
        Ok(Piece {
            lba: offset / u64::from(block),
            blocks,
            span,
            head,
            len,
        })
    }
}

struct Piece {
    lba: u64,
    blocks: u32,
    /// Whole blocks.
    span: Span,
    /// Bytes in front of ours.
    head: u32,
    len: u32,
}

impl Piece {
    fn inside(&self) -> Result<Span, Error> {
        self.span
            .sub(self.head, self.len)
            .ok_or(Error::Io(IoError::Invalid(InvalidCommand::Buffer)))
    }
}
