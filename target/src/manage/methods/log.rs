//! `log_*`.

use serde_json::{Map, Value};

use super::super::log::{LogControl, LogLevel};
use super::super::params::Params;
use super::{Context, Method, Result, RpcError, change, query};

pub(super) const METHODS: &[Method] = &[
    query("log_get_level", get_level),
    change("log_set_level", set_level),
    // There is one log: what SPDK prints is what it logs.
    query("log_get_print_level", get_level),
    change("log_set_print_level", set_level),
    query("log_get_flags", get_flags),
    change("log_set_flag", |context, params| {
        set_flag(context, params, true)
    }),
    change("log_clear_flag", |context, params| {
        set_flag(context, params, false)
    }),
];

fn control(context: &Context) -> Result<&LogControl> {
    let none = || RpcError::internal("the program around the target keeps the log to itself");
    context.log.as_deref().ok_or_else(none)
}

fn get_level(context: &Context, params: Params) -> Result {
    params.end()?;
    Ok(control(context)?.level().name().into())
}

fn set_level(context: &Context, mut params: Params) -> Result {
    let word: String = params.required("level")?;
    let what = "ERROR, WARNING, NOTICE, INFO or DEBUG";
    let level = LogLevel::parse(&word)
        .ok_or_else(|| params.wrong("level", what, &Value::from(word.as_str())))?;
    params.end()?;
    control(context)?
        .set_level(level)
        .map_err(RpcError::internal)?;
    Ok(true.into())
}

fn get_flags(context: &Context, params: Params) -> Result {
    params.end()?;
    let flags = control(context)?.flags();
    let members: Map<String, Value> = flags
        .into_iter()
        .map(|(flag, on)| (flag.to_owned(), on.into()))
        .collect();
    Ok(members.into())
}

fn set_flag(context: &Context, mut params: Params, on: bool) -> Result {
    let flag: String = params.required("flag")?;
    let unknown = params.wrong(
        "flag",
        "one that log_get_flags lists, or all",
        &flag.as_str().into(),
    );
    params.end()?;
    match control(context)?.set_flag(&flag, on) {
        Ok(true) => Ok(true.into()),
        Ok(false) => Err(unknown),
        Err(error) => Err(RpcError::internal(error)),
    }
}
