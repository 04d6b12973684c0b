//! NVMe/TCP peers that are silent, close, refuse or speak something else: one typed error each, in time.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use flexblk_initiator::{ConnectOptions, Controller, Error, Host, HostId, LostReason, discover};
use flexblk_nvme::tcp::{
    Alignment, Digests, End, Error as WireError, Established, Framing, HEAD_MAX, IcResp, Stream,
    TERM_MAX,
};
use flexblk_nvme::{Cid, Cqe};

fn options(address: SocketAddr, more: &str) -> ConnectOptions {
    let host = Host {
        hostnqn: "nqn.2026-11.io.example:host".parse().unwrap(),
        hostid: HostId::random(),
    };
    let words = format!(
        "trtype=tcp traddr={} trsvcid={} subnqn=nqn.2026-11.io.example:disk connect_timeout_ms=400 {more}",
        address.ip(),
        address.port()
    );
    ConnectOptions::parse(&words, host).unwrap()
}

fn error_of(address: SocketAddr, more: &str) -> Error {
    let started = Instant::now();
    let error = Controller::connect(&options(address, more)).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(2), "{error}");
    error
}

/// What connecting ends with to a peer that does this with the connection. It has done all of it.
fn error_with(more: &str, act: impl FnOnce(TcpStream) + Send + 'static) -> Error {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let peer = std::thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        act(socket);
    });
    let error = error_of(address, more);
    peer.join().unwrap();
    error
}

/// Takes the ICReq and answers it.
fn set_up(socket: &mut TcpStream, digests: Digests) {
    let mut request = [0; 128];
    socket.read_exact(&mut request).unwrap();
    let response = IcResp {
        cpda: Alignment::DWORD,
        digests,
        maxh2cdata: 131_072,
    };
    socket.write_all(&response.emit()).unwrap();
}

/// The Connect command's capsule: 72 bytes, and 1024 of data.
fn take_connect(socket: &mut TcpStream) {
    let mut capsule = [0; 72 + 1024];
    socket.read_exact(&mut capsule).unwrap();
    assert_eq!((capsule[0], capsule[8]), (0x04, 0x7f), "a Fabrics command");
}

fn wait_for_the_end(socket: &mut TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    let _ = socket.read_to_end(&mut rest);
    rest
}

#[test]
fn nobody_listens() {
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .unwrap()
        .local_addr()
        .unwrap();
    let error = error_of(address, "");
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    let text = error.to_string();
    let port = format!("nothing listens on TCP port {}", address.port());
    assert!(text.contains(&port) && text.contains("trsvcid"), "{text}");
}

#[test]
fn a_peer_that_never_answers() {
    let error = error_with("", |mut socket| drop(wait_for_the_end(&mut socket)));
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("TCP port"), "{error}");
}

#[test]
fn a_peer_that_speaks_something_else() {
    let error = error_with("", |mut socket| {
        let _ = socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        let _ = wait_for_the_end(&mut socket);
    })
    .to_string();
    assert!(error.contains("does not speak NVMe/TCP"), "{error}");
}

