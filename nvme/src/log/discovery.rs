//! Discovery log page (LID 70h, Base 5.1.12.3.1): a header and one entry per way to a subsystem.

use bitfield_struct::bitfield;
use bitflags::bitflags;

use crate::ids::Cntlid;
use crate::nqn::{Nqn, NqnError};
use crate::{U16, U64, text};

wire! {
    /// Head of the page.
    pub struct Header: 1024 {
        /// Generation Counter (GENCTR): changes with the page; a host that saw it change while
        /// it read starts over.
        0 => pub genctr: U64,
        /// Number of Records (NUMREC).
        8 => pub numrec: U64,
        /// Record Format (RECFMT): 0.
        16 => pub recfmt: U16,
        18 => _r18: [u8; 1006],
    }
}

wire! {
    /// Discovery Log Page Entry.
    pub struct Entry: 1024 {
        /// Transport Type (TRTYPE), [`TransportType`].
        0 => pub trtype: u8,
        /// Address Family (ADRFAM), [`AddressFamily`].
        1 => pub adrfam: u8,
        /// Subsystem Type (SUBTYPE), [`SubsystemType`].
        2 => pub subtype: u8,
        /// Transport Requirements (TREQ), [`Treq`].
        3 => pub treq: u8,
        /// Port ID (PORTID).
        4 => pub portid: U16,
        /// Controller ID (CNTLID).
        6 => pub cntlid: U16,
        /// Admin Max SQ Size (ASQSZ) in entries; at least 32.
        8 => pub asqsz: U16,
        /// Entry Flags (EFLAGS), [`EntryFlags`].
        10 => pub eflags: U16,
        12 => _r12: [u8; 20],
        /// Transport Service Identifier (TRSVCID), ASCII.
        32 => pub trsvcid: [u8; 32],
        64 => _r64: [u8; 192],
        /// NVM Subsystem Qualified Name (SUBNQN).
        256 => pub subnqn: [u8; 256],
        /// Transport Address (TRADDR), ASCII.
        512 => pub traddr: [u8; 256],
        /// Transport Specific Address Subtype (TSAS), [`TsasRdma`] or [`TsasTcp`].
        768 => pub tsas: [u8; 256],
    }
}

wire! {
    /// TSAS of RDMA transports (RDMA 3.1.1, RDMA Transport Specific Address Subtype).
    pub struct TsasRdma: 256 {
        /// RDMA QP Service Type (RDMA_QPTYPE): 1 reliable connected.
        0 => pub qptype: u8,
        /// RDMA Provider Type (RDMA_PRTYPE): 1 none, 2 InfiniBand, 3 RoCE, 4 RoCEv2, 5 iWARP.
        1 => pub prtype: u8,
        /// RDMA Connection Management Service (RDMA_CMS): 1 RDMA_CM.
        2 => pub cms: u8,
        3 => _r3: [u8; 5],
        /// Partition Key (RDMA_PKEY).
        8 => pub pkey: U16,
        10 => _r10: [u8; 246],
    }
}

impl TsasRdma {
    /// Reliable connected over RoCEv2 by RDMA_CM.
    #[must_use]
    pub fn roce_v2() -> Self {
        Self {
            qptype: 1,
            prtype: 4,
            cms: 1,
            ..Self::zeroed()
        }
    }
}

wire! {
    /// TSAS of NVMe/TCP (TCP Transport Specification, Transport Specific Address Subtype).
    pub struct TsasTcp: 256 {
        /// Security Type (SECTYPE): 0 none, 1 TLS 1.2, 2 TLS 1.3.
        0 => pub sectype: u8,
        1 => _r1: [u8; 255],
    }
}

open_enum! {
    /// Transport Type (TRTYPE, Base 5.1.12.3.1).
    pub enum TransportType {
        /// RDMA.
        Rdma = 1,
        /// Fibre Channel.
        FibreChannel = 2,
        /// TCP.
        Tcp = 3,
        /// FlexiNS. The specification has no number for it: this is one of its reserved ones, so
        /// that hosts which do not know FlexiNS pass the entry over. TSAS is [`TsasRdma`].
        Flexins = 0xF1,
        /// Intra-host (loopback).
        IntraHost = 254,
    }
}

open_enum! {
    /// Address Family (ADRFAM, Base 5.1.12.3.1).
    pub enum AddressFamily {
        /// IPv4.
        Ipv4 = 1,
        /// IPv6.
        Ipv6 = 2,
        /// InfiniBand.
        InfiniBand = 3,
        /// Fibre Channel.
        FibreChannel = 4,
        /// Intra-host (loopback).
        IntraHost = 254,
    }
}

open_enum! {
    /// Subsystem Type (SUBTYPE, Base 5.1.12.3.1).
    pub enum SubsystemType {
        /// Another discovery subsystem.
        Referral = 1,
        /// A subsystem with storage.
        Nvm = 2,
        /// The discovery subsystem that was asked.
        CurrentDiscovery = 3,
    }
}

