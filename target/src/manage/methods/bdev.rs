//! `bdev_*`: block devices. SPDK's malloc is our RAM device; aio and uring are both our file device,
//! which goes through io_uring.

use flexblk_blockdev::{
    BdevConfig, Caps, DelayConfig, DirectMode, FileConfig, HugePagesMode, NullConfig, RamConfig,
};
use serde_json::{Value, json};
use uuid::Uuid;

use super::super::params::Params;
use super::{Context, Method, Result, RpcError, bdev_error, change, query};
use crate::bdevs::Bdev;

pub(super) const METHODS: &[Method] = &[
    query("bdev_get_bdevs", get_bdevs),
    query("bdev_wait_for_examine", |_, params| {
        params.end()?;
        Ok(true.into())
    }),
    change("bdev_malloc_create", |context, params| {
        create(context, malloc(params)?)
    }),
    change("bdev_malloc_delete", |context, params| {
        delete(context, params, "malloc", |config| {
            matches!(config, BdevConfig::Ram(_))
        })
    }),
    change("bdev_null_create", |context, params| {
        create(context, null(params)?)
    }),
    change("bdev_null_delete", |context, params| {
        delete(context, params, "null", |config| {
            matches!(config, BdevConfig::Null(_))
        })
    }),
    change("bdev_null_resize", null_resize),
    change("bdev_aio_create", |context, params| {
        create(context, aio(params)?)
    }),
    change("bdev_aio_delete", |context, params| {
        delete(context, params, "aio", is_file)
    }),
    change("bdev_aio_rescan", rescan),
    change("bdev_uring_create", |context, params| {
        create(context, uring(params)?)
    }),
    change("bdev_uring_delete", |context, params| {
        delete(context, params, "uring", is_file)
    }),
    change("bdev_uring_rescan", rescan),
    change("bdev_delay_create", |context, params| {
        create(context, delay(params)?)
    }),
    change("bdev_delay_delete", |context, params| {
        delete(context, params, "delay", |config| {
            matches!(config, BdevConfig::Delay(_))
        })
    }),
    change("bdev_delay_update_latency", update_latency),
    change("flexblk_bdev_create", any_create),
    change("flexblk_bdev_delete", |context, params| {
        delete(context, params, "block", |_| true)
    }),
    change("flexblk_bdev_resize", any_resize),
];

fn is_file(config: &BdevConfig) -> bool {
    matches!(config, BdevConfig::File(_))
}

pub(super) fn refused(error: crate::NamespaceError) -> RpcError {
    RpcError::bdev(&error)
}

fn create(context: &Context, config: BdevConfig) -> Result {
    let name = config.name().to_owned();
    context.target.create_bdev(config).map_err(refused)?;
    Ok(name.into())
}

pub(super) fn delete(
    context: &Context,
    mut params: Params,
    kind: &str,
    is_kind: impl Fn(&BdevConfig) -> bool,
) -> Result {
    let name: String = params.required("name")?;
    params.end()?;
    if !is_kind(&named(context, &name)?.config) {
        let what = format!("{name} is no {kind} device");
        return Err(RpcError::errno(libc::ENODEV, what));
    }
    context.target.delete_bdev(&name).map_err(refused)?;
    Ok(true.into())
}

/// The device of that name.
pub(super) fn named(context: &Context, name: &str) -> Result<Bdev> {
    let all = context.target.bdevs();
    let found = all.into_iter().find(|bdev| bdev.name() == name);
    found.ok_or_else(|| RpcError::errno(libc::ENODEV, format!("no block device is named {name}")))
}

/// Parameters about metadata and protection information, which devices here do not have.
fn no_metadata(params: &mut Params) -> Result<()> {
    params.only(
        &[
            ("md_size", 0.into()),
            ("md_interleave", false.into()),
            ("dif_type", 0.into()),
            ("dif_is_head_of_md", false.into()),
            ("dif_pi_format", 0.into()),
        ],
        "devices here have no metadata",
    )
}

