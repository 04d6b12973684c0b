//! Every kind of NVMe/TCP PDU, one per input: what is emitted is understood as the same, and with
//! digests a changed byte never passes for the original.

#![no_main]

use flexblk_nvme::command::Sqe;
use flexblk_nvme::tcp::digest::crc32c;
use flexblk_nvme::tcp::framing::term_req;
use flexblk_nvme::tcp::{
    Alignment, C2hData, CapsuleCmd, Digests, End, Established, Event, FatalStatus, Framing,
    H2cData, HEAD_MAX, IcReq, IcResp, Pdu, PduType, R2t, Stream, TERM_MAX, TermReq,
};
use flexblk_nvme::{Cid, Cqe};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some(([kind, options, alignment, change, at], rest)) = input.split_first_chunk() else {
        return;
    };
    let Some((fields, data)) = rest.split_first_chunk::<64>() else {
        return;
    };
    let data = &data[..data.len().min(8192)];
    let Some(pdu_type) = PduType::from_raw(kind % 10) else {
        return;
    };
    let framing = Framing {
        digests: Digests::from_bits_truncate(*options),
        alignment: Alignment::from_raw(alignment % 32).unwrap_or_default(),
    };
    let half = |at: usize| u16::from_le_bytes([fields[at], fields[at + 1]]);
    let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
    let (cid, len_bytes) = (Cid::new(half(0)), data.len() as u32);
    let mut head = [0; HEAD_MAX];
    let mut out = [0; TERM_MAX];
    let (pdu, front, data) = match pdu_type {
        PduType::IcReq => {
            let request = IcReq {
                hpda: framing.alignment,
                digests: framing.digests,
                maxr2t: word(0),
            };
            (Pdu::IcReq(request), request.emit().to_vec(), None)
        }
        PduType::IcResp => {
            let response = IcResp {
                cpda: framing.alignment,
                digests: framing.digests,
                maxh2cdata: (word(0) & !3).max(4096),
            };
            (Pdu::IcResp(response), response.emit().to_vec(), None)
        }
        PduType::H2cTermReq | PduType::C2hTermReq => {
            let (from, fes, fei) = (pdu_type.from(), FatalStatus::from_raw(half(0)), word(2));
            let len = term_req(from, fes, fei, data, &mut out);
            (
                Pdu::TermReq(TermReq { from, fes, fei }),
                out[..len].to_vec(),
                None,
            )
        }
        PduType::CapsuleCmd => {
            let sqe = *Sqe::cast(fields);
            let len = framing.capsule_cmd(&sqe, len_bytes, &mut head);
            let pdu = Pdu::CapsuleCmd(CapsuleCmd { sqe, len_bytes });
            (pdu, head[..len].to_vec(), (len_bytes > 0).then_some(data))
        }
        PduType::CapsuleResp => {
            let cqe = Cqe::from_bytes(fields.first_chunk().expect("64 bytes"));
            let len = framing.capsule_resp(&cqe, &mut head);
            (Pdu::CapsuleResp(cqe), head[..len].to_vec(), None)
        }
        PduType::H2cData => {
            let pdu = H2cData {
                cid,
                ttag: half(2),
                offset: word(4),
                len_bytes,
                last: fields[8] & 1 != 0,
            };
            let len = framing.h2c_data(&pdu, &mut head);
            (Pdu::H2cData(pdu), head[..len].to_vec(), Some(data))
        }
        PduType::C2hData => {
            let pdu = C2hData {
                cid,
                offset: word(4),
                len_bytes,
                last: fields[8] & 1 != 0,
                success: fields[8] & 3 == 3,
            };
            let len = framing.c2h_data(&pdu, &mut head);
            (Pdu::C2hData(pdu), head[..len].to_vec(), Some(data))
        }
        PduType::R2t => {
            let pdu = R2t {
                cid,
                ttag: half(2),
                offset: word(4),
                len_bytes: word(8),
            };
            let len = framing.r2t(&pdu, &mut head);
            (Pdu::R2t(pdu), head[..len].to_vec(), None)
        }
    };
    let mut wire = front;
    if let Some(data) = data {
        wire.extend_from_slice(data);
        if framing.has_data_digest() {
            wire.extend_from_slice(&crc32c(data).to_le_bytes());
        }
    }
    let stream = || {
        let mut stream = Stream::new(match pdu_type.from() {
            End::Host => End::Controller,
            End::Controller => End::Host,
        });
        if !pdu_type.is_setup() {
            stream.establish(Established {
                digests: framing.digests,
                alignment: framing.alignment,
                max_in_capsule_bytes: 8192,
                max_data_bytes: 8192,
            });
        }
        stream
    };
    let read = |wire: &[u8]| {
        let (mut stream, mut input, mut events) = (stream(), wire, 0);
        let mut seen = (None, Vec::new(), true, 0);
        while let Some(event) = stream.next(&mut input)? {
            events += 1;
            match event {
                Event::Pdu(pdu) => seen.0 = Some(pdu),
                Event::Data(bytes) => seen.1.extend_from_slice(bytes),
                Event::DataEnd { intact } => seen.2 = intact,
            }
        }
        seen.3 = events;
        Ok::<_, flexblk_nvme::tcp::Error>(seen)
    };
    let (seen, bytes, intact, _) = read(&wire).expect("what we emit is right");
    assert_eq!(seen, Some(pdu));
    assert_eq!(bytes, data.unwrap_or_default());
    assert!(intact);
    // Padding is not protected.
    if *change != 0 && framing.digests == Digests::all() && framing.alignment == Alignment::DWORD {
        let at = usize::from(*at) % wire.len();
        wire[at] ^= change;
        if pdu_type.has_header_digest()
            && let Ok((seen, bytes, intact, events)) = read(&wire)
            && events > 0
        {
            assert!(
                !intact
                    || (seen, &bytes[..]) != (Some(pdu), data.unwrap_or_default())
                    || events < 2
            );
            assert!(!intact || bytes.is_empty() || bytes != data.unwrap_or_default());
        }
    }
});
