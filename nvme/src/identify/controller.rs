//! Identify Controller: CNS 01h (Base 5.1.13.2.1), CNS 06h of the NVM command set (NVM 4.1.5.4).

use crate::ids::Cntlid;
use crate::nqn::{Nqn, NqnError};
use crate::property::Vs;
use crate::{U16, U32, U64, U128, text};

wire! {
    /// Identify Controller data structure (CNS 01h, Base 5.1.13.2.1).
    pub struct Controller: 4096 {
        /// PCI Vendor ID (VID).
        0 => pub vid: U16,
        /// PCI Subsystem Vendor ID (SSVID).
        2 => pub ssvid: U16,
        /// Serial Number (SN), ASCII.
        4 => pub sn: [u8; 20],
        /// Model Number (MN), ASCII.
        24 => pub mn: [u8; 40],
        /// Firmware Revision (FR), ASCII.
        64 => pub fr: [u8; 8],
        /// Recommended Arbitration Burst (RAB).
        72 => pub rab: u8,
        /// IEEE OUI Identifier (IEEE), least significant byte first.
        73 => pub ieee: [u8; 3],
        /// Controller Multi-Path I/O and Namespace Sharing Capabilities (CMIC), [`super::Cmic`].
        76 => pub cmic: u8,
        /// Maximum Data Transfer Size (MDTS): 2 to this power, units of CAP.MPSMIN; 0 no limit.
        77 => pub mdts: u8,
        /// Controller ID (CNTLID).
        78 => pub cntlid: U16,
        /// Version (VER), [`Vs`].
        80 => pub ver: U32,
        /// RTD3 Resume Latency (RTD3R) in microseconds.
        84 => pub rtd3r: U32,
        /// RTD3 Entry Latency (RTD3E) in microseconds.
        88 => pub rtd3e: U32,
        /// Optional Asynchronous Events Supported (OAES), [`super::Oaes`].
        92 => pub oaes: U32,
        /// Controller Attributes (CTRATT), [`super::Ctratt`].
        96 => pub ctratt: U32,
        /// Read Recovery Levels Supported (RRLS).
        100 => pub rrls: U16,
        /// Boot Partition Capabilities (BPCAP).
        102 => pub bpcap: u8,
        103 => _r103: u8,
        /// NVM Subsystem Shutdown Latency (NSSL) in microseconds.
        104 => pub nssl: U32,
        108 => _r108: [u8; 2],
        /// Power Loss Signaling Information (PLSI).
        110 => pub plsi: u8,
        /// Controller Type (CNTRLTYPE), [`super::ControllerType`].
        111 => pub cntrltype: u8,
        /// FRU Globally Unique Identifier (FGUID).
        112 => pub fguid: [u8; 16],
        /// Command Retry Delay Time 1 (CRDT1), units of 100 ms.
        128 => pub crdt1: U16,
        /// Command Retry Delay Time 2 (CRDT2), units of 100 ms.
        130 => pub crdt2: U16,
        /// Command Retry Delay Time 3 (CRDT3), units of 100 ms.
        132 => pub crdt3: U16,
        /// Controller Reachability Capabilities (CRCAP).
        134 => pub crcap: u8,
        135 => _r135: [u8; 118],
        /// NVM Subsystem Report (NVMSR).
        253 => pub nvmsr: u8,
        /// VPD Write Cycle Information (VWCI).
        254 => pub vwci: u8,
        /// Management Endpoint Capabilities (MEC).
        255 => pub mec: u8,
        /// Optional Admin Command Support (OACS), [`super::Oacs`].
        256 => pub oacs: U16,
        /// Abort Command Limit (ACL), 0's based.
        258 => pub acl: u8,
        /// Asynchronous Event Request Limit (AERL), 0's based.
        259 => pub aerl: u8,
        /// Firmware Updates (FRMW): bit 0 first slot read only, 3:1 number of slots.
        260 => pub frmw: u8,
        /// Log Page Attributes (LPA), [`super::Lpa`].
        261 => pub lpa: u8,
        /// Error Log Page Entries (ELPE), 0's based.
        262 => pub elpe: u8,
        /// Number of Power States Support (NPSS), 0's based.
        263 => pub npss: u8,
        /// Admin Vendor Specific Command Configuration (AVSCC).
        264 => pub avscc: u8,
        /// Autonomous Power State Transition Attributes (APSTA).
        265 => pub apsta: u8,
        /// Warning Composite Temperature Threshold (WCTEMP) in kelvins.
        266 => pub wctemp: U16,
        /// Critical Composite Temperature Threshold (CCTEMP) in kelvins.
        268 => pub cctemp: U16,
        /// Maximum Time for Firmware Activation (MTFA), units of 100 ms.
        270 => pub mtfa: U16,
        /// Host Memory Buffer Preferred Size (HMPRE).
        272 => pub hmpre: U32,
        /// Host Memory Buffer Minimum Size (HMMIN).
        276 => pub hmmin: U32,
        /// Total NVM Capacity (TNVMCAP) in bytes.
        280 => pub tnvmcap: U128,
        /// Unallocated NVM Capacity (UNVMCAP) in bytes.
        296 => pub unvmcap: U128,
        /// Replay Protected Memory Block Support (RPMBS).
        312 => pub rpmbs: U32,
        /// Extended Device Self-test Time (EDSTT) in minutes.
        316 => pub edstt: U16,
        /// Device Self-test Options (DSTO).
        318 => pub dsto: u8,
        /// Firmware Update Granularity (FWUG).
        319 => pub fwug: u8,
        /// Keep Alive Support (KAS): granularity of the timeout, units of 100 ms; 0 unsupported.
        320 => pub kas: U16,
        /// Host Controlled Thermal Management Attributes (HCTMA).
        322 => pub hctma: U16,
        /// Minimum Thermal Management Temperature (MNTMT).
        324 => pub mntmt: U16,
        /// Maximum Thermal Management Temperature (MXTMT).
        326 => pub mxtmt: U16,
        /// Sanitize Capabilities (SANICAP).
        328 => pub sanicap: U32,
        /// Host Memory Buffer Minimum Descriptor Entry Size (HMMINDS).
        332 => pub hmminds: U32,
        /// Host Memory Maximum Descriptors Entries (HMMAXD).
        336 => pub hmmaxd: U16,
        /// NVM Set Identifier Maximum (NSETIDMAX).
        338 => pub nsetidmax: U16,
        /// Endurance Group Identifier Maximum (ENDGIDMAX).
        340 => pub endgidmax: U16,
        /// ANA Transition Time (ANATT) in seconds.
        342 => pub anatt: u8,
        /// Asymmetric Namespace Access Capabilities (ANACAP), [`super::Anacap`].
        343 => pub anacap: u8,
        /// ANA Group Identifier Maximum (ANAGRPMAX).
        344 => pub anagrpmax: U32,
        /// Number of ANA Group Identifiers (NANAGRPID).
        348 => pub nanagrpid: U32,
        /// Persistent Event Log Size (PELS), units of 64 KiB.
        352 => pub pels: U32,
        /// Domain Identifier (DID).
        356 => pub did: U16,
        /// Key Per I/O Capabilities (KPIOC).
        358 => pub kpioc: u8,
        359 => _r359: u8,
        /// Maximum Processing Time for Firmware Activation Without Reset (MPTFAWR).
        360 => pub mptfawr: U16,
        362 => _r362: [u8; 6],
        /// Max Endurance Group Capacity (MEGCAP) in bytes.
        368 => pub megcap: U128,
        /// Temperature Threshold Hysteresis Attributes (TMPTHHA).
        384 => pub tmpthha: u8,
        385 => _r385: u8,
        /// Command Quiesce Time (CQT) in milliseconds.
        386 => pub cqt: U16,
        388 => _r388: [u8; 124],
        /// Submission Queue Entry Size (SQES): required 3:0, maximum 7:4, powers of two.
        512 => pub sqes: u8,
        /// Completion Queue Entry Size (CQES): required 3:0, maximum 7:4, powers of two.
        513 => pub cqes: u8,
        /// Maximum Outstanding Commands (MAXCMD) per I/O queue; Fabrics requires it.
        514 => pub maxcmd: U16,
        /// Number of Namespaces (NN): the highest valid NSID.
        516 => pub nn: U32,
        /// Optional NVM Command Support (ONCS), [`super::Oncs`].
        520 => pub oncs: U16,
        /// Fused Operation Support (FUSES): bit 0 Compare and Write.
        522 => pub fuses: U16,
        /// Format NVM Attributes (FNA).
        524 => pub fna: u8,
        /// Volatile Write Cache (VWC), [`super::Vwc`].
        525 => pub vwc: u8,
        /// Atomic Write Unit Normal (AWUN) in logical blocks, 0's based.
        526 => pub awun: U16,
        /// Atomic Write Unit Power Fail (AWUPF) in logical blocks, 0's based.
        528 => pub awupf: U16,
        /// I/O Command Set Vendor Specific Command Configuration (ICSVSCC).
        530 => pub icsvscc: u8,
        /// Namespace Write Protection Capabilities (NWPC).
        531 => pub nwpc: u8,
        /// Atomic Compare & Write Unit (ACWU) in logical blocks, 0's based.
        532 => pub acwu: U16,
        /// Copy Descriptor Formats Supported (CDFS), a bit per format.
        534 => pub cdfs: U16,
        /// SGL Support (SGLS), [`super::Sgls`].
        536 => pub sgls: U32,
        /// Maximum Number of Allowed Namespaces (MNAN).
        540 => pub mnan: U32,
        /// Maximum Domain Namespace Attachments (MAXDNA).
        544 => pub maxdna: U128,
        /// Maximum I/O Controller Namespace Attachments (MAXCNA).
        560 => pub maxcna: U32,
        /// Optimal Aggregated Queue Depth (OAQD).
        564 => pub oaqd: U32,
        /// Recommended Host-Initiated Refresh Interval (RHIRI).
        568 => pub rhiri: u8,
        /// Host-Initiated Refresh Time (HIRT).
        569 => pub hirt: u8,
        /// Controller Maximum Memory Range Tracking Descriptors (CMMRTD).
        570 => pub cmmrtd: U16,
        /// NVM Subsystem Maximum Memory Range Tracking Descriptors (NMMRTD).
        572 => pub nmmrtd: U16,
        /// Minimum Memory Range Tracking Granularity (MINMRTG).
        574 => pub minmrtg: u8,
        /// Maximum Memory Range Tracking Granularity (MAXMRTG).
        575 => pub maxmrtg: u8,
        /// Tracking Attributes (TRATTR).
        576 => pub trattr: u8,
        577 => _r577: u8,
        /// Maximum Controller User Data Migration Queues (MCUDMQ).
        578 => pub mcudmq: U16,
        /// Maximum NVM Subsystem User Data Migration Queues (MNSUDMQ).
        580 => pub mnsudmq: U16,
        /// Maximum CDQ Memory Ranges (MCMR).
        582 => pub mcmr: U16,
        /// NVM Subsystem Maximum CDQ Memory Ranges (NMCMR).
        584 => pub nmcmr: U16,
        /// Maximum Controller Data Queue PRP Count (MCDQPC).
        586 => pub mcdqpc: U16,
        588 => _r588: [u8; 180],
        /// NVM Subsystem NVMe Qualified Name (SUBNQN).
        768 => pub subnqn: [u8; 256],
        1024 => _r1024: [u8; 768],
        /// I/O Queue Command Capsule Supported Size (IOCCSZ), units of 16 bytes; at least 4.
        1792 => pub ioccsz: U32,
        /// I/O Queue Response Capsule Supported Size (IORCSZ), units of 16 bytes; at least 1.
        1796 => pub iorcsz: U32,
        /// In Capsule Data Offset (ICDOFF), units of 16 bytes, after the SQE.
        1800 => pub icdoff: U16,
        /// Fabrics Controller Attributes (FCATT): bit 0 set is the static controller model.
        1802 => pub fcatt: u8,
        /// Maximum SGL Data Block Descriptors (MSDBD); 0 no limit.
        1803 => pub msdbd: u8,
        /// Optional Fabrics Commands Support (OFCS): bit 0 Disconnect.
        1804 => pub ofcs: U16,
        /// Discovery Controller Type (DCTYPE).
        1806 => pub dctype: u8,
        1807 => _r1807: [u8; 241],
        /// Power State Descriptors (PSD0 to PSD31).
        2048 => pub psd: [PowerState; 32],
        /// Vendor specific.
        3072 => pub vendor: [u8; 1024],
    }
}

