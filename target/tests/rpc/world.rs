//! A target with its RPC socket, and a client of it.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flexblk_target::Target;
use flexblk_target::config::Config;
use flexblk_target::manage::{LogControl, LogLevel, Management, Options};
use serde_json::{Value, json};

pub(crate) const NQN: &str = "nqn.2026-11.test:rpc";

/// A target without anything, its socket, and what it was told.
pub(crate) struct World {
    pub(crate) target: Arc<Target>,
    pub(crate) management: Management,
    pub(crate) filters: Arc<Mutex<Vec<String>>>,
    pub(crate) signals: Arc<Mutex<Vec<i32>>>,
    pub(crate) directory: tempfile::TempDir,
}

impl World {
    pub(crate) fn new() -> Self {
        let mut config = Config::default();
        config.listener.udp_port = UdpSocket::bind("127.0.0.1:0")
            .and_then(|socket| socket.local_addr())
            .unwrap()
            .port();
        let target = Arc::new(Target::start(config).unwrap());
        let directory = tempfile::tempdir().unwrap();
        let (filters, signals) = (Arc::default(), Arc::default());
        let options = options(&socket_in(directory.path()), &filters, &signals);
        let management = Management::start(&target, options).unwrap();
        Self {
            target,
            management,
            filters,
            signals,
            directory,
        }
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.management.rpc_socket().unwrap())
    }
}

pub(crate) fn socket_in(directory: &Path) -> PathBuf {
    directory.join("rpc.sock")
}

pub(crate) fn options(
    socket: &Path,
    filters: &Arc<Mutex<Vec<String>>>,
    signals: &Arc<Mutex<Vec<i32>>>,
) -> Options {
    let (filters, signals) = (Arc::clone(filters), Arc::clone(signals));
    Options {
        rpc_socket: Some(socket.to_owned()),
        log: Some(Arc::new(LogControl::new(LogLevel::Info, move |filter| {
            filters.lock().unwrap().push(filter.to_owned());
            Ok(())
        }))),
        signal: Some(Box::new(move |signal| signals.lock().unwrap().push(signal))),
        ..Options::default()
    }
}

pub(crate) struct Client {
    pub(crate) socket: UnixStream,
    pub(crate) kept: Vec<u8>,
    pub(crate) called: BTreeSet<String>,
}

impl Client {
    pub(crate) fn new(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Self {
            socket,
            kept: Vec::new(),
            called: BTreeSet::new(),
        }
    }

    pub(crate) fn send(&mut self, text: &str) {
        self.socket.write_all(text.as_bytes()).unwrap();
    }

    /// The next answer; `None` when the server has closed.
    pub(crate) fn read(&mut self) -> Option<Value> {
        loop {
            let mut stream = serde_json::Deserializer::from_slice(&self.kept).into_iter();
            if let Some(Ok(value)) = stream.next() {
                let end = stream.byte_offset();
                self.kept.drain(..end);
                return Some(value);
            }
            let mut more = [0; 4096];
            let len = self.socket.read(&mut more).expect("an answer in time");
            if len == 0 {
                return None;
            }
            self.kept.extend_from_slice(&more[..len]);
        }
    }

    pub(crate) fn ask(&mut self, text: &str) -> Value {
        self.send(text);
        self.read().expect("an answer")
    }

    pub(crate) fn call(&mut self, method: &str, params: Value) -> Value {
        self.called.insert(method.to_owned());
        let request = json!({ "jsonrpc": "2.0", "id": 7, "method": method, "params": params });
        let answer = self.ask(&request.to_string());
        assert_eq!(
            (&answer["jsonrpc"], &answer["id"]),
            (&json!("2.0"), &json!(7))
        );
        answer
    }

    pub(crate) fn ok(&mut self, method: &str, params: Value) -> Value {
        let answer = self.call(method, params);
        assert!(answer.get("error").is_none(), "{method}: {answer}");
        answer["result"].clone()
    }

    pub(crate) fn refused(&mut self, method: &str, params: Value, code: i64, wanted: &str) {
        let answer = self.call(method, params);
        let error = &answer["error"];
        assert_eq!(error["code"], code, "{method}: {answer}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(wanted), "{method}: {message}");
    }
}
