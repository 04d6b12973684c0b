//! Round trips, fragmentation, and what is refused.

use proptest::prelude::*;

use super::framing::term_req;
use super::*;
use crate::command::Sqe;
use crate::completion::Cqe;
use crate::ids::Cid;

/// A PDU and the data behind it.
#[derive(Clone, Debug)]
struct Sent {
    pdu: Pdu,
    data: Vec<u8>,
}

impl Sent {
    fn new(pdu: Pdu) -> Self {
        Self {
            pdu,
            data: Vec::new(),
        }
    }

    fn emit(&self, framing: &Framing) -> Vec<u8> {
        let mut head = [0xEE; HEAD_MAX];
        let len = match &self.pdu {
            Pdu::IcReq(request) => return request.emit().to_vec(),
            Pdu::IcResp(response) => return response.emit().to_vec(),
            Pdu::TermReq(term) => {
                let mut out = [0; TERM_MAX];
                let len = term_req(term.from, term.fes, term.fei, &self.data, &mut out);
                return out[..len].to_vec();
            }
            Pdu::CapsuleCmd(capsule) => {
                framing.capsule_cmd(&capsule.sqe, self.data.len() as u32, &mut head)
            }
            Pdu::CapsuleResp(cqe) => framing.capsule_resp(cqe, &mut head),
            Pdu::H2cData(data) => framing.h2c_data(data, &mut head),
            Pdu::C2hData(data) => framing.c2h_data(data, &mut head),
            Pdu::R2t(r2t) => framing.r2t(r2t, &mut head),
        };
        let mut bytes = head[..len].to_vec();
        bytes.extend_from_slice(&self.data);
        let carries_data = match self.pdu {
            Pdu::CapsuleCmd(_) => !self.data.is_empty(),
            Pdu::H2cData(_) | Pdu::C2hData(_) => true,
            _ => false,
        };
        if carries_data && framing.has_data_digest() {
            bytes.extend_from_slice(&digest::crc32c(&self.data).to_le_bytes());
        }
        bytes
    }
}

/// What a stream gave, data joined per PDU.
#[derive(Clone, Debug, PartialEq)]
enum Got {
    Pdu(Pdu),
    Data { bytes: Vec<u8>, intact: bool },
}

/// Feeds `wire` in pieces; where `direct` says so, the middle of a payload goes past `next`.
fn receive(
    stream: &mut Stream,
    wire: &[u8],
    mut cuts: impl FnMut() -> (usize, bool),
) -> Result<Vec<Got>, Error> {
    let (mut got, mut data) = (Vec::new(), Vec::new());
    let mut rest = wire;
    loop {
        let (len, direct) = cuts();
        let left = stream.payload_left() as usize;
        let mut piece: &[u8] = &[];
        if direct && left > 0 {
            let (bytes, behind) = rest.split_at(len.min(left).min(rest.len()));
            stream.placed(bytes.len() as u32, || [bytes]);
            data.extend_from_slice(bytes);
            rest = behind;
        } else {
            (piece, rest) = rest.split_at(len.min(rest.len()));
        }
        while let Some(event) = stream.next(&mut piece)? {
            match event {
                Event::Pdu(pdu) => got.push(Got::Pdu(pdu)),
                Event::Data(bytes) => {
                    assert!(!bytes.is_empty());
                    data.extend_from_slice(bytes);
                }
                Event::DataEnd { intact } => got.push(Got::Data {
                    bytes: std::mem::take(&mut data),
                    intact,
                }),
            }
        }
        assert!(piece.is_empty(), "all input is used");
        if rest.is_empty() && stream.payload_left() == 0 {
            return Ok(got);
        }
        if rest.is_empty() {
            // The wire ends within a payload.
            return Ok(got);
        }
    }
}

fn whole() -> (usize, bool) {
    (usize::MAX, false)
}

fn expected(sent: &[Sent]) -> Vec<Got> {
    let mut got = Vec::new();
    for sent in sent {
        got.push(Got::Pdu(sent.pdu));
        let has_data = match sent.pdu {
            Pdu::CapsuleCmd(capsule) => capsule.len_bytes > 0,
            Pdu::H2cData(_) | Pdu::C2hData(_) => true,
            _ => false,
        };
        if has_data {
            got.push(Got::Data {
                bytes: sent.data.clone(),
                intact: true,
            });
        }
    }
    got
}