wire! {
    /// Power State Descriptor (Base 5.1.13.2.1).
    pub struct PowerState: 32 {
        /// Maximum Power (MP), units of 0.01 W (0.0001 W with MXPS).
        0 => pub mp: U16,
        2 => _r2: u8,
        /// Bit 0 Max Power Scale (MXPS), bit 1 Non-Operational State (NOPS).
        3 => pub flags: u8,
        /// Entry Latency (ENLAT) in microseconds.
        4 => pub enlat: U32,
        /// Exit Latency (EXLAT) in microseconds.
        8 => pub exlat: U32,
        /// Relative Read Throughput (RRT).
        12 => pub rrt: u8,
        /// Relative Read Latency (RRL).
        13 => pub rrl: u8,
        /// Relative Write Throughput (RWT).
        14 => pub rwt: u8,
        /// Relative Write Latency (RWL).
        15 => pub rwl: u8,
        /// Idle Power (IDLP).
        16 => pub idlp: U16,
        /// Idle Power Scale (IPS), 7:6.
        18 => pub ips: u8,
        19 => _r19: u8,
        /// Active Power (ACTP).
        20 => pub actp: U16,
        /// Active Power Workload (APW) 2:0, Active Power Scale (APS) 7:6.
        22 => pub apw: u8,
        23 => _r23: [u8; 9],
    }
}

