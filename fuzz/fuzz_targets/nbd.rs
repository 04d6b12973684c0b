//! What an NBD client sends, from the first byte: nothing panics, cutting the bytes into pieces changes nothing, and no
//! request reaches the volume that is not inside of it.

#![no_main]

use flexblk_initiator::export::nbd::protocol::{
    Command, Export, Handshake, MAX_PAYLOAD_BYTES, RequestHeader, Session, Step,
};
use libfuzzer_sys::fuzz_target;

const LEN_BYTES: u64 = 64 << 20;

fn export() -> Export {
    Export {
        name: "disk".into(),
        description: "a disk".into(),
        len_bytes: LEN_BYTES,
        block_bytes: 512,
        preferred_bytes: 4096,
        read_only: false,
        trim: true,
        write_zeroes: true,
        cache: true,
    }
}

/// Negotiation over `wire` in pieces: what was sent, the session, and what of the input it left.
fn negotiate(wire: &[u8], piece: usize) -> (Vec<u8>, Option<(Session, usize)>) {
    let mut handshake = Handshake::new(export());
    let (mut out, mut received, mut taken) = (Vec::new(), Vec::new(), 0);
    for piece in wire.chunks(piece) {
        received.extend_from_slice(piece);
        loop {
            let mut rest = received.as_slice();
            let step = handshake.handle(&mut rest, &mut out);
            let used = received.len() - rest.len();
            received.drain(..used);
            taken += used;
            match step {
                Ok(Step::More) => break,
                Ok(Step::Again) => {}
                Ok(Step::Session(session)) => return (out, Some((session, taken))),
                Ok(Step::Abort) | Err(_) => return (out, None),
            }
        }
    }
    (out, None)
}

fuzz_target!(|input: &[u8]| {
    let [piece, wire @ ..] = input else { return };
    let whole = negotiate(wire, wire.len().max(1));
    assert_eq!(whole, negotiate(wire, usize::from(*piece).max(1)));
    let Some((session, taken)) = whole.1 else {
        return;
    };
    let mut rest = wire.get(taken..).unwrap_or_default();
    while let Ok(Some(header)) = RequestHeader::parse(session.style, rest) {
        rest = &rest[RequestHeader::len_of(session.style)..];
        let (bytes, len) = header.emit(session.style);
        assert_eq!(RequestHeader::parse(session.style, &bytes[..len]), Ok(Some(header)));
        let skip = match session.command(&header) {
            Ok(Command::Io(io)) => {
                assert!(io.data_bytes <= MAX_PAYLOAD_BYTES);
                if io.data_bytes > 0 {
                    assert!(header.offset + header.len_bytes <= LEN_BYTES);
                }
                if io.is_write { io.data_bytes } else { 0 }
            }
            Ok(Command::Refuse { payload_bytes, .. }) => payload_bytes,
            Ok(Command::Nothing) => 0,
            Ok(Command::Disconnect) | Err(_) => return,
        };
        rest = rest.get(skip as usize..).unwrap_or_default();
    }
});
