//! What is known about a namespace.

use flexblk_nvme::Nsid;
use flexblk_nvme::command::nvm;
use flexblk_nvme::identify::NvmController;
use uuid::Uuid;

use crate::Op;

/// The most logical blocks that one command without data may name (NVM 4.1.5.4). A controller aborts longer ones with
/// Invalid Field in Command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaxBlocks {
    /// Write Zeroes (WZSL).
    pub write_zeroes: u32,
    /// Verify (VSL).
    pub verify: u32,
    /// One range of a discard (DMRSL).
    pub discard: u32,
}

impl MaxBlocks {
    /// What the commands can express: the limit of a controller that names none.
    pub const EXPRESSIBLE: MaxBlocks = MaxBlocks {
        write_zeroes: nvm::MAX_BLOCKS,
        verify: nvm::MAX_BLOCKS,
        discard: u32::MAX,
    };

    /// Of a controller whose pages (CAP.MPSMIN) have `page_bytes`, for blocks of `block_bytes`. WZDSL is not looked at:
    /// it allows more than WZSL, for zeroes that deallocate.
    pub(crate) fn of(controller: &NvmController, page_bytes: u64, block_bytes: u32) -> MaxBlocks {
        // Powers of two in units of pages; 0 is no limit.
        let blocks = |exponent: u8| match exponent {
            0 => nvm::MAX_BLOCKS,
            exponent => (1_u64.checked_shl(exponent.into()))
                .and_then(|pages| pages.checked_mul(page_bytes))
                .map_or(u64::MAX, |bytes| bytes / u64::from(block_bytes.max(1)))
                .clamp(1, u64::from(nvm::MAX_BLOCKS)) as u32,
        };
        MaxBlocks {
            write_zeroes: blocks(controller.wzsl),
            verify: blocks(controller.vsl),
            discard: match controller.dmrsl.get() {
                0 => u32::MAX,
                limit => limit,
            },
        }
    }

    /// What both allow.
    pub(crate) fn min(self, other: MaxBlocks) -> MaxBlocks {
        MaxBlocks {
            write_zeroes: self.write_zeroes.min(other.write_zeroes),
            verify: self.verify.min(other.verify),
            discard: self.discard.min(other.discard),
        }
    }

    /// The limit of a command; those with data are limited by [`Namespace::max_transfer_bytes`] besides.
    pub(crate) fn for_op(&self, op: Op) -> u32 {
        match op {
            Op::WriteZeroes { .. } => self.write_zeroes,
            Op::Verify => self.verify,
            Op::Discard => self.discard,
            Op::Read | Op::Write { .. } | Op::Compare | Op::Flush => nvm::MAX_BLOCKS,
        }
    }
}

/// A namespace as its controller described it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its id in this subsystem.
    pub nsid: Nsid,
    /// Bytes per logical block.
    pub block_size: u32,
    /// Number of logical blocks.
    pub block_count: u64,
    /// Namespace UUID, when there is one.
    pub uuid: Option<Uuid>,
    /// Namespace Globally Unique Identifier; zero: none.
    pub nguid: [u8; 16],
    /// IEEE EUI-64; zero: none.
    pub eui64: [u8; 8],
    /// Write-protected.
    pub read_only: bool,
    /// Deallocated blocks read as zeroes.
    pub deallocated_reads_zero: bool,
    /// Preferred granularity of writes in bytes, 0 when not said.
    pub optimal_io_bytes: u32,
    /// Largest transfer of one read, write or compare in bytes.
    pub max_transfer_bytes: u32,
    /// Longest commands without data.
    pub max_blocks: MaxBlocks,
    /// The controller supports Write Zeroes.
    pub write_zeroes: bool,
    /// The controller supports Dataset Management (discard).
    pub discard: bool,
    /// The controller supports Compare.
    pub compare: bool,
    /// The controller supports fused Compare and Write.
    pub compare_and_write: bool,
    /// The controller supports Verify.
    pub verify: bool,
    /// The controller has a volatile write cache: completed writes need a flush (or FUA) to be durable.
    pub volatile_write_cache: bool,
}

impl Namespace {
    /// One of 512 MiB with everything that a namespace can have and no name: for tests and fuzzing.
    #[doc(hidden)]
    pub fn example() -> Namespace {
        Namespace {
            nsid: Nsid::new(1),
            block_size: 512,
            block_count: 1 << 20,
            uuid: None,
            nguid: [0; 16],
            eui64: [0; 8],
            read_only: false,
            deallocated_reads_zero: true,
            optimal_io_bytes: 0,
            max_transfer_bytes: 64 << 10,
            max_blocks: MaxBlocks::EXPRESSIBLE,
            write_zeroes: true,
            discard: true,
            compare: true,
            compare_and_write: true,
            verify: true,
            volatile_write_cache: true,
        }
    }

    /// Capacity in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.block_count.saturating_mul(u64::from(self.block_size))
    }
}

#[cfg(test)]
mod tests {
    use flexblk_nvme::U32;

    use super::*;

    #[test]
    fn limits_count_pages_as_powers_of_two() {
        let mut controller = NvmController::zeroed();
        let of = |controller: &NvmController, block| MaxBlocks::of(controller, 4096, block);
        assert_eq!(of(&controller, 512), MaxBlocks::EXPRESSIBLE);
        (controller.wzsl, controller.vsl) = (10, 1);
        controller.dmrsl = U32::new(77);
        let limits = of(&controller, 512);
        assert_eq!(
            (limits.write_zeroes, limits.verify, limits.discard),
            (8192, 16, 77)
        );
        assert_eq!(of(&controller, 4096).write_zeroes, 1024);
        // Beyond what a command, or a number, can express.
        for exponent in [52, 63, 64, 255] {
            controller.wzsl = exponent;
            assert_eq!(of(&controller, 512).write_zeroes, nvm::MAX_BLOCKS);
        }
        // A page is less than a block.
        controller.vsl = 1;
        assert_eq!(of(&controller, 65_536).verify, 1);
    }
}