fn established(digests: Digests, alignment: Alignment) -> Established {
    Established {
        digests,
        alignment,
        max_in_capsule_bytes: 8192,
        max_data_bytes: 1 << 20,
    }
}

fn stream(end: End, framing: &Framing) -> Stream {
    let mut stream = Stream::new(end);
    stream.establish(established(framing.digests, framing.alignment));
    stream
}

fn capsule(cid: u16, data: Vec<u8>) -> Sent {
    let mut sqe = Sqe::zeroed();
    sqe.set_cid(Cid::new(cid));
    Sent {
        pdu: Pdu::CapsuleCmd(CapsuleCmd {
            sqe,
            len_bytes: data.len() as u32,
        }),
        data,
    }
}

#[test]
fn a_capsule_with_data_can_be_foreseen_from_its_header() {
    let framing = Framing {
        digests: Digests::empty(),
        alignment: Alignment::DWORD,
    };
    let bytes = capsule(7, vec![1; 4096]).emit(&framing);
    let (sqe, data_len) = CapsuleCmd::foresee(&bytes).unwrap();
    assert_eq!((sqe.cid(), data_len), (Cid::new(7), 4096));
    let header = bytes.get(..72).unwrap();
    assert!(CapsuleCmd::foresee(header).is_some());
    for len in 0..72 {
        assert!(CapsuleCmd::foresee(&header[..len]).is_none());
    }
    let without_data = capsule(7, Vec::new()).emit(&framing);
    assert!(CapsuleCmd::foresee(&without_data).is_none());
    let other = h2c(vec![1; 4096]).emit(&framing);
    assert!(CapsuleCmd::foresee(&[other, vec![0; 72]].concat()).is_none());
    let mut mad = bytes;
    mad[3..8].copy_from_slice(&[200, 100, 0, 0, 0]);
    assert!(CapsuleCmd::foresee(&mad).is_none());
}

fn h2c(data: Vec<u8>) -> Sent {
    Sent {
        pdu: Pdu::H2cData(H2cData {
            cid: Cid::new(1),
            ttag: 2,
            offset: 4096,
            len_bytes: data.len() as u32,
            last: true,
        }),
        data,
    }
}

fn digests() -> impl Strategy<Value = Digests> {
    (0u8..4).prop_map(Digests::from_bits_truncate)
}

fn framing() -> impl Strategy<Value = Framing> {
    (digests(), 0u8..32).prop_map(|(digests, alignment)| Framing {
        digests,
        alignment: Alignment::from_raw(alignment).unwrap(),
    })
}

fn from_host() -> impl Strategy<Value = Sent> {
    let data = || prop::collection::vec(any::<u8>(), 0..300);
    prop_oneof![
        (any::<[u8; 64]>(), data()).prop_map(|(sqe, data)| Sent {
            pdu: Pdu::CapsuleCmd(CapsuleCmd {
                sqe: *Sqe::cast(&sqe),
                len_bytes: data.len() as u32,
            }),
            data,
        }),
        (
            any::<u16>(),
            any::<u16>(),
            any::<u32>(),
            any::<bool>(),
            data()
        )
            .prop_map(|(cid, ttag, offset, last, data)| Sent {
                pdu: Pdu::H2cData(H2cData {
                    cid: Cid::new(cid),
                    ttag,
                    offset,
                    len_bytes: data.len() as u32,
                    last,
                }),
                data,
            }),
        term(End::Host),
    ]
}

fn from_controller() -> impl Strategy<Value = Sent> {
    let data = || prop::collection::vec(any::<u8>(), 0..300);
    prop_oneof![
        any::<[u8; 16]>().prop_map(|cqe| Sent::new(Pdu::CapsuleResp(Cqe::from_bytes(&cqe)))),
        (
            any::<u16>(),
            any::<u32>(),
            any::<bool>(),
            any::<bool>(),
            data()
        )
            .prop_map(|(cid, offset, last, success, data)| Sent {
                pdu: Pdu::C2hData(C2hData {
                    cid: Cid::new(cid),
                    offset,
                    len_bytes: data.len() as u32,
                    last,
                    success: last && success,
                }),
                data,
            }),
        (any::<u16>(), any::<u16>(), any::<u32>(), any::<u32>()).prop_map(
            |(cid, ttag, offset, len_bytes)| Sent::new(Pdu::R2t(R2t {
                cid: Cid::new(cid),
                ttag,
                offset,
                len_bytes,
            }))
        ),
        term(End::Controller),
    ]
}

