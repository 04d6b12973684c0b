//! NVMe/RDMA private data of connection management (RDMA 3.2, Queue mapping and RDMA_CM private
//! data), which NVMe over FlexiNS uses too.

use crate::U16;
use crate::ids::{Cntlid, Qid};

wire! {
    /// Private data of a connection request (RDMA, RDMA_CM_REQUEST Private Data).
    pub struct RequestPrivate: 32 {
        /// Record Format (RECFMT): 0.
        0 => pub recfmt: U16,
        /// Queue ID (QID).
        2 => pub qid: U16,
        /// RDMA QP Host Receive Queue Size (HRQSIZE), in entries.
        4 => pub hrqsize: U16,
        /// RDMA QP Host Send Queue Size (HSQSIZE), 0's based.
        6 => pub hsqsize: U16,
        /// Controller ID (CNTLID); valid on I/O queues, transport 1.1.
        8 => pub cntlid: U16,
        10 => _r10: [u8; 14],
        /// Reserved by NVMe/RDMA; NVMe over FlexiNS puts [`crate::flexins::NvmeParams`] here.
        24 => pub extension: [u8; 8],
    }
}

wire! {
    /// Private data of a connection's acceptance (RDMA, RDMA_CM_ACCEPT Private Data).
    pub struct AcceptPrivate: 32 {
        /// Record Format (RECFMT): 0.
        0 => pub recfmt: U16,
        /// RDMA QP Controller Receive Queue Size (CRQSIZE), in entries.
        2 => pub crqsize: U16,
        4 => _r4: [u8; 20],
        /// Reserved by NVMe/RDMA; NVMe over FlexiNS puts [`crate::flexins::NvmeParams`] here.
        24 => pub extension: [u8; 8],
    }
}

wire! {
    /// Private data of a connection's rejection (RDMA, RDMA_CM_REJECT Private Data).
    pub struct RejectPrivate: 4 {
        /// Record Format (RECFMT): 0.
        0 => pub recfmt: U16,
        /// Status (STS), see [`RejectStatus`].
        2 => pub sts: U16,
    }
}

/// Why a connection is rejected (RDMA, RDMA_CM_REJECT status codes).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum RejectStatus {
    /// 1.
    #[error("invalid private data length")]
    InvalidLength,
    /// 2.
    #[error("invalid record format")]
    InvalidRecordFormat,
    /// 3.
    #[error("invalid queue id")]
    InvalidQid,
    /// 4.
    #[error("invalid host send queue size")]
    InvalidHsqsize,
    /// 5.
    #[error("invalid host receive queue size")]
    InvalidHrqsize,
    /// 6.
    #[error("no resources")]
    NoResources,
    /// 7.
    #[error("invalid IRD")]
    InvalidIrd,
    /// 8.
    #[error("invalid ORD")]
    InvalidOrd,
    /// 9.
    #[error("invalid controller id")]
    InvalidCntlid,
    /// A code without a meaning here.
    #[error("status {0}")]
    Other(u16),
}

impl RejectStatus {
    /// From the code.
    #[must_use]
    pub const fn from_raw(raw: u16) -> Self {
        match raw {
            1 => Self::InvalidLength,
            2 => Self::InvalidRecordFormat,
            3 => Self::InvalidQid,
            4 => Self::InvalidHsqsize,
            5 => Self::InvalidHrqsize,
            6 => Self::NoResources,
            7 => Self::InvalidIrd,
            8 => Self::InvalidOrd,
            9 => Self::InvalidCntlid,
            other => Self::Other(other),
        }
    }

    /// The code.
    #[must_use]
    pub const fn raw(self) -> u16 {
        match self {
            Self::InvalidLength => 1,
            Self::InvalidRecordFormat => 2,
            Self::InvalidQid => 3,
            Self::InvalidHsqsize => 4,
            Self::InvalidHrqsize => 5,
            Self::NoResources => 6,
            Self::InvalidIrd => 7,
            Self::InvalidOrd => 8,
            Self::InvalidCntlid => 9,
            Self::Other(raw) => raw,
        }
    }
}