impl Controller {
    /// Serial number.
    #[must_use]
    pub fn serial_number(&self) -> String {
        text::trim_ascii(&self.sn)
    }

    /// Model number.
    #[must_use]
    pub fn model_number(&self) -> String {
        text::trim_ascii(&self.mn)
    }

    /// Firmware revision.
    #[must_use]
    pub fn firmware_revision(&self) -> String {
        text::trim_ascii(&self.fr)
    }

    /// Sets serial number, model number and firmware revision.
    pub fn set_names(&mut self, serial: &str, model: &str, firmware: &str) {
        text::pad_ascii(&mut self.sn, serial);
        text::pad_ascii(&mut self.mn, model);
        text::pad_ascii(&mut self.fr, firmware);
    }

    /// Name of the subsystem.
    pub fn subnqn(&self) -> Result<Nqn, NqnError> {
        Nqn::from_field(&self.subnqn)
    }

    /// Controller identifier.
    #[must_use]
    pub fn cntlid(&self) -> Cntlid {
        Cntlid::new(self.cntlid.get())
    }

    /// Version.
    #[must_use]
    pub fn version(&self) -> Vs {
        Vs::from_bits(self.ver.get())
    }

    /// Longest data transfer in bytes with that CAP.MPSMIN; `None` without limit.
    #[must_use]
    pub const fn max_transfer_bytes(&self, mpsmin: u8) -> Option<u64> {
        match self.mdts {
            0 => None,
            mdts => 1u64.checked_shl(12 + (mpsmin & 0xF) as u32 + mdts as u32),
        }
    }

