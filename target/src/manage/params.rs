//! A method's parameters: taken out by name and type, and whatever is left over is an error that
//! names it.

use flexblk_nvme::{Nqn, Nsid};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::jsonrpc::RpcError;
use crate::config;

/// Parameters that are still to be taken.
#[derive(Debug)]
pub(crate) struct Params {
    members: Map<String, Value>,
    /// `address.` in an object called `address`.
    prefix: String,
    known: Vec<&'static str>,
}

/// A type of parameter.
pub(crate) trait Param: Sized {
    /// What it must be, for the error.
    const WHAT: &'static str;
    /// Reads it.
    fn read(value: &Value) -> Option<Self>;
}

impl Param for String {
    const WHAT: &'static str = "a string";
    fn read(value: &Value) -> Option<Self> {
        value.as_str().map(str::to_owned)
    }
}

impl Param for bool {
    const WHAT: &'static str = "true or false";
    fn read(value: &Value) -> Option<Self> {
        value.as_bool()
    }
}

impl Param for u64 {
    const WHAT: &'static str = "a number of at most 64 bits";
    fn read(value: &Value) -> Option<Self> {
        value.as_u64()
    }
}

impl Param for u32 {
    const WHAT: &'static str = "a number of at most 32 bits";
    fn read(value: &Value) -> Option<Self> {
        value.as_u64()?.try_into().ok()
    }
}

impl Param for i32 {
    const WHAT: &'static str = "a number of 32 bits";
    fn read(value: &Value) -> Option<Self> {
        value.as_i64()?.try_into().ok()
    }
}

impl Param for Uuid {
    const WHAT: &'static str = "a UUID";
    fn read(value: &Value) -> Option<Self> {
        value.as_str()?.parse().ok()
    }
}

impl Param for Nsid {
    const WHAT: &'static str = "a namespace identifier, 1 to 1024";
    fn read(value: &Value) -> Option<Self> {
        let number = u32::read(value)?;
        (1..=config::MAX_NSID)
            .contains(&number)
            .then(|| Self::new(number))
    }
}

impl Param for Nqn {
    const WHAT: &'static str = "an NQN";
    fn read(value: &Value) -> Option<Self> {
        Self::opaque(value.as_str()?).ok()
    }
}

impl Param for Value {
    const WHAT: &'static str = "a value";
    fn read(value: &Value) -> Option<Self> {
        Some(value.clone())
    }
}

impl<T: Param> Param for Vec<T> {
    const WHAT: &'static str = "an array";
    fn read(value: &Value) -> Option<Self> {
        value.as_array()?.iter().map(T::read).collect()
    }
}

impl Params {
    /// A request's; none are the same as an empty object.
    pub(crate) fn new(params: Option<Value>) -> Result<Self, RpcError> {
        match params {
            None => Ok(Self::of(Map::new(), String::new())),
            Some(Value::Object(members)) => Ok(Self::of(members, String::new())),
            Some(_) => Err(RpcError::params("they are an object, each with its name")),
        }
    }

    fn of(members: Map<String, Value>, prefix: String) -> Self {
        Self {
            members,
            prefix,
            known: Vec::new(),
        }
    }

