//! A client of a target's RPC socket.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// A connection.
pub struct Rpc {
    socket: UnixStream,
    kept: Vec<u8>,
}

impl Rpc {
    /// Connects.
    pub fn connect(path: &Path) -> Result<Rpc> {
        let socket =
            UnixStream::connect(path).with_context(|| format!("connect {}", path.display()))?;
        socket.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(Rpc {
            socket,
            kept: Vec::new(),
        })
    }

    /// Calls a method; an error when the target gives one.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        let request = json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params });
        self.socket.write_all(request.to_string().as_bytes())?;
        loop {
            let mut stream = serde_json::Deserializer::from_slice(&self.kept).into_iter::<Value>();
            if let Some(Ok(answer)) = stream.next() {
                let end = stream.byte_offset();
                self.kept.drain(..end);
                if let Some(error) = answer.get("error") {
                    bail!("{method}: {error}");
                }
                return answer.get("result").cloned().context("no result");
            }
            let mut more = [0; 16 << 10];
            let len = self.socket.read(&mut more)?;
            if len == 0 {
                bail!("{method}: the target has closed the connection");
            }
            self.kept
                .extend_from_slice(more.get(..len).unwrap_or_default());
        }
    }
}