    /// Most bytes of data in a command capsule of an I/O queue, from IOCCSZ.
    #[must_use]
    pub fn in_capsule_bytes(&self) -> u32 {
        let capsule = u64::from(self.ioccsz.get()) * 16;
        let head = 64 + u64::from(self.icdoff.get()) * 16;
        u32::try_from(capsule.saturating_sub(head)).unwrap_or(u32::MAX)
    }

    /// Sets IOCCSZ for that many bytes of in-capsule data (rounded down to 16), IORCSZ for a
    /// completion, ICDOFF 0.
    pub fn set_in_capsule_bytes(&mut self, bytes: u32) {
        self.ioccsz = U32::new(4 + bytes / 16);
        self.iorcsz = U32::new(1);
        self.icdoff = U16::ZERO;
    }
}

wire! {
    /// Identify Controller of the NVM command set (CNS 06h, CSI 00h, NVM 4.1.5.4). Sizes are powers
    /// of two in units of CAP.MPSMIN; 0 is no limit.
    pub struct NvmController: 4096 {
        /// Verify Size Limit (VSL).
        0 => pub vsl: u8,
        /// Write Zeroes Size Limit (WZSL).
        1 => pub wzsl: u8,
        /// Write Uncorrectable Size Limit (WUSL).
        2 => pub wusl: u8,
        /// Dataset Management Ranges Limit (DMRL).
        3 => pub dmrl: u8,
        /// Dataset Management Range Size Limit (DMRSL) in logical blocks.
        4 => pub dmrsl: U32,
        /// Dataset Management Size Limit (DMSL) in logical blocks.
        8 => pub dmsl: U64,
        /// Key Per I/O Capabilities (KPIOCAP).
        16 => pub kpiocap: u8,
        /// Write Zeroes With Deallocate Size Limit (WZDSL).
        17 => pub wzdsl: u8,
        /// Admin Optional Command Support (AOCS).
        18 => pub aocs: U16,
        /// Version (VER) of the command set.
        20 => pub ver: U32,
        /// LBA Migration Queue Format (LBAMQF).
        24 => pub lbamqf: u8,
        25 => _r25: [u8; 4071],
    }
}

