//! A client of a target's management socket: JSON-RPC 2.0, a Unix socket, no framing.
//!
//! ```no_run
//! # fn main() -> Result<(), flexblk_rpc::RpcError> {
//! let path = std::path::Path::new(flexblk_rpc::DEFAULT_SOCKET);
//! let mut client = flexblk_rpc::RpcClient::connect(path)?;
//! let bdevs = client.call("bdev_get_bdevs", serde_json::json!({}))?;
//! # Ok(()) }
//! ```

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

/// Where a target's socket is unless it was told otherwise.
pub const DEFAULT_SOCKET: &str = "/var/tmp/flexblk.sock";

/// How long an answer may take: longer than a target lets a request run.
const TIME: Duration = Duration::from_secs(45);
/// Longest answer.
const MAX_ANSWER_BYTES: usize = 64 << 20;
/// Bytes of one read.
const READ_BYTES: usize = 16 << 10;

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    /// Nobody answers there.
    #[error("no target answers at {} ({source}); give its RPC socket with --rpc-socket", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The connection failed, or the answer took too long.
    #[error("the target at {}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The target closed the connection, or what it sent is no answer.
    #[error("the target at {} has given no whole answer", path.display())]
    NoAnswer {
        /// The socket.
        path: PathBuf,
    },
    /// The target refuses.
    #[error("{message}")]
    Refused {
        /// JSON-RPC's code, or a negative errno.
        code: i64,
        /// Why, and what to do.
        message: String,
    },
}

/// A connection.
#[derive(Debug)]
pub struct RpcClient {
    path: PathBuf,
    socket: UnixStream,
    /// What has been read of the answer.
    kept: Vec<u8>,
}

impl RpcClient {
    /// Connects to a target's socket.
    pub fn connect(path: &Path) -> Result<Self, RpcError> {
        let failed = |source| RpcError::Connect {
            path: path.to_owned(),
            source,
        };
        let socket = UnixStream::connect(path).map_err(failed)?;
        socket.set_read_timeout(Some(TIME)).map_err(failed)?;
        socket.set_write_timeout(Some(TIME)).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            socket,
            kept: Vec::new(),
        })
    }

    /// Calls a method and waits for its result.
    ///
    /// After any error but [`RpcError::Refused`] the connection is of no more use.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value, RpcError> {
        let request = json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params });
        let sent = self.socket.write_all(request.to_string().as_bytes());
        sent.map_err(|source| self.io(source))?;
        let mut answer = self.answer()?;
        if let Some(error) = answer.get("error") {
            let message = error.get("message").and_then(Value::as_str);
            return Err(RpcError::Refused {
                code: error.get("code").and_then(Value::as_i64).unwrap_or(0),
                message: message.unwrap_or("the target gives no reason").to_owned(),
            });
        }
        let result = answer.get_mut("result").map(Value::take);
        result.ok_or_else(|| self.no_answer())
    }

    /// An answer ends with a newline, and has no other.
    fn answer(&mut self) -> Result<Value, RpcError> {
        self.kept.clear();
        let mut more = [0; READ_BYTES];
        while self.kept.last() != Some(&b'\n') {
            let read = self.socket.read(&mut more);
            let len = read.map_err(|source| self.io(source))?;
            if len == 0 || self.kept.len() > MAX_ANSWER_BYTES {
                return Err(self.no_answer());
            }
            self.kept
                .extend_from_slice(more.get(..len).unwrap_or_default());
        }
        serde_json::from_slice(&self.kept).map_err(|_| self.no_answer())
    }

    fn io(&self, source: io::Error) -> RpcError {
        RpcError::Io {
            path: self.path.clone(),
            source,
        }
    }

    fn no_answer(&self) -> RpcError {
        RpcError::NoAnswer {
            path: self.path.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A target that gives these answers, one for each request, in pieces.
    fn serve(answers: &'static [&'static str]) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("rpc.sock");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            for answer in answers {
                let mut request = [0; 4096];
                let len = socket.read(&mut request).unwrap();
                let request: Value = serde_json::from_slice(&request[..len]).unwrap();
                assert_eq!(request["params"], json!({ "a": 1 }));
                for piece in answer.as_bytes().chunks(7) {
                    socket.write_all(piece).unwrap();
                }
            }
        });
        (directory, path)
    }

    #[test]
    fn answers_become_results_and_errors() {
        let (_directory, path) = serve(&[
            "{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{\"x\":[1,2,3]}}\n",
            "{\"jsonrpc\":\"2.0\",\"id\":1,\"error\":{\"code\":-19,\"message\":\"no device\"}}\n",
            "{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":null}\n",
            "what\n",
        ]);
        let mut client = RpcClient::connect(&path).unwrap();
        let mut call = || client.call("m", json!({ "a": 1 }));
        assert_eq!(call().unwrap(), json!({ "x": [1, 2, 3] }));
        let refused = call().unwrap_err();
        assert!(matches!(refused, RpcError::Refused { code: -19, .. }));
        assert_eq!(refused.to_string(), "no device");
        assert_eq!(call().unwrap(), Value::Null);
        assert!(matches!(call(), Err(RpcError::NoAnswer { .. })));
    }

    #[test]
    fn whoever_is_not_there_is_named() {
        let error = RpcClient::connect(Path::new("/nowhere/rpc.sock")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/rpc.sock"), "{error}");
        assert!(error.to_string().contains("--rpc-socket"), "{error}");
    }
}