fn term(from: End) -> impl Strategy<Value = Sent> {
    (
        any::<u16>(),
        any::<u32>(),
        prop::collection::vec(any::<u8>(), 0..=128),
    )
        .prop_map(move |(fes, fei, data)| Sent {
            pdu: Pdu::TermReq(TermReq {
                from,
                fes: FatalStatus::from_raw(fes),
                fei,
            }),
            data,
        })
}

fn sent(end: End) -> BoxedStrategy<Vec<Sent>> {
    match end {
        End::Controller => prop::collection::vec(from_host(), 1..8).boxed(),
        End::Host => prop::collection::vec(from_controller(), 1..8).boxed(),
    }
}

fn ends() -> impl Strategy<Value = End> {
    prop_oneof![Just(End::Host), Just(End::Controller)]
}

proptest! {
    /// Whatever one end emits, the other understands as the same, however the bytes are cut and
    /// wherever payload is received.
    #[test]
    fn any_fragmentation_gives_the_same_events(
        (end, sent) in ends().prop_flat_map(|end| (Just(end), sent(end))),
        framing in framing(),
        cuts in prop::collection::vec((1usize..200, any::<bool>()), 1..40),
    ) {
        let wire: Vec<u8> = sent.iter().flat_map(|sent| sent.emit(&framing)).collect();
        let mut whole_stream = stream(end, &framing);
        prop_assert_eq!(receive(&mut whole_stream, &wire, whole).unwrap(), expected(&sent));
        prop_assert!(whole_stream.is_between_pdus());

        let mut cut = cuts.iter().cycle();
        let mut pieces = stream(end, &framing);
        let got = receive(&mut pieces, &wire, || *cut.next().unwrap()).unwrap();
        prop_assert_eq!(got, expected(&sent));

        let mut bytes = stream(end, &framing);
        prop_assert_eq!(receive(&mut bytes, &wire, || (1, false)).unwrap(), expected(&sent));
    }

    #[test]
    fn connection_set_up_round_trips(hpda in 0u8..32, asked in digests(), maxr2t: u32, max in 1024u32..1 << 20) {
        let request = IcReq { hpda: Alignment::from_raw(hpda).unwrap(), digests: asked, maxr2t };
        let mut controller = Stream::new(End::Controller);
        prop_assert_eq!(
            receive(&mut controller, &request.emit(), || (3, false)).unwrap(),
            vec![Got::Pdu(Pdu::IcReq(request))]
        );
        let response = request.answer(Digests::all(), Digests::empty(), max * 4).unwrap();
        prop_assert_eq!(response.digests, asked);
        let mut host = Stream::new(End::Host);
        prop_assert_eq!(
            receive(&mut host, &response.emit(), || (3, false)).unwrap(),
            vec![Got::Pdu(Pdu::IcResp(response))]
        );
        prop_assert_eq!(response.check(&request), Ok(()));
    }

    /// Arbitrary bytes, established or not: events or an error that stays, never a panic.
    #[test]
    fn arbitrary_bytes_are_judged(
        end in ends(),
        framing in framing(),
        is_established: bool,
        kind in 0u8..11,
        mut bytes in prop::collection::vec(any::<u8>(), 0..400),
        cuts in prop::collection::vec((1usize..100, any::<bool>()), 1..10),
    ) {
        // Often a type and lengths that go further than the first check.
        if let [pdu_type, _, hlen, pdo, plen @ ..] = &mut bytes[..]
            && let Some(known) = PduType::from_raw(kind)
            && plen.len() > 4
        {
            *pdu_type = kind;
            *hlen = known.hlen() as u8;
            *pdo &= 0x7C;
            plen[1..4].fill(0);
        }
        let mut stream = Stream::new(end);
        if is_established {
            stream.establish(established(framing.digests, framing.alignment));
        }
        let mut cut = cuts.iter().cycle();
        if let Err(error) = receive(&mut stream, &bytes, || *cut.next().unwrap()) {
            prop_assert_eq!(stream.next(&mut &bytes[..]), Err(error));
            let mut out = [0; TERM_MAX];
            let len = stream.term_req(error, &mut out);
            prop_assert_eq!(len == 0, error == Error::BadTermReq);
            if len > 0 {
                // And what we send about it is understood.
                let mut other = Stream::new(if end == End::Host { End::Controller } else { End::Host });
                let got = receive(&mut other, &out[..len], whole).unwrap();
                prop_assert!(matches!(got[..], [Got::Pdu(Pdu::TermReq(_))]));
            }
        }
    }

    /// One flipped bit: in a header that has a digest it is found as such or as an invalid field; in
    /// data it is found by the data digest.
    #[test]
    fn a_flipped_bit_is_found(len in 4usize..300, at: prop::sample::Index, bit in 0u8..8) {
        let framing = Framing { digests: Digests::all(), ..Framing::default() };
        let sent = h2c(vec![0x5A; len]);
        let mut wire = sent.emit(&framing);
        let at = at.index(wire.len());
        wire[at] ^= 1 << bit;
        match receive(&mut stream(End::Controller, &framing), &wire, whole) {
            Ok(got) => match &got[..] {
                [Got::Pdu(pdu), Got::Data { intact, .. }] => {
                    prop_assert!(at >= 28);
                    prop_assert_eq!(*pdu, sent.pdu);
                    prop_assert!(!intact);
                }
                // H2CData has become H2CTermReq, which has no digest, and ends the connection too.
                [Got::Pdu(Pdu::TermReq(_))] => prop_assert_eq!(at, 0),
                // A longer PLEN: the header is not complete or the type is another one.
                got => prop_assert!(got.is_empty() && at < 28, "{:?}", got),
            },
            Err(_) => prop_assert!(at < 28),
        }
    }

    #[test]
    fn fatal_statuses_round_trip(raw: u16) {
        prop_assert_eq!(FatalStatus::from_raw(raw).raw(), raw);
    }

    /// A cursor takes exactly the pieces of its range, in order.
    #[test]
    fn a_cursor_takes_its_range_in_order(start in 0u32..1000, pieces in prop::collection::vec(0u32..500, 1..8)) {
        let len = pieces.iter().sum();
        let mut cursor = Cursor::new(start, len).unwrap();
        let mut at = start;
        for (i, piece) in pieces.iter().enumerate() {
            prop_assert_eq!(cursor.accept(at, start + len - at + 1, false), Err(Error::OutOfRange));
            if at > start {
                prop_assert_eq!(cursor.accept(at - 1, 1, false), Err(Error::Sequence));
            }
            cursor.accept(at, *piece, i + 1 == pieces.len()).unwrap();
            at += piece;
            prop_assert_eq!(cursor.accepted(), at - start);
        }
        prop_assert!(cursor.is_complete() && cursor.has_ended());
        prop_assert_eq!(cursor.accept(at, 0, true), Err(Error::Sequence));
    }
}

