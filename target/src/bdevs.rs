//! The block devices of a target: each opened once, used by any number of namespaces by its name.

use std::fmt;
use std::sync::Arc;

use flexblk_blockdev::{BdevConfig, BlockDevice};

use crate::histogram::LatencyHistogram;
use crate::iostat::IoStats;
use crate::media::Media;

/// A block device that is open.
#[derive(Clone)]
pub struct Bdev {
    /// Tells devices apart over threads and time.
    pub id: u64,
    /// As it was made; `name()` is its name.
    pub config: BdevConfig,
    /// The device.
    pub device: Arc<dyn BlockDevice>,
    /// Blocks of it that must not be read.
    pub media: Arc<Media>,
    /// What is done with it.
    pub stats: Arc<IoStats>,
    /// Its latencies, when they are counted.
    pub histogram: Option<Arc<LatencyHistogram>>,
    /// It came with its namespace, from a short form such as `ram:1G`, and goes with the last
    /// namespace on it.
    pub implicit: bool,
}

impl Bdev {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.config.name()
    }
}

/// Is the data of a device over one of `open`, or over none, there again after a start?
pub(crate) fn outlives_us(config: &BdevConfig, open: &[Bdev]) -> bool {
    match open.iter().find(|bdev| config.base() == Some(bdev.name())) {
        Some(base) => base.media.keeper().is_some(),
        None => matches!(config, BdevConfig::File(_)),
    }
}

impl fmt::Debug for Bdev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bdev")
            .field("id", &self.id)
            .field("config", &self.config)
            .field("implicit", &self.implicit)
            .finish_non_exhaustive()
    }
}