fn block_size(params: &mut Params) -> Result<u32> {
    params.required("block_size")
}

fn malloc(mut params: Params) -> Result<BdevConfig> {
    let uuid: Option<Uuid> = params.optional("uuid")?;
    let uuid = uuid.unwrap_or_else(Uuid::new_v4);
    let name: Option<String> = params.optional("name")?;
    let block_size = block_size(&mut params)?;
    let num_blocks: u64 = params.required("num_blocks")?;
    let physical = block_size.into();
    params.only(&[("physical_block_size", physical)], "it is the block size")?;
    params.only(&[("optimal_io_boundary", 0.into())], "there is none")?;
    params.only(&[("numa_id", (-1).into())], "memory comes from where it is")?;
    no_metadata(&mut params)?;
    params.end()?;
    Ok(BdevConfig::Ram(RamConfig {
        // SPDK counts up; the identity cannot clash.
        name: name.unwrap_or_else(|| format!("Malloc-{}", uuid.simple())),
        block_size,
        size: None,
        num_blocks: Some(num_blocks),
        max_size: None,
        uuid: Some(uuid),
        hugepages: HugePagesMode::default(),
        atomic_blocks: true,
        depth: DEPTH,
    }))
}

/// The devices' own default.
const DEPTH: u32 = 1024;

fn null(mut params: Params) -> Result<BdevConfig> {
    let name = params.required("name")?;
    let block_size = block_size(&mut params)?;
    let num_blocks: u64 = params.required("num_blocks")?;
    let uuid = params.optional("uuid")?;
    let physical = block_size.into();
    params.only(&[("physical_block_size", physical)], "it is the block size")?;
    for key in [
        "preferred_write_alignment",
        "preferred_write_granularity",
        "optimal_write_size",
        "preferred_unmap_alignment",
        "preferred_unmap_granularity",
    ] {
        params.only(&[(key, 0.into())], "there is none")?;
    }
    no_metadata(&mut params)?;
    params.end()?;
    Ok(BdevConfig::Null(NullConfig {
        name,
        block_size,
        size: None,
        num_blocks: Some(num_blocks),
        uuid,
        read_zeroes: true,
    }))
}

fn aio(mut params: Params) -> Result<BdevConfig> {
    let readonly: Option<bool> = params.optional("readonly")?;
    // Files here can always give space back, and io_uring does not block the thread in any case.
    params.optional::<bool>("fallocate")?;
    params.optional::<bool>("nowait")?;
    file(params, readonly.unwrap_or(false))
}

fn uring(params: Params) -> Result<BdevConfig> {
    file(params, false)
}

fn file(mut params: Params, readonly: bool) -> Result<BdevConfig> {
    let name = params.required("name")?;
    let filename: String = params.required("filename")?;
    let block_size: Option<u32> = params.optional("block_size")?;
    let uuid = params.optional("uuid")?;
    params.end()?;
    Ok(BdevConfig::File(FileConfig {
        name,
        filename: filename.into(),
        // SPDK: 0 is the device's own.
        block_size: block_size.filter(|bytes| *bytes != 0),
        readonly,
        share_rw: false,
        direct: DirectMode::Auto,
        uuid,
        depth: DEPTH,
    }))
}

fn delay(mut params: Params) -> Result<BdevConfig> {
    let name = params.required("name")?;
    let base_bdev_name = params.required("base_bdev_name")?;
    let avg_read_latency = params.required("avg_read_latency")?;
    let p99_read_latency = Some(params.required("p99_read_latency")?);
    let avg_write_latency = params.required("avg_write_latency")?;
    let p99_write_latency = Some(params.required("p99_write_latency")?);
    let uuid = params.optional("uuid")?;
    params.end()?;
    Ok(BdevConfig::Delay(DelayConfig {
        name,
        base_bdev_name,
        uuid,
        seed: 0,
        avg_read_latency,
        p99_read_latency,
        avg_write_latency,
        p99_write_latency,
        flush_latency: 0,
        depth: DEPTH,
    }))
}