#[test]
fn bytes_of_a_read_answered_with_the_success_flag() {
    let framing = Framing {
        digests: Digests::HEADER,
        alignment: Alignment::from_raw(7).unwrap(),
    };
    let mut out = [0xEE; HEAD_MAX];
    let data = C2hData {
        cid: Cid::new(0x0102),
        offset: 8192,
        len_bytes: 4096,
        last: true,
        success: true,
    };
    // Header 24, digest 4, padding up to 32.
    assert_eq!(framing.c2h_data(&data, &mut out), 32);
    let header = [
        7, 0x0D, 24, 32, 0x20, 0x10, 0, 0, 2, 1, 0, 0, 0, 0x20, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0,
    ];
    assert_eq!(out[..24], header);
    assert_eq!(out[24..28], digest::crc32c(&header).to_le_bytes());
    assert_eq!(out[28..33], [0, 0, 0, 0, 0xEE]);
}

#[test]
fn digest_is_crc32c_with_little_endian_bytes() {
    // RFC 3720, B.4: 32 bytes of zeros are AA 36 91 8A on the wire.
    let mut crc = Crc32c::new();
    crc.update(&[0; 20]);
    crc.update(&[0; 12]);
    assert_eq!(crc.to_bytes(), [0xAA, 0x36, 0x91, 0x8A]);
    assert_eq!(digest::crc32c(b"123456789"), 0xE306_9283);
}

/// Sends `bytes` to `end` and gives the error, with what the TermReq says.
fn refused(end: End, is_established: bool, digests: Digests, bytes: &[u8]) -> (Error, Vec<u8>) {
    let mut stream = Stream::new(end);
    if is_established {
        stream.establish(established(digests, Alignment::DWORD));
    }
    let error = receive(&mut stream, bytes, || (5, false)).unwrap_err();
    let mut out = [0; TERM_MAX];
    let len = stream.term_req(error, &mut out);
    (error, out[..len].to_vec())
}

