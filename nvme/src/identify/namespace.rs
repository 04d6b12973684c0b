//! Identify Namespace: CNS 00h and 05h of the NVM command set (NVM 4.1.5.1, 4.1.5.3) and CNS 08h
//! (Base 5.1.13.2.8).

use bitfield_struct::bitfield;
use bitflags::bitflags;

use crate::{U16, U32, U64, U128};

wire! {
    /// Identify Namespace data structure of the NVM command set (CNS 00h, NVM 4.1.5.1).
    pub struct Namespace: 4096 {
        /// Namespace Size (NSZE) in logical blocks.
        0 => pub nsze: U64,
        /// Namespace Capacity (NCAP) in logical blocks.
        8 => pub ncap: U64,
        /// Namespace Utilization (NUSE) in logical blocks.
        16 => pub nuse: U64,
        /// Namespace Features (NSFEAT), [`Nsfeat`].
        24 => pub nsfeat: u8,
        /// Number of LBA Formats (NLBAF), 0's based.
        25 => pub nlbaf: u8,
        /// Formatted LBA Size (FLBAS): format index in 3:0 and 6:5, metadata at the end of the
        /// data in 4.
        26 => pub flbas: u8,
        /// Metadata Capabilities (MC).
        27 => pub mc: u8,
        /// End-to-end Data Protection Capabilities (DPC).
        28 => pub dpc: u8,
        /// End-to-end Data Protection Type Settings (DPS).
        29 => pub dps: u8,
        /// Namespace Multi-path I/O and Namespace Sharing Capabilities (NMIC), [`Nmic`].
        30 => pub nmic: u8,
        /// Reservation Capabilities (RESCAP).
        31 => pub rescap: u8,
        /// Format Progress Indicator (FPI).
        32 => pub fpi: u8,
        /// Deallocate Logical Block Features (DLFEAT): 2:0 001b reads zeros, 3 DEAC of Write Zeroes.
        33 => pub dlfeat: u8,
        /// Namespace Atomic Write Unit Normal (NAWUN), 0's based.
        34 => pub nawun: U16,
        /// Namespace Atomic Write Unit Power Fail (NAWUPF), 0's based.
        36 => pub nawupf: U16,
        /// Namespace Atomic Compare & Write Unit (NACWU), 0's based.
        38 => pub nacwu: U16,
        /// Namespace Atomic Boundary Size Normal (NABSN), 0's based.
        40 => pub nabsn: U16,
        /// Namespace Atomic Boundary Offset (NABO).
        42 => pub nabo: U16,
        /// Namespace Atomic Boundary Size Power Fail (NABSPF), 0's based.
        44 => pub nabspf: U16,
        /// Namespace Optimal I/O Boundary (NOIOB) in logical blocks.
        46 => pub noiob: U16,
        /// NVM Capacity (NVMCAP) in bytes.
        48 => pub nvmcap: U128,
        /// Namespace Preferred Write Granularity (NPWG), 0's based.
        64 => pub npwg: U16,
        /// Namespace Preferred Write Alignment (NPWA), 0's based.
        66 => pub npwa: U16,
        /// Namespace Preferred Deallocate Granularity (NPDG), 0's based.
        68 => pub npdg: U16,
        /// Namespace Preferred Deallocate Alignment (NPDA), 0's based.
        70 => pub npda: U16,
        /// Namespace Optimal Write Size (NOWS), 0's based.
        72 => pub nows: U16,
        /// Maximum Single Source Range Length (MSSRL) of Copy.
        74 => pub mssrl: U16,
        /// Maximum Copy Length (MCL).
        76 => pub mcl: U32,
        /// Maximum Source Range Count (MSRC) of Copy, 0's based.
        80 => pub msrc: u8,
        /// Key Per I/O Status (KPIOS).
        81 => pub kpios: u8,
        /// Number of Unique Attribute LBA Formats (NULBAF).
        82 => pub nulbaf: u8,
        83 => _r83: u8,
        /// Key Per I/O Data Access Alignment and Granularity (KPIODAAG).
        84 => pub kpiodaag: U32,
        88 => _r88: [u8; 4],
        /// ANA Group Identifier (ANAGRPID).
        92 => pub anagrpid: U32,
        96 => _r96: [u8; 3],
        /// Namespace Attributes (NSATTR): bit 0 write protected.
        99 => pub nsattr: u8,
        /// NVM Set Identifier (NVMSETID).
        100 => pub nvmsetid: U16,
        /// Endurance Group Identifier (ENDGID).
        102 => pub endgid: U16,
        /// Namespace Globally Unique Identifier (NGUID), big endian.
        104 => pub nguid: [u8; 16],
        /// IEEE Extended Unique Identifier (EUI64), big endian.
        120 => pub eui64: [u8; 8],
        /// LBA Format Support (LBAF0 to LBAF63), [`LbaFormat`].
        128 => pub lbaf: [U32; 64],
        /// Vendor specific.
        384 => pub vendor: [u8; 3712],
    }
}

