//! Controller properties (Base 3.1.4), which Fabrics hosts reach by Property Get and Property Set.

use bitfield_struct::bitfield;

/// Width of a property access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Width {
    /// 4 bytes.
    Four,
    /// 8 bytes.
    Eight,
}

/// The properties that exist for message-based controllers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Property {
    /// Controller Capabilities, 8 bytes.
    Cap,
    /// Version.
    Vs,
    /// Controller Configuration.
    Cc,
    /// Controller Status.
    Csts,
    /// NVM Subsystem Reset.
    Nssr,
    /// Controller Ready Timeouts.
    Crto,
}

impl Property {
    /// Every property, by offset.
    pub const ALL: &[Self] = &[
        Self::Cap,
        Self::Vs,
        Self::Cc,
        Self::Csts,
        Self::Nssr,
        Self::Crto,
    ];

    /// The property at that offset.
    #[must_use]
    pub const fn from_offset(offset: u32) -> Option<Self> {
        Some(match offset {
            0x00 => Self::Cap,
            0x08 => Self::Vs,
            0x14 => Self::Cc,
            0x1C => Self::Csts,
            0x20 => Self::Nssr,
            0x68 => Self::Crto,
            _ => return None,
        })
    }

    /// Its offset.
    #[must_use]
    pub const fn offset(self) -> u32 {
        match self {
            Self::Cap => 0x00,
            Self::Vs => 0x08,
            Self::Cc => 0x14,
            Self::Csts => 0x1C,
            Self::Nssr => 0x20,
            Self::Crto => 0x68,
        }
    }

    /// Its width.
    #[must_use]
    pub const fn width(self) -> Width {
        match self {
            Self::Cap => Width::Eight,
            _ => Width::Four,
        }
    }
}

/// Value that a host writes to NSSR to reset the subsystem: "NVMe" (Base 3.1.4.7).
pub const NSSR_RESET: u32 = 0x4E56_4D65;

/// Controller Capabilities, offset 0h (Base 3.1.4.1).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Cap {
    /// Maximum Queue Entries Supported (MQES), 0's based.
    pub mqes: u16,
    /// Contiguous Queues Required (CQR); 1 in Fabrics.
    pub cqr: bool,
    /// Arbitration Mechanism Supported (AMS).
    #[bits(2)]
    pub ams: u8,
    #[bits(5)]
    __: u8,
    /// Timeout (TO): longest time for CSTS.RDY to change, in units of 500 ms.
    pub to: u8,
    /// Doorbell Stride (DSTRD); 0 in Fabrics.
    #[bits(4)]
    pub dstrd: u8,
    /// NVM Subsystem Reset Supported (NSSRS).
    pub nssrs: bool,
    /// Command Sets Supported (CSS): bit 0 NVM, bit 6 others (IOCSS), bit 7 none (NOIOCSS).
    pub css: u8,
    /// Boot Partition Support (BPS).
    pub bps: bool,
    /// Controller Power Scope (CPS).
    #[bits(2)]
    pub cps: u8,
    /// Memory Page Size Minimum (MPSMIN): 2 ^ (12 + this).
    #[bits(4)]
    pub mpsmin: u8,
    /// Memory Page Size Maximum (MPSMAX).
    #[bits(4)]
    pub mpsmax: u8,
    /// Persistent Memory Region Supported (PMRS).
    pub pmrs: bool,
    /// Controller Memory Buffer Supported (CMBS).
    pub cmbs: bool,
    /// NVM Subsystem Shutdown Supported (NSSS).
    pub nsss: bool,
    /// Controller Ready With Media Support (CRMS.CRWMS).
    pub crwms: bool,
    /// Controller Ready Independent of Media Support (CRMS.CRIMS).
    pub crims: bool,
    /// NVM Subsystem Shutdown Enhancements Supported (NSSES).
    pub nsses: bool,
    #[bits(2)]
    __: u8,
}

/// Version, offset 8h (Base 3.1.4.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq, PartialOrd, Ord)]
pub struct Vs {
    /// Tertiary (TER).
    pub tertiary: u8,
    /// Minor (MNR).
    pub minor: u8,
    /// Major (MJR).
    pub major: u16,
}

impl Vs {
    /// 1.4.
    pub const V1_4: Self = Self::new().with_major(1).with_minor(4);
    /// 2.0.
    pub const V2_0: Self = Self::new().with_major(2);
    /// 2.1.
    pub const V2_1: Self = Self::new().with_major(2).with_minor(1);
}

