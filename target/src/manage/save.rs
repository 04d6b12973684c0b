//! What runs, as the calls that make it: the shape of SPDK's `save_config`, which `load_config`
//! replays.

use flexblk_blockdev::BdevConfig;
use serde_json::{Value, json};

use super::methods::{ana, discovery, iostat, listeners, masking};
use crate::bdevs::Bdev;
use crate::config::AllowedHosts;
use crate::snapshot::Protection;
use crate::target::Target;

fn call(method: &str, params: Value) -> Value {
    json!({ "method": method, "params": params })
}

/// The block devices, a wrapper after its base, and their histograms.
pub(crate) fn bdevs(target: &Target) -> Vec<Value> {
    let bdevs = target.bdevs();
    let histograms = bdevs.iter().filter_map(|bdev| {
        let config = bdev.histogram.as_ref()?.config();
        let params = iostat::histogram_params(bdev.name(), config);
        Some(call("bdev_enable_histogram", params))
    });
    bdevs.iter().map(bdev).chain(histograms).collect()
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
                "name": name, "base_bdev_name": delay.base_bdev_name, "uuid": delay.uuid,
                "avg_read_latency": delay.avg_read_latency,
                "p99_read_latency": delay.p99_read_latency.unwrap_or(delay.avg_read_latency),
                "avg_write_latency": delay.avg_write_latency,
                "p99_write_latency": delay.p99_write_latency.unwrap_or(delay.avg_write_latency),
            }),
        )),
        BdevConfig::Fault(fault) => Some((
            "bdev_error_create",
            json!({ "base_name": fault.base_bdev_name, "uuid": fault.uuid }),
        )),
        _ => None,
    };
    // A device that came with a namespace goes with it: only ours says that.
    if !bdev.implicit
        && let Some((method, params)) = made
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
    let mut params = serde_json::to_value(config).unwrap_or_default();
    if bdev.implicit {
        params["implicit"] = true.into();
    }
    call("flexblk_bdev_create", params)
}

/// The discovery service, subsystems, hosts, namespaces and who sees them, listeners, ANA states.
pub(crate) fn nvmf(target: &Target) -> Vec<Value> {
    let snapshot = target.snapshot();
    let bdevs = target.bdevs();
    let subsystems = || snapshot.subsystems.iter().flatten();
    let mut calls: Vec<Value> = listeners::transports(target)
        .into_iter()
        .map(|transport| call("nvmf_create_transport", transport))
        .collect();
    if let Some(nqn) = &snapshot.discovery.nqn {
        let params = json!({ "nqn": nqn.as_str() });
        calls.push(call("flexblk_discovery_set_nqn", params));
    }
    for referral in &snapshot.discovery.referrals {
        let params = discovery::to_json(referral);
        calls.push(call("nvmf_discovery_add_referral", params));
    }
    for subsystem in subsystems() {
        let params = json!({
            "nqn": subsystem.nqn.as_str(),
            "ana_reporting": true,
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
            let (nqn, nsid) = (subsystem.nqn.as_str(), namespace.nsid.get());
            let params = json!({
                "nqn": nqn,
                "namespace": {
                    "nsid": nsid, "bdev_name": name, "uuid": namespace.uuid,
                    "anagrpid": namespace.anagrpid, "no_auto_visible": !namespace.hosts.any(),
                },
            });
            calls.push(call("nvmf_subsystem_add_ns", params));
            if let AllowedHosts::Only(hosts) = &namespace.hosts {
                for host in hosts {
                    let params = json!({ "nqn": nqn, "nsid": nsid, "host": host.as_str() });
                    calls.push(call("nvmf_ns_add_host", params));
                }
            }
            // Until Power Cycle ends with the program.
            if let Protection::Protect | Protection::Permanent = namespace.protection {
                let word = masking::protection_word(namespace.protection);
                let params = json!({ "nqn": nqn, "nsid": nsid, "write_protect": word });
                calls.push(call("flexblk_ns_set_write_protect", params));
            }
        }
    }
    let listeners = listeners::calls(&snapshot).into_iter();
    calls.extend(listeners.map(|(method, params)| call(method, params)));
    let ports = listeners::addresses(&snapshot, None);
    for subsystem in subsystems() {
        let states = ana::calls(subsystem, &ports).into_iter();
        calls.extend(states.map(|(method, params)| call(method, params)));
    }
    calls
}
