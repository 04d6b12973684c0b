//! JSON-RPC on the server: which method, in which lane, one after the other in a batch.

use serde_json::Value;

use super::framing::{Frame, JsonFraming};
use super::jsonrpc::{Call, Calls, RpcError, answer, to_bytes};
use super::methods::{self, Context};
use super::params::Params;
use super::server::{Lane, Next, Protocol, Ready, Reply};
use super::state_file;

/// The protocol.
pub(crate) struct Rpc {
    context: Context,
    max_request_bytes: usize,
}

impl Rpc {
    pub(crate) fn new(context: Context, max_request_bytes: usize) -> Self {
        Self {
            context,
            max_request_bytes,
        }
    }

    fn call(&self, method: &str, params: Option<Value>) -> Result<Value, RpcError> {
        let found = methods::find(method).ok_or_else(|| RpcError::method(method))?;
        let result = (found.run)(&self.context, Params::new(params)?);
        match &result {
            Ok(_) if found.lane == Lane::Change => tracing::info!(method, "rpc"),
            Ok(_) => tracing::debug!(method, "rpc"),
            Err(error) => tracing::info!(method, error = error.message, "rpc refused"),
        }
        if result.is_ok() && found.lane == Lane::Change {
            self.save_state()?;
        }
        result
    }

    /// Keeps what runs now. Whoever asked for the change must know when it would not survive.
    fn save_state(&self) -> Result<(), RpcError> {
        let Some(path) = &self.context.state_file else {
            return Ok(());
        };
        state_file::save(&self.context.target, path).map_err(|error| {
            let what = format!(
                "it is done, but the state file {} could not be written, so it will not survive a \
                 restart: {error}",
                path.display()
            );
            tracing::error!("{what}");
            RpcError::errno(libc::EIO, what)
        })
    }
}

impl Protocol for Rpc {
    type Framing = JsonFraming;
    type Request = Calls;

    fn next(&self, framing: &mut JsonFraming, input: &mut Vec<u8>) -> Next<Calls> {
        let parsed = match framing.take(input, self.max_request_bytes) {
            Frame::More => return Next::More,
            Frame::Broken(why) => Err(RpcError::parse(why)),
            Frame::Value(bytes) => Calls::parse(&bytes),
        };
        match parsed {
            Ok(calls) => {
                let late = answers(&calls, calls.calls.iter().map(late));
                Next::Request(Ready {
                    lane: lane(&calls),
                    late,
                    request: calls,
                })
            }
            Err(error) => Next::Refuse(to_bytes(&answer(&Value::Null, Err(error)))),
        }
    }

    fn run(&self, request: Calls) -> Reply {
        let is_batch = request.is_batch;
        let mut results = Vec::with_capacity(request.calls.len());
        for call in request.calls {
            let result = match call.what {
                Ok((method, params)) => self.call(&method, params),
                Err(error) => Err(error),
            };
            results.extend(call.id.map(|id| answer(&id, result)));
        }
        Reply {
            bytes: joined(is_batch, results),
            close: false,
        }
    }
}

/// A batch goes to the changes when one of its requests does, so that it runs in its order.
fn lane(calls: &Calls) -> Lane {
    let changes = |call: &Call| match &call.what {
        Ok((method, _)) => methods::find(method).is_some_and(|found| found.lane == Lane::Change),
        Err(_) => false,
    };
    match calls.calls.iter().any(changes) {
        true => Lane::Change,
        false => Lane::Query,
    }
}

fn late(_: &Call) -> Result<Value, RpcError> {
    let what = "it takes longer than the server waits; if it was already under way it goes on, \
                so look at the state before trying again";
    Err(RpcError::errno(libc::ETIMEDOUT, what))
}

fn answers(calls: &Calls, results: impl Iterator<Item = Result<Value, RpcError>>) -> Vec<u8> {
    let answered = calls.calls.iter().zip(results);
    let values = answered.filter_map(|(call, result)| Some(answer(call.id.as_ref()?, result)));
    joined(calls.is_batch, values.collect())
}

/// Nothing at all when every request was a notification.
fn joined(is_batch: bool, mut values: Vec<Value>) -> Vec<u8> {
    match (is_batch, values.pop()) {
        (_, None) => Vec::new(),
        (false, Some(value)) => to_bytes(&value),
        (true, Some(value)) => {
            values.push(value);
            to_bytes(&Value::Array(values))
        }
    }
}