impl RequestPrivate {
    /// For that queue. `queue_size` is its size in entries, 1 or more: both work queues of the
    /// host have room for as many commands.
    #[must_use]
    pub fn new(qid: Qid, queue_size: u16, cntlid: Cntlid) -> Self {
        Self {
            qid: U16::new(qid.get()),
            hrqsize: U16::new(queue_size),
            hsqsize: U16::new(queue_size.saturating_sub(1)),
            cntlid: U16::new(cntlid.get()),
            ..Self::zeroed()
        }
    }

    /// Reads a request's private data: at least 32 bytes, of which connection management may have
    /// padded more. The error is the status to reject with.
    pub fn parse(bytes: &[u8]) -> Result<Self, RejectStatus> {
        let request = Self::view(bytes).ok_or(RejectStatus::InvalidLength)?;
        if request.recfmt.get() != 0 {
            return Err(RejectStatus::InvalidRecordFormat);
        }
        if request.hrqsize.get() == 0 {
            return Err(RejectStatus::InvalidHrqsize);
        }
        Ok(*request)
    }

    /// Queue.
    #[must_use]
    pub fn qid(&self) -> Qid {
        Qid::new(self.qid.get())
    }

    /// Commands that the host may have in flight: its send queue, in entries.
    #[must_use]
    pub fn send_entries(&self) -> u32 {
        u32::from(self.hsqsize.get()) + 1
    }

    /// Controller, of an I/O queue.
    #[must_use]
    pub fn cntlid(&self) -> Cntlid {
        Cntlid::new(self.cntlid.get())
    }
}

impl AcceptPrivate {
    /// With that many entries in the controller's receive queue.
    #[must_use]
    pub fn new(crqsize: u16) -> Self {
        Self {
            crqsize: U16::new(crqsize),
            ..Self::zeroed()
        }
    }

    /// Reads an acceptance; `None` when it is too short or of another format.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        Self::view(bytes)
            .filter(|accept| accept.recfmt.get() == 0)
            .copied()
    }
}

impl RejectPrivate {
    /// With that reason.
    #[must_use]
    pub fn new(status: RejectStatus) -> Self {
        Self {
            recfmt: U16::ZERO,
            sts: U16::new(status.raw()),
        }
    }

    /// Reads a rejection; `None` when it is too short or of another format.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<RejectStatus> {
        let reject = Self::view(bytes).filter(|reject| reject.recfmt.get() == 0)?;
        Some(RejectStatus::from_raw(reject.sts.get()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn request_bytes() {
        let request = RequestPrivate::new(Qid::new(1), 128, Cntlid::new(5));
        assert_eq!(request.bytes()[..10], [0, 0, 1, 0, 128, 0, 127, 0, 5, 0]);
        assert_eq!(request.send_entries(), 128);
        assert_eq!(RequestPrivate::parse(request.bytes()), Ok(request));
        assert_eq!(
            RequestPrivate::parse(&[0; 31]),
            Err(RejectStatus::InvalidLength)
        );
        assert_eq!(
            RequestPrivate::parse(&[0; 56]),
            Err(RejectStatus::InvalidHrqsize)
        );
        assert_eq!(
            RequestPrivate::parse(&[1; 56]),
            Err(RejectStatus::InvalidRecordFormat)
        );
    }

    proptest! {
        #[test]
        fn random_bytes_are_judged(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(request) = RequestPrivate::parse(&bytes) {
                prop_assert_eq!(request.bytes(), &bytes[..32]);
            }
            let _ = (AcceptPrivate::parse(&bytes), RejectPrivate::parse(&bytes));
        }

        #[test]
        fn statuses_round_trip(raw in any::<u16>()) {
            let status = RejectStatus::from_raw(raw);
            prop_assert_eq!(status.raw(), raw);
            prop_assert_eq!(RejectPrivate::parse(RejectPrivate::new(status).bytes()), Some(status));
        }

        #[test]
        fn accept_round_trips(crqsize in any::<u16>()) {
            let accept = AcceptPrivate::new(crqsize);
            prop_assert_eq!(AcceptPrivate::parse(accept.bytes()), Some(accept));
        }
    }
}
