//! Reading the buffer that a multishot `recvmsg` filled.

/// Layout of a buffer filled by [`crate::Op::RecvMsgMulti`] (io_uring UAPI, `struct
/// io_uring_recvmsg_out`): a 16-byte header (name, control and payload lengths, flags), room for the
/// name, room for the control data, payload.
#[derive(Clone, Copy, Debug)]
pub struct ReceivedMessage<'a> {
    /// `struct sockaddr_*` of the sender.
    pub name: &'a [u8],
    /// Control messages.
    pub control: &'a [u8],
    /// The datagram.
    pub payload: &'a [u8],
    /// `msg_flags`: `MSG_TRUNC`, `MSG_CTRUNC`.
    pub flags: u32,
}

impl<'a> ReceivedMessage<'a> {
    /// Bytes before the name.
    pub const HEADER_LEN: usize = 16;

    /// Bytes before the payload for the given `msg_namelen` and `msg_controllen`.
    #[must_use]
    pub const fn payload_offset(name_room: usize, control_room: usize) -> usize {
        Self::HEADER_LEN + name_room + control_room
    }

    /// Reads `buffer` (the first `result` bytes of the provided buffer); `name_room` and
    /// `control_room` are `msg_namelen` and `msg_controllen` of the operation's header. `None` when
    /// the buffer is shorter than its own layout.
    #[must_use]
    pub fn parse(buffer: &'a [u8], name_room: usize, control_room: usize) -> Option<Self> {
        let word = |at: usize| -> Option<u32> {
            let bytes = buffer.get(at..at + 4)?;
            Some(u32::from_ne_bytes(bytes.try_into().ok()?))
        };
        let (name_len, control_len, payload_len, flags) = (word(0)?, word(4)?, word(8)?, word(12)?);
        let (_, rest) = buffer.split_at_checked(Self::HEADER_LEN)?;
        let (name, rest) = rest.split_at_checked(name_room)?;
        let (control, payload) = rest.split_at_checked(control_room)?;
        Some(Self {
            name: name.get(..(name_len as usize).min(name.len()))?,
            control: control.get(..(control_len as usize).min(control.len()))?,
            payload: payload.get(..(payload_len as usize).min(payload.len()))?,
            flags,
        })
    }

    /// Whether the datagram was longer than the buffer.
    #[must_use]
    pub const fn is_truncated(&self) -> bool {
        self.flags & libc::MSG_TRUNC as u32 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_buffers_are_refused_and_lengths_clamped() {
        let mut buffer = vec![0_u8; 16 + 28 + 32 + 5];
        buffer[0..4].copy_from_slice(&16_u32.to_ne_bytes());
        buffer[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
        buffer[8..12].copy_from_slice(&5_u32.to_ne_bytes());
        buffer[16 + 28 + 32] = 9;
        let message = ReceivedMessage::parse(&buffer, 28, 32).unwrap();
        assert_eq!(
            (message.name.len(), message.control.len(), message.payload),
            (16, 32, &[9, 0, 0, 0, 0][..])
        );
        assert!(!message.is_truncated());
        for len in 0..16 + 28 + 32 {
            assert!(ReceivedMessage::parse(&buffer[..len], 28, 32).is_none());
        }
    }
}
