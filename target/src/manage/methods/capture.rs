//! Packet captures at run time.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde_json::json;

use super::super::params::Params;
use super::{Context, Method, Result, RpcError, query};
use crate::captures::{CaptureError, CaptureRequest};

/// Of each file, unless the caller says otherwise.
const LIMIT_BYTES: u64 = 1 << 30;

pub(super) const METHODS: &[Method] = &[
    // Nothing that the state file keeps.
    query("flexblk_start_capture", start),
    query("flexblk_stop_capture", stop),
];

/// Writes the packets of FlexiNS to pcapng files, one for each data thread.
fn start(context: &Context, mut params: Params) -> Result {
    let file: String = params.required("file")?;
    let limit_bytes: Option<u64> = params.optional("limit_bytes")?;
    let peer: Option<String> = params.optional("peer")?;
    let peer = match peer {
        Some(text) => match (text.parse::<SocketAddr>(), text.parse::<IpAddr>()) {
            (Ok(address), _) => Some((address.ip(), Some(address.port()))),
            (_, Ok(ip)) => Some((ip, None)),
            _ => {
                let wanted = "an address of a host, with or without its UDP port";
                return Err(params.wrong("peer", wanted, &text.into()));
            }
        },
        None => None,
    };
    let request = CaptureRequest {
        file: PathBuf::from(file),
        limit_bytes: limit_bytes.unwrap_or(LIMIT_BYTES),
        peer,
    };
    params.end()?;
    let files = context.target.start_capture(&request).map_err(refused)?;
    Ok(json!({ "files": files }))
}

/// Ends the capture, and says what it has recorded.
fn stop(context: &Context, params: Params) -> Result {
    params.end()?;
    let report = context.target.stop_capture().map_err(refused)?;
    Ok(json!({
        "files": report.files,
        "recorded": report.recorded,
        "not_recorded": report.not_recorded,
    }))
}

fn refused(error: CaptureError) -> RpcError {
    let errno = match &error {
        CaptureError::Running(_) => libc::EALREADY,
        CaptureError::NotRunning => libc::ENOENT,
        CaptureError::File { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
    };
    RpcError::errno(errno, error)
}
