//! Asking a discovery controller what there is.

use std::time::{Duration, Instant};

use flexblk_nvme::aer::AsyncEvent;
use flexblk_nvme::command::admin::SetFeatures;
use flexblk_nvme::features::{AsyncEventConfig, FeatureValue};
use flexblk_nvme::log::LogPageId;
use flexblk_nvme::log::discovery::{Entry, Header, Page};
use flexblk_nvme::{Nqn, Nsid, Sgl};

use crate::admin::bring_up::{BroughtUp, bring_up};
use crate::admin::runner::Payload;
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
    let mut options = options.clone();
    // A discovery controller that lives as long as one log page needs no keep-alive (Base 3.1.3.3).
    options.kato = Duration::ZERO;
    DiscoveryController::open(&options)?.log()
}

/// A persistent connection to a discovery controller, which tells when its log changes (Base 3.1.3.3.1).
pub struct DiscoveryController {
    up: BroughtUp,
}

impl DiscoveryController {
    /// Connects, and asks to be told of changes. A controller that does not tell works, too.
    pub fn connect(options: &ConnectOptions) -> Result<DiscoveryController, Error> {
        let mut controller = DiscoveryController::open(options)?;
        let queue = &mut controller.up.queue;
        let events = AsyncEventConfig::new().with_discovery_log(true);
        let feature = SetFeatures::new(FeatureValue::AsyncEventConfig(events));
        match queue.execute(
            "Set Features (Asynchronous Event Configuration)",
            Payload::None,
            |cid| feature.emit(cid, &Sgl::NONE),
        ) {
            Ok(_) => queue.listen()?,
            Err(Error::Status { status, .. }) => {
                tracing::warn!(%status, "the discovery controller does not tell of changes");
            }
            Err(other) => return Err(other),
        }
        Ok(controller)
    }

    fn open(options: &ConnectOptions) -> Result<DiscoveryController, Error> {
        let subnqn = options.target.subnqn.clone().unwrap_or_else(Nqn::discovery);
        let up = bring_up(options, &subnqn)?;
        Ok(DiscoveryController { up })
    }

    /// Waits, and keeps the connection alive, until the log changes or `timeout` is over; whether it changed. The
    /// controller tells again after [`log`](Self::log).
    pub fn wait_for_change(&mut self, timeout: Duration) -> Result<bool, Error> {
        let until = Instant::now() + timeout;
        while Instant::now() < until {
            self.up.queue.service(until)?;
            while let Some(event) = self.up.queue.next_event() {
                if event.event == AsyncEvent::DISCOVERY_CHANGED {
                    return Ok(true);
                }
                self.up.queue.acknowledge(event)?;
            }
        }
        Ok(false)
    }

    /// Reads the whole log.
    pub fn log(&mut self) -> Result<DiscoveryLog, Error> {
        let queue = &mut self.up.queue;
        for _ in 0..ATTEMPTS {
            let header = queue.log_page(LOG, Nsid::NONE, 0, Header::SIZE as u32)?;
            let page = Page::parse(&header).map_err(|_| BAD_LOG)?;
            let (generation, count) = (page.generation(), page.record_count());
            if count > MAX_RECORDS {
                return Err(Error::Protocol("a discovery log of more than 4096 records"));
            }
            let len = (1 + count) * Entry::SIZE as u64;
            let bytes = queue.log_page(LOG, Nsid::NONE, 0, len as u32)?;
            let page = Page::parse(&bytes).map_err(|_| BAD_LOG)?;
            // Base 5.1.12.3.1: the same generation before and after, or the pieces do not belong together.
            let after = queue.log_page(LOG, Nsid::NONE, 0, Header::SIZE as u32)?;
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
}

const LOG: LogPageId = LogPageId::Discovery;
const BAD_LOG: Error = Error::Protocol("an unreadable discovery log");