/// TCP 3.3: "An NVMe/TCP PDU that is transferred in a direction opposite from that with which it is
/// associated is treated as a fatal transport error".
#[test]
fn wrong_direction_and_reserved_types() {
    for raw in 0..=255u8 {
        for end in [End::Host, End::Controller] {
            let fits = PduType::from_raw(raw).is_some_and(|kind| kind.from() != end);
            if !fits {
                let bytes = [raw, 0, 24, 0, 24, 0, 0, 0];
                let (error, term) = refused(end, true, Digests::empty(), &bytes);
                assert_eq!(error, Error::InvalidField { offset: 0 });
                let by = if end == End::Host { 2 } else { 3 };
                assert_eq!(term[..14], [by, 0, 24, 0, 32, 0, 0, 0, 1, 0, 0, 0, 0, 0]);
                assert_eq!(term[24..], bytes);
            }
        }
    }
}

#[test]
fn set_up_comes_first_and_once() {
    let capsule = capsule(1, Vec::new()).emit(&Framing::default());
    let (error, term) = refused(End::Controller, false, Digests::empty(), &capsule);
    assert_eq!(error, Error::Sequence);
    assert_eq!(term[8], 2);
    let again = IcReq::default().emit();
    let (error, _) = refused(End::Controller, true, Digests::empty(), &again);
    assert_eq!(error, Error::Sequence);
    let response = IcReq::default()
        .answer(Digests::empty(), Digests::empty(), 4096)
        .unwrap()
        .emit();
    let (error, _) = refused(End::Host, true, Digests::empty(), &response);
    assert_eq!(error, Error::Sequence);
}

#[test]
fn set_up_with_wrong_fields() {
    let at = |end, offset: usize, value: u8| {
        let mut bytes = match end {
            End::Controller => IcReq::default().emit(),
            End::Host => IcReq::default()
                .answer(Digests::all(), Digests::empty(), 8192)
                .unwrap()
                .emit(),
        };
        bytes[offset] = value;
        refused(end, false, Digests::empty(), &bytes)
    };
    for end in [End::Controller, End::Host] {
        assert_eq!(at(end, 2, 127).0, Error::InvalidField { offset: 2 });
        assert_eq!(at(end, 4, 127).0, Error::InvalidField { offset: 4 });
        let (error, term) = at(end, 9, 1);
        assert_eq!(error, Error::Unsupported { offset: 8 });
        assert_eq!(term[8..14], [6, 0, 8, 0, 0, 0]);
        assert_eq!(term.len(), TERM_MAX);
        assert_eq!(at(end, 10, 32).0, Error::InvalidField { offset: 10 });
    }
    // MAXH2CDATA below 4096, or not in dwords.
    assert_eq!(
        at(End::Host, 13, 0x0F).0,
        Error::InvalidField { offset: 12 }
    );
    assert_eq!(at(End::Host, 12, 2).0, Error::InvalidField { offset: 12 });
}

#[test]
fn digests_are_negotiated() {
    let request = IcReq {
        digests: Digests::HEADER,
        ..IcReq::default()
    };
    let answer = |allowed, required| request.answer(allowed, required, 4096);
    let none = Digests::empty();
    assert_eq!(
        answer(Digests::all(), none).unwrap().digests,
        Digests::HEADER
    );
    assert_eq!(answer(none, none).unwrap().digests, none);
    assert_eq!(
        answer(none, Digests::HEADER).unwrap().digests,
        Digests::HEADER
    );
    assert_eq!(
        answer(Digests::all(), Digests::DATA),
        Err(Error::Unsupported { offset: 11 })
    );
    let unasked = IcResp {
        cpda: Alignment::DWORD,
        digests: Digests::DATA,
        maxh2cdata: 4096,
    };
    assert_eq!(
        unasked.check(&request),
        Err(Error::InvalidField { offset: 11 })
    );
}

