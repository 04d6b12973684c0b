//! Work requests and completions as messages of a pipe.
//!
//! Request: a 32-byte capsule, the inline bytes, 16 bytes for each entry of the list. A send of one
//! registered buffer takes one 64-byte pipe entry. Completion: one entry, its 32 inline bytes
//! included. Little endian: both ends are threads (or processes) of one machine.

use arrayvec::ArrayVec;

use crate::pipe::{ENTRY_PAYLOAD_BYTES, MESSAGE_LEN_MAX_BYTES};
use crate::verbs::{
    INLINE_RECV_MAX_BYTES, Lkey, MAX_SGE, Qpn, RecvWr, Rkey, SendFlags, SendOp, SendWr, Sge,
    WcOpcode, WcStatus, WcWord, WorkCompletion,
};

/// Inline bytes of a send request at most.
pub const INLINE_MAX_BYTES: usize = 128;

const CAPSULE: usize = 32;
const SGE: usize = 16;
const COMPLETION: usize = 31 + INLINE_RECV_MAX_BYTES;

const _: () = assert!(CAPSULE + INLINE_MAX_BYTES + MAX_SGE * SGE <= MESSAGE_LEN_MAX_BYTES);
const _: () = assert!(CAPSULE + SGE <= ENTRY_PAYLOAD_BYTES);
const _: () = assert!(COMPLETION == ENTRY_PAYLOAD_BYTES);

/// An encoded request.
pub(super) type Message = ArrayVec<u8, MESSAGE_LEN_MAX_BYTES>;

/// A request as it comes out of a pipe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Send {
        qpn: Qpn,
        wr_id: u64,
        op: SendOp,
        flags: SendFlags,
        inline: ArrayVec<u8, INLINE_MAX_BYTES>,
        sges: ArrayVec<Sge, MAX_SGE>,
    },
    Recv {
        qpn: Qpn,
        wr_id: u64,
        sges: ArrayVec<Sge, MAX_SGE>,
    },
}

const OP_RECV: u8 = 0;
const OP_SEND: u8 = 1;
const OP_SEND_IMM: u8 = 2;
const OP_SEND_INV: u8 = 3;
const OP_WRITE: u8 = 4;
const OP_WRITE_IMM: u8 = 5;
const OP_READ: u8 = 6;

/// Encodes a send request; `None` when its inline bytes or its list are too long.
pub(super) fn encode_send(qpn: Qpn, wr: &SendWr<'_>) -> Option<Message> {
    if wr.inline.len() > INLINE_MAX_BYTES {
        return None;
    }
    let (op, remote, key, imm) = match wr.op {
        SendOp::Send => (OP_SEND, 0, 0, 0),
        SendOp::SendImm(imm) => (OP_SEND_IMM, 0, 0, imm),
        SendOp::SendInv(Rkey(key)) => (OP_SEND_INV, 0, key, 0),
        SendOp::Write { remote, rkey } => (OP_WRITE, remote, rkey.0, 0),
        SendOp::WriteImm { remote, rkey, imm } => (OP_WRITE_IMM, remote, rkey.0, imm),
        SendOp::Read { remote, rkey } => (OP_READ, remote, rkey.0, 0),
    };
    let mut message = Message::new();
    let counts = [wr.inline.len() as u8, wr.sges.len() as u8];
    message
        .try_extend_from_slice(&[op, wr.flags.bits(), counts[0], counts[1]])
        .ok()?;
    message
        .try_extend_from_slice(&qpn.get().to_le_bytes())
        .ok()?;
    message
        .try_extend_from_slice(&wr.wr_id.to_le_bytes())
        .ok()?;
    message.try_extend_from_slice(&remote.to_le_bytes()).ok()?;
    message.try_extend_from_slice(&key.to_le_bytes()).ok()?;
    message.try_extend_from_slice(&imm.to_le_bytes()).ok()?;
    message.try_extend_from_slice(wr.inline).ok()?;
    encode_sges(&mut message, wr.sges)?;
    Some(message)
}

/// Encodes a receive request; `None` when its list is too long.
pub(super) fn encode_recv(qpn: Qpn, wr: &RecvWr<'_>) -> Option<Message> {
    let mut message = Message::new();
    message
        .try_extend_from_slice(&[OP_RECV, 0, 0, wr.sges.len() as u8])
        .ok()?;
    message
        .try_extend_from_slice(&qpn.get().to_le_bytes())
        .ok()?;
    message
        .try_extend_from_slice(&wr.wr_id.to_le_bytes())
        .ok()?;
    message.try_extend_from_slice(&[0; 16]).ok()?;
    encode_sges(&mut message, wr.sges)?;
    Some(message)
}

