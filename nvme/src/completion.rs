//! Completion queue entries (Base 4.2).

use crate::ids::Cid;
use crate::status::Status;
use crate::{U16, U64};

wire! {
    /// A completion queue entry: what a response capsule carries (Base 4.2.1, 4.2.2).
    pub struct Cqe: 16 {
        /// Dwords 0 and 1: the command's own result.
        0 => pub result: U64,
        /// SQ Head Pointer (SQHD); reserved when SQ flow control is disabled.
        8 => pub sqhd: U16,
        /// SQ Identifier; reserved in Fabrics.
        10 => pub sqid: U16,
        /// Command Identifier.
        12 => cid: U16,
        /// Status Field (15:1) and Phase Tag (bit 0; reserved in Fabrics).
        14 => status: U16,
    }
}

impl Cqe {
    /// A completion with result 0 and SQHD 0.
    #[inline]
    #[must_use]
    pub fn new(cid: Cid, status: Status) -> Self {
        Self {
            result: U64::ZERO,
            sqhd: U16::ZERO,
            sqid: U16::ZERO,
            cid: U16::new(cid.get()),
            status: U16::new(status.to_cqe()),
        }
    }

    /// A successful completion.
    #[inline]
    #[must_use]
    pub fn success(cid: Cid) -> Self {
        Self::new(cid, Status::SUCCESS)
    }

    /// The same with that result in dwords 0 and 1.
    #[inline]
    #[must_use]
    pub fn with_result(mut self, result: u64) -> Self {
        self.result = U64::new(result);
        self
    }

    /// The same with that SQ head pointer.
    #[inline]
    #[must_use]
    pub fn with_sqhd(mut self, sqhd: u16) -> Self {
        self.sqhd = U16::new(sqhd);
        self
    }

    /// From the 16 bytes of a response capsule.
    #[inline]
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        zerocopy::transmute!(*bytes)
    }

    /// The 16 bytes of a response capsule.
    #[inline]
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        zerocopy::transmute!(self)
    }

    /// The 16 bytes as two little-endian words, put together from the fields.
    #[inline]
    #[must_use]
    pub(crate) fn to_words(self) -> [u64; 2] {
        let second = u64::from(self.sqhd.get())
            | u64::from(self.sqid.get()) << 16
            | u64::from(self.cid.get()) << 32
            | u64::from(self.status.get()) << 48;
        [self.result.get(), second]
    }

    /// Which command this completes.
    #[inline]
    #[must_use]
    pub fn cid(&self) -> Cid {
        Cid::new(self.cid.get())
    }

    /// How it ended.
    #[inline]
    #[must_use]
    pub fn status(&self) -> Status {
        Status::from_cqe(self.status.get())
    }

    /// Dwords 0 and 1.
    #[inline]
    #[must_use]
    pub fn result(&self) -> u64 {
        self.result.get()
    }

    /// Dword 0.
    #[inline]
    #[must_use]
    pub fn dword0(&self) -> u32 {
        self.result.get() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::StatusCode;
    use proptest::prelude::*;

    #[test]
    fn bytes() {
        let cqe = Cqe::new(Cid::new(0x0102), StatusCode::InvalidField.dnr())
            .with_result(0x1_0000_0005)
            .with_sqhd(9);
        assert_eq!(
            cqe.to_bytes(),
            [5, 0, 0, 0, 1, 0, 0, 0, 9, 0, 0, 0, 2, 1, 4, 0x80]
        );
        assert_eq!(cqe.dword0(), 5);
    }

    proptest! {
        #[test]
        fn round_trips(bytes in any::<[u8; 16]>()) {
            let cqe = Cqe::from_bytes(&bytes);
            prop_assert_eq!(cqe.to_bytes(), bytes);
            prop_assert_eq!(cqe.to_words().map(u64::to_le_bytes).concat(), bytes.to_vec());
            let mut again = Cqe::new(cqe.cid(), cqe.status()).with_result(cqe.result()).with_sqhd(cqe.sqhd.get());
            again.sqid = cqe.sqid;
            let mut without_phase = bytes;
            without_phase[14] &= 0xFE;
            prop_assert_eq!(again.to_bytes(), without_phase);
        }
    }
}
