//! `spdk_*`, `rpc_*`, `framework_*`: the program itself.

use serde_json::{Value, json};

use super::super::params::Params;
use super::super::save;
use super::{Context, Method, Result, RpcError, change, names, query};

pub(super) const METHODS: &[Method] = &[
    query("spdk_get_version", version),
    query("rpc_get_methods", methods),
    change("spdk_kill_instance", kill),
    // The target serves as soon as it answers.
    query("framework_wait_init", nothing),
    query("framework_get_subsystems", subsystems),
    query("framework_get_config", config),
];

fn nothing(_: &Context, params: Params) -> Result {
    params.end()?;
    Ok(true.into())
}

fn version(_: &Context, params: Params) -> Result {
    params.end()?;
    let number = |text: &str| text.parse::<u32>().unwrap_or(0);
    Ok(json!({
        "version": concat!("flexblk v", env!("CARGO_PKG_VERSION")),
        "fields": {
            "major": number(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": number(env!("CARGO_PKG_VERSION_MINOR")),
            "patch": number(env!("CARGO_PKG_VERSION_PATCH")),
            "suffix": env!("CARGO_PKG_VERSION_PRE"),
        },
    }))
}

fn methods(_: &Context, mut params: Params) -> Result {
    // Every method can be called at any time, and none has another name.
    params.optional::<bool>("current")?;
    params.optional::<bool>("include_aliases")?;
    params.end()?;
    Ok(names().into())
}

fn kill(context: &Context, mut params: Params) -> Result {
    let name: String = params.required("sig_name")?;
    let what = "SIGINT, SIGTERM, SIGQUIT, SIGHUP, SIGKILL or SIGUSR1";
    let signal = match name.as_str() {
        "SIGINT" => libc::SIGINT,
        "SIGTERM" => libc::SIGTERM,
        "SIGQUIT" => libc::SIGQUIT,
        "SIGHUP" => libc::SIGHUP,
        "SIGKILL" => libc::SIGKILL,
        "SIGUSR1" => libc::SIGUSR1,
        _ => return Err(params.wrong("sig_name", what, &name.as_str().into())),
    };
    params.end()?;
    let Some(send) = &context.signal else {
        let what = "the target runs inside another program, which gets no signals from here";
        return Err(RpcError::internal(what));
    };
    send(signal);
    Ok(true.into())
}

/// SPDK's subsystems that have a configuration here: devices, then what exports them.
fn subsystems(_: &Context, params: Params) -> Result {
    params.end()?;
    Ok(json!([
        { "subsystem": "bdev", "depends_on": [] },
        { "subsystem": "nvmf", "depends_on": ["bdev"] },
    ]))
}

fn config(context: &Context, mut params: Params) -> Result {
    let name: String = params.required("name")?;
    // Batches group calls that may run side by side; here they run one after the other anyway.
    params.optional::<bool>("with_batches")?;
    params.end()?;
    match name.as_str() {
        "bdev" => Ok(Value::Array(save::bdevs(&context.target))),
        "nvmf" => Ok(Value::Array(save::nvmf(&context.target))),
        _ => Err(RpcError::params(format!(
            "Subsystem '{name}' not found; there are bdev and nvmf"
        ))),
    }
}
