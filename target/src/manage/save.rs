//! What runs, as the calls that make it: the shape of SPDK's `save_config`, which `load_config`
//! replays.

use flexblk_blockdev::BdevConfig;
use serde_json::{Value, json};

use super::methods::listeners;
use crate::bdevs::Bdev;
use crate::target::Target;

fn call(method: &str, params: Value) -> Value {
    json!({ "method": method, "params": params })
}

/// The block devices, a wrapper after its base.
pub(crate) fn bdevs(target: &Target) -> Vec<Value> {
    target.bdevs().iter().map(bdev).collect()
}

/// SPDK's method when it can say everything about the device, ours when not. The device's identity
/// goes with it, so that hosts find the same namespace after a restart.
fn bdev(bdev: &Bdev) -> Value {
    let info = bdev.device.info();
    let (name, uuid) = (bdev.name(), info.uuid);
    let made = match &bdev.config {
        BdevConfig::Ram(_) => Some((
            "bdev_malloc_create",
            json!({
                "name": name, "block_size": info.block_size, "num_blocks": info.block_count,
                "uuid": uuid,
            }),
        )),
        BdevConfig::Null(_) => Some((
            "bdev_null_create",
            json!({
                "name": name, "block_size": info.block_size, "num_blocks": info.block_count,
                "uuid": uuid,
            }),
        )),
        BdevConfig::File(file) if file.readonly => Some((
            "bdev_aio_create",
            json!({
                "name": name, "filename": file.filename, "block_size": info.block_size,
                "readonly": true, "uuid": uuid,
            }),
        )),
        BdevConfig::File(file) => Some((
            "bdev_uring_create",
            json!({
                "name": name, "filename": file.filename, "block_size": info.block_size,
                "uuid": uuid,
            }),
        )),
        BdevConfig::Delay(delay) => Some((
            "bdev_delay_create",
            json!({
                "name": name, "base_bdev_name": delay.base_bdev_name,
                "avg_read_latency": delay.avg_read_latency,
                "p99_read_latency": delay.p99_read_latency.unwrap_or(delay.avg_read_latency),
                "avg_write_latency": delay.avg_write_latency,
                "p99_write_latency": delay.p99_write_latency.unwrap_or(delay.avg_write_latency),
            }),
        )),
        _ => None,
    };
    if let Some((method, params)) = made
        && super::methods::says_all(&bdev.config, method, &params)
    {
        return call(method, params);
    }
    let mut config = bdev.config.clone();
    match &mut config {
        BdevConfig::Ram(ram) => {
            ram.uuid = Some(uuid);
            (ram.size, ram.num_blocks) = (None, Some(info.block_count));
        }
        BdevConfig::Null(null) => {
            null.uuid = Some(uuid);
            (null.size, null.num_blocks) = (None, Some(info.block_count));
        }
        BdevConfig::File(file) => file.uuid = Some(uuid),
        _ => {}
    }
    call(
        "flexblk_bdev_create",
        serde_json::to_value(config).unwrap_or_default(),
    )
}

/// Subsystems, hosts, namespaces, listeners.
pub(crate) fn nvmf(target: &Target) -> Vec<Value> {
    let snapshot = target.snapshot();
    let bdevs = target.bdevs();
    let subsystems = || snapshot.subsystems.iter().flatten();
    let mut calls: Vec<Value> = listeners::transports(target)
        .into_iter()
        .map(|transport| call("nvmf_create_transport", transport))
        .collect();
    for subsystem in subsystems() {
        let params = json!({
            "nqn": subsystem.nqn.as_str(),
            "allow_any_host": subsystem.hosts.any(),
            "serial_number": &*subsystem.serial,
            "model_number": &*subsystem.model,
        });
        calls.push(call("nvmf_create_subsystem", params));
    }
    for subsystem in subsystems() {
        for host in subsystem.hosts.names() {
            let params = json!({ "nqn": subsystem.nqn.as_str(), "host": host.as_str() });
            calls.push(call("nvmf_subsystem_add_host", params));
        }
    }
    for subsystem in subsystems() {
        for namespace in subsystem.active() {
            let bdev = bdevs.iter().find(|bdev| bdev.id == namespace.device_id);
            let name = bdev.map_or(&*namespace.info.name, Bdev::name);
            let params = json!({
                "nqn": subsystem.nqn.as_str(),
                "namespace": {
                    "nsid": namespace.nsid.get(), "bdev_name": name, "uuid": namespace.uuid,
                },
            });
            calls.push(call("nvmf_subsystem_add_ns", params));
        }
    }
    for subsystem in subsystems() {
        for address in listeners::addresses(target) {
            let params = json!({
                "nqn": subsystem.nqn.as_str(), "listen_address": address.to_json(),
            });
            calls.push(call("nvmf_subsystem_add_listener", params));
        }
    }
    calls
}
