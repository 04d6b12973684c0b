//! What is done with block devices: `bdev_get_iostat`, histograms of latencies. Ticks are microseconds.

use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde_json::{Map, Value, json};

use super::super::params::Params;
use super::bdev::named;
use super::{Context, Method, Result, RpcError, change, query};
use crate::bdevs::Bdev;
use crate::histogram::{HistogramConfig, LatencyHistogram, TICK_RATE};
use crate::iostat::{Class, Failure, IoNumbers, IoType, Reset};

pub(super) const METHODS: &[Method] = &[
    query("bdev_get_iostat", get_iostat),
    // Changes only what the next answer is counted from; the state file has nothing of it.
    query("bdev_reset_iostat", reset_iostat),
    change("bdev_enable_histogram", enable_histogram),
    query("bdev_get_histogram", get_histogram),
    query("bdev_get_histogram_borders", get_borders),
];

/// Most borders that are taken, as in SPDK.
const MAX_BORDERS: usize = 256;

fn get_iostat(context: &Context, mut params: Params) -> Result {
    let names: Option<Vec<String>> = params.optional("names")?;
    let per_channel: bool = params.optional("per_channel")?.unwrap_or(false);
    let mode: Option<String> = params.optional("reset_mode")?;
    let reset = reset_mode(&params, "reset_mode", mode.as_deref().unwrap_or("none"))?;
    params.end()?;
    let bdevs = match &names {
        Some(names) => {
            let named = names.iter().map(|name| named(context, name));
            named.collect::<Result<Vec<Bdev>>>()?
        }
        None => context.target.bdevs(),
    };
    let ticks = context.target.uptime().as_micros() as u64;
    if per_channel {
        let ([bdev], Some(_)) = (bdevs.as_slice(), names) else {
            let what = "`per_channel` is for one device, which `names` says";
            return Err(RpcError::params(what));
        };
        let threads = bdev.stats.read(reset).into_iter().enumerate();
        let channels = threads.map(|(thread, numbers)| {
            // As in thread_get_stats.
            shown(&numbers, Map::from_iter([id("thread_id", thread + 1)]))
        });
        return Ok(json!({
            "tick_rate": TICK_RATE, "ticks": ticks, "name": bdev.name(),
            "channels": channels.collect::<Vec<_>>(),
        }));
    }
    let whole = bdevs.iter().map(|bdev| {
        let threads = bdev.stats.read(reset);
        let sum = threads
            .iter()
            .fold(IoNumbers::default(), |sum, thread| sum.plus(thread));
        shown(&sum, Map::from_iter([id("name", bdev.name())]))
    });
    Ok(json!({
        "tick_rate": TICK_RATE, "ticks": ticks, "bdevs": whole.collect::<Vec<_>>(),
    }))
}

fn id(key: &str, value: impl Into<Value>) -> (String, Value) {
    (key.to_owned(), value.into())
}

/// Numbers under SPDK's names, behind whose they are.
fn shown(numbers: &IoNumbers, mut members: Map<String, Value>) -> Value {
    let names = [
        (Class::Read, "bytes_read", "read"),
        (Class::Write, "bytes_written", "write"),
        (Class::Unmap, "bytes_unmapped", "unmap"),
        (Class::Copy, "bytes_copied", "copy"),
    ];
    let of = |class: Class| numbers.classes.get(class as usize).copied();
    for (class, bytes, word) in names {
        let class = of(class).unwrap_or_default();
        members.insert(bytes.to_owned(), class.bytes.into());
        members.insert(format!("num_{word}_ops"), class.operations.into());
    }
    for (class, _, word) in names {
        let class = of(class).unwrap_or_default();
        let (shortest, longest) = class.range_us.unwrap_or_default();
        members.insert(format!("{word}_latency_ticks"), class.time_us.into());
        members.insert(format!("max_{word}_latency_ticks"), longest.into());
        members.insert(format!("min_{word}_latency_ticks"), shortest.into());
    }
    let failures = [
        (Failure::Failed, "failed"),
        (Failure::Miscompare, "miscompare"),
        (Failure::Aborted, "aborted"),
    ];
    let failed = failures.into_iter().filter_map(|(failure, name)| {
        let count = *numbers.failures.get(failure as usize)?;
        (count != 0).then(|| id(name, count))
    });
    let failed: Map<String, Value> = failed.collect();
    members.insert("io_error".to_owned(), failed.into());
    members.into()
}

