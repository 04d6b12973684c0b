//! `flexblk info`.

use anyhow::Result;
use flexblk_initiator::{Controller, Namespace};
use flexblk_nvme::property::Vs;
use flexblk_nvme::text::trim_ascii;
use serde_json::json;

use crate::args;
use crate::connect;
use crate::size::human;

/// Shows the controller and its namespaces.
pub(crate) fn info(args: &args::Info) -> Result<()> {
    let options = connect::options(&args.address, &args.connection, false)?;
    let controller = Controller::connect(&options)?;
    let mut namespaces = controller.namespaces();
    if let Some(nsid) = options.target.nsid {
        namespaces = vec![controller.namespace(nsid)?];
    }
    if args.json {
        println!("{:#}", json_of(&controller, &namespaces));
    } else {
        print(&controller, &namespaces);
    }
    Ok(())
}

fn print(controller: &Controller, namespaces: &[Namespace]) {
    let id = controller.identify();
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.add_row(["subsystem", controller.subnqn().as_str()]);
    table.add_row(["address", &controller.address().to_string()]);
    table.add_row(["model", &trim_ascii(&id.mn)]);
    table.add_row(["serial", &trim_ascii(&id.sn)]);
    table.add_row(["firmware", &trim_ascii(&id.fr)]);
    table.add_row(["NVMe version", &Vs::from_bits(id.ver.get()).to_string()]);
    table.add_row(["controller id", &controller.cntlid().to_string()]);
    table.add_row([
        "I/O queues",
        &format!(
            "{} of depth {} at most",
            controller.granted_io_queues(),
            controller.max_queue_depth()
        ),
    ]);
    table.add_row([
        "largest transfer",
        &human(u64::from(controller.max_transfer_bytes())),
    ]);
    println!("{table}");
    println!();
    if namespaces.is_empty() {
        println!("no active namespace");
        return;
    }
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["nsid", "size", "block", "blocks", "uuid", "features"]);
    for namespace in namespaces {
        table.add_row([
            namespace.nsid.to_string(),
            human(namespace.len_bytes()),
            namespace.block_size.to_string(),
            namespace.block_count.to_string(),
            namespace
                .uuid
                .map(|uuid| uuid.to_string())
                .unwrap_or_else(|| "-".into()),
            features(namespace).join(" "),
        ]);
    }
    println!("{table}");
}

fn features(namespace: &Namespace) -> Vec<&'static str> {
    [
        (namespace.read_only, "read-only"),
        (namespace.discard, "discard"),
        (namespace.write_zeroes, "write-zeroes"),
        (namespace.compare, "compare"),
        (namespace.verify, "verify"),
        (namespace.volatile_write_cache, "write-cache"),
    ]
    .into_iter()
    .filter_map(|(has, name)| has.then_some(name))
    .collect()
}

fn json_of(controller: &Controller, namespaces: &[Namespace]) -> serde_json::Value {
    let id = controller.identify();
    let namespaces: Vec<_> = namespaces
        .iter()
        .map(|namespace| {
            json!({
                "nsid": namespace.nsid.get(),
                "block_size": namespace.block_size,
                "block_count": namespace.block_count,
                "size_bytes": namespace.len_bytes(),
                "uuid": namespace.uuid.map(|uuid| uuid.to_string()),
                "nguid": hex(&namespace.nguid),
                "eui64": hex(&namespace.eui64),
                "max_transfer_bytes": namespace.max_transfer_bytes,
                "optimal_io_bytes": namespace.optimal_io_bytes,
                "features": features(namespace),
            })
        })
        .collect();
    json!({
        "subnqn": controller.subnqn().to_string(),
        "address": controller.address().to_string(),
        "model": trim_ascii(&id.mn),
        "serial": trim_ascii(&id.sn),
        "firmware": trim_ascii(&id.fr),
        "version": Vs::from_bits(id.ver.get()).to_string(),
        "cntlid": controller.cntlid().get(),
        "io_queues": controller.granted_io_queues(),
        "max_queue_depth": controller.max_queue_depth(),
        "max_transfer_bytes": controller.max_transfer_bytes(),
        "namespaces": namespaces,
    })
}

/// Bytes as hexadecimal; `None` when all are zero (not reported).
fn hex(bytes: &[u8]) -> Option<String> {
    bytes
        .iter()
        .any(|byte| *byte != 0)
        .then(|| bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