/// One latency of a delay device, for I/O that begins from now on. A p99 latency that was never said
/// follows its average.
fn update_latency(context: &Context, mut params: Params) -> Result {
    let name: String = params.required("delay_bdev_name")?;
    let word: String = params.required("latency_type")?;
    let us: u64 = params.required("latency_us")?;
    let BdevConfig::Delay(mut delay) = named(context, &name)?.config else {
        let what = format!("{name} is no delay device");
        return Err(RpcError::errno(libc::ENODEV, what));
    };
    match word.as_str() {
        "avg_read" => delay.avg_read_latency = us,
        "p99_read" => delay.p99_read_latency = Some(us),
        "avg_write" => delay.avg_write_latency = us,
        "p99_write" => delay.p99_write_latency = Some(us),
        _ => {
            let what = "avg_read, p99_read, avg_write or p99_write";
            return Err(params.wrong("latency_type", what, &word.into()));
        }
    }
    params.end()?;
    let changed = BdevConfig::Delay(delay);
    context.target.reconfigure_bdev(changed).map_err(refused)?;
    Ok(true.into())
}

/// Does the method with these parameters make the very device? Identity and size are in the
/// parameters anyway.
pub(crate) fn says_all(config: &BdevConfig, method: &str, given: &Value) -> bool {
    let made = Params::new(Some(given.clone())).and_then(|params| match method {
        "bdev_malloc_create" => malloc(params),
        "bdev_null_create" => null(params),
        "bdev_aio_create" => aio(params),
        "bdev_uring_create" => uring(params),
        "bdev_error_create" => bdev_error::config(params),
        _ => delay(params),
    });
    match (config, made) {
        (BdevConfig::Ram(old), Ok(BdevConfig::Ram(new))) => {
            let plain = RamConfig {
                size: new.size,
                num_blocks: new.num_blocks,
                uuid: new.uuid,
                ..old.clone()
            };
            plain == new
        }
        (BdevConfig::Null(old), Ok(BdevConfig::Null(new))) => old.read_zeroes == new.read_zeroes,
        (BdevConfig::File(old), Ok(BdevConfig::File(new))) => {
            (old.direct, old.depth, old.readonly, old.share_rw)
                == (new.direct, new.depth, new.readonly, new.share_rw)
        }
        (BdevConfig::Delay(old), Ok(BdevConfig::Delay(new))) => {
            let plain = DelayConfig {
                p99_read_latency: new.p99_read_latency,
                p99_write_latency: new.p99_write_latency,
                ..old.clone()
            };
            plain == new
        }
        (BdevConfig::Fault(old), Ok(BdevConfig::Fault(new))) => *old == new,
        _ => false,
    }
}

/// Mebibytes, as in SPDK.
fn null_resize(context: &Context, mut params: Params) -> Result {
    let name: String = params.required("name")?;
    let mebibytes: u64 = params.required("new_size")?;
    let bytes = mebibytes
        .checked_mul(1 << 20)
        .ok_or_else(|| params.wrong("new_size", "a number of mebibytes", &mebibytes.into()))?;
    params.end()?;
    if !matches!(named(context, &name)?.config, BdevConfig::Null(_)) {
        let what = format!("{name} is no null device (flexblk_bdev_resize takes any)");
        return Err(RpcError::errno(libc::ENODEV, what));
    }
    context.target.resize_bdev(&name, bytes).map_err(refused)?;
    Ok(true.into())
}

fn rescan(context: &Context, mut params: Params) -> Result {
    let name: String = params.required("name")?;
    params.end()?;
    if !is_file(&named(context, &name)?.config) {
        let what = format!("{name} is no file device");
        return Err(RpcError::errno(libc::ENODEV, what));
    }
    context.target.rescan_bdev(&name).map_err(refused)?;
    Ok(true.into())
}

