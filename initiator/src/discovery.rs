//! Asking a discovery controller what there is.

use flexblk_nvme::log::LogPageId;
use flexblk_nvme::log::discovery::{Entry, Header, Page};
use flexblk_nvme::{Nqn, Nsid};

use crate::admin::bring_up::bring_up;
use crate::{ConnectOptions, Error};

pub use flexblk_nvme::log::discovery::{
    AddressFamily, Record as DiscoveryRecord, SubsystemType, TransportType,
};

/// What a discovery controller offers to this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryLog {
    /// Generation counter: changes when the records do.
    pub generation: u64,
    /// The records.
    pub records: Vec<DiscoveryRecord>,
}

/// Records that we read at most.
const MAX_RECORDS: u64 = 4096;
/// Times that the log may change while it is read.
const ATTEMPTS: u32 = 10;

/// Connects to the discovery controller at `options.target` (the well-known discovery subsystem, or the one whose
/// NQN `subnqn` is) and reads the whole log.
pub fn discover(options: &ConnectOptions) -> Result<DiscoveryLog, Error> {
    let subnqn = options.target.subnqn.clone().unwrap_or_else(Nqn::discovery);
    let mut options = options.clone();
    // A discovery controller that lives as long as one log page needs no keep-alive (Base 3.1.3.3).
    options.kato = std::time::Duration::ZERO;
    let mut up = bring_up(&options, &subnqn)?;
    for _ in 0..ATTEMPTS {
        let header = up
            .queue
            .log_page(LogPageId::Discovery, Nsid::NONE, 0, Header::SIZE as u32)?;
        let page = Page::parse(&header).map_err(|_| BAD_LOG)?;
        let (generation, count) = (page.generation(), page.record_count());
        if count > MAX_RECORDS {
            return Err(Error::Protocol("a discovery log of more than 4096 records"));
        }
        let len = (1 + count) * Entry::SIZE as u64;
        let bytes = up
            .queue
            .log_page(LogPageId::Discovery, Nsid::NONE, 0, len as u32)?;
        let page = Page::parse(&bytes).map_err(|_| BAD_LOG)?;
        // Base 5.1.12.3.1: the same generation before and after, or the pieces do not belong together.
        let after = up
            .queue
            .log_page(LogPageId::Discovery, Nsid::NONE, 0, Header::SIZE as u32)?;
        let after = Page::parse(&after).map_err(|_| BAD_LOG)?.generation();
        if page.generation() != generation || after != generation {
            continue;
        }
        let records = page
            .entries()
            .map(Entry::record)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| BAD_LOG)?;
        return Ok(DiscoveryLog {
            generation,
            records,
        });
    }
    Err(Error::Protocol(
        "the discovery log changes faster than it can be read",
    ))
}

const BAD_LOG: Error = Error::Protocol("an unreadable discovery log");