/// Transport Requirements (TREQ, Base 5.1.12.3.1).
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct Treq {
    /// Secure Channel (TSC): 0 not specified, 1 required, 2 not required.
    #[bits(2)]
    pub secure_channel: u8,
    /// The subsystem can disable SQ flow control.
    pub sq_flow_control_disable: bool,
    #[bits(5)]
    __: u8,
}

bitflags! {
    /// Entry Flags (EFLAGS, Base 5.1.12.3.1).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct EntryFlags: u16 {
        /// Duplicate Returned Information (DUPRETINFO).
        const DUPLICATE = 1 << 0;
        /// Explicit Persistent Connection Support for Discovery (EPCSD).
        const PERSISTENT_DISCOVERY = 1 << 1;
        /// No CDC Connectivity (NCC).
        const NO_CDC = 1 << 2;
    }
}

/// Admin Max SQ Size that entries commonly give.
pub const ASQSZ_DEFAULT: u16 = 32;

/// What an entry means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Transport.
    pub trtype: TransportType,
    /// Family of the address.
    pub adrfam: AddressFamily,
    /// Kind of subsystem.
    pub subtype: SubsystemType,
    /// Requirements.
    pub treq: Treq,
    /// Port of the subsystem.
    pub portid: u16,
    /// Controller identifier to connect to.
    pub cntlid: Cntlid,
    /// Largest Admin submission queue in entries.
    pub asqsz: u16,
    /// Flags.
    pub eflags: EntryFlags,
    /// Service: a port number in IP networks. At most 31 bytes.
    pub trsvcid: String,
    /// Name of the subsystem.
    pub subnqn: Nqn,
    /// Address. At most 255 bytes.
    pub traddr: String,
    /// Transport specific.
    pub tsas: [u8; 256],
}

/// Why a page or an entry cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiscoveryError {
    /// Shorter than its header.
    #[error("discovery log page is shorter than its header")]
    Header,
    /// Not record format 0.
    #[error("discovery log page has record format {0}, which is not known")]
    RecordFormat(u16),
    /// The name of the subsystem is unusable.
    #[error("discovery log entry has an unusable subsystem name: {0}")]
    Subnqn(#[from] NqnError),
}

impl Entry {
    /// What the entry means.
    pub fn record(&self) -> Result<Record, DiscoveryError> {
        Ok(Record {
            trtype: TransportType::from_raw(self.trtype),
            adrfam: AddressFamily::from_raw(self.adrfam),
            subtype: SubsystemType::from_raw(self.subtype),
            treq: Treq::from_bits(self.treq),
            portid: self.portid.get(),
            cntlid: Cntlid::new(self.cntlid.get()),
            asqsz: self.asqsz.get(),
            eflags: EntryFlags::from_bits_retain(self.eflags.get()),
            trsvcid: text::trim_ascii(&self.trsvcid),
            subnqn: Nqn::from_field(&self.subnqn)?,
            traddr: text::trim_ascii(&self.traddr),
            tsas: self.tsas,
        })
    }
}

impl Record {
    /// The entry that says so.
    #[must_use]
    pub fn entry(&self) -> Entry {
        let mut entry = Entry {
            trtype: self.trtype.raw(),
            adrfam: self.adrfam.raw(),
            subtype: self.subtype.raw(),
            treq: self.treq.into_bits(),
            portid: U16::new(self.portid),
            cntlid: U16::new(self.cntlid.get()),
            asqsz: U16::new(self.asqsz),
            eflags: U16::new(self.eflags.bits()),
            subnqn: self.subnqn.to_field(),
            tsas: self.tsas,
            ..Entry::zeroed()
        };
        // ASCII fields are padded with spaces (Base 1.4.2); `record` also reads those that other
        // targets pad with NUL.
        text::pad_ascii(&mut entry.trsvcid, &self.trsvcid);
        text::pad_ascii(&mut entry.traddr, &self.traddr);
        entry
    }

    /// Provider type of an RDMA-like transport.
    #[must_use]
    pub fn tsas_rdma(&self) -> TsasRdma {
        zerocopy::transmute!(self.tsas)
    }

    /// Security of an NVMe/TCP transport.
    #[must_use]
    pub fn tsas_tcp(&self) -> TsasTcp {
        zerocopy::transmute!(self.tsas)
    }
}

/// A page as far as it has been read.
#[derive(Clone, Copy, Debug)]
pub struct Page<'a> {
    header: &'a Header,
    entries: &'a [u8],
}

