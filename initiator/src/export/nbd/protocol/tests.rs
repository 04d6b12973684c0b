use proptest::prelude::*;

use super::*;
use crate::Op;

fn export() -> Export {
    Export {
        name: "disk".into(),
        description: "a disk".into(),
        len_bytes: 64 << 20,
        block_bytes: 512,
        preferred_bytes: 4096,
        read_only: false,
        trim: true,
        write_zeroes: true,
        cache: true,
    }
}

fn session(style: Style, export: Export) -> Session {
    Session::new(export, style)
}

fn header(kind: u16, flags: u16, offset: u64, len_bytes: u64) -> RequestHeader {
    RequestHeader {
        flags,
        kind,
        cookie: 7,
        offset,
        len_bytes,
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn go(number: u32, name: &[u8], infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name);
    data.extend((infos.len() as u16).to_be_bytes());
    infos
        .iter()
        .for_each(|info| data.extend(info.to_be_bytes()));
    option(number, &data)
}

/// Runs negotiation over `input`, which arrives in pieces: what is sent, and how it ended.
fn negotiate(input: &[u8], piece: usize) -> (Vec<u8>, Result<Option<Session>, Broken>) {
    let mut handshake = Handshake::new(export());
    let (mut out, mut received) = (Vec::new(), Vec::new());
    for piece in input.chunks(piece) {
        received.extend_from_slice(piece);
        loop {
            let mut rest = received.as_slice();
            let step = handshake.handle(&mut rest, &mut out);
            let taken = received.len() - rest.len();
            received.drain(..taken);
            match step {
                Ok(Step::More) => break,
                Ok(Step::Again) => {}
                Ok(Step::Session(session)) => return (out, Ok(Some(session))),
                Ok(Step::Abort) => return (out, Ok(None)),
                Err(broken) => return (out, Err(broken)),
            }
        }
    }
    (out, Ok(None))
}

/// Types of the replies in what the server sent.
fn reply_kinds(mut out: &[u8]) -> Vec<(u32, u32)> {
    let mut kinds = Vec::new();
    while !out.is_empty() {
        assert_eq!(out[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
        kinds.push((u32_at(out, 8).unwrap(), u32_at(out, 12).unwrap()));
        let len = u32_at(out, 16).unwrap() as usize;
        out = &out[20 + len..];
    }
    kinds
}

const FLAGS: [u8; 4] = [0, 0, 0, 3];
const ERR: u32 = 1 << 31;

#[test]
fn a_client_agrees_on_everything_and_goes() {
    let mut input = FLAGS.to_vec();
    input.extend(option(5, &[])); // STARTTLS
    input.extend(option(3, &[])); // LIST
    input.extend(option(8, &[])); // STRUCTURED_REPLY
    input.extend(option(8, &[]));
    input.extend(option(11, &[])); // EXTENDED_HEADERS
    input.extend(option(8, &[]));
    input.extend(go(6, b"other", &[]));
    input.extend(go(6, b"disk", &[3, 1, 2]));
    let mut meta = 4_u32.to_be_bytes().to_vec();
    meta.extend(b"disk\0\0\0\x01\0\0\0\x05base:");
    input.extend(option(10, &meta));
    input.extend(go(7, b"", &[]));
    let (out, end) = negotiate(&input, input.len());
    assert_eq!(end.unwrap().unwrap().style, Style::Extended);
    let expected = [
        (5, ERR + 1),
        (3, 2),
        (3, 1),
        (8, 1),
        (8, ERR + 3),
        (11, 1),
        (8, ERR + 10),
        (6, ERR + 6),
        (6, 3),
        (6, 3),
        (6, 3),
        (6, 3),
        (6, 1),
        (10, 1),
        (7, 3),
        (7, 3),
        (7, 1),
    ];
    assert_eq!(reply_kinds(&out), expected);
    // Size and flags behind the information type, minimum, preferred, maximum.
    let info = out
        .windows(2 + 8)
        .find(|w| w[..2] == [0, 0] && w[2..] == (64_u64 << 20).to_be_bytes());
    assert!(info.is_some());
    let sizes: Vec<u8> = [512_u32, 4096, 32 << 20]
        .iter()
        .flat_map(|n| n.to_be_bytes())
        .collect();
    assert!(out.windows(12).any(|window| window == sizes));
}

#[test]
fn the_old_way_to_name_an_export() {
    for (flags, padding) in [(3, 0), (1, 124), (0, 124)] {
        let mut input = vec![0, 0, 0, flags];
        input.extend(option(1, b"disk"));
        let (out, end) = negotiate(&input, 3);
        assert_eq!(end.unwrap().unwrap().style, Style::Simple);
        assert_eq!(out.len(), 10 + padding);
        assert_eq!(out[..8], (64_u64 << 20).to_be_bytes());
        // No DF without structured replies.
        assert_eq!(out[8..10], 0b1101_0110_1101_u16.to_be_bytes());
    }
}

#[test]
fn liars_in_negotiation_are_cut_off_or_told() {
    let with_flags = |bytes: Vec<u8>| [FLAGS.to_vec(), bytes].concat();
    let broken = |bytes: Vec<u8>| negotiate(&bytes, 4096).1.unwrap_err();
    assert_eq!(broken(vec![0, 0, 0, 4]), Broken::ClientFlags(4));
    assert_eq!(broken(with_flags(b"IHAVEOPS".to_vec())), Broken::Magic);
    assert_eq!(
        broken(with_flags(option(1, b"other"))),
        Broken::UnknownExport
    );
    assert_eq!(
        broken([vec![0, 0, 0, 0], go(7, b"", &[])].concat()),
        Broken::NotFixed
    );
    let mut huge = option(7, &[]);
    huge[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(broken(with_flags(huge)), Broken::Length(u32::MAX.into()));
    // Too long is skipped, and what comes behind is understood; malformed is told.
    let mut input = FLAGS.to_vec();
    input.extend(option(7, &vec![0xff; 100_000]));
    input.extend(option(7, &[0, 0, 0, 9, b'd']));
    input.extend(option(7, &[0, 0, 0, 0, 0, 2, 0, 3]));
    input.extend(option(10, b"\0\0\0\0\xff\xff\xff\xff"));
    input.extend(option(3, b"x"));
    input.extend(option(99, b"x"));
    input.extend(option(2, &[]));
    let (out, end) = negotiate(&input, 1000);
    assert_eq!(end, Ok(None));
    let kinds = [
        (7, ERR + 9),
        (7, ERR + 3),
        (7, ERR + 3),
        (10, ERR + 3),
        (3, ERR + 3),
        (99, ERR + 1),
        (2, 1),
    ];
    assert_eq!(reply_kinds(&out), kinds);
}

/// What a command is, for tables.
fn told(command: Result<Command, Broken>) -> String {
    match command {
        Ok(Command::Io(io)) => format!(
            "{:?} {}+{}{}{}",
            io.wanted.op,
            io.wanted.extent.lba,
            io.wanted.extent.blocks,
            if io.wanted.then_flush {
                " then flush"
            } else {
                ""
            },
            if io.is_write { " payload" } else { "" },
        ),
        Ok(Command::Refuse {
            errno,
            payload_bytes,
            ..
        }) => format!("{errno:?} skip {payload_bytes}"),
        Ok(other) => format!("{other:?}"),
        Err(broken) => format!("{broken:?}"),
    }
}

#[test]
fn what_requests_become() {
    let simple = session(Style::Simple, export());
    let extended = session(Style::Extended, export());
    let read_only = session(
        Style::Structured,
        Export {
            read_only: true,
            trim: false,
            write_zeroes: false,
            cache: false,
            ..export()
        },
    );
    let end = 64 << 20;
    for (session, header, expected) in [
        (&simple, header(0, 0, 4096, 512), "Read 8+1"),
        (&simple, header(0, 1, 0, 512), "Read 0+1"),
        (&simple, header(0, 4, 0, 512), "Inval skip 0"),
        (&extended, header(0, 4, 0, 512), "Read 0+1"),
        (&simple, header(0, 0, 0, 0), "Nothing"),
        (&simple, header(0, 0, 1, 512), "Inval skip 0"),
        (&simple, header(0, 0, end, 512), "Inval skip 0"),
        (&simple, header(0, 0, 0, (32 << 20) + 512), "Inval skip 0"),
        (
            &simple,
            header(1, 0, 512, 512),
            "Write { fua: false } 1+1 payload",
        ),
        (
            &simple,
            header(1, 1, 0, 512),
            "Write { fua: true } 0+1 payload",
        ),
        (&simple, header(1, 0, end, 512), "NoSpc skip 512"),
        (&simple, header(1, 0, 0, 100), "Inval skip 100"),
        (&simple, header(1, 0x20, 0, 512), "Inval skip 512"),
        (&simple, header(1, 0, u64::MAX, 512), "NoSpc skip 512"),
        (
            &simple,
            header(1, 0, 0, 32 << 20),
            "Write { fua: false } 0+65536 payload",
        ),
        (&simple, header(1, 0, 0, (32 << 20) + 1), "Length(33554433)"),
        (
            &extended,
            header(1, 0x20, 0, 512),
            "Write { fua: false } 0+1 payload",
        ),
        (
            &extended,
            header(1, 0, 0, 512),
            "Write { fua: false } 0+1 payload",
        ),
        (
            &extended,
            header(1, 0x20, 0, 1 << 40),
            "Length(1099511627776)",
        ),
        // A payload where none belongs.
        (&extended, header(0, 0x20, 0, 512), "Inval skip 512"),
        (&extended, header(3, 0x20, 0, 512), "Inval skip 512"),
        (&simple, header(2, 0, 0, 0), "Disconnect"),
        (&simple, header(3, 0, 0, 0), "Flush 0+0"),
        (&simple, header(4, 1, 512, 1024), "Discard 1+2 then flush"),
        (&extended, header(4, 0, 0, end), "Discard 0+131072"),
        (&simple, header(5, 0, 0, 512), "Verify 0+1"),
        (
            &simple,
            header(6, 0, 0, 512),
            "WriteZeroes { deallocate: true } 0+1",
        ),
        (
            &simple,
            header(6, 0x13, 0, 512),
            "WriteZeroes { deallocate: false } 0+1 then flush",
        ),
        (&simple, header(6, 0, end - 512, 1024), "NoSpc skip 0"),
        (&simple, header(7, 0, 0, 512), "Inval skip 0"),
        (&simple, header(8, 0, 0, 512), "Inval skip 0"),
        (&read_only, header(1, 0, 0, 512), "Perm skip 512"),
        (&read_only, header(4, 0, 0, 512), "Inval skip 0"),
        (&read_only, header(0, 0, 0, 512), "Read 0+1"),
    ] {
        assert_eq!(told(session.command(&header)), expected, "{header:?}");
    }
}

#[test]
fn error_numbers_are_those_of_the_protocol() {
    for (host, expected) in [
        (libc::EROFS, Errno::Perm),
        (libc::EBADE, Errno::Perm),
        (libc::ENOSPC, Errno::NoSpc),
        (libc::EOPNOTSUPP, Errno::NotSup),
        (libc::ENODATA, Errno::Io),
        (libc::ENOTCONN, Errno::Io),
        (libc::ECANCELED, Errno::Shutdown),
    ] {
        assert_eq!(Errno::from_host(host), expected);
    }
    assert_eq!(Errno::NotSup as u32, 95);
}

#[test]
fn heads_of_replies() {
    let head = |style, answer| {
        ReplyHead::new(style, 0x0102_0304_0506_0708, 512, answer)
            .bytes()
            .to_vec()
    };
    let cookie = [1, 2, 3, 4, 5, 6, 7, 8];
    let data = Answer::Data {
        offset: 512,
        len_bytes: 1024,
    };
    let parts = |parts: &[&[u8]]| parts.concat();
    assert_eq!(
        head(Style::Simple, data),
        parts(&[&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], &cookie])
    );
    assert_eq!(
        head(Style::Simple, Answer::Failed(Errno::NoSpc, "text")),
        parts(&[&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28], &cookie])
    );
    assert_eq!(
        head(Style::Structured, data),
        parts(&[
            &[0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1],
            &cookie,
            &[0, 0, 4, 8],
            &512_u64.to_be_bytes()
        ])
    );
    assert_eq!(
        head(Style::Structured, Answer::Done),
        parts(&[&[0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 0], &cookie, &[0; 4]])
    );
    assert_eq!(
        head(Style::Extended, Answer::Failed(Errno::Inval, "why")),
        parts(&[
            &[0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0x80, 1],
            &cookie,
            &512_u64.to_be_bytes(),
            &9_u64.to_be_bytes(),
            &[0, 0, 0, 22, 0, 3],
            b"why"
        ])
    );
    let long = head(
        Style::Extended,
        Answer::Failed(
            Errno::Io,
            "0123456789012345678901234567890123456789012345678901234567890",
        ),
    );
    assert_eq!(long.len(), MAX_REPLY_HEAD_BYTES);
}

fn style() -> impl Strategy<Value = Style> {
    prop_oneof![
        Just(Style::Simple),
        Just(Style::Structured),
        Just(Style::Extended)
    ]
}

proptest! {
    #[test]
    fn request_headers_survive_the_wire(style in style(), flags: u16, kind: u16, cookie: u64, offset: u64, len: u64) {
        let len_bytes = if style == Style::Extended { len } else { len & u64::from(u32::MAX) };
        let header = RequestHeader { flags, kind, cookie, offset, len_bytes };
        let (bytes, len) = header.emit(style);
        prop_assert_eq!(RequestHeader::parse(style, &bytes[..len]), Ok(Some(header)));
        for short in 0..len {
            prop_assert_eq!(RequestHeader::parse(style, &bytes[..short]), Ok(None));
        }
        let other = if style == Style::Extended { Style::Simple } else { Style::Extended };
        prop_assert_eq!(RequestHeader::parse(other, &bytes), Err(Broken::Magic));
    }

    /// A request that is let through lies inside of the export and on block boundaries, whatever the client says.
    #[test]
    fn what_reaches_the_volume_is_inside_of_it(style in style(), flags: u16, kind in 0_u16..9, offset in prop_oneof![any::<u64>(), 0_u64..70 << 20], len in prop_oneof![any::<u64>(), 0_u64..40 << 20], align: bool) {
        let mask = if align { 511 } else { 0 };
        let header = RequestHeader { flags, kind, cookie: 0, offset: offset & !mask, len_bytes: len & !mask };
        if let Ok(Command::Io(io)) = session(style, export()).command(&header) {
            let extent = io.wanted.extent;
            prop_assert!((extent.lba + extent.blocks) * 512 <= 64 << 20);
            prop_assert!(io.data_bytes <= MAX_PAYLOAD_BYTES);
            if io.wanted.op != Op::Flush {
                prop_assert_eq!((extent.lba * 512, extent.blocks * 512), (header.offset, header.len_bytes));
            }
            if io.data_bytes > 0 {
                prop_assert_eq!(u64::from(io.data_bytes), header.len_bytes);
            }
        }
    }

    /// However the bytes are cut, negotiation comes to the same; and no bytes make it panic.
    #[test]
    fn negotiation_does_not_depend_on_packets(options in proptest::collection::vec((0_u32..13, proptest::collection::vec(any::<u8>(), 0..40)), 0..8), piece in 1_usize..50, garbage in proptest::collection::vec(any::<u8>(), 0..30)) {
        let mut input = FLAGS.to_vec();
        for (number, data) in &options {
            input.extend(option(*number, data));
        }
        input.extend(garbage);
        prop_assert_eq!(negotiate(&input, input.len()), negotiate(&input, piece));
    }
}