impl core::fmt::Display for Vs {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}.{}", self.major(), self.minor())?;
        if self.tertiary() != 0 {
            write!(f, ".{}", self.tertiary())?;
        }
        Ok(())
    }
}

/// Controller Configuration, offset 14h (Base 3.1.4.5).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cc {
    /// Enable (EN).
    pub en: bool,
    #[bits(3)]
    __: u8,
    /// I/O Command Set Selected (CSS): 0 NVM, 6 all supported, 7 Admin only.
    #[bits(3)]
    pub css: u8,
    /// Memory Page Size (MPS).
    #[bits(4)]
    pub mps: u8,
    /// Arbitration Mechanism Selected (AMS).
    #[bits(3)]
    pub ams: u8,
    /// Shutdown Notification (SHN): 0 none, 1 normal, 2 abrupt.
    #[bits(2)]
    pub shn: u8,
    /// I/O Submission Queue Entry Size (IOSQES), as a power of two: 6.
    #[bits(4)]
    pub iosqes: u8,
    /// I/O Completion Queue Entry Size (IOCQES), as a power of two: 4.
    #[bits(4)]
    pub iocqes: u8,
    /// Controller Ready Independent of Media Enable (CRIME).
    pub crime: bool,
    #[bits(7)]
    __: u8,
}

impl Cc {
    /// What a host writes to enable a controller: EN, NVM command set, 64- and 16-byte entries.
    pub const ENABLE: Self = Self::new().with_en(true).with_iosqes(6).with_iocqes(4);
}

/// Controller Status, offset 1Ch (Base 3.1.4.6).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Csts {
    /// Ready (RDY).
    pub rdy: bool,
    /// Controller Fatal Status (CFS).
    pub cfs: bool,
    /// Shutdown Status (SHST): 0 none, 1 in progress, 2 complete.
    #[bits(2)]
    pub shst: u8,
    /// NVM Subsystem Reset Occurred (NSSRO).
    pub nssro: bool,
    /// Processing Paused (PP).
    pub pp: bool,
    /// Shutdown Type (ST): of the subsystem, not of the controller.
    pub st: bool,
    #[bits(25)]
    __: u32,
}

/// Controller Ready Timeouts, offset 68h (Base 3.1.4.22); units of 500 ms.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Crto {
    /// With media (CRWMT).
    pub crwmt: u16,
    /// Independent of media (CRIMT).
    pub crimt: u16,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bits_are_where_the_specification_has_them() {
        assert_eq!(Cap::new().with_mqes(0x7F).into_bits(), 0x7F);
        assert_eq!(Cap::new().with_cqr(true).into_bits(), 1 << 16);
        assert_eq!(Cap::new().with_to(30).into_bits(), 30 << 24);
        assert_eq!(Cap::new().with_css(1).into_bits(), 1 << 37);
        assert_eq!(Cap::new().with_mpsmin(1).into_bits(), 1 << 48);
        assert_eq!(Cap::new().with_crwms(true).into_bits(), 1 << 59);
        assert_eq!(Cc::ENABLE.into_bits(), 0x0046_0001);
        assert_eq!(Cc::new().with_shn(1).into_bits(), 1 << 14);
        assert_eq!(Csts::new().with_shst(2).into_bits(), 0x8);
        assert_eq!(Csts::new().with_pp(true).into_bits(), 0x20);
        assert_eq!(Vs::V1_4.into_bits(), 0x0001_0400);
        assert_eq!(Vs::V2_1.to_string(), "2.1");
        assert!(Vs::V1_4 < Vs::V2_0);
    }

    #[test]
    fn properties_are_found_by_offset() {
        for property in Property::ALL {
            assert_eq!(Property::from_offset(property.offset()), Some(*property));
        }
        assert_eq!(Property::from_offset(0x0C), None);
    }

    proptest! {
        #[test]
        fn bitfields_round_trip(bits in any::<u64>()) {
            prop_assert_eq!(Cap::from_bits(bits).into_bits(), bits);
            prop_assert_eq!(Cc::from_bits(bits as u32).into_bits(), bits as u32);
            prop_assert_eq!(Csts::from_bits(bits as u32).into_bits(), bits as u32);
            prop_assert_eq!(Vs::from_bits(bits as u32).into_bits(), bits as u32);
            let _ = format!("{:?}", Cap::from_bits(bits));
        }
    }
}