/// LBA Format (NVM 4.1.5.1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct LbaFormat {
    /// Metadata Size (MS) in bytes.
    pub ms: u16,
    /// LBA Data Size (LBADS): 2 to this power; below 9 the format is not supported.
    pub lbads: u8,
    /// Relative Performance (RP): 0 best, 3 degraded.
    #[bits(2)]
    pub rp: u8,
    #[bits(6)]
    __: u8,
}

bitflags! {
    /// Namespace Features (NSFEAT).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Nsfeat: u8 {
        /// Thin provisioning.
        const THIN = 1 << 0;
        /// NAWUN, NAWUPF and NACWU are defined.
        const ATOMICS = 1 << 1;
        /// Deallocated or unwritten block error.
        const DEALLOCATED_ERROR = 1 << 2;
        /// NGUID and EUI64 are never reused.
        const UNIQUE_ID_NOT_REUSED = 1 << 3;
        /// NPWG, NPWA, NPDG, NPDA and NOWS are defined (OPTPERF, bit 0 of two).
        const OPTIMAL_PERFORMANCE = 1 << 4;
    }

    /// Namespace Multi-path I/O and Namespace Sharing Capabilities (NMIC).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Nmic: u8 {
        /// May be attached to two or more controllers.
        const SHARED = 1 << 0;
        /// Dispersed over subsystems.
        const DISPERSED = 1 << 1;
    }
}

impl Namespace {
    /// Index of the format in use, from FLBAS.
    #[must_use]
    pub const fn format_index(&self) -> usize {
        // FLBAS 6:5 are the upper bits of the index only when there are more than 16 formats.
        let high = if self.nlbaf as u16 + self.nulbaf as u16 > 15 {
            self.flbas >> 5 & 3
        } else {
            0
        };
        (self.flbas & 0xF | high << 4) as usize
    }

    /// The format in use. Its index has 6 bits, so it is always in the table.
    #[must_use]
    pub fn format(&self) -> LbaFormat {
        LbaFormat::from_bits(
            self.lbaf
                .get(self.format_index())
                .map_or(0, |lbaf| lbaf.get()),
        )
    }

    /// Size of a logical block in bytes, without metadata; `None` when the format in use is not
    /// a sane one (below 512 bytes or above 2 GiB).
    #[must_use]
    pub fn block_bytes(&self) -> Option<u32> {
        match self.format().lbads() {
            lbads @ 9..=31 => Some(1 << lbads),
            _ => None,
        }
    }

    /// Sets one LBA format without metadata, with blocks of 2 to the power `lbads` bytes.
    pub fn set_single_format(&mut self, lbads: u8) {
        self.nlbaf = 0;
        self.flbas = 0;
        if let Some(first) = self.lbaf.first_mut() {
            *first = U32::new(LbaFormat::new().with_lbads(lbads).into_bits());
        }
    }

    /// Sets size, capacity and utilization to that many logical blocks.
    pub fn set_blocks(&mut self, blocks: u64) {
        self.nsze = U64::new(blocks);
        self.ncap = U64::new(blocks);
        self.nuse = U64::new(blocks);
    }
}