    /// A parameter that may be left out, or be null.
    pub(crate) fn optional<T: Param>(&mut self, key: &'static str) -> Result<Option<T>, RpcError> {
        self.known.push(key);
        match self.members.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match T::read(&value) {
                Some(read) => Ok(Some(read)),
                None => Err(self.wrong(key, T::WHAT, &value)),
            },
        }
    }

    /// A parameter that must be there.
    pub(crate) fn required<T: Param>(&mut self, key: &'static str) -> Result<T, RpcError> {
        let missing = format!("`{}{key}` is missing", self.prefix);
        self.optional(key)?.ok_or_else(|| RpcError::params(missing))
    }

    /// An object of parameters.
    pub(crate) fn object(&mut self, key: &'static str) -> Result<Option<Self>, RpcError> {
        self.known.push(key);
        let prefix = format!("{}{key}.", self.prefix);
        match self.members.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(members)) => Ok(Some(Self::of(members, prefix))),
            Some(value) => Err(self.wrong(key, "an object", &value)),
        }
    }

    /// Parameters that are taken when they ask for what is so anyway. `why` says what is so.
    pub(crate) fn only(
        &mut self,
        expected: &[(&'static str, Value)],
        why: &str,
    ) -> Result<(), RpcError> {
        for (key, value) in expected {
            let key: &'static str = key;
            if let Some(given) = self.optional::<Value>(key)?
                && given != *value
            {
                let what = format!("`{}{key}` = {given} is not possible: {why}", self.prefix);
                return Err(RpcError::params(what));
            }
        }
        Ok(())
    }

    /// Parameters of SPDK's that nothing can be asked for with here. `why` says what is so instead.
    pub(crate) fn none(&mut self, keys: &[&'static str], why: &str) -> Result<(), RpcError> {
        for key in keys.iter().copied() {
            if self.optional::<Value>(key)?.is_some() {
                let what = format!("`{}{key}` cannot be set here: {why}", self.prefix);
                return Err(RpcError::params(what));
            }
        }
        Ok(())
    }

    /// All of them, for a method that reads them itself.
    pub(crate) fn into_value(self) -> Value {
        Value::Object(self.members)
    }

    /// Name of SPDK's target; there is only one here.
    pub(crate) fn target_name(&mut self) -> Result<(), RpcError> {
        match self.optional::<String>("tgt_name")?.as_deref() {
            None | Some("nvmf_tgt") => Ok(()),
            Some(name) => Err(RpcError::params(format!(
                "there is no target `{name}`, only `nvmf_tgt`"
            ))),
        }
    }

    /// That was all: anything left over is unknown.
    pub(crate) fn end(self) -> Result<(), RpcError> {
        let Some(key) = self.members.keys().next() else {
            return Ok(());
        };
        let known = match self.known.as_slice() {
            [] => "there are none".to_owned(),
            known => format!("known are {}", known.join(", ")),
        };
        let what = format!("unknown parameter `{}{key}`; {known}", self.prefix);
        Err(RpcError::params(what))
    }

    /// What a parameter should have been.
    pub(crate) fn wrong(&self, key: &str, what: &str, value: &Value) -> RpcError {
        let mut shown = value.to_string();
        if shown.len() > 80 {
            let end = (0..=80).rev().find(|at| shown.is_char_boundary(*at));
            shown.truncate(end.unwrap_or(0));
            shown.push_str("...");
        }
        RpcError::params(format!(
            "`{}{key}` must be {what}, not {shown}",
            self.prefix
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn message<T: std::fmt::Debug>(result: Result<T, RpcError>) -> String {
        let error = result.unwrap_err();
        assert_eq!(error.code, -32602);
        error.message
    }

    #[test]
    fn parameters_are_named_in_errors() {
        let value = json!({ "nsid": "x", "more": 1, "address": { "port": 7 } });
        let mut params = Params::new(Some(value)).unwrap();
        assert_eq!(
            message(params.optional::<Nsid>("nsid")),
            "Invalid parameters: `nsid` must be a namespace identifier, 1 to 1024, not \"x\""
        );
        assert!(message(params.required::<String>("nqn")).contains("`nqn` is missing"));
        let address = params.object("address").unwrap().unwrap();
        assert!(message(address.end()).contains("unknown parameter `address.port`"));
        let left = message(params.end());
        assert!(left.contains("unknown parameter `more`"), "{left}");
        assert!(left.contains("nsid, nqn, address"), "{left}");
        assert!(message(Params::new(Some(json!([1])))).contains("an object"));
    }

    #[test]
    fn what_is_so_anyway_may_be_asked_for() {
        let mut params = Params::new(Some(json!({ "zcopy": false, "depth": 4 }))).unwrap();
        params.only(&[("zcopy", json!(false))], "no").unwrap();
        let refused = message(params.only(&[("depth", json!(8))], "it is 8"));
        assert!(refused.contains("`depth` = 4 is not possible: it is 8"));
        let mut params = Params::new(Some(json!({ "psk": "k", "label": null }))).unwrap();
        params.none(&["label", "other"], "no").unwrap();
        let refused = message(params.none(&["psk"], "there is no TLS"));
        assert!(refused.contains("`psk` cannot be set here: there is no TLS"));
    }
}