#[test]
fn a_peer_that_closes_during_set_up() {
    for bytes in [0, 1, 100] {
        let error = error_with("", move |mut socket| {
            let mut request = [0; 128];
            socket.read_exact(&mut request).unwrap();
            let response = IcResp {
                cpda: Alignment::DWORD,
                digests: Digests::empty(),
                maxh2cdata: 4096,
            };
            socket.write_all(&response.emit()[..bytes]).unwrap();
        });
        assert!(matches!(error, Error::Refused { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("ended the connection during"), "{text}");
    }
}

#[test]
fn digests_that_the_target_does_not_have() {
    for (word, granted) in [
        ("hdr_digest", Digests::empty()),
        ("hdr_digest", Digests::DATA),
        ("data_digest", Digests::HEADER),
    ] {
        let more = match granted {
            Digests::DATA | Digests::HEADER => "hdr_digest=1 data_digest=1",
            _ => "hdr_digest=1",
        };
        let error = error_with(more, move |mut socket| {
            set_up(&mut socket, granted);
            let _ = wait_for_the_end(&mut socket);
        })
        .to_string();
        let advice = format!("connect without {word}");
        assert!(error.contains(&advice), "{error}");
    }
    // One that nobody asked for.
    let error = error_with("", |mut socket| {
        set_up(&mut socket, Digests::DATA);
        let _ = wait_for_the_end(&mut socket);
    })
    .to_string();
    assert!(error.contains("does not speak NVMe/TCP"), "{error}");
}

#[test]
fn a_command_that_is_never_answered() {
    let error = error_with("", |mut socket| {
        set_up(&mut socket, Digests::empty());
        take_connect(&mut socket);
        assert_eq!(wait_for_the_end(&mut socket), [], "the host closes");
    });
    assert!(
        matches!(
            error,
            Error::TimedOut {
                command: "Connect",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_peer_that_closes_in_the_middle_of_a_pdu() {
    let error = error_with("", |mut socket| {
        set_up(&mut socket, Digests::empty());
        take_connect(&mut socket);
        let mut head = [0; HEAD_MAX];
        let len = Framing::default().capsule_resp(&Cqe::success(Cid::new(0)), &mut head);
        for byte in &head[..len - 1] {
            socket.write_all(&[*byte]).unwrap();
        }
    });
    assert!(
        matches!(error, Error::Lost(LostReason::PeerClosed)),
        "{error}"
    );
}

#[test]
fn a_peer_that_terminates_the_connection() {
    let error = error_with("", |mut socket| {
        set_up(&mut socket, Digests::empty());
        take_connect(&mut socket);
        let mut term = [0; TERM_MAX];
        let len = Stream::new(End::Controller).term_req(WireError::Sequence, &mut term);
        socket.write_all(&term[..len]).unwrap();
        assert_eq!(wait_for_the_end(&mut socket), [], "no answer to a TermReq");
    });
    assert!(
        matches!(error, Error::Lost(LostReason::PeerClosed)),
        "{error}"
    );
}

#[test]
fn a_peer_that_breaks_the_protocol_is_told() {
    let error = error_with("hdr_digest=1", |mut socket| {
        set_up(&mut socket, Digests::HEADER);
        let mut capsule = [0; 76 + 1024];
        socket.read_exact(&mut capsule).unwrap();
        let framing = Framing {
            digests: Digests::HEADER,
            ..Framing::default()
        };
        let mut head = [0; HEAD_MAX];
        let len = framing.capsule_resp(&Cqe::success(Cid::new(0)), &mut head);
        // A flipped bit in the header.
        head[10] ^= 4;
        socket.write_all(&head[..len]).unwrap();
        let told = wait_for_the_end(&mut socket);
        let mut stream = Stream::new(End::Controller);
        stream.establish(Established::default());
        let term = format!("{:?}", stream.next(&mut &told[..]));
        assert!(term.contains("HeaderDigestError"), "{term}");
    });
    assert!(
        matches!(error, Error::Lost(LostReason::Protocol)),
        "{error}"
    );
}

#[test]
fn options_of_the_other_transport_are_named() {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    for (more, name) in [
        ("digest=none", "digest"),
        ("engine=thread", "engine"),
        ("tx=copy", "tx"),
        ("rx=ring", "rx"),
        ("mtu=4096", "mtu"),
        ("fault=loss=0.1", "fault"),
        ("capture=/nowhere/x.pcapng", "capture"),
    ] {
        let error = error_of(address, more);
        assert!(
            matches!(&error, Error::Option { name: found, .. } if found == name),
            "{error}"
        );
    }
    let mut flexins = options(address, "hdr_digest=1");
    flexins.target.trtype = flexblk_initiator::TrType::Flexins;
    let error = discover(&flexins).unwrap_err().to_string();
    assert!(
        error.contains("hdr_digest") && error.contains("tcp"),
        "{error}"
    );
}