wire! {
    /// Identify Namespace of the NVM command set (CNS 05h, CSI 00h, NVM 4.1.5.3).
    pub struct NvmNamespace: 4096 {
        /// Logical Block Storage Tag Mask (LBSTM).
        0 => pub lbstm: U64,
        /// Protection Information Capabilities (PIC).
        8 => pub pic: u8,
        /// Protection Information Format Attribute (PIFA).
        9 => pub pifa: u8,
        10 => _r10: [u8; 2],
        /// Extended LBA Format Support (ELBAF0 to ELBAF63).
        12 => pub elbaf: [U32; 64],
        /// Namespace Preferred Deallocate Granularity Large (NPDGL).
        268 => pub npdgl: U32,
        /// Namespace Preferred Read Granularity (NPRG).
        272 => pub nprg: U32,
        /// Namespace Preferred Read Alignment (NPRA).
        276 => pub npra: U32,
        /// Namespace Optimal Read Size (NORS).
        280 => pub nors: U32,
        /// Namespace Preferred Deallocate Alignment Large (NPDAL).
        284 => pub npdal: U32,
        /// LBA Format Placement Shard Size (LBAPSS).
        288 => pub lbapss: U32,
        /// Tracked LBA Allocation Granularity (TLBAAG).
        292 => pub tlbaag: U32,
        296 => _r296: [u8; 3800],
    }
}

wire! {
    /// I/O Command Set Independent Identify Namespace (CNS 08h, Base 5.1.13.2.8).
    pub struct IndependentNamespace: 4096 {
        /// Common Namespace Features (NSFEAT): bit 3 identifiers are not reused, 4 rotational
        /// media, 5 volatile write cache not present.
        0 => pub nsfeat: u8,
        /// Namespace Multi-path I/O and Namespace Sharing Capabilities (NMIC), [`Nmic`].
        1 => pub nmic: u8,
        /// Reservation Capabilities (RESCAP).
        2 => pub rescap: u8,
        /// Format Progress Indicator (FPI).
        3 => pub fpi: u8,
        /// ANA Group Identifier (ANAGRPID).
        4 => pub anagrpid: U32,
        /// Namespace Attributes (NSATTR): bit 0 write protected.
        8 => pub nsattr: u8,
        9 => _r9: u8,
        /// NVM Set Identifier (NVMSETID).
        10 => pub nvmsetid: U16,
        /// Endurance Group Identifier (ENDGID).
        12 => pub endgid: U16,
        /// Namespace Status (NSTAT): bit 0 ready.
        14 => pub nstat: u8,
        /// Key Per I/O Status (KPIOS).
        15 => pub kpios: u8,
        /// Maximum Key Tag (MAXKT).
        16 => pub maxkt: U16,
        18 => _r18: [u8; 2],
        /// Reachability Group Identifier (RGRPID).
        20 => pub rgrpid: U32,
        24 => _r24: [u8; 4072],
    }
}

impl IndependentNamespace {
    /// NSTAT: the namespace is ready.
    pub const READY: u8 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn formats() {
        let mut namespace = Namespace::zeroed();
        assert_eq!(namespace.block_bytes(), None);
        namespace.set_single_format(12);
        namespace.set_blocks(100);
        assert_eq!(namespace.block_bytes(), Some(4096));
        assert_eq!(namespace.lbaf[0].get(), 12 << 16);
        assert_eq!(namespace.nsze.get(), 100);
        namespace.flbas = 0x61;
        assert_eq!(namespace.format_index(), 1);
        namespace.nlbaf = 63;
        assert_eq!(namespace.format_index(), 49);
    }

    proptest! {
        #[test]
        fn random_bytes_are_read(bytes in proptest::collection::vec(any::<u8>(), 4096)) {
            let namespace = Namespace::view(&bytes).unwrap();
            prop_assert_eq!(namespace.bytes(), &bytes[..]);
            prop_assert!(namespace.format_index() < 64);
            prop_assert!(namespace.block_bytes().is_none_or(|bytes| bytes.is_power_of_two()));
            prop_assert_eq!(NvmNamespace::view(&bytes).unwrap().bytes(), &bytes[..]);
            prop_assert_eq!(IndependentNamespace::view(&bytes).unwrap().bytes(), &bytes[..]);
        }
    }
}
