//! The HTTP server that metrics are scraped from: GET /metrics, nothing else, one request for each
//! connection.

use std::sync::Arc;

use super::openmetrics;
use super::server::{Lane, Next, Protocol, Ready, Reply};
use crate::target::Target;

/// Longest head of a request.
pub(super) const MAX_HEAD_BYTES: usize = 8 << 10;
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The protocol.
pub(crate) struct Http {
    pub(crate) target: Arc<Target>,
}

/// What is asked for.
pub(crate) struct Scrape {
    /// Without the text.
    head_only: bool,
}

impl Protocol for Http {
    type Framing = ();
    type Request = Scrape;

    fn next(&self, (): &mut (), input: &mut Vec<u8>) -> Next<Scrape> {
        if !input.windows(4).any(|end| end == b"\r\n\r\n") {
            return match input.len() < MAX_HEAD_BYTES {
                true => Next::More,
                false => Next::Refuse(answer(
                    "431 Request Header Fields Too Large",
                    "",
                    b"",
                    false,
                )),
            };
        }
        let head = core::mem::take(input);
        let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
        let mut words = line.split(|byte| *byte == b' ');
        let (method, path, version) = (words.next(), words.next(), words.next());
        let refuse =
            |status: &str| Next::Refuse(answer(status, "text/plain", status.as_bytes(), false));
        if !version.is_some_and(|version| version.starts_with(b"HTTP/1.")) {
            return refuse("400 Bad Request");
        }
        let head_only = match method {
            Some(b"GET") => false,
            Some(b"HEAD") => true,
            _ => return refuse("405 Method Not Allowed"),
        };
        let path = path.unwrap_or_default();
        if path.split(|byte| *byte == b'?').next() != Some(b"/metrics") {
            return refuse("404 Not Found");
        }
        Next::Request(Ready {
            request: Scrape { head_only },
            lane: Lane::Query,
            late: answer("503 Service Unavailable", "text/plain", b"too slow", false),
        })
    }

    fn run(&self, request: Scrape) -> Reply {
        let bytes = match openmetrics::text(&self.target) {
            Ok(text) => answer("200 OK", OPENMETRICS, text.as_bytes(), request.head_only),
            Err(_) => answer("500 Internal Server Error", "text/plain", b"", false),
        };
        Reply { bytes, close: true }
    }
}

fn answer(status: &str, kind: &str, body: &[u8], head_only: bool) -> Vec<u8> {
    let mut bytes = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    )
    .into_bytes();
    if !head_only {
        bytes.extend_from_slice(body);
    }
    bytes
}
