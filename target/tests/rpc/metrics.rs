//! Metrics over HTTP.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use flexblk_target::manage::{Management, Options};

use crate::world::World;

/// Metrics are served to whoever asks properly; who does not is told so and holds nothing up.
#[test]
fn metrics_are_served_to_any_client() {
    use std::net::{SocketAddr, TcpStream};
    let world = World::new();
    let options = Options {
        metrics: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
        ..Options::default()
    };
    let management = Management::start(&world.target, options).unwrap();
    let address = management.metrics_address().unwrap();
    let connect = || {
        let socket = TcpStream::connect(address).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        socket
    };
    let ask = |text: &[u8]| {
        let mut socket = connect();
        socket.write_all(text).unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        answer
    };
    // Nothing said, half a request, and a megabyte without an end.
    let _silent: Vec<TcpStream> = (0..50).map(|_| connect()).collect();
    let mut half = connect();
    half.write_all(b"GET /metr").unwrap();
    let mut endless = connect();
    let _ = endless.write_all(&vec![b'x'; 1 << 20]);

    let answer = ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(
        head.contains("application/openmetrics-text; version=1.0.0"),
        "{head}"
    );
    assert!(
        head.contains(&format!("Content-Length: {}", body.len())),
        "{head}"
    );
    assert!(body.ends_with("# EOF\n"), "{body}");
    assert!(body.contains("flexblk_controllers 0\n"), "{body}");
    let turns = "flexblk_reactor_total{thread=\"data-0\",counter=\"turns\"} ";
    assert!(body.contains(turns), "{body}");
    let head_only = ask(b"HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(head_only.ends_with("\r\n\r\n"), "{head_only}");
    for (text, status) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"hello\r\n\r\n", "400"),
        (b"\r\n\r\n", "400"),
        (&[b'x'; 8192], "431"),
    ] {
        let answer = ask(text);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
    }
    // The address is taken: said in one line that names it.
    let options = Options {
        metrics: Some(address),
        ..Options::default()
    };
    let taken = Management::start(&world.target, options).unwrap_err();
    assert!(taken.to_string().contains(&address.to_string()), "{taken}");
}