fn encode_sges(message: &mut Message, sges: &[Sge]) -> Option<()> {
    if sges.len() > MAX_SGE {
        return None;
    }
    for sge in sges {
        message
            .try_extend_from_slice(&sge.addr.to_le_bytes())
            .ok()?;
        message.try_extend_from_slice(&sge.len.to_le_bytes()).ok()?;
        message
            .try_extend_from_slice(&sge.lkey.to_bits().to_le_bytes())
            .ok()?;
    }
    Some(())
}

/// Decodes a request; `None` for what no client encodes.
pub(super) fn decode_request(message: &[u8]) -> Option<Request> {
    let (capsule, rest) = message.split_first_chunk::<CAPSULE>()?;
    let &[op, flags, inline_len, sge_count, ..] = capsule;
    let qpn = Qpn::new(le32(capsule, 4)?);
    let wr_id = le64(capsule, 8)?;
    let remote = le64(capsule, 16)?;
    let key = Rkey(le32(capsule, 24)?);
    let imm = le32(capsule, 28)?;
    let inline_len = usize::from(inline_len);
    let inline = rest.get(..inline_len)?.try_into().ok()?;
    let mut sges = ArrayVec::new();
    let list = rest.get(inline_len..)?;
    for index in 0..usize::from(sge_count) {
        let entry = list.get(index * SGE..(index + 1) * SGE)?;
        sges.try_push(Sge {
            addr: le64(entry, 0)?,
            len: le32(entry, 8)?,
            lkey: Lkey::from_bits(le32(entry, 12)?),
        })
        .ok()?;
    }
    let op = match op {
        OP_RECV => return Some(Request::Recv { qpn, wr_id, sges }),
        OP_SEND => SendOp::Send,
        OP_SEND_IMM => SendOp::SendImm(imm),
        OP_SEND_INV => SendOp::SendInv(key),
        OP_WRITE => SendOp::Write { remote, rkey: key },
        OP_WRITE_IMM => SendOp::WriteImm {
            remote,
            rkey: key,
            imm,
        },
        OP_READ => SendOp::Read { remote, rkey: key },
        _ => return None,
    };
    let flags = SendFlags::from_bits(flags)?;
    Some(Request::Send {
        qpn,
        wr_id,
        op,
        flags,
        inline,
        sges,
    })
}

/// Encodes a completion: exactly one pipe entry.
pub(super) fn encode_completion(wc: &WorkCompletion) -> [u8; ENTRY_PAYLOAD_BYTES] {
    let mut entry = [0; ENTRY_PAYLOAD_BYTES];
    put(&mut entry, 0, wc.wr_id.to_le_bytes());
    put(&mut entry, 8, wc.user.to_le_bytes());
    put(&mut entry, 16, wc.byte_len.to_le_bytes());
    put(&mut entry, 20, wc.word.to_le_bytes());
    // Three bytes of a 24-bit number; the fourth is overwritten.
    put(&mut entry, 24, wc.qpn.to_le_bytes());
    put(
        &mut entry,
        27,
        [
            wc.word_kind as u8,
            wc.opcode as u8,
            wc.status as u8,
            wc.inline_len,
        ],
    );
    put(&mut entry, 31, wc.inline);
    entry
}

/// Decodes a completion; `None` for what no engine encodes.
pub(super) fn decode_completion(entry: &[u8]) -> Option<WorkCompletion> {
    let &[word_kind, opcode, status, inline_len] = entry.get(27..31)?.first_chunk()?;
    let word_kind = match word_kind {
        0 => WcWord::None,
        1 => WcWord::Imm,
        2 => WcWord::Invalidated,
        _ => return None,
    };
    if usize::from(inline_len) > INLINE_RECV_MAX_BYTES {
        return None;
    }
    Some(WorkCompletion {
        wr_id: le64(entry, 0)?,
        user: le64(entry, 8)?,
        byte_len: le32(entry, 16)?,
        word: le32(entry, 20)?,
        qpn: le32(entry, 24)? & Qpn::MAX,
        word_kind,
        opcode: WcOpcode::from_u8(opcode)?,
        status: WcStatus::from_u8(status)?,
        inline_len,
        inline: *entry.get(31..)?.first_chunk()?,
    })
}

