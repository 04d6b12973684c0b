//! I/O by host and namespace, slow commands, tracing.

use flexblk_nvme::Nqn;
use serde_json::{Value, json};

use super::super::params::Params;
use super::{Context, Method, Result, RpcError, query};
use crate::metrics::{BOUNDS_US, Numbers, Operation, Stage};

pub(super) const METHODS: &[Method] = &[
    query("flexblk_get_io", get_io),
    query("flexblk_set_slow_io", set_slow_io),
    query("flexblk_trace_host", trace_host),
];

/// Everything that is counted of each host on each namespace, for `flexblk top`.
fn get_io(context: &Context, params: Params) -> Result {
    params.end()?;
    let bdevs = context.target.bdevs();
    let sums = context.target.metrics().sum();
    let series = sums.iter().map(|(series, operations)| {
        let bdev = bdevs.iter().find(|bdev| bdev.id == series.device_id);
        let mut shown = json!({
            "host": series.host,
            "subsystem": series.subsystem,
            "nsid": series.nsid,
            "bdev_name": bdev.map(|bdev| bdev.name().to_owned()),
        });
        if let Some(members) = shown.as_object_mut() {
            for (operation, numbers) in Operation::ALL.iter().zip(operations) {
                members.insert(operation.name().to_owned(), show(numbers));
            }
        }
        shown
    });
    Ok(json!({
        "ticks": context.target.uptime().as_micros() as u64,
        "bounds_us": BOUNDS_US,
        "series": series.collect::<Vec<_>>(),
    }))
}

fn show(numbers: &Numbers) -> Value {
    let mut shown = json!({
        "commands": numbers.commands,
        "bytes": numbers.bytes,
        "failed": numbers.failed,
    });
    if let Some(members) = shown.as_object_mut() {
        for (stage, times) in Stage::ALL.iter().zip(&numbers.stages) {
            let value = json!({ "sum_us": times.sum_us, "buckets": times.buckets });
            members.insert(stage.name().to_owned(), value);
        }
    }
    shown
}

/// Logs commands that take at least so long; 0 logs none.
fn set_slow_io(context: &Context, mut params: Params) -> Result {
    let us: u32 = params.required("threshold_us")?;
    params.end()?;
    context
        .target
        .metrics()
        .set_slow_us((us != 0).then_some(us));
    Ok(true.into())
}

fn trace_host(context: &Context, mut params: Params) -> Result {
    let host: Nqn = params.required("host")?;
    let enable: bool = params.required("enable")?;
    params.end()?;
    context
        .target
        .trace_host(&host, enable)
        .map_err(RpcError::internal)?;
    Ok(true.into())
}
