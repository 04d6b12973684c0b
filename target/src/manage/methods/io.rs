//! I/O by host and device, slow commands, tracing.

use std::collections::BTreeMap;

use flexblk_nvme::Nqn;
use serde_json::{Value, json};

use super::super::params::Params;
use super::{Context, Method, Result, RpcError, query};
use crate::association::lock;
use crate::metrics::{BOUNDS_US, Numbers, Operation, Stage};

pub(super) const METHODS: &[Method] = &[
    query("bdev_get_iostat", get_iostat),
    // Changes only what the next answer is counted from; the state file has nothing of it.
    query("bdev_reset_iostat", reset_iostat),
    query("flexblk_get_io", get_io),
    query("flexblk_set_slow_io", set_slow_io),
    query("flexblk_trace_host", trace_host),
];

/// What was counted when the numbers were last reset, by device.
pub(crate) type Baseline = BTreeMap<u64, DeviceNumbers>;

/// Numbers of a device over all hosts: reads, then writes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DeviceNumbers {
    commands: [u64; 2],
    bytes: [u64; 2],
    time_us: [u64; 2],
}

fn by_device(context: &Context) -> Baseline {
    let mut devices = Baseline::new();
    for (series, operations) in context.target.metrics().sum() {
        let device = devices.entry(series.device_id).or_default();
        for (at, numbers) in operations.iter().take(2).enumerate() {
            let total = numbers.stages.first().map_or(0, |times| times.sum_us);
            let sums = [
                (&mut device.commands, numbers.commands),
                (&mut device.bytes, numbers.bytes),
                (&mut device.time_us, total),
            ];
            for (sum, value) in sums {
                if let Some(sum) = sum.get_mut(at) {
                    *sum += value;
                }
            }
        }
    }
    devices
}

fn get_iostat(context: &Context, mut params: Params) -> Result {
    let names: Option<Vec<String>> = params.optional("names")?;
    params.only(
        &[("per_channel", false.into())],
        "numbers are of the whole device",
    )?;
    let reset: Option<String> = params.optional("reset_mode")?;
    let reset = reset_mode(&params, reset.as_deref().unwrap_or("none"))?;
    params.end()?;
    let bdevs = context.target.bdevs();
    if let Some(name) = names
        .iter()
        .flatten()
        .find(|name| bdevs.iter().all(|bdev| bdev.name() != name.as_str()))
    {
        let what = format!("no block device is named {name}");
        return Err(RpcError::errno(libc::ENODEV, what));
    }
    let now = by_device(context);
    let mut baseline = lock(&context.iostat_baseline);
    let mut shown = Vec::new();
    for bdev in &bdevs {
        if names
            .as_ref()
            .is_some_and(|names| !names.iter().any(|name| name == bdev.name()))
        {
            continue;
        }
        let is = now.get(&bdev.id).copied().unwrap_or_default();
        let was = baseline.get(&bdev.id).copied().unwrap_or_default();
        let [reads, writes] = difference(is.commands, was.commands);
        let [bytes_read, bytes_written] = difference(is.bytes, was.bytes);
        let [read_us, write_us] = difference(is.time_us, was.time_us);
        shown.push(json!({
            "name": bdev.name(),
            "bytes_read": bytes_read,
            "num_read_ops": reads,
            "bytes_written": bytes_written,
            "num_write_ops": writes,
            "read_latency_ticks": read_us,
            "write_latency_ticks": write_us,
        }));
        if reset {
            baseline.insert(bdev.id, is);
        }
    }
    let ticks = context.target.uptime().as_micros() as u64;
    Ok(json!({ "tick_rate": 1_000_000, "ticks": ticks, "bdevs": shown }))
}

fn difference(is: [u64; 2], was: [u64; 2]) -> [u64; 2] {
    let [first, second] = is;
    let [first_was, second_was] = was;
    [
        first.saturating_sub(first_was),
        second.saturating_sub(second_was),
    ]
}

/// `all`, or `maxmin`, of which there are none to reset.
fn reset_mode(params: &Params, mode: &str) -> Result<bool> {
    match mode {
        "all" => Ok(true),
        "maxmin" | "none" => Ok(false),
        _ => Err(params.wrong("reset_mode", "all, maxmin or none", &mode.into())),
    }
}

fn reset_iostat(context: &Context, mut params: Params) -> Result {
    let name: Option<String> = params.optional("name")?;
    let mode: Option<String> = params.optional("mode")?;
    let reset = reset_mode(&params, mode.as_deref().unwrap_or("all"))?;
    params.end()?;
    let bdevs = context.target.bdevs();
    let chosen: Vec<u64> = bdevs
        .iter()
        .filter(|bdev| name.as_ref().is_none_or(|name| bdev.name() == name))
        .map(|bdev| bdev.id)
        .collect();
    if let Some(name) = name.filter(|_| chosen.is_empty()) {
        let what = format!("no block device is named {name}");
        return Err(RpcError::errno(libc::ENODEV, what));
    }
    if reset {
        let mut now = by_device(context);
        now.retain(|id, _| chosen.contains(id));
        lock(&context.iostat_baseline).extend(now);
    }
    Ok(true.into())
}

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