fn put<const N: usize>(entry: &mut [u8; ENTRY_PAYLOAD_BYTES], at: usize, value: [u8; N]) {
    if let Some(field) = entry.get_mut(at..at + N) {
        field.copy_from_slice(&value);
    }
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_sges() -> impl Strategy<Value = Vec<Sge>> {
        let sge = any::<(u64, u32, u32)>().prop_map(|(addr, len, key)| Sge {
            addr,
            len,
            lkey: Lkey::from_bits(key),
        });
        proptest::collection::vec(sge, 0..=MAX_SGE)
    }

    fn any_op() -> impl Strategy<Value = SendOp> {
        (0..6, any::<(u64, u32, u32)>()).prop_map(|(kind, (remote, key, imm))| {
            let rkey = Rkey(key);
            match kind {
                0 => SendOp::Send,
                1 => SendOp::SendImm(imm),
                2 => SendOp::SendInv(rkey),
                3 => SendOp::Write { remote, rkey },
                4 => SendOp::WriteImm { remote, rkey, imm },
                _ => SendOp::Read { remote, rkey },
            }
        })
    }

    proptest! {
        #[test]
        fn send_requests_round_trip(
            qpn in any::<u32>(), wr_id in any::<u64>(), op in any_op(), flags in 0_u8..8,
            inline in proptest::collection::vec(any::<u8>(), 0..=INLINE_MAX_BYTES),
            sges in any_sges(),
        ) {
            let qpn = Qpn::new(qpn);
            let flags = SendFlags::from_bits_truncate(flags);
            let wr = SendWr { wr_id, op, inline: &inline, sges: &sges, flags };
            let mut message = encode_send(qpn, &wr).unwrap().to_vec();
            message.resize(message.len().next_multiple_of(ENTRY_PAYLOAD_BYTES), 0);
            let expected = Request::Send {
                qpn, wr_id, op, flags,
                inline: inline[..].try_into().unwrap(),
                sges: sges[..].try_into().unwrap(),
            };
            prop_assert_eq!(decode_request(&message), Some(expected));
        }

        #[test]
        fn receive_requests_round_trip(qpn in any::<u32>(), wr_id in any::<u64>(), sges in any_sges()) {
            let qpn = Qpn::new(qpn);
            let message = encode_recv(qpn, &RecvWr { wr_id, sges: &sges }).unwrap();
            let expected = Request::Recv { qpn, wr_id, sges: sges[..].try_into().unwrap() };
            prop_assert_eq!(decode_request(&message), Some(expected));
        }

        #[test]
        fn completions_round_trip(
            (wr_id, user, byte_len, word, qpn) in any::<(u64, u64, u32, u32, u32)>(),
            kind in 0..3, status in proptest::sample::select(WcStatus::ALL.to_vec()),
            opcode in proptest::sample::select(vec![0, 1, 2, 128, 129]),
            inline_len in 0_u8..=32, inline in any::<[u8; 32]>(),
        ) {
            let word_kind = [WcWord::None, WcWord::Imm, WcWord::Invalidated][kind as usize];
            let wc = WorkCompletion {
                wr_id, user, byte_len, word, qpn: qpn & Qpn::MAX, word_kind, status,
                opcode: WcOpcode::from_u8(opcode).unwrap(), inline_len, inline,
            };
            prop_assert_eq!(decode_completion(&encode_completion(&wc)), Some(wc));
        }

        #[test]
        fn foreign_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = decode_request(&bytes);
            let _ = decode_completion(&bytes);
        }
    }

    #[test]
    fn a_send_of_one_buffer_takes_one_entry() {
        let sge = Sge {
            addr: 1,
            len: 4096,
            lkey: Lkey::from_bits(1),
        };
        let flags = SendFlags::SIGNALED;
        let wr = SendWr {
            wr_id: 1,
            op: SendOp::Send,
            inline: &[],
            sges: &[sge],
            flags,
        };
        assert!(encode_send(Qpn::new(1), &wr).unwrap().len() <= ENTRY_PAYLOAD_BYTES);
        let too_long = [0; INLINE_MAX_BYTES + 1];
        assert!(
            encode_send(
                Qpn::new(1),
                &SendWr {
                    inline: &too_long,
                    ..wr
                }
            )
            .is_none()
        );
        let too_many = [sge; MAX_SGE + 1];
        assert!(
            encode_send(
                Qpn::new(1),
                &SendWr {
                    sges: &too_many,
                    ..wr
                }
            )
            .is_none()
        );
        assert!(
            encode_recv(
                Qpn::new(1),
                &RecvWr {
                    wr_id: 1,
                    sges: &too_many
                }
            )
            .is_none()
        );
    }
}
