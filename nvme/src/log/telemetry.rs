//! Telemetry log pages (LIDs 07h and 08h, Base 5.1.12.1.8 and .9): a header and blocks of 512 bytes, in
//! up to four data areas of which each contains the ones before it.

use crate::{U16, U32};

/// Log Specific Parameter bit: capture the data anew before it is read (LID 07h).
pub const CREATE: u8 = 1;
/// Offsets are multiples of that, and so is the data.
pub const BLOCK: usize = 512;

wire! {
    /// The header, which is the log's first block.
    pub struct TelemetryHeader: 512 {
        /// Log Identifier, 07h or 08h.
        0 => pub lid: u8,
        1 => _r1: [u8; 4],
        /// IEEE OUI, or 0.
        5 => pub ieee: [u8; 3],
        /// Last block of data area 1; 0 when there is none.
        8 => pub data_area_1_last: U16,
        /// Last block of data area 2.
        10 => pub data_area_2_last: U16,
        /// Last block of data area 3.
        12 => pub data_area_3_last: U16,
        14 => _r14: [u8; 2],
        /// Last block of data area 4.
        16 => pub data_area_4_last: U32,
        20 => _r20: [u8; 360],
        /// Scope: 0 is not reported.
        380 => pub scope: u8,
        /// Telemetry Host-Initiated Data Generation Number: counts captures (THDGN).
        381 => pub host_generation: u8,
        /// Telemetry Controller-Initiated Data Available (TCDA).
        382 => pub controller_available: u8,
        /// Telemetry Controller-Initiated Data Generation Number (TCDGN).
        383 => pub controller_generation: u8,
        /// Reason Identifier: why the data was captured, in words of the vendor.
        384 => pub reason: [u8; 128],
    }
}

impl TelemetryHeader {
    /// The header of `len_bytes` of data, all of it in data area 1.
    #[must_use]
    pub fn new(lid: u8, len_bytes: usize) -> Self {
        let last = u16::try_from(len_bytes.div_ceil(BLOCK)).unwrap_or(u16::MAX);
        Self {
            lid,
            data_area_1_last: U16::new(last),
            data_area_2_last: U16::new(last),
            data_area_3_last: U16::new(last),
            ..Self::zeroed()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last block is counted from the header, which is block 0.
    #[test]
    fn blocks_are_counted() {
        for (len, last) in [(0, 0), (1, 1), (512, 1), (513, 2), (100 << 20, 65535)] {
            let header = TelemetryHeader::new(7, len);
            assert_eq!(header.data_area_1_last.get(), last, "{len}");
            assert_eq!(header.data_area_3_last.get(), last, "{len}");
        }
    }
}
