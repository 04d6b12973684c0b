//! A client of the RPC socket, for the daemon's own commands.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// How long an answer may take: longer than the server lets a request run.
const TIME: Duration = Duration::from_secs(45);
/// Longest answer.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// Calls one method. The error is one line for people.
pub fn call(socket: &Path, method: &str, params: Value) -> Result<Value, String> {
    let failed = |error: std::io::Error| format!("the target at {}: {error}", socket.display());
    let mut stream = UnixStream::connect(socket).map_err(|error| {
        format!(
            "no target answers at {} ({error}); give its RPC socket with --rpc-socket",
            socket.display()
        )
    })?;
    stream.set_read_timeout(Some(TIME)).map_err(failed)?;
    stream.set_write_timeout(Some(TIME)).map_err(failed)?;
    let request = json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params });
    stream
        .write_all(request.to_string().as_bytes())
        .map_err(failed)?;
    let mut bytes = Vec::new();
    let mut more = [0; 16 << 10];
    // Answers end with a newline, and have no other.
    while bytes.last() != Some(&b'\n') {
        let len = stream.read(&mut more).map_err(failed)?;
        if len == 0 || bytes.len() > MAX_ANSWER_BYTES {
            return Err(format!(
                "the target at {} has given no whole answer",
                socket.display()
            ));
        }
        bytes.extend_from_slice(more.get(..len).unwrap_or_default());
    }
    let mut answer: Value = serde_json::from_slice(&bytes).map_err(|error| error.to_string())?;
    if let Some(message) = answer.pointer("/error/message").and_then(Value::as_str) {
        return Err(message.to_owned());
    }
    Ok(answer
        .get_mut("result")
        .map(Value::take)
        .unwrap_or_default())
}