/// Any device, as a `[[bdev]]` table of the TOML file. With `implicit` it is one that came with a
/// namespace, as by a short form, and goes with the last one on it.
fn any_create(context: &Context, mut params: Params) -> Result {
    let implicit: bool = params.optional("implicit")?.unwrap_or(false);
    let config: BdevConfig =
        serde_json::from_value(params.into_value()).map_err(RpcError::params)?;
    let name = config.name().to_owned();
    let created = context
        .target
        .change(|draft| draft.create_bdev(config, implicit).map(|_| ()));
    created.map_err(refused)?;
    Ok(name.into())
}

fn any_resize(context: &Context, mut params: Params) -> Result {
    let name: String = params.required("name")?;
    let bytes: u64 = params.required("size_bytes")?;
    params.end()?;
    named(context, &name)?;
    context.target.resize_bdev(&name, bytes).map_err(refused)?;
    Ok(true.into())
}

fn get_bdevs(context: &Context, mut params: Params) -> Result {
    let name: Option<String> = params.optional("name")?;
    // How long to wait for the device to appear: rpc.py always sends it, and nothing appears by itself.
    params.optional::<u64>("timeout")?;
    params.end()?;
    let snapshot = context.target.snapshot();
    let claimed = |id| {
        let mut all = snapshot
            .subsystems
            .iter()
            .flatten()
            .flat_map(|s| s.active());
        all.any(|namespace| namespace.device_id == id)
    };
    let bdevs = match name {
        Some(name) => vec![named(context, &name)?],
        None => context.target.bdevs(),
    };
    let shown: Vec<Value> = bdevs
        .iter()
        .map(|bdev| show(bdev, claimed(bdev.id)))
        .collect();
    Ok(shown.into())
}

fn show(bdev: &Bdev, claimed: bool) -> Value {
    let info = bdev.device.info();
    let has = |caps| info.caps.contains(caps);
    let writable = !has(Caps::READ_ONLY);
    let (product, driver) = match &bdev.config {
        BdevConfig::Ram(_) => ("Malloc disk", "malloc"),
        BdevConfig::Null(_) => ("Null disk", "null"),
        BdevConfig::File(_) => ("URING bdev", "uring"),
        BdevConfig::Delay(_) => ("delay", "delay"),
        BdevConfig::Fault(_) => ("Error Injection Disk", "error_disk"),
        _ => ("block device", "other"),
    };
    let mut members = serde_json::to_value(&bdev.config).unwrap_or_default();
    if let Some(members) = members.as_object_mut() {
        members.retain(|key, value| !matches!(key.as_str(), "type" | "name") && !value.is_null());
        if let BdevConfig::Fault(fault) = &bdev.config {
            // SPDK's word for it.
            members.insert("base_bdev".to_owned(), (*fault.base_bdev_name).into());
        }
    }
    let mut shown = json!({
        "name": bdev.name(),
        "aliases": [info.uuid],
        "product_name": product,
        "block_size": info.block_size,
        "num_blocks": info.block_count,
        "uuid": info.uuid,
        "assigned_rate_limits": {
            "rw_ios_per_sec": 0, "rw_mbytes_per_sec": 0, "r_mbytes_per_sec": 0,
            "w_mbytes_per_sec": 0,
        },
        "claimed": claimed,
        "zoned": false,
        "supported_io_types": {
            "read": true,
            "write": writable,
            "unmap": writable && has(Caps::DISCARD),
            "flush": has(Caps::FLUSH),
            "reset": false,
            "write_zeroes": writable,
            "compare": true,
            "copy": writable,
        },
        "driver_specific": {},
    });
    if claimed && let Some(members) = shown.as_object_mut() {
        members.insert("claim_type".to_owned(), "exclusive_write".into());
    }
    if let Some(specific) = shown
        .get_mut("driver_specific")
        .and_then(Value::as_object_mut)
    {
        specific.insert(driver.to_owned(), members);
    }
    shown
}