fn reset_mode(params: &Params, key: &str, mode: &str) -> Result<Reset> {
    Ok(match mode {
        "all" => Reset::All,
        "maxmin" => Reset::MaxMin,
        "error" => Reset::Error,
        "none" => Reset::None,
        _ => return Err(params.wrong(key, "all, maxmin, error or none", &mode.into())),
    })
}

fn reset_iostat(context: &Context, mut params: Params) -> Result {
    let name: Option<String> = params.optional("name")?;
    let mode: Option<String> = params.optional("mode")?;
    let reset = reset_mode(&params, "mode", mode.as_deref().unwrap_or("all"))?;
    params.end()?;
    let bdevs = match name {
        Some(name) => vec![named(context, &name)?],
        None => context.target.bdevs(),
    };
    for bdev in bdevs {
        bdev.stats.read(reset);
    }
    Ok(true.into())
}

fn enable_histogram(context: &Context, mut params: Params) -> Result {
    let usual = HistogramConfig::default();
    let name: String = params.required("name")?;
    let enable: bool = params.required("enable")?;
    let opc: Option<String> = params.optional("opc")?;
    let granularity: Option<u64> = params.optional("granularity")?;
    let min_ns: Option<u64> = params.optional("min_nsec")?;
    let max_ns: Option<u64> = params.optional("max_nsec")?;
    let granularity = granularity.unwrap_or(usual.granularity.into());
    let config = HistogramConfig {
        io_type: match opc {
            Some(word) => Some(io_type(&params, &word)?),
            None => None,
        },
        granularity: u8::try_from(granularity)
            .map_err(|_| params.wrong("granularity", "a number of 8 bits", &granularity.into()))?,
        min_ns: min_ns.unwrap_or(usual.min_ns),
        max_ns: max_ns.unwrap_or(usual.max_ns),
    };
    params.end()?;
    let set = context
        .target
        .set_histogram(&name, enable.then_some(config));
    set.map_err(|error| RpcError::bdev(&error))?;
    Ok(true.into())
}

fn io_type(params: &Params, word: &str) -> Result<IoType> {
    let all = IoType::ALL;
    let found = all.into_iter().find(|io_type| io_type.name() == word);
    found.ok_or_else(|| {
        let names = all.map(IoType::name).join(", ");
        params.wrong("opc", &format!("one of {names}"), &word.into())
    })
}

/// The parameters with which [`enable_histogram`] makes the same again.
pub(crate) fn histogram_params(name: &str, config: &HistogramConfig) -> Value {
    let mut params = json!({
        "name": name, "enable": true, "granularity": config.granularity,
        "min_nsec": config.min_ns, "max_nsec": config.max_ns,
    });
    if let (Some(io_type), Some(members)) = (config.io_type, params.as_object_mut()) {
        members.insert("opc".to_owned(), io_type.name().into());
    }
    params
}

fn histogram_of(context: &Context, name: &str) -> Result<std::sync::Arc<LatencyHistogram>> {
    let histogram = named(context, name)?.histogram;
    histogram.ok_or_else(|| {
        let what = format!("{name} has no histogram; bdev_enable_histogram makes one");
        RpcError::errno(libc::ENODATA, what)
    })
}

fn get_histogram(context: &Context, mut params: Params) -> Result {
    let name: String = params.required("name")?;
    params.end()?;
    let histogram = histogram_of(context, &name)?;
    let counts = histogram.sum();
    let bytes: Vec<u8> = counts
        .iter()
        .flat_map(|count| count.to_le_bytes())
        .collect();
    let layout = histogram.layout();
    Ok(json!({
        "histogram": BASE64_STANDARD.encode(&bytes),
        "granularity": layout.granularity,
        "min_range": layout.min_range,
        "max_range": layout.max_range,
        "tsc_rate": TICK_RATE,
    }))
}

/// I/Os that took at most so many microseconds, for each border, and all of them.
fn get_borders(context: &Context, mut params: Params) -> Result {
    let name: String = params.required("name")?;
    let borders: Vec<u64> = params.required("borders")?;
    params.end()?;
    if borders.is_empty() || borders.len() > MAX_BORDERS || !borders.is_sorted() {
        let what = format!("`borders` must be 1 to {MAX_BORDERS} numbers in ascending order");
        return Err(RpcError::params(what));
    }
    let histogram = histogram_of(context, &name)?;
    Ok(json!({ "borders_count": histogram.up_to(&borders) }))
}