#[test]
fn headers_with_wrong_lengths_and_flags() {
    let check = |sent: &Sent, digests: Digests, offset: usize, value: u8| {
        let framing = Framing {
            digests,
            ..Framing::default()
        };
        let mut bytes = sent.emit(&framing);
        bytes[offset] = value;
        refused(End::Controller, true, digests, &bytes).0
    };
    let none = Digests::empty();
    let invalid = |offset| Error::InvalidField { offset };
    let (with, without) = (capsule(1, vec![1; 512]), capsule(1, Vec::new()));
    // Digests that were not agreed, and agreed ones that are missing.
    assert_eq!(check(&without, none, 1, 1), invalid(1));
    assert_eq!(check(&with, none, 1, 2), invalid(1));
    assert_eq!(check(&with, Digests::all(), 1, 1), invalid(1));
    assert_eq!(check(&without, Digests::all(), 1, 0), invalid(1));
    assert_eq!(check(&with, none, 2, 24), invalid(2));
    // The data begins within the header, unaligned, or behind the end.
    assert_eq!(check(&with, none, 3, 68), invalid(3));
    assert_eq!(check(&with, none, 3, 73), invalid(3));
    assert_eq!(check(&without, none, 4, 71), invalid(3));
    assert_eq!(check(&h2c(vec![0; 8]), none, 4, 16), invalid(4));
    // DATAL and PLEN disagree.
    assert_eq!(check(&h2c(vec![0; 8]), none, 16, 4), invalid(16));
    // SUCCESS without LAST_PDU (TCP 3.3.2.1).
    let data = Pdu::C2hData(C2hData {
        cid: Cid::new(1),
        offset: 0,
        len_bytes: 0,
        last: false,
        success: true,
    });
    let bytes = Sent::new(data).emit(&Framing::default());
    assert_eq!(refused(End::Host, true, none, &bytes).0, invalid(1));
    // A header of no more than 8 bytes is all that has come: that is what is sent back.
    let (_, term) = refused(End::Controller, true, none, &[4, 1, 72, 0, 72, 0, 0, 0]);
    assert_eq!(term.len(), 32);
}

#[test]
fn limits() {
    let none = Digests::empty();
    let too_long = h2c(vec![0; (1 << 20) + 4]).emit(&Framing::default());
    let (error, term) = refused(End::Controller, true, none, &too_long);
    assert_eq!((error, term[8]), (Error::LimitExceeded, 5));
    let capsule = capsule(1, vec![0; 8196]).emit(&Framing::default());
    let (error, _) = refused(End::Controller, true, none, &capsule);
    assert_eq!(error, Error::InvalidField { offset: 4 });
}

#[test]
fn a_wrong_header_digest_is_fatal_and_says_what_was_received() {
    let framing = Framing {
        digests: Digests::HEADER,
        ..Framing::default()
    };
    let mut bytes = capsule(9, Vec::new()).emit(&framing);
    bytes[72..76].copy_from_slice(&[1, 2, 3, 4]);
    let (error, term) = refused(End::Controller, true, Digests::HEADER, &bytes);
    assert_eq!(
        error,
        Error::HeaderDigest {
            received: 0x0403_0201
        }
    );
    assert_eq!(term[8..14], [3, 0, 1, 2, 3, 4]);
    assert_eq!(term[24..], bytes[..72]);
}

/// TCP 3.5: a TermReq shorter than 24 or longer than 152 bytes is ignored, without an answer.
#[test]
fn malformed_term_reqs_are_not_answered() {
    for (plen, hlen) in [(23, 24), (153, 24), (24, 23)] {
        let bytes = [2, 0, hlen, 0, plen, 0, 0, 0];
        let (error, term) = refused(End::Controller, true, Digests::empty(), &bytes);
        assert_eq!(error, Error::BadTermReq);
        assert!(term.is_empty());
    }
}

/// The errors that a user of the stream finds are about the PDU whose header came last.
#[test]
fn term_req_about_the_current_pdu() {
    let sent = h2c(vec![1; 64]).emit(&Framing::default());
    let mut stream = stream(End::Controller, &Framing::default());
    let mut input = &sent[..30];
    assert!(matches!(stream.next(&mut input), Ok(Some(Event::Pdu(_)))));
    let mut out = [0; TERM_MAX];
    let error = Error::InvalidField { offset: 10 };
    let len = stream.term_req(error, &mut out);
    assert_eq!(out[24..len], sent[..24]);
    assert_eq!(out[8..14], [1, 0, 10, 0, 0, 0]);
}

#[test]
fn display_names_the_status() {
    let term = |from, fes| TermReq {
        from,
        fes: FatalStatus::from_raw(fes),
        fei: 16,
    };
    assert_eq!(
        term(End::Controller, 5).to_string(),
        "C2HTermReq: Data Transfer Limit Exceeded (FES 05h, FEI 0x10)"
    );
    assert_eq!(
        term(End::Host, 5).to_string(),
        "H2CTermReq: R2T Limit Exceeded (FES 05h, FEI 0x10)"
    );
}