impl<'a> Page<'a> {
    /// Reads the header; entries that are cut off are not there.
    pub fn parse(page: &'a [u8]) -> Result<Self, DiscoveryError> {
        let header = Header::view(page).ok_or(DiscoveryError::Header)?;
        if header.recfmt.get() != 0 {
            return Err(DiscoveryError::RecordFormat(header.recfmt.get()));
        }
        Ok(Self {
            header,
            entries: page.get(Header::SIZE..).unwrap_or_default(),
        })
    }

    /// Generation counter.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.header.genctr.get()
    }

    /// Number of records that the page has in full.
    #[must_use]
    pub fn record_count(&self) -> u64 {
        self.header.numrec.get()
    }

    /// Length of the full page in bytes; `None` when the count is absurd.
    #[must_use]
    pub fn full_len(&self) -> Option<u64> {
        self.record_count()
            .checked_add(1)?
            .checked_mul(Entry::SIZE as u64)
    }

    /// The entries read, at most as many as the header says.
    pub fn entries(&self) -> impl Iterator<Item = &'a Entry> + use<'a> {
        let count = usize::try_from(self.record_count()).unwrap_or(usize::MAX);
        self.entries
            .chunks_exact(Entry::SIZE)
            .filter_map(Entry::view)
            .take(count)
    }
}

/// Builds the page.
#[must_use]
pub fn emit<'a>(genctr: u64, records: impl IntoIterator<Item = &'a Record>) -> Vec<u8> {
    let mut page = vec![0; Header::SIZE];
    let mut count = 0u64;
    for record in records {
        page.extend_from_slice(record.entry().bytes());
        count += 1;
    }
    let header = Header {
        genctr: U64::new(genctr),
        numrec: U64::new(count),
        ..Header::zeroed()
    };
    if let Some(front) = page.get_mut(..Header::SIZE) {
        front.copy_from_slice(header.bytes());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record() -> impl Strategy<Value = Record> {
        let numbers = (
            any::<u8>(),
            any::<u8>(),
            any::<u8>(),
            any::<u8>(),
            any::<u16>(),
            any::<u16>(),
            any::<u16>(),
            any::<u16>(),
        );
        let texts = ("[0-9a-z]{0,32}", "[!-~]{1,223}", "[0-9a-f:.]{0,256}");
        (numbers, texts, proptest::collection::vec(any::<u8>(), 256)).prop_map(|(n, t, tsas)| {
            Record {
                trtype: TransportType::from_raw(n.0),
                adrfam: AddressFamily::from_raw(n.1),
                subtype: SubsystemType::from_raw(n.2),
                treq: Treq::from_bits(n.3),
                portid: n.4,
                cntlid: Cntlid::new(n.5),
                asqsz: n.6,
                eflags: EntryFlags::from_bits_retain(n.7),
                trsvcid: t.0,
                subnqn: Nqn::opaque(&t.1).unwrap(),
                traddr: t.2,
                tsas: tsas.try_into().unwrap(),
            }
        })
    }

    #[test]
    fn tsas() {
        let tsas: [u8; 256] = zerocopy::transmute!(TsasRdma::roce_v2());
        assert_eq!(tsas[..4], [1, 4, 1, 0]);
    }

    #[test]
    fn heads_are_judged() {
        let mut page = emit(5, []);
        let full = Page::parse(&page).unwrap();
        assert_eq!(
            (full.generation(), full.record_count(), full.full_len()),
            (5, 0, Some(1024))
        );
        page[16] = 1;
        assert_eq!(
            Page::parse(&page).err(),
            Some(DiscoveryError::RecordFormat(1))
        );
        assert_eq!(Page::parse(&page[1..]).err(), Some(DiscoveryError::Header));
        page[16] = 0;
        page[8..16].fill(0xFF);
        assert_eq!(Page::parse(&page).unwrap().full_len(), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn pages_round_trip(genctr: u64, records in proptest::collection::vec(record(), 0..5), cut in 0usize..1025) {
            let page = emit(genctr, &records);
            let parsed = Page::parse(&page).unwrap();
            prop_assert_eq!(parsed.generation(), genctr);
            prop_assert_eq!(parsed.record_count(), records.len() as u64);
            prop_assert_eq!(parsed.full_len(), Some(page.len() as u64));
            let again: Vec<Record> = parsed.entries().map(Entry::record).collect::<Result<_, _>>().unwrap();
            prop_assert_eq!(&again, &records);
            // Cut anywhere in the last entry, all others are still there.
            if let Some(len) = page.len().checked_sub(cut).filter(|len| *len >= 1024) {
                let whole = len / 1024 - 1;
                prop_assert_eq!(Page::parse(&page[..len]).unwrap().entries().count(), whole);
            }
        }

        #[test]
        fn random_bytes_are_read(page in proptest::collection::vec(any::<u8>(), 0..4096)) {
            if let Ok(page) = Page::parse(&page) {
                for entry in page.entries() {
                    let _ = entry.record();
                }
            }
            if let Some(entry) = Entry::view(&page) {
                let _ = entry.record();
            }
        }
    }
}
