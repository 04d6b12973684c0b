//! A device with nothing behind it: writes vanish, reads give zeroes.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use flexblk_reactor::{Completion, Reactor};
use uuid::Uuid;

use crate::{
    BlockDevice, Caps, Channel, Error, Info, Io, IoDone, IoError, IoOp, NullConfig, Submitted,
    Tokens, check::Limits, config,
};

/// See [`crate::BdevConfig::Null`]. Every I/O ends at once.
#[derive(Debug)]
pub struct NullDevice {
    name: Arc<str>,
    kind: Arc<str>,
    uuid: Uuid,
    limits: Limits,
    read_zeroes: bool,
    block_count: Arc<AtomicU64>,
}

const MAX_IO_BYTES: u32 = 1 << 30;

impl NullDevice {
    /// Makes the device.
    pub fn new(config: &NullConfig) -> Result<Self, Error> {
        let count = config::block_count(
            &config.name,
            config.block_size,
            config.size,
            config.num_blocks,
        )?;
        Ok(Self {
            name: config.name.as_str().into(),
            kind: "null".into(),
            uuid: config.uuid.unwrap_or_else(Uuid::new_v4),
            limits: Limits {
                block_size: config.block_size,
                max_io_bytes: MAX_IO_BYTES,
                caps: Caps::WRITE_ZEROES | Caps::DISCARD | Caps::FLUSH | Caps::FUA | Caps::RESIZE,
            },
            read_zeroes: config.read_zeroes,
            block_count: Arc::new(AtomicU64::new(count)),
        })
    }
}

impl BlockDevice for NullDevice {
    fn info(&self) -> Info {
        Info {
            name: Arc::clone(&self.name),
            kind: Arc::clone(&self.kind),
            block_size: self.limits.block_size,
            block_count: self.block_count.load(Ordering::Acquire),
            caps: self.limits.caps,
            optimal_io_bytes: 4096,
            max_io_bytes: self.limits.max_io_bytes,
            volatile_write_cache: false,
            uuid: self.uuid,
            memory_alignment: 1,
        }
    }

    fn open(&self, _reactor: &mut Reactor, _tokens: Tokens) -> Result<Box<dyn Channel>, Error> {
        Ok(Box::new(NullChannel {
            limits: self.limits,
            read_zeroes: self.read_zeroes,
            block_count: Arc::clone(&self.block_count),
        }))
    }

    fn resize(&self, new_bytes: u64) -> Result<Info, Error> {
        let count = config::whole_blocks(&self.name, new_bytes, self.limits.block_size)?;
        self.block_count.store(count, Ordering::Release);
        Ok(self.info())
    }
}

struct NullChannel {
    limits: Limits,
    read_zeroes: bool,
    block_count: Arc<AtomicU64>,
}

impl NullChannel {
    fn run(&self, io: &Io) -> Result<(), IoError> {
        self.limits
            .check(io, self.block_count.load(Ordering::Acquire))?;
        match io.op {
            IoOp::Read if self.read_zeroes => {
                for span in &io.data.spans {
                    span.fill(0);
                }
                Ok(())
            }
            // what was written is not there to be compared with: say so rather than "equal"
            IoOp::Compare => Err(IoError::Unsupported),
            _ => Ok(()),
        }
    }
}

impl Channel for NullChannel {
    fn submit(&mut self, _reactor: &mut Reactor, io: Io) -> Submitted {
        Submitted::Done(self.run(&io))
    }

    fn complete(
        &mut self,
        _reactor: &mut Reactor,
        completion: &Completion,
        _out: &mut Vec<IoDone>,
    ) {
        tracing::warn!(
            ?completion,
            "a completion for a null device, which has no operations"
        );
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn depth(&self) -> usize {
        usize::MAX
    }
}