wire! {
    /// I/O Command Set data structure (CNS 1Ch, Base 5.1.13.2.20): combinations that CC.CSS = 110b
    /// and the I/O Command Set Profile feature choose from. Bit n of a vector is CSI n.
    pub struct CommandSetVectors: 4096 {
        /// Combinations, from index 0 on; 0 ends them.
        0 => pub vector: [U64; 512],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn derived_values() {
        let mut controller = Controller::zeroed();
        controller.set_in_capsule_bytes(8192);
        assert_eq!(controller.ioccsz.get(), 516);
        assert_eq!(controller.in_capsule_bytes(), 8192);
        assert_eq!(controller.max_transfer_bytes(0), None);
        controller.mdts = 5;
        assert_eq!(controller.max_transfer_bytes(0), Some(128 << 10));
        controller.set_names("S1", "flexblk", "0.1");
        assert_eq!(controller.serial_number(), "S1");
        assert_eq!(&controller.mn[..8], b"flexblk ");
        assert_eq!(controller.firmware_revision(), "0.1");
    }

    proptest! {
        #[test]
        fn random_bytes_are_read(bytes in proptest::collection::vec(any::<u8>(), 4096)) {
            let controller = Controller::view(&bytes).unwrap();
            prop_assert_eq!(controller.bytes(), &bytes[..]);
            let _ = (
                controller.subnqn(), controller.model_number(), controller.in_capsule_bytes(),
                controller.max_transfer_bytes(bytes[0]), controller.version().to_string(),
            );
            prop_assert_eq!(NvmController::view(&bytes).unwrap().bytes(), &bytes[..]);
            prop_assert!(Controller::view(&bytes[1..]).is_none());
        }
    }
}
