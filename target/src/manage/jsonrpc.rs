//! JSON-RPC 2.0: requests, batches, answers, and the error codes that SPDK gives.

use flexblk_blockdev::Error as DeviceError;
use serde_json::{Map, Value, json};

use crate::error::NamespaceError;

/// Most requests of one batch.
const MAX_BATCH: usize = 4096;

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RpcError {
    pub(crate) code: i64,
    pub(crate) message: String,
}

impl RpcError {
    fn new(code: i64, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// -32700: not JSON.
    pub(crate) fn parse(what: impl std::fmt::Display) -> Self {
        Self::new(-32700, format!("Parse error: {what}"))
    }

    /// -32600: JSON, but no request.
    pub(crate) fn request(what: impl std::fmt::Display) -> Self {
        Self::new(-32600, format!("Invalid Request: {what}"))
    }

    /// -32601.
    pub(crate) fn method(name: &str) -> Self {
        Self::new(
            -32601,
            format!("Method not found: {name} (rpc_get_methods lists them)"),
        )
    }

    /// -32602.
    pub(crate) fn params(what: impl std::fmt::Display) -> Self {
        Self::new(-32602, format!("Invalid parameters: {what}"))
    }

    /// -32603: asked rightly, and failed.
    pub(crate) fn internal(what: impl std::fmt::Display) -> Self {
        Self::new(-32603, what.to_string())
    }

    /// A negative errno, as SPDK's bdev methods have it.
    pub(crate) fn errno(errno: i32, what: impl std::fmt::Display) -> Self {
        Self::new(-i64::from(errno), what.to_string())
    }

    /// Of an nvmf method.
    pub(crate) fn nvmf(error: &NamespaceError) -> Self {
        match error {
            NamespaceError::Device(device) => Self::errno(errno_of(device), device),
            NamespaceError::SubsystemExists(_) | NamespaceError::TooManySubsystems => {
                Self::internal(error)
            }
            error => Self::params(error),
        }
    }

    /// Of a bdev method.
    pub(crate) fn bdev(error: &NamespaceError) -> Self {
        let errno = match error {
            NamespaceError::Device(device) => errno_of(device),
            NamespaceError::NoBdev(_) => libc::ENODEV,
            NamespaceError::BdevExists(_) => libc::EEXIST,
            NamespaceError::BdevInUse { .. } => libc::EBUSY,
            NamespaceError::TooManyBdevs => libc::ENOSPC,
            error => return Self::nvmf(error),
        };
        Self::errno(errno, error)
    }
}

fn errno_of(error: &DeviceError) -> i32 {
    match error {
        DeviceError::Missing { .. } => libc::ENOENT,
        DeviceError::Permission { .. } => libc::EACCES,
        DeviceError::InUse { .. } => libc::EBUSY,
        DeviceError::NoBase { .. } => libc::ENODEV,
        DeviceError::Duplicate { .. } => libc::EEXIST,
        _ => libc::EINVAL,
    }
}

/// One request.
#[derive(Debug)]
pub(crate) struct Call {
    /// `None` is a notification: it is done and not answered.
    pub(crate) id: Option<Value>,
    /// What to do, or why it is no request.
    pub(crate) what: Result<(String, Option<Value>), RpcError>,
}

/// What a client has sent in one piece.
#[derive(Debug)]
pub(crate) struct Calls {
    pub(crate) calls: Vec<Call>,
    pub(crate) is_batch: bool,
}

impl Calls {
    /// Reads one piece. An error when it is not JSON, or an empty or too long batch.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, RpcError> {
        let value: Value = serde_json::from_slice(bytes).map_err(RpcError::parse)?;
        match value {
            Value::Array(calls) if calls.is_empty() => Err(RpcError::request("an empty batch")),
            Value::Array(calls) if calls.len() > MAX_BATCH => {
                let what = format!("a batch has at most {MAX_BATCH} requests");
                Err(RpcError::request(what))
            }
            Value::Array(calls) => Ok(Self {
                calls: calls.into_iter().map(Call::parse).collect(),
                is_batch: true,
            }),
            value => Ok(Self {
                calls: vec![Call::parse(value)],
                is_batch: false,
            }),
        }
    }
}

impl Call {
    fn parse(value: Value) -> Self {
        let refused = |what: &str| Self {
            id: Some(Value::Null),
            what: Err(RpcError::request(what)),
        };
        let Value::Object(mut members) = value else {
            return refused("not an object");
        };
        let id = match members.remove("id") {
            Some(id @ (Value::String(_) | Value::Number(_) | Value::Null)) => Some(id),
            Some(_) => return refused("`id` is a string or a number"),
            None => None,
        };
        let refuse = |what: &str| Self {
            id: Some(id.clone().unwrap_or(Value::Null)),
            what: Err(RpcError::request(what)),
        };
        if members
            .remove("jsonrpc")
            .is_some_and(|version| version != "2.0")
        {
            return refuse("`jsonrpc` is \"2.0\"");
        }
        let Some(Value::String(method)) = members.remove("method") else {
            return refuse("`method` is missing or no string");
        };
        let params = match members.remove("params") {
            None | Some(Value::Null) => None,
            Some(params @ (Value::Object(_) | Value::Array(_))) => Some(params),
            Some(_) => return refuse("`params` is an object"),
        };
        if let Some(key) = members.keys().next() {
            return refuse(&format!("unknown member `{key}`"));
        }
        Self {
            id,
            what: Ok((method, params)),
        }
    }
}

/// An answer.
pub(crate) fn answer(id: &Value, result: Result<Value, RpcError>) -> Value {
    let mut members = Map::new();
    members.insert("jsonrpc".to_owned(), "2.0".into());
    members.insert("id".to_owned(), id.clone());
    match result {
        Ok(result) => members.insert("result".to_owned(), result),
        Err(error) => members.insert(
            "error".to_owned(),
            json!({ "code": error.code, "message": error.message }),
        ),
    };
    Value::Object(members)
}

/// As bytes for the client, with SPDK's newline at the end.
pub(crate) fn to_bytes(value: &Value) -> Vec<u8> {
    let mut bytes = value.to_string().into_bytes();
    bytes.push(b'\n');
    bytes
}
