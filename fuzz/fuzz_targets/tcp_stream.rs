//! A connection's incoming bytes at either end of NVMe/TCP: nothing panics, cutting the bytes into
//! pieces or receiving payload past the stream changes nothing, and an error stays.

#![no_main]

use flexblk_nvme::tcp::{
    Alignment, Digests, End, Error, Established, Event, Pdu, Stream, TERM_MAX,
};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, PartialEq)]
enum Got {
    Pdu(Pdu),
    Data { bytes: Vec<u8>, intact: bool },
}

fn receive(mut stream: Stream, wire: &[u8], cuts: &[u8]) -> (Vec<Got>, Result<(), Error>) {
    let (mut got, mut data, mut rest) = (Vec::new(), Vec::new(), wire);
    let mut cuts = cuts.iter().cycle();
    while !rest.is_empty() {
        let cut = cuts.next().copied().unwrap_or(255);
        let len = match cut & 0x7F {
            0x7F => rest.len(),
            small => usize::from(small) + 1,
        };
        let left = stream.payload_left() as usize;
        let mut piece: &[u8] = &[];
        if cut & 0x80 != 0 && left > 0 {
            let (bytes, behind) = rest.split_at(len.min(left).min(rest.len()));
            stream.placed(bytes.len() as u32, || [bytes]);
            data.extend_from_slice(bytes);
            rest = behind;
        } else {
            (piece, rest) = rest.split_at(len.min(rest.len()));
        }
        loop {
            match stream.next(&mut piece) {
                Ok(None) => break,
                Ok(Some(Event::Pdu(pdu))) => got.push(Got::Pdu(pdu)),
                Ok(Some(Event::Data(bytes))) => data.extend_from_slice(bytes),
                Ok(Some(Event::DataEnd { intact })) => got.push(Got::Data {
                    bytes: std::mem::take(&mut data),
                    intact,
                }),
                Err(error) => {
                    assert_eq!(stream.next(&mut piece), Err(error));
                    let mut out = [0; TERM_MAX];
                    assert_eq!(
                        stream.term_req(error, &mut out) == 0,
                        error == Error::BadTermReq
                    );
                    return (got, Err(error));
                }
            }
        }
        assert!(piece.is_empty());
    }
    (got, Ok(()))
}

fuzz_target!(|input: &[u8]| {
    let [options, alignment, cut_count, rest @ ..] = input else {
        return;
    };
    let (cuts, wire) = rest.split_at(usize::from(*cut_count % 16).min(rest.len()));
    let end = if options & 1 == 0 {
        End::Controller
    } else {
        End::Host
    };
    let mut stream = Stream::new(end);
    if options & 2 == 0 {
        stream.establish(Established {
            digests: Digests::from_bits_truncate(options >> 2),
            alignment: Alignment::from_raw(alignment % 32).unwrap_or_default(),
            max_in_capsule_bytes: 8192,
            max_data_bytes: 1 << 20,
        });
    }
    assert_eq!(
        receive(stream.clone(), wire, cuts),
        receive(stream, wire, &[])
    );
});
