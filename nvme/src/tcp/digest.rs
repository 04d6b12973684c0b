//! CRC32C (Castagnoli), the checksum of header and data digests (TCP 3.3.1.1), over bytes that lie
//! in several pieces.

use crc_fast::CrcAlgorithm;

use super::DIGEST_LEN;

/// A CRC32C under way.
#[derive(Clone, Copy, Debug)]
pub struct Crc32c(crc_fast::Digest);

impl Crc32c {
    /// Of no bytes.
    #[inline]
    #[must_use]
    pub fn new() -> Self {
        Self(crc_fast::Digest::new(CrcAlgorithm::Crc32Iscsi))
    }

    /// Adds bytes.
    #[inline]
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum of everything added.
    #[inline]
    #[must_use]
    pub fn finish(&self) -> u32 {
        self.0.finalize() as u32
    }

    /// The digest of everything added, as it goes on the wire.
    #[inline]
    #[must_use]
    pub fn to_bytes(&self) -> [u8; DIGEST_LEN] {
        self.finish().to_le_bytes()
    }
}

impl Default for Crc32c {
    fn default() -> Self {
        Self::new()
    }
}

/// CRC32C of one piece.
#[inline]
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}
