//! What is known about a namespace.

use flexblk_nvme::Nsid;
use uuid::Uuid;

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
    /// One with everything that a namespace can have and no name: for tests and fuzzing.
    pub(crate) fn example() -> Namespace {
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
