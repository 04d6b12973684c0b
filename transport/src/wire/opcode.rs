//! BTH opcodes (IBA 9.2.1, table 38): service in the upper three bits, operation in the lower five.

/// Opcode of a packet that this transport knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs)] // the names are those of the table
pub enum Opcode {
    SendFirst = 0x00,
    SendMiddle = 0x01,
    SendLast = 0x02,
    SendLastImm = 0x03,
    SendOnly = 0x04,
    SendOnlyImm = 0x05,
    WriteFirst = 0x06,
    WriteMiddle = 0x07,
    WriteLast = 0x08,
    WriteLastImm = 0x09,
    WriteOnly = 0x0A,
    WriteOnlyImm = 0x0B,
    ReadRequest = 0x0C,
    ReadResponseFirst = 0x0D,
    ReadResponseMiddle = 0x0E,
    ReadResponseLast = 0x0F,
    ReadResponseOnly = 0x10,
    Acknowledge = 0x11,
    SendLastInv = 0x16,
    SendOnlyInv = 0x17,
    /// Unreliable datagram: connection-management MADs to queue pair 1.
    UdSendOnly = 0x64,
    /// FlexiNS (manufacturer-defined range): selective acknowledgement.
    Sack = 0xC0,
    /// FlexiNS: asks for a selective acknowledgement, carries a timestamp.
    Probe = 0xC1,
    /// FlexiNS: several self-contained packets in one datagram.
    Pack = 0xC2,
}

impl Opcode {
    /// Every opcode.
    pub const ALL: [Self; 24] = [
        Self::SendFirst,
        Self::SendMiddle,
        Self::SendLast,
        Self::SendLastImm,
        Self::SendOnly,
        Self::SendOnlyImm,
        Self::WriteFirst,
        Self::WriteMiddle,
        Self::WriteLast,
        Self::WriteLastImm,
        Self::WriteOnly,
        Self::WriteOnlyImm,
        Self::ReadRequest,
        Self::ReadResponseFirst,
        Self::ReadResponseMiddle,
        Self::ReadResponseLast,
        Self::ReadResponseOnly,
        Self::Acknowledge,
        Self::SendLastInv,
        Self::SendOnlyInv,
        Self::UdSendOnly,
        Self::Sack,
        Self::Probe,
        Self::Pack,
    ];

    /// The opcode with this number.
    #[must_use]
    pub const fn from_u8(value: u8) -> Option<Self> {
        Some(match value {
            0x00 => Self::SendFirst,
            0x01 => Self::SendMiddle,
            0x02 => Self::SendLast,
            0x03 => Self::SendLastImm,
            0x04 => Self::SendOnly,
            0x05 => Self::SendOnlyImm,
            0x06 => Self::WriteFirst,
            0x07 => Self::WriteMiddle,
            0x08 => Self::WriteLast,
            0x09 => Self::WriteLastImm,
            0x0A => Self::WriteOnly,
            0x0B => Self::WriteOnlyImm,
            0x0C => Self::ReadRequest,
            0x0D => Self::ReadResponseFirst,
            0x0E => Self::ReadResponseMiddle,
            0x0F => Self::ReadResponseLast,
            0x10 => Self::ReadResponseOnly,
            0x11 => Self::Acknowledge,
            0x16 => Self::SendLastInv,
            0x17 => Self::SendOnlyInv,
            0x64 => Self::UdSendOnly,
            0xC0 => Self::Sack,
            0xC1 => Self::Probe,
            0xC2 => Self::Pack,
            _ => return None,
        })
    }

    /// Whether a requester sends this: it occupies sequence numbers of the request direction.
    #[must_use]
    pub const fn is_request(self) -> bool {
        (self as u8) <= 0x0C || matches!(self, Self::SendLastInv | Self::SendOnlyInv)
    }

    /// Whether a responder sends this.
    #[must_use]
    pub const fn is_response(self) -> bool {
        self.is_read_response() || matches!(self, Self::Acknowledge | Self::Sack)
    }

    /// Whether this carries data that was read.
    #[must_use]
    pub const fn is_read_response(self) -> bool {
        let value = self as u8;
        value >= 0x0D && value <= 0x10
    }

    /// Whether a SEND begins here.
    #[must_use]
    pub const fn is_send_start(self) -> bool {
        matches!(
            self,
            Self::SendFirst | Self::SendOnly | Self::SendOnlyImm | Self::SendOnlyInv
        )
    }

    /// Whether this is part of a SEND.
    #[must_use]
    pub const fn is_send(self) -> bool {
        (self as u8) <= 0x05 || matches!(self, Self::SendLastInv | Self::SendOnlyInv)
    }

    /// Whether this is part of an RDMA WRITE.
    #[must_use]
    pub const fn is_write(self) -> bool {
        let value = self as u8;
        value >= 0x06 && value <= 0x0B
    }

    /// Whether a RETH follows the BTH.
    #[must_use]
    pub const fn has_reth(self) -> bool {
        matches!(
            self,
            Self::WriteFirst | Self::WriteOnly | Self::WriteOnlyImm | Self::ReadRequest
        )
    }

    /// Whether an immediate value follows.
    #[must_use]
    pub const fn has_imm(self) -> bool {
        matches!(
            self,
            Self::SendLastImm | Self::SendOnlyImm | Self::WriteLastImm | Self::WriteOnlyImm
        )
    }

    /// Whether a key to invalidate follows.
    #[must_use]
    pub const fn has_ieth(self) -> bool {
        matches!(self, Self::SendLastInv | Self::SendOnlyInv)
    }

    /// Whether an AETH follows.
    #[must_use]
    pub const fn has_aeth(self) -> bool {
        matches!(
            self,
            Self::Acknowledge
                | Self::ReadResponseFirst
                | Self::ReadResponseLast
                | Self::ReadResponseOnly
        )
    }

    /// Whether the message ends here.
    #[must_use]
    pub const fn is_end(self) -> bool {
        !matches!(
            self,
            Self::SendFirst
                | Self::SendMiddle
                | Self::WriteFirst
                | Self::WriteMiddle
                | Self::ReadResponseFirst
                | Self::ReadResponseMiddle
        )
    }

    /// Length of BTH and extended headers of this opcode.
    #[inline]
    #[must_use]
    pub const fn header_len(self) -> usize {
        HEADER_LEN[self as usize] as usize
    }

    const fn sum_of_headers(self) -> usize {
        let mut len = super::BTH_LEN_BYTES;
        if self.has_reth() {
            len += super::RETH_LEN_BYTES;
        }
        if self.has_imm() || self.has_ieth() || self.has_aeth() {
            len += 4;
        }
        len
    }
}

/// Header lengths by opcode: on the path of every packet.
const HEADER_LEN: [u8; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < Opcode::ALL.len() {
        table[Opcode::ALL[i] as usize] = Opcode::ALL[i].sum_of_headers() as u8;
        i += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip_and_kinds_do_not_overlap() {
        for opcode in Opcode::ALL {
            assert_eq!(Opcode::from_u8(opcode as u8), Some(opcode));
            assert!(!(opcode.is_request() && opcode.is_response()), "{opcode:?}");
            assert!(!(opcode.is_send() && opcode.is_write()), "{opcode:?}");
        }
        assert_eq!(
            (0..=255).filter_map(Opcode::from_u8).count(),
            Opcode::ALL.len()
        );
    }
}
